"""The loops that people write, by us: the report's, a plain one on resident tensors, Lightning's.

They share the network of the PyTorch tutorial, which is the report's, and are independent of the engine.
"""

import importlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from stn_pipeline.data import Split, Splits
from stn_pipeline.errors import ConfigError


class ReportNet(nn.Module):
    """The report's network as the PyTorch tutorial writes it, sizes derived: images (B, C, H, W) -> log-probabilities (B, K).

    The independent definition that the engine's network is tested and timed against.
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], n_classes: int) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(in_channels, 8, 7), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 10, 5), nn.MaxPool2d(2), nn.ReLU()
        )
        theta = nn.Linear(32, 6)
        theta.weight.data.zero_()
        theta.bias.data.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
        self.fc_loc = nn.Sequential(nn.Linear(10 * _area(image_size, 7), 32), nn.ReLU(), theta)
        self.conv1 = nn.Conv2d(in_channels, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.drop = nn.Dropout2d()
        self.fc1 = nn.Linear(20 * _area(image_size, 5), 50)
        self.fc2 = nn.Linear(50, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities."""
        theta = self.fc_loc(self.localization(x).flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2))
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def _area(image_size: tuple[int, int], first: int) -> int:
    """Return the pixels left of an image by a kernel of side `first` and one of 5, each followed by pooling."""
    height, width = (((side - first + 1) // 2 - 5 + 1) // 2 for side in image_size)
    return height * width


def report_net(splits: Splits) -> ReportNet:
    """Return the report's network for these images, on their device."""
    channels, height, width = splits.image_shape
    return ReportNet(channels, (height, width), splits.n_classes).to(splits.train.images.device)


def report_epochs(splits: Splits, batch_size: int, workers: int, lr: float = 0.01) -> Iterator[ReportNet]:
    """Train as the report does, an epoch a turn: per-item transforms of PIL images in a DataLoader, Adam; yield the network."""
    loader = report_loader(splits, splits.train, batch_size, workers, shuffle=True)
    device, network = splits.train.images.device, report_net(splits)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    while True:
        network.train()
        for data, target in loader:
            data, target = data.to(device), target.to(device)
            optimizer.zero_grad()
            loss = F.nll_loss(network(data), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield network


def report_loader(splits: Splits, split: Split, batch_size: int, workers: int, shuffle: bool) -> DataLoader[tuple[Tensor, int]]:
    """Return a DataLoader over a split with the report's per-item transforms."""
    pinned = split.images.device.type == "cuda"
    return DataLoader(Items(splits, split), batch_size=batch_size, shuffle=shuffle, num_workers=workers, pin_memory=pinned)


class Items(Dataset[tuple[Tensor, int]]):
    """A split as torchvision's data sets give it: a PIL image at a time, transformed when it is asked for."""

    def __init__(self, splits: Splits, split: Split):
        self.images, self.labels = split.images.cpu(), split.labels.cpu().tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(splits.mean.tolist(), splits.std.tolist())])

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a normalised image (C, H, W) and its label."""
        return self.transform(to_pil_image(self.images[index])), self.labels[index]


def resident_epochs(splits: Splits, batch_size: int, lr: float = 0.01) -> Iterator[ReportNet]:
    """Train the report's network on images that are normalised once and stay on the device; otherwise plainly."""
    train, network = splits.train, report_net(splits)
    images = (train.images.float() / 255 - splits.mean.to(train.images.device)[:, None, None]) / splits.std.to(train.images.device)[
        :, None, None
    ]
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    while True:
        network.train()
        for picked in torch.split(torch.randperm(len(train), device=images.device), batch_size):
            optimizer.zero_grad()
            F.nll_loss(network(images[picked]), train.labels[picked]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield network


def lightning_epochs(splits: Splits, batch_size: int, workers: int, lr: float = 0.01) -> Iterator[float]:
    """Train the report's network by Lightning's Trainer with the same DataLoader; yield seconds of its training epoch.

    Raises: ConfigError where Lightning is not installed.
    """
    lightning = lightning_or_none()
    if lightning is None:
        raise ConfigError("lightning: is not installed: pip install lightning")
    logging.getLogger(lightning.__name__).setLevel(logging.ERROR)
    loader = report_loader(splits, splits.train, batch_size, workers, shuffle=True)
    seconds: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = report_net(splits)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.nll_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=lr)

        def on_train_epoch_start(self) -> None:
            seconds.append(-time.perf_counter())

        def on_train_epoch_end(self) -> None:
            seconds[-1] += time.perf_counter()

    module = Module()
    kind = "gpu" if splits.train.images.device.type == "cuda" else "cpu"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    while True:
        lightning.Trainer(max_epochs=1, accelerator=kind, devices=1, **quiet).fit(module, loader)
        yield seconds[-1]


def lightning_or_none() -> Any:
    """Return Lightning's package where it is installed."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None
