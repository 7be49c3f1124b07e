"""Workers that stand still: told of after half a minute, given up after ten.

A worker says every few seconds that it has computed something since. One that is stopped, or waits for a disk that does not
answer, says nothing; one that takes an hour to decode images, or for one step, is heard all the while.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

BEAT_S = 5.0
COMPUTED = 0.01  # of a core; a process that merely waits needs less
TOLD_S = 30.0
GIVEN_UP_S = 600.0  # longer than MLflow waits for a server that is away
MOST_AT_ONCE_S = 5.0

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def beating(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat`, during the block, every BEAT_S seconds in which this process has computed, for as long as it can be called."""
    done = threading.Event()

    def watch() -> None:
        before = time.process_time()
        while not done.wait(BEAT_S):
            now = time.process_time()
            if now - before < COMPUTED * BEAT_S:
                continue
            before = now
            try:
                beat()
            except Exception:  # who listened is gone
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Silence(Generic[Key]):
    """For how long each worker that is to be heard of has been silent.

    Only time in which we listened counts: a driver that was itself stopped, with its workers or without, gives nobody up.
    """

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic):
        self._say, self._clock = say, clock
        self._silent_s: dict[Key, float] = {}
        self._told: set[Key] = set()
        self._listened = clock()

    def heard(self, key: Key, name: str) -> None:
        """Hear of a worker."""
        if key in self._told:
            self._told.remove(key)
            self._say(f"{name} is heard again after {self._silent_s[key]:.0f} s")
        self._silent_s[key] = 0.0

    def forget(self, key: Key) -> None:
        """Expect to hear no more of a worker."""
        self._silent_s.pop(key, None)
        self._told.discard(key)

    def listen(self, expected: dict[Key, str]) -> dict[Key, str]:
        """Let the time since the last call pass for the workers that are to be heard of, by name; return those given up, and why."""
        now = self._clock()
        passed, self._listened = min(now - self._listened, MOST_AT_ONCE_S), now
        for key in self._silent_s.keys() - expected.keys():
            self.forget(key)
        given_up = {}
        for key, name in expected.items():
            self._silent_s[key] = self._silent_s.get(key, 0.0) + passed
            if self._silent_s[key] >= GIVEN_UP_S:
                given_up[key] = f"{name} was silent for {GIVEN_UP_S / 60:.0f} min and is given up"
            elif self._silent_s[key] >= TOLD_S and key not in self._told:
                self._told.add(key)
                self._say(f"{name} has been silent for {TOLD_S:.0f} s; it is given up after {GIVEN_UP_S / 60:.0f} min")
        return given_up
