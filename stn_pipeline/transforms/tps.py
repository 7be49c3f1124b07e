"""Thin-plate splines: the smoothest warp that moves sixteen control points where theta says."""

import torch
from torch import Tensor

from stn_pipeline.transforms.family import Constant, Transform

SIDE = 4
TICKS = tuple(2 * i / (SIDE - 1) - 1 for i in range(SIDE))
CONTROL_POINTS = torch.tensor([(x, y) for y in TICKS for x in TICKS], dtype=torch.float64)
CONTROL = Constant(CONTROL_POINTS)


def _features(points: Tensor) -> Tensor:
    """Return r² log r² to each control point, then 1, x, y: (..., 2) -> (..., 19)."""
    squared = (points[..., None, :] - CONTROL.like(points)).square().sum(dim=-1)  # (..., 16)
    radial = squared * torch.where(squared > 0, squared, 1).log()
    return torch.cat((radial, torch.ones_like(points[..., :1]), points), dim=-1)


def _weights() -> Tensor:
    """Return the spline's coefficients (19, 16), float64, for a unit displacement of each control point in turn."""
    n = len(CONTROL_POINTS)
    system = torch.zeros(n + 3, n + 3, dtype=torch.float64)
    system[:n] = _features(CONTROL_POINTS)
    system[n:, :n] = system[:n, n:].T
    weights: Tensor = torch.linalg.solve(system, torch.eye(n + 3, n, dtype=torch.float64))
    return weights


# The spline is linear in the places of its control points, so its system is solved once for all.
WEIGHTS = Constant(_weights())


def warp(theta: Tensor, points: Tensor) -> Tensor:
    """Return the source points of the spline through the control points.

    Convention: theta is the source places (x, y) of a 4x4 lattice of target points spanning [-1, 1]², row by row.
    Args:    theta: (B, 32), identity at the lattice itself.   points: (N, 2) or (B, N, 2) target (x, y) in [-1, 1].
    Returns: (B, N, 2) source points, not clamped; may fold where control points cross.
    Source:  Bookstein 1989; Jaderberg et al. 2015, sec. 4.1.   Checked against: scipy.interpolate.RBFInterpolator.
    """
    rest = CONTROL.like(theta)
    moved = theta.view(-1, len(rest), 2) - rest  # (B, 16, 2)
    # The displacement alone is interpolated: the identity then is exact, to the last bit.
    basis = _features(points).to(theta.dtype) @ WEIGHTS.like(theta)  # (..., N, 16)
    if points.ndim == 3:
        return points + basis @ moved
    displacement = basis @ moved.transpose(0, 1).reshape(len(rest), -1)  # (N, 16) @ (16, 2B)
    return points + displacement.view(len(points), theta.shape[0], 2).transpose(0, 1)  # (B, N, 2)


TPS = Transform(name="tps", identity=tuple(CONTROL_POINTS.flatten().tolist()), warp=warp, source="Bookstein 1989")
