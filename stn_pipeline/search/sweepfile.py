"""A sweep file: YAML that reads like the question it asks, checked whole before anything starts."""

import itertools
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, TypeAdapter, ValidationError, model_validator

from stn_pipeline import questions
from stn_pipeline.config import MACHINE, Choices, DatasetName, Knobs, Range, TrainConfig, choices_of, knob, search_of, short_name
from stn_pipeline.errors import ConfigError, did_you_mean
from stn_pipeline.questions import Question, names
from stn_pipeline.texts import quoted
from stn_pipeline.yamlfile import is_nothing

OWN_KEY = {  # knobs that a sweep sets by a key of its own, and the key
    "dataset": "datasets: names the sets",
    "seed": "seed: is the sweep's, final: the number of fresh ones",
}
OFF = "off"
TRUTH = TypeAdapter(bool)
SAME_FOR_ALL = {*MACHINE, "val_fraction"}  # knobs that a search may not vary: values would not compare


MOST_FINALS = 100  # so that the confirmation's seeds stay clear of theirs, however many are asked for later


class Confirm(Knobs):
    """How the winner is chosen: the best few trials and the default, trained again on fresh seeds, judged by the mean on validation."""

    noun: ClassVar[str] = "key"

    top: int = knob(5, help="how many of the best configurations are trained again, beside the default", ge=1, le=1000)
    seeds: int = knob(3, help="fresh seeds for each", ge=1, le=100)


class SweepConfig(Question):
    """One sweep: the keys of its file."""

    train: dict[str, Any] = knob({}, help="knobs that stay fixed")
    search: dict[str, Range | Choices] = knob(
        ..., help="knobs to tune: bare for the range that the knob declares, {low: , high: , log: } or a list of values"
    )
    datasets: Annotated[tuple[DatasetName, ...], BeforeValidator(names)] = knob(("auto",), help="data sets, a study each, side by side")
    objective: Literal["val/loss", "val/accuracy"] = knob("val/loss", help="whose best value over the epochs counts")
    direction: Literal["minimize", "maximize"] = knob("minimize", help="minimize, or maximize where the objective is an accuracy")
    trials: int = knob(0, help="trials a study, the default configuration among them; 0 for no such limit", ge=0, le=1_000_000)
    time_limit_s: float = knob(
        0,
        help="seconds of trials and confirmation, over all calls, after which no new trial starts; 0 for no such limit",
        unit="s",
        ge=0,
        le=100_000_000,
    )
    sampler: Literal["tpe", "gp", "random", "qmc", "grid"] = knob("tpe", help="how the next values are chosen")
    pruner: Literal["hyperband", "median", "none"] = knob("hyperband", help="which trials stop early")
    seed: int = knob(0, help="of the sampler, and of every trial", ge=0, lt=1_000_000)
    confirm: Confirm | None = knob(
        None,
        help="{top: 5, seeds: 3}: the best 5 and the default, on 3 fresh seeds each, whose mean on validation chooses the winner",
    )
    final: int = knob(
        3, help="fresh seeds to retrain the winner and the default configuration with, on the test split", ge=0, le=MOST_FINALS
    )
    register_as: str = knob("", help="registered model whose next version, alias champion, the winner becomes; none by default")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        given = dict(given)
        questions.check_name(given.get("name", "x"))
        _check_model_name(given.get("register_as") or "")
        given["train"] = questions.knobs("train", given.get("train"), OWN_KEY)
        if "search" in given:
            given["search"] = dict(_searched(given["search"], given["train"]))
        if "confirm" in given:
            given["confirm"] = _confirm(given["confirm"])
        given.setdefault("direction", "maximize" if given.get("objective") == "val/accuracy" else "minimize")
        return given

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if (self.objective == "val/accuracy") != (self.direction == "maximize"):
            raise ValueError(f"direction={self.direction}: of {self.objective} that is the worst: leave direction out")
        if not self.trials and not self.time_limit_s:
            raise ValueError("trials: missing, and so is time_limit_s: give at least one of them")
        if len(set(self.datasets)) < len(self.datasets) or not self.datasets:
            raise ValueError(f"datasets={', '.join(self.datasets)}: must be at least one, each named once")
        for dataset in self.datasets if self.register_as and len(self.datasets) > 1 else ():
            _check_model_name(f"{self.register_as}-{short_name(dataset)}")  # a model for each
        if not self.search:
            raise ValueError("search: is empty: name a knob to tune, such as lr")
        for name, space in self.search.items():
            if self.sampler == "grid" and isinstance(space, Range):
                raise ValueError(f"sampler=grid: needs a list of values for search.{name}, got {in_words(space)}")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the keys as a sweep file that asks the same."""
        spaces = {name: space._asdict() if isinstance(space, Range) else list(space.values) for name, space in self.search.items()}
        return self.model_dump(mode="json") | {"search": spaces, "confirm": self.confirm.plain() if self.confirm else OFF}

    def flat(self) -> dict[str, Any]:
        """Return the keys as params: the knobs under train. and search., everything else plain."""
        plain = {key: value for key, value in dict(self).items() if key not in ("train", "search", "datasets")}
        plain["confirm"] = f"top {self.confirm.top}, seeds {self.confirm.seeds}" if self.confirm else OFF
        fixed = {f"train.{name}": value for name, value in self.train.items()}
        return plain | fixed | {f"search.{name}": in_words(space) for name, space in self.search.items()}

    def config(self, dataset: str, params: dict[str, Any] | None = None, seed: int | None = None) -> TrainConfig:
        """Return the knobs of one training; without params, of the default configuration.

        Raises: ConfigError where the params do not go together.
        """
        seed = self.seed if seed is None else seed
        return TrainConfig.parse(self.train | (params or {}) | {"dataset": dataset, "seed": seed})

    @property
    def confirm_seeds(self) -> range:
        """The fresh seeds of the confirmation, none of them a trial's or a final training's."""
        first = self.seed + MOST_FINALS + 1
        return range(first, first + (self.confirm.seeds if self.confirm else 0))

    @property
    def final_seeds(self) -> range:
        """The fresh seeds of the final trainings."""
        return range(self.seed + 1, self.seed + 1 + self.final)

    @property
    def default(self) -> dict[str, Any]:
        """The default values of the knobs that are searched."""
        return {name: TrainConfig.model_fields[name].default for name in self.search}

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Return every combination of the searched values, where each knob has a list."""
        values = [space.values for space in self.search.values() if isinstance(space, Choices)]
        return (dict(zip(self.search, combination, strict=True)) for combination in itertools.product(*values))

    @property
    def is_finite(self) -> bool:
        """Whether there are only so many combinations."""
        return all(isinstance(space, Choices) for space in self.search.values())


def read(path: str, flags: dict[str, str]) -> SweepConfig:
    """Return a sweep file with the flags put over its keys.

    Raises: ConfigError, one line that names the place.
    """
    return questions.read(SweepConfig, path, flags, "sweeps/digits.yaml")


def _confirm(given: Any) -> Confirm | None:
    if is_nothing(given) or str(given).lower() in (OFF, "no", "false"):
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"confirm={quoted(given)}: must be {{top: 5, seeds: 3}}, or off")
    try:
        return Confirm.parse({str(key): value for key, value in given.items()})
    except ConfigError as error:
        raise ConfigError(f"confirm: {error}" if str(error).startswith("unknown") else f"confirm.{error}") from error


def _check_model_name(given: Any) -> None:
    """Check the name of a registered model by MLflow's rule, and that a URI such as models:/NAME@champion can hold it."""
    name = str(given)
    if name and (not re.fullmatch(r"[\w.-]([\w .-]*[\w.-])?", name) or name.startswith(".") or len(name.encode()) > questions.MOST_NAME):
        rule = f"must be at most {questions.MOST_NAME} letters, digits, spaces and _ . - and not begin with a dot"
        raise ConfigError(f"register_as={quoted(name)}: {rule}: MLflow's registry takes no other")
    if is_nothing(name) and name:
        raise ConfigError(f"register_as={name}: leave it out to register nothing")


def _searched(given: Any, train: dict[str, Any]) -> Iterator[tuple[str, Range | Choices]]:
    given = names(given)
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        given = dict.fromkeys(given)
    if not isinstance(given, dict):
        raise ConfigError(f"search={quoted(given)}: must be knobs, as in [lr, batch_size] or {{lr: {{low: 1e-4, high: 1e-2}}}}")
    for name, asked in given.items():
        if name not in TrainConfig.model_fields:
            raise ConfigError(f"search: unknown knob {quoted(name)}{did_you_mean(str(name), TrainConfig.model_fields)}")
        if name in OWN_KEY:
            raise ConfigError(f"search.{name}: {OWN_KEY[name]}")
        if name in SAME_FOR_ALL:
            raise ConfigError(f"search.{name}: must be the same for all trials: put it under train:")
        if name in train:
            raise ConfigError(f"search.{name}: stands under train: too: leave it in one of them")
        yield name, _space(name, asked)


def _space(name: str, asked: Any) -> Range | Choices:
    field, place = TrainConfig.model_fields[name], f"search.{name}"
    declared = search_of(field)
    if isinstance(asked, list):
        if not asked:
            raise ConfigError(f"{place}: the list is empty: give at least one value")
        values = tuple(dict.fromkeys(_value(name, value) for value in asked))
        return Choices(values)
    if is_nothing(asked):
        if declared is None:
            raise ConfigError(f"{place}: declares no range of its own: give {{low: , high: }} or a list of values")
        return declared
    if not isinstance(asked, dict):
        raise ConfigError(f"{place}={quoted(asked)}: must be bare, {{low: , high: , log: }} or a list of values")
    if choices_of(field) or field.annotation not in (int, float):
        raise ConfigError(f"{place}: takes {', '.join(choices_of(field)) or 'words'}: give a list of values")
    for key in asked:
        if key not in Range._fields:
            raise ConfigError(f"{place}.{quoted(key)}: unknown: give low, high and log{did_you_mean(str(key), Range._fields)}")
    if isinstance(declared, Range):
        asked = declared._asdict() | asked
    if missing := {"low", "high"} - asked.keys():
        raise ConfigError(f"{place}: {min(missing)} is missing: give {{low: , high: }}")
    low, high = _value(name, asked["low"], "low"), _value(name, asked["high"], "high")
    try:
        log = TRUTH.validate_python(asked.get("log", False))
    except ValidationError as error:
        raise ConfigError(f"{place}.log={quoted(asked['log'])}: must be true or false") from error
    if low >= high:
        raise ConfigError(f"{place}: low={low} must be < high={high}")
    if log and low <= 0:
        raise ConfigError(f"{place}: low={low} must be > 0 where log is true")
    return Range(low, high, log)


def _value(name: str, value: Any, end: str = "") -> Any:
    try:
        return getattr(TrainConfig.parse({name: value} | ({"coordconv": True} if name == "coordconv_r" else {})), name)
    except ConfigError as error:
        raise ConfigError(f"search.{name}{'.' + end if end else ''}{str(error).removeprefix(name)}") from error


def in_words(space: Range | Choices) -> str:
    """Return a range or a list as text, as in `0.0001 to 0.03, log` or `32, 64, 128`."""
    if isinstance(space, Choices):
        return ", ".join(str(value) for value in space.values)
    return f"{space.low:g} to {space.high:g}" + (", log" if space.log else "")


def holds(space: Range | Choices, value: Any) -> bool:
    """Say whether a value lies in a range or stands in a list."""
    return value in space.values if isinstance(space, Choices) else space.low <= value <= space.high


def short(params: dict[str, Any]) -> str:
    """Return params as a run's name shows them, as in `lr=3.1e-03 bs=128`."""
    words = []
    for name, value in params.items():
        key = "".join(word[0] for word in name.split("_")) if "_" in name else name
        words.append(f"{key}={value:.1e}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(words)
