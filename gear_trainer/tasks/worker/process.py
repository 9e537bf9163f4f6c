"""Worker processes: asked one request at a time, started when an episode needs one, replaced when they die."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_START = 120.0  # seconds at least that a worker has to load its environment
_KEPT = 12  # lines of standard error that an error quotes


class WorkerError(RuntimeError):
    """A worker that refused a request. It lives on."""


class WorkerDied(RuntimeError):
    """A worker that ended, hung or answered no JSON; what its episodes earned is unknown."""


class Worker:
    """One process. Requests come one at a time, from any thread."""

    def __init__(self, command: list[str], timeout: float):
        self.timeout, self.lock, self.dead, self._rest = timeout, threading.Lock(), False, b""
        self.episodes: set[int] = set()
        self._said: deque[str] = deque(maxlen=_KEPT)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._listener = threading.Thread(target=self._listen, name="worker's errors", daemon=True)
        self._listener.start()

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to a request. Raises WorkerError where the worker refuses it, WorkerDied where none comes."""
        with self.lock:
            if self.dead:
                raise WorkerDied(self._epitaph("is gone"))
            assert self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
                answer = json.loads(self._line())
            except (OSError, ValueError) as error:
                self._end()
                self._listener.join(1.0)  # its last words may be on their way
                raise WorkerDied(self._epitaph(f"gave no answer to {do} ({error})")) from error
        if not isinstance(answer, dict) or "ok" not in answer:
            raise WorkerError(f"the worker's {do}: {answer.get('error') if isinstance(answer, dict) else answer}")
        return answer["ok"]

    def end(self) -> None:
        """End the process and what it started."""
        with self.lock:
            self._end()

    def _end(self) -> None:
        if not self.dead:
            self.dead = True
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _line(self) -> bytes:
        """The next line of its output. Raises OSError where it ended or stays silent."""
        assert self.process.stdout is not None
        until = time.monotonic() + self.timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"nothing within {self.timeout:g} s")
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                raise OSError("it ended")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line.decode(errors="replace").rstrip())

    def _epitaph(self, what: str) -> str:
        return " | ".join((f"the worker {what}", *list(self._said)[-3:]))


@dataclass
class Pool:
    """Workers of one command. An episode belongs to one worker from its reset on.

    timeout: seconds for an answer. A worker that holds n episodes gets no more; another one is started.
    """

    command: list[str]
    timeout: float
    _workers: list[Worker] = field(default_factory=list)
    _holds: int | None = 1
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def first(self) -> Worker:
        """A worker to ask about tasks; started if there is none. Raises WorkerError or WorkerDied where it does not start."""
        with self._lock:
            self._workers = [worker for worker in self._workers if not worker.dead]
            return self._workers[0] if self._workers else self._start()

    def take(self) -> tuple[Worker, int]:
        """A worker with room, and a number for the episode."""
        with self._lock:
            self._workers = [worker for worker in self._workers if not worker.dead]
            room = [w for w in self._workers if self._holds is None or len(w.episodes) < self._holds]
            worker = min(room, key=lambda w: len(w.episodes)) if room else self._start()
            self._count += 1
            worker.episodes.add(self._count)
            return worker, self._count

    def leave(self, worker: Worker, episode: int) -> None:
        """Give the worker's room back."""
        with self._lock:
            worker.episodes.discard(episode)

    def end(self) -> None:
        """End all workers."""
        with self._lock:
            for worker in self._workers:
                worker.end()

    def _start(self) -> Worker:
        worker = Worker(self.command, max(self.timeout, _START))
        try:
            self._holds = worker.ask("hello")["holds"]
            worker.timeout = self.timeout
        except (WorkerError, WorkerDied):
            worker.end()
            raise
        atexit.register(worker.end)
        self._workers.append(worker)
        return worker
