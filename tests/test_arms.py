"""Arms beside a baseline, described: each figure against scipy or a sum by hand, and what is left out of what."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap, ttest_rel

from stn_pipeline.comparing import arms
from stn_pipeline.comparing.arms import Trained, bootstrap_mean, bootstrap_ratio, collapses, contrasts, mcnemar, pairing
from stn_pipeline.comparing.measures import LOSS

laws = settings(max_examples=100, deadline=None)


def close(one, other) -> bool:
    return one == pytest.approx(other, rel=1e-9, abs=1e-12, nan_ok=True)


def done(loss: float, accuracy: float = 0.9, collapsed: bool = False) -> Trained:
    return Trained("done", {"test/loss": loss, "test/accuracy": accuracy}, collapsed)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(arms, "RESAMPLES", 99)


# Bootstrap

SKEWED = np.random.default_rng(3).lognormal(0, 1, 12)


def resampled(values, method: str):
    return bootstrap((values,), np.mean, n_resamples=9999, method=method, rng=np.random.default_rng(5))


def test_the_bootstrap_of_a_mean_is_scipys_bca():
    expected, plain = resampled(SKEWED, "BCa"), resampled(SKEWED, "percentile").confidence_interval
    found, error = bootstrap_mean(SKEWED), 0.12 * expected.standard_error  # 3 times the Monte-Carlo error of two such ends
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=error)
    assert found.high - plain.high > 2 * error  # and not the percentiles
    assert bootstrap_mean(SKEWED) == found == bootstrap_mean(SKEWED.tolist())


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.1, 0.1], [0.0, 0.0]])
@pytest.mark.filterwarnings("error")
def test_no_bootstrap_without_spread(values):
    assert all(map(math.isnan, bootstrap_mean(values)))


@pytest.mark.filterwarnings("error")
def test_two_differences_bootstrap_to_an_interval_between_them():
    low, high = bootstrap_mean([1.0, 2.0])
    assert 1 <= low < high <= 2


def test_the_bootstrap_of_a_ratio_is_that_of_a_plain_loop():
    rng = np.random.default_rng(4)
    baseline = rng.lognormal(0, 0.5, 8)
    arm = 0.8 * baseline + rng.normal(0, 0.05, 8)
    draw, ratios = random.Random(1), []
    for _ in range(5000):
        picked = [draw.randrange(8) for _ in range(8)]
        ratios.append(sum(arm[i] for i in picked) / sum(baseline[i] for i in picked) - 1)
    ratios.sort()
    expected = (ratios[125], ratios[4875])
    found = bootstrap_ratio(arm.tolist(), baseline.tolist())
    assert found == pytest.approx(expected, abs=0.15 * statistics.stdev(ratios))
    assert found.low < arm.mean() / baseline.mean() - 1 < found.high < 0
    assert bootstrap_ratio(arm.tolist(), baseline.tolist()) == found


@pytest.mark.parametrize(("arm", "baseline"), [([1.0], [2.0]), ([1.0, 2.0], [1.0, 0.0]), ([1.0, 2.0, 3.0], [5.0, 6.0, -1.0])])
@pytest.mark.filterwarnings("error")
def test_no_bootstrap_of_a_ratio_to_what_may_be_0(arm, baseline):
    assert all(map(math.isnan, bootstrap_ratio(arm, baseline)))


# Collapses


def fisher(k: int, n: int, other_k: int, other_n: int) -> float:
    """Tables with these margins, of those that are no likelier than this one."""
    ways = [math.comb(n, i) * math.comb(other_n, k + other_k - i) for i in range(k + other_k + 1)]
    return sum(way for way in ways if way <= ways[k]) / sum(ways)


counts = st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@laws
@given(counts, counts)
def test_fishers_p_is_the_sum_of_tables_as_rare(one, other):
    trained = {
        name: {seed: done(1.0, collapsed=seed < k) for seed in range(n)} for name, (k, n) in {"default": other, "tuned": one}.items()
    }
    baseline, tuned = collapses(trained, "default")
    assert (tuned.arm, tuned.n_collapsed, tuned.n) == ("tuned", *one) and (baseline.arm, baseline.n_collapsed, baseline.n) == (
        "default",
        *other,
    )
    assert close(tuned.p, fisher(*one, *other)) and math.isnan(baseline.p)


def test_fishers_lady_tasting_tea():
    trained = {"guessed": {i: done(1.0, collapsed=i < 1) for i in range(4)}, "tea": {i: done(1.0, collapsed=i < 3) for i in range(4)}}
    assert round(collapses(trained, "guessed")[1].p, 4) == 0.4857  # R: fisher.test(matrix(c(3, 1, 1, 3), 2))


@laws
@given(counts, counts)
def test_the_interval_of_a_rate_is_clopper_and_pearsons(one, other):
    trained = {name: {seed: done(1.0, collapsed=seed < k) for seed in range(n)} for name, (k, n) in {"a": one, "b": other}.items()}
    for found, (k, n) in zip(collapses(trained, "b"), (one, other), strict=True):
        assert found.low == 0 if k == 0 else close(binom.sf(k - 1, n, found.low), 0.025)
        assert found.high == 1 if k == n else close(binom.cdf(k, n, found.high), 0.025)


def test_none_lost_of_ten_may_still_be_three_in_ten():
    (none,) = collapses({"default": {seed: done(1.0) for seed in range(10)}}, "default")
    assert (none.n_collapsed, none.n, none.low) == (0, 10, 0) and none.high == pytest.approx(0.3085, abs=1e-4)
    (never,) = collapses({"default": {0: Trained("missing")}}, "default")
    assert (never.n, never.low, never.high) == (0, 0, 1)


def test_a_diverged_training_collapsed_and_one_that_failed_or_is_missing_does_not_count():
    diverged, failed, missing = Trained("diverged", collapsed=True), Trained("failed"), Trained("missing")
    trained = {
        "tuned": {0: diverged, 1: diverged, 2: diverged, 3: done(2.3, collapsed=True), 4: failed, 5: missing},
        "default": {0: done(0.1), 1: done(0.1), 2: done(0.1), 3: done(0.1), 4: done(0.1), 5: failed},
        "never": {0: missing, 1: failed},
    }
    tuned, default, never = collapses(trained, "default")
    assert (tuned.n, tuned.n_collapsed, default.n, default.n_collapsed, never.n, never.n_collapsed) == (4, 4, 5, 0, 0, 0)
    assert close(tuned.p, 1 / math.comb(9, 4)) and math.isnan(default.p) and never.p == 1


# McNemar


@laws
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemars_p_is_the_sum_of_splits_as_rare(right):
    arm, baseline = (np.array(values) for values in zip(*right, strict=True))
    only_arm, only_baseline = sum(a and not b for a, b in right), sum(b and not a for a, b in right)
    n = only_arm + only_baseline
    ways = [math.comb(n, i) for i in range(n + 1)]
    p = sum(way for way in ways if way <= ways[only_arm]) / 2**n
    found = mcnemar(arm, baseline)
    assert found[:2] == (only_arm, only_baseline) and close(found[2], p)


@laws
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_copies_of_an_image_are_one_image(pictures):
    image, arm, baseline = (np.array(values) for values in zip(*pictures, strict=True))
    net = {i: sum(int(a) - int(b) for j, a, b in pictures if j == i) for i in image.tolist()}
    only_arm, only_baseline = sum(value > 0 for value in net.values()), sum(value < 0 for value in net.values())
    n = only_arm + only_baseline
    found = mcnemar(arm, baseline, image)
    assert found[:2] == (only_arm, only_baseline)
    assert close(found[2], min(1.0, 2 * binom.cdf(min(found[:2]), n, 0.5)) if n else 1.0)


def test_an_image_each_is_mcnemars_own_test():
    rng = np.random.default_rng(0)
    arm, baseline = rng.random(50) < 0.7, rng.random(50) < 0.8
    assert mcnemar(arm, baseline, np.arange(50)) == mcnemar(arm, baseline)


def test_copies_do_not_make_alike_networks_differ():
    rng, false, naive = np.random.default_rng(0), 0, 0
    image = np.tile(np.arange(120), 10)
    for _ in range(600):  # both have an image right with the same chance, but in all of its copies or in none
        right = [np.tile(rng.random(120) < 0.8, 10) ^ (rng.random(1200) < 0.02) for _ in range(2)]
        false += mcnemar(*right, image)[2] <= 0.05
        naive += mcnemar(*right)[2] <= 0.05
    assert false / 600 <= 0.05 and naive / 600 > 0.3


def test_networks_that_agree_on_every_image_are_not_told_apart():
    right = np.array([True, False, True])
    assert mcnemar(right, right) == (0, 0, 1.0)
    assert mcnemar(np.ones(10, bool), np.zeros(10, bool)) == (10, 0, pytest.approx(2 / 2**10))


# Contrasts

DEFAULT = {1: 0.100, 2: 0.104, 3: 0.098, 4: 0.111, 5: 0.105}
TUNED = {2: 0.093, 3: 0.094, 4: 0.097, 5: 0.096, 6: 0.5}


def of(losses: dict[int, float]) -> dict[int, Trained]:
    return {seed: done(loss, accuracy=1 - loss / 2) for seed, loss in losses.items()}


def test_arms_are_paired_on_the_seeds_that_both_have(quick):
    (found,) = contrasts({"default": of(DEFAULT), "tuned": of(dict(reversed(TUNED.items())))}, "default", LOSS)
    arm, baseline = [0.093, 0.094, 0.097, 0.096], [0.104, 0.098, 0.111, 0.105]
    test = ttest_rel(arm, baseline)
    assert (found.arm, found.baseline, found.measure, found.seeds) == ("tuned", "default", LOSS, (2, 3, 4, 5))
    assert close((found.t.n, found.t.arm_mean, found.t.baseline_mean, found.t.difference), (4, 0.095, 0.1045, -0.0095))
    assert close((found.t.low, found.t.high), tuple(test.confidence_interval()))
    assert close(found.t.p, test.pvalue) and (found.without, found.n_without) == (None, 0) and found.sound is found.t


def test_bootstraps_are_those_of_the_pairs():
    (found,) = contrasts({"default": of(DEFAULT), "tuned": of(TUNED)}, "default", LOSS)
    arm, baseline = [0.093, 0.094, 0.097, 0.096], [0.104, 0.098, 0.111, 0.105]
    assert found.bootstrap == bootstrap_mean(np.subtract(arm, baseline)) and -0.014 < found.bootstrap.low < found.bootstrap.high < -0.004
    assert found.bootstrap_relative == bootstrap_ratio(arm, baseline)
    assert found.bootstrap_relative.low < 0.095 / 0.1045 - 1 < found.bootstrap_relative.high


@pytest.mark.parametrize("state", ["diverged", "crashed", "failed", "missing"])
@pytest.mark.parametrize("where", ["default", "tuned"])
def test_what_is_not_done_is_left_out(quick, where, state):
    trained = {"default": of(DEFAULT), "tuned": of(TUNED)}
    trained[where][4] = Trained(state, collapsed=state == "diverged")
    (found,) = contrasts(trained, "default", LOSS)
    assert found.seeds == (2, 3, 5) and found.t.n == 3
    assert close(found.t.difference, (-0.011 - 0.004 - 0.009) / 3) and (found.without, found.n_without) == (None, 0)


def test_an_arm_without_a_shared_seed_or_without_the_measure_is_left_out(quick):
    trained = {"apart": of({8: 0.1, 9: 0.2}), "default": of(DEFAULT), "tuned": of(TUNED), "failed": {2: Trained("failed")}}
    trained["old"] = {seed: Trained("done", {"test/accuracy": 0.9}) for seed in DEFAULT}
    (found,) = contrasts(trained, "default", LOSS)
    assert found.arm == "tuned"
    assert contrasts({"default": of(DEFAULT)}, "default", LOSS) == []


def test_one_shared_seed_gives_a_difference_and_no_more(quick):
    (found,) = contrasts({"default": of(DEFAULT), "tuned": of({3: 0.09})}, "default", LOSS)
    assert found.t.n == 1 and close(found.t.difference, -0.008)
    assert all(map(math.isnan, (found.t.p, *found.bootstrap, *found.bootstrap_relative, found.correlation, found.variance_ratio)))


@pytest.mark.parametrize("where", [("tuned",), ("default",), ("tuned", "default")])
def test_without_the_seeds_that_collapsed_in_either_arm(quick, where):
    trained = {"default": of(DEFAULT), "tuned": of(TUNED)}
    for arm, seed in zip(where, (3, 4), strict=False):
        trained[arm][seed] = done(2.3, collapsed=True)
    trained["tuned"][6] = done(2.3, collapsed=True)  # not a pair: not counted
    (found,) = contrasts(trained, "default", LOSS)
    left = [seed for seed in (2, 3, 4, 5) if seed not in (3, 4)[: len(where)]]
    assert found.seeds == (2, 3, 4, 5) and found.n_without == len(where) and found.sound is found.without and found.without.n == len(left)
    test = ttest_rel([TUNED[seed] for seed in left], [DEFAULT[seed] for seed in left])
    assert close((found.without.low, found.without.high, found.without.p), (*test.confidence_interval(), test.pvalue))
    assert abs(found.t.difference) > 0.2 > 0.02 > abs(found.without.difference) or len(where) == 2  # there, the two cancel


def test_where_all_seeds_collapsed_none_are_left(quick):
    trained = {"default": of(DEFAULT), "tuned": {seed: done(2.3 + seed / 100, collapsed=True) for seed in (1, 2)}}
    (found,) = contrasts(trained, "default", LOSS)
    assert (found.without, found.n_without) == (None, 2)


# Pairing


def test_pairing_is_numpys_correlation_and_the_variances_ratio(quick):
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.01, 12)
    base, arm = 0.1 + shared + rng.normal(0, 0.004, 12), 0.09 + shared + rng.normal(0, 0.004, 12)
    collapsed = {3: done(2.3, collapsed=True)}
    trained = {"default": of(dict(enumerate(base.tolist()))), "tuned": of(dict(enumerate(arm.tolist()))) | collapsed}
    (found,) = contrasts(trained, "default", LOSS)
    a, b = np.delete(arm, 3), np.delete(base, 3)
    assert close(found.correlation, np.corrcoef(a, b)[0, 1]) and found.correlation > 0.5
    assert close(found.variance_ratio, np.var(a - b, ddof=1) / (np.var(a, ddof=1) + np.var(b, ddof=1))) and found.variance_ratio < 0.5


@pytest.mark.parametrize(("arm", "baseline"), [([], []), ([1.0, 2.0], [1.0, 3.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])])
@pytest.mark.filterwarnings("error")
def test_no_pairing_of_too_few_or_of_what_does_not_vary(arm, baseline):
    assert all(map(math.isnan, pairing(arm, baseline)))
