"""The gallery moves points as far as it says, and draws runs that were trained beside each other."""

import io

import pytest
import torch
from PIL import Image

from stn_pipeline import gallery, tracking
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import load
from stn_pipeline.errors import ConfigError, RunError
from stn_pipeline.jobs import run_trial
from stn_pipeline.transforms import TRANSFORMS, lattice


@pytest.mark.parametrize("family", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("way", [0.0, 0.1, 0.4])
def test_a_warp_goes_as_far_as_asked(family, way):
    direction = torch.randn(family.n_params, generator=torch.Generator().manual_seed(3))
    points = lattice(28, 28)
    moved = (family(gallery.towards(family, direction, way, points), points)[0] - points).norm(dim=1)
    assert moved.mean() == pytest.approx(way, abs=1e-3)


def test_families_side_by_side(tmp_path):
    gallery.gallery(["--dataset", "digits", "--out", str(tmp_path / "families.png")])
    picture = Image.open(io.BytesIO((tmp_path / "families.png").read_bytes()))
    assert picture.format == "PNG" and picture.width > 100 * len(TRANSFORMS)


@pytest.fixture(scope="module")
def runs(store):
    ids = []
    for knobs in ({"transform": "affine"}, {"transform": "none"}, {"transform": "affine", "distortion": "rts"}):
        config = TrainConfig.parse({"dataset": "digits", "epochs": 1, **knobs})
        with tracking.open_run("x", config) as run:
            run_trial(config, load(config), run)
        ids.append(run.id)
    return ids


def test_trained_networks_side_by_side(runs, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("stn_pipeline.figures.warps_by_arm", lambda images, arms, title: drawn.update(images=images, arms=arms) or "figure")
    monkeypatch.setattr("stn_pipeline.figures.to_png", lambda figure: figure.encode())
    gallery.gallery(["--runs", f"{runs[0]},{runs[1]}", "--images", "5", "--out", str(tmp_path / "x.png")])
    assert list(drawn["arms"]) == ["affine", "none"] and len(drawn["images"]) == 5
    network = tracking.load_checkpoint(runs[0]).build_best()
    warped, grid = network.warp(torch.from_numpy(drawn["images"]))
    assert torch.equal(torch.from_numpy(drawn["arms"]["affine"][0]), warped.detach())
    assert torch.equal(torch.from_numpy(drawn["arms"]["affine"][1]), grid.detach())
    assert drawn["arms"]["none"][1] is None


@pytest.mark.parametrize(
    ("flags", "error", "told"),
    [
        (["--image", "99999"], ConfigError, r"image=99999: the test split has 360 images: give a smaller number"),
        (["--out", "nowhere/x.png"], ConfigError, r"out=nowhere/x\.png: no folder nowhere: make it first"),
        (["--runs", "nonsense"], RunError, "nonsense"),
    ],
)
def test_wrong_input_is_one_line(store, flags, error, told):
    with pytest.raises(error, match=told):
        gallery.gallery(["--dataset", "digits", *flags])


def test_runs_of_different_shapes_are_refused(runs):
    with pytest.raises(ConfigError, match=r"was built for images \(1, 12, 12\), the first for \(1, 8, 8\): give runs of one shape"):
        gallery.gallery(["--runs", f"{runs[0]},{runs[2]}"])
