"""Tasks on a Ray cluster, one a training: its processes stay warm, and whatever dies costs the trainings that ran there.

The pool places each task on a node itself, so it knows what a dead node takes with it. Ray retries nothing: the driver does.
An attempt that was lost before it began starts again elsewhere, unheard; one that stands still is told of, and killed in the
end (silence.py).
"""

import itertools
import os
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import ray
import torch

from stn_pipeline import tracking
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import RawData, Split, read
from stn_pipeline.errors import ConfigError, StnError
from stn_pipeline.jobs import mailbox as at_the_nodes
from stn_pipeline.jobs.cluster import REST_S, Cluster, Node, one_line
from stn_pipeline.jobs.driver import Job, Outcome
from stn_pipeline.jobs.mailbox import Mailbox
from stn_pipeline.jobs.silence import Silence, beating
from stn_pipeline.jobs.worker import LostError, Worker
from stn_pipeline.training import Record

MAX_STILLBORN = 3
MAX_WAITING = 10_000  # calls that the mailbox holds at once: one a training, and some
SOURCE = ("dataset", "data_dir", "image_size")  # knobs that say which images, before they are split

_worker: Worker | None = None  # of this process, where it is one of Ray's


class RayPool:
    """At most `most` trainings at once on a cluster, or as many as it has room for.

    Raises: StnError, from wait, when trainings are lost again and again before they begin.
    """

    def __init__(self, cluster: Cluster, most: int | None, kind: type[Worker] = Worker):
        self.cluster, self.most, self.kind = cluster, most, kind
        self._numbers = itertools.count()
        self._attempts: dict[str, tuple[Job, Node, Any]] = {}
        self._unplaced: list[Job] = []
        self._data: dict[tuple[Any, ...], Any] = {}
        self._stillborn = 0
        self._silence: Silence[str] = Silence(cluster.say)
        self._heard: set[str] = set()  # attempts that have begun
        self._asking: set[str] = set()  # of them, those that wait for an answer
        self._crashed: list[tuple[float, Job, Node, str]] = []  # since when, until it is known whether the node died with it
        here = Node(cluster.here, "", 0)
        self._mailbox = cluster.on(here, ray.remote(num_cpus=0, max_concurrency=MAX_WAITING)(Mailbox)).remote()
        # max_calls=0: a process stays; of a task with a GPU Ray would end it on its own, and the next would import torch anew.
        self._train = ray.remote(max_calls=0, max_retries=0)(_train)
        self._news = self._mailbox.take.remote()
        self._settings = tracking.settings()

    def __str__(self) -> str:
        """Say how many trainings run where."""
        n_workers = min(self.most or self.cluster.room, self.cluster.room)
        n_nodes = len(self.cluster.usable)
        where = f"{n_nodes} node{'s' * (n_nodes != 1)} of the Ray cluster at {self.cluster.address}"
        return f"{n_workers} workers, {self.cluster.cpus} threads each, on {where}"

    def _free(self) -> dict[Node, int]:
        """Return the nodes that could take a training, and how many."""
        taken = Counter(node.id for _, node, _ in self._attempts.values())
        return {node: free for node in self.cluster.usable if (free := node.room - taken[node.id]) > 0}

    @property
    def n_free(self) -> int:
        """Number of trainings that could start at once."""
        free = sum(self._free().values())
        if self.most is not None:
            free = min(free, self.most - len(self._attempts))
        return max(0, free - len(self._unplaced))

    def submit(self, job: Job) -> None:
        """Start a job on the node with the most room."""
        self._unplaced.append(job)
        self._place()

    def _place(self) -> None:
        while self._unplaced and (free := self._free()):
            node = max(free, key=lambda node: free[node])
            job, attempt = self._unplaced.pop(0), str(next(self._numbers))
            self._mailbox.admit.remote(attempt)
            task = self.cluster.on(node, self._train, num_cpus=self.cluster.cpus, num_gpus=self.cluster.gpus)
            device = self.cluster.resolve(job.config.device, job.config.precision).type
            task = task.remote(self._mailbox, attempt, job, device, [self._put(job.config)], self._settings, self.cluster.cpus, self.kind)
            self._attempts[attempt] = job, node, task

    def _put(self, config: TrainConfig) -> Any:
        """Return Ray's reference to a data set; each node fetches it once, into memory that its workers share."""
        key = tuple(getattr(config, knob) for knob in SOURCE)
        if key not in self._data:
            raw = read(config, announce=lambda line: None)
            parts = {name: s for name, s in (("train", raw.train), ("test", raw.test)) if s is not None}
            splits = {name: [t.numpy() for t in (s.images, s.labels, s.ids) if t is not None] for name, s in parts.items()}
            self._data[key] = ray.put({"name": raw.name, "classes": raw.classes, "bits": raw.bits} | splits)
        return self._data[key]

    def answer(self, job: Job, go_on: bool) -> None:
        """Let the job go on, or stop it."""
        for attempt, (known, _, _) in self._attempts.items():
            if known is job:
                self._asking.discard(attempt)
                self._mailbox.answer.remote(attempt, go_on)

    def wait(self, timeout_s: float) -> list[tuple[Job, Record | Outcome]]:
        """Return what the trainings said since; one whose worker or node died is lost."""
        news: list[tuple[Job, Record | Outcome]] = []
        for node in self.cluster.poll():
            for attempt in [attempt for attempt, (_, where, _) in self._attempts.items() if where.id == node.id]:
                news += self._lose(attempt, f"node {node.name} died or froze", node_died=True)
        for attempt, why in self._silence.listen({attempt: self._name(attempt) for attempt in self._heard - self._asking}).items():
            node = self._attempts[attempt][1]
            process = self._from_mailbox(self._mailbox.process.remote(attempt))
            self.cluster.on(node, ray.remote(num_cpus=0, max_calls=0, max_retries=0)(at_the_nodes.kill)).remote(process)
            news += self._lose(attempt, why)
        for crash in [crash for crash in self._crashed if time.monotonic() > crash[0] + REST_S]:
            self._crashed.remove(crash)
            _, job, node, why = crash
            news.append((job, Outcome("crashed" if node.id in self.cluster.nodes else "lost", why)))
        self._place()
        waiting = [self._news, *(task for _, _, task in self._attempts.values())]
        if not news:
            ray.wait(waiting, timeout=timeout_s, fetch_local=False)
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        if self._news in ready:
            told = self._from_mailbox(self._news)
            self._news = self._mailbox.take.remote()
            for attempt, record in told:
                if attempt not in self._attempts:
                    continue
                self._silence.heard(attempt, self._name(attempt))
                self._heard.add(attempt)
                if record:
                    self._asking.add(attempt)
                    news.append((self._attempts[attempt][0], Record(**record)))
        for attempt in [attempt for attempt, (_, _, task) in self._attempts.items() if task in ready]:
            news += self._end(attempt)
        return news

    def _name(self, attempt: str) -> str:
        job, node, _ = self._attempts[attempt]
        return f"{job.key} on node {node.name}"

    def _end(self, attempt: str) -> list[tuple[Job, Record | Outcome]]:
        job, node, task = self._attempts[attempt]
        try:
            outcome = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            outcome = Outcome("bug", str(error))
        except ray.exceptions.RayError as error:
            unplaced = isinstance(error, ray.exceptions.TaskUnschedulableError)
            why = f"node {node.name}: {one_line(error).partition('. ')[0]}"
            lost = self._lose(attempt, why, node_died=unplaced)
            if lost and isinstance(error, (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)):
                self._crashed.append((time.monotonic(), job, node, why))
                return []
            return lost
        self._forget(attempt)
        self._stillborn = 0
        return [(job, outcome)]

    def _lose(self, attempt: str, why: str, *, node_died: bool = False) -> list[tuple[Job, Record | Outcome]]:
        job, node, _ = self._attempts[attempt]
        self.cluster.rest(node)
        if self._forget(attempt):
            return [(job, Outcome("lost", why))]
        self._stillborn += not node_died
        if self._stillborn >= MAX_STILLBORN:
            raise StnError(f"{self._stillborn} trainings in a row were lost before they began: {why}")
        self._unplaced.append(job)
        return []

    def _forget(self, attempt: str) -> bool:
        """Know an attempt no more; say whether it had begun."""
        del self._attempts[attempt]
        self._heard.discard(attempt)
        self._asking.discard(attempt)
        self._silence.forget(attempt)
        return bool(self._from_mailbox(self._mailbox.drop.remote(attempt)))

    def _from_mailbox(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except ray.exceptions.ActorDiedError as error:
            raise StnError(f"the driver's mailbox on this machine died ({one_line(error)}); the same command goes on") from error

    def close(self) -> None:
        """Stop all trainings at once."""
        for _, _, task in self._attempts.values():
            ray.cancel(task, force=True)
        ray.kill(self._mailbox)


def _train(
    mailbox: Any, attempt: str, job: Job, device: str, data: list[Any], settings: dict[str, str], n_threads: int, kind: type[Worker]
) -> Outcome:
    """Train a job in a process of Ray's.

    device: cpu or cuda.   data: holds the reference to the images, fetched where they are not in memory yet.
    """
    global _worker
    if not ray.get(mailbox.begin.remote(attempt, os.getpid())):
        return Outcome("interrupted", "the driver has given this attempt up")
    tracking.settle(settings)
    torch.set_num_threads(n_threads)
    _worker = _worker if type(_worker) is kind else kind()

    def report(record: Record) -> bool:
        return bool(ray.get(mailbox.epoch.remote(attempt, asdict(record))))

    mailbox.beat.remote(attempt)
    with beating(lambda: mailbox.beat.remote(attempt)):
        return _worker.perform(job, _gpu(ray.get_gpu_ids()) if device == "cuda" else "cpu", report, lambda config: _get(data[0]))


def _gpu(given: list[Any]) -> str:
    """Return torch's name of the GPU that Ray gave.

    A warm process keeps the CUDA devices that it saw first, so it must see all of them: Ray, which shows it one, is overruled.
    Raises: ConfigError where Ray does not number its GPUs.
    """
    if not str(given[0]).isdecimal():
        raise ConfigError(f"GPU {given[0]}: must be a number: start Ray with CUDA_VISIBLE_DEVICES unset, or of numbers")
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return f"cuda:{given[0]}"


def _get(reference: Any) -> RawData:
    try:
        raw = ray.get(reference)  # arrays in the node's shared memory, read-only
    except ray.exceptions.RayError as error:
        raise LostError(f"the images could not be fetched: {one_line(error)}") from error
    splits = {name: Split(*(torch.tensor(array) for array in raw[name])) for name in ("train", "test") if name in raw}
    return RawData(raw["name"], splits["train"], splits.get("test"), raw["classes"], raw["bits"])
