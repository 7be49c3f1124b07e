"""The user's own images: PATH/train/CLASS/* and PATH/test/CLASS/*, PATH/train alone, or PATH/CLASS/*.

Listed, then decoded once into uint8 (N, C, H, W), then read from a cache for as long as no file changes.
"""

from pathlib import Path

import numpy as np
import torch

from stn_pipeline.config import FOLDER
from stn_pipeline.data.cache import Arrays, Cache
from stn_pipeline.data.decoding import BrokenError, Reading, decode
from stn_pipeline.data.listing import Listing, list_folder
from stn_pipeline.data.sources import CPU, Announce, check_memory, free_bytes
from stn_pipeline.data.splits import RawData, Split
from stn_pipeline.data.splitting import check_counts
from stn_pipeline.errors import DataError
from stn_pipeline.texts import printable

SMALLER = "give image_size=N or use fewer images"


def read(path: str, image_size: int, announce: Announce, *, to_score: str = "", reading: Reading | None = None) -> RawData:
    """Return the images of a folder, each with its id: see decoding.decode for what becomes of them.

    Args:
        path: the folder; `~` is expanded.
        image_size: side in px that every image is scaled and centre-cropped to; 0 is their own, or the commonest where they differ.
        announce: told what was ignored, resized, scaled and decoded.
        to_score: the split that alone is wanted, to be scored; empty where a network is to be trained.
        reading: how to read them, where a network was trained on others; it overrules image_size.

    Raises:
        DataError: no such folder, no classes, classes that do not agree, images that cannot be decoded, or too many of them.
    """
    listing = list_folder(FOLDER + path, Path(path).expanduser(), to_score)
    name = listing.name
    if not to_score:
        labels = torch.tensor([file.label for file in listing.parts["train"]])
        check_counts(name, listing.classes, labels, has_test="test" in listing.parts)
    if listing.ignored:
        first, more = ", ".join(map(printable, listing.ignored[:3])), ", ..." if len(listing.ignored) > 3 else ""
        announce(f"{name}: ignored {len(listing.ignored)} that are no images or not in a class: {first}{more}")
    arrays = _arrays(listing, image_size, reading, announce)
    for note in arrays["notes"].tolist():
        announce(f"{name}: {note}")
    splits, start = {}, 0
    for part, files in listing.parts.items():
        rows = slice(start, start + len(files))
        labels = torch.tensor([file.label for file in files], dtype=torch.int64)
        splits[part] = Split(torch.from_numpy(arrays["images"][rows]), labels, torch.from_numpy(arrays["ids"][rows]))
        start += len(files)
    train = splits["train"] if "train" in splits else splits["test"].take(np.arange(0))
    return RawData(name, train, splits.get("test"), listing.classes, int(arrays["bits"]))


def _arrays(listing: Listing, image_size: int, reading: Reading | None, announce: Announce) -> Arrays:
    """Return images (N, C, H, W), ids (N,), bits and notes of a listing's files in their order, kept from before or decoded now."""

    def afford(n_bytes: int) -> None:
        check_memory(listing.name, n_bytes, free_bytes(CPU), SMALLER)

    cache = Cache(listing, (image_size, reading))
    kept = cache.load(afford)
    if kept is not None:
        return kept
    where = f"kept in {printable(cache.folder)} for the next time" if cache.folder else "not kept: there is no cache folder of your own"
    announce(f"{listing.name}: decoding {len(listing.files)} images, {where}")
    try:
        found = decode([listing.root / file.path for file in listing.files], image_size, reading, afford)
    except BrokenError as error:
        more = f" and {error.n_more} more" if error.n_more else ""
        path = printable(listing.files[error.at].path)
        raise DataError(f"{listing.name}: cannot decode {path}{more} ({printable(error)}): replace or remove it") from error.cause
    arrays: Arrays = {"images": found.images, "ids": found.ids, "bits": np.array(found.bits), "notes": np.array(found.notes, dtype=np.str_)}
    cache.save(found.contents, arrays)
    return arrays
