"""What names a training: the same for what cannot change what is learned, another for all that can."""

from dataclasses import replace

import pytest
import torch

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split, Splits, load
from stn_pipeline.training.fingerprint import ROOMS, code_version, fingerprint

CPU = torch.device("cpu")
CONFIG = TrainConfig(dataset="digits")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load(CONFIG, announce=lambda line: None)


def name(splits: Splits, where: torch.device = CPU, **knobs: object) -> str:
    return fingerprint(CONFIG.model_copy(update=knobs), splits, where)


def test_it_is_repeatable_and_does_not_ask_where(splits):
    assert name(splits) == name(splits) and len(name(splits)) == 16
    assert name(splits, data_dir="elsewhere") == name(splits, device="cpu") == name(splits)
    assert name(splits, dataset="folder:/home/me/digits") == name(splits)  # the pixels say which set it is


@pytest.mark.parametrize(
    "knobs", [{"seed": 1}, {"lr": 0.011}, {"epochs": 49}, {"transform": "diffeo"}, {"padding": "border"}, {"val_fraction": 0.2}]
)
def test_another_knob_is_another_training(splits, knobs):
    assert name(splits, **knobs) != name(splits)


def test_what_a_network_does_not_have_does_not_count(splits):
    assert name(splits, transform="none", loc_lr_multiplier=1.0, padding="border") == name(splits, transform="none")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_one_pixel_or_label_is_another_training(splits, part):
    split = getattr(splits, part)
    images, labels = split.images.clone(), split.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[0] = (labels[0] + 1) % 10
    for changed in (Split(images, split.labels), Split(split.images, labels)):
        assert name(replace(splits, **{part: changed})) != name(splits)


def test_another_device_torch_or_code_is_another_training(splits, monkeypatch):
    before = name(splits)
    assert name(splits, torch.device("cuda:1")) == name(splits, torch.device("cuda:0")) != before
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "1.0")
        assert name(splits) != before
    monkeypatch.setattr("stn_pipeline.training.fingerprint.code_version", lambda: "another")
    assert name(splits) != before


def test_the_codes_version_is_of_the_rooms_that_decide_what_is_learned():
    assert code_version() == code_version() and len(code_version()) == 12
    assert set(ROOMS) == {"transforms", "data", "model", "training"}
