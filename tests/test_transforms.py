"""Every family of warps keeps the contract; affine, exponential, lattice, warp_shape and sampler agree with independent code."""

import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RBFInterpolator
from torch import Tensor
from torch.autograd import gradcheck

from stn_pipeline.errors import ShapeError
from stn_pipeline.transforms import TRANSFORMS, Transform, lattice, warp_shape
from stn_pipeline.transforms.diffeo import exp_affine
from stn_pipeline.transforms.family import Constant
from stn_pipeline.transforms.sampler import sample

AFFINE, DIFFEO = TRANSFORMS["affine"], TRANSFORMS["diffeo"]
PADDINGS = ("zeros", "border", "reflection")
INVERTED = {"cpab": (0.2, 0.01)}  # size of theta and error, where it is integrated in steps; the others are exact
UNIT_POINTS = torch.tensor([(0, 0), (1, 0), (0, 1)], dtype=torch.float64)
FLOATS = (torch.float32, torch.float64)

every_family = pytest.mark.parametrize("family", TRANSFORMS.values(), ids=TRANSFORMS)
every_padding = pytest.mark.parametrize("padding", PADDINGS)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=("float32", "float64"))
law = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def identities(family: Transform, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(family.identity, dtype=dtype).repeat(n, 1)


def thetas(family: Transform, n: int, size: float = 0.15, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """N different warps near the identity."""
    return identities(family, n, dtype) + size * noise(n, family.n_params, seed=seed, dtype=dtype)


def grid(family: Transform, theta: Tensor, height: int, width: int) -> Tensor:
    return family(theta, lattice(height, width, theta.dtype)).view(-1, height, width, 2)


def relative_error(got: Tensor, true: Tensor) -> float:
    """Largest error, relative to the largest entry of each matrix of a batch."""
    error, size = (got.double() - true).abs(), true.abs()
    return (error.flatten(1).amax(1) / size.flatten(1).amax(1).clamp_min(1e-300)).max().item()


# The contract, kept by every family


@every_family
def test_a_family_is_found_under_its_own_name(family: Transform) -> None:
    assert TRANSFORMS[family.name] is family
    assert family.n_params == len(family.identity)
    assert family.source


@every_family
@every_float
@pytest.mark.parametrize("size", [(1, 1), (2, 4), (5, 7), (28, 28), (60, 33)], ids=str)
@pytest.mark.parametrize("n", [1, 3, 64])
def test_identity_gives_the_lattice_to_the_last_bit(family: Transform, dtype: torch.dtype, size: tuple[int, int], n: int) -> None:
    points = lattice(*size, dtype)
    assert torch.equal(family(identities(family, n, dtype), points), points.expand(n, -1, -1))


@every_family
def test_identity_gives_arbitrary_points_back(family: Transform) -> None:
    points = 2 * torch.rand(50, 2, generator=generator(1), dtype=torch.float64) - 1
    torch.testing.assert_close(family(identities(family, 2), points), points.expand(2, -1, -1), atol=1e-15, rtol=0)


@every_family
@every_padding
def test_identity_gives_the_image_back(family: Transform, padding: str) -> None:
    image = torch.rand(2, 3, 9, 14, generator=generator(0))
    warped = sample(image, grid(family, identities(family, 2, torch.float32), 9, 14), padding)
    torch.testing.assert_close(warped, image, atol=1e-6, rtol=0)


@every_family
@pytest.mark.parametrize("size", [0.0, 0.01, 0.3], ids=["at", "by", "off"])
def test_gradients_of_theta_and_points_are_right_about_the_identity(family: Transform, size: float) -> None:
    theta = thetas(family, 3, size).requires_grad_()
    points = (0.9 * lattice(3, 4, torch.float64) + 0.01).requires_grad_()
    assert gradcheck(family, (theta, points))


def off_the_kinks(family: Transform, height: int, width: int) -> Tensor:
    """Warps (2, P) that read no point near a pixel's centre or edge, where the sampler has its kinks."""
    for seed in range(1000):
        theta = thetas(family, 2, 0.3, seed)
        halves = (grid(family, theta, 3, 4) + 1) * torch.tensor((width, height))  # in half pixels
        if (halves - halves.round()).abs().min() > 1e-3:
            return theta
    raise AssertionError("no such warp in 1000")


@every_family
@every_padding
def test_gradients_of_image_and_theta_are_right_through_the_sampler(family: Transform, padding: str) -> None:
    theta = off_the_kinks(family, 5, 6).requires_grad_()
    image = noise(2, 2, 5, 6).requires_grad_()
    assert gradcheck(lambda image, theta: sample(image, grid(family, theta, 3, 4), padding), (image, theta))


@every_family
def test_each_row_of_theta_warps_its_own_image_only(family: Transform) -> None:
    image, theta = noise(4, 2, 6, 5), thetas(family, 4)
    before = sample(image, grid(family, theta, 6, 5))
    theta[2] = thetas(family, 1, seed=9)[0]
    after = sample(image, grid(family, theta, 6, 5))
    others = [0, 1, 3]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[2], after[2])


@every_family
def test_a_row_of_theta_means_the_same_in_any_batch(family: Transform) -> None:
    theta, points = thetas(family, 5), lattice(4, 6, torch.float64)
    alone = torch.cat([family(row[None], points) for row in theta])
    torch.testing.assert_close(family(theta, points), alone, atol=1e-14, rtol=0)


@every_family
def test_every_parameter_moves_the_points(family: Transform) -> None:
    points, step = lattice(16, 16, torch.float64), 1e-3
    nudged = identities(family, family.n_params) + step * torch.eye(family.n_params)
    assert ((family(nudged, points) - points).abs().amax((1, 2)) > 1e-2 * step).all()


@every_family
def test_wrong_shapes_are_refused_by_name(family: Transform) -> None:
    points, n = lattice(2, 2), family.n_params
    for shape in [(n,), (4, n + 1), (4, n - 1), (2, n, 1)]:
        with pytest.raises(ShapeError, match=f"^{re.escape(f'{family.name}: theta has shape {shape}, expected (B, {n})')}$"):
            family(torch.zeros(shape), points)
    for shape in [(2,), (7, 3), (2, 2, 2), (4, 2, 3)]:
        told = re.escape(f"{family.name}: points has shape {shape}, expected (N, 2) or (4, N, 2)")
        with pytest.raises(ShapeError, match=f"^{told}$"):
            family(torch.zeros(4, n), torch.zeros(shape))


@every_family
def test_points_may_be_each_rows_own(family: Transform) -> None:
    theta, points = thetas(family, 3), 2 * torch.rand(3, 20, 2, generator=generator(2), dtype=torch.float64) - 1
    alone = torch.cat([family(row[None], own) for row, own in zip(theta, points, strict=True)])
    torch.testing.assert_close(family(theta, points), alone, atol=1e-14, rtol=0)
    assert gradcheck(family, (theta.requires_grad_(), points[:, :4].clone().requires_grad_()))


@every_family
@every_float
def test_points_come_at_thetas_precision(family: Transform, dtype: torch.dtype) -> None:
    assert grid(family, thetas(family, 2, dtype=dtype), 3, 4).dtype == dtype


@every_family
def test_autocast_leaves_the_warp_and_its_gradient_as_they_are(family: Transform) -> None:
    def value_and_gradient(autocast: bool) -> tuple[Tensor, Tensor]:
        theta = thetas(family, 3, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            points = grid(family, theta, 28, 28)
            warped = sample(noise(3, 1, 28, 28, dtype=torch.float32), points)
        assert points.dtype == warped.dtype == torch.float32
        (gradient,) = torch.autograd.grad(warped.square().sum(), theta)
        return warped, gradient

    for plain, cast in zip(value_and_gradient(False), value_and_gradient(True), strict=True):
        assert torch.equal(cast, plain)


@every_family
def test_the_declared_inverse_inverts(family: Transform) -> None:
    if family.inverse is None:
        pytest.skip(f"{family.name} declares no inverse")
    points, (size, error) = lattice(5, 7, torch.float64), INVERTED.get(family.name, (0.5, 1e-10))
    for theta in thetas(family, 20, size):
        there = family(theta[None], points)[0]
        back = family(family.inverse(theta[None]), there)[0]
        torch.testing.assert_close(back, points, atol=error, rtol=0)
    assert torch.equal(family.inverse(identities(family, 1)).abs(), identities(family, 1).abs())


# Affine


@pytest.mark.parametrize("size", [(28, 28), (5, 9), (2, 4)], ids=str)
def test_affine_agrees_with_affine_grid(size: tuple[int, int]) -> None:
    theta = thetas(AFFINE, 8, 1.0, dtype=torch.float32)
    true = F.affine_grid(theta.view(-1, 2, 3), [8, 1, *size], align_corners=False)
    torch.testing.assert_close(grid(AFFINE, theta, *size), true, atol=1e-6, rtol=0)


def test_two_over_width_moves_the_content_left_by_one_pixel() -> None:
    rows = torch.tensor([0.0, 1, 2, 3]).expand(1, 1, 3, 4)
    moved = sample(rows, grid(AFFINE, torch.tensor([[1, 0, 2 / 4, 0, 1, 0]]), 3, 4), "zeros")
    torch.testing.assert_close(moved, torch.tensor([1.0, 2, 3, 0]).expand(1, 1, 3, 4), atol=1e-6, rtol=0)


def test_two_over_height_moves_the_content_up_by_one_pixel() -> None:
    columns = torch.tensor([0.0, 1, 2, 3])[:, None].expand(1, 1, 4, 3)
    moved = sample(columns, grid(AFFINE, torch.tensor([[1, 0, 0, 0, 1, 2 / 4]]), 4, 3), "zeros")
    torch.testing.assert_close(moved, torch.tensor([1.0, 2, 3, 0])[:, None].expand(1, 1, 4, 3), atol=1e-6, rtol=0)


# The lattice


def test_lattice_by_hand() -> None:
    top = [(-0.75, -0.5), (-0.25, -0.5), (0.25, -0.5), (0.75, -0.5)]
    bottom = [(x, 0.5) for x, _ in top]
    assert lattice(2, 4).tolist() == [list(point) for point in top + bottom]


@every_float
@pytest.mark.parametrize("size", [(28, 28), (5, 9), (1, 3)], ids=str)
def test_lattice_is_the_grid_of_torchs_identity(size: tuple[int, int], dtype: torch.dtype) -> None:
    eye = torch.eye(2, 3, dtype=dtype)[None]
    true = F.affine_grid(eye, [1, 1, *size], align_corners=False).view(-1, 2)
    assert lattice(*size, dtype).dtype == dtype
    torch.testing.assert_close(lattice(*size, dtype), true, atol=4 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("side", [3, 7, 28])
def test_lattice_is_symmetric_to_the_last_bit(side: int) -> None:
    points = lattice(side, side)
    assert torch.equal(points.flip(0).view(side, side, 2), points.view(side, side, 2).transpose(0, 1).flip(0, 1).transpose(0, 1))
    torch.testing.assert_close(points.flip(0), -points, atol=1e-7, rtol=0)


# The exponential

GENERATORS = {
    "zero": [[0, 0, 0], [0, 0, 0]],
    "translation": [[0, 0, 0.7], [0, 0, -1.3]],
    "tiny": [[1e-8, -2e-8, 3e-8], [2e-8, 1e-8, -1e-8]],
    "real eigenvalues": [[0.5, 0.3, 0.2], [0.1, -1.2, 0.4]],
    "complex eigenvalues": [[0.3, -2.0, 1.0], [2.0, 0.3, -0.5]],
    "rotation by 3 turns": [[0, -6 * math.pi, 1.0], [6 * math.pi, 0, 2.0]],
    "repeated eigenvalue, diagonal": [[0.7, 0, 0.1], [0, 0.7, 0.2]],
    "repeated eigenvalue, Jordan block": [[0.7, 1, 0.1], [0, 0.7, 0.2]],
    "all but repeated": [[0.7, 1, 0.1], [1e-9, 0.7, 0.2]],
    "nilpotent": [[0, 1, 0.1], [0, 0, 0.2]],
    "singular": [[1, 2, 0.5], [2, 4, -0.5]],
    "contraction": [[-10, 0, 0], [0, -9, 0.0]],
    "entries of 10": [[9, -10, 8], [10, 7, -10]],
    "entries of 10, growing": [[9, 10, 8], [10, 7, -10]],
    "entries of 30": [[29, -30, 10], [28, 25, -30]],
    "entries of 30, growing": [[29, 30, 10], [28, 25, -30]],
}
every_generator = pytest.mark.parametrize("kind", GENERATORS)


def generators(*kinds: str) -> Tensor:
    return torch.tensor([GENERATORS[kind] for kind in kinds], dtype=torch.float64)


def tolerance_of(kind: str) -> float:
    return 1e-8 if "30" in kind else 1e-11


def scipy_exponential(generator: Tensor) -> Tensor:
    full = F.pad(generator.double(), (0, 0, 0, 1)).numpy()
    return torch.from_numpy(np.stack([scipy.linalg.expm(matrix) for matrix in full]))[:, :2]


def torch_exponential(generator: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(F.pad(generator, (0, 0, 0, 1)))[:, :2]


def gradient(function: object, generator: Tensor, cotangent: Tensor) -> Tensor:
    generator = generator.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(generator), generator, cotangent)  # type: ignore[operator]
    return result


def cotangent(n: int) -> Tensor:
    """Gradients (n, 2, 3) from above, exact in float32."""
    return noise(n, 2, 3, seed=5, dtype=torch.float32).double()


@every_generator
def test_exponential_agrees_with_scipy(kind: str) -> None:
    theta = generators(kind)
    assert relative_error(exp_affine(theta), scipy_exponential(theta)) < tolerance_of(kind)


@every_generator
def test_exponential_and_its_gradient_agree_with_torch(kind: str) -> None:
    theta = generators(kind)
    assert relative_error(exp_affine(theta), torch_exponential(theta)) < tolerance_of(kind)
    ours, true = (gradient(function, theta, cotangent(1)) for function in (exp_affine, torch_exponential))
    assert relative_error(ours, true) < tolerance_of(kind)


@every_generator
def test_exponential_and_its_gradient_are_right_to_float32_rounding(kind: str) -> None:
    theta, eps = generators(kind).float(), torch.finfo(torch.float32).eps
    value = exp_affine(theta)
    assert value.dtype == torch.float32
    assert relative_error(value, scipy_exponential(theta)) <= eps
    ours = gradient(exp_affine, theta, cotangent(1).float())
    assert ours.dtype == torch.float32
    assert relative_error(ours, gradient(torch_exponential, theta.double(), cotangent(1))) <= eps


def test_a_batch_of_all_kinds_gives_what_each_gives_alone() -> None:
    theta, above = generators(*GENERATORS), cotangent(len(GENERATORS))
    alone = torch.cat([exp_affine(one[None]) for one in theta])
    assert relative_error(exp_affine(theta), alone) < 1e-14
    alone = torch.cat([gradient(exp_affine, one[None], up[None]) for one, up in zip(theta, above, strict=True)])
    assert relative_error(gradient(exp_affine, theta, above), alone) < 1e-13


def test_exponential_of_a_translation_is_that_translation() -> None:
    value = exp_affine(generators("translation"))[0]
    assert torch.equal(value[:, :2], torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(value[:, 2], torch.tensor([0.7, -1.3], dtype=torch.float64), atol=1e-14, rtol=0)


def test_gradient_at_zero_is_the_identity() -> None:
    jacobian = torch.autograd.functional.jacobian(lambda g: exp_affine(g.view(1, 2, 3)).flatten(), torch.zeros(6))
    assert torch.equal(jacobian, torch.eye(6))


# Laws of diffeo

entry = st.floats(-2, 2, allow_subnormal=False)
generator_rows = st.lists(entry, min_size=6, max_size=6).map(lambda row: torch.tensor([row], dtype=torch.float64))
part = st.floats(-1, 1, allow_subnormal=False)


@law
@given(theta=generator_rows)
def test_diffeo_scales_areas_by_the_exponential_of_its_trace(theta: Tensor) -> None:
    origin, right, down = DIFFEO(theta, torch.tensor([(0.0, 0), (1, 0), (0, 1)], dtype=torch.float64))[0]
    det = torch.linalg.det(torch.stack((right - origin, down - origin))).item()
    assert det > 0
    assert det == pytest.approx(math.exp(theta[0, 0] + theta[0, 4]), rel=1e-9)


@law
@given(theta=generator_rows)
def test_minus_theta_undoes_theta(theta: Tensor) -> None:
    points = lattice(3, 4, torch.float64)
    there = DIFFEO(theta, points)[0]
    torch.testing.assert_close(DIFFEO(-theta, there)[0], points, atol=1e-10, rtol=0)


@law
@given(theta=generator_rows, s=part, t=part)
def test_warps_of_one_generator_add_up(theta: Tensor, s: float, t: float) -> None:
    points = lattice(3, 4, torch.float64)
    in_two_steps = DIFFEO(s * theta, DIFFEO(t * theta, points)[0])[0]
    torch.testing.assert_close(in_two_steps, DIFFEO((s + t) * theta, points)[0], atol=1e-10, rtol=1e-10)


@law
@given(theta=generator_rows)
def test_diffeo_never_folds(theta: Tensor) -> None:
    assert warp_shape(grid(DIFFEO, theta.float(), 7, 9)).folded == 0


# warp_shape


def seen(a: float, b: float, tx: float, c: float, d: float, ty: float) -> tuple[float, float, float]:
    return tuple(warp_shape(grid(AFFINE, torch.tensor([[a, b, tx, c, d, ty]], dtype=torch.float64), 4, 6)))


@pytest.mark.parametrize(
    ("theta", "outside", "log_det", "folded"),
    [
        pytest.param((1, 0, 0, 0, 1, 0), 0, 0, 0, id="identity"),
        pytest.param((2, 0, 0, 0, 2, 0), 2 / 3, math.log(4), 0, id="image at half its size: 2x4 of 4x6 pixels inside"),
        pytest.param((0.5, 0, 0, 0, 0.5, 0), 0, -math.log(4), 0, id="image at twice its size"),
        pytest.param((-1, 0, 0, 0, 1, 0), 0, 0, 1, id="mirrored"),
        pytest.param((-1, 0, 0, 0, -1, 0), 0, 0, 0, id="half a turn"),
        pytest.param((1, 0, 2, 0, 1, 0), 1, 0, 0, id="one image to the side"),
        pytest.param((1, 0, 0, 0, 1, -2), 1, 0, 0, id="one image up"),
        pytest.param((1, 0, 1, 0, 1, 0), 0.5, 0, 0, id="half an image to the side"),
        pytest.param((1, 3, 0, 0, 1, 0), 2 / 3, 0, 0, id="sheared: 0, 4, 4, 0 of each 6 pixels inside"),
        pytest.param((1, 0, 0, 0, 0, 0), 0, math.log(1e-12), 0, id="flat, cut off"),
    ],
)
def test_warp_shape_by_hand(theta: tuple[float, ...], outside: float, log_det: float, folded: float) -> None:
    assert seen(*theta) == pytest.approx((outside, log_det, folded), abs=1e-9)


def test_warp_shape_is_the_mean_of_the_batch() -> None:
    theta = torch.tensor([[1.0, 0, 0, 0, 1, 0], [-2, 0, 0, 0, 2, 9]])
    assert tuple(warp_shape(grid(AFFINE, theta, 4, 6))) == pytest.approx((0.5, math.log(4) / 2, 0.5), abs=1e-6)


# The sampler


def reflected(position: float, size: int) -> float:
    """Mirror a pixel position at the outer edges, -0.5 and size - 0.5, as often as it takes."""
    while not -0.5 <= position <= size - 0.5:
        position = -1 - position if position < -0.5 else 2 * size - 1 - position
    return position


def read(plane: np.ndarray, x: float, y: float, padding: str) -> float:
    """Bilinear value of an (H, W) plane at the point (x, y), the edges of which are at -1 and 1."""
    height, width = plane.shape
    column, row = (x + 1) / 2 * width - 0.5, (y + 1) / 2 * height - 0.5
    if padding == "reflection":
        column, row = reflected(column, width), reflected(row, height)
    if padding != "zeros":
        column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
    value = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                value += plane[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return value


def naive_sample(image: Tensor, points: Tensor, padding: str) -> Tensor:
    rows = [
        [[[read(plane, *point, padding) for point in line] for line in where.tolist()] for plane in planes.numpy()]
        for planes, where in zip(image, points, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@every_padding
def test_sampler_agrees_with_a_naive_loop_inside_and_far_outside(padding: str) -> None:
    image = noise(2, 3, 5, 7)
    points = 2.5 * noise(2, 8, 6, 2, seed=3)
    assert (points.abs() > 3).any()
    torch.testing.assert_close(sample(image, points, padding), naive_sample(image, points, padding), atol=1e-12, rtol=0)


def test_zeros_are_the_samplers_default() -> None:
    far = torch.full((1, 2, 2, 2), 5.0)
    assert sample(torch.ones(1, 1, 4, 4), far).abs().max() == 0


@every_padding
def test_sampler_reads_half_an_image_as_the_mean_of_2x2_pixels(padding: str) -> None:
    image = noise(2, 3, 6, 8, dtype=torch.float32)
    points = lattice(3, 4).view(1, 3, 4, 2).expand(2, -1, -1, -1)
    torch.testing.assert_close(sample(image, points, padding), F.avg_pool2d(image, 2), atol=1e-6, rtol=0)


def test_sampler_reads_a_bf16_image_at_fp32_points_in_fp32() -> None:
    image, points = noise(1, 1, 5, 5).bfloat16(), noise(1, 5, 5, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        warped = sample(image, points)
    assert torch.equal(warped, sample(image.float(), points))


# Similarity, projective, tps


@law
@given(theta=st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_similarity_is_a_scale_and_a_turn(theta: list[float]) -> None:
    s, r = theta[:2]
    origin, right, down = TRANSFORMS["similarity"](torch.tensor([theta], dtype=torch.float64), UNIT_POINTS)[0]
    scale = math.exp(s)
    torch.testing.assert_close(right - origin, torch.tensor([scale * math.cos(r), scale * math.sin(r)], dtype=torch.float64))
    torch.testing.assert_close(down - origin, torch.tensor([-scale * math.sin(r), scale * math.cos(r)], dtype=torch.float64))


def test_similarity_is_the_exponential_of_its_generator() -> None:
    s, r, tx, ty = theta = (0.3, -0.7, 0.2, 0.5)
    (points,) = TRANSFORMS["similarity"](torch.tensor([theta], dtype=torch.float64), UNIT_POINTS)
    matrix = torch.from_numpy(scipy.linalg.expm(np.array([[s, -r, tx], [r, s, ty], [0, 0, 0]])))
    torch.testing.assert_close(points, UNIT_POINTS @ matrix[:2, :2].T + matrix[:2, 2])


def test_projective_moves_the_corners_as_worked_out_by_hand() -> None:
    theta = torch.tensor([[1, 0, 0, 0, 1, 0, 0.5, 0.25]], dtype=torch.float64)  # denominators 1 + x/2 + y/4
    corners = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]], dtype=torch.float64)
    expected = torch.tensor([[-4, -4], [0.8, -0.8], [-4 / 3, 4 / 3], [4 / 7, 4 / 7]], dtype=torch.float64)
    torch.testing.assert_close(TRANSFORMS["projective"](theta, corners)[0], expected)


def test_projective_beyond_the_horizon_is_far_outside_and_finite() -> None:
    theta = torch.tensor([[1, 0, 0, 0, 1, 0, 2.0, 0]], requires_grad=True)
    (points,) = TRANSFORMS["projective"](theta, torch.tensor([[-0.5, 0.2], [-0.9, 0.3], [0.5, 0]]))
    assert (points[:2].abs().amax(dim=1) > 10).all() and points[1, 0] < 0 and points[2, 0] == 0.25
    points.sum().backward()
    assert theta.grad is not None and torch.isfinite(theta.grad).all()


def test_projective_with_no_perspective_is_affine() -> None:
    theta = thetas(AFFINE, 4, 0.5)
    points = noise(20, 2)
    torch.testing.assert_close(TRANSFORMS["projective"](torch.cat((theta, torch.zeros(4, 2)), dim=1), points), AFFINE(theta, points))


def test_tps_agrees_with_scipy() -> None:
    tps = TRANSFORMS["tps"]
    theta, points = thetas(tps, 3, 0.3), noise(50, 2)
    control = identities(tps, 1, torch.float64).view(16, 2).numpy()
    for row, found in zip(theta, tps(theta, points), strict=True):
        spline = RBFInterpolator(control, row.view(16, 2).numpy(), kernel="thin_plate_spline", degree=1)
        np.testing.assert_allclose(found.numpy(), spline(points.numpy()), atol=1e-12, rtol=0)


def test_tps_through_affinely_moved_control_points_is_that_affine_map() -> None:
    theta, points = thetas(AFFINE, 4, 0.4), noise(30, 2)
    control = identities(TRANSFORMS["tps"], 1, torch.float64).view(16, 2)
    torch.testing.assert_close(TRANSFORMS["tps"](AFFINE(theta, control).reshape(4, 32), points), AFFINE(theta, points))


def test_what_was_made_while_a_graph_was_traced_is_not_kept() -> None:
    """A stand-in kept by an export would break the next training in the same process."""
    constant = Constant(noise(3))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return x + constant.like(x)

    x = noise(2, 3).float()  # the export is the first to ask for this precision
    exported = torch.export.export(Layer(), (x,)).module()
    torch.testing.assert_close(exported(x), Layer()(x))
    assert type(constant.like(x)) is torch.Tensor
