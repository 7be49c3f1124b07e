"""A run written to: opened, created or taken over, given epochs, scores, figures and the model, and closed with the right status."""

import math
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import numpy as np
import psutil
import torch
import yaml
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
)
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from stn_pipeline import __version__
from stn_pipeline.config import Knobs
from stn_pipeline.data import Splits
from stn_pipeline.errors import AwayError, StnError
from stn_pipeline.interrupts import ignore_signals
from stn_pipeline.model import Network
from stn_pipeline.tracking.away import in_a_hurry, is_away
from stn_pipeline.tracking.found import CHECKPOINTS, search_runs
from stn_pipeline.tracking.where import experiment_id, reachable, store
from stn_pipeline.training import Checkpoint, Record, checkpoint

CHAMPION = "champion"
GO_ON = "once it does, the same command goes on (of train, --resume RUN_ID)"
MAX_TAG = 8000
LOG_INPUTS_TRIES = 5
CHILD_OF = MLFLOW_PARENT_RUN_ID


class Run:
    """One MLflow run, to be written to from any process; who opened or created it closes it."""

    def __init__(self, run_id: str):
        self.id = run_id
        self._client = mlflow.MlflowClient()
        self._collapsed = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, model_id: str | None = None) -> None:
        """Log metrics in one call."""
        now = int(time.time() * 1000)
        entities = [Metric(name, value, now, step or 0, model_id=model_id) for name, value in metrics.items()]
        self._client.log_batch(self.id, metrics=entities)  # half the time of mlflow.log_metrics

    def log_epoch(self, record: Record, warps: np.ndarray | None = None) -> None:
        """Log an epoch's metrics in one call, step = epoch from 1, and where given its strip of warps (H, W, 3) uint8."""
        metrics = {
            "train/loss": record.train_loss,
            "train/accuracy": record.train_accuracy,
            "val/loss": record.val_loss,
            "val/accuracy": record.val_accuracy,
            "time/epoch_s": record.seconds,
            "speed/images_per_s": record.images_per_s,
        }
        if not math.isnan(record.shift):
            metrics |= {
                "warp/shift": record.shift,
                "warp/outside": record.outside,
                "warp/log_det": record.log_det,
                "warp/folded": record.folded,
            }
        self.log_metrics(metrics, record.number)
        if warps is not None:
            self._client.log_image(self.id, warps, key="warps", step=record.number)
        if record.trouble:
            self.tag({"collapsed": "true", "collapsed.why": f"epoch {record.number}: {record.trouble}"})
        elif self._collapsed:
            self.tag({"collapsed": "recovered"})
        self._collapsed = bool(record.trouble)

    def log_checkpoint(self, content: Checkpoint) -> None:
        """Keep the state after a whole epoch: two files in turn, so that a kill in mid-write leaves the one before."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("even.pt" if content.state.epoch % 2 == 0 else "odd.pt")
            checkpoint.save(content, path)
            mlflow.log_artifact(str(path), CHECKPOINTS, run_id=self.id)

    def log_scores(self, split: str, scores: dict[str, Any], model_id: str | None = None) -> None:
        """Log a split's scores, as training.report gives them: metrics, and report.json."""
        self.log_metrics({f"{split}/{name}": scores[name] for name in ("loss", "accuracy", "calibration_error")}, model_id=model_id)
        self.log_json("report.json", scores)

    def log_files(self, files: dict[str, bytes]) -> None:
        """Log artifacts by name; a / in it makes a folder."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            mlflow.log_artifacts(folder, run_id=self.id)

    def log_json(self, name: str, content: dict[str, Any]) -> None:
        """Log an artifact of plain values."""
        mlflow.log_dict(content, name, run_id=self.id)

    def log_model(self, network: Network, example: np.ndarray) -> str:
        """Log the network as a portable pt2 program (images (B, C, H, W) in [0, 1] in, logits out); return the model's id.

        `example` needs at least two images: one alone would fix the batch size at one.
        """
        requirements = [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]
        with _active(self.id):
            logged = mlflow.pytorch.log_model(network, name="model", input_example=example, pip_requirements=requirements)
        return str(logged.model_id)

    def register(self, name: str) -> str:
        """Register the run's model as the newest version of `name`, with alias champion; return the version."""
        version = mlflow.register_model(f"runs:/{self.id}/model", name).version
        self._client.set_registered_model_alias(name, CHAMPION, version)
        return str(version)

    def log_data(self, splits: Splits) -> None:
        """Log the three splits as the run's inputs, with their checksums, and which set was really used."""
        source = CodeDatasetSource(tags={"dataset": splits.dataset})
        inputs = []
        for context, digest in splits.digests().items():
            if not len(getattr(splits, context)):  # only another split was read, to be scored
                continue
            data = MetaDataset(source, name=f"{splits.name}-{context}-{len(getattr(splits, context))}", digest=digest)
            inputs.append(DatasetInput(data._to_mlflow_entity(), [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
        for attempt in range(LOG_INPUTS_TRIES):
            try:
                self._client.log_inputs(self.id, inputs)
                break
            except MlflowException:  # two processes that log the same new data at once: the second try finds it there
                if attempt == LOG_INPUTS_TRIES - 1:
                    raise
        self.tag({"dataset_used": splits.dataset})

    def log_knobs(self, knobs: Knobs) -> None:
        """Log the knobs as params, except those that `mlflow run` logged in the user's own spelling; config.yaml has all."""
        have = self._client.get_run(self.id).data.params
        self._client.log_batch(self.id, params=[Param(name, str(value)) for name, value in knobs.flat().items() if name not in have])
        mlflow.log_text(yaml.safe_dump(knobs.plain(), sort_keys=False), "config.yaml", run_id=self.id)

    def describe(self, markdown: str) -> None:
        """Set the text at the top of the run's page."""
        self.tag({MLFLOW_RUN_NOTE: markdown[:MAX_TAG]})

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags."""
        self._client.log_batch(self.id, tags=[RunTag(name, value[:MAX_TAG]) for name, value in tags.items()])

    def fail(self, reason: str) -> None:
        """Say on the run's page why it failed."""
        self.tag({"error": reason})
        self.describe(f"**Failed.** {reason}")

    def reopen(self) -> None:
        """Say that the run goes on; why it failed before is no longer told."""
        self._client.update_run(self.id, status="RUNNING")
        if "error" in self._client.get_run(self.id).data.tags:
            self._client.delete_tag(self.id, "error")

    def close(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.id, status)


@contextmanager
def _active(run_id: str) -> Iterator[None]:
    """Make a run the process's active one, which alone a model is linked to; the run stays open."""
    if mlflow.active_run() is not None:
        yield
        return
    mlflow.start_run(run_id=run_id)
    try:
        yield
    finally:
        mlflow.end_run("RUNNING")


@contextmanager
def open_run(name: str, knobs: Knobs, *, resume: str | None = None, parent: str | None = None, device: str = "") -> Iterator[Run]:
    """Open a run: the one that `mlflow run` made, the one to resume, or a new one; close it with the right status."""
    made_by_mlflow = "MLFLOW_RUN_ID" in os.environ
    with reachable():
        experiment = experiment_id(parent or resume)
        where = {"run_id": resume} if resume else {} if made_by_mlflow else {"experiment_id": experiment}
        active = mlflow.start_run(**where, log_system_metrics=True)
    run = Run(active.info.run_id)
    with closing(run, mlflow.end_run):
        if not resume and (not made_by_mlflow or _named_by_mlflow(active.info.run_name)):
            mlflow.set_tag(MLFLOW_RUN_NAME, name)
        if parent:
            mlflow.set_tag(MLFLOW_PARENT_RUN_ID, parent)
        run.log_knobs(knobs)
        run.tag(environment() | {"device": device})
        yield run


@contextmanager
def closing(run: Run, close: Callable[[str], object]) -> Iterator[None]:
    """Close a run after the block: FINISHED; KILLED by an interrupt; FAILED by an error, with the reason on its page.

    Raises: AwayError where the server did not answer until MLflow gave up; the run is then left RUNNING.
    """
    try:
        yield
    except BaseException as error:
        ignore_signals()
        if is_away(error):
            raise error if isinstance(error, AwayError) else AwayError(f"MLflow at {store()} has not answered for long: {GO_ON}") from error
        with in_a_hurry():
            if isinstance(error, KeyboardInterrupt):
                close("KILLED")
            else:
                run.fail(str(error) if isinstance(error, StnError) else f"{type(error).__name__}: {error}")
                close("FAILED")
        raise
    close("FINISHED")


def create_run(name: str, experiment: str, knobs: Knobs, tags: dict[str, str], parent: str = "") -> Run:
    """Create a run that some other process may write to; the caller closes it."""
    tags = _origin() | tags | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
    run = Run(mlflow.MlflowClient().create_run(experiment, run_name=name, tags=tags).info.run_id)
    run.log_knobs(knobs)
    return run


def close_orphans(parent: Run) -> None:
    """Close the children of a run that are RUNNING though nothing runs: a server that went away may make a run twice, and tell of one."""
    for child in search_runs({CHILD_OF: parent.id}):
        if child.info.status == "RUNNING":
            orphan = Run(child.info.run_id)
            orphan.tag({"stage": "orphan"})
            orphan.describe("**Made twice.** The server went away while this run was made, and another was made in its place.")
            orphan.close("KILLED")


@cache
def _origin() -> dict[str, str]:
    """Return MLflow's own tags for the user, the program and its commit."""
    origin: dict[str, str] = resolve_tags()
    return origin


def adopt_run(name: str, knobs: Knobs, tags: dict[str, str]) -> Run | None:
    """Return the run that `mlflow run` made for this process, named and tagged, or None where there is none; once only."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id is None:
        return None
    run = Run(run_id)
    run.tag(tags | {MLFLOW_RUN_NAME: name})
    run.log_knobs(knobs)
    return run


def _named_by_mlflow(name: str) -> bool:
    """Say whether a run's name is one of MLflow's own random ones, such as redolent-chimp-963."""
    first, _, rest = name.partition("-")
    return first in _GENERATOR_PREDICATES and rest.partition("-")[0] in _GENERATOR_NOUNS


def environment() -> dict[str, str]:
    """Return the tags that say what code ran where: commit, versions, process."""
    me = psutil.Process()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "mlflow": mlflow.__version__, "stn_pipeline": __version__}
    commit = get_git_commit(str(Path(__file__).parent))
    code = {MLFLOW_GIT_COMMIT: commit} if commit else {}
    return (
        code
        | {f"version.{name}": value for name, value in versions.items()}
        | {"process": f"{socket.gethostname()} {me.pid} {me.create_time()}"}
    )


def disown_run(error: StnError) -> None:
    """Say on the run that `mlflow run` made why nothing was started; MLflow itself closes it FAILED."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        with in_a_hurry(), suppress(MlflowException):  # the store may be what is wrong
            run = Run(run_id)
            run.tag({"error": str(error)})
            run.describe(f"**Nothing was started.** {error}")
