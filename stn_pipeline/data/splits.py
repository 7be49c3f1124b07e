"""What a source gives, and the three splits that a network is trained and scored on.

Shapes: N images, C channels, H W image size, K classes.
"""

import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stn_pipeline.config import short_name
from stn_pipeline.data.distortions import distort
from stn_pipeline.errors import DataError


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), contiguous, 0..255, and their labels int64 (N,), 0..K-1.

    ids: int64 (N,), what each image is, wherever it stands: a hash of its pixels. None where the set never changes.
    draws: how often each source image is in it, distorted in another way each time: image i shows source i mod N / draws.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor | None = None
    draws: int = field(default=1, kw_only=True)

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def to(self, device: torch.device) -> "Split":
        """Return the split on `device`; the ids stay on the CPU."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def draw(self, epoch: int) -> "Split":
        """Return what an epoch trains on: the same each time, but for a split that is distorted."""
        return self

    def spread(self, n: int) -> Tensor:
        """Return at most n indices, evenly spread: a few images of every class, where a folder lists class by class."""
        n = min(n, len(self))
        return torch.arange(n, device=self.images.device) * len(self) // n

    def take(self, index: np.ndarray) -> "Split":
        """Return the images at `index` int64 (n,), copied; of several draws of an image all or none, in their order."""
        at = torch.from_numpy(index)
        ids, at = None if self.ids is None else self.ids[at], at.to(self.images.device)
        return Split(self.images[at].contiguous(), self.labels[at], ids, draws=self.draws)

    def in_order(self, index: np.ndarray) -> np.ndarray:
        """Return some indices in the order in which the images stand in a split: by label and id, or as they are without ids."""
        if self.ids is None:
            return index
        return index[np.lexsort((self.ids.numpy()[index], self.labels.cpu().numpy()[index]))]

    def ordered(self) -> "Split":
        """Return the split in that order, in each of its draws."""
        if self.ids is None:
            return self
        n = len(self) // self.draws
        first = self.in_order(np.arange(n))
        return self.take(np.concatenate([first + n * draw for draw in range(self.draws)]))


@dataclass(frozen=True, kw_only=True)
class Distorted(Split):
    """A split whose images are drawn anew each epoch; `images` are the draw of epoch 0, which no training sees."""

    source: Tensor
    kind: str
    seed: int

    @classmethod
    def of(cls, split: Split, kind: str, seed: int) -> "Distorted":
        """Distort a split; epoch e of a seed is always the same draw."""
        first = distort(split.images, kind, f"train {seed} 0")
        return cls(first, split.labels, split.ids, source=split.images, kind=kind, seed=seed)

    def draw(self, epoch: int) -> Split:
        """Return the draw of an epoch."""
        return Split(distort(self.source, self.kind, f"train {self.seed} {epoch}"), self.labels)

    def to(self, device: torch.device) -> "Distorted":
        """Return the split on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), source=self.source.to(device))


def distorted(splits: "Splits", kind: str, draws: int, seed: int) -> "Splits":
    """Return splits distorted: train anew each epoch; val and test once for all, each image `draws` times, whatever the seed."""

    def fixed(split: Split, name: str) -> Split:
        if not len(split):
            return split
        ids = None if split.ids is None else split.ids.repeat(draws)
        return Split(distort(split.images.repeat(draws, 1, 1, 1), kind, name), split.labels.repeat(draws), ids, draws=draws)

    train = Distorted.of(splits.train, kind, seed) if len(splits.train) else splits.train
    return replace(splits, train=train, val=fixed(splits.val, "val"), test=fixed(splits.test, "test"))


@dataclass(frozen=True)
class RawData:
    """What a source gives: `test` is None where the set has none of its own; `train` may be empty beside a test split to be scored.

    bits: the depth that greyscale images of more than 8 bits were read with; 0 where there are none.

    Raises:
        DataError: a dtype, shape, count or label does not fit.
    """

    name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    bits: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        what, n_classes, shape = f"dataset={self.name}", len(self.classes), tuple(self.train.images.shape[1:])
        for part, s in (("train", self.train), ("test", self.test)):
            if s is None or (part == "train" and not len(s.labels) and self.test is not None):
                continue
            if s.images.dtype != torch.uint8 or s.images.ndim != 4 or s.labels.dtype != torch.int64 or s.labels.ndim != 1:
                got = f"{s.images.dtype} {tuple(s.images.shape)} and {s.labels.dtype} {tuple(s.labels.shape)}"
                raise DataError(
                    f"{what}: {part} images and labels are {got}, expected uint8 (N, C, H, W) and int64 (N,): fetch the files anew"
                )
            if len(s.images) != len(s.labels) or not len(s.images) or tuple(s.images.shape[1:]) != shape:
                got = f"{tuple(s.images.shape)} images and {len(s.labels)} labels"
                raise DataError(f"{what}: {part} has {got}, expected as many of each, of shape {shape}: fetch the files anew")
            low, high = int(s.labels.min()), int(s.labels.max())
            if low < 0 or high >= n_classes:
                raise DataError(f"{what}: {part} labels are {low}..{high}, expected 0..{n_classes - 1}: fetch the files anew")


@dataclass(frozen=True)
class Splits:
    """The three splits of `dataset`, which is the name of what was really used. val is never test data.

    reading: (C, H, W) of the images before any distortion, and the bits that they were read with, as RawData has them.
    """

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    dataset: str
    reading: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Splits":
        """Return the splits on `device`."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def put(self, name: str, split: Split, classes: tuple[str, ...]) -> "Splits":
        """Return the splits with another one, and its classes, in the place of one of the three."""
        parts = {"train": self.train, "val": self.val, "test": self.test} | {name: split}
        return Splits(parts["train"], parts["val"], parts["test"], classes, self.dataset, self.reading)

    @property
    def name(self) -> str:
        """The set's name, short: a folder's is that of the folder itself."""
        return short_name(self.dataset)

    def digests(self) -> dict[str, str]:
        """Return a checksum of each split's pixels and labels."""
        return self._digests

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {
            name: f"{zlib.crc32(split.labels.cpu().numpy().data, zlib.crc32(split.images.cpu().numpy().data)):08x}"
            for name, split in (("train", self.train), ("val", self.val), ("test", self.test))
        }

    @cached_property
    def members(self) -> dict[str, Tensor]:
        """What images each split holds: their ids, int64, ascending, each once; nothing of a set that never changes."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: torch.from_numpy(np.unique(split.ids.numpy())) for name, split in parts.items() if split.ids is not None}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W); of the test split, since the others may be empty where a split is only scored."""
        _, c, h, w = self.test.images.shape
        return c, h, w

    @property
    def n_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def mean(self) -> Tensor:
        """float32 (C,), 0..1: mean pixel of the train split, a channel at a time."""
        return self._statistics[0]

    @property
    def std(self) -> Tensor:
        """float32 (C,), 0..1: standard deviation of the train split's pixels; 1 where a channel is constant."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        # Counts of the 256 values: exact, and no float copy of the set.
        images = self.train.images
        counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])])  # (C, 256)
        share = counts.double().cpu() / counts[0].sum().cpu()
        value = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ value  # (C,)
        std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()  # (C,)
        std[(counts > 0).sum(1).cpu() == 1] = 1.0
        return mean.float().to(images.device), std.float().to(images.device)
