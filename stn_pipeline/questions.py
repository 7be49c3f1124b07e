"""What a sweep file and a comparison file share: YAML that reads like the question it asks, checked whole before anything starts."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BeforeValidator, model_validator

from stn_pipeline.config import Knobs, TrainConfig, knob
from stn_pipeline.errors import ConfigError, did_you_mean

ENTRY_POINTS = {"search": "sweep", "arms": "compare"}  # by the key that only its files have
MOST_HERE = 256


def _address(given: Any) -> Any:
    if given and not re.fullmatch(r"auto|[^\s/:]+:\d{1,5}", str(given)):
        raise ValueError("must be auto (the cluster that this machine is in) or HOST:PORT")
    return given


class Question(Knobs):
    """The keys that every file has: what the question is called, and where its trainings run."""

    noun: ClassVar[str] = "key"

    name: str = knob(..., help="name of the sweep or comparison: of its runs, of its files in studies/")
    question: str = knob("", help="what it asks, in words; shown on its page")
    workers: int = knob(
        0,
        help="trainings at once; 0 for one a core, or one a GPU where there are GPUs; with ray, for all that fit",
        ge=0,
    )
    ray: Annotated[str, BeforeValidator(_address)] = knob(
        "", help="train on a Ray cluster: auto, or HOST:PORT; none by default (pip install 'stn-pipeline[ray]')"
    )
    gpus_per_trial: float = knob(0, help="with ray, share of a GPU that a training takes; 0.25 puts four on one", ge=0, le=1)
    cpus_per_trial: int = knob(1, help="with ray, cores that a training takes, and its threads", ge=1, le=1024)

    @model_validator(mode="after")
    def _ray_agrees(self) -> Self:
        for key in ("gpus_per_trial", "cpus_per_trial"):
            if not self.ray and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)}: is for a Ray cluster only: add ray=auto, or leave it out")
        if not self.ray and self.workers > MOST_HERE:
            raise ValueError(f"workers={self.workers}: must be <= {MOST_HERE} on one machine")
        return self


WHERE = Question.model_fields.keys() - {"name", "question"}  # keys that say where, not what
AnyQuestion = TypeVar("AnyQuestion", bound=Question)


def read(question: type[AnyQuestion], path: str, flags: dict[str, str], example: str) -> AnyQuestion:
    """Return a file with the flags put over its keys.

    Raises: ConfigError, one line that names the place.
    """
    content = load(path, example)
    for key, module in ENTRY_POINTS.items():
        if key in content and key not in question.model_fields:
            raise ConfigError(f"{path}: has {key}, so it is a file for python -m stn_pipeline.{module}: run that, or name another file")
    try:
        return question.parse(content | from_flags(question, flags))
    except ConfigError as error:
        from_flag = re.split(r"\W", str(error).removeprefix("unknown key "))[0] in flags
        raise error if from_flag else ConfigError(f"{path}: {error}") from error


def load(path: str, example: str) -> dict[str, Any]:
    """Return the keys of a file.

    Raises: ConfigError where there is none, or it is not YAML of keys and values.
    """
    try:
        content = yaml.load(Path(path).expanduser().read_text(), Loader=_OneOfEachKey)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}: name a file such as {example}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text: name a file such as {example}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as name: mnist")
    return {str(key): value for key, value in content.items()}


def from_flags(question: type[Knobs], flags: dict[str, str]) -> dict[str, Any]:
    """Return what flags say: YAML, except where the key takes words."""
    return {key: _flag(question, key, text) for key, text in flags.items()}


def _flag(question: type[Knobs], key: str, text: str) -> Any:
    if key in question.model_fields and question.model_fields[key].annotation is str:
        return text
    try:
        return yaml.load(text, Loader=_OneOfEachKey)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{key}={text}: is not YAML") from error


class _OneOfEachKey(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key that stands twice is an error, and 1e-3 a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key} stands twice", problem_mark=node.start_mark)
        content: dict[Any, Any] = super().construct_mapping(node, deep)
        return content


_OneOfEachKey.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def names(given: Any) -> Any:
    """Return `a, b` as a list, and anything else as it is."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given


def check_name(given: Any) -> None:
    """Check that a name can be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name := str(given)):
        raise ConfigError(f"name={name}: must be letters, digits and _ . - only")


def knobs(place: str, given: Any, own_key: dict[str, str], beside: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the knobs under a key, each checked and of its type; `beside` are knobs that hold too.

    own_key: knobs that the file sets by a key of its own, and what to say of it.
    """
    given = given or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{place}={given}: must be knobs and their values, as in {{epochs: 10}}")
    for name in given:
        if not isinstance(name, str):
            raise ConfigError(f"{place}: unknown knob {name}{did_you_mean(str(name), TrainConfig.model_fields)}")
    for own in own_key.keys() & given.keys():
        raise ConfigError(f"{place}.{own}: {own_key[own]}")
    try:
        checked = TrainConfig.parse((beside or {}) | given)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}" if str(error).startswith("unknown") else f"{place}.{error}") from error
    return {name: getattr(checked, name) for name in given}
