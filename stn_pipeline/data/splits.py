"""What a source gives, and its stratified train, val and test splits.

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

TEST_FRACTION = 0.2  # of a source that has no test split of its own
TEST_SEED = 0  # constant, so that every run is scored on the same images
MIN_IMAGES = 2  # of a class, so that train and val can both have one
MIN_IMAGES_UNSPLIT = 5  # of a class where a test split is to be cut: 20 % of 5 is 1


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), contiguous, 0..255, and their labels int64 (N,), 0..K-1.

    draws: how often each source image is in it, distorted in another way each time: image i shows source i mod N / draws.
    """

    images: Tensor
    labels: Tensor
    draws: int = field(default=1, kw_only=True)

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def to(self, device: torch.device) -> "Split":
        """Return the split on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def draw(self, epoch: int) -> "Split":
        """Return what an epoch trains on: the same each time, but for a split that is distorted."""
        return self

    def spread(self, n: int) -> Tensor:
        """Return at most n indices, evenly spread: a few images of every class, where a folder lists class by class."""
        n = min(n, len(self))
        return torch.arange(n, device=self.images.device) * len(self) // n

    def take(self, index: np.ndarray) -> "Split":
        """Return the images at `index` int64 (n,), copied."""
        at = torch.from_numpy(index).to(self.images.device)
        return Split(self.images[at].contiguous(), self.labels[at])


@dataclass(frozen=True)
class Distorted(Split):
    """A split whose images are drawn anew each epoch; `images` are the draw of epoch 0, which no training sees."""

    source: Tensor
    kind: str
    seed: int

    @classmethod
    def of(cls, split: Split, kind: str, seed: int) -> "Distorted":
        """Distort a split; epoch e of a seed is always the same draw."""
        return cls(distort(split.images, kind, f"train {seed} 0"), split.labels, split.images, kind, seed)

    def draw(self, epoch: int) -> Split:
        """Return the draw of an epoch."""
        return Split(distort(self.source, self.kind, f"train {self.seed} {epoch}"), self.labels)

    def to(self, device: torch.device) -> "Distorted":
        """Return the split on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), source=self.source.to(device))


def distorted(splits: "Splits", kind: str, draws: int, seed: int) -> "Splits":
    """Return splits distorted: train anew each epoch; val and test once for all, each image `draws` times, whatever the seed."""

    def fixed(split: Split, name: str) -> Split:
        return Split(distort(split.images.repeat(draws, 1, 1, 1), kind, name), split.labels.repeat(draws), draws=draws)

    train = Distorted.of(splits.train, kind, seed)
    return replace(splits, train=train, val=fixed(splits.val, "val"), test=fixed(splits.test, "test"))


@dataclass(frozen=True)
class RawData:
    """What a source gives: `test` is None where the set has none of its own.

    Raises:
        DataError: a dtype, shape, count or label does not fit.
    """

    name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check what was given."""
        what, n_classes, shape = f"dataset={self.name}", len(self.classes), tuple(self.train.images.shape[1:])
        if n_classes < 2:
            raise DataError(f"{what}: has {n_classes} class ({', '.join(self.classes)}), needs at least 2: add a class")
        for part, s in (("train", self.train), ("test", self.test)):
            if s is None:
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

    @property
    def n_bytes(self) -> int:
        """Bytes of all the images."""
        return self.train.images.numel() + (0 if self.test is None else self.test.images.numel())


@dataclass(frozen=True)
class Splits:
    """The three splits of `dataset`, which is the name of what was really used. val is never test data."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    dataset: str

    def to(self, device: torch.device) -> "Splits":
        """Return the splits on `device`."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, c, h, w = self.train.images.shape
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


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to keep and those held out, both ascending.

    Args:
        labels: int64 (N,), on the CPU.
        fraction: share held out, 0..1; a class loses that share of its images, to within one.
        seed: the only thing that the choice depends on besides the labels.

    Raises:
        ValueError: a class has fewer than 2 images, or a side would hold fewer images than there are classes.
    """
    from sklearn.model_selection import train_test_split

    keep, held = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels.numpy(), random_state=seed)
    return np.sort(keep), np.sort(held)


def split(raw: RawData, val_fraction: float, seed: int) -> Splits:
    """Return the splits of `raw`.

    Args:
        raw: what a source gave, on the CPU.
        val_fraction: share of the training images held out, 0..1.
        seed: of the val split; a test split cut here does not depend on it.

    Raises:
        DataError: a class, or the whole set, has too few images.
    """
    train, test = raw.train, raw.test
    check_counts(raw.name, raw.classes, train.labels, has_test=test is not None)
    if test is None:
        keep, held = stratified(train.labels, TEST_FRACTION, TEST_SEED)
        train, test = train.take(keep), train.take(held)
    try:
        keep, held = stratified(train.labels, val_fraction, seed)
    except ValueError as error:
        got = f"val_fraction={val_fraction} of {len(train)} images in {len(raw.classes)} classes"
        rule = "train and val must each hold an image a class"
        raise DataError(f"dataset={raw.name}: {got}: {rule}: raise val_fraction (at most 0.5) or add images") from error
    return Splits(train.take(keep), train.take(held), test, raw.classes, raw.name)


def check_counts(name: str, classes: tuple[str, ...], labels: Tensor, *, has_test: bool) -> None:
    """Check that every class has enough images to be split.

    Raises:
        DataError: a class has fewer than 2, or fewer than 5 where a test split is to be cut too.
    """
    least, what_for = (MIN_IMAGES, "train and val") if has_test else (MIN_IMAGES_UNSPLIT, "train, val and a 20 % test split")
    for label, n in enumerate(torch.bincount(labels, minlength=len(classes)).tolist()):
        if n < least:
            got = f"class {classes[label]} has {n} images for training"
            raise DataError(f"dataset={name}: {got}, needs at least {least} for {what_for}: add images or drop the class")
