"""C++ of ours compiled for this machine by its own compiler: one small library a program, in about a second.

Libraries are kept in the user's cache and shared by all processes; there is nothing to install where a compiler is.

What is loaded runs as the user, so the cache is trusted no further than it must be: the folder is the user's alone, and a
library ends with the SHA-256 digest of its name and content, without which it is compiled again.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from stn_pipeline.errors import StnError

COMPILERS = ("g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
ASK_S = 30.0  # for the compiler to say what it is
COMPILE_S = 180.0  # for all programs of a network, together
WAIT_S = COMPILE_S + 60  # for another process that compiles
POLL_S = 0.1
MARK = b"sha256:"
UNFINISHED = "unfinished-"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CompilerError(StnError):
    """There is no C++ compiler, it refused, or its libraries cannot be kept."""


class Program(NamedTuple):
    """A source and the macros that make it one of a kind, as in (("K", 5),): whole numbers that inner loops know."""

    source: Path
    macros: tuple[tuple[str, int], ...]


def compile_programs(programs: Iterable[Program]) -> None:
    """Compile what the cache does not hold, side by side, for every process of this user on such a machine; load all.

    Raises: CompilerError.
    """
    wanted = dict.fromkeys(programs)
    if not is_compiled(wanted):
        with _one_at_a_time():
            _compile([program for program in wanted if not _is_whole(_library(program))])
    for program in wanted:
        _load(_library(program))


def is_compiled(programs: Iterable[Program]) -> bool:
    """Say whether the cache holds all of these already, whole; not where there is no compiler to know it by."""
    try:
        return all(_is_whole(_library(program)) for program in programs)
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
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # its OpenMP is missing, say
        raise CompilerError(f"{path} cannot be loaded: {_one_line(str(error))}") from error


# The compiler

_hung: set[tuple[str, ...]] = set()  # compilers that have not answered: they are not waited for again


@cache
def _compiler() -> tuple[str, ...]:
    """Return the compiler's command: CXX may be a path, or a command with flags, as in `ccache g++`."""
    asked = os.environ.get("CXX", "").strip()
    if not asked:
        found = next(filter(None, map(shutil.which, COMPILERS)), None)
        if found is None:
            raise CompilerError(f"no C++ compiler called {' or '.join(COMPILERS)} is on the path: install g++")
        return (found,)
    if whole := shutil.which(asked):  # a path may hold spaces
        return (whole,)
    try:
        words = shlex.split(asked)
    except ValueError as error:
        raise CompilerError(f"CXX={asked}: {str(error).lower()}: quote it as a shell would") from error
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise CompilerError(f"no C++ compiler called {' '.join(words[:1])} is on the path: install it, or unset CXX")
    return (found, *words[1:])


@cache
def _machine() -> str:
    """Return what the compiler says of itself and of this processor: a cache may be shared by unlike machines."""
    process = _run("-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    told, why = _end(process, time.monotonic() + ASK_S)
    if process.returncode:
        raise CompilerError(f"{shlex.join(_compiler())} does not know -march=native: {_one_line(why) or process.returncode}")
    return told


def _compile(programs: list[Program]) -> None:
    """Compile programs side by side; each library gets its name when it is whole and on the disk."""
    folder = _folder()
    for left in folder.glob(f"{UNFINISHED}*"):  # by a process that was killed, since we have the lock
        shutil.rmtree(left, ignore_errors=True)
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder, ignore_cleanup_errors=True) as place:
        try:
            until = time.monotonic() + COMPILE_S
            started = {program: Path(place) / _library(program).name for program in programs}
            for program, unfinished in started.items():
                macros = [f"-D{name}={value}" for name, value in program.macros]
                running.append(_run(*FLAGS, *macros, str(program.source), "-o", str(unfinished)))
            for process, (program, unfinished) in zip(running, started.items(), strict=True):
                _, told = _end(process, until)
                if process.returncode:
                    name = f"{shlex.join(_compiler())} could not compile {program.source.name}"
                    raise CompilerError(f"{name}: {_one_line(told) or process.returncode}")
                _seal(unfinished)
                unfinished.rename(_library(program))
        finally:
            for process in running:
                _kill(process)
    _sync(folder)


def _run(*arguments: str) -> subprocess.Popen[str]:
    """Start the compiler, in a process group of its own: it starts others."""
    command = _compiler()
    if command in _hung:
        raise CompilerError(f"{shlex.join(command)} did not end in time before: it is not tried again")
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            [*command, *arguments], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise CompilerError(f"{shlex.join(command)} cannot be started: {error.strerror or error}") from error


def _end(process: subprocess.Popen[str], until: float) -> tuple[str, str]:
    """Return what a compiler said on stdout and stderr, once it has ended.

    Raises: CompilerError where it has not by then.
    """
    try:
        return process.communicate(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        _hung.add(_compiler())
        raise CompilerError(f"{shlex.join(_compiler())} did not end in time, and was stopped") from error
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


# The cache


@cache
def _name(program: Program) -> str:
    content = (program.source.read_text(), shlex.join(_compiler()), " ".join(FLAGS), _machine())
    stem = "-".join([program.source.stem, *(str(value) for _, value in program.macros)])
    return f"{stem}-{hashlib.sha256(chr(0).join(content).encode()).hexdigest()[:16]}.so"


def _library(program: Program) -> Path:
    """Return where a program's library lies, or would lie."""
    return _folder() / _name(program)


def _folder() -> Path:
    """Return the folder of the libraries, made if it is not there, which nobody else can write to.

    Raises: CompilerError where it is somebody else's, others may write to it, or it cannot be made.
    """
    from platformdirs import user_cache_path

    parent = user_cache_path("stn_pipeline")
    folder = parent / "kernels"
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for path, may_not in ((parent, stat.S_IWOTH), (folder, OTHERS_WRITE)):
            found = path.stat()
            if found.st_uid != os.geteuid():
                raise CompilerError(f"{path} is another user's, and libraries in it may be too: set XDG_CACHE_HOME to a folder of yours")
            if found.st_mode & may_not:
                raise CompilerError(f"{path} can be written to by others, who may have put libraries there: delete it")
        if folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):  # of an earlier version
            folder.chmod(0o700)
    except OSError as error:
        raise CompilerError(f"{folder}: {error.strerror or error}") from error
    return folder


def _is_whole(path: Path) -> bool:
    """Say whether a library is there, ours, and to the last byte what the compiler wrote: what is cut short kills who loads it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
                return False
            content = file.read()
    except OSError:
        return False
    body, mark, digest = content.rpartition(MARK)
    return bool(mark) and digest == _digest(path.name, body)


def _seal(path: Path) -> None:
    """Append a library's digest, and have all of it on the disk: loaders of libraries do not mind more bytes."""
    with path.open("rb+") as file:
        file.write(MARK + _digest(path.name, file.read()))
        path.chmod(0o700)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest().encode()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep the workers of a sweep from compiling the same thing side by side.

    Raises: CompilerError where another process has the lock for long, or the folder cannot be used.
    """
    import fcntl

    until = time.monotonic() + WAIT_S
    try:
        with (_folder() / "lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > until:
                        raise CompilerError(f"{lock.name}: another process has been compiling for {WAIT_S:.0f} s") from error
                    time.sleep(POLL_S)
            yield
    except OSError as error:
        raise CompilerError(f"{_folder()}: {error.strerror or error}") from error


def _one_line(told: str) -> str:
    return " ".join(told.split())[:300]
