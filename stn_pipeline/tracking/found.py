"""Runs found again: records, metrics, files and checkpoints."""

import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import mlflow
import psutil
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PROJECT_ENTRY_POINT

from stn_pipeline.errors import RunError, StoreError
from stn_pipeline.locks import HeldError, held, lock_path
from stn_pipeline.tracking.away import first_line, insist, is_away, tell
from stn_pipeline.tracking.where import knock, store
from stn_pipeline.training import Checkpoint, checkpoint

CHECKPOINTS = "checkpoint"
HEARTBEAT, HEARTBEAT_S = "system/system_memory_usage_megabytes", 60.0  # which MLflow logs of a training every 10 s
RunRecord: TypeAlias = MlflowRun  # a run as it was when the store was asked


def search_runs(tags: dict[str, str]) -> list[RunRecord]:
    """Return the runs that have all of these tags, oldest first, from every experiment."""
    return _search(" and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items()))


def filter_runs(words: str) -> list[RunRecord]:
    """Return the runs that match an MLflow filter, oldest first, from every experiment.

    Raises: RunError where the filter is not one, or the store does not answer.
    """
    knock()
    try:
        return _search(words)
    except (MlflowException, StoreError) as error:
        raise RunError(f"runs={words}: {first_line(error)}; write as in params.dataset = 'mnist' and params.epochs = '5'") from error


def dead_runs() -> list[RunRecord]:
    """Return the runs that are RUNNING though their process, on this machine, is dead."""
    here = _search(f"attributes.status = 'RUNNING' and tags.process LIKE '{socket.gethostname()} %'")
    return [run for run in here if not living_trainer(run)]


def _search(words: str) -> list[RunRecord]:
    found: list[RunRecord] = insist(
        mlflow.search_runs,
        search_all_experiments=True,
        filter_string=words,
        order_by=["attributes.start_time ASC"],
        max_results=50_000,
        output_format="list",
    )
    return found


def data_digests(record: RunRecord) -> dict[str, str]:
    """Return the checksum of each split that a run was trained and scored on, by the split's name; empty where it has none yet."""
    inputs = record.inputs.dataset_inputs if record.inputs is not None else []
    found = {}
    for one in inputs:
        context = next((tag.value for tag in one.tags if tag.key == MLFLOW_DATASET_CONTEXT), "")
        found[context] = str(one.dataset.digest)
    return found


def read_file(run_id: str, path: str) -> bytes | None:
    """Return an artifact of a run, or None where it cannot be had."""
    with tempfile.TemporaryDirectory() as folder, suppress(MlflowException, OSError):
        return Path(download_artifacts(run_id=run_id, artifact_path=path, dst_path=folder)).read_bytes()
    return None


def metric_by_epoch(run_id: str, name: str) -> dict[int, float]:
    """Return a metric by step; of two values at one step, the later one."""
    return {point.step: float(point.value) for point in _history(run_id, name)}


def metric_history(run_id: str, name: str) -> list[tuple[float, float]]:
    """Return when (seconds since 1970) a metric was logged, and its value."""
    return [(point.timestamp / 1000, float(point.value)) for point in _history(run_id, name)]


def _history(run_id: str, name: str) -> list[Metric]:
    points: list[Metric] = insist(mlflow.MlflowClient().get_metric_history, run_id, name)
    return points


def find_run(run_id: str) -> RunRecord:
    """Return a run.

    Raises: RunError if the store does not answer, has no such run, or it is deleted.
    """
    try:
        run = insist(mlflow.get_run, run_id)
    except (MlflowException, StoreError) as error:
        raise RunError(
            f"run {run_id}: not to be had from {store()}: {first_line(error)}; copy the id from the run's page, or set MLFLOW_TRACKING_URI"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise RunError(f"run {run_id}: it is deleted: restore it with `mlflow runs restore --run-id {run_id}`")
    return run


def why_gone(error: BaseException, run_id: str) -> str:
    """Say so where a run cannot be written to because another hand has deleted it meanwhile; else nothing.

    error: what writing to it raised.
    """
    if not isinstance(error, (MlflowException, StoreError)) or is_away(error):
        return ""
    try:
        deleted = mlflow.get_run(run_id).info.lifecycle_stage == "deleted"
    except MlflowException as why:
        deleted = why.error_code == "RESOURCE_DOES_NOT_EXIST"
    return f"run {run_id} was deleted meanwhile" if deleted else ""


@contextmanager
def unless_gone(run_id: str) -> Iterator[None]:
    """Write to a run inside the block, or leave it where another hand has deleted it meanwhile."""
    try:
        yield
    except (MlflowException, StoreError) as error:
        if not why_gone(error, run_id):
            raise


def load_checkpoint(run_id: str) -> Checkpoint:
    """Return the newest whole checkpoint of a run.

    Raises: RunError if there is none.
    """
    run = find_run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = list(Path(download_artifacts(run_id=run.info.run_id, artifact_path=CHECKPOINTS, dst_path=folder)).glob("*.pt"))
        except (MlflowException, OSError):
            paths = []
        newest = checkpoint.load_newest(paths)
    if newest is None:
        raise RunError(f"run {run_id}: has no whole checkpoint: name a training run that finished an epoch")
    return newest


def is_complete(record: RunRecord, *, tested: bool = True) -> bool:
    """Say whether a training is done: closed so, and with its test scores, which come after its last epoch.

    tested: whether it has test scores at all; without, the best of its validation scores is what its driver logs last.

    Not by its status alone, which `mlflow run`, the UI or a store that went away meanwhile may have set.
    """
    last = {"test/loss", "test/accuracy"} if tested else {"best/val/loss"}
    return bool(record.info.status == "FINISHED" and last <= record.data.metrics.keys())


def made_for_us() -> RunRecord | None:
    """Return the run that `mlflow run` made for this process, or None where there is none.

    A MLFLOW_RUN_ID that is left over from another run is told of and dropped: MLflow would write over that run.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        return None
    try:
        run: RunRecord = insist(mlflow.get_run, run_id)
        tags = run.data.tags
        wrong = {
            "is deleted": run.info.lifecycle_stage == "deleted",
            f"is {run.info.status}": run.info.status != "RUNNING",
            "holds results": bool(run.data.metrics) or "process" in tags,
            "was not made by `mlflow run`": MLFLOW_PROJECT_ENTRY_POINT not in tags,
        }
        why = next((what for what, holds in wrong.items() if holds), "")
    except StoreError:
        why = f"is not in {store()}"
    if not why:
        return run
    tell(f"warning: MLFLOW_RUN_ID={run_id} is left over from another run, which {why}: a new run is made")
    del os.environ["MLFLOW_RUN_ID"]
    return None


@contextmanager
def only_trainer(run_id: str) -> Iterator[None]:
    """Hold a run for as long as this process trains it.

    Raises: RunError where another process of this user and machine does.
    """
    try:
        with held(lock_path(f"run-{hashlib.sha256(run_id.encode()).hexdigest()[:32]}")):
            yield
    except HeldError as error:
        raise _trained_by(run_id, str(error)) from error


def _trained_by(run_id: str, whom: str) -> RunError:
    return RunError(f"resume={run_id}: {whom} is still training it: wait, or stop that process first")


@contextmanager
def resuming(run_id: str) -> Iterator[None]:
    """Hold a run that is to go on.

    Raises: RunError if it is complete, or another process is still training it.
    """
    knock()
    if made_for_us() is not None:
        raise RunError(f"resume={run_id}: `mlflow run` always makes a new run: use python -m stn_pipeline.train --resume {run_id}")
    with only_trainer(run_id):
        run = find_run(run_id)
        if is_complete(run):
            raise RunError(f"resume={run_id}: the run is finished, nothing is left to train: start a new one with more epochs")
        if run.info.status == "RUNNING" and (whom := living_trainer(run)):
            raise _trained_by(run_id, whom)
        yield


def living_trainer(run: RunRecord) -> str:
    """Return which process writes to a run that is RUNNING, or nothing where it is dead.

    Of another machine's process nothing is known but what it logged: it is taken for alive for a minute after that.
    """
    host, _, process = run.data.tags.get("process", "").partition(" ")
    pid, _, born = process.partition(" ")
    if host == socket.gethostname() and pid.isdecimal():
        with suppress(psutil.NoSuchProcess):
            if str(psutil.Process(int(pid)).create_time()) == born:
                return f"process {pid}"
        return ""
    silent_s = time.time() - max((when for when, _ in metric_history(run.info.run_id, HEARTBEAT)), default=0.0)
    return f"{host} process {pid}, heard {max(silent_s, 0):.0f} s ago," if host and silent_s < HEARTBEAT_S else ""
