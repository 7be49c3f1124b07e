"""Whatever stands in a file or on a command line: a config, or one line that says what is wrong, soon and without a mark left."""

import os
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stn_pipeline import cli, texts, yamlfile
from stn_pipeline.comparing import comparefile
from stn_pipeline.comparing.comparefile import CompareConfig, ExistingConfig
from stn_pipeline.config import EvalConfig, Knobs, TrainConfig
from stn_pipeline.errors import ConfigError
from stn_pipeline.questions import from_flags
from stn_pipeline.search import sweepfile, tuning
from stn_pipeline.search.sweepfile import SweepConfig
from tests.conftest import ROOT
from tests.nasty import DOCUMENTS, WORDS

SOON_S = 20.0  # on a machine that is busy; the slowest takes two
SWEEP = {"name": "x", "search": ["lr"], "trials": "3", "datasets": ["digits"]}
COMPARE = {"name": "x", "arms": {"base": {}, "low": {"lr": "0.001"}}, "datasets": ["digits"], "seeds": "2"}


def read_comparison(path: str, flags: dict[str, str]) -> CompareConfig:
    """Read one as the entry point does, the sweeps that tune its arms included."""
    config = comparefile.read(path, flags)
    tuning.sweeps_of(config)
    return config


QUESTIONS = {SweepConfig: (sweepfile.read, SWEEP), CompareConfig: (read_comparison, COMPARE)}
ENTRY_POINTS = (TrainConfig, EvalConfig, SweepConfig, CompareConfig, ExistingConfig)

words = st.sampled_from(WORDS) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(repr)
values = st.recursive(
    words | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*TrainConfig.model_fields]) | words, inner, max_size=4),
    max_leaves=8,
)


def outcome(call) -> str:
    """Return the one line of the error, or nothing where it was no error."""
    begun = time.monotonic()
    try:
        config = call()
    except ConfigError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) < 2 * texts.MOST_SHOWN
        line.encode()
        return line
    finally:
        assert time.monotonic() - begun < SOON_S
    assert isinstance(config, (Knobs, dict))
    return ""


def through_file(folder, question, content: bytes) -> str:
    path = folder / "q.yaml"
    path.write_bytes(content)
    return outcome(lambda: QUESTIONS[question][0](str(path), {})).removeprefix(f"{path}: ")


def through_flags(knobs, argv) -> str:
    """Go the way of the entry point, as far as it goes without torch."""

    def call() -> Knobs:
        if knobs in QUESTIONS:
            given = cli.parse(knobs, argv, "", {"config": "x"}, positional="config")
            return QUESTIONS[knobs][0](given.pop("config"), given)
        given = cli.parse(knobs, argv, "")
        return knobs.parse(from_flags(knobs, given) if knobs is ExistingConfig else given)

    return outcome(call)


@st.composite
def files(draw):
    """A question's file with a few keys of another value, some of them misspelt or gone; or bytes of no meaning."""
    question = draw(st.sampled_from(sorted(QUESTIONS, key=str)))
    if draw(st.integers(0, 9)) == 0:
        return question, draw(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
    known = st.sampled_from([*question.model_fields])
    keys = QUESTIONS[question][1] | draw(st.dictionaries(st.one_of(known, known, known, known, words), values, max_size=3))
    for key in draw(st.sets(st.sampled_from(sorted(keys)), max_size=1)):
        del keys[key]
    style = draw(st.sampled_from(["'", '"', None]))
    text = yaml.dump(keys, Dumper=yaml.SafeDumper, default_style=style, allow_unicode=draw(st.booleans()), width=10**6)
    plain = draw(st.booleans()) and style == "'"
    return question, (text.replace("'", "") if plain else text).encode("utf-8", "surrogatepass")


@st.composite
def command_lines(draw):
    """An entry point and its flags, some of them misspelt, doubled, or without a value."""
    knobs = draw(st.sampled_from(ENTRY_POINTS))
    argv = (
        [draw(st.sampled_from([str(ROOT / "sweeps" / "digits.yaml"), str(ROOT / "sweeps" / "arms.yaml"), *WORDS]))]
        if knobs in QUESTIONS
        else []
    )
    if draw(st.integers(0, 19)) == 0:
        return knobs, [*argv, *draw(st.lists(words, max_size=4))]
    for name in draw(st.lists(st.sampled_from([*knobs.model_fields, "resume", "lrr", "a b", "\udc80"]), max_size=4)):
        flag = "--" + (name.replace("_", "-") if draw(st.booleans()) else name)
        argv += draw(words.map(lambda word, flag=flag: [f"{flag}={word}"]) | words.map(lambda word, flag=flag: [flag, word]))
    return knobs, argv


def check_help(argv) -> bool:
    return any(word in ("-h", "--help") for word in argv)


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_file_ends_in_a_traceback(tmp_path, examples):
    told = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(files())
    def attack(drawn):
        told.add(through_file(tmp_path, *drawn)[:20])

    attack()
    assert "" in told and len(told) > 20  # some were right, and the others wrong in many ways


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(examples):
    told = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(command_lines())
    def attack(drawn):
        knobs, argv = drawn
        if not check_help(argv):
            told.add(through_flags(knobs, argv)[:20])

    attack()
    assert "" in told and len(told) > 20


@pytest.mark.parametrize("number", range(len(DOCUMENTS)))
def test_a_nasty_document_is_one_line_in_every_place(tmp_path, number):
    document = DOCUMENTS[number]
    assert through_file(tmp_path, SweepConfig, document.encode())
    assert through_file(tmp_path, CompareConfig, document.encode())
    config = str(ROOT / "sweeps" / "digits.yaml")
    for key in ("train", "search", "datasets"):
        assert outcome(lambda key=key: sweepfile.read(config, {key: document}))


@pytest.mark.parametrize("word", WORDS)
def test_a_nasty_word_is_a_value_or_one_line_under_every_key(word):
    for knobs, needed in ((TrainConfig, {}), (EvalConfig, {"run_id": "a"}), (SweepConfig, SWEEP), (CompareConfig, COMPARE)):
        for key in knobs.model_fields:
            outcome(lambda knobs=knobs, needed=needed, key=key: knobs.parse(needed | from_flags(knobs, {key: word})))


# Files that are none


def test_what_is_no_file_is_said_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 10**9)
    long, deep = "a" * 300, "/a" * 3000
    paths = {
        tmp_path: "Is a directory", tmp_path / "pipe": "is a pipe or a device", "/dev/zero": "is a pipe or a device",
        tmp_path / "huge": "larger than", tmp_path / "loop": "symbolic links", long: "too long", deep: "too long",
        "~nosuch/x.yaml": "home", "a\0b": "null byte", "": "Is a directory",
    }  # fmt: skip
    for path, text in paths.items():
        for read in (sweepfile.read, comparefile.read):
            assert text in outcome(lambda path=path, read=read: read(str(path), {})), path


def test_a_path_that_cannot_be_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("~nosuch/x", "a\0b", "a" * 300, f"{tmp_path}/loop/x"):
        assert outcome(lambda path=path: TrainConfig.parse({"dataset": f"folder:{path}"})).startswith("dataset=folder:")
    assert outcome(lambda: TrainConfig.parse({"data_dir": ""})) == "data_dir=: must not be empty (default data)"


@pytest.mark.parametrize("path", ["~nosuch/x", "a" * 300])
def test_a_data_dir_that_cannot_be_is_one_line_where_it_is_used(path):
    from stn_pipeline.data import read

    with pytest.raises(ConfigError, match=r"^data_dir=.*: (~nosuch is nobody's home|cannot be a path \(File name too long\))"):
        read(TrainConfig(dataset="mnist", data_dir=path), announce=lambda line: None)


@pytest.mark.parametrize("argv", [["--data_dir", "\udce4"], ["\udce4.yaml"], ["--question=\udce4", "x"]])
def test_bytes_of_another_encoding_are_one_line(argv):
    assert through_flags(SweepConfig, argv).endswith("is not text in UTF-8: write it anew, or rename what it names")


def test_a_flags_value_may_be_two_dashes():
    assert cli.parse(TrainConfig, ["--data_dir=--"], "", {"resume": "x"}) == {"data_dir": "--"}
    assert outcome(lambda: TrainConfig.parse(cli.parse(TrainConfig, ["--lr=--"], ""))) == "lr=--: must be a number (default 0.01)"


# Words and numbers


NAMES = ["off", "on", "no", "yes", "true", "false", "null", "1", "0123", "1:3", "1_000", "0x1f", "1e3", "2026-01-01"]


@pytest.mark.parametrize("name", NAMES)
def test_where_a_name_is_meant_every_word_is_itself(tmp_path, name):
    path = tmp_path / "c.yaml"
    arms = f"arms: {{{name}: {{lr: 0.5}}, other: {{}}}}\nbaseline: {name}\nsettings: {{{name}: {{epochs: 3}}}}"
    path.write_text(f"name: x\nquestion: {name}\n{arms}\nclaims: {{other: -0.1}}\n")
    config = comparefile.read(str(path), {})
    assert (config.question, list(config.arms), config.baseline, list(config.settings)) == (name, [name, "other"], name, [name])
    assert CompareConfig.parse(yamlfile.parse(yaml.safe_dump(config.plain()))) == config


@given(st.sampled_from(["auto", "on", "off"]), st.sampled_from(["yes", "no", "on", "off", "True", "false"]))
def test_a_choice_is_the_word_and_a_truth_is_a_truth(choice, truth):
    keys = yamlfile.parse(f"{{compile: {choice}, coordconv: {truth}}}")
    config = TrainConfig.parse(keys)
    assert (config.compile, config.coordconv) == (choice, truth in ("yes", "on", "True"))


@pytest.mark.parametrize("word", ["0123", "1:3", "1_000", "0x1f", "0o17", "true", "1 000", "１２", "1e", "+", "--1", "2026-01-01", "null"])
def test_what_is_no_decimal_number_is_none(word):
    for knobs, key, needed in (
        (TrainConfig, "epochs", {}),
        (TrainConfig, "lr", {}),
        (SweepConfig, "trials", SWEEP),
        (CompareConfig, "seeds", COMPARE),
    ):
        assert "must be" in outcome(
            lambda knobs=knobs, key=key, needed=needed: knobs.parse(needed | yamlfile.parse(f"{{{key}: {word!r}}}"))
        )
    assert "must be" in outcome(lambda: CompareConfig.parse(COMPARE | {"seeds": ["1", word]}))
    assert "must be" in outcome(lambda: CompareConfig.parse(COMPARE | {"claims": {"low": word}}))


ODD = [
    ("margin", "0123"),
    ("margin", "true"),
    ("trials", ".inf"),
    ("trials", "-.INF"),
    ("seeds", "\uff11"),
    ("claims", "~"),
    ("datasets", "{a: b}"),
]


@pytest.mark.parametrize(("key", "word"), ODD)
def test_numbers_that_may_be_absent_and_words_of_another_kind_have_one_rule(key, word):
    knobs, needed = (SweepConfig, SWEEP) if key == "trials" else (CompareConfig, COMPARE)
    told = outcome(lambda: knobs.parse(needed | from_flags(knobs, {key: word})))
    assert told.startswith(f"{key}=") and "Input should be" not in told


@pytest.mark.parametrize(("word", "margin"), [("null", None), ("~", None), ("0.05", 0.05)])
def test_a_number_that_may_be_absent_is_absent_by_yamls_words(word, margin):
    assert CompareConfig.parse(COMPARE | {"margin": word}).margin == margin


@pytest.mark.parametrize("word", ["off", "no", "false", "False", "null", "~"])
def test_a_confirmation_is_left_out_by_every_word_for_it(word):
    assert SweepConfig.parse(SWEEP | yamlfile.parse(f"{{confirm: {word}}}")).confirm is None


def test_true_is_no_number_from_python_either():
    for key in ("epochs", "lr", "seed"):
        assert "must be" in outcome(lambda key=key: TrainConfig.parse({key: True}))


def test_a_merge_key_merges_as_yaml_has_it():
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc: {<<: *a, y: 3}\nd: {<<: [*a, *b], w: 4}\ne: {'<<': 1}\nf: {y: 3, <<: *a}"
    found = yamlfile.parse(text)
    assert found == {
        "a": {"x": "1", "y": "1"}, "b": {"x": "2", "z": "2"}, "c": {"x": "1", "y": "3"}, "d": {"x": "1", "y": "1", "z": "2", "w": "4"},
        "e": {"<<": "1"}, "f": {"x": "1", "y": "3"},
    }  # fmt: skip
    known = yaml.safe_load(text.replace("'<<'", "'e'"))
    assert all({key: str(value) for key, value in known[name].items()} == found[name] for name in "abcdf")


names = st.text("abc", min_size=1)
simple = st.recursive(
    st.text("abcxyz0189 _.-", min_size=1, max_size=6) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
)


@given(simple, st.booleans())
def test_what_yaml_writes_is_read_as_the_same_words(value, flow):
    text = yaml.safe_dump(value, default_flow_style=flow, width=10**6)
    expected = yaml.load(text, Loader=yaml.BaseLoader)  # PyYAML's own loader of words, which has no null
    assert _without_nothing(yamlfile.parse(text)) == _without_nothing(expected)


def _without_nothing(value):
    if isinstance(value, dict):
        return {key: _without_nothing(inner) for key, inner in value.items()}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value or ""


def all_knobs() -> list[type[Knobs]]:
    from stn_pipeline import bench, bench_pools, bench_warps, gallery  # noqa: F401 - they declare some

    found, new = [], [Knobs]
    while new:
        new = [below for above in new for below in above.__subclasses__()]
        found += new
    return found


def test_every_number_of_every_set_of_knobs_is_bounded_on_both_sides():
    n_numbers = 0
    for knobs in all_knobs():
        if not knobs.__module__.startswith("stn_pipeline."):
            continue  # another test's
        for name, field in knobs.model_fields.items():
            if field.annotation in (int, float, int | None, float | None):
                n_numbers += 1
                bounds = {type(rule).__name__ for rule in field.metadata}
                assert bounds & {"Gt", "Ge"} and bounds & {"Lt", "Le"}, f"{knobs.__name__}.{name}"
    assert n_numbers > 30


@pytest.mark.parametrize("given", ["300000000", "9" * 25, "-" + "9" * 25, "1e300", "9" * 5000])
def test_a_number_beyond_all_bounds_is_one_line_under_every_key(given):
    for knobs, needed in ((TrainConfig, {}), (EvalConfig, {"run_id": "a"}), (SweepConfig, SWEEP), (CompareConfig, COMPARE)):
        for name, field in knobs.model_fields.items():
            if (field.annotation in (int, float) or name == "seeds") and not (given == "300000000" and name == "seed"):
                assert outcome(lambda knobs=knobs, needed=needed, name=name: knobs.parse(needed | {name: given})), name


# What is told, and first


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\nserach: [lr]\ntrials: 3", "unknown key serach: .*did you mean search\\?"),
        ("name: x\nsearch: [lr]\ntrails: 3", "unknown key trails: .*did you mean trials\\?"),
        ("nmae: x\nsearch: [lrr]\ntrials: 3", "unknown key nmae: .*did you mean name\\?"),
    ],
)
def test_a_misspelt_key_is_told_before_what_is_missing_or_wrong(tmp_path, text, told):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        sweepfile.read(str(tmp_path / "s.yaml"), {})


@given(st.text(st.characters(), max_size=300))
def test_nothing_that_is_shown_leaves_its_line_or_moves_a_terminal(text):
    for shown in (texts.printable(text), texts.quoted(text), str(ConfigError(text)), texts.markdown(text), texts.code(text)):
        assert shown.isprintable()
        shown.encode()


def test_a_message_says_what_was_written_with_escapes_and_without_passwords(capsys):
    texts.say(
        ConfigError("data_dir=a\n\x1b]0;title\x07error: fake \u202e\udce4: at postgresql://me:secret@host/db?password=other"), error=True
    )
    assert (
        capsys.readouterr().err == "data_dir=a\\n\\x1b]0;title\\x07error: fake \\u202e\\udce4: at postgresql://***@host/db?password=***\n"
    )


def test_a_long_message_keeps_both_ends():
    told = str(ConfigError("begin" + "x" * 10**5 + "end"))
    assert told.startswith("begin") and len(told) <= texts.MOST_SHOWN + 5


def test_the_entry_points_print_an_error_as_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--data_dir", "x", "--lr", "1\nerror: fake\x1b[2J"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    from stn_pipeline.train import train

    with pytest.raises(SystemExit) as ended:
        cli.run(train)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: lr=1 error: fake\\x1b[2J: must be a number (default 0.01)\n"
