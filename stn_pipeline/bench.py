"""How fast is the training loop beside the one people write: `python -m stn_pipeline.bench --dataset mnist`.

The reference is the report's own way: a DataLoader with per-item transforms, the network as the PyTorch tutorial has
it, Adam. Both loops train whole epochs in turn, so that a drifting machine slows both.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from stn_pipeline import cli
from stn_pipeline.config import DATASET_HELP, DEVICE_HELP, DatasetName, DeviceName, Knobs, TrainConfig, knob
from stn_pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from stn_pipeline.data import Split, Splits


def _numbers(text: Any) -> str:
    words = str(text).split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError("must be whole numbers with commas between, such as 0,2,4")
    return ",".join(words)


class BenchConfig(Knobs):
    """One comparison of speeds."""

    dataset: DatasetName = knob("auto", help=DATASET_HELP)
    data_dir: str = knob("data", help="folder of the torchvision sets")
    transform: str = knob("affine", help="family of warps of our engine; the reference is always affine")
    batch_size: int = knob(64, help="images a step", unit="images", ge=1)
    repeats: int = knob(3, help="epochs of each loop, in turn, after one that is not counted", ge=1)
    workers: Annotated[str, BeforeValidator(_numbers)] = knob("0,2,4", help="DataLoader workers of the reference loops")
    device: DeviceName = knob("auto", help=DEVICE_HELP)
    out: str = knob("", help="file for the figures as JSON; none by default")


def report_net(in_channels: int, image_size: tuple[int, int], n_classes: int) -> "torch.nn.Module":
    """Return the report's network as the PyTorch tutorial writes it, sizes derived: images (B, C, H, W) -> log-probabilities.

    The independent definition that the engine's network is tested and timed against.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    def after(side: int, kernel: int) -> int:
        return (side - kernel + 1) // 2

    class ReportNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            height, width = image_size
            features = 10 * after(after(height, 7), 5) * after(after(width, 7), 5)
            self.localization = nn.Sequential(
                nn.Conv2d(in_channels, 8, 7), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 10, 5), nn.MaxPool2d(2), nn.ReLU()
            )
            theta = nn.Linear(32, 6)
            theta.weight.data.zero_()
            theta.bias.data.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
            self.fc_loc = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), theta)
            self.conv1 = nn.Conv2d(in_channels, 10, 5)
            self.conv2 = nn.Conv2d(10, 20, 5)
            self.drop = nn.Dropout2d()
            self.fc1 = nn.Linear(20 * after(after(height, 5), 5) * after(after(width, 5), 5), 50)
            self.fc2 = nn.Linear(50, n_classes)

        def forward(self, x: Tensor) -> Tensor:
            theta = self.fc_loc(self.localization(x).flatten(1)).view(-1, 2, 3)
            grid = F.affine_grid(theta, list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, align_corners=False)
            x = F.relu(F.max_pool2d(self.conv1(x), 2))
            x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2))
            x = F.dropout(F.relu(self.fc1(x.flatten(1))), training=self.training)
            return F.log_softmax(self.fc2(x), dim=1)

    return ReportNet()


def reference_epochs(
    splits: "Splits", batch_size: int, workers: int, device: "torch.device", lr: float = 0.01
) -> Iterator["torch.nn.Module"]:
    """Train as the report does, an epoch a turn: per-item transforms of PIL images in a DataLoader, Adam; yield the network."""
    import torch
    import torch.nn.functional as F

    loader = reference_loader(splits, splits.train, batch_size, workers, device, shuffle=True)
    channels, *size = splits.image_shape
    network = report_net(channels, (size[0], size[1]), splits.n_classes).to(device)
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


def reference_loader(splits: "Splits", split: "Split", batch_size: int, workers: int, device: "torch.device", shuffle: bool) -> Any:
    """Return a DataLoader over a split with the report's per-item transforms."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    per_item = transforms.Compose([transforms.ToTensor(), transforms.Normalize(splits.mean.tolist(), splits.std.tolist())])
    images, labels = split.images.cpu(), split.labels.cpu().tolist()

    class Items(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return per_item(to_pil_image(images[index])), labels[index]

    return DataLoader(Items(), batch_size=batch_size, shuffle=shuffle, num_workers=workers, pin_memory=device.type == "cuda")


def engine_epochs(splits: "Splits", config: TrainConfig) -> Iterator[float]:
    """Train with our engine, an epoch a turn, yielding the share of it that went into training alone."""
    from stn_pipeline.model import build
    from stn_pipeline.training import fit

    network = build(config, splits.image_shape, splits.n_classes, splits.mean, splits.std).to(splits.train.images.device)
    for epoch in fit(network, splits.train, splits.val, config):
        yield len(splits.train) / epoch.record.images_per_s


def measure(loops: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return seconds a call of each loop: called in turn, `repeats` times after one that is not counted.

    A loop that returns a number is believed: its own seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats + 1):
        for name, call in loops.items():
            started = time.perf_counter()
            own = call()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def bench(argv: Sequence[str]) -> None:
    """Time as the flags say, print ratios and, where asked, write JSON."""
    knobs = BenchConfig.parse(cli.parse(BenchConfig, argv, "Time the training loop against the report's."))
    if knobs.out and not Path(knobs.out).parent.is_dir():
        raise ConfigError(f"out={knobs.out}: no folder {Path(knobs.out).parent}: make it first")

    import torch

    from stn_pipeline.data import load
    from stn_pipeline.model.layers import UNPADDED_SIDE
    from stn_pipeline.training.device import describe, resolve

    device = resolve(knobs.device)
    shared = {"dataset": knobs.dataset, "data_dir": knobs.data_dir, "batch_size": knobs.batch_size, "transform": knobs.transform}
    config = TrainConfig.parse(shared | {"epochs": knobs.repeats + 1})
    splits = load(config, device)
    if min(splits.image_shape[1:]) < UNPADDED_SIDE:
        raise ConfigError(f"dataset={splits.dataset}: the report's network needs images of {UNPADDED_SIDE} px a side: give dataset=mnist")
    loops: dict[str, Callable[[], object]] = {}
    ours = engine_epochs(splits, config)
    loops["engine"] = lambda: next(ours)
    for workers in map(int, knobs.workers.split(",")):
        reference = reference_epochs(splits, knobs.batch_size, workers, device)
        loops[f"report's loop, {workers} workers"] = lambda epochs=reference: next(epochs)  # type: ignore[misc]
    seconds = measure(loops, knobs.repeats)

    what = f"{splits.dataset}, {len(splits.train)} images, batch {knobs.batch_size}, {knobs.transform}, fp32"
    print(f"{what}, {describe(device)}, torch {torch.__version__}")
    print(f"{'training alone, s/epoch':<28}{'median':>8}{'min':>8}{'max':>8}{'x engine':>10}")
    for name, values in seconds.items():
        ratio = median(value / own for value, own in zip(values, seconds["engine"], strict=True))
        print(f"{name:<28}{median(values):>8.2f}{min(values):>8.2f}{max(values):>8.2f}{ratio:>10.2f}")
    if knobs.out:
        machine = {"device": describe(device), "torch": torch.__version__, "python": platform.python_version()}
        figures = {"knobs": knobs.model_dump(exclude={"data_dir", "out"}), "n_train": len(splits.train), "seconds_an_epoch": seconds}
        Path(knobs.out).write_text(json.dumps(machine | figures, indent=1) + "\n")


def main() -> None:
    """Run the entry point."""
    cli.run(bench)


if __name__ == "__main__":
    main()
