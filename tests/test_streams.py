"""Standard output and error that cannot end the work: closed, full, read by nobody, or of a poor encoding."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys
from stn_pipeline import cli
from stn_pipeline.errors import StnError

def work(argv):
    for at in range(2000):
        print("−0.5 é \\ud800", at)
        print("−0.5", at, file=sys.stderr)
    with open("made", "x") as file:
        file.write(str(file.fileno()))
    if argv:
        raise StnError(argv[0])

cli.run(work)
"""


def run(folder, redirection: str, *argv: str, **environment: str) -> int:
    command = f'"{sys.executable}" -c "$PROGRAM" "$@" {redirection}'
    given = os.environ | {"PYTHONPATH": str(ROOT), "PROGRAM": PROGRAM} | environment
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}", "-", *argv], cwd=folder, env=given, timeout=60).returncode


@pytest.mark.parametrize("redirection", [">&- 2>&-", "> /dev/full 2> /dev/full", "2>&1 | head -1 > out", "> out 2>&1 < /dev/null"])
def test_the_work_is_done_and_its_exit_code_kept_whatever_becomes_of_its_words(tmp_path, redirection):
    assert run(tmp_path, redirection) == 0
    assert int((tmp_path / "made").read_text()) > 2  # no file of ours has the number of a closed stream
    (tmp_path / "made").unlink()
    assert run(tmp_path, redirection, "it failed") == 1


def test_a_poor_encoding_costs_the_characters_it_lacks(tmp_path):
    assert run(tmp_path, "> out 2> err", "a\x1b]0;x\x07 b", PYTHONIOENCODING="iso-8859-1") == 1
    assert (tmp_path / "out").read_bytes().startswith(b"\\u22120.5 \xe9 \\ud800 0\n")
    assert (tmp_path / "err").read_text().splitlines()[-1] == r"error: a\x1b]0;x\x07 b"
