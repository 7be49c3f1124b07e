"""A pool that trains at once, for tests of what drives it: each job plays a part, and nothing is computed."""

import math
from collections.abc import Callable, Iterator

from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs import Job, Outcome
from stn_pipeline.tracking import Run
from stn_pipeline.training import Record

News = Iterator[Record | Outcome]


class Killed(BaseException):
    """The driver's process is gone: nothing that it would have done at the end is done."""


def loss_of(config: TrainConfig) -> float:
    return abs(math.log10(config.lr) + 2.5) + 0.1


def record(number: int, val_loss: float, val_accuracy: float = 0.5) -> Record:
    nothing = dict.fromkeys(("shift", "outside", "log_det", "folded"), math.nan)
    return Record(number, val_loss, val_accuracy, val_loss, val_accuracy, seconds=0.1, images_per_s=1.0, trouble="", **nothing)


def test_figures(config: TrainConfig) -> dict[str, float]:
    loss = loss_of(config) + 0.01 * config.seed * config.lr
    return {"test/loss": loss, "test/accuracy": 0.9 - 0.1 * loss}


test_figures.__test__ = False  # type: ignore[attr-defined]


def trained(job: Job) -> News:
    """Do what a worker does: best in the epoch before the last; of a final training, the test split too."""
    loss = loss_of(job.config)
    for number, more in enumerate((0.2, 0.0, 0.1), 1):
        if job.whole:
            Run(job.run_id).log_metrics({"val/loss": loss + more}, number)
        yield record(number, loss + more)
    figures = {"val/loss": loss, "val/accuracy": 0.5, "best_epoch": 2, "time/overhead_s": 0.5}
    if job.whole:
        figures |= test_figures(job.config)
        Run(job.run_id).log_metrics(test_figures(job.config))
    yield Outcome("done", figures=figures)


def ends(*news: Record | Outcome | BaseException) -> Callable[[Job], News]:
    """Return a training that tells just this, and raises what is to be raised where the driver waits for it."""

    def train(job: Job) -> News:
        for each in news:
            if isinstance(each, BaseException):
                raise each
            yield each

    return train


DONE = Outcome("done", figures={"val/loss": 0.5, "val/accuracy": 0.5, "best_epoch": 1, "time/overhead_s": 0.5})
LOST = ends(record(1, 0.5), Outcome("lost", "worker 7 ended with exit code -9"))
FAILED = ends(Outcome("failed", "training loss is nan at epoch 1, step 3 of 21, lr=0.1"))
BUG = ends(record(1, 0.5), Outcome("bug", "ZeroDivisionError: division by zero\nTraceback:\n  File x\n"))


class FakePool:
    """Runs each job by what stands in `plays` under a part of its key, otherwise as `trained`; the jobs take turns."""

    def __init__(self, plays: dict[str, Callable[[Job], News]] | None = None, n_workers: int = 1):
        self.plays, self.n_workers = plays or {}, n_workers
        self.running: dict[str, tuple[Job, News]] = {}
        self.jobs: list[Job] = []
        self.told: list[str] = []
        self.killed = self.closed = False

    @property
    def n_free(self) -> int:
        return self.n_workers - len(self.running)

    def submit(self, job: Job) -> None:
        play = next((play for part, play in self.plays.items() if part in job.key), trained)
        self.running[job.key] = job, play(job)
        self.jobs.append(job)
        self.told.append(f"start {job.key}")

    def wait(self, timeout_s: float) -> list[tuple[Job, Record | Outcome]]:
        for key in list(self.running)[:1]:
            job, news = self.running.pop(key)
            try:
                what = next(news)
            except Killed:
                self.killed = True
                raise
            if isinstance(what, Record):
                self.running[key] = job, news
            else:
                self.told.append(f"end {key}")
            return [(job, what)]
        return []

    def answer(self, job: Job, go_on: bool) -> None:
        if not go_on:
            self.running[job.key] = job, iter([Outcome("stopped")])

    def close(self) -> None:
        self.closed = True
        if self.killed:
            raise Killed
