"""The store where it is a database: looked at before MLflow would wait for minutes; a SQLite file is made whole, or not at all."""

import hashlib
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple
from urllib.parse import quote

import sqlalchemy
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from stn_pipeline.errors import RunError
from stn_pipeline.locks import HeldError, held, lock_path
from stn_pipeline.texts import masked
from stn_pipeline.tracking.away import PATIENCE_S, first_line, tell

MAKING_S = 120.0  # making the tables takes a second or two
STANDSTILL_S = 10.0  # after which tables that somebody else was making are given up
LOOK_S = 0.2
ROOM = 1 << 16  # bytes that must fit on the disk
ELSEWHERE = "or set MLFLOW_TRACKING_URI"


class Content(NamedTuple):
    """What a SQLite file holds: its tables, its number of experiments, and when it last changed."""

    tables: frozenset[str]
    n_experiments: int
    changed: int


def check_database(uri: str, *, makes: bool = True) -> None:
    """Check that the database at an address can be used; where `makes`, make a SQLite file that is not there yet.

    Other addresses, such as a server's, are no concern of this.
    Raises: RunError where it cannot be used.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if path is not None and (makes or path.exists()):
            _check_file(path)
    elif scheme in ("postgresql", "mysql", "mssql"):
        try:
            sqlalchemy.create_engine(uri).connect().close()
        except (SQLAlchemyError, ImportError) as error:  # ImportError: of its driver
            raise RunError(f"MLflow's database {masked(uri)} cannot be used: {first_line(error)}; start it, {ELSEWHERE}") from error


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a sqlite address, or None where it is in memory."""
    database = make_url(uri).database
    return None if database in (None, "", ":memory:") else Path(str(database)).resolve()


def check_folder(folder: Path, what: str) -> None:
    """Check that files can be written in a folder, or in what would become one.

    Raises: RunError, naming `what` lies there.
    """
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        raise RunError(
            f"{what} cannot be written: {there}: {error.strerror or error}; make room or change its rights, {ELSEWHERE}"
        ) from error


def _check_file(path: Path) -> None:
    check_folder(path.parent, f"MLflow's store {path.name}")
    if not path.exists():
        _make(path)
    if path.is_dir():
        raise _unusable(path, f"is a folder: move it away, {ELSEWHERE}")
    try:
        path.open("r+b").close()
    except OSError as error:
        raise _unusable(path, f"cannot be opened ({error.strerror or error}): change its rights, {ELSEWHERE}") from error

    content, since, told = _look(path), monotonic(), False
    while (wrong := _wrong(path, content)) is not None:
        why, wait_s, waiting_for = wrong
        if monotonic() > since + wait_s:
            raise _unusable(path, why)
        if not told:
            tell(f"waiting for MLflow's store {path}: {waiting_for}")
            told = True
        sleep(LOOK_S)
        before, content = content, _look(path)
        since = since if content == before else monotonic()
    if content is not None and not content.tables:
        _make(path)


def _look(path: Path) -> Content | None:
    """Return what the file holds, or None where another process has locked it.

    Raises: RunError where it is no SQLite file.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=LOOK_S)) as db:
            tables = frozenset(str(name) for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
            n_experiments = int(db.execute("SELECT count(*) FROM experiments").fetchone()[0]) if "experiments" in tables else 0
        return Content(tables, n_experiments, path.stat().st_mtime_ns)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            return None
        raise _unusable(path, f"is not to be read as a SQLite database ({error}): move it away, {ELSEWHERE}") from error


def _wrong(path: Path, content: Content | None) -> tuple[str, float, str] | None:
    """Return what is wrong with a file and the way out, how long to wait for a change, and for what; None where MLflow can use it."""
    if content is None:
        minutes = f"{PATIENCE_S / 60:.0f} minutes"
        return f"has been locked by another process for {minutes}: stop that one, {ELSEWHERE}", PATIENCE_S, "another process has it locked"
    if not content.tables:
        return None
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  declares the tables
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.db.utils import _get_latest_schema_revision

    ours = {*Base.metadata.tables}
    if content.tables - {"alembic_version"} and not content.tables & ours:
        return f"holds tables, but not MLflow's ({', '.join(sorted(content.tables)[:3])}): move it away, {ELSEWHERE}", 0.0, ""
    if ours <= content.tables and _version(path) == _get_latest_schema_revision():
        return None
    if content.n_experiments:
        return f"is of another version of MLflow: keep a copy, then `mlflow db upgrade sqlite:///{path}`, {ELSEWHERE}", 0.0, ""
    why = f"is half-made, by a process that was stopped, and holds no run: delete it, {ELSEWHERE}"
    return why, STANDSTILL_S, "another process may be making it"


def _version(path: Path) -> str:
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=LOOK_S)) as db:
        return str((db.execute("SELECT version_num FROM alembic_version").fetchone() or ("",))[0])
    return ""


def _unusable(path: Path, why: str) -> RunError:
    return RunError(f"MLflow's store {path} {why}")


def _make(path: Path) -> None:
    """Make a store aside and give it its name when it is whole: MLflow leaves half of one where it is stopped meanwhile."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with suppress(HeldError), held(lock_path(f"store-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"), MAKING_S):
        if path.exists() and path.stat().st_size:  # another process was quicker
            return
        for left in path.parent.glob(f".{path.name}.making-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.making-", dir=path.parent))
        try:
            aside = folder / path.name
            SqlAlchemyStore(f"sqlite:///{aside}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
            if path.exists() and not path.stat().st_size:
                os.replace(aside, path)
            elif not path.exists():
                try:
                    os.link(aside, path)  # unlike a rename this never replaces what another program has made meanwhile
                except FileExistsError:
                    pass
                except OSError:  # a file system without links
                    os.rename(aside, path)
        except (SQLAlchemyError, OSError) as error:
            raise _unusable(path, f"cannot be made: {first_line(error)}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
