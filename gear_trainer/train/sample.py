"""A step's rollouts: whole groups of fresh problems, sampled again where the recipe wants mixed ones."""

from __future__ import annotations

from dataclasses import dataclass

from gear_trainer.config import Config
from gear_trainer.recipe import Recipe
from gear_trainer.rollout import Engine, Limits, Rollout, check_failures, mixed_groups, roll_out, troubles
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem, Task


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

        def sample(batch: int, slots: list[int]) -> list[Rollout]:
            return roll_out(self.engine, self.chat, self.task, self.problems(step, batch, slots), limits, (cfg.seed, step))

        rollouts, counts = mixed_groups(sample, cfg.prompts_per_rank, most, cfg.rollout.filter_spread)
        if most > 1:
            sums.mean("mixed_groups", counts["mixed_groups"], cfg.prompts_per_rank)
            sums.total("resampled_groups", counts["resampled_groups"])
        for name, value in troubles(rollouts).items():
            sums.total(name, value)
        check_failures(rollouts, limits)
        return rollouts

    def problems(self, step: int, batch: int, slots: list[int]) -> list[tuple[int, Problem]]:
        """Fresh problems for some of the rank's places in a step. Every step owns the indices of all batches that it may sample,
        so what an index holds never depends on what was sampled before."""
        cfg = self.cfg
        first = ((step - 1) * self.recipe.gen_batches + batch) * cfg.rollout.prompts_per_step + self.rank * cfg.prompts_per_rank
        return [(first + slot, self.task.train_problem(first + slot)) for slot in slots]
