"""What names a training: two of one fingerprint are the same knobs, seed, images, code and kind of device."""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Splits

ROOMS = ("transforms", "data", "model", "training")  # whose code decides what is learned


@cache
def code_version() -> str:
    """Return a digest of the code that decides what is learned; it stays where only tracking, pictures or texts change."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (package / room).rglob("*.*") if path.suffix in (".py", ".cpp")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def fingerprint(config: TrainConfig, splits: Splits, device: torch.device) -> str:
    """Return the name of a training on these splits and this kind of device.

    The data set counts by its pixels and labels, not by its name or place.
    """
    knobs = {name: value for name, value in config.learning_knobs().items() if name != "dataset"}
    where = {"torch": torch.__version__.partition("+")[0], "device": device.type}
    content = {"knobs": knobs, "data": splits.digests(), "code": code_version()} | where
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
