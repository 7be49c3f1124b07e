"""MLflow, and nothing else imports it: start, resume and finish runs; log epochs, scores, figures and the model.

The store is wherever MLflow itself looks (MLFLOW_TRACKING_URI, or mlflow.db beside mlruns/); this file never sets it.
"""

import logging
import os
import platform
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mlflow
import mlflow.pytorch
import numpy as np
import psutil
import torch
import yaml
from mlflow.artifacts import download_artifacts
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from stn_pipeline import __version__
from stn_pipeline.config import Knobs
from stn_pipeline.data import Splits
from stn_pipeline.errors import RunError, StnError
from stn_pipeline.model import Network
from stn_pipeline.training import Checkpoint, Record, checkpoint

EXPERIMENT = "stn"
CHECKPOINTS = "checkpoint"

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def _artifacts_without_a_server(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of an mlflow-artifacts URI, reading and writing the server's own folder where none is asked.

    A UI that was opened before the first run gives the experiment Default an artifact location that only it can
    resolve, and `mlflow run` puts its runs there. Beside a SQLite store that location is the folder mlartifacts/.
    """
    store = tracking_uri or mlflow.get_tracking_uri()
    if not store.startswith("sqlite:///"):
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)
    folder = Path(store.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
    return LocalArtifactRepository(str(folder / unquote(artifact_uri.removeprefix("mlflow-artifacts:").lstrip("/"))))


artifact_repository_registry._artifact_repository_registry.register("mlflow-artifacts", _artifacts_without_a_server)


class Run:
    """One open MLflow run."""

    def __init__(self, run_id: str):
        self.id = run_id
        self._collapsed = False

    def log_epoch(self, record: Record, warps: np.ndarray | None) -> None:
        """Log an epoch's metrics in one call, step = epoch from 1, and its strip of warps (H, W, 3) uint8."""
        metrics = {
            "train/loss": record.train_loss,
            "train/accuracy": record.train_accuracy,
            "val/loss": record.val_loss,
            "val/accuracy": record.val_accuracy,
            "time/epoch_s": record.seconds,
            "speed/images_per_s": record.images_per_s,
        }
        if warps is not None:
            metrics |= {
                "warp/shift": record.shift,
                "warp/outside": record.outside,
                "warp/log_det": record.log_det,
                "warp/folded": record.folded,
            }
            mlflow.log_image(warps, key="warps", step=record.number)
        mlflow.log_metrics(metrics, step=record.number)
        if record.trouble:
            mlflow.set_tags({"collapsed": "true", "collapsed.why": f"epoch {record.number}: {record.trouble}"})
        elif self._collapsed:
            mlflow.set_tag("collapsed", "recovered")
        self._collapsed = bool(record.trouble)

    def log_checkpoint(self, content: Checkpoint) -> None:
        """Keep the state after a whole epoch: two files in turn, so that a kill in mid-write leaves the one before."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("even.pt" if content.state.epoch % 2 == 0 else "odd.pt")
            checkpoint.save(content, path)
            mlflow.log_artifact(str(path), CHECKPOINTS)

    def log_scores(self, split: str, scores: dict[str, Any], model_id: str | None = None) -> None:
        """Log a split's scores, as training.report gives them: metrics, and report.json."""
        metrics = {f"{split}/{name}": scores[name] for name in ("loss", "accuracy", "calibration_error")}
        mlflow.log_metrics(metrics, model_id=model_id)
        mlflow.log_dict(scores, "report.json")

    def log_files(self, files: dict[str, bytes]) -> None:
        """Log artifacts by name."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            mlflow.log_artifacts(folder)

    def log_json(self, name: str, content: dict[str, Any]) -> None:
        """Log an artifact of plain values."""
        mlflow.log_dict(content, name)

    def log_model(self, network: Network, example: np.ndarray) -> str:
        """Log the network as a portable pt2 program (images (B, C, H, W) in [0, 1] in, logits out); return the model's id.

        `example` needs at least two images: one alone would fix the batch size at one.
        """
        requirements = [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]
        logged = mlflow.pytorch.log_model(network, name="model", input_example=example, pip_requirements=requirements)
        return str(logged.model_id)

    def describe(self, markdown: str) -> None:
        """Set the text at the top of the run's page."""
        mlflow.set_tag("mlflow.note.content", markdown)

    def tag(self, **tags: str) -> None:
        """Set tags."""
        mlflow.set_tags(tags)


@contextmanager
def open_run(name: str, knobs: Knobs, *, resume: str | None = None, parent: str | None = None, device: str = "") -> Iterator[Run]:
    """Open a run: the one that `mlflow run` made, the one to resume, or a new one; close it with the right status.

    An interrupt closes it KILLED, an error FAILED with the reason on its page.
    """
    made_by_mlflow = "MLFLOW_RUN_ID" in os.environ
    try:
        where: dict[str, Any] = {"run_id": resume} if resume else {} if made_by_mlflow else {"experiment_id": _experiment_id(parent)}
        active = mlflow.start_run(**where, log_system_metrics=True)
    except MlflowException as error:
        raise RunError(f"MLflow at {mlflow.get_tracking_uri()} opens no run: {_first_line(error)}; see the MLFLOW_ variables") from error
    run = Run(active.info.run_id)
    try:
        if not resume and (not made_by_mlflow or _named_by_mlflow(active.info.run_name)):
            mlflow.set_tag("mlflow.runName", name)
        if parent:
            mlflow.set_tag("mlflow.parentRunId", parent)
        if "mlflow.experimentKind" not in mlflow.get_experiment(active.info.experiment_id).tags:
            # Otherwise the UI opens the experiment as one of prompts and judges.
            mlflow.MlflowClient().set_experiment_tag(active.info.experiment_id, "mlflow.experimentKind", "custom_model_development")
        _log_knobs(active, knobs)
        mlflow.set_tags(_environment() | {"device": device})
        yield run
    except KeyboardInterrupt:
        _ignore_signals()
        mlflow.end_run("KILLED")
        raise
    except BaseException as error:
        _ignore_signals()
        reason = str(error) if isinstance(error, StnError) else f"{type(error).__name__}: {error}"
        run.tag(error=reason[:5000])
        run.describe(f"**Failed.** {reason}")
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run()


def _ignore_signals() -> None:
    """Let a run be closed in peace: a second Ctrl-C would leave it RUNNING."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _named_by_mlflow(name: str) -> bool:
    """Say whether a run's name is one of MLflow's own random ones, such as redolent-chimp-963."""
    first, _, rest = name.partition("-")
    return first in _GENERATOR_PREDICATES and rest.partition("-")[0] in _GENERATOR_NOUNS


def _experiment_id(parent: str | None) -> str:
    """Return the id of the parent run's experiment, of the one that the environment names, or of `stn`; made where missing.

    Passed on by id: processes that call set_experiment at the same time can end up in Default.
    """
    if parent:
        return str(mlflow.get_run(parent).info.experiment_id)
    if "MLFLOW_EXPERIMENT_ID" in os.environ:
        return os.environ["MLFLOW_EXPERIMENT_ID"]
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(mlflow.create_experiment(name))
        except MlflowException:
            experiment = mlflow.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _log_knobs(active: MlflowRun, knobs: Knobs) -> None:
    """Log the knobs as params, except those that `mlflow run` logged in the user's own spelling; config.yaml has all."""
    have = mlflow.get_run(active.info.run_id).data.params
    mlflow.log_params({name: value for name, value in knobs.model_dump().items() if name not in have})
    mlflow.log_text(yaml.safe_dump(knobs.model_dump(), sort_keys=False), "config.yaml")


def _environment() -> dict[str, str]:
    me = psutil.Process()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "mlflow": mlflow.__version__, "stn_pipeline": __version__}
    commit = get_git_commit(str(Path(__file__).parent))
    code = {MLFLOW_GIT_COMMIT: commit} if commit else {}
    return (
        code
        | {f"version.{name}": value for name, value in versions.items()}
        | {"process": f"{socket.gethostname()} {me.pid} {me.create_time()}"}
    )


def log_data(splits: Splits) -> None:
    """Log the three splits as the run's inputs, with their checksums, and which set was really used."""
    source = CodeDatasetSource(tags={"dataset": splits.dataset})
    for context, digest in splits.digests().items():
        name = f"{splits.name}-{context}-{len(getattr(splits, context))}"
        mlflow.log_input(MetaDataset(source, name=name, digest=digest), context=context)
    mlflow.set_tag("dataset_used", splits.dataset)


def find_run(run_id: str) -> MlflowRun:
    """Return a run.

    Raises: RunError if the store does not answer, has no such run, or it is deleted.
    """
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        raise RunError(
            f"run {run_id}: not to be had from {mlflow.get_tracking_uri()}: {_first_line(error)}; "
            "copy the id from the run's page, or set MLFLOW_TRACKING_URI"
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


def disown_run(error: StnError) -> None:
    """Say on the run that `mlflow run` made why nothing was started; MLflow itself closes it FAILED."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        client = mlflow.MlflowClient()
        with suppress(MlflowException):  # the store may be what is wrong
            client.set_tag(run_id, "error", str(error)[:5000])
            client.set_tag(run_id, "mlflow.note.content", f"**Nothing was started.** {error}")
