"""The steps of an epoch captured as one GPU program and replayed: the host launches a graph, not thousands of kernels.

Source: NVIDIA's CUDA graphs, through torch.cuda.CUDAGraph; what is captured is the plain step.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split
from stn_pipeline.model import Network
from stn_pipeline.training.step import Steps

STEPS_A_REPLAY = 16
WARM_UPS = 3

Capture = Callable[[Callable[[], None]], Callable[[], object]]


def cuda_capture(work: Callable[[], None]) -> Callable[[], object]:
    """Return what replays `work` as one graph; it is run a few times before, and once while it is captured.

    While it is captured nothing is computed; the runs before it are, so the caller puts back what they changed. Where
    it cannot be captured, `work` itself is returned, with a warning: slower, not different.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        warnings.warn(f"steps cannot be captured on this GPU, and go one by one: {str(error).splitlines()[0]}", stacklevel=2)
        return work
    return graph.replay


class CapturedSteps(Steps):
    """Steps in blocks: the images' numbers and the learning rates go into fixed places, and a graph takes the steps.

    The last steps of an epoch, fewer than a block, go by a graph of one step, and a batch that is not full by the plain
    step. `capture` is for tests: on a machine without a GPU it may return the work itself.
    """

    def __init__(self, network: Network, optimizer: Optimizer, train: Split, config: TrainConfig, capture: Capture = cuda_capture):
        super().__init__(network, optimizer, train, config)
        device = train.images.device
        self._capture = capture
        self._graphs: dict[int, Callable[[], object]] = {}
        self._picked = torch.zeros(STEPS_A_REPLAY * config.batch_size, dtype=torch.long, device=device)
        self._factors = torch.ones(STEPS_A_REPLAY, device=device)
        self._losses = torch.zeros(STEPS_A_REPLAY, device=device)
        self._right = torch.zeros((), dtype=torch.long, device=device)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["peak_lr"], device=device)
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"

    def feed(self, train: Split) -> None:
        """Take the images from this split: copied to where the graphs read them, once there are any."""
        if not self._graphs:
            self.train = train
        elif train.images is not self.train.images:
            self.train.images.copy_(train.images)

    def epoch(self, number: int, order: Tensor, tick: Callable[[int], object]) -> tuple[Tensor, Tensor]:
        """Take the steps of an epoch, as Steps.epoch does."""
        size, n_full = self.config.batch_size, len(order) // self.config.batch_size
        losses = torch.zeros(self.n_steps, device=order.device)
        factors = torch.tensor([self.factor(number, index) for index in range(self.n_steps)]).to(order.device, non_blocking=True)
        n_right = torch.zeros((), dtype=torch.long, device=order.device)
        first = 0
        while first < n_full:
            n = STEPS_A_REPLAY if n_full - first >= STEPS_A_REPLAY else 1
            replay = self._graph(n)
            self._picked[: n * size].copy_(order[first * size : (first + n) * size])
            self._factors[:n].copy_(factors[first : first + n])
            replay()
            losses[first : first + n] = self._losses[:n]
            n_right += self._right
            tick(n * size)
            first += n
        if len(order) > n_full * size:
            losses[-1], right = self.take(order[n_full * size :], factors[-1])
            n_right += right
            tick(len(order) - n_full * size)
        return losses, n_right

    def take(self, picked: Tensor, factor: float | Tensor) -> tuple[Tensor, Tensor]:
        """Take one step, the learning rates set in place."""
        for group in self.optimizer.param_groups:
            group["lr"].copy_(group["peak_lr"] * factor)
        return self._step(picked)

    def _graph(self, n: int) -> Callable[[], object]:
        """Return what replays n steps, captured when it is first wanted and with nothing changed by that."""
        if n not in self._graphs:
            before = _Snapshot(self.network, self.optimizer, self._picked.device)
            self._graphs[n] = self._capture(lambda: self._work(n))
            before.restore()
        return self._graphs[n]

    def _work(self, n: int) -> None:
        self._right.zero_()
        for index, picked in enumerate(self._picked[: n * self.config.batch_size].view(n, -1)):
            self._losses[index], right = self.take(picked, self._factors[index])
            self._right += right


class _Snapshot:
    """Weights, the optimiser's state and the device's random numbers as they are, to be put back in their places."""

    def __init__(self, network: Network, optimizer: Optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        self.weights = [(tensor, tensor.clone()) for tensor in network.state_dict().values()]
        self.moments = {parameter: _copies(state) for parameter, state in optimizer.state.items()}
        self.random = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def restore(self) -> None:
        """Put all back; what the optimiser had not yet is set to 0, which is how it starts."""
        for tensor, value in self.weights:
            tensor.copy_(value)
        for parameter, state in self.optimizer.state.items():
            for name, tensor in state.items():
                if isinstance(tensor, Tensor):
                    tensor.copy_(self.moments[parameter][name]) if parameter in self.moments else tensor.zero_()
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random, self.device)
        else:
            torch.set_rng_state(self.random)


def _copies(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
