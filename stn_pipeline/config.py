"""Every knob, once: type, default, bounds, unit, help, and the range that a sweep may search.

The command-line flags, the MLproject parameters, the params that MLflow shows, the sweep files' check and docs/knobs.md's
knob table all come from these declarations.
"""

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticKnownError

from stn_pipeline.errors import ConfigError, did_you_mean
from stn_pipeline.paths import expanded
from stn_pipeline.texts import quoted
from stn_pipeline.yamlfile import is_nothing

FOLDER = "folder:"
DATA = {"dataset", "data_dir", "image_size", "distortion", "draws", "val_fraction", "seed"}  # knobs that decide the splits
TEST_IMAGES = {"dataset", "image_size", "distortion", "draws"}  # knobs that decide what a network is tested on
MACHINE = {"device", "data_dir", "compile"}  # knobs that say where and how fast, not what is learned
DATASETS = ("auto", "mnist", "fashion_mnist", "kmnist", "cifar10", "svhn", "digits")
DATASET_CHOICES = ", ".join((*DATASETS, f"{FOLDER}PATH"))
DATASET_HELP = f"images to learn: {DATASET_CHOICES}; auto is mnist, or the bundled digits where mnist cannot be had"
DEVICE_HELP = "where to compute: auto (the GPU where there is one), cpu, cuda, cuda:N"


class Range(NamedTuple):
    """An interval that a sweep may search."""

    low: int | float
    high: int | float
    log: bool = False


class Choices(NamedTuple):
    """A set of values that a sweep may search."""

    values: tuple[Any, ...]


def knob(default: Any, *, help: str, unit: str = "", search: Range | Choices | None = None, absent: Any = None, **bounds: Any) -> Any:
    """Declare a knob; `bounds` are pydantic's (gt, ge, lt, le).

    absent: what a run from before this knob counts as, where that is not its default: whoever changes a default keeps the first here.
    """
    extra: Any = {"unit": unit, "search": search, "absent": absent}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def _check_dataset(name: Any) -> Any:
    name = str(name)
    if name.startswith(FOLDER) and len(name) > len(FOLDER):
        return FOLDER + str(expanded(name.removeprefix(FOLDER)).resolve())
    if name in DATASETS:
        return name
    raise ValueError(f"choose {DATASET_CHOICES}{did_you_mean(name, DATASETS)}")


def _check_device(name: Any) -> Any:
    if re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", str(name)):
        return name
    raise ValueError("choose auto, cpu, cuda (a GPU) or cuda:N")


_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.?(?:inf|nan)", re.IGNORECASE)
MOST_TEXT = 4000  # characters of a value; MLflow cuts a param at 6000
MOST_DIGITS = 400


def number(given: Any) -> Any:
    """Return the word of a number, as in 0.01, 1e-2, 5; 007, 1_000, 0x1f and 1:30 are none, nor is true."""
    if isinstance(given, bool):
        raise PydanticKnownError("float_type")
    if not isinstance(given, str):
        return given
    if not _NUMBER.fullmatch(word := given.strip()):
        raise PydanticKnownError("float_parsing")
    return word.lower().replace(".inf", "inf").replace(".nan", "nan")


def whole_number(given: Any) -> Any:
    """Return a whole number of its word, as in 10, 1e1, 10.0."""
    if isinstance(given, bool):
        raise PydanticKnownError("int_type")
    if not isinstance(given, str):
        return given
    word = given.strip()
    if len(word) > MOST_DIGITS:
        raise PydanticKnownError("int_parsing_size")
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", word):
        return int(word)
    if not _NUMBER.fullmatch(word):
        raise PydanticKnownError("int_parsing")
    if not (value := float(number(word))).is_integer():
        raise PydanticKnownError("int_from_float")
    return int(value)


def _text(given: str) -> str:
    if len(given) > MOST_TEXT:
        raise ValueError(f"must be at most {MOST_TEXT} characters, got {len(given)}")
    if not given.isprintable() and any(unicodedata.category(mark) in ("Cc", "Cs") and mark not in "\n\t" for mark in given):
        raise ValueError("must be without control characters and broken ones")
    return given


def short_name(dataset: str) -> str:
    """Return a set's name, short: a folder's is that of the folder itself."""
    return Path(dataset.removeprefix(FOLDER)).name


DatasetName = Annotated[str, BeforeValidator(_check_dataset)]
DeviceName = Annotated[str, BeforeValidator(_check_device)]


class Knobs(BaseModel):
    """What every set of knobs shares: frozen, unknown names forbidden, errors of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    noun: ClassVar[str] = "knob"

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Return the checked knobs.

        Raises: ConfigError, one line for the first thing that is wrong; a name that is unknown before one that is missing.
        """
        for name in map(str, values):
            if name not in cls.model_fields:
                near = did_you_mean(name, cls.model_fields)
                raise ConfigError(f"unknown {cls.noun} {quoted(name)}: choose from {', '.join(cls.model_fields)}{near}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error.errors()[0])) from error

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, given: Any, info: ValidationInfo) -> Any:
        """Read numbers as every file and flag spells them, and refuse text that nothing could show."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if type(None) in kinds and is_nothing(given):
            return None
        read = whole_number if int in kinds else number if float in kinds else None
        if read and isinstance(given, (list, tuple)):
            return [read(item) for item in given]
        if read and isinstance(given, dict):
            return {key: read(item) for key, item in given.items()}
        if read and (get_origin(annotation) not in (tuple, dict) or _NUMBER.fullmatch(str(given))):
            return read(given)
        return _text(given) if isinstance(given, str) else given

    def plain(self) -> dict[str, Any]:
        """Return the values as a file would hold them."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """Return the values by name, each one plain, as a tracked run's params are."""
        return self.model_dump()


class TrainConfig(Knobs):
    """One training: the data, the network, the optimiser, the machine."""

    dataset: DatasetName = knob("auto", help=DATASET_HELP)
    data_dir: str = knob("data", help="folder of the torchvision sets, filled by a download where they are absent", min_length=1)
    image_size: int = knob(
        0, help="side to which the images of a folder are resized; 0 keeps their own (mixed: the commonest)", unit="px", ge=0, le=1024
    )
    distortion: Literal["none", "rotated", "rts", "projective", "elastic", "cluttered"] = knob(
        "none", help="distorts the images as the STN paper does, anew each epoch for training: R, RTS, P, E, TC"
    )
    draws: int = knob(1, help="with distortion, how often each image is in the val and test splits, each time another way", ge=1, le=10)
    val_fraction: float = knob(0.1, help="share of the training images held out to choose the best epoch", gt=0, le=0.5)
    arch: Literal["report", "stcnn"] = knob(
        "report", help="the report's network, or the STN paper's of about 400k parameters", search=Choices(("report", "stcnn"))
    )
    transform: Literal["none", "affine", "diffeo", "similarity", "projective", "tps", "cpab"] = knob(
        "affine",
        help="family of warps; none is the classifier alone",
        search=Choices(("none", "affine", "diffeo", "similarity", "projective", "tps", "cpab")),
    )
    cpab_cells: int = knob(3, help="of cpab: squares a side of its tessellation, four triangles each", ge=1, le=8, search=Range(1, 6))
    cpab_boundary: Literal["free", "fixed"] = knob(
        "free", help="of cpab: fixed keeps the image's edge in its place", search=Choices(("free", "fixed"))
    )
    iterations: int = knob(
        1, help="how often the localiser looks, each time at the image as warped so far; the warps are composed", ge=1, le=8,
        search=Range(1, 4),
    )  # fmt: skip
    supersample: int = knob(
        1, help="points a side that each pixel of a warped image averages; 2 or more against aliasing where a warp zooms out", ge=1, le=4,
        search=Range(1, 2),
    )  # fmt: skip
    coordconv: bool = knob(False, help="append the coordinates x, y to the input of every convolution", search=Choices((False, True)))
    coordconv_r: bool = knob(False, help="with coordconv, append the distance from the centre too", search=Choices((False, True)))
    padding: Literal["zeros", "border", "reflection"] = knob(
        "zeros", help="what the sampler sees outside the image", search=Choices(("zeros", "border", "reflection"))
    )
    epochs: int = knob(50, help="passes over the training split", ge=1, le=1_000_000)
    batch_size: int = knob(64, help="images a step", unit="images", ge=1, le=1_000_000, search=Choices((32, 64, 128, 256, 512)))
    lr: float = knob(0.01, help="learning rate of the classifier", gt=0, le=100, search=Range(1e-4, 3e-2, log=True))
    loc_lr_multiplier: float = knob(
        0.1, help="the localisation net's learning rate as a share of lr; at 1 some seeds collapse", ge=0, le=100,
        search=Range(1e-3, 1.0, log=True),
    )  # fmt: skip
    optimizer: Literal["adam", "adamw", "sgd"] = knob(
        "adam", help="update rule; sgd has no momentum", search=Choices(("adam", "adamw", "sgd"))
    )
    weight_decay: float = knob(
        0.0, help="decay of the weights: L2 for adam and sgd, decoupled for adamw", ge=0, le=10, search=Range(1e-6, 1e-2, log=True)
    )
    schedule: Literal["constant", "cosine"] = knob(
        "constant", help="learning rate over the run; cosine falls to 0 after the last step", search=Choices(("constant", "cosine"))
    )
    seed: int = knob(0, help="of the split, the initial weights, the batch order and dropout", ge=0, lt=1_000_000_000)
    device: DeviceName = knob("auto", help=DEVICE_HELP)
    precision: Literal["fp32", "tf32", "bf16"] = knob(
        "fp32", help="arithmetic of training: tf32 (GPU) for the convolutions, bf16 for the products too; the warp and the scores are fp32"
    )
    compile: Literal["auto", "on", "off"] = knob(
        "auto", help="train by kernels compiled for this CPU (fp32), by captured steps on a GPU; auto where that pays, the same to rounding"
    )

    @model_validator(mode="after")
    def _knobs_agree(self) -> Self:
        if self.coordconv_r and not self.coordconv:
            raise ValueError("coordconv_r=true needs coordconv=true")
        return self

    def learning_knobs(self) -> dict[str, Any]:
        """Return the knobs that decide what is learned: not where it happens, and none that this network does not have."""
        lacking = {"loc_lr_multiplier", "padding", "iterations", "supersample"} if self.transform == "none" else set()
        lacking |= set() if self.transform == "cpab" else {"cpab_cells", "cpab_boundary"}
        lacking |= {"draws"} if self.distortion == "none" else set()
        return self.model_dump(exclude=MACHINE | lacking)

    @property
    def data(self) -> str:
        """What decides the splits, in words: two configs that agree in it load the same ones."""
        return str(self.model_dump(include=DATA))

    @property
    def arm(self) -> str:
        """The network in a word or two, as in `diffeo-coordconv`."""
        words = [self.transform, "coordconv" * self.coordconv, "r" * self.coordconv_r]
        words += [self.arch * (self.arch != "report"), f"x{self.iterations}" * (self.iterations > 1)]
        return "-".join(filter(None, words))


class EvalConfig(Knobs):
    """One scoring of a run that exists."""

    run_id: str = knob(..., help="MLflow id of the training run to score", min_length=1)
    dataset: Annotated[str, BeforeValidator(lambda name: name if name == "same" else _check_dataset(name))] = knob(
        "same", help=f"same (as it was trained on), {DATASET_CHOICES}"
    )
    data_dir: str = knob("same", help="folder of the torchvision sets; same is the run's own", min_length=1)
    distortion: Literal["same", "none", "rotated", "rts", "projective", "elastic", "cluttered"] = knob(
        "same", help="distortion of the images; same is the run's own"
    )
    split: Literal["train", "val", "test"] = knob("test", help="split to score")
    robustness: int = knob(
        1000, help="undistorted images on which accuracy is told against rotation, scale and shift; 0 for none", unit="images", ge=0,
        le=1_000_000,
    )  # fmt: skip
    device: DeviceName = knob("auto", help=DEVICE_HELP)


def unit_of(field: FieldInfo) -> str:
    """Return the unit of a knob, or nothing where it has none."""
    return str(_extra(field)["unit"])


def search_of(field: FieldInfo) -> Range | Choices | None:
    """Return what a sweep may search of a knob, or None."""
    search: Range | Choices | None = _extra(field)["search"]
    return search


def absent_of(field: FieldInfo) -> Any:
    """Return what a run that does not have a knob counts as."""
    absent = _extra(field)["absent"]
    return field.default if absent is None else absent


def default_of(field: FieldInfo) -> str:
    """Return the default of a knob as a user would type it, or nothing where it is required."""
    if field.is_required() or field.default is None or isinstance(field.default, dict):
        return ""
    if isinstance(field.default, tuple):
        return ", ".join(map(str, field.default))
    return str(field.default).lower() if field.annotation is bool else str(field.default)


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the values of a knob that takes one of a few, or nothing."""
    if field.annotation is bool:
        return ("false", "true")
    return tuple(getattr(field.annotation, "__args__", ())) if getattr(field.annotation, "__origin__", None) is Literal else ()


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {"unit": "", "search": None, "absent": None}


_RULES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of sane size",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "dict_type": "must be names and their values",
    "tuple_type": "must be a list",
}


def _explain(cls: type[Knobs], error: ErrorDetails) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "missing":
        return f"{name}: missing; it is the {cls.model_fields[name].description}: give --{name} VALUE"
    if not name:
        return error["msg"].removeprefix("Value error, ")
    field, got = cls.model_fields[name], error["input"]
    if error["type"] == "literal_error":
        rule = f"choose {', '.join(choices_of(field))}{did_you_mean(str(got), choices_of(field))}"
    elif error["type"] in _RULES:
        rule = _RULES[error["type"]].format(**error.get("ctx", {}))
        rule += f" (default {default_of(field)})" if default_of(field) else ""
    else:
        rule = error["msg"].removeprefix("Value error, ")
    return f"{name}={quoted(got)}: {rule}"
