"""Runs that exist already as arms: what is found, what is refused in a line, what is told of how they came about."""

import json
import re

import mlflow
import pytest

from stn_pipeline import compare as entry
from stn_pipeline import tracking
from stn_pipeline.comparing import existing
from stn_pipeline.comparing.comparefile import ExistingConfig
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ConfigError, RunError
from tests.compared import Go, fresh, goer, log_digests, score_of, without_pictures


@pytest.fixture(autouse=True)
def go(store, signals_restored, monkeypatch) -> Go:
    without_pictures(monkeypatch)
    return goer(monkeypatch)


def planted(group: str, *seeds: int, digest: str = "", tags: dict[str, str] | None = None, **knobs: object) -> list[str]:
    """Log whole trainings as MLflow has them, found by tags.group; return their ids."""
    made = []
    for seed in seeds:
        config = TrainConfig.parse({"dataset": "digits", "epochs": 3, "seed": seed} | knobs)
        run = tracking.create_run("planted", tracking.experiment_id(), config, {"group": group, "dataset_used": "digits"} | (tags or {}))
        run.log_metrics(score_of(config))
        if digest:
            log_digests(run.id, digest)
        run.close("FINISHED")
        made.append(run.id)
    return made


def ask(group: str, by: str = "lr", **keys: object) -> list[str]:
    said: list[str] = []
    existing.compare_existing(ExistingConfig.parse({"runs": f"tags.group = '{group}'", "by": by} | keys), said.append)
    return said


def verdicts(said: list[str]) -> list[str]:
    return [line for line in said if re.search(r"^\S+ (v |lowers|raises|is equivalent)", line)]


def test_runs_that_exist_give_the_same_answer_as_the_comparison_that_made_them(go):
    name = fresh()
    arms = {"0.01": {}, "0.003": {"lr": 0.003}}
    _, said = go(name=name, arms=arms, seeds=4, train={"epochs": 3, "device": "cpu", "weight_decay": 0.25})
    found: list[str] = []
    runs = {"runs": "params.weight_decay = '0.25'", "by": "lr"}
    existing.compare_existing(ExistingConfig.parse(runs), found.append)
    assert verdicts(found) == [line for line in verdicts(said) if "digits s" not in line] and len(verdicts(found)) == 1
    assert "The runs were chosen by a filter after they were trained: an answer is worth what that choice is." in found
    newest = tracking.search_runs({"stage": "compare"})[-1]
    assert newest.info.status == "FINISHED" and newest.data.params["by"] and newest.data.tags["answer"]
    back: list[str] = []
    keys = {"baseline": "0.003", "decide": "test/accuracy", "margin": 0.9}
    existing.compare_existing(ExistingConfig.parse(runs | keys), back.append)
    (line,) = verdicts(back)
    assert line.startswith("0.01 ") and "0.003" in line and "test accuracy" in line and "within " in line


def test_runs_that_differ_in_more_than_the_arms_are_refused():
    for epochs in (3, 4):
        for lr, arm in ((0.01, "base"), (0.1, "high")):
            planted("more", 0, 1, epochs=epochs, lr=lr, tags={"arm": arm, "half": f"{epochs}"})
    with pytest.raises(
        RunError, match=r"epochs is not the same in all \(3 in 4, 4 in 4 runs\): narrow the filter, or put epochs into --by"
    ):
        ask("more")
    with pytest.raises(RunError, match=r"epochs is not the same in all runs of base"):
        ask("more", "arm", baseline="base")
    half = ask("more' and params.epochs = '4", "arm", baseline="high")
    assert any("2 seeds" in line for line in half) and verdicts(half)[0].startswith("base ")
    both = ask("more", "epochs,lr", baseline="epochs=3 lr=0.01")
    assert sum("epochs=4 lr=0.1" in line for line in both) >= 2


def test_of_several_runs_of_one_arm_and_seed_the_newest_counts_and_one_that_runs_does_not():
    for code in ("old", "new"):
        newest = [planted("twice", 0, 1, lr=lr, tags={"version.code": code}) for lr in (0.01, 0.003)]
    config = TrainConfig(dataset="digits", lr=0.003, epochs=3, seed=0)
    tracking.create_run("running", tracking.experiment_id(), config, {"dataset_used": "digits", "group": "twice"})
    said = ask("twice")
    assert "digits: 4 runs have the arm and seed of a newer one and are left out" in said
    assert "the runs come from 2 versions of the training code (new, old)" in said and not any("differs by arm" in line for line in said)
    asked = tracking.search_runs({"stage": "compare"})[-1].info.run_id
    runs = json.loads(mlflow.artifacts.load_text(f"runs:/{asked}/answer.json"))["blocks"][0]["runs"]
    assert {one["run_id"] for by_seed in runs.values() for one in by_seed.values()} == {run_id for made in newest for run_id in made}


def test_circumstances_that_differ_by_arm_are_told():
    planted("engines", 0, 1, tags={"engine": "plain", "version.code": "a"})
    planted("engines", 0, 1, lr=0.003, tags={"engine": "kernels", "version.code": "a"})
    said = ask("engines")
    assert "The engine differs by arm: 0.01 plain, 0.003 kernels." in said and sum("differs by arm" in line for line in said) == 1


def test_runs_of_other_test_images_are_refused_whatever_their_labels():
    planted("same", 0, 1, digest="a")
    planted("same", 0, 1, lr=0.003, digest="a")
    assert any("2 seeds" in line for line in ask("same"))
    planted("other", 0, 1, digest="a")
    planted("other", 1, lr=0.003, digest="b")
    planted("other", 0, lr=0.003, digest="a")
    with pytest.raises(RunError) as caught:
        ask("other")
    told = (
        "0.01 and 0.003 were scored on different test images of digits (seed 1): compare runs of the same images, or score them with eval"
    )
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("knob", ["distortion", "image_size"])
def test_what_decides_the_test_images_tells_no_arms_apart(knob):
    values = {"distortion": ("none", "rotated"), "image_size": (0, 16)}[knob]
    for value in values:
        planted(knob, 0, 1, **{knob: value})
    with pytest.raises(ConfigError, match=f"by={knob}: decides the test images, so nothing could be compared"):
        ask(knob, knob, baseline=str(values[1]))
    with pytest.raises(ConfigError, match=f"by={knob}: decides the test images"):
        ask(knob, f"{knob},lr", baseline="x")


def test_a_choice_by_outcome_is_refused_and_one_by_status_told():
    planted("status", 0, 1)
    planted("status", 0, 1, lr=0.003)
    for outcome in ("metrics.`test/loss` < 0.1", 'metric."val/loss" < 1'):
        with pytest.raises(ConfigError, match="filters on metrics, which chooses runs by their outcome"):
            ask(f"status' and {outcome} and tags.group = 'status")
    told = "The filter asks for a status, so trainings that diverged may be left out: do not trust its counts of lost ones."
    assert told in ask("status' and attributes.status = 'FINISHED") and told not in ask("status")
    named = ask("status' and tags.group != 'metrics.x")  # a value is not a filter on it
    assert verdicts(named)


@pytest.mark.parametrize(
    ("runs", "by", "keys", "text"),
    [
        ("tags.group == 'x", "lr", {}, "runs=tags.group == 'x: Invalid clause"),
        ("tags.group = 'nothing'", "lr", {}, "finds 0 runs and no whole training among them"),
        ("tags.group = 'asked' and params.lr = '0.1'", "optimizer", {}, r"by=optimizer: all 2 runs are of one arm \(adam\)"),
        ("tags.group = 'asked'", "optimiser", {}, r"by=optimiser: is no knob, and run .* has no such tag; did you mean optimizer\?"),
        ("tags.group = 'asked'", "lr", {"baseline": "1"}, "baseline=1: is no arm here: choose 0.01, 0.003, 0.1"),
        ("tags.group = 'asked' and params.lr != '0.01'", "lr", {}, "baseline: missing; none of the arms is the default: choose 0.003, 0.1"),
        (
            "tags.group = 'asked'",
            "lr",
            {"claims": {"0.03": -0.1}},
            r"claims\.0\.03: is no arm beside the baseline: choose 0\.003, 0\.1; did you mean 0\.003\?",
        ),
        ("tags.group = 'asked'", "lr", {"claims": {"0.01": -0.1}}, r"claims\.0\.01: is no arm beside the baseline"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(runs, by, keys, text):
    if not tracking.search_runs({"group": "asked"}):
        for lr in (0.01, 0.003, 0.1):
            planted("asked", 0, 1, lr=lr)
    n_before = len(tracking.search_runs({"stage": "compare"}))
    with pytest.raises((RunError, ConfigError)) as caught:
        existing.compare_existing(ExistingConfig.parse({"runs": runs, "by": by} | keys), lambda line: None)
    assert re.search(text, str(caught.value)) and "\n" not in str(caught.value)
    assert len(tracking.search_runs({"stage": "compare"})) == n_before


def test_the_entry_point_takes_a_file_or_a_filter(monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr(existing, "compare_existing", lambda config, say, command: asked.append((config, command)))
    entry.compare(["--runs", "params.lr = '0.01'", "--by", "transform,coordconv"])
    ((config, command),) = asked
    assert (config.runs, config.by) == ("params.lr = '0.01'", ("transform", "coordconv")) and "--by transform,coordconv" in command
    with pytest.raises(ConfigError, match="by: missing"):
        entry.compare(["--runs", "x"])
    with pytest.raises(ConfigError, match="config: missing; it is the comparison file"):
        entry.compare([])
    with pytest.raises(ConfigError, match="unknown flag --seed; did you mean seeds"):
        entry.compare(["x.yaml", "--seed", "3"])
