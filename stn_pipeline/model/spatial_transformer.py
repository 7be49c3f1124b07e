"""The spatial transformer, a layer for anybody's network: localisation -> theta -> transform -> points -> sampler.

Legend: B batch, C channels, (H, W) input size, (h, w) output size, P size of theta, s supersampling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

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
        """Return theta, at fp32 or better, also from a net in half precision."""
        hidden = F.relu(self.hidden(self.stages(x)))
        dtype = torch.promote_types(self.theta.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.theta.weight.to(dtype), self.theta.bias.to(dtype))


class SpatialTransformer(nn.Module):
    """A layer that learns where to look: (B, C, H, W) -> (B, C, h, w), the image warped as its localiser says.

    The warp and the sampler compute in float32 at least, also in a network in half precision; images come out at the
    precision they came in. Images for which a warp has no finite points come out NaN, so that the loss tells it.
    The state holds the family's name: it is refused by a layer of another. A copy, or what torch.save keeps, computes
    without kernels until `use_kernel`.
    Args:    in_channels: C.   image_size: (H, W), each >= 4, or one side of a square.
             transform: a name in TRANSFORMS, or a family such as cpab(4, "fixed").
             output_size: (h, w) or one side, the input's by default.   padding: zeros, border or reflection.
             coordconv: append x, y to the input of the localiser's convolutions; coordconv_r: r too.
             iterations: how often the localiser looks, each time at the image as warped so far; the warps are composed and
             the original is sampled.
             supersample: points a side that an output pixel averages. 2 or more keeps what a warp that zooms out would skip
             (anti-aliasing); at the identity 2 blurs by (1/8, 3/4, 1/8) each way.
             arch: a name in ARCHS, whose localiser it gets.
    Raises:  ConfigError for an unknown transform, padding or arch, too small an image, or the state of another family;
             ShapeError for another input size.
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
        image_size: int | tuple[int, int],
        transform: str | Transform = "affine",
        *,
        output_size: int | tuple[int, int] | None = None,
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
        image_size = _height_and_width(image_size)
        self.transform = (TRANSFORMS[transform] if isinstance(transform, str) else transform).for_image(image_size)
        self.padding, self.iterations, self.supersample = padding, iterations, supersample
        self.input_shape = (in_channels, *image_size)
        self.output_size = image_size if output_size is None else _height_and_width(output_size)
        options = Options.for_image(arch, image_size, coordconv, coordconv_r)
        self.localisation = Localisation(in_channels, image_size, self.transform.identity, options)
        self._target_size = (supersample * self.output_size[0], supersample * self.output_size[1])
        self.register_buffer("target", lattice(*self._target_size), persistent=False)  # (s·h·s·w, 2)
        self.register_buffer("view", lattice(*image_size) if iterations > 1 else None, persistent=False)
        self._compiled: Warp | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert as every module does, but lay the coordinates anew: half precision is half a pixel at 224 px."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, size in (("target", self._target_size), ("view", self.input_shape[1:])):
            if (points := getattr(self, name)) is not None:
                setattr(self, name, lattice(*size, torch.promote_types(points.dtype, torch.float32), points.device))
        return self

    def get_extra_state(self) -> Tensor:
        """Return the family's name, in bytes: its theta means something else to another, of the same size or not."""
        return torch.tensor(list(self.transform.full_name.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of another family, before any of it is taken over."""
        told = bytes(state.tolist()).decode()
        if told != self.transform.full_name:
            raise ConfigError(
                f"SpatialTransformer: the state is of transform={told}, the layer has transform={self.transform.full_name}: "
                "load it into a layer of its own family"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a state from before it held the family's name, too: as it fits, as then."""
        name = f"{prefix}_extra_state"
        if name not in state_dict and f"{prefix}localisation.theta.weight" in state_dict:
            if self.transform.takes_aspect and self.input_shape[1] != self.input_shape[2]:
                raise ConfigError(
                    f"SpatialTransformer: the state is from before transform={self.transform.name} turned images that are not "
                    "square without shearing them: train it again, or load it with the version that made it"
                )
            state_dict[name] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the kernel, which belongs to this process."""
        return self.__dict__ | {"_compiled": None}

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
        return Look(torch.stack(theta), self._source(theta, self.get_buffer("target"), self._target_size))

    def _source(self, theta: list[Tensor], points: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the source points (B, *size, 2) of the warps composed: the last, nearest to the output, goes first."""
        for each in reversed(theta):
            points = self.transform(each, points, self._compiled)
        return points.view(-1, *size, 2)

    def _read(self, x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        warped = sample(x, points, self.padding)
        if self.supersample > 1:
            warped = F.avg_pool2d(warped, self.supersample)
            points = F.avg_pool2d(points.permute(0, 3, 1, 2), self.supersample).permute(0, 2, 3, 1)
        return warped.to(x.dtype), points

    def warp(self, x: Tensor, see: Callable[[Tensor], Tensor] = as_it_is) -> tuple[Tensor, Tensor]:
        """Return the warped images (B, C, h, w) and the sampling grid (B, h, w, 2): where each output pixel is read, (x, y)."""
        return self._read(x, self.look(x, see).points)

    def forward(self, x: Tensor, return_grid: bool = False, return_theta: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Return the warped images, and where asked the sampling grid (B, h, w, 2) and theta (iterations, B, P), in this order."""
        look = self.look(x)
        warped, points = self._read(x, look.points)
        more = (points,) * return_grid + (look.theta,) * return_theta
        return (warped, *more) if more else warped


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
