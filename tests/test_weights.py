"""Initial weights: of a seed and a layer's name, so that the arms of a comparison start alike wherever their shapes agree."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stn_pipeline.config import TrainConfig
from stn_pipeline.model import Network, build
from stn_pipeline.model.layers import CoordConv2d
from stn_pipeline.model.network import _initialise
from stn_pipeline.transforms import TRANSFORMS

LAYERS: list[dict[str, Any]] = [{}, {"coordconv": True}, {"coordconv": True, "coordconv_r": True}]
ARMS = [
    {"transform": transform, "arch": arch, **layers}
    for transform in ("none", *TRANSFORMS)
    for arch in ("report", "stcnn")
    for layers in LAYERS
] + [{"iterations": 2}, {"supersample": 2}, {"cpab_cells": 4, "transform": "cpab"}, {"batch_size": 7, "lr": 0.1, "padding": "border"}]
FAMILY = "transformer.localisation.theta"  # starts at the identity of the arm's family


def weights(**knobs: Any) -> dict[str, Tensor]:
    network = build(TrainConfig(dataset="digits", **({"seed": 5} | knobs)), (1, 28, 28), 10)
    return {name: weight for name, weight in network.named_parameters() if not name.startswith(FAMILY)}


def test_over_all_pairs_of_arms_equal_shapes_start_equal():
    """But for the bias of a layer that has other inputs in another architecture: torch draws it smaller, the more there are."""
    drawn = [(arm.get("arch", "report"), weights(**arm)) for arm in ARMS]
    n_equal = 0
    for (arch, one), (other_arch, other) in itertools.combinations(drawn, 2):
        for name in one.keys() & other.keys():
            weight = name.replace(".bias", ".weight")
            if one[name].shape == other[name].shape and (arch == other_arch or one[weight].shape == other[weight].shape):
                n_equal += 1
                assert torch.equal(one[name], other[name]), name
    assert n_equal > 4500


@pytest.mark.parametrize("layers", LAYERS[1:], ids=["xy", "xyr"])
@pytest.mark.parametrize("arch", ["report", "stcnn"])
def test_coordconv_starts_as_the_plain_layer_with_more_channels(arch, layers):
    plain, coord = weights(arch=arch), weights(arch=arch, **layers)
    convolutions = [name for name in plain if name.endswith("conv.weight")]
    assert len(convolutions) == 4 and all(torch.equal(plain[name], coord[name]) for name in plain if name.endswith("bias"))
    for name in convolutions:
        n_shared, n_all = plain[name].shape[1], coord[name].shape[1]
        shared, coordinates = coord[name][:, :n_shared], coord[name][:, n_shared:]
        torch.testing.assert_close(shared, plain[name] * math.sqrt(n_shared / n_all))
        bound = 1 / math.sqrt(n_all * plain[name][0, 0].numel())  # torch's, of a layer of as many channels
        for part in (shared, coordinates):
            assert 0.9 * bound < part.abs().max() <= bound * (1 + 1e-6)
            assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_a_coordconv_layer_alone_is_drawn_by_torchs_seed():
    def layer() -> CoordConv2d:
        return CoordConv2d(3, 4, 3, 0, (8, 8), True)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = layer()
        torch.manual_seed(1)
        other, third = layer(), layer()
    assert torch.equal(one.weight, other.weight) and not torch.equal(one.weight, third.weight)


class Own(nn.Module):
    """A layer of a kind that torch does not have: its numbers are drawn when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))


def with_layers(seed: int, torch_seed: int) -> dict[str, Tensor]:
    """A network that has layers of other kinds, made after torch's generator was used for something."""
    kinds = {
        "norm": lambda: nn.BatchNorm2d(3),
        "attention": lambda: nn.MultiheadAttention(4, 2),
        "embedding": lambda: nn.Embedding(5, 3),
        "gru": lambda: nn.GRU(3, 4),
        "bilinear": lambda: nn.Bilinear(2, 3, 4),
        "deep": lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.PReLU()),
    }
    torch.manual_seed(torch_seed)
    network = build(TrainConfig(dataset="digits", transform="none"), (1, 8, 8), 10)
    for name, make in kinds.items():
        network.add_module(name, make())
    _initialise(network, seed)
    return {name: tensor.detach() for name, tensor in network.named_parameters()}


def test_layers_of_every_kind_are_drawn_from_the_seed_and_their_name():
    with torch.random.fork_rng():
        one, same, other = with_layers(5, 1), with_layers(5, 2), with_layers(6, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if one[name].unique().numel() > 1]  # a norm's weights are ones
    assert len(drawn) > 12 and not any(torch.equal(one[name], other[name]) for name in drawn)


def test_what_cannot_be_drawn_again_is_drawn_from_the_seed_all_the_same(monkeypatch):
    class WithOwn(Network):
        def __init__(self, *given: Any) -> None:
            own = Own()
            super().__init__(*given)
            self.own = own

    monkeypatch.setattr("stn_pipeline.model.network.Network", WithOwn)
    with torch.random.fork_rng():
        drawn = []
        for torch_seed, seed in ((1, 5), (2, 5), (1, 6)):
            torch.manual_seed(torch_seed)
            drawn.append(build(TrainConfig(dataset="digits", seed=seed), (1, 8, 8), 10).get_parameter("own.scale"))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
