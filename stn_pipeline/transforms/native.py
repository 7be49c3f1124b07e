"""The flow of a CPAB warp as one operation on the CPU, compiled for this machine.

cpab.py is the definition; this is the same function and the same gradients to float32 rounding.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stn_pipeline.compiler import Program, library

SOURCE = Path(__file__).with_name("cpab.cpp")

Flow = Callable[[Tensor, Tensor], Tensor]


def flow_program(cells: int, steps: int) -> Program:
    """What computes the flow over cells x cells squares in so many steps."""
    return Program(SOURCE, (("CELLS", cells), ("STEPS", steps)))


def flow_kernel(cells: int, steps: int) -> Flow:
    """Return the flow of fields (B, 6, T) from points (N, 2) or (B, N, 2) to (B, N, 2), float32 on the CPU, differentiable once.

    Bitwise the same for any number of threads.   Checked against: cpab.flow, in float64.
    Raises: CompilerError where it is not compiled and cannot be.
    """
    compiled = _load(flow_program(cells, steps))

    def kernel(fields: Tensor, points: Tensor) -> Tensor:
        moved: Tensor = _Flow.apply(compiled, fields.contiguous(), points.contiguous())
        return moved

    return kernel


class _Flow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: ctypes.CDLL, fields: Tensor, points: Tensor) -> Tensor:
        for given in (fields, points):
            if given.dtype != torch.float32 or given.device.type != "cpu":
                raise ValueError(f"flow kernel: got {given.dtype} on {given.device}, compiled for float32 on the CPU")
        moved = torch.empty(len(fields), *points.shape[-2:])
        ctx.sizes = (len(fields), points.shape[-2], points.ndim == 2)
        compiled.forward(fields.data_ptr(), points.data_ptr(), moved.data_ptr(), *ctx.sizes, torch.get_num_threads())
        ctx.save_for_backward(fields, points)
        ctx.compiled = compiled
        return moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        fields, points = ctx.saved_tensors
        gradient, of_fields = gradient.contiguous(), torch.empty_like(fields)
        of_points = torch.empty_like(gradient) if ctx.needs_input_grad[2] else None
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in (gradient, fields, points, of_fields, of_points)]
        ctx.compiled.backward(*addresses, *ctx.sizes, torch.get_num_threads())
        if of_points is not None and points.ndim == 2:
            of_points = of_points.sum(dim=0)
        return None, of_fields, of_points


@cache
def _load(program: Program) -> ctypes.CDLL:
    loaded = library(program)
    sizes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    loaded.forward.argtypes = (*[ctypes.c_void_p] * 3, *sizes)
    loaded.backward.argtypes = (*[ctypes.c_void_p] * 5, *sizes)
    return loaded
