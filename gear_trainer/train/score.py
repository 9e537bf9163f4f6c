"""Scoring: one pass without gradients, micro-batch by micro-batch, into the experience's columns."""

from __future__ import annotations

from dataclasses import replace

import torch

from gear_kernels import TokenStats
from gear_trainer.policy.forward import Forward
from gear_trainer.recipe import Recipe
from gear_trainer.train.experience import Experience
from gear_trainer.train.schedule import Pass


def score(recipe: Recipe, experience: Experience, passes: list[Pass], forward: Forward) -> None:
    """The student everywhere, and the reference model with a KL term; the teacher, behind its own prompt, where an advantage is
    not 0 or a loss asks, and once more behind a wrong hint where the recipe holds the signal against that. Collective."""
    for part in passes:
        stats = recipe.stats_to_score(part.teacher)
        for batch in part.micro_batches(experience):
            with torch.no_grad():
                out = forward(batch, stats)
                # the same call with another prompt for the teacher: the student's half of it cancels in the difference
                wrong = forward(replace(batch, teacher=batch.wrong_hint), stats) if part.wrong_hint else None
            if batch.rows:
                keep(recipe, experience, batch.rows, out, wrong, part.teacher)
    # by itself: on the policy's own weights each change of adapters is another order of modules, which ZeRO-3 would record anew
    for part in passes if recipe.kl else ():
        for batch in replace(part, teacher=False, wrong_hint=False).micro_batches(experience):
            with torch.no_grad():
                reference = forward.reference_logprobs(batch)
            if batch.rows:
                experience.write("reference_logprobs", experience.tokens(batch.rows), reference)


def keep(
    recipe: Recipe,
    experience: Experience,
    rows: list[int],
    out: TokenStats,
    wrong: TokenStats | None = None,
    teacher: bool = False,
) -> None:
    """Write a micro-batch's statistics into the columns of its rollouts `rows`; wrong: those behind a wrong hint."""
    found = {"logprobs": out.logprobs, "entropy": out.entropy}
    if teacher:
        found["teacher_logprobs"] = out.teacher_logprobs
        found |= {name: getattr(out, name) for name in recipe.teacher_stats}
        found["signal"] = recipe.signal_of(out)
    if wrong is not None:
        found["wrong_hint"] = recipe.signal_of(wrong)
        found["signal"] = recipe.signal_of(out) - found["wrong_hint"]
    places = experience.tokens(rows)
    for name, values in found.items():
        assert values is not None, name
        experience.write(name, places, values.detach().float())
