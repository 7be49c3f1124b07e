"""A sweep on a real Ray cluster of several nodes on this machine: kill -9 of worker, node and driver, a node that freezes, a late one."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import pytest
import torch
import yaml
from mlflow.entities import Run

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import load
from stn_pipeline.model import build
from stn_pipeline.training import fit
from stn_pipeline.training.engine import choose_engine
from tests.conftest import ROOT
from tests.driven import Sweep, check_whole, mid_trial, refused, standing_still, until, wait_until_gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra: pip install -e '.[ray]'"),
]

ON_RAY = ("--ray", "auto", "--gpus-per-trial", "0.5")  # the GPUs are only said to be there; the one CPU of a node has room for one training
AS_OTHERS = {"RAY_worker_niceness": "0"}  # Ray's 15 leaves its workers a few percent of a core while other tests run
QUICK_TO_NOTICE = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}


class Node:
    """One node of the cluster, as processes."""

    def __init__(self, raylet: int):
        self.raylet = psutil.Process(raylet)

    @property
    def processes(self) -> list[psutil.Process]:
        """The raylet and all that it started, workers among it."""
        return [*self.raylet.children(recursive=True), self.raylet]

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.is_running():
                process.send_signal(number)

    def trains(self, run: Run) -> psutil.Process | None:
        """Return the worker here that trains a run, if one does."""
        pid = int(run.data.tags.get("process", "- 0 -").split()[1])
        return next((process for process in self.raylet.children() if process.pid == pid), None)


@dataclass
class Cluster:
    """A cluster of one node, to which tests add more, and what drivers need to find it."""

    process: subprocess.Popen[str]
    environment: dict[str, str]
    head: Node
    joined: list[Node] = field(default_factory=list)

    def ask(self, words: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(words, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def join(self) -> Node:
        self.joined.append(Node(int(self.ask("join"))))
        return self.joined[-1]


@contextmanager
def started(**environment: str) -> Iterator[Cluster]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "tests.ray_cluster"], cwd=ROOT, env=os.environ | AS_OTHERS | environment, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        address, raylet = process.stdout.readline().split()
        yield Cluster(process, environment | {"RAY_ADDRESS": address}, Node(int(raylet)))
        process.stdin.close()


@pytest.fixture(scope="module")
def cluster_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o644)  # as Ray makes it
    checks = {f"RAY_health_check_{name}": str(value) for name, value in QUICK_TO_NOTICE.items()}
    with started(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0", **checks) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_of_one: Cluster, sweep: Sweep) -> Iterator[Cluster]:
    sweep.environment = dict(cluster_of_one.environment)
    yield cluster_of_one
    while cluster_of_one.joined:
        node = cluster_of_one.joined.pop()
        if node.raylet.is_running():
            cluster_of_one.ask(f"leave {node.raylet.pid}")


def hears(driver: subprocess.Popen[str], words: str) -> str:
    """Return the next line of the console that holds the words."""
    assert driver.stdout is not None
    for line in driver.stdout:
        if words in line:
            return line
    raise AssertionError(f"never said {words}: {driver.communicate()}")


def training_on(sweep: Sweep, node: Node, driver: subprocess.Popen[str]) -> tuple[int, psutil.Process]:
    """Return the trial that a node trains, its third epoch behind it, and its worker."""

    def found() -> tuple[int, psutil.Process] | None:
        for trial in sweep.trials("RUNNING"):
            if len(trial.intermediate_values) >= 3 and "retry_of" not in trial.user_attrs:  # each is tried again once only
                worker = node.trains(sweep.client.get_run(trial.user_attrs["run_id"]))
                if worker is not None:
                    return trial.number, worker
        return None

    return until(found, driver)


def test_workers_and_nodes_that_die_freeze_and_join_cost_the_trials_on_them_alone(sweep, cluster):
    head, second = cluster.head, cluster.join()
    sweep.write(workers=0, trials=9, train={"device": "auto", "epochs": 30})
    driver = sweep.begin(*ON_RAY)
    late = cluster.join()

    killed, worker = training_on(sweep, head, driver)
    worker.kill()
    lost = {killed}

    assert "3 nodes with room for 3 trainings" in hears(driver, "has joined")
    on_late, _ = training_on(sweep, late, driver)
    late.send(signal.SIGKILL)
    lost.add(on_late)
    assert "2 nodes with room for 2 trainings" in hears(driver, "is gone")

    on_second, _ = training_on(sweep, second, driver)
    second.send(signal.SIGSTOP)
    lost.add(on_second)
    assert "1 node with room for 1 training " in hears(driver, "is gone")
    frozen = second.processes
    second.send(signal.SIGCONT)
    wait_until_gone(frozen)  # Ray ends what was written off

    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    check_whole(sweep, 9, lost)
    reasons = {trial.number: trial.user_attrs["reason"] for trial in sweep.trials("FAIL")}
    assert "The worker died" in reasons[killed] and "died or froze" in reasons[on_second]
    assert "node it was running on is dead" in reasons[on_late] or "died or froze" in reasons[on_late]


def test_a_worker_that_is_stopped_is_told_of_and_killed_on_its_node(sweep, cluster):
    sweep.environment["PYTHONPATH"] = f"{sweep.workplace.path}:{ROOT}"
    (sweep.workplace.path / "sitecustomize.py").write_text(
        "import sys\nif sys.argv[0] == '-m':\n"
        "    from stn_pipeline.jobs import silence\n    silence.TOLD_S, silence.GIVEN_UP_S = 8.0, 16.0\n"
    )
    sweep.write(workers=0, trials=3, train={"device": "auto", "epochs": 30})
    driver = sweep.begin(*ON_RAY)
    lost, worker = training_on(sweep, cluster.head, driver)
    worker.suspend()
    assert f"t{lost:03d} on node" in hears(driver, "has been silent for 8 s")
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    check_whole(sweep, 3, {lost})
    assert "was silent for" in sweep.trials("FAIL")[0].user_attrs["reason"]


def test_a_killed_driver_takes_its_trainings_with_it_and_the_next_one_goes_on(sweep, cluster):
    nodes = [cluster.head, cluster.join()]
    sweep.write(workers=0, trials=6)
    driver = sweep.begin(*ON_RAY)
    mid_trial(sweep, driver, n_complete=1)
    workers = [training_on(sweep, node, driver)[1] for node in nodes]
    with standing_still(workers):
        assert f"process {driver.pid} is driving it" in refused(sweep, *ON_RAY)
    driver.kill()
    driver.communicate()
    wait_until_gone(workers)
    kept, lost = sweep.values(), sweep.numbers("RUNNING")
    assert kept and lost

    driver = sweep.begin(*ON_RAY)
    assert lost == sweep.numbers("FAIL")
    mid_trial(sweep, driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130 and err == "interrupted\n", err
    assert sweep.parent.info.status == "KILLED" and not sweep.trials("RUNNING")
    lost = sweep.numbers("FAIL")

    done = sweep.run(*ON_RAY)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_whole(sweep, 6, lost)
    assert kept.items() <= sweep.values().items()


def test_a_cluster_and_this_machine_train_the_same_and_take_up_each_others_work(sweep, cluster):
    cluster.join()
    workplace = sweep.workplace
    file = {"name": "c", "arms": {"base": {}, "tps": {"transform": "tps"}}, "datasets": "digits", "seeds": 2, "train": {"epochs": 2}}
    (workplace.path / "c.yaml").write_text(yaml.safe_dump(file))
    far = workplace.run_module("compare", "c.yaml", *ON_RAY, **cluster.environment)
    assert far.returncode == 0 and "Traceback" not in far.stderr, far.stderr
    assert "2 workers, 1 threads each, on 2 nodes" in far.stdout
    near = workplace.run_module("compare", "c.yaml")
    assert near.returncode == 0 and "workers, " not in near.stdout, near.stdout
    assert near.stdout.splitlines()[-3:] == far.stdout.splitlines()[-3:]
    again = workplace.run_module("compare", "c.yaml", "--name", "d", "--seeds", "1", *ON_RAY, **cluster.environment)
    assert again.returncode == 0 and "2 runs of others" in again.stdout and "workers, " not in again.stdout, again.stdout


def test_mnist_reaches_nodes_that_have_no_data_and_gives_what_this_process_gives(sweep, cluster):
    data = os.environ.get("STN_TEST_DATA")
    if not data:
        pytest.skip("needs MNIST: set STN_TEST_DATA to a folder that holds MNIST/raw")
    cluster.join()
    elsewhere = os.path.relpath(data, sweep.workplace.path)  # the raylets run in another folder
    sweep.write(workers=0, datasets=["mnist"], trials=2, train={"device": "cpu", "epochs": 1, "val_fraction": 0.5, "data_dir": elsewhere})
    done = sweep.run(*ON_RAY)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    check_whole(sweep, 2, set())
    torch.set_num_threads(1)  # as on the nodes
    config = TrainConfig.parse(sweep.keys["train"] | {"dataset": "mnist"})
    splits = load(config)
    network = build(config, splits.image_shape, splits.n_classes, splits.mean, splits.std)
    choose_engine(network, config, len(splits.train))
    (epoch,) = fit(network, splits.train, splits.val, config)
    assert sweep.trials()[0].value == epoch.record.val_loss


def test_a_cluster_that_cannot_be_used_is_one_line(sweep, cluster, tmp_path):
    sweep.write(workers=0, trials=2)
    assert "nothing answers at" in refused(sweep, "--ray", "127.0.0.1:1")
    assert "no node has 64 CPU" in refused(sweep, "--ray", "auto", "--cpus-per-trial", "64")
    sweep.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    assert "MLflow at http://127.0.0.1:9 does not answer" in refused(sweep, *ON_RAY)
    other = tmp_path / "other"
    other.write_text("f" * 64)
    sweep.environment["RAY_AUTH_TOKEN_PATH"] = str(other)
    assert "have its token, Ray and Python" in refused(sweep, *ON_RAY)
    assert not (sweep.workplace.path / "mlflow.db").exists() and not list(sweep.workplace.path.glob("studies/*.db"))


def test_a_cluster_without_tokens_is_refused_unless_that_is_wanted(sweep):
    sweep.write(workers=0, trials=2, train={"device": "cpu", "epochs": 2})
    with started(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0") as opened:
        token = sweep.workplace.path / "token"
        token.write_text("0123456789abcdef" * 4)
        sweep.environment = {"RAY_ADDRESS": opened.environment["RAY_ADDRESS"], "RAY_AUTH_TOKEN_PATH": str(token)}
        assert "this cluster asks for no token" in refused(sweep, "--ray", "auto")
        sweep.environment["RAY_AUTH_MODE"] = "disabled"
        done = sweep.run("--ray", "auto")
    assert done.returncode == 0 and "warning" not in done.stdout, done.stderr  # it keeps to loopback
    check_whole(sweep, 2, set())
