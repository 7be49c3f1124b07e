"""A study on a real SQLite file, without training: what is asked and when it ends, what is tried again, and what a new driver finds."""

import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine

from stn_pipeline.errors import ConfigError
from stn_pipeline.search.study import Asked, Study
from stn_pipeline.search.sweep import _meaning
from stn_pipeline.search.sweepfile import SweepConfig

SAMPLERS = ("tpe", "gp", "random", "qmc", "grid")
BASE = {"name": "x", "search": ["lr", "batch_size"], "trials": 6, "sampler": "random", "pruner": "none"}
DIGESTS = {"train": "a1", "val": "b2", "test": "c3"}


@pytest.fixture(scope="module", autouse=True)
def quick_storage():
    """Let a study be opened in a fifth of the time.

    The file is real, but SQLite does not wait for the disk; and what a process would do once (read the migration scripts,
    compile the statements) is not done again for every driver that a test makes.
    """

    def hurry(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    head = optuna.storages.RDBStorage("sqlite://").get_head_version()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optuna.storages._rdb.storage._VersionManager.get_head_version", lambda self: head)
        patch.setattr("sqlalchemy.engine.create_engine", cache(sqlalchemy.engine.create_engine))
        yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="module")
def database(quick_storage, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("studies") / "x.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}")
    return path


def a_sweep(**keys: Any) -> SweepConfig:
    return SweepConfig.parse(BASE | keys)


@pytest.fixture
def begin(database, request):
    """Return what opens this test's study as a new driver does, with these keys of the sweep file changed."""

    def begin(digests: dict[str, str] = DIGESTS, **keys: Any) -> Study:
        sweep = a_sweep(**keys)
        meaning = _meaning(sweep, sweep.config("digits"), SimpleNamespace(digests=lambda: digests))
        return Study(f"sqlite:///{database}", request.node.name, sweep, "digits", meaning)

    return begin


def ask(study: Study) -> Asked:
    asked = study.ask()
    assert asked is not None
    return asked


def finish(study: Study, value: Callable[[dict[str, Any]], float] = lambda params: params.get("lr", 1.0)) -> list[dict[str, Any]]:
    """Complete every trial that a study still asks for; return their knobs."""
    found = []
    while (asked := study.ask()) is not None:
        study.report(asked.number, 1, value(asked.params))
        study.end(asked.number, "COMPLETE", value(asked.params))
        found.append(asked.params)
    return found


def recover(study: Study) -> None:
    for trial in study.unfinished:
        study.end(trial.number, "FAIL", lost="driver")


def distinct(params: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(sorted(each.items())) for each in params}


# What is asked


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
@pytest.mark.parametrize(
    "search",
    [
        ["lr", "batch_size"],
        {"lr": {"low": 0.05, "high": 0.1}, "batch_size": None},
        {"lr": None, "batch_size": [8, 16]},
        {"lr": {"low": 0.05, "high": 0.1}, "batch_size": [8, 16]},
    ],
    ids=["inside", "outside the range", "outside the list", "outside both"],
)
def test_trial_0_is_the_default_wherever_it_lies_and_the_others_lie_inside(begin, sampler, search):
    study = begin(search=search, sampler=sampler, trials=3)
    first, *others = finish(study)
    assert first == {"lr": 0.01, "batch_size": 64}
    assert [study.is_default(trial.number) for trial in study.trials] == [True, False, False]
    assert all(study.holds(knob, value) for params in others for knob, value in params.items())
    assert study.trials[0].params == {knob: value for knob, value in first.items() if study.holds(knob, value)}


def test_asking_makes_a_running_trial_with_its_knobs_and_its_run(begin):
    study = begin()
    assert ask(study) == Asked(0, {"lr": 0.01, "batch_size": 64}, None, True)
    second = ask(study)
    study.started(1, "abc")
    trial = begin().trials[1]
    assert (second.number, second.retry_of, second.is_default) == (1, None, False)
    assert (trial.state, trial.params, trial.user_attrs) == (TrialState.RUNNING, second.params, {"params": second.params, "run_id": "abc"})


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_limit_is_exact_over_calls_however_it_changes(begin, sampler):
    assert [begin(sampler=sampler, trials=n).n_left for n in (1, 5)] == [1, 5]
    assert len(finish(begin(sampler=sampler, trials=4))) == 4
    assert len(finish(begin(sampler=sampler, trials=6))) == 2
    for trials in (6, 2):
        study = begin(sampler=sampler, trials=trials)
        assert (study.n_left, study.ask(), study.ask(), study.n_left) == (0, None, None, 0)
    assert [trial.state for trial in begin().trials] == [TrialState.COMPLETE] * 6


def test_trials_side_by_side_are_different_and_as_many_as_asked_for(begin):
    study = begin(sampler="tpe", trials=5, search={"batch_size": [8, 16, 32, 64, 128]})
    asked = [ask(study) for _ in range(5)]
    assert study.ask() is None
    assert {each.params["batch_size"] for each in asked} == {8, 16, 32, 64, 128}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_finite_space_is_tried_whole_each_combination_once_and_then_ends(begin, sampler):
    search = {"batch_size": [16, 64], "padding": ["zeros", "border"], "coordconv": [True]}
    found = finish(begin(sampler=sampler, trials=30, search=search))
    assert found[0] == {"batch_size": 64, "padding": "zeros", "coordconv": False}  # the default, outside
    assert len(found) == len(distinct(found)) == 1 + 4
    assert begin(sampler=sampler, trials=30, search=search).ask() is None


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc"])
def test_no_values_of_a_range_are_tried_twice_over_calls(begin, sampler):
    search = {"lr": {"low": 0.01, "high": 0.1}, "epochs": {"low": 1, "high": 9}}
    found = [finish(begin(sampler=sampler, trials=trials, search=search)) for trials in (3, 7)]
    assert len(distinct(found[0] + found[1])) == 7


def test_a_small_range_of_whole_numbers_is_tried_whole(begin):
    found = finish(begin(trials=5, search={"epochs": {"low": 1, "high": 4}}))
    assert (found[0]["epochs"], sorted(params["epochs"] for params in found)) == (50, [1, 2, 3, 4, 50])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_knobs_that_do_not_go_together_are_never_asked_for(begin, sampler):
    found = finish(begin(sampler=sampler, trials=9, search=["coordconv", "coordconv_r"]))
    assert sorted((params["coordconv"], params["coordconv_r"]) for params in found) == [(False, False), (True, False), (True, True)]


def test_knobs_that_do_not_go_together_are_drawn_again_in_a_range_too(begin):
    found = finish(begin(trials=8, search=["lr", "coordconv", "coordconv_r"]))
    assert len(found) == 8 and any(params["coordconv_r"] for params in found)
    assert not any(params["coordconv_r"] and not params["coordconv"] for params in found)


@pytest.mark.parametrize(("n_tried", "most"), [(9, 0), (8, 20)])
def test_a_slow_sampler_is_not_asked_again_and_again_for_the_last_of_a_list(begin, monkeypatch, n_tried, most):
    drawn = []

    class Slow(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            drawn.append(trial.number)

        def sample_independent(self, study: optuna.Study, trial: Any, name: str, distribution: Any) -> Any:
            return distribution.choices[0]

    search = {"batch_size": [64, 32, 16], "padding": None}
    finish(begin(trials=n_tried, search=search, sampler="grid"))
    monkeypatch.setattr(Study, "_sampler", lambda self, n_trials: Slow())
    study = begin(trials=30, search=search, sampler="gp")
    assert (study.ask() is None) == (n_tried == 9)
    assert len(drawn) <= most


def test_a_default_outside_does_not_keep_qmc_from_filling_the_range_evenly(begin):
    found = finish(begin(sampler="qmc", trials=10, search={"lr": {"low": 0.05, "high": 0.1}, "batch_size": None}))
    eighths = [int(8 * math.log2(params["lr"] / 0.05)) for params in found[2:]]  # the first two stand before the sequence
    assert sorted(eighths) == list(range(8))


def test_a_large_space_of_lists_is_not_gone_through_at_every_look(begin, monkeypatch):
    looked, real = [], Study._go_together
    monkeypatch.setattr(Study, "_go_together", lambda self, params: looked.append(params) or real(self, params))
    study = begin(trials=4, search=["batch_size", "transform", "padding", "optimizer", "schedule", "coordconv", "coordconv_r"])
    study.end(ask(study).number, "COMPLETE", 0.5)
    assert study.n_left == 3
    ask(study)
    assert len(looked) < 200


def test_qmc_goes_on_with_its_sequence_however_long_it_is(begin, monkeypatch):
    monkeypatch.setattr("stn_pipeline.search.study.REDRAWS", 3)
    assert len(finish(begin(sampler="qmc", trials=10))) == 10


def test_the_seed_decides_what_is_drawn(database):
    def drawn(name: str, seed: int, sampler: str) -> list[dict[str, Any]]:
        return finish(Study(f"sqlite:///{database}", name, a_sweep(seed=seed, sampler=sampler, trials=3), "digits", {}))

    for sampler in ("tpe", "qmc", "random"):
        assert drawn(f"{sampler} a", 1, sampler) == drawn(f"{sampler} b", 1, sampler) != drawn(f"{sampler} c", 2, sampler)


# What is tried again


@pytest.mark.parametrize(
    ("losses", "again"),
    [
        (["worker"], True),
        (["worker", "worker"], False),
        (["driver"], True),
        (["driver", "driver", "driver"], True),
        (["worker", "driver"], True),
        (["worker", "driver", "driver"], True),
        (["worker", "driver", "worker"], False),
        (["driver", "worker"], True),
        (["driver", "worker", "worker"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_lost_driver_costs_nothing_and_a_lost_worker_is_forgiven_once(begin, losses, again):
    study = begin(trials=1, search={"lr": {"low": 0.05, "high": 0.1}})
    for number, by in enumerate(losses):
        asked = ask(study)
        assert asked == Asked(number, {"lr": 0.01}, number - 1 if number else None, True)
        study.end(number, "FAIL", lost=by, reason="it died")
        study = begin(trials=1, search={"lr": {"low": 0.05, "high": 0.1}})
    assert study.n_left == again
    assert (study.ask() is not None) == again
    assert study.n_slots == 1


@pytest.mark.parametrize(("state", "value"), [("FAIL", None), ("PRUNED", None), ("COMPLETE", 0.5)])
def test_what_ended_by_itself_is_not_tried_again(begin, state, value):
    study = begin(trials=1)
    study.report(ask(study).number, 1, 0.5)
    study.end(0, state, value, reason="diverged")
    assert (study.n_left, study.ask(), study.trials[0].state.name) == (0, None, state)
    assert study.trials[0].user_attrs["reason"] == "diverged"


def test_lost_trials_come_first_and_do_not_count_against_the_limit(begin):
    study = begin(trials=3)
    lost = [ask(study), ask(study)]
    for asked in lost:
        study.end(asked.number, "FAIL", lost="worker")
    assert (study.n_slots, study.n_left) == (2, 3)
    asked = [ask(study) for _ in range(3)]
    assert [each.params for each in asked[:2]] == [each.params for each in lost]
    assert [each.retry_of for each in asked] == [0, 1, None]
    assert [each.is_default for each in asked] == [True, False, False]
    assert (study.ask(), study.n_slots, len(study.trials)) == (None, 3, 5)
    assert study.chain(3) == [3, 1]


def test_a_trial_that_a_sampler_cannot_read_does_not_stop_it(begin):
    study = begin(sampler="tpe", trials=4, search={"lr": {"low": 0.05, "high": 0.1}, "batch_size": None})
    study.end(ask(study).number, "FAIL", lost="worker")
    ask(study)
    assert len(finish(study)) == 3


# What a new driver finds


def test_a_kill_between_any_two_writes_costs_no_trial_and_adds_none(database, tmp_path, monkeypatch):
    writes = [name for name in dir(_CachedStorage) if name.startswith(("create_new", "set_"))]
    cuts: list[Path] = []

    def cut_before(name: str) -> Callable[..., Any]:
        whole = getattr(_CachedStorage, name)

        def write(self: _CachedStorage, *args: Any, **kwargs: Any) -> Any:
            cuts.append(Path(shutil.copy(database, tmp_path / f"{len(cuts):03d} before {name}.db")))
            return whole(self, *args, **kwargs)

        return write

    sweep = a_sweep(trials=2, search={"batch_size": [16, 32, 64]})

    def open_at(path: Path) -> Study:
        return Study(f"sqlite:///{path}", "x", sweep, "digits", {"a": "b"})

    with monkeypatch.context() as patch:
        for name in writes:
            patch.setattr(_CachedStorage, name, cut_before(name))
        study = open_at(database)
        ask(study)
        study.started(0, "abc")
        study.report(0, 1, 0.5)
        study.end(0, "FAIL", lost="worker", reason="it died")
        finish(study)
    cuts.append(database)

    seen = set()
    for cut in cuts:
        study = open_at(cut)
        seen |= {(trial.state.name, "lost" in trial.user_attrs) for trial in study.trials}
        recover(study)
        n_left, asked = study.n_left, finish(study)
        assert len(asked) == n_left, cut.name
        assert study.n_slots == len(distinct([trial.user_attrs["params"] for trial in study.trials])) == 2, cut.name
        assert [trial.state.name for trial in study.trials].count("COMPLETE") == 2, cut.name
        assert (study.unfinished, study.n_left, study.ask()) == ([], 0, None), cut.name
    assert seen >= {("WAITING", False), ("RUNNING", False), ("RUNNING", True), ("FAIL", True), ("COMPLETE", False)}


def test_the_runs_token_is_kept(begin):
    assert begin().token == ""
    begin().token = "abc"
    assert begin().token == "abc"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"search": {"lr": {"high": 0.1}, "batch_size": None}},
         "search.lr: was 0.0001 to 0.03, log when study x began, now 0.0001 to 0.1, log"),
        ({"search": {"lr": {"log": False}, "batch_size": None}},
         "search.lr: was 0.0001 to 0.03, log when study x began, now 0.0001 to 0.03"),
        ({"search": {"lr": None, "batch_size": [32, 64]}},
         "search.batch_size: was 32, 64, 128, 256, 512 when study x began, now 32, 64"),
        ({"search": ["lr", "batch_size", "padding"]}, "search.padding: was not there when study x began, now zeros, border, reflection"),
        ({"search": ["lr"]}, "search.batch_size: was 32, 64, 128, 256, 512 when study x began, now not there"),
        ({"train": {"epochs": 9}}, "train.epochs: was 50 when study x began, now 9"),
        ({"train": {"transform": "tps"}}, "train.transform: was affine when study x began, now tps"),
        ({"seed": 1}, "seed: was 0 when study x began, now 1"),
        ({"objective": "val/accuracy"}, "direction: was minimize when study x began, now maximize"),
        ({"digests": DIGESTS | {"val": "other"}}, "data: was a1 b2 when study x began, now a1 other"),
        ({"digests": DIGESTS | {"train": "other"}}, "data: was a1 b2 when study x began, now other b2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)  # fmt: skip
def test_another_question_is_refused_and_the_study_left_as_it_was(begin, request, keys, text):
    finish(begin(trials=1))
    with pytest.raises(ConfigError) as caught:
        begin(**keys)
    assert str(caught.value).replace(request.node.name, "x", 1) == f"{text}: restore it, or begin another study (--name x-2)"
    assert begin(trials=2).n_left == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"workers": 7},
        {"sampler": "tpe"},
        {"pruner": "hyperband"},
        {"final": 9},
        {"time_limit_s": 1e6},
        {"question": "why?"},
        {"train": {"data_dir": "elsewhere", "device": "cpu"}},
        {"digests": DIGESTS | {"test": "other"}},
    ],
    ids=str,
)
def test_what_changes_no_value_may_change(begin, keys):
    finish(begin(trials=2))
    assert len(finish(begin(**keys | {"trials": 3}))) == 1


# Time


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr("stn_pipeline.search.study.time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_the_time_limit_counts_over_calls(begin, clock):
    study = begin(trials=0, time_limit_s=10)
    ask(study)
    clock.s += 6
    study.end(0, "COMPLETE", 0.5)
    clock.s += 1000
    study = begin(trials=0, time_limit_s=10)
    assert study.spent_s == 6
    ask(study)
    clock.s += 5
    study.end(1, "COMPLETE", 0.5)
    assert study.spent_s == 11 and study.ask() is None
    clock.s += 1000
    assert begin(trials=0, time_limit_s=10).ask() is None
    assert begin(trials=0, time_limit_s=12).ask() is not None


def test_of_two_limits_the_first_one_counts(begin, clock):
    assert len(finish(begin(trials=2, time_limit_s=10))) == 2
    study = begin(trials=4, time_limit_s=10)
    study.end(ask(study).number, "COMPLETE", 0.5)
    clock.s += 11
    assert (study.n_left, study.ask()) == (0, None)


def test_a_time_limit_alone_leaves_something_to_do_until_it_is_over(begin, clock):
    study = begin(trials=0, time_limit_s=10)
    assert study.n_left > 0
    study.end(ask(study).number, "COMPLETE", 0.5)
    assert study.n_left > 0
    clock.s += 11
    assert (study.n_left, study.ask()) == (0, None)


def test_time_counts_from_the_first_trial_on(begin, clock):
    study = begin(trials=0, time_limit_s=10)
    clock.s += 60
    assert study.spent_s == 0
    ask(study)
    clock.s += 4
    assert study.spent_s == 4


def test_nothing_is_left_of_a_space_that_was_tried_whole(begin):
    finish(begin(trials=30, search={"batch_size": [16, 64]}, sampler="grid"))
    assert begin(trials=30, search={"batch_size": [16, 64]}, sampler="grid").n_left == 0


def test_the_time_of_a_killed_driver_counts_up_to_its_last_word(begin, clock):
    study = begin(trials=0, time_limit_s=10)
    ask(study)
    clock.s += 8
    study.report(0, 1, 0.5)
    clock.s += 500
    assert begin(trials=0, time_limit_s=10).spent_s == 8


# The best, and who is stopped


@pytest.mark.parametrize(("objective", "best"), [("val/loss", 2), ("val/accuracy", 1)])
def test_the_best_is_the_first_of_the_complete_trials_with_the_best_value(begin, objective, best):
    study = begin(objective=objective)
    assert study.best is None
    for number, value in enumerate((0.5, 0.7, 0.3, 0.7, 0.3)):
        study.end(ask(study).number, "COMPLETE", value)
        assert study.trials[number].value == value
    study.report(ask(study).number, 1, 0.1 if objective == "val/loss" else 0.9)
    study.end(5, "PRUNED")
    assert study.best is not None and study.best.number == best


@pytest.mark.parametrize(
    ("keys", "epochs"),
    [
        ({}, 50),
        ({"train": {"epochs": 9}}, 9),
        ({"search": {"epochs": [3, 27, 5]}}, 27),
        ({"search": {"lr": None, "epochs": {"low": 2, "high": 12}}}, 12),
    ],
)
def test_hyperband_knows_the_most_epochs_that_a_trial_can_take(begin, keys, epochs):
    pruner = begin(pruner="hyperband", **keys).optuna.pruner
    assert isinstance(pruner, HyperbandPruner)
    assert (pruner._min_resource, pruner._max_resource, pruner._reduction_factor) == (1, epochs, 3)


@pytest.mark.parametrize(("pruner", "kind"), [("median", MedianPruner), ("none", NopPruner), ("hyperband", HyperbandPruner)])
def test_the_pruner_is_the_one_asked_for_in_each_call(begin, pruner, kind):
    begin(pruner="none")
    assert type(begin(pruner=pruner).optuna.pruner) is kind


@pytest.mark.parametrize(("objective", "good", "bad"), [("val/loss", 0.1, 0.9), ("val/accuracy", 0.9, 0.1)])
def test_the_median_stops_a_trial_behind_the_others_by_its_second_epoch(begin, objective, good, bad):
    study = begin(pruner="median", objective=objective, trials=7)
    for _ in range(5):
        number = ask(study).number
        assert all(study.report(number, epoch, 0.5) for epoch in (1, 2, 3))
        study.end(number, "COMPLETE", 0.5)
    ahead, behind = ask(study), ask(study)
    assert [study.report(ahead.number, epoch, good) for epoch in (1, 2, 3)] == [True, True, True]
    study.report(behind.number, 1, bad)
    assert not study.report(behind.number, 2, bad)
    study.end(behind.number, "PRUNED")
    assert (study.trials[behind.number].state, study.trials[behind.number].value) == (TrialState.PRUNED, bad)
