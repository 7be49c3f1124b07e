"""One driver a question: a lock that the operating system drops with the process that held it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stn_pipeline.errors import RunError

STUDIES = Path("studies")


@contextmanager
def only_driver(kind: str, name: str) -> Iterator[Path]:
    """Hold the lock of a question; return the path of its files in studies/, without an ending.

    kind: sweep or compare.
    Raises: RunError where another process drives it.
    """
    STUDIES.mkdir(exist_ok=True)
    path = STUDIES / (name if kind == "sweep" else f"{kind}-{name}")
    with open(f"{path}.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise RunError(f"{kind} {name}: {holder} is driving it: wait, stop that one, or begin another (--name {name}-2)") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield path
