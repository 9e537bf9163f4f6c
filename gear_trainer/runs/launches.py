"""Starts the runs of a study, some side by side, each a process group of its own with a log, and shows how far they are."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gear_trainer.errors import ConfigError
from gear_trainer.runs.files import beside, read_metrics
from gear_trainer.runs.study import Cell, Plan, Standing, last_line, standing_of

POLL = 0.5  # seconds between looks at the processes
ENTRY = Path(__file__).parents[1] / "run.py"


def gpus() -> int:
    """The number of GPUs of this machine, without a context on any."""
    import torch

    return torch.cuda.device_count()


def check_devices(plan: Plan, count: int) -> None:
    """Raises ConfigError where the machine's GPUs do not suffice for the runs side by side; without any the cores are shared."""
    ranks, many = max(cell.cfg.world_size for cell in plan.cells), plan.study.side_by_side
    if many > 1 and any(cell.cfg.rollout.server.devices for cell in plan.cells):
        raise ConfigError(f"side_by_side={many}: rollout.server.devices names the same GPUs for all of them: set it to 1")
    if count and ranks * many > count:
        raise ConfigError(
            f"side_by_side={many} runs of up to {ranks} rank(s) need {ranks * many} GPUs, and this machine has {count}: lower it"
        )


def command(plan: Plan, cell: Cell, resume: bool, slot: int, port: int, count: int) -> tuple[list[str], dict[str, str]]:
    """A run's command line, and the environment that it gets beside this process'.

    slot: its place among those side by side, which decides its GPUs; port: where its ranks meet; count: the machine's GPUs.
    """
    ranks = cell.cfg.world_size
    given = ["--config", str(plan.config.resolve()), *(["--resume"] if resume else []), *cell.overrides]
    apart = count and plan.study.side_by_side > 1
    devices = ",".join(str(slot * ranks + i) for i in range(ranks)) if apart else ""
    environment = {"OMP_NUM_THREADS": str(_threads(ranks * plan.study.side_by_side))}
    launcher = plan.study.launcher or ("process" if ranks == 1 else "deepspeed")
    if launcher == "process":
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
        return [sys.executable, "-m", "gear_trainer", "train", *given], environment
    where = ["--include", f"localhost:{devices}"] if devices else ["--num_gpus", str(ranks)]
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", *where, "--master_port", str(port)]
    return [*start, str(ENTRY), *given], environment


def _threads(processes: int) -> int:
    """Each process' share of the cores, or less where the environment says so."""
    share = max(1, (os.cpu_count() or 1) // processes)
    return min(share, int(os.environ.get("OMP_NUM_THREADS") or share))


def _free_port() -> int:
    """A port below those that the system hands out unasked: the neighbour's ranks take many of these while this run starts."""
    while True:
        with suppress(OSError), socket.create_server(("", 20000 + secrets.randbelow(10000))) as taken:
            return taken.getsockname()[1]


@contextmanager
def locked(plan: Plan) -> Iterator[None]:
    """The study is this process' alone while its runs go on. Raises ConfigError where another has it."""
    folder = plan.study.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside(folder, "lock"))
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"{folder}: another process runs this study: end that one, or give the study another name") from None
    except OSError as error:
        raise ConfigError(f"output_dir={plan.study.output_dir}: {error.strerror}; give a folder that can be written") from None
    try:
        yield
    finally:
        lock.release()


# --- all of them --------------------------------------------------------------------------------------------------------------


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    bar: TaskID
    started: float = field(default_factory=time.monotonic)


class Launches:
    """The runs that a study still needs, each tried once. `run` returns 0 if all of them finished, 130 if it was interrupted, 1
    else. start: makes a process of a command line, an environment and a log's path, in a process group of its own."""

    def __init__(self, plan: Plan, standing: list[Standing], out: Console | None = None, start: Callable[..., Any] | None = None):
        self.plan, self.out, self.start = plan, out or Console(highlight=False), start or _start
        self.waiting = [s for s in standing if s.need in ("start", "resume")]
        self.left_alone = [s for s in standing if s.need == "wait"]
        self.gpus = gpus()
        check_devices(plan, self.gpus)
        self.free, self.running = list(range(plan.study.side_by_side)), list[_Running]()
        self.failed, self.asked, self.told = 0, 0, 0
        self.bars = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.out, disable=not self.out.is_terminal, transient=True,
        )  # fmt: skip
        done = sum(s.need == "nothing" for s in standing)
        self.all = self.bars.add_task(plan.study.name, total=len(standing), completed=done)

    def run(self) -> int:
        """Start and await all; an interrupt asks the running ones to end after their step, a second one at once."""
        for s in self.left_alone:
            self._say(f"{s.cell.name}: another process runs it, left alone")
        with self.bars, self._interruptible():
            while self.running or (self.waiting and not self.asked):
                while self.waiting and self.free and not self.asked:
                    self._begin(self.waiting.pop(0))
                self._forward()
                self._look()
                if self.running:
                    time.sleep(POLL)
        return 130 if self.asked else 1 if self.failed or self.left_alone else 0

    def _begin(self, s: Standing) -> None:
        cell, slot = s.cell, self.free.pop(0)
        words, environment = command(self.plan, cell, s.need == "resume", slot, _free_port(), self.gpus)
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        process = self.start(words, {**os.environ, **environment}, cell.log)
        at = s.run.step if s.run else 0
        self._say(f"{cell.name}: goes on after step {at}" if s.need == "resume" else f"{cell.name}: starts")
        bar = self.bars.add_task(f"  {cell.name}", total=cell.cfg.train.steps, completed=at)
        self.running.append(_Running(cell, process, slot, bar))

    def _look(self) -> None:
        for one in list(self.running):
            code = one.process.poll()
            if code is None or standing_of(one.cell).need == "wait":  # a launcher leaves at once, its ranks after their step
                if self.out.is_terminal and (done := read_metrics(one.cell.cfg.run_dir / "metrics.jsonl")):
                    self.bars.update(one.bar, completed=done[-1]["step"])
                continue
            self.running.remove(one)
            self.free.append(one.slot)
            self.bars.remove_task(one.bar)
            self._ended(one, code, standing_of(one.cell))

    def _ended(self, one: _Running, code: int, standing: Standing) -> None:
        minutes = f"{(time.monotonic() - one.started) / 60:.1f} min"
        if standing.run and standing.need == "nothing":
            before, after = standing.run.held_out
            solved = "" if after is None or before is None else f", held-out success {before:.3f} -> {after:.3f}"
            self.bars.update(self.all, advance=1)
            self._say(f"{one.cell.name}: finished, {minutes}{solved}")
        elif code == 130 or self.asked:
            self._say(f"{one.cell.name}: stopped; the same command goes on with it")
        else:
            self.failed += 1
            self._say(f"{one.cell.name}: failed (exit code {code}, {one.cell.log}): {last_line(one.cell.log)}")

    def _say(self, text: str) -> None:
        self.out.print(text, markup=False, soft_wrap=True)

    # --- interrupts -------------------------------------------------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM in place of ending by them; the runs hear of both as of Ctrl-C."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self.asked += 1

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self) -> None:
        if self.told == self.asked:
            return
        self.told += 1
        if self.told == 1:
            self._say("interrupted: the runs end after their step; again for at once")
        for one in self.running:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGINT)


def _start(words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
