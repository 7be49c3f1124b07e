"""Ctrl-C, SIGTERM and SIGHUP: raised as KeyboardInterrupt, remembered where that is swallowed, held back where they would do harm."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_told: list[int] = []  # the signals that came and have ended nothing yet


class Interrupted(KeyboardInterrupt):
    """A signal that ends the work: `number` says which."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def _interrupt(number: int, _: object) -> NoReturn:
    _told.append(number)
    raise Interrupted(number)


def listen() -> None:
    """Let each signal end the work, except those that are ignored already: `nohup` means that."""
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raise the signal that came, if any: what a handler raises inside a destructor is printed and swallowed.

    Raises: Interrupted.
    """
    if _told:
        raise Interrupted(_told[0])


def ignore_signals() -> None:
    """Let last things be done in peace: a second Ctrl-C would leave a run open, or change the exit code."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    _told.clear()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back until the block is done.

    A blocked signal would not do: another thread could take it.
    """
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in NUMBERS}
    waiting = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    for number in waiting:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number in waiting:
            signal.signal(number, before[number])
        if held:
            signal.raise_signal(held[0])
