"""The driver's loop: hand jobs to a pool, hear what becomes of them, tell it on. It knows neither studies nor statistics.

A source says which job comes next and what an epoch or an end means; a pool runs jobs somewhere. Only the driver's
process touches the source, so whatever that owns (a study, the closing of runs) has one writer.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import StnError
from stn_pipeline.interrupts import ignore_signals, uninterrupted
from stn_pipeline.texts import printable
from stn_pipeline.tracking import in_a_hurry, is_away
from stn_pipeline.training import Record

POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One training: which knobs, into which run.

    key: its name among the jobs of a drive.   whole: score the test split too, and log pictures and the model.
    resume: nothing, or the run whose newest checkpoint to go on from, where that has these knobs and data.
    """

    key: str
    run_id: str
    config: TrainConfig
    whole: bool = False
    resume: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: why, where it was not simply done, and its figures.

    stopped: the source said so.   failed: diverged, out of memory, knobs that do not fit, or its run was deleted.
    crashed: its process died of itself.   lost: for want of what it needs (its node, MLflow, a disk that answers); both are tried again.
    bug: our code broke, the traceback follows the first line.   interrupted: the driver itself was stopped.
    """

    kind: Literal["done", "stopped", "failed", "crashed", "lost", "bug", "interrupted"]
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)


class Source(Protocol):
    """Where jobs come from and where news of them goes."""

    def next(self) -> Job | None:
        """Return a job to start now, its run created, or None where there is none at present."""

    def epoch(self, job: Job, record: Record) -> bool:
        """Hear of an epoch; say whether the job shall go on."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Hear how a job ended; close its run."""


class Pool(Protocol):
    """Where jobs run."""

    @property
    def n_free(self) -> int:
        """Number of jobs that could start at once."""

    def submit(self, job: Job) -> None:
        """Start a job."""

    def wait(self, timeout_s: float) -> list[tuple[Job, Record | Outcome]]:
        """Return what has happened, at the latest after `timeout_s`; every Record is to be answered."""

    def answer(self, job: Job, go_on: bool) -> None:
        """Let a job that reported an epoch go on, or stop it."""

    def close(self) -> None:
        """Stop all workers at once."""


class JobError(StnError):
    """A job broke in our own code; its traceback is told too, so it has many lines."""

    def __str__(self) -> str:
        return "\n".join(map(printable, Exception.__str__(self).split("\n")))


def drive(source: Source, pool: Pool, beat: Callable[[], object] = lambda: None) -> None:
    """Run jobs until the source has none left and all have ended; `beat` is called about twice a second.

    Raises: JobError when a job breaks. Whatever stops the drive, every job that still runs ends interrupted.
    """
    running: dict[str, Job] = {}
    beaten = 0.0
    try:
        while True:
            exhausted = False
            while pool.n_free and not exhausted:
                with uninterrupted():
                    job = source.next()
                    exhausted = job is None
                    if job is not None:
                        running[job.key] = job
                        pool.submit(job)
            if exhausted and not running:
                return
            for job, news in pool.wait(POLL_S):
                if isinstance(news, Record):
                    pool.answer(job, source.epoch(job, news))
                    continue
                with uninterrupted():
                    del running[job.key]
                    source.ended(job, news)
                if news.kind == "bug":
                    raise JobError(f"{job.key} broke: {news.reason}")
            if time.monotonic() > beaten + POLL_S:
                beat()
                beaten = time.monotonic()
    except BaseException as error:
        ignore_signals()
        pool.close()
        if not is_away(error):
            _interrupt(source, running.values())
        raise


def _interrupt(source: Source, jobs: Iterable[Job]) -> None:
    """Tell that jobs were stopped; what cannot be told now, the next driver finds out: the error to hear of is the first one."""
    with in_a_hurry():
        for job in jobs:
            try:
                source.ended(job, Outcome("interrupted", "the driver was stopped"))
            except Exception as error:
                if is_away(error):
                    return
