"""Faults in a sweep, with real processes, a real study and a real store: kill -9, Ctrl-C, a second driver, eight workers at once."""

import json
import os
import shutil
import signal
import time

import pytest

from tests.conftest import ROOT
from tests.driven import (
    check_whole,
    children_of,
    mid_final,
    mid_trial,
    mid_trial_and_about_to_start_another,
    refused,
    standing_still,
    wait_until_gone,
    worker_of,
)

pytestmark = pytest.mark.slow


def test_a_killed_worker_costs_no_trial_and_a_sweep_that_is_done_stays_as_it_is(sweep):
    sweep.write(trials=4)
    driver = sweep.begin()
    killed = mid_trial(sweep, driver)
    worker = worker_of(sweep.client.get_run(killed.user_attrs["run_id"]), driver)
    assert worker is not None
    worker.kill()
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    check_whole(sweep, 4, {killed.number})

    before = sweep.content()
    again = sweep.run()
    assert again.returncode == 0 and again.stderr == ""
    assert "workers, " not in again.stdout and again.stdout.splitlines()[-2:] == out.splitlines()[-2:]
    assert sweep.content() == before
    line = refused(sweep, "--search", "{lr: {low: 1e-4, high: 1e-1, log: true}, batch_size: [32, 64]}")
    assert "search.lr" in line and "0.0001 to 0.01, log" in line and "0.0001 to 0.1, log" in line and "--name s-2" in line
    line = refused(sweep, "--train", "{device: cpu, epochs: 15}")
    assert "train.epochs: was 14 " in line and "now 15" in line and "--name s-2" in line
    assert sweep.content() == before


def test_a_killed_or_interrupted_driver_goes_on_to_the_exact_total(sweep):
    sweep.write(trials=7)
    driver = sweep.begin()
    mid_trial(sweep, driver)
    with standing_still(children_of(driver)):
        assert f"process {driver.pid} is driving it" in refused(sweep)  # a second driver
    assert driver.poll() is None

    mid_trial(sweep, driver, n_complete=1)
    workers = children_of(driver)
    driver.kill()
    driver.communicate()
    wait_until_gone(workers)
    kept, lost = sweep.values(), sweep.numbers("RUNNING")
    assert kept and lost

    driver = sweep.begin()
    assert lost == sweep.numbers("FAIL")
    mid_trial(sweep, driver)
    driver.send_signal(signal.SIGSTOP)  # so that it does not see its workers die
    for process in [*children_of(driver), driver]:
        process.kill()
    driver.communicate()
    lost |= sweep.numbers("RUNNING")

    driver = sweep.begin()
    assert lost == sweep.numbers("FAIL")
    mid_trial_and_about_to_start_another(sweep, driver)
    workers = children_of(driver)
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGINT)  # as people do
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "Traceback" not in err, err
    wait_until_gone(workers)
    assert sweep.parent.info.status == "KILLED"
    assert not sweep.trials("RUNNING") and "RUNNING" not in {run.info.status for run in sweep.runs()}
    lost = sweep.numbers("FAIL")

    done = sweep.run()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_whole(sweep, 7, lost)
    assert kept.items() <= sweep.values().items()


def test_final_trainings_that_were_killed_go_on_in_their_own_runs(sweep):
    train = {"device": "cpu", "epochs": 12, "optimizer": "sgd"}  # at the default lr of 0.01 that is slow: something else wins
    sweep.write(trials=2, final=2, train=train, search={"lr": [0.1]})
    driver = sweep.begin()
    first = mid_final(sweep, driver)
    workers = children_of(driver)
    driver.kill()
    driver.communicate()
    wait_until_gone(workers)

    driver = sweep.begin()
    assert "RUNNING" not in {run.info.status for run in sweep.runs("final")}
    second = mid_final(sweep, driver)
    worker = worker_of(second, driver)
    assert worker is not None
    worker.kill()
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    check_whole(sweep, 2, set())

    finals = sorted(sweep.runs("final"), key=lambda run: int(run.data.params["seed"]))
    assert {first.info.run_id, second.info.run_id} <= {run.info.run_id for run in finals}
    assert sorted((run.data.tags["arm"], run.data.params["seed"]) for run in finals) == [
        (arm, seed) for arm in ("default", "tuned") for seed in "12"
    ]
    for run in finals:
        assert run.info.status == "FINISHED" and run.data.tags["state"] == "COMPLETE"
        assert sorted(set(sweep.epochs(run.info.run_id))) == list(range(1, 13))
    with open(sweep.client.download_artifacts(sweep.parent.info.run_id, "answer.json", str(sweep.workplace.path))) as file:
        answer = json.load(file)
    for what in ("test/loss", "test/accuracy"):
        assert answer[what]["n"] == 2
        for arm in ("tuned", "default"):
            assert answer[what][arm] == [run.data.metrics[what] for run in finals if run.data.tags["arm"] == arm]


def test_a_confirmation_that_was_killed_goes_on_to_its_exact_total(sweep):
    train = {"device": "cpu", "epochs": 12}
    sweep.write(trials=3, train=train, search={"lr": [0.003, 0.002]}, confirm={"top": 2, "seeds": 2}, final=1)
    driver = sweep.begin()
    first = mid_final(sweep, driver, "confirm")
    workers = children_of(driver)
    driver.kill()
    driver.communicate()
    wait_until_gone(workers)
    ended = {run.info.run_id: run.info.end_time for run in sweep.runs("confirm") if run.info.status == "FINISHED"}

    driver = sweep.begin()
    second = mid_final(sweep, driver, "confirm")
    worker = worker_of(second, driver)
    assert worker is not None
    worker.kill()
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    check_whole(sweep, 3, set())

    runs = {(run.data.tags["trial"], run.data.params["seed"]): run for run in sweep.runs("confirm")}
    with open(sweep.client.download_artifacts(sweep.parent.info.run_id, "answer.json", str(sweep.workplace.path))) as file:
        answer = json.load(file)
    assert len(runs) == len(sweep.runs("confirm")) == 2 * len(answer["confirmation"]) in (4, 6)
    assert {first.info.run_id, second.info.run_id} <= {run.info.run_id for run in runs.values()}
    for run in runs.values():
        assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "COMPLETE")
        assert sorted(set(sweep.epochs(run.info.run_id))) == list(range(1, 13))
        assert not any(name.startswith("test/") for name in run.data.metrics)
        assert ended.get(run.info.run_id, run.info.end_time) == run.info.end_time  # what was done is not opened again
    for one in answer["confirmation"]:
        assert one["values"] == {seed: runs[str(one["trial"]), seed].data.metrics["best/val/loss"] for seed in ("101", "102")}
    means = [one["kept"] for one in answer["confirmation"]]
    assert means == sorted(means) and " kept " in out
    assert {run.data.params["seed"] for run in sweep.runs("final")} == {"1"}


def test_eight_workers_at_once_in_an_empty_folder_and_then_two_trials_more(sweep):
    sweep.write(trials=12, train={"device": "cpu", "epochs": 8})
    done = sweep.run("--workers", "8")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    check_whole(sweep, 12, set())
    kept = sweep.values()
    assert {sweep.client.get_experiment(run.info.experiment_id).name for run in sweep.runs()} == {"stn"}
    done = sweep.run("--trials", "14")
    assert done.returncode == 0, done.stderr
    check_whole(sweep, 14, set())
    assert kept.items() <= sweep.values().items() and len(sweep.trials()) == 14


def test_mlflow_run_makes_the_studys_own_run_and_a_time_limit_alone_ends_it(sweep):
    sweep.write(time_limit_s=1, workers=1)
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, sweep.workplace.path)
    done = sweep.workplace.run("mlflow", "run", ".", "--env-manager=local", "-e", "sweep", "-P", "config=s.yaml", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert sweep.parent.data.tags["mlflow.project.entryPoint"] == "sweep"
    assert sweep.parent.info.run_name == "sweep s" and sweep.parent.data.params["config"] == "s.yaml"
    n_trials = len(sweep.trials())
    assert n_trials >= 1  # the default configuration at least
    check_whole(sweep, n_trials, set())
