"""A sweep file is checked whole before anything starts: one line that names the place, and what is right comes back as it was meant."""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stn_pipeline.config import DATASET_CHOICES, Choices, Range, TrainConfig, search_of
from stn_pipeline.errors import ConfigError
from stn_pipeline.search import sweepfile
from stn_pipeline.search.sweepfile import SweepConfig, holds, in_words, short
from stn_pipeline.sweep import sweep
from tests.conftest import ROOT

KNOBS = ", ".join(TrainConfig.model_fields)
KEYS = ", ".join(SweepConfig.model_fields)
NO_FILE = "config: missing; it is the sweep file, such as sweeps/digits.yaml; each of its keys may be given as a flag instead"
HEAD = {"name": "name: x", "search": "search: [lr]", "trials": "trials: 3"}


@pytest.fixture
def read(tmp_path):
    """Return what reads a file of these lines, `HEAD` first wherever they name no such key of their own."""

    def read(*lines: str, without: str = "", **flags: str) -> SweepConfig:
        given = "\n".join(lines)
        head = [line for key, line in HEAD.items() if key != without and not any(own.startswith(f"{key}:") for own in lines)]
        path = tmp_path / "s.yaml"
        path.write_text("\n".join([*head, given]))
        return sweepfile.read(str(path), flags)

    return read


def message(read, tmp_path, *lines: str, **given: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*lines, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


# What is shipped


SWEEPS = [path for path in sorted((ROOT / "sweeps").glob("*.yaml")) if "search" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_is_right(path):
    config = sweepfile.read(str(path), {})
    assert config.name == path.stem and config.question.endswith("?") and config.final >= 2
    for dataset in config.datasets:
        assert config.config(dataset).dataset == dataset


# What is wrong


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["trails: 3"], f"unknown key trails: choose from {KEYS}; did you mean trials?"),
        (["1: 2"], f"unknown key 1: choose from {KEYS}"),
        (["train: {epoch: 3}"], f"train: unknown knob epoch: choose from {KNOBS}; did you mean epochs?"),
        (["train: {epochs: 0}"], "train.epochs=0: must be >= 1 (default 50)"),
        (["train: {coordconv_r: true}"], "train.coordconv_r=true needs coordconv=true"),
        (["train: {dataset: mnist}"], "train.dataset: datasets: names the sets"),
        (["train: {seed: 1}"], "train.seed: seed: is the sweep's, final: the number of fresh ones"),
        (["train: 5"], "train=5: must be knobs and their values, as in {epochs: 10}"),
        (["train: [lr]"], "train=['lr']: must be knobs and their values, as in {epochs: 10}"),
        (["train: {lr: 0.1}"], "search.lr: stands under train: too: leave it in one of them"),
        (["search: [lrr]"], "search: unknown knob lrr; did you mean lr?"),
        (["search: {1: [2]}"], "search: unknown knob 1"),
        (["search: [dataset]"], "search.dataset: datasets: names the sets"),
        (["search: [seed]"], "search.seed: seed: is the sweep's, final: the number of fresh ones"),
        (["search: [val_fraction]"], "search.val_fraction: must be the same for all trials: put it under train:"),
        (["search: [device]"], "search.device: must be the same for all trials: put it under train:"),
        (["search: 5"], "search: unknown knob 5"),
        (["search:"], "search=None: must be knobs, as in [lr, batch_size] or {lr: {low: 1e-4, high: 1e-2}}"),
        (["search: {}"], "search: is empty: name a knob to tune, such as lr"),
        (["search: {lr: []}"], "search.lr: the list is empty: give at least one value"),
        (["search: {lr: 0.1}"], "search.lr=0.1: must be bare, {low: , high: , log: } or a list of values"),
        (["search: {lr: [abc]}"], "search.lr=abc: must be a number (default 0.01)"),
        (["search: {lr: [0.1, .nan]}"], "search.lr=nan: must be finite (default 0.01)"),
        (["search: {transform: [affine, tsp]}"],
         "search.transform=tsp: choose none, affine, diffeo, similarity, projective, tps, cpab; did you mean tps?"),
        (["search: {lr: {low: 0}}"], "search.lr.low=0: must be > 0.0 (default 0.01)"),
        (["search: {lr: {high: 1000}}"], "search.lr.high=1000: must be <= 100.0 (default 0.01)"),
        (["search: {lr: {high: .inf}}"], "search.lr.high=inf: must be finite (default 0.01)"),
        (["search: {lr: {low: 1e-2, high: 1e-3}}"], "search.lr: low=0.01 must be < high=0.001"),
        (["search: {lr: {low: 1e-2, high: 1e-2}}"], "search.lr: low=0.01 must be < high=0.01"),
        (["search: {weight_decay: {low: 0}}"], "search.weight_decay: low=0.0 must be > 0 where log is true"),
        (["search: {epochs: {low: 1.5, high: 5}}"], "search.epochs.low=1.5: must be a whole number (default 50)"),
        (["search: {epochs: {low: 2}}"], "search.epochs: high is missing: give {low: , high: }"),
        (["search: {epochs: {high: 2}}"], "search.epochs: low is missing: give {low: , high: }"),
        (["search: {lr: {lo: 1}}"], "search.lr.lo: unknown: give low, high and log; did you mean low?"),
        (["search: {lr: {step: 1}}"], "search.lr.step: unknown: give low, high and log"),
        (["search: {lr: {log: 3}}"], "search.lr.log=3: must be true or false"),
        (["search: [epochs]"], "search.epochs: declares no range of its own: give {low: , high: } or a list of values"),
        (["search: {transform: {low: 1, high: 2}}"],
         "search.transform: takes none, affine, diffeo, similarity, projective, tps, cpab: give a list of values"),
        (["search: {coordconv: {low: 0, high: 1}}"], "search.coordconv: takes false, true: give a list of values"),
        (["sampler: grid"], "sampler=grid: needs a list of values for search.lr, got 0.0001 to 0.03, log"),
        (["sampler: gird"], "sampler=gird: choose tpe, gp, random, qmc, grid; did you mean grid?"),
        (["objective: val/acc"], "objective=val/acc: choose val/loss, val/accuracy; did you mean val/accuracy?"),
        (["objective: test/loss"], "objective=test/loss: choose val/loss, val/accuracy"),
        (["direction: maximize"], "direction=maximize: of val/loss that is the worst: leave direction out"),
        (["objective: val/accuracy", "direction: minimize"],
         "direction=minimize: of val/accuracy that is the worst: leave direction out"),
        (["datasets: [digits, digits]"], "datasets=digits, digits: must be at least one, each named once"),
        (["datasets: []"], "datasets=: must be at least one, each named once"),
        (["datasets: [digts]"], f"datasets=digts: choose {DATASET_CHOICES}; did you mean digits?"),
        (["trials: -1"], "trials=-1: must be >= 0 (default 0)"),
        (["trials: some"], "trials=some: must be a whole number (default 0)"),
        (["trials: 0"], "trials: missing, and so is time_limit_s: give at least one of them"),
        (["time_limit_s: .inf"], "time_limit_s=inf: must be finite (default 0)"),
        (["workers: -1"], "workers=-1: must be >= 0 (default 0)"),
        (["name: a/b"], "name=a/b: must be letters, digits and _ . - only"),
        (["name: ../up"], "name=../up: must be letters, digits and _ . - only"),
        (["name: .hidden"], "name=.hidden: must be letters, digits and _ . - only"),
        (["name: a b"], "name=a b: must be letters, digits and _ . - only"),
        (["name: ''"], "name=: must be letters, digits and _ . - only"),
        (["name:"], "name=None: must be text"),
    ],
    ids=lambda value: "; ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_file_place_rule_and_way_out(read, tmp_path, lines, text):
    assert message(read, tmp_path, *lines) == f"s.yaml: {text}"


def test_a_sweep_needs_a_limit(read, tmp_path):
    text = "trials: missing, and so is time_limit_s: give at least one of them"
    assert message(read, tmp_path, without="trials") == f"s.yaml: {text}"
    assert read("time_limit_s: 60", without="trials").trials == 0


@pytest.mark.parametrize("key", ["name", "search"])
def test_a_missing_key_is_explained_in_english(read, tmp_path, key):
    text = message(read, tmp_path, without=key)
    assert text.startswith(f"s.yaml: {key}: missing; it is the ") and text.endswith(f": give --{key} VALUE")
    assert "the what" not in text


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["question: why", "question: why not"], "key question stands twice"),
        (["search: {lr: {low: 1, high: 2, low: 1}}"], "key low stands twice"),
        (["search:", "  lr:", "  lr: [1]"], "key lr stands twice"),
        (["train: [1"], "while parsing a flow sequence"),
        (["question: what: now"], "mapping values are not allowed here"),
        (["\tworkers: 2"], "while scanning for the next token found character '\\t'"),
    ],
)
def test_yaml_that_breaks_or_says_a_thing_twice_is_one_line_with_its_place(read, tmp_path, lines, text):
    told = message(read, tmp_path, *lines)
    assert told.startswith(f"s.yaml: is not YAML: {text}") and "line " in told


@pytest.mark.parametrize(
    "lines",
    [
        ["search: [{lr: [0.1, 0.2]}]"],
        ["search: [[lr, batch_size]]"],
        ["train: {1: 2}"],
        ["train: {yes: 2}"],
        ["objective: |", "  val/loss", "workers: 1"],
        ["register_as: models/best"],
        ["register_as: 'models:best'"],
    ],
    ids="; ".join,
)
def test_no_slip_is_a_traceback_or_shows_only_at_the_end(read, tmp_path, lines):
    assert message(read, tmp_path, *lines).startswith("s.yaml: ")


def test_a_rule_without_a_default_tells_none(read, tmp_path):
    assert message(read, tmp_path, "question: [5]") == "s.yaml: question=['5']: must be text"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must hold keys and values, such as name: mnist"),
        (b"- name\n- search\n", "must hold keys and values, such as name: mnist"),
        (b"lr, batch_size\n", "must hold keys and values, such as name: mnist"),
        (b"\x89PNG\r\n\x1a\n\x00", "is not text: name a file such as sweeps/digits.yaml"),
        (b"\x7fELF\x00\x00", "is not YAML: unacceptable character #x007f: special characters are not allowed "
                             'in "<unicode string>", position 0'),
    ],
    ids=["empty", "list", "words", "not UTF-8", "control characters"],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path, content, text):
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        sweepfile.read(str(tmp_path / "s.yaml"), {})
    assert str(caught.value) == f"{tmp_path}/s.yaml: {text}"


def test_no_file_is_said_with_the_way_out(tmp_path):
    for path, why in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            sweepfile.read(str(path), {})
        assert str(caught.value) == f"{path}: {why}: name a file such as sweeps/digits.yaml"


# Flags


def test_flags_stand_over_the_files_keys(read):
    config = read("train: {epochs: 9}", "seed: 4", trials="5", train="{epochs: 2}", search="lr,batch_size", datasets="digits, mnist")
    assert (config.name, config.seed, config.trials, config.train) == ("x", 4, 5, {"epochs": 2})
    assert config.datasets == ("digits", "mnist")
    assert config.search == {name: search_of(TrainConfig.model_fields[name]) for name in ("lr", "batch_size")}
    assert read(search="{lr: [1e-3, 0.1]}").search == {"lr": Choices((0.001, 0.1))}
    assert read(datasets="[kmnist, digits]").datasets == ("kmnist", "digits")


def test_an_accuracy_asked_for_by_flag_is_maximised(read):
    assert read(objective="val/accuracy").direction == "maximize"
    assert read().direction == "minimize"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"trials": "some"}, "trials=some: must be a whole number (default 0)"),
        ({"trials": "0"}, "trials: missing, and so is time_limit_s: give at least one of them"),
        ({"name": "a/b"}, "name=a/b: must be letters, digits and _ . - only"),
        ({"search": "lrr"}, "search: unknown knob lrr; did you mean lr?"),
        ({"search": "{lr: {low: 1}}"}, "search.lr: low=1.0 must be < high=0.03"),
        ({"search": "[lr"}, "search=[lr: is not YAML"),
        ({"search": "{lr: , lr: }"}, "search={lr: , lr: }: is not YAML"),
        ({"train": "{epochs: 0}"}, "train.epochs=0: must be >= 1 (default 50)"),
        ({"train": "{dataset: mnist}"}, "train.dataset: datasets: names the sets"),
        ({"sampler": "grid"}, "sampler=grid: needs a list of values for search.lr, got 0.0001 to 0.03, log"),
    ],
)
def test_a_wrong_flag_does_not_blame_the_file(read, tmp_path, flags, text):
    assert message(read, tmp_path, **flags) == text


def test_a_right_flag_is_not_blamed_for_the_file(read, tmp_path):
    assert message(read, tmp_path, "workers: -1", trials="5").startswith("s.yaml: workers=-1")
    assert message(read, tmp_path, "trails: 1", trials="5").startswith("s.yaml: unknown key trails")


@pytest.mark.parametrize(
    ("key", "text"), [("question", "Does it help: yes or no?"), ("question", "2"), ("name", "2026"), ("register_as", "007")]
)
def test_a_flag_of_words_keeps_them_as_they_are(read, key, text):
    assert getattr(read(**{key: text}), key) == text


# What is right


def test_a_number_is_a_number_in_every_spelling(read):
    config = read("search: {lr: [1e-3, 1E-2, 1.0e-1, 1., 5], weight_decay: {low: 1e-06, high: 1e-2}}", "time_limit_s: 1e3")
    assert config.search["lr"] == Choices((0.001, 0.01, 0.1, 1.0, 5.0))
    assert all(type(value) is float for value in config.search["lr"].values)
    assert config.search["weight_decay"] == Range(1e-6, 1e-2, True)
    assert (config.time_limit_s, read("trials: 1e1").trials) == (1000, 10)


def test_values_come_back_as_their_knobs_own_type_and_once(read):
    config = read("search: {epochs: [1, 2.0, '3', 1], coordconv: [yes, no], lr: [1, 1.0]}")
    assert config.search == {"epochs": Choices((1, 2, 3)), "coordconv": Choices((True, False)), "lr": Choices((1.0,))}
    assert [type(value) for space in config.search.values() for value in space.values] == [int, int, int, bool, bool, float]


def test_the_ends_of_a_whole_numbers_range_stay_whole(read):
    space = read("search: {epochs: {low: 2, high: 9}}").search["epochs"]
    assert space == Range(2, 9) and (type(space.low), type(space.high)) == (int, int)


def test_a_bare_knob_is_searched_as_it_declares_and_a_range_may_change_one_end(read):
    config = read("search: {lr: {high: 0.1}, loc_lr_multiplier: , padding: , epochs: {low: 1, high: 9}}")
    assert config.search == {
        "lr": Range(1e-4, 0.1, True),
        "loc_lr_multiplier": Range(1e-3, 1.0, True),
        "padding": Choices(("zeros", "border", "reflection")),
        "epochs": Range(1, 9, False),
    }
    assert read("search: {lr: {log: false}}").search["lr"] == Range(1e-4, 3e-2, False)


def test_a_training_has_the_fixed_knobs_the_params_and_the_sweeps_seed(read):
    config = read("train: {epochs: 4, data_dir: there}", "search: [lr, batch_size]", "seed: 7")
    assert config.default == {"lr": 0.01, "batch_size": 64}
    expected = {"dataset": "digits", "data_dir": "there", "epochs": 4, "seed": 7}
    assert config.config("digits") == TrainConfig.parse(expected)
    for seed in (9, 0):
        assert config.config("digits", {"lr": 0.5}, seed) == TrainConfig.parse(expected | {"lr": 0.5, "seed": seed})


def test_what_is_logged_of_a_sweep_names_every_key_in_plain_words(read):
    config = read("train: {epochs: 4}", "search: {lr: , batch_size: [8, 16]}", "datasets: [digits, mnist]")
    flat = config.flat()
    assert flat.keys() == (SweepConfig.model_fields.keys() - {"train", "search", "datasets"}) | {
        "train.epochs", "search.lr", "search.batch_size",
    }  # fmt: skip
    assert (flat["train.epochs"], flat["search.lr"], flat["search.batch_size"]) == (4, "0.0001 to 0.03, log", "8, 16")


def test_what_is_kept_of_a_sweep_is_a_sweep_file_that_asks_the_same(read, tmp_path):
    lines = ["train: {epochs: 4, coordconv: true}", "search: {lr: , batch_size: [8, 16]}", "datasets: [digits, 'folder:/a b']"]
    asked = read(*lines, "objective: val/accuracy", "time_limit_s: 1e3", "question: why?")
    kept = tmp_path / "kept.yaml"
    kept.write_text(yaml.safe_dump(asked.plain(), sort_keys=False))
    assert sweepfile.read(str(kept), {}) == asked


def test_only_lists_have_so_many_combinations_and_each_stands_once(read):
    config = read("search: {batch_size: [8, 16], padding: }")
    combinations = list(config.combinations())
    assert config.is_finite and len(combinations) == 6
    assert {(c["batch_size"], c["padding"]) for c in combinations} == {(b, p) for b in (8, 16) for p in ("zeros", "border", "reflection")}
    assert not read("search: {batch_size: [8, 16], lr: }").is_finite


@st.composite
def ranges(draw):
    """A knob and two ends inside its bounds."""
    knob, least, most = draw(
        st.sampled_from([("lr", 1e-9, 100.0), ("weight_decay", 1e-9, 10.0), ("epochs", 1, 10**6), ("image_size", 1, 1024)])
    )
    ends = st.integers(least, most) if isinstance(least, int) else st.floats(least, most)
    low, high = sorted(draw(st.lists(ends, min_size=2, max_size=2, unique=True)))
    return knob, {"low": low, "high": high, "log": draw(st.booleans())}


@given(ranges())
def test_any_range_inside_the_bounds_comes_back_with_its_ends(given):
    knob, space = given
    for text in (json.dumps({knob: space}), yaml.safe_dump({knob: space})):
        config = sweepfile.read(str(ROOT / "sweeps" / "digits.yaml"), {"search": text, "train": "{}"})
        assert config.search == {knob: Range(**space)}
    found = config.search[knob]
    assert holds(found, space["low"]) and holds(found, space["high"]) and not holds(found, space["high"] * 2 + 1)
    low, to, high = in_words(found).removesuffix(", log").split()
    assert (float(low), to, float(high)) == (pytest.approx(space["low"], rel=1e-5), "to", pytest.approx(space["high"], rel=1e-5))
    assert in_words(found).endswith(", log") == space["log"]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(1e-6, 100),
            "loc_lr_multiplier": st.floats(1e-6, 100),
            "batch_size": st.integers(1, 9999),
            "coordconv": st.booleans(),
            "coordconv_r": st.booleans(),
            "transform": st.sampled_from(["affine", "tps"]),
        },
    )
)
def test_a_runs_name_tells_every_knob_to_two_digits(params):
    words = dict(word.split("=") for word in short(params).split())
    assert len(words) == len(params)
    for told, value in zip(words.values(), params.values(), strict=True):
        assert float(told) == pytest.approx(value, rel=0.06) if isinstance(value, float) else told == str(value)


def test_no_two_knobs_share_a_short_name():
    assert len({short({name: 0}) for name in TrainConfig.model_fields}) == len(TrainConfig.model_fields)
    assert short({"lr": 0.0031, "batch_size": 128}) == "lr=3.1e-03 bs=128"


def test_a_list_in_words_is_its_values():
    assert in_words(Choices((32, 64))) == "32, 64"
    assert holds(Choices((32, 64)), 64) and not holds(Choices((32, 64)), 65)


# The command line


def test_a_bad_file_ends_with_2_and_one_line_before_anything_is_imported_or_made(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\ntrials: 3\nsearch: [lrr]\n")
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sorted({'torch', 'mlflow', 'optuna'} & set(sys.modules))));"
        "from stn_pipeline import sweep; sweep.main()"
    )
    command = [sys.executable, "-c", code, "bad.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert done.stderr == "error: bad.yaml: search: unknown knob lrr; did you mean lr?\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], NO_FILE),
        (["--trials", "3"], NO_FILE),
        (["nope.yaml"], "nope.yaml: No such file or directory: name a file such as sweeps/digits.yaml"),
        (["--config", "nope.yaml"], "nope.yaml: No such file or directory: name a file such as sweeps/digits.yaml"),
        (["sweeps/digits.yaml", "--trails", "3"], "unknown flag --trails; did you mean trials?; --help lists the flags"),
        (["sweeps/digits.yaml", "mnist"], "unknown flag mnist; --help lists the flags"),
        (["sweeps/digits.yaml", "--time-limit-s", "-1"], "time_limit_s=-1: must be >= 0.0 (default 0)"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_clear_line(monkeypatch, argv, text):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        sweep(argv)
    assert str(caught.value) == text
