"""A split made ready to be scored by a network that is there already: classes matched by their names, no image it was trained on.

Shapes: N images, K classes.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from stn_pipeline.data.splits import Split, Splits
from stn_pipeline.errors import DataError, did_you_mean

EARLIER = {"train": (), "val": ("train",), "test": ("train", "val")}  # whose images may not be in a split that tells of new ones


@dataclass(frozen=True)
class Known:
    """What a network was trained on: the run, its classes, and of each split a checksum and, for a folder, the ids of its images.

    digests may be left out where images cannot be the same, as when another distortion is asked for.
    """

    run_id: str
    classes: tuple[str, ...]
    members: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def make_ready(splits: Splits, which: str, known: Known, *, own: bool) -> tuple[Splits, list[str]]:
    """Return the splits with the one to be scored made ready, and warnings that belong to its scores.

    Args:
        splits: of which `which` alone is looked at; its images may be distorted.
        which: train, val or test.
        known: what the network was trained on.
        own: whether this is called the set that the network was trained on.

    Raises:
        DataError: classes that the network does not know, or no image that it was not trained on.
    """
    split = getattr(splits, which)
    index, warnings = match(splits.classes, split.labels.unique().tolist(), known.classes, f"dataset={splits.dataset}", known.run_id)
    split = replace(split, labels=torch.tensor(index, device=split.labels.device)[split.labels])
    split = split if index == sorted(index) else split.ordered()
    ready = splits.put(which, split, known.classes)
    as_trained = known.digests.get(which) == ready.digests()[which]
    if split.ids is not None and known.members:
        if not as_trained:
            split, told = _only_new(split, which, known, own, f"dataset={splits.dataset}")
            ready, warnings = ready.put(which, split, known.classes), warnings + told
    elif own and which in known.digests and not as_trained:
        warnings.append(f"the {which} split is not the one that run {known.run_id} had: it may hold images that the run was trained on")
    return ready, warnings


def _only_new(split: Split, which: str, known: Known, own: bool, what: str) -> tuple[Split, list[str]]:
    """Return the images of a split that an earlier split of the run did not hold, and what to tell of the difference."""
    if split.ids is None:
        raise ValueError("the images have no ids")
    ids, had = torch.from_numpy(np.unique(split.ids.numpy())), known.members[which]
    n_common = int(torch.isin(ids, had).sum())
    if n_common == len(ids) == len(had):  # the same images; copies that lay in both splits from the start are scored as they were then
        return split, [f"some {which} images have other labels than in run {known.run_id}"] if which in known.digests else []
    told = []
    if own or n_common:
        told.append(f"the {which} split is not the one that run {known.run_id} had: {len(had) - n_common} images are gone, "
                    f"{len(ids) - n_common} are new")  # fmt: skip
    seen = torch.isin(split.ids, torch.cat([known.members[name] for name in EARLIER[which]] + [ids[:0]]))
    n_seen = int(seen.sum())
    if n_seen == len(seen):
        raise DataError(f"{what}: run {known.run_id} was trained on all {n_seen} {which} images: give images that it has not seen")
    if n_seen:
        told.append(f"{n_seen} of {len(seen)} {which} images are left out, since run {known.run_id} was trained on them")
        split = split.take(np.flatnonzero(~seen.numpy()))
    return split, told


def match(classes: Sequence[str], used: Sequence[int], known: Sequence[str], what: str, run_id: str) -> tuple[list[int], list[str]]:
    """Return the known class of each class, by name, and what to tell.

    The same name first; then names that differ only in case, in how letters are encoded, or in blanks, `_` and `-`, where that is
    unambiguous. Where not one name agrees, and there are as many, they are taken to be the same in another language: by order.

    Args:
        classes: the names of a set's classes.
        used: which of them matter, as indices: those that have images; the others' entries mean nothing.
        known: the names that the network was trained with.
        what: what messages call the set.
        run_id: the network's run.

    Raises:
        DataError: some names agree, and others do not; or none, and the numbers differ.
    """
    index = {at: known.index(classes[at]) for at in used if classes[at] in known}
    spelt = Counter(_folded(classes[at]) for at in used if at not in index)
    free = [at for at in range(len(known)) if at not in index.values()]
    n_known = Counter(_folded(known[at]) for at in free)
    respelt = {
        at: next(i for i in free if _folded(known[i]) == name)
        for at in used
        if at not in index and spelt[name := _folded(classes[at])] == n_known[name] == 1
    }
    index |= respelt
    unknown = [classes[at] for at in used if at not in index]
    if unknown and (index or len(classes) != len(known)):
        near = did_you_mean(unknown[0], known)
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        got = f"{', '.join(unknown[:10])}{', ...' if len(unknown) > 10 else ''}"
        raise DataError(
            f"{what}: of its {len(classes)} classes run {run_id} does not know {got}; it was built for {len(known)}: {shown}: "
            f"rename them or leave them out{near}"
        )
    if unknown:
        pairs = f"{classes[0]} for {known[0]}, {classes[1]} for {known[1]}" if len(known) > 1 else f"{classes[0]} for {known[0]}"
        return list(range(len(classes))), [f"no class is called as in run {run_id}: they are matched by their order ({pairs}, ...)"]
    told = [f"class {classes[at]} is taken for {known[i]}, as run {run_id} calls it" for at, i in respelt.items()]
    return [index.get(at, 0) for at in range(len(classes))], told


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold().strip())
