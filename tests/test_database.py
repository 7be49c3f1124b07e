"""The store as a SQLite file: made whole or not at all, and told in one line where it cannot be used."""

import resource
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from stn_pipeline import interrupts
from stn_pipeline.errors import RunError, StoreError
from stn_pipeline.tracking import away, database, where
from stn_pipeline.tracking.database import check_database


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a store that was made aside."""
    path = tmp_path_factory.mktemp("made") / "mlflow.db"
    check_database(f"sqlite:///{path}")
    return path


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copy(made, tmp_path / "mlflow.db"))


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        check_database(f"sqlite:///{path}")
    text = str(caught.value)
    assert "\n" not in text and "MLFLOW_TRACKING_URI" in text
    return text


def test_a_new_store_is_whole_and_nothing_else_is_left(made):
    assert [path.name for path in made.parent.iterdir()] == ["mlflow.db"]
    assert [e.name for e in mlflow.MlflowClient(f"sqlite:///{made}").search_experiments()] == ["Default"]
    check_database(f"sqlite:///{made}")


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_the_making_leaves_nothing_and_what_a_kill_left_goes_with_the_next(monkeypatch, tmp_path, ending):
    (tmp_path / ".mlflow.db.making-dead").mkdir()

    def stopped(uri: str, _: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half")
        raise ending

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", stopped)
    with pytest.raises(KeyboardInterrupt if isinstance(ending, KeyboardInterrupt) else RunError):
        check_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_another_program_made_meanwhile_is_not_replaced(monkeypatch, made, tmp_path):
    path = tmp_path / "mlflow.db"

    class Slow:
        def __init__(self, uri: str, _: str):
            shutil.copy(made, uri.removeprefix("sqlite:///"))
            shutil.copy(made, path)
            change(path, "INSERT INTO experiments (experiment_id, name) VALUES (7, 'theirs')")

        @property
        def engine(self) -> "Slow":
            return self

        def dispose(self) -> None:
            pass

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", Slow)
    check_database(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM experiments WHERE name = 'theirs'").fetchone() == (1,)


def test_a_file_that_is_no_store_is_one_line(monkeypatch, tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_text("hello\n")
    assert "is not to be read as a SQLite database" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "is a folder: move it away" in refusal(path)
    path.rmdir()
    change(path, "CREATE TABLE studies (a)")
    assert "holds tables, but not MLflow's (studies)" in refusal(path)
    assert "cannot be written: /proc" in refusal(Path("/proc/nothing/mlflow.db"))


def test_a_full_disk_is_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        text = refusal(tmp_path / "mlflow.db")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot be written: {tmp_path}: File too large; make room" in text


def test_a_half_made_store_is_waited_for_and_then_one_line_with_the_way_out(monkeypatch, copied, capsys):
    monkeypatch.setattr(database, "STANDSTILL_S", 0.5)
    change(copied, "DELETE FROM experiments", "UPDATE alembic_version SET version_num = '451aebb31d03'")
    assert "is half-made, by a process that was stopped, and holds no run: delete it" in refusal(copied)
    assert "waiting for MLflow's store" in capsys.readouterr().err
    change(copied, "DROP TABLE alembic_version", "DROP TABLE latest_metrics")
    assert "is half-made" in refusal(copied)


def test_a_store_that_somebody_is_just_making_is_waited_for(monkeypatch, made, copied):
    monkeypatch.setattr(database, "STANDSTILL_S", 30.0)
    change(copied, "DELETE FROM experiments", "UPDATE alembic_version SET version_num = '451aebb31d03'")
    maker = threading.Timer(0.5, shutil.copy, (made, copied))
    maker.start()
    check_database(f"sqlite:///{copied}")
    maker.join()


def test_a_store_of_another_version_is_one_line_at_once(copied):
    change(copied, "UPDATE alembic_version SET version_num = '451aebb31d03'")
    started = time.monotonic()
    assert f"is of another version of MLflow: keep a copy, then `mlflow db upgrade sqlite:///{copied}`" in refusal(copied)
    assert time.monotonic() - started < database.STANDSTILL_S


def test_an_empty_file_becomes_a_store(monkeypatch, made, tmp_path):
    path = tmp_path / "mlflow.db"
    path.touch()
    check_database(f"sqlite:///{path}")
    assert mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()


def test_a_locked_store_is_waited_for_told_of_and_given_up(monkeypatch, copied, capsys):
    holder = sqlite3.connect(copied, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(database, "PATIENCE_S", 0.5)
    assert "has been locked by another process for" in refusal(copied)
    monkeypatch.setattr(database, "PATIENCE_S", 60.0)
    release = threading.Timer(0.5, holder.close)
    release.start()
    capsys.readouterr()
    check_database(f"sqlite:///{copied}")
    assert "another process has it locked" in capsys.readouterr().err


def test_a_database_server_that_is_not_there_is_one_line_without_the_password():
    with pytest.raises(RunError, match=r"^MLflow's database postgresql\S*://\*\*\*@127.0.0.1:1/x cannot be used: ") as caught:
        check_database("postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


# Calls to MLflow


LOCKED = "(sqlite3.OperationalError) database is locked"


class Calls:
    """Something that fails a few times."""

    def __init__(self, *errors: Exception):
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_a_call_is_made_again_while_the_store_is_locked_and_that_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(away, "RETRY_S", 0.01)
    assert away.insist(Calls(MlflowException(LOCKED), MlflowException(LOCKED))) == "done"
    assert capsys.readouterr().err.count("is locked by another process") == 1
    with away.in_a_hurry():  # where nothing is waited for
        away.insist(Calls(MlflowException(LOCKED)))
        raise AssertionError("it was tried again")


def test_what_mlflow_refuses_is_one_line_without_passwords_and_a_lock_is_an_absence(monkeypatch):
    with pytest.raises(StoreError, match=r"^MLflow refused: no run at http://\*\*\*@h/$"):
        away.insist(Calls(MlflowException("no run at http://u:p@h/\nmore")))
    with pytest.raises(StoreError, match="No space left"):
        away.insist(Calls(OSError(28, "No space left on device")))
    monkeypatch.setattr(away, "_patience_s", [0.0])
    with pytest.raises(MlflowException) as caught:
        away.insist(Calls(MlflowException(LOCKED)))
    assert away.is_away(caught.value)


def test_a_signal_that_was_swallowed_ends_the_next_call(monkeypatch):
    monkeypatch.setattr(interrupts, "_told", [15])
    with pytest.raises(KeyboardInterrupt):
        away.insist(Calls())


def test_an_address_is_shown_without_its_password_and_used_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    assert where.store() == "http://***@127.0.0.1:1"
    assert where.settings()["MLFLOW_TRACKING_URI"] == "http://me:secret@127.0.0.1:1"
    with pytest.raises(RunError, match="does not answer .*refused") as caught:
        where.knock()
    assert "secret" not in str(caught.value)
