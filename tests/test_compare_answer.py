"""The answer of a comparison from end to end: looks that stop it, what decides, figures that scipy finds again, the page."""

import csv
import io
import json
import math
import re

import mlflow
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from stn_pipeline.comparing import arms
from stn_pipeline.comparing.verdicts import holm
from stn_pipeline.jobs import Job
from stn_pipeline.texts import markdown
from tests.compared import (
    NOTE,
    TWO,
    Go,
    artifact,
    block_of,
    children_of,
    drawn,
    fresh,
    goer,
    keys_of,
    parent_of,
    steady,
    whole,
    without_pictures,
)
from tests.fakes import Killed, News, record

LOOKS = {"looks": [3, 5, 6]}
ARMS = TWO | {"twin": {"batch_size": 32}}  # low is far better; of twin only the noise differs


@pytest.fixture
def go(request, store, signals_restored, monkeypatch) -> Go:
    if "pictures" not in request.fixturenames:
        without_pictures(monkeypatch)
    return goer(monkeypatch)


@pytest.fixture
def pictures():
    """Have the pictures drawn, which takes a second."""


# Looks


def test_a_comparison_stops_at_the_look_at_which_every_arm_is_decided(go):
    name = fresh()
    pool, said = go({"": steady}, n_workers=2, name=name, arms=TWO, seeds=LOOKS)
    assert sorted(keys_of(pool)) == sorted(f"{arm} s{seed}" for seed in range(3) for arm in TWO)
    assert "3 or 5 or 6 seeds: at most 12 trainings" in said[0]
    assert "look 1 of 3, 3 seeds: every arm is decided; 3 seeds are saved" in said
    assert any(
        re.match(r"low lowers test loss on digits .* seeds, p.* at look 1 of 3, which may spend 0\.0177\): better", line) for line in said
    )
    assert not any("answered before" in line for line in said)
    again, repeated = go({"": steady}, name=name, arms=TWO, seeds=LOOKS)
    assert again.jobs == [] and [line for line in repeated if "better than" in line] == [line for line in said if "better than" in line]


def test_looks_go_on_with_what_is_not_decided_and_survive_a_killed_driver(go):
    name, twin = fresh(), fresh()
    asked = {"arms": ARMS, "seeds": LOOKS, "train": {"epochs": 4, "device": "cpu"}}

    def killed(job: Job) -> News:
        yield record(1, 1.0)
        raise Killed

    with pytest.raises(Killed):
        go({"twin digits s4": killed, "": steady}, name=name, **asked)
    pool, said = go({"": steady}, name=name, **asked)
    assert keys_of(pool) == ["twin s4", "base s5", "twin s5"], "low is decided, and trained no further"
    assert len(children_of(name)) == 9 + 4 + 2
    assert [line.partition(" seeds: ")[2] for line in said if line.startswith("look ")] == [
        "not decided yet: twin; going on to 5 seeds",
        "not decided yet: twin; going on to 6 seeds",
    ]
    verdicts = {verdict["arm"]: verdict for verdict in block_of(name)["verdicts"]}
    assert (verdicts["low"]["kind"], verdicts["low"]["seeds"], verdicts["low"]["look"]) == ("better", [0, 1, 2], 1)
    assert (verdicts["twin"]["kind"], verdicts["twin"]["seeds"], verdicts["twin"]["look"]) == ("not shown", [*range(6)], 3)
    assert not any("answered before" in line for line in said)

    other, at_once = go({"": steady}, name=twin, **asked)  # never killed; finds all of its trainings done
    assert other.jobs == [] and block_of(twin)["verdicts"] == block_of(name)["verdicts"]
    answers = [line for line in said if line.startswith(("low ", "twin ")) and "digits s" not in line]
    assert answers == [line for line in at_once if line.startswith(("low ", "twin "))] and len(answers) == 2

    unplanned, told = go({"": steady}, name=fresh(), **asked | {"seeds": 7})
    assert any(line.startswith("This question was answered before with 6 seeds: this is look 2") for line in told)
    assert keys_of(unplanned) == ["low s3", "low s4", "low s5", "base s6", "low s6", "twin s6"]


# What decides


def test_accuracy_decides_where_it_is_asked_to_within_a_margin_and_engines_that_differ_are_told(go):
    def by_engine(job: Job) -> News:
        return whole(job, 0.0005, engine="kernels" if job.config.lr == 0.003 else "plain", device="cpu")

    name = fresh()
    asked = {"arms": ARMS, "seeds": 4, "decide": "test/accuracy", "margin": 0.0008, "train": {"epochs": 5, "val_fraction": 0.2}}
    _, said = go({"": by_engine}, name=name, **asked)
    assert any(re.match(r"low raises test accuracy on digits \(5 epochs\) by 0\.4\d points .* better than base\.", line) for line in said)
    assert any(line.startswith("twin is equivalent to base in test accuracy within 0.08 points on digits (5 epochs)") for line in said)
    assert any(line.startswith("Test loss, described, not tested: low −19 % (95 % CI ") for line in said)
    assert sum("better than" in line or "equivalent to" in line for line in said) == 2
    assert "The engine differs by arm: base plain, low kernels, twin plain." in said and not any("device differs" in line for line in said)
    block = block_of(name)
    assert block["decide"] == "test/accuracy" and {verdict["margin"] for verdict in block["verdicts"]} == {0.0008}
    row = next(csv.DictReader(io.StringIO(artifact(name, "runs.csv"))))
    assert list(row)[5:7] == ["test/accuracy", "test/loss"]


def test_arms_trained_on_other_numbers_of_images_are_compared_and_it_is_said(go):
    _, said = go(name=fresh(), arms={"base": {}, "more": {"val_fraction": 0.05, "batch_size": 32}}, seeds=[200, 201])
    assert "The arms are trained on different numbers of images (val_fraction: base 0.1, more 0.05)." in said
    assert any(line.startswith("No difference shown is not equality: name a margin below which") for line in said)


# The figures


N = 6


def test_the_figures_are_those_of_scipy_on_the_exported_runs(go, monkeypatch):
    name = fresh()
    monkeypatch.setattr(arms, "RESAMPLES", 9999)
    go(name=name, seeds=N)
    table: dict[str, dict[int, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(artifact(name, "runs.csv"))):
        run = mlflow.get_run(row["run_id"])
        assert all(run.data.metrics[what] == float(row[what]) for what in ("test/loss", "test/accuracy"))
        assert (run.data.params["seed"], row["state"]) == (row["seed"], "done")
        table.setdefault(row["arm"], {})[int(row["seed"])] = {what: float(row[what]) for what in ("test/loss", "test/accuracy")}
    (block,) = json.loads(artifact(name, "answer.json"))["blocks"]
    assert len(block["contrasts"]) == 4
    for what in ("test/loss", "test/accuracy"):
        found = [contrast for contrast in block["contrasts"] if contrast["measure"] == what]
        raw = []
        for contrast in found:
            arm, base = (np.array([table[a][seed][what] for seed in range(N)]) for a in (contrast["arm"], "base"))
            test = scipy.stats.ttest_rel(arm, base)
            low, high = test.confidence_interval(0.95)
            shares = [scipy.optimize.brentq(lambda r, a=arm, b=base, s=side: edge(a, b, r, s), -5, 5, xtol=1e-13) for side in (-1, 1)]
            raw.append(test.pvalue)
            told = contrast["t"]
            expected = {
                "arm_mean": arm.mean(), "arm_sd": arm.std(ddof=1), "baseline_mean": base.mean(), "baseline_sd": base.std(ddof=1),
                "difference": (arm - base).mean(), "low": low, "high": high, "p": test.pvalue,
                "relative": arm.mean() / base.mean() - 1, "relative_low": shares[0], "relative_high": shares[1],
            }  # fmt: skip
            for key, value in expected.items():
                assert told[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
            low, high = scipy.stats.bootstrap(
                (arm - base,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
            ).confidence_interval
            assert contrast["bootstrap"] == pytest.approx([low, high], abs=1e-9)
        if what == "test/loss":  # which decides
            verdicts = {verdict["arm"]: verdict for verdict in block["verdicts"]}
            told_p = [verdicts[contrast["arm"]]["p"] for contrast in found]
            assert told_p == pytest.approx([min(1.0, 2 * min(raw)) if p == min(raw) else max(p, 2 * min(raw)) for p in raw])
            assert told_p == pytest.approx(holm(raw))
            assert [verdicts[contrast["arm"]]["kind"] != "not shown" for contrast in found] == [p <= 0.05 for p in told_p]


def edge(arm: np.ndarray, base: np.ndarray, share: float, side: int) -> float:
    """Return 0 where a t test of arm - base against this share of base is just on the edge, on this side."""
    rest = (arm - base) - share * base
    t = rest.mean() / (rest.std(ddof=1) / math.sqrt(len(rest)))
    return t + side * scipy.stats.t.ppf(0.975, len(rest) - 1)


# The page


def test_the_page_says_the_answer_first_and_the_report_stands_alone(go, pictures):
    name = fresh()
    arms = {"base": {}, "<b>low</b> & co": {"lr": 0.003}}
    _, said = go(
        {"": drawn},
        name=name,
        arms=arms,
        seeds=4,
        train={"epochs": 3, "weight_decay": 0.3},
        question="Is <i>low</i> better?",
        claims={"<b>low</b> & co": -0.2},
    )
    note = parent_of(name).data.tags[NOTE]
    sentence = next(line for line in said if "test loss on digits (3 epochs)" in line)
    assert note.startswith(f"* **{markdown(sentence)}**\n* Test accuracy, described") and "| arm | n |" in note and "<b>" not in note
    report = artifact(name, "report.html")
    assert "<b>low</b>" not in report and "&lt;b&gt;low&lt;/b&gt; &amp; co" in report and "<i>low" not in report
    assert not re.search(r"(src|href)=.(?!data:image/png;base64,)", report) and "<script" not in report and "@import" not in report
    assert report.count("data:image/png;base64,") == 5 and "the command" in report
    assert any(
        re.match(r"Claimed for <b>low</b> & co: −20 % test loss\. The interval here, .* (holds|excludes) it\. ", line) for line in said
    )
