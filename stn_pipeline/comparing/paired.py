"""Two arms over the same seeds: the mean paired difference, its 95 % intervals, and one sentence that says it."""

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
    rounding, the interval is [difference, difference] and p is by convention 1 at difference 0, otherwise 0: no evidence.
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
    Source:  Student 1908, Biometrika 6(1), as scipy.stats.ttest_rel; Fieller 1954, JRSS B 16(2).
    Checked against: R's t.test on Student's sleep data; the shares that ttest_rel does not reject.
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

    n, differences = len(a), a - b
    rounding = ROUNDING * max(np.abs(a).max(), np.abs(b).max())
    difference = float(differences.mean()) if abs(differences.mean()) > rounding else 0.0
    if n == 1:
        low = high = p = nan
    elif np.ptp(differences) <= rounding:
        low = high = difference
        p = float(difference == 0)
    else:
        from scipy.stats import ttest_rel

        test = ttest_rel(a, b)
        (low, high), p = map(float, test.confidence_interval(0.95)), float(test.pvalue)

    (arm_mean, arm_sd), (baseline_mean, baseline_sd) = ((float(x.mean()), float(x.std(ddof=1)) if n > 1 else nan) for x in (a, b))
    relative = difference / (abs(baseline_mean) or nan)
    ends = (relative, relative) if low == high else _fieller(differences, b if baseline_mean > 0 else -b)
    return Paired(n, arm_mean, arm_sd, baseline_mean, baseline_sd, difference, low, high, p, relative, *ends)


def _fieller(differences: Array, baseline: Array) -> tuple[float, float]:
    """Return the shares r of the baseline's mean for which a t test finds no fault with difference = r · baseline."""
    n = len(baseline)
    if n == 1:
        return nan, nan
    from scipy.stats import t

    (s_dd, s_db), (_, s_bb) = np.cov(differences, baseline) / n * t.ppf(0.975, n - 1) ** 2
    d, b = differences.mean(), baseline.mean()
    square, half, constant = b * b - s_bb, d * b - s_db, d * d - s_dd  # the ends are the roots of square r² - 2 half r + constant
    if square <= 0:
        return nan, nan
    root = np.sqrt(max(0.0, half * half - square * constant))
    return float((half - root) / square), float((half + root) / square)


@dataclass(frozen=True)
class Unit:
    """A difference is told times `scale`, with at least `decimals`, as a share too if `relative`; `level` follows an arm's own value."""

    name: str
    scale: float
    decimals: int
    relative: bool
    level: str = ""


NATS = Unit("nats", scale=1, decimals=4, relative=True)
POINTS = Unit("points", scale=100, decimals=2, relative=False, level=" %")  # of a fraction 0..1, such as accuracy


def in_words(
    result: Paired, what: str, *, arm: str, baseline: str, smaller_is_better: bool, unit: Unit, holm: tuple[float, int] | None = None
) -> str:
    """Return one sentence, as in `tuned raises test accuracy by 0.42 points (95 % CI −0.10 to 0.94, 10 seeds): not ...`.

    The interval follows the verb: of what is lowered by 0.0123, it lies around +0.0123, and below 0 means raised. One
    pair, or pairs that all differ by the same, get no verdict: they say nothing about noise.
    holm: the p corrected for several arms, and the number of arms; it can take a verdict back, and then is told.
    """
    if result.n == 1:
        levels = (f"{mean * unit.scale:.4g}{unit.level}" for mean in (result.arm_mean, result.baseline_mean))
        told = f"{arm} v {baseline}: {what} {' against '.join(levels)} from one seed each"
        return f"{told}: a single pair says nothing about noise; give at least 2 seeds"
    verb = {-1: "lowers", 0: "changes", 1: "raises"}[int(np.sign(result.difference))]
    sign = -1 if verb == "lowers" else 1
    as_share = unit.relative and bool(np.isfinite([result.relative, result.relative_low, result.relative_high]).all())
    ends = (result.relative_low, result.relative_high) if as_share else (result.low, result.high)
    scale, decimals = (100, 0 if max(map(abs, ends)) >= 0.1 else 1) if as_share else (unit.scale, unit.decimals)
    middle = result.relative if as_share else result.difference
    told, low, high = _numbers(sign * middle * scale, *sorted(sign * end * scale for end in ends), decimals=decimals)
    (absolute,) = _numbers(sign * result.difference * unit.scale, decimals=unit.decimals)
    size = f"{told} %" if as_share else f"{told} {unit.name}"
    beside = f"{absolute} {unit.name}, " if as_share else ""
    if result.low == result.high:
        by = f"{size} ({beside}the same in each of {result.n} seeds)"
        return f"{arm} {verb} {what} by {by}: no spread to judge it by; check that the arms and the seeds differ"
    by = f"{size} (95 % CI {low} to {high}{' %; ' if as_share else ', '}{beside}{result.n} seeds)"
    favour = "better" if (verb == "lowers") == smaller_is_better else "worse"
    if result.low <= 0 <= result.high:
        verdict = "not distinguishable from no effect"
    elif holm is not None and holm[0] > ALPHA:
        verdict = f"not distinguishable from no effect, one of {holm[1]} arms being tested (p = {holm[0]:.2g} by Holm)"
    else:
        verdict = f"{favour} than {baseline}"
    return f"{arm} {verb} {what} by {by}: {verdict}"


def _numbers(middle: float, *ends: float, decimals: int) -> tuple[str, ...]:
    """Return numbers with as many decimals as it takes that no end reads 0 but 0."""
    enough = next((k for k in range(decimals, 12) if all(round(end, k) or not end for end in ends or (middle,))), 12)
    return tuple(f"{number:z.{enough}f}".replace("-", "−") for number in (middle, *ends))
