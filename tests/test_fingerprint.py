"""What names a training: the same for what cannot change what is learned, another for all that can."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from stn_pipeline.config import MACHINE, TrainConfig, absent_of, knob
from stn_pipeline.data import Split, Splits, load
from stn_pipeline.training.fingerprint import NAMELESS, changes, code_version, conditions, fingerprint, gone_on

CPU = torch.device("cpu")
CONFIG = TrainConfig(dataset="digits")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load(CONFIG, announce=lambda line: None)


def name(splits: Splits, where: torch.device = CPU, engine: Any = "plain", **knobs: object) -> str:
    return fingerprint(CONFIG.model_copy(update=knobs), splits, conditions(engine, where))


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


def test_another_device_engine_torch_or_code_is_another_training(splits, monkeypatch):
    before = name(splits)
    assert name(splits, torch.device("cuda:1")) == name(splits, torch.device("cuda:0")) != before
    assert len({name(splits, engine=engine) for engine in ("plain", "kernels", "captured")}) == 3
    assert name(splits, compile="on") == before  # what was asked for is not what was had
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "1.0")
        assert name(splits) != before
    monkeypatch.setattr("stn_pipeline.training.fingerprint.code_version", lambda: "another")
    assert name(splits) != before


# Knobs that a run lacks


class Later(TrainConfig):
    """Of a version to come: with a knob more, one whose default has changed, and one that is declared without `knob`."""

    zoom: float = knob(1.0, help="new")
    lr: float = knob(0.001, help="learning rate", absent=0.01)
    bare: int = 3


def test_a_knob_that_a_run_lacks_counts_as_its_default(splits):
    def later(**knobs: object) -> str:
        return fingerprint(Later(dataset="digits", **knobs), splits, conditions("plain", CPU))

    assert later(lr=0.01) == name(splits) != later(lr=0.01, zoom=1.5)
    assert later(lr=0.001) == later() == name(splits, lr=0.001) != name(splits)
    assert later(lr=0.01, bare=4) != later(lr=0.01)


def test_what_an_absent_knob_counts_as_never_changes():
    """Runs are named without the knobs that stand at these. Whoever changes a default keeps the one of here as `absent`."""
    absent = {knob: absent_of(field) for knob, field in TrainConfig.model_fields.items() if knob not in {*MACHINE, "dataset"}}
    pinned = {
        "image_size": 0, "distortion": "none", "draws": 1, "val_fraction": 0.1, "arch": "report", "transform": "affine", "cpab_cells": 3,
        "cpab_boundary": "free", "iterations": 1, "supersample": 1, "coordconv": False, "coordconv_r": False, "padding": "zeros",
        "epochs": 50, "batch_size": 64, "lr": 0.01, "loc_lr_multiplier": 0.1, "optimizer": "adam", "weight_decay": 0.0,
        "schedule": "constant", "seed": 0, "precision": "fp32",
    }  # fmt: skip
    assert {knob: absent[knob] for knob in pinned} == pinned


# Trainings that went on


def test_what_changed_on_the_way_is_remembered_and_leaves_no_name(splits):
    first, second = ({"code": code, "torch": "2.9", "engine": "plain", "device": "cpu"} for code in ("1f2e", "3d4c"))
    assert gone_on(first, first) == first and changes(first) == ""
    changed = gone_on(first, second)
    assert changes(changed) == "code 1f2e, then 3d4c"
    assert gone_on(changed, second) == changed  # interrupted again under the second: not whole for that
    assert changes(gone_on(changed, first)) == "code 1f2e, then 3d4c, then 1f2e"
    assert (
        changes(gone_on({}, first))
        == "code unknown, then 1f2e; torch unknown, then 2.9; engine unknown, then plain; device unknown, then cpu"
    )
    assert fingerprint(CONFIG, splits, changed) == NAMELESS != fingerprint(CONFIG, splits, second)


def test_the_codes_version_is_that_of_the_code_that_was_loaded():
    assert code_version() == code_version() and len(code_version()) == 12
