"""The confirmation: fresh seeds choose the winner, whatever is lost or killed on the way, and what was promised and kept is told."""

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml

from stn_pipeline import tracking
from stn_pipeline.comparing.arms import Trained
from stn_pipeline.errors import ConfigError
from stn_pipeline.jobs import Job, Outcome, drive
from stn_pipeline.jobs.driver import JobError
from stn_pipeline.search.answer import finals_in_words
from stn_pipeline.search.confirm import Confirmed, ranking
from stn_pipeline.search.page import changes, publish
from stn_pipeline.search.study import Study
from stn_pipeline.search.sweep import NoTrialError, _opening, _register
from stn_pipeline.search.sweepfile import Confirm, SweepConfig
from stn_pipeline.texts import markdown
from tests.fakes import BUG, FAILED, LOST, FakePool, Killed, News, ends, loss_of, record
from tests.test_search_source import NOTE, Sweep, artifact, deaf_no_more, keys_of, no_pictures, registered

__all__ = ["deaf_no_more", "no_pictures", "registered"]  # fixtures

LRS = [0.01, 0.003, 0.002, 0.001]  # by the fakes best at 0.003, then 0.002, 0.001 and the default, 0.01
CONFIRMED: dict[str, Any] = {"trials": 4, "search": {"lr": LRS}, "sampler": "grid", "final": 0, "confirm": {"top": 2, "seeds": 2}}
NAN = "training loss is nan at epoch 1, step 3 of 21, lr=0.1"


def promises(*, but: float, on: float = 0.003) -> dict[str, Callable[[Job], News]]:
    """Return plays in which the configuration of one lr is as usual in its trial, and worse by `but` on fresh seeds."""

    def train(job: Job) -> News:
        loss = loss_of(job.config) + but * (job.config.lr == on)
        yield record(1, loss, 0.5)
        yield Outcome("done", figures={"val/loss": loss, "val/accuracy": 0.5, "time/overhead_s": 0.1})

    return {" confirm ": train}


def numbers(search: Any) -> dict[float, int]:
    return {trial.user_attrs["params"]["lr"]: trial.number for trial in search.study.trials}


# Numbers alone


def test_the_best_mean_over_the_fresh_seeds_is_first():
    one, other = Confirmed(1, 0.1, {5: 0.5, 6: 0.7}), Confirmed(0, 0.4, {5: 0.4, 6: 0.5})
    assert ranking([one, other], smaller_is_better=True) == [other, one]
    assert ranking([one, other], smaller_is_better=False) == [one, other]
    assert (one.mean, one.n_lost) == (pytest.approx(0.6), 0) and one.sd == pytest.approx(math.sqrt(0.02))


@pytest.mark.parametrize("smaller_is_better", [True, False])
def test_a_lost_seed_is_worse_than_any_value_and_more_of_them_are_worse_still(smaller_is_better):
    best, worst = (0.0, 9.9) if smaller_is_better else (9.9, 0.0)
    once, twice, never = Confirmed(1, 0, {5: best, 6: None}), Confirmed(2, 0, {5: None, 6: None}), Confirmed(0, 9, {5: worst, 6: worst})
    assert ranking([twice, once, never], smaller_is_better=smaller_is_better) == [never, once, twice]
    assert math.isnan(twice.mean) and math.isnan(once.sd)


def test_in_a_tie_the_default_is_ahead():
    tied = [Confirmed(number, 0.1, {5: 0.5}) for number in (3, 1, 0)]
    assert [one.number for one in ranking(tied, smaller_is_better=True)] == [0, 3, 1]
    lost = [Confirmed(number, 0.1, {5: None}) for number in (3, 0)]
    assert ranking(lost, smaller_is_better=True)[0].number == 0


@pytest.mark.parametrize(("noise", "most"), [(1.0, 0.75), (0.5, 0.85)], ids=["noisy", "calm"])
def test_choosing_by_the_mean_of_fresh_seeds_lowers_the_regret(noise, most):
    """Of 20 configurations, true values N(0, 1), a training's noise N(0, noise): by one shared seed, or by 3 fresh seeds of the best 5."""
    random = np.random.default_rng(0)
    regrets = []
    for _ in range(1000):
        true = random.normal(size=20)
        promised = true + random.normal(scale=noise, size=20)
        best = np.argsort(promised)[:5]
        fresh = true[:, None] + random.normal(scale=noise, size=(20, 3))
        candidates = [Confirmed(int(i), promised[i], dict(enumerate(map(float, fresh[i])))) for i in dict.fromkeys([*best, 0])]
        chosen = ranking(candidates, smaller_is_better=True)[0].number
        regrets.append((true[best[0]] - true.min(), true[chosen] - true.min()))
    by_one_seed, by_fresh_seeds = np.mean(regrets, axis=0)
    assert by_fresh_seeds < most * by_one_seed


# The key


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, "confirm=5: must be {top: 5, seeds: 3}, or off"),
        (True, "confirm=True: must be {top: 5, seeds: 3}, or off"),
        ([5, 3], "confirm=[5, 3]: must be {top: 5, seeds: 3}, or off"),
        ({"top": 0}, "confirm.top=0: must be >= 1 (default 5)"),
        ({"seeds": 0}, "confirm.seeds=0: must be >= 1 (default 3)"),
        ({"seeds": 1000}, "confirm.seeds=1000: must be <= 100 (default 3)"),
        ({"top": "few"}, "confirm.top=few: must be a whole number (default 5)"),
        ({"top": 2.5}, "confirm.top=2.5: must be a whole number (default 5)"),
        ({"seeds": None}, "confirm.seeds=None: must be a whole number (default 3)"),
        ({"tops": 3}, "confirm: unknown key tops: choose from top, seeds; did you mean top?"),
        ({1: 2}, "confirm: unknown key 1: choose from top, seeds"),
    ],
    ids=str,
)
def test_a_wrong_confirmation_is_one_line(given, text):
    with pytest.raises(ConfigError) as caught:
        SweepConfig.parse({"name": "x", "search": ["lr"], "trials": 3, "confirm": given})
    assert str(caught.value) == text


def test_a_file_without_the_key_means_what_it_meant_and_one_with_it_comes_back():
    base = {"name": "x", "search": ["lr"], "trials": 3}
    assert SweepConfig.parse(base).confirm is SweepConfig.parse(base | {"confirm": False}).confirm is None
    for given, meant in (({}, Confirm(top=5, seeds=3)), ({"top": 2}, Confirm(top=2, seeds=3)), ("off", None)):
        config = SweepConfig.parse(base | {"confirm": given})
        assert config.confirm == meant
        assert SweepConfig.parse(yaml.safe_load(yaml.safe_dump(config.plain()))) == config
    assert SweepConfig.parse(base | {"confirm": {}}).flat()["confirm"] == "top 5, seeds 3"


def test_trials_confirmation_and_finals_share_no_seed_however_many_are_asked_for():
    config = SweepConfig.parse({"name": "x", "search": ["lr"], "trials": 3, "seed": 7, "final": 100, "confirm": {"seeds": 100}})
    seeds = [config.seed, *config.final_seeds, *config.confirm_seeds]
    assert len(set(seeds)) == len(seeds) == 201


# A search


@pytest.fixture(scope="module")
def story(store):
    """Four trials; on fresh seeds the best of them, lr 0.003, is worse than the second, 0.002; two finals."""
    sweep = Sweep(**CONFIRMED | {"final": 2})
    search, pool = sweep.go(promises(but=0.5))
    return sweep, search, pool, publish(search)


def test_the_best_few_and_the_default_are_trained_again_with_fresh_seeds_and_see_no_test_split(story):
    sweep, search, pool, _ = story
    of = numbers(search)
    confirmations = [job for job in pool.jobs if " confirm " in job.key]
    names = [f"t{of[0.003]:03d}", f"t{of[0.002]:03d}", "default"]
    assert [job.key.split(" confirm ")[1] for job in confirmations] == [f"{name} s{seed}" for seed in (101, 102) for name in names]
    assert [job.config.lr for job in confirmations] == [0.003, 0.002, 0.01] * 2
    assert [job.config.seed for job in confirmations] == [101] * 3 + [102] * 3
    for job in confirmations:
        run = mlflow.get_run(job.run_id)
        assert not job.whole and not any(name.startswith("test/") for name in run.data.metrics)
        assert (run.info.status, run.data.tags["stage"], run.data.tags["state"]) == ("FINISHED", "confirm", "COMPLETE")
        assert run.info.run_name == f"digits {job.key.split(' ', 1)[1]} lr={job.config.lr:.1e}"
        assert run.data.metrics["best/val/loss"] == loss_of(job.config) + 0.5 * (job.config.lr == 0.003)


def test_the_mean_chooses_the_winner_and_the_finals_come_after_on_other_seeds(story):
    sweep, search, pool, _ = story
    of = numbers(search)
    assert search.study.best.number == of[0.003] and search.winner == of[0.002]
    assert keys_of(pool)[-4:] == ["final tuned s1", "final default s1", "final tuned s2", "final default s2"]
    assert {job.config.lr for job in pool.jobs if "final tuned" in job.key} == {0.002}
    assert search.n_left == 0


def test_no_final_starts_before_the_confirmation_has_ended(store):
    search, pool = Sweep(**CONFIRMED | {"final": 1}).go(n_workers=4)
    stages = [told.split()[2] for told in pool.told if told.startswith("start")]
    first_final, first_confirm = stages.index("final"), stages.index("confirm")
    assert sum(told.startswith("end ") for told in pool.told[: pool.told.index(f"start {pool.jobs[first_final].key}")]) == 4 + 6
    assert first_confirm == 4 and set(stages[4:first_final]) == {"confirm"}


def test_what_was_promised_and_kept_is_on_the_console_the_page_and_in_the_figures(story):
    sweep, search, _, answer = story
    of = numbers(search)
    lines = answer.splitlines()
    promised = {lr: loss_of(search.study.config({"lr": lr})) for lr in LRS}
    assert lines[2] == (
        f"The winner, t{of[0.002]:03d}, promised val/loss {promised[0.002]:.4f}, kept {promised[0.002]:.4f} ± 0.0000 (2 fresh seeds), "
        "the best mean of 3 configurations."
    )
    assert lines[3] == f"The default promised val/loss {promised[0.01]:.4f}, kept {promised[0.01]:.4f} ± 0.0000 (2 fresh seeds)."
    best = f"The best trial, t{of[0.003]:03d}, promised val/loss {promised[0.003]:.4f}, kept {promised[0.003] + 0.5:.4f} ± 0.0000"
    assert lines[4] == f"{best} (2 fresh seeds)." and len(lines) == 5
    page = mlflow.get_run(sweep.parent.id).data.tags[NOTE]
    assert page.startswith(f"**{markdown(' '.join(lines))}**") and "| configuration | promised | kept, mean ± sd | lost | lr |" in page
    rows = [row for row in page.splitlines() if row.endswith(" | 0 of 2 | 0.002 |")]
    assert rows == [f"| t{of[0.002]:03d} | {promised[0.002]:.4f} | {promised[0.002]:.4f} ± 0.0000 | 0 of 2 | 0.002 |"]
    figures = json.loads(artifact(sweep.parent.id, "answer.json"))
    first = figures["confirmation"][0]
    assert (figures["best"], figures["best_trial"], figures["chosen_by"]) == ({"lr": 0.002}, of[0.002], "mean of 2 fresh seeds")
    assert (first["trial"], first["promised"], first["kept"]) == (of[0.002], promised[0.002], pytest.approx(promised[0.002]))
    assert [one["trial"] for one in figures["confirmation"]] == [of[0.002], 0, of[0.003]]
    assert figures["finals"]["tuned"] == {"1": "done", "2": "done"}


def test_the_confirmation_is_kept_as_a_table_and_a_picture(story):
    sweep, search, pool, _ = story
    rows = list(csv.DictReader(io.StringIO(artifact(sweep.parent.id, "confirmation.csv"))))
    runs = {(job.config.lr, job.config.seed): job.run_id for job in pool.jobs if " confirm " in job.key}
    assert {(float(row["lr"]), int(row["seed"])): row["run_id"] for row in rows} == runs
    assert "confirmation.png" in {file.path for file in mlflow.MlflowClient().list_artifacts(sweep.parent.id)}
    assert yaml.safe_load(artifact(sweep.parent.id, "best.yaml"))["lr"] == 0.002


def test_the_default_that_wins_on_fresh_seeds_is_the_winner_and_nothing_behind_it_is_registered(store, no_pictures, registered):
    sweep = Sweep(**CONFIRMED | {"confirm": {"top": 1, "seeds": 3}, "final": 1}, register_as="stn")
    search, pool = sweep.go(promises(but=0.9))
    of = numbers(search)
    assert search.winner == 0 and not any(" final tuned " in job.key for job in pool.jobs)
    lines = publish(search).splitlines()
    assert lines[0] == ("Tuning found nothing better than the default: of 2 configurations it is the best on 3 fresh seeds, on validation.")
    assert any(line.startswith(f"The best trial, t{of[0.003]:03d}, promised val/loss ") for line in lines)
    _register(search, sweep.said.append, alone=True)
    assert (
        registered == [f"stn {sweep.runs['default s1'].info.run_id}"]
        and ", with the default configuration, is models:/stn" in sweep.said[-1]
    )


@pytest.mark.parametrize("how", [FAILED, LOST], ids=["diverged", "lost"])
def test_a_training_that_diverges_or_is_lost_counts_as_the_worst_and_stays_so(story, no_pictures, how):
    sweep = Sweep(**CONFIRMED)
    of = numbers(story[1])  # the same sampler and seed: the same numbers
    name = f"t{of[0.003]:03d}"
    search, pool = sweep.go({f"confirm {name} s102": how})
    assert search.winner == of[0.002] and search.confirmed[-1].number == of[0.003] and search.confirmed[-1].n_lost == 1
    assert keys_of(pool).count(f"confirm {name} s102") == (2 if how is LOST else 1)
    answer = publish(search)
    assert "on the others (1 of 2 fresh seeds lost, which counts as the worst)." in answer
    again, pool = sweep.go()
    assert (pool.jobs, again.n_left, again.winner, publish(again)) == ([], 0, of[0.002], answer)
    assert any(said.endswith(NAN if how is FAILED else "lost: worker 7 ended with exit code -9") for said in sweep.said)


def test_a_confirmation_that_loses_every_seed_leaves_the_default(store, no_pictures):
    search, _ = Sweep(**CONFIRMED).go({" confirm ": FAILED})
    assert search.winner == 0
    assert "The default promised val/loss 0.6000, kept nothing (2 of 2 fresh seeds lost, which counts as the worst)" in publish(search)


@pytest.fixture(scope="module")
def unbroken(store):
    return Sweep(**CONFIRMED).go()


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed, JobError])
def test_a_confirmation_that_is_stopped_goes_on_and_no_training_is_done_twice(unbroken, no_pictures, error):
    (whole, pool), sweep = unbroken, Sweep(**CONFIRMED)
    how = BUG if error is JobError else ends(record(1, 0.5), error())
    before = sweep.stopped_by(error, {"default s101": how})
    stopped = before.jobs[-1]
    search, after = sweep.go()
    assert (after.jobs[0].run_id, after.jobs[0].resume, after.jobs[0].whole) == (stopped.run_id, stopped.run_id, False)
    assert keys_of(before)[:-1] + keys_of(after) == keys_of(pool)
    assert publish(search) == publish(whole) and search.n_left == 0
    assert [one.values for one in search.confirmed] == [one.values for one in whole.confirmed]
    runs = [run for run in sweep.runs.values() if run.data.tags["stage"] == "confirm"]
    assert len(runs) == 6 and {run.info.status for run in runs} == {"FINISHED"}


def test_an_accuracy_is_judged_by_its_own_best_value_over_calls_too(store, no_pictures):
    def train(job: Job) -> News:
        yield record(1, 1.0, 0.9)
        yield Outcome("done", figures={"val/loss": 1.0, "val/accuracy": 0.8 if job.config.lr == 0.01 else 0.7, "time/overhead_s": 0.1})

    sweep = Sweep(**CONFIRMED, objective="val/accuracy")
    search, _ = sweep.go({" confirm ": train})
    assert search.winner == 0 and search.confirmed[0].mean == pytest.approx(0.8)
    assert [one.values for one in sweep.begin().confirmed] == [one.values for one in search.confirmed]


def test_the_confirmation_counts_in_what_is_left_and_in_the_time(store):
    sweep = Sweep(**CONFIRMED | {"final": 1})
    assert sweep.begin().n_left == 4 + 3 * 2 + 2
    sweep.stopped_by(Killed, {"default s101": ends(record(1, 0.5), Killed())})
    search = sweep.begin()
    assert search.n_left == 4 + 2 and search.state.endswith("4 done, confirmation 2 of 6")
    assert any("going on: 4 done, confirmation 2 of 6" in line for line in _opening(search, "there"))
    spent = search.study.spent_s
    sweep.go()
    assert sweep.begin().study.spent_s > spent > 0


def test_no_trial_starts_where_the_confirmation_would_end_after_the_limit(store, monkeypatch):
    sweep = Sweep(**CONFIRMED | {"trials": 0, "time_limit_s": 100, "search": ["lr"], "sampler": "random"})
    search = sweep.begin()
    monkeypatch.setattr(Study, "spent_s", property(lambda self: 10.0 * sum(bool(trial.datetime_complete) for trial in self.trials)))
    pool = FakePool()
    drive(search, pool)
    n_trials = sum(not job.key.split()[1].startswith(("confirm", "final")) for job in pool.jobs)
    assert n_trials == 5  # ten seconds each; beside them 6 trainings are to fit into what is left of 100 s


def test_configurations_that_are_one_and_the_same_training_are_one(store):
    search = {"transform": ["none"], "loc_lr_multiplier": [0.1, 0.2, 0.3]}
    sweep = Sweep(**CONFIRMED | {"search": search, "confirm": {"top": 3, "seeds": 1}, "trials": 4})
    found, pool = sweep.go()
    assert len(found.study.trials) == 4 and len([job for job in pool.jobs if " confirm " in job.key]) == 2


def test_the_default_alone_is_not_confirmed(store, no_pictures):
    search, pool = Sweep(**CONFIRMED | {"trials": 1, "final": 1}).go()
    assert keys_of(pool) == ["t000", "final default s1"] and search.winner == 0
    assert publish(search).endswith("Nothing was confirmed: only the default configuration was there to be.")


def test_more_to_choose_among_than_there_are_trials_is_all_of_them(store):
    search, pool = Sweep(**CONFIRMED | {"confirm": {"top": 50, "seeds": 1}}).go()
    assert len(search.confirmed) == 4 and search.n_left == 0


# The finals in words


def finals(tuned: list[float | None], default: list[float | None]) -> dict[str, dict[int, Trained]]:
    def one(value: float | None) -> Trained:
        done = Trained("done", {"test/loss": value, "test/accuracy": 0.9}) if value is not None else None
        return done or Trained("diverged", {}, True, why=NAN)

    return {arm: {seed: one(v) for seed, v in enumerate(values)} for arm, values in {"tuned": tuned, "default": default}.items()}


def test_a_lost_final_is_the_worst_outcome_and_there_is_no_plain_better_where_the_better_arm_lost_more():
    values = [0.5, 0.6, 0.55]
    lines = finals_in_words(finals([0.1, 0.2, 0.15, None], [*values, 0.5]), "digits (3 epochs)")
    assert lines[0].startswith("Tuned lost 1 of 4 seeds and default 0 on digits (3 epochs)") and "is shown" in lines[0]
    assert lines[-1] == f"Tuned lost 1 of 4 final trainings (1 diverged): {NAN}." and "better than" not in " ".join(lines)
    worse = finals_in_words(finals([*values, 0.5], [0.1, 0.2, 0.15, None]), "digits (3 epochs)")
    assert "worse than" not in " ".join(worse) and worse[-1].startswith("The default lost 1 of 4 final trainings (1 diverged)")
    both = finals_in_words(finals([0.1, 0.2, 0.15, None], [0.5, 0.6, 0.55, None]), "digits (3 epochs)")
    assert [line.split(" lost ")[0] for line in both[2:]] == ["Tuned", "The default"]


# Under other code, and nothing at all


def test_a_study_that_goes_on_under_other_code_says_so_once_a_thing_and_goes_on(store, no_pictures):
    sweep = Sweep(trials=1, final=0)
    here = {"code": "abc", "torch": "2.9.1", "device": "cpu"}
    for trials, under in ((1, here), (2, here), (3, here | {"code": "def", "torch": "2.9.2"})):
        search = sweep.begin(trials=trials)
        search.study.under = under
        opening = _opening(search, "there")
        told = [line for line in opening if line.startswith("going on under")]
        drive(search, FakePool())
    assert told == [
        f"going on under another {what}: {before} before, {now} then; the two may not compare."
        for what, before, now in (("training code", "abc", "def"), ("torch", "2.9.1", "2.9.2"))
    ]
    publish(search)
    page = mlflow.get_run(sweep.parent.id).data.tags[NOTE]
    assert "\n\nAfter 2 trials it went on under another training code: abc before, def then; the two may not compare.\n\n" in page
    assert sweep.begin().study.history == [here | {"after": 0}, here | {"code": "def", "torch": "2.9.2", "after": 2}]


def test_what_an_older_version_did_not_keep_is_said_to_be_unknown():
    told = changes({"after": 0}, {"code": "abc", "torch": "2.9.1"}, "going on")
    assert told == ["going on; under what code, torch and kind of device the earlier trainings ran was not kept."]
    assert changes({"torch": "2.9.1", "after": 0}, {"torch": "2.9.1", "after": 4}, "going on") == []


def test_where_every_trial_fails_the_run_fails_with_the_reason(store, monkeypatch, tmp_path):
    from stn_pipeline.search import sweep as module

    monkeypatch.chdir(tmp_path)
    config = SweepConfig.parse(
        {"name": "allfail", "search": {"lr": [0.01, 0.02]}, "trials": 2, "datasets": ["digits"], "train": {"epochs": 1}}
    )
    pool = FakePool({" t00": FAILED})
    monkeypatch.setattr("stn_pipeline.jobs.places.Here.pool", lambda self, most: pool)
    monkeypatch.setattr(module, "dry_run", lambda *args: "plain")
    for _ in range(2):  # the second time there is nothing left to try
        with pytest.raises(NoTrialError) as caught:
            module.run(config, lambda line: None, lambda searches: lambda: None)
    assert str(caught.value) == f"allfail: Every trial failed, so there is no answer (2 failed). The first, t000: {NAN}"
    (run,) = tracking.search_runs({"study": "allfail", "stage": "sweep"})
    assert run.info.status == "FAILED" and run.data.tags["error"].startswith("Every trial failed")
    assert run.data.tags[NOTE].startswith("**Every trial failed") and len(pool.jobs) == 2
