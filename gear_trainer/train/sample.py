"""A step's rollouts: whole groups of fresh problems, sampled again where the recipe wants mixed ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gear_trainer.config import Config
from gear_trainer.hints.wrong_answer import draw
from gear_trainer.recipe import Recipe
from gear_trainer.rollout import (
    Completion,
    Engine,
    Limits,
    Request,
    Rollout,
    check_failures,
    leave_out_stale,
    mixed_groups,
    roll_out,
    troubles,
)
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem, Task
from gear_trainer.train.ahead import Ahead


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


class StepSampler:
    """Samples this rank's share of a step, in turn with the training or `rollout.staleness` steps ahead of it.

    What a step holds is a function of (seed, step, rank) alone, and of the weights that sampled it.
    """

    def __init__(self, cfg: Config, recipe: Recipe, task: Task, chat: Chat, engine: Engine, rank: int):
        self.cfg, self.recipe, self.task, self.chat, self.engine, self.rank = cfg, recipe, task, chat, engine, rank
        staleness = cfg.rollout.staleness
        self.take = Ahead(self.draw, staleness, cfg.train.steps).take if staleness else self.draw

    def __call__(self, step: int, sums: Sums) -> list[Rollout]:
        """The step's rollouts. Ranks may sample different numbers of batches, so nothing in here is a collective."""
        cfg = self.cfg
        rollouts, counts, seconds = self.take(step)
        if self.recipe.gen_batches > 1:
            sums.mean("mixed_groups", counts["mixed_groups"], cfg.prompts_per_rank)
            sums.total("resampled_groups", counts["resampled_groups"])
        for name, value in troubles(rollouts).items():
            sums.total(name, value)
        sums.mean("engine_seconds", seconds, 1)
        check_failures(rollouts, Limits.of(cfg.rollout))
        if cfg.rollout.staleness:
            self._count_ages(rollouts, sums)
        return rollouts

    def draw(self, step: int) -> tuple[list[Rollout], dict[str, int], float]:
        """Sample the step's rollouts; with the counts of `mixed_groups`, and the seconds that the engine worked."""
        cfg, limits = self.cfg, Limits.of(self.cfg.rollout)
        self.engine.wake()
        engine = Stopwatch(self.engine)

        def sample(batch: int, slots: list[int]) -> list[Rollout]:
            return roll_out(engine, self.chat, self.task, self.problems(step, batch, slots), limits, (cfg.seed, step))

        rollouts, counts = mixed_groups(sample, cfg.prompts_per_rank, self.recipe.gen_batches, cfg.rollout.filter_spread)
        return rollouts, counts, engine.seconds

    def _count_ages(self, rollouts: list[Rollout], sums: Sums) -> None:
        """Leave out what is too old; a token's age is the number of pushes since it was sampled."""
        version = self.engine.version
        sums.total("groups_stale", leave_out_stale(rollouts, version, self.cfg.rollout.staleness))
        ages = [version - sampled for r in rollouts for sampled in r.versions if sampled >= 0]
        sums.mean("token_age_mean", sum(ages), len(ages))
        sums.peak("token_age_max", max(ages, default=0))

    def problems(self, step: int, batch: int, slots: list[int]) -> list[tuple[int, Problem]]:
        """Fresh problems for some of the rank's places in a step. Every step owns the indices of all batches that it may sample,
        so what an index holds never depends on what was sampled before."""
        cfg = self.cfg
        first = ((step - 1) * self.recipe.gen_batches + batch) * cfg.rollout.prompts_per_step + self.rank * cfg.prompts_per_rank
        return [(first + slot, draw(self.task, first + slot, self.recipe.wrong_answer)) for slot in slots]
