"""A run as people watch it: the numbers of its steps, a line for each on the terminal, its rollouts on the disk and as text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.policy.batching import Amount
from gear_trainer.recipe import Recipe
from gear_trainer.rollout import Rollout
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.console import Console
from gear_trainer.runs.files import RunFiles
from gear_trainer.runs.metrics import Phases, Sums, six_digits, step_values
from gear_trainer.runs.records import COLUMNS, Records
from gear_trainer.train.experience import Experience
from gear_trainer.train.schedule import Schedule, amounts
from gear_trainer.train.update import learning_rate

GIB = 2**30


class Cost(Protocol):
    """The arithmetic of the run's model on its cards."""

    def flops(self, amount: Amount, backward: bool) -> float:
        """Floating-point operations of passes over this many tokens, without what is computed again."""
        ...

    @property
    def peak(self) -> float:
        """The most that a card does in a second."""
        ...


@dataclass(frozen=True)
class Yardsticks:
    """The figures that a step's numbers are held against.

    planned: bytes that a rank was to hold at most, by phase; none where nothing was planned. cost: None where no card's peak is
    known, as on a CPU: then there is no MFU.
    """

    planned: dict[str, float]
    cost: Cost | None


class Watch:
    """Shows a run. Every rank has one; that of rank 0 has `files`, and speaks. `start`: the step that the run goes on from."""

    def __init__(
        self, cfg: Config, chat: Chat, start: int = 0, files: RunFiles | None = None, yardsticks: Yardsticks | None = None
    ):
        self.cfg, self.files, self.yardsticks = cfg, files, yardsticks or Yardsticks({}, None)
        self.records, self.console = Records(cfg, chat), Console(cfg, start, quiet=files is None)
        self.sample: str | None = None  # of the step, until it is shown

    def __enter__(self) -> Watch:
        self.console.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self.console.stop()
        if self.files:
            self.files.close(failed=kind is not None)

    def report(self, values: dict[str, Any]) -> None:
        """A step's numbers, wherever they go."""
        if not self.files:
            return
        self.files.metrics(values)
        self.console.step(values)
        if self.sample:
            self.files.sample(values["step"], self.sample)
            self.console.sample(self.sample)
            self.sample = None

    def keep(self, step: int, e: Experience) -> dict[str, Any]:
        """Write a step's rollouts; returns the numbers that only all of them tell. Ranks make rows, rank 0 writes. Collective.

        response_length_p50, response_length_p99: policy tokens of a rollout that half, and 99 %, of all have at most. outcome: by
        name, the mean of each metric that the task reports beside the reward, over the rollouts that have it and did not fail.
        """
        if self.records.share:
            rows = self.records.gathered(e.rollouts, e.advantages, e.rows(tuple(COLUMNS.values()), self.records.share))
            if self.files and rows is not None:
                self.files.records(step, rows)
        every = self.cfg.tracking.samples_every
        if self.files and every and step % every == 0:
            self.sample = self.records.text(*_telling(e))
        return _figures(e.lengths, [r.metrics for r in e.rollouts if not r.failed])

    def count_work(self, recipe: Recipe, e: Experience, passes: Schedule, sums: Sums) -> None:
        """Add what this rank's passes compute."""
        if cost := self.yardsticks.cost:
            for phase, parts in amounts(recipe, e, passes).items():
                sums.total(f"flops/{phase}", sum(cost.flops(amount, backward) for amount, backward in parts))

    def values(self, step: int, sums: Sums, phases: Phases, more: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """A step's numbers, see docs/watch.md. more: those of `keep`, and held-out figures if any. Collective."""
        for phase, peak in phases.peaks.items():
            sums.peak(f"peak/{phase}", peak)
        seconds = phases.split()
        read = sums.read(device)
        found, flops = (_taken(read, prefix) for prefix in ("peak/", "flops/"))
        peaks = {phase: found[phase] for phase in seconds if phase in found}  # in their order
        engine = read.pop("engine_seconds")
        assert engine is not None  # each rank adds its own
        out = step_values(step, read, seconds, learning_rate(self.cfg, step), more)
        if device.type == "cuda":
            out["tokens_per_second_per_gpu"] = round(out["tokens_per_second"] / self.cfg.world_size, 1)
        # all ranks leave the wait together, so rank 0's time for both is everybody's
        whole = out["seconds"]["step"]
        room = whole if self.cfg.rollout.staleness else seconds["rollout"] + seconds["wait"]
        out["idle_share"] = six_digits(max(0.0, room - engine) / whole) if whole else None
        return out | self._against(seconds, flops, peaks)

    def _against(self, seconds: dict[str, float], flops: dict[str, float], peaks: dict[str, float]) -> dict[str, Any]:
        """What was measured beside the yardsticks. flops: of all ranks."""
        out: dict[str, Any] = {}
        if cost := self.yardsticks.cost:
            full = cost.peak * self.cfg.world_size
            out["mfu"] = {phase: six_digits(work / (full * seconds[phase])) for phase, work in flops.items() if seconds[phase]}
        planned = {phase: size for phase, size in self.yardsticks.planned.items() if phase in peaks}
        for name, sizes in (("memory", peaks), ("memory_planned", planned)):
            if sizes:
                out[name] = {phase: round(size / GIB, 3) for phase, size in sizes.items()}
        return out


def _taken(values: dict[str, float | None], prefix: str) -> dict[str, float]:
    """The numbers under a prefix, without it, taken out of the others."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) or 0.0 for name in names}


def _telling(e: Experience) -> tuple[Rollout, float]:
    """A rollout of this rank that something is learnt from, where there is one, and its advantage."""
    i = next((i for i, advantage in enumerate(e.advantages) if advantage), 0)
    return e.rollouts[i], e.advantages[i]


def _figures(lengths: list[int], metrics: list[dict[str, float]]) -> dict[str, Any]:
    """Quantiles of lengths and means of outcomes over all ranks. Collective."""
    own: dict[str, tuple[float, int]] = {}
    for found in metrics:
        for name, value in found.items():
            total, count = own.get(name, (0.0, 0))
            own[name] = total + value, count + 1
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (lengths, own))
    every = sorted(length for part, _ in parts for length in part)
    out: dict[str, Any] = {f"response_length_p{q}": every[math.ceil(q / 100 * len(every)) - 1] for q in (50, 99) if every}
    names = sorted({name for _, found in parts for name in found})
    sums = {name: [found[name] for _, found in parts if name in found] for name in names}
    outcome = {name: six_digits(sum(t for t, _ in found) / sum(n for _, n in found)) for name, found in sums.items()}
    return out | ({"outcome": outcome} if outcome else {})
