"""CPAB: the space of its fields, their flow against independent integrators, its laws, and the compiled kernel."""

import shutil

import libcpab
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.tri import LinearTriInterpolator, Triangulation
from scipy.integrate import solve_ivp
from torch import Tensor

from stn_pipeline.errors import ConfigError
from stn_pipeline.transforms import TRANSFORMS, cpab, lattice
from stn_pipeline.transforms.cpab import basis, flow, n_steps, triangles, velocity, vertices
from stn_pipeline.transforms.native import flow_kernel

DIFFEO = TRANSFORMS["diffeo"]
law = settings(max_examples=20, deadline=None, derandomize=True, database=None)
TESSELLATIONS = [(cells, boundary) for cells in (1, 2, 3) for boundary in ("free", "fixed")]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fields_of(theta: Tensor, cells: int, boundary: str = "free") -> Tensor:
    return (theta @ basis(cells, boundary).to(theta.dtype)).view(len(theta), 6, -1)


def moving_by(pixels: float, cells: int, boundary: str, seed: int) -> Tensor:
    """A theta (1, P) that moves the furthest of 28x28 points by so many pixels."""
    family, points = cpab(cells, boundary), lattice(28, 28, torch.float64)
    direction = noise(1, family.n_params, seed=seed)
    low, high = 0.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        furthest = (family(middle * direction, points) - points).norm(dim=2).max().item() * 14
        low, high = (middle, high) if furthest < pixels else (low, middle)
    return low * direction


def velocities(fields: Tensor, points: Tensor, cells: int) -> Tensor:
    return velocity(fields, points.transpose(1, 2), cells).transpose(1, 2)


class Field:
    """The velocities interpolated by matplotlib over the triangles, and integrated by scipy."""

    def __init__(self, at_vertices: np.ndarray, cells: int):
        mesh = Triangulation(*vertices(cells).numpy().T, triangles(cells).numpy())
        self.parts = [LinearTriInterpolator(mesh, component) for component in at_vertices.T]

    def __call__(self, points: np.ndarray) -> np.ndarray:
        inside = points.clip(-1 + 1e-12, 1 - 1e-12)
        return np.stack([np.asarray(part(*inside.T)) for part in self.parts], axis=1)

    def flow(self, points: np.ndarray) -> np.ndarray:
        solved = solve_ivp(lambda _, p: self(p.reshape(-1, 2)).ravel(), (0, 1), points.ravel(), rtol=1e-8, atol=1e-9, max_step=0.01)
        return solved.y[:, -1].reshape(-1, 2)


# The space of fields


def continuity(cells: int, boundary: str) -> np.ndarray:
    """Rows that every field's maps fulfil: neighbours agree at both ends of their common edge, and a fixed edge does not move."""
    places, corners = vertices(cells).numpy(), triangles(cells).numpy()
    rows = []
    for first in range(len(corners)):
        for second in range(first):
            shared = set(corners[first]) & set(corners[second])
            for vertex in shared if len(shared) == 2 else ():
                for component in range(2):
                    row = np.zeros((len(corners), 2, 3))
                    row[first, component], row[second, component] = (*places[vertex], 1), -np.array((*places[vertex], 1))
                    rows.append(row.ravel())
        for vertex in corners[first]:
            if boundary == "fixed" and np.abs(places[vertex]).max() == 1:
                for component in range(2):
                    row = np.zeros((len(corners), 2, 3))
                    row[first, component] = (*places[vertex], 1)
                    rows.append(row.ravel())
    return np.array(rows)


@pytest.mark.parametrize(("cells", "boundary"), TESSELLATIONS)
def test_the_basis_spans_the_null_space_of_the_continuity_constraints(cells: int, boundary: str) -> None:
    ours, null = (
        basis(cells, boundary).view(-1, 6, 4 * cells**2).transpose(1, 2).flatten(1).numpy(),
        scipy.linalg.null_space(continuity(cells, boundary)),
    )
    assert len(ours) == null.shape[1] == np.linalg.matrix_rank(ours)
    np.testing.assert_allclose(ours - ours @ null @ null.T, 0, atol=1e-9)


@pytest.mark.parametrize("cells", [1, 2, 3, 5])
def test_theta_is_the_velocity_of_the_vertices_and_the_field_is_linear_between(cells: int) -> None:
    theta = noise(1, 2 * len(vertices(cells)))
    at_vertices = theta.view(-1, 2)
    found = velocities(fields_of(theta, cells), vertices(cells)[None], cells)[0]
    torch.testing.assert_close(found, at_vertices, atol=1e-12, rtol=0)
    points = 2 * torch.rand(1, 500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    true = Field(at_vertices.numpy(), cells)(points[0].numpy())
    np.testing.assert_allclose(velocities(fields_of(theta, cells), points, cells)[0].numpy(), true, atol=1e-9)


def test_outside_the_square_a_point_has_the_velocity_of_the_nearest_inside() -> None:
    fields = fields_of(noise(1, 50), 3)
    outside = torch.tensor([[[1.7, 0.2], [-3, -3], [0.1, 1.01], [5, 1]]], dtype=torch.float64)
    assert torch.equal(velocities(fields, outside, 3), velocities(fields, outside.clamp(-1, 1), 3))


# The flow


SCIPYS = [(c, b, f, e, m) for c, b in ((3, "free"), (3, "fixed"), (2, "free")) for f, e, m in ((2.7, 5e-4, 1e-2), (8.2, 1e-2, 0.3))]


@pytest.mark.parametrize(("cells", "boundary", "furthest", "mean", "most"), [*SCIPYS, (5, "fixed", 5, 5e-3, 0.1)])
def test_the_flow_agrees_with_scipy(cells: int, boundary: str, furthest: float, mean: float, most: float) -> None:
    """Errors in pixels of a 28x28 image."""
    points = lattice(28, 28, torch.float64)
    theta = moving_by(furthest, cells, boundary, seed=cells)
    of_vertex = torch.zeros(len(vertices(cells)), 2, dtype=torch.float64)
    moving = (vertices(cells).abs() < 1).all(dim=1) if boundary == "fixed" else slice(None)
    of_vertex[moving] = theta.view(-1, 2)
    true = Field(of_vertex.numpy(), cells).flow(points.numpy())
    error = 14 * np.linalg.norm(cpab(cells, boundary)(theta, points)[0].numpy() - true, axis=1)
    assert error.mean() < mean and error.max() < most


def test_smaller_squares_take_more_steps() -> None:
    fields, points = fields_of(moving_by(5, 5, "fixed", 0), 5, "fixed"), lattice(28, 28, torch.float64)[None]
    true = flow(fields, points, 5, 200)
    errors = [(flow(fields, points, 5, steps) - true).norm(dim=2).mean() for steps in (n_steps(3), n_steps(5))]
    assert errors[1] < 0.5 * errors[0]


def test_the_flow_of_one_affine_map_is_its_exponential() -> None:
    generators = torch.tensor([[0.1, -0.6, 0.05, 0.5, -0.1, 0], [-0.3, 0.1, 0, 0.2, -0.4, 0.1]], dtype=torch.float64)
    at_vertices = vertices(3) @ generators.view(2, 2, 3)[:, :, :2].transpose(1, 2) + generators.view(2, 2, 3)[:, None, :, 2]
    points = 0.5 * lattice(9, 9, torch.float64)  # none leaves the square
    torch.testing.assert_close(cpab(3)(at_vertices.flatten(1), points), DIFFEO(generators, points), atol=2e-5, rtol=0)


def test_libcpab_agrees() -> None:
    theirs = libcpab.Cpab([3, 3], device="cpu", zero_boundary=True)
    theta, points = moving_by(4, 3, "fixed", 5), lattice(28, 28, torch.float64)
    # Ours over [-1, 1]² as maps over [0, 1]²: q = (p + 1) / 2; libcpab lists a square's triangles top, right, bottom, left.
    maps = fields_of(theta, 3, "fixed")[0].T.reshape(9, 4, 2, 3)[:, [1, 3, 2, 0]].reshape(-1, 2, 3)
    moved = torch.cat((maps[..., :2], ((maps[..., 2] - maps[..., :2].sum(dim=2)) / 2)[..., None]), dim=2)
    space = np.asarray(theirs.params.basis, dtype=np.float64)
    coordinates, residual, *_ = np.linalg.lstsq(space, moved.flatten().numpy(), rcond=None)
    assert np.abs(space @ coordinates - moved.flatten().numpy()).max() < 1e-5
    theirs.set_solver_params(nstepsolver=500)
    grid = theirs.transform_grid(((points.T + 1) / 2).float(), torch.tensor(coordinates, dtype=torch.float32)[None])[0]
    error = 28 * (grid.T.double() - (cpab(3, "fixed")(theta, points)[0] + 1) / 2).norm(dim=1)
    assert error.mean() < 0.01


# Laws


@law
@given(st.integers(0, 10_000), st.sampled_from(TESSELLATIONS), st.floats(0, 6))
def test_forward_then_backward_returns_the_points(seed: int, tessellation: tuple[int, str], furthest: float) -> None:
    theta, points = moving_by(furthest, *tessellation, seed), lattice(28, 28, torch.float64)
    family = cpab(*tessellation)
    back = family(-theta, family(theta, points))
    assert 14 * (back - points).norm(dim=2).mean() < 0.02 and 14 * (back - points).norm(dim=2).max() < 0.5


@law
@given(st.integers(0, 10_000), st.sampled_from([*TESSELLATIONS, (5, "fixed")]), st.floats(0, 8))
def test_orientation_is_kept_everywhere(seed: int, tessellation: tuple[int, str], furthest: float) -> None:
    points = lattice(28, 28, torch.float64)[None].requires_grad_()
    moved = cpab(*tessellation)(moving_by(furthest, *tessellation, seed), points)
    of_x, of_y = (torch.autograd.grad(moved[..., axis].sum(), points, retain_graph=True)[0] for axis in (0, 1))
    assert (of_x[..., 0] * of_y[..., 1] > of_x[..., 1] * of_y[..., 0]).all()


@law
@given(st.integers(0, 10_000), st.integers(2, 4), st.floats(0, 8))
def test_a_fixed_edge_stays_and_nothing_crosses_it(seed: int, cells: int, furthest: float) -> None:
    theta, family = moving_by(furthest, cells, "fixed", seed), cpab(cells, "fixed")
    along = torch.linspace(-1, 1, 31, dtype=torch.float64)
    one = torch.ones_like(along)
    edge = torch.cat([torch.stack(pair, dim=1) for pair in ((along, one), (along, -one), (one, along), (-one, along))])
    torch.testing.assert_close(family(theta, edge)[0], edge, atol=1e-12, rtol=0)
    assert (family(theta, lattice(28, 28, torch.float64)).abs() < 1).all()


@pytest.mark.parametrize(("cells", "boundary"), [(0, "free"), (3, "fxed")])
def test_a_tessellation_that_is_none_is_refused(cells: int, boundary: str) -> None:
    with pytest.raises(ConfigError, match=f"^cpab: got cells={cells}, boundary={boundary}: cells must be >= 1, boundary free or fixed$"):
        cpab(cells, boundary)


def test_nan_stays_nan_and_harms_no_other_image() -> None:
    theta = noise(3, 50).float()
    theta[1, 7] = torch.nan
    moved = cpab(3)(theta, lattice(28, 28))
    assert moved[1].isnan().any() and not moved[[0, 2]].isnan().any()


# The kernel


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")


def value_and_gradients(function, fields: Tensor, points: Tensor) -> list[Tensor]:
    fields, points = fields.clone().requires_grad_(), points.clone().requires_grad_()
    moved = function(fields, points)
    weights = noise(*moved.shape, seed=3).to(moved.dtype)
    return [moved.detach(), *torch.autograd.grad((moved * weights).sum(), (fields, points))]


@needs_a_compiler
@pytest.mark.parametrize("cells", [1, 3])
@pytest.mark.parametrize("n", [1, 31, 784])
@pytest.mark.parametrize("own", [False, True], ids=["shared points", "own points"])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_the_kernel_is_the_flow_and_its_gradients(cells: int, n: int, own: bool, size: float) -> None:
    fields = fields_of(size * noise(5, 2 * len(vertices(cells)), seed=n), cells)
    points = 2.2 * torch.rand(*((5, n, 2) if own else (n, 2)), generator=torch.Generator().manual_seed(n), dtype=torch.float64) - 1.1

    def plain(fields: Tensor, points: Tensor) -> Tensor:
        return flow(fields, points.expand(len(fields), -1, 2), cells, n_steps(cells))

    exact = value_and_gradients(plain, fields, points)
    ours, single = (value_and_gradients(f, fields.float(), points.float()) for f in (flow_kernel(cells, n_steps(cells)), plain))
    for a, b, right in zip(ours, single, exact, strict=True):
        near = (a - right).abs() <= 1e-4 * right.abs().max()
        assert (
            near.all() or (~near).sum() <= 2 * ((b - right).abs() > 1e-4 * right.abs().max()).sum()
        )  # where rounding takes another triangle


@needs_a_compiler
def test_the_number_of_threads_changes_no_bit() -> None:
    fields, points = fields_of(noise(7, 50), 3).float(), lattice(9, 9)
    alone = value_and_gradients(flow_kernel(3, 5), fields, points)
    torch.set_num_threads(3)
    together = value_and_gradients(flow_kernel(3, 5), fields, points)
    torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@needs_a_compiler
def test_the_kernel_passes_nan_on() -> None:
    fields = fields_of(noise(2, 50), 3).float()
    fields[1] = torch.nan
    moved, of_fields, _ = value_and_gradients(flow_kernel(3, 5), fields, lattice(5, 5))
    assert moved[1].isnan().all() and not moved[0].isnan().any() and not of_fields[0].isnan().any()


@needs_a_compiler
def test_the_kernel_refuses_what_it_was_not_compiled_for() -> None:
    with pytest.raises(ValueError, match="flow kernel: got torch.float64 on cpu"):
        flow_kernel(3, 5)(torch.zeros(1, 6, 36, dtype=torch.float64), lattice(2, 2))


@needs_a_compiler
def test_the_compiled_family_is_the_family() -> None:
    theta, points = 0.3 * noise(4, 50).float(), lattice(28, 28)
    torch.testing.assert_close(cpab(3)(theta, points, cpab(3).compiled()), cpab(3)(theta, points), atol=1e-5, rtol=0)
