"""Numbers of a step: weighted sums that add up over ranks, phase timers, and the files that they go to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.runs.files import aside, write_whole
from gear_trainer.runs.records import recorded_steps, records_path


class Sums:
    """Means over all ranks: `add` on each rank, then `means` (collective; every rank must have added the same names)."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._peaks: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def mean_of(self, name: str, values: torch.Tensor) -> None:
        self.add(name, values.double().sum().item(), values.numel())

    def peak(self, name: str, value: float) -> None:
        before, value = self._peaks.get(name, 0.0), float(value)
        self._peaks[name] = value if value != value else max(before, value)  # a NaN stays: max(0, nan) would hide it

    def means(self, device: torch.device) -> dict[str, float | None]:
        """Mean of each name over ranks (None where nothing was counted) and the largest of each peak."""
        sums = torch.tensor([v for k in sorted(self._sums) for v in self._sums[k]], dtype=torch.float64, device=device)
        peaks = torch.tensor([self._peaks[k] for k in sorted(self._peaks)], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        pairs = sums.view(-1, 2).tolist()
        out: dict[str, float | None] = {k: s / n if n else None for k, (s, n) in zip(sorted(self._sums), pairs, strict=True)}
        return out | dict(zip(sorted(self._peaks), peaks.tolist(), strict=True))


class Phases:
    """Seconds by phase of one step; `split()` returns and forgets them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # otherwise a phase's kernels would be billed to the next one
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def split(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return {name: round(value, 3) for name, value in seconds.items()}


class RunFiles:
    """Rank 0's writer: metrics.jsonl, TensorBoard, each step's rollouts. What is past a resumed step is moved aside first."""

    def __init__(self, cfg: Config, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.dir = cfg.run_dir
        (self.dir / "rollouts").mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.dir / "metrics.jsonl"
        _keep_until(self.dir, resume_step)
        self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=resume_step + 1)

    def metrics(self, values: dict[str, Any]) -> None:
        """One object a step, flushed to the disk: a killed run loses no finished step."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in _flat(values):
            self.board.add_scalar(name, value, values["step"])
        self.board.flush()

    def records(self, step: int, lines: str) -> None:
        write_whole(records_path(self.dir, step), lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl; a last line that a kill cut short is left out."""
    steps = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return steps


def _keep_until(run_dir: Path, step: int) -> None:
    """Leave the steps that a resumed run goes on from; those past them will be made again, and move to a folder of their own."""
    metrics = run_dir / "metrics.jsonl"
    steps = read_metrics(metrics)
    files = [records_path(run_dir, n) for n in recorded_steps(run_dir) if n > step]
    past = [m for m in steps if m["step"] > step]
    if past or files:
        moved = aside(run_dir, step)
        write_whole(moved / metrics.name, "".join(json.dumps(m) + "\n" for m in past))
        for path in files:
            path.rename(moved / path.name)
    write_whole(metrics, "".join(json.dumps(m) + "\n" for m in steps if m["step"] <= step))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and prefix + name != "step":  # seconds/step is one of them
            yield prefix + name, value
