"""Verdicts and differences in words. A sentence holds its verdict, the numbers behind it, and the images and settings it is about."""

import math
from collections.abc import Mapping
from statistics import fmean, stdev

import numpy as np

from stn_pipeline.comparing.arms import Contrast
from stn_pipeline.comparing.measures import Measure
from stn_pipeline.comparing.paired import ALPHA, Paired
from stn_pipeline.comparing.planning import MOST_SEEDS, Needed
from stn_pipeline.comparing.ranks import least_pairs
from stn_pipeline.comparing.verdicts import Verdict


def verdict_sentence(verdict: Verdict, contrast: Contrast | None, where: str) -> str:
    """Return one sentence that says what is decided of an arm.

    contrast: the arm's description in the measure that decides; None where no seed is done in both arms.   where: the images and the
    settings, as in `mnist, 5 epochs`.
    """
    if verdict.test == "signed rank":
        sound = contrast.sound if contrast else None
        return _by_rank(verdict, where) + (f"; {_sound(sound, verdict.measure)}" if sound else "")
    if contrast is None or not verdict.seeds:
        return f"{verdict.arm} and {verdict.baseline} have no seed that both have done on {where}: there is nothing to compare"
    result, measure = contrast.t, verdict.measure
    if result.n == 1:
        levels = (f"{mean * measure.unit.scale:.4g}{measure.unit.level}" for mean in (result.arm_mean, result.baseline_mean))
        pair = f"{verdict.arm} v {verdict.baseline} on {where}: {measure.words} {' against '.join(levels)} from one seed each"
        return f"{pair}: a single pair says nothing about noise; give at least 2 seeds"
    if verdict.test is None:
        size = difference(result, measure, signed=True, with_interval=False)
        same = f"{verdict.arm} v {verdict.baseline} on {where}: {measure.words} differs by {size} in each of {result.n} seeds"
        return f"{same}: no spread to judge it by; check that the arms and the seeds differ"
    if verdict.kind == "not shown":
        alone = f"{_p(result.p, ALPHA)} alone, but " if verdict.n_verdicts > 1 else ""
        doubt = f"; {alone}{_corrected(verdict)}" if result.p <= ALPHA else ""
        return (
            f"{verdict.arm} v {verdict.baseline}: no difference in {measure.words} shown on {where}: {_with_seeds(result, measure)}{doubt}"
        )
    if verdict.kind == "equivalent":
        equal = f"{verdict.arm} is equivalent to {verdict.baseline} in {measure.words} within {margin(verdict)} on {where}"
        return f"{equal}: {_with_seeds(result, measure)}, two one-sided tests, {_corrected(verdict, equivalent=True)}"
    verb = "lowers" if result.difference < 0 else "raises"
    small = f", though within the margin of {margin(verdict)}" if verdict.within_margin else ""
    size, _, bracket = difference(result, measure, signed=False).partition(" (")
    told = f"({bracket.removesuffix(')')}; {result.n} seeds, {_corrected(verdict)})"
    return f"{verdict.arm} {verb} {measure.words} on {where} by {size} {told}: {verdict.kind} than {verdict.baseline}{small}"


def _with_seeds(result: Paired, measure: Measure) -> str:
    return f"{difference(result, measure, signed=True)}, {result.n} seeds"


def _by_rank(verdict: Verdict, where: str) -> str:
    n = len(verdict.seeds)
    lost = f"{verdict.arm} lost {verdict.lost} of {n} seeds and {verdict.baseline} {verdict.baseline_lost}"
    lost += f" on {where}, by divergence, crash or collapse"
    test = f"by signed rank over all {n}, a lost one being worst"
    if verdict.kind == "not shown":
        few = least_pairs(verdict.level)
        doubt = f" ({_corrected(verdict)})" if not math.isnan(verdict.p) else ""
        more = f"; with fewer than {few} seeds this test cannot show one" if n < few else ""
        return f"{lost}: {test}, no difference in {verdict.measure.words} is shown{doubt}{more}"
    favour = f"{verdict.kind} than {verdict.baseline} in {verdict.measure.words}"
    if verdict.kind == "better" and verdict.lost_more:
        favour += ", but only where it is not lost, and it is lost more often"
    elif verdict.kind == "worse" and verdict.lost < verdict.baseline_lost:
        favour += ", though it is lost less often"
    return f"{lost}: {test}, {verdict.arm} is {favour} ({_corrected(verdict)})"


def _sound(result: Paired, measure: Measure) -> str:
    seeds = f"{result.n} seed{'s' * (result.n != 1)}"
    return f"where neither was lost: {difference(result, measure, signed=True)}, {seeds}, described, not tested"


def _corrected(verdict: Verdict, *, equivalent: bool = False) -> str:
    """Return the p that decides, in words."""
    told = _p(verdict.p_equivalent if equivalent else verdict.p, verdict.level)
    told += f" by Holm over {verdict.n_verdicts} verdicts" if verdict.n_verdicts > 1 else ""
    return told + (f" at look {verdict.look} of {verdict.n_looks}, which may spend {verdict.level:.3g}" if verdict.n_looks > 1 else "")


def _p(p: float, level: float) -> str:
    """Return p in words, with the digits it takes to read on that side of the level on which it is."""
    if p < 1e-4 <= level:
        return "p < 0.0001"
    digits = next((k for k in range(2, 17) if (float(f"{p:.{k}g}") <= level) == (p <= level)), 17)
    return f"p = {p:.{digits}g}"


def described(contrast: Contrast) -> str:
    """Return what a measure that does not decide shows of an arm, as in `tps +0.95 points (95 % CI +0.40 to +1.50)`."""
    return f"{contrast.arm} {difference(contrast.sound or contrast.t, contrast.measure, signed=True)}"


def margin(verdict: Verdict) -> str:
    """Return a verdict's margin in words, as in `5 %` or `0.20 points`."""
    size = verdict.margin or 0.0
    unit = verdict.measure.unit
    return f"{100 * size:g} %" if unit.relative else f"{unit.scale * size:g} {unit.name}"


def difference(result: Paired, measure: Measure, *, signed: bool, with_interval: bool = True) -> str:
    """Return a difference, its interval, and for a relative measure its size in the unit too.

    signed: as it lies, `−3.3 % (95 % CI −9.4 to +3.5 %; −0.0031 nats)`; otherwise without its sign and its interval around that, for a
    sentence whose verb says which way it goes. No end of an interval reads 0 but 0.
    """
    unit, sign = measure.unit, 1 if signed or result.difference >= 0 else -1
    as_share = unit.relative and bool(np.isfinite([result.relative, result.relative_low, result.relative_high]).all())
    ends = (result.relative_low, result.relative_high) if as_share else (result.low, result.high)
    has_interval = with_interval and result.n > 1 and result.low != result.high
    middle = result.relative if as_share else result.difference
    scale = 100 if as_share else unit.scale
    decimals = (0 if max(map(abs, ends if has_interval else (middle,))) >= 0.1 else 1) if as_share else unit.decimals
    name = "%" if as_share else unit.name
    around = sorted(sign * end * scale for end in ends) if has_interval else []
    told, *bounds = numbers(sign * middle * scale, *around, decimals=decimals, signed=signed)
    (absolute,) = numbers(sign * result.difference * unit.scale, decimals=unit.decimals, signed=signed)
    beside = f"{absolute} {unit.name}" if as_share else ""
    inside = f"95 % CI {bounds[0]} to {bounds[1]}{' %' if as_share else ''}" if has_interval else ""
    bracket = "; ".join(filter(None, (inside, beside)))
    return f"{told} {name}" + (f" ({bracket})" if bracket else "")


def numbers(middle: float, *ends: float, decimals: int, signed: bool) -> tuple[str, ...]:
    """Return numbers with as many decimals as it takes that no end reads 0 but 0."""
    enough = next((k for k in range(decimals, 12) if all(round(end, k) or not end for end in ends or (middle,))), 12)
    form = f"{{:{'+' if signed else ''}z.{enough}f}}"
    told = (form.format(number) for number in (middle, *ends))
    return tuple(text.lstrip("+") if not float(text) else text.replace("-", "−") for text in told)


def percent(share: float) -> str:
    """Return a share as `−15 %`, with a decimal below 10 %."""
    digits = 0 if abs(share) >= 0.1 else 1
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def needed(found: Needed | None) -> str:
    """Return a number of seeds in words, as in `14 to 38 paired seeds`; empty where nothing can be said."""
    if found is None:
        return ""
    low, high = found
    if low is None:
        return f"more than {MOST_SEEDS:,} paired seeds"
    if high is None:
        return f"{low:,} paired seeds or many more"
    return f"{low:,} paired seeds" if low == high else f"{low:,} to {high:,} paired seeds"


def p_in_table(p: float) -> str:
    """Return a p for a table's cell."""
    return "" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def mean_and_spread(values: Mapping[int, float]) -> str:
    """Return mean ± standard deviation for a table's cell."""
    found = list(values.values())
    return "" if not found else f"{fmean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")
