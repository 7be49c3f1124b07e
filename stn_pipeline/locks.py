"""Locks between processes of one user on one machine, which the operating system drops with the process that holds them."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path


class HeldError(Exception):
    """Another process holds the lock; the text says which."""


def lock_path(name: str) -> Path:
    """Return where the lock of this name lies: in the user's cache, since what it is about may be on a server, or among temporary files."""
    folder = user_cache_path("stn_pipeline") / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir(), f"stn_pipeline-{getpass.getuser()}")
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{name}.lock"


@contextmanager
def held(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock during the block.

    Raises: HeldError where another process still holds it after `wait_s`; OSError where it cannot be made.
    """
    holder = path.with_suffix(".holder")  # a file of its own: some versions of filelock empty the lock's before they try
    lock = FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout as error:
        raise HeldError(holder.read_text() if holder.exists() else "another process") from error
    try:
        holder.write_text(f"process {os.getpid()}")
        yield
    finally:
        lock.release()
