"""Projective warps (homographies): straight lines stay straight, parallels need not."""

import torch.nn.functional as F
from torch import Tensor

from stn_pipeline.transforms.affine import apply_rows
from stn_pipeline.transforms.family import Transform

HORIZON = 0.01


def warp(theta: Tensor, points: Tensor) -> Tensor:
    """Return the source points (h1 x + h2 y + h3, h4 x + h5 y + h6) / (h7 x + h8 y + 1).

    Points at the horizon and beyond it (a denominator under 0.01) take 0.01: they land far outside the image instead
    of being reflected into it, and stay finite.
    Convention: theta is (h1 .. h8), the rows of the matrix with 1 in its last place.
    Args:    theta: (B, 8) unitless, identity at (1, 0, 0, 0, 1, 0, 0, 0).   points: (N, 2) or (B, N, 2) target (x, y) in [-1, 1].
    Returns: (B, N, 2) source points, not clamped.
    Source:  Jaderberg et al. 2015, sec. 4.1 (projective transformer).   Checked against: corners worked out by hand.
    """
    matrix = F.pad(theta, (0, 1), value=1.0).view(-1, 3, 3)  # (B, 3, 3)
    source = apply_rows(matrix, points)  # (B, N, 3)
    return source[..., :2] / source[..., 2:].clamp_min(HORIZON)


PROJECTIVE = Transform(name="projective", identity=(1, 0, 0, 0, 1, 0, 0, 0), warp=warp, source="Jaderberg et al. 2015, sec. 4.1")
