"""What a family of warps is: a name, a size, an identity and a function of points."""

from collections.abc import Callable
from dataclasses import dataclass

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
    warp: (theta (B, P), target points (N, 2) or (B, N, 2)) -> source points (B, N, 2), not clamped.
    source: where the family is defined.
    inverse: theta -> theta of the inverse warp, where the family is closed under inversion in theta.
    compiled: makes the same warp by a kernel for float32 on this CPU, from `program`, where there is one.
    """

    name: str
    identity: tuple[float, ...]
    warp: Warp
    source: str
    inverse: Callable[[Tensor], Tensor] | None = None
    program: Program | None = None
    compiled: Callable[[], Warp] | None = None

    @property
    def n_params(self) -> int:
        """P, the size of theta."""
        return len(self.identity)

    def __call__(self, theta: Tensor, points: Tensor, warp: Warp | None = None) -> Tensor:
        """Warp target points by each row of theta (B, P) into source points (B, N, 2).

        Points are (N, 2), the same for all, or (B, N, 2), each row's own. `warp` stands in for the family's own, as
        `compiled` makes it. Computed at theta's precision, whatever autocast says: half a pixel is a visible shift at 8
        bits of mantissa.
        Raises: ShapeError if theta or points are of other shapes.
        """
        if theta.ndim != 2 or theta.shape[1] != self.n_params:
            raise ShapeError(f"{self.name}: theta has shape {tuple(theta.shape)}, expected (B, {self.n_params})")
        if points.ndim not in (2, 3) or points.shape[-1] != 2 or (points.ndim == 3 and points.shape[0] != theta.shape[0]):
            raise ShapeError(f"{self.name}: points has shape {tuple(points.shape)}, expected (N, 2) or ({len(theta)}, N, 2)")
        with torch.autocast(theta.device.type, enabled=False):
            return (warp or self.warp)(theta, points)
