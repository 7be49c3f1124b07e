"""What one training leaves in MLflow, read back through MLflow's own client from a real SQLite store."""

import json
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stn_pipeline import evaluate, train
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ConfigError, DataError, DivergedError, RunError
from stn_pipeline.tracking import load_checkpoint, open_run
from stn_pipeline.tracking.opening import _named_by_mlflow
from stn_pipeline.training import score

FLAGS = "--dataset digits --transform diffeo --epochs 3 --device cpu".split()
EPOCH_METRICS = {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "time/epoch_s", "speed/images_per_s"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Work in an empty folder with a store of its own; nothing of the user's environment leaks in."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield folder
        mlflow.set_tracking_uri(None)


def runs() -> list[mlflow.entities.Run]:
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


@pytest.fixture(scope="module")
def trained(store):
    train.train(FLAGS)
    (run,) = runs()
    return run


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    return Path(mlflow.artifacts.download_artifacts(run_id=trained.info.run_id, dst_path=str(tmp_path_factory.mktemp("artifacts"))))


def test_the_run_says_what_it_is(trained):
    assert (trained.info.run_name, trained.info.status) == ("diffeo digits s0", "FINISHED")
    assert mlflow.get_experiment(trained.info.experiment_id).name == "stn"
    assert {"device", "version.torch", "version.mlflow", "version.python", "mlflow.source.git.commit"} <= set(trained.data.tags)
    note = trained.data.tags["mlflow.note.content"]
    assert note.startswith(f"**diffeo digits s0**: test loss {trained.data.metrics['test/loss']:.4f} nats, accuracy ")


def test_every_knob_is_a_param_and_config_yaml_gives_the_config_back(trained, folder):
    config = TrainConfig.parse({"dataset": "digits", "transform": "diffeo", "epochs": 3, "device": "cpu"})
    assert trained.data.params == {name: str(value) for name, value in config.model_dump().items()}
    assert TrainConfig.parse(yaml.safe_load((folder / "config.yaml").read_text())) == config


def test_epochs_are_metrics_with_steps_from_1(trained):
    client = mlflow.MlflowClient()
    for name in EPOCH_METRICS | {"warp/shift", "warp/outside", "warp/log_det"}:
        assert [point.step for point in client.get_metric_history(trained.info.run_id, name)] == [1, 2, 3], name


def test_the_artifacts_are_there_and_agree(trained, folder):
    names = {path.name for path in folder.iterdir()}
    assert {"confusion_matrix.png", "confusion_matrix.json", "curves.png", "warps.png", "report.json", "config.yaml"} <= names
    for picture in folder.glob("*.png"):
        assert min(Image.open(picture).size) > 300
    report = json.loads((folder / "report.json").read_text())
    counts = np.array(json.loads((folder / "confusion_matrix.json").read_text())["counts"])
    assert counts.sum() == report["n"] == 360
    assert counts.trace() / 360 == report["accuracy"] == trained.data.metrics["test/accuracy"]
    assert report["accuracy_95"][0] < report["accuracy"] < report["accuracy_95"][1]


def test_the_warps_are_an_image_for_every_epoch(folder):
    steps = {path.name.split("step+")[1].split("+")[0] for path in (folder / "images").glob("warps*.png")}
    assert steps == {"1", "2", "3"}


def test_the_inputs_name_the_splits_with_digests(trained):
    inputs = {tag.value: entry.dataset for entry in trained.inputs.dataset_inputs for tag in entry.tags}
    assert {context: dataset.name for context, dataset in inputs.items()} == {
        "train": "digits-train-1293", "val": "digits-val-144", "test": "digits-test-360",
    }  # fmt: skip
    assert len({dataset.digest for dataset in inputs.values()}) == 3


def test_the_logged_model_is_the_best_epochs_network(trained):
    network = load_checkpoint(trained.info.run_id).build_best()
    model = mlflow.pyfunc.load_model(f"runs:/{trained.info.run_id}/model")
    images = torch.rand(5, 1, 8, 8)
    with torch.inference_mode():
        expected = network(images).numpy()
    np.testing.assert_allclose(model.predict(images.numpy()), expected, atol=1e-5, rtol=0)
    assert model.metadata.get_input_schema() is not None


def test_eval_scores_the_run_again_in_a_run_of_its_own(trained):
    evaluate.evaluate(["--run_id", trained.info.run_id])
    evaluation = next(run for run in runs() if run.info.run_name.startswith("eval"))
    assert evaluation.data.tags["evaluated_run"] == evaluation.data.tags["mlflow.parentRunId"] == trained.info.run_id
    for name in ("test/loss", "test/accuracy"):
        assert evaluation.data.metrics[name] == trained.data.metrics[name]
    evaluate.evaluate(["--run_id", trained.info.run_id, "--split", "val"])
    best = load_checkpoint(trained.info.run_id).state
    assert runs()[0].data.metrics["val/loss"] == pytest.approx(best.best_val_loss, abs=1e-6)


def test_eval_tells_robustness_unless_asked_not_to_and_may_distort(trained):
    evaluate.evaluate(["--run_id", trained.info.run_id, "--robustness", "50"])
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(runs()[0].info.run_id)}
    assert {"robustness.png", "robustness.json", "report.json"} <= names
    evaluate.evaluate(["--run_id", trained.info.run_id, "--robustness", "0", "--distortion", "rotated"])
    (run, *_) = runs()
    assert "robustness.png" not in {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert run.info.run_name == "eval diffeo rotated digits s0, test"
    assert run.data.metrics["test/accuracy"] < trained.data.metrics["test/accuracy"] - 0.1
    with pytest.raises(DataError, match=r"images \(1, 12, 12\); run \w+ was built for \(1, 8, 8\)"):
        evaluate.evaluate(["--run_id", trained.info.run_id, "--distortion", "rts"])


def test_the_checkpoint_holds_the_network_that_was_scored(trained):
    from stn_pipeline.data import load

    checkpoint = load_checkpoint(trained.info.run_id)
    assert score(checkpoint.build_best(), load(checkpoint.config).test).loss == pytest.approx(trained.data.metrics["test/loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "error", "text"),
    [
        (["--resume", "{run}"], RunError, "resume={run}: the run is finished, nothing is left to train: start a new one with more epochs"),
        (["--resume", "nope"], RunError, "run nope: not to be had from sqlite"),
        (["--dataset", "folder:/nowhere"], DataError, "/nowhere"),
        (["--dataset", "mnist", "--data_dir", "/proc/nothing"], DataError, "mnist"),
    ],
)
def test_bad_input_leaves_no_run(trained, flags, error, text):
    before = len(runs())
    with pytest.raises(error, match=text.format(run=trained.info.run_id)) as caught:
        train.train([flag.format(run=trained.info.run_id) for flag in flags])
    assert "\n" not in str(caught.value)
    assert len(runs()) == before


def test_eval_refuses_a_set_of_other_classes(trained, tmp_path):
    for part, label, at in [(p, c, i) for p in ("train", "test") for c in ("a", "b", "c") for i in range(20)]:
        folder = tmp_path / part / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), at * 10).save(folder / f"{at}.png")
    before = len(runs())
    with pytest.raises(DataError, match=r"of its 3 classes run \w+ does not know a, b, c; it was built for 10: 0, 1, 2, "):
        evaluate.evaluate(["--run_id", trained.info.run_id, "--dataset", f"folder:{tmp_path}"])
    assert len(runs()) == before


@pytest.mark.parametrize(
    ("error", "status"), [(DivergedError("loss is nan"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (ZeroDivisionError("x"), "FAILED")]
)
def test_a_run_that_breaks_is_closed_with_the_right_status(store, error, status, signals_restored):
    with pytest.raises(type(error)), open_run("broken", TrainConfig()) as run:
        raise error
    closed = mlflow.get_run(run.id)
    assert closed.info.status == status
    assert ("error" in closed.data.tags) == (status == "FAILED")


def test_a_collapsed_run_says_so_while_it_runs_and_on_its_page(store, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["stn_pipeline.training.fit"], "PATIENCE_STEPS", 40)
    flags = "--dataset digits --epochs 2 --lr 100 --device cpu --transform affine".split()
    train.train(flags)
    (run, *_) = runs()
    out = capsys.readouterr()
    assert "warning: epoch 2 looks collapsed: val accuracy 0." in out.out + out.err
    assert run.data.tags["collapsed"] == "true" and "is at chance" in run.data.tags["collapsed.why"]
    assert "**Looked collapsed** in 1 of 2 epochs, at last in epoch 2: val accuracy 0." in run.data.tags["mlflow.note.content"]


def test_a_diverged_run_fails_with_what_where_and_the_learning_rate(store):
    with pytest.raises(DivergedError, match=r"training loss is (inf|nan) at epoch 1, step \d+ of 21, lr=100.0, .*; try lr=10$"):
        train.train("--dataset digits --optimizer sgd --lr 100 --weight_decay 10 --epochs 5 --device cpu".split())
    (run, *_) = runs()
    assert run.info.status == "FAILED" and "lr=100.0" in run.data.tags["error"]


def test_auto_falls_back_loudly_and_the_param_says_what_was_used(store, capsys):
    train.train("--epochs 1 --device cpu --data_dir /proc/nothing --transform none".split())
    (run, *_) = runs()
    assert run.data.params["dataset"] == run.data.tags["dataset_used"] == "digits"
    assert "digits" in capsys.readouterr().out


def images_in_folders(folder: Path, n_classes: int, side: int) -> str:
    for part, label, at in [(p, c, i) for p in ("train", "test") for c in range(n_classes) for i in range(20)]:
        (folder / part / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side + 2), (at * 10, label * 60, 0)).save(folder / part / f"class {label}" / f"{at}.png")
    return f"folder:{folder}"


def test_images_too_small_leave_no_run(store, tmp_path):
    before = len(runs())
    with pytest.raises(ConfigError, match="images are 5x3 px: both sides must be >= 4 px"):
        train.train(["--dataset", images_in_folders(tmp_path, 2, 3), "--epochs", "1"])
    assert len(runs()) == before


def test_a_folder_run_is_resumed_where_it_moved_but_not_on_other_images(store, tmp_path, monkeypatch, signals_restored):
    dataset = images_in_folders(tmp_path / "here", 3, 9)
    calls = []

    def interrupt(self, record):
        calls.append(record.number)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("stn_pipeline.progress.Progress.watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.train(["--dataset", dataset, "--epochs", "3", "--device", "cpu"])
    (run, *_) = runs()
    assert (run.info.status, run.info.run_name) == ("KILLED", "affine here s0")
    (tmp_path / "here").rename(tmp_path / "there")
    train.train(["--resume", run.info.run_id, "--dataset", f"folder:{tmp_path / 'there'}"])
    assert calls == [1, 2, 3] and mlflow.get_run(run.info.run_id).info.status == "FINISHED"
    mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
    (tmp_path / "there" / "train" / "class 0" / "0.png").unlink()
    with pytest.raises(DataError, match="has not the images it was trained on: restore them, or start a new run"):
        train.train(["--resume", run.info.run_id, "--dataset", f"folder:{tmp_path / 'there'}"])


def test_a_store_that_cannot_be_used_is_one_line(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    with pytest.raises(RunError, match="^MLFLOW_EXPERIMENT_ID=77: .* has no such experiment: unset it, or name one that is there$"):
        train.train(["--dataset", "digits", "--epochs", "1"])


def test_only_names_that_mlflow_made_up_are_replaced():
    assert _named_by_mlflow("redolent-chimp-963")
    assert not _named_by_mlflow("cifar-big-2") and not _named_by_mlflow("mine")
