"""A checkpoint: everything that a run needs to go on, or to be scored again, in one file of tensors and plain values."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ConfigError
from stn_pipeline.model import Network, build
from stn_pipeline.training.fit import State


@dataclass(frozen=True)
class Checkpoint:
    """The knobs (dataset as it was really used), what the network was built for, the training state, the data's checksums.

    members and reading: which images of a folder each split held, and how they were read, as Splits has them.
    """

    config: TrainConfig
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    state: State
    digests: dict[str, str] = field(default_factory=dict)
    members: dict[str, Tensor] = field(default_factory=dict)
    reading: tuple[int, ...] = ()

    def build_best(self) -> Network:
        """Return the network at its best epoch's weights, on the CPU, in evaluation mode."""
        network = build(self.config, self.image_shape, len(self.classes))
        network.load_state_dict(self.state.best)
        return network.eval()


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint."""
    content: dict[str, Any] = {
        "config": checkpoint.config.model_dump(),
        "image_shape": checkpoint.image_shape,
        "classes": checkpoint.classes,
        "state": vars(checkpoint.state),
        "digests": checkpoint.digests,
        "members": checkpoint.members,
        "reading": checkpoint.reading,
    }
    torch.save(content, path)


def load_newest(paths: list[Path]) -> Checkpoint | None:
    """Return the checkpoint that got furthest, or None where none can be read.

    A kill in mid-write leaves a torn file: that one is passed over, which is why runs keep two in turn.
    """
    found = [checkpoint for checkpoint in map(_load, paths) if checkpoint is not None]
    return max(found, key=lambda checkpoint: checkpoint.state.epoch, default=None)


def _load(path: Path) -> Checkpoint | None:
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load does not look at the checksums
                return None
        content = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(
            config=TrainConfig.parse(content["config"]),
            image_shape=tuple(content["image_shape"]),
            classes=tuple(content["classes"]),
            state=State(**content["state"]),
            digests=content["digests"],
            members=content.get("members", {}),  # earlier versions kept none
            reading=tuple(content.get("reading", ())),
        )
    except (RuntimeError, EOFError, OSError, UnpicklingError, zipfile.BadZipFile, KeyError, TypeError, ConfigError):
        return None
