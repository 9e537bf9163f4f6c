"""A Python interpreter for code that nobody trusts: warm processes in a sandbox, each of which forks for one call at a time."""

from __future__ import annotations

import atexit
import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gear_trainer.sandbox import zygote
from gear_trainer.sandbox.means import Means
from gear_trainer.sandbox.syscalls import seccomp_filter
from gear_trainer.sandbox.view import LIBRARIES, interpreter, readable

End = Literal["done", "error", "memory", "time", "output", "killed"]
START_LIMIT = 50.0  # seconds; importing sympy takes 1-2, much more on a loaded machine; below rollout.turn_timeout
OPENING_LIMIT = 200.0  # the same before a run, where no call waits: 50 was too little on two cores with 30 processes
_GRACE = 20.0  # seconds beyond a call's limit, after which its process is lost; twice that is below rollout.turn_timeout
_FLAGS = ("-S", "-s", "-P", "-B", "-X", "utf8")  # no site-packages, nothing written, no path but what it is given
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "HOME": "/", "CUDA_VISIBLE_DEVICES": ""} | {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
}  # all that the code sees; a call may start no thread
# What a fresh sympy loads and works out on first use, which takes longer than most calls; numpy is optional to it.
WARM = """
import contextlib
with contextlib.suppress(ImportError):
    import numpy
with contextlib.suppress(ImportError):
    import sympy
    x, y = sympy.symbols("x y")
    sympy.solve(x**2 - 2, x), sympy.solve([x + y - 3, x - y - 1], [x, y]), sympy.factor(x**2 - 1), sympy.N(sympy.pi, 30)
    sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2), sympy.integrate(x * sympy.sin(x), x), sympy.diff(x**x, x)
    sympy.limit(sympy.sin(x) / x, x, 0), sympy.Matrix([[1, 2], [3, 4]]).inv(), sympy.sympify("x + 1/3"), sympy.factorint(30021)
"""


class SandboxError(RuntimeError):
    """A sandbox that does not start, or was lost. One line: what failed, and how to go on."""


@dataclass(frozen=True)
class Limits:
    """The limits of one call: seconds of wall time (and, rounded up, of CPU time), bytes of address space, bytes of output."""

    seconds: float = 5.0
    memory: int = 1 << 30
    output: int = 4096

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "output"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")


LIMITS = Limits()


@dataclass(frozen=True)
class Result:
    """The text that a call printed, cut at the limit, and how it ended; `error`: it raised, or left with a status but 0."""

    text: str
    end: End
    seconds: float


class Sandbox:
    """Runs code under one means, at most `size` calls at a time; whoever comes then waits. `restarts` counts processes lost.

    A call knows nothing of another: it is a fork of a process that never ran any, only `warm` (code that imports what is slow).
    Made by `open_sandbox`, which tries it out.
    """

    def __init__(self, means: Means, size: int, limits: Limits = LIMITS, warm: str = WARM):
        self.means, self.size, self.limits, self.restarts = means, size, limits, 0
        self.start_limit = START_LIMIT
        self.folder = tempfile.mkdtemp(prefix="gear-sandbox-")  # stands in the command line of each of its processes
        self._owner = os.getpid()
        library = Path(self.folder, "library")
        library.mkdir()
        paths = readable(library, LIBRARIES)
        settings = means.settings(paths) | {
            "library": str(library),
            "warm": warm,
            "filter": base64.b64encode(seccomp_filter()).decode(),
        }
        source = Path(zygote.__file__).read_text(encoding="utf-8")
        self._command = means.command([interpreter(), *_FLAGS, "-c", source, json.dumps(settings)], paths)
        self._idle: list[_Warm] = []
        self._all: set[_Warm] = set()
        self._free = threading.Semaphore(size)
        self._lock = threading.Lock()
        self._closed = False
        atexit.register(self.close)

    def run(self, code: str, limits: Limits | None = None) -> Result:
        """Run a text of Python. Never raises on what the code does; SandboxError where the warm process is lost twice."""
        with self._free:
            for last in (False, True):
                try:
                    warm = self._take()
                    result = warm.call(code, limits or self.limits)
                except (OSError, EOFError, TimeoutError, ValueError) as error:  # ValueError: its pipes were closed meanwhile
                    self.restarts += 1
                    self._end_idle()
                    if last:
                        raise SandboxError(f"the sandbox {self.means.name} was lost twice in a call ({said(error)})") from error
                else:
                    with self._lock:
                        self._idle.append(warm)
                    return result
        raise AssertionError("not reached")

    def pids(self) -> list[int]:
        """The processes that are up, as the host numbers them: with bwrap that of its outer half."""
        with self._lock:
            return [warm.process.pid for warm in self._all]

    def close(self) -> None:
        """End all of its processes, calls that run too. A fork of the process that opened it leaves it as it is."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closed = True
            for warm in self._all:
                warm.kill()
            self._all.clear()
            self._idle.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def _end_idle(self) -> None:
        """End the processes that wait: what took one may have taken them, and a dying one still looks alive for a moment."""
        with self._lock:
            for warm in self._idle:
                warm.kill()
            self._all.difference_update(self._idle)
            self._idle.clear()

    def _take(self) -> _Warm:
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            dead = {warm for warm in self._all if warm.process.poll() is not None}
            self._all -= dead
            self._idle = [warm for warm in self._idle if warm not in dead]
            if self._idle:
                return self._idle.pop()  # the one that was used last: its pages are in the caches
            warm = _Warm(self._command, self.folder)
            self._all.add(warm)
        try:
            warm.wait_until_ready(self.start_limit)
        except BaseException:
            warm.kill()
            raise
        return warm


class _Warm:
    """One warm process, the leader of a process group of its own."""

    def __init__(self, command: list[str], folder: str):
        self._complaints = open(Path(folder, f"{time.monotonic_ns()}.txt"), "w+b")  # noqa: SIM115  (closed in kill)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )

    def wait_until_ready(self, limit_s: float) -> None:
        """Return when it has imported its libraries. Raises SandboxError with its own last words."""
        try:
            self._read(1, time.monotonic() + limit_s)
        except (EOFError, TimeoutError) as error:
            self._complaints.seek(0)
            lines = self._complaints.read().decode(errors="replace").strip().splitlines()
            raise SandboxError(lines[-1] if lines else said(error)) from error

    def call(self, code: str, limits: Limits) -> Result:
        """One call. Where it raises (EOFError, TimeoutError, OSError) the process is gone."""
        text = code.encode(errors="replace")
        deadline = time.monotonic() + limits.seconds + _GRACE
        try:
            self._write(zygote.REQUEST.pack(limits.seconds, limits.memory, limits.output, len(text)) + text, deadline)
            end, seconds, length = zygote.REPLY.unpack(self._read(zygote.REPLY.size, deadline))
            shown = self._read(length, deadline).decode(errors="replace")
        except BaseException:
            self.kill()
            raise
        return Result(shown, zygote.ENDS[end], seconds)  # pyright: ignore[reportArgumentType]

    def kill(self) -> None:
        """End the process with its group; a call of bwrap's or of rlimits' ends with the process that it was forked from."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._complaints):
            if file:
                file.close()

    def _write(self, data: bytes, deadline: float) -> None:
        stream: Any = self.process.stdin
        view = memoryview(data)
        while view:
            if not select.select([], [stream], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError("does not read")
            view = view[os.write(stream.fileno(), view[:4096]) :]  # what a pipe that is ready takes without blocking

    def _read(self, size: int, deadline: float) -> bytes:
        stream: Any = self.process.stdout
        found = b""
        while len(found) < size:
            if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("no answer in time")
            part = os.read(stream.fileno(), size - len(found))
            if not part:
                raise EOFError("it ended")
            found += part
        return found


def said(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{error or type(error).__name__}".split())
