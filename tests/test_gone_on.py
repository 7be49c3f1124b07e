"""A run that goes on under other code, torch, engine or kind of device has no fingerprint, and says so wherever it is read."""

import platform
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml

from stn_pipeline import tracking, train
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import load
from stn_pipeline.jobs import Job, Trainings, Worker
from stn_pipeline.jobs.trial import run_trial
from stn_pipeline.training.fingerprint import NAMELESS, conditions, fingerprint

KNOBS: dict[str, Any] = {"dataset": "digits", "device": "cpu", "epochs": 2, "transform": "none", "batch_size": 256}
FLAGS = [flag for name, value in KNOBS.items() for flag in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def quick(store, signals_restored, monkeypatch):
    """No model is exported, no picture drawn: seconds each."""
    monkeypatch.setattr(tracking.Run, "log_model", lambda self, network, example: None)
    monkeypatch.setattr("stn_pipeline.jobs.trial._pictures", lambda *given: {})


@pytest.fixture
def interrupted(monkeypatch) -> str:
    """A run that was interrupted after its first epoch."""
    with monkeypatch.context() as patch:
        patch.setattr("stn_pipeline.progress.Progress.watch", lambda self, record: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.train(FLAGS)
    return mlflow.search_runs(search_all_experiments=True, output_format="list")[0].info.run_id


def tags(run_id: str) -> dict[str, str]:
    found: dict[str, str] = mlflow.get_run(run_id).data.tags
    return found


def expected(engine: Any = "plain") -> str:
    config = TrainConfig.parse(KNOBS)
    return fingerprint(config, load(config, announce=lambda line: None), conditions(engine, torch.device("cpu")))


def other_code(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("stn_pipeline.training.fingerprint.code_version", lambda: "0ther")


def other_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.__version__", "1.0.0")


def other_engine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("stn_pipeline.jobs.trial.choose_engine", lambda *given: "kernels")


def test_what_goes_on_as_it_was_keeps_its_fingerprint(interrupted, capsys):
    assert tags(interrupted)["fingerprint"] == expected()
    train.train(["--resume", interrupted])
    assert tags(interrupted)["fingerprint"] == expected() and "went_on_under" not in tags(interrupted)
    assert tags(interrupted)["engine"] == "plain" and "conditions" not in capsys.readouterr().out + tags(interrupted)["mlflow.note.content"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_code, ", then 0ther"),
        (other_torch, f"torch {torch.__version__.partition('+')[0]}, then 1.0.0"),
        (other_engine, "plain, then kernels"),
    ],
)
def test_what_goes_on_under_other_conditions_has_none_and_says_so(interrupted, monkeypatch, capsys, change, told):
    change(monkeypatch)
    train.train(["--resume", interrupted])
    found = tags(interrupted)
    assert found["fingerprint"] == NAMELESS and told in found["went_on_under"]
    for said in (capsys.readouterr().out, found["mlflow.note.content"]):
        assert "Went on under other conditions" in said and told in said and "no comparison reuses it" in said
    assert tracking.load_checkpoint(interrupted).state.epoch == 2


def test_one_that_was_mixed_stays_so_though_the_first_code_is_back(interrupted, monkeypatch):
    run = tracking.Run(interrupted)
    config = TrainConfig.parse(KNOBS)
    splits = load(config, announce=lambda line: None)
    with monkeypatch.context() as patch:
        other_code(patch)
        run_trial(config, splits, run, resume=tracking.load_checkpoint(interrupted))
    again = tracking.load_checkpoint(interrupted)
    run_trial(config, splits, run, resume=again)
    assert tags(interrupted)["fingerprint"] == NAMELESS and tags(interrupted)["went_on_under"].count("then") == 2


def test_a_checkpoint_that_knows_no_conditions_gives_no_fingerprint(interrupted, monkeypatch):
    """As those of the version before this one."""
    kept = tracking.load_checkpoint(interrupted)
    object.__setattr__(kept, "under", {})
    monkeypatch.setattr("stn_pipeline.tracking.load_checkpoint", lambda run_id: kept)
    train.train(["--resume", interrupted])
    assert tags(interrupted)["fingerprint"] == NAMELESS and "code unknown, then" in tags(interrupted)["went_on_under"]


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_training_that_a_comparison_or_a_sweep_goes_on_with_is_told_the_same(interrupted, monkeypatch, is_changed):
    config = TrainConfig.parse(KNOBS)
    trainings: Trainings[str] = Trainings()
    trainings.adopt("key", tracking.find_run(interrupted))
    run = trainings.again("key")
    assert run is not None
    if is_changed:
        other_code(monkeypatch)
    job = trainings.job("key", "a s0", config, run)
    numbers: list[int] = []
    outcome = Worker().perform(job, "cpu", lambda record: numbers.append(record.number) is None)
    said = trainings.ended(job, outcome)
    assert outcome.kind == "done" and numbers == [2]
    assert (tags(interrupted)["fingerprint"] == NAMELESS) == ("Went on under other conditions" in said) == is_changed
    assert is_changed or tags(interrupted)["fingerprint"] == expected()


def test_a_trial_that_is_tried_again_in_another_run_says_so_too(interrupted, monkeypatch):
    other_code(monkeypatch)
    config = TrainConfig.parse(KNOBS)
    run = tracking.create_run("t1", tracking.experiment_id(), config, {})
    outcome = Worker().perform(Job("t1", run.id, config, resume=interrupted), "cpu", lambda record: True)
    assert outcome.kind == "done" and ", then 0ther" in tags(run.id)["went_on_under"]
    assert "fingerprint" not in tags(run.id)  # a trial has no test score to be used again


def test_a_run_says_which_machine_and_engine_trained_it(interrupted):
    found = tags(interrupted)
    assert found["threads"] == str(torch.get_num_threads()) and found["engine"] == "plain" and "gpu" not in found
    assert found["device"] == f"{found['processor']}, {found['threads']} threads" and len(found["processor"]) > 2
    cpuinfo = Path("/proc/cpuinfo")
    assert found["processor"] != platform.machine() or not cpuinfo.exists() or "model name" not in cpuinfo.read_text()
    assert yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{interrupted}/config.yaml"))["compile"] == "auto"
