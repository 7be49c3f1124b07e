"""Contenders: a loop each in processes of its own, with its own threads, told when it is its turn."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, Self

import numpy as np
import torch
from torch.nn.functional import interpolate

from stn_pipeline.benching import reference
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split, Splits, load
from stn_pipeline.errors import RunError
from stn_pipeline.model import build
from stn_pipeline.training import fit
from stn_pipeline.training.device import resolve

FOREVER = 10**6  # epochs: for a run so long, compile=auto compiles
CLOSE_S = 5.0

Loop = Literal["engine", "plain", "resident", "report", "lightning"]


@dataclass(frozen=True)
class Setting:
    """What is trained, the same for all contenders of a table: knobs of TrainConfig, and of the machine.

    images: training images an epoch, 0 for all; more than there are come again.   side: of the images, 0 for their own.
    threads: for all the processes of a contender together.   at_once: trainings side by side.
    """

    knobs: dict[str, Any]
    images: int
    side: int
    threads: int
    at_once: int

    @property
    def config(self) -> TrainConfig:
        """The knobs, for a long run."""
        return TrainConfig.parse({**self.knobs, "epochs": FOREVER})

    def splits(self) -> Splits:
        """Load what is trained on."""
        config = self.config
        splits = load(config, resolve(config.device, config.precision), announce=lambda line: None)
        train, val = (self._resized(split) for split in (splits.train, splits.val))
        if self.images:
            train = train.take(np.arange(self.images) % len(train))
        return Splits(train, val, val, splits.classes, splits.dataset)

    def _resized(self, split: Split) -> Split:
        if self.side in (0, *split.images.shape[2:]):
            return split
        parts = [interpolate(part.float(), (self.side, self.side), mode="bilinear").byte() for part in torch.split(split.images, 1000)]
        return Split(torch.cat(parts), split.labels)


@dataclass(frozen=True)
class Contender:
    """A loop in one process or several side by side; `workers` are the DataLoader's."""

    loop: Loop
    setting: Setting
    processes: int = 1
    workers: int = 0

    @property
    def name(self) -> str:
        """What a table calls it."""
        words = {
            "engine": "ours",
            "plain": "ours, compile=off",
            "resident": "plain loop, resident tensors",
            "report": f"report's loop, {self.workers} workers",
            "lightning": f"Lightning, {self.workers} workers",
        }
        return words[self.loop] + (f", {self.processes} at once" if self.processes > 1 else "")

    @property
    def threads(self) -> int:
        """Of each process."""
        return max(1, self.setting.threads // self.processes)

    def epochs(self, splits: Splits) -> Iterator[object]:
        """Train an epoch a turn. What yields a number has taken the time itself: seconds of training alone."""
        batch_size, lr = self.setting.config.batch_size, self.setting.config.lr
        loops: dict[Loop, Callable[[], Iterator[object]]] = {
            "engine": lambda: engine_epochs(splits, self.setting.config),
            "plain": lambda: engine_epochs(splits, self.setting.config.model_copy(update={"compile": "off"})),
            "resident": lambda: reference.resident_epochs(splits, batch_size, lr),
            "report": lambda: reference.report_epochs(splits, batch_size, self.workers, lr),
            "lightning": lambda: reference.lightning_epochs(splits, batch_size, self.workers, lr),
        }
        return loops[self.loop]()


def engine_epochs(splits: Splits, config: TrainConfig) -> Iterator[float]:
    """Train with our engine, an epoch a turn, yielding the seconds of it that went into training alone."""
    network = build(config, splits.image_shape, splits.n_classes, splits.mean, splits.std).to(splits.train.images.device)
    for epoch in fit(network, splits.train, splits.val.take(np.arange(min(len(splits.val), 1000))), config):
        yield len(splits.train) / epoch.record.images_per_s


def seconds_of(epochs: Iterator[object]) -> float:
    """Return seconds of the next epoch."""
    started = time.perf_counter()
    own = next(epochs)
    return own if isinstance(own, float) else time.perf_counter() - started


def _serve(connection: Connection, contender: Contender) -> None:
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as in a script
    torch.set_num_threads(contender.threads)
    try:
        epochs = contender.epochs(contender.setting.splits())
        connection.send(None)
        while True:
            connection.recv()
            connection.send(seconds_of(epochs))
    except EOFError:
        return
    except Exception as error:
        connection.send(error)


class Contest:
    """Contenders by name, each in processes that live until the contest is left."""

    def __init__(self, contenders: Sequence[Contender]):
        context = multiprocessing.get_context("spawn")
        self._running: dict[str, list[tuple[Any, Connection]]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            for _ in range(contender.processes):
                ours, theirs = multiprocessing.Pipe()
                process = context.Process(target=_serve, args=(theirs, contender))  # no daemon: it may have workers
                process.start()
                theirs.close()
                self._running[contender.name].append((process, ours))

    def __enter__(self) -> Self:
        """Wait until all are ready."""
        for name in self._running:
            self._hear(name)
        return self

    def turn(self, name: str) -> float:
        """Let one contender train an epoch in each of its processes; return the seconds of the slowest."""
        for _, connection in self._running[name]:
            connection.send("go")
        return max(self._hear(name))

    def run(self, repeats: int, say: Callable[[str], object] = lambda line: None) -> dict[str, list[float]]:
        """Return seconds an epoch by name: all in turn, `repeats` times after a turn that is not counted."""
        seconds: dict[str, list[float]] = {name: [] for name in self._running}
        for repeat in range(repeats + 1):
            for name, values in seconds.items():
                values.append(self.turn(name))
                say(f"{'warm-up' if repeat == 0 else f'{repeat}/{repeats}'}  {name}  {values[-1]:.2f} s")
        return {name: values[1:] for name, values in seconds.items()}

    def _hear(self, name: str) -> list[float]:
        heard: list[float] = []
        for process, connection in self._running[name]:
            try:
                told = connection.recv()
            except (EOFError, OSError) as error:
                process.join()
                raise RunError(f"{name}: its process died with exit code {process.exitcode}") from error
            if isinstance(told, Exception):
                raise told
            heard.append(told)
        return heard

    def __exit__(self, *exception: object) -> None:
        """End them all."""
        everyone: list[tuple[Any, Connection]] = [both for some in self._running.values() for both in some]
        for _, connection in everyone:
            connection.close()
        for process, _ in everyone:
            process.join(CLOSE_S)
            if process.is_alive():
                process.kill()
