"""Two arms over paired seeds: Student's own figures, three other routes to the same numbers, laws, coverage."""

import math
import statistics
import subprocess
import sys
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import betainc
from scipy.stats import t as student
from scipy.stats import ttest_rel

from stn_pipeline.comparing.paired import Paired, PairingError, interval, paired
from stn_pipeline.errors import StnError
from tests.conftest import ROOT

TUNED = [0.081, 0.079, 0.086, 0.077, 0.082]
DEFAULT = [0.092, 0.091, 0.089, 0.093, 0.090]
SLEEP = (  # hours of extra sleep under two drugs: Student 1908, which R ships as `sleep`
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def close(one: float | tuple[float, ...], other: float | tuple[float, ...]) -> bool:
    return one == pytest.approx(other, rel=1e-9, abs=1e-9, nan_ok=True)


def noisy(n: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that share most of their noise: paired and unpaired statistics lie far apart."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(2, 1, n)
    return shared + rng.normal(-0.1, 0.2, n), shared + rng.normal(0, 0.2, n)


# Oracles


def test_students_sleep_data_as_r_prints_them():
    result = paired(*SLEEP)  # R: with(sleep, t.test(extra[group == 1], extra[group == 2], paired = TRUE))
    assert (result.n, round(result.arm_mean, 2), round(result.baseline_mean, 2)) == (10, 0.75, 2.33)
    assert (round(result.arm_sd, 6), round(result.baseline_sd, 6)) == (1.789010, 2.002249)
    assert (round(result.difference, 2), round(result.low, 7), round(result.high, 7)) == (-1.58, -2.4598858, -0.7001142)
    assert round(result.p, 6) == 0.002833


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (12, 2.201)])  # t table, 0.975, n - 1
def test_the_interval_is_the_tables(n, t):
    arm, baseline = noisy(n)
    differences = [float(a - b) for a, b in zip(arm, baseline, strict=True)]
    half = t * statistics.stdev(differences) / math.sqrt(n)
    result = paired(arm.tolist(), baseline.tolist())
    assert result.difference == pytest.approx(statistics.fmean(differences))
    assert result.high - result.difference == pytest.approx(half, rel=2e-4)
    assert result.difference - result.low == pytest.approx(half, rel=2e-4)


def test_means_and_deviations_are_the_arms_own():
    result = paired(TUNED, DEFAULT)
    assert close((result.arm_mean, result.arm_sd), (statistics.fmean(TUNED), statistics.stdev(TUNED)))
    assert close((result.baseline_mean, result.baseline_sd), (statistics.fmean(DEFAULT), statistics.stdev(DEFAULT)))


@pytest.mark.parametrize("n", [2, 3, 12])
def test_a_regression_on_the_arm_and_the_seeds_gives_the_same(n):
    arm, baseline = noisy(n, seed=1)
    is_arm = np.repeat([1.0, 0.0], n)[:, None]
    design = np.hstack([is_arm, np.tile(np.eye(n), (2, 1))])  # (2n, 1 + n): the arm, then one intercept a seed
    y = np.concatenate([arm, baseline])
    effect = np.linalg.lstsq(design, y)[0]
    residual = y - design @ effect
    error = math.sqrt(residual @ residual / (n - 1) * np.linalg.inv(design.T @ design)[0, 0])
    low, high = student.interval(0.95, n - 1, effect[0], error)
    statistic = effect[0] / error
    p = betainc((n - 1) / 2, 1 / 2, (n - 1) / (n - 1 + statistic**2))  # Abramowitz & Stegun 26.7.1
    result = paired(arm.tolist(), baseline.tolist())
    assert close((result.difference, result.low, result.high, result.p), (effect[0], low, high, p))


def test_the_share_is_of_the_baselines_mean():
    result = paired([0.9, 0.7], [1.0, 1.0])
    assert close((result.relative, result.relative_low), (-0.2, -0.2 - 12.706204736 * 0.1))
    below = paired([-0.9, -0.7], [-1.0, -1.0])  # a rise from a mean below 0 is still a rise
    assert close((below.relative, below.relative_high), (0.2, 0.2 + 12.706204736 * 0.1))
    assert close((below.relative_low, result.relative_high), (0.2 - 12.706204736 * 0.1, -0.2 + 12.706204736 * 0.1))


def test_no_share_of_nothing():
    result = paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert all(map(math.isnan, (result.relative, result.relative_low, result.relative_high)))
    assert result.low < result.difference < result.high


def test_the_interval_covers_95_studies_in_100():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 3, (2000, 5))
    arm, baseline = shared + rng.normal(0.5, 1, (2000, 5)), shared + rng.normal(0, 1, (2000, 5))
    results = [paired(a, b) for a, b in zip(arm, baseline, strict=True)]
    assert 0.935 < np.mean([result.low < 0.5 < result.high for result in results]) < 0.965
    assert 0.015 < np.mean([result.low > 0.5 for result in results]) < 0.035  # each side misses as often


# Edges


def test_one_pair_has_a_difference_and_no_interval():
    result = paired([0.081], [0.092])
    assert close((result.n, result.difference, result.relative), (1, -0.011, -0.011 / 0.092))
    unknown = (result.arm_sd, result.baseline_sd, result.low, result.high, result.p, result.relative_low, result.relative_high)
    assert all(map(math.isnan, unknown))


def test_two_pairs_have_a_wide_interval():
    result = paired([1.0, 3.0], [0.0, 0.0])
    assert close((result.low, result.high), (2 - 12.706204736, 2 + 12.706204736))


@pytest.mark.parametrize("n", [2, 5])
def test_identical_arms_differ_by_nothing(n):
    result = paired(DEFAULT[:n], DEFAULT[:n])
    assert (result.difference, result.low, result.high, result.relative) == (0, 0, 0, 0) and math.isnan(result.p)


@pytest.mark.parametrize("shift", [0.1, -0.1, 0.01])
@pytest.mark.filterwarnings("error")  # scipy warns of precision lost where differences are equal but for rounding
def test_a_constant_difference_is_its_own_interval_whatever_the_rounding(shift):
    baseline = [0.3, 0.55, 0.8, 1.1, 2.7]
    arm = [value + shift for value in baseline]
    assert len({a - b for a, b in zip(arm, baseline, strict=True)}) > 1
    result = paired(arm, baseline)
    assert result.difference == pytest.approx(shift) and result.low == result.high == result.difference and math.isnan(result.p)


def test_rounding_is_no_difference():
    result = paired([0.1 + 0.2, 0.1 + 0.7], [0.3, 0.8])
    assert (result.difference, result.low, result.high) == (0, 0, 0) and math.isnan(result.p)
    cancelling = paired([0.1 + 0.2, 0.2, 0.3], [0.2, 0.3, 0.3])
    assert 0.1 + 0.2 - 0.2 - (0.3 - 0.2) != 0 and cancelling.difference == 0 and 0 < cancelling.p <= 1


def test_tiny_but_real_spread_is_kept():
    result = paired([1 + 1e-9, 1 + 3e-9], [1.0, 1.0])
    assert result.low < 0 < result.high


@pytest.mark.parametrize(
    ("arm", "baseline", "text"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0], "arm has 3 values, baseline has 2: give one of each per seed"),
        ([], [1.0], "arm has 0 values, baseline has 1: give one of each per seed"),
        ([], [], "arm and baseline are empty: give at least one seed, and 2 for an interval"),
        ([1.0, math.nan, math.inf], [1.0, 2.0, 3.0], "arm[1]=nan: must be finite; a diverged run has no mean, count it apart"),
        ([1.0, 2.0], [-math.inf, 2.0], "baseline[0]=-inf: must be finite; a diverged run has no mean, count it apart"),
    ],
)
def test_what_cannot_be_paired_is_refused(arm, baseline, text):
    with pytest.raises(PairingError) as error:
        paired(arm, baseline)
    assert str(error.value) == text
    assert isinstance(error.value, StnError) and isinstance(error.value, ValueError)


# Laws

values = st.integers(-10_000, 10_000).map(lambda i: i / 1000)
positive = st.integers(1, 10_000).map(lambda i: i / 1000)
studies = st.lists(st.tuples(values, values), min_size=2, max_size=8).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True))))
losses = st.lists(st.tuples(positive, positive), min_size=2, max_size=8).map(lambda pairs: tuple(map(list, zip(*pairs, strict=True))))
noise, high = st.integers(-3000, 3000).map(lambda i: i / 1000), st.integers(15_000, 25_000).map(lambda i: i / 1000)
far_from_0 = st.tuples(st.lists(st.tuples(high, noise), min_size=3, max_size=8), values).map(  # at any n, the share's interval is bounded
    lambda drawn: ([b + drawn[1] + e for b, e in drawn[0]], [b for b, _ in drawn[0]])
)
laws = settings(max_examples=100, deadline=None)


def told(result: Paired) -> tuple[float, ...]:
    return result.difference, result.low, result.high, result.p


@laws
@given(studies)
def test_swapping_the_arms_mirrors_the_difference(study):
    arm, baseline = study
    there, back = paired(arm, baseline), paired(baseline, arm)
    assert close(told(there), (-back.difference, -back.high, -back.low, back.p))
    assert close((there.arm_mean, there.arm_sd), (back.baseline_mean, back.baseline_sd))


@laws
@given(studies, values)
def test_adding_the_same_to_both_arms_leaves_the_difference(study, c):
    arm, baseline = study
    moved = paired([a + c for a in arm], [b + c for b in baseline])
    assert close(told(moved), told(paired(arm, baseline)))


@laws
@given(losses, st.floats(0.01, 100))
def test_scaling_scales_the_difference_and_leaves_the_share(study, k):
    arm, baseline = study
    before, after = paired(arm, baseline), paired([k * a for a in arm], [k * b for b in baseline])
    scaled = (before.arm_mean, before.arm_sd, before.baseline_mean, before.baseline_sd, before.difference, before.low, before.high)
    assert close(astuple(after)[1:8], tuple(k * number for number in scaled))
    assert close(astuple(after)[8:], astuple(before)[8:])  # p and the shares


@laws
@given(studies, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(study, random):
    pairs = list(zip(*study, strict=True))
    random.shuffle(pairs)
    arm, baseline = map(list, zip(*pairs, strict=True))
    now, before = paired(arm, baseline), paired(*study)
    assert close((now.arm_mean, now.arm_sd, now.baseline_mean, now.baseline_sd), astuple(before)[1:5])
    assert close(told(now), told(before))


@laws
@given(losses)
def test_the_interval_and_the_test_agree(study):
    result = paired(*study)
    assert result.low <= result.difference <= result.high
    assert math.isnan(result.p) if result.low == result.high else (result.p < 0.05) == (result.low > 0 or result.high < 0)
    assert close(result.difference, result.arm_mean - result.baseline_mean)
    assert close(result.arm_mean, result.baseline_mean * (1 + result.relative))


@laws
@given(far_from_0, st.sampled_from([1, -1]))
def test_the_share_holds_no_effect_where_the_difference_does(study, sign):
    result = paired(*(np.multiply(sign, values).tolist() for values in study))
    assert math.isfinite(result.relative_low) and math.isfinite(result.relative_high)
    assert (result.relative_low <= 0 <= result.relative_high) == (result.low <= 0 <= result.high)
    assert result.relative_low <= result.relative + 1e-12 and result.relative <= result.relative_high + 1e-12


@laws
@given(far_from_0)
def test_swapping_the_arms_inverts_the_ratio(study):
    there, back = paired(*study), paired(*study[::-1])
    assume(there.low != there.high and math.isfinite(there.relative_low) and math.isfinite(back.relative_low))
    ratios, inverse = (1 + there.relative_low, 1 + there.relative_high), (1 / (1 + back.relative_high), 1 / (1 + back.relative_low))
    assert ratios == pytest.approx(inverse, rel=1e-6)


@laws
@given(studies)
def test_the_share_has_an_interval_where_the_baseline_is_clearly_not_0(study):
    result = paired(*study)
    assume(result.low < result.high)
    edge = student.ppf(0.975, result.n - 1) * result.baseline_sd / math.sqrt(result.n)
    assume(abs(abs(result.baseline_mean) - edge) > 1e-9)
    assert math.isfinite(result.relative_low) == math.isfinite(result.relative_high) == (abs(result.baseline_mean) > edge)


@laws
@given(studies, st.sampled_from([0.5, 0.8, 0.9]))
def test_an_interval_of_less_certainty_lies_within_and_at_95_it_is_that_of_the_comparison(study, level):
    result, (low, high), narrow = paired(*study), interval(*study, 0.95, relative=False), interval(*study, level, relative=False)
    assume(result.low < result.high)
    assert close((low, high), (result.low, result.high)) and low < narrow[0] < narrow[1] < high
    test = ttest_rel(*study).confidence_interval(level)
    assert narrow == pytest.approx(tuple(test), rel=1e-6, abs=1e-9)
    assert close(interval(*study, 0.95, relative=True), (result.relative_low, result.relative_high))


@pytest.mark.parametrize("relative", [True, False])
def test_there_is_no_interval_of_a_single_pair_or_without_spread(relative):
    for arm, baseline in (([0.1], [0.2]), ([0.4, 0.3, 0.2], [0.3, 0.2, 0.1])):
        assert all(map(math.isnan, interval(arm, baseline, 0.9, relative=relative)))


# Fieller's interval of the share

shares_of = st.lists(st.tuples(st.integers(15_000, 25_000), st.integers(-3000, 3000)), min_size=3, max_size=8)


@laws
@given(shares_of, st.integers(-10_000, 10_000))
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


def test_scipy_is_loaded_only_for_a_test():
    code = "import stn_pipeline.comparing, sys; print(*sorted({'scipy', 'torch', 'mlflow', 'matplotlib', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
