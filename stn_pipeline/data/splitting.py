"""How a set is cut into train, val and test.

A published set never changes: its splits are stratified, by a seed. A folder does: there each image falls into its split by a
hash of its own pixels, so that no file that comes, goes or gets another name moves another image from one split to another.

Shapes: N images, C channels, H W image size, K classes.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stn_pipeline.data.splits import RawData, Split, Splits
from stn_pipeline.errors import DataError

Announce = Callable[[str], object]
TEST_FRACTION = 0.2  # of a source that has no test split of its own
TEST_SEED = 0  # constant, so that every run is scored on the same images
MIN_IMAGES = 2  # of a class, so that train and val can both have one
MIN_IMAGES_UNSPLIT = 5  # of a class where a test split is to be cut: 20 % of 5 is 1


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


def split(raw: RawData, val_fraction: float, seed: int, announce: Announce = lambda line: None) -> Splits:
    """Return the splits of `raw`; where images have ids, each split is in the order of labels and ids.

    Args:
        raw: what a source gave, on the CPU.
        val_fraction: share of the training images held out, 0..1.
        seed: of the val split; a test split cut here does not depend on it.
        announce: told where the split of a small class is not left to the hash alone.

    Raises:
        DataError: a class, or the whole set, has too few images.
    """
    check_counts(raw.name, raw.classes, raw.train.labels, has_test=raw.test is not None)
    train, test = cut_test(raw, announce)
    if train.ids is not None:
        keep, held = hold_out(raw, train, val_fraction, f"val {seed}", announce)
    else:
        try:
            keep, held = stratified(train.labels, val_fraction, seed)
        except ValueError as error:
            got = f"val_fraction={val_fraction} of {len(train)} images in {len(raw.classes)} classes"
            rule = "train and val must each hold an image a class"
            raise DataError(f"dataset={raw.name}: {got}: {rule}: raise val_fraction (at most 0.5) or add images") from error
    return Splits(train.take(keep), train.take(held), test, raw.classes, raw.name, reading_of(raw))


def cut_test(raw: RawData, announce: Announce) -> tuple[Split, Split]:
    """Return the images to learn from and the test split, which is the set's own or cut here.

    Raises:
        DataError: a class has too few images for a test split.
    """
    if raw.test is not None:
        return raw.train, raw.test.ordered()
    if raw.train.ids is not None:
        keep, held = hold_out(raw, raw.train, TEST_FRACTION, "test", announce, spare=2)
    else:
        keep, held = stratified(raw.train.labels, TEST_FRACTION, TEST_SEED)
    return raw.train.take(keep), raw.train.take(held)


def reading_of(raw: RawData) -> tuple[int, ...]:
    """Return (C, H, W) of a set's images, and the bits that they were read with."""
    return (*raw.train.images.shape[1:], raw.bits)


def hold_out(raw: RawData, part: Split, fraction: float, salt: str, announce: Announce, spare: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images to keep and of those held out, both in the split's order.

    Each image is held out where its own number in 0..1, a hash of its id, is below `fraction`: so the share is met within chance,
    and copies stay together. Only in a class where that would hold out none, or keep fewer than `spare` different images, those with
    the lowest numbers are taken, as few or as many as will do.

    Args:
        raw: the set, for its name and those of its classes.
        part: N images with ids, on the CPU.
        fraction: share held out, 0..1.
        salt: what the hash depends on besides the id; its first word says what is held out.
        announce: told of classes where the numbers alone do not do.
        spare: how many different images of each class must be kept.

    Raises:
        DataError: a class has too few different images.
    """
    if part.ids is None:
        raise ValueError("the images have no ids")
    ids, where = np.unique(part.ids.numpy(), return_inverse=True)  # (M,), (N,)
    labels, number, what = part.labels.numpy(), numbers(ids, salt), salt.partition(" ")[0]
    held, small = number < fraction, []
    for label in np.unique(labels):
        mine = np.unique(where[labels == label])
        if len(mine) <= spare:
            got = f"class {raw.classes[label]} has {len(mine)} different images"
            raise DataError(
                f"dataset={raw.name}: {got}, needs at least {spare + 1} to hold one out for {what}: add images or drop the class"
            )
        n_held = int(held[mine].sum())
        n_wanted = min(max(n_held, 1), len(mine) - spare)
        if n_wanted != n_held:
            small.append(raw.classes[label])
            nearest = mine[np.argsort(number[mine])]
            held[nearest[:n_wanted]], held[nearest[n_wanted:]] = True, False
    if small:
        names = ", ".join(small[:3]) + (", ..." if len(small) > 3 else "")
        announce(f"{raw.name}: by chance none or nearly all images of {names} fell to {what}: as few as will do were moved")
    out = held[where]
    for label in np.unique(labels):
        if len(np.unique(out[labels == label])) < 2:
            got = f"class {raw.classes[label]} has too few images that are not in another class too"
            raise DataError(f"dataset={raw.name}: {got}: remove the copies or add images")
    return part.in_order(np.flatnonzero(~out)), part.in_order(np.flatnonzero(out))


def numbers(ids: np.ndarray, salt: str) -> np.ndarray:
    """Return a number in 0..1 for each id int64 (N,), even and independent of all other ids: float64 (N,)."""
    content, key = ids.astype("<i8").tobytes(), salt.encode()
    drawn = (hashlib.blake2b(content[at : at + 8], digest_size=8, key=key).digest() for at in range(0, len(content), 8))
    return np.frombuffer(b"".join(drawn), dtype="<u8") / 2.0**64


def check_counts(name: str, classes: tuple[str, ...], labels: Tensor, *, has_test: bool) -> None:
    """Check that there are classes to tell apart, and that each has enough images to be split.

    Raises:
        DataError: there is one class only, or one has fewer than 2 images, or fewer than 5 where a test split is to be cut too.
    """
    if len(classes) < 2:
        raise DataError(f"dataset={name}: has {len(classes)} class ({', '.join(classes)}), needs at least 2: add a class")
    least, what_for = (MIN_IMAGES, "train and val") if has_test else (MIN_IMAGES_UNSPLIT, "train, val and a 20 % test split")
    for label, n in enumerate(torch.bincount(labels, minlength=len(classes)).tolist()):
        if n < least:
            got = f"class {classes[label]} has {n} images for training"
            raise DataError(f"dataset={name}: {got}, needs at least {least} for {what_for}: add images or drop the class")
