"""The stage conv -> pool -> relu as one operation on the CPU.

layers.py is the definition; this is the same function and the same gradients to float32 rounding, in a third of the time
or less (stage.cpp says how).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stn_pipeline.compiler import Program, library

SOURCE = Path(__file__).with_name("stage.cpp")
LANES = 16  # images that a thread holds at once
MOST_SCRATCH = 2**26  # bytes of them: beyond the caches there is nothing to gain

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Geometry(NamedTuple):
    """What a kernel is compiled for: channels in and out, the kernel's side, the padded image's height and width."""

    C: int
    O: int  # noqa: E741
    K: int
    H: int
    W: int

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the pooled map."""
        return (self.H - self.K + 1) // 2, (self.W - self.K + 1) // 2

    @property
    def products(self) -> int:
        """Multiplications an image, forward."""
        height, width = self.size
        return self.C * self.O * self.K**2 * 4 * height * width

    @property
    def fits(self) -> bool:
        """Whether a thread's share of the images is small enough for a kernel to pay."""
        height, width = self.size
        return 4 * LANES * max(self.C * self.H * self.W, self.O * height * width) <= MOST_SCRATCH

    @property
    def program(self) -> Program:
        """What computes it."""
        return Program(SOURCE, tuple(self._asdict().items()))


def stage_kernel(geometry: Geometry) -> Kernel:
    """Return relu(max_pool2d(conv2d(x, weight, bias), 2)) for float32 on the CPU, differentiable once.

    x: (B, C, H, W).   weight: (O, C, K, K).   bias: (O,).   Returns (B, O, h, w).
    Equal to torch's to rounding, and bitwise the same for any number of threads.  Checked against: torch, in float64.
    Raises: CompilerError where it is not compiled and cannot be.
    """
    compiled = _load(geometry)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pooled: Tensor = _Stage.apply(compiled, geometry, x.contiguous(), weight.contiguous(), bias)
        return pooled

    return kernel


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: ctypes.CDLL, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[1:] != (geometry.C, geometry.H, geometry.W):
            raise ValueError(f"stage kernel: got {x.dtype} {tuple(x.shape)} on {x.device}, compiled for float32 {geometry} on the CPU")
        pooled = torch.empty(len(x), geometry.O, *geometry.size)
        which = torch.empty(pooled.shape, dtype=torch.uint8)
        library.forward(*_addresses(x, weight, bias, pooled, which), len(x), torch.get_num_threads())
        ctx.save_for_backward(x, weight, which)
        ctx.library = library
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, which = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        of_weight, of_bias = torch.empty_like(weight), torch.empty(len(weight))
        gradient = gradient.contiguous()  # by a name: what has none is gone before its address is used
        ctx.library.backward(*_addresses(gradient, which, x, weight, of_x, of_weight, of_bias), len(x), torch.get_num_threads())
        return None, None, of_x, of_weight, of_bias


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@cache
def _load(geometry: Geometry) -> ctypes.CDLL:
    loaded = library(geometry.program)
    loaded.forward.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_int]
    loaded.backward.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64, ctypes.c_int]
    return loaded
