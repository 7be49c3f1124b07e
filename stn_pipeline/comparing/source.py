"""A comparison as a source of jobs: a training for each arm, seed, data set and setting that no run has answered yet.

Where the data are looked at several times, an arm that is decided at a look is trained no further, nor is its block's baseline
once all of its arms are.
"""

from collections.abc import Callable
from typing import NamedTuple

from stn_pipeline.comparing.arms import Table, Trained
from stn_pipeline.comparing.comparefile import Block, CompareConfig
from stn_pipeline.comparing.trained import trained
from stn_pipeline.comparing.verdicts import decide
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
        self.look = 1
        self._n_seeds: dict[tuple[Block, str], int] = {}  # of arms that are decided: after how many seeds
        self._place = {seed: i for i, seed in enumerate(config.seeds.values)}

    @property
    def blocks(self) -> list[Block]:
        """Every data set under every setting."""
        return list(dict.fromkeys(cell.block for cell in self.cells))

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
        trainings = {cell.fingerprint: self.trainings.by_key.get(cell.fingerprint) for cell in self._wanted()}
        n_done = sum(training is not None and training.figures is not None for training in trainings.values())
        n_failed = sum(training is not None and bool(training.failed) for training in trainings.values())
        at_look = f", look {self.look} of {len(self.config.seeds.looks)}" if self.config.seeds.looks else ""
        return f"{n_done} of {len(trainings)} trained" + (f", {n_failed} failed" if n_failed else "") + at_look

    def _wanted(self) -> list[Cell]:
        """Return the trainings that the looks up to this one need."""
        most = self.config.seeds.at_looks[self.look - 1]
        return [cell for cell in self.cells if self._place[cell.seed] < min(most, self._needed(cell.block, cell.arm))]

    def _needed(self, block: Block, arm: str) -> int:
        """Return how many seeds an arm needs at most, as far as is known."""
        every, baseline = len(self.config.seeds.values), self.config.baseline
        if arm != baseline:
            return self._n_seeds.get((block, arm), every)
        return max(self._n_seeds.get((block, other), every) for other in self.config.arms if other != baseline)

    def _open(self) -> dict[str, Cell]:
        cells: dict[str, Cell] = {}
        for cell in self._wanted():
            if self.trainings.is_open(cell.fingerprint):
                cells.setdefault(cell.fingerprint, cell)
        return cells

    def next(self) -> Job | None:
        """Return the next training, or None where all are started."""
        self.take_looks()
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

    def take_looks(self) -> None:
        """Where all that this look needs has ended, decide, and go on to the next one unless every arm is decided."""
        looks = self.config.seeds.looks
        while self.look < len(looks) and not self._open() and not self.trainings.running:
            blocks = self.blocks
            tables = [self.table(block) for block in blocks]
            verdicts = decide(tables, self.config.baseline, self.config.rules, self.config.seeds.values, self.look)
            undecided = []
            for block, by_arm in zip(blocks, verdicts, strict=True):
                for arm, verdict in by_arm.items():
                    if verdict.is_decided:
                        self._n_seeds.setdefault((block, arm), looks[self.look - 1])
                    else:
                        undecided.append(arm if len(blocks) == 1 else f"{arm} ({block.title})")
            told = f"look {self.look} of {len(looks)}, {looks[self.look - 1]} seeds"
            if not undecided:
                self.say(f"{told}: every arm is decided; {looks[-1] - looks[self.look - 1]} seeds are saved")
                return
            self.say(f"{told}: not decided yet: {', '.join(undecided)}; going on to {looks[self.look]} seeds")
            self.look += 1

    def table(self, block: Block) -> Table:
        """Return what came of each training in a block, of those that were wanted."""
        found: dict[str, dict[int, Trained]] = {arm: {} for arm in self.config.arms}
        for cell in self._wanted():
            if cell.block == block:
                training = self.trainings.by_key.get(cell.fingerprint)
                try:
                    came = Trained(why="it was not started") if training is None else trained(find_run(training.run.id))
                except RunError as error:  # deleted since by another hand
                    came = Trained(why=str(error))
                found[cell.arm][cell.seed] = came
        return found
