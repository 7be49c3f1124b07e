"""A Ray cluster from the driver's side: connect to it, ask every node what it has, and see nodes come and go.

Ray's own settings, where the environment does not say otherwise: tokens on, no usage reports.
"""

import math
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
import ray
import torch
from ray import cloudpickle
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.services import canonicalize_bootstrap_address_or_die, get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stn_pipeline import tracking
from stn_pipeline.errors import ConfigError, RunError
from stn_pipeline.jobs import mailbox
from stn_pipeline.training.device import resolve

CONNECT_S = 5.0  # of the first knock at the cluster's door
REST_S = 3.0  # of a node that took a task and lost it, until it is known whether it is dead
DESCRIBE_S = 120.0  # for a node to say what it has
POLL_S = 1.0
LOOPBACK = "127.0.0.1"
GUIDE = "docs/cluster.md"

cloudpickle.register_pickle_by_value(mailbox)


@dataclass(eq=False)
class Node:
    """A node: how Ray names it and what people call it, room for so many trainings at once, what it told of itself."""

    id: str
    name: str
    room: int
    told: dict[str, Any] | None = None
    asked: Any = None
    rests_until: float = 0.0
    asked_at: float = field(default_factory=time.monotonic)


class Cluster:
    """The cluster that this machine is in, seen by the one driver.

    `say` is told of nodes that come, go, or are left out.
    """

    def __init__(self, address: str, gpus: float, cpus: int, say: Callable[[str], object]):
        self.address, self.gpus, self.cpus, self.say = address, gpus, cpus, say
        self.here = ray.get_runtime_context().get_node_id()
        self.nodes: dict[str, Node] = {}
        self._seen: set[str] = set()
        self._store = tracking.store() if tracking.store().startswith("http") else ""
        self._versions = mailbox.versions()
        self._polled = 0.0
        self._on_gpus = False

    @property
    def usable(self) -> list[Node]:
        """The nodes that may be given trainings."""
        return [node for node in self.nodes.values() if node.told is not None and node.rests_until < time.monotonic()]

    @property
    def room(self) -> int:
        """Number of trainings that fit at once."""
        return sum(node.room for node in self.usable)

    def poll(self) -> list[Node]:
        """See, once a second, which nodes have come and gone; return those that died.

        Ray does not tell of the tasks on a node that froze, so it is asked for the nodes.
        """
        if time.monotonic() < self._polled + POLL_S:
            return []
        self._polled = time.monotonic()
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        gone = [self.nodes.pop(node_id) for node_id in self.nodes.keys() - alive.keys()]
        for node in gone:
            if node.told is not None:
                self.say(f"node {node.name} is gone: {self._capacity()}")
        for node_id in alive.keys() - self._seen:
            self._meet(node_id, alive[node_id])
        for node in [node for node in self.nodes.values() if node.told is None]:
            if why := self._hear(node):
                del self.nodes[node.id]
                self.say(f"node {node.name} is left out: {why}")
            elif node.told is not None:
                self.say(f"node {node.name} has joined: {self._capacity()}")
        return gone

    def rest(self, node: Node) -> None:
        """Give a node nothing for a moment."""
        node.rests_until = time.monotonic() + REST_S

    def gather(self) -> None:
        """Ask all nodes what they have, and wait for it.

        Raises: ConfigError where one of them differs from this machine, none has room for a training, or they ask for no token.
        """
        for info in ray.nodes():
            if info["Alive"]:
                self._meet(info["NodeID"], info)
        if self.nodes:
            ray.wait([node.asked for node in self.nodes.values()], num_returns=len(self.nodes), timeout=DESCRIBE_S)
        for node in self.nodes.values():
            if why := self._hear(node):
                raise ConfigError(f"ray={self.address}: node {node.name} {why}")
        if self.gpus and any(node.told["cuda"] for node in self.nodes.values() if node.told is not None):
            self._on_gpus = True
            for node in self.nodes.values():
                if why := self._hear(node):
                    raise ConfigError(f"ray={self.address}: node {node.name} {why}")
        if not self.room:
            wanted = f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
            raise ConfigError(
                f"ray={self.address}: no node has {wanted} for a training: start Ray with more (ray start --num-cpus --num-gpus)"
            )
        self._check_token()

    def _meet(self, node_id: str, info: dict[str, Any]) -> None:
        self._seen.add(node_id)
        resources = info["Resources"]
        room = int(resources.get("CPU", 0) // self.cpus)
        if self.gpus:  # a training never takes shares of two GPUs
            room = min(room, int(resources.get("GPU", 0)) * math.floor(1 / self.gpus + 1e-9))
        if not room:
            return
        node = self.nodes[node_id] = Node(node_id, f"{info['NodeManagerAddress']} ({node_id[:6]})", room)
        node.asked = self.on(node, ray.remote(max_calls=0, max_retries=0, num_cpus=0)(mailbox.describe_node)).remote(self._store)

    def _hear(self, node: Node) -> str:
        """Take in what a node told, if it did; return why it cannot be used, or nothing."""
        if not ray.wait([node.asked], timeout=0)[0]:
            return f"has said nothing for {DESCRIBE_S:.0f} s" if time.monotonic() > node.asked_at + DESCRIBE_S else ""
        try:
            told = ray.get(node.asked)
        except ray.exceptions.RayError as error:
            return f"cannot run a task: {one_line(error)}"
        if "broken" in told:
            return str(told["broken"])
        for what, version in told["versions"].items():
            if version != self._versions[what]:
                return f"has {what} {version}, this machine {self._versions[what]}: install the same on both"
        if self._on_gpus and not told["cuda"]:
            return "has a GPU for Ray, but none that its torch sees: install torch for CUDA there, or start Ray with --num-gpus 0"
        node.told = told
        return ""

    def _capacity(self) -> str:
        nodes, room = len(self.usable), self.room
        return f"{nodes} node{'s' * (nodes != 1)} with room for {room} training{'s' * (room != 1)} at once"

    def _check_token(self) -> None:
        """Warn of a cluster that lets in anyone who reaches it.

        Raises: ConfigError where this machine asks for tokens: Ray lets it in, but its workers' words to us would be refused.
        """
        if all(node.told is None or node.told["token"] for node in self.nodes.values()):
            return
        if is_token_auth_enabled():
            raise ConfigError(
                f"ray={self.address}: this cluster asks for no token, so whoever reaches it can run any program on its machines: start it "
                f"with RAY_AUTH_MODE=token, or, where nobody else can reach it, set RAY_AUTH_MODE=disabled here too ({GUIDE})"
            )
        if open_to := listens_on(int(self.address.rpartition(":")[2])):
            self.say(
                f"warning: this Ray cluster asks for no token and listens on {open_to}: whoever reaches that can run any program on its "
                f"machines. Stop it, and start it with RAY_AUTH_MODE=token ({GUIDE})"
            )

    def on(self, node: Node, remote: Any, **options: Any) -> Any:
        """Return a remote function or class that runs on this node only."""
        return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False), **options)

    def resolve(self, device: str, precision: str) -> torch.device:
        """Return what the nodes train on for a device's name: Ray chooses which GPU.

        Raises: ConfigError for a GPU where none is asked of Ray, or none is there, and for tf32 without one.
        """
        if device.startswith("cuda") and (not self._on_gpus or ":" in device):
            way_out = "give device=auto, and gpus_per_trial, on nodes with a GPU that torch sees"
            raise ConfigError(f"device={device}: on a cluster Ray gives out the GPUs: {way_out}")
        return torch.device("cuda") if self._on_gpus and device != "cpu" else resolve("cpu", precision)


@contextmanager
def connect(address: str, gpus: float, cpus: int, say: Callable[[str], object]) -> Iterator[Cluster]:
    """Join the cluster as a driver, for as long as the block.

    Raises: ConfigError where there is none, it does not let us in, or its nodes do not fit.
    """
    before = signal.getsignal(signal.SIGTERM)
    found = _locate(address)
    if is_token_auth_enabled():
        _guard_token(say)
    try:
        with _hushed():
            ray.init(found, log_to_driver=False, logging_level="ERROR")
    except ray.exceptions.AuthenticationError as error:
        why = one_line(error).partition(". ")[0]
        raise ConfigError(f"ray={address}: {why}: give RAY_AUTH_TOKEN_PATH the file with the cluster's token ({GUIDE})") from error
    except (Exception, SystemExit) as error:  # Ray raises nearly anything here
        way_out = "this machine must be a node of the cluster, and have its token, Ray and Python"
        raise ConfigError(f"ray={address}: {one_line(error)}: {way_out} ({GUIDE})") from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray sets its own
    try:
        cluster = Cluster(found, gpus, cpus, say)
        tracking.knock(makes=False)  # the cluster may yet be refused, and then nothing is to be left behind
        _check_store(cluster)
        cluster.gather()
        yield cluster
    finally:
        ray.shutdown()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep this process's stderr empty inside the block: Ray's C++ part writes there a line a second while it is refused."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _locate(address: str) -> str:
    """Return host and port of the cluster, once somebody answers there: Ray itself would wait for minutes."""
    try:
        found = str(canonicalize_bootstrap_address_or_die(address))
    except (ConnectionError, ValueError, OSError) as error:
        raise ConfigError(f"ray={address}: no cluster is running on this machine: start one (ray start --head; {GUIDE})") from error
    host, _, port = found.rpartition(":")
    if _answers(host, port):
        return found
    if host == get_node_ip_address() and _answers(LOOPBACK, port):
        # Ray takes a loopback address for the machine's outer one, at which a cluster that keeps to loopback does not answer.
        ray_constants.ENABLE_RAY_CLUSTER = False
        return f"{LOOPBACK}:{port}"
    raise ConfigError(f"ray={address}: nothing answers at {found}: start Ray there (ray start --head; {GUIDE})")


def _answers(host: str, port: str) -> bool:
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError):
        return False
    return True


def _guard_token(say: Callable[[str], object]) -> None:
    """Take from others the right to read the token: Ray makes the file readable to all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or not path.is_file() or not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return
    try:
        path.chmod(0o600)
        say(f"{path}: others could read this token; now it is yours alone (mode 600)")
    except OSError:
        say(f"warning: {path}: others can read this token: make it mode 600")


def _check_store(cluster: Cluster) -> None:
    """Check that the store can be written to from other machines, where there are any.

    Raises: RunError where it lies on this one's disk.
    """
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(addresses) > 1 and tracking.is_on_disk():
        raise RunError(
            f"ray={cluster.address}: MLflow is at {tracking.store()}, on this machine's disk, and other machines are to write to it: "
            f"start a server and set MLFLOW_TRACKING_URI ({GUIDE})"
        )


def listens_on(port: int) -> str:
    """Return the address on which this machine listens at a port, beyond itself; nothing where it listens to itself only."""
    try:
        listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    except psutil.AccessDenied:
        return f"port {port}"
    if not listening:
        return f"port {port} of another machine"
    beyond = [address.ip for address in listening if not ip_address(address.ip.removeprefix("::ffff:")).is_loopback]
    return f"{beyond[0]} port {port}" if beyond else ""


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__
