"""Equivalence within a margin: two one-sided tests against scipy's, and the 90 % interval that says the same."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from stn_pipeline.comparing.paired import equivalence_p, interval

laws = settings(max_examples=80, deadline=None)
pairs = st.lists(st.tuples(st.integers(800, 1200), st.integers(-150, 150)), min_size=2, max_size=9)
margins = st.integers(5, 400).map(lambda i: i / 1000)


def study(drawn: list[tuple[int, int]], sign: int = 1) -> tuple[np.ndarray, np.ndarray]:
    baseline = sign * np.array([b for b, _ in drawn]) / 1000
    return baseline + np.array([e for _, e in drawn]) / 1000, baseline


@laws
@given(pairs, margins, st.sampled_from([1, -1]))
def test_they_are_two_one_sided_t_tests(drawn, margin, sign):
    arm, baseline = study(drawn, sign)
    assume(np.ptp(arm - baseline) > 1e-9)
    for relative, edge in ((False, np.full(len(arm), margin)), (True, margin * np.abs(baseline))):
        assume(np.ptp(arm - baseline - edge) > 1e-9 and np.ptp(arm - baseline + edge) > 1e-9)
        expected = max(
            ttest_1samp(arm - baseline - edge, 0, alternative="less").pvalue,
            ttest_1samp(arm - baseline + edge, 0, alternative="greater").pvalue,
        )
        assert equivalence_p(arm, baseline, margin, relative=relative) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@laws
@given(pairs, margins, st.booleans())
def test_it_is_shown_exactly_where_the_90_percent_interval_lies_within_the_margin(drawn, margin, relative):
    arm, baseline = study(drawn)
    assume(np.ptp(arm - baseline) > 1e-9)
    low, high = interval(arm, baseline, 0.9, relative=relative)
    p = equivalence_p(arm, baseline, margin, relative=relative)
    assume(abs(p - 0.05) > 1e-9)
    assert (p <= 0.05) == (-margin < low and high < margin)


def test_a_share_of_what_may_be_0_is_never_shown_to_be_small():
    rng = np.random.default_rng(0)
    for _ in range(300):
        arm, baseline = rng.normal(0.05, 0.1, 4), rng.normal(0.05, 0.1, 4)
        if math.isnan(interval(arm, baseline, 0.9, relative=True)[0]):
            assert equivalence_p(arm, baseline, 0.5, relative=True) > 0.05


@laws
@given(pairs, margins, st.booleans())
def test_a_wider_margin_is_shown_sooner_and_swapping_the_arms_changes_nothing(drawn, margin, relative):
    arm, baseline = study(drawn)
    assume(np.ptp(arm - baseline) > 1e-9)
    p = equivalence_p(arm, baseline, margin, relative=relative)
    assert relative or equivalence_p(baseline, arm, margin, relative=False) == pytest.approx(p)
    wider = equivalence_p(arm, baseline, 2 * margin, relative=relative)
    assert wider <= 0.05 or p > 0.05


@pytest.mark.parametrize("relative", [True, False])
def test_a_single_pair_and_equal_differences_show_nothing(relative):
    assert math.isnan(equivalence_p([0.1], [0.1], 0.5, relative=relative))
    assert math.isnan(equivalence_p([0.4, 0.3, 0.2], [0.3, 0.2, 0.1], 0.5, relative=relative))


def test_arms_at_the_edge_of_the_margin_are_called_equivalent_in_5_studies_of_100():
    rng = np.random.default_rng(0)
    baseline = rng.normal(1, 0.05, (3000, 6))
    arm = baseline + rng.normal(0.05, 0.03, (3000, 6))
    shown = [equivalence_p(a, b, 0.05, relative=False) <= 0.05 for a, b in zip(arm, baseline, strict=True)]
    assert 0.038 < np.mean(shown) < 0.062
