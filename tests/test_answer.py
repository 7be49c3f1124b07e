"""What is told of collapsed and missing seeds, claims and single pairs: exact words from planted tables."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import fisher_exact

from stn_pipeline.comparing.answer import LOSS, Answer
from stn_pipeline.comparing.arms import SinglePair, Trained
from stn_pipeline.comparing.paired import paired
from stn_pipeline.comparing.pictures import _interval, _Row
from stn_pipeline.comparing.trained import single_pairs, trained
from stn_pipeline.figures import sheet

BASE = [0.100, 0.104, 0.098, 0.101, 0.099, 0.103]
ARM = [0.091, 0.093, 0.090, 0.094, 0.088, 0.092]


def done(loss: float, collapsed: bool = False) -> Trained:
    return Trained("done", {"test/loss": loss, "test/accuracy": 1 - loss}, collapsed, "r")


def table(arm: list[Trained], base: list[Trained] | None = None) -> dict[str, dict[int, Trained]]:
    return {"base": dict(enumerate(base or map(done, BASE))), "arm": dict(enumerate(arm))}


def test_sound_seeds_are_two_sentences_and_nothing_beside_them():
    lines = Answer("t", table(list(map(done, ARM))), "base").sentences()
    assert len(lines) == 2 and all(line.endswith("6 seeds): better than base.") for line in lines)
    assert lines[0].startswith("arm lowers test loss by 9 % (95 % CI 8 to 11 %; 0.0095 nats, ") and lines[1].startswith(
        "arm raises test accuracy by 0.95 points"
    )


@pytest.mark.parametrize("where", ["arm", "base"])
def test_a_collapse_is_counted_and_the_difference_told_without_it(where):
    values = {"arm": list(map(done, ARM)), "base": list(map(done, BASE))}
    values[where][2] = done(2.3, collapsed=True)
    answer = Answer("t", table(**values), "base")
    p = fisher_exact([[1, 5], [0, 6]]).pvalue
    against = f" (Fisher's exact test against base: p = {p:.2g})" if where == "arm" else ""
    assert f"1 of 6 trainings of {where} collapsed{against}." in answer.sentences()
    without = paired(*([loss for seed, loss in enumerate(losses) if seed != 2] for losses in (ARM, BASE)))
    ends = [
        f"{100 * end:+.0f}" if abs(end) >= 0.1 else f"{100 * end:+.1f}"
        for end in (without.relative, without.relative_low, without.relative_high)
    ]
    share, low, high = (end.replace("-", "−") for end in ends)
    start = f"arm without the seeds that collapsed in it or in base: {share} % (95 % CI {low} % to {high} %) in test loss and +"
    assert [line for line in answer.sentences() if line.startswith(start) and line.endswith(" points in test accuracy, 5 seeds.")]
    assert "not distinguishable" in answer.sentences()[0]  # the whole answer still has the collapsed seed in it
    assert [row[-1] for row in answer.rows()[1:]] == (["0 of 6", "1 of 6"] if where == "arm" else ["1 of 6", "0 of 6"])


def test_what_is_missing_is_named_with_its_reason():
    arm = [*map(done, ARM[:3]), Trained("diverged", {}, True, "r", "loss is nan"), Trained("failed", {}, False, "r", "out of memory")]
    lines = Answer("t", table(arm), "base").sentences()
    assert "arm: seed 3 diverged: loss is nan; its pairs are left out." in lines
    assert "arm: seed 4 failed: out of memory; its pairs are left out." in lines
    assert "arm: seed 5 is missing; its pairs are left out." in lines
    assert "3 seeds" in lines[0] and "1 of 4 trainings of arm collapsed" in " ".join(lines)


@pytest.mark.parametrize(
    ("status", "tags", "state", "collapsed"),
    [
        ("FINISHED", {}, "done", False),
        ("FINISHED", {"collapsed": "true"}, "done", True),
        ("FINISHED", {"collapsed": "recovered"}, "done", False),
        ("FAILED", {"collapsed": "true", "collapsed.why": "nan"}, "diverged", True),
        ("FAILED", {"error": "out of memory"}, "failed", False),
        ("KILLED", {"collapsed": "true"}, "missing", False),
    ],
)
def test_a_run_is_what_its_status_and_its_tags_say(status, tags, state, collapsed):
    info, data = SimpleNamespace(run_id="r", status=status), SimpleNamespace(tags=tags, metrics={"test/loss": 0.1, "test/accuracy": 0.9})
    found = trained(SimpleNamespace(info=info, data=data))
    assert (found.state, found.collapsed) == (state, collapsed)
    assert found.why == tags.get("collapsed.why", tags.get("error", "" if state != "missing" else "it was not trained to the end"))
    data.metrics = {"test/loss": 0.1}
    assert trained(SimpleNamespace(info=info, data=data)).state == ("missing" if status == "FINISHED" else state)


def test_an_arm_without_a_shared_seed_is_not_compared():
    lines = Answer("t", {"base": {0: done(0.1)}, "arm": {1: done(0.2)}}, "base").sentences()
    assert "arm shares no seed with base that both have done: there is nothing to compare." in lines


@pytest.mark.parametrize(("claim", "word"), [(-0.09, "holds"), (-0.25, "excludes"), (0.2, "excludes")])
def test_a_claim_is_held_against_the_interval(claim, word):
    answer = Answer("t", table(list(map(done, ARM))), "base", {"arm": claim})
    (line,) = answer.claims_in_words()
    low, high = answer.of("arm").t.relative_low, answer.of("arm").t.relative_high
    assert (low <= claim <= high) == (word == "holds")
    assert f"{word} it. To see a difference of that size 8 times in 10 takes {answer.of('arm').n_needed} paired seeds; here are 6." in line
    told = {-0.09: "−9.0", -0.25: "−25", 0.2: "+20"}[claim]
    assert line.startswith(f"Claimed for arm: {told} % test loss.")


def test_single_pairs_are_counted_by_what_each_would_have_said():
    found = [(30, 5, 1e-4), (5, 30, 1e-4), (12, 10, 0.8), (4, 31, 1e-5)]
    pairs = [SinglePair("arm", seed, *counts) for seed, counts in enumerate(found)]
    answer = Answer("t", table(list(map(done, ARM))), "base", single_pairs=tuple(pairs))
    (line,) = answer.single_pairs_in_words()
    assert line == "Seed by seed (McNemar at 5 %), arm is better than base in 1 of 4 single pairs, worse in 2, neither in 1."


def test_the_table_has_an_arm_a_row_and_the_baseline_first():
    head, base, arm = Answer("t", {"arm": dict(enumerate(map(done, ARM))), "base": dict(enumerate(map(done, BASE)))}, "base").rows()
    assert (base[0], arm[0]) == ("base (baseline)", "arm") and len({len(head), len(base), len(arm)}) == 1
    assert arm[:3] == ["arm", "6", "0.0913 ± 0.0022"] and base[3] == "" and not math.isnan(float(arm[4]))


def test_a_claim_is_held_against_seeds_that_did_not_collapse():
    base = [*map(done, BASE[:5]), done(2.3, collapsed=True)]
    answer, sound = Answer("t", table(list(map(done, ARM)), base), "base", {"arm": -0.25}), Answer("t", table(list(map(done, ARM))), "base")
    contrast = answer.of("arm")
    assert contrast.sought == pytest.approx(-0.25 * sum(BASE[:5]) / 5) and contrast.without.n == 5
    (line,) = answer.claims_in_words()
    assert "The interval here, without the collapsed seeds, " in line and "excludes it" in line and line.endswith("here are 5.")
    assert contrast.n_needed <= 3 and sound.of("arm").sought == pytest.approx(sound.of("arm").t.difference)


@pytest.mark.parametrize(("labels", "n_pairs"), [([0, 1, 2, 0], 1), ([1, 0, 2, 0], 0)])
def test_single_networks_are_compared_on_the_same_images_only(monkeypatch, labels, n_pairs):
    def predictions(run_id: str, name: str) -> bytes:
        file = io.BytesIO()
        np.savez(file, label=np.array([0, 1, 2, 0] if run_id == "b" else labels), predicted=np.array([0, 1, 2, 2]))
        return file.getvalue()

    monkeypatch.setattr("stn_pipeline.comparing.trained.read_file", predictions)
    figures = {"test/loss": 0.1, "test/accuracy": 0.9}
    table = {"base": {0: Trained("done", figures, run_id="b")}, "arm": {0: Trained("done", figures, run_id="a")}}
    assert len(single_pairs(table, "base")) == n_pairs


@pytest.mark.parametrize(
    ("low", "high", "arrows"),
    [(-40, -20, []), (20, 40, []), (-5, 5, []), (-400, -20, ["<"]), (20, 400, [">"]), (-math.inf, math.inf, ["<", ">"])],
)
def test_only_an_interval_that_goes_on_beyond_the_picture_ends_in_an_arrow(low, high, arrows):
    ends = (low / 100, high / 100) if math.isfinite(low) else (math.nan, math.nan)
    result = SimpleNamespace(relative=-0.3, relative_low=ends[0], relative_high=ends[1])
    with sheet(3, 3, "x") as figure:
        axes = figure.subplots()
        axes.set_xlim(-100, 100)
        _interval(axes, _Row("arm", "black", result, None, None), 0.0, LOSS)
        assert [line.get_marker() for line in axes.lines if line.get_marker() in "<>"] == arrows
