"""The signed-rank test: against scipy, against all signs by brute force with ties and infinities, and laws."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, wilcoxon

from stn_pipeline.comparing import ranks
from stn_pipeline.comparing.ranks import difference, least_pairs, outcome, signed_rank

laws = settings(max_examples=100, deadline=None)
differences = st.lists(st.integers(-6, 6).map(float) | st.sampled_from([math.inf, -math.inf]), max_size=9)


def brute(values: list[float]) -> tuple[float, float]:
    """Rank sum of the positive ones less its mean, and the share of the 2^n signs that lie at least as far out."""
    kept = [value for value in values if value]
    if not kept:
        return 0.0, math.nan
    sizes = rankdata(np.abs(kept))
    seen = sum(rank for rank, value in zip(sizes, kept, strict=True) if value > 0) - sizes.sum() / 2
    sums = [
        sum(rank for rank, sign in zip(sizes, signs, strict=True) if sign) - sizes.sum() / 2 for signs in product((0, 1), repeat=len(kept))
    ]
    return seen, float(np.mean([abs(one) >= abs(seen) for one in sums]))


@pytest.mark.parametrize("n", [1, 2, 5, 10, 25, 60])
def test_without_ties_it_is_scipys_exact_test(n):
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.3, 1, n)
        centred, p = signed_rank(values.tolist())
        exact = wilcoxon(values, alternative="two-sided", method="exact")
        assert p == pytest.approx(exact.pvalue, rel=1e-9)
        assert n * (n + 1) / 4 - abs(centred) == pytest.approx(exact.statistic)  # scipy's is the smaller of the two rank sums


@laws
@given(differences)
def test_with_ties_and_lost_trainings_it_counts_all_signs(values):
    assert signed_rank(values) == pytest.approx(brute(values), rel=1e-12, nan_ok=True)


@laws
@given(differences)
def test_swapping_the_arms_turns_the_sign_and_keeps_p(values):
    (there, p), (back, same) = signed_rank(values), signed_rank([-value for value in values])
    assert there == -back and (p == same or math.isnan(p) and math.isnan(same))


@laws
@given(differences, st.floats(0.01, 100), st.randoms(use_true_random=False))
def test_neither_the_unit_nor_the_order_matters(values, k, random):
    shuffled = [k * value for value in values]
    random.shuffle(shuffled)
    assert signed_rank(shuffled) == pytest.approx(signed_rank(values), nan_ok=True)


def test_beyond_the_exact_sizes_the_normal_approximation_is_close(monkeypatch):
    for shift in (0.0, 0.15, 0.25):
        values = np.random.default_rng(1).normal(shift, 1, ranks.EXACT_UP_TO + 20).round(1).tolist()
        told = signed_rank(values)
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "EXACT_UP_TO", 1000)
            exact = signed_rank(values)
        assert told[0] == exact[0] and told[1] != exact[1] and told[1] == pytest.approx(exact[1], rel=0.04)


def test_no_difference_is_no_test_and_a_nan_is_refused():
    for values in ([], [0.0, 0.0]):
        centred, p = signed_rank(values)
        assert centred == 0 and math.isnan(p)
    with pytest.raises(ValueError, match="give an infinity for a lost training"):
        signed_rank([1.0, math.nan])


def test_no_effect_is_found_in_at_most_5_studies_of_100_however_skewed_and_lost():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        losses = np.where(rng.random((2, 12)) < 0.2, np.inf, rng.lognormal(0, 1, (2, 12)))
        found += signed_rank([difference(a, b) for a, b in losses.T])[1] <= 0.05
    assert 0.01 < found / 2000 <= 0.055


@pytest.mark.parametrize("level", [0.05, 0.01, 0.00625, 0.0005])
def test_the_fewest_pairs_with_which_a_level_can_be_reached(level):
    n = least_pairs(level)
    assert signed_rank([float(i) for i in range(1, n + 1)])[1] <= level < signed_rank([float(i) for i in range(1, n)])[1]


@pytest.mark.parametrize("smaller_is_better", [True, False])
def test_a_lost_training_is_the_worst_and_two_are_equal(smaller_is_better):
    lost, sound = (outcome(0.3, is_lost, smaller_is_better=smaller_is_better) for is_lost in (True, False))
    assert sound == 0.3 and outcome(math.nan, False, smaller_is_better=smaller_is_better) == lost
    assert (lost > 1e9) == smaller_is_better and math.isinf(lost)
    assert difference(lost, lost) == 0 and difference(lost, sound) == lost and difference(sound, lost) == -lost
