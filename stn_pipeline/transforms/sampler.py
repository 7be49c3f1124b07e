"""The sampler: reads an image at the source points of a warp, bilinearly."""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDINGS = ("zeros", "border", "reflection")
FAR = 1e9  # half images: further out float32 does not tell one pixel from another, and torch counts reflections in 32 bits


def sample(image: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Return the image read at the sampling points.

    Computed at the points' precision, float32 at least, whatever autocast says. A point that is not finite reads NaN, on
    every device and with every padding, so that a localiser that diverges is seen in the loss; so may one within a
    thousandth of the largest number that there is. Else what is beyond FAR is read as if it were at FAR.
    Args:    image: (B, C, H, W).   points: (B, h, w, 2) source points (x, y), [-1, 1] spans the image's edges.
             padding: what lies outside: zeros, border or reflection.
    Returns: (B, C, h, w).
    Source:  Jaderberg et al. 2015, sec. 3.3.   Checked against: a bilinear loop in NumPy.
    """
    with torch.autocast(image.device.type, enabled=False):
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        image = image.to(points.dtype)
        if padding == "zeros" and points.device.type == "cpu":  # torch's own kernel does all this
            return F.grid_sample(image, points, mode="bilinear", padding_mode=padding, align_corners=False)
        read = F.grid_sample(image, _within_reach(points), mode="bilinear", padding_mode=padding, align_corners=False)
        x, y = points.detach().unbind(dim=-1)
        return read.add_((x + y)[:, None], alpha=0)  # adds 0 where both are finite, NaN elsewhere


def _within_reach(points: Tensor) -> Tensor:
    """Return the points, those that are not finite or beyond FAR replaced: torch's backward pass leaves its memory at NaN.

    The gradient passes as it is: it is 0 out there in any case, and to mask it would cost as much as to sample.
    """
    safe = points.clone()
    safe.detach().clamp_(-FAR, FAR).nan_to_num_(nan=0.0)
    return safe
