"""A comparison as a source of jobs: a training for each arm, seed, data set and setting that no run has answered yet."""

from collections.abc import Callable
from typing import NamedTuple

from stn_pipeline.comparing.arms import Table, Trained
from stn_pipeline.comparing.comparefile import Block, CompareConfig
from stn_pipeline.comparing.trained import trained
from stn_pipeline.config import TrainConfig, short_name
from stn_pipeline.errors import RunError
from stn_pipeline.jobs import Job, Outcome, Trainings
from stn_pipeline.tracking import CHILD_OF, Run, create_run, find_run, search_runs
from stn_pipeline.training import Record


class Cell(NamedTuple):
    """One training that is asked for: its place in the comparison, its knobs, and its fingerprint."""

    block: Block
    arm: str
    seed: int
    config: TrainConfig
    fingerprint: str


class Comparison:
    """One comparison, run to its end: a Source for `drive`.

    cells: in the order in which to train; two of one fingerprint are trained once. `say` is told a line when a job ends.
    """

    def __init__(self, config: CompareConfig, cells: list[Cell], parent: Run, experiment: str, say: Callable[[str], object]):
        self.config, self.cells, self.parent, self.experiment, self.say = config, cells, parent, experiment, say
        self.trainings: Trainings[str] = Trainings()
        self.reused: set[str] = set()

    def recover(self) -> None:
        """Find what is there: this comparison's own runs, and anybody's that ended and have the fingerprint of one."""
        for child in search_runs({CHILD_OF: self.parent.id, "stage": "arm"}):
            if trained(child).state != "failed":  # for want of memory, say: that is tried again, as a divergence is not
                self.trainings.adopt(child.data.tags["fingerprint"], child)
        for fingerprint in {cell.fingerprint for cell in self.cells}:
            if not self.trainings.is_open(fingerprint):
                continue
            for record in search_runs({"fingerprint": fingerprint}):
                if trained(record).state in ("done", "diverged"):
                    self.trainings.adopt(fingerprint, record)
                    self.reused.add(fingerprint)
                    break

    @property
    def n_left(self) -> int:
        """Number of trainings still to be started or ended."""
        return len(self._open()) + len(self.trainings.running)

    @property
    def state(self) -> str:
        """How far it is, in words."""
        trainings = {cell.fingerprint: self.trainings.by_key.get(cell.fingerprint) for cell in self.cells}
        n_done = sum(training is not None and training.figures is not None for training in trainings.values())
        n_failed = sum(training is not None and bool(training.failed) for training in trainings.values())
        return f"{n_done} of {len(trainings)} trained" + (f", {n_failed} failed" if n_failed else "")

    def _open(self) -> dict[str, Cell]:
        cells: dict[str, Cell] = {}
        for cell in self.cells:
            if self.trainings.is_open(cell.fingerprint):
                cells.setdefault(cell.fingerprint, cell)
        return cells

    def next(self) -> Job | None:
        """Return the next training, or None where all are started."""
        cell = next(iter(self._open().values()), None)
        if cell is None:
            return None
        name = self.title(cell)
        run = self.trainings.again(cell.fingerprint)
        if run is None:
            tags = {"stage": "arm", "state": "RUNNING", "comparison": self.config.name, "arm": cell.arm, "seed": str(cell.seed)}
            tags |= {"setting": cell.block.setting} if cell.block.setting else {}
            run = create_run(name, self.experiment, cell.config, tags | {"fingerprint": cell.fingerprint}, self.parent.id)
        return self.trainings.job(cell.fingerprint, name, cell.config, run)

    def title(self, cell: Cell) -> str:
        """Return what a training is called, as in `diffeo mnist s3`."""
        return " ".join(filter(None, (cell.arm, short_name(cell.block.dataset), cell.block.setting, f"s{cell.seed}")))

    def epoch(self, job: Job, record: Record) -> bool:
        """Let it go on."""
        return True

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Close the run of a training that ended."""
        self.say(f"{job.key}: {self.trainings.ended(job, outcome)}")

    def table(self, block: Block) -> Table:
        """Return what came of each training in a block."""
        found: dict[str, dict[int, Trained]] = {arm: {} for arm in self.config.arms}
        for cell in self.cells:
            if cell.block == block:
                training = self.trainings.by_key.get(cell.fingerprint)
                try:
                    came = Trained(why="it was not started") if training is None else trained(find_run(training.run.id))
                except RunError as error:  # deleted since by another hand
                    came = Trained(why=str(error))
                found[cell.arm][cell.seed] = came
        return found
