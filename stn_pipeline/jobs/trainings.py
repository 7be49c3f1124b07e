"""Whole trainings, each wanted once: its run made or found again, closed, gone on with where it was lost or interrupted."""

from collections.abc import Hashable
from dataclasses import dataclass
from math import nan
from typing import Any, Generic, TypeVar

from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs.driver import Job, Outcome
from stn_pipeline.tracking import Run, RunRecord, is_complete, only_trainer

MAX_LOSSES = 2
BEST_VAL = "best/val/loss"

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Training:
    """One training with one seed: in which run; test/loss and more when it is done; how often it was lost; why it failed."""

    run: Run
    figures: dict[str, float] | None = None
    n_lost: int = 0
    failed: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it is not to be tried any more."""
        return self.figures is not None or bool(self.failed) or self.n_lost >= MAX_LOSSES


class Trainings(Generic[Key]):
    """The trainings of a question by key, and those of them that run now."""

    def __init__(self) -> None:
        self.by_key: dict[Key, Training] = {}
        self.running: dict[str, Key] = {}

    def adopt(self, key: Key, record: RunRecord) -> None:
        """Take over a run that an earlier driver made, with what came of it.

        Raises: RunError where `train --resume` is going on with it.
        """
        metrics, status = record.data.metrics, record.info.status
        run = Run(record.info.run_id)
        figures = metrics | {"val/loss": metrics.get(BEST_VAL, nan)} if is_complete(record) else None
        failed = record.data.tags.get("error", "") if status == "FAILED" else ""
        self.by_key[key] = Training(run, figures, failed=failed)
        if status == "RUNNING":  # it may be wanted no more; else it is opened again
            with only_trainer(run.id):  # unless somebody goes on with it by --resume just now
                run.close("KILLED")

    def is_open(self, key: Key) -> bool:
        """Say whether a training is still to be started: it is neither over nor running."""
        return key not in self.running.values() and not (key in self.by_key and self.by_key[key].is_over)

    def again(self, key: Key) -> Run | None:
        """Return the run to go on in, open, or None where there is none yet."""
        if key not in self.by_key:
            return None
        self.by_key[key].run.reopen()
        return self.by_key[key].run

    def job(self, key: Key, name: str, config: TrainConfig, run: Run) -> Job:
        """Return the job that trains it in this run."""
        known = key in self.by_key
        if not known:
            self.by_key[key] = Training(run)
        self.running[name] = key
        return Job(name, run.id, config, whole=True, resume=run.id if known else "")

    def ended(self, job: Job, outcome: Outcome) -> str:
        """Close the run of a job that ended; return how, in words."""
        work = self.by_key[self.running.pop(job.key)]
        if outcome.kind == "done":
            work.figures = outcome.figures
            work.run.log_metrics(times(outcome) | {BEST_VAL: outcome.figures["val/loss"]})
            work.run.tag({"state": "COMPLETE"})
            work.run.close("FINISHED")
            return f"test/loss {outcome.figures['test/loss']:.4f}, test/accuracy {outcome.figures['test/accuracy']:.4f}"
        work.run.tag({"state": "FAIL"})
        if outcome.kind == "failed":
            work.failed = outcome.reason
            work.run.fail(outcome.reason)
            work.run.close("FAILED")
            return f"failed: {outcome.reason}"
        work.n_lost += outcome.kind == "lost"
        work.run.close("KILLED")
        return f"lost: {outcome.reason.splitlines()[0]}"


def times(outcome: Outcome) -> dict[str, Any]:
    """Return the durations among an outcome's figures."""
    return {name: value for name, value in outcome.figures.items() if name.startswith("time/")}
