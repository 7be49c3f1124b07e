"""The user's own images: PATH/train/CLASS/* and PATH/test/CLASS/*, PATH/train alone, or PATH/CLASS/*.

Decoded once into uint8 (N, C, H, W), then read from a cache for as long as no file changes.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from stn_pipeline.config import FOLDER
from stn_pipeline.data.sources import CPU, Announce, check_memory, free_bytes
from stn_pipeline.data.splits import RawData, Split, check_counts
from stn_pipeline.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # (width, height), as PIL has it
LAYOUT = "train/CLASS/* with or without test/CLASS/*, or CLASS/*"
SMALLER = "give image_size=N or use fewer images"
CACHE_VERSION = 1  # raise it when decoding changes
CHUNK = 64  # images a thread takes at a time
# PIL decodes without the GIL, but on smaller images most of the time is Python's and threads only contend: on 2 cores,
# 32x32 JPEG take 101 us on one thread and 149 us on two, 128x128 151 and 141, 256x256 309 and 228.
THREADED_PIXELS = 128 * 128
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}


class _File(NamedTuple):
    path: str  # relative to the folder
    label: int
    n_bytes: int
    mtime_ns: int


@dataclass
class _Listing:
    name: str
    root: Path
    classes: tuple[str, ...] = ()
    train: list[_File] = field(default_factory=list)
    test: list[_File] | None = None
    ignored: list[str] = field(default_factory=list)


class _Arrays(NamedTuple):
    """uint8 (N, C, H, W) of each split, (0, C, H, W) for a test split that is absent, and what to tell about sizes."""

    train: np.ndarray
    test: np.ndarray
    note: str


def read(path: str, image_size: int, announce: Announce) -> RawData:
    """Return the images of a folder.

    All greyscale gives C = 1, anything else RGB; transparency is flattened over black; EXIF orientation is respected;
    16 bit greyscale is scaled to 8. Of several frames the first is read.

    Args:
        path: the folder; `~` is expanded.
        image_size: side in px that every image is scaled and centre-cropped to; 0 is their own, or the commonest where they differ.
        announce: told what was ignored, resized and decoded.

    Raises:
        DataError: no such folder, no classes, classes that do not agree, images that cannot be decoded, or too many of them.
    """
    listing = _list(FOLDER + path, Path(path).expanduser())
    check_counts(listing.name, listing.classes, _labels(listing.train), has_test=listing.test is not None)
    if listing.ignored:
        first, more = ", ".join(listing.ignored[:3]), ", ..." if len(listing.ignored) > 3 else ""
        announce(f"{listing.name}: ignored {len(listing.ignored)} that are no images or not in a class: {first}{more}")
    arrays = _cached(listing, image_size, announce)
    if arrays.note:
        announce(f"{listing.name}: {arrays.note}")
    test = None if listing.test is None else _split(arrays.test, listing.test)
    return RawData(listing.name, _split(arrays.train, listing.train), test, listing.classes)


def _split(images: np.ndarray, files: list[_File]) -> Split:
    return Split(torch.from_numpy(images), _labels(files))


def _labels(files: list[_File]) -> torch.Tensor:
    return torch.tensor([file.label for file in files], dtype=torch.int64)


# Listing


def _list(name: str, root: Path) -> _Listing:
    if not root.is_dir():
        if root.exists():
            raise DataError(f"{name}: is a file, expected a folder: unpack it and give the folder that holds {LAYOUT}")
        near = did_you_mean(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise DataError(f"{name}: no such folder: give one that holds {LAYOUT}{near}")
    listing = _Listing(name, root)
    try:
        _list_splits(listing)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error}): allow it or give another folder") from error
    return listing


def _list_splits(listing: _Listing) -> None:
    root = listing.root
    train, test = root / "train", root / "test"
    if not train.is_dir():
        if test.is_dir():
            raise DataError(f"{listing.name}: has test/ and no train/, expected {LAYOUT}: add train/ or rename test/")
        train = root
    else:
        listing.ignored += [entry.name for entry in _entries(root) if entry.name not in ("train", "test")]
    listing.classes = tuple(entry.name for entry in _entries(train) if entry.is_dir())
    if not listing.classes:
        raise DataError(f"{listing.name}: no class folders in {train}: give a folder that holds {LAYOUT}")
    listing.train = _files(listing, train)
    if not listing.train:
        raise DataError(f"{listing.name}: no images in the class folders of {train}: give a folder that holds {LAYOUT}")
    if train == root or not test.is_dir():
        return
    extra = sorted({entry.name for entry in _entries(test) if entry.is_dir()} - set(listing.classes))
    if extra:
        near = did_you_mean(extra[0], listing.classes)
        raise DataError(f"{listing.name}: test/ has classes that train/ lacks: {', '.join(extra)}: add them to train/ or drop them{near}")
    listing.test = _files(listing, test)
    if not listing.test:
        raise DataError(f"{listing.name}: test/ holds no images: fill it, or remove it to have 20 % of train/ held out")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _files(listing: _Listing, part: Path) -> list[_File]:
    """Return the images of a split, by class then name; strays are added to `listing.ignored`."""
    extensions, files = _image_extensions(), []
    for folder in _entries(part):
        if not folder.is_dir():
            listing.ignored.append(os.path.relpath(folder.path, listing.root))
            continue
        for entry in _entries(Path(folder.path)):
            path = os.path.relpath(entry.path, listing.root)
            if entry.is_file() and os.path.splitext(entry.name)[1].lower() in extensions:
                stat = entry.stat()
                files.append(_File(path, listing.classes.index(folder.name), stat.st_size, stat.st_mtime_ns))
            else:
                listing.ignored.append(path)
    return files


def _image_extensions() -> set[str]:
    from PIL import Image

    known = Image.registered_extensions()
    return {ext for ext, kind in known.items() if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")}


# Cache: one file for a folder and image_size, holding the key of the files that it was made from


def _cached(listing: _Listing, image_size: int, announce: Announce) -> _Arrays:
    from platformdirs import user_cache_path

    files = [listing.train, listing.test or []]
    name = hashlib.sha256(os.fsencode(f"{os.path.abspath(listing.root)}\n{image_size}")).hexdigest()[:24]
    key = hashlib.sha256(os.fsencode(repr((CACHE_VERSION, files)))).hexdigest()
    path = user_cache_path("stn_pipeline") / f"folder-{name}.npz"
    found = _load(path, key, listing.name)
    if found is None:
        announce(f"{listing.name}: decoding {sum(map(len, files))} images, kept in {path.parent} for the next time")
        found = _decode(listing, image_size)
        _save(path, key, found)
    return found


def _load(path: Path, key: str, name: str) -> _Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as cache:
            if str(cache["key"]) != key:
                return None
            check_memory(name, path.stat().st_size, free_bytes(CPU), SMALLER)
            return _Arrays(cache["train"], cache["test"], str(cache["note"]))
    except DataError:
        raise
    except Exception:  # it is only a copy: whatever is wrong with it, the images are decoded again
        return None


def _save(path: Path, key: str, arrays: _Arrays) -> None:
    with suppress(OSError):  # no cache, only slower
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, key=np.array(key), **arrays._asdict())
            os.replace(scratch, path)
        finally:
            Path(scratch).unlink(missing_ok=True)


# Decoding


def _decode(listing: _Listing, image_size: int) -> _Arrays:
    parts = [listing.train, listing.test or []]
    paths = [listing.root / file.path for part in parts for file in part]
    broken: dict[Path, Exception] = {}

    def look(i: int) -> None:
        headers[i] = _header(paths[i])

    headers: dict[int, tuple[Size, bool]] = {}
    _in_threads(look, paths, broken, 1)
    if not headers:
        raise _broken(listing, broken)
    sizes = Counter(size for size, _ in headers.values())
    grey = all(is_grey for _, is_grey in headers.values())
    commonest = max(sizes, key=lambda size: (sizes[size], size))
    size = (image_size, image_size) if image_size else commonest
    shape = (1 if grey else 3, size[1], size[0])
    check_memory(listing.name, len(paths) * shape[0] * shape[1] * shape[2], free_bytes(CPU), SMALLER)
    arrays = [np.empty((len(part), *shape), dtype=np.uint8) for part in parts]

    def fill(i: int) -> None:
        part, at = (0, i) if i < len(parts[0]) else (1, i - len(parts[0]))
        arrays[part][at] = _pixels(paths[i], grey, size)

    n_pixels = sum(width * height * n for (width, height), n in sizes.items())
    _in_threads(fill, paths, broken, (os.cpu_count() or 1) if n_pixels >= THREADED_PIXELS * len(headers) else 1)
    if broken:
        raise _broken(listing, broken)
    n_resized = len(paths) - sizes[size]
    own = f"{len(sizes)} sizes" if len(sizes) > 1 else "size {}x{}".format(*commonest)
    note = f"{n_resized} of {len(paths)} images ({own}) scaled and centre-cropped to {size[0]}x{size[1]}" if n_resized else ""
    return _Arrays(arrays[0], arrays[1], note)


def _in_threads(work: Callable[[int], None], paths: list[Path], broken: dict[Path, Exception], n_threads: int) -> None:
    """Do `work(i)` for each path that is not `broken`, and add those where it fails."""

    def chunk(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(paths))):
            if paths[i] not in broken:
                try:
                    work(i)
                except Exception as error:  # a damaged image makes PIL raise nearly anything
                    broken[paths[i]] = error

    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(chunk, range(0, len(paths), CHUNK)):
            pass


def _broken(listing: _Listing, broken: dict[Path, Exception]) -> DataError:
    path = min(broken)
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    error = DataError(
        f"{listing.name}: cannot decode {path.relative_to(listing.root)}{more} ({_reason(broken[path])}): replace or remove it"
    )
    error.__cause__ = broken[path]
    return error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__


def _header(path: Path) -> tuple[Size, bool]:
    """Return the size once upright, and whether it is greyscale; no pixel is decoded."""
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if 5 <= _orientation(image) <= 8 else (width, height), image.mode in GREY_MODES


def _orientation(image: "Image.Image") -> int:
    from PIL import ExifTags

    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}:
        return 1  # getexif would decode the whole image to look behind the pixels
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _pixels(path: Path, grey: bool, size: Size) -> np.ndarray:
    """Return the decoded image, uint8 (C, H, W)."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened) if 2 <= _orientation(opened) <= 8 else opened
        image = _flat(image).convert("L" if grey else "RGB")
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)  # (H, W) -> (1, H, W), or (H, W, C) -> (C, H, W)


def _flat(image: "Image.Image") -> "Image.Image":
    """Return the image with 8 bits a channel and no transparency: over black."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels are {values.min()}..{values.max()}, expected 0..65535")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image
