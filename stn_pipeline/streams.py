"""Standard output and error that never end the work: a closed pipe, a full disk or a poor encoding costs the words alone."""

import io
import os
import sys
from typing import Any, TextIO


class _Tireless(io.FileIO):
    """A file descriptor whose first failed write sends all later ones, also those of libraries and children, to nowhere."""

    def write(self, data: Any, /) -> int:
        """Write, or drop."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError:  # nobody reads any more, the terminal is gone, or the disk is full
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def harden() -> None:
    """Make both streams unable to fail; characters that their encoding lacks are written as escapes."""
    _fill_standard_descriptors()
    sys.stdout, sys.stderr = _hardened(sys.stdout, sys.__stdout__, 1), _hardened(sys.stderr, sys.__stderr__, 2)


def _fill_standard_descriptors() -> None:
    """Open what was closed (`>&-`): else the next file opened would get its number, and what is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _hardened(stream: TextIO | None, original: TextIO | None, number: int) -> TextIO:
    if stream is not original:  # somebody, such as a test, has put another in its place
        return stream or sys.stderr
    if stream is not None:
        stream.flush()
    encoding, by_line = (stream.encoding, stream.line_buffering) if isinstance(stream, io.TextIOWrapper) else ("utf-8", True)
    by_line = by_line or bool(getattr(stream, "write_through", False))  # as PYTHONUNBUFFERED asks for
    buffer = io.BufferedWriter(_Tireless(number, "wb", closefd=False))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=by_line)
