"""A tracking server that does not answer: told from one that refuses, said on the console, given up with the run left as it is."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException

from stn_pipeline import tracking
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import AwayError, RunError
from stn_pipeline.jobs import Job, Outcome, Worker, drive
from stn_pipeline.tracking import away
from tests.fakes import FakePool, ends, record


@contextmanager
def answering(status: int, port: int = 0) -> Iterator[int]:
    """Serve nothing but a status; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def closed_port() -> int:
    with answering(200) as port:
        pass
    return port


def mlflows_own_error(port: int, monkeypatch: pytest.MonkeyPatch) -> MlflowException:
    """Return what MLflow raises in the end, without its minutes of patience."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        patch.setenv(away.RETRIES, "0")
        patch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
        with pytest.raises(MlflowException) as caught:
            mlflow.MlflowClient(f"http://127.0.0.1:{port}").get_run("a" * 32)
    return caught.value


@pytest.mark.parametrize(("status", "why"), [(200, ""), (401, ""), (404, ""), (500, ""), (503, "status 503"), (502, "status 502")])
def test_a_server_that_answers_at_all_is_not_away_but_a_proxy_may_say_that_it_is(status, why):
    with answering(status) as port:
        assert away.absence(f"http://127.0.0.1:{port}/") == why


def test_nobody_there_is_away_and_a_file_never_is(closed_port):
    assert "refused" in away.absence(f"http://127.0.0.1:{closed_port}")
    assert away.absence("sqlite:////tmp/x.db") == ""


def test_an_error_of_absence_is_told_from_a_refusal(closed_port, monkeypatch):
    assert away.is_away(mlflows_own_error(closed_port, monkeypatch))
    with answering(401) as port:
        assert not away.is_away(mlflows_own_error(port, monkeypatch))
    assert away.is_away(requests.Timeout()) and not away.is_away(ValueError("x")) and not away.is_away(None)
    interrupt = KeyboardInterrupt()
    interrupt.__context__ = requests.ConnectionError()
    assert not away.is_away(interrupt)


def test_the_console_hears_once_that_it_went_and_that_it_came_back(closed_port, monkeypatch):
    monkeypatch.setattr(away, "LOOK_S", 0.05)
    said: list[str] = []

    def until(n: int) -> None:
        end = time.monotonic() + 20
        while len(said) < n and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        assert len(said) == n, said

    with away.watched(f"http://127.0.0.1:{closed_port}", said.append):
        until(1)
        with answering(200, closed_port):
            until(2)
    assert "does not answer" in said[0] and "answers again after" in said[1]


def test_the_start_says_at_once_that_nobody_answers(closed_port, monkeypatch):
    monkeypatch.setattr("stn_pipeline.tracking.where._address", lambda: f"http://127.0.0.1:{closed_port}")
    started = time.monotonic()
    with pytest.raises(RunError, match="does not answer .*: start it, or set MLFLOW_TRACKING_URI"), tracking.reachable():
        raise AssertionError("the block was entered")
    assert time.monotonic() - started < 30


def test_a_hurry_is_over_when_it_is_over(closed_port, monkeypatch):
    monkeypatch.setenv(away.RETRIES, "5")
    monkeypatch.delenv(away.TIMEOUT, raising=False)
    with away.in_a_hurry():
        assert os.environ[away.RETRIES] == "1" and int(os.environ[away.TIMEOUT]) <= 10
        raise mlflows_own_error(closed_port, monkeypatch)
    assert os.environ[away.RETRIES] == "5" and away.TIMEOUT not in os.environ
    with pytest.raises(MlflowException, match="refused us"), away.in_a_hurry():
        raise MlflowException("refused us")


def test_a_run_whose_server_is_away_is_left_running_for_the_next_driver(store, closed_port, monkeypatch, signals_restored):
    gone = mlflows_own_error(closed_port, monkeypatch)
    run = tracking.create_run("x", tracking.experiment_id(), TrainConfig(), {})
    with (
        pytest.raises(AwayError, match="has not answered for long: once it does, the same command goes on"),
        tracking.closing(run, run.close),
    ):
        raise gone
    assert tracking.find_run(run.id).info.status == "RUNNING"
    with pytest.raises(ZeroDivisionError), tracking.closing(run, run.close):
        raise ZeroDivisionError
    assert tracking.find_run(run.id).info.status == "FAILED"


def test_a_worker_whose_server_is_away_loses_its_job(closed_port, monkeypatch):
    gone = mlflows_own_error(closed_port, monkeypatch)
    worker = Worker()

    def train(*_: object) -> Outcome:
        raise gone

    monkeypatch.setattr(worker, "_train", train)
    assert worker.perform(Job("x", "r", TrainConfig()), "cpu", lambda record: True).kind == "lost"


def test_a_driver_whose_server_is_away_does_not_try_to_close_what_ran(closed_port, monkeypatch, signals_restored):
    gone = mlflows_own_error(closed_port, monkeypatch)

    class Source:
        def __init__(self) -> None:
            self.jobs = [Job(key, "r", TrainConfig()) for key in "ab"]
            self.closed: list[str] = []

        def next(self) -> Job | None:
            return self.jobs.pop() if self.jobs else None

        def epoch(self, job: Job, record: object) -> bool:
            raise gone

        def ended(self, job: Job, outcome: Outcome) -> None:
            self.closed.append(job.key)

    source, pool = Source(), FakePool({"": ends(record(1, 0.5), Outcome("done"))}, n_workers=2)
    with pytest.raises(MlflowException):
        drive(source, pool)
    assert source.closed == [] and pool.closed


def test_a_run_that_was_made_twice_is_closed_and_put_aside(store):
    parent = tracking.create_run("p", tracking.experiment_id(), TrainConfig(), {})
    done, orphan = (tracking.create_run(name, tracking.experiment_id(), TrainConfig(), {"stage": "trial"}, parent.id) for name in "ab")
    done.close("FINISHED")
    tracking.close_orphans(parent)
    assert [(tracking.find_run(run.id).info.status, tracking.find_run(run.id).data.tags["stage"]) for run in (done, orphan)] == [
        ("FINISHED", "trial"),
        ("KILLED", "orphan"),
    ]


def test_what_a_worker_elsewhere_is_told_of_the_store(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"MLFLOW_TRACKING_PASSWORD": "p", "MLFLOW_RUN_ID": "r", "OTHER": "o"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("stn_pipeline.tracking.where._address", lambda: "sqlite:///mlflow.db")
    told = tracking.settings()
    assert told["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db" and told["MLFLOW_TRACKING_PASSWORD"] == "p"
    assert "MLFLOW_RUN_ID" not in told and "OTHER" not in told
    monkeypatch.setattr("os.environ", dict(os.environ))
    tracking.settle(told)
    assert os.environ["MLFLOW_TRACKING_URI"] == told["MLFLOW_TRACKING_URI"]
