"""The user's own images: layouts, sizes, modes, strays, damage, and a cache that is never wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stn_pipeline import data
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Splits, folder
from stn_pipeline.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/stn_pipeline"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ and test/ with two classes, 6 and 2 greyscale images each, 8 wide and 6 high."""
    for part, n in (("train", 6), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(n):
                save(Image.new("L", (8, 6), 100 * label + i), tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def load(root: Path, **knobs: object) -> tuple[Splits, list[str]]:
    lines: list[str] = []
    config = TrainConfig.parse({"dataset": f"folder:{root}", "val_fraction": 0.34, **knobs})
    splits = data.load(config, announce=lines.append)
    return splits, [line for line in lines if " decoding " not in line]


def error_of(root: Path, **knobs: object) -> str:
    with pytest.raises(DataError) as caught:
        load(root, **knobs)
    assert "\n" not in str(caught.value)
    assert f"folder:{root}" in str(caught.value)
    return str(caught.value)


def pixels(splits: Splits, label: int) -> list[list[int]]:
    """The centre pixel (C,) of each test image of a class."""
    images = splits.test.images[splits.test.labels == label]
    return images[:, :, images.shape[2] // 2, images.shape[3] // 2].tolist()


# Layouts


def test_train_and_test(root: Path) -> None:
    splits, lines = load(root)
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (12, 4)
    assert (splits.image_shape, splits.classes, splits.dataset) == ((1, 6, 8), ("cat", "dog"), f"folder:{root}")
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert [sorted(splits.test.images[splits.test.labels == label][:, 0, 0, 0].tolist()) for label in (0, 1)] == [[0, 1], [100, 101]]
    values = torch.cat([splits.train.images, splits.val.images])[:, 0, 0, 0].tolist()
    assert sorted(values) == [0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105]
    assert lines == []


@pytest.mark.parametrize("direct", [True, False])
def test_no_test_folder_gets_a_fixed_stratified_test_split(root: Path, direct: bool) -> None:
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "test").rmdir()
    top = root / "train" if direct else root
    one, two = load(top, seed=1)[0], load(top, seed=2)[0]
    assert torch.bincount(one.test.labels).max() <= 2
    assert len(one.test) == 3
    assert torch.equal(one.test.images, two.test.images)
    assert len(one.train) + len(one.val) + len(one.test) == 12


def test_home_is_expanded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(load(Path("~/set"))[0].test) == 4


def test_a_class_absent_from_test_is_fine(root: Path) -> None:
    for path in (root / "test/dog").iterdir():
        path.unlink()
    assert load(root)[0].test.labels.tolist() == [0, 0]
    (root / "test/dog").rmdir()
    assert load(root)[0].n_classes == 2


def test_a_class_that_only_test_has(root: Path) -> None:
    save(Image.new("L", (8, 6)), root / "test/dogs/0.png")
    assert "test/ has classes that train/ lacks: dogs: add them to train/ or drop them; did you mean dog?" in error_of(root)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (["missing"], "no such folder: give one that holds"),
        (["empty/"], "no class folders in"),
        (["empty/train/a/", "empty/train/b/"], "no images in the class folders"),
        (["empty/test/a/"], "has test/ and no train/"),
        (["empty/train/a/0.png", "empty/train/b/"], "class b has 0 images for training, needs at least 5"),
        (["empty/train/a/0.png", "empty/train/b/0.png", "empty/test/a/"], "test/ holds no images"),
    ],
)
def test_a_folder_that_cannot_be_used(make: list[str], text: str, tmp_path: Path) -> None:
    for name in make if make != ["missing"] else []:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        else:
            for i in range(6):
                save(Image.new("L", (8, 8)), (tmp_path / name).with_name(f"{i}.png"))
    assert text in error_of(tmp_path / "empty")


def test_a_folder_name_nearly_right(root: Path) -> None:
    assert "did you mean set?" in error_of(root.parent / "sett")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_text("")
    assert "is a file, expected a folder: unpack it" in error_of(tmp_path / "set.zip")


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    for i in range(6):
        save(Image.new("L", (8, 8)), tmp_path / f"set/only/{i}.png")
    assert "has 1 class (only), needs at least 2" in error_of(tmp_path / "set")


# Strays and damage


def test_strays_are_named_in_one_line_and_hidden_files_are_not(root: Path) -> None:
    for name in ("train/cat/notes.txt", "train/cat/.DS_Store", "train/readme.md", "test/dog/z.csv", ".git/config", "val/cat/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    splits, lines = load(root)
    assert lines == [f"folder:{root}: ignored 4 that are no images or not in a class: val, train/cat/notes.txt, train/readme.md, ..."]
    assert len(splits.test) == 4
    assert load(root)[1] == lines


def test_undecodable_images_are_named(root: Path) -> None:
    whole = (root / "train/cat/0.png").read_bytes()
    (root / "train/cat/1.png").write_bytes(whole[:45])
    (root / "train/cat/5.png").write_text("not an image")
    (root / "test/dog/1.png").write_bytes(b"")
    for _ in range(2):  # nothing of it was cached
        assert "cannot decode test/dog/1.png and 2 more (not an image): replace or remove it" in error_of(root)


def test_floating_point_pixels_are_refused(root: Path) -> None:
    save(Image.new("F", (8, 6), 0.5), root / "train/cat/f.tif")
    assert "cannot decode train/cat/f.tif (floating-point pixels have no fixed range)" in error_of(root)


# Sizes


def test_mixed_sizes_become_the_commonest(root: Path) -> None:
    save(Image.new("L", (40, 10), 3), root / "train/cat/wide.png")
    save(Image.new("L", (3, 5), 3), root / "test/cat/small.png")
    splits, lines = load(root)
    assert splits.image_shape == (1, 6, 8)
    assert lines == [f"folder:{root}: 2 of 18 images (3 sizes) scaled and centre-cropped to 8x6"]
    assert load(root)[1] == lines  # said again when it comes from the cache


def test_image_size_scales_the_shorter_side_and_crops_the_centre(root: Path) -> None:
    bands = np.zeros((32, 96), dtype=np.uint8)
    bands[:, 32:64] = 200
    save(Image.fromarray(bands), root / "test/cat/0.png")
    splits, lines = load(root, image_size=16)
    assert splits.image_shape == (1, 16, 16)
    assert (splits.test.images == 200).float().mean((1, 2, 3)).max() > 0.8  # only the middle band is left
    assert lines == [f"folder:{root}: 16 of 16 images (2 sizes) scaled and centre-cropped to 16x16"]


def test_shrinking_is_antialiased(root: Path) -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(Image.fromarray(checks), root / "test/cat/0.png")
    images = load(root, image_size=8)[0].test.images.float()
    assert ((images - 127.5).abs().flatten(1).max(1).values < 8).sum() == 1


def test_exif_orientation_is_respected(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn clockwise
    for part, n in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                lying = np.zeros((8, 6), dtype=np.uint8)  # 6 wide, 8 high; upright 8 wide, 6 high
                lying[:4] = 255
                lying[0, 0] -= 10 * i  # copies of each other would be one image
                (root / part / name / f"{i}.png").unlink()
                save(Image.fromarray(lying), root / part / name / f"{i}.jpg", exif=exif, quality=95)
    splits, lines = load(root)
    assert splits.image_shape == (1, 6, 8)
    assert lines == []
    assert splits.test.images[:, :, 2:, 5:].min() > 240  # the top half turned to the right
    assert splits.test.images[:, :, :, :3].max() < 15


# Modes


def grey_16() -> Image.Image:
    return Image.fromarray(np.full((6, 8), 65535 // 3, dtype=np.uint16))


def transparent_l() -> Image.Image:
    image = Image.new("L", (8, 6), 0)
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "name", "value"),
    [
        (Image.new("1", (8, 6), 1), "0.png", 255),
        (grey_16(), "0.png", 85),
        (grey_16(), "0.tif", 85),
        (Image.new("LA", (8, 6), (200, 128)), "0.png", 100),
        (Image.new("LA", (8, 6), (200, 0)), "0.png", 0),
        (Image.new("I", (8, 6), 65535), "0.tif", 255),
    ],
)
def test_greyscale_modes_give_one_channel(root: Path, image: Image.Image, name: str, value: int) -> None:
    (root / "test/dog/0.png").unlink()
    save(image, root / "test/dog" / name)
    assert [pytest.approx(value, abs=1)] in pixels(load(root)[0], 1)


@pytest.mark.parametrize(
    ("image", "name", "value"),
    [
        (Image.new("RGB", (8, 6), (10, 20, 30)), "0.png", (10, 20, 30)),
        (Image.new("RGBA", (8, 6), (200, 100, 50, 128)), "0.png", (100, 50, 25)),
        (Image.new("RGB", (8, 6), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE), "0.gif", (200, 100, 50)),
        (Image.new("CMYK", (8, 6), (0, 0, 0, 55)), "0.tif", (200, 200, 200)),
    ],
)
def test_any_colour_gives_rgb(root: Path, image: Image.Image, name: str, value: tuple[int, ...]) -> None:
    (root / "test/dog/0.png").unlink()
    save(image, root / "test/dog" / name)
    splits, _ = load(root)
    assert splits.image_shape == (3, 6, 8)
    assert [pytest.approx(v, abs=1) for v in value] in pixels(splits, 1)
    assert [0, 0, 0] in pixels(splits, 0)  # greyscale among colour


def test_palette_transparency_is_black(root: Path) -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 250, 250, 250])
    (root / "test/dog/0.png").unlink()
    save(image, root / "test/dog/0.png", transparency=1)
    assert [0, 0, 0] in pixels(load(root)[0], 1)


# Memory


def test_too_many_pixels_for_the_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "free_bytes", lambda device: 2 * (16 + 24) * 6 * 8 - 1)  # the set, and decoding one image
    assert "give image_size=N or use fewer images" in error_of(root)
    monkeypatch.setattr(folder, "free_bytes", lambda device: 2 * (16 + 24) * 6 * 8)
    load(root)


def test_a_stale_cache_is_not_held_against_the_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(200):
        save(Image.new("L", (8, 6)), root / f"train/cat/more{i}.png")
    load(root)
    for i in range(200):
        (root / f"train/cat/more{i}.png").unlink()
    monkeypatch.setattr(folder, "free_bytes", lambda device: 2 * (16 + 24) * 6 * 8)
    load(root)


def test_a_cache_too_large_for_the_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root)
    monkeypatch.setattr(folder, "free_bytes", lambda device: 100)
    assert "must be at most half of the" in error_of(root)


# Cache


def decoded(root: Path, **knobs: object) -> bool:
    """Load, and return whether the images were decoded rather than read from the cache."""
    lines: list[str] = []
    data.load(TrainConfig.parse({"dataset": f"folder:{root}", "val_fraction": 0.34, **knobs}), announce=lines.append)
    return any(" decoding " in line for line in lines)


def test_the_second_time_nothing_is_decoded(root: Path) -> None:
    first = load(root)[0]
    assert not decoded(root)
    again = load(root)[0]
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.images, again.test.images)
    assert torch.equal(first.test.labels, again.test.labels)


def test_changed_files_are_decoded_again_into_the_same_cache_file(root: Path, cache: Path) -> None:
    load(root)
    save(Image.new("L", (8, 6), 77), root / "test/dog/0.png")
    assert [77] in pixels(load(root)[0], 1)
    (root / "train/cat/5.png").unlink()
    assert decoded(root)
    assert not decoded(root)
    os.utime(root / "train/cat/0.png", ns=(1, 1))
    assert not decoded(root)  # the content is the same
    assert len(list(cache.glob("*.npz"))) == 1
    assert decoded(root, image_size=16)
    assert not decoded(root)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "folder"])
def test_a_damaged_cache_is_rebuilt(root: Path, cache: Path, damage: str) -> None:
    first = load(root)[0]
    (path,) = cache.glob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "flipped":
        at = content.index(bytes([0] * 48 + [1] * 48))  # two of the images
        content[at] ^= 255
        path.write_bytes(content)
    else:
        path.write_bytes({"cut": bytes(content[: len(content) // 2]), "empty": b"", "text": b"hello"}[damage])
    assert decoded(root)
    assert torch.equal(load(root)[0].test.images, first.test.images)


def test_a_cache_that_cannot_be_written_is_no_error(root: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert decoded(root)
    assert decoded(root)


def test_killed_while_writing_the_cache(root: Path, cache: Path) -> None:
    code = f"""
import os, signal
import numpy as np
from stn_pipeline import data
from stn_pipeline.config import TrainConfig
def half(file, **arrays):
    file.write(b"PK half of it"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
np.savez = half
data.load(TrainConfig(dataset="folder:{root}", val_fraction=0.34))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    assert decoded(root)
    assert not decoded(root)
