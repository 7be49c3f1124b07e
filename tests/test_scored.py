"""A split made ready for a network that is there already: labels by name under any order and spelling, nothing it was trained on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stn_pipeline.data.scored import Known, make_ready, match
from stn_pipeline.data.splits import RawData, Split, Splits, distorted
from stn_pipeline.data.splitting import split
from stn_pipeline.errors import DataError

classes = st.lists(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6), min_size=2, max_size=6, unique=True)


def index_of(found: list[str], known: list[str]) -> list[int]:
    return match(found, range(len(found)), known, "dataset=folder:x", "abc")[0]


@settings(deadline=None)
@given(classes, st.randoms(use_true_random=False), st.integers(1, 6))
def test_classes_are_found_by_name_in_any_order_and_number(known: list[str], random, n: int) -> None:
    found = random.sample(known, min(n, len(known)))
    assert [known[at] for at in index_of(found, known)] == found


@pytest.mark.parametrize(
    "respell", [str.upper, str.title, lambda name: f" {name}", lambda name: name.replace(" ", "_"), lambda name: name.replace(" ", "-")]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_names_that_differ_in_case_or_blanks_are_the_same_and_it_is_told(respell, backwards) -> None:
    known = ["sea cow", "ant", "bee 2"]
    found = [respell(name) for name in (reversed(known) if backwards else known)]
    index, told = match(found, range(3), known, "", "abc")
    assert index == ([2, 1, 0] if backwards else [0, 1, 2])
    assert len(told) == sum(name not in known for name in found)
    assert all("is taken for" in line for line in told)


def test_the_exact_name_wins_and_what_could_be_two_is_neither() -> None:
    assert index_of(["Cow", "cow"], ["cow", "Cow"]) == [1, 0]
    with pytest.raises(DataError, match="run abc does not know COW; it was built for 3: cow, Cow, ant: rename them or leave them out"):
        index_of(["COW", "ant"], ["cow", "Cow", "ant"])
    with pytest.raises(DataError, match="does not know Cow, COW"):
        index_of(["Cow", "COW", "ant"], ["cow", "ant", "bee"])
    assert index_of(["c++", "c"], ["c", "c++"]) == [1, 0]
    with pytest.raises(DataError, match=r"does not know c\+\+"):
        index_of(["c++", "d"], ["c", "d"])


def test_a_class_that_the_network_does_not_know_is_named_with_what_it_may_mean() -> None:
    with pytest.raises(DataError, match=r"of its 2 classes run abc does not know cows; it was built for 3: .*; did you mean cow\?"):
        index_of(["ant", "cows"], ["ant", "bee", "cow"])
    with pytest.raises(DataError, match=r"of its 2 classes run abc does not know x, y; it was built for 3"):
        index_of(["x", "y"], ["ant", "bee", "cow"])
    # A class without images in the split does not matter.
    assert match(["ant", "zebra"], [0], ["ant", "bee"], "", "")[0][0] == 0


def test_where_no_name_agrees_the_order_decides_and_a_warning_says_so() -> None:
    index, told = match(["fourmi", "abeille"], [0, 1], ["ant", "bee"], "", "abc")
    assert index == [0, 1]
    assert told == ["no class is called as in run abc: they are matched by their order (fourmi for ant, abeille for bee, ...)"]


def folder(ids: list[list[int]], classes: tuple[str, ...], test: bool = False) -> Splits:
    labels = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(one) for one in ids]))
    names = torch.tensor([name for one in ids for name in one], dtype=torch.int64)
    part = Split(torch.from_numpy(names.numpy().view(np.uint8).reshape(-1, 1, 1, 8).copy()), labels, names)
    if test:
        nothing = part.take(np.arange(0))
        return Splits(nothing, nothing, part, classes, "folder:set")
    return split(RawData("folder:set", part, None, classes), 0.2, 0)


def known(splits: Splits) -> Known:
    return Known("abc", splits.classes, splits.members, splits.digests())


IDS = [list(range(60)), list(range(100, 160))]


def test_the_set_that_the_run_had_is_scored_as_it_was_whatever_its_classes_are_called() -> None:
    trained = folder(IDS, ("ant", "cow"))
    for splits in (trained, folder(IDS[::-1], ("Cow", "ant"))):
        ready, told = make_ready(splits, "test", known(trained), own=True)
        assert ready.classes == ("ant", "cow")
        assert ready.digests()["test"] == trained.digests()["test"]
        assert [line for line in told if "is taken for" not in line] == []


def test_images_that_the_run_was_trained_on_are_left_out_and_told() -> None:
    trained = folder(IDS, ("ant", "cow"))
    seen = trained.train.ids[trained.train.labels == 0][:5].tolist() + trained.val.ids[trained.val.labels == 0][:2].tolist()
    new = folder([[*seen, 900, 901], [902]], ("ant", "cow"), test=True)
    ready, told = make_ready(new, "test", known(trained), own=False)
    assert ready.test.ids.tolist() == [900, 901, 902]
    assert ready.test.labels.tolist() == [0, 0, 1]
    assert told == ["7 of 10 test images are left out, since run abc was trained on them"]
    with pytest.raises(DataError, match="run abc was trained on all 7 test images: give images that it has not seen"):
        make_ready(folder([seen], ("ant",), test=True), "test", known(trained), own=False)


def test_of_several_draws_of_an_image_all_are_left_out_or_none() -> None:
    trained = folder(IDS, ("ant", "cow"))
    seen = trained.train.ids[:2].tolist()
    new = distorted(folder([[900, *seen], [902, 901]], ("cow", "ant"), test=True), "rotated", 3, 0)
    ready, _ = make_ready(new, "test", known(trained), own=False)
    assert (ready.test.ids.tolist(), ready.test.labels.tolist(), ready.test.draws) == ([901, 902, 900] * 3, [0, 0, 1] * 3, 3)
    for at, name in enumerate(ready.test.ids.tolist()):
        place = new.test.ids.tolist().index(name) + at // 3 * 5
        assert torch.equal(ready.test.images[at], new.test.images[place])


def test_a_test_split_that_is_no_longer_the_runs_is_told() -> None:
    trained = folder(IDS, ("ant", "cow"))
    held = trained.test.ids[trained.test.labels == 0].tolist()
    changed = folder([[*held[1:], 900, 901], trained.test.ids[trained.test.labels == 1].tolist()], ("ant", "cow"), test=True)
    ready, told = make_ready(changed, "test", known(trained), own=True)
    assert told == ["the test split is not the one that run abc had: 1 images are gone, 2 are new"]
    assert len(ready.test) == len(trained.test) + 1
    relabelled = [held[1:], [*trained.test.ids[trained.test.labels == 1].tolist(), held[0]]]
    assert make_ready(folder(relabelled, ("ant", "cow"), test=True), "test", known(trained), own=True)[1] == [
        "some test images have other labels than in run abc"
    ]


def test_a_run_that_kept_no_membership_is_warned_of() -> None:
    trained = folder(IDS, ("ant", "cow"))
    old = Known("abc", trained.classes, {}, trained.digests())
    assert make_ready(trained, "test", old, own=True)[1] == []
    changed = folder([IDS[0], IDS[1][1:]], ("ant", "cow"), test=True)
    assert make_ready(changed, "test", old, own=True)[1] == [
        "the test split is not the one that run abc had: it may hold images that the run was trained on"
    ]
    assert make_ready(changed, "test", old, own=False)[1] == []
