"""Similarities: turn, zoom and shift, as the exponential of a generator with four numbers."""

import torch
from torch import Tensor

from stn_pipeline.transforms.affine import apply_rows
from stn_pipeline.transforms.diffeo import exp_affine
from stn_pipeline.transforms.family import Transform


def warp(theta: Tensor, points: Tensor, aspect: float = 1.0) -> Tensor:
    """Return the source points exp(G)·p with G = [[s, -r / aspect, tx], [r · aspect, s, ty]].

    In pixels, where x is W / 2 and y is H / 2 times as long as here, that is a scale and a turn on any image.

    Convention: theta is (s, r, tx, ty): log of the scale, angle in radians (from x to y, clockwise on the screen), and
    the velocity of the shift; zero is the identity, and -theta inverts theta.
    Args:    theta: (B, 4), identity at 0.   points: (N, 2) or (B, N, 2) target (x, y) in [-1, 1].
             aspect: W / H of the image that is read.
    Returns: (B, N, 2) source points, not clamped.
    Source:  Lin & Lucey 2017, sec. 3 (arXiv:1612.03897), warps by generators.   Checked against: scipy.linalg.expm.
    """
    s, r, tx, ty = theta.unbind(dim=1)
    generator = torch.stack((s, -r / aspect, tx, r * aspect, s, ty), dim=1)  # (B, 6)
    return apply_rows(exp_affine(generator.view(-1, 2, 3)), points)


SIMILARITY = Transform(
    name="similarity", identity=(0,) * 4, warp=warp, source="Lin & Lucey 2017, sec. 3", inverse=torch.neg, takes_aspect=True
)
