"""How fast a training runs, never what it learns: the plain modules, compiled kernels on the CPU, captured steps on a GPU.

The plain network is the definition. The others are chosen here, for the whole of a training, by its knobs and the size of
its data alone, so that one command twice is one run twice.
"""

from collections.abc import Callable
from typing import Literal

import torch

from stn_pipeline.compiler import CompilerError, compile_programs, is_compiled
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Splits
from stn_pipeline.errors import ConfigError
from stn_pipeline.model import Network, build
from stn_pipeline.model.layers import Stage
from stn_pipeline.training.device import n_gpus

Engine = Literal["plain", "kernels", "captured"]

# Of all the epochs: products (forward) from which kernels save more than the seconds that compiling them takes, one and
# a half epochs of MNIST; and points warped by a family that has a kernel of its own, an eighth of one.
PAYS_BACK = 6e10
POINTS_PAY_BACK = 5e6


def engage(network: Network, config: TrainConfig, n_images: int, announce: Callable[[str], object] = lambda line: None) -> Engine:
    """Make a network as fast as its knobs and this machine allow, and return how: before its first step, on its device.

    n_images: of the training split.   announce: told a line when there is something to wait for, or to install.
    Raises: ConfigError where compile=on cannot be had.
    """
    if next(network.parameters()).device.type == "cuda":
        return "plain" if config.compile == "off" else "captured"
    stages = [module for module in network.modules() if isinstance(module, Stage)]
    if why := _against(network, stages, config, n_images):
        if config.compile == "on":
            raise ConfigError(f"compile=on: {why}")
        return "plain"
    transformer = network.transformer
    programs = [stage.geometry.program for stage in stages]
    if transformer is not None and transformer.transform.program is not None:
        programs.append(transformer.transform.program)
    if not is_compiled(programs):
        announce("compiling kernels for this processor: a few seconds, once")
    try:
        compile_programs(programs)
        for stage in stages:
            stage.use_kernel()
        if transformer is not None:
            transformer.use_kernel()
    except CompilerError as error:
        if config.compile == "on":
            raise ConfigError(f"compile=on: {error}: give compile=auto or off") from error
        announce(f"training goes on without compiled kernels, about three times slower: {error}")
        return "plain"
    return "kernels"


def _against(network: Network, stages: list[Stage], config: TrainConfig, n_images: int) -> str:
    """Return what speaks against kernels, or nothing."""
    products, points = sum(stage.geometry.products for stage in stages), 0
    if network.transformer is not None and network.transformer.transform.program is not None:
        points = len(network.transformer.get_buffer("target")) * config.iterations
    worth = n_images * config.epochs * (products / PAYS_BACK + points / POINTS_PAY_BACK)
    if config.compile == "off":
        return "it is off"
    if config.precision != "fp32":
        return f"kernels compute in fp32, got precision={config.precision}: give precision=fp32 or compile=off"
    if not all(stage.geometry.fits for stage in stages):
        return "the images are too large for kernels to pay: give compile=off or smaller images"
    return "it would not pay" if config.compile == "auto" and worth < 1 else ""


def rehearse(config: TrainConfig, splits: Splits, device: torch.device, announce: Callable[[str], object]) -> Engine:
    """Build what will be trained, and throw it away: so that nothing is found wrong, or compiled, after the start.

    Where the GPU is another machine's, only the network itself is tried, here.
    Raises: ConfigError where the images are too small, or the engine that is asked for cannot be had.
    """
    network = build(config, splits.image_shape, splits.n_classes)
    if device.type == "cuda" and not n_gpus():
        return "captured" if config.compile != "off" else "plain"
    network = network.to(device)
    return engage(network, config, len(splits.train), announce)
