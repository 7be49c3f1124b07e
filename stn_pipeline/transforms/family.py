"""What a family of warps is: a name, a size, an identity and a function of points."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stn_pipeline.compiler import Program
from stn_pipeline.errors import ShapeError

Warp = Callable[[Tensor, Tensor], Tensor]


class Constant:
    """Numbers of a family that never change, brought to each precision and device once: a captured step may not copy from the host."""

    def __init__(self, values: Tensor):
        self._values = values.contiguous()
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the numbers alone: what is kept of them belongs to a device of this process."""
        return Constant, (self._values,)

    def like(self, tensor: Tensor) -> Tensor:
        """Return the numbers at a tensor's precision, where it lies."""
        key = tensor.dtype, tensor.device
        if torch.compiler.is_exporting():  # what is made while a graph is traced is a stand-in: never kept
            return self._values.to(tensor)
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = self._values.to(tensor)
        return self._kept[key]


@dataclass(frozen=True)
class Transform:
    """One family of warps, from target (output) points to source (input) points.

    name: as the knob `transform` spells it.
    identity: theta of the identity, (P,) unitless; the localiser's last bias starts there.
    warp: (theta (B, P), target points (N, 2) or (B, N, 2)) -> source points (B, N, 2), not clamped; with takes_aspect also
        `aspect`, W / H of the image that is read, 1 by default.
    source: where the family is defined.
    inverse: theta -> theta of the inverse warp, where the family is closed under inversion in theta.
    compiled: makes the same warp by a kernel for float32 on this CPU, from `program`, where there is one.
    takes_aspect: theta holds what has a meaning in pixels only, as an angle has: `for_image` makes it hold on every image.
    made_by: function and arguments that make this family, where it is one of several by that name and cannot be pickled as
        it is.
    """

    name: str
    identity: tuple[float, ...]
    warp: Warp
    source: str
    inverse: Callable[[Tensor], Tensor] | None = None
    program: Program | None = None
    compiled: Callable[[], Warp] | None = None
    takes_aspect: bool = False
    made_by: tuple[Callable[..., "Transform"], tuple[object, ...]] | None = None

    @property
    def n_params(self) -> int:
        """P, the size of theta."""
        return len(self.identity)

    @property
    def full_name(self) -> str:
        """The name and what the family was made with, as in cpab(3, free): theta of one means nothing to another."""
        return self.name if self.made_by is None else f"{self.name}({', '.join(map(str, self.made_by[1]))})"

    def for_image(self, size: tuple[int, int]) -> "Transform":
        """Return the family for images (H, W): itself, unless theta means pixels and the image is not square."""
        height, width = size
        if not self.takes_aspect or height == width:
            return self
        return replace(self, warp=partial(self.warp, aspect=width / height))  # type: ignore[call-arg]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by `made_by` where there is one."""
        return self.made_by or super().__reduce_ex__(protocol)

    def __call__(self, theta: Tensor, points: Tensor, warp: Warp | None = None) -> Tensor:
        """Warp target points by each row of theta (B, P) into source points (B, N, 2).

        Points are (N, 2), the same for all, or (B, N, 2), each row's own. `warp` stands in for the family's own, as
        `compiled` makes it. Computed and returned at theta's precision, float32 at least, whatever autocast says: half a
        pixel is a visible shift at 8 bits of mantissa.
        Raises: ShapeError if theta or points are of other shapes.
        """
        if theta.ndim != 2 or theta.shape[1] != self.n_params:
            raise ShapeError(f"{self.name}: theta has shape {tuple(theta.shape)}, expected (B, {self.n_params})")
        if points.ndim not in (2, 3) or points.shape[-1] != 2 or (points.ndim == 3 and points.shape[0] != theta.shape[0]):
            raise ShapeError(f"{self.name}: points has shape {tuple(points.shape)}, expected (N, 2) or ({len(theta)}, N, 2)")
        dtype = torch.promote_types(theta.dtype, torch.float32)
        with torch.autocast(theta.device.type, enabled=False):
            return (warp or self.warp)(theta.to(dtype), points.to(dtype))
