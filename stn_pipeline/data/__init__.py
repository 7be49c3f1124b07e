"""Sources -> splits, distorted where asked, resident on the device as uint8."""

from collections.abc import Callable

import torch

from stn_pipeline.config import FOLDER, TrainConfig
from stn_pipeline.data import folder, sources
from stn_pipeline.data.distortions import canvas_share
from stn_pipeline.data.sources import SOURCES, check_memory, free_bytes
from stn_pipeline.data.splits import RawData, Split, Splits, distorted, split
from stn_pipeline.errors import ConfigError, DataError
from stn_pipeline.paths import expanded
from stn_pipeline.texts import say

__all__ = ["SOURCES", "RawData", "Split", "Splits", "load", "prepare", "read"]


def load(config: TrainConfig, device: torch.device | None = None, announce: Callable[[str], object] = say) -> Splits:
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
    return prepare(read(config, announce), config, device)


def read(config: TrainConfig, announce: Callable[[str], object] = say) -> RawData:
    """Return what the source of `config.dataset` gives: dataset, data_dir and image_size are read.

    Raises:
        DataError: the set is absent, damaged, or too large for half of the free memory.
    """
    if config.dataset.startswith(FOLDER):
        return folder.read(config.dataset.removeprefix(FOLDER), config.image_size, announce)
    if config.image_size:
        raise DataError(f"image_size={config.image_size}: only {FOLDER}PATH is resized, got dataset={config.dataset}: give image_size=0")
    try:
        data_dir = expanded(config.data_dir)
    except ConfigError as error:
        raise ConfigError(f"data_dir={config.data_dir}: {error}") from error
    return sources.auto(data_dir, announce) if config.dataset == "auto" else SOURCES[config.dataset](data_dir, announce)


def prepare(raw: RawData, config: TrainConfig, device: torch.device | None = None) -> Splits:
    """Return the splits of `raw` on a device: distortion, draws, val_fraction and seed are read.

    Raises:
        DataError: the set is too small to be split, or too large for half of the free memory.
    """
    device = device or torch.device("cpu")
    if device.type == "cuda":
        check_memory(f"dataset={raw.name} on {device}", raw.n_bytes, free_bytes(device), "give device=cpu or a smaller set")
    splits = split(raw, config.val_fraction, config.seed).to(device)
    if config.distortion == "none":
        return splits
    n_bytes = int(2 * raw.n_bytes * canvas_share(config.distortion) * config.draws)
    check_memory(f"distortion={config.distortion} of {raw.name}", n_bytes, free_bytes(device), "give fewer draws or a smaller set")
    return distorted(splits, config.distortion, config.draws, config.seed)
