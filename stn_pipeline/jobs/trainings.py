"""Whole trainings, each wanted once: its run made or found again, closed, gone on with where it was lost or interrupted."""

from collections.abc import Hashable
from dataclasses import dataclass
from math import nan
from typing import Any, Generic, TypeVar

from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs.driver import Job, Outcome
from stn_pipeline.tracking import Run, RunRecord, is_complete, only_trainer, unless_gone

MAX_LOSSES = 2
VAL = ("val/loss", "val/accuracy")  # of a training, the best over its epochs; kept on its run under best/
TEST = ("test/loss", "test/accuracy")

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Training:
    """One training with one seed: in which run; its figures when it is done; why it failed.

    figures: the best val/loss and val/accuracy over the epochs; of a whole training test/loss and test/accuracy too.
    n_lost: how often it was lost, in whatever way; n_crashed: of that, how often its process died of itself.
    """

    run: Run
    figures: dict[str, float] | None = None
    n_lost: int = 0
    n_crashed: int = 0
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

    def adopt(self, key: Key, record: RunRecord, *, tested: bool = True) -> None:
        """Take over a run that an earlier driver made, with what came of it; `tested`: whether its job scores the test split.

        Raises: RunError where `train --resume` is going on with it.
        """
        metrics, status = record.data.metrics, record.info.status
        run = Run(record.info.run_id)
        done = is_complete(record, tested=tested)
        figures = metrics | {name: metrics.get(f"best/{name}", nan) for name in VAL} if done else None
        failed = record.data.tags.get("error", "") if status == "FAILED" else ""
        self.by_key[key] = Training(run, figures, failed=failed)
        if status == "RUNNING":  # it may be wanted no more; else it is opened again
            with only_trainer(run.id):  # unless somebody goes on with it by --resume just now
                run.close("KILLED")

    def is_open(self, key: Key) -> bool:
        """Say whether a training is still to be started: it is neither over nor running."""
        return key not in self.running.values() and not (key in self.by_key and self.by_key[key].is_over)

    def again(self, key: Key) -> Run | None:
        """Return the run to go on in, open, or None where there is none, yet or any more."""
        if key not in self.by_key:
            return None
        run = self.by_key[key].run
        with unless_gone(run.id):
            run.reopen()
            return run
        del self.by_key[key]
        return None

    def job(self, key: Key, name: str, config: TrainConfig, run: Run, whole: bool = True) -> Job:
        """Return the job that trains it in this run; one that is not `whole` does not read the test split."""
        known = key in self.by_key
        if not known:
            self.by_key[key] = Training(run)
        self.running[name] = key
        return Job(name, run.id, config, whole=whole, resume=run.id if known else "")

    def ended(self, job: Job, outcome: Outcome) -> str:
        """Close the run of a job that ended, where it is still there; return how, in words.

        One whose process died by itself each time it was tried, as of a segmentation fault or of all memory taken, has
        collapsed: that is what came of it, as a divergence is. What was lost with its node, say, is missing.
        """
        work, tags = self.by_key[self.running.pop(job.key)], {"state": "FAIL"}
        work.n_lost += outcome.kind in ("lost", "crashed")
        work.n_crashed += outcome.kind == "crashed"
        if outcome.kind == "done":
            work.figures = outcome.figures
            with unless_gone(work.run.id):
                work.run.log_metrics(times(outcome) | {f"best/{name}": outcome.figures[name] for name in VAL})
                work.run.tag({"state": "COMPLETE"})
                work.run.close("FINISHED")
            told = ", ".join(f"{name} {outcome.figures[name]:.4f}" for name in (TEST if job.whole else VAL))
            return told + outcome.reason
        if outcome.kind == "failed":
            work.failed = outcome.reason
        elif work.n_crashed >= MAX_LOSSES:
            work.failed = f"its process died twice: {outcome.reason}"
            tags |= {"collapsed": "true", "crashed": "true", "collapsed.why": work.failed}
        with unless_gone(work.run.id):
            work.run.tag(tags)
            if work.failed:
                work.run.fail(work.failed)
            work.run.close("FAILED" if work.failed else "KILLED")
        return f"failed: {work.failed}" if work.failed else f"lost: {outcome.reason.splitlines()[0]}"

    def give_up(self, key: Key, reason: str) -> None:
        """Close a training that was lost as often as is forgiven, for good: a later driver does not try it again."""
        self.by_key[key].failed = reason
        self.by_key[key].run.fail(reason)
        self.by_key[key].run.close("FAILED")


def times(outcome: Outcome) -> dict[str, Any]:
    """Return the durations among an outcome's figures."""
    return {name: value for name, value in outcome.figures.items() if name.startswith("time/")}
