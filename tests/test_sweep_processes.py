"""Faults in a sweep, with real processes, a real study and a real store: kill -9, Ctrl-C, a second driver, eight workers at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import mlflow
import optuna
import psutil
import pytest
import yaml
from mlflow.entities import Run
from optuna.trial import FrozenTrial

from tests.conftest import ROOT, Workplace

pytestmark = pytest.mark.slow

T = TypeVar("T")
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
KEYS = {
    "name": "s",
    "train": {"device": "cpu", "epochs": 20},
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
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, **keys: Any) -> None:
        self.keys = KEYS | keys
        (self.workplace.path / "s.yaml").write_text(yaml.safe_dump(self.keys))

    def begin(self, *flags: str) -> subprocess.Popen[str]:
        """Start a driver in a process group of its own; return when it has closed what was left open, and has its workers."""
        command = [sys.executable, "-m", "stn_pipeline.sweep", "s.yaml", *flags]
        pipe, place = subprocess.PIPE, self.workplace
        driver = subprocess.Popen(
            command, cwd=place.path, env=place.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self.started.append(driver)
        assert driver.stdout is not None
        for line in driver.stdout:
            if "workers, " in line:
                return driver
        raise AssertionError(driver.communicate())

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return self.workplace.run_module("sweep", "s.yaml", *flags)

    @cached_property
    def study(self) -> optuna.Study:
        return optuna.load_study(study_name="s", storage=f"sqlite:///{self.workplace.path}/studies/s.db")

    @cached_property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.workplace.path}/mlflow.db")

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


@pytest.fixture
def sweep(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    monkeypatch.chdir(workplace.path)
    sweep = Sweep(workplace)
    yield sweep
    for driver in sweep.started:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()


def until(found: Callable[[], T | None], driver: subprocess.Popen[str] | None = None, limit_s: float = 300, pause_s: float = 0.05) -> T:
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
    workers = psutil.Process(driver.pid).children()
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

    until(found, driver, pause_s=0.001)


def mid_final(sweep: Sweep, driver: subprocess.Popen[str]) -> Run:
    """Wait for a final training that goes on, its third epoch behind it."""

    def found() -> Run | None:
        training = [run for run in sweep.runs("final") if run.info.status == "RUNNING" and worker_of(run, driver)]
        return next((run for run in training if len(sweep.epochs(run.info.run_id)) >= 3), None)

    return until(found, driver)


def children_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) >= 2
    return children


def wait_until_gone(processes: list[psutil.Process]) -> None:
    def gone() -> bool | None:
        return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes) or None

    assert until(gone, limit_s=30)


def refused(sweep: Sweep, *flags: str) -> str:
    """Run the sweep, which must be refused; return the one line."""
    done = sweep.run(*flags)
    assert done.returncode == 2, (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    return line


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


def test_a_killed_worker_costs_no_trial_and_a_sweep_that_is_done_stays_as_it_is(sweep):
    sweep.write(trials=4)
    driver = sweep.begin()
    killed = mid_trial(sweep, driver)
    worker = worker_of(sweep.client.get_run(killed.user_attrs["run_id"]), driver)
    assert worker is not None
    worker.kill()
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    check_whole(sweep, 4, {killed.number})

    before = sweep.content()
    again = sweep.run()
    assert again.returncode == 0 and again.stderr == ""
    assert "workers, " not in again.stdout and again.stdout.splitlines()[-2:] == out.splitlines()[-2:]
    assert sweep.content() == before
    line = refused(sweep, "--search", "{lr: {low: 1e-4, high: 1e-1, log: true}, batch_size: [32, 64]}")
    assert "search.lr" in line and "0.0001 to 0.01, log" in line and "0.0001 to 0.1, log" in line and "--name s-2" in line
    line = refused(sweep, "--train", "{device: cpu, epochs: 21}")
    assert "train.epochs: was 20 " in line and "now 21" in line and "--name s-2" in line
    assert sweep.content() == before


def test_a_killed_or_interrupted_driver_goes_on_to_the_exact_total(sweep):
    sweep.write(trials=8)
    driver = sweep.begin()
    mid_trial(sweep, driver)
    assert f"process {driver.pid} is driving it" in refused(sweep)  # a second driver
    assert driver.poll() is None

    mid_trial(sweep, driver, n_complete=1)
    workers = children_of(driver)
    driver.kill()
    driver.communicate()
    wait_until_gone(workers)
    kept, lost = sweep.values(), sweep.numbers("RUNNING")
    assert kept and lost

    driver = sweep.begin()
    assert lost == sweep.numbers("FAIL")
    mid_trial(sweep, driver)
    driver.send_signal(signal.SIGSTOP)  # so that it does not see its workers die
    for process in [*children_of(driver), driver]:
        process.kill()
    driver.communicate()
    lost |= sweep.numbers("RUNNING")

    driver = sweep.begin()
    assert lost == sweep.numbers("FAIL")
    mid_trial_and_about_to_start_another(sweep, driver)
    workers = children_of(driver)
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGINT)  # as people do
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "Traceback" not in err, err
    wait_until_gone(workers)
    assert sweep.parent.info.status == "KILLED"
    assert not sweep.trials("RUNNING") and "RUNNING" not in {run.info.status for run in sweep.runs()}
    lost = sweep.numbers("FAIL")

    done = sweep.run()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_whole(sweep, 8, lost)
    assert kept.items() <= sweep.values().items()


def test_final_trainings_that_were_killed_go_on_in_their_own_runs(sweep):
    train = {"device": "cpu", "epochs": 12, "optimizer": "sgd"}  # at the default lr of 0.01 that is slow: something else wins
    sweep.write(trials=2, final=2, train=train, search={"lr": [0.1]})
    driver = sweep.begin()
    first = mid_final(sweep, driver)
    workers = children_of(driver)
    driver.kill()
    driver.communicate()
    wait_until_gone(workers)

    driver = sweep.begin()
    assert "RUNNING" not in {run.info.status for run in sweep.runs("final")}
    second = mid_final(sweep, driver)
    worker = worker_of(second, driver)
    assert worker is not None
    worker.kill()
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    check_whole(sweep, 2, set())

    finals = sorted(sweep.runs("final"), key=lambda run: int(run.data.params["seed"]))
    assert {first.info.run_id, second.info.run_id} <= {run.info.run_id for run in finals}
    assert sorted((run.data.tags["arm"], run.data.params["seed"]) for run in finals) == [
        (arm, seed) for arm in ("default", "tuned") for seed in "12"
    ]
    for run in finals:
        assert run.info.status == "FINISHED" and run.data.tags["state"] == "COMPLETE"
        assert sorted(set(sweep.epochs(run.info.run_id))) == list(range(1, 13))
    with open(sweep.client.download_artifacts(sweep.parent.info.run_id, "answer.json", str(sweep.workplace.path))) as file:
        answer = json.load(file)
    for what in ("test/loss", "test/accuracy"):
        assert answer[what]["n"] == 2
        for arm in ("tuned", "default"):
            assert answer[what][arm] == [run.data.metrics[what] for run in finals if run.data.tags["arm"] == arm]


def test_eight_workers_at_once_in_an_empty_folder_and_then_two_trials_more(sweep):
    sweep.write(trials=12, train={"device": "cpu", "epochs": 8})
    done = sweep.run("--workers", "8")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    check_whole(sweep, 12, set())
    kept = sweep.values()
    assert {sweep.client.get_experiment(run.info.experiment_id).name for run in sweep.runs()} == {"stn"}
    done = sweep.run("--trials", "14")
    assert done.returncode == 0, done.stderr
    check_whole(sweep, 14, set())
    assert kept.items() <= sweep.values().items() and len(sweep.trials()) == 14


def test_mlflow_run_makes_the_studys_own_run_and_a_time_limit_alone_ends_it(sweep):
    sweep.write(time_limit_s=1)
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, sweep.workplace.path)
    done = sweep.workplace.run("mlflow", "run", ".", "--env-manager=local", "-e", "sweep", "-P", "config=s.yaml")
    assert done.returncode == 0, done.stderr
    assert sweep.parent.data.tags["mlflow.project.entryPoint"] == "sweep"
    assert sweep.parent.info.run_name == "sweep s" and sweep.parent.data.params["config"] == "s.yaml"
    n_trials = len(sweep.trials())
    assert n_trials >= 1  # the default configuration at least
    check_whole(sweep, n_trials, set())
