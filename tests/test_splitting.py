"""The splits of a folder: what an image is, and where it falls, never depends on where it stands. Laws by hypothesis."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stn_pipeline.data.splits import RawData, Split, Splits, distorted
from stn_pipeline.data.splitting import hold_out, numbers, split
from stn_pipeline.errors import DataError


@st.composite
def ids_of_classes(draw: st.DrawFn) -> list[list[int]]:
    """Forty to eighty ids in each of two or three classes, none twice."""
    counts = draw(st.lists(st.integers(40, 80), min_size=2, max_size=3))
    drawn = np.random.default_rng(draw(st.integers(0, 2**31))).choice(2**40, sum(counts), replace=False) - 2**39
    return [part.tolist() for part in np.split(drawn, np.cumsum(counts)[:-1])]


def raw(ids: list[list[int]], test: bool = False, order: Callable[[int], np.ndarray] = np.arange) -> RawData:
    """A folder of `ids[k]` in class k: each image holds its own id in its pixels. Listed in any order."""
    labels = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(one) for one in ids]))
    names = torch.tensor([name for one in ids for name in one], dtype=torch.int64)
    images = torch.from_numpy(names.numpy().view(np.uint8).reshape(-1, 1, 1, 8).copy())
    part = Split(images, labels, names).take(order(len(labels)))
    return RawData("folder:set", part, part if test else None, tuple(f"class{k}" for k in range(len(ids))))


def membership(splits: Splits) -> dict[int, str]:
    parts = (("train", splits.train), ("val", splits.val), ("test", splits.test))
    return {name: part for part, held in parts for name in held.ids.tolist()}


@settings(deadline=None, max_examples=30)
@given(ids_of_classes(), st.integers(0, 2**31 - 1), st.data())
def test_where_an_image_falls_depends_neither_on_the_other_images_nor_on_their_order(ids, seed, drawn) -> None:
    told: list[str] = []
    few = [one[: len(one) - drawn.draw(st.integers(0, 15))] for one in ids]
    all_of_them, some = split(raw(ids), 0.3, seed, told.append), split(raw(few), 0.3, seed, told.append)
    if told:  # a class of which chance gave one split none: the law is that of the next test
        return
    whole, part = membership(all_of_them), membership(some)
    assert part == {name: whole[name] for name in part}
    shuffled = split(raw(ids, order=np.random.default_rng(seed).permutation), 0.3, seed)
    assert shuffled.digests() == all_of_them.digests()
    assert torch.equal(shuffled.train.images, all_of_them.train.images)
    other = split(raw(ids), 0.3, seed + 1)
    assert other.digests()["test"] == all_of_them.digests()["test"]
    assert other.digests()["val"] != all_of_them.digests()["val"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(5, 8), min_size=2, max_size=4), st.integers(0, 10**5), st.integers(0, 100), st.integers(10**6, 10**7))
def test_each_class_is_in_each_split_however_small_and_no_new_file_moves_an_image_from_train_to_test(counts, start, seed, one) -> None:
    ids = [list(range(start + 10 * k, start + 10 * k + n)) for k, n in enumerate(counts)]
    told: list[str] = []
    splits = split(raw(ids), 0.1, seed, told.append)
    for part in (splits.train, splits.val, splits.test):
        assert torch.bincount(part.labels, minlength=len(ids)).min() >= 1
    assert len(membership(splits)) == sum(map(len, ids))
    plain = all(0 < (numbers(np.array(one), "test") < 0.2).sum() <= len(one) - 2 for one in ids)
    assert plain == (not any("fell to test" in line for line in told))
    more = membership(split(raw([[*ids[0], one], *ids[1:]]), 0.1, seed))
    before = membership(splits)
    if (numbers(np.array(ids[0]), "test") < 0.2).sum() <= len(ids[0]) - 2:
        assert not [name for name, part in before.items() if part != "test" and more[name] == "test"]


@settings(deadline=None, max_examples=30)
@given(ids_of_classes(), st.integers(0, 100))
def test_copies_of_an_image_fall_together_under_whatever_label(ids, seed) -> None:
    doubled = [[*ids[0], *ids[0]], [*ids[1], *ids[0][:3]], *ids[2:]]
    splits = split(raw(doubled), 0.3, seed)
    train, val, test = (set(part.ids.tolist()) for part in (splits.train, splits.val, splits.test))
    assert not (train & val or train & test or val & test)
    assert len(splits.train) + len(splits.val) + len(splits.test) == sum(map(len, doubled))


def test_the_share_that_is_held_out_is_met_within_chance() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    part = raw([ids[:10_000].tolist(), ids[10_000:].tolist()])
    for fraction in (0.05, 0.2, 0.5):
        _, held = hold_out(part, part.train, fraction, "test", pytest.fail)
        assert abs(len(held) / 20_000 - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / 20_000)
    both = (numbers(ids, "val 0") < 0.5) & (numbers(ids, "val 1") < 0.5)
    assert abs(both.mean() - 0.25) < 0.015  # the seeds' draws are independent


def test_a_class_with_too_few_different_images_is_named() -> None:
    with pytest.raises(DataError, match="class class1 has 2 different images, needs at least 3 to hold one out for test: add images"):
        split(raw([[1, 2, 3, 4, 5], [6, 6, 6, 6, 7]]), 0.1, 0)
    with pytest.raises(DataError, match="class class1 has 1 different images, needs at least 2 to hold one out for val"):
        split(raw([[1, 2, 3], [6, 6, 6]], test=True), 0.1, 0)


def test_ids_follow_their_images_to_the_end() -> None:
    ids = [list(range(40)), list(range(100, 140))]
    splits = distorted(split(raw(ids), 0.2, 0), "rotated", 3, 0)
    assert splits.test.ids.tolist() == split(raw(ids), 0.2, 0).test.ids.tolist() * 3
    assert splits.members["test"].tolist() == sorted(set(splits.test.ids.tolist()))
    for part in (splits.train, splits.val, splits.test):
        assert len(part.ids) == len(part.images) == len(part.labels)
    assert splits.reading == (1, 1, 8, 0)
