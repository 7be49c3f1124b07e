"""The answer of a block: what is lost, missing, claimed, needed and paired, the table, plain values; from planted tables."""

import io
import json
import math
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest, fisher_exact

from stn_pipeline.comparing import arms
from stn_pipeline.comparing.answer import Answer, answers_of
from stn_pipeline.comparing.arms import SinglePair, Trained
from stn_pipeline.comparing.measures import ACCURACY, LOSS, measures_of
from stn_pipeline.comparing.paired import interval, paired
from stn_pipeline.comparing.pictures import _interval, _Row
from stn_pipeline.comparing.planning import needed_for_difference, needed_for_equivalence
from stn_pipeline.comparing.trained import differences, single_pairs, trained, where
from stn_pipeline.comparing.verdicts import Rules
from stn_pipeline.config import TrainConfig
from stn_pipeline.figures import sheet

BASE = [0.100, 0.104, 0.098, 0.101, 0.099, 0.103]
ARM = [0.091, 0.093, 0.090, 0.094, 0.088, 0.092]
NEAR = [0.101, 0.102, 0.099, 0.102, 0.097, 0.104]
LOST = Trained("diverged", {}, True, "r", "loss is nan")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(arms, "RESAMPLES", 99)


def done(loss: float, collapsed: bool = False, **more: object) -> Trained:
    return Trained("done", {"test/loss": loss, "test/accuracy": 1 - loss}, collapsed, "r", **more)


def table(arm: list[Trained] = (), base: list[Trained] = (), **others: list[Trained]) -> dict[str, dict[int, Trained]]:
    arms = {"base": base or map(done, BASE), "arm": arm or map(done, ARM)} | others
    return {name: dict(enumerate(found)) for name, found in arms.items()}


def answer(found: dict[str, dict[int, Trained]], rules: Rules = Rules(), **more: object) -> Answer:  # noqa: B008
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    (one,) = answers_of([("t", "t (5 epochs)", found)], "base", rules, seeds, None, measures=measures_of(rules.measure.name), **more)
    return one


def said(found: dict[str, dict[int, Trained]], rules: Rules = Rules(), **more: object) -> list[str]:  # noqa: B008
    return answer(found, rules, **more).sentences()


def share(value: float, digits: int | None = None) -> str:
    return f"{100 * value:+.{(0 if abs(value) >= 0.1 else 1) if digits is None else digits}f}".replace("-", "−")


def test_sound_seeds_are_a_verdict_in_one_measure_and_the_other_described():
    lines = said(table())
    assert len(lines) == 3 and lines[0].startswith(
        "arm lowers test loss on t (5 epochs) by 9 % (95 % CI 8 to 11 %; 0.0095 nats; 6 seeds, p"
    )
    assert lines[0].endswith(": better than base.")
    assert re.fullmatch(r"Test accuracy, described, not tested: arm \+0\.95 points \(95 % CI \+0\.\d\d to \+1\.\d\d\)\.", lines[1])
    assert lines[2].startswith("Pairing by seed in test loss")
    by_accuracy = said(table(), Rules(ACCURACY))
    assert by_accuracy[0].startswith("arm raises test accuracy on t (5 epochs) by 0.95 points") and by_accuracy[0].endswith(
        "better than base."
    )
    assert by_accuracy[1].startswith("Test loss, described, not tested: arm −9 % (95 % CI −11 to −8 %; −0.0095 nats).")
    assert sum("better than" in line for line in (*lines, *by_accuracy)) == 2


@pytest.mark.parametrize("lost", [done(2.3, collapsed=True), LOST, Trained("crashed", {}, True, "r", "killed twice")])
@pytest.mark.parametrize("place", ["arm", "base"])
def test_a_lost_seed_is_counted_with_the_interval_of_the_rate(place, lost):
    values = {"arm": list(map(done, ARM)), "base": list(map(done, BASE))}
    values[place][2] = lost
    found = answer(table(**values))
    lines = found.sentences()
    p = fisher_exact([[1, 5], [0, 6]]).pvalue
    rate = {k: binomtest(k, 6).proportion_ci(0.95, "exact") for k in (0, 1)}
    told = {k: f"{k} of 6 ({100 * rate[k].low:.0f} to {100 * rate[k].high:.0f} %)" for k in (0, 1)}
    k = {"base": int(place == "base"), "arm": int(place == "arm")}
    against = f" Fisher's exact test against base: arm p = {p:.2g}." if place == "arm" else ""
    rates = f"base {told[k['base']]}, arm {told[k['arm']]}"
    assert f"Lost (diverged, crashed or collapsed), with the 95 % interval of the rate: {rates}.{against}" in lines
    assert lines[0].startswith(f"arm lost {k['arm']} of 6 seeds and base {k['base']} on t (5 epochs)")
    assert (f"{place}: seed 2 {lost.state}: {lost.why}." in lines) == bool(lost.why)
    without = paired(*([loss for seed, loss in enumerate(losses) if seed != 2] for losses in (ARM, BASE)))
    ends = (f"{share(end, 0)}" for end in (without.relative, without.relative_low, without.relative_high))
    assert "where neither was lost: {} % (95 % CI {} to {} %; ".format(*ends) in lines[0]
    assert [row[-1] for row in found.rows()[1:]] == [told[k["base"]], told[k["arm"]]]


def test_none_of_ten_lost_is_still_compatible_with_three_in_ten():
    ten = [done(0.1 + i / 1000) for i in range(10)]
    lines = said(table([LOST, *ten[1:]], ten))
    assert any("base 0 of 10 (0 to 31 %), arm 1 of 10 (0 to 45 %)." in line for line in lines)


def test_what_is_missing_is_named_with_its_reason_and_left_out():
    lines = said(table([*map(done, ARM[:4]), Trained("failed", {}, False, "r", "out of memory")]))
    assert "arm: seed 4 failed: out of memory; left out, since it says nothing about arm." in lines
    assert "4 seeds, p" in lines[0] and not any("Lost" in line for line in lines)
    found = table([*map(done, ARM[:3]), Trained("missing", why="it was not started"), Trained("missing")])
    assert "arm: seed 3, 4 is missing: it was not started; left out, since it says nothing about arm." in said(found)


def test_an_arm_without_a_shared_seed_is_not_compared():
    lines = said({"base": {0: done(0.1)}, "arm": {1: done(0.2)}})
    assert lines == ["arm and base have no seed that both have done on t (5 epochs): there is nothing to compare."]


@pytest.mark.parametrize(
    ("status", "tags", "state", "collapsed"),
    [
        ("FINISHED", {}, "done", False),
        ("FINISHED", {"collapsed": "true"}, "done", True),
        ("FINISHED", {"collapsed": "recovered"}, "done", False),
        ("FAILED", {"collapsed": "true", "collapsed.why": "nan"}, "diverged", True),
        ("FAILED", {"collapsed": "true", "crashed": "true"}, "crashed", True),
        ("FAILED", {"error": "out of memory"}, "failed", False),
        ("KILLED", {"collapsed": "true"}, "missing", False),
    ],
)
def test_a_run_is_what_its_status_and_its_tags_say(status, tags, state, collapsed):
    info, data = SimpleNamespace(run_id="r", status=status), SimpleNamespace(tags=tags, metrics={"test/loss": 0.1, "test/accuracy": 0.9})
    found = trained(SimpleNamespace(info=info, data=data, inputs=None))
    assert (found.state, found.collapsed) == (state, collapsed)
    assert found.why == tags.get("collapsed.why", tags.get("error", "" if state != "missing" else "it was not trained to the end"))
    data.metrics = {"test/loss": math.nan, "test/accuracy": 0.1}
    if status == "FINISHED":
        nothing = trained(SimpleNamespace(info=info, data=data, inputs=None))
        assert (nothing.state, nothing.collapsed, nothing.why) == ("diverged", True, "its test loss is nan")
    data.metrics = {"test/loss": 0.1}
    assert trained(SimpleNamespace(info=info, data=data, inputs=None)).state == ("missing" if status == "FINISHED" else state)


# Claims and what it takes to know


@pytest.mark.parametrize(("claim", "word"), [(-0.09, "holds"), (-0.25, "excludes"), (0.2, "excludes")])
def test_a_claim_is_held_against_the_interval_and_told_how_many_seeds_it_takes(claim, word):
    found = answer(table(), claims={"arm": claim})
    (line,) = (line for line in found.sentences() if "laimed" in line)
    t = found.of("arm").t
    assert (t.relative_low <= claim <= t.relative_high) == (word == "holds")
    sd = statistics.stdev(a - b for a, b in zip(ARM, BASE, strict=True))
    low, high = needed_for_difference(claim * statistics.fmean(BASE), sd, 6, 0.05)
    takes = f"{low}" if low == high else f"{low} to {high}"
    told = {-0.09: "−9.0", -0.25: "−25", 0.2: "+20"}[claim]
    assert line == (
        f"Claimed for arm: {told} % test loss. The interval here, {share(t.relative_low)} % to {share(t.relative_high)} %, {word} it. "
        f"To see a difference of that size 8 times in 10 takes {takes} paired seeds; here are 6."
    )


def test_a_claim_is_held_against_seeds_that_were_not_lost():
    found = answer(table(base=[*map(done, BASE[:5]), done(2.3, collapsed=True)]), claims={"arm": -0.25})
    (line,) = (line for line in found.sentences() if "laimed" in line)
    assert "The interval here without the lost seeds, " in line and "excludes it" in line and line.endswith("here are 5.")
    sd = statistics.stdev(a - b for a, b in zip(ARM[:5], BASE[:5], strict=True))
    assert found.needed_for_claim("arm") == needed_for_difference(0.25 * statistics.fmean(BASE[:5]), sd, 5, 0.05)


def test_seeds_are_planned_for_the_level_of_the_whole_file_and_of_the_look():
    others = {name: list(map(done, NEAR)) for name in ("b", "c")}
    among, alone = (answer(found, claims={"arm": -0.05}) for found in (table(**others), table()))
    sd = statistics.stdev(a - b for a, b in zip(ARM, BASE, strict=True))
    assert (
        among.needed_for_claim("arm")
        == needed_for_difference(0.05 * statistics.fmean(BASE), sd, 6, 0.05 / 3)
        != alone.needed_for_claim("arm")
    )
    looks = answer(table(), Rules(looks=(3, 6)), claims={"arm": -0.05})
    level = looks.verdicts["arm"].level
    assert level < 0.05 and looks.needed_for_claim("arm").low >= alone.needed_for_claim("arm").low


def test_what_equality_takes_is_told_where_nothing_is_shown_and_a_margin_is_named():
    near = table(list(map(done, NEAR)))
    assert not any("to show equivalence" in line for line in said(near))  # for a margin alone, never for what was seen
    found = answer(near, Rules(margin=0.01))
    sd = statistics.stdev(a - b for a, b in zip(NEAR, BASE, strict=True))
    low, high = needed_for_equivalence(0.01 * statistics.fmean(BASE), sd, 6, 0.05)
    line = f"arm: to show equivalence within 1 % 8 times in 10, were it equal, takes {low} to {high} paired seeds; here are 6."
    assert found.verdicts["arm"].kind == "not shown" and line in found.sentences()
    for rules in (Rules(margin=0.2), Rules(ACCURACY, margin=0.02)):
        assert answer(near, rules).verdicts["arm"].kind == "equivalent"
        assert not any("to show equivalence" in line for line in said(near, rules))
    by_points = answer(near, Rules(ACCURACY, margin=0.0005))
    assert by_points.needed_for_margin("arm") == pytest.approx(needed_for_equivalence(0.0005, sd, 6, 0.05))
    assert any("within 0.05 points 8 times in 10" in line for line in by_points.sentences())


def test_ranks_do_not_show_equivalence_so_no_seeds_are_promised_for_it():
    found = answer(table([LOST, *map(done, NEAR[1:])]), Rules(margin=0.01))
    assert found.needed_for_margin("arm") is None and not any("to show equivalence" in line for line in found.sentences())


def test_a_seed_each_or_no_spread_promises_no_number():
    for own in ({0: done(0.09)}, {seed: done(loss + 0.01) for seed, loss in enumerate(BASE)}):
        found = answer({"base": dict(enumerate(map(done, BASE))), "arm": own}, Rules(margin=0.01), claims={"arm": -0.15})
        assert found.needed_for_claim("arm") is None and found.needed_for_margin("arm") is None
        assert not any("8 times in 10" in line for line in found.sentences())


# Pairing, single pairs, circumstances


def test_pairing_is_told_as_it_is():
    line = said(table())[-1]
    r, ratio = np.corrcoef(ARM, BASE)[0, 1], np.var(np.subtract(ARM, BASE)) / (np.var(ARM) + np.var(BASE))
    told = "correlation with base, and the variance of the difference as a share of that of unpaired seeds"
    assert line == f"Pairing by seed in test loss ({told}): arm {r:.2f} and {ratio:.2f}."
    assert not any("Pairing" in line for line in said(table(list(map(done, ARM[:2])))))


def test_single_pairs_are_counted_by_what_each_would_have_said():
    found = [(30, 5, 1e-4), (5, 30, 1e-4), (12, 10, 0.8), (4, 31, 1e-5)]
    pairs = [SinglePair("arm", seed, *counts) for seed, counts in enumerate(found)]
    (line,) = answer(table(), single_pairs=tuple(pairs)).single_pairs_in_words()
    assert line == "Seed by seed (McNemar at 5 %), arm is better than base in 1 of 4 single pairs, worse in 2, neither in 1."


def test_circumstances_that_are_not_the_same_in_all_arms_are_told():
    def trained_by(engine: str, code: str = "a") -> list[Trained]:
        return [done(0.1, tags={"engine": engine, "version.code": code}) for _ in range(2)]

    assert differences(answer(table(trained_by("plain"), trained_by("plain")))) == []
    assert differences(answer(table(trained_by("kernels"), trained_by("plain")))) == ["The engine differs by arm: base plain, arm kernels."]
    mixed = [*trained_by("plain", "b"), *trained_by("plain")]
    assert differences(answer(table(mixed, trained_by("plain")))) == ["The training code differs by arm: base a, arm a and b."]
    assert differences(answer(table(trained_by("plain"), [done(0.1)]))) == []  # not known is not different


def test_where_says_what_all_trainings_share():
    one, other = TrainConfig(epochs=5, distortion="rotated"), TrainConfig(epochs=1)
    assert where([one, one], "mnist") == "mnist (rotated, 5 epochs)" and where([other], "mnist") == "mnist (1 epoch)"
    assert where([one, other], "mnist") == "mnist" and where([one, one.model_copy(update={"epochs": 2})], "mnist") == "mnist (rotated)"


# The table and plain values


def test_the_table_has_an_arm_a_row_and_the_baseline_first():
    found = answer({"arm": dict(enumerate(map(done, ARM))), "base": dict(enumerate(map(done, BASE)))}, Rules(margin=0.05))
    head, base, arm = found.rows()
    assert len({len(head), len(base), len(arm)}) == 1 and head[:6] == [
        "arm", "n", "test loss, nats", "difference, 95 % CI", "verdict", "p (Holm)",
    ]  # fmt: skip
    assert base[:2] == ["base (baseline)", "6"] and base[3:6] == ["", "", ""]
    assert arm[:3] == ["arm", "6", "0.0913 ± 0.0022"] and arm[4:6] == ["better", "< 0.0001"]
    assert arm[3].startswith("−9 % (95 % CI −11 to −8 %)") and head[-1] == "lost" and arm[-1] == "0 of 6 (0 to 46 %)"
    near = answer(table(list(map(done, NEAR))), Rules(margin=0.05)).rows()[-1]
    assert near[4] == "equivalent" and float(near[5]) <= 0.05


@pytest.mark.parametrize("n", [0, 1, 4, 6])
def test_plain_values_are_json_and_the_answers_own(n):
    others = {"lost": [LOST] * 6, "constant": [done(loss + 0.01) for loss in BASE]}
    found = answer(table(**others) | {"arm": dict(enumerate(map(done, ARM[:n])))}, Rules(margin=0.05), claims={"arm": -0.15})
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert (plain["title"], plain["where"], plain["baseline"], plain["decide"]) == ("t", "t (5 epochs)", "base", "test/loss")
    assert plain["answer"] == found.sentences() and plain["runs"]["lost"]["3"]["state"] == "diverged"
    verdict = next(one for one in plain["verdicts"] if one["arm"] == "arm")
    own = found.verdicts["arm"]
    assert (verdict["kind"], verdict["seeds"], verdict["test"], verdict["measure"]) == (own.kind, list(range(n)), own.test, "test/loss")
    assert verdict["p"] == (None if math.isnan(own.p) else own.p) and verdict["sentence"] == found.sentences()[0]
    ends = interval(ARM[:n], BASE[:n], 0.9, relative=True) if n > 1 else (None, None)
    assert verdict["interval_90"] == pytest.approx(list(ends)) and (verdict["seeds_for_claim"] is None) == (n < 2)
    contrasts = [one for one in plain["contrasts"] if one["arm"] == "arm"]
    assert [one["measure"] for one in contrasts] == (["test/loss", "test/accuracy"] if n else [])
    for one in contrasts:
        t = found.of("arm", LOSS if one["unit"] == "nats" else ACCURACY).t
        assert all(one["t"][name] == (None if math.isnan(value) else value) for name, value in vars(t).items())


SAME_IMAGES = {"test": "d"}


@pytest.mark.parametrize(
    ("labels", "digests", "n_pairs"),
    [
        ([0, 1, 2, 0], SAME_IMAGES, 1),
        ([1, 0, 2, 0], SAME_IMAGES, 0),
        ([0, 1, 2, 0], {"test": "e"}, 0),  # equal labels of other images
        ([0, 1, 2, 0], {}, 0),
    ],
)
def test_single_networks_are_compared_on_the_same_images_only(monkeypatch, labels, digests, n_pairs):
    def predictions(run_id: str, name: str) -> bytes:
        file = io.BytesIO()
        np.savez(file, label=np.array([0, 1, 2, 0] if run_id == "b" else labels), predicted=np.array([0, 1, 2, 2]))
        return file.getvalue()

    monkeypatch.setattr("stn_pipeline.comparing.trained.read_file", predictions)
    figures = {"test/loss": 0.1, "test/accuracy": 0.9}
    table = {
        "base": {0: Trained("done", figures, run_id="b", digests=SAME_IMAGES)},
        "arm": {0: Trained("done", figures, run_id="a", digests=digests)},
    }
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
