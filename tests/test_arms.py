"""Arms against a baseline: each figure against scipy or a sum by hand, error rates by simulation, and what is left out of what."""

import json
import math
import random
import statistics
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, chi, norm, ttest_rel
from scipy.stats import t as student

from stn_pipeline.comparing import arms
from stn_pipeline.comparing.arms import (
    MEASURES,
    Trained,
    bootstrap_mean,
    bootstrap_ratio,
    collapses,
    contrasts,
    holm,
    mcnemar,
    seeds_needed,
)
from stn_pipeline.comparing.paired import paired

LOSS, ACCURACY = MEASURES
laws = settings(max_examples=100, deadline=None)
shares = st.floats(0, 1)


def close(one, other) -> bool:
    return one == pytest.approx(other, rel=1e-9, abs=1e-12, nan_ok=True)


def done(loss: float, accuracy: float = 0.9, collapsed: bool = False) -> Trained:
    return Trained("done", {"test/loss": loss, "test/accuracy": accuracy}, collapsed)


def table(**losses: list[float]) -> dict[str, dict[int, Trained]]:
    return {arm: {seed: done(loss) for seed, loss in enumerate(values)} for arm, values in losses.items()}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(arms, "RESAMPLES", 99)


# Fieller's interval of the share

parts = st.lists(st.tuples(st.integers(15_000, 25_000), st.integers(-3000, 3000)), min_size=3, max_size=8)


@laws
@given(parts, st.integers(-10_000, 10_000))
def test_a_t_test_just_does_not_reject_the_ends_of_the_share(pairs, effect):
    baseline = np.array([b for b, _ in pairs]) / 1000
    arm = baseline + np.array([effect + e for _, e in pairs]) / 1000
    assume(np.ptp(arm - baseline) > 1e-9)
    result = paired(arm, baseline)
    for end in (result.relative_low, result.relative_high):
        assert ttest_rel(arm - baseline, end * np.abs(baseline)).pvalue == pytest.approx(0.05, abs=1e-6)
    assert result.relative_low < result.relative < result.relative_high


def test_the_share_covers_95_studies_in_100():
    rng, truth, caught, below = np.random.default_rng(0), -0.15, 0, 0
    for study in range(2000):
        n = 5 + study % 6
        shared = rng.normal(0, 0.15, n)
        baseline, arm = 1 + shared + rng.normal(0, 0.1, n), (1 + truth) * (1 + shared) + rng.normal(0, 0.15, n)
        result = paired(arm, baseline)
        caught += result.relative_low < truth < result.relative_high
        below += result.relative_high <= truth
    assert 0.935 < caught / 2000 < 0.965
    assert 0.015 < below / 2000 < 0.035  # each side misses as often


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


def no_difference(studies: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of 3 arms and a baseline that are all alike, (studies, 4, 10), and the p of each arm, (studies, 3)."""
    rng = np.random.default_rng(0)
    losses = 0.1 + 0.01 * (rng.normal(size=(studies, 1, 10)) + rng.normal(size=(studies, 4, 10)))
    return losses, ttest_rel(losses[:, :3], losses[:, 3:], axis=2).pvalue


def test_one_study_in_20_of_arms_that_are_all_alike_finds_a_difference():
    _, p = no_difference(2000)
    alarms = np.array([min(holm(study)) <= 0.05 for study in p.tolist()])
    assert 0.01 < alarms.mean() < 0.06
    assert (p.min(axis=1) <= 0.05).mean() > 0.08  # uncorrected, it is more than one in 10


def test_contrasts_hold_the_same_p_as_that_simulation(quick):
    for losses, p in zip(*no_difference(100), strict=True):
        found = contrasts(table(**dict(zip("abcd", losses.tolist(), strict=True))), "d", LOSS)
        assert close([contrast.p for contrast in found], holm(p.tolist()))
        assert [contrast.is_distinguishable for contrast in found] == [value <= 0.05 for value in holm(p.tolist())]


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


# Seeds needed


@pytest.mark.parametrize(("d", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])  # G*Power: two-sided paired t test, 0.05, power 0.8
def test_seeds_needed_as_in_the_tables(d, n):
    assert seeds_needed(d, 1) == seeds_needed(-d, 1) == seeds_needed(0.003 * d, 0.003) == n


def power(d: float, n: int) -> float:
    """How often |t| > edge: t is a normal around d √n, over a chi by the root of its n - 1 degrees."""
    if n == 1:
        return 0
    edge, c = student.ppf(0.975, n - 1), np.linspace(0, math.sqrt(n) + 9, 20_001)
    root, at = c / math.sqrt(n - 1), d * math.sqrt(n)
    return np.trapezoid(chi.pdf(c, n - 1) * (norm.sf(edge * root - at) + norm.cdf(-edge * root - at)), c)


@laws
@given(st.floats(0.3, 16))
def test_seeds_needed_have_the_power_and_one_fewer_have_not(d):
    n = seeds_needed(d, 1)
    assert power(d, n) > 0.8 - 1e-6 and power(d, n - 1) < 0.8 + 1e-6


@pytest.mark.parametrize(("d", "n"), [(5.25, 3), (6, 3), (11, 3), (12, 2), (28, 2)])  # where scipy's nct.cdf is NaN
def test_large_effects_need_few_seeds_but_not_too_few(d, n):
    assert seeds_needed(d, 1) == n


def test_as_many_seeds_as_needed_see_the_difference_8_times_in_10_and_one_fewer_does_not():
    n = seeds_needed(1.0, 1.25)
    differences = np.random.default_rng(0).normal(1.0, 1.25, (50_000, n))
    seen = [np.mean(ttest_rel(some, np.zeros_like(some), axis=1).pvalue < 0.05) for some in (differences, differences[:, 1:])]
    assert seen[0] > 0.8 > seen[1]


@pytest.mark.parametrize(("difference", "sd"), [(0.0, 1.0), (-0.0, 1.0), (0.1, math.nan), (0.1, 0.0), (1e-6, 1.0), (1.0, math.inf)])
def test_no_number_of_seeds_for_nothing_or_too_little(difference, sd):
    assert seeds_needed(difference, sd) is None


def test_more_seeds_than_anybody_trains_are_no_answer():
    effect = 1.959964 + 0.841621  # in standard errors, at a power of 0.8 with many seeds
    assert seeds_needed(effect / math.sqrt(99_000), 1) == pytest.approx(99_000, abs=10)
    assert seeds_needed(effect / math.sqrt(101_000), 1) is None


@laws
@given(st.floats(0.5, 10), st.floats(0.1, 10), st.floats(1, 2))
def test_more_noise_needs_more_seeds_and_the_sign_does_not_matter(difference, sd, more):
    needed = seeds_needed(difference, sd)
    assert 2 <= needed <= seeds_needed(difference, sd * more)
    assert seeds_needed(-difference, sd) == needed


def test_a_vast_difference_needs_two_seeds():
    assert seeds_needed(1e6, 1e-6) == 2


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
    assert (found.arm, found.baseline, found.measure, found.seeds, found.n_arms) == ("tuned", "default", LOSS, (2, 3, 4, 5), 1)
    assert close((found.t.n, found.t.arm_mean, found.t.baseline_mean, found.t.difference), (4, 0.095, 0.1045, -0.0095))
    assert close((found.t.low, found.t.high), tuple(test.confidence_interval()))
    assert close((found.t.p, found.p), (test.pvalue, test.pvalue))
    assert found.is_distinguishable == (test.pvalue <= 0.05) and (found.without, found.n_without) == (None, 0)


def test_bootstraps_are_those_of_the_pairs():
    (found,) = contrasts({"default": of(DEFAULT), "tuned": of(TUNED)}, "default", LOSS)
    arm, baseline = [0.093, 0.094, 0.097, 0.096], [0.104, 0.098, 0.111, 0.105]
    assert found.bootstrap == bootstrap_mean(np.subtract(arm, baseline)) and -0.014 < found.bootstrap.low < found.bootstrap.high < -0.004
    assert found.bootstrap_relative == bootstrap_ratio(arm, baseline)
    assert found.bootstrap_relative.low < 0.095 / 0.1045 - 1 < found.bootstrap_relative.high


@pytest.mark.parametrize("state", ["diverged", "failed", "missing"])
@pytest.mark.parametrize("where", ["default", "tuned"])
def test_what_is_not_done_is_left_out(quick, where, state):
    trained = {"default": of(DEFAULT), "tuned": of(TUNED)}
    trained[where][4] = Trained(state, collapsed=state == "diverged")
    (found,) = contrasts(trained, "default", LOSS)
    assert found.seeds == (2, 3, 5) and found.t.n == 3
    assert close(found.t.difference, (-0.011 - 0.004 - 0.009) / 3) and (found.without, found.n_without) == (None, 0)


def test_an_arm_without_a_shared_seed_is_left_out_and_not_corrected_for(quick):
    trained = {"apart": of({8: 0.1, 9: 0.2}), "default": of(DEFAULT), "tuned": of(TUNED), "failed": {2: Trained("failed")}}
    (found,) = contrasts(trained, "default", LOSS)
    assert (found.arm, found.n_arms) == ("tuned", 1) and found.p == found.t.p
    assert contrasts({"default": of(DEFAULT)}, "default", LOSS) == []


def test_one_shared_seed_gives_a_difference_and_no_more(quick):
    (found,) = contrasts({"default": of(DEFAULT), "tuned": of({3: 0.09})}, "default", LOSS, {"tuned": -0.15})
    assert found.t.n == 1 and close((found.t.difference, found.sought), (-0.008, -0.15 * 0.098))
    assert math.isnan(found.p) and found.n_needed is None and not found.is_distinguishable
    assert all(map(math.isnan, (*found.bootstrap, *found.bootstrap_relative)))


def test_equal_differences_give_nothing_to_plan_seeds_by(quick):
    baseline = [0.3, 0.2, 0.1]
    (found,) = contrasts(table(default=baseline, tuned=[loss + 0.1 for loss in baseline]), "default", LOSS)
    assert found.t.low == found.t.high and found.n_needed is None and not found.is_distinguishable


def test_a_test_that_was_not_made_is_not_corrected_for(quick):
    several = contrasts({"default": of(DEFAULT), "one": of({3: 0.09}), "tuned": of(TUNED)}, "default", LOSS)
    assert [contrast.arm for contrast in several] == ["one", "tuned"]
    assert math.isnan(several[0].p) and several[1].p == several[1].t.p
    assert [contrast.n_arms for contrast in several] == [1, 1]


def test_p_is_holms_of_the_t_tests_and_told_so(quick):
    rng = np.random.default_rng(18)
    baseline = rng.normal(0.1, 0.01, 6)
    losses = {name: baseline + rng.normal(shift, 0.005, 6) for name, shift in {"a": -0.02, "b": -0.006, "c": 0.0}.items()}
    raw = [float(ttest_rel(values, baseline).pvalue) for values in losses.values()]
    found = contrasts(table(default=baseline.tolist(), **{name: values.tolist() for name, values in losses.items()}), "default", LOSS)
    assert [contrast.arm for contrast in found] == ["a", "b", "c"] and {contrast.n_arms for contrast in found} == {3}
    assert close([contrast.t.p for contrast in found], raw) and close([contrast.p for contrast in found], closed(raw))
    assert raw[1] <= 0.05 < found[1].p and raw[0] <= found[0].p <= 0.05  # else this shows nothing
    assert [contrast.is_distinguishable for contrast in found] == [True, False, False]
    assert found[0].sentence.startswith("a lowers test loss by ") and found[0].sentence.endswith(", 6 seeds): better than default")
    doubt = f"not distinguishable from no effect, one of 3 arms being tested (p = {found[1].p:.2g} by Holm)"
    assert found[1].sentence.endswith(doubt) and found[2].sentence.endswith(": not distinguishable from no effect")


@pytest.mark.parametrize("where", [("tuned",), ("default",), ("tuned", "default")])
def test_without_the_seeds_that_collapsed_in_either_arm(quick, where):
    trained = {"default": of(DEFAULT), "tuned": of(TUNED)}
    for arm, seed in zip(where, (3, 4), strict=False):
        trained[arm][seed] = done(2.3, collapsed=True)
    trained["tuned"][6] = done(2.3, collapsed=True)  # not a pair: not counted
    (found,) = contrasts(trained, "default", LOSS)
    left = [seed for seed in (2, 3, 4, 5) if seed not in (3, 4)[: len(where)]]
    assert found.seeds == (2, 3, 4, 5) and found.n_without == len(where) and found.without.n == len(left)
    test = ttest_rel([TUNED[seed] for seed in left], [DEFAULT[seed] for seed in left])
    assert close((found.without.low, found.without.high, found.without.p), (*test.confidence_interval(), test.pvalue))
    assert abs(found.t.difference) > 0.2 > 0.02 > abs(found.without.difference) or len(where) == 2  # there, the two cancel


def test_where_all_seeds_collapsed_none_are_left(quick):
    trained = {"default": of(DEFAULT), "tuned": {seed: done(2.3 + seed / 100, collapsed=True) for seed in (1, 2)}}
    (found,) = contrasts(trained, "default", LOSS)
    assert (found.without, found.n_without) == (None, 2)


def test_a_claim_is_of_the_baselines_loss_and_sets_the_seeds_needed(quick):
    trained = {"default": of(DEFAULT), "tuned": of(TUNED), "other": of(TUNED)}
    claimed, seen = contrasts(trained, "default", LOSS, {"tuned": -0.02, "nobody": -0.5})
    sd = statistics.stdev([-0.011, -0.004, -0.014, -0.009])
    assert claimed.claimed and close(claimed.sought, -0.02 * 0.1045) and claimed.n_needed == seeds_needed(0.02 * 0.1045 / sd, 1)
    assert not seen.claimed and close(seen.sought, -0.0095) and seen.n_needed == seeds_needed(0.0095 / sd, 1)
    assert claimed.n_needed > seen.n_needed


def test_a_claim_about_the_loss_says_nothing_about_accuracy(quick):
    trained = {"default": of(DEFAULT), "tuned": of(TUNED)}
    (found,) = contrasts(trained, "default", ACCURACY, {"tuned": -0.02})
    assert not found.claimed and close(found.sought, 0.0095 / 2)
    assert found.sentence.startswith("tuned raises test accuracy by 0.4") and " points (95 % CI " in found.sentence


@pytest.mark.parametrize("n", [1, 4])
def test_plain_figures_are_json_and_the_contrasts_own(quick, n):
    trained = {"default": of(DEFAULT), "tuned": of(dict(list(TUNED.items())[:n])), "constant": of({s: v + 1 for s, v in DEFAULT.items()})}
    trained["tuned"][2] = done(2.3, collapsed=True)
    found = contrasts(trained, "default", LOSS, {"tuned": -0.15})[0]
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert (plain["arm"], plain["baseline"], plain["measure"], plain["unit"]) == ("tuned", "default", "test/loss", "nats")
    assert (plain["seeds"], plain["n_arms"], plain["claimed"], plain["n_without"]) == ([2, 3, 4, 5][:n], 1 if n == 1 else 2, True, 1)
    assert (plain["sentence"], plain["n_needed"], plain["sought"]) == (found.sentence, found.n_needed, found.sought)

    def same(told: float | None, number: float) -> bool:
        return told is None if math.isnan(number) else told == number

    assert same(plain["p"], found.p) and (plain["p"] is None) == (n == 1)
    assert all(
        same(plain["t"][name], getattr(found.t, name)) for name in ("n", "difference", "low", "high", "p", "relative", "relative_low")
    )
    assert all(same(*ends) for ends in zip(plain["bootstrap"], found.bootstrap, strict=True))
    assert all(same(*ends) for ends in zip(plain["bootstrap_relative"], found.bootstrap_relative, strict=True))
    assert plain["without"] is None if n == 1 else plain["without"]["difference"] == found.without.difference
