"""The errors of this package: one line each, saying what, got, rule and way out.

A `UserError` means that the input is wrong: the entry points print it and exit with 2. Every other `StnError`
means that the work itself failed: exit code 1.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class StnError(Exception):
    """Root of all errors that this package raises on purpose."""


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
    near = get_close_matches(got, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def masked(text: str) -> str:
    """Return a text without what stands before the @ of an address, nor its secret parameters: users and passwords."""
    text = re.sub(r"(?<=://)(?:[^\s/:@]*:\S*|[^\s/@]*)@", "***@", text)
    return re.sub(r"(?i)([?&;][\w-]*(?:password|passwd|pwd|token|secret|key)[\w-]*=)[^\s&;'\"]+", r"\1***", text)


def printable(text: str) -> str:
    r"""Return a text as one line that a terminal only shows: control characters, newlines too, as \x escapes, passwords masked."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in masked(text))
