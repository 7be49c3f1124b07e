"""Two arms over the same seeds: the mean paired difference, its intervals, and the tests of a difference and of equivalence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import numpy.typing as npt

from stn_pipeline.errors import StnError

Array = npt.NDArray[np.float64]

ALPHA = 0.05
ROUNDING = 64 * float(np.finfo(float).eps)  # 0.3 - 0.2 and 0.2 - 0.1 are one difference: below this share, spread is arithmetic


class PairingError(StnError, ValueError):
    """Two arms cannot be paired."""


@dataclass(frozen=True)
class Paired:
    """Two arms over the same n seeds: `arm` minus `baseline`, pair by pair, in the units of the inputs.

    sd: with n - 1; NaN at n = 1.   difference: mean of the paired differences; low, high: its 95 % t interval.
    p: 0..1, of the two-sided paired t test.   low, high and p are NaN at n = 1. Where all differences are equal to within
    rounding, the interval is [difference, difference] and p is NaN: without spread there is nothing to test by.
    relative: difference over |baseline_mean|, a share (-0.12: 12 % less); NaN where that is 0.  relative_low, relative_high: its
    95 % interval by Fieller, the baseline's own uncertainty included: it holds 0 where low to high does.  NaN where it is
    unbounded, the baseline's mean being too close to 0 for its noise.
    """

    n: int
    arm_mean: float
    arm_sd: float
    baseline_mean: float
    baseline_sd: float
    difference: float
    low: float
    high: float
    p: float
    relative: float
    relative_low: float
    relative_high: float


def paired(arm: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two arms whose i-th values share a seed; the order of the pairs does not matter.

    The interval takes the differences to be roughly normal: a collapsed seed stretches it, so count collapses beside it.
    Raises:  PairingError if the arms differ in length, are empty, or hold a NaN or an infinity.
    Source:  Student 1908, Biometrika 6(1); Fieller 1954, JRSS B 16(2).
    Checked against: R's t.test on Student's sleep data; scipy.stats.ttest_rel, and the shares that it does not reject.
    Example: >>> round(paired([0.081, 0.079, 0.083], [0.092, 0.094, 0.090]).difference, 4)
             -0.0113
    """
    if len(arm) != len(baseline):
        raise PairingError(f"arm has {len(arm)} values, baseline has {len(baseline)}: give one of each per seed")
    if not len(arm):
        raise PairingError("arm and baseline are empty: give at least one seed, and 2 for an interval")
    a, b = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    for name, values in (("arm", a), ("baseline", b)):
        for i in np.flatnonzero(~np.isfinite(values)):
            raise PairingError(f"{name}[{i}]={values[i]}: must be finite; a diverged run has no mean, count it apart")

    n, (difference, error, p) = len(a), t_test(a.tolist(), b.tolist())
    low = high = nan
    if error:
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 1 - ALPHA / 2)) * error
        low, high = difference - half, difference + half
    elif n > 1:
        low = high = difference

    (arm_mean, arm_sd), (baseline_mean, baseline_sd) = ((float(x.mean()), float(x.std(ddof=1)) if n > 1 else nan) for x in (a, b))
    relative = difference / (abs(baseline_mean) or nan)
    ends = (relative, relative) if low == high else _fieller(a - b, b if baseline_mean > 0 else -b)
    return Paired(n, arm_mean, arm_sd, baseline_mean, baseline_sd, difference, low, high, p, relative, *ends)


def t_test(arm: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference of pairs, its standard error, and the two-sided p of the paired t test.

    Without spread, or with one pair, the error is 0 and p NaN. On few values plain Python is ten times as fast as numpy, and
    scipy.stats a hundred times as slow.
    """
    differences, n = [a - b for a, b in zip(arm, baseline, strict=True)], len(arm)
    rounding = ROUNDING * max(map(abs, (*arm, *baseline)))
    mean = math.fsum(differences) / n
    difference = mean if abs(mean) > rounding else 0.0
    if n == 1 or max(differences) - min(differences) <= rounding:
        return difference, 0.0, nan
    from scipy.special import stdtr

    error = math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / (n - 1) / n)
    return difference, error, 2 * float(stdtr(n - 1, -abs(difference) / error))


def _fieller(differences: Array, baseline: Array, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Return the shares r of the baseline's mean for which a t test finds no fault with difference = r · baseline."""
    n = len(baseline)
    if n == 1:
        return nan, nan
    from scipy.special import stdtrit

    (s_dd, s_db), (_, s_bb) = np.cov(differences, baseline) / n * stdtrit(n - 1, (1 + level) / 2) ** 2
    d, b = differences.mean(), baseline.mean()
    square, half, constant = b * b - s_bb, d * b - s_db, d * d - s_dd  # the ends are the roots of square r² - 2 half r + constant
    if square <= 0:
        return nan, nan
    root = np.sqrt(max(0.0, half * half - square * constant))
    return float((half - root) / square), float((half + root) / square)


def interval(arm: Sequence[float], baseline: Sequence[float], level: float, *, relative: bool) -> tuple[float, float]:
    """Return the ends of an interval of the difference at a level (0.90, say), by t; as a share of the baseline's mean, by Fieller.

    NaN at one pair, where all differences are equal, and where the share is unbounded.
    """
    a, b = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    differences, n = a - b, len(a)
    if n < 2 or np.ptp(differences) <= ROUNDING * max(np.abs(a).max(), np.abs(b).max()):
        return nan, nan
    if relative:
        return _fieller(differences, b if b.mean() > 0 else -b, level)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(differences.std(ddof=1)) / n**0.5
    return float(differences.mean()) - half, float(differences.mean()) + half


def equivalence_p(arm: Sequence[float], baseline: Sequence[float], margin: float, *, relative: bool) -> float:
    """Return the p of two one-sided t tests: small where the arms differ by less than a margin, whichever way.

    It is at most 0.05 exactly where the 90 % `interval` lies inside of ±margin.

    Args:
        arm: a value a seed.
        baseline: the same; the i-th values of both share a seed.
        margin: > 0, in the unit of the values; if `relative`, a share of the baseline's mean.
        relative: which of the two.

    Returns:
        p, NaN at one pair and where all differences are equal but for rounding.

    Source: Schuirmann 1987, J. Pharmacokinet. Biopharm. 15(6); of a ratio, Sasabuchi 1980.   Checked against: the interval's ends.
    """
    a, b = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    n = len(a)
    if n < 2 or np.ptp(a - b) <= ROUNDING * max(np.abs(a).max(), np.abs(b).max()):
        return nan
    from scipy.special import stdtr

    edges = margin * np.sign(b.mean()) * b if relative else np.full(n, margin)
    above, below = a - b - edges, a - b + edges  # the mean of the first should lie below 0, of the second above
    ps = []
    for values, sign in ((above, 1), (below, -1)):
        error = float(values.std(ddof=1)) / n**0.5
        ps.append(float(stdtr(n - 1, sign * float(values.mean()) / error)) if error else float(sign * values.mean() > 0))
    return max(ps)
