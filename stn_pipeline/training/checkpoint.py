"""A checkpoint: everything that a run needs to go on, or to be scored again, in one file of tensors and plain values.

The file is the zip archive that torch.save writes; its archive comment is the SHA-256 digest of every byte before it, so it
opens wherever such a file does. Nothing is unpickled before the digest has been found right.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stn_pipeline.config import TrainConfig
from stn_pipeline.model import Network, build
from stn_pipeline.training.fit import State, load_weights

MARK = b"sha256:"
DIGEST_BYTES = len(MARK) + 2 * hashlib.sha256().digest_size
END_RECORD = b"PK\x05\x06"  # begins the last 22 bytes of a zip archive without a comment; the last two are the comment's length


@dataclass(frozen=True)
class Checkpoint:
    """The knobs (dataset as it was really used), what the network was built for, the training state, the data's checksums.

    under: the conditions of all its epochs (training.fingerprint); a checkpoint of an earlier version knows none.
    members and reading: which images of a folder each split held, and how they were read, as Splits has them.
    """

    config: TrainConfig
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    state: State
    digests: dict[str, str] = field(default_factory=dict)
    under: dict[str, str] = field(default_factory=dict)
    members: dict[str, Tensor] = field(default_factory=dict)
    reading: tuple[int, ...] = ()

    def build_best(self) -> Network:
        """Return the network at its best epoch's weights, on the CPU, in evaluation mode.

        Raises: RunError where the weights are not those of such a network.
        """
        network = build(self.config, self.image_shape, len(self.classes))
        load_weights(network, self.state.best)
        return network.eval()


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint."""
    content: dict[str, Any] = {
        "config": checkpoint.config.model_dump(),
        "image_shape": checkpoint.image_shape,
        "classes": checkpoint.classes,
        "state": vars(checkpoint.state),
        "digests": checkpoint.digests,
        "under": checkpoint.under,
        "members": checkpoint.members,
        "reading": checkpoint.reading,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()
    archive[-2:] = DIGEST_BYTES.to_bytes(2, "little")
    with path.open("wb") as file:
        file.write(archive)
        file.write(_digest(archive))


def load_newest(paths: list[Path]) -> Checkpoint | None:
    """Return the checkpoint that got furthest, or None where none can be read.

    A kill in mid-write leaves a torn file: that one is passed over, which is why runs keep two in turn.
    """
    found = [checkpoint for checkpoint in map(_load, paths) if checkpoint is not None]
    return max(found, key=lambda checkpoint: checkpoint.state.epoch, default=None)


def _load(path: Path) -> Checkpoint | None:
    try:
        data = path.read_bytes()
        if not _is_whole(data):
            return None
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return Checkpoint(
            config=TrainConfig.parse(content["config"]),
            image_shape=tuple(content["image_shape"]),
            classes=tuple(content["classes"]),
            state=State(**content["state"]),
            digests=content["digests"],
            under=content.get("under", {}),
            members=content.get("members", {}),  # earlier versions kept none
            reading=tuple(content.get("reading", ())),
        )
    except Exception:  # what is no checkpoint can raise anything: errors of zlib, struct, codecs, pickle, memory
        return None


def _is_whole(data: bytes) -> bool:
    """Say whether each byte of a file is as it was written.

    Files of earlier versions have no digest: for them stand the checksums of the archive's members, which cover less.
    """
    if data[-22:-18] == END_RECORD and data[-2:] == b"\0\0":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is None
    return len(data) > DIGEST_BYTES and data[-DIGEST_BYTES:] == _digest(memoryview(data)[:-DIGEST_BYTES])


def _digest(content: memoryview) -> bytes:
    return MARK + hashlib.sha256(content).hexdigest().encode()
