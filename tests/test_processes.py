"""Faults and servers, with real processes: kill -9, signals, `mlflow run`, the UI opened first, a model that is served."""

import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
import pytest
import torch

from tests.conftest import ROOT, Workplace

pytestmark = pytest.mark.slow

FLAGS = "--dataset digits --transform diffeo --coordconv true --epochs 20 --device cpu".split()


@pytest.fixture
def client(workplace, monkeypatch):
    monkeypatch.chdir(workplace.path)
    return mlflow.MlflowClient(f"sqlite:///{workplace.path}/mlflow.db")


def only_run(client: mlflow.MlflowClient) -> mlflow.entities.Run:
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch") and int(line.split()[1].partition("/")[0]) >= epoch:
            return
    raise AssertionError(process.communicate())


def final_state(workplace: Workplace, run_id: str) -> dict[str, torch.Tensor]:
    (path,) = workplace.path.glob(f"mlruns/*/{run_id}/artifacts/checkpoint/even.pt")
    state = torch.load(path, weights_only=True)["state"]
    return state["network"] | {f"best {name}": value for name, value in state["best"].items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for_url(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} never answered")


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate(timeout=60)


@contextmanager
def tracking_server(workplace: Workplace) -> Iterator[str]:
    port = str(free_port())
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = workplace.start("mlflow", "server", "--workers", "1", "--port", port, **lean)
    try:
        wait_for_url(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


def test_a_killed_run_goes_on_and_ends_as_the_unbroken_one_bit_for_bit(workplace, client):
    unbroken = workplace.run_module("train", *FLAGS)
    assert unbroken.returncode == 0, unbroken.stderr
    first = only_run(client)

    process = workplace.start_module("train", *FLAGS)
    wait_for_epoch(process, 5)
    process.kill()
    process.communicate()
    killed = client.search_runs([first.info.experiment_id], order_by=["start_time DESC"])[0]
    assert killed.info.run_id != first.info.run_id
    assert killed.info.status == "RUNNING"  # nobody was left to say otherwise

    resumed = workplace.run_module("train", "--resume", killed.info.run_id)
    assert resumed.returncode == 0, resumed.stderr
    numbers = [int(line.split()[1].partition("/")[0]) for line in resumed.stdout.splitlines() if line.startswith("epoch")]
    assert numbers == list(range(numbers[0], 21)) and 5 <= numbers[0] <= 20
    assert client.get_run(killed.info.run_id).info.status == "FINISHED"
    ours, theirs = final_state(workplace, killed.info.run_id), final_state(workplace, first.info.run_id)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("test/loss", "test/accuracy", "val/loss"):
        assert client.get_run(killed.info.run_id).data.metrics[name] == client.get_run(first.info.run_id).data.metrics[name]
    steps = [point.step for point in client.get_metric_history(killed.info.run_id, "val/loss")]
    assert sorted(set(steps)) == list(range(1, 21))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_run_killed_with_its_checkpoint_kept_however_impatient(workplace, client, sent, code):
    process = workplace.start_module("train", *FLAGS[:-4], "--epochs", "2000")
    wait_for_epoch(process, 2)
    run_id = only_run(client).info.run_id
    if sent == signal.SIGTERM:
        second = workplace.run_module("train", "--resume", run_id)
        assert second.returncode == 2
        busy = f"error: resume={run_id}: process {process.pid} is still training it: wait, or stop that process first"
        assert second.stderr.splitlines()[-1] == busy
    process.send_signal(sent)
    time.sleep(0.1)
    process.send_signal(sent)  # as people do
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in err
    assert client.get_run(run_id).info.status == "KILLED"
    assert list(workplace.path.glob(f"mlruns/*/{run_id}/artifacts/checkpoint/*.pt"))


def test_mlflow_run_takes_the_users_spelling_and_works_when_the_ui_was_opened_first(workplace, monkeypatch):
    monkeypatch.chdir(workplace.path)
    with tracking_server(workplace):
        pass
    client = mlflow.MlflowClient(f"sqlite:///{workplace.path}/mlflow.db")
    assert client.get_experiment("0").artifact_location.startswith("mlflow-artifacts:")
    given = "transform=diffeo dataset=digits lr=1e-2 coordconv=True epochs=2".split()
    done = workplace.run("mlflow", "run", str(ROOT), "--env-manager=local", *(word for pair in given for word in ("-P", pair)))
    assert done.returncode == 0, done.stderr
    run = only_run(client)
    assert run.info.status == "FINISHED" and run.info.run_name == "diffeo-coordconv digits s0"
    assert (run.data.params["lr"], run.data.params["coordconv"], run.data.params["dataset"]) == ("1e-2", "True", "digits")
    assert list(workplace.path.glob(f"mlartifacts/0/{run.info.run_id}/artifacts/warps.png"))
    again = workplace.run("mlflow", "run", str(ROOT), "--env-manager=local", "-e", "eval", "-P", f"run_id={run.info.run_id}")
    assert again.returncode == 0, again.stderr


def test_mlflow_run_with_bad_input_is_one_line_and_nothing_is_left_running(workplace, client):
    done = workplace.run("mlflow", "run", str(ROOT), "--env-manager=local", "-P", "lr=-1")
    assert done.returncode != 0
    assert "error: lr=-1: must be > 0.0 (default 0.01)" in done.stderr and "Traceback" not in done.stderr
    run = only_run(client)
    assert run.info.status == "FAILED" and "lr=-1" in run.data.tags["mlflow.note.content"]


def test_a_tracking_server_over_http_and_a_served_model(workplace):
    with tracking_server(workplace) as uri:
        done = workplace.run_module("train", "--dataset", "digits", "--epochs", "2", MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 0, done.stderr
        client = mlflow.MlflowClient(uri)
        run = only_run(client)
        assert run.info.status == "FINISHED"
        assert {"warps.png", "report.json"} <= {entry.path for entry in client.list_artifacts(run.info.run_id)}

        serving_port = free_port()
        command = ["mlflow", "models", "serve", "-m", f"runs:/{run.info.run_id}/model", "--env-manager", "local", "-p", str(serving_port)]
        serving = workplace.start(*command, MLFLOW_TRACKING_URI=uri)
        try:
            wait_for_url(f"http://127.0.0.1:{serving_port}/ping", serving)
            images = torch.rand(3, 1, 8, 8)
            body = json.dumps({"inputs": images.tolist()}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{serving_port}/invocations", body, {"Content-Type": "application/json"})
            answer = torch.tensor(json.load(urllib.request.urlopen(request, timeout=60))["predictions"])
        finally:
            stop(serving)
        path = client.download_artifacts(run.info.run_id, "checkpoint/even.pt", str(workplace.path))
    from stn_pipeline.training.checkpoint import load_newest

    checkpoint = load_newest([workplace.path / path])
    assert checkpoint is not None
    with torch.inference_mode():
        torch.testing.assert_close(answer, checkpoint.build_best()(images), atol=1e-5, rtol=0)
