"""What a step would cost if all of it ran at the rate of this machine's matrix products."""

import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Splits
from stn_pipeline.model import build

SIDE = 1024
MEASURED_S = 1.0


def flops_an_image(config: TrainConfig, splits: Splits) -> float:
    """Return the floating-point operations of a training step, an image: convolutions and matrix products, forward and backward.

    As torch.utils.flop_counter counts them on the plain network; the sampler, the pooling and the optimiser are left out.
    """
    network = build(config, splits.image_shape, splits.n_classes).train()
    images, labels = torch.rand(config.batch_size, *splits.image_shape), torch.zeros(config.batch_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / config.batch_size


def product_rate(device: torch.device) -> float:
    """Return the best rate of float32 products of 1024 x 1024 matrices within a second, in FLOP/s, on all threads of this process."""
    a, b = torch.rand(2, SIDE, SIDE, device=device)
    best, until = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < until:
        started = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * SIDE**3 / best
