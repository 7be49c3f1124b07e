"""One function per data set that has a name: torchvision's, read from data_dir or downloaded, and scikit-learn's digits."""

import io
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from math import prod
from pathlib import Path
from typing import Any

import torch

from stn_pipeline.data.splits import RawData, Split
from stn_pipeline.errors import DataError

Announce = Callable[[str], object]
TIMEOUT_S = 15.0  # of each wait for the network
DIGITS = tuple("0123456789")
CPU = torch.device("cpu")


class AbsentError(DataError):
    """The files are not there and cannot be downloaded; `reason` says which."""

    def __init__(self, name: str, reason: str, way_out: str) -> None:
        """Say what, why and the way out."""
        super().__init__(f"dataset={name}: {reason}: {way_out}")
        self.reason = reason


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def check_memory(what: str, need: int, free: int, way_out: str) -> None:
    """Check that `need` bytes of images are at most half of the `free` bytes; the rest is the training's.

    Raises:
        DataError: they are not.
    """
    if need > free / 2:
        raise DataError(f"{what}: its images take {need / 1e9:.3g} GB, must be at most half of the {free / 1e9:.3g} GB free: {way_out}")


@dataclass(frozen=True)
class _Published:
    """A set that torchvision reads: its class there, counts, (C, H, W), and class names where ours differ."""

    name: str
    torchvision: str
    n_train: int
    n_test: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()

    @property
    def cls(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.torchvision)

    @property
    def is_idx(self) -> bool:
        """Whether it is stored as MNIST is, of which torchvision checks the existence only."""
        return hasattr(self.cls, "resources")

    @property
    def folder(self) -> str:
        """Where its files lie below data_dir."""
        return f"{self.torchvision}/raw" if self.is_idx else ""

    @property
    def files(self) -> list[str]:
        """The names it is published under."""
        if self.is_idx:
            return [name for name, _ in self.cls.resources]
        return [self.cls.split_list[part][1] for part in ("train", "test")] if self.torchvision == "SVHN" else [self.cls.filename]

    def open(self, data_dir: Path, *, train: bool, download: bool = False) -> tuple[Split, tuple[str, ...]]:
        """Return a split and the class names; raises as torchvision does."""
        which = {"split": "train" if train else "test"} if self.torchvision == "SVHN" else {"train": train}
        found = self.cls(str(data_dir), download=download, **which)
        images = torch.as_tensor(found.data)
        if images.ndim == 3:
            images = images.unsqueeze(1)  # (N, H, W) -> (N, 1, H, W)
        elif self.torchvision == "CIFAR10":
            images = images.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        labels = torch.as_tensor(found.labels if self.torchvision == "SVHN" else found.targets).long()
        return Split(images.contiguous(), labels), self.classes or tuple(found.classes)


def _published(data: _Published, data_dir: Path, announce: Announce) -> RawData:
    n_bytes = (data.n_train + data.n_test) * prod(data.shape)
    check_memory(f"dataset={data.name}", n_bytes, free_bytes(CPU), "free some memory or use a smaller set, such as dataset=digits")
    found = _on_disk(data, data_dir)
    if found is None:
        _download(data, data_dir, announce)
        found = _on_disk(data, data_dir)
    if found is None:
        raise _damaged(data, data_dir, "incomplete after the download")
    for part, split, n in (("train", found.train, data.n_train), ("test", found.test, data.n_test)):
        got = () if split is None else tuple(split.images.shape)
        if got != (n, *data.shape):
            raise _damaged(data, data_dir, f"{part} images have shape {got}, expected {(n, *data.shape)}")
    return found


def _on_disk(data: _Published, data_dir: Path) -> RawData | None:
    """Return the set, or None where it is absent.

    Raises:
        DataError: it is there and damaged.
    """
    if data.is_idx:
        _check_sizes(data, data_dir)
    try:
        train, classes = data.open(data_dir, train=True)
        test, _ = data.open(data_dir, train=False)
    except Exception as error:  # torchvision raises nearly anything on a damaged file, AssertionError included
        if isinstance(error, RuntimeError) and "not found" in str(error):
            return None
        raise _damaged(data, data_dir, _last_line(error)) from error
    return RawData(data.name, train, test, classes)


def _check_sizes(data: _Published, data_dir: Path) -> None:
    for archive in data.files:
        path = data_dir / data.folder / archive.removesuffix(".gz")
        n = data.n_train if path.name.startswith("train") else data.n_test
        expected = 16 + n * prod(data.shape) if "images" in path.name else 8 + n
        if path.is_file() and path.stat().st_size != expected:
            raise _damaged(data, path, f"has {path.stat().st_size} bytes, expected {expected}")


def _damaged(data: _Published, where: Path, why: str) -> DataError:
    return DataError(f"dataset={data.name}: damaged files: {where}: {why}: delete {where} to have it fetched anew, or use another data_dir")


def _download(data: _Published, data_dir: Path, announce: Announce) -> None:
    """Download into a folder beside the target, then move each whole file in: a broken download leaves nothing behind."""
    where = data_dir / data.folder
    way_out = f"put {', '.join(data.files)} in {where}, give the data_dir that has them, or use dataset=digits"
    is_new = not data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=data_dir))
    except OSError as error:
        reason = f"not in {where}, and data_dir={data_dir} cannot be written to download it ({error.strerror})"
        raise AbsentError(data.name, reason, way_out) from error
    try:
        (scratch / data.folder).mkdir(parents=True, exist_ok=True)
        for name in data.files:  # archives that the user put there need no network
            if (where / name).is_file():
                shutil.copyfile(where / name, scratch / data.folder / name)
        announce(f"dataset={data.name}: not in {where}: downloading it")
        with _quiet_network():
            for train in (True, False):
                data.open(scratch, train=train, download=True)
        for path in sorted(p for p in scratch.rglob("*") if p.is_file()):
            target = data_dir / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except (OSError, RuntimeError, HTTPException) as error:
        raise AbsentError(data.name, f"not in {where}, and its download failed ({_last_line(error)})", way_out) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: it holds the set
                data_dir.rmdir()


@contextmanager
def _quiet_network() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def digits(data_dir: Path, announce: Announce) -> RawData:
    """Return scikit-learn's 1797 digits, 8x8, 0..16 stretched to 0..255; bundled, so both arguments are unused."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # (N, 8, 8) -> (N, 1, 8, 8)
    return RawData("digits", Split(images.contiguous(), torch.from_numpy(bundle.target).long()), None, DIGITS)


def auto(data_dir: Path, announce: Announce) -> RawData:
    """Return mnist, or digits where mnist is absent; a damaged mnist is an error, for it was meant to be there."""
    try:
        return SOURCES["mnist"](data_dir, announce)
    except AbsentError as error:
        announce(f"dataset=auto: USING scikit-learn's 8x8 DIGITS, NOT MNIST: mnist is {error.reason}")
        return digits(data_dir, announce)


SOURCES: dict[str, Callable[[Path, Announce], RawData]] = {
    data.name: partial(_published, data)
    for data in (
        _Published("mnist", "MNIST", 60_000, 10_000, (1, 28, 28), DIGITS),
        _Published("fashion_mnist", "FashionMNIST", 60_000, 10_000, (1, 28, 28)),
        _Published("kmnist", "KMNIST", 60_000, 10_000, (1, 28, 28)),
        _Published("cifar10", "CIFAR10", 50_000, 10_000, (3, 32, 32)),
        _Published("svhn", "SVHN", 73_257, 26_032, (3, 32, 32), DIGITS),
    )
} | {"digits": digits}
