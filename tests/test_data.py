"""Named data sets and the splits: laws by hypothesis, real MNIST where it is on disk, no network."""

import gzip
import hashlib
import io
import os
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stn_pipeline import data
from stn_pipeline.config import DATASETS, TrainConfig
from stn_pipeline.data import sources
from stn_pipeline.data.splits import RawData, Split, Splits
from stn_pipeline.data.splitting import split, stratified
from stn_pipeline.errors import DataError

TORCHVISION = sorted(set(DATASETS) - {"auto", "digits"})


@pytest.fixture
def real_data() -> str:
    folder = Path(os.environ.get("STN_TEST_DATA") or Path(__file__).parents[1] / "../shared/data").resolve()
    if not (folder / "MNIST/raw").is_dir():
        pytest.skip(f"no MNIST/raw in {folder}: set STN_TEST_DATA")
    return str(folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Refuse every connection; holds the socket timeout that each attempt ran under."""
    timeouts: list[float | None] = []

    def refuse(*args: object, **kwargs: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return timeouts


def config(dataset: str, data_dir: str | Path = "data", **knobs: object) -> TrainConfig:
    return TrainConfig.parse({"dataset": dataset, "data_dir": str(data_dir), **knobs})


def error_of(dataset: str, data_dir: str | Path, **knobs: object) -> str:
    with pytest.raises(DataError) as caught:
        data.load(config(dataset, data_dir, **knobs), announce=lambda line: None)
    text = str(caught.value)
    assert "\n" not in text
    assert f"dataset={dataset}" in text
    return text


def raw(counts: list[int], test: bool = True) -> RawData:
    """`counts[k]` images of class k, each holding its own number in its pixels."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    number = torch.arange(len(labels))
    images = torch.stack([number % 256, number // 256], 1).to(torch.uint8).reshape(-1, 1, 1, 2)
    part = Split(images, labels)
    return RawData("toy", part, part if test else None, tuple(f"class{k}" for k in range(len(counts))))


def numbers(part: Split) -> list[int]:
    return (part.images[:, 0, 0, 0].long() + 256 * part.images[:, 0, 0, 1].long()).tolist()


# Splits

counts_of_classes = st.lists(st.integers(2, 60), min_size=2, max_size=6)


@settings(deadline=None)
@given(counts_of_classes, st.floats(0.05, 0.5), st.integers(0, 2**31 - 1))
def test_val_and_train_partition_the_training_images(counts: list[int], fraction: float, seed: int) -> None:
    whole = raw(counts)
    try:
        splits = split(whole, fraction, seed)
    except DataError as error:
        n_val = int(np.ceil(fraction * sum(counts)))
        assert n_val < len(counts)
        assert re.search(r"val_fraction=.* images in \d classes: .* raise val_fraction", str(error))
        return
    train, val = numbers(splits.train), numbers(splits.val)
    assert sorted(train + val) == list(range(sum(counts)))
    assert train == sorted(train)
    assert val == sorted(val)
    assert numbers(splits.test) == list(range(sum(counts)))
    for part in (splits.train, splits.val):
        assert (part.labels == whole.train.labels[numbers(part)]).all()
        assert part.images.is_contiguous()
    held = torch.bincount(splits.val.labels, minlength=len(counts)).numpy()
    assert np.abs(held - np.array(counts) * len(val) / sum(counts)).max() < 1 + 1e-9
    assert torch.bincount(splits.train.labels, minlength=len(counts)).min() >= 1


@settings(deadline=None)
@given(st.integers(0, 2**31 - 2))
def test_the_split_depends_on_the_seed_alone(seed: int) -> None:
    labels = raw([30, 40, 50]).train.labels
    first, again, other = (stratified(labels, 0.2, s)[1].tolist() for s in (seed, seed, seed + 1))
    assert first == again
    assert first != other


def test_a_test_split_that_is_cut_here_does_not_depend_on_the_seed() -> None:
    one, two = (split(raw([50, 70], test=False), 0.1, seed) for seed in (1, 2))
    assert numbers(one.test) == numbers(two.test)
    assert len(one.test) == 24
    assert numbers(one.val) != numbers(two.val)
    assert sorted(numbers(one.train) + numbers(one.val) + numbers(one.test)) == list(range(120))


@pytest.mark.parametrize(("counts", "test", "text"), [([9, 1], True, "class class1 has 1 images"), ([9, 4], False, "at least 5")])
def test_a_class_with_too_few_images_is_named(counts: list[int], test: bool, text: str) -> None:
    with pytest.raises(DataError, match=text):
        split(raw(counts, test), 0.5, 0)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 9))
def test_mean_and_std_are_those_of_the_pixels(c: int, n: int, seed: int) -> None:
    images = torch.randint(0, 256, (n, c, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    part = Split(images, torch.zeros(n, dtype=torch.int64))
    splits = Splits(part, part, part, ("a", "b"), "toy")
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(splits.mean, pixels.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(splits.std, pixels.std((0, 2, 3)), atol=1e-6)
    assert splits.mean.dtype == splits.std.dtype == torch.float32


def test_the_std_of_constant_pixels_is_1() -> None:
    part = Split(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert Splits(part, part, part, ("a", "b"), "toy").std.tolist() == [1.0]


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), "torch.float32"),
        (torch.zeros(4, 2, 2).byte(), torch.zeros(4).long(), r"expected uint8 \(N, C, H, W\)"),
        (torch.zeros(4, 1, 2, 2).byte(), torch.zeros(3).long(), "3 labels"),
        (torch.zeros(4, 1, 2, 2).byte(), torch.tensor([0, 1, 2, 0]), r"labels are 0..2, expected 0..1"),
        (torch.zeros(4, 1, 2, 2).byte(), torch.tensor([0, 1, -1, 0]), r"labels are -1..1"),
    ],
)
def test_data_that_does_not_fit_is_refused(images: torch.Tensor, labels: torch.Tensor, text: str) -> None:
    with pytest.raises(DataError, match=text):
        RawData("toy", Split(images, labels), None, ("a", "b"))


def test_one_class_is_not_enough() -> None:
    with pytest.raises(DataError, match=r"has 1 class \(class0\), needs at least 2"):
        split(raw([9]), 0.2, 0)


def test_the_set_may_take_half_of_the_free_memory() -> None:
    sources.check_memory("big", 50, 100, "shrink")
    with pytest.raises(DataError, match=r"^big: its images take 5.1 GB, must be at most half of the 10 GB free: shrink$"):
        sources.check_memory("big", 5_100_000_000, 10_000_000_000, "shrink")


def test_a_named_set_that_does_not_fit_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch, real_data: str) -> None:
    monkeypatch.setattr(sources, "free_bytes", lambda device: 2 * 70_000 * 28 * 28 - 1)
    assert "half of the" in error_of("mnist", real_data)


# Sources


def test_every_named_data_set_has_a_source() -> None:
    assert set(data.SOURCES) == set(DATASETS) - {"auto"}


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    splits = data.load(config("digits"))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1293, 144, 360)
    assert (splits.image_shape, splits.n_classes, splits.dataset) == ((1, 8, 8), 10, "digits")
    images = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    assert (images.dtype, int(images.min()), int(images.max())) == (torch.uint8, 0, 255)
    ours = sorted((images.float() * 16 / 255).round().flatten(1).int().tolist())
    assert ours == sorted(load_digits().data.astype(int).tolist())
    other = data.load(config("digits", seed=1))
    assert torch.equal(other.test.images, splits.test.images)
    assert not torch.equal(other.val.images, splits.val.images)


def test_mnist_from_disk(real_data: str, offline: list[float | None]) -> None:
    lines: list[str] = []
    splits = data.load(config("mnist", real_data), announce=lines.append)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (54_000, 6_000, 10_000)
    assert (splits.image_shape, splits.classes, splits.dataset) == ((1, 28, 28), tuple("0123456789"), "mnist")
    # The published label counts of the 60,000 and the 10,000.
    both = torch.bincount(splits.train.labels) + torch.bincount(splits.val.labels)
    assert both.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(splits.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    whole = Path(real_data, "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert splits.test.images.numpy().tobytes() == whole
    assert splits.mean.item() == pytest.approx(0.1307, abs=3e-4)
    assert splits.std.item() == pytest.approx(0.3081, abs=3e-4)
    assert lines == []
    assert offline == []


def test_auto_is_mnist_where_it_is_on_disk(real_data: str) -> None:
    lines: list[str] = []
    assert data.load(config("auto", real_data), announce=lines.append).dataset == "mnist"
    assert lines == []


def test_auto_falls_back_loudly(tmp_path: Path, offline: list[float | None]) -> None:
    lines: list[str] = []
    splits = data.load(config("auto", tmp_path / "none"), announce=lines.append)
    assert splits.dataset == "digits"
    assert len([line for line in lines if "NOT MNIST" in line and "no network in tests" in line and "\n" not in line]) == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dataset", TORCHVISION)
def test_a_named_set_offline_never_falls_back(
    dataset: str, tmp_path: Path, offline: list[float | None], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    before = socket.getdefaulttimeout()
    text = error_of(dataset, tmp_path)
    assert "download failed (" in text
    assert "no network in tests" in text
    assert re.search(r": put .* in .*, give the data_dir that has them, or use dataset=digits$", text)
    assert set(offline) == {sources.TIMEOUT_S}
    assert socket.getdefaulttimeout() == before
    assert os.listdir(tmp_path) == ["mine.txt"]
    assert capfd.readouterr() == ("", "")


def test_a_data_dir_that_cannot_be_written(tmp_path: Path, offline: list[float | None]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to download it (" in error_of("mnist", tmp_path / "file")
    assert "cannot be written to download it (" in error_of("cifar10", "/proc/stn")
    assert offline == []


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("size", [0, 9_999])
def test_a_truncated_raw_file_is_named(file: str, size: int, tmp_path: Path, real_data: str) -> None:
    raw_folder = tmp_path / "MNIST/raw"
    raw_folder.mkdir(parents=True)
    for path in Path(real_data, "MNIST/raw").iterdir():
        (raw_folder / path.name).symlink_to(path)
    (raw_folder / file).unlink()
    (raw_folder / file).write_bytes(bytes(size))
    for dataset in ("mnist", "auto"):
        with pytest.raises(DataError, match=f"{file}: has {size} bytes, expected .*: delete .*{file} to have it fetched anew"):
            data.load(config(dataset, tmp_path))


def test_a_raw_file_of_the_right_size_and_wrong_content(tmp_path: Path, real_data: str) -> None:
    raw_folder = tmp_path / "MNIST/raw"
    raw_folder.mkdir(parents=True)
    for path in Path(real_data, "MNIST/raw").iterdir():
        (raw_folder / path.name).symlink_to(path)
    labels = raw_folder / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.unlink()
    labels.write_bytes(good[:-1] + bytes([200]))
    assert "train labels are 0..200, expected 0..9" in error_of("mnist", tmp_path)
    labels.write_bytes(bytes(len(good)))
    assert f"damaged files: {tmp_path}" in error_of("mnist", tmp_path)


class Served(io.BytesIO):
    """What urlopen returns."""

    def __init__(self, url: str, content: bytes, breaks_after: int | None = None) -> None:
        """Serve `content`; after `breaks_after` bytes the line goes dead."""
        super().__init__(content)
        self.url, self.length, self.breaks_after = url, len(content), breaks_after

    def read(self, size: int | None = -1) -> bytes:
        if self.breaks_after is not None and self.tell() >= self.breaks_after:
            raise TimeoutError("timed out")
        return super().read(size)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Serve an MNIST of blank images, whole or cut short in its last archive."""
    from torchvision.datasets import MNIST

    def idx(shape: tuple[int, ...], content: bytes) -> bytes:
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        return gzip.compress(header + content, compresslevel=1)

    archives = {}
    for name, _ in MNIST.resources:
        n = 60_000 if name.startswith("train") else 10_000
        archives[name] = idx((n, 28, 28), bytes(n * 784)) if "images" in name else idx((n,), bytes(i % 10 for i in range(n)))
    monkeypatch.setattr(MNIST, "resources", [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()])

    def serve(breaks_after: int | None) -> None:
        def urlopen(request: urllib.request.Request, **kwargs: object) -> Served:
            name = request.full_url.rsplit("/", 1)[1]
            return Served(request.full_url, archives[name], breaks_after if name.startswith("t10k-labels") else None)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    return serve


def test_a_download_fills_data_dir_once(tmp_path: Path, mirror: Callable[[int | None], None], capfd: pytest.CaptureFixture[str]) -> None:
    mirror(None)
    lines: list[str] = []
    splits = data.load(config("mnist", tmp_path / "new"), announce=lines.append)
    assert len(splits.test) == 10_000
    assert len(lines) == 1
    assert "downloading" in lines[0]
    assert os.listdir(tmp_path / "new") == ["MNIST"]
    assert capfd.readouterr() == ("", "")
    data.load(config("mnist", tmp_path / "new"), announce=lines.append)
    assert len(lines) == 1


def test_a_download_that_breaks_leaves_nothing_and_the_next_works(tmp_path: Path, mirror: Callable[[int | None], None]) -> None:
    mirror(0)
    assert "download failed (timed out)" in error_of("mnist", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    mirror(None)
    assert len(data.load(config("mnist", tmp_path / "new"), announce=lambda line: None).train) == 54_000


def test_archives_put_there_by_hand_need_no_network(
    tmp_path: Path, mirror: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(None)
    data.load(config("mnist", tmp_path), announce=lambda line: None)
    for path in (tmp_path / "MNIST/raw").iterdir():
        if path.suffix != ".gz":
            path.unlink()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("reached for the network"))
    assert len(data.load(config("mnist", tmp_path), announce=lambda line: None).train) == 54_000


def test_image_size_is_for_folders() -> None:
    assert "image_size=16: only folder:PATH is resized" in error_of("digits", "data", image_size=16)


def test_importing_the_package_loads_no_slow_library() -> None:
    import subprocess
    import sys

    code = "import sys, stn_pipeline.data; print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"
