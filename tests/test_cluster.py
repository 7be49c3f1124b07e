"""What can be told of a cluster without one: the mailbox, what a node says of itself, room, tokens, and a machine without Ray."""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stn_pipeline.comparing.compare import _parent
from stn_pipeline.comparing.comparefile import CompareConfig
from stn_pipeline.errors import ConfigError
from stn_pipeline.jobs import mailbox
from stn_pipeline.jobs.mailbox import Mailbox
from stn_pipeline.questions import WHERE, Question
from stn_pipeline.search.sweepfile import SweepConfig
from tests.conftest import ROOT, page_block

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra: pip install -e '.[ray]'")
SWEEP = {"name": "s", "search": ["lr"], "trials": 2, "datasets": "digits"}


def test_an_epoch_waits_for_its_answer_and_others_do_not():
    async def scene() -> None:
        box = Mailbox()
        await box.admit("a")
        await box.admit("b")
        assert await box.begin("a", 7) and await box.begin("b", 8)
        first = asyncio.create_task(box.epoch("a", {"number": 1}))
        second = asyncio.create_task(box.epoch("b", {"number": 7}))
        await asyncio.sleep(0)
        assert await box.take() == [("a", {"number": 1}), ("b", {"number": 7})]
        await box.answer("b", False)
        assert await second is False and not first.done()
        await box.answer("a", True)
        assert await first is True

    asyncio.run(scene())


def test_an_attempt_that_was_given_up_is_let_go_and_heard_no_more():
    async def scene() -> None:
        box = Mailbox()
        await box.admit("a")
        assert await box.begin("a", 7)
        waiting = asyncio.create_task(box.epoch("a", {"number": 1}))
        await asyncio.sleep(0)
        assert await box.drop("a") is True
        assert await waiting is False  # so that a worker that was thought dead ends
        assert await box.begin("a", 7) is False and await box.epoch("a", {"number": 2}) is False
        assert await box.take() == [("a", {"number": 1})]
        await box.admit("b")
        assert await box.drop("b") is False  # it had not begun
        await box.answer("b", True)

    asyncio.run(scene())


@needs_ray
def test_a_node_without_the_package_can_say_so(tmp_path):
    from ray import cloudpickle

    from stn_pipeline.jobs import cluster  # noqa: F401  says what is sent by value

    (tmp_path / "asked").write_bytes(cloudpickle.dumps((mailbox.describe_node, Mailbox)))
    code = (
        "import sys, pickle; sys.modules['stn_pipeline'] = None; "
        "describe, Mailbox = pickle.load(open('asked', 'rb')); Mailbox(); print(describe('')['broken'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot import stn_pipeline (ModuleNotFoundError")


@needs_ray
def test_a_node_tells_its_versions_and_whether_it_reaches_the_server(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = mailbox.describe_node("")
    assert "broken" not in told and told["versions"] == mailbox.versions()
    assert set(told["versions"]) == {"Python", "torch", "MLflow", "stn_pipeline", "training code"}
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert f"cannot reach MLflow at {url}" in mailbox.describe_node(url)["broken"]


@pytest.fixture
def cluster():
    """Return a cluster that was never connected, with one node."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra: pip install -e '.[ray]'")
    from stn_pipeline.jobs.cluster import Cluster, Node

    cluster = Cluster.__new__(Cluster)
    cluster.address, cluster.gpus, cluster.cpus, cluster._versions = "here:1", 0.0, 1, mailbox.versions()
    cluster.nodes = {"n": Node("n", "n (n)", 3, {"cuda": False, "token": True, "versions": mailbox.versions()})}
    cluster._seen, cluster._store, cluster._on_gpus, cluster.said = set(), "", False, []
    cluster.say = cluster.said.append
    return cluster


@pytest.mark.parametrize(
    ("cpus", "gpus", "has", "room"),
    [
        (1, 0, {"CPU": 4.0}, 4),
        (3, 0, {"CPU": 8.0, "GPU": 2.0}, 2),
        (1, 0.25, {"CPU": 16.0, "GPU": 2.0}, 8),
        (1, 0.4, {"CPU": 16.0, "GPU": 2.0}, 4),  # two on each: a training never takes shares of two GPUs
        (1, 0.1, {"CPU": 16.0, "GPU": 1.0}, 10),
        (2, 0.25, {"CPU": 4.0, "GPU": 1.0}, 2),
        (1, 1, {"CPU": 4.0}, 0),
        (1, 0, {}, 0),
    ],
)
def test_room_is_what_cores_and_whole_gpus_hold(cluster, monkeypatch, cpus, gpus, has, room):
    class Asked:
        def remote(self, store: str) -> None:
            pass

    monkeypatch.setattr(cluster, "on", lambda node, remote: Asked(), raising=False)
    cluster.cpus, cluster.gpus, cluster.nodes = cpus, gpus, {}
    cluster._meet("m", {"Resources": has, "NodeManagerAddress": "10.0.0.1"})
    assert [node.room for node in cluster.nodes.values()] == [room] * bool(room)


def test_a_node_of_another_version_is_refused_and_one_of_the_same_is_not(cluster, monkeypatch):
    from stn_pipeline.jobs.cluster import Node

    told = {"token": True, "cuda": False, "versions": mailbox.versions()}
    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr("ray.get", lambda ref: told)
    node = Node("m", "m", 1)
    assert cluster._hear(node) == "" and node.told == told
    told["versions"] = mailbox.versions() | {"torch": "1.0"}
    assert cluster._hear(node).startswith("has torch 1.0, this machine ")
    told["versions"], cluster._on_gpus = mailbox.versions(), True
    assert "none that its torch sees" in cluster._hear(node)


@needs_ray
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\nThis process was started with:\n    Ray: 2.60.0"),
        SystemExit(15),
        ConnectionError("Failed to connect to Ray cluster at here:1"),
    ],
)
def test_what_ray_raises_at_the_door_is_one_line(monkeypatch, error):
    from stn_pipeline.jobs import cluster

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cluster, "_locate", lambda address: address)
    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(ConfigError) as caught, cluster.connect("here:1", 0, 1, lambda line: None):
        pass
    told = str(caught.value)
    assert "\n" not in told and told.startswith("ray=here:1: ") and "docs/cluster.md" in told
    assert "Ray: 2.59.0" in told or not isinstance(error, RuntimeError)


def test_devices_of_a_cluster(cluster, monkeypatch):
    assert cluster.resolve("auto", "fp32").type == "cpu" and cluster.resolve("cpu", "fp32").type == "cpu"
    for wrong in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"device={wrong}: on a cluster Ray gives out the GPUs"):
            cluster.resolve(wrong, "fp32")
    with pytest.raises(ConfigError, match="tf32"):
        cluster.resolve("auto", "tf32")
    cluster._on_gpus = True
    assert cluster.resolve("auto", "tf32").type == "cuda" and cluster.resolve("cuda", "fp32").type == "cuda"
    assert cluster.resolve("cpu", "fp32").type == "cpu"
    with pytest.raises(ConfigError, match="device=cuda:1"):
        cluster.resolve("cuda:1", "fp32")


@needs_ray
def test_a_warm_worker_takes_the_gpu_that_it_is_given_each_time(monkeypatch):
    from stn_pipeline.jobs.ray_pool import _gpu

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _gpu([3]) == "cuda:3" and "CUDA_VISIBLE_DEVICES" not in os.environ
    with pytest.raises(ConfigError, match="MIG-1"):
        _gpu(["MIG-1"])


def test_an_open_cluster_is_refused_and_where_it_is_wanted_warned_of_unless_it_keeps_to_itself(cluster, monkeypatch):
    from stn_pipeline.jobs.cluster import listens_on

    with socket.socket() as inside, socket.socket() as outside, socket.socket(socket.AF_INET6) as mapped:
        for one, host in ((inside, "127.0.0.1"), (outside, "0.0.0.0"), (mapped, "::ffff:127.0.0.1")):  # the last is how Ray does it
            one.bind((host, 0))
            one.listen()
        inner, outer = inside.getsockname()[1], outside.getsockname()[1]
        assert listens_on(inner) == listens_on(mapped.getsockname()[1]) == "" and listens_on(outer) == f"0.0.0.0 port {outer}"
        for port, told_token, asks_here, warned in (
            (inner, False, False, False),
            (outer, True, True, False),
            (outer, False, False, True),
        ):
            cluster.said.clear()
            monkeypatch.setattr("stn_pipeline.jobs.cluster.is_token_auth_enabled", lambda: asks_here)  # noqa: B023
            cluster.address, cluster.nodes["n"].told["token"] = f"127.0.0.1:{port}", told_token
            cluster._check_token()
            assert bool(cluster.said) == warned
        assert f"asks for no token and listens on 0.0.0.0 port {outer}" in cluster.said[0]
    monkeypatch.setattr("stn_pipeline.jobs.cluster.is_token_auth_enabled", lambda: True)
    with pytest.raises(ConfigError, match="this cluster asks for no token.*start it with RAY_AUTH_MODE=token"):
        cluster._check_token()


def test_the_token_of_the_page_is_the_users_alone(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", page_block("token")], env=os.environ | {"HOME": str(tmp_path), "PATH": path}, check=True)
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64


@needs_ray
def test_a_token_that_others_can_read_becomes_the_users_alone(tmp_path, monkeypatch):
    from stn_pipeline.jobs.cluster import _guard_token

    said: list[str] = []
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    _guard_token(said.append)
    assert token.stat().st_mode & 0o777 == 0o600 and len(said) == 1
    _guard_token(said.append)
    assert len(said) == 1


def test_without_ray_the_flag_is_one_line_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP))
    blocker = "import sys; sys.modules['ray'] = None; sys.argv = ['sweep', 's.yaml', '--ray', 'auto']; "
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{blocker}from stn_pipeline.sweep import main; main()"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: ray=auto: Ray is not installed: pip install 'stn-pipeline[ray]', or leave ray out\n"
    assert not list(tmp_path.glob("studies/*.db")) and not (tmp_path / "mlflow.db").exists()


def test_nothing_imports_ray_unless_it_is_asked_for():
    code = "import stn_pipeline.jobs, stn_pipeline.search.sweep, stn_pipeline.comparing.compare, sys; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ray": "auto"}, ""),
        ({"ray": "node-1.lab:6379", "gpus_per_trial": 0.25, "cpus_per_trial": 2, "workers": 1000}, ""),
        ({"ray": "ray://node:10001"}, "ray=ray://node:10001: must be auto .* or HOST:PORT"),
        ({"ray": "node"}, "ray=node: must be auto"),
        ({"gpus_per_trial": 0.25}, "gpus_per_trial=0.25: is for a Ray cluster only: add ray=auto"),
        ({"cpus_per_trial": 2}, "cpus_per_trial=2: is for a Ray cluster only"),
        ({"ray": "auto", "gpus_per_trial": 2}, "gpus_per_trial=2: must be <= 1"),
        ({"workers": 257}, "workers=257: must be <= 256 on one machine"),
    ],
)
def test_where_is_checked(keys, words):
    if not words:
        assert Question.parse({"name": "x"} | keys)
        return
    for kind, more in ((SweepConfig, SWEEP), (CompareConfig, {"name": "c", "arms": {"a": {}, "b": {"lr": 0.5}}})):
        with pytest.raises(ConfigError, match=words):
            kind.parse(more | keys)


def test_where_it_runs_does_not_make_another_comparison(monkeypatch):
    assert WHERE == {"workers", "ray", "gpus_per_trial", "cpus_per_trial"}
    asked = []
    monkeypatch.setattr("stn_pipeline.tracking.search_runs", lambda tags: asked.append(tags) or [])
    monkeypatch.setattr("stn_pipeline.tracking.adopt_run", lambda *_: asked)
    monkeypatch.setattr("stn_pipeline.tracking.environment", dict)
    asked_of = {"name": "c", "arms": {"a": {}, "b": {"lr": 0.5}}}
    for where in ({}, {"workers": 4}, {"ray": "auto", "gpus_per_trial": 0.5}):
        with pytest.raises(AttributeError):
            _parent(CompareConfig.parse(asked_of | where), [], "0")
    assert asked[0] == asked[1] == asked[2]
