"""What arms can be compared in: names of a run's metrics, their units, and which way is better."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Unit:
    """How to print a measure.

    scale: values are multiplied by it.   decimals: the least number of them.   relative: print a difference as a share of the
    baseline's mean too.   level: suffix of an arm's own value.
    """

    name: str
    scale: float
    decimals: int
    relative: bool
    level: str = ""


NATS = Unit("nats", scale=1, decimals=4, relative=True)
POINTS = Unit("points", scale=100, decimals=2, relative=False, level=" %")  # of a fraction 0..1, such as accuracy


class Measure(NamedTuple):
    """What arms are compared in: a metric of the run."""

    name: str
    unit: Unit
    smaller_is_better: bool

    @property
    def words(self) -> str:
        """The name in a sentence, as in `test loss`."""
        return self.name.replace("/", " ").replace("_", " ")


LOSS = Measure("test/loss", NATS, True)
ACCURACY = Measure("test/accuracy", POINTS, False)
CALIBRATION = Measure("test/calibration_error", POINTS, True)
MEASURES = {measure.name: measure for measure in (LOSS, ACCURACY, CALIBRATION)}
REQUIRED = (LOSS, ACCURACY)  # what every whole training has, in every version


def measures_of(decide: str) -> tuple[Measure, ...]:
    """Return the measures of a page: the one that decides, then loss and accuracy where they are others."""
    return (MEASURES[decide], *(measure for measure in REQUIRED if measure.name != decide))
