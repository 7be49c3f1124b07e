"""The layer in anybody's hands: thetas that run away, images that are not square, empty batches, half precision.

Every family keeps what is promised here.
"""

import copy
import math
import shutil
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split
from stn_pipeline.errors import DataError, DivergedError
from stn_pipeline.model import Network, SpatialTransformer, build
from stn_pipeline.model.layers import Stage
from stn_pipeline.training.fit import fit
from stn_pipeline.training.robustness import robustness
from stn_pipeline.training.scores import score
from stn_pipeline.transforms import TRANSFORMS, lattice
from stn_pipeline.transforms.sampler import FAR, PADDINGS, sample

OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "all": {"coordconv": True, "coordconv_r": True, "iterations": 2, "supersample": 2}}
RUN_AWAY = (math.nan, math.inf, -math.inf, 1e20, -1e30, 3e38, -3e38)
LARGEST = torch.finfo(torch.float32).max
OBLONG = [(16, 48), (48, 16), (20, 28)]

every_family = pytest.mark.parametrize("transform", TRANSFORMS)
every_padding = pytest.mark.parametrize("padding", PADDINGS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
oblong = pytest.mark.parametrize("size", OBLONG, ids=str)
law = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def layer_of(transform: str, size: int | tuple[int, int] = (12, 16), std: float = 0.05, **options: Any) -> SpatialTransformer:
    """A layer whose localiser says something else of each image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SpatialTransformer(1, size, transform, **options)
        nn.init.normal_(layer.localisation.theta.weight, std=std)
    return layer


def saying(theta: list[float] | Tensor, transform: str, size: tuple[int, int], **options: Any) -> SpatialTransformer:
    """A layer that says the same theta (P,) of every image."""
    layer = SpatialTransformer(1, size, transform, **options)
    with torch.no_grad():
        layer.localisation.theta.bias.copy_(torch.as_tensor(theta))
    return layer


def network_of(shape: tuple[int, int, int] = (1, 12, 16), **knobs: object) -> Network:
    return build(TrainConfig.parse(knobs), shape, 3, torch.full((shape[0],), 0.3), torch.full((shape[0],), 0.4)).eval()


def use_kernels(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, (Stage, SpatialTransformer)):
            each.use_kernel()


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
with_and_without_kernels = pytest.mark.parametrize(
    ("options", "kernels"),
    [
        pytest.param({}, False, id="plain"),
        pytest.param(OPTIONS["all"], False, id="all"),
        pytest.param({"iterations": 2, "supersample": 2}, True, marks=needs_compiler, id="kernels"),
    ],
)


# Thetas that run away


@every_family
@every_padding
@every_option
def test_no_theta_kills_the_process_and_what_is_not_finite_is_seen(transform: str, padding: str, options: dict[str, Any]) -> None:
    layer, x = SpatialTransformer(1, (6, 8), transform, padding=padding, **options), images(len(RUN_AWAY), 1, 6, 8).requires_grad_()
    theta = torch.tensor(RUN_AWAY)[:, None].repeat(1, layer.transform.n_params).requires_grad_()
    layer.localisation.forward = lambda seen: theta  # type: ignore[method-assign]
    warped, grid = layer(x, return_grid=True)
    bad, near = ~grid.isfinite().all(dim=-1)[:, None], (grid.abs() < LARGEST / 1000).all(dim=-1)[:, None]
    assert warped[bad].isnan().all() and warped[near].isfinite().all()
    assert bad[:1].all()
    warped.sum().backward()
    assert x.grad is not None and theta.grad is not None


coordinate = st.floats(-3, 3, width=32) | st.floats(width=32)


@law
@every_padding
@given(places=st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=40))
def test_a_point_that_is_not_finite_reads_nan_and_changes_no_other(padding: str, places: list[tuple[float, float]]) -> None:
    image, points = images(1, 2, 5, 7).requires_grad_(), torch.tensor(places).view(1, 1, -1, 2).requires_grad_()
    read = sample(image, points, padding)
    read.sum().backward()
    finite = points.isfinite().all(dim=-1)[0, 0]
    assert read[..., ~finite].isnan().all()
    near = finite & (points.detach().abs() < FAR).all(dim=-1)[0, 0]
    assert read[..., near].isfinite().all()
    alone = points.detach()[:, :, near].requires_grad_()
    true = F.grid_sample(image.detach(), alone, padding_mode=padding, align_corners=False)
    assert torch.equal(read[..., near], true)
    assert points.grad is not None and torch.equal(points.grad[:, :, near], torch.autograd.grad(true.sum(), alone)[0])


@every_padding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sampler_and_its_gradients_are_torchs_to_the_last_bit(padding: str, dtype: torch.dtype) -> None:
    image, points = images(3, 2, 9, 11).to(dtype), 4 * images(3, 8, 6, 2, seed=1).to(dtype) - 2
    above = images(3, 2, 8, 6, seed=2).to(dtype)

    def value_and_gradients(sampler: Any) -> list[Tensor]:
        leaves = [image.clone().requires_grad_(), points.clone().requires_grad_()]
        value = sampler(*leaves)
        return [value, *torch.autograd.grad(value, leaves, above)]

    ours = value_and_gradients(lambda image, points: sample(image, points, padding))
    true = value_and_gradients(lambda image, points: F.grid_sample(image, points, padding_mode=padding, align_corners=False))
    for one, other in zip(ours, true, strict=True):
        assert torch.equal(one, other)


def test_points_far_out_read_the_edge_of_their_own_side_or_nothing() -> None:
    image = images(1, 1, 4, 6)
    for far in (1e10, 1e30, 1e38):
        corners = torch.tensor([[-far, -far], [far, -far], [-far, far], [far, far]]).view(1, 2, 2, 2)
        assert torch.equal(sample(image, corners, "border"), image[:, :, ::3, ::5])
        reflection = sample(image, corners, "reflection")
        assert ((reflection >= image.min()) & (reflection <= image.max())).all()
        if far < LARGEST / 1000:
            assert torch.equal(sample(image, corners, "zeros"), torch.zeros(1, 1, 2, 2))


@every_padding
@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=needs_compiler)])
@pytest.mark.parametrize("transform", ["similarity", "cpab"])
def test_a_localiser_that_diverges_ends_the_training_by_name(padding: str, transform: str, compile: str) -> None:
    config = TrainConfig.parse({"transform": transform, "padding": padding, "epochs": 1, "device": "cpu", "compile": compile})
    network = network_of(transform=transform, padding=padding)
    with torch.no_grad():
        network.transformer.localisation.theta.bias.fill_(math.nan)
    split = Split((255 * images(4, 1, 12, 16)).byte(), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(DivergedError, match="training loss is nan at epoch 1, step 1 of 1"):
        list(fit(network, split, split, config))


@every_padding
def test_an_image_whose_theta_is_not_finite_spoils_no_other(padding: str) -> None:
    layer, x = layer_of("affine", padding=padding), images(3, 1, 12, 16)
    before = layer(x)
    x[1, 0, 2, 2] = math.nan
    after = layer(x)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and after[1].isnan().all()


# Images that are not square

part = st.floats(-1, 1)


@law
@given(theta=st.tuples(part, part, part, part), size=st.sampled_from([*OBLONG, (9, 9)]), looks=st.integers(1, 3), out=st.booleans())
def test_a_similarity_scales_and_turns_pixels_whatever_the_images_sides(
    theta: tuple[float, ...], size: tuple[int, int], looks: int, out: bool
) -> None:
    """And so do several composed, and where the output is of another size: what is turned is the image that is read."""
    layer = saying(list(theta), "similarity", size, iterations=looks, output_size=(7, 10) if out else None)
    half = torch.tensor((size[1], size[0])) / 2
    _, grid = layer(images(1, 1, *size), return_grid=True)
    height, width = layer.output_size
    across, down = half / torch.tensor([width / 2, 1]), half / torch.tensor([1, height / 2])  # px of the image a step of the output
    x_axis = (grid[0, 0, 1] - grid[0, 0, 0]) * half / across[0]
    y_axis = (grid[0, 1, 0] - grid[0, 0, 0]) * half / down[1]
    scale, angle = math.exp(looks * theta[0]), looks * theta[1]
    true = scale * torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(torch.stack((x_axis, y_axis)), true, atol=2e-4, rtol=2e-4)


@oblong
def test_a_quarter_turn_on_an_oblong_image_is_clockwise_and_keeps_its_shapes(size: tuple[int, int]) -> None:
    """A point of the output is read a quarter turn clockwise from it, so what is seen has turned back by as much."""
    height, width = size
    x, side = images(2, 1, *size), min(size)
    rows, columns = (slice((whole - side) // 2, (whole + side) // 2) for whole in size)
    turned = saying([0, math.pi / 2, 0, 0], "similarity", size)(x)
    torch.testing.assert_close(turned[:, :, rows, columns], x[:, :, rows, columns].rot90(1, dims=(2, 3)), atol=1e-4, rtol=0)


@oblong
@pytest.mark.parametrize("angle", [0.3, -1.1])
def test_a_turn_on_an_oblong_image_agrees_with_scipys(size: tuple[int, int], angle: float) -> None:
    image = scipy.ndimage.gaussian_filter(np.random.default_rng(0).random(size), 1)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # of (row, column)
    middle = (np.array(size) + 1) / 2  # of the image with a black pixel all round
    true = scipy.ndimage.affine_transform(np.pad(image, 1), matrix, middle - matrix @ (middle - 1), size, order=1)
    found = saying([0, angle, 0, 0], "similarity", size)(torch.from_numpy(image)[None, None].float())
    np.testing.assert_allclose(found[0, 0].detach().numpy(), true, atol=1e-5)


@every_family
@oblong
def test_on_oblong_images_a_family_starts_at_its_identity_and_its_inverse_inverts(transform: str, size: tuple[int, int]) -> None:
    family, points = TRANSFORMS[transform].for_image(size), lattice(*size, torch.float64)
    identity = torch.tensor([family.identity], dtype=torch.float64)
    assert torch.equal(family(identity, points)[0], points)
    if family.inverse is not None:
        theta = 0.1 * images(1, family.n_params).double()
        back = family(family.inverse(theta), family(theta, points))[0]
        torch.testing.assert_close(back, points, atol=1e-3 if transform == "cpab" else 1e-12, rtol=0)


@every_family
def test_on_square_images_a_family_is_as_it_is_registered(transform: str) -> None:
    assert TRANSFORMS[transform].for_image((28, 28)) is TRANSFORMS[transform]
    assert (TRANSFORMS[transform].for_image((16, 48)) is TRANSFORMS[transform]) == (transform != "similarity")


# Half precision


@every_family
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.03), (torch.bfloat16, 0.2)], ids=str)
def test_in_half_precision_the_layer_gives_what_it_gives_in_float32(transform: str, dtype: torch.dtype, error: float) -> None:
    """To what theta's own few bits allow, on images so smooth that half a pixel shows as 0.01."""
    ramp = torch.linspace(0, 1, 224).expand(2, 1, 224, 224) * torch.linspace(0.5, 1, 2).view(2, 1, 1, 1)
    layer = layer_of(transform, 224, std=0.01, padding="border")
    full, half = layer(ramp), copy.deepcopy(layer).to(dtype)
    warped, grid = half(ramp.to(dtype), return_grid=True)
    assert warped.dtype == dtype and grid.dtype == torch.float32
    assert (warped.float() - full).abs().max() < error


@every_family
@every_padding
def test_at_the_identity_half_precision_loses_nothing_but_the_images_own_bits(transform: str, padding: str) -> None:
    x = images(1, 1, 40, 224)
    for dtype in (torch.float16, torch.bfloat16):
        layer = SpatialTransformer(1, (40, 224), transform, padding=padding).to(dtype)
        error = 0.15 if transform == "tps" else torch.finfo(dtype).eps  # its control points at 1/3 have no half precision
        torch.testing.assert_close(layer(x.to(dtype)), x.to(dtype), atol=error, rtol=0)


@every_family
def test_coordinates_keep_their_bits_through_any_conversion(transform: str) -> None:
    layer = SpatialTransformer(1, (12, 224), transform, iterations=2)
    assert torch.equal(layer.half().get_buffer("target"), lattice(12, 224))
    assert torch.equal(layer.bfloat16().float().get_buffer("view"), lattice(12, 224))
    assert torch.equal(layer.double().get_buffer("target"), lattice(12, 224, torch.float64))


@every_family
def test_theta_in_half_precision_warps_in_float32(transform: str) -> None:
    family = TRANSFORMS[transform]
    theta = (torch.tensor([family.identity]) + 0.05 * images(1, family.n_params)).half()
    assert torch.equal(family(theta, lattice(5, 7)), family(theta.float(), lattice(5, 7)))


def test_the_sampler_reads_half_precision_images_and_points_in_float32() -> None:
    image, points = images(1, 1, 224, 224).half(), (2 * images(1, 9, 9, 2) - 1).half()
    assert torch.equal(sample(image, points), sample(image.float(), points.float()))


@every_family
def test_a_network_in_bfloat16_tells_what_it_tells_in_float32(transform: str) -> None:
    network, x = network_of((1, 28, 28), transform=transform), images(4, 1, 28, 28)
    full = network(x)
    assert (network.bfloat16()(x.bfloat16()).float() - full).abs().max() < 0.05


# Batches of none and of one


@every_family
@with_and_without_kernels
def test_batches_of_none_and_one_pass_forwards_and_backwards(transform: str, options: dict[str, Any], kernels: bool) -> None:
    network = network_of(transform=transform, **options)
    if kernels:
        use_kernels(network)
    x = images(3, 1, 12, 16)
    together = network(x)
    for n in (0, 1):
        leaf = x[:n].clone().requires_grad_()
        logits = network(leaf)
        assert logits.shape == (n, 3)
        torch.testing.assert_close(logits, together[:n], atol=1e-5, rtol=0)
        logits.sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
        if n == 0:
            assert all((parameter.grad == 0).all() for parameter in network.parameters())
        network.zero_grad()
        warped, grid, theta = network.transformer(x[:n], return_grid=True, return_theta=True)
        assert warped.shape == (n, 1, 12, 16) and grid.shape == (n, 12, 16, 2) and theta.shape[1] == n


@every_padding
def test_the_sampler_reads_no_images(padding: str) -> None:
    assert sample(torch.zeros(0, 3, 5, 7), torch.zeros(0, 2, 4, 2), padding).shape == (0, 3, 2, 4)


def test_a_split_without_images_is_told_not_scored() -> None:
    network, empty = network_of(), Split(torch.zeros(0, 1, 12, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    for judge in (lambda: score(network, empty), lambda: robustness(network, empty, 10)):
        with pytest.raises(DataError, match=r"^the split has no images: give at least one to be scored$"):
            judge()


def test_a_split_of_one_image_is_scored() -> None:
    one = Split((255 * images(1, 1, 12, 16)).byte(), torch.tensor([2]))
    scores = score(network_of(), one)
    assert scores.n == 1 and scores.accuracy in (0, 1) and scores.confusion.sum() == 1


# Sizes and what is returned


def test_one_side_stands_for_a_square() -> None:
    layer, x = SpatialTransformer(1, 28, output_size=14), images(2, 1, 28, 28)
    assert layer.input_shape == (1, 28, 28) and layer(x).shape == (2, 1, 14, 14)


@every_family
def test_grid_and_theta_are_returned_where_asked(transform: str) -> None:
    layer, x = layer_of(transform, iterations=2), images(2, 1, 12, 16)
    warped, grid, theta = layer(x, return_grid=True, return_theta=True)
    look = layer.look(x)
    assert torch.equal(theta, look.theta) and torch.equal(grid, look.points) and torch.equal(warped, layer(x))
    assert torch.equal(layer(x, return_theta=True)[1], theta) and torch.equal(layer(x, return_grid=True)[1], grid)
