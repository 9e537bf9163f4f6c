"""A group of rollouts as rows of the audit's file: tokens, signals, values, and the token at which the solution was lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gear_trainer.audit.file import LISTS, NO_DEVIATION, SCHEMA, UNKNOWN_DEVIATION
from gear_trainer.audit.signals import Columns
from gear_trainer.audit.values import Values
from gear_trainer.rollout import Rollout
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks.base import KnowsDeviation, Task
from gear_trainer.train.advantages import group_advantages


def columns(
    chat: Chat, task: Task, group: list[Rollout], scored: Columns, values: Sequence[Values], step: int, samples: int
) -> dict[str, list[Any]]:
    """The columns of `file.SCHEMA` for a whole group. samples: M, the continuations of each cut."""
    found: dict[str, list[Any]] = {
        "problem": [r.problem.id for r in group],
        "group": [r.group for r in group],
        "sample": [r.sample for r in group],
        "step": [step] * len(group),
        "reward": [r.reward for r in group],
        "success": [r.success for r in group],
        "advantage": group_advantages(group),
        "end": [r.status.value for r in group],
        "v0": [v.v0 for v in values],
        "value_samples": [samples] * len(group),
        "deviation": [deviation_place(chat, task, r) for r in group],
        "ids": [r.ids for r in group],
        "tokens": [[chat.tokenizer.decode([token]) for token in r.ids] for r in group],
        "mask": [r.mask for r in group],
        "turn": [[turn if own else -1 for turn, own in zip(r.turn_ids, r.mask, strict=True)] for r in group],
        "value": [v.value for v in values],
    }
    for name in LISTS:
        if name not in found:
            found[name] = [x if x is None else _spread(r, x) for r, x in zip(group, scored[name], strict=True)]
    return {name: found[name] for name in SCHEMA.names}


def _spread(rollout: Rollout, values: torch.Tensor) -> list[float]:
    """Values [n] of the policy's tokens at their places among all; NaN at the others."""
    found = [math.nan] * len(rollout.ids)
    for place, value in zip(rollout.policy_positions, values.tolist(), strict=True):
        found[place] = value
    return found


def deviation_place(chat: Chat, task: Task, rollout: Rollout) -> int:
    """The place in `ids` of the first token after which the solution is out of reach; NO_DEVIATION where it never was.

    UNKNOWN_DEVIATION where the task does not say. Where only the cut of a turn is to blame, it is that turn's last token.
    """
    if not isinstance(task, KnowsDeviation):
        return UNKNOWN_DEVIATION
    turns: dict[int, list[int]] = {}
    for place in rollout.policy_positions:
        turns.setdefault(rollout.turn_ids[place], []).append(place)
    decode, texts = chat.tokenizer.decode, []
    for turn, own in turns.items():
        was_cut = turn == rollout.turns  # it never came to the environment
        texts.append(decode([rollout.ids[place] for place in (own if was_cut else own[:-1])]))
    found = task.deviation(rollout.problem, texts)
    if found is None:
        return NO_DEVIATION
    own = turns[found.turn]
    ids = [rollout.ids[place] for place in own]
    ends = (len(decode(ids[: i + 1])) for i in range(len(ids)))
    return own[next((i for i, end in enumerate(ends) if end > found.characters), len(own) - 1)]
