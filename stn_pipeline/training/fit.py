"""The training loop, top to bottom: a generator of epochs, and a plain `for` over it is the only API.

Nobody who watches is known here: tracking logs each epoch, a search prunes on it, by standing in the `for`.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split
from stn_pipeline.errors import DivergedError, RunError
from stn_pipeline.model import Network
from stn_pipeline.training.captured import CapturedSteps
from stn_pipeline.training.device import arithmetic
from stn_pipeline.training.engine import Engine, choose_engine
from stn_pipeline.training.scores import score
from stn_pipeline.training.step import Steps, make_optimizer
from stn_pipeline.transforms import warp_shape

PATIENCE_STEPS = 500
DIAGNOSED_IMAGES = 256


@dataclass(frozen=True)
class Record:
    """One epoch in numbers: losses nats per image, accuracies 0..1, durations seconds.

    shift: mean |theta - identity|.   outside, log_det, folded: transforms.WarpShape.  All NaN without a transformer.
    trouble: nothing, or what looks collapsed.
    """

    number: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    images_per_s: float
    shift: float
    outside: float
    log_det: float
    folded: float
    trouble: str


@dataclass
class State:
    """All that is needed to go on: weights, optimiser, the best epoch's weights, and the history in numbers.

    The tensors are the living ones: save them before the next epoch is asked for.
    """

    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Number of whole epochs trained."""
        return len(self.history)

    @property
    def best_val_loss(self) -> float:
        """Validation loss of the best epoch; infinite before the first."""
        return self.history[self.best_epoch - 1]["val_loss"] if self.best_epoch else math.inf


@dataclass(frozen=True)
class Epoch:
    """What `fit` yields: the numbers of an epoch, and the state to go on from after it."""

    record: Record
    state: State


def fit(
    network: Network,
    train: Split,
    val: Split,
    config: TrainConfig,
    state: State | None = None,
    tick: Callable[[int], object] = lambda n_images: None,
    engine: Engine | None = None,
) -> Iterator[Epoch]:
    """Train the network, yielding after each epoch; selection is by validation loss, and no test split comes here.

    Every epoch draws its batch order and its dropout from (seed, epoch number) alone, so an interrupted run that goes
    on from its last state is, on the CPU and with as many threads, the unbroken run bit for bit.

    The network lies on the device of the splits, its `mean` and `std` set. `state` is where to go on from; `tick` is
    told the number of images after each step, or several. `engine` is what choose_engine has made of this network; it is
    asked here where nobody has.

    Raises: DivergedError, at the end of the epoch, with epoch, step and learning rate, when a loss is not finite.
        RunError where `state` is not one of such a network and optimiser.
    """
    device = train.images.device
    engine = engine or choose_engine(network, config, len(train))
    if engine == "plain" and device.type == "cpu":  # convolutions with few channels: 1.9x the speed
        network.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, config)
    if state is None:
        state = State(network.state_dict(), optimizer.state_dict())
    else:
        load_weights(network, state.network)
        _load_optimizer(optimizer, state.optimizer)
    steps = (CapturedSteps if engine == "captured" else Steps)(network, optimizer, train, config)
    n_steps = steps.n_steps

    for number in range(state.epoch + 1, config.epochs + 1):
        started = time.perf_counter()
        torch.manual_seed(config.seed * 100_003 + number)
        order = torch.randperm(len(train)).to(device)
        steps.feed(train.draw(number))
        network.train()
        with arithmetic(config.precision):
            losses, n_right = steps.epoch(number, order, tick)
        _check_finite(losses, number, config)  # the epoch's first wait for the device
        seconds = time.perf_counter() - started
        val_scores = score(network, val)
        if not math.isfinite(val_scores.loss):  # the last step alone may have blown the weights up
            raise _diverged(f"validation loss is {val_scores.loss} after epoch {number}", config)
        diagnostics = diagnose(network, val.images[val.spread(DIAGNOSED_IMAGES)])

        sizes = torch.full((n_steps,), config.batch_size, dtype=torch.double)
        sizes[-1] = len(train) - (n_steps - 1) * config.batch_size
        record = Record(
            number=number,
            train_loss=(losses.cpu().double() * sizes).sum().item() / len(train),
            train_accuracy=n_right.item() / len(train),
            val_loss=val_scores.loss,
            val_accuracy=val_scores.accuracy,
            seconds=time.perf_counter() - started,
            images_per_s=len(train) / seconds,
            trouble=_trouble(val_scores.accuracy, val.labels, diagnostics["outside"], number * n_steps),
            **diagnostics,
        )
        state.history.append(asdict(record))
        if record.val_loss < state.best_val_loss:
            state.best_epoch, state.best = number, copy.deepcopy(network.state_dict())
        state.network, state.optimizer = network.state_dict(), optimizer.state_dict()
        yield Epoch(record, state)


def load_weights(network: Network, weights: dict[str, Tensor]) -> None:
    """Give a network the weights of a checkpoint.

    Raises: RunError where names or shapes differ.
    """
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _misfit("weights", "network", error) from error


def _load_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    try:
        optimizer.load_state_dict(kept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _misfit("values", "optimiser", error) from error
    for parameter, values in optimizer.state.items():  # of their shapes torch knows nothing before the first step
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise _misfit("values", "optimiser", f"{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")


def _misfit(what: str, of: str, why: object) -> RunError:
    told = str(why).strip().splitlines() or [type(why).__name__]  # torch's first line of several is a heading
    return RunError(f"checkpoint: its {what} do not fit this {of} ({told[:2][-1].strip()[:200]}): other code wrote it; train anew")


@torch.inference_mode()
def diagnose(network: Network, images: Tensor) -> dict[str, float]:
    """Return shift, outside, log_det and folded on uint8 images (n, C, H, W); NaN without a transformer."""
    if network.transformer is None:
        return dict.fromkeys(("shift", "outside", "log_det", "folded"), math.nan)
    transformer = network.transformer
    theta, points = transformer.look(images.float() / 255, see=network.normalise)
    identity = transformer.localisation.get_buffer("identity")
    return {"shift": (theta - identity).abs().mean().item(), **warp_shape(points)._asdict()}


def _check_finite(losses: Tensor, epoch: int, config: TrainConfig) -> None:
    finite = torch.isfinite(losses).cpu()
    if not finite.all():
        first = int((~finite).nonzero()[0]) + 1
        raise _diverged(f"training loss is {losses[first - 1].item()} at epoch {epoch}, step {first} of {len(losses)}", config)


def _diverged(what: str, config: TrainConfig) -> DivergedError:
    localiser = "" if config.transform == "none" else f", loc_lr_multiplier={config.loc_lr_multiplier}"
    return DivergedError(f"{what}, lr={config.lr}{localiser}: it must stay finite; try lr={config.lr / 10:g}")


def _trouble(accuracy: float, labels: Tensor, outside: float, n_steps: int) -> str:
    """Say what looks collapsed, once the network has had time to learn: accuracy at chance, or a localiser far out."""
    if n_steps < PATIENCE_STEPS:
        return ""
    far_out = f"{outside:.0%} of the sampling points lie outside the image"
    if told := at_chance(accuracy, labels):
        return f"val {told}" + (f", {far_out}" if outside > 0.5 else "")
    return far_out if outside > 0.75 else ""


def at_chance(accuracy: float, labels: Tensor) -> str:
    """Say so where an accuracy is hardly better than naming the commonest of these labels each time; else nothing."""
    chance = labels.bincount().max().item() / len(labels)
    return f"accuracy {accuracy:.3f} is at chance ({chance:.3f})" if accuracy <= chance + 0.1 * (1 - chance) else ""
