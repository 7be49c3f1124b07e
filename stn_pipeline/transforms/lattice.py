"""The one home of the coordinate convention: where the pixels of an image lie, and what a warp does to them.

Coordinates are (x, y), x right, y down; [-1, 1] spans the image's outer edges, so that one pixel is 2/W wide and
pixel (row i, column j) of an (H, W) image has its centre at ((2j + 1)/W - 1, (2i + 1)/H - 1). This is what torch calls
`align_corners=False`; beside this file only sampler.py knows it.

Legend: B batch, N points, (h, w) size of the output lattice.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def lattice(height: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return the (h·w, 2) target points (x, y): the pixel centres of an (h, w) image, row by row."""
    x = (2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1
    y = (2 * torch.arange(height, dtype=torch.float64) + 1) / height - 1
    points = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
    return points.view(-1, 2).to(dtype=dtype, device=device)


class WarpShape(NamedTuple):
    """What a batch of warps does, in three means: the diagnostics of a localiser that runs away.

    outside: share of the sampling points that lie outside the image, 0..1.
    log_det: mean log of the local change of area; 0 keeps areas, log 4 sees the image at half its size.
    folded: share of the lattice's cells that are turned inside out, 0..1.
    """

    outside: float
    log_det: float
    folded: float


def warp_shape(points: Tensor) -> WarpShape:
    """Measure (B, h, w, 2) sampling points of any family, by the signed areas of the lattice's cells.

    Needs h, w >= 2. The log of an area is cut off at 1e-12 of the cell's own, so that a flat warp stays finite.
    """
    points = points.double()
    height, width = points.shape[1:3]
    right = (points[:, :-1, 1:] - points[:, :-1, :-1]) * (width / 2)  # (B, h-1, w-1, 2), a step of one target pixel
    down = (points[:, 1:, :-1] - points[:, :-1, :-1]) * (height / 2)
    det = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]
    return WarpShape(
        outside=1 - (points.abs() <= 1).all(dim=-1).double().mean().item(),  # NaN is nowhere, hence outside
        log_det=det.abs().clamp_min(1e-12).log().mean().item(),
        folded=(det < 0).double().mean().item(),
    )
