"""What a run says is so: whose it is, what it was trained with, whether it is done, and how it ended."""

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest
from mlflow.utils.mlflow_tags import MLFLOW_PROJECT_ENTRY_POINT

from stn_pipeline import cli, interrupts, tracking
from stn_pipeline.config import EvalConfig, TrainConfig
from stn_pipeline.errors import RunError, StnError, StoreError
from stn_pipeline.jobs import Trainings
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import CHILD_OF, Run, found, open_run, opening, resuming
from stn_pipeline.tracking.opening import close_opened

OF_A_PROJECT = {MLFLOW_PROJECT_ENTRY_POINT: "main"}
CONFIG = TrainConfig(dataset="digits")

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture(autouse=True)
def hearing(signals_restored, monkeypatch):
    """Hear signals again: a run that breaks is closed deaf to them."""
    monkeypatch.setattr(interrupts, "_told", [])
    for number in interrupts.NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    interrupts.listen()


def make(tags: dict[str, str], **params: str) -> Run:
    """Make a run as another program does."""
    client = mlflow.MlflowClient()
    run = client.create_run(tracking.experiment_id(), tags=tags, run_name=None)
    for name, value in params.items():
        client.log_param(run.info.run_id, name, value)
    return Run(run.info.run_id)


def status(run: Run) -> str:
    return str(mlflow.get_run(run.id).info.status)


def is_deleted(run: Run) -> bool:
    return bool(mlflow.get_run(run.id).info.lifecycle_stage == "deleted")


# The run that `mlflow run` made


def test_an_empty_run_of_mlflow_run_is_taken_over(monkeypatch):
    made = make(OF_A_PROJECT, lr="1e-2", batch_size="64", data_dir="'data'")
    monkeypatch.setenv("MLFLOW_RUN_ID", made.id)
    with open_run("mine", CONFIG) as run:
        assert run.id == made.id and "MLFLOW_RUN_ID" not in os.environ
        assert mlflow.active_run() is None  # MLflow closes that one as FINISHED, however the process ends
    record = mlflow.get_run(made.id)
    assert record.info.run_name == "mine" and record.info.status == "FINISHED"
    assert (record.data.params["lr"], record.data.params["epochs"]) == ("1e-2", "50")


@pytest.mark.parametrize("state", ["finished", "killed", "results", "being trained", "deleted", "not a project's", "unknown"])
def test_a_run_id_left_over_in_the_environment_is_told_of_and_touches_nothing(monkeypatch, capsys, state):
    tags = {} if state == "not a project's" else OF_A_PROJECT | ({"process": "h 1 2"} if state == "being trained" else {})
    left = make(tags)
    if state in ("finished", "killed"):
        left.close(state.upper())
    elif state == "results":
        left.log_metrics({"val/loss": 1.0}, 1)
    elif state == "deleted":
        mlflow.delete_run(left.id)
    before = mlflow.get_run(left.id).to_dictionary()
    given = "f" * 32 if state == "unknown" else left.id
    for use in ("open", "resume", "error"):
        monkeypatch.setenv("MLFLOW_RUN_ID", given)
        if use == "open":
            with open_run("new", CONFIG) as run:
                assert run.id != left.id
        elif use == "resume":
            with pytest.raises(RunError, match="not to be had"), resuming("nope"):
                pass
        else:
            tracking.disown_run(RunError("wrong"))
        assert capsys.readouterr().err.startswith(f"warning: MLFLOW_RUN_ID={given} is left over from another run, which ")
    assert mlflow.get_run(left.id).to_dictionary() == before


@pytest.mark.parametrize("logged", [{"batch_size": "64"}, {"lr": "0.010001"}, {"coordconv": "true"}, {"epochs": "nonsense"}])
def test_a_param_that_is_not_so_is_never_left_standing(monkeypatch, capsys, logged):
    made = make(OF_A_PROJECT, **logged)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.id)
    config = CONFIG.model_copy(update={"batch_size": 512})
    with open_run("mine", config) as run:
        pass
    assert is_deleted(made) and run.id != made.id
    assert mlflow.get_run(run.id).data.params == {name: str(value) for name, value in config.flat().items()}
    ((name, value),) = logged.items()
    assert f"warning: `mlflow run` has put {name}={value} on its run, which is not what is asked for" in capsys.readouterr().err


def test_resume_is_refused_below_mlflow_run_alone(monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", make(OF_A_PROJECT).id)
    with pytest.raises(RunError, match="`mlflow run` always makes a new run"), resuming("nope"):
        pass


# Experiments


def test_experiments_that_are_gone_or_contradict_each_other_are_one_line(monkeypatch):
    client = mlflow.MlflowClient()
    gone, there = client.create_experiment("gone"), client.create_experiment("there")
    client.delete_experiment(gone)
    for variables, text in (
        ({"MLFLOW_EXPERIMENT_ID": "4711"}, "MLFLOW_EXPERIMENT_ID=4711: .* has no such experiment: unset it"),
        ({"MLFLOW_EXPERIMENT_ID": gone}, f"experiment gone was deleted: `mlflow experiments restore --experiment-id {gone}`"),
        ({"MLFLOW_EXPERIMENT_NAME": "gone"}, "experiment gone was deleted"),
        ({"MLFLOW_EXPERIMENT_NAME": ""}, None),
        ({"MLFLOW_EXPERIMENT_ID": there, "MLFLOW_EXPERIMENT_NAME": "stn"}, "is experiment there and .*NAME=stn: unset one of them"),
        ({"MLFLOW_EXPERIMENT_ID": there, "MLFLOW_EXPERIMENT_NAME": "there"}, None),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            if text is None:
                tracking.experiment_id()
            else:
                with pytest.raises(RunError, match=text), tracking.reachable():
                    tracking.experiment_id()


def test_files_that_cannot_be_written_are_told_before_there_is_a_run(monkeypatch, tmp_path):
    (tmp_path / "mlruns").touch()
    mlflow.create_experiment("files", artifact_location=f"file://{tmp_path}/mlruns/1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "files")
    before = len(mlflow.search_runs(search_all_experiments=True))
    with (
        pytest.raises(RunError, match=f"files of experiment files cannot be written: {tmp_path}/mlruns: Not a directory"),
        open_run("x", CONFIG),
    ):
        pass
    assert len(mlflow.search_runs(search_all_experiments=True)) == before


# Done or not


def test_a_finished_run_without_scores_is_not_done_and_goes_on():
    with open_run("x", CONFIG) as run:
        pass
    assert status(run) == "FINISHED"
    with resuming(run.id):
        pass
    trainings: Trainings[str] = Trainings()
    trainings.adopt("key", tracking.find_run(run.id))
    assert trainings.is_open("key")
    run.log_metrics({"test/loss": 1.0, "test/accuracy": 0.5})
    with pytest.raises(RunError, match="is finished, nothing is left to train"), resuming(run.id):
        pass
    trainings.adopt("key", tracking.find_run(run.id))
    assert not trainings.is_open("key")


def test_a_failed_run_that_goes_on_and_ends_says_no_more_that_it_failed():
    with pytest.raises(ZeroDivisionError), open_run("x", CONFIG) as run:
        raise ZeroDivisionError("boom")
    assert mlflow.get_run(run.id).data.tags["error"] == "ZeroDivisionError: boom"
    with resuming(run.id), open_run("x", CONFIG, resume=run.id) as again:
        assert again.id == run.id and status(run) == "RUNNING"
    assert status(run) == "FINISHED" and "error" not in mlflow.get_run(run.id).data.tags


# Two at once, and dead ones


def test_a_run_is_trained_by_one_process_at_a_time():
    with open_run("x", CONFIG) as run:
        assert found.living_trainer(mlflow.get_run(run.id)) == f"process {os.getpid()}"
        with pytest.raises(RunError, match=f"resume={run.id}: process {os.getpid()} is still training it: wait, or stop"), resuming(run.id):
            pass
        with pytest.raises(RunError, match="is still training it"):
            Trainings[str]().adopt("key", tracking.find_run(run.id))
    with resuming(run.id), pytest.raises(RunError, match="is still training it"), resuming(run.id):
        pass


def test_a_run_of_another_machine_is_alive_for_a_minute_after_it_was_heard():
    run = make({"process": "elsewhere 77 1.0"})
    assert found.living_trainer(mlflow.get_run(run.id)) == ""
    run.log_metrics({found.HEARTBEAT: 1.0})
    with pytest.raises(RunError, match="elsewhere process 77, heard . s ago, is still training it"), resuming(run.id):
        pass


def test_runs_of_killed_processes_are_closed_but_neither_the_living_nor_a_drivers_own():
    host, me = socket.gethostname(), psutil.Process()
    dead = make({"process": f"{host} {me.pid} 1.0"})  # the number was given again since
    alive = make({"process": f"{host} {me.pid} {me.create_time()}"})
    elsewhere = make({"process": f"{host}-2 {me.pid} 1.0"})
    child = make({"process": f"{host} {me.pid} 1.0", CHILD_OF: alive.id, "stage": "trial"})
    tracking.close_dead()
    assert [status(run) for run in (dead, alive, elsewhere, child)] == ["KILLED", "RUNNING", "RUNNING", "RUNNING"]
    assert "--resume" in mlflow.get_run(dead.id).data.tags["mlflow.note.content"]


# Another hand


def test_a_run_deleted_while_it_is_trained_ends_in_one_line():
    with pytest.raises(StnError) as caught, open_run("x", CONFIG) as run:
        mlflow.delete_run(run.id)
        run.log_metrics({"val/loss": 1.0}, 1)
    text = str(caught.value)
    assert text.startswith(f"run {run.id} was deleted meanwhile") and "\n" not in text
    assert is_deleted(run)


def test_files_that_another_hand_removed_are_made_again_or_told_in_one_line(tmp_path, monkeypatch):
    mlflow.create_experiment("removed", artifact_location=f"file://{tmp_path}/1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "removed")
    with pytest.raises(StoreError, match="^MLflow refused: .*Not a directory"), open_run("x", CONFIG) as run:
        (tmp_path / "1").rename(tmp_path / "gone")
        run.log_json("a.json", {"a": 1})
        assert list(tmp_path.glob("1/*/artifacts/a.json"))
        (tmp_path / "1").rename(tmp_path / "gone too")
        (tmp_path / "1").touch()
        run.log_json("b.json", {})
    assert status(run) == "FAILED"


# Signals at the wrong moment


@pytest.mark.parametrize("moment", ["create_run", "log_batch", "set_terminated"])
def test_a_signal_while_a_run_starts_or_ends_leaves_none_running(monkeypatch, moment):
    real = getattr(mlflow.MlflowClient, moment)
    ids: set[str] = {run.info.run_id for run in mlflow.search_runs(search_all_experiments=True, output_format="list")}

    def hit(self, *given, **named):
        answer = real(self, *given, **named)
        monkeypatch.setattr(mlflow.MlflowClient, moment, real)
        signal.raise_signal(signal.SIGTERM)
        return answer

    monkeypatch.setattr(mlflow.MlflowClient, moment, hit)
    with pytest.raises(interrupts.Interrupted) as caught, open_run("x", CONFIG):
        pass
    interrupts.ignore_signals()
    close_opened(caught.value)  # as cli.run does
    (made,) = (run for run in mlflow.search_runs(search_all_experiments=True, output_format="list") if run.info.run_id not in ids)
    assert made.info.status == ("FINISHED" if moment == "set_terminated" else "KILLED")


def test_an_error_before_the_work_began_leaves_no_run_running(monkeypatch):
    monkeypatch.setattr("stn_pipeline.tracking.runs.Run.log_knobs", lambda *_: 1 / 0)

    def command(_: object) -> None:
        with open_run("x", CONFIG):
            pass

    started = time.time() * 1000
    with pytest.raises(ZeroDivisionError):
        cli.run(command)
    (made,) = mlflow.search_runs(search_all_experiments=True, filter_string=f"attributes.start_time > {int(started)}", output_format="list")
    assert made.info.status == "FAILED"


# Names on MLflow's pages


def test_a_failure_quotes_no_picture_and_no_password():
    run = make({})
    run.fail("![x](http://u:secret@h/) <img src=x>")
    tags = mlflow.get_run(run.id).data.tags
    assert tags["mlflow.note.content"] == f"**Failed.** {markdown('![x](http://u:secret@h/) <img src=x>')}"
    assert "secret" not in tags["error"] + tags["mlflow.note.content"]
    run.close("FAILED")


def test_models_are_programs_and_never_pickles(store, tmp_path):
    import numpy as np

    from stn_pipeline.model import build

    network = build(TrainConfig(transform="none"), (1, 8, 8), 3)
    with open_run("x", CONFIG) as run:
        model_id = run.log_model(network, np.zeros((2, 1, 8, 8), dtype=np.float32))
    assert status(run) == "FINISHED" and mlflow.active_run() is None
    model = mlflow.get_logged_model(model_id)
    assert model.source_run_id == run.id and model.experiment_id == mlflow.get_run(run.id).info.experiment_id
    folder = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.id}/model", dst_path=str(tmp_path)))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert "model.pt2" in names and not any("pickle" in name or name.endswith((".pkl", ".pth")) for name in names)


def test_a_knob_of_eval_that_means_the_scored_runs_own_is_no_untruth():
    params = {"run_id": "r", "data_dir": "same", "distortion": "same", "split": "test", "robustness": "1000", "device": "auto"}
    record = SimpleNamespace(data=SimpleNamespace(params=params))
    used = EvalConfig(run_id="r", data_dir="elsewhere")
    assert opening._untrue(record, used) == ""
    params["split"] = "val"
    assert opening._untrue(record, used) == "split=val"
