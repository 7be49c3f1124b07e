"""A search from end to end on a real MLflow store, without training: runs and their ends, finals, kills, and the answer on the page."""

import csv
import io
import itertools
import json
import shlex
from collections.abc import Callable
from typing import Any

import mlflow
import pytest
import yaml

from stn_pipeline import cli, tracking
from stn_pipeline.comparing.paired import paired
from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs import Job, Outcome, drive
from stn_pipeline.jobs.driver import JobError
from stn_pipeline.search.answer import finals_in_words, finals_table, shared_seeds
from stn_pipeline.search.page import publish
from stn_pipeline.search.source import Search
from stn_pipeline.search.study import Study
from stn_pipeline.search.sweep import SideBySide, _register
from stn_pipeline.search.sweepfile import SweepConfig
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import Run
from stn_pipeline.training import Record
from tests.fakes import BUG, DONE, FAILED, LOST, FakePool, Killed, News, ends, loss_of, record, test_figures

BASE = {"name": "x", "search": ["lr"], "train": {"epochs": 3}, "trials": 2, "sampler": "random", "pruner": "none", "final": 1}
NOTE = "mlflow.note.content"
ONE_SEED = (
    "One shared seed (0) chose the winner, so what its trial promises it need not keep: confirm: {top: 5, seeds: 3} chooses by fresh seeds."
)


# A store and a study


@pytest.fixture(autouse=True, scope="module")
def deaf_no_more(signals_restored):
    """A drive that is stopped ends deaf to Ctrl-C."""


class Sweep:
    """A sweep of one study: `begin` is a new driver, `go` one that drives to the end; what the console was told is `said`."""

    counter = itertools.count()

    def __init__(self, label: str = "digits", **keys: Any):
        self.keys, self.label, self.name = BASE | keys, label, f"x{next(self.counter)}"
        self.experiment = tracking.experiment_id()
        self.parent = tracking.create_run(f"sweep {self.name}", self.experiment, SweepConfig.parse(self.keys), {})
        self.said: list[str] = []

    def begin(self, **keys: Any) -> Search:
        self.keys |= keys
        study = Study("sqlite:///studies.db", self.name, SweepConfig.parse(self.keys), "digits", {})
        search = Search(study, Run(self.parent.id), self.experiment, self.label, self.said.append)
        search.recover()
        return search

    def go(self, plays: dict[str, Callable[[Job], News]] | None = None, n_workers: int = 1, **keys: Any) -> tuple[Search, FakePool]:
        search, pool = self.begin(**keys), FakePool(plays, n_workers)
        drive(search, pool)
        return search, pool

    def stopped_by(self, error: type[BaseException], plays: dict[str, Callable[[Job], News]], n_workers: int = 1) -> FakePool:
        pool = FakePool(plays, n_workers)
        with pytest.raises(error) as caught:
            drive(self.begin(), pool)
        assert caught.value
        return pool

    @property
    def runs(self) -> dict[str, mlflow.entities.Run]:
        """The study's runs by the last words of their key: t000, or tuned s1."""
        found = {}
        for run in tracking.search_runs({tracking.CHILD_OF: self.parent.id}):
            tags = run.data.tags
            key = f"t{int(tags['trial']):03d}" if tags["stage"] == "trial" else f"{tags['arm']} s{run.data.params['seed']}"
            assert key not in found, f"two runs of {key}"
            found[key] = run
        return found

    def statuses(self) -> dict[str, str]:
        return {key: f"{run.info.status} {run.data.tags['state']}" for key, run in self.runs.items()}


def artifact(run_id: str, name: str) -> str:
    return mlflow.artifacts.load_text(f"runs:/{run_id}/{name}")


def pairs(search: Search, what: str) -> tuple[list[float], ...]:
    """Return a test figure of the winner and of the default, seed by seed, where both are there."""
    table = finals_table(search)
    return tuple([table[arm][seed].figures[what] for seed in shared_seeds(table)] for arm in ("tuned", "default"))


def keys_of(pool: FakePool) -> list[str]:
    return [job.key.split(" ", 1)[1] for job in pool.jobs]


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("stn_pipeline.search.page.pictures", lambda *_: {})


@pytest.fixture(scope="module")
def story(store):
    """Five trials: done, pruned, failed, lost and tried again, done; then the winner and the default with two fresh seeds."""
    real = Study.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "report", lambda self, number, *args: real(self, number, *args) and number != 1)
        sweep = Sweep(trials=5, final=2, question="Which lr?", train={"epochs": 3, "padding": "border"})
        search, pool = sweep.go({"t002": FAILED, "t003": LOST})
    return sweep, search, pool, publish(search)


# How trials end


def test_every_end_of_a_trial_has_its_status_and_state(story):
    sweep, search, _, _ = story
    assert {key: status for key, status in sweep.statuses().items() if key.startswith("t0")} == {
        "t000": "FINISHED COMPLETE",
        "t001": "KILLED PRUNED",
        "t002": "FAILED FAIL",
        "t003": "FAILED FAIL",
        "t004": "FINISHED COMPLETE",
        "t005": "FINISHED COMPLETE",
    }
    assert [trial.state.name for trial in search.study.trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert search.counts() == {"done": 3, "pruned": 1, "failed": 1, "lost": 1}
    assert search.n_left == 0


def test_a_trials_run_says_what_it_is(story):
    sweep, search, pool, _ = story
    trials = search.study.trials
    for key, job in zip(keys_of(pool), pool.jobs, strict=True):
        if key.startswith("t0"):
            run, params = sweep.runs[key], trials[int(key[1:])].user_attrs["params"]
            again = " (t003 again)" if key == "t004" else ""
            assert run.info.run_name == f"digits {key} lr={params['lr']:.1e}{again}"
            assert run.data.tags["study"] == sweep.name and run.data.tags["mlflow.parentRunId"] == sweep.parent.id
            assert ("default" in run.data.tags) == (key == "t000")
            assert job.config == TrainConfig.parse({"dataset": "digits", "epochs": 3, "padding": "border", **params})
            assert run.data.params == {name: str(value) for name, value in job.config.model_dump().items()}
            assert (job.run_id, trials[int(key[1:])].user_attrs["run_id"], job.whole) == (run.info.run_id, run.info.run_id, False)


def test_a_trials_page_says_how_it_ended_and_why(story):
    sweep, search, _, _ = story
    notes = {key: run.data.tags.get(NOTE, "") for key, run in sweep.runs.items()}
    value = search.study.trials[4].value
    assert notes["t004"] == f"**val/loss {value:.4f}**, the best of 3 epochs."
    assert notes["t001"].startswith("**Pruned** after 1 of 3 epochs: val/loss ")
    assert notes["t002"] == "**Failed.** training loss is nan at epoch 1, step 3 of 21, lr=0.1"
    assert notes["t003"] == "**Lost.** worker 7 ended with exit code -9"
    assert [sweep.runs[key].data.tags.get("error") for key in ("t002", "t003", "t004")] == [
        "training loss is nan at epoch 1, step 3 of 21, lr=0.1",
        "worker 7 ended with exit code -9",
        None,
    ]


def test_the_console_is_told_a_line_for_each_end(story):
    sweep, search, _, _ = story
    trials, first, pruned = search.study.trials, *search.study.trials[:2]
    words = [f"digits t{trial.number:03d} lr={trial.user_attrs['params']['lr']:.1e}: " for trial in trials]
    assert sweep.said[0] == f"{words[0]}val/loss {first.value:.4f} (best so far)"
    assert sweep.said[1] == f"{words[1]}pruned after 1 of 3 epochs, val/loss {pruned.value:.4f}"
    assert sweep.said[2] == f"{words[2]}failed: training loss is nan at epoch 1, step 3 of 21, lr=0.1"
    assert sweep.said[3] == f"{words[3]}lost after 1 epochs: worker 7 ended with exit code -9"
    best = first.value
    for trial, word, said in zip(trials[4:], words[4:], sweep.said[4:6], strict=True):
        assert said == f"{word}val/loss {trial.value:.4f}" + " (best so far)" * (trial.value < best)
        best = min(best, trial.value)


def test_a_lost_trial_is_tried_again_with_its_knobs_from_its_own_checkpoint(story):
    sweep, search, pool, _ = story
    (again,) = (job for job in pool.jobs if job.key.endswith("t004"))
    lost = sweep.runs["t003"]
    assert again.resume == lost.info.run_id != again.run_id
    assert sweep.runs["t004"].data.tags["retry_of"] == "3"
    assert {job.resume for job in pool.jobs if job is not again} == {""}
    assert search.study.trials[4].user_attrs["params"] == search.study.trials[3].user_attrs["params"]


def test_the_best_value_so_far_is_reported_and_logged(story):
    sweep, search, _, _ = story
    for trial in (trial for trial in search.study.trials if trial.state.name == "COMPLETE"):
        loss = loss_of(search.study.config(trial.user_attrs["params"]))
        assert trial.intermediate_values == {1: loss + 0.2, 2: loss, 3: loss}
        assert trial.value == loss == sweep.runs[f"t{trial.number:03d}"].data.metrics["best/val/loss"]
    history = mlflow.MlflowClient().get_metric_history(sweep.parent.id, "best/val/loss")
    values = [point.value for point in sorted(history, key=lambda point: (point.timestamp, -point.value))]
    assert values == sorted(values, reverse=True) and values[-1] == search.study.best.value


def test_an_accuracy_is_maximised(store):
    accuracies = ends(*(record(i, 9.0, value) for i, value in enumerate((0.5, 0.7, 0.6), 1)), DONE)
    search, _ = Sweep(objective="val/accuracy", trials=1, final=0).go({"t000": accuracies})
    assert search.study.trials[0].intermediate_values == {1: 0.5, 2: 0.7, 3: 0.7}
    assert (search.study.best.value, search.state) == (0.7, "digits: best 0.7000 (t000), 1 done")


def test_the_default_is_never_pruned_not_even_tried_again(store, monkeypatch):
    monkeypatch.setattr(Study, "report", lambda *_: False)
    sweep = Sweep(trials=2, final=0)
    search, _ = sweep.go({"t000": LOST})
    assert sweep.statuses() == {"t000": "FAILED FAIL", "t001": "FINISHED COMPLETE", "t002": "KILLED PRUNED"}
    assert sweep.runs["t001"].data.tags["default"] == "true"


# Final trainings


def test_the_winner_and_the_default_are_trained_again_in_pairs_with_fresh_seeds(story):
    sweep, search, pool, _ = story
    finals = [job for job in pool.jobs if job.whole]
    assert [job.key.split(" final ")[1] for job in finals] == ["tuned s1", "default s1", "tuned s2", "default s2"]
    params = {"tuned": search.study.best.user_attrs["params"], "default": {"lr": 0.01}}
    for job in finals:
        arm, seed = job.key.split(" final ")[1].split(" s")
        assert job.config == search.study.config(params[arm], int(seed)) and job.config.seed == int(seed)
        run = sweep.runs[f"{arm} s{seed}"]
        assert (run.info.run_id, run.info.status, run.data.tags["state"]) == (job.run_id, "FINISHED", "COMPLETE")
        assert run.data.tags["trial"] == str(search.winner if arm == "tuned" else 0)
        assert run.data.metrics["time/overhead_s"] == 0.5
    assert len([run for run in sweep.runs.values() if run.data.tags["stage"] == "final"]) == 4


def test_no_final_training_starts_before_every_trial_has_ended(store):
    sweep = Sweep(trials=5, final=2, seed=10, search={"lr": [0.01, 0.003, 0.002, 0.001, 0.005]})
    search, pool = sweep.go({"t001": LOST}, n_workers=4)
    first = next(at for at, told in enumerate(pool.told) if " final " in told)
    assert sum(told.startswith("end ") for told in pool.told[:first]) == 6
    assert [job.config.seed for job in pool.jobs] == [10] * 6 + [11, 11, 12, 12]
    assert search.running == {}


def test_where_the_default_wins_it_alone_is_trained_again(store, no_pictures):
    sweep = Sweep(trials=2, final=2, search={"lr": [0.01, 10.0]})
    search, pool = sweep.go()
    assert keys_of(pool)[2:] == ["final default s1", "final default s2"]
    answer = publish(search).splitlines()
    assert search.winner == 0
    assert answer[0] == "Tuning found nothing better than the default: val/loss 0.6000 (trial t000) was best on validation."
    assert pairs(search, "test/loss")[0] == pairs(search, "test/loss")[1]
    figures = json.loads(artifact(sweep.parent.id, "answer.json"))
    assert (figures["best"], figures["best_trial"], figures["answer"]) == ({"lr": 0.01}, 0, answer)
    assert "test/loss" not in figures


def test_a_winner_that_was_lost_once_is_known_by_the_number_it_had_first(store):
    search, pool = Sweep(trials=2, search={"lr": [0.01, 0.003]}).go({"t001": LOST})
    assert (search.study.best.number, search.winner) == (2, 1)
    assert search.finals.keys() == {(1, 1), (0, 1)}


def test_a_default_that_was_lost_once_is_still_the_default(store, no_pictures):
    sweep = Sweep(trials=2, search={"lr": [0.01, 10.0]})
    search, pool = sweep.go({"t000": LOST})
    assert (search.study.best.number, search.winner, keys_of(pool)[3:]) == (1, 0, ["final default s1"])
    assert publish(search).startswith("Tuning found nothing better than the default: val/loss 0.6000 (trial t001)")


def test_a_final_training_that_diverges_is_said_and_not_tried_again(store, no_pictures):
    sweep = Sweep(final=3, search={"lr": [0.01, 0.003]})
    search, _ = sweep.go({"tuned s2": FAILED})
    answer = publish(search)
    assert answer.splitlines()[2] == "Tuned lost 1 of 3 final trainings (1 failed): training loss is nan at epoch 1, step 3 of 21, lr=0.1."
    assert "; 2 seeds, " in answer.splitlines()[0]  # what failed without having diverged says nothing about its arm
    run = sweep.runs["tuned s2"]
    assert (run.info.status, run.data.tags["state"]) == ("FAILED", "FAIL")
    assert run.data.tags["error"] == "training loss is nan at epoch 1, step 3 of 21, lr=0.1"
    assert [len(values) for values in pairs(search, "test/loss")] == [2, 2]
    again, pool = sweep.go()
    assert (pool.jobs, again.n_left, publish(again)) == ([], 0, answer)


def test_a_final_training_that_is_lost_goes_on_once_from_its_own_checkpoint(store, no_pictures):
    sweep = Sweep(final=1, search={"lr": [0.01, 0.003]})
    search, pool = sweep.go({"tuned s1": LOST})
    tuned = [job for job in pool.jobs if job.key.endswith("tuned s1")]
    assert [job.resume for job in tuned] == ["", tuned[0].run_id] and tuned[1].run_id == tuned[0].run_id
    assert sweep.statuses()["tuned s1"] == "KILLED FAIL"
    told = publish(search).splitlines()
    assert "no seed that both have done" in told[0] and told[1:] == [
        "Tuned lost 1 of 1 final trainings (1 missing): they were not trained to the end; the same command goes on.",
        ONE_SEED,
    ]
    again, pool = sweep.go()
    assert keys_of(pool) == ["final tuned s1"] and len(pairs(again, "test/loss")[0]) == 1
    assert sweep.statuses()["tuned s1"] == "FINISHED COMPLETE"


def test_without_final_trainings_the_answer_says_that_it_is_none(store, no_pictures):
    search, pool = Sweep(final=0, search={"lr": [0.01, 0.003]}).go()
    assert not any(job.whole for job in pool.jobs)
    assert publish(search) == (
        "Best: val/loss 0.1229 (trial t001) against 0.6000 of the default configuration, on validation, one seed each: "
        f"not yet an answer (final is 0, so no test split was read).\n{ONE_SEED}"
    )


def test_where_no_trial_was_done_nothing_is_claimed(store, no_pictures):
    sweep = Sweep()
    search, pool = sweep.go({"t00": FAILED})
    assert (keys_of(pool), publish(search), search.state, search.n_left) == (
        ["t000", "t001"],
        "Every trial failed, so there is no answer (2 failed). The first, t000: training loss is nan at epoch 1, step 3 of 21, lr=0.1",
        "digits: no trial done, 2 failed",
        0,
    )
    assert "best.yaml" not in [file.path for file in mlflow.MlflowClient().list_artifacts(sweep.parent.id)]


def test_a_default_that_failed_is_named_so(store, no_pictures):
    search, _ = Sweep(final=0, search={"lr": [0.01, 0.003]}).go({"t000": FAILED})
    assert "against none (it failed) of the default configuration" in publish(search)


# Whatever stops the driver


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
def test_a_stopped_drive_goes_on_where_it_was_and_loses_nothing(store, error):
    sweep = Sweep(trials=3, final=1, search={"lr": [0.01, 0.003, 0.002]})
    pool = sweep.stopped_by(error, {"t001": ends(record(1, 0.5), error())}, n_workers=2)
    assert keys_of(pool) == ["t000", "t001", "t002"][: len(pool.jobs)] and pool.closed
    before = sweep.statuses()
    assert before["t001"] == ("FAILED FAIL" if error is KeyboardInterrupt else "RUNNING RUNNING")
    search, pool = sweep.go()
    assert "RUNNING" not in "".join(sweep.statuses().values())
    assert search.study.n_slots == 3 and search.counts()["done"] == 3 and search.n_left == 0
    assert len(pairs(search, "test/loss")[0]) == 1
    again = [job for job in pool.jobs if job.key.split()[-1] in ("t003", "t004") and job.resume]
    assert again[0].resume in {run.info.run_id for run in sweep.runs.values()}


def test_an_interrupted_trial_says_so(store):
    sweep = Sweep()
    sweep.stopped_by(KeyboardInterrupt, {"t000": ends(record(1, 0.5), KeyboardInterrupt())})
    run = sweep.runs["t000"]
    assert (run.data.tags["error"], run.data.tags[NOTE]) == ("the driver was stopped", "**Lost.** the driver was stopped")
    assert sweep.begin().study.trials[0].user_attrs["lost"] == "driver"
    assert sweep.said == ["digits t000 lr=1.0e-02: lost after 1 epochs: the driver was stopped"]


def test_a_bug_stops_the_sweep_with_its_traceback_and_the_next_call_tries_again(store):
    sweep = Sweep(trials=3)
    pool = FakePool({"t001": BUG}, n_workers=2)
    with pytest.raises(JobError) as caught:
        drive(sweep.begin(), pool)
    assert str(caught.value).splitlines()[0] == f"{sweep.name} t001 broke: ZeroDivisionError: division by zero"
    assert "File x" in str(caught.value) and pool.closed
    assert [sweep.runs[key].data.tags["error"].splitlines()[0] for key in ("t000", "t001")] == [
        "the driver was stopped",
        "ZeroDivisionError: division by zero",
    ]
    assert sweep.statuses() == {"t000": "FAILED FAIL", "t001": "FAILED FAIL"}
    search, pool = sweep.go()
    assert [job.resume for job in pool.jobs][:2] == [sweep.runs[key].info.run_id for key in ("t000", "t001")]
    assert search.counts() == {"done": 3, "pruned": 0, "failed": 0, "lost": 2}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed, JobError])
def test_finals_that_were_stopped_go_on_and_done_ones_are_kept(store, no_pictures, error):
    sweep = Sweep(final=2, search={"lr": [0.01, 0.003]})
    how = BUG if error is JobError else ends(record(1, 0.5), error())
    sweep.stopped_by(error, {"default s1": how})
    assert sweep.statuses()["default s1"] == ("RUNNING RUNNING" if error is Killed else "KILLED FAIL")
    stopped = sweep.runs["default s1"].info.run_id
    search, pool = sweep.go()
    assert [(job.key.split(" final ")[1], job.resume) for job in pool.jobs] == [
        ("default s1", stopped),
        ("tuned s2", ""),
        ("default s2", ""),
    ]
    assert pool.jobs[0].run_id == stopped
    unbroken = Sweep(final=2, search={"lr": [0.01, 0.003]})
    assert publish(search) == publish(unbroken.go()[0])


def test_a_final_of_a_winner_that_was_beaten_is_not_left_running(store):
    sweep = Sweep(final=1, search={"lr": [0.01, 0.001, 0.003]})
    sweep.stopped_by(Killed, {"tuned s1": ends(Killed())})
    winner = sweep.begin().winner
    search, _ = sweep.go({"t002": ends(record(1, 1e-6), DONE)}, trials=3)
    assert search.winner == 2 != winner
    statuses = [run.info.status for run in tracking.search_runs({tracking.CHILD_OF: sweep.parent.id})]
    assert "RUNNING" not in statuses


@pytest.mark.parametrize("write", ["log_metrics", "tag", "close"])
def test_a_run_left_open_after_its_trial_was_told_ends_as_the_trial_did(store, monkeypatch, write):
    sweep, pool = Sweep(trials=2, final=0), FakePool()
    search, pool.killed = sweep.begin(), True

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, write, killed)
        drive(search, pool)
    assert sweep.runs["t000"].info.status == "RUNNING"
    search = sweep.begin()
    assert sweep.statuses() == {"t000": "FINISHED COMPLETE"} and search.counts()["done"] == 1
    assert sweep.runs["t000"].data.metrics["best/val/loss"] == search.study.best.value


def test_a_run_that_a_kill_left_behind_says_that_its_trial_was_lost(store):
    sweep = Sweep()
    sweep.stopped_by(Killed, {"t000": ends(record(1, 0.5), Killed())})
    orphan = tracking.create_run("x", sweep.experiment, TrainConfig(), {"stage": "trial", "trial": "9"}, sweep.parent.id)
    search = sweep.begin()
    for run in (sweep.runs["t000"], mlflow.get_run(orphan.id)):
        assert (run.info.status, run.data.tags["state"]) == ("FAILED", "FAIL")
        assert run.data.tags[NOTE] == "Lost: the driver was stopped; a later trial tries it again."
    assert [trial.user_attrs.get("lost") for trial in search.study.trials] == ["driver"]


def test_a_kill_while_a_finals_run_is_made_leaves_a_study_that_goes_on(store, monkeypatch):
    sweep, real = Sweep(final=1, search={"lr": [0.01, 0.003]}), Run.log_knobs

    def log_knobs(self: Run, knobs: TrainConfig) -> None:
        if knobs.seed:
            raise Killed
        real(self, knobs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "log_knobs", log_knobs)
        sweep.go()
    search, _ = sweep.go()
    assert len(pairs(search, "test/loss")[0]) == 1 and search.n_left == 0


def test_recovering_leaves_closed_runs_alone(story):
    sweep, search, _, _ = story
    before = {run.info.run_id: (run.info.status, run.info.end_time, run.data.tags) for run in sweep.runs.values()}
    sweep.begin()
    assert {run.info.run_id: (run.info.status, run.info.end_time, run.data.tags) for run in sweep.runs.values()} == before


def test_more_trials_and_a_new_winner_need_only_the_new_winners_finals(store, no_pictures):
    sweep = Sweep(trials=2, final=1, search={"lr": [0.01, 0.001, 0.003]})
    sweep.go({"t001": ends(record(1, 0.55), DONE)})
    search, pool = sweep.go({"t002": ends(record(1, 0.01), DONE)}, trials=3)
    assert keys_of(pool) == ["t002", "final tuned s1"] and search.winner == 2
    assert pairs(search, "test/loss") == (
        [test_figures(search.study.config(search.study.trials[2].user_attrs["params"], 1))["test/loss"]],
        [test_figures(search.study.config({"lr": 0.01}, 1))["test/loss"]],
    )


# Side by side


def test_two_studies_share_a_pool_in_turn_and_each_hears_its_own(store):
    sweeps = [Sweep("a", trials=2, final=1, seed=1), Sweep("b", trials=3, final=1, seed=2)]
    searches, pool = [sweep.begin() for sweep in sweeps], FakePool({f"{sweeps[1].name} t001": LOST}, n_workers=2)
    beats: list[int] = []
    drive(SideBySide(searches), pool, lambda: beats.append(sum(search.n_left for search in searches)))
    owners = [job.key.split()[0] for job in pool.jobs]
    assert owners[:4] == [sweeps[0].name, sweeps[1].name] * 2
    assert [search.counts()["done"] for search in searches] == [2, 3]
    assert [search.counts()["lost"] for search in searches] == [0, 1]
    assert [len(pairs(search, "test/loss")[0]) for search in searches] == [1, 1]
    assert [search.n_left for search in searches] == [0, 0]
    for sweep in sweeps:
        assert all(run.info.run_name.startswith(sweep.label) for run in sweep.runs.values())
        assert all(status.startswith(("FINISHED", "FAILED")) for status in sweep.statuses().values())


# The page


def test_the_answer_is_that_of_the_paired_runs(story):
    sweep, search, _, answer = story
    figures = json.loads(artifact(sweep.parent.id, "answer.json"))
    runs = sweep.runs
    for what in ("test/loss", "test/accuracy"):
        tuned, default = ([runs[f"{arm} s{seed}"].data.metrics[what] for seed in (1, 2)] for arm in ("tuned", "default"))
        pair = paired(tuned, default)
        assert figures[what] == vars(pair) | {"tuned": tuned, "default": default}
        metrics = mlflow.get_run(sweep.parent.id).data.metrics
        assert (metrics[f"tuned/{what}"], metrics[f"default/{what}"]) == (pair.arm_mean, pair.baseline_mean)
    lines = finals_in_words(finals_table(search), "digits (3 epochs)")
    assert len(lines) == 2 and lines[0].startswith("Tuned ") and " on digits (3 epochs)" in lines[0] and "2 seeds" in lines[0]
    assert answer.splitlines() == figures["answer"] == [*lines, ONE_SEED]


def test_answer_json_has_the_counts_the_best_and_what_pruning_saved(story):
    sweep, search, _, _ = story
    figures, best = json.loads(artifact(sweep.parent.id, "answer.json")), search.study.best
    assert (figures["study"], figures["trials"]) == (sweep.name, {"done": 3, "pruned": 1, "failed": 1, "lost": 1})
    assert (figures["epochs_saved"], figures["epochs_without_pruning"]) == (2, 12)
    assert (figures["best"], figures["best_trial"], figures["val/loss"]) == (best.user_attrs["params"], best.number, best.value)


def test_trials_csv_has_every_trial_with_its_knobs_and_its_end(story):
    sweep, search, _, _ = story
    rows = list(csv.DictReader(io.StringIO(artifact(sweep.parent.id, "trials.csv"))))
    assert [int(row["trial"]) for row in rows] == list(range(6))
    for row, trial in zip(rows, search.study.trials, strict=True):
        assert row["state"] == trial.state.name and float(row["lr"]) == trial.user_attrs["params"]["lr"]
        assert row["val/loss"] == ("" if trial.value is None else str(trial.value))
        assert row["run_id"] == sweep.runs[f"t{trial.number:03d}"].info.run_id
        assert float(row["seconds"]) >= 0
    assert [row["epochs"] for row in rows] == ["3", "1", "0", "1", "3", "3"]
    assert [(row["retry_of"], row["lost"]) for row in rows[2:]] == [("", ""), ("", "worker"), ("3", ""), ("", "")]
    assert rows[3]["reason"] == "worker 7 ended with exit code -9"


def test_best_yaml_is_a_training_with_the_best_knobs(story):
    sweep, search, _, _ = story
    best = TrainConfig.parse(yaml.safe_load(artifact(sweep.parent.id, "best.yaml")))
    assert best == search.study.config(search.study.best.user_attrs["params"])
    assert (best.padding, best.dataset) == ("border", "digits")


def test_the_page_begins_with_the_answer_and_tells_the_rest(story):
    sweep, search, _, answer = story
    tags, best = mlflow.get_run(sweep.parent.id).data.tags, search.study.best
    told, question, command, table, summary, _ = tags[NOTE].split("\n\n")
    assert told == f"**{markdown(' '.join(answer.splitlines()))}**" and question == "*Which lr?*"
    assert (tags["answer"], tags["best_trial"]) == (" ".join(answer.splitlines()), str(best.number))
    assert "python -m stn_pipeline.train --dataset digits --epochs 3 --padding border --lr " in command
    rows = table.splitlines()
    assert len(rows) == 2 + 3 and rows[2].startswith(f"| t{best.number:03d} | {best.value:.4f} | ")
    values = [float(row.split(" | ")[1]) for row in rows[2:]]
    assert values == sorted(values) and sum("t000 (default)" in row for row in rows) == 1
    run_id = best.user_attrs["run_id"]
    assert rows[2].endswith(f"[{run_id}](#/experiments/{sweep.experiment}/runs/{run_id}) |")
    assert summary.startswith("6 trials (3 done, 1 pruned, 1 failed, 1 lost); pruning saved 2 of 12 epochs, ")
    assert summary.endswith(" s in all. Searched: `lr` in 0.0001 to 0.03, log; random, none.")


def test_the_command_on_the_page_trains_the_best_knobs(store, no_pictures):
    sweep = Sweep(final=0, train={"epochs": 3, "data_dir": "my data", "coordconv": True}, search={"lr": [0.01, 0.0031622776]})
    search, _ = sweep.go()
    publish(search)
    command = mlflow.get_run(sweep.parent.id).data.tags[NOTE].split("\n\n")[1].split("`")[3]
    flags = shlex.split(command.removeprefix("python -m stn_pipeline.train "))
    told, best = TrainConfig.parse(cli.parse(TrainConfig, flags, "")), search.study.config(search.study.best.user_attrs["params"])
    assert told.model_dump() == best.model_dump() | {"lr": pytest.approx(0.00316, rel=0.01)}


def test_one_pair_is_told_without_an_interval(store, no_pictures):
    sweep = Sweep(final=1, search={"lr": [0.01, 0.003]})
    assert "a single pair says nothing about noise" in publish(sweep.go()[0])
    loss = json.loads(artifact(sweep.parent.id, "answer.json"))["test/loss"]
    assert (loss["n"], loss["low"], loss["high"], loss["p"]) == (1, None, None, None)
    assert (len(loss["tuned"]), loss["difference"]) == (1, loss["tuned"][0] - loss["default"][0])


def test_the_page_has_its_pictures(story):
    sweep, *_ = story
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(sweep.parent.id)}
    assert {"history.png", "timeline.png", "slices.png", "trials.csv", "best.yaml", "answer.json"} <= names


def test_only_the_best_are_shown_and_always_the_default(store, no_pictures):
    sweep = Sweep(trials=8, final=0, search={"lr": [0.01, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.02]})
    search, _ = sweep.go()
    publish(search)
    table = mlflow.get_run(sweep.parent.id).data.tags[NOTE].split("\n\n")[2].splitlines()[2:]
    values = sorted(trial.value for trial in search.study.trials)
    assert [row.split(" | ")[1] for row in table] == [f"{value:.4f}" for value in (*values[:5], 0.6)]
    assert table[5].startswith("| t000 (default) | ")


def test_of_an_accuracy_the_highest_are_shown_first(store, no_pictures):
    sweep = Sweep(trials=3, final=0, objective="val/accuracy")
    plays = {f"t00{i}": ends(record(1, 1.0, value), DONE) for i, value in enumerate((0.5, 0.9, 0.7))}
    publish(sweep.go(plays)[0])
    table = mlflow.get_run(sweep.parent.id).data.tags[NOTE].split("\n\n")[2].splitlines()[2:]
    assert [row.split(" | ")[1] for row in table] == ["0.9000", "0.7000", "0.5000"]


def test_fewer_finals_asked_for_than_done_are_none_missing(store, no_pictures):
    sweep = Sweep(final=3, search={"lr": [0.01, 0.003]})
    sweep.go()
    search, pool = sweep.go(final=2)
    assert pool.jobs == [] and "missing" not in publish(search)


# The champion


@pytest.fixture
def registered(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(Run, "register", lambda self, name: found.append(f"{name} {self.id}") or str(len(found)))
    return found


def with_val_loss(*epochs: float) -> Callable[[Job], News]:
    """Return a final training with these validation losses."""

    def train(job: Job) -> News:
        for number, loss in enumerate(epochs, 1):
            Run(job.run_id).log_metrics({"val/loss": loss}, number)
            yield record(number, loss)
        Run(job.run_id).log_metrics(test_figures(job.config))
        yield Outcome("done", figures=test_figures(job.config) | {"val/loss": min(epochs), "val/accuracy": 0.5})

    return train


CHAMPIONS = {"tuned s1": with_val_loss(0.3, 0.5), "tuned s2": with_val_loss(0.2, 0.9), "tuned s3": with_val_loss(0.4, 0.4)}


def test_the_winners_run_that_was_best_on_validation_becomes_champion(store, registered):
    sweep = Sweep(final=3, search={"lr": [0.01, 0.003]}, register_as="stn")
    search, _ = sweep.go(CHAMPIONS | {"default": with_val_loss(0.1)})
    _register(search, sweep.said.append, alone=True)
    champion = sweep.runs["tuned s2"].info.run_id
    assert registered == [f"stn {champion}"]
    assert mlflow.get_run(sweep.parent.id).data.tags["registered"] == "stn version 1"
    assert sweep.said[-1] == f"{sweep.name}: run {champion} is models:/stn@champion, version 1"


def test_the_champion_is_the_same_after_a_kill(store, registered):
    sweep = Sweep(final=3, search={"lr": [0.01, 0.003]}, register_as="stn")
    sweep.go(CHAMPIONS)
    _register(sweep.begin(), sweep.said.append, alone=True)
    assert registered == [f"stn {sweep.runs['tuned s2'].info.run_id}"]


def test_the_same_command_again_registers_nothing_again(store, registered):
    sweep = Sweep(final=1, search={"lr": [0.01, 0.003]}, register_as="stn")
    sweep.go()
    for _ in range(2):
        _register(sweep.begin(), sweep.said.append, alone=True)
    assert len(registered) == 1


def test_a_study_among_others_registers_under_its_own_name_and_an_undone_one_nothing(store, registered):
    sweep = Sweep(final=1, search={"lr": [0.01, 0.003]}, register_as="stn")
    search, _ = sweep.go()
    _register(search, sweep.said.append, alone=False)
    assert registered == [f"stn-digits {sweep.runs['tuned s1'].info.run_id}"]
    undone = Sweep(final=0, register_as="stn")
    _register(undone.go()[0], undone.said.append, alone=True)
    assert undone.said[-1] == f"{undone.name}: nothing is registered: no final training of the winner was done"
    unnamed = Sweep(final=1)
    _register(unnamed.go()[0], unnamed.said.append, alone=True)
    assert len(registered) == 1


# The driver's loop alone


class Listed:
    """A source of listed jobs; `told` is what it heard."""

    def __init__(self, *keys: str, go_on: bool = True):
        self.jobs = [Job(key, "", TrainConfig(epochs=3)) for key in keys]
        self.go_on, self.told = go_on, []

    def next(self) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def epoch(self, job: Job, heard: Record) -> bool:
        self.told.append(f"{job.key} epoch {heard.number}")
        return self.go_on

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.told.append(f"{job.key} {outcome.kind}")


def test_a_job_that_shall_not_go_on_is_stopped_after_the_epoch():
    source = Listed("a", go_on=False)
    drive(source, FakePool())
    assert source.told == ["a epoch 1", "a stopped"]


def test_never_more_jobs_run_than_the_pool_has_places():
    source, pool = Listed(*"abcde"), FakePool(n_workers=2)
    most = 0

    def wait(timeout_s: float) -> list[tuple[Job, Record | Outcome]]:
        nonlocal most
        most = max(most, len(pool.running))
        return FakePool.wait(pool, timeout_s)

    pool.wait = wait  # type: ignore[method-assign]
    drive(source, pool)
    assert most == 2 and [told for told in source.told if told.endswith("done")] == [f"{key} done" for key in "abcde"]
    assert not pool.closed


def test_whatever_stops_the_drive_every_running_job_ends_interrupted_once():
    source = Listed(*"abc")
    pool = FakePool({"b": ends(ValueError("the pool broke"))}, n_workers=3)
    with pytest.raises(ValueError, match="the pool broke"):
        drive(source, pool)
    assert source.told == ["a epoch 1", "a interrupted", "b interrupted", "c interrupted"] and pool.closed


def test_a_job_that_breaks_ends_as_a_bug_and_the_others_as_interrupted():
    source, pool = Listed(*"ab"), FakePool({"a": BUG}, n_workers=2)
    with pytest.raises(JobError, match="^a broke: ZeroDivisionError: division by zero\n"):
        drive(source, pool)
    assert source.told == ["a epoch 1", "b epoch 1", "a bug", "b interrupted"]


def test_the_bar_moves_while_jobs_run(monkeypatch):
    monkeypatch.setattr("stn_pipeline.jobs.driver.POLL_S", -1)
    beats: list[int] = []
    drive(Listed("a"), FakePool(), lambda: beats.append(1))
    assert len(beats) >= 3


def test_a_sources_own_error_closes_the_pool():
    source, pool = Listed("a"), FakePool(n_workers=2)
    source.ended = lambda job, outcome: (_ for _ in ()).throw(OSError("the store is gone"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the store is gone"):
        drive(source, pool)
    assert pool.closed
