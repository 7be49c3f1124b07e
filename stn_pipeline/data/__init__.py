"""Sources -> splits, distorted where asked, resident on the device as uint8."""

from collections.abc import Callable

import numpy as np
import torch

from stn_pipeline.config import FOLDER, TrainConfig
from stn_pipeline.data import folder, sources
from stn_pipeline.data.decoding import Reading
from stn_pipeline.data.distortions import canvas_share
from stn_pipeline.data.sources import SOURCES, check_memory, free_bytes
from stn_pipeline.data.splits import RawData, Split, Splits, distorted
from stn_pipeline.data.splitting import cut_test, reading_of, split
from stn_pipeline.errors import ConfigError, DataError
from stn_pipeline.paths import expanded
from stn_pipeline.texts import say

__all__ = ["SOURCES", "RawData", "Reading", "Split", "Splits", "load", "load_to_score", "prepare", "read"]

Announce = Callable[[str], object]


def _silent(line: str) -> None:
    """Tell nobody."""


def load(config: TrainConfig, device: torch.device | None = None, announce: Announce = say) -> Splits:
    """Return the train, val and test splits of `config.dataset`.

    A data set asked for by name never falls back; auto is mnist, or else digits, and says so.

    Args:
        config: dataset, data_dir, image_size, distortion, draws, val_fraction and seed are read.
        device: where the images shall lie; None is the CPU.
        announce: told, a line at a time, what the user should know (a download, a fallback, ignored files, a resize).

    Returns:
        Splits whose images are uint8 (N, C, H, W) and labels int64 (N,). The test split never depends on the seed.

    Raises:
        DataError: the set is absent, damaged, too small to be split, or too large for half of the free memory.
    """
    return prepare(read(config, announce), config, device, announce)


def load_to_score(
    config: TrainConfig, which: str, reading: Reading | None = None, device: torch.device | None = None, announce: Announce = say
) -> Splits:
    """Return splits of which one is to be scored by a network that is there already; train and val may be empty beside a test split.

    So a folder that has only test/, or few of the classes, will do.

    Args:
        config: as load reads it.
        which: the split: train, val or test.
        reading: how a folder's images are to be read: as those were that the network was trained on.
        device: as of load.
        announce: as of load.

    Raises:
        DataError: as load does, or the split is not there.
    """
    raw = read(config, announce, to_score=which, reading=reading)
    if which != "test":
        return prepare(raw, config, device, announce)
    test = cut_test(raw, announce)[1]
    nothing = test.take(np.arange(0))
    return _placed(Splits(nothing, nothing, test, raw.classes, raw.name, reading_of(raw)), config, device)


def read(config: TrainConfig, announce: Announce = say, *, to_score: str = "", reading: Reading | None = None) -> RawData:
    """Return what the source of `config.dataset` gives: dataset, data_dir and image_size are read.

    Args:
        config: the knobs.
        announce: told what the user should know.
        to_score: the split that alone is wanted of a folder, to be scored; empty where a network is to be trained.
        reading: how a folder's images are to be read; it overrules image_size.

    Raises:
        DataError: the set is absent, damaged, or too large for half of the free memory.
    """
    if config.dataset.startswith(FOLDER):
        path = config.dataset.removeprefix(FOLDER)
        return folder.read(path, config.image_size, announce, to_score=to_score, reading=reading)
    if config.image_size:
        raise DataError(f"image_size={config.image_size}: only {FOLDER}PATH is resized, got dataset={config.dataset}: give image_size=0")
    try:
        data_dir = expanded(config.data_dir)
    except ConfigError as error:
        raise ConfigError(f"data_dir={config.data_dir}: {error}") from error
    return sources.auto(data_dir, announce) if config.dataset == "auto" else SOURCES[config.dataset](data_dir, announce)


def prepare(raw: RawData, config: TrainConfig, device: torch.device | None = None, announce: Announce = _silent) -> Splits:
    """Return the splits of `raw` on a device: distortion, draws, val_fraction and seed are read.

    Raises:
        DataError: the set is too small to be split, or too large for half of the free memory.
    """
    return _placed(split(raw, config.val_fraction, config.seed, announce), config, device)


def _placed(splits: Splits, config: TrainConfig, device: torch.device | None) -> Splits:
    """Return splits on a device, distorted where asked."""
    device = device or torch.device("cpu")
    n_bytes = sum(part.images.numel() for part in (splits.train, splits.val, splits.test))
    if device.type == "cuda":
        check_memory(f"dataset={splits.dataset} on {device}", n_bytes, free_bytes(device), "give device=cpu or a smaller set")
    splits = splits.to(device)
    if config.distortion == "none":
        return splits
    n_distorted = int(2 * n_bytes * canvas_share(config.distortion) * config.draws)
    check_memory(f"distortion={config.distortion} of {splits.name}", n_distorted, free_bytes(device), "give fewer draws or a smaller set")
    return distorted(splits, config.distortion, config.draws, config.seed)
