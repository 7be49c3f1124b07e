"""CPAB warps: the flow of a continuous velocity field that is affine in each triangle of a tessellation.

The square [-1, 1]² is cut into cells x cells squares, each into four triangles that meet at its centre. Any velocities of
the vertices make one such field, and each field is made by one: they are theta. (Freifeld et al. take an orthonormal
basis of the same space, by SVD of the continuity constraints. It is fixed only up to a rotation, so a theta would be
another warp under another LAPACK; a test holds that both span the same fields.) Outside the square a point has the
velocity of the nearest point inside, so the field is continuous everywhere and each warp is a bijection of the plane.

Legend: B batch, N points, V vertices, T triangles, P size of theta.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from stn_pipeline.errors import ConfigError
from stn_pipeline.transforms.family import Constant, Transform
from stn_pipeline.transforms.native import flow_kernel, flow_program

Boundary = Literal["free", "fixed"]


def vertices(cells: int) -> Tensor:
    """Return the vertices (V, 2), float64: corners of the squares row by row, then their centres."""
    corner = torch.linspace(-1, 1, cells + 1, dtype=torch.float64)
    centre = (corner[1:] + corner[:-1]) / 2
    return torch.cat([torch.stack((side.repeat(len(side)), side.repeat_interleave(len(side))), dim=1) for side in (corner, centre)])


def triangles(cells: int) -> Tensor:
    """Return the three vertices of each triangle, (T, 3): square by square; left, top, bottom, right of its centre."""
    row, column = torch.arange(cells * cells) // cells, torch.arange(cells * cells) % cells
    first = row * (cells + 1) + column
    a, b, c, d = first, first + 1, first + cells + 1, first + cells + 2  # the corners: top left, top right, bottom left, bottom right
    centre = (cells + 1) ** 2 + row * cells + column
    sides = [torch.stack((*edge, centre), dim=1) for edge in ((a, c), (a, b), (c, d), (b, d))]
    return torch.stack(sides, dim=1).view(-1, 3)


def basis(cells: int, boundary: Boundary) -> Tensor:
    """Return (P, 6T), float64: a, b, tx, c, d, ty of all the triangles' affine maps for a unit velocity of each vertex in turn.

    A fixed boundary has no velocity there: only the vertices inside count.
    """
    places, corners = vertices(cells), triangles(cells)
    homogeneous = torch.nn.functional.pad(places[corners], (0, 1), value=1.0)  # (T, 3, 3): velocity = homogeneous @ map
    of_vertex = torch.zeros(len(corners), 3, len(places), dtype=torch.float64)
    of_vertex[torch.arange(len(corners))[:, None], torch.arange(3), corners] = 1
    maps = torch.linalg.solve(homogeneous, of_vertex)  # (T, 3, V)
    both = torch.zeros(len(places), 2, 2, 3, len(corners), dtype=torch.float64)
    both[:, 0, 0] = both[:, 1, 1] = maps.permute(2, 1, 0)
    moving = (places.abs() < 1).all(dim=1) if boundary == "fixed" else torch.ones(len(places), dtype=torch.bool)
    return both[moving].flatten(2).flatten(0, 1)


def velocity(fields: Tensor, points: Tensor, cells: int) -> Tensor:
    """Return the velocities (B, 2, N) of the fields (B, 6, T) at points (B, 2, N)."""
    x, y = points.clamp(-1, 1).unbind(dim=1)
    with torch.no_grad():
        place = torch.stack((x, y), dim=1).add_(1).mul_(cells / 2)
        square = place.floor().clamp_(max=cells - 1)
        (u, v), (column, row) = place.sub_(square).sub_(0.5).unbind(dim=1), square.unbind(dim=1)
        which = (row * (4 * cells)).add_(column, alpha=4).add_(u > v).add_(u > -v, alpha=2)
        which = which.long().clamp_(0, fields.shape[2] - 1)  # NaN is nowhere: any triangle will do, for it stays NaN
    maps = fields.gather(2, which[:, None].expand(-1, 6, -1))  # (B, 6, N)
    a, b, shift = maps.view(-1, 2, 3, maps.shape[2]).unbind(dim=2)  # (B, 2, N) each
    return torch.addcmul(torch.addcmul(shift, a, x[:, None]), b, y[:, None])


def n_steps(cells: int) -> int:
    """Return the steps of a flow: the smaller the squares, the sooner a velocity changes along the way."""
    return max(5, 2 * cells - 1)


def flow(fields: Tensor, points: Tensor, cells: int, steps: int) -> Tensor:
    """Move points (B, N, 2) with the fields (B, 6, T) for one unit of time.

    By Ralston's third-order method: of those tried, the least error for as many velocities.
    Source: Ralston 1962 (Mathematics of Computation 16).
    """
    h, p = 1 / steps, points.transpose(1, 2).contiguous()
    for _ in range(steps):
        k1 = velocity(fields, p, cells)
        k2 = velocity(fields, p.add(k1, alpha=h / 2), cells)
        k3 = velocity(fields, p.add(k2, alpha=3 * h / 4), cells)
        p = p.add(k1, alpha=2 * h / 9).add(k2, alpha=3 * h / 9).add(k3, alpha=4 * h / 9)
    return p.transpose(1, 2)


@cache
def cpab(cells: int = 3, boundary: Boundary = "free") -> Transform:
    """Return the family of a tessellation.

    Convention: theta is the velocity (x, y) of each vertex, in half images a unit of time, in the order of `vertices`; zero
    is the identity, and -theta inverts theta to the error of the steps: of 28x28 pixels with 3 cells a side, in the mean
    0.0002 px where the furthest moves by 3 px, 0.004 px where it moves by 8, and nothing folds that far.
    Args:    cells: squares a side.   boundary: free, or fixed: points of the square's edge stay, and none crosses it.
    Theta:   (B, 2V), V = (cells + 1)² + cells², of which a fixed boundary leaves (cells - 1)² + cells².
    Raises:  ConfigError for fewer than one square a side, or another boundary.
    Source:  Freifeld et al. 2017 (TPAMI), sec. 4; Detlefsen et al. 2018 (CVPR) put them into an STN.
    Checked against: scipy's solve_ivp on the velocities, libcpab, scipy.linalg.expm where the field is one affine map.
    """
    if cells < 1 or boundary not in ("free", "fixed"):
        raise ConfigError(f"cpab: got cells={cells}, boundary={boundary}: cells must be >= 1, boundary free or fixed")
    hats, steps, n_triangles = Constant(basis(cells, boundary)), n_steps(cells), 4 * cells**2

    def fields(theta: Tensor) -> Tensor:
        return (theta @ hats.like(theta)).view(-1, 6, n_triangles)

    def warp(theta: Tensor, points: Tensor) -> Tensor:
        return flow(fields(theta), points.expand(theta.shape[0], -1, 2), cells, steps)

    def compiled() -> Callable[[Tensor, Tensor], Tensor]:
        kernel = flow_kernel(cells, steps)
        return lambda theta, points: kernel(fields(theta), points)

    return Transform(
        name="cpab", identity=(0,) * len(hats), warp=warp, source="Freifeld et al. 2017, sec. 4", inverse=torch.neg,
        program=flow_program(cells, steps), compiled=compiled, made_by=(cpab, (cells, boundary)),
    )  # fmt: skip


CPAB = cpab(3, "free")
