"""The kernel cache: what is not the user's own, or not whole, is never loaded; compilers of every kind, also such as fail or hang."""

import ctypes
import os
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stn_pipeline import compiler
from stn_pipeline.compiler import CompilerError, Program, compile_programs, is_compiled, library
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ConfigError
from stn_pipeline.model import build
from stn_pipeline.training import engine
from tests.conftest import ROOT

REAL = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(REAL is None, reason="no C++ compiler")
CACHES = (compiler._compiler, compiler._machine, compiler._name, compiler._load)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of the kernels in an empty cache, not made yet."""

    def forget() -> None:
        compiler._hung.clear()
        for each in CACHES:
            each.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield tmp_path / "cache" / "stn_pipeline" / "kernels"
    forget()


@pytest.fixture
def program(tmp_path) -> Program:
    """A program whose answer is its macro; it takes as good as nothing to compile."""
    source = tmp_path / "program.cpp"
    source.write_text('extern "C" int answer() { return ANSWER; }\n')
    return Program(source, (("ANSWER", 42),))


def in_another_process(program: Program, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load a program where nothing is loaded yet, and print its answer."""
    code = (
        "import sys; from pathlib import Path; from stn_pipeline.compiler import Program, library; "
        f"print(library(Program(Path({str(program.source)!r}), {program.macros!r})).answer())"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


# What lies in the cache


def test_what_is_compiled_is_not_compiled_again(program, monkeypatch):
    assert not is_compiled([program]) and library(program).answer() == 42
    monkeypatch.setattr(subprocess, "Popen", None)
    compile_programs([program])
    assert is_compiled([program])


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_the_cache_is_the_users_alone_whatever_the_umask(program, cache, mask):
    before = os.umask(mask)
    try:
        compile_programs([program])
    finally:
        os.umask(before)
    assert is_compiled([program])
    for path in (cache, cache.parent, compiler._library(program)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert sorted(path.name for path in cache.iterdir()) == sorted(["lock", compiler._library(program).name])


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[random.Random(0).randrange(len(changed))] ^= 1
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "truncated": truncated,
    "its last byte": lambda content: content[:-1],
    "flipped": flipped,
    "a hole": lambda content: content[:4096] + bytes(512) + content[4608:],
    "more": lambda content: content + b"\0",
    "of an earlier version": lambda content: content[: content.rindex(compiler.MARK)],
    "text": lambda content: b"hello\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_compiled_again_and_never_loaded(program, damage):
    compile_programs([program])
    path = compiler._library(program)
    good = path.read_bytes()
    path.unlink()  # it is loaded here: who writes into it kills us
    path.write_bytes(damage(good))
    assert not is_compiled([program])
    told = in_another_process(program)
    assert (told.returncode, told.stdout) == (0, "42\n"), told.stderr
    assert is_compiled([program])


def test_a_library_under_the_name_of_another_is_compiled_again(program):
    other = program._replace(macros=(("ANSWER", 7),))
    compile_programs([program, other])
    shutil.copy(compiler._library(other), compiler._library(program).with_suffix(".new"))
    compiler._library(program).with_suffix(".new").rename(compiler._library(program))
    assert not is_compiled([program]) and is_compiled([other])
    assert in_another_process(program).stdout == "42\n"


def test_a_library_for_another_processor_has_another_name(program, monkeypatch):
    here = compiler._library(program)
    compiler._name.cache_clear()
    monkeypatch.setattr(compiler, "_machine", lambda: "#define __AVX2048F__ 1\n")
    assert compiler._library(program) != here


def test_what_cannot_be_loaded_is_one_line(program, monkeypatch):
    def refuse(path: str) -> ctypes.CDLL:
        raise OSError("libgomp.so.1: cannot open shared object file:\n No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(CompilerError, match=r"cannot be loaded: libgomp.so.1: .*: No such file or directory$"):
        compile_programs([program])


# Who else can write there


def refused(program: Program, match: str) -> None:
    """Check that a cache is not used: one line for compile=on, and plain training for compile=auto."""
    assert not is_compiled([program])
    with pytest.raises(CompilerError, match=match):
        library(program)
    config = TrainConfig.parse({"dataset": "digits", "device": "cpu", "epochs": 1, "compile": "on"})
    with pytest.raises(ConfigError, match=rf"^compile=on: .*{match}.*: give compile=auto or off$"):
        engine.choose_engine(build(config, (1, 28, 28), 10), config, 60_000)
    told: list[str] = []
    config = config.model_copy(update={"compile": "auto", "epochs": 50})
    assert engine.choose_engine(build(config, (1, 28, 28), 10), config, 60_000, told.append) == "plain"
    assert "without compiled kernels" in told[-1] and "\n" not in told[-1]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(program, cache, mode):
    compile_programs([program])
    cache.chmod(mode)
    refused(program, "kernels can be written to by others, who may have put libraries there: delete it")


def test_a_folder_in_one_that_all_can_write_to_is_refused(program, cache):
    compile_programs([program])
    cache.parent.chmod(0o777)
    refused(program, "stn_pipeline can be written to by others")


def test_another_users_folder_is_refused(program, cache, monkeypatch):
    compile_programs([program])
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refused(program, "is another user's, and libraries in it may be too: set XDG_CACHE_HOME")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give files away")
def test_a_link_to_another_users_folder_is_refused_and_his_library_not_loaded(program, cache, tmp_path):
    compile_programs([program])
    theirs = tmp_path / "theirs"
    cache.rename(theirs)
    cache.symlink_to(theirs)
    assert is_compiled([program])  # to one's own folder, why not
    os.chown(compiler._library(program), 12345, -1)
    assert not is_compiled([program])
    compile_programs([program])
    assert compiler._library(program).stat().st_uid == os.getuid()
    os.chown(theirs, 12345, -1)
    refused(program, "is another user's")


@pytest.mark.parametrize("how", ["a link", "writable", "a pipe"])
def test_a_file_that_is_not_safely_ours_is_compiled_again(program, tmp_path, how):
    compile_programs([program])
    path = compiler._library(program)
    if how == "writable":
        path.chmod(0o722)
    else:
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so") if how == "a link" else os.mkfifo(path)
    assert not is_compiled([program])
    compile_programs([program])
    assert is_compiled([program]) and stat.S_IMODE(path.lstat().st_mode) == 0o700 and not path.is_symlink()


def test_a_cache_of_an_earlier_version_that_all_could_read_is_made_private(program, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o755)
    compile_programs([program])
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_made_is_one_line(program, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("in the way")
    refused(program, "kernels: ")


def test_a_full_disk_is_one_line_and_leaves_no_half_library(program, cache, monkeypatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CompilerError, match="kernels: No space left on device"):
            compile_programs([program])
    assert [path.name for path in cache.iterdir()] == ["lock"]
    assert library(program).answer() == 42


# The compiler


def test_a_command_is_a_compiler_too(program, tmp_path, monkeypatch):
    log = tmp_path / "log"
    ccache = script(tmp_path / "my tools" / "ccache", f'echo "$1" >> {log}', 'exec "$@"')
    monkeypatch.setenv("CXX", f"{shlex.quote(str(ccache))} {REAL} -DMORE='a b'")
    assert library(program).answer() == 42
    assert set(log.read_text().split()) == {REAL}


def test_a_path_with_spaces_and_quotes_is_a_compiler_too(program, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "it's my tools" / "c++", f'exec {REAL} "$@"')))
    assert library(program).answer() == 42


def test_an_empty_cxx_is_none(program, monkeypatch):
    monkeypatch.setenv("CXX", "  ")
    assert library(program).answer() == 42


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/nowhere/g++", r"no C\+\+ compiler called /nowhere/g\+\+ is on the path: install it, or unset CXX"),
        ("nowhere -O1", r"no C\+\+ compiler called nowhere is on the path"),
        ('g++ "', 'CXX=g\\+\\+ ": no closing quotation: quote it as a shell would'),
        ("''", "no C.. compiler called  is on the path"),
        ("false", "does not know -march=native: 1$"),
        ("true", "could not compile program.cpp|No such file"),
    ],
)
def test_a_compiler_that_is_none_is_one_line(program, monkeypatch, command, told):
    monkeypatch.setenv("CXX", command)
    assert not is_compiled([program])
    with pytest.raises(CompilerError, match=told) as caught:
        compile_programs([program])
    assert "\n" not in str(caught.value)


def test_a_file_that_no_system_can_run_is_one_line(program, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CompilerError, match="broken cannot be started: "):
        compile_programs([program])


def test_a_compiler_that_fails_leaves_nothing_behind_and_says_why_in_one_line(program, cache):
    program.source.write_text("no C++\nat all\n")
    good = program._replace(macros=(("ANSWER", 1),))
    with pytest.raises(CompilerError, match=r"could not compile program\.cpp: .*error") as caught:
        compile_programs([program, good])
    assert "\n" not in str(caught.value)
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("hangs", ["*-dM*", "*program.cpp*"])
def test_a_compiler_that_hangs_is_stopped_with_what_it_started_and_not_waited_for_again(program, tmp_path, monkeypatch, hangs, cache):
    pids = tmp_path / "pids"
    slow = script(tmp_path / "slow", f'case "$*" in {hangs}) sleep 600 & echo $! >> {pids}; wait;; esac', f'exec {REAL} "$@"')
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(compiler, "ASK_S", 2.0)
    monkeypatch.setattr(compiler, "COMPILE_S", 2.0)
    for _ in range(2):
        with pytest.raises(CompilerError, match="did not end in time"):
            compile_programs([program])
    (pid,) = map(int, pids.read_text().split())
    until = time.monotonic() + 10
    while _is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _is_alive(pid)
    assert [path.name for path in cache.iterdir() if path.name != "lock"] == []


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Two at once


def test_two_processes_compile_a_program_once(program, tmp_path):
    log = tmp_path / "log"
    logged = script(tmp_path / "logged", f'case "$*" in *program.cpp*) echo compiled >> {log}; sleep 0.5;; esac', f'exec {REAL} "$@"')
    code = f"from stn_pipeline.compiler import *; library(Program(Path({str(program.source)!r}), {program.macros!r})).answer()"
    environment = os.environ | {"CXX": str(logged)}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert log.read_text().splitlines() == ["compiled"]


def test_who_was_killed_while_compiling_leaves_nothing_in_the_way(program, tmp_path, cache):
    begun = tmp_path / "begun"
    slow = script(tmp_path / "slow", f'case "$*" in *program.cpp*) touch {begun}; sleep 2;; esac', f'exec {REAL} "$@"')
    code = f"from stn_pipeline.compiler import *; library(Program(Path({str(program.source)!r}), {program.macros!r})).answer()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"CXX": str(slow)})
    while not begun.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cache.glob("unfinished-*"))
    assert library(program).answer() == 42
    assert not list(cache.glob("unfinished-*"))


def test_a_process_that_compiles_for_ever_is_not_waited_for(program, cache, monkeypatch):
    import fcntl

    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(compiler, "WAIT_S", 0.3)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CompilerError, match="another process has been compiling for"):
            compile_programs([program])
