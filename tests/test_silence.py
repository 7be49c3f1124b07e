"""Workers that stand still, are heard again, or are given up: by a made-up clock, and with real processes that are stopped and killed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver

import psutil
import pytest

from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import StnError
from stn_pipeline.jobs import Job, Outcome, local, silence
from stn_pipeline.jobs.local import LocalPool
from stn_pipeline.jobs.silence import Silence
from stn_pipeline.jobs.worker import Report
from stn_pipeline.training import Record
from tests.fakes import record

NAMES = {1: "worker 1", 2: "worker 2"}


class Clock:
    def __init__(self) -> None:
        self.now, self.said = 100.0, list[str]()
        self.silence: Silence[int] = Silence(self.said.append, clock=lambda: self.now)

    def pass_s(self, seconds: float, expected: dict[int, str], step: float = 0.5) -> dict[int, str]:
        given_up: dict[int, str] = {}
        for _ in range(int(seconds / step)):
            self.now += step
            given_up |= self.silence.listen(expected)
        return given_up


def test_a_silent_worker_is_told_of_once_and_given_up_in_the_end():
    clock = Clock()
    assert clock.pass_s(29, NAMES) == {} and clock.said == []
    clock.silence.heard(1, "worker 1")
    assert clock.pass_s(29, NAMES) == {}
    assert clock.said == ["worker 2 has been silent for 30 s; it is given up after 10 min"]
    assert clock.pass_s(600 - 58, NAMES) == {2: "worker 2 was silent for 10 min and is given up"}
    assert clock.said[1:] == ["worker 1 has been silent for 30 s; it is given up after 10 min"]


def test_a_worker_that_is_heard_again_is_told_of_and_starts_anew():
    clock = Clock()
    clock.pass_s(45, NAMES)
    clock.silence.heard(2, "worker 2")
    assert clock.said[-1] == "worker 2 is heard again after 45 s"
    assert clock.pass_s(599, {2: "worker 2"}) == {}


def test_a_worker_that_has_nothing_to_do_is_not_waited_for():
    clock = Clock()
    clock.pass_s(29, NAMES)
    clock.pass_s(3600, {})
    assert clock.pass_s(29, NAMES) == {} and clock.said == []


def test_a_driver_that_was_stopped_itself_gives_nobody_up():
    clock = Clock()
    clock.pass_s(10, NAMES)
    clock.now += 3600  # Ctrl-Z, a lid that was shut, a server that was away
    assert clock.silence.listen(NAMES) == {} and clock.said == []


@pytest.mark.parametrize("computes", [True, False])
def test_only_who_computes_is_heard(monkeypatch, computes):
    monkeypatch.setattr(silence, "BEAT_S", 0.02)
    cpu = iter(range(1_000_000))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu) if computes else 1.0)
    beaten = threading.Event()
    with silence.beating(beaten.set):
        assert beaten.wait(5 if computes else 0.3) is computes


# The pool, with workers that are no processes


def test_where_the_process_to_fork_dies_while_workers_start_another_is_started(monkeypatch):
    monkeypatch.setattr(local, "PAUSE_S", 0.0)
    errors = [EOFError("unexpected EOF"), ConnectionRefusedError(111, "Connection refused")]
    started: list[int] = []

    def start_once(pool: LocalPool, index: int) -> str:
        started.append(index)
        if errors:
            raise errors.pop()
        return "a worker"

    monkeypatch.setattr(LocalPool, "_start_once", start_once)
    assert LocalPool(2)._workers == ["a worker"] * 2 and started == [0, 0, 0, 1]
    errors += [EOFError()] * 3
    with pytest.raises(StnError, match="^no worker can be started on this machine: EOFError$"):
        LocalPool(2)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-signal.SIGKILL, "was killed by SIGKILL, as when memory runs out"),
        (-99, "was killed by signal 99"),
        (3, "ended with exit code 3"),
    ],
)
def test_how_a_process_ended_in_words(code, words):
    assert local.in_words(code) == words


# Real processes


class Player:
    """A worker that plays what the job is called, and beats more often."""

    def __init__(self) -> None:
        silence.BEAT_S = 0.5

    def perform(self, job: Job, device: str, report: Report) -> Outcome:
        if job.key.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if job.key.startswith("compute"):
            until = time.monotonic() + 16
            while time.monotonic() < until:
                pass
        if job.key.startswith("wait"):
            time.sleep(600)
        if job.key.startswith("ask"):
            report(record(1, 0.5))
        return Outcome("done", str(os.getpid()))


@pytest.fixture
def started(monkeypatch):
    """Return a function that starts a pool of players, told what is said; no libraries are loaded before they are forked."""
    monkeypatch.setattr(local, "LOADED_ONCE", [])
    forkserver._forkserver._stop()
    pools: list[LocalPool] = []

    def start(n: int = 1) -> tuple[LocalPool, list[str]]:
        said: list[str] = []
        pools.append(LocalPool(n, Player, said.append))  # type: ignore[arg-type]
        return pools[0], said

    yield start
    for pool in pools:
        pool.close()
    forkserver._forkserver._stop()


def until(pool: LocalPool, found: Callable[[], bool], limit_s: float = 90) -> list[tuple[Job, Record | Outcome]]:
    news: list[tuple[Job, Record | Outcome]] = []
    end = time.monotonic() + limit_s
    while not found() and not news:
        assert time.monotonic() < end, "waited in vain"
        news += pool.wait(0.2)
    return news


def submitted(pool: LocalPool, key: str) -> psutil.Process:
    """Start a job on the one worker that is free; return its process."""
    until(pool, lambda: pool.n_free > 0)
    job = Job(key, "r", TrainConfig())
    pool.submit(job)
    worker = next(worker for worker in pool._workers if worker.job is job)
    assert worker.process.pid is not None
    return psutil.Process(worker.process.pid)


def only(news: list[tuple[Job, Record | Outcome]]) -> Outcome:
    ((_, outcome),) = news
    assert isinstance(outcome, Outcome)
    return outcome


@pytest.fixture
def impatient(monkeypatch):
    """Return a function after whose call workers are given up after 12 s: not before they have started, which takes long."""

    def call() -> None:
        monkeypatch.setattr(silence, "TOLD_S", 3.0)
        monkeypatch.setattr(silence, "GIVEN_UP_S", 12.0)

    return call


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_told_of_killed_and_replaced(started, impatient, monkeypatch):
    pool, said = started()
    until(pool, lambda: pool.n_free == 1)
    impatient()
    process = submitted(pool, "wait")
    process.suspend()
    outcome = only(until(pool, lambda: False))
    assert said == [f"worker 1 (process {process.pid}) has been silent for 3 s; it is given up after 0 min"]
    assert outcome.kind == "lost" and "was silent for" in outcome.reason
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    monkeypatch.setattr(silence, "GIVEN_UP_S", 600.0)
    submitted(pool, "done")
    assert only(until(pool, lambda: False)).kind == "done"


@pytest.mark.slow
def test_a_worker_that_waits_for_a_disk_is_given_up_and_one_that_computes_is_not(started, impatient):
    pool, said = started(2)
    until(pool, lambda: pool.n_free == 2)
    impatient()
    submitted(pool, "compute")  # for longer than silence is borne
    waits = submitted(pool, "wait")
    given_up = only(until(pool, lambda: False))
    assert given_up.kind == "lost" and f"(process {waits.pid}) was silent" in given_up.reason
    assert only(until(pool, lambda: False)).kind == "done"
    assert any(f"(process {waits.pid}) has been silent" in line for line in said)


@pytest.mark.slow
def test_a_segmentation_fault_is_a_crash_with_its_name(started):
    pool, _ = started()
    process = submitted(pool, "crash")
    assert only(until(pool, lambda: False)) == Outcome("crashed", f"worker 1 (process {process.pid}) was killed by SIGSEGV")


@pytest.mark.slow
def test_an_epoch_that_the_driver_is_slow_to_answer_is_no_silence(started, impatient):
    pool, said = started()
    until(pool, lambda: pool.n_free == 1)
    impatient()
    submitted(pool, "ask")
    ((job, told),) = until(pool, lambda: False)
    assert isinstance(told, Record)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        assert pool.wait(0.2) == []
    pool.answer(job, True)
    assert only(until(pool, lambda: False)).kind == "done" and said == []


@pytest.mark.slow
def test_a_pool_outlives_the_process_that_its_workers_are_forks_of(started):
    pool, _ = started(2)
    until(pool, lambda: pool.n_free == 2)
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    for key in ("done 1", "done 2"):  # the workers live on
        submitted(pool, key)
        assert only(until(pool, lambda: False)).kind == "done"
    submitted(pool, "crash")
    assert only(until(pool, lambda: False)).kind == "crashed"
    submitted(pool, "done 3")
    assert only(until(pool, lambda: False)).kind == "done"


@pytest.mark.slow
def test_a_pool_starts_though_the_process_to_fork_is_killed_meanwhile(started):
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < 2:
            pid = forkserver._forkserver._forkserver_pid
            if pid is not None and pid not in killed:
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    pool, _ = started(2)
    thread.join()
    submitted(pool, "done")
    assert only(until(pool, lambda: False)).kind == "done"
