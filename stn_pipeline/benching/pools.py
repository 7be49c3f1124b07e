"""Trainings that cost a fixed time and no processor, so that what is left over is the driver's, the pool's and the store's."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from stn_pipeline import tracking
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import RawData
from stn_pipeline.jobs import Job, Outcome, Report, Source, Worker, drive, place
from stn_pipeline.jobs.driver import Pool
from stn_pipeline.questions import Question
from stn_pipeline.search.source import Search
from stn_pipeline.search.study import Study
from stn_pipeline.search.sweepfile import SweepConfig
from stn_pipeline.tracking import Run
from stn_pipeline.training import Record

EPOCHS, EPOCH_S = 5, 0.6
T = TypeVar("T")
UNKNOWN = dict.fromkeys(("train_loss", "train_accuracy", "shift", "outside", "log_det", "folded"), math.nan)


class Sleeper(Worker):
    """Sleeps through each epoch; logs and reports it as a training does."""

    def _train(self, job: Job, device_name: str, report: Report, source: Callable[[TrainConfig], RawData]) -> Outcome:
        run = Run(job.run_id)
        run.tag(self.environment)
        for number in range(1, job.config.epochs + 1):
            time.sleep(EPOCH_S)
            record = Record(number, val_loss=job.config.lr, val_accuracy=0.5, seconds=EPOCH_S, images_per_s=1.0, trouble="", **UNKNOWN)
            run.log_epoch(record)
            report(record)
        return Outcome("done", figures={"val/loss": job.config.lr, "best_epoch": 1})


@dataclass
class Taken:
    """Seconds of a study: from its first start to its last end, and those of the driver's own work."""

    wall_s: float = 0.0
    driver_s: float = 0.0


def drive_sleepers(ray: str, n_workers: int, n_trials: int) -> Taken:
    """Run a study of so many trials on warm workers."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, here)
        asked = Question.parse({"name": "bench", "workers": n_workers, "ray": ray})
        somewhere = stack.enter_context(place(asked, lambda line: None))
        pool = somewhere.pool(None, Sleeper)
        stack.callback(pool.close)
        while pool.n_free < n_workers:
            pool.wait(0.1)
        _drive("warm", n_workers, pool)
        return _drive("timed", n_trials, pool)


def _drive(name: str, n_trials: int, pool: Pool) -> Taken:
    keys = {"name": name, "search": ["lr"], "datasets": "digits", "trials": n_trials, "pruner": "none", "final": 0}
    sweep = SweepConfig.parse(keys | {"train": {"epochs": EPOCHS}})
    experiment = tracking.experiment_id()
    parent = tracking.create_run(name, experiment, sweep, {})
    search = Search(Study("sqlite:///study.db", name, sweep, "digits", {}), parent, experiment, "digits", lambda line: None)
    taken, started = Taken(), time.perf_counter()
    drive(_Clocked(search, taken), pool)
    taken.wall_s = time.perf_counter() - started
    return taken


class _Clocked:
    """A source whose own work is timed."""

    def __init__(self, source: Source, taken: Taken):
        self.source, self.taken = source, taken

    def _clocked(self, call: Callable[..., T], *arguments: Any) -> T:
        started = time.perf_counter()
        answer = call(*arguments)
        self.taken.driver_s += time.perf_counter() - started
        return answer

    def next(self) -> Job | None:
        return self._clocked(self.source.next)

    def epoch(self, job: Job, record: Record) -> bool:
        return self._clocked(self.source.epoch, job, record)

    def ended(self, job: Job, outcome: Outcome) -> None:
        self._clocked(self.source.ended, job, outcome)
