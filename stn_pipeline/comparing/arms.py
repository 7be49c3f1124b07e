"""Several arms over the same seeds: what came of each training, and each arm beside the baseline, described in numbers.

Nothing here is a verdict: verdicts.py decides.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from stn_pipeline.comparing.measures import Measure
from stn_pipeline.comparing.paired import ALPHA, Paired, paired

RESAMPLES = 9999

State = Literal["done", "diverged", "crashed", "failed", "missing"]
ENDED = ("done", "diverged", "crashed")  # states that say something about the arm


@dataclass(frozen=True)
class Trained:
    """What came of one training.

    state: done; diverged (its loss was no longer finite); crashed (its process died each time it was tried); failed (for a
    reason that has nothing to do with the arm, such as a full disk); missing (not trained, or not to the end).
    figures: test/loss in nats, test/accuracy 0..1 and more; empty unless done.   collapsed: diverged, or ended at chance, or with
    its localiser far out of the image.   tags: the run's, which say where and from which code it comes.
    digests: of each split's pixels and labels, by name; empty where they are not known.
    """

    state: State = "missing"
    figures: Mapping[str, float] = field(default_factory=dict)
    collapsed: bool = False
    run_id: str = ""
    why: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_lost(self) -> bool:
        """Whether it is the worst that can come of a training: it diverged, crashed or collapsed."""
        return self.collapsed or self.state in ("diverged", "crashed")


Table = Mapping[str, Mapping[int, Trained]]  # by arm, by seed


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Contrast:
    """One arm beside the baseline in one measure, over the seeds that both have done.

    t: mean paired difference, its t interval, the relative difference with Fieller's.   bootstrap: of the difference, BCa;
    bootstrap_relative: of the ratio of the means, percentiles of resampled pairs.   without: t once more, without the seeds that
    collapsed in either arm; None where none did.   correlation: of the arms over the seeds, without collapsed ones; variance_ratio: of
    the differences' variance to that of unpaired seeds, below 1 where pairing helps; both NaN with fewer than 3 pairs.
    """

    arm: str
    baseline: str
    measure: Measure
    seeds: tuple[int, ...]
    t: Paired
    bootstrap: Interval
    bootstrap_relative: Interval
    without: Paired | None
    n_without: int
    correlation: float
    variance_ratio: float

    @property
    def sound(self) -> Paired | None:
        """The comparison over the seeds that collapsed in neither arm; None where there is none."""
        return self.t if not self.n_without else self.without


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
    """How many trainings of an arm diverged, crashed or collapsed, beside the baseline's.

    low, high: Clopper and Pearson's 95 % interval of the rate, 0..1.   p: by Fisher's exact test, NaN for the baseline itself.
    """

    arm: str
    n: int
    n_collapsed: int
    low: float
    high: float
    p: float


def contrasts(table: Table, baseline: str, measure: Measure) -> list[Contrast]:
    """Describe each arm beside the baseline in one measure; an arm that shares no done seed with it is left out."""
    found = []
    for arm in table:
        seeds = _shared(table, arm, baseline, measure) if arm != baseline else []
        if not seeds:
            continue
        values = _pairs(table, arm, baseline, seeds, measure)
        sound = [seed for seed in seeds if not (table[arm][seed].collapsed or table[baseline][seed].collapsed)]
        without = paired(*_pairs(table, arm, baseline, sound, measure)) if sound and len(sound) < len(seeds) else None
        correlation, ratio = pairing(*_pairs(table, arm, baseline, sound, measure))
        found.append(
            Contrast(
                arm=arm,
                baseline=baseline,
                measure=measure,
                seeds=tuple(seeds),
                t=paired(*values),
                bootstrap=bootstrap_mean(np.subtract(*values)),
                bootstrap_relative=bootstrap_ratio(*values),
                without=without,
                n_without=len(seeds) - len(sound),
                correlation=correlation,
                variance_ratio=ratio,
            )
        )
    return found


def _shared(table: Table, arm: str, baseline: str, measure: Measure) -> list[int]:
    done = [{seed for seed, one in table[name].items() if one.state == "done" and measure.name in one.figures} for name in (arm, baseline)]
    return sorted(done[0] & done[1])


def _pairs(table: Table, arm: str, baseline: str, seeds: Sequence[int], measure: Measure) -> tuple[list[float], list[float]]:
    one, other = ([table[name][seed].figures[measure.name] for seed in seeds] for name in (arm, baseline))
    return one, other


def pairing(arm: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Return what pairing by seed brings: the correlation of two arms, and var(arm - baseline) / (var(arm) + var(baseline)).

    NaN with fewer than 3 pairs, or where an arm does not vary.
    """
    a, b = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    if len(a) < 3 or not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return math.nan, math.nan
    return float(np.corrcoef(a, b)[0, 1]), float(np.var(a - b) / (np.var(a) + np.var(b)))


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


def collapses(table: Table, baseline: str) -> list[Collapses]:
    """Count the trainings that were lost in each arm, and test each arm against the baseline."""
    from scipy.stats import binomtest, fisher_exact

    counts = {}
    for arm, trained in table.items():
        ended = [one for one in trained.values() if one.state in ENDED]
        counts[arm] = (len(ended), sum(one.is_lost for one in ended))

    def p(arm: str) -> float:
        rows = [(k, n - k) for n, k in (counts[arm], counts[baseline])]
        return math.nan if arm == baseline else float(fisher_exact(rows).pvalue)

    found = []
    for arm, (n, k) in counts.items():
        rate = binomtest(k, n).proportion_ci(1 - ALPHA, method="exact") if n else Interval(0.0, 1.0)
        found.append(Collapses(arm, n, k, float(rate.low), float(rate.high), p(arm)))
    return found


def mcnemar(arm_right: Any, baseline_right: Any, image: Any = None) -> tuple[int, int, float]:
    """Compare two networks image by image: images that the arm has right more often, the baseline more often, and the exact p.

    It is about these two networks only: another seed of the same arms may say the opposite.

    Args:
        arm_right: (n,) bool, which pictures the arm has right.
        baseline_right: (n,) bool, the same for the baseline, of the same pictures in the same order.
        image: (n,) the source image of each picture, where an image is shown several times; one each by default. Copies
            of one image are no independent evidence: an image counts once, for the network that has more of its copies right.

    Source: McNemar 1947, as scipy.stats.binomtest of the images on which the two disagree; with copies, their sign test.
    """
    from scipy.stats import binomtest

    difference = np.asarray(arm_right, dtype=int) - np.asarray(baseline_right, dtype=int)
    if image is not None:
        difference = np.bincount(np.unique(image, return_inverse=True)[1], weights=difference)
    arm_only, baseline_only = int((difference > 0).sum()), int((difference < 0).sum())
    n = arm_only + baseline_only
    return arm_only, baseline_only, float(binomtest(arm_only, n).pvalue) if n else 1.0
