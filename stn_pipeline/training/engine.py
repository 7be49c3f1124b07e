"""How fast a training runs: the plain modules, compiled kernels on the CPU, captured steps on a GPU.

The plain network is the definition, and a step of the others is the same to rounding. A training is not: rounding grows,
and after it 57 % of seeds differ by more than .01 nats between plain and kernels, though the means agree. So the engine
is chosen for the whole of a training, by its knobs and the size of its data alone, and belongs to its fingerprint.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from stn_pipeline.compiler import CompilerError, Program, compile_programs, is_compiled
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Splits
from stn_pipeline.errors import ConfigError
from stn_pipeline.model import Network, build
from stn_pipeline.model.layers import Stage
from stn_pipeline.training.device import n_gpus

Engine = Literal["plain", "kernels", "captured"]
Compile = Literal["auto", "on", "off"]

# Of all the epochs: products (forward) from which kernels save more than the seconds that compiling them takes, one and
# a half epochs of MNIST; and points warped by a family that has a kernel of its own, an eighth of one.
PAYS_BACK = 6e10
POINTS_PAY_BACK = 5e6
SLOWER = "training goes on without compiled kernels, about three times slower"


def choose_engine(network: Network, config: TrainConfig, n_images: int, announce: Callable[[str], object] = lambda line: None) -> Engine:
    """Make a network as fast as its knobs and this machine allow, and return how: before its first step, on its device.

    n_images: of the training split.   announce: told a line when there is something to wait for, or to install.
    Raises: ConfigError where compile=on cannot be had.
    """
    if next(network.parameters()).device.type == "cuda":
        return "plain" if config.compile == "off" else "captured"
    if why := _against(network, config, n_images):
        if config.compile == "on":
            raise ConfigError(f"compile=on: {why}")
        return "plain"
    try:
        _compile(_programs(network), announce)
        for stage in _stages(network):
            stage.use_kernel()
        if network.transformer is not None:
            network.transformer.use_kernel()
    except CompilerError as error:
        if config.compile == "on":
            raise ConfigError(f"compile=on: {error}: give compile=auto or off") from error
        announce(f"{SLOWER}: {error}")
        return "plain"
    return "kernels"


def engine_of(config: TrainConfig, image_shape: tuple[int, int, int], n_classes: int, n_images: int, device: torch.device) -> Engine:
    """Return the engine that knobs and data ask for, nothing compiled or trained; where kernels cannot be compiled it may be another.

    image_shape: (C, H, W).   n_images: of the training split.   device: not where this runs, but where will be trained.
    Raises: ConfigError where the images are too small for the network.
    """
    if device.type == "cuda":
        return "plain" if config.compile == "off" else "captured"
    return "plain" if _against(build(config, image_shape, n_classes), config, n_images) else "kernels"


def with_one_engine(
    asked: Sequence[tuple[TrainConfig, Splits, torch.device]], announce: Callable[[str], object] = lambda line: None
) -> list[TrainConfig]:
    """Return the knobs of trainings that are to be compared, with `compile` set so that one engine trains them all.

    A training gives another result on kernels than without, so no arm is given another engine for what it costs. Kernels
    where all can have them and they pay for one; else none. `compile` stays as it is where somebody has set it, as to
    compare engines, and where there is a GPU, on which the steps of all are captured.
    Raises: ConfigError where images are too small for a network.
    """
    configs = [config for config, _, _ in asked]
    if any(config.compile != "auto" or device.type == "cuda" for config, _, device in asked):
        return configs

    def would_be(how: Compile) -> set[Engine]:
        return {engine_of(_compiling(config, how), s.image_shape, s.n_classes, len(s.train), device) for config, s, device in asked}

    how: Compile = "off"
    if would_be("on") == {"kernels"} and "kernels" in would_be("auto"):
        try:
            _compile([program for config, s, _ in asked for program in _programs(build(config, s.image_shape, s.n_classes))], announce)
            how = "on"
        except CompilerError as error:
            announce(f"{SLOWER}: {error}")
    return [_compiling(config, how) for config in configs]


def dry_run(config: TrainConfig, splits: Splits, device: torch.device, announce: Callable[[str], object]) -> Engine:
    """Build what will be trained, and throw it away: so that nothing is found wrong, or compiled, after the start.

    Where the GPU is another machine's, only the network itself is tried, here.
    Raises: ConfigError where the images are too small, or the engine that is asked for cannot be had.
    """
    network = build(config, splits.image_shape, splits.n_classes)
    if device.type == "cuda" and not n_gpus():
        return engine_of(config, splits.image_shape, splits.n_classes, len(splits.train), device)
    return choose_engine(network.to(device), config, len(splits.train), announce)


def _stages(network: Network) -> list[Stage]:
    return [module for module in network.modules() if isinstance(module, Stage)]


def _programs(network: Network) -> list[Program]:
    programs = [stage.geometry.program for stage in _stages(network)]
    if network.transformer is not None and network.transformer.transform.program is not None:
        programs.append(network.transformer.transform.program)
    return programs


def _compile(programs: list[Program], announce: Callable[[str], object]) -> None:
    if not is_compiled(programs):
        announce("compiling kernels for this processor: a few seconds, once")
    compile_programs(programs)


def _compiling(config: TrainConfig, how: Compile) -> TrainConfig:
    return config.model_copy(update={"compile": how})


def _against(network: Network, config: TrainConfig, n_images: int) -> str:
    """Return what speaks against kernels, or nothing."""
    stages, points = _stages(network), 0
    products = sum(stage.geometry.products for stage in stages)
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
