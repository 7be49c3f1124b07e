"""What the tests share: an empty folder with a store of its own, and the entry points as real processes in it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stn_pipeline.interrupts import NUMBERS

if TYPE_CHECKING:
    from tests.driven import Sweep

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # of several processes with two threads each, on two cores, all wait for each other
# In a shell's background, or under nohup, these are ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass(frozen=True)
class Workplace:
    """An empty folder in which entry points run as processes, away from the user's own runs and caches."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        paths = os.pathsep.join((str(Path(sys.executable).parent), kept["PATH"]))
        return kept | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.path / "cache"), "PATH": paths, "PYTHONUNBUFFERED": "1"}

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.path, env=self.environment | environment, stdout=pipe, stderr=pipe, text=True)

    def start_module(self, module: str, *flags: str, **environment: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "-m", f"stn_pipeline.{module}", *flags, **environment)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def run_module(self, module: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", f"stn_pipeline.{module}", *flags, **environment)


def page_block(name: str) -> str:
    """Return the commands of a block of docs/cluster.md."""
    found = re.search(rf"<!-- {name} -->\n```\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Undo what a module's tests have set for this process."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def sweep(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator["Sweep"]:
    from tests.driven import Sweep

    monkeypatch.chdir(workplace.path)
    sweep = Sweep(workplace)
    yield sweep
    for driver in sweep.started:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Work in an empty folder with a store of its own, and let SQLite not wait for the disk."""
    import mlflow
    import optuna
    import sqlalchemy
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from stn_pipeline import tracking

    def hurry(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    folder = tmp_path_factory.mktemp("store")
    event.listen(Engine, "connect", hurry)
    head = optuna.storages.RDBStorage("sqlite://").get_head_version()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        patch.setattr("optuna.storages._rdb.storage._VersionManager.get_head_version", lambda self: head)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        tracking.experiment_id()
        patch.setattr("sqlalchemy.engine.create_engine", cache(sqlalchemy.engine.create_engine))
        yield folder
        mlflow.set_tracking_uri(None)
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="module")
def signals_restored():
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield  # what is stopped ends deaf to them
    for number, handler in handlers.items():
        signal.signal(number, handler)
