"""One home for every knob: command line, MLproject, docs/knobs.md and the rooms that know the names agree with config.py."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.projects import _project_spec

from stn_pipeline import cli, docs
from stn_pipeline.config import DATA, DATASET_CHOICES, DATASETS, EvalConfig, TrainConfig, choices_of, search_of
from stn_pipeline.data import SOURCES
from stn_pipeline.errors import ConfigError
from stn_pipeline.transforms import TRANSFORMS
from stn_pipeline.transforms.sampler import PADDINGS
from tests.conftest import ROOT

OTHERS = {
    "dataset": "digits", "data_dir": "some where", "image_size": "32", "val_fraction": "0.25", "transform": "diffeo", "coordconv": "True",
    "coordconv_r": "true", "padding": "border", "epochs": "7", "batch_size": "128", "lr": "2e-2", "loc_lr_multiplier": "1",
    "optimizer": "sgd", "weight_decay": "1e-4", "schedule": "cosine", "seed": "3", "device": "cpu", "precision": "bf16",
    "compile": "off", "distortion": "rts", "draws": "3", "arch": "stcnn", "cpab_cells": "4", "cpab_boundary": "fixed", "iterations": "2",
    "supersample": "2",
}  # fmt: skip


def from_mlproject(entry_point: str, given: dict[str, str], knobs: type[TrainConfig] | type[EvalConfig]):
    project = _project_spec.load_project(str(ROOT))
    command = project.get_entry_point(entry_point).compute_command(given, storage_dir=None)
    words = shlex.split(command)
    return words[2], knobs.parse(cli.parse(knobs, words[3:], ""))


def test_mlproject_defaults_are_the_config():
    assert from_mlproject("main", {}, TrainConfig) == ("stn_pipeline.train", TrainConfig())
    assert from_mlproject("eval", {"run_id": "a"}, EvalConfig) == ("stn_pipeline.evaluate", EvalConfig(run_id="a"))


def test_mlproject_passes_every_knob_in_the_users_spelling():
    assert set(OTHERS) == set(TrainConfig.model_fields)
    assert from_mlproject("main", OTHERS, TrainConfig)[1] == TrainConfig.parse(OTHERS)
    assert all(getattr(TrainConfig.parse(OTHERS), name) != getattr(TrainConfig(), name) for name in OTHERS)


def test_mlproject_logs_defaults_as_the_program_spells_them():
    parameters = _project_spec.load_project(str(ROOT)).get_entry_point("main").parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        name: str(value) for name, value in TrainConfig().model_dump().items() if name != "dataset"
    }


@given(st.sampled_from(sorted(set(OTHERS) - {"coordconv", "coordconv_r"})), st.booleans(), st.booleans())
def test_flags_read_the_same_with_dashes_and_with_an_equals_sign(name, dashes, equals):
    flag = "--" + (name.replace("_", "-") if dashes else name)
    argv = [f"{flag}={OTHERS[name]}"] if equals else [flag, OTHERS[name]]
    assert cli.parse(TrainConfig, argv, "") == {name: OTHERS[name]}


def test_written_files_are_not_stale():
    assert (ROOT / "MLproject").read_text() == docs.mlproject()
    assert (ROOT / "conda.yaml").read_text() == docs.conda()
    assert (ROOT / docs.KNOBS).read_text() == docs.knobs_page()


def test_rooms_know_the_names_that_the_config_offers():
    assert choices_of(TrainConfig.model_fields["transform"]) == ("none", *TRANSFORMS)
    assert choices_of(TrainConfig.model_fields["padding"]) == PADDINGS
    assert set(DATASETS) == {"auto", *SOURCES}


def test_what_a_sweep_may_search_lies_within_the_bounds():
    for name, field in TrainConfig.model_fields.items():
        search = search_of(field)
        ends = () if search is None else search.values if hasattr(search, "values") else (search.low, search.high)
        for value in ends:
            assert getattr(TrainConfig.parse({name: value} | ({"coordconv": True} if name == "coordconv_r" else {})), name) == value


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--lr -1", "lr=-1: must be > 0.0 (default 0.01)"),
        ("--lr 0", "lr=0: must be > 0.0 (default 0.01)"),
        ("--lr abc", "lr=abc: must be a number (default 0.01)"),
        ("--lr nan", "lr=nan: must be finite (default 0.01)"),
        ("--lr", "argument --lr: expected one argument; --help lists the flags"),
        ("--epochs 0", "epochs=0: must be >= 1 (default 50)"),
        ("--epochs 2.5", "epochs=2.5: must be a whole number (default 50)"),
        ("--batch_size 0", "batch_size=0: must be >= 1 (default 64)"),
        ("--val_fraction 0", "val_fraction=0: must be > 0.0 (default 0.1)"),
        ("--val_fraction 0.9", "val_fraction=0.9: must be <= 0.5 (default 0.1)"),
        ("--seed -1", "seed=-1: must be >= 0 (default 0)"),
        ("--coordconv maybe", "coordconv=maybe: must be true or false (default false)"),
        ("--coordconv_r true", "coordconv_r=true needs coordconv=true"),
        ("--transform difeo", "transform=difeo: choose none, affine, diffeo, similarity, projective, tps, cpab; did you mean diffeo?"),
        ("--padding edge", "padding=edge: choose zeros, border, reflection"),
        ("--optimizer adm", "optimizer=adm: choose adam, adamw, sgd; did you mean adam?"),
        ("--device gpu", "device=gpu: choose auto, cpu, cuda (a GPU) or cuda:N"),
        ("--device cuda:x", "device=cuda:x: choose auto, cpu, cuda (a GPU) or cuda:N"),
        ("--dataset mnits", f"dataset=mnits: choose {DATASET_CHOICES}; did you mean mnist?"),
        ("--dataset folder:", f"dataset=folder:: choose {DATASET_CHOICES}"),
        ("--transfrm diffeo", "unknown flag --transfrm; did you mean transform?; --help lists the flags"),
        ("diffeo", "unknown flag diffeo; --help lists the flags"),
        ("--resume abc --lr 1", "lr: the knobs of a resumed run are its own; with --resume go only device, data_dir and dataset"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_clear_line(argv, line):
    from stn_pipeline.train import train

    with pytest.raises(ConfigError) as caught:
        train(shlex.split(argv))
    assert str(caught.value) == line


def test_eval_needs_a_run_id():
    with pytest.raises(ConfigError) as caught:
        EvalConfig.parse({})
    assert str(caught.value) == "run_id: missing; it is the MLflow id of the training run to score: give --run_id VALUE"


def test_a_wrong_flag_exits_with_2_and_leaves_nothing(workplace):
    done = workplace.run_module("train", "--lr", "-1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: lr=-1: must be > 0.0 (default 0.01)\n")
    assert list(workplace.path.iterdir()) == []


def test_two_configs_load_the_same_data_where_they_agree_in_what_decides_it():
    first = TrainConfig()
    assert first.data == TrainConfig(lr=0.5, transform="cpab", device="cpu").data
    others = {"dataset": "digits", "data_dir": "x", "image_size": 9, "distortion": "rts", "draws": 2, "val_fraction": 0.3, "seed": 1}
    assert others.keys() == DATA
    assert all(TrainConfig(**{knob: value}).data != first.data for knob, value in others.items())


@pytest.mark.parametrize(
    "knobs",
    [
        {"cpab_cells": 5},
        {"cpab_boundary": "fixed"},
        {"draws": 3},
        {"transform": "none", "iterations": 2, "supersample": 2, "padding": "border"},
    ],
)
def test_a_knob_that_the_network_or_the_data_have_no_use_for_means_nothing(knobs):
    used = {name: knobs[name] for name in knobs.keys() & {"transform"}}
    assert TrainConfig(**knobs).learning_knobs() == TrainConfig(**used).learning_knobs()
    assert (
        TrainConfig(transform="cpab", cpab_boundary="fixed", cpab_cells=5).learning_knobs()
        != TrainConfig(transform="cpab", cpab_cells=5).learning_knobs()
    )
    assert TrainConfig(distortion="rts", draws=3).learning_knobs() != TrainConfig(distortion="rts").learning_knobs()
