"""Several arms over the same seeds against one baseline: pure numbers in, a verdict an arm and a measure out."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from stn_pipeline.comparing.paired import ALPHA, NATS, POINTS, Paired, Unit, in_words, paired

POWER = 0.8
MOST_SEEDS = 100_000
RESAMPLES = 9999


class Measure(NamedTuple):
    """What arms are compared in."""

    name: str
    unit: Unit
    smaller_is_better: bool


MEASURES = (Measure("test/loss", NATS, True), Measure("test/accuracy", POINTS, False))


@dataclass(frozen=True)
class Trained:
    """What came of one training.

    state: done, diverged (its loss was no longer finite), failed (for another reason), missing (not trained, or not to the end).
    figures: test/loss in nats, test/accuracy 0..1 and more; empty unless done.   collapsed: diverged, or ended at chance.
    tags: the run's, which say where and from which code it comes.
    """

    state: Literal["done", "diverged", "failed", "missing"] = "missing"
    figures: Mapping[str, float] = field(default_factory=dict)
    collapsed: bool = False
    run_id: str = ""
    why: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


Table = Mapping[str, Mapping[int, Trained]]  # by arm, by seed


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Contrast:
    """One arm against the baseline in one measure, over the seeds that both have done.

    t: mean paired difference, its t interval, the relative difference with Fieller's.   bootstrap: of the difference, BCa;
    bootstrap_relative: of the ratio of the means, percentiles of resampled pairs.   p: of t, corrected by Holm over the n_arms tested.
    n_needed: seeds that would show `sought` (a difference in the measure's unit: the one claimed, else the one seen) with a
    power of 0.8; None where there is nothing to seek.   without: t once more, without the seeds that collapsed in either arm; where
    there is one, n_needed is of such seeds.
    """

    arm: str
    baseline: str
    measure: Measure
    seeds: tuple[int, ...]
    t: Paired
    bootstrap: Interval
    bootstrap_relative: Interval
    p: float
    n_arms: int
    sought: float
    claimed: bool
    n_needed: int | None
    without: Paired | None
    n_without: int

    @property
    def sentence(self) -> str:
        """The answer in words."""
        name, unit, smaller_is_better = self.measure
        holm = (self.p, self.n_arms) if self.n_arms > 1 else None
        what = name.replace("/", " ")
        return in_words(self.t, what, arm=self.arm, baseline=self.baseline, smaller_is_better=smaller_is_better, unit=unit, holm=holm)

    @property
    def is_distinguishable(self) -> bool:
        """Whether the corrected test tells the arms apart."""
        return self.t.low != self.t.high and self.p <= ALPHA

    def plain(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        whole = asdict(self) | {"measure": self.measure.name, "unit": self.measure.unit.name, "sentence": self.sentence}
        whole["distinguishable"] = self.is_distinguishable
        plain: dict[str, Any] = _plain(whole)
        return plain


@dataclass(frozen=True)
class SinglePair:
    """McNemar's test of one seed's two networks: images that one of them alone has right, and p."""

    arm: str
    seed: int
    arm_only: int
    baseline_only: int
    p: float


@dataclass(frozen=True)
class Collapses:
    """How many trainings of an arm collapsed, beside the baseline's; p by Fisher's exact test, NaN for the baseline itself."""

    arm: str
    n: int
    n_collapsed: int
    p: float


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def contrasts(table: Table, baseline: str, measure: Measure, claims: Mapping[str, float] | None = None) -> list[Contrast]:
    """Compare each arm with the baseline in one measure; an arm that shares no done seed with it is left out.

    claims: by arm, a relative difference in test/loss that somebody claims (-0.15: 15 % less).
    """
    arms = {arm: _shared(table, arm, baseline) for arm in table if arm != baseline}
    arms = {arm: seeds for arm, seeds in arms.items() if seeds}
    results = {arm: paired(*_pairs(table, arm, baseline, seeds, measure)) for arm, seeds in arms.items()}
    corrected = dict(zip(results, holm([result.p for result in results.values()]), strict=True))
    claims = claims if claims and measure is MEASURES[0] else {}
    found = []
    for arm, seeds in arms.items():
        result = results[arm]
        values = _pairs(table, arm, baseline, seeds, measure)
        sound = [seed for seed in seeds if not (table[arm][seed].collapsed or table[baseline][seed].collapsed)]
        without = paired(*_pairs(table, arm, baseline, sound, measure)) if sound and len(sound) < len(seeds) else None
        usual = without or result  # a collapsed seed's loss would make anything small
        sought = claims[arm] * abs(usual.baseline_mean) if arm in claims else usual.difference
        spread = np.std(np.subtract(*_pairs(table, arm, baseline, sound or seeds, measure)), ddof=1) if usual.low < usual.high else math.nan
        found.append(
            Contrast(
                arm=arm,
                baseline=baseline,
                measure=measure,
                seeds=tuple(seeds),
                t=result,
                bootstrap=bootstrap_mean(np.subtract(*values)),
                bootstrap_relative=bootstrap_ratio(*values),
                p=corrected[arm],
                n_arms=sum(not math.isnan(p) for p in corrected.values()),
                sought=sought,
                claimed=arm in claims,
                n_needed=seeds_needed(sought, float(spread)),
                without=without,
                n_without=len(seeds) - len(sound),
            )
        )
    return found


def _shared(table: Table, arm: str, baseline: str) -> list[int]:
    done = [{seed for seed, trained in table[name].items() if trained.state == "done"} for name in (arm, baseline)]
    return sorted(done[0] & done[1])


def _pairs(table: Table, arm: str, baseline: str, seeds: Sequence[int], measure: Measure) -> tuple[list[float], list[float]]:
    one, other = ([table[name][seed].figures[measure.name] for seed in seeds] for name in (arm, baseline))
    return one, other


def holm(p: Sequence[float]) -> list[float]:
    """Return p values corrected for their number; a NaN is a test that was not made, and does not count.

    Source: Holm 1979, Scand. J. Statist. 6(2).   Checked against: the closed test procedure over all subsets.
    """
    made = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    corrected, most = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(made):
        most = max(most, min(1.0, (len(made) - rank) * value))
        corrected[i] = most
    return corrected


def bootstrap_mean(differences: Any) -> Interval:
    """Return the BCa interval of the mean of paired differences, (n,); NaN at n = 1, or where all are equal.

    With few seeds it is too narrow: at n = 5 it covers about 84 studies in 100, at n = 10 about 90.
    Source: Efron 1987, as scipy.stats.bootstrap.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(math.nan, math.nan)
    from scipy.stats import bootstrap

    interval = partial(bootstrap, (values,), np.mean, n_resamples=RESAMPLES, vectorized=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that BCa is degenerate, which its NaN says
        found = interval(method="BCa", rng=np.random.default_rng(0)).confidence_interval
        if math.isnan(found.low) or math.isnan(found.high):
            found = interval(method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return Interval(float(found.low), float(found.high))


def bootstrap_ratio(arm: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Return the percentile interval of mean(arm) / mean(baseline) - 1, pairs resampled; NaN at n = 1, or where a mean may be 0 or less."""
    a, b = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    if len(a) < 2 or (b <= 0).any():
        return Interval(math.nan, math.nan)
    picked = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    low, high = np.quantile(a[picked].mean(axis=1) / b[picked].mean(axis=1) - 1, (0.025, 0.975))
    return Interval(float(low), float(high))


def seeds_needed(difference: float, sd: float) -> int | None:
    """Return the fewest pairs with which a two-sided paired t test at 5 % sees a true mean difference 8 times in 10.

    sd: of the paired differences.   None where the difference is 0, sd is unknown, or MOST_SEEDS would not do.
    Source: the noncentral t distribution, squared; Cohen 1988, ch. 2.   Checked against: simulation, G*Power's tables.
    """
    if not difference or not sd > 0:
        return None
    from scipy.stats import ncf, t

    def power(n: int) -> float:
        shift, edge = abs(difference) / sd * math.sqrt(n), t.ppf(1 - ALPHA / 2, n - 1)
        return float(ncf.sf(edge**2, 1, n - 1, shift**2)) if shift < 30 else 1.0  # of t²: nct's far tail is NaN from shifts of 7 on

    low, high = 1, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high if high <= MOST_SEEDS else None


def collapses(table: Table, baseline: str) -> list[Collapses]:
    """Count the trainings that collapsed in each arm, and test each arm against the baseline."""
    counts = {}
    for arm, trained in table.items():
        ended = [one for one in trained.values() if one.state in ("done", "diverged")]
        counts[arm] = (len(ended), sum(one.collapsed for one in ended))
    from scipy.stats import fisher_exact

    def p(arm: str) -> float:
        rows = [(k, n - k) for n, k in (counts[arm], counts[baseline])]
        return math.nan if arm == baseline else float(fisher_exact(rows).pvalue)

    return [Collapses(arm, n, k, p(arm)) for arm, (n, k) in counts.items()]


def mcnemar(arm_right: Any, baseline_right: Any) -> tuple[int, int, float]:
    """Compare two networks image by image: images that the arm alone has right, the baseline alone, and the exact p.

    It is about these two networks only: another seed of the same arms may say the opposite.
    Args:    arm_right, baseline_right: (n,) bool, the same images in the same order.
    Source:  McNemar 1947, as scipy.stats.binomtest of the images on which the two disagree.
    """
    from scipy.stats import binomtest

    arm_only, baseline_only = int((arm_right & ~baseline_right).sum()), int((baseline_right & ~arm_right).sum())
    n = arm_only + baseline_only
    return arm_only, baseline_only, float(binomtest(arm_only, n).pvalue) if n else 1.0
