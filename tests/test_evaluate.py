"""The eval entry point on folders that are not what they were when the run was trained: renamed, halved, mixed with what it has seen."""

import sys
from contextlib import nullcontext
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from stn_pipeline import evaluate, train
from stn_pipeline.data import load
from stn_pipeline.errors import DataError
from stn_pipeline.tracking import load_checkpoint

CLASSES = ("ant", "bee", "cow")


def picture(label: int, number: int, grey: bool = True) -> Image.Image:
    """Which third is bright is the class."""
    pixels = np.random.default_rng([label, number]).integers(0, 40, (12, 12), dtype=np.uint8)
    pixels[:, 4 * label : 4 * label + 4] += 180
    return Image.fromarray(pixels).convert("L" if grey else "RGB")


def put(root: Path, name: str, image: Image.Image) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(root / name)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run on a folder without test/, its images in colour or not; and the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        root = tmp_path_factory.mktemp("data") / "set"
        for label, name in enumerate(CLASSES):
            for i in range(40):
                put(root, f"{name}/{i}.png", picture(label, i, grey=i > 0))
        train.train(["--dataset", f"folder:{root}", "--epochs", "8", "--batch_size", "16", "--lr", "0.003", "--device", "cpu"])
        run = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
        assert run.data.metrics["test/accuracy"] == 1
        yield run, root


def score(run, *flags: str):
    evaluate.evaluate(["--run_id", run.info.run_id, "--robustness", "0", *flags])
    return mlflow.search_runs(search_all_experiments=True, output_format="list", max_results=1)[0]


def test_a_renamed_class_costs_nothing_and_the_split_is_still_the_runs(trained):
    run, root = trained
    (root / "cow").rename(root / "COW")
    try:
        scored = score(run)
    finally:
        (root / "COW").rename(root / "cow")
    assert scored.data.metrics["test/accuracy"] == 1
    assert scored.data.metrics["test/loss"] == pytest.approx(run.data.metrics["test/loss"], abs=1e-6)
    assert scored.data.tags["warning"] == f"class COW is taken for cow, as run {run.info.run_id} calls it"
    assert "**warning:**" in scored.data.tags["mlflow.note.content"]


def test_new_files_move_no_image_and_the_change_is_told(trained, capsys):
    run, root = trained
    before = load_checkpoint(run.info.run_id)
    new = [root / f"ant/0 new {i}.png" for i in range(5)]  # first by name
    for i, path in enumerate(new):
        picture(0, 100 + i).save(path)
    try:
        now = load(before.config, announce=lambda line: None)
        assert now.members.keys() == before.members.keys()
        for part, ids in now.members.items():
            assert not np.isin(ids, np.concatenate([had for name, had in before.members.items() if name != part])).any()
        scored = score(run)
    finally:
        for path in new:
            path.unlink()
    n_new = len(now.members["test"]) - len(before.members["test"])
    expected = f"the test split is not the one that run {run.info.run_id} had: 0 images are gone, {n_new} are new"
    assert (scored.data.tags.get("warning") == expected) == (n_new > 0)
    assert ("warning: the test split" in capsys.readouterr().err) == (n_new > 0)


def test_a_folder_of_two_classes_and_nothing_but_test_is_scored_and_what_was_trained_on_is_left_out(trained, tmp_path):
    run, root = trained
    for label in (1, 2):
        for i in range(6):
            put(tmp_path, f"test/{CLASSES[label]}/{i}.png", picture(label, 200 + i))  # all grey, where the run's were in colour
    for path in (root / "bee").iterdir():
        (tmp_path / "test/bee" / f"copy {path.name}").write_bytes(path.read_bytes())
    scored = score(run, "--dataset", f"folder:{tmp_path}")
    members = load_checkpoint(run.info.run_id).members
    assert scored.data.metrics["test/accuracy"] == 1
    warning = scored.data.tags["warning"]
    n_left = int(warning.partition(" of 52 test images are left out")[0].rpartition(" ")[2])
    assert 25 < n_left < 40 and n_left < len(members["train"]) + len(members["val"])
    inputs = [item.dataset.name for item in scored.inputs.dataset_inputs]
    assert "Hardest classes by F1: bee 1.000, cow 1.000." in scored.data.tags["mlflow.note.content"]  # of ant there is no image
    assert len(inputs) == 1 and f"-test-{52 - n_left}" in inputs[0]


def test_a_class_that_the_run_does_not_know_leaves_no_run(trained, tmp_path):
    run, _ = trained
    for i in range(3):
        put(tmp_path, f"test/ant/{i}.png", picture(0, 300 + i))
        put(tmp_path, f"test/cows/{i}.png", picture(2, 300 + i))
    with pytest.raises(DataError, match=r"does not know cows; it was built for 3: ant, bee, cow: .*; did you mean cow\?"):
        score(run, "--dataset", f"folder:{tmp_path}")
    with pytest.raises(DataError, match="has test/ and no train/"):
        score(run, "--dataset", f"folder:{tmp_path}", "--split", "val")


def test_resuming_wants_the_same_names_too(trained, monkeypatch):
    run, root = trained
    monkeypatch.setattr(sys.modules["stn_pipeline.tracking"], "resuming", lambda run_id: nullcontext())
    (root / "cow").rename(root / "dow")  # the order is the same
    try:
        with pytest.raises(DataError, match="has not the images it was trained on"):
            train.train(["--resume", run.info.run_id])
    finally:
        (root / "dow").rename(root / "cow")
