"""Where a network is trained, and the arithmetic it runs in."""

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from stn_pipeline.errors import ConfigError


def resolve(device: str, precision: str = "fp32") -> torch.device:
    """Return the device that the knob names; auto is the first GPU, or the CPU.

    Raises: ConfigError for a GPU that is not there, or for tf32 without one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs: give device=cpu or auto")
    if precision == "tf32" and resolved.type != "cuda":
        raise ConfigError(f"precision=tf32: needs a GPU, got device={device}: give precision=fp32 or bf16")
    return resolved


def n_gpus() -> int:
    """Return the number of GPUs that torch sees."""
    return torch.cuda.device_count()


def describe(device: torch.device) -> str:
    """Return the device's own name, as in `NVIDIA H100 80GB HBM3` or `AMD EPYC 7B13, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def machine(device: torch.device) -> dict[str, str]:
    """Return what two runs of one fingerprint may still differ in: the device's name, processor, threads, and GPU where it is one."""
    gpu = {"gpu": describe(device)} if device.type == "cuda" else {}
    return {"device": describe(device), "processor": processor(), "threads": str(torch.get_num_threads())} | gpu


@cache
def processor() -> str:
    """Return the processor's model, or what is known of it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return " ".join(names[0].split()) if names else platform.processor() or platform.machine()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the block in which a forward pass runs in bf16, where the knob says so; backward passes stay outside."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Run fp32 convolutions on the GPU as tf32, or as they are, inside the block.

    Products stay fp32 either way: the warp's grid is one.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision, convolutions.fp32_precision = "ieee", "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before
