"""Where the trainings of a question run: on this machine, or on a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from stn_pipeline.errors import ConfigError
from stn_pipeline.jobs.driver import Pool
from stn_pipeline.jobs.local import LocalPool, n_workers
from stn_pipeline.jobs.worker import Worker
from stn_pipeline.questions import Question
from stn_pipeline.training.device import resolve

if TYPE_CHECKING:
    from stn_pipeline.jobs.cluster import Cluster


class Place(Protocol):
    """What a driver must know of where it trains."""

    def resolve(self, device: str, precision: str) -> torch.device:
        """Return the kind of device that trainings get for a device's name.

        Raises: ConfigError where there is none.
        """

    def pool(self, most: int | None, kind: type[Worker] = Worker) -> Pool:
        """Return a pool of at most so many trainings at once, by workers of a kind."""


class Here:
    """This machine; `say` is told of workers that stand still."""

    def __init__(self, workers: int, say: Callable[[str], object] = lambda line: None):
        self.workers, self.say = workers, say

    def resolve(self, device: str, precision: str) -> torch.device:
        """As training.device does."""
        return resolve(device, precision)

    def pool(self, most: int | None, kind: type[Worker] = Worker) -> Pool:
        """Return processes: as many as asked for, or one a GPU, or one a core."""
        wanted = self.workers or n_workers()
        return LocalPool(wanted if most is None else min(wanted, most), kind, self.say)


class OnRay:
    """A Ray cluster."""

    def __init__(self, cluster: "Cluster", workers: int):
        self.cluster, self.workers = cluster, workers
        self.resolve = cluster.resolve

    def pool(self, most: int | None, kind: type[Worker] = Worker) -> Pool:
        """Return tasks of Ray's: as many as asked for, or as fit."""
        from stn_pipeline.jobs.ray_pool import RayPool

        limits = [limit for limit in (self.workers, most) if limit]
        return RayPool(self.cluster, min(limits, default=None), kind)


@contextmanager
def place(asked: Question, say: Callable[[str], object]) -> Iterator[Place]:
    """Give the place that a question asks for; `say` is told of nodes that come and go.

    Raises: ConfigError where it cannot be had.
    """
    if not asked.ray:
        yield Here(asked.workers, say)
        return
    try:
        from stn_pipeline.jobs.cluster import connect
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(f"ray={asked.ray}: Ray is not installed: pip install 'stn-pipeline[ray]', or leave ray out") from error
    with connect(asked.ray, asked.gpus_per_trial, asked.cpus_per_trial, say) as cluster:
        yield OnRay(cluster, asked.workers)
