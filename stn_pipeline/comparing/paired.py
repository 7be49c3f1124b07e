"""Two arms over the same seeds: the mean paired difference, its 95 % t interval, and one sentence that says it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from stn_pipeline.errors import StnError

ROUNDING = 64 * float(np.finfo(float).eps)  # 0.3 - 0.2 and 0.2 - 0.1 are one difference: below this share, spread is arithmetic


class PairingError(StnError, ValueError):
    """Two arms cannot be paired."""


@dataclass(frozen=True)
class Paired:
    """Two arms over the same n seeds: `arm` minus `baseline`, pair by pair, in the units of the inputs.

    sd: with n - 1; NaN at n = 1.   difference: mean of the paired differences; low, high: its 95 % t interval.
    p: 0..1, of the two-sided paired t test.   low, high and p are NaN at n = 1. Where all differences are equal to within
    rounding, the interval is [difference, difference] and p is by convention 1 at difference 0, otherwise 0: no evidence.
    relative, relative_low, relative_high: difference, low and high over |baseline_mean|, a share (-0.12: 12 % less); the
    baseline's own uncertainty is not in them.  NaN where the baseline's mean is 0.
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
    Source:  Student 1908, Biometrika 6(1), as scipy.stats.ttest_rel.   Checked against: R's t.test on Student's sleep data.
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
    shares = (value / (abs(baseline_mean) or nan) for value in (difference, low, high))
    return Paired(n, arm_mean, arm_sd, baseline_mean, baseline_sd, difference, low, high, p, *shares)


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


def in_words(result: Paired, what: str, *, arm: str, baseline: str, smaller_is_better: bool, unit: Unit) -> str:
    """Return one sentence, as in `tuned raises test accuracy by 0.42 points (95 % CI −0.10 to 0.94, 10 seeds): not ...`.

    The interval follows the verb: of what is lowered by 0.0123, it lies around +0.0123, and below 0 means raised. One
    pair, or pairs that all differ by the same, get no verdict: they say nothing about noise.
    """
    if result.n == 1:
        levels = (f"{mean * unit.scale:.4g}{unit.level}" for mean in (result.arm_mean, result.baseline_mean))
        told = f"{arm} v {baseline}: {what} {' against '.join(levels)} from one seed each"
        return f"{told}: a single pair says nothing about noise; give at least 2 seeds"
    verb = {-1: "lowers", 0: "changes", 1: "raises"}[int(np.sign(result.difference))]
    sign = -1 if verb == "lowers" else 1
    size, *ends = sign * result.difference * unit.scale, *sorted(sign * end * unit.scale for end in (result.low, result.high))
    decimals = next((k for k in range(unit.decimals, 12) if all(round(end, k) or not end for end in ends)), 12)  # no end reads 0 but 0
    told, low, high = (f"{number:z.{decimals}f}".replace("-", "−") for number in (size, *ends))
    if result.low == result.high:
        pairs, verdict = f"the same in each of {result.n} seeds", "no spread to judge it by; check that the arms and the seeds differ"
    else:
        favour = "better" if (verb == "lowers") == smaller_is_better else "worse"
        pairs = f"95 % CI {low} to {high}, {result.n} seeds"
        verdict = f"{favour} than {baseline}" if ends[0] > 0 else "not distinguishable from no effect"
    by = f"{told} {unit.name} ({pairs})"
    if unit.relative and np.isfinite(result.relative):
        by = f"{float(f'{abs(result.relative) * 100:.2g}'):g} % ({told} {unit.name}; {pairs})"
    return f"{arm} {verb} {what} by {by}: {verdict}"
