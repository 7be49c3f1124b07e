"""Ctrl-C and SIGTERM, held back where they would leave something half-done."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def ignore_signals() -> None:
    """Let last things be done in peace: a second Ctrl-C would leave a run open, or change the exit code."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back until the block is done.

    A blocked signal would not do: another thread could take it.
    """
    held: list[int] = []
    before = [signal.signal(number, lambda number, frame: held.append(number)) for number in NUMBERS]
    try:
        yield
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
