"""Where the runs are kept: wherever MLflow itself looks (MLFLOW_TRACKING_URI, or mlflow.db beside mlruns/); nothing here sets it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

from stn_pipeline.errors import RunError
from stn_pipeline.tracking.away import absence, first_line

EXPERIMENT = "stn"
OF_THIS_PROCESS = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")

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


def knock() -> None:
    """Check that the server, where the store is one, answers: MLflow itself would wait for minutes.

    Raises: RunError where it does not.
    """
    if why := absence(store()):
        raise RunError(f"MLflow at {store()} does not answer ({why}): start it, or set MLFLOW_TRACKING_URI")


@contextmanager
def reachable() -> Iterator[None]:
    """Turn MLflow's complaint inside the block into one line.

    Raises: RunError where the store does not answer, or refuses.
    """
    knock()
    try:
        yield
    except MlflowException as error:
        raise RunError(f"MLflow at {store()} opens no run: {first_line(error)}; see the MLFLOW_ variables") from error


def store() -> str:
    """Return where MLflow keeps the runs."""
    return str(mlflow.get_tracking_uri())


def is_on_disk() -> bool:
    """Whether the store lies on this machine's disk."""
    return urlsplit(store()).scheme in ("", "file", "sqlite")


def settings() -> dict[str, str]:
    """Return what a process elsewhere needs in its environment to write to the same store, passwords among it."""
    given = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and name not in OF_THIS_PROCESS}
    uri = store()
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return given | {"MLFLOW_TRACKING_URI": uri}


def settle(given: dict[str, str]) -> None:
    """Write to the store that `settings` of another process speak of."""
    os.environ.update(given)


def experiment_id(parent: str | None = None) -> str:
    """Return the id of the parent run's experiment, of the one that the environment names, or of `stn`; made where missing.

    Passed on by id: processes that call set_experiment at the same time can end up in Default.
    """
    client = mlflow.MlflowClient()
    if parent:
        found = str(client.get_run(parent).info.experiment_id)
    elif "MLFLOW_RUN_ID" in os.environ:
        found = str(client.get_run(os.environ["MLFLOW_RUN_ID"]).info.experiment_id)
    elif "MLFLOW_EXPERIMENT_ID" in os.environ:
        found = os.environ["MLFLOW_EXPERIMENT_ID"]
    else:
        found = _experiment_named(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
    if "mlflow.experimentKind" not in client.get_experiment(found).tags:
        # Otherwise the UI opens the experiment as one of prompts and judges.
        client.set_experiment_tag(found, "mlflow.experimentKind", "custom_model_development")
    return found


def _experiment_named(name: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(mlflow.create_experiment(name))
        except MlflowException:  # another process was quicker
            experiment = mlflow.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)
