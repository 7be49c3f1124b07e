"""Which configuration wins on fresh seeds: the best few trials and the default, trained again, judged by the mean. Numbers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean, stdev


@dataclass(frozen=True)
class Confirmed:
    """A configuration on fresh seeds.

    number: of the trial that tried it first; 0 is the default.   promised: that trial's value, None where it has none.
    values: by fresh seed the objective's best value over the epochs; None where the training diverged, failed or was lost.
    """

    number: int
    promised: float | None
    values: Mapping[int, float | None]

    @property
    def done(self) -> list[float]:
        """The values that there are."""
        return [value for value in self.values.values() if value is not None]

    @property
    def n_lost(self) -> int:
        """Number of fresh seeds on which it diverged, failed or was lost."""
        return len(self.values) - len(self.done)

    @property
    def mean(self) -> float:
        """Mean of the values that there are; NaN where there is none."""
        return fmean(self.done) if self.done else nan

    @property
    def sd(self) -> float:
        """Standard deviation of the values that there are, with n - 1; NaN at fewer than two."""
        return stdev(self.done) if len(self.done) > 1 else nan


def ranking(candidates: Sequence[Confirmed], *, smaller_is_better: bool) -> list[Confirmed]:
    """Return the configurations by their means over the fresh seeds, the best first.

    A training that was lost is worse than any value, so whoever lost fewer is ahead. In a tie the default is ahead, then the given order.
    The best mean of a few is itself a little better than it will keep, so it chooses, and the final trainings tell.
    """
    sign = 1 if smaller_is_better else -1
    return sorted(candidates, key=lambda one: (one.n_lost, sign * one.mean if one.done else 0.0, one.number != 0))
