"""A comparison file: what is shipped is right, what is wrong is one line that names the place."""

import re

import pytest
import yaml

from stn_pipeline.comparing import comparefile
from stn_pipeline.comparing.comparefile import Block, CompareConfig, ExistingConfig
from stn_pipeline.comparing.measures import ACCURACY, CALIBRATION, LOSS
from stn_pipeline.comparing.verdicts import Rules
from stn_pipeline.errors import ConfigError
from stn_pipeline.search import sweepfile
from tests.conftest import ROOT

RIGHT = {"name": "x", "arms": {"base": {}, "low": {"lr": 0.001}}, "datasets": "digits", "seeds": 2}
COMPARISONS = [path for path in sorted((ROOT / "sweeps").glob("*.yaml")) if "arms" in yaml.safe_load(path.read_text())]


@pytest.fixture
def read(tmp_path):
    def read(text: str, **flags: str) -> CompareConfig:
        (tmp_path / "c.yaml").write_text(text)
        return comparefile.read(str(tmp_path / "c.yaml"), flags)

    return read


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_shipped_comparison_is_right(path):
    config = comparefile.read(str(path), {})
    assert config.name == path.stem and config.question.endswith("?") and len(config.seeds.values) >= 5
    for block in config.blocks():
        for arm in config.arms:
            assert config.config(block, arm, 7).seed == 7


def test_the_reports_claims_are_asked_at_the_reports_settings():
    config = comparefile.read(str(ROOT / "sweeps" / "report.yaml"), {})
    blocks = list(config.blocks())
    assert config.claims == {"coordconv": -0.15, "diffeo": -0.25} and len(config.seeds.values) == 10 and len(blocks) == 2
    settings = [config.config(block, "diffeo", 0) for block in blocks]
    assert [(knobs.optimizer, knobs.lr, knobs.batch_size, knobs.loc_lr_multiplier) for knobs in settings] == [
        ("adam", 0.01, 64, 1.0),
        ("adam", 0.01, 64, 0.1),
    ]


def test_an_arm_goes_over_what_is_the_same_for_all():
    config = CompareConfig.parse(
        RIGHT | {"train": {"lr": 0.02, "epochs": 3}, "settings": {"big": {"batch_size": 256}}, "arms": {"a": {}, "b": {"lr": 0.5}}}
    )
    (block,) = config.blocks()
    assert block == Block("digits", "big") and config.baseline == "a"
    a, b = (config.config(block, arm, 3) for arm in "ab")
    assert (a.lr, a.epochs, a.batch_size, a.seed, a.dataset) == (0.02, 3, 256, 3, "digits")
    assert a.model_copy(update={"lr": 0.5}) == b


@pytest.mark.parametrize(
    ("given", "seeds", "looks"),
    [(3, (0, 1, 2), ()), ([5, 2], (5, 2), ()), (1, (0,), ()), ({"looks": [2, 4]}, (0, 1, 2, 3), (2, 4))],
)
def test_seeds_are_a_number_a_list_or_looks(given, seeds, looks):
    config = CompareConfig.parse(RIGHT | {"seeds": given})
    assert (config.seeds.values, config.seeds.looks, config.seeds.at_looks) == (seeds, looks, looks or (len(seeds),))
    assert config.rules.looks == looks and CompareConfig.parse(config.plain()) == config


def test_what_decides_and_the_margin_are_the_rules_of_the_verdicts():
    usual = CompareConfig.parse(RIGHT)
    assert usual.rules == Rules(LOSS, None, ()) and usual.decide == "test/loss"
    config = CompareConfig.parse(RIGHT | {"decide": "test/accuracy", "margin": 0.005, "seeds": {"looks": [3, 6]}})
    assert config.rules == Rules(ACCURACY, 0.005, (3, 6))
    asked = ExistingConfig.parse({"runs": "x", "by": "lr", "decide": "test/calibration_error", "margin": 0.1})
    assert asked.rules == Rules(CALIBRATION, 0.1)


def test_arms_that_train_on_other_numbers_of_images_are_allowed_and_said():
    config = CompareConfig.parse(RIGHT | {"arms": {"base": {}, "more": {"val_fraction": 0.05}}})
    assert config.caveats == ("The arms are trained on different numbers of images (val_fraction: base 0.1, more 0.05).",)
    assert CompareConfig.parse(RIGHT).caveats == ()


@pytest.mark.parametrize(("knob", "value"), [("distortion", "rotated"), ("image_size", "16"), ("draws", "2")])
def test_what_decides_the_test_images_stands_in_settings_and_not_in_an_arm(knob, value):
    train = {"distortion": "rts"} if knob == "draws" else {}
    usual = {"distortion": "none", "image_size": "", "draws": "1"}[knob]
    for arms in ({"base": {}, "other": {knob: value}}, {"other": {knob: value}, "base": {}}):
        with pytest.raises(ConfigError) as caught:
            CompareConfig.parse(RIGHT | {"train": train, "arms": arms})
        assert re.match(rf"arms\.(base|other)\.{knob}: .*, but .* in (base|other): the test images differ: ", str(caught.value))
        assert "put it under settings:" in str(caught.value) and value in str(caught.value) and usual in str(caught.value)
    settings = {"usual": {}, "turned": {knob: value}}
    assert len(list(CompareConfig.parse(RIGHT | {"train": train, "settings": settings}).blocks())) == 2
    CompareConfig.parse(RIGHT | {"train": train, "arms": {"base": {knob: value}, "low": {knob: value, "lr": 0.1}}})


def test_flags_stand_over_the_files_keys(read):
    config = read(yaml.safe_dump(RIGHT), seeds="[4, 5]", baseline="low", datasets="digits,mnist", train="{epochs: 2}", name="y")
    assert (config.seeds.values, config.baseline, config.datasets, config.train, config.name) == (
        (4, 5),
        "low",
        ("digits", "mnist"),
        {"epochs": 2},
        "y",
    )


def test_what_is_shown_as_params_is_text_that_yaml_reads_back():
    config = CompareConfig.parse(RIGHT | {"claims": {"low": -0.5}})
    flat = config.flat()
    assert yaml.safe_load(flat["arms"]) == RIGHT["arms"] and yaml.safe_load(flat["seeds"]) == [0, 1]
    assert CompareConfig.parse(config.plain()) == config
    assert all("\n" not in str(value) for value in flat.values())


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"arm": {}}, r"unknown key arm: .*did you mean arms\?"),
        ({"arms": {"base": {}}}, "arms=base: must be at least two"),
        ({"arms": ["base", "low"]}, "arms=.*: must be names and their knobs"),
        ({"arms": {"base": {}, "low": {"learning_rate": 1}}}, "arms.low: unknown knob learning_rate"),
        ({"arms": {"base": {}, "low": {"lr": -1}}}, "arms.low.lr=-1: must be > 0"),
        ({"arms": {"base": {}, "low": {"seed": 3}}}, "arms.low.seed: seeds: gives them"),
        ({"arms": {"base": {}, "low": {"device": "cpu"}}}, "arms.low.device: says where or how fast, not what"),
        ({"arms": {"base": {}, "r": {"coordconv_r": True}}}, "coordconv_r=true needs coordconv=true"),
        ({"arms": {"base": {}, "same": {"lr": 0.01}}}, "arms.same: is the same network as arms.base"),
        (
            {"train": {"transform": "none"}, "arms": {"base": {}, "same": {"loc_lr_multiplier": 1}}},
            "arms.same: is the same network as arms.base",  # without a localiser that knob means nothing
        ),
        ({"baseline": "bas"}, r"baseline=bas: is no arm: choose base, low; did you mean base\?"),
        ({"claims": {"base": -0.1}}, "claims.base: is no arm beside the baseline: choose low"),
        ({"claims": {"low": 0}}, "claims.low=0: must be a share above -1 and not 0"),
        ({"claims": {"low": -15}}, "claims.low=-15: must be a share above -1"),
        ({"settings": {"s": {"lr": 0.1}}}, "settings.s.lr: stands under arms.low too"),
        ({"train": {"seed": 1}}, "train.seed: seeds: gives them"),
        ({"train": {"dataset": "digits"}}, "train.dataset: datasets: names the sets"),
        ({"seeds": 0}, "seeds=0: must be 1 to 1000 seeds"),
        ({"seeds": [1, 1]}, "must name each seed once"),
        ({"seeds": "many"}, "seeds=many: must be a number of seeds, a list of seeds, or {looks: "),
        ({"seeds": [0, -1]}, "seeds.seed=-1: must be >= 0"),
        ({"seeds": True}, "seeds=True: must be a number"),
        ({"seeds": [0, 1.5]}, "must be a list of whole numbers"),
        *(
            ({"seeds": looks}, "must be {looks: .5, 10, 20.}: two or more rising numbers of seeds, the first at least 2")
            for looks in (
                {"looks": [5]},
                {"looks": [5, 5]},
                {"looks": [10, 5]},
                {"looks": [1, 5]},
                {"looks": [5, 10.5]},
                {"looks": "many"},
                {"looks": [True, 5]},
                {"look": [5, 10]},
                {"looks": [5, 10], "n": 3},
                {},
            )
        ),
        ({"seeds": {"looks": [5, 5000]}}, "must be 1 to 1000 seeds"),
        ({"decide": "test/los"}, r"decide=test/los: choose test/loss, test/accuracy, test/calibration_error; did you mean test/loss\?"),
        ({"decide": "val/loss"}, "decide=val/loss: choose test/loss"),
        ({"margin": 0}, "margin=0: must be > 0"),
        ({"margin": -0.1}, "margin=-0.1: must be > 0"),
        ({"margin": 5}, "margin=5: must be < 1"),
        ({"margin": "small"}, "margin=small: "),
        ({"datasets": ["digits", "digits"]}, "datasets=digits, digits: must be at least one, each named once"),
        ({"datasets": "digit"}, "datasets.*digit"),
        ({"name": "../x"}, "name=../x: must be letters, digits"),
        ({"workers": -1}, "workers=-1: must be >= 0"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_place(keys, text):
    with pytest.raises(ConfigError) as caught:
        CompareConfig.parse(RIGHT | keys)
    assert re.search(text, str(caught.value)) and "\n" not in str(caught.value)


def test_a_file_that_is_no_comparison_is_said(read, tmp_path):
    with pytest.raises(ConfigError, match=r"c.yaml: arms: missing; it is the arms by name"):
        read("name: x\ndatasets: digits\n")
    with pytest.raises(ConfigError, match="nope.yaml: No such file or directory: name a file such as sweeps/report.yaml"):
        comparefile.read(str(tmp_path / "nope.yaml"), {})


def test_a_file_for_the_other_entry_point_is_said():
    with pytest.raises(ConfigError, match=r"mnist.yaml: has search, so it is a file for python -m stn_pipeline.sweep"):
        comparefile.read(str(ROOT / "sweeps" / "mnist.yaml"), {})
    with pytest.raises(ConfigError, match=r"report.yaml: has arms, so it is a file for python -m stn_pipeline.compare"):
        sweepfile.read(str(ROOT / "sweeps" / "report.yaml"), {})


def test_what_exists_is_asked_for_by_a_filter_and_knobs():
    asked = ExistingConfig.parse({"runs": "params.epochs = '5'", "by": "transform, coordconv"})
    assert asked.by == ("transform", "coordconv") and asked.flat()["by"]
    with pytest.raises(ConfigError, match="by: missing; it is the knobs or tags that tell arms apart"):
        ExistingConfig.parse({"runs": "x"})
