"""How accuracy falls as the images are turned, scaled and shifted: what a transformer is for."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from stn_pipeline.data import Split
from stn_pipeline.data.distortions import show, similar
from stn_pipeline.model import Network
from stn_pipeline.training.scores import accuracy_interval, score

SWEPT = {  # by what is done to the images: its unit, and how much of it
    "rotation": ("degrees, clockwise", tuple(range(-90, 91, 15))),
    "scale": ("times the size", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)),
    "shift": ("share of the width, to the right", (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)),
}


@dataclass(frozen=True)
class Point:
    """Accuracy, 0..1, and its 95 % interval by Wilson on images turned, scaled or shifted by a value."""

    value: float
    accuracy: float
    low: float
    high: float


def robustness(network: Network, split: Split, n_images: int) -> dict[str, list[Point]]:
    """Return accuracy by rotation, scale and shift, on at most n_images of a split, the same ones everywhere.

    Smaller images than the network was built for, as undistorted ones may be, stand in the middle.
    """
    chosen = split.spread(n_images)
    images, labels = split.images[chosen], split.labels[chosen]
    size, canvas, n = (images.shape[2], images.shape[3]), network.image_shape[1:], len(images)
    curves: dict[str, list[Point]] = {}
    for name, (_, values) in SWEPT.items():
        curves[name] = []
        for value in values:
            angle, scale, shift = torch.zeros(n), torch.ones(n), torch.zeros(n, 2)
            if name == "rotation":
                angle += value
            elif name == "scale":
                scale *= value
            else:
                shift[:, 0] = value * size[1]
            scores = score(network, Split(show(images, "affine", similar(angle, scale, shift, size, canvas), canvas), labels))
            curves[name].append(Point(float(value), scores.accuracy, *accuracy_interval(scores)))
    return curves


def plain(curves: dict[str, list[Point]]) -> dict[str, Any]:
    """Return the curves ready for JSON, with their units."""
    return {name: {"unit": SWEPT[name][0], "points": [asdict(point) for point in points]} for name, points in curves.items()}
