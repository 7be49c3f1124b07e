"""A tracking server that is away for a while, or a store that another process has locked: waited for, told of, and at last given up."""

import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import requests
from mlflow.exceptions import MlflowException
from requests.exceptions import ChunkedEncodingError, RetryError
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from stn_pipeline.errors import StnError, StoreError
from stn_pipeline.interrupts import check
from stn_pipeline.texts import masked, say

AWAY = (502, 503, 504)  # what a proxy says of a server that is gone, and MLflow of its database
PATIENCE_S = 360.0
RETRY_S = 0.5  # between two tries at a locked store
LOOK_S = 5.0  # between two looks at the server, and the longest wait for its answer
RETRIES, TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
# MLflow asks a server that is away again after 0, 2, 4, 8, 16, 32, 64, 120 and 120 s: six minutes in all.
os.environ.setdefault(RETRIES, "9")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")


_patience_s = [PATIENCE_S]  # how long a locked store is waited for; none in a hurry


def tell(line: str) -> None:
    """Print a line on standard error."""
    say(line, error=True)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or of what it passes on from MLflow; passwords masked."""
    if isinstance(error, StoreError) and error.__cause__ is not None:
        error = error.__cause__
    return masked((str(error).splitlines() or [type(error).__name__])[0])[:300]


def is_locked(error: BaseException | None) -> bool:
    """Say whether an error came of a SQLite store that another process has locked: MLflow itself waits for 20 s."""
    return isinstance(error, (MlflowException, OperationalError)) and "is locked" in str(error)


def insist(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Ask MLflow, again and again for six minutes where its store is locked.

    Raises: StoreError where it refuses; what is_away knows where it does not answer; Interrupted where a signal was swallowed.
    """
    check()
    until, told = monotonic() + _patience_s[-1], False
    while True:
        try:
            return call(*given, **named)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if is_locked(error) and monotonic() < until:
                if not told:
                    tell(f"MLflow's store is locked by another process: what needs it waits for up to {PATIENCE_S / 60:.0f} minutes")
                told = True
                sleep(RETRY_S)
            elif is_away(error):
                raise
            else:
                raise StoreError(f"MLflow refused: {first_line(error)}") from error


def absence(uri: str) -> str:
    """Return why the server at an http address does not answer; nothing where it does, or where there is no server."""
    if not uri.startswith("http"):
        return ""
    try:
        bare = re.sub(r"(?<=://)[^/]*@", "", uri)  # urllib takes a user's name for a part of the host's
        urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=LOOK_S).close()
    except urllib.error.HTTPError as error:
        return f"status {error.code}" if error.code in AWAY else ""  # of a proxy before it
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def is_away(error: BaseException | None) -> bool:
    """Say whether an error came of a store that did not answer; an interrupt, or what the store refused, never does."""
    while isinstance(error, StnError):  # those of ours that pass one on
        error = error.__cause__
    if is_locked(error):
        return True
    if isinstance(error, MlflowException):
        # What failed stands one step behind, and only there: further back may lie an older error that was dealt with.
        error = (error.__cause__ or error.__context__) if str(error).startswith("API request to ") else None
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in AWAY
    return isinstance(error, (requests.ConnectionError, requests.Timeout, RetryError, ChunkedEncodingError))


def is_unable(error: BaseException) -> bool:
    """Say whether an error came of a store that could not do what it was asked: it is locked, or full; not of a wrong question."""
    cause = error.__cause__ if isinstance(error, StoreError) else error
    return isinstance(cause, SQLAlchemyError) or (isinstance(cause, MlflowException) and cause.error_code != "INVALID_PARAMETER_VALUE")


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """Do last things with the server inside the block, or leave them where it does not answer at once."""
    before = {name: os.environ.get(name) for name in (RETRIES, TIMEOUT)}
    os.environ.update({RETRIES: "1", TIMEOUT: "10"})
    _patience_s.append(0.0)
    try:
        yield
    except (MlflowException, SQLAlchemyError, StnError) as error:
        if not is_away(error):
            raise
    finally:
        _patience_s.pop()
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


@contextmanager
def watched(uri: str, say: Callable[[str], object]) -> Iterator[None]:
    """Tell, during the block, when the server stops answering and when it answers again."""
    done = threading.Event()

    def watch() -> None:
        since = None
        while not done.wait(LOOK_S):
            why = absence(uri)
            if why and since is None:
                since = monotonic()
                say(f"MLflow at {uri} does not answer ({why}): what needs it waits for up to six minutes")
            elif not why and since is not None:
                say(f"MLflow at {uri} answers again after {monotonic() - since:.0f} s")
                since = None

    if uri.startswith("http"):
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
