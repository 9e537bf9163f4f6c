"""Rollouts -> right-padded micro-batches under a token budget, the same number on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gear_trainer.rollout import Rollout


@dataclass
class Rows:
    """R token streams, right-padded to the longest of them: one forward.

    `input_ids` [R, L] int64. `index` [n] int64 points into the flattened [R * L] hidden states, at the position that predicts
    each policy token. Right padding needs no attention mask: a causal model never looks ahead.
    """

    input_ids: torch.Tensor
    index: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(on_device(self.input_ids, device), on_device(self.index, device))


@dataclass
class MicroBatch:
    """The same rollouts behind their own prompts and, where scored, behind the teacher's, whose rows have a width of their own.

    Row order and policy-token order of both agree. `targets` [n] int64 are the policy tokens.
    """

    student: Rows
    teacher: Rows | None
    targets: torch.Tensor
    rows: list[int]  # which rollouts; empty for a padding micro-batch
    wrong_hint: Rows | None = None  # behind a teacher's prompt with a wrong hint, or the student's where none was shown

    def to(self, device: torch.device) -> MicroBatch:
        teacher = self.teacher and self.teacher.to(device)
        wrong = self.wrong_hint and self.wrong_hint.to(device)
        return MicroBatch(self.student.to(device), teacher, on_device(self.targets, device), self.rows, wrong)


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on the device. A GPU's copy is made behind its queue: from pages that may move it would be waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _longest(rollout: Rollout, teacher: bool) -> int:
    prompts = [rollout.prompt_ids, *([rollout.teacher_prompt_ids, rollout.wrong_prompt_ids] if teacher else [])]
    return max(map(len, prompts)) + len(rollout.ids)


def split_rows(rollouts: list[Rollout], rows: list[int], budget: int, teacher: bool) -> list[list[int]]:
    """Rows by falling length, cut wherever a forward's padded tokens would pass the budget (a single row may)."""
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda i: (-_longest(rollouts[i], teacher), i)):
        width = _longest(rollouts[batches[-1][0]], teacher) if batches else 0
        if batches and width * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def micro_batch(rollouts: list[Rollout], rows: list[int], teacher: bool, wrong_hint: bool = False) -> MicroBatch:
    chosen = [rollouts[i] for i in rows]
    targets = torch.tensor([r.ids[p] for r in chosen for p in r.policy_positions], dtype=torch.int64)
    taught = _rows(chosen, [r.teacher_prompt_ids for r in chosen]) if teacher else None
    wrong = _rows(chosen, [r.wrong_prompt_ids or r.prompt_ids for r in chosen]) if wrong_hint else None
    return MicroBatch(_rows(chosen, [r.prompt_ids for r in chosen]), taught, targets, rows, wrong)


def _rows(rollouts: list[Rollout], prompts: list[list[int]]) -> Rows:
    streams = [prompt + r.ids for prompt, r in zip(prompts, rollouts, strict=True)]
    width = max(map(len, streams))
    ids = torch.zeros(len(streams), width, dtype=torch.int64)
    for row, stream in zip(ids, streams, strict=True):
        row[: len(stream)] = torch.tensor(stream)
    starts = [i * width + len(prompt) - 1 for i, prompt in enumerate(prompts)]
    places = [start + p for start, r in zip(starts, rollouts, strict=True) for p in r.policy_positions]
    return Rows(ids, torch.tensor(places, dtype=torch.int64))


def padding_micro_batch(teacher: bool, wrong_hint: bool = False) -> MicroBatch:
    """The smallest micro-batch that runs every module: short ranks pad with it, since ranks with unequal counts would hang."""
    one = torch.zeros(1, dtype=torch.int64)
    rows = Rows(torch.zeros(1, 2, dtype=torch.int64), one)
    return MicroBatch(rows, rows if teacher else None, one, [], rows if wrong_hint else None)
