"""The signed-rank test of paired differences, exact with ties and with infinite differences: a lost training is the worst outcome."""

from collections.abc import Sequence
from functools import lru_cache
from math import isnan, nan, sqrt

import numpy as np
import numpy.typing as npt

EXACT_UP_TO = 150  # pairs; beyond, the normal approximation is within 4 hundredths of p where p matters


def signed_rank(differences: Sequence[float]) -> tuple[float, float]:
    """Test whether differences lie as often and as far above 0 as below.

    The only assumption is that under no effect each difference is as likely as its negative, which holds for arms that are alike,
    however skewed their losses are and however often they are lost. An infinite difference (one arm lost its training) has
    the largest rank; equal ones share theirs; differences of 0 (both lost) are left out.

    Args:
        differences: arm minus baseline, a pair each; may hold infinities.

    Returns:
        The rank sum of the positive differences minus its mean under no effect, and the two-sided p; (0, NaN) where every
        difference is 0.

    Raises:
        ValueError: a difference is NaN.

    Source: Wilcoxon 1945, Biometrics Bulletin 1(6); the exact distribution with ties by enumerating the signs.
    Checked against: scipy.stats.wilcoxon without ties, all 2^n signs with ties.
    """
    values = np.asarray(differences, dtype=float)
    if np.isnan(values).any():
        raise ValueError("differences hold a NaN: give an infinity for a lost training")
    values = values[values != 0]
    if not len(values):
        return 0.0, nan
    doubled = _doubled_ranks(np.abs(values))
    centred = float(doubled[values > 0].sum() - doubled.sum() / 2) / 2
    if len(values) > EXACT_UP_TO:
        from scipy.special import ndtr

        return centred, float(2 * ndtr(-abs(2 * centred) / sqrt(float((doubled.astype(float) ** 2).sum() / 4))))
    tail = _distribution(tuple(sorted(doubled.tolist())))
    extreme = int(doubled.sum() / 2 + abs(2 * centred) + 0.5)  # the doubled rank sum, at least this far out
    return centred, min(1.0, 2 * float(tail[extreme:].sum()))


def _doubled_ranks(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return twice the ranks, so that the mean ranks of ties are whole numbers."""
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (2 * last - counts + 1)[inverse]


@lru_cache(maxsize=4096)
def _distribution(doubled: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the probability of each doubled rank sum when every sign is a coin's: of 0, 1, ..., the sum of all."""
    chances = np.ones(1)
    for rank in doubled:
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    return chances


def least_pairs(level: float) -> int:
    """Return the fewest pairs with which the test can reach a level at all: 2 in 2^n is the smallest p of n."""
    n = 1
    while 2.0 ** (1 - n) > level:
        n += 1
    return n


def outcome(value: float, lost: bool, *, smaller_is_better: bool) -> float:
    """Return an outcome on a scale on which a lost training is the worst."""
    if lost or isnan(value):
        return np.inf if smaller_is_better else -np.inf
    return value


def difference(arm: float, baseline: float) -> float:
    """Return arm minus baseline; 0 where both are lost."""
    return 0.0 if arm == baseline else arm - baseline
