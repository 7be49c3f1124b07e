"""The spatial transformer, a layer for anybody's network: localisation -> theta -> transform -> points -> sampler.

Legend: B batch, C channels, (H, W) input size, (h, w) output size, P size of theta.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_pipeline.errors import ConfigError, ShapeError, did_you_mean
from stn_pipeline.model.layers import Options, Stage
from stn_pipeline.model.sampler import PADDINGS, sample
from stn_pipeline.transforms import TRANSFORMS, lattice


class Localisation(nn.Module):
    """The report's localisation net: (B, C, H, W) -> theta (B, P), the identity for every image at the start."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], identity: tuple[float, ...], options: Options):
        super().__init__()
        first = Stage((in_channels, 8), 7, image_size, options)
        second = Stage((8, 10), 5, first.size, options)
        self.stages = nn.Sequential(first, second)
        self.hidden = nn.Linear(10 * math.prod(second.size), 32)
        self.theta = nn.Linear(32, len(identity))
        self.register_buffer("identity", torch.tensor(identity, dtype=torch.float32), persistent=False)
        self.reset_to_identity()

    def reset_to_identity(self) -> None:
        """Make every image's theta the identity: zero weights, the bias alone speaks."""
        with torch.no_grad():
            self.theta.weight.zero_()
            self.theta.bias.copy_(self.get_buffer("identity"))

    def forward(self, x: Tensor) -> Tensor:
        """Return theta, at fp32 or better."""
        hidden = F.relu(self.hidden(self.stages(x).flatten(1)))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.to(self.theta.weight.dtype), self.theta.weight, self.theta.bias)


class SpatialTransformer(nn.Module):
    """A layer that learns where to look: (B, C, H, W) -> (B, C, h, w), the image warped as its localiser says.

    Args:    in_channels: C.   image_size: (H, W), each >= 4.   transform: a name in TRANSFORMS.
             output_size: (h, w), the input's by default.   padding: zeros, border or reflection.
             coordconv: append x, y to the input of the localiser's convolutions; coordconv_r: r too.
    Raises:  ConfigError for an unknown transform or padding, or too small an image; ShapeError for another input size.
    Source:  Jaderberg et al. 2015 (arXiv:1506.02025).

    Example:
        >>> layer = SpatialTransformer(in_channels=3, image_size=(32, 32), transform="diffeo")
        >>> warped, grid = layer(torch.rand(2, 3, 32, 32), return_grid=True)
        >>> warped.shape, grid.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 32, 32, 2]))
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        transform: str = "affine",
        *,
        output_size: tuple[int, int] | None = None,
        padding: str = "zeros",
        coordconv: bool = False,
        coordconv_r: bool = False,
    ):
        super().__init__()
        if transform not in TRANSFORMS:
            raise ConfigError(f"transform={transform}: choose {', '.join(TRANSFORMS)}{did_you_mean(transform, TRANSFORMS)}")
        if padding not in PADDINGS:
            raise ConfigError(f"padding={padding}: choose {', '.join(PADDINGS)}{did_you_mean(padding, PADDINGS)}")
        if coordconv_r and not coordconv:
            raise ConfigError("coordconv_r=true needs coordconv=true")
        self.transform = TRANSFORMS[transform]
        self.padding = padding
        self.input_shape = (in_channels, *image_size)
        self.output_size = output_size or image_size
        options = Options.for_image(image_size, coordconv, coordconv_r)
        self.localisation = Localisation(in_channels, image_size, self.transform.identity, options)
        self.register_buffer("target", lattice(*self.output_size), persistent=False)  # (h·w, 2)

    def points(self, x: Tensor) -> Tensor:
        """Return the sampling grid (B, h, w, 2): for each output pixel the source point (x, y) it is read at."""
        if x.shape[1:] != self.input_shape:
            raise ShapeError(f"SpatialTransformer: input has shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.input_shape))})")
        theta = self.localisation(x)  # (B, P)
        return self.transform(theta, self.get_buffer("target")).view(-1, *self.output_size, 2)

    def forward(self, x: Tensor, return_grid: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the warped images, and the sampling grid too where asked."""
        points = self.points(x)
        warped = sample(x, points, self.padding)
        return (warped, points) if return_grid else warped
