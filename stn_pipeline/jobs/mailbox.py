"""What is sent to a Ray cluster as code, not by name: the driver's mailbox, and what a node is asked about itself.

So a node on which this package is missing, or another version of it, can still answer. Nothing of ours is imported here.
"""

import asyncio
from typing import Any


class Mailbox:
    """An actor on the driver's node: attempts at jobs tell it of their epochs and wait for an answer.

    An attempt is known from `admit` to `drop`. What one that is not known says is not heard: the driver has given it up.
    """

    def __init__(self) -> None:
        self._news: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self._answers: dict[str, asyncio.Queue[bool]] = {}
        self._begun: dict[str, int] = {}

    async def admit(self, attempt: str) -> None:
        """Know an attempt."""
        self._answers[attempt] = asyncio.Queue()

    async def begin(self, attempt: str, process: int) -> bool:
        """Hear that an attempt begins, and in which process; say whether it shall."""
        if attempt not in self._answers:
            return False
        self._begun[attempt] = process
        return True

    async def process(self, attempt: str) -> int:
        """Return the process in which an attempt has begun, on its node; 0 where it has not."""
        return self._begun.get(attempt, 0)

    async def beat(self, attempt: str) -> None:
        """Hear that an attempt computes; an empty record says so."""
        if attempt in self._answers:
            self._news.put_nowait((attempt, {}))

    async def epoch(self, attempt: str, record: dict[str, Any]) -> bool:
        """Hear of an epoch; say, once the driver has, whether to go on."""
        if attempt not in self._answers:
            return False
        self._news.put_nowait((attempt, record))
        return await self._answers[attempt].get()

    async def take(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what was told since, at least one thing."""
        news = [await self._news.get()]
        while not self._news.empty():
            news.append(self._news.get_nowait())
        return news

    async def answer(self, attempt: str, go_on: bool) -> None:
        """Let an attempt go on, or stop it."""
        if attempt in self._answers:
            self._answers[attempt].put_nowait(go_on)

    async def drop(self, attempt: str) -> bool:
        """Forget an attempt; say whether it had begun."""
        if waiting := self._answers.pop(attempt, None):
            waiting.put_nowait(False)
        return self._begun.pop(attempt, 0) != 0


def kill(process: int) -> None:
    """End a process of this node, also one that stands still."""
    import os
    import signal
    from contextlib import suppress

    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def versions() -> dict[str, str]:
    """Return what must be the same on every machine that trains for one driver."""
    import importlib.metadata
    import platform

    import torch

    import stn_pipeline
    from stn_pipeline.training.fingerprint import code_version

    torch_version = torch.__version__.partition("+")[0]  # +cpu, +cu128: how it was built
    return {
        "Python": platform.python_version(),
        "torch": torch_version,
        "MLflow": importlib.metadata.version("mlflow").rpartition(".")[0],
        "stn_pipeline": stn_pipeline.__version__,
        "training code": code_version(),
    }


def describe_node(store: str) -> dict[str, Any]:
    """Return what a node has: `versions`, `cuda` (torch sees a GPU), `token` (Ray asks for one); `broken` where it cannot be used.

    store: address of the MLflow server that it must reach, or nothing.
    """
    import os
    import urllib.error
    import urllib.request

    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that asks for none
    told: dict[str, Any] = {"token": is_token_auth_enabled()}
    try:
        import torch

        told |= {"versions": versions(), "cuda": torch.cuda.is_available()}
    except Exception as error:
        return told | {"broken": f"cannot import stn_pipeline ({type(error).__name__}: {error}): install it there as on this machine"}
    try:
        if store:
            urllib.request.urlopen(store, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it lets us in, the driver has found out
    except OSError as error:
        return told | {"broken": f"cannot reach MLflow at {store} ({error}): set MLFLOW_TRACKING_URI to an address that every node reaches"}
    return told
