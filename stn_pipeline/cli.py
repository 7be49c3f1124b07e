"""What every command line shares: flags from a set of knobs, one line for an error, and the exit codes.

Exit codes: 0 done, 2 the input is wrong, 1 the work failed, 130, 143 and 129 ended by SIGINT, SIGTERM and SIGHUP.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from stn_pipeline import interrupts, streams
from stn_pipeline.config import Knobs, choices_of, default_of, unit_of
from stn_pipeline.errors import ConfigError, StnError, UserError, did_you_mean
from stn_pipeline.texts import quoted, say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


def parse(
    knobs: type[Knobs], argv: Sequence[str], description: str, options: dict[str, str] | None = None, positional: str = ""
) -> dict[str, str]:
    """Return the flags that were given, unchecked, by knob name.

    Every flag takes a value, since `mlflow run -P name=value` passes them so; --batch-size is --batch_size.
    `options` adds flags that are not knobs, with their help; the one called `positional` is required, and may stand bare.
    Raises: ConfigError for an unknown flag or a missing value.
    """
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:  # bytes that were not UTF-8, which Python hands over as surrogates
            raise ConfigError(f"{quoted(word)}: is not text in UTF-8: write it anew, or rename what it names") from error
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_Help)
    for name, text in (options or {}).items():
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=name.upper(), help=text)
    for name, field in knobs.model_fields.items():
        unit = f" [{unit_of(field)}]" if unit_of(field) else ""
        default = " (required)" if field.is_required() else f" (default {default_of(field)})" if default_of(field) else ""
        value = "|".join(choices_of(field)) or name.upper()
        text = f"{field.description}{unit}{default}".replace("%", "%%")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=value, help=text)
    given, unknown = parser.parse_known_args([_underscored(word) for word in argv])
    if unknown:
        known = [*knobs.model_fields, *(options or {})]
        near = did_you_mean(unknown[0].lstrip("-").partition("=")[0], known)
        raise ConfigError(f"unknown flag {quoted(unknown[0])}{near}; --help lists the flags")
    if positional and not hasattr(given, positional):
        raise ConfigError(f"{positional}: missing; it is {(options or {})[positional]}")
    return {name: value if isinstance(value, str) else "--" for name, value in vars(given).items()}  # argparse makes [] of --x=--


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str, **_: Any):
        super().__init__(prog, max_help_position=44, width=140)


def run(command: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run an entry point and exit with its code; an error made on purpose is one line on stderr.

    No run is left open, and where `mlflow run` made one for us that was never started, its page says why.
    """
    streams.harden()
    interrupts.listen()
    code = 0
    try:
        command(sys.argv[1:])
    except BaseException as error:
        interrupts.ignore_signals()
        if isinstance(error, KeyboardInterrupt):
            number = error.number if isinstance(error, interrupts.Interrupted) else signal.SIGINT
            said, code = ENDED[signal.Signals(number)], 128 + number
        elif isinstance(error, StnError):
            said, code = f"error: {error}", 2 if isinstance(error, UserError) else 1
        else:  # a bug of ours, with its traceback; or --help
            _last_words(error)
            raise
        for line in said.split("\n"):  # one; of a fault of our own, its traceback
            say(line, error=True)
        _last_words(error)
    sys.exit(code)


def _last_words(error: BaseException) -> None:
    """Leave no run behind that says what is not so."""
    if "stn_pipeline.tracking" not in sys.modules and "MLFLOW_RUN_ID" not in os.environ:
        return
    from stn_pipeline.tracking import close_opened, disown_run

    close_opened(error)
    if isinstance(error, StnError):
        disown_run(error)
