"""What another hand removes while trainings run, and what becomes of a training whose process dies: one line, and the others go on."""

import sqlite3
import threading
from collections.abc import Callable

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from stn_pipeline import tracking
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import StnError
from stn_pipeline.jobs import Job, Outcome, Trainings, drive
from stn_pipeline.jobs.worker import Worker
from stn_pipeline.search.study import Study
from stn_pipeline.search.sweepfile import SweepConfig
from stn_pipeline.tracking import Run
from tests import fakes
from tests.compared import children_of, fresh, keys_of
from tests.fakes import FakePool, News, ends, record
from tests.test_compare import go  # noqa: F401
from tests.test_search_source import BASE, Sweep, no_pictures, pairs  # noqa: F401

CRASHED = ends(record(1, 0.5), Outcome("crashed", "worker 1 (process 7) was killed by SIGSEGV"))


def delete(run_id: str) -> None:
    mlflow.MlflowClient().delete_run(run_id)


def deleted_while_it_trains(how: Callable[[], Outcome]) -> Callable[[Job], News]:
    def train(job: Job) -> News:
        yield record(1, 0.5)
        delete(job.run_id)
        yield how()

    return train


def an_end() -> Outcome:
    return fakes.DONE


def as_the_worker_says() -> Outcome:
    return Outcome("failed", "run x was deleted meanwhile")


def a_crash() -> Outcome:
    return Outcome("crashed", "worker 1 (process 7) was killed by SIGSEGV")


# A run that is deleted


@pytest.mark.parametrize("how", [an_end, as_the_worker_says, a_crash])
def test_a_trials_run_that_is_deleted_while_it_trains_stops_no_sweep(store, no_pictures, how):  # noqa: F811
    sweep = Sweep(trials=3, final=0, search={"lr": [0.01, 0.003, 0.002]})
    search, _ = sweep.go({"t001": deleted_while_it_trains(how)})
    assert search.n_left == 0 and search.counts()["done"] == 2 + (how in (an_end, a_crash))
    assert any(line.startswith("digits t001 ") for line in sweep.said)
    assert "RUNNING" not in "".join(sweep.statuses().values())


def test_a_final_trainings_run_that_is_deleted_is_made_anew_where_it_is_to_go_on(store, no_pictures):  # noqa: F811
    first = iter([deleted_while_it_trains(a_crash)])
    sweep = Sweep(trials=2, final=1, search={"lr": [0.01, 0.003]})
    search, pool = sweep.go({"tuned s1": lambda job: next(first, fakes.trained)(job)})
    tuned = [job for job in pool.jobs if job.key.endswith("tuned s1")]
    assert len(tuned) == 2 and tuned[0].run_id != tuned[1].run_id and tuned[1].resume == ""
    assert len(pairs(search, "test/loss")[0]) == 1


def test_a_comparisons_run_that_is_deleted_is_missing_and_trained_anew_by_the_same_command(go):  # noqa: F811
    name = fresh()
    _, said = go({"low digits s201": deleted_while_it_trains(as_the_worker_says)}, name=name, seeds=[200, 201, 202])
    assert any("low digits s201: failed: run x was deleted meanwhile" in line for line in said)
    assert any("low: seed 201 is missing" in line for line in said)
    pool, _ = go(name=name, seeds=[200, 201, 202])
    assert keys_of(pool) == ["low s201"]


def test_a_run_that_is_done_and_then_deleted_does_not_end_the_comparison(go):  # noqa: F811
    name = fresh()

    def and_then_deletes_another(job: Job) -> News:
        (other,) = (child for child in children_of(name) if child.data.tags["arm"] == "base" and child.data.params["seed"] == "210")
        delete(other.info.run_id)
        yield Outcome("failed", "out of memory: so that it does not matter")

    _, said = go({"high digits s212": and_then_deletes_another}, name=name, seeds=[210, 211, 212])
    assert any("base: seed 210 is missing" in line for line in said), said


def test_the_sweeps_own_run_that_is_deleted_ends_it_in_one_line(store, signals_restored):
    sweep = Sweep(trials=3, search={"lr": [0.01, 0.003, 0.002]})

    def train(job: Job) -> News:
        delete(sweep.parent.id)
        yield from fakes.trained(job)

    with (
        pytest.raises(StnError, match=f"^run {sweep.parent.id} was deleted meanwhile: nothing more can be written to it$"),
        tracking.closing(sweep.parent, sweep.parent.close),
    ):
        drive(sweep.begin(), FakePool({"t001": train}))


@pytest.mark.parametrize("purged", [False, True])
def test_a_worker_whose_run_is_deleted_fails_its_job_in_one_line(store, purged):
    run = tracking.create_run("x", tracking.experiment_id(), TrainConfig(), {})
    worker = Worker()
    delete(run.id)
    job = Job("x", "0" * 32 if purged else run.id, TrainConfig(dataset="digits", device="cpu", epochs=1))
    outcome = worker.perform(job, "cpu", lambda record: True)
    assert outcome == Outcome("failed", f"run {job.run_id} was deleted meanwhile")


def test_only_a_run_that_is_gone_is_forgiven(store):
    run = tracking.create_run("x", tracking.experiment_id(), TrainConfig(), {})
    assert tracking.why_gone(MlflowException("refused"), run.id) == "" and tracking.why_gone(ValueError(), run.id) == ""
    with pytest.raises(MlflowException, match="refused"), tracking.unless_gone(run.id):
        raise MlflowException("refused")
    delete(run.id)
    with tracking.unless_gone(run.id):
        run.tag({"a": "b"})


# A file that another program has locked


@pytest.mark.slow
def test_a_study_that_another_program_locks_for_longer_than_sqlite_waits_goes_on(store, tmp_path):
    study = Study(f"sqlite:///{tmp_path}/s.db", "s", SweepConfig.parse(BASE), "digits", {})
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(8, lambda: other.execute("COMMIT")).start()
    assert study.ask() is not None


# What a worker and a driver make of errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), "lost"),
        (MlflowException("(sqlite3.OperationalError) database is locked"), "lost"),
        (MlflowException("Invalid metric name", error_code=1000), "bug"),
        (ZeroDivisionError("division by zero"), "bug"),
        (MemoryError(), "failed"),
    ],
)
def test_what_the_machine_or_the_store_cannot_do_is_no_bug(store, monkeypatch, error, kind):
    run, worker = tracking.create_run("x", tracking.experiment_id(), TrainConfig(), {}), Worker()

    def train(*_: object) -> Outcome:
        raise error

    monkeypatch.setattr(worker, "_train", train)
    outcome = worker.perform(Job("x", run.id, TrainConfig()), "cpu", lambda record: True)
    assert outcome.kind == kind and (kind == "bug" or "\n" not in outcome.reason)


def test_a_stopped_driver_closes_each_job_though_one_cannot_be_closed_and_tells_the_first_error(signals_restored):
    closed: list[str] = []

    class Source:
        jobs = [Job(key, "r", TrainConfig()) for key in "abc"]

        def next(self) -> Job | None:
            return self.jobs.pop() if self.jobs else None

        def epoch(self, job: Job, record: object) -> bool:
            raise ZeroDivisionError

        def ended(self, job: Job, outcome: Outcome) -> None:
            closed.append(job.key)
            if job.key == "b":
                raise MlflowException("refused")

    with pytest.raises(ZeroDivisionError):
        drive(Source(), FakePool({"": ends(record(1, 0.5))}, n_workers=3))
    assert sorted(closed) == ["a", "b", "c"]


# A process that dies


def test_a_training_whose_process_died_twice_has_collapsed_and_is_not_missing(go):  # noqa: F811
    name = fresh()
    pool, said = go({"low digits s221": CRASHED}, name=name, seeds=[220, 221, 222])
    assert keys_of(pool).count("low s221") == 2
    (run,) = (child for child in children_of(name) if child.data.tags["arm"] == "low" and child.data.params["seed"] == "221")
    why = "its process died twice: worker 1 (process 7) was killed by SIGSEGV"
    assert (run.info.status, run.data.tags["collapsed"], run.data.tags["collapsed.why"], run.data.tags["error"]) == (
        "FAILED",
        "true",
        why,
        why,
    )
    assert any(f"low: seed 221 crashed: {why}" in line for line in said)
    assert any(line.startswith("low lost 1 of 3 seeds and base 0") for line in said)
    assert go(name=name, seeds=[220, 221, 222])[0].jobs == []


def test_what_was_lost_with_its_node_is_missing_though_its_process_died_too(store):
    trainings: Trainings[str] = Trainings()
    run = tracking.create_run("x", tracking.experiment_id(), TrainConfig(), {})
    for outcome in (a_crash(), Outcome("lost", "node n died or froze")):
        trainings.ended(trainings.job("k", "x", TrainConfig(), run), outcome)
    assert not trainings.is_open("k") and trainings.by_key["k"].failed == ""
    found = tracking.find_run(run.id)
    assert found.info.status == "KILLED" and "collapsed" not in found.data.tags


def test_a_process_that_died_once_and_then_trained_on_has_not_collapsed(store):
    trainings: Trainings[str] = Trainings()
    run = Run(tracking.create_run("x", tracking.experiment_id(), TrainConfig(), {}).id)
    done = Outcome("done", figures={"test/loss": 0.1, "test/accuracy": 0.9, "val/loss": 0.2, "val/accuracy": 0.9})
    assert [trainings.ended(trainings.job("k", "x", TrainConfig(), run), outcome) for outcome in (a_crash(), done)] == [
        "lost: worker 1 (process 7) was killed by SIGSEGV",
        "test/loss 0.1000, test/accuracy 0.9000",
    ]
    assert "collapsed" not in tracking.find_run(run.id).data.tags
