"""What a file decides: Holm over all of its verdicts, looks, margins, lost trainings; from planted tables."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from stn_pipeline.comparing.arms import Trained
from stn_pipeline.comparing.measures import ACCURACY, CALIBRATION, LOSS
from stn_pipeline.comparing.paired import equivalence_p
from stn_pipeline.comparing.ranks import signed_rank
from stn_pipeline.comparing.verdicts import Rules, decide, holm, judge

laws = settings(max_examples=60, deadline=None)
shares = st.floats(0, 1)
BASE = np.array([0.100, 0.104, 0.098, 0.101, 0.099, 0.103, 0.097, 0.102, 0.105, 0.096])
NOISE = np.array([0.004, -0.003, 0.002, -0.004, 0.003, -0.002, 0.001, -0.001, 0.002, -0.003])
DIVERGED, CRASHED = Trained("diverged", {}, True), Trained("crashed", {}, True)
FAILED, MISSING = Trained("failed"), Trained("missing")


def close(one, other) -> bool:
    return one == pytest.approx(other, rel=1e-9, abs=1e-12, nan_ok=True)


def done(loss: float, collapsed: bool = False) -> Trained:
    return Trained("done", {"test/loss": float(loss), "test/accuracy": 1 - float(loss)}, collapsed)


def arm(losses) -> dict[int, Trained]:
    return dict(enumerate(map(done, losses)))


def table(**losses) -> dict[str, dict[int, Trained]]:
    return {name: arm(values) for name, values in losses.items()}


def one(ours, theirs=None, **rules):
    return judge(ours, theirs or arm(BASE), ("arm", "base"), Rules(**rules))


# Holm


def closed(p: list[float]) -> list[float]:
    """An arm differs if every set of arms with it does; a set of k does if k times its smallest p is small."""
    sets = [subset for k in range(1, len(p) + 1) for subset in combinations(range(len(p)), k)]
    return [max(min(1.0, len(subset) * min(p[j] for j in subset)) for subset in sets if i in subset) for i in range(len(p))]


@laws
@given(st.lists(shares, max_size=6))
def test_holm_is_the_closed_test(p):
    assert close(holm(p), closed(p))


@laws
@given(st.lists(shares | st.just(math.nan), max_size=6))
def test_holm_does_not_count_tests_that_were_not_made(p):
    corrected, made = holm(p), [not math.isnan(value) for value in p]
    assert [not math.isnan(value) for value in corrected] == made
    assert close([value for value in corrected if not math.isnan(value)], closed([value for value in p if not math.isnan(value)]))


@laws
@given(st.lists(shares | st.just(math.nan), max_size=6), st.randoms(use_true_random=False))
def test_holm_does_not_mind_the_order_and_never_lowers_a_p(p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    corrected = holm(p)
    assert holm([p[i] for i in order]) == pytest.approx([corrected[i] for i in order], rel=0, abs=0, nan_ok=True)
    assert all(math.isnan(before) or before <= after <= 1 for before, after in zip(p, corrected, strict=True))


def test_holm_by_hand():
    assert close(holm([0.04, 0.01, math.nan, 0.03]), [0.06, 0.03, math.nan, 0.06])
    assert holm([0.7, 0.6]) == [1, 1] and holm([0.04]) == [0.04] and holm([]) == []


# A file's verdicts are one family


def test_better_worse_and_nothing_by_a_paired_t_test():
    values = {"low": BASE - 0.01 + NOISE, "high": BASE + 0.01 + NOISE, "same": BASE + NOISE}
    (found,) = decide([table(base=BASE, **values)], "base", Rules(), range(10))
    assert {name: verdict.kind for name, verdict in found.items()} == {"low": "better", "high": "worse", "same": "not shown"}
    raw = [ttest_rel(losses, BASE).pvalue for losses in values.values()]
    assert close([verdict.p for verdict in found.values()], closed(raw))
    for verdict in found.values():
        assert (verdict.seeds, verdict.test, verdict.level, verdict.n_verdicts) == (tuple(range(10)), "t", 0.05, 3)
        assert (verdict.look, verdict.n_looks, verdict.lost, verdict.baseline_lost, verdict.margin) == (1, 1, 0, 0, None)
        assert math.isnan(verdict.p_equivalent) and verdict.is_decided == (verdict.kind != "not shown")


def test_which_way_is_better_is_the_measures():
    assert one(arm(BASE - 0.01 + NOISE), measure=ACCURACY).kind == "better"
    assert one(arm(BASE + 0.01 + NOISE), measure=ACCURACY).kind == "worse"
    calibrated = {seed: Trained("done", {"test/calibration_error": value}) for seed, value in enumerate(BASE + 0.01 + NOISE)}
    base = {seed: Trained("done", {"test/calibration_error": value}) for seed, value in enumerate(BASE)}
    assert one(calibrated, base, measure=CALIBRATION).kind == "worse"


def test_holm_runs_over_arms_and_blocks_of_a_file():
    shifts = {"a": (-0.02, 0.0), "b": (0.001, -0.0028), "c": (0.0, 0.001)}
    blocks = [table(base=BASE, **{name: BASE + shift[block] + NOISE for name, shift in shifts.items()}) for block in (0, 1)]
    raw = [
        ttest_rel(*([one.figures["test/loss"] for one in block[name].values()] for name in (name, "base"))).pvalue
        for block in blocks
        for name in shifts
    ]
    found = decide(blocks, "base", Rules(), range(10))
    told = [verdict.p for by_arm in found for verdict in by_arm.values()]
    assert close(told, closed(raw)) and {verdict.n_verdicts for by_arm in found for verdict in by_arm.values()} == {6}
    alone = decide(blocks[1:], "base", Rules(), range(10))[0]["b"]
    assert alone.kind == "better" and found[1]["b"].kind == "not shown", "in a file of its own it is decided, among six it is not"


def test_alike_arms_over_blocks_are_told_apart_in_5_files_of_100():
    rng, files, alarms, naive = np.random.default_rng(0), 300, 0, 0
    for _ in range(files):
        losses = 0.1 + 0.01 * (rng.normal(size=(3, 1, 6)) + rng.normal(size=(3, 4, 6)))
        found = decide([table(**dict(zip(("base", "a", "b", "c"), block, strict=True))) for block in losses], "base", Rules(), range(6))
        alarms += any(verdict.is_decided for by_arm in found for verdict in by_arm.values())
        naive += (ttest_rel(losses[:, 1:], losses[:, :1], axis=2).pvalue <= 0.05).any()
    assert alarms / files < 0.08 and naive / files > 0.15


def test_a_test_that_was_not_made_is_not_corrected_for():
    tables = table(base=BASE, arm=BASE - 0.003 + NOISE, constant=BASE + 0.1) | {"never": {0: MISSING}, "short": {3: done(0.09)}}
    (found,) = decide([tables], "base", Rules(margin=0.05), range(10))
    assert close(found["arm"].p, ttest_rel(BASE - 0.003 + NOISE, BASE).pvalue)
    for name in ("constant", "never", "short"):
        verdict = found[name]
        assert verdict.kind == "not shown" and verdict.test is None and math.isnan(verdict.p) and math.isnan(verdict.p_equivalent)
    assert (found["never"].seeds, found["short"].seeds) == ((), (3,))


# Equivalence


@pytest.mark.parametrize(("shift", "kind", "small"), [(0.0, "equivalent", False), (-0.003, "better", True), (-0.02, "better", False)])
def test_within_the_margin_arms_are_equivalent_unless_they_are_told_apart(shift, kind, small):
    losses = BASE + shift + NOISE
    verdict = one(arm(losses), margin=0.05)
    assert (verdict.kind, verdict.within_margin) == (kind, small)
    assert close(verdict.p_equivalent, equivalence_p(losses, BASE, 0.05, relative=True))
    assert verdict.p_decisive == (verdict.p_equivalent if kind == "equivalent" else verdict.p)


def test_the_margin_of_accuracy_is_in_points_and_that_of_loss_a_share():
    losses = BASE + NOISE
    assert one(arm(losses), measure=ACCURACY, margin=0.05).kind == "equivalent"
    assert close(one(arm(losses), measure=ACCURACY, margin=0.002).p_equivalent, equivalence_p(1 - losses, 1 - BASE, 0.002, relative=False))
    assert one(arm(losses), measure=ACCURACY, margin=0.001).kind == "not shown"


def test_without_a_margin_nothing_is_called_equivalent():
    assert one(arm(BASE + NOISE / 1000)).kind == "not shown"


def test_equivalences_of_a_file_are_corrected_too():
    losses = [BASE + NOISE * k for k in (1.0, 2.0, 3.0)]
    (found,) = decide([table(base=BASE, **dict(zip("abc", losses, strict=True)))], "base", Rules(margin=0.03), range(10))
    assert close(
        [verdict.p_equivalent for verdict in found.values()], closed([equivalence_p(x, BASE, 0.03, relative=True) for x in losses])
    )


# Lost trainings

HARD = BASE - 0.02 + NOISE


@pytest.mark.parametrize("lost", [DIVERGED, CRASHED, done(2.3, collapsed=True), done(0.01, collapsed=True)])
def test_once_a_training_is_lost_ranks_over_all_seeds_decide_and_it_is_the_worst(lost):
    verdict = one(arm(HARD) | {4: lost}, margin=0.5)
    ranked = (HARD - BASE).tolist()
    ranked[4] = math.inf
    centred, p = signed_rank(ranked)
    assert (verdict.test, verdict.seeds, verdict.lost, verdict.baseline_lost) == ("signed rank", tuple(range(10)), 1, 0)
    assert close(verdict.p, p) and centred < 0 and verdict.lost_more
    assert math.isnan(verdict.p_equivalent) and verdict.kind == ("better" if p <= 0.05 else "not shown")


def test_half_lost_is_not_better_however_good_the_other_half():
    verdict = one(arm(HARD) | dict.fromkeys(range(5), DIVERGED))
    assert verdict.kind == "not shown" and (verdict.lost, verdict.p) == (
        5,
        pytest.approx(signed_rank([math.inf] * 5 + [-1, -2, -3, -4, -5])[1]),
    )
    assert one(arm(HARD) | dict.fromkeys(range(9), DIVERGED)).kind == "worse"
    turned = judge(arm(HARD), arm(BASE) | dict.fromkeys(range(9), DIVERGED), ("arm", "base"), Rules(measure=ACCURACY))
    assert turned.kind == "better" and not turned.lost_more


def test_a_seed_that_both_lost_is_a_tie():
    lost = dict.fromkeys((0, 1), DIVERGED)
    verdict = one(arm(HARD) | lost, arm(BASE) | lost)
    assert close(verdict.p, signed_rank((HARD - BASE)[2:].tolist())[1]) and (verdict.lost, verdict.baseline_lost) == (2, 2)
    every = dict.fromkeys(range(10), DIVERGED)
    nothing = one(every, every)
    assert nothing.kind == "not shown" and math.isnan(nothing.p) and nothing.test == "signed rank"


@pytest.mark.parametrize("nothing", [FAILED, MISSING, Trained("done", {"test/accuracy": 0.9})])
@pytest.mark.parametrize("where", ["arm", "base"])
def test_what_says_nothing_of_an_arm_is_left_out(where, nothing):
    arms = {"arm": arm(HARD), "base": arm(BASE)}
    arms[where][3] = nothing
    verdict = one(arms["arm"], arms["base"])
    left = [seed for seed in range(10) if seed != 3]
    assert verdict.seeds == tuple(left) and verdict.test == "t" and verdict.lost == 0
    assert close(verdict.p, ttest_rel(HARD[left], BASE[left]).pvalue)
    with_a_loss = one(arms["arm"] | {5: DIVERGED}, arms["base"])
    assert with_a_loss.seeds == tuple(left) and with_a_loss.lost == 1


def test_equivalence_is_never_claimed_where_something_was_lost():
    equal = BASE + NOISE / 10
    assert one(arm(equal), margin=0.05).kind == "equivalent"
    for lost in ({0: DIVERGED}, {0: done(0.1, collapsed=True)}):
        assert one(arm(equal) | lost, margin=0.05).kind == "not shown"
        assert one(arm(equal), arm(BASE) | lost, margin=0.05).kind == "not shown"


outcomes = st.sampled_from([DIVERGED, FAILED, MISSING]) | st.integers(50, 150).map(lambda i: done(i / 1000, collapsed=i == 150))
studies = st.lists(st.tuples(outcomes, outcomes), max_size=8)


@laws
@given(studies, st.sampled_from([LOSS, ACCURACY]), st.sampled_from([None, 0.05]))
def test_swapping_the_arms_turns_the_verdict(study, measure, margin):
    ours, theirs = (dict(enumerate(side)) for side in (zip(*study, strict=True) if study else ((), ())))
    there, back = (judge(*pair, ("arm", "base"), Rules(measure, margin)) for pair in ((ours, theirs), (theirs, ours)))
    turned = {"better": "worse", "worse": "better"}
    assert (there.lost, there.baseline_lost, there.seeds, there.test) == (back.baseline_lost, back.lost, back.seeds, back.test)
    assert close(there.p, back.p)
    if there.kind in turned or back.kind in turned:
        assert back.kind == turned[there.kind]
    if there.lost or there.baseline_lost or len(there.seeds) < 2:
        assert there.kind != "equivalent"
    assert len(there.seeds) > 1 or there.kind == "not shown"


# Looks

LOOKS = (4, 6, 10)


@laws
@given(st.lists(st.integers(2, 400), min_size=2, max_size=6, unique=True).map(sorted))
def test_the_looks_spend_5_percent_and_no_more(looks):
    levels = Rules(looks=tuple(looks)).levels
    assert len(levels) == len(looks) and min(levels) > 0 and sum(levels) == pytest.approx(0.05)
    assert levels[0] == pytest.approx(0.05 * (looks[0] / looks[-1]) ** 1.5)
    assert Rules().levels == (0.05,)


def test_a_look_sees_its_seeds_only_and_holds_its_own_family():
    values = {name: BASE + shift + 0.3 * NOISE for name, shift in {"a": -0.02, "b": -0.0012, "c": 0.0}.items()}
    rules = Rules(looks=LOOKS)
    (found,) = decide([table(base=BASE, **values)], "base", rules, range(10), look=1)
    assert close([verdict.p for verdict in found.values()], closed([ttest_rel(x[:4], BASE[:4]).pvalue for x in values.values()]))
    assert {verdict.seeds for verdict in found.values()} == {(0, 1, 2, 3)}
    assert {(verdict.look, verdict.n_looks, verdict.level) for verdict in found.values()} == {(1, 3, rules.levels[0])}
    assert [verdict.kind for verdict in found.values()] == ["better", "not shown", "not shown"]
    (later,) = decide([table(base=BASE, **values)], "base", rules, range(10))
    assert later["a"] == found["a"], "what is decided stands, with the seeds of its look"
    left = [ttest_rel(values[name], BASE).pvalue for name in "bc"]
    assert later["b"].look == 3 and len(later["b"].seeds) == 10 and close([later["b"].p, later["c"].p], closed(left))


def test_what_an_arm_does_after_it_was_decided_changes_nothing():
    rules, good = Rules(looks=LOOKS, margin=0.02), arm(BASE - 0.02 + 0.3 * NOISE)
    first = one(good, **vars(rules))
    turned = one(good | {seed: DIVERGED for seed in range(4, 10)}, **vars(rules))
    assert first.kind == "better" and first == turned and first.seeds == (0, 1, 2, 3)
    equal = one(arm(BASE + NOISE / 100), **vars(rules))
    assert equal.kind == "equivalent" and equal.look == 1 and equal.p_equivalent <= rules.levels[0]


def test_an_equivalent_arm_leaves_the_family_of_equivalences_and_not_that_of_differences():
    values = {"same": BASE + NOISE / 100, "b": BASE - 0.0012 + 0.6 * NOISE}
    (found,) = decide([table(base=BASE, **values)], "base", Rules(looks=(4, 10), margin=0.02), range(10))
    assert (found["same"].kind, found["same"].look, found["b"].look) == ("equivalent", 1, 2)
    assert close(found["b"].p, min(1.0, 2 * ttest_rel(values["b"], BASE).pvalue))
    assert close(found["b"].p_equivalent, equivalence_p(values["b"], BASE, 0.02, relative=True))


def test_a_false_verdict_comes_in_5_studies_of_100_though_the_data_are_looked_at_three_times():
    looks, n_studies = (5, 10, 20), 500
    same, base = np.random.default_rng(0).normal(0.1, 0.01, (2, n_studies, 20))
    false = sum(one(arm(a), arm(b), looks=looks).is_decided for a, b in zip(same, base, strict=True))
    naive = np.any([ttest_rel(same[:, :n], base[:, :n], axis=1).pvalue <= 0.05 for n in looks], axis=0)
    assert false / n_studies <= 0.06 and naive.mean() > 0.08


@pytest.mark.parametrize("n", [0, 1])
def test_one_seed_decides_nothing(n):
    verdict = one(arm(BASE[:n] - 0.05), arm(BASE), margin=0.9)
    assert verdict.kind == "not shown" and verdict.test is None and len(verdict.seeds) == n
    assert one({0: DIVERGED}, arm(BASE)).kind == "not shown"
