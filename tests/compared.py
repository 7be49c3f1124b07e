"""Comparisons on a real MLflow store whose trainings are played: figures follow from the knobs and the seed, nothing is computed."""

import io
import json
import math
from collections.abc import Callable
from itertools import count

import mlflow
import numpy as np
import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from stn_pipeline import tracking
from stn_pipeline.comparing import arms, compare
from stn_pipeline.comparing.comparefile import CompareConfig
from stn_pipeline.config import TrainConfig
from stn_pipeline.jobs import Job, Outcome, places
from stn_pipeline.tracking import CHILD_OF, Run
from tests.fakes import FakePool, News, record

KEYS = {
    "arms": {"base": {}, "low": {"lr": 0.003}, "high": {"lr": 0.1}},
    "datasets": ["digits"],
    "seeds": 3,
    "train": {"epochs": 3, "device": "cpu"},
}
TWO = {"base": {}, "low": {"lr": 0.003}}
NOTE = "mlflow.note.content"
names = count()
Go = Callable[..., tuple[FakePool, list[str]]]


def fresh() -> str:
    return f"c{next(names)}"


def score_of(config: TrainConfig, noise: float = 0.01) -> dict[str, float]:
    """Return test figures that the learning rate and the seed decide, with noise of its own for each batch size."""
    rng = np.random.default_rng([config.seed, int(config.lr * 1e6), config.batch_size])
    loss = 0.2 + 0.1 * abs(math.log10(config.lr) + 2.5) + float(rng.normal(0, noise))
    return {"test/loss": loss, "test/accuracy": 0.98 - 0.1 * loss}


def whole(job: Job, noise: float = 0.01, **tags: str) -> News:
    """Do as little as a worker may: one epoch, the test figures."""
    scores = score_of(job.config, noise)
    Run(job.run_id).log_metrics(scores)
    if tags:
        Run(job.run_id).tag(tags)
    yield record(1, 1.1)
    yield Outcome("done", figures=scores | {"val/loss": 1.1, "val/accuracy": 0.8, "best_epoch": 1, "time/overhead_s": 0.1})


def steady(job: Job) -> News:
    """Do the same with little noise, so that a few seeds decide."""
    return whole(job, 0.0005)


def drawn(job: Job) -> News:
    """Do what a worker does, with two classes and ten images."""
    run = Run(job.run_id)
    for number, more in enumerate((0.3, 0.1, 0.0), 1):
        run.log_metrics(
            {"train/loss": 1 + more, "val/loss": 1.1 + more, "warp/shift": 0.1, "warp/outside": 0.2, "warp/log_det": 0.0}, number
        )
    log_digests(job.run_id)
    labels = np.arange(10) % 2
    wrong = np.arange(10) < (1 if job.config.lr == 0.01 else 9 if job.config.lr > 0.05 else 2)
    predicted = np.where(wrong, 1 - labels, labels)
    file = io.BytesIO()
    np.savez(file, label=labels, predicted=predicted)
    counts = np.histogram2d(labels, predicted, 2)[0].astype(int).tolist()
    run.log_files(
        {"predictions.npz": file.getvalue(), "confusion_matrix.json": json.dumps({"classes": ["a", "b"], "counts": counts}).encode()}
    )
    yield from whole(job)


def log_digests(run_id: str, test: str = "same") -> None:
    """Log what a run was tested on, as log_data does."""
    tested = DatasetInput(Dataset("digits-test", test, "code", "{}"), [InputTag(MLFLOW_DATASET_CONTEXT, "test")])
    mlflow.MlflowClient().log_inputs(run_id, [tested])


def diverges(job: Job) -> News:
    Run(job.run_id).tag({"collapsed": "true", "collapsed.why": "training loss is nan at epoch 1"})
    yield Outcome("failed", "training loss is nan at epoch 1")


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stn_pipeline.comparing.page._pictures", lambda *_: {})
    monkeypatch.setattr("stn_pipeline.comparing.pictures.forest", lambda *_: None)


def goer(monkeypatch: pytest.MonkeyPatch) -> Go:
    """Return a function that runs a comparison with these plays, and returns its pool and what it said."""
    monkeypatch.setattr("stn_pipeline.comparing.page._warps", lambda *_: None)  # there are no networks here
    monkeypatch.setattr(arms, "RESAMPLES", 99)

    def go(plays: dict[str, Callable[[Job], News]] | None = None, n_workers: int = 1, **keys: object) -> tuple[FakePool, list[str]]:
        pool, said = FakePool({"": whole} | (plays or {}), n_workers), []
        pool.plays[""] = pool.plays.pop("")  # the last, since it is a part of every key
        monkeypatch.setattr(places, "LocalPool", lambda n, kind, say: pool)
        config = CompareConfig.parse(KEYS | keys)
        compare.run(config, said.append, lambda sources: lambda: [(source.state, source.n_left) for source in sources], "the command")
        return pool, said

    return go


def parent_of(name: str) -> mlflow.entities.Run:
    return tracking.search_runs({"stage": "compare", "comparison": name})[-1]


def children_of(name: str) -> list[mlflow.entities.Run]:
    return tracking.search_runs({CHILD_OF: parent_of(name).info.run_id})


def artifact(name: str, path: str) -> str:
    return mlflow.artifacts.load_text(f"runs:/{parent_of(name).info.run_id}/{path}")


def block_of(name: str) -> dict[str, object]:
    (block,) = json.loads(artifact(name, "answer.json"))["blocks"]
    return block


def keys_of(pool: FakePool) -> list[str]:
    return [job.key.replace("digits ", "") for job in pool.jobs]
