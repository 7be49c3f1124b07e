"""A sweep as a real process, for tests of faults: what its study and its store hold, when to strike, and what must be true at the end."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import mlflow
import optuna
import psutil
import yaml
from mlflow.entities import Run
from optuna.trial import FrozenTrial

from tests.conftest import Workplace

T = TypeVar("T")
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
KEYS = {
    "name": "s",
    "train": {"device": "cpu", "epochs": 14},
    "search": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "batch_size": [32, 64]},
    "datasets": "digits",
    "pruner": "none",
    "workers": 2,
    "final": 0,
}


@dataclass
class Sweep:
    """A sweep file in an empty folder, what is started with it, and what its study and its store hold by now."""

    workplace: Workplace
    keys: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # more of it, for the drivers
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, **keys: Any) -> None:
        self.keys = KEYS | keys
        (self.workplace.path / "s.yaml").write_text(yaml.safe_dump(self.keys))

    def begin(self, *flags: str) -> subprocess.Popen[str]:
        """Start a driver in a process group of its own; return when it has closed what was left open, and has its workers."""
        command = [sys.executable, "-m", "stn_pipeline.sweep", "s.yaml", *flags]
        pipe, place = subprocess.PIPE, self.workplace
        driver = subprocess.Popen(
            command, cwd=place.path, env=place.environment | self.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self.started.append(driver)
        assert driver.stdout is not None
        for line in driver.stdout:
            if "workers, " in line:
                return driver
        raise AssertionError(driver.communicate())

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return self.workplace.run_module("sweep", "s.yaml", *flags, **self.environment)

    @cached_property
    def study(self) -> optuna.Study:
        return optuna.load_study(study_name="s", storage=f"sqlite:///{self.workplace.path}/studies/s.db")

    @cached_property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.workplace.path}/mlflow.db"))

    def trials(self, *states: str) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials() if not states or trial.state.name in states]

    def numbers(self, *states: str) -> set[int]:
        return {trial.number for trial in self.trials(*states)}

    def runs(self, *stages: str) -> list[Run]:
        runs = self.client.search_runs([experiment.experiment_id for experiment in self.client.search_experiments()])
        return [run for run in runs if not stages or run.data.tags.get("stage") in stages]

    @property
    def parent(self) -> Run:
        (parent,) = self.runs("sweep")
        return parent

    def epochs(self, run_id: str) -> list[int]:
        return sorted(point.step for point in self.client.get_metric_history(run_id, "val/loss"))

    def values(self) -> dict[int, tuple[Any, ...]]:
        """Return what must stay of the complete trials."""
        return {trial.number: (trial.value, trial.params, trial.user_attrs) for trial in self.trials("COMPLETE")}

    def content(self) -> tuple[Any, ...]:
        """Return all that the study and the children of its run say."""
        trials = [(trial.number, trial.state, trial.value, trial.user_attrs) for trial in self.trials()]
        attributes = {name: value for name, value in self.study.user_attrs.items() if name != "spent_s"}
        runs = [
            (run.info.run_id, run.info.status, run.info.end_time, run.data.metrics, run.data.tags) for run in self.runs("trial", "final")
        ]
        return trials, runs, attributes, self.parent.info.run_id, self.parent.info.status, self.parent.data.tags["answer"]


def until(found: Callable[[], T | None], driver: subprocess.Popen[str] | None = None, limit_s: float = 300, pause_s: float = 0.2) -> T:
    """Return what is found at last, while the driver, where one is given, lives."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if (it := found()) is not None:
            return it
        if driver is not None and driver.poll() is not None:
            raise AssertionError(driver.communicate())
        time.sleep(pause_s)
    raise AssertionError("waited in vain")


def worker_of(run: Run, driver: subprocess.Popen[str]) -> psutil.Process | None:
    """Return the worker of this driver that trains a run, if one does."""
    _, pid, born = run.data.tags.get("process", "- - -").split()
    workers = psutil.Process(driver.pid).children(recursive=True)
    return next((worker for worker in workers if (str(worker.pid), str(worker.create_time())) == (pid, born)), None)


def mid_trial(sweep: Sweep, driver: subprocess.Popen[str], n_complete: int = 0) -> FrozenTrial:
    """Wait for a trial that trains, its third epoch behind it, and for so many that are complete."""

    def found() -> FrozenTrial | None:
        training = [trial for trial in sweep.trials("RUNNING") if len(trial.intermediate_values) >= 3]
        return training[0] if training and len(sweep.trials("COMPLETE")) >= n_complete else None

    return until(found, driver)


def mid_trial_and_about_to_start_another(sweep: Sweep, driver: subprocess.Popen[str]) -> None:
    """Wait until a trial trains while the driver is making the run of the next one, or for the last such chance to be gone."""

    def found() -> bool | None:
        running = sweep.trials("RUNNING")
        training = any(len(trial.intermediate_values) >= 3 for trial in running)
        starting = any("run_id" not in trial.user_attrs for trial in running)
        return (training and (starting or len(sweep.trials("COMPLETE")) >= sweep.keys["trials"] - 2)) or None

    until(found, driver, pause_s=0.01)


def mid_final(sweep: Sweep, driver: subprocess.Popen[str], stage: str = "final") -> Run:
    """Wait for a final training, or one of another stage, that goes on, its third epoch behind it."""

    def found() -> Run | None:
        training = [run for run in sweep.runs(stage) if run.info.status == "RUNNING" and worker_of(run, driver)]
        return next((run for run in training if len(sweep.epochs(run.info.run_id)) >= 3), None)

    return until(found, driver)


def children_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) >= 2
    return children


def wait_until_gone(processes: list[psutil.Process]) -> None:
    def gone() -> bool | None:
        return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes) or None

    assert until(gone, limit_s=120)


@contextmanager
def standing_still(workers: list[psutil.Process]) -> Iterator[None]:
    """Stop a driver's workers for the length of the block, so that it is not done before what is tried meanwhile."""
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def refused(sweep: Sweep, *flags: str) -> str:
    """Run the sweep, which must be refused; return the one line."""
    done = sweep.run(*flags)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def check_whole(sweep: Sweep, total: int, lost: set[int]) -> None:
    """Check that a study is done: so many trials, those lost tried again, each run once, closed and complete."""
    trials = sweep.trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert sum("retry_of" not in trial.user_attrs for trial in trials) == total
    assert sweep.numbers("FAIL") == lost and sweep.numbers("COMPLETE", "FAIL") == set(range(len(trials)))

    again = [trial for trial in trials if "retry_of" in trial.user_attrs]
    assert sorted(trial.user_attrs["retry_of"] for trial in again) == sorted(lost)
    for trial in again:
        assert trial.user_attrs["params"] == trials[trial.user_attrs["retry_of"]].user_attrs["params"]
    first = [json.dumps(trial.user_attrs["params"], sort_keys=True) for trial in trials if trial not in again]
    assert len(set(first)) == total

    runs = {int(run.data.tags["trial"]): run for run in sweep.runs("trial")}
    assert len(runs) == len(sweep.runs("trial"))
    assert {number: run.info.run_id for number, run in runs.items()} == {
        trial.number: trial.user_attrs["run_id"] for trial in trials if trial.number not in lost or "run_id" in trial.user_attrs
    }
    for number, run in runs.items():
        assert run.data.tags["state"] == trials[number].state.name and run.info.status == STATUS[trials[number].state.name]
        assert run.data.tags["mlflow.parentRunId"] == sweep.parent.info.run_id and run.data.tags["study"] == "s"
        assert run.data.tags.get("retry_of") == (str(of) if (of := trials[number].user_attrs.get("retry_of")) is not None else None)
        if number not in lost:
            assert sweep.epochs(run.info.run_id) == list(range(1, sweep.keys["train"]["epochs"] + 1))
    assert sweep.parent.info.status == "FINISHED"
    assert "RUNNING" not in {run.info.status for run in sweep.runs()}
