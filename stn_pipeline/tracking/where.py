"""Where the runs are kept: wherever MLflow itself looks (MLFLOW_TRACKING_URI, or mlflow.db beside mlruns/); nothing here sets it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import SQLAlchemyError

from stn_pipeline.errors import RunError, StoreError
from stn_pipeline.texts import masked
from stn_pipeline.tracking.away import absence, first_line, insist, is_away
from stn_pipeline.tracking.database import check_database, check_folder, sqlite_path

EXPERIMENT = "stn"
OF_THIS_PROCESS = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").addFilter(lambda record: record.levelno < logging.WARNING)  # tracebacks of what is raised anyway


def _artifacts_without_a_server(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Return the repository of an mlflow-artifacts URI, reading and writing the server's own folder where none is asked.

    A UI that was opened before the first run gives the experiment Default an artifact location that only it can
    resolve, and `mlflow run` puts its runs there. Beside a SQLite store that location is the folder mlartifacts/.
    """
    store = tracking_uri or _address()
    if not store.startswith("sqlite:///"):
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)
    folder = Path(store.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
    return LocalArtifactRepository(str(folder / unquote(artifact_uri.removeprefix("mlflow-artifacts:").lstrip("/"))))


artifact_repository_registry._artifact_repository_registry.register("mlflow-artifacts", _artifacts_without_a_server)


def knock(*, makes: bool = True) -> None:
    """Check that the store can be used: a server answers, a database opens; MLflow itself would wait for minutes.

    makes: a SQLite file that is not there yet is made; otherwise it is left to whoever writes the first run.
    Raises: RunError where it cannot.
    """
    if why := absence(_address()):
        raise RunError(f"MLflow at {store()} does not answer ({why}): start it, or set MLFLOW_TRACKING_URI")
    check_database(_address(), makes=makes)


@contextmanager
def reachable() -> Iterator[None]:
    """Turn MLflow's complaint inside the block into one line.

    Raises: RunError where the store does not answer, or refuses.
    """
    knock()
    try:
        yield
    except (MlflowException, SQLAlchemyError, StoreError) as error:
        raise RunError(f"MLflow at {store()} opens no run: {first_line(error)}; see the MLFLOW_ variables") from error


def _address() -> str:
    return str(mlflow.get_tracking_uri())


def store() -> str:
    """Return where MLflow keeps the runs, to be shown: passwords are masked."""
    return masked(_address())


def is_on_disk() -> bool:
    """Whether the store lies on this machine's disk."""
    return urlsplit(_address()).scheme in ("", "file", "sqlite")


def settings() -> dict[str, str]:
    """Return what a process elsewhere needs in its environment to write to the same store, passwords among it."""
    given = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and name not in OF_THIS_PROCESS}
    uri = _address()
    if path := sqlite_path(uri) if uri.startswith("sqlite") else None:
        uri = f"sqlite:///{path}"
    return given | {"MLFLOW_TRACKING_URI": uri}


def settle(given: dict[str, str]) -> None:
    """Write to the store that `settings` of another process speak of."""
    os.environ.update(given)


def experiment_id(parent: str | None = None) -> str:
    """Return the id of the parent run's experiment, of the one that the environment names, or of `stn`; made where missing.

    Passed on by id: processes that call set_experiment at the same time can end up in Default.
    Raises: RunError where the experiment is not there any more, or its files cannot be written.
    """
    client = mlflow.MlflowClient()
    given, name = os.environ.get("MLFLOW_EXPERIMENT_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if parent:
        found = insist(client.get_experiment, insist(client.get_run, parent).info.experiment_id)
    elif given:
        found = _experiment_with(given)
        if name and found.name != name:
            raise RunError(f"MLFLOW_EXPERIMENT_ID={given} is experiment {found.name} and MLFLOW_EXPERIMENT_NAME={name}: unset one of them")
    else:
        found = _experiment_named(name or EXPERIMENT)
    number = str(found.experiment_id)
    if found.lifecycle_stage != "active":
        way_out = f"`mlflow experiments restore --experiment-id {number}`, or name another with MLFLOW_EXPERIMENT_NAME"
        raise RunError(f"experiment {found.name} was deleted: {way_out}")
    if urlsplit(found.artifact_location).scheme in ("", "file"):
        check_folder(Path(local_file_uri_to_path(found.artifact_location)), f"files of experiment {found.name}")
    if "mlflow.experimentKind" not in found.tags:
        # Otherwise the UI opens the experiment as one of prompts and judges.
        insist(client.set_experiment_tag, number, "mlflow.experimentKind", "custom_model_development")
    return number


def _experiment_with(number: str) -> Experiment:
    try:
        return mlflow.MlflowClient().get_experiment(number)
    except MlflowException as error:
        if is_away(error):
            raise
        raise RunError(f"MLFLOW_EXPERIMENT_ID={number}: {store()} has no such experiment: unset it, or name one that is there") from error


def _experiment_named(name: str) -> Experiment:
    client = mlflow.MlflowClient()
    found = insist(client.get_experiment_by_name, name)
    if found is None:
        with suppress(StoreError):  # another process was quicker
            insist(client.create_experiment, name)
        found = insist(client.get_experiment_by_name, name)
    if found is None:
        raise RunError(f"MLFLOW_EXPERIMENT_NAME={name}: {store()} makes no such experiment: choose another name")
    return found
