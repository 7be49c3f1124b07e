"""Decoded images kept between runs, in the user's cache folder: one file for a folder and the way it is read.

A copy is known by the content of the files that it was made from. To read them all again each time is slow (2 s for 60,000
small JPEG, minutes for many GB), so a note beside it says which stamps of theirs (Stamp: with the time of change, which cp -p,
rsync -t and tar cannot set back) were seen with that content: where the stamps are the same, the content is taken for the same.
"""

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from stn_pipeline.data.decoding import digest_file
from stn_pipeline.data.listing import Listing
from stn_pipeline.errors import DataError

VERSION = 2  # raise it when decoding changes
SETTLED_S = 2.0  # a file changed so shortly ago could change once more and keep its stamp: clocks tick coarsely

Arrays = dict[str, Any]


class Cache:
    """The kept copy of one folder, read in one way; without a folder that is the user's own, nothing is kept."""

    def __init__(self, listing: Listing, way: object) -> None:
        """Name the copy by the folder and by `way`, whatever decides besides the files how they are decoded."""
        self.listing, self.folder = listing, _own_folder()
        words = f"{os.path.abspath(listing.root)}\n{tuple(listing.parts)}\n{way}"
        self._name = f"folder-{hashlib.sha256(os.fsencode(words)).hexdigest()[:24]}"
        self._taken_s = time.time()

    def load(self, check_memory: Callable[[int], object]) -> Arrays | None:
        """Return the kept arrays, or None where there are none of just these files.

        Raises:
            DataError: from check_memory, where as many bytes are not to be had.
        """
        if self.folder is None or not (self.folder / f"{self._name}.npz").is_file():
            return None
        try:
            key = self._key_by_stamps() or self._key_by_content()
            with _own(self.folder / f"{self._name}.npz") as file, np.load(file, allow_pickle=False) as kept:
                if str(kept["key"]) != key:
                    return None
                check_memory(os.fstat(file.fileno()).st_size)
                return {name: kept[name] for name in kept.files if name != "key"}
        except DataError:
            raise
        except Exception:  # it is only a copy: whatever is wrong with it, the images are decoded again
            return None

    def save(self, contents: list[bytes], arrays: Arrays) -> None:
        """Keep arrays, made of files with these digests."""
        key = self._key(contents)
        if self._write(".npz", lambda file: np.savez(file, key=np.array(key), **arrays)):
            self._note(key)

    def _key(self, contents: Iterable[bytes]) -> str:
        """Return the name of what the copy is made from: each image's class, place in its split, and content."""
        files = [(part, file.path, file.label) for part, files in self.listing.parts.items() for file in files]
        return _digest((VERSION, self.listing.classes, files, list(contents)))

    def _key_by_content(self) -> str:
        key = self._key(digest_file(self.listing.root / file.path) for file in self.listing.files)
        self._note(key)
        return key

    def _key_by_stamps(self) -> str:
        """Return the key that was noted with these stamps, or nothing."""
        with suppress(OSError, ValueError), _own(self._place / f"{self._name}.seen") as file:
            stamps, key = file.read(200).decode("ascii").split()
            return key if stamps == self._stamps else ""
        return ""

    def _note(self, key: str) -> None:
        """Note which stamps were seen with this content, once the files have rested for a while."""
        youngest = max(file.stamp.ctime_ns for file in self.listing.files)
        if youngest < (self._taken_s - SETTLED_S) * 1e9:
            self._write(".seen", lambda file: file.write(f"{self._stamps} {key}".encode()))

    @property
    def _stamps(self) -> str:
        return _digest((VERSION, self.listing.classes, list(self.listing.parts.items())))

    @property
    def _place(self) -> Path:
        if self.folder is None:
            raise OSError("no cache folder")
        return self.folder

    def _write(self, suffix: str, write: Callable[[IO[bytes]], object]) -> bool:
        with suppress(OSError):  # no cache, only slower
            handle, scratch = tempfile.mkstemp(prefix=f"{self._name}-", suffix=".tmp", dir=self._place)
            try:
                with os.fdopen(handle, "wb") as file:
                    write(file)
                os.replace(scratch, self._place / f"{self._name}{suffix}")
                return True
            finally:
                Path(scratch).unlink(missing_ok=True)
        return False


def _digest(content: object) -> str:
    return hashlib.sha256(os.fsencode(repr(content))).hexdigest()


def _own_folder() -> Path | None:
    """Return the cache folder, made or narrowed so that only the user can write or read it; None where it is somebody else's."""
    from platformdirs import user_cache_path

    folder = user_cache_path("stn_pipeline")
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.geteuid():
            if stat.S_IMODE(folder.stat().st_mode) & 0o077:
                folder.chmod(0o700)
            return folder
    return None


def _own(path: Path) -> BinaryIO:
    """Open a file of the user's own that nobody else could have written, else raise OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        os.close(handle)
        raise OSError(f"{path}: not a file of the user's own")
    return os.fdopen(handle, "rb")
