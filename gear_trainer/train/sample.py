"""A step's rollouts: whole groups of fresh problems, sampled again where the recipe wants mixed ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gear_trainer.config import Config
from gear_trainer.recipe import Recipe
from gear_trainer.rollout import Completion, Engine, Limits, Request, Rollout, check_failures, mixed_groups, roll_out, troubles
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem, Task


class Stopwatch(Engine):
    """An engine whose work is timed: `seconds` that sampling has taken. What a rollout spends besides, the engine idles."""

    def __init__(self, engine: Engine):
        self.engine, self.seconds = engine, 0.0

    def generate(self, requests: list[Request]) -> list[Completion]:
        with self._running():
            return self.engine.generate(requests)

    def submit(self, ticket: int, request: Request) -> None:
        self.engine.submit(ticket, request)

    def collect(self) -> list[tuple[int, Completion]]:
        with self._running():
            return self.engine.collect()

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.engine.push(weights)

    @contextmanager
    def _running(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class StepSampler:
    """Samples this rank's share of a step. What a step holds is a function of (seed, step, rank) alone."""

    cfg: Config
    recipe: Recipe
    task: Task
    chat: Chat
    engine: Engine
    rank: int

    def __call__(self, step: int, sums: Sums) -> list[Rollout]:
        """The step's rollouts. Ranks may sample different numbers of batches, so nothing in here is a collective."""
        cfg, limits, most = self.cfg, Limits.of(self.cfg.rollout), self.recipe.gen_batches
        self.engine.wake()
        engine = Stopwatch(self.engine)

        def sample(batch: int, slots: list[int]) -> list[Rollout]:
            return roll_out(engine, self.chat, self.task, self.problems(step, batch, slots), limits, (cfg.seed, step))

        rollouts, counts = mixed_groups(sample, cfg.prompts_per_rank, most, cfg.rollout.filter_spread)
        if most > 1:
            sums.mean("mixed_groups", counts["mixed_groups"], cfg.prompts_per_rank)
            sums.total("resampled_groups", counts["resampled_groups"])
        for name, value in troubles(rollouts).items():
            sums.total(name, value)
        sums.mean("engine_seconds", engine.seconds, 1)
        check_failures(rollouts, limits)
        return rollouts

    def problems(self, step: int, batch: int, slots: list[int]) -> list[tuple[int, Problem]]:
        """Fresh problems for some of the rank's places in a step. Every step owns the indices of all batches that it may sample,
        so what an index holds never depends on what was sampled before."""
        cfg = self.cfg
        first = ((step - 1) * self.recipe.gen_batches + batch) * cfg.rollout.prompts_per_step + self.rank * cfg.prompts_per_rank
        return [(first + slot, self.task.train_problem(first + slot)) for slot in slots]
