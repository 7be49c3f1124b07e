"""A run written to: epochs, scores, figures, the model, and why it failed."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import numpy as np
import torch
import yaml
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_RUN_NOTE

from stn_pipeline.config import Knobs
from stn_pipeline.data import Splits
from stn_pipeline.errors import StoreError
from stn_pipeline.model import Network
from stn_pipeline.texts import markdown, masked
from stn_pipeline.tracking.away import insist
from stn_pipeline.tracking.found import CHECKPOINTS
from stn_pipeline.training import Checkpoint, Record, checkpoint

CHAMPION = "champion"
MAX_TAG = 8000
LOG_INPUTS_TRIES = 5


class Run:
    """One MLflow run, to be written to from any process; who opened or created it closes it."""

    def __init__(self, run_id: str):
        self.id = run_id
        self._client = mlflow.MlflowClient()
        self.is_closed = False
        self._collapsed = False

    def _ask(self, what: str, *given: Any, **named: Any) -> Any:
        """Call a method of MLflow's client for this run.

        Raises: StoreError where MLflow refuses: the run was deleted, say, or its files cannot be written.
        """
        return insist(getattr(self._client, what), self.id, *given, **named)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, model_id: str | None = None) -> None:
        """Log metrics in one call."""
        now = int(time.time() * 1000)
        entities = [Metric(name, value, now, step or 0, model_id=model_id) for name, value in metrics.items()]
        self._ask("log_batch", metrics=entities)  # half the time of mlflow.log_metrics

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
            self._ask("log_image", warps, key="warps", step=record.number)
        if record.trouble:
            self.tag({"collapsed": "true", "collapsed.why": f"epoch {record.number}: {record.trouble}"})
        elif self._collapsed:
            self.tag({"collapsed": "recovered"})
        self._collapsed = bool(record.trouble)

    def log_checkpoint(self, content: Checkpoint) -> None:
        """Keep the state after a whole epoch: two files in turn, so that a kill in mid-write leaves the one before."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("even.pt" if content.state.epoch % 2 == 0 else "odd.pt")
            insist(checkpoint.save, content, path)
            self._ask("log_artifact", str(path), CHECKPOINTS)

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
            self._ask("log_artifacts", folder)

    def log_json(self, name: str, content: dict[str, Any]) -> None:
        """Log an artifact of plain values."""
        self._ask("log_dict", content, name)

    def log_model(self, network: Network, example: np.ndarray) -> str:
        """Log the network as a portable pt2 program (images (B, C, H, W) in [0, 1] in, logits out); return the model's id.

        `example` needs at least two images: one alone would fix the batch size at one.
        """
        requirements = [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]
        run = self._ask("get_run")
        # Made here and not by mlflow.pytorch, which wants an active run: MLflow closes that as FINISHED whatever ends the process.
        model = insist(self._client.create_logged_model, run.info.experiment_id, "model", self.id, params=run.data.params)
        insist(
            Model.log,
            None,
            mlflow.pytorch,
            run_id=self.id,
            model_id=model.model_id,
            pytorch_model=network,
            input_example=example,
            pip_requirements=requirements,
            serialization_format="pt2",  # nothing is pickled
        )
        return str(model.model_id)

    def register(self, name: str) -> str:
        """Register the run's model as the newest version of `name`, with alias champion; return the version."""
        version = insist(mlflow.register_model, f"runs:/{self.id}/model", name).version
        insist(self._client.set_registered_model_alias, name, CHAMPION, version)
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
                self._ask("log_inputs", inputs)
                break
            except StoreError:  # two processes that log the same new data at once: the second try finds it there
                if attempt == LOG_INPUTS_TRIES - 1:
                    raise
        self.tag({"dataset_used": splits.dataset})

    def log_knobs(self, knobs: Knobs) -> None:
        """Log the knobs as params, except those that `mlflow run` logged in the user's own spelling; config.yaml has all."""
        have = self._ask("get_run").data.params
        self._ask("log_batch", params=[Param(name, str(value)) for name, value in knobs.flat().items() if name not in have])
        self._ask("log_text", yaml.safe_dump(knobs.plain(), sort_keys=False), "config.yaml")

    def describe(self, markdown: str) -> None:
        """Set the text at the top of the run's page; names in it go through texts.markdown."""
        self.tag({MLFLOW_RUN_NOTE: markdown[:MAX_TAG]})

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags."""
        self._ask("log_batch", tags=[RunTag(name, value[:MAX_TAG]) for name, value in tags.items()])

    def fail(self, reason: str) -> None:
        """Say on the run's page why it failed."""
        self.tag({"error": masked(reason)})
        self.describe(f"**Failed.** {markdown(reason)}")

    def reopen(self) -> None:
        """Say that the run goes on; why it failed before is no longer told."""
        self._ask("update_run", status="RUNNING")
        self.is_closed = False
        if "error" in self._ask("get_run").data.tags:
            self._ask("delete_tag", "error")

    def close(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._ask("set_terminated", status)
        self.is_closed = True
