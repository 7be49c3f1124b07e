"""The compiled stage is torch's conv -> pool -> relu: exactly on whole numbers, to float32 rounding on others."""

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stn_pipeline import compiler
from stn_pipeline.compiler import compile_programs
from stn_pipeline.model import native
from stn_pipeline.model.native import Geometry, stage_kernel

GEOMETRIES = [
    Geometry(1, 8, 7, 28, 28),  # MNIST's four
    Geometry(8, 10, 5, 11, 11),
    Geometry(1, 10, 5, 28, 28),
    Geometry(10, 20, 5, 12, 12),
    Geometry(3, 8, 7, 32, 32),  # CIFAR-10's first
    Geometry(13, 10, 5, 9, 12),  # CoordConv with r, not square, an odd side cut off by the pooling
    Geometry(1, 1, 1, 2, 3),
    Geometry(2, 7, 3, 4, 5),
]
PROGRAMS = [geometry.program for geometry in GEOMETRIES]
CACHES = (native._load, compiler._compiler, compiler._machine, compiler._name, compiler._load)


def forget() -> None:
    for each in CACHES:
        each.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory) -> Iterator[None]:
    """Compile all into a cache of their own."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        forget()
        compile_programs(PROGRAMS)
        yield
    forget()


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.max_pool2d(F.conv2d(x, weight, bias), 2))


def tensors(geometry: Geometry, n: int, seed: int = 0, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    g, generator = geometry, torch.Generator().manual_seed(seed)
    shapes = ((n, g.C, g.H, g.W), (g.O, g.C, g.K, g.K), (g.O,))
    if whole:
        return tuple(torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def value_and_gradients(function, inputs, gradient: Tensor | None = None) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    pooled = function(*leaves)
    gradient = torch.ones_like(pooled) if gradient is None else gradient.to(pooled.dtype)
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, gradient)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 37])
def test_on_whole_numbers_value_gradients_and_the_choice_among_equals_are_torchs_to_the_last_bit(geometry, n):
    inputs = tensors(geometry, n, whole=True)
    gradient = torch.randint(-2, 3, (n, geometry.O, *geometry.size), generator=torch.Generator().manual_seed(1)).float()
    expected, got = (value_and_gradients(f, inputs, gradient) for f in (plain, stage_kernel(geometry)))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_on_other_numbers_it_is_as_near_to_float64_as_torch_is(geometry):
    inputs = tensors(geometry, 64)
    gradient = torch.randn(64, geometry.O, *geometry.size, generator=torch.Generator().manual_seed(1))
    exact = value_and_gradients(plain, [tensor.double() for tensor in inputs], gradient)
    for ours, right in zip(value_and_gradients(stage_kernel(geometry), inputs, gradient), exact, strict=True):
        assert (ours.double() - right).abs().max() <= 2e-5 * right.abs().max()


@settings(max_examples=25, deadline=None)
@given(geometry=st.sampled_from(GEOMETRIES), n=st.integers(1, 70), seed=st.integers(0, 2**31), dead=st.floats(0, 1))
def test_any_batch_with_any_channels_dropped_out(geometry, n, seed, dead):
    inputs = tensors(geometry, n, seed, whole=True)
    gradient = torch.ones(n, geometry.O, *geometry.size)
    gradient *= torch.rand(n, geometry.O, 1, 1, generator=torch.Generator().manual_seed(seed)) >= dead
    for a, b in zip(*(value_and_gradients(f, inputs, gradient) for f in (stage_kernel(geometry), plain)), strict=True):
        assert torch.equal(a, b)


def test_nan_is_passed_on_and_minus_infinity_is_not():
    geometry = GEOMETRIES[-1]
    x, weight, bias = tensors(geometry, 3)
    x[1, 0, 2, 2] = torch.nan
    x[2] = -torch.inf
    ours, torchs = stage_kernel(geometry)(x, weight.abs(), bias), plain(x, weight.abs(), bias)
    assert torch.equal(ours.isnan(), torchs.isnan()) and ours[1].isnan().any()
    assert torch.equal(ours[2], torch.zeros_like(ours[2]))


@pytest.mark.parametrize("geometry", GEOMETRIES[2:5], ids=str)
def test_the_number_of_threads_changes_no_bit(geometry):
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            results.append(value_and_gradients(stage_kernel(geometry), tensors(geometry, 75)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_are_its_own_affair():
    geometry = GEOMETRIES[3]
    x, weight, bias = tensors(geometry, 5, whole=True)
    spread = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight)]
    for a, b in zip(*(value_and_gradients(stage_kernel(geometry), inputs) for inputs in ((x, weight, bias), (*spread, bias))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [5, 64, 256])
def test_a_gradient_may_be_a_slice_of_another(n):
    geometry = GEOMETRIES[3]
    wide = torch.randint(-2, 3, (n, geometry.O + 3, *geometry.size), generator=torch.Generator().manual_seed(1)).float()
    inputs, gradient = tensors(geometry, n, whole=True), wide[:, : geometry.O]
    for a, b in zip(*(value_and_gradients(f, inputs, gradient) for f in (stage_kernel(geometry), plain)), strict=True):
        assert torch.equal(a, b)


def test_images_that_want_no_gradient_get_none():
    geometry = GEOMETRIES[0]
    x, weight, bias = tensors(geometry, 5)
    weight.requires_grad_()
    stage_kernel(geometry)(x, weight, bias).sum().backward()
    assert x.grad is None and weight.grad.abs().sum() > 0


def test_there_is_no_second_derivative():
    inputs = [tensor.requires_grad_() for tensor in tensors(GEOMETRIES[-1], 2)]
    (first,) = torch.autograd.grad(stage_kernel(GEOMETRIES[-1])(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("wrong", [lambda x: x.double(), lambda x: x[:, :1], lambda x: x[..., 1:]])
def test_what_it_was_not_compiled_for_is_refused(wrong):
    x, weight, bias = tensors(GEOMETRIES[3], 2)
    with pytest.raises(ValueError, match="compiled for float32"):
        stage_kernel(GEOMETRIES[3])(wrong(x), weight, bias)
