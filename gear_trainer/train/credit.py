"""Credit: the experience's columns to token advantages, in one call on the device where they are."""

from __future__ import annotations

import torch

from gear_kernels import credit_weights
from gear_trainer.policy.batching import on_device
from gear_trainer.recipe import Recipe
from gear_trainer.runs.metrics import Sums
from gear_trainer.train.experience import Experience


def assign(recipe: Recipe, experience: Experience, step: int, sums: Sums) -> None:
    """Weigh the trajectories that teach (an advantage that is not 0, or turn rewards).

    The others keep W = 1 and their own advantage, which is 0 but where the teacher had no reference to read.
    """
    e, rows = experience, experience.credited
    places = e.tokens(rows)
    credit = credit_weights(
        **_inputs(recipe, e, rows, places),
        advantages=on_device(torch.tensor([e.advantages[i] if e.teaches[i] else 0.0 for i in rows]), e.device),
        cu_seqlens=on_device(torch.tensor([0, *(e.lengths[i] for i in rows)]).cumsum(0).to(torch.int32), e.device),
        method=recipe.method_at(step),
    )
    e.columns["weights"] = torch.ones_like(e["sampler_logprobs"])
    e.columns["segments"] = torch.full_like(e["sampler_logprobs"], -1, dtype=torch.int32)
    e.columns["token_advantages"] = e.over_tokens([0.0 if t else a for a, t in zip(e.advantages, e.teaches, strict=True)])
    for name, values in {
        "weights": credit.weights,
        "segments": credit.segment_ids,
        "normalised": credit.signal,
        "token_advantages": credit.token_advantages + e["token_advantages"].index_select(0, places),
    }.items():
        e.write(name, places, values)
    _count_in(recipe, e)
    if recipe.wrong_hint:
        seen = e.tokens([i for i, taught in enumerate(e.taught) if taught])
        shown = e["wrong_hint"] if "wrong_hint" in e.columns else torch.zeros_like(e["logprobs"])
        sums.mean_of("wrong_hint_signal", shown.index_select(0, seen))
    for name, value in credit.diagnostics.items():
        sums.mean(name, value.double() * len(rows), len(rows))  # a rank that has no such trajectory counts for nothing


def _inputs(recipe: Recipe, e: Experience, rows: list[int], places: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """What the method reads of the credited tokens, packed."""
    names = ("entropy", "turn_ids") if recipe.scores_first else ("turn_ids",)
    picked: dict[str, torch.Tensor | None] = {name: e[name].index_select(0, places) for name in names}
    for name in recipe.teacher_columns:
        picked[name] = e[name].index_select(0, places) if name in e.columns else e["entropy"].new_zeros(len(places))
    if recipe.by_turn:
        picked |= {name: e[name].index_select(0, places) for name in ("turn_rewards", "anchors")}
        picked["groups"] = on_device(torch.tensor([e.rollouts[i].group for i in rows], dtype=torch.int64), e.device)
    return {"signal": None, "entropy": None, **picked}


def _count_in(recipe: Recipe, e: Experience) -> None:
    """Mark what the update's numbers are taken over, and take the weight from the rest: it has nothing to learn.

    Which rollouts these are only values tell (a method may weigh all tokens of one by 0), so the device decides.
    """
    if recipe.moves_all:
        e.columns["moves"] = torch.ones_like(e["sampler_logprobs"], dtype=torch.bool)
        return
    found = torch.zeros(len(e.rollouts), dtype=torch.int32, device=e.device)
    found.index_add_(0, e.sequence, (e["token_advantages"] != 0).int())
    e.columns["moves"] = found.index_select(0, e.sequence) > 0
    e.columns["loss_weights"] = e["loss_weights"] * e["moves"]
