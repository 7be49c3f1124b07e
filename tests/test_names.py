"""Names are checked when a question is read, by the rules of what will use them at its end."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name, _validate_model_name

from stn_pipeline.comparing.comparefile import MOST_TITLE, CompareConfig, check_titles
from stn_pipeline.errors import ConfigError
from stn_pipeline.questions import MOST_NAME, check_in_keys, check_name, in_keys
from stn_pipeline.search.sweepfile import SweepConfig
from stn_pipeline.texts import code, markdown

SWEEP = {"name": "x", "search": ["lr"], "trials": 3, "datasets": "digits"}
ARMS = {"base": {}, "low": {"lr": 0.001}}
RIGHT = {"name": "x", "arms": ARMS, "datasets": "digits", "seeds": 2}
anything = st.text(max_size=12) | st.text("ab _-./:.\u00e4", max_size=8) | st.text("a", min_size=95, max_size=260)


def told(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)


@given(anything, anything)
def test_a_name_that_is_taken_makes_keys_that_mlflow_takes(arm, title):
    try:
        check_in_keys("arms", [arm])
        check_titles([title, "another"])
    except ConfigError:
        return
    for key in (f"{in_keys(arm)}/accuracy_difference", f"{in_keys(title)}/{in_keys(arm)}/accuracy_difference"):
        _validate_metric_name(key)
        assert len(key) <= MAX_ENTITY_KEY_LENGTH
    assert len(in_keys(title).encode()) < 250 and len(f"{arm} {title} s999999999") <= 250  # a folder's name, a run's


@given(st.sets(anything, min_size=2, max_size=4))
def test_names_that_are_taken_together_stay_apart_in_keys(names):
    try:
        check_in_keys("arms", names)
    except ConfigError:
        return
    assert len(set(map(in_keys, names))) == len(names)


@given(anything)
def test_a_registered_models_name_that_is_taken_mlflow_takes(name):
    try:
        taken = SweepConfig.parse(SWEEP | {"register_as": name}).register_as
    except ConfigError:
        return
    if taken:
        _validate_model_name(taken)
        assert len(taken) <= MOST_NAME and "@" not in taken


@given(anything)
def test_a_questions_name_that_is_taken_can_be_a_files(name):
    try:
        check_name(name)
    except ConfigError:
        return
    assert "/" not in name and not name.startswith(".") and len(f"compare-{name}.db-journal".encode()) <= 255


@pytest.mark.parametrize("arm", ["..", ".", "", " ", "...", "a" * 240, "a\nb", "\u202eab", "/", "_", ".a"])
@pytest.mark.parametrize("key", ["arms", "settings"])
def test_a_name_that_would_fail_at_the_end_fails_at_the_start(key, arm):
    keys = {"arms": ARMS | {arm: {"lr": 0.5}}, "settings": {"b": {}, arm: {"epochs": 3}}}
    assert told(lambda: CompareConfig.parse(RIGHT | {key: keys[key]})).startswith(f"{key}: a name must ")


def test_mlflow_would_have_refused_them():
    for arm in ("..", "..a", ""):
        with pytest.raises(MlflowException):
            _validate_metric_name(f"{in_keys(arm)}/loss_difference")


@pytest.mark.parametrize("pair", [("a b", "a_b"), ("a/b", "a:b"), ("(x)", "[x]")])
def test_arms_that_would_share_their_metrics_are_refused(pair):
    first, second = pair
    text = told(lambda: CompareConfig.parse(RIGHT | {"arms": {first: {}, second: {"lr": 0.5}}}))
    assert text == f"arms: {first} and {second} are both {in_keys(first)} in metrics and files: rename one"


def test_arms_of_any_script_keep_their_letters_in_keys():
    arms = {"gr\u00f6\u00dfe": {}, "gr\u00e4\u00dfe": {"lr": 0.5}, "\u65cb\u8f6c": {"lr": 0.1}}
    assert list(CompareConfig.parse(RIGHT | {"arms": arms}).arms) == list(arms) == [in_keys(arm) for arm in arms]


def test_blocks_that_would_share_their_metrics_are_refused():
    for keys in (
        {"settings": {"a b": {}, "a_b": {"epochs": 3}}},
        {"datasets": ["folder:/x/a b", "folder:/y/a_b"]},
        {"datasets": ["folder:/x/a", "folder:/y/a"]},
    ):
        assert re.search("are both|have one name", told(lambda keys=keys: CompareConfig.parse(RIGHT | keys)))
    long = "s" * MOST_NAME
    assert "at most" in told(
        lambda: CompareConfig.parse(RIGHT | {"datasets": [f"folder:/x/{'d' * MOST_TITLE}", "digits"], "settings": {long: {}}})
    )


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "a:b", "a@b", "m" * 240, " a", "a ", "a\nb", "~", "null", "\u202e"])
def test_a_model_that_could_not_be_registered_is_refused_at_the_start(name):
    assert told(lambda: SweepConfig.parse(SWEEP | {"register_as": name})).startswith("register_as=")
    assert SweepConfig.parse(SWEEP | {"register_as": "my model-1.0"}).register_as == "my model-1.0"


def test_a_model_for_each_data_set_is_checked_by_its_whole_name():
    keys = {"register_as": "m", "datasets": ["digits", "folder:/x/a:b"]}
    assert told(lambda: SweepConfig.parse(SWEEP | keys)).startswith("register_as=m-a:b: ")


@pytest.mark.parametrize("name", ["n" * 245, "\u00e4" * 60, "a\nb", "..", "\udc80"])
def test_a_questions_name_that_no_file_could_have_is_refused(name):
    assert told(lambda: SweepConfig.parse(SWEEP | {"name": name})).startswith("name=")


# Markdown


@given(st.text("ab!*_[]()<>`|~#&@:/.\\ \n\"'=", max_size=40))
def test_a_name_in_markdown_is_only_its_letters(name):
    shown = markdown(name)
    bare = re.sub(r"\\[\\`*_\[\]|~#]|&(lt|gt|amp|#47|#46|#64);", "", shown)
    assert not set(bare) & set("<>`*_[]|~#@\n") and "://" not in shown


def test_code_holds_any_backticks():
    assert code("a") == "`a`" and code("a`b``c") == "``` a`b``c ```"
