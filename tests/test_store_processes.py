"""The store, the run's state and the terminal, with real processes: signals at any moment, a lock that is held, words that nobody reads."""

import random
import signal
import sqlite3
import subprocess
import time

import mlflow
import pytest

from tests.conftest import ROOT, Workplace

pytestmark = pytest.mark.slow

LONG = "--dataset digits --epochs 4000 --device cpu --compile off".split()
SHORT = "--dataset digits --epochs 2 --device cpu --compile off".split()


@pytest.fixture
def client(workplace, monkeypatch):
    monkeypatch.chdir(workplace.path)
    return mlflow.MlflowClient(f"sqlite:///{workplace.path}/mlflow.db")


def runs(client: mlflow.MlflowClient) -> list[mlflow.entities.Run]:
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def wait_for_line(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(process.communicate())


def test_a_closed_terminal_ends_the_run_killed_unless_nohup_was_asked_for(workplace, client):
    process = workplace.start_module("train", *LONG)
    wait_for_line(process, "epoch    2/")
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 129 and err.splitlines()[-1] == "the terminal was closed" and "Traceback" not in err
    (run,) = runs(client)
    assert run.info.status == "KILLED"

    process = workplace.start("bash", "-c", 'trap "" HUP; exec "$@"', "-", "python", "-m", "stn_pipeline.train", *LONG)
    line = wait_for_line(process, "run ")
    process.send_signal(signal.SIGHUP)
    wait_for_line(process, "epoch    2/")
    second = workplace.run_module("train", "--resume", line.split()[1])
    busy = f"error: resume={line.split()[1]}: process {process.pid} is still training it: wait, or stop that process first"
    assert second.returncode == 2 and second.stderr.splitlines()[-1] == busy
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143 and {run.info.status for run in runs(client)} == {"KILLED"}


def test_a_signal_or_a_kill_in_the_first_seconds_leaves_a_folder_that_trains(workplace: Workplace, client):
    moments = random.Random(17)
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = workplace.start_module("train", *LONG)
        if sent != signal.SIGINT:  # the first one falls where the store is made, as soon as there is a trace of it
            wait_for_line(process, "run " if sent == signal.SIGTERM else "epoch")
        else:
            while not list(workplace.path.glob(".mlflow.db.making-*")):
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (128 + sent if sent != signal.SIGKILL else -sent), err
    done = workplace.run_module("train", *SHORT)
    assert done.returncode == 0, done.stderr
    assert {run.info.status for run in runs(client)} <= {"KILLED", "FINISHED"}  # also of the one that was killed -9
    assert not list(workplace.path.glob(".mlflow.db*"))


def test_three_first_commands_at_once_all_train(workplace, client):
    started = [workplace.start_module("train", *SHORT, "--seed", str(seed)) for seed in range(3)]
    ended = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert [run.info.status for run in runs(client)] == ["FINISHED"] * 3


def test_a_store_that_is_locked_for_longer_than_mlflow_waits_costs_nothing_but_time(workplace, client):
    process = workplace.start_module("train", "--dataset", "digits", "--epochs", "60", "--device", "cpu", "--compile", "off")
    wait_for_line(process, "epoch  2/")
    with sqlite3.connect(workplace.path / "mlflow.db", isolation_level=None, timeout=60) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        time.sleep(24)  # MLflow gives up after 20 s
        holder.execute("ROLLBACK")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert err.count("MLflow's store is locked by another process") == 1 and "Traceback" not in err
    (run,) = runs(client)
    assert run.info.status == "FINISHED" and "test/accuracy" in run.data.metrics
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/loss")] == list(range(1, 61))


def test_nobody_who_reads_is_no_reason_to_stop(workplace, client):
    command = f"{{ python -m stn_pipeline.train {' '.join(SHORT)}; echo $? > code; }} 2>&1 | head -1"
    done = workplace.run("bash", "-c", command)
    assert (workplace.path / "code").read_text() == "0\n", done
    (run,) = runs(client)
    assert run.info.status == "FINISHED" and "test/accuracy" in run.data.metrics


def test_mlflow_run_with_a_dash_in_a_knobs_name_trains_in_a_run_that_says_what_was_used(workplace, client):
    given = "dataset=digits epochs=1 batch-size=512 compile=off".split()
    done = workplace.run("mlflow", "run", str(ROOT), "--env-manager=local", *(word for pair in given for word in ("-P", pair)))
    assert "warning: `mlflow run` has put batch_size=64 on its run" in done.stderr
    (run,) = runs(client)
    assert run.info.status == "FINISHED" and run.data.params["batch_size"] == "512"
