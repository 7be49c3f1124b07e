"""The spatial transformer, a layer for anybody's network: localisation -> theta -> transform -> points -> sampler.

Legend: B batch, C channels, (H, W) input size, (h, w) output size, P size of theta, s supersampling.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_pipeline.errors import ConfigError, ShapeError, did_you_mean
from stn_pipeline.model.layers import ARCHS, Options, Stages
from stn_pipeline.transforms import TRANSFORMS, Transform, Warp, lattice
from stn_pipeline.transforms.sampler import PADDINGS, sample


def as_it_is(images: Tensor) -> Tensor:
    """Return the images."""
    return images


class Look(NamedTuple):
    """Where a batch is looked at: theta of each iteration, (iterations, B, P), and the source points (B, s·h, s·w, 2)."""

    theta: Tensor
    points: Tensor


class Localisation(nn.Module):
    """The localisation net: (B, C, H, W) -> theta (B, P), the identity for every image at the start."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], identity: tuple[float, ...], options: Options):
        super().__init__()
        sizes = options.arch.localiser
        self.stages = Stages(sizes, in_channels, image_size, options, pool=nn.MaxPool2d, dropout=False)
        self.hidden = nn.Linear(self.stages.n_features, sizes.hidden)
        self.theta = nn.Linear(sizes.hidden, len(identity))
        self.register_buffer("identity", torch.tensor(identity, dtype=torch.float32), persistent=False)
        self.reset_to_identity()

    def reset_to_identity(self) -> None:
        """Make every image's theta the identity: zero weights, the bias alone speaks."""
        with torch.no_grad():
            self.theta.weight.zero_()
            self.theta.bias.copy_(self.get_buffer("identity"))

    def forward(self, x: Tensor) -> Tensor:
        """Return theta, at fp32 or better."""
        hidden = F.relu(self.hidden(self.stages(x)))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.to(self.theta.weight.dtype), self.theta.weight, self.theta.bias)


class SpatialTransformer(nn.Module):
    """A layer that learns where to look: (B, C, H, W) -> (B, C, h, w), the image warped as its localiser says.

    Args:    in_channels: C.   image_size: (H, W), each >= 4.   transform: a name in TRANSFORMS, or a family such as cpab(4, "fixed").
             output_size: (h, w), the input's by default.   padding: zeros, border or reflection.
             coordconv: append x, y to the input of the localiser's convolutions; coordconv_r: r too.
             iterations: how often the localiser looks, each time at the image as warped so far; the warps are composed and
             the original is sampled.
             supersample: points a side that an output pixel averages. 2 or more keeps what a warp that zooms out would skip
             (anti-aliasing); at the identity 2 blurs by (1/8, 3/4, 1/8) each way.
             arch: a name in ARCHS, whose localiser it gets.
    Raises:  ConfigError for an unknown transform, padding or arch, or too small an image; ShapeError for another input size.
    Source:  Jaderberg et al. 2015 (arXiv:1506.02025); iterations: Lin & Lucey 2017, sec. 4 (arXiv:1612.03897).

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
        transform: str | Transform = "affine",
        *,
        output_size: tuple[int, int] | None = None,
        padding: str = "zeros",
        coordconv: bool = False,
        coordconv_r: bool = False,
        iterations: int = 1,
        supersample: int = 1,
        arch: str = "report",
    ):
        super().__init__()
        for name, value, known in (("transform", transform, TRANSFORMS), ("padding", padding, PADDINGS), ("arch", arch, ARCHS)):
            if isinstance(value, str) and value not in known:
                raise ConfigError(f"{name}={value}: choose {', '.join(known)}{did_you_mean(value, known)}")
        for name, count in (("iterations", iterations), ("supersample", supersample)):
            if count < 1:
                raise ConfigError(f"{name}={count}: must be >= 1")
        if coordconv_r and not coordconv:
            raise ConfigError("coordconv_r=true needs coordconv=true")
        self.transform = TRANSFORMS[transform] if isinstance(transform, str) else transform
        self.padding, self.iterations, self.supersample = padding, iterations, supersample
        self.input_shape = (in_channels, *image_size)
        self.output_size = output_size or image_size
        options = Options.for_image(arch, image_size, coordconv, coordconv_r)
        self.localisation = Localisation(in_channels, image_size, self.transform.identity, options)
        height, width = (supersample * side for side in self.output_size)
        self.register_buffer("target", lattice(height, width), persistent=False)  # (s·h·s·w, 2)
        self.register_buffer("view", lattice(*image_size) if iterations > 1 else None, persistent=False)
        self._compiled: Warp | None = None

    def use_kernel(self) -> None:
        """Warp by the family's kernel, where it has one, from now on: float32 on the CPU only, the same to rounding.

        Raises: CompilerError.
        """
        self._compiled = self.transform.compiled() if self.transform.compiled is not None else None

    def look(self, x: Tensor, see: Callable[[Tensor], Tensor] = as_it_is) -> Look:
        """Return where the images (B, C, H, W) are looked at; the localiser is shown see(images), warped as far as it got."""
        if x.shape[1:] != self.input_shape:
            raise ShapeError(f"SpatialTransformer: input has shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.input_shape))})")
        theta = [self.localisation(see(x))]
        for _ in range(1, self.iterations):
            seen = sample(x, self._source(theta, self.get_buffer("view"), self.input_shape[1:]), self.padding)
            theta.append(self.localisation(see(seen)))
        height, width = (self.supersample * side for side in self.output_size)
        return Look(torch.stack(theta), self._source(theta, self.get_buffer("target"), (height, width)))

    def _source(self, theta: list[Tensor], points: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the source points (B, *size, 2) of the warps composed: the last, nearest to the output, goes first."""
        for each in reversed(theta):
            points = self.transform(each, points, self._compiled)
        return points.view(-1, *size, 2)

    def warp(self, x: Tensor, see: Callable[[Tensor], Tensor] = as_it_is) -> tuple[Tensor, Tensor]:
        """Return the warped images (B, C, h, w) and the sampling grid (B, h, w, 2): where each output pixel is read, (x, y)."""
        points = self.look(x, see).points
        warped = sample(x, points, self.padding)
        if self.supersample > 1:
            warped = F.avg_pool2d(warped, self.supersample)
            points = F.avg_pool2d(points.permute(0, 3, 1, 2), self.supersample).permute(0, 2, 3, 1)
        return warped, points

    def forward(self, x: Tensor, return_grid: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the warped images, and the sampling grid too where asked."""
        warped, points = self.warp(x)
        return (warped, points) if return_grid else warped
