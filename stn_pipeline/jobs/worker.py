"""What a worker does, wherever its process is: train a job, report each epoch, say how it ended."""

import time
import traceback
from collections.abc import Callable

import torch

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import RawData, Splits, prepare, read
from stn_pipeline.errors import DivergedError, RunError, UserError
from stn_pipeline.jobs.driver import Job, Outcome
from stn_pipeline.jobs.trial import mixed, run_trial, train_and_test
from stn_pipeline.tracking import Run, environment, is_away, is_unable, load_checkpoint, store, why_gone
from stn_pipeline.training import Checkpoint, Record
from stn_pipeline.training.device import resolve

Report = Callable[[Record], bool]  # tells the driver of an epoch; returns whether to go on


class _Stopped(Exception):
    """The driver wants this job no further."""


class LostError(Exception):
    """What a job needs of another machine cannot be had any more."""


def load_here(config: TrainConfig) -> RawData:
    """Return a data set from this machine's disk, in silence: the driver has said what there is to say."""
    return read(config, announce=lambda line: None)


class Worker:
    """A warm place for one job at a time: the libraries are loaded, the last data set stays in memory."""

    def __init__(self) -> None:
        self.environment = environment()
        self._data: tuple[object, Splits] | None = None
        torch.optim.Adam([torch.zeros(1)], fused=True)  # imports torch._dynamo, which takes seconds
        import sklearn.model_selection  # noqa: F401

    def perform(self, job: Job, device: str, report: Report, source: Callable[[TrainConfig], RawData] = load_here) -> Outcome:
        """Train a job to its end, whatever that is.

        device: as the knob names it.   source: where the images come from.
        """
        try:
            return self._train(job, device, report, source)
        except _Stopped:
            return Outcome("stopped")
        except (DivergedError, UserError) as error:
            return Outcome("failed", str(error))
        except LostError as error:
            return Outcome("lost", str(error))
        except Exception as error:
            if is_away(error):
                return Outcome("lost", f"MLflow at {store()} did not answer")
            if why := why_gone(error, job.run_id):
                return Outcome("failed", why)
            if out_of_memory(error):
                torch.cuda.empty_cache()
                return Outcome("failed", f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, OSError) or is_unable(error):  # a full disk, a locked store: nothing that the training did
                return Outcome("lost", told)
            return Outcome("bug", f"{told}\n{traceback.format_exc()}")

    def _train(self, job: Job, device_name: str, report: Report, source: Callable[[TrainConfig], RawData]) -> Outcome:
        started, training_s = time.perf_counter(), 0.0
        device = resolve(device_name, job.config.precision)
        splits = self._splits(job.config, device, source)
        run = Run(job.run_id)
        run.tag(self.environment)

        def watch(record: Record) -> None:
            nonlocal training_s
            training_s += record.seconds
            if not report(record):
                raise _Stopped

        resume = _checkpoint_of(job, splits)
        if resume is not None and job.resume != job.run_id:
            for earlier in resume.state.history:
                run.log_epoch(Record(**earlier))
                watch(Record(**earlier))
            training_s = 0.0
        if job.whole:
            last, scores = train_and_test(job.config, splits, run, resume=resume, watch=watch)
            figures = {f"test/{name}": float(scores[name]) for name in ("loss", "accuracy")}
        else:
            last, figures = run_trial(job.config, splits, run, resume=resume, watch=watch, lean=True), {}
        accuracies = [record["val_accuracy"] for record in last.state.history]
        figures |= {"val/loss": last.state.best_val_loss, "val/accuracy": max(accuracies), "best_epoch": last.state.best_epoch}
        figures["time/overhead_s"] = time.perf_counter() - started - training_s
        return Outcome("done", mixed(last), figures)

    def _splits(self, config: TrainConfig, device: torch.device, source: Callable[[TrainConfig], RawData]) -> Splits:
        key = (config.data, device)
        if self._data is None or self._data[0] != key:
            self._data = None  # so that two sets are never held at once
            self._data = key, prepare(source(config), config, device)
        return self._data[1]


def _checkpoint_of(job: Job, splits: Splits) -> Checkpoint | None:
    """Return what to go on from, or None where there is nothing that fits these knobs and data."""
    if not job.resume:
        return None
    try:
        checkpoint = load_checkpoint(job.resume)
    except RunError:
        return None
    same_knobs = checkpoint.config.learning_knobs() == job.config.learning_knobs()
    return checkpoint if same_knobs and checkpoint.digests == splits.digests() else None


def out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory ran out, on the CPU or on a GPU."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
