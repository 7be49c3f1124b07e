"""The tracking server of docs/cluster.md, from its own commands: PostgreSQL, passwords, eight workers, and half a minute without it."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Workplace, page_block
from tests.driven import Sweep, check_whole, mid_trial, until

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: float(path.parent.name))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES is None or shutil.which("createdb") is None, reason="needs PostgreSQL (Debian: apt install postgresql)"),
]
AWAY_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The server of the page, which can be stopped and started again."""

    def __init__(self, place: Workplace, environment: dict[str, str]):
        self.place, self.environment = place, environment
        self.url = f"http://127.0.0.1:{environment['PORT']}"
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, name: str, **more: str) -> None:
        subprocess.run(["bash", "-euc", page_block(name)], cwd=self.place.path, env=self.environment | more, check=True)

    def start(self) -> None:
        with open(self.place.path / "server.log", "ab") as log:
            command = ["bash", "-euc", page_block("server")]
            self.process = subprocess.Popen(
                command, cwd=self.place.path, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: True if self.status("/health") == 200 else None, limit_s=120, pause_s=0.5)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def status(self, path: str) -> int:
        try:
            return int(urllib.request.urlopen(self.url + path, timeout=5).status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a PostgreSQL of its own; return the environment in which its commands find it."""
    folder = Path("/tmp") / f"pg-{os.getpid()}"  # short, for its socket, and open to its user
    port = str(free_port())
    folder.mkdir()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres")
    assert BINARIES is not None
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    data = str(folder / "data")

    def run(program: str, *arguments: str) -> None:
        subprocess.run([*as_user, str(BINARIES / program), "-D", data, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "--auth-local=trust", "--auth-host=scram-sha-256", "-U", "postgres")
        run("pg_ctl", "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield {"PGHOST": str(folder), "PGPORT": port, "PGUSER": "postgres", "DB": f"127.0.0.1:{port}", "DB_PASSWORD": "database-pass"}
        run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(workplace: Workplace, database: dict[str, str]) -> Iterator[Server]:
    secrets = {"ADMIN_PASSWORD": "admin-password", "SECRET_KEY": "key", "SWEEPER_PASSWORD": "sweeper-password"}
    server = Server(workplace, workplace.environment | database | secrets | {"HOST": "127.0.0.1", "PORT": str(free_port())})
    server.run("database")
    try:
        server.start()
        server.run("user", MLFLOW_TRACKING_URI=server.url)
        yield server
    finally:
        server.stop()


def test_eight_workers_lose_nothing_to_half_a_minute_without_their_server(sweep: Sweep, server: Server, monkeypatch: pytest.MonkeyPatch):
    assert server.status("/api/2.0/mlflow/experiments/search?max_results=1") == 401
    assert (server.place.path / "auth.ini").stat().st_mode & 0o077 == 0
    access = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_TRACKING_USERNAME": "sweeper", "MLFLOW_TRACKING_PASSWORD": "sweeper-password"}
    sweep.environment = access
    for name, value in access.items():
        monkeypatch.setenv(name, value)

    sweep.write(workers=8, trials=11, train={"device": "cpu", "epochs": 10})
    driver = sweep.begin()
    mid_trial(sweep, driver, n_complete=2)
    server.stop()
    time.sleep(AWAY_S)
    assert driver.poll() is None
    server.start()
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0 and "Traceback" not in err, err
    assert f"MLflow at {server.url} does not answer" in out and f"MLflow at {server.url} answers again after" in out
    check_whole(sweep, 11, set())
    orphans = sweep.runs("orphan")
    assert len(sweep.runs()) == 11 + 1 + len(orphans) and all(run.info.status == "KILLED" for run in orphans)
    for run in sweep.runs("trial"):
        trial = sweep.trials()[int(run.data.tags["trial"])]
        logged = {point.step: point.value for point in sweep.client.get_metric_history(run.info.run_id, "val/loss")}
        best_so_far = [min(logged[step] for step in range(1, epoch + 1)) for epoch in sorted(logged)]
        assert best_so_far == [trial.intermediate_values[epoch] for epoch in sorted(logged)]
        assert sweep.client.list_artifacts(run.info.run_id, "checkpoint")
