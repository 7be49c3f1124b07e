"""How many seeds would decide: G*Power's tables, the noncentral F's power, simulation, and the range's laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ncfdtr
from scipy.stats import chi2, f, ttest_1samp

from stn_pipeline.comparing.planning import (
    MOST_SEEDS,
    Needed,
    needed_for_difference,
    needed_for_equivalence,
    seeds_for_difference,
    seeds_for_equivalence,
    spread,
)

laws = settings(max_examples=15, deadline=None)
levels = st.sampled_from([0.05, 0.025, 0.05 / 6, 0.00625])


@pytest.mark.parametrize(("d", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])  # G*Power: two-sided paired t test, 0.05, power 0.8
def test_seeds_for_a_difference_are_those_of_the_tables(d, n):
    assert seeds_for_difference(d, 1, 0.05) == seeds_for_difference(-d, 1, 0.05) == seeds_for_difference(0.003 * d, 0.003, 0.05) == n


def power(d: float, n: int, level: float) -> float:
    """How often t² passes its edge: it is a noncentral F with 1 and n - 1 degrees."""
    return 1 - float(ncfdtr(1, n - 1, n * d * d, f.isf(level, 1, n - 1))) if n > 1 else 0.0


@laws
@given(st.floats(0.3, 4), levels)
def test_they_have_the_power_and_one_fewer_has_not(d, level):
    n = seeds_for_difference(d, 1, level)
    assert power(d, n, level) > 0.8 - 2e-4 and power(d, n - 1, level) < 0.8 + 2e-4


@pytest.mark.parametrize(("d", "n"), [(5.25, 3), (6, 3), (11, 3), (12, 2), (28, 2), (1e12, 2)])
def test_large_effects_need_few_seeds_but_not_too_few(d, n):
    assert seeds_for_difference(d, 1, 0.05) == n


@pytest.mark.parametrize(("margin", "sd", "level"), [(1.0, 1.0, 0.05), (1.0, 0.8, 0.05), (0.05, 0.06, 0.025)])
def test_as_many_seeds_as_needed_show_equality_8_times_in_10_and_one_fewer_does_not(margin, sd, level):
    n = seeds_for_equivalence(margin, sd, level)
    differences = np.random.default_rng(0).normal(0, sd, (40_000, n))

    def shown(some: np.ndarray) -> float:
        above = ttest_1samp(some - margin, 0, axis=1, alternative="less").pvalue
        below = ttest_1samp(some + margin, 0, axis=1, alternative="greater").pvalue
        return float((np.maximum(above, below) <= level).mean())

    assert shown(differences) > 0.795 and shown(differences[:, 1:]) < 0.805


def test_more_seeds_than_anybody_trains_are_no_answer():
    effect = 1.959964 + 0.841621  # in standard errors, at a power of 0.8 with many seeds
    assert seeds_for_difference(effect / math.sqrt(99_000), 1, 0.05) == pytest.approx(99_000, abs=10)
    assert seeds_for_difference(effect / math.sqrt(101_000), 1, 0.05) is None
    assert seeds_for_equivalence(1e-4, 1, 0.05) is None
    assert needed_for_difference(1.5 * effect / math.sqrt(MOST_SEEDS), 1.0, 5, 0.05).high is None


@pytest.mark.parametrize("n", [2, 5, 20])
def test_the_spread_is_the_80_percent_interval_of_a_standard_deviation(n):
    low, high = spread(2.0, n)
    assert (low, high) == pytest.approx((2 * math.sqrt((n - 1) / chi2.ppf(0.9, n - 1)), 2 * math.sqrt((n - 1) / chi2.ppf(0.1, n - 1))))
    ends = [spread(float(np.std(values, ddof=1)), n) for values in np.random.default_rng(0).normal(0, 3, (4000, n))]
    assert np.mean([a < 3 < b for a, b in ends]) == pytest.approx(0.8, abs=0.02)


@laws
@given(st.floats(0.5, 3), st.integers(2, 30), levels)
def test_the_range_holds_the_number_for_the_spread_seen_and_narrows_with_seeds(effect, n, level):
    for plan, ask in ((seeds_for_difference, needed_for_difference), (seeds_for_equivalence, needed_for_equivalence)):
        low, high = ask(effect, 1.0, n, level)
        usual = plan(effect, 1.0, level)
        assert 2 <= low <= usual and (high is None or usual <= high)
        more = ask(effect, 1.0, n + 10, level)
        assert low <= more.low and (high is None or more.high <= high)


@laws
@given(st.floats(0.5, 3), st.floats(1, 2), levels)
def test_more_noise_a_smaller_effect_and_a_smaller_level_need_more(effect, more, level):
    for plan in (seeds_for_difference, seeds_for_equivalence):
        n = plan(effect, 1.0, level)
        assert n <= plan(effect, more, level) and n <= plan(effect / more, 1.0, level) and n <= plan(effect, 1.0, level / more)


@pytest.mark.parametrize(("difference", "sd", "n"), [(0.0, 1.0, 5), (0.1, math.nan, 1), (0.1, math.nan, 5), (0.1, 0.0, 5), (0.1, 1.0, 1)])
def test_nothing_is_said_where_nothing_is_claimed_or_the_spread_is_not_known(difference, sd, n):
    assert needed_for_difference(difference, sd, n, 0.05) is None
    assert difference == 0 or needed_for_equivalence(0.1, sd, n, 0.05) is None


def test_five_seeds_tell_the_number_only_roughly():
    found = needed_for_difference(0.8, 1.0, 5, 0.05)  # 15 were the spread known
    assert isinstance(found, Needed) and found.low <= 10 and found.high >= 40
