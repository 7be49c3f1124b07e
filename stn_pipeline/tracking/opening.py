"""Runs opened, created, taken over and closed, so that whatever ends the process none says what is not so."""

import os
import platform
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import mlflow
import psutil
import torch
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from stn_pipeline import __version__
from stn_pipeline.config import Knobs
from stn_pipeline.errors import AwayError, ConfigError, StnError, StoreError
from stn_pipeline.interrupts import ignore_signals, uninterrupted
from stn_pipeline.questions import Question, from_flags
from stn_pipeline.texts import markdown
from stn_pipeline.tracking.away import in_a_hurry, insist, is_away, tell, watched
from stn_pipeline.tracking.found import RunRecord, dead_runs, made_for_us, only_trainer, search_runs, why_gone
from stn_pipeline.tracking.runs import Run
from stn_pipeline.tracking.where import experiment_id, reachable, store

GO_ON = "once it does, the same command goes on (of train, --resume RUN_ID)"
CHILD_OF = MLFLOW_PARENT_RUN_ID
MONITOR_END_S = 5.0
SAME = "same"  # a knob of eval that stands for what the run that is scored has

_opened: list[Run] = []  # by this process, and not always closed


@contextmanager
def open_run(name: str, knobs: Knobs, *, resume: str | None = None, parent: str | None = None, device: str = "") -> Iterator[Run]:
    """Open a run: the one that `mlflow run` made, the one to resume (held by `resuming`), or a new one; close it with the right status."""
    tags = {"device": device}
    with reachable():
        experiment = experiment_id(parent or resume)
        close_dead()
        run = _resumed(resume) if resume else None
        run = run or adopt_run(name, knobs, tags) or create_run(name, experiment, knobs, tags, parent or "")
    with closing(run, run.close), watched(store(), tell), _system_metrics(run.id, goes_on=bool(resume)):
        run.tag(environment() | tags)
        if resume:
            yield run
        else:
            with only_trainer(run.id):
                yield run


def _resumed(run_id: str) -> Run:
    run = Run(run_id)
    with uninterrupted():
        _opened.append(run)
        run.reopen()
    return run


@contextmanager
def _system_metrics(run_id: str, goes_on: bool) -> Iterator[None]:
    """Log the load of processor, memory and disk during the block, where that can be had."""
    try:
        monitor = SystemMetricsMonitor(run_id, resume_logging=goes_on)
    except Exception as error:  # of a library that reads this machine's sensors
        tell(f"warning: the machine's load is not logged: {error}")
        yield
        return
    monitor.start()
    try:
        yield
    finally:
        ending = threading.Thread(target=monitor.finish, daemon=True)
        ending.start()
        ending.join(MONITOR_END_S)  # not for as long as a server that is away may take


@contextmanager
def closing(run: Run, close: Callable[[str], object]) -> Iterator[None]:
    """Close a run after the block: FINISHED; KILLED by an interrupt; FAILED by an error, with the reason on its page.

    Raises: AwayError where the store did not answer until MLflow gave up; the run is then left RUNNING.
    """
    try:
        yield
        with uninterrupted():
            close("FINISHED")
    except BaseException as error:
        ignore_signals()
        if run.is_closed:  # the interrupt came when all was done
            raise
        if is_away(error):
            raise error if isinstance(error, AwayError) else AwayError(f"MLflow at {store()} has not answered for long: {GO_ON}") from error
        if why := why_gone(error, run.id):
            raise StnError(f"{why}: nothing more can be written to it") from error
        with in_a_hurry(), suppress(StoreError):  # the run may be what was deleted
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                close("KILLED")
            else:
                run.fail(str(error) if isinstance(error, StnError) else f"{type(error).__name__}: {error}")
                close("FAILED")
        raise


def close_opened(error: BaseException) -> None:
    """Close what this process has left RUNNING: a signal may fall between the lines of `closing`."""
    for run in [] if is_away(error) else _opened:
        if not run.is_closed:
            with in_a_hurry(), suppress(StoreError):
                run.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    _opened.clear()


def create_run(name: str, experiment: str, knobs: Knobs, tags: dict[str, str], parent: str = "") -> Run:
    """Create a run that some other process may write to; the caller closes it."""
    tags = _origin() | tags | ({CHILD_OF: parent} if parent else {})
    with uninterrupted():
        run = Run(insist(mlflow.MlflowClient().create_run, experiment, run_name=name, tags=tags).info.run_id)
        _opened.append(run)
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


def close_dead() -> None:
    """Close the runs of this machine that are RUNNING though their process was killed; a driver's children are its own to go on with."""
    for record in dead_runs():
        if not (CHILD_OF in record.data.tags and "stage" in record.data.tags):
            run = Run(record.info.run_id)
            run.describe("**Killed.** Its process ended without a word; a training goes on with --resume.")
            run.close("KILLED")


@cache
def _origin() -> dict[str, str]:
    """Return MLflow's own tags for the user, the program and its commit."""
    origin: dict[str, str] = resolve_tags()
    return origin


def adopt_run(name: str, knobs: Knobs, tags: dict[str, str]) -> Run | None:
    """Return the run that `mlflow run` made for this process, named and tagged, or None where there is none; once only.

    It is deleted where its params say what is not so: MLflow cannot change them.
    """
    record = made_for_us()
    os.environ.pop("MLFLOW_RUN_ID", None)
    if record is None:
        return None
    run = Run(record.info.run_id)
    if untrue := _untrue(record, knobs):
        tell(
            f"warning: `mlflow run` has put {untrue} on its run, which is not what is asked for (a knob is written with _, not -): "
            "that run is deleted and a new one made; at the end `mlflow run` will miss its own and say that it failed"
        )
        insist(mlflow.MlflowClient().delete_run, run.id)
        return None
    _opened.append(run)
    named = {MLFLOW_RUN_NAME: name} if _named_by_mlflow(record.info.run_name) else {}
    run.tag(tags | named)
    run.log_knobs(knobs)
    return run


def _untrue(record: RunRecord, knobs: Knobs) -> str:
    """Return a param that is another than the knob, whatever its spelling; nothing where there is none.

    Not the data set, which may be `auto`: the tag dataset_used says which that was; nor `same`, which eval reads as the trained run's.
    """
    used = knobs.flat()
    for name, logged in record.data.params.items():
        if name not in used or name == "dataset" or logged == SAME:
            continue
        text = "".join(shlex.split(logged)) if logged.startswith("'") else logged  # MLflow quotes them for the shell
        try:
            given = from_flags(type(knobs), {name: text}) if isinstance(knobs, Question) else {name: text}
            same = text == str(used[name]) or type(knobs).parse(used | given).flat()[name] == used[name]
        except ConfigError:
            same = isinstance(knobs, Question)  # a file's keys depend on each other: this says nothing
        if not same:
            return f"{name}={text}"
    return ""


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
    with in_a_hurry(), suppress(MlflowException, StoreError):  # the store may be what is wrong
        if (record := made_for_us()) is not None:
            run = Run(record.info.run_id)
            run.tag({"error": str(error)})
            run.describe(f"**Nothing was started.** {markdown(error)}")
