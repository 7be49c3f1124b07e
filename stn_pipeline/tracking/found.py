"""Runs found again: records, metrics, files and checkpoints."""

import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import mlflow
import psutil
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from stn_pipeline.errors import RunError
from stn_pipeline.tracking.away import first_line
from stn_pipeline.tracking.where import knock, store
from stn_pipeline.training import Checkpoint, checkpoint

CHECKPOINTS = "checkpoint"
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
    except MlflowException as error:
        raise RunError(f"runs={words}: {first_line(error)}; write as in params.dataset = 'mnist' and metrics.test/loss < 1") from error


def _search(words: str) -> list[RunRecord]:
    found: list[RunRecord] = mlflow.search_runs(
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
    return {point.step: float(point.value) for point in mlflow.MlflowClient().get_metric_history(run_id, name)}


def metric_history(run_id: str, name: str) -> list[tuple[float, float]]:
    """Return when (seconds since 1970) a metric was logged, and its value."""
    return [(point.timestamp / 1000, float(point.value)) for point in mlflow.MlflowClient().get_metric_history(run_id, name)]


def find_run(run_id: str) -> RunRecord:
    """Return a run.

    Raises: RunError if the store does not answer, has no such run, or it is deleted.
    """
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        raise RunError(
            f"run {run_id}: not to be had from {store()}: {first_line(error)}; copy the id from the run's page, or set MLFLOW_TRACKING_URI"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise RunError(f"run {run_id}: it is deleted: restore it with `mlflow runs restore --run-id {run_id}`")
    return run


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


def check_resumable(run_id: str) -> None:
    """Check that a run may go on.

    Raises: RunError if it is finished, is still being trained on this machine, or `mlflow run` has made another run for us.
    """
    knock()
    run = find_run(run_id)
    if "MLFLOW_RUN_ID" in os.environ:
        raise RunError(f"resume={run_id}: `mlflow run` always makes a new run: use python -m stn_pipeline.train --resume {run_id}")
    if run.info.status == "FINISHED":
        raise RunError(f"resume={run_id}: the run is finished, nothing is left to train: start a new one with more epochs")
    host, _, process = run.data.tags.get("process", "").partition(" ")
    pid, _, born = process.partition(" ")
    if run.info.status == "RUNNING" and host == socket.gethostname() and pid.isdecimal() and psutil.pid_exists(int(pid)):
        if str(psutil.Process(int(pid)).create_time()) == born:
            raise RunError(f"resume={run_id}: process {pid} is still training it: wait, or stop that process first")
