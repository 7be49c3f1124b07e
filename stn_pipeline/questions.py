"""What a sweep file and a comparison file share: YAML that reads like the question it asks, checked whole before anything starts."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, model_validator

from stn_pipeline import yamlfile
from stn_pipeline.config import Knobs, TrainConfig, knob
from stn_pipeline.errors import ConfigError
from stn_pipeline.texts import quoted
from stn_pipeline.yamlfile import is_nothing

ENTRY_POINTS = {"search": "sweep", "arms": "compare"}  # by the key that only its files have
MOST_HERE = 256
MOST_NAME = 100  # characters of a name that becomes part of a file's, a run's or a metric's: those end at 250


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
        le=100_000,
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
    content = yamlfile.read(path, example)
    for key, module in ENTRY_POINTS.items():
        if key in content and key not in question.model_fields:
            raise ConfigError(f"{path}: has {key}, so it is a file for python -m stn_pipeline.{module}: run that, or name another file")
    try:
        return question.parse(content | from_flags(question, flags))
    except ConfigError as error:
        from_flag = re.split(r"\W", str(error).removeprefix("unknown key "))[0] in flags
        raise error if from_flag else ConfigError(f"{path}: {error}") from error


def from_flags(question: type[Knobs], flags: dict[str, str]) -> dict[str, Any]:
    """Return what flags say: YAML where the key takes a list or a mapping, else the word itself."""
    return {key: _flag(question, key, text) for key, text in flags.items()}


def _flag(question: type[Knobs], key: str, text: str) -> Any:
    if key not in question.model_fields or not _is_nested(question.model_fields[key].annotation):
        return text
    try:
        return yamlfile.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{key}={quoted(text)}: is not YAML") from error


def _is_nested(annotation: Any) -> bool:
    """Say whether a key takes a list or a mapping."""
    kinds = (annotation, *get_args(annotation))
    return get_origin(annotation) in (tuple, dict) or any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def names(given: Any) -> Any:
    """Return `a, b` as a list, and anything else as it is."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given


def check_name(given: Any) -> None:
    """Check that a name can be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name := str(given)):
        raise ConfigError(f"name={quoted(name)}: must be letters, digits and _ . - only")
    if len(name.encode()) > MOST_NAME:
        raise ConfigError(f"name={quoted(name)}: must be at most {MOST_NAME} letters, got {len(name)}")


def in_keys(name: str) -> str:
    """Return a name as keys of metrics and names of files hold it: whatever else than letters, digits, _ . - is a _."""
    return re.sub(r"[^\w.-]", "_", name)


def check_in_keys(place: str, names: Iterable[str], most: int = MOST_NAME) -> None:
    """Check that names can be parts of the keys of metrics and of files, by MLflow's rule, and stay different there.

    place: what the error names, such as arms.   most: bytes of a name.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not re.search(r"[^\W_]", name) or in_keys(name).startswith("."):
            raise ConfigError(f"{place}: a name must hold a letter or digit and not begin with a dot, got {quoted(name) or 'nothing'}")
        if not name.isprintable() or name != name.strip() or len(name.encode()) > most:
            raise ConfigError(f"{place}: a name must be one line of at most {most} letters, got {quoted(name)}")
        if (twin := seen.setdefault(in_keys(name), name)) != name:
            raise ConfigError(f"{place}: {quoted(twin)} and {quoted(name)} are both {in_keys(name)} in metrics and files: rename one")


def knobs(place: str, given: Any, own_key: dict[str, str], beside: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the knobs under a key, each checked and of its type; `beside` are knobs that hold too.

    own_key: knobs that the file sets by a key of its own, and what to say of it.
    """
    given = {} if is_nothing(given) else given
    if not isinstance(given, dict):
        raise ConfigError(f"{place}={quoted(given)}: must be knobs and their values, as in {{epochs: 10}}")
    for own in sorted(own_key.keys() & given.keys()):
        raise ConfigError(f"{place}.{own}: {own_key[own]}")
    try:
        checked = TrainConfig.parse((beside or {}) | given)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}" if str(error).startswith("unknown") else f"{place}.{error}") from error
    return {name: getattr(checked, name) for name in given}
