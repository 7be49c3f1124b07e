"""The sizes of the networks, convolutions with CoordConv, and the stage conv -> pool -> relu of which both nets are made.

Legend: B batch, C channels, (H, W) input size, k kernel side.
"""

import math
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_pipeline.errors import ConfigError
from stn_pipeline.model.native import Geometry, Kernel, stage_kernel
from stn_pipeline.transforms import lattice

SMALLEST_SIDE = 4


class Sizes(NamedTuple):
    """Of a net of two stages and at most one hidden layer: channels and kernel side of the stages, hidden units (0: no such layer)."""

    channels: tuple[int, int]
    kernels: tuple[int, int]
    hidden: int


class Arch(NamedTuple):
    """An architecture: its two nets, where the classifier drops out, and what it does with small and large images.

    unpadded_side: px a side below which convolutions are padded to keep their size, or too few features would be left.
    halved_from: px a side from which images are halved before both nets.
    """

    localiser: Sizes
    classifier: Sizes
    dropout: bool
    unpadded_side: int
    halved_from: float


# report: the seed report's.   stcnn: the STN paper's, with as many filters as make its 400k parameters at 28x28.
ARCHS = {
    "report": Arch(Sizes((8, 10), (7, 5), 32), Sizes((10, 20), (5, 5), 50), dropout=True, unpadded_side=22, halved_from=math.inf),
    "stcnn": Arch(Sizes((20, 20), (5, 5), 20), Sizes((88, 88), (9, 7), 0), dropout=False, unpadded_side=26, halved_from=56),
}


class Options(NamedTuple):
    """What both nets of a network share: the architecture, and whether convolutions are padded, given x and y, given r too."""

    arch: Arch
    padded: bool
    coordconv: bool
    coordconv_r: bool

    @classmethod
    def for_image(cls, arch: str, image_size: tuple[int, int], coordconv: bool, coordconv_r: bool) -> Self:
        """Return the options for an image size (H, W).

        Raises: ConfigError below 4 pixels a side, where two poolings leave nothing.
        """
        if min(image_size) < SMALLEST_SIDE:
            height, width = image_size
            raise ConfigError(
                f"images are {height}x{width} px: both sides must be >= {SMALLEST_SIDE} px, for two poolings; use larger images"
            )
        return cls(ARCHS[arch], min(image_size) < ARCHS[arch].unpadded_side, coordconv, coordconv_r)

    def halves(self, image_size: tuple[int, int]) -> bool:
        """Say whether images of a size are halved before both nets."""
        return min(image_size) >= self.arch.halved_from


class CoordConv2d(nn.Conv2d):
    """A convolution that also sees where it is: the channels x, y (and r) are appended to its input.

    Convention: x and y are the pixel centres in [-1, 1], each axis scaled by its own size; r = sqrt(x² + y²), the
    distance from the centre.
    It starts as close to the plain layer as torch's initialisation lets it: with the same bias, and with the plain layer's
    weights for the channels that both have, scaled by sqrt(fan-in of that / fan-in of this), as for a layer of its fan-in.
    Source:  Liu et al. 2018, sec. 3 (arXiv:1807.03247).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int, image_size: tuple[int, int], radius: bool):
        self.n_shared = in_channels  # before torch's own constructor, which draws the weights
        super().__init__(in_channels + 2 + radius, out_channels, kernel_size, padding=padding)
        x, y = lattice(*image_size).T.view(2, 1, *image_size)
        channels = [x, y, torch.sqrt(x**2 + y**2)] if radius else [x, y]
        self.register_buffer("coordinates", torch.stack(channels, dim=1), persistent=False)  # (1, 2 or 3, H, W)

    def reset_parameters(self) -> None:
        """Draw the weights and the bias, from the same random numbers as the plain layer and then more."""
        plain = nn.Conv2d(self.n_shared, self.out_channels, self.kernel_size)  # type: ignore[arg-type]
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        with torch.no_grad():
            self.weight[:, : self.n_shared] = plain.weight * math.sqrt(self.n_shared / self.in_channels)
            self.weight[:, self.n_shared :].uniform_(-bound, bound)
            self.get_parameter("bias").copy_(plain.get_parameter("bias"))

    def with_coordinates(self, input: Tensor) -> Tensor:
        """Append the coordinates to (B, C, H, W)."""
        coordinates = self.get_buffer("coordinates").to(input.dtype).expand(input.shape[0], -1, -1, -1)
        return torch.cat((input, coordinates), dim=1)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W) and its coordinates."""
        return super().forward(self.with_coordinates(input))


class Stage(nn.Module):
    """Convolution, 2x2 max pooling, ReLU, channel dropout (where asked): (B, C, H, W) -> (B, out, h, w).

    The order is for speed and changes nothing: dropout scales a whole channel by a number >= 0, so it may follow the
    pooling and the ReLU. `size` is the (h, w) that comes out.
    """

    def __init__(self, channels: tuple[int, int], kernel: int, image_size: tuple[int, int], options: "Options", *, dropout: bool = False):
        super().__init__()
        self.padding = kernel // 2 if options.padded else 0
        self.conv = (
            CoordConv2d(*channels, kernel, self.padding, image_size, options.coordconv_r)
            if options.coordconv
            else nn.Conv2d(*channels, kernel, padding=self.padding)
        )
        self.dropout = nn.Dropout2d() if dropout else nn.Identity()
        height, width = (side + 2 * self.padding for side in image_size)
        self.geometry = Geometry(self.conv.in_channels, self.conv.out_channels, kernel, height, width)
        self.size = self.geometry.size
        self._kernel: Kernel | None = None

    def use_kernel(self) -> None:
        """Compute by a kernel compiled for this machine from now on: float32 on the CPU only, the same to rounding.

        Raises: CompilerError.
        """
        self._kernel = stage_kernel(self.geometry)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the kernel, which belongs to this process: a copy computes plainly until it is told."""
        return self.__dict__ | {"_kernel": None}

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled, rectified features."""
        if self._kernel is None:
            pooled = F.relu(F.max_pool2d(self.conv(x), 2))
        else:
            inputs = self.conv.with_coordinates(x) if isinstance(self.conv, CoordConv2d) else x
            inputs = F.pad(inputs, (self.padding,) * 4) if self.padding else inputs
            pooled = self._kernel(inputs, self.conv.weight, self.conv.get_parameter("bias"))
        kept: Tensor = self.dropout(pooled)
        return kept


class Stages(nn.Sequential):
    """The two stages of a net: (B, C, H, W) -> (B, n_features), flat. Images that are halved first, by `pool`, are so here."""

    def __init__(
        self, sizes: Sizes, in_channels: int, image_size: tuple[int, int], options: Options, *, pool: type[nn.Module], dropout: bool
    ):
        halved = options.halves(image_size)
        height, width = image_size
        size = (height // 2, width // 2) if halved else image_size
        first = Stage((in_channels, sizes.channels[0]), sizes.kernels[0], size, options)
        second = Stage(sizes.channels, sizes.kernels[1], first.size, options, dropout=dropout)
        super().__init__(first, second)
        self.halve = pool(2) if halved else None
        self.n_features = sizes.channels[1] * math.prod(second.size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        x = x if self.halve is None else self.halve(x)
        features: Tensor = self[1](self[0](x))
        return features.flatten(1)
