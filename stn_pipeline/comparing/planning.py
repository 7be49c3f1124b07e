"""How many seeds would decide: for a difference that somebody claims, or for equivalence within a margin; never for what was seen.

The seeds that are there tell the spread only roughly, so an answer is a range: what the 80 % interval of that spread comes to.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

POWER = 0.8
MOST_SEEDS = 100_000
SPREAD_LEVEL = 0.8
STRATA = 2000


class Needed(NamedTuple):
    """The fewest and the most paired seeds that it may take; None for more than MOST_SEEDS."""

    low: int | None
    high: int | None


def spread(sd: float, n: int) -> tuple[float, float]:
    """Return the 80 % interval of a standard deviation that n values gave, taking them for normal; n >= 2."""
    from scipy.special import chdtri

    tail = (1 - SPREAD_LEVEL) / 2
    return sd * math.sqrt((n - 1) / chdtri(n - 1, tail)), sd * math.sqrt((n - 1) / chdtri(n - 1, 1 - tail))


def needed_for_difference(difference: float, sd: float, n: int, level: float) -> Needed | None:
    """Return the seeds that show a true mean difference 8 times in 10, given the sd that n pairs had; None where nothing can be said."""
    return _range(sd, n, lambda wide: seeds_for_difference(difference, wide, level)) if difference else None


def needed_for_equivalence(margin: float, sd: float, n: int, level: float) -> Needed | None:
    """Return the seeds that show equivalence within ±margin 8 times in 10 where the arms are equal; as needed_for_difference."""
    return _range(sd, n, lambda wide: seeds_for_equivalence(margin, wide, level))


def _range(sd: float, n: int, seeds: Callable[[float], int | None]) -> Needed | None:
    if n < 2 or not sd > 0:
        return None
    low, high = spread(sd, n)
    return Needed(seeds(low), seeds(high))


def seeds_for_difference(difference: float, sd: float, level: float) -> int | None:
    """Return the fewest pairs with which a two-sided paired t test sees a true mean difference 8 times in 10.

    sd: of the paired differences.   level: of the test, 0..1.   None where MOST_SEEDS would not do.
    Source: Cohen 1988, ch. 2.   Checked against: simulation, G*Power's tables, the noncentral F distribution.
    """
    from scipy.special import ndtr, stdtrit

    def power(n: int) -> float:
        shift, edge = abs(difference) / sd * math.sqrt(n), stdtrit(n - 1, 1 - level / 2)
        scaled = edge * _spreads(n - 1)
        return float((ndtr(shift - scaled) + ndtr(-shift - scaled)).mean())

    return _fewest(power)


def seeds_for_equivalence(margin: float, sd: float, level: float) -> int | None:
    """Return the fewest pairs with which two one-sided t tests show |difference| < margin 8 times in 10, the truth being 0.

    sd, level, None: as seeds_for_difference.
    Source: Phillips 1990, J. Pharmacokinet. Biopharm. 18(2).   Checked against: simulation.
    """
    from scipy.special import ndtr, stdtrit

    def power(n: int) -> float:
        shift, edge = margin / sd * math.sqrt(n), stdtrit(n - 1, 1 - level)
        return float(np.maximum(0.0, 2 * ndtr(shift - edge * _spreads(n - 1)) - 1).mean())

    return _fewest(power)


@lru_cache(maxsize=512)  # the search for a number of seeds begins at the same numbers each time
def _spreads(freedom: int) -> npt.NDArray[np.float64]:
    """Return STRATA equally likely values of an estimated standard deviation whose truth is 1."""
    from scipy.special import chdtri

    shares = (np.arange(STRATA) + 0.5) / STRATA
    return np.asarray(np.sqrt(chdtri(freedom, shares) / freedom))


def _fewest(power: Callable[[int], float]) -> int | None:
    if not power(MOST_SEEDS) >= POWER:
        return None
    return bisect_left(range(2, MOST_SEEDS), POWER, key=power) + 2
