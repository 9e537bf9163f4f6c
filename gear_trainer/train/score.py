"""Scoring: one pass without gradients, micro-batch by micro-batch, into the experience's columns."""

from __future__ import annotations

import torch

from gear_kernels import TokenStats
from gear_trainer.policy.forward import Forward
from gear_trainer.recipe import Recipe
from gear_trainer.train.experience import Experience
from gear_trainer.train.schedule import Pass


def score(recipe: Recipe, experience: Experience, passes: list[Pass], forward: Forward) -> None:
    """The student everywhere; the teacher, behind its own prompt, where an advantage is not 0 or a loss asks. Collective."""
    for part in passes:
        stats = recipe.stats_to_score(part.teacher)
        for batch in part.micro_batches(experience):
            with torch.no_grad():
                out = forward(batch, stats)
            if batch.rows:
                _keep(recipe, experience, batch.rows, out, part.teacher)


def _keep(recipe: Recipe, experience: Experience, rows: list[int], out: TokenStats, teacher: bool) -> None:
    found = {"logprobs": out.logprobs, "entropy": out.entropy}
    if teacher:
        found["teacher_logprobs"] = out.teacher_logprobs
        found |= {name: getattr(out, name) for name in recipe.teacher_stats}
        found["signal"] = recipe.signal_of(out)
    places = experience.tokens(rows)
    for name, values in found.items():
        assert values is not None, name
        experience.write(name, places, values.float())
