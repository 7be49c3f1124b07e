"""What names a training: two of one fingerprint are the same knobs, seed, images, code, engine and kind of device."""

import hashlib
import json
from pathlib import Path

import torch

import stn_pipeline
from stn_pipeline.config import TrainConfig, absent_of
from stn_pipeline.data import Splits, load
from stn_pipeline.model import build
from stn_pipeline.training.checkpoint import Checkpoint
from stn_pipeline.training.code_digest import Definition, digest
from stn_pipeline.training.engine import Engine
from stn_pipeline.training.fit import fit
from stn_pipeline.training.scores import report, score

NAMELESS = "none"  # fingerprint of a training that is not of one kind: no other has it
THEN = ", then "

# What is learned, and what is said of it, is decided by these and by all that they use. The files are read when they are
# loaded: a process that lives long trains by the code that it has, not by the one that is on the disk then.
ROOTS = (load, build, fit, Checkpoint, score, report)
_CODE = digest(Path(stn_pipeline.__file__).parent, [Definition(root.__module__, root.__qualname__) for root in ROOTS])


def code_version() -> str:
    """Return a digest of the code that decides what is learned; it stays where only tracking, pictures or texts change."""
    return _CODE


def conditions(engine: Engine, device: torch.device) -> dict[str, str]:
    """Return what a training runs under, apart from its knobs and images."""
    return {"code": code_version(), "torch": torch.__version__.partition("+")[0], "engine": engine, "device": device.type}


def gone_on(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Return the conditions of a training that goes on: where one has changed, all that it has been, as in `kernels, then plain`.

    before: as its checkpoint has them; what that does not say is unknown, and so has changed.
    """
    told = {name: before.get(name, "unknown") for name in now}
    return {name: was if was.split(THEN)[-1] == now[name] else f"{was}{THEN}{now[name]}" for name, was in told.items()}


def changes(under: dict[str, str]) -> str:
    """Return the conditions that have changed during a training, as in `code 1f2e, then 3d4c`, or nothing."""
    return "; ".join(f"{name} {value}" for name, value in under.items() if THEN in value)


def fingerprint(config: TrainConfig, splits: Splits, under: dict[str, str]) -> str:
    """Return the name of a training on these splits under these conditions, or NAMELESS where they changed on its way.

    The data set counts by its pixels and labels, not by its name or place; a knob that is not given, or not known yet,
    as its default.
    """
    if changes(under):
        return NAMELESS
    fields = type(config).model_fields
    knobs = {name: value for name, value in config.learning_knobs().items() if name != "dataset" and value != absent_of(fields[name])}
    content = {"knobs": knobs, "data": splits.digests()} | under
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
