"""The passes of a step and what each runs over, laid out by the host and agreed by all ranks before the first of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gear_kernels.losses import aggregation_weights
from gear_trainer.config import Config
from gear_trainer.policy.batching import (
    Amount,
    MicroBatch,
    amount,
    even,
    micro_batch,
    on_device,
    padding,
    padding_micro_batch,
    sides,
    split_rows,
)
from gear_trainer.recipe import Recipe
from gear_trainer.train.experience import Experience


@dataclass(frozen=True)
class Pass:
    """This rank's micro-batches, by rollouts, and how many any rank has at most: every engine call is a collective."""

    split: list[list[int]]
    teacher: bool  # with the teacher's rows
    count: int
    wrong_hint: bool = False  # and those behind a wrong hint
    packed: bool = False

    def micro_batches(self, experience: Experience) -> Iterator[MicroBatch]:
        """On the device, up to the largest count of any rank."""
        for k in range(self.count):
            short = k >= len(self.split)
            sides = self.teacher, self.wrong_hint, self.packed
            batch = padding_micro_batch(*sides) if short else micro_batch(experience.rollouts, self.split[k], *sides)
            yield batch.to(experience.device)


@dataclass(frozen=True)
class Schedule:
    """The passes of scoring, of what the update does not score, and one for each optimizer step.

    padding: tokens of it, and all that this rank's forwards take.
    """

    score: list[Pass]
    update: list[Pass]
    padding: tuple[int, int]


def schedule(cfg: Config, recipe: Recipe, experience: Experience) -> Schedule:
    """Lay out a step's passes, and give the experience its `loss_weights`. Collective.

    Two collectives and one look at each are all that ranks have to agree on: counts of micro-batches, of tokens and rollouts.
    """
    share = len(experience.rollouts) // cfg.train.updates_per_step
    parts = [range(first, first + share) for first in range(0, len(experience.rollouts), share)]
    scored = (True, False) if recipe.needs_teacher or recipe.teaches_all else (False,)
    learning = [[i for i in part if _learns(recipe, experience, i)] for part in parts]
    later = set() if recipe.scores_first else set(learning[0])  # the update's own forward scores them
    rows = [[i for i, taught in enumerate(experience.taught) if taught == teacher and i not in later] for teacher in scored]
    rows += learning
    whole = bool(recipe.distillation and recipe.distillation.full)
    teachers = [*scored, *(whole for _ in parts)]
    budget, packed = cfg.train.tokens_per_micro_batch, bool(cfg.train.packing)
    splits = [split_rows(experience.rollouts, own, budget, teacher, packed) for own, teacher in zip(rows, teachers, strict=True)]
    lengths = [[experience.lengths[i] for i in part] for part in parts]
    # a truncated rollout that is masked counts as a sequence without tokens, as in TRL
    sizes = [n for part in parts for n in (sum(experience.lengths[i] for i in part if not _masked(experience, i)), len(part))]
    counts, tokens = _agreed([len(s) for s in splits], sizes, experience.device)
    weights = [
        aggregation_weights(
            own,
            cfg.train.aggregation,
            n_tokens_global=max(1, tokens[2 * k]),
            n_seqs_global=tokens[2 * k + 1],
            max_len=cfg.rollout.max_model_len,
        )
        for k, own in enumerate(lengths)
    ]
    experience.columns["loss_weights"] = on_device(torch.cat(weights), experience.device)
    wrong = [recipe.wrong_hint and teacher for teacher in scored] + [False] * len(parts)
    if packed:
        splits = [even(experience.rollouts, *given, budget, t) for *given, t in zip(splits, counts, teachers, strict=True)]
    passes = [Pass(*given, packed) for given in zip(splits, teachers, counts, wrong, strict=True)]
    found = [padding(experience.rollouts, part.split, part.teacher, part.wrong_hint, packed) for part in passes]
    return Schedule(passes[: len(scored)], passes[len(scored) :], (sum(p for p, _ in found), sum(n for _, n in found)))


def amounts(recipe: Recipe, experience: Experience, passes: Schedule) -> dict[str, list[tuple[Amount, bool]]]:
    """The work of this rank's passes by phase, each with whether it has a backward; a reference model counts as the policy."""
    found: dict[str, list[tuple[Amount, bool]]] = {"score": [], "update": []}
    for phase, parts in (("score", passes.score), ("update", passes.update)):
        for part in parts:
            rollouts = [experience.rollouts[i] for rows in part.split for i in rows]
            student, *taught = (amount(rollouts, prompts) for prompts in sides(rollouts, part.teacher, part.wrong_hint))
            found[phase] += [(student, phase == "update"), *((one, False) for one in taught)]
            if recipe.kl and phase == "score":
                found[phase].append((student, False))
    return found


def _learns(recipe: Recipe, experience: Experience, i: int) -> bool:
    """Whether a rollout can have a gradient; the means count the others too."""
    if experience.left_out[i]:
        return False
    return recipe.moves_all or (experience.lengths[i] > 0 and (experience.advantages[i] != 0 or recipe.by_turn))


def _masked(experience: Experience, i: int) -> bool:
    return experience.left_out[i] and not experience.rollouts[i].dropped


def _agreed(largest: list[int], summed: list[int], device: torch.device) -> tuple[list[int], list[int]]:
    """The largest of each number over all ranks, and the sum of each."""
    most, total = (torch.tensor(given, dtype=torch.int64, device=device) for given in (largest, summed))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return most.tolist(), total.tolist()
