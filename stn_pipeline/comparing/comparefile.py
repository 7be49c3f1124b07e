"""A comparison file: which arms, over which seeds, on which data, against which baseline; checked whole before anything starts."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_serializer, model_validator

from stn_pipeline import questions
from stn_pipeline.comparing.measures import LOSS, MEASURES
from stn_pipeline.comparing.verdicts import Rules
from stn_pipeline.config import MACHINE, TEST_IMAGES, DatasetName, Knobs, TrainConfig, knob, short_name
from stn_pipeline.errors import ConfigError, did_you_mean
from stn_pipeline.questions import Question, names
from stn_pipeline.texts import quoted
from stn_pipeline.yamlfile import is_nothing

NO_SETTING: dict[str, dict[str, Any]] = {"": {}}
OWN_KEY = {  # knobs that a comparison sets by a key of its own, and the key
    "dataset": "datasets: names the sets",
    "seed": "seeds: gives them, the same for every arm",
}
MOST_SEEDS = 1000
MOST_CLAIMED = 100
MOST_TITLE = 120  # characters; with an arm's and a measure's name it is a metric's key, which MLflow ends at 250


class Seeds(BaseModel):
    """The seeds of a comparison in the order in which they are trained.

    looks: after how many of them the data are looked at; none where that is once, after all.
    """

    model_config = ConfigDict(frozen=True)

    values: tuple[int, ...]
    looks: tuple[int, ...] = ()

    @model_serializer
    def _as_in_a_file(self) -> Any:
        return {"looks": list(self.looks)} if self.looks else list(self.values)

    @property
    def at_looks(self) -> tuple[int, ...]:
        """How many seeds each look has."""
        return self.looks or (len(self.values),)


def _seeds(given: Any) -> Any:
    if isinstance(given, Seeds):
        return given
    looks = _looks(given) if isinstance(given, dict) else ()
    given = looks[-1] if looks else _whole(given)
    if not isinstance(given, (int, list, tuple)):
        raise ValueError("must be a number of seeds, a list of seeds, or {looks: [5, 10, 20]}")
    if not 1 <= (given if isinstance(given, int) else len(given)) <= MOST_SEEDS:
        raise ValueError(f"must be 1 to {MOST_SEEDS} seeds")
    seeds = list(range(given)) if isinstance(given, int) else [_whole(seed) for seed in given]
    if not all(isinstance(seed, int) for seed in seeds):
        raise ValueError("must be a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise ValueError("must name each seed once")
    return Seeds(values=tuple(seeds), looks=looks)


def _looks(given: dict[Any, Any]) -> tuple[int, ...]:
    looks: Any = given.get("looks")
    looks = [_whole(n) for n in looks] if isinstance(looks, (list, tuple)) else []
    whole = len(looks) >= 2 and all(isinstance(n, int) for n in looks)
    if set(given) != {"looks"} or not whole or sorted(set(looks)) != looks or looks[0] < 2:
        raise ValueError("must be {looks: [5, 10, 20]}: two or more rising numbers of seeds, the first at least 2")
    return tuple(looks)


def _whole(given: Any) -> Any:
    """Return a word that is a whole number as that, and None for what is no number though Python counts by it."""
    if isinstance(given, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,9})", given):
        return int(given)
    return None if isinstance(given, bool) else given


def _measure(given: Any) -> Any:
    if not isinstance(given, str) or given not in MEASURES:
        raise ValueError(f"choose {', '.join(MEASURES)}{did_you_mean(str(given), MEASURES)}")
    return given


class Block(NamedTuple):
    """Where all arms are trained alike and are compared with each other: one data set under one setting."""

    dataset: str
    setting: str

    @property
    def title(self) -> str:
        """What it is called on pages, and as a part of the keys of metrics and of files."""
        return ", ".join(filter(None, (short_name(self.dataset), self.setting)))


MeasureName = Annotated[str, BeforeValidator(_measure)]


class CompareConfig(Question):
    """One comparison: the keys of its file."""

    train: dict[str, Any] = knob({}, help="knobs that are the same for all arms")
    arms: dict[str, dict[str, Any]] = knob(..., help="arms by name, and the knobs in which each differs: {base: {}, tps: {transform: tps}}")
    baseline: str = knob("", help="the arm that the others are compared with; the first by default")
    settings: dict[str, dict[str, Any]] = knob(
        NO_SETTING, help="circumstances in which to compare all arms anew: {name: {knob: value}}; none by default"
    )
    datasets: Annotated[tuple[DatasetName, ...], BeforeValidator(names)] = knob(("auto",), help="data sets to compare all arms on")
    seeds: Annotated[Seeds, BeforeValidator(_seeds)] = knob(
        10, help="how many seeds, from 0; a list of them; or {looks: [5, 10, 20]}, to stop as soon as every arm is decided"
    )
    decide: MeasureName = knob(LOSS.name, help=f"the measure that has verdicts; the others are described: {', '.join(MEASURES)}")
    margin: float | None = knob(
        None, help="differences below it do not matter: a share of the baseline's loss (0.05), or points of accuracy as 0..1", gt=0, lt=1
    )
    tune: dict[str, Any] = knob(
        {}, help="{search: [lr, loc_lr_multiplier], trials: 20}: tunes each arm by itself before it is compared on fresh seeds"
    )
    claims: dict[str, float] = knob(
        {},
        help="by arm, a relative difference in test loss that somebody claims, as -0.15 for 15 % less",
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        given = dict(given)
        questions.check_name(given.get("name", "x"))
        given["train"] = train = questions.knobs("train", given.get("train"), OWN_KEY)
        given["settings"] = settings = _named("settings", NO_SETTING if is_nothing(given.get("settings")) else given["settings"], train)
        if settings != NO_SETTING:
            questions.check_in_keys("settings", settings)
        if "arms" in given:
            given["arms"] = arms = _named("arms", given["arms"], train)
            questions.check_in_keys("arms", arms)
            if len(arms) < 2:
                raise ConfigError(f"arms={', '.join(arms)}: must be at least two")
            given["baseline"] = str(given.get("baseline") or next(iter(arms)))
            for setting, knobs in settings.items():
                for arm, own in arms.items():
                    if both := knobs.keys() & own.keys():
                        raise ConfigError(f"settings.{setting}.{min(both)}: stands under arms.{arm} too: leave it in one of them")
        return given

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.baseline not in self.arms:
            raise ValueError(
                f"baseline={quoted(self.baseline)}: is no arm: choose {', '.join(self.arms)}{did_you_mean(self.baseline, self.arms)}"
            )
        if len(set(self.datasets)) < len(self.datasets) or not self.datasets:
            raise ValueError(f"datasets={', '.join(self.datasets)}: must be at least one, each named once")
        for seed in self.seeds.values:
            questions.knobs("seeds", {"seed": seed}, {})
        check_claims(self.claims, self.arms, self.baseline)
        check_titles([block.title for block in self.blocks()])
        for block in self.blocks():
            self._check_images(block)
        seen: dict[str, str] = {}
        for arm in self.arms:
            twin = seen.setdefault(str([self.config(block, arm, 0).learning_knobs() for block in self.blocks()]), arm)
            if twin != arm:
                raise ValueError(f"arms.{arm}: is the same network as arms.{twin}, so nothing could differ: change one of them")
        return self

    def _check_images(self, block: Block) -> None:
        """Check that all arms of a block are scored on the same images."""
        ours = self.config(block, self.baseline, 0).learning_knobs()
        for arm in self.arms:
            theirs = self.config(block, arm, 0).learning_knobs()
            for name in sorted(TEST_IMAGES):
                if ours.get(name) != theirs.get(name):
                    raise ValueError(
                        f"arms.{arm}.{name}: {theirs.get(name)}, but {ours.get(name)} in {self.baseline}: the test images differ: nothing "
                        "could be compared: put it under settings:, or train on both and score the runs with eval"
                    )

    @property
    def rules(self) -> Rules:
        """How verdicts are made."""
        return Rules(MEASURES[self.decide], self.margin, self.seeds.looks)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader must know of the arms."""
        shares = {arm: self.config(next(self.blocks()), arm, 0).val_fraction for arm in self.arms}
        if len(set(shares.values())) == 1:
            return ()
        words = ", ".join(f"{arm} {share:g}" for arm, share in shares.items())
        return (f"The arms are trained on different numbers of images (val_fraction: {words}).",)

    def blocks(self) -> Iterator[Block]:
        """Return every data set under every setting."""
        return (Block(dataset, setting) for dataset in self.datasets for setting in self.settings)

    def config(self, block: Block, arm: str, seed: int, tuned: dict[str, Any] | None = None) -> TrainConfig:
        """Return the knobs of one training; `tuned` are those that the arm chose for itself.

        Raises: ConfigError where they do not go together.
        """
        knobs = self.train | self.settings[block.setting] | self.arms[arm]
        return TrainConfig.parse(knobs | (tuned or {}) | {"dataset": block.dataset, "seed": seed})

    def flat(self) -> dict[str, Any]:
        """Return the keys by name, nested ones as YAML in a line."""
        return {key: _line(value) if isinstance(value, (dict, list)) else value for key, value in self.plain().items()}


class ExistingConfig(Knobs):
    """A comparison of runs that exist already: what to find, and what tells the arms apart."""

    runs: str = knob(..., help="MLflow filter of the runs to compare, as \"params.dataset = 'mnist' and params.epochs = '5'\"")
    by: Annotated[tuple[str, ...], BeforeValidator(names)] = knob(..., help="knobs or tags that tell arms apart, as transform,coordconv")
    baseline: str = knob("", help="the arm that the others are compared with; by default the one with the default values")
    claims: dict[str, float] = knob({}, help="by arm, a relative difference in test loss that is claimed")
    decide: MeasureName = knob(LOSS.name, help=f"the measure that has verdicts: {', '.join(MEASURES)}")
    margin: float | None = knob(None, help="differences below it do not matter, as in a comparison file", gt=0, lt=1)

    @property
    def rules(self) -> Rules:
        """How verdicts are made."""
        return Rules(MEASURES[self.decide], self.margin)


def check_claims(claims: dict[str, float], arms: Iterable[str], baseline: str) -> None:
    """Check that each claim is of an arm beside the baseline, and could be true.

    Raises: ConfigError.
    """
    others = [name for name in arms if name != baseline]
    for arm, claim in claims.items():
        if arm not in others:
            near = did_you_mean(arm, others)
            raise ConfigError(f"claims.{quoted(arm)}: is no arm beside the baseline: choose {', '.join(others)}{near}")
        if not -1 < claim <= MOST_CLAIMED or not claim:
            rule = f"must be a share above -1 and not 0, at most {MOST_CLAIMED}, as -0.15 for 15 % less"
            raise ConfigError(f"claims.{quoted(arm)}={claim:g}: {rule}")


def check_titles(titles: Sequence[str]) -> None:
    """Check that the names of several blocks can tell their metrics and files apart.

    Raises: ConfigError.
    """
    if len(set(titles)) < len(titles):
        name = max(titles, key=titles.count)
        raise ConfigError(f"datasets: two of them have one name: leave one out, or rename a folder, got {quoted(name)} twice")
    if len(titles) > 1:
        questions.check_in_keys("datasets and settings", titles, MOST_TITLE)


def _line(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=100_000)).removesuffix("\n").removesuffix("\n...")


def _named(key: str, given: Any, train: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not isinstance(given, dict):
        raise ConfigError(f"{key}={quoted(given)}: must be names and their knobs, as in {{base: {{}}, tps: {{transform: tps}}}}")
    named = {str(name): questions.knobs(f"{key}.{quoted(name)}", knobs, OWN_KEY, train) for name, knobs in given.items()}
    for name, knobs in named.items():
        for place in sorted(MACHINE):
            if place in knobs:
                raise ConfigError(f"{key}.{name}.{place}: says where or how fast, not what: put it under train:")
    return named


def read(path: str, flags: dict[str, str]) -> CompareConfig:
    """Return a comparison file with the flags put over its keys.

    Raises: ConfigError, one line that names the place.
    """
    return questions.read(CompareConfig, path, flags, "sweeps/report.yaml")
