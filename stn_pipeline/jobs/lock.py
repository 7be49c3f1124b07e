"""One driver a question."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stn_pipeline.errors import RunError
from stn_pipeline.locks import HeldError, held

STUDIES = Path("studies")


@contextmanager
def only_driver(kind: str, name: str) -> Iterator[Path]:
    """Hold the lock of a question; return the path of its files in studies/, without an ending.

    kind: sweep or compare.
    Raises: RunError where another process drives it, or studies/ cannot be written.
    """
    path = STUDIES / (name if kind == "sweep" else f"{kind}-{name}")
    with ExitStack() as stack:
        try:
            STUDIES.mkdir(exist_ok=True)
            stack.enter_context(held(Path(f"{path}.lock")))
        except HeldError as error:
            raise RunError(f"{kind} {name}: {error} is driving it: wait, stop that one, or begin another (--name {name}-2)") from error
        except OSError as error:
            why = f"{STUDIES.resolve()} cannot be used ({error.strerror or error})"
            raise RunError(f"{kind} {name}: {why}: it must be a folder that you may write to") from error
        yield path
