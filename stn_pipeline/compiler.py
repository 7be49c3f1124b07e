"""C++ of ours compiled for this machine by its own compiler: one small library a program, in about a second.

Libraries are kept in the user's cache and shared by all processes; there is nothing to install where a compiler is.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from stn_pipeline.errors import StnError

COMPILERS = ("g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


class CompilerError(StnError):
    """There is no C++ compiler, or it refused."""


class Program(NamedTuple):
    """A source and the macros that make it one of a kind, as in (("K", 5),): whole numbers that inner loops know."""

    source: Path
    macros: tuple[tuple[str, int], ...]


def compile_programs(programs: Iterable[Program]) -> None:
    """Compile what the cache does not hold, side by side, for every process of this user on such a machine.

    Raises: CompilerError.
    """
    wanted = set(programs)
    if is_compiled(wanted):
        return
    with _one_at_a_time():
        started = {program: _start(program) for program in wanted if not _library(program).exists()}
        for program, (process, unfinished) in started.items():
            _, told = process.communicate()
            if process.returncode:
                unfinished.unlink(missing_ok=True)
                raise CompilerError(f"{_compiler()} could not compile {program.source.name}: {told.strip()[:300] or process.returncode}")
            unfinished.rename(_library(program))


def is_compiled(programs: Iterable[Program]) -> bool:
    """Say whether the cache holds all of these already; not where there is no compiler to know it by."""
    try:
        return all(_library(program).exists() for program in programs)
    except CompilerError:
        return False


def library(program: Program) -> ctypes.CDLL:
    """Return a program's library, compiled if it is not yet.

    Raises: CompilerError where it is not compiled and cannot be.
    """
    compile_programs([program])
    return _load(_library(program))


@cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@cache
def _compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise CompilerError(f"no C++ compiler called {' or '.join(names)} is on the path: install g++")
    return found


@cache
def _machine() -> str:
    """Return what the compiler says of itself and of this processor: a cache may be shared by unlike machines."""
    asked = subprocess.run(
        [_compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise CompilerError(f"{_compiler()} does not know -march=native: {asked.stderr.strip()[:300]}")
    return asked.stdout


@cache
def _library(program: Program) -> Path:
    """Return where a program's library lies, or would lie."""
    content = (program.source.read_text(), _compiler(), " ".join(FLAGS), _machine())
    name = "-".join([program.source.stem, *(str(value) for _, value in program.macros)])
    return _folder() / f"{name}-{hashlib.sha256(chr(0).join(content).encode()).hexdigest()[:16]}.so"


def _folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("stn_pipeline") / "kernels"


def _start(program: Program) -> tuple[subprocess.Popen[str], Path]:
    unfinished = _library(program).with_suffix(f".{os.getpid()}")
    macros = [f"-D{name}={value}" for name, value in program.macros]
    command = [_compiler(), *FLAGS, *macros, str(program.source), "-o", str(unfinished)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), unfinished


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep the workers of a sweep from compiling the same thing side by side."""
    import fcntl

    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with (_folder() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CompilerError(f"{_folder()}: {error.strerror or error}") from error
