"""The errors of this package: one line each, saying what, got, rule and way out.

A `UserError` means that the input is wrong: the entry points print it and exit with 2. Every other `StnError`
means that the work itself failed: exit code 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from stn_pipeline.texts import MOST_QUOTED, printable


class StnError(Exception):
    """Root of all errors that this package raises on purpose; as text it is one line without control characters."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(StnError):
    """The user's input cannot be used; nothing was started."""


class ConfigError(UserError, ValueError):
    """A knob, flag or value is unknown or out of bounds."""


class DataError(UserError, ValueError):
    """A data set is absent, broken, or does not fit."""


class RunError(UserError, LookupError):
    """A run id names no run that can be used."""


class AwayError(StnError, ConnectionError):
    """The tracking server did not answer for so long that it was given up."""


class StoreError(StnError):
    """The tracking store refused what was written to it, or has no more what it held."""


class ShapeError(StnError, ValueError):
    """A tensor has the wrong shape."""


class DivergedError(StnError, ArithmeticError):
    """The training loss is no longer finite."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known name, or nothing when none is near."""
    near = get_close_matches(got[:MOST_QUOTED], list(known), n=1)  # its time grows with the square of the length
    return f"; did you mean {near[0]}?" if near else ""
