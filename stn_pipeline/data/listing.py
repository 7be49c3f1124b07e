"""What lies in a folder of images: its splits, classes and files by name. No file is opened here.

PATH/train/CLASS/* with or without PATH/test/CLASS/*, or PATH/CLASS/*. A class is a folder's name, never its place in a list.
"""

import os
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stn_pipeline.data.decoding import extensions
from stn_pipeline.errors import DataError, did_you_mean
from stn_pipeline.texts import printable

PARTS = ("train", "test")
LAYOUT = "train/CLASS/* with or without test/CLASS/*, or CLASS/*"


class Stamp(NamedTuple):
    """What changes with a file's content. The time of change, unlike that of modification, cannot be set by cp -p, rsync or tar."""

    n_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class File(NamedTuple):
    """An image's path below the folder, its class as an index into Listing.classes, and its stamp."""

    path: str
    label: int
    stamp: Stamp


@dataclass
class Listing:
    """The files of each split by its name, by class and then by name; and the strays."""

    name: str
    root: Path
    classes: tuple[str, ...] = ()
    parts: dict[str, list[File]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[File]:
        """The files of all the splits."""
        return [file for part in self.parts.values() for file in part]


def list_folder(name: str, root: Path, to_score: str = "") -> Listing:
    """Return what lies in a folder.

    Args:
        name: what messages call it.
        root: the folder.
        to_score: the split that alone is wanted, to be scored; empty where a network is to be trained, which needs train/.

    Raises:
        DataError: no such folder, no classes, classes that do not agree or have no usable name, no images.
    """
    if not root.is_dir():
        if root.exists():
            raise DataError(f"{name}: is a file, expected a folder: unpack it and give the folder that holds {LAYOUT}")
        near = did_you_mean(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise DataError(f"{name}: no such folder: give one that holds {LAYOUT}{near}")
    listing = Listing(name, root)
    try:
        _fill(listing, to_score)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({printable(error)}): allow it or give another folder") from error
    return listing


def _fill(listing: Listing, to_score: str) -> None:
    name, root = listing.name, listing.root
    places = {part: root / part for part in PARTS if (root / part).is_dir()}
    if "train" not in places:
        if "test" in places and to_score != "test":
            raise DataError(f"{name}: has test/ and no train/, expected {LAYOUT}: add train/ or rename test/")
        places = places or {"train": root}
    if root not in places.values():
        listing.ignored += [entry.name for entry in _entries(root) if entry.name not in PARTS]
    if to_score == "test" and "test" in places:
        places = {"test": places["test"]}
    classes = {part: [entry.name for entry in _entries(place) if _is_dir(entry)] for part, place in places.items()}
    first = next(iter(places))
    if extra := sorted(set().union(*classes.values()) - set(classes[first])):
        near = did_you_mean(extra[0], classes[first])
        raise DataError(f"{name}: test/ has classes that train/ lacks: {', '.join(extra)}: add them to train/ or drop them{near}")
    if not classes[first]:
        raise DataError(f"{name}: no class folders in {places[first]}: give a folder that holds {LAYOUT}")
    _check_names(name, classes[first])
    listing.classes = tuple(classes[first])
    for part, place in places.items():
        listing.parts[part] = _files(listing, place)
        if not listing.parts[part] and part == first:
            raise DataError(f"{name}: no images in the class folders of {place}: give a folder that holds {LAYOUT}")
        if not listing.parts[part]:
            raise DataError(f"{name}: test/ holds no images: fill it, or remove it to have 20 % of train/ held out")


def _check_names(name: str, classes: Iterable[str]) -> None:
    """Check that each class can be written in JSON, on a page and in a figure: later is after all the training."""
    for one in classes:
        if any(unicodedata.category(mark) in ("Cc", "Cs") for mark in one):
            raise DataError(
                f"{name}: class {ascii(one)}: its name holds control characters, or bytes that are not UTF-8, "
                "which no figure or page can show: rename the folder"
            )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link that leads to itself
        return entry.is_dir()
    return False


def _files(listing: Listing, part: Path) -> list[File]:
    """Return the images of a split; strays are added to `listing.ignored`. Pipes, devices and sockets are strays, and never opened."""
    known, files = extensions(), []
    label = {name: at for at, name in enumerate(listing.classes)}
    for folder in _entries(part):
        if not _is_dir(folder):
            listing.ignored.append(os.path.relpath(folder.path, listing.root))
            continue
        for entry in _entries(Path(folder.path)):
            path = os.path.relpath(entry.path, listing.root)
            stamp = _stamp(entry) if os.path.splitext(entry.name)[1].lower() in known else None
            if stamp is None:
                listing.ignored.append(path)
            else:
                files.append(File(path, label[folder.name], stamp))
    return files


def _stamp(entry: os.DirEntry[str]) -> Stamp | None:
    """Return a file's stamp, or None where it is no regular file."""
    with suppress(OSError):
        if entry.is_file():
            stat = entry.stat()
            return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return None
