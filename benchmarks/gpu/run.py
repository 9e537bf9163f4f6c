"""The GPU report's items, and how it runs them: in processes of their own, side by side where nothing is timed, within limits."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..harness.environment import ROOT

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FATAL = 3  # exit code of a worker whose CUDA context is lost
Note = Callable[[dict], None]  # takes an outcome as soon as it is there


class Skip(Exception):
    """An item cannot run here; says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large: "cuda", or the CPU for the self-test."""

    device: str
    wheels: str | None = None

    @property
    def self_test(self) -> bool:
        """True of the self-test, on the CPU with tiny shapes."""
        return self.device == "cpu"

    def pick(self, full, tiny):
        """`full` on a GPU, `tiny` in the self-test."""
        return tiny if self.self_test else full


@dataclass(frozen=True)
class Item:
    """One line of the report. run: gives figures by name; raises Skip, or anything else for a failure."""

    name: str
    run: Callable[[], dict]
    gpu_only: str = ""  # why it cannot run on a CPU
    seconds: float = 20.0  # its limit
    peer: bool = False  # someone else's code: what goes wrong in it is no failure


def synchronize(setting: Setting) -> None:
    """Wait for the device: what went wrong on it is raised here."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def is_fatal(error: Exception) -> bool:
    """After these the process' CUDA context answers nothing any more."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Phase:
    """A phase of the report. items: made without touching the device.  seconds: its share, and its limit without a budget.

    own: these seconds are its limit whatever the budget: it starts on a cold machine, and needs a tenth of them on a warm one.
    workers: processes side by side, for what needs no quiet device.  strict: an item that was not reached is a failure.
    vital: after a failure the rest of the report would mean nothing.
    """

    items: Callable[[Setting], list[Item]]
    seconds: int
    own: bool = False
    workers: int = 1
    strict: bool = False
    vital: bool = False


class Part(NamedTuple):
    """Every `of`-th item of a phase from the `first` on, without the first `done` of these."""

    first: int = 0
    of: int = 1
    done: int = 0

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """This part of the items."""
        return items[self.first :: self.of][self.done :]


WHOLE = Part()


# --- in the worker ----------------------------------------------------------------------------------------------------------


def work(items: Sequence[Item], setting: Setting, part: Part = WHOLE) -> Iterator[dict]:
    """Run a part of the items: {"begin": name, "of": its items, "seconds": limit} before each, its outcome after it."""
    count = len(items[part.first :: part.of])
    for item in part.take(items):
        yield {"begin": item.name, "of": count, "seconds": item.seconds, "peer": item.peer}
        begin, fatal = time.perf_counter(), False
        outcome = {"name": item.name, "status": "passed"}
        try:
            if item.gpu_only and setting.self_test:
                raise Skip(f"needs a GPU: {item.gpu_only}")
            outcome["figures"] = item.run()
            synchronize(setting)
        except Skip as skip:
            outcome |= {"status": "skipped", "reason": str(skip)}
        except Exception as error:  # a failure is a line of the report
            outcome |= {"status": "failed", "reason": _described(error), "traceback": traceback.format_exc()}
            fatal = is_fatal(error)
        yield {**outcome, "seconds": round(time.perf_counter() - begin, 2)}
        if fatal:
            raise SystemExit(FATAL)
        _clean(setting)


def _clean(setting: Setting) -> None:
    if setting.device == "cuda" and torch.cuda.memory_reserved() > 1 << 30:
        gc.collect()
        torch.cuda.empty_cache()


def _described(error: Exception) -> str:
    ours = (str(ROOT / "gear_kernels"), str(ROOT / "benchmarks"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ours)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:600]}{where}"


# --- in the report's own process --------------------------------------------------------------------------------------------


def in_process(phase: Phase, setting: Setting, note: Note) -> dict:
    """`run_phase` without processes, for the self-test."""
    found = []
    for line in work(phase.items(setting), setting):
        if "status" in line:
            note(line)
            found.append(line)
    return {"items": found, "missed": 0}


def run_phase(name: str, phase: Phase, setting: Setting, seconds: float, note: Note) -> dict:
    """A phase in processes of its own: {"items": outcomes, "missed": items not reached}. A process that dies costs one item."""
    deadline, lock = time.perf_counter() + seconds, threading.Lock()

    def told(outcome: dict) -> None:
        with lock:
            note(outcome)

    strands = [_Strand(name, phase, setting, deadline, told) for _ in range(phase.workers)]
    with concurrent.futures.ThreadPoolExecutor(phase.workers) as pool:
        list(pool.map(lambda i: strands[i].run(Part(i, phase.workers)), range(phase.workers)))
    turns = itertools.zip_longest(*(strand.items for strand in strands))  # the list's own order
    missed = sum(max(strand.count - len(strand.items), 0) for strand in strands)
    return {"items": [item for turn in turns for item in turn if item], "missed": missed}


class _Strand:
    """One worker after another over one part of a phase: items, and how many there should be."""

    def __init__(self, name: str, phase: Phase, setting: Setting, deadline: float, note: Note):
        self.name, self.phase, self.setting, self.deadline, self.note = name, phase, setting, deadline, note
        self.items: list[dict] = []
        self.count = 0

    def run(self, part: Part) -> None:
        while True:
            with tempfile.TemporaryFile("w+") as errors:
                starts = command(self.name, self.setting, part._replace(done=len(self.items)))
                worker = _Worker(starts, environment(self.setting, self.phase.workers), errors)
                running = self._follow(worker)
                late, code = time.perf_counter() >= self.deadline, worker.process.returncode
                if running is not None:
                    self._lost(running, worker.overdue, late, f"its process ended with {code}: {_tail(errors)}")
                elif late and not self.count:
                    self._add({"name": self.name, "status": "failed", "reason": "its time was over before the first item"})
                elif not late and code != FATAL and (code or len(self.items) < self.count):
                    self._add({"name": self.name, "status": "failed", "reason": _tail(errors) or f"exit code {code}"})
                    return
            if late or len(self.items) >= self.count:
                return

    def _follow(self, worker: _Worker) -> dict | None:
        """Note the outcomes of a worker until it ends; the item that it did not finish."""
        running, worker.until = None, self.deadline
        for line in worker.lines():
            if "begin" in line:
                running, self.count = line, line["of"]
                worker.until = min(self.deadline, time.perf_counter() + line["seconds"])
            else:
                running, worker.until = None, self.deadline
                self._add(line)
        return running

    def _lost(self, running: dict, overdue: bool, late: bool, died: str) -> None:
        reason = "the phase's time was over" if late else f"not done in its {running['seconds']:g} s" if overdue else died
        spared = running["peer"] or (late and not self.phase.strict)
        self._add({"name": running["begin"], "status": "skipped" if spared else "failed", "reason": reason})

    def _add(self, outcome: dict) -> None:
        outcome = {"seconds": None, **outcome}
        self.items.append(outcome)
        self.note(outcome)


def command(phase: str, setting: Setting, part: Part) -> list[str]:
    """The command that starts a worker."""
    options = ["--worker", phase, "--part", ",".join(map(str, part)), *["--self-test"] * setting.self_test]
    return [sys.executable, "-m", "benchmarks.gpu", *options]


def environment(setting: Setting, workers: int) -> dict[str, str]:
    """A worker's environment: the peers' wheels on its path, its share of the processors, lest threads wait for each other."""
    paths = filter(None, (setting.wheels, os.environ.get("PYTHONPATH")))
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return found | ({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {})


class _Worker:
    """A process and its lines; killed once `until` has passed, which its reader moves on with every line."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], errors):
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        self.until, self.overdue = float("inf"), False
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None and not self.overdue:
            self.overdue = time.perf_counter() >= self.until
            time.sleep(0 if self.overdue else 0.02)
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its compiler's helpers too, or the pipe would stay open

    def lines(self) -> Iterator[dict]:
        try:
            for line in self.process.stdout:
                if line.startswith('{"') and line.endswith("}\n"):  # anything else is a library's chatter
                    yield json.loads(line)
            self.process.wait()
        finally:
            self._kill()
            self.process.stdout.close()


def _tail(errors) -> str:
    errors.seek(0)
    return errors.read().strip()[-600:]
