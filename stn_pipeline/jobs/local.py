"""Processes on this machine that stay warm: each trains one job after another.

The libraries are loaded once, in a process whose forks the workers are. On GPUs each worker is a new process, which loads
its own: what has touched CUDA cannot be forked.

A worker's death closes its pipe, which is how the driver hears of it; the driver's death closes the worker's lifeline,
on which the worker ends itself at once. One that stands still is told of, and killed in the end (silence.py). SIGINT and
SIGHUP are blocked in workers: the driver alone hears Ctrl-C, and that the terminal was closed.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

import torch

from stn_pipeline.errors import StnError
from stn_pipeline.jobs.driver import Job, Outcome
from stn_pipeline.jobs.silence import Silence, beating
from stn_pipeline.jobs.worker import Worker
from stn_pipeline.training import Record
from stn_pipeline.training.device import n_gpus

READY, BEAT = "ready", "beat"
MAX_STILLBORN = 3
CLOSE_S = 5.0
PAUSE_S = 0.5
MAX_WORKERS = 8  # chosen by itself
LOADED_ONCE = ["stn_pipeline.jobs.worker", "torch._dynamo", "sklearn.model_selection", "mlflow.store.tracking.sqlalchemy_store"]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_workers() -> int:
    """Return how many trainings to run at once where nobody says: one a GPU, or one a core."""
    return n_gpus() or min(available_cores(), MAX_WORKERS)


def work(connection: Connection, lifeline: Connection, environment: dict[str, str], index: int, n_threads: int, kind: type[Worker]) -> None:
    """Train jobs from `connection` until it closes; end at once when the driver, who holds the lifeline, is gone."""
    os.environ.clear()
    os.environ.update(environment)  # the fork's is that of the driver when its first worker started
    threading.Thread(target=_die_with_the_driver, args=(lifeline,), daemon=True).start()
    one_at_a_time = threading.Lock()

    def send(message: object) -> None:
        with one_at_a_time:
            connection.send(message)

    def report(record: Record) -> bool:
        send(record)
        return bool(connection.recv())

    with beating(lambda: send(BEAT)):
        torch.set_num_threads(n_threads)
        worker = kind()
        send(READY)
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            send(worker.perform(job, _share(job.config.device, index), report))


def in_words(exit_code: int | None) -> str:
    """Return how a process ended."""
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")


def _can_fork() -> bool:
    return sys.platform == "linux" and not n_gpus() and len(tempfile.gettempdir()) < 70  # the path of its socket may have 107 bytes


def _load_once() -> None:
    """Start the process to fork, where there is none yet.

    It has one OpenMP thread: a fork has one alone of the threads of a pool, and would wait for the others for ever.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.set_forkserver_preload(LOADED_ONCE)
        forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})


def _die_with_the_driver(lifeline: Connection) -> None:
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)


def _share(device: str, index: int) -> str:
    """Return the device of worker `index`: where any GPU will do, they take turns."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{index % torch.cuda.device_count()}"
    return device


@dataclass(eq=False)
class _Process:
    process: BaseProcess
    connection: Connection
    lifeline: Connection
    name: str
    ready: bool = False
    job: Job | None = None
    asks: bool = False  # it waits for the answer to an epoch

    @property
    def is_due(self) -> bool:
        """Whether it has something to do, and so must be heard of."""
        return not self.ready or (self.job is not None and not self.asks)


class LocalPool:
    """`n_workers` processes that share the cores; on GPUs, worker i trains on GPU i modulo their number.

    `say` is told of workers that stand still.
    Raises: StnError when workers die again and again before they are ready, or none can be started.
    """

    def __init__(self, n_workers: int, kind: type[Worker] = Worker, say: Callable[[str], object] = lambda line: None):
        self._kind = kind
        self._silence: Silence[_Process] = Silence(say)
        self._context: ForkServerContext | SpawnContext
        self._context = multiprocessing.get_context("forkserver") if _can_fork() else multiprocessing.get_context("spawn")
        self.n_threads = max(1, available_cores() // n_workers)
        self._stillborn = 0
        self._workers = [self._start(index) for index in range(n_workers)]

    def _start(self, index: int, tries: int = MAX_STILLBORN) -> _Process:
        """Start a worker; where the process to fork dies meanwhile, start another such process."""
        try:
            return self._start_once(index)
        except (EOFError, OSError) as error:
            if tries == 1:
                raise StnError(f"no worker can be started on this machine: {str(error) or type(error).__name__}") from error
        time.sleep(PAUSE_S)  # until the dead process can be seen to be dead
        return self._start(index, tries - 1)

    def _start_once(self, index: int) -> _Process:
        ours, theirs = self._context.Pipe()
        lifeline, held = self._context.Pipe()
        given = (theirs, lifeline, dict(os.environ), index, self.n_threads, self._kind)
        process = self._context.Process(target=work, args=given, daemon=True)
        try:
            resource_tracker.ensure_running()  # it would unblock SIGINT if it were started inside the block below
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})  # a new process inherits the mask
            try:
                if isinstance(self._context, ForkServerContext):
                    _load_once()
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            ours.close()
            held.close()  # what was started all the same ends by this
            raise
        finally:
            theirs.close()
            lifeline.close()
        return _Process(process, ours, held, f"worker {index + 1} (process {process.pid})")

    def __str__(self) -> str:
        """Say how many workers there are."""
        return f"{len(self._workers)} workers, {self.n_threads} threads each"

    @property
    def n_free(self) -> int:
        """Number of workers that wait for a job."""
        return sum(worker.ready and worker.job is None for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Give a job to a free worker."""
        worker = next(worker for worker in self._workers if worker.ready and worker.job is None)
        worker.job, worker.asks = job, False
        self._send(worker, job)

    def answer(self, job: Job, go_on: bool) -> None:
        """Let the job go on, or stop it."""
        worker = next(worker for worker in self._workers if worker.job is job)
        worker.asks = False
        self._send(worker, go_on)

    @staticmethod
    def _send(worker: _Process, message: object) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            pass  # it died; wait will hear of it

    def wait(self, timeout_s: float) -> list[tuple[Job, Record | Outcome]]:
        """Return what the workers said since; a dead one is replaced, its job lost."""
        news: list[tuple[Job, Record | Outcome]] = []
        spoke = wait([worker.connection for worker in self._workers], timeout_s)
        for index, worker in enumerate(self._workers):
            if worker.connection not in spoke:
                continue
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                news += self._bury(index)
                continue
            self._silence.heard(worker, worker.name)
            if message == READY:
                worker.ready, self._stillborn = True, 0
            elif worker.job is not None and message != BEAT:
                news.append((worker.job, message))
                worker.asks = isinstance(message, Record)
                if isinstance(message, Outcome):
                    worker.job = None
        given_up = self._silence.listen({worker: worker.name for worker in self._workers if worker.is_due})
        for index, worker in enumerate(self._workers):
            if worker in given_up:
                worker.process.kill()
                news += self._bury(index, given_up[worker])
        return news

    def _bury(self, index: int, why: str = "") -> list[tuple[Job, Record | Outcome]]:
        """Replace a worker that died, or, where it says why, was given up; return how its job ended."""
        dead = self._workers[index]
        dead.process.join(CLOSE_S)
        how = why or f"{dead.name} {in_words(dead.process.exitcode)}"
        self._stillborn += not dead.ready
        if self._stillborn >= MAX_STILLBORN:
            raise StnError(f"{self._stillborn} workers in a row died before they were ready: {how}; its own words stand above")
        dead.lifeline.close()
        dead.connection.close()
        self._workers[index] = self._start(index)
        return [] if dead.job is None else [(dead.job, Outcome("lost" if why else "crashed", how))]

    def close(self) -> None:
        """End every worker at once."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(CLOSE_S)
            worker.connection.close()
            worker.lifeline.close()
