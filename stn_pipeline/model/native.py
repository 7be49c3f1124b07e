"""The stage conv -> pool -> relu as one operation on the CPU, compiled for this machine by its own C++ compiler.

layers.py is the definition; this is the same function and the same gradients to float32 rounding, in a third of the time
or less (stage.cpp says how). One small library a geometry, compiled in about a second, kept in the user's cache and shared by all
processes; there is nothing to install where a compiler is.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stn_pipeline.errors import StnError

SOURCE = Path(__file__).with_name("stage.cpp")
COMPILERS = ("g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
LANES = 16  # images that a thread holds at once
MOST_SCRATCH = 2**26  # bytes of them: beyond the caches there is nothing to gain

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class CompilerError(StnError):
    """There is no C++ compiler, or it refused."""


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


def compile_kernels(geometries: Iterable[Geometry]) -> None:
    """Compile what the cache does not hold, side by side, for every process of this user on such a machine.

    Raises: CompilerError.
    """
    wanted = set(geometries)
    if is_compiled(wanted):
        return
    with _one_at_a_time():
        started = {geometry: _start(geometry) for geometry in wanted if not _library(geometry).exists()}
        for geometry, (process, unfinished) in started.items():
            _, told = process.communicate()
            if process.returncode:
                unfinished.unlink(missing_ok=True)
                raise CompilerError(f"{_compiler()} could not compile {SOURCE.name}: {told.strip()[:300] or process.returncode}")
            unfinished.rename(_library(geometry))


def is_compiled(geometries: Iterable[Geometry]) -> bool:
    """Say whether the cache holds all of these already; not where there is no compiler to know it by."""
    try:
        return all(_library(geometry).exists() for geometry in geometries)
    except CompilerError:
        return False


def stage_kernel(geometry: Geometry) -> Kernel:
    """Return relu(max_pool2d(conv2d(x, weight, bias), 2)) for float32 on the CPU, differentiable once.

    x: (B, C, H, W).   weight: (O, C, K, K).   bias: (O,).   Returns (B, O, h, w).
    Equal to torch's to rounding, and bitwise the same for any number of threads.  Checked against: torch, in float64.
    Raises: CompilerError where it is not compiled and cannot be.
    """
    compile_kernels([geometry])
    library = _load(_library(geometry))

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pooled: Tensor = _Stage.apply(library, geometry, x.contiguous(), weight.contiguous(), bias)
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
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.forward.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_int]
    library.backward.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64, ctypes.c_int]
    return library


@cache
def _compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise CompilerError(f"no C++ compiler called {' or '.join(names)} is on the path: install g++")
    return found


@cache
def _machine() -> str:
    """Return what the compiler says of itself and of this processor: a cache may be shared by unlike machines."""
    asked = subprocess.run(
        [_compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise CompilerError(f"{_compiler()} does not know -march=native: {asked.stderr.strip()[:300]}")
    return asked.stdout


@cache
def _library(geometry: Geometry) -> Path:
    """Return where a geometry's library lies, or would lie."""
    content = (SOURCE.read_text(), _compiler(), " ".join(FLAGS), _machine())
    name = "-".join(map(str, geometry))
    return _folder() / f"stage-{name}-{hashlib.sha256(chr(0).join(content).encode()).hexdigest()[:16]}.so"


def _folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("stn_pipeline") / "kernels"


def _start(geometry: Geometry) -> tuple[subprocess.Popen[str], Path]:
    unfinished = _library(geometry).with_suffix(f".{os.getpid()}")
    macros = [f"-D{name}={value}" for name, value in geometry._asdict().items()]
    command = [_compiler(), *FLAGS, *macros, str(SOURCE), "-o", str(unfinished)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), unfinished


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep the workers of a sweep from compiling the same thing side by side."""
    import fcntl

    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with (_folder() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CompilerError(f"{_folder()}: {error.strerror or error}") from error
