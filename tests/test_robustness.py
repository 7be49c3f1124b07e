"""Accuracy against rotation, scale and shift, on a network whose answers are known."""

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from stn_pipeline import figures
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split
from stn_pipeline.data.distortions import show, similar
from stn_pipeline.model import build
from stn_pipeline.training.robustness import SWEPT, plain, robustness


class Upright(nn.Module):
    """Tells 1 where the upper half is brighter than the lower one, 0 otherwise; its class stands for a network's."""

    def forward(self, images):
        brighter = images[:, :, :5].mean((1, 2, 3)) > images[:, :, 5:].mean((1, 2, 3)) + 1e-3
        return torch.stack((~brighter, brighter), dim=1).float()


@pytest.fixture
def network():
    network = build(TrainConfig.parse({"transform": "none"}), (1, 10, 10), 2).eval()
    network.forward = Upright().forward
    return network


@pytest.fixture
def split():
    images = torch.zeros(40, 1, 10, 10, dtype=torch.uint8)
    images[:20, :, 1:4, 3:7] = 200  # bright above: class 1
    images[20:, :, 6:9, 3:7] = 200
    return Split(images, torch.arange(40) // 20 ^ 1)


def test_accuracy_falls_where_the_answer_turns_and_nowhere_else(network, split):
    curves = robustness(network, split, 40)
    assert {name: tuple(point.value for point in points) for name, points in curves.items()} == {
        name: values for name, (_, values) in SWEPT.items()
    }
    by_angle = {point.value: point.accuracy for point in curves["rotation"]}
    assert by_angle[0] == by_angle[60] == by_angle[-60] == 1 and by_angle[90] < 1
    assert all(point.accuracy == 1 for point in curves["scale"] + curves["shift"])


def test_each_point_is_the_score_of_those_images_with_wilsons_interval(network, split):
    point = next(point for point in robustness(network, split, 40)["rotation"] if point.value == 90)
    turned = show(
        split.images, "affine", similar(torch.full((40,), 90.0), torch.ones(40), torch.zeros(40, 2), (10, 10), (10, 10)), (10, 10)
    )
    right = int((network(turned.float() / 255).argmax(1) == split.labels).sum())
    interval = binomtest(right, 40).proportion_ci(0.95, method="wilson")
    assert (point.accuracy, point.low, point.high) == pytest.approx((right / 40, interval.low, interval.high))


def test_smaller_images_stand_in_the_middle(network, split):
    seen = []
    network.image_shape = (1, 16, 14)
    network.forward = lambda images: seen.append(images) or torch.zeros(len(images), 2)
    robustness(network, split, 40)
    upright = seen[6]  # of 13 rotations
    assert torch.equal((255 * upright[:, :, 3:13, 2:12]).round().byte(), split.images) and upright.shape == (40, 1, 16, 14)


def test_it_is_written_with_its_units_and_drawn(network, split):
    curves = robustness(network, split, 10)
    told = plain(curves)
    assert told["rotation"]["unit"] == "degrees, clockwise" and told["rotation"]["points"][0]["value"] == -90
    rows = {
        name: (SWEPT[name][0], torch.tensor([[p.value, p.accuracy, p.low, p.high] for p in points]).numpy())
        for name, points in curves.items()
    }
    figure = figures.robustness(rows, "x")
    assert [axes.get_xlabel() for axes in figure.axes] == [f"{name}, {unit}" for name, (unit, _) in SWEPT.items()]


def test_oblong_images_are_turned_without_shear(network):
    seen, images = [], torch.zeros(4, 1, 10, 30, dtype=torch.uint8)
    images[:, :, 2:8, 12:18] = torch.arange(1, 37, dtype=torch.uint8).view(6, 6) * 7
    network.image_shape = (1, 10, 30)
    network.forward = lambda given: seen.append(given) or torch.zeros(len(given), 2)
    robustness(network, Split(images, torch.tensor([0, 1, 0, 1])), 4)
    for at, turns in ((0, 1), (12, -1)):  # 90 degrees either way, the first and the last of 13 rotations
        assert torch.equal((255 * seen[at][:, :, :, 10:20]).round().byte(), images[:, :, :, 10:20].rot90(turns, dims=(2, 3)))
