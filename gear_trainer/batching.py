"""Rollouts -> right-padded micro-batches under a token budget, the same number on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gear_trainer.rollout import Rollout


@dataclass
class MicroBatch:
    """R rows of L padded ids: the students', then (where scored) the teachers'. Row order and policy-token order agree.

    `student_index` / `teacher_index` [n] int64 point into the flattened [R * L] hidden states, at the position that predicts each
    policy token; `targets` [n] are those tokens. Right padding needs no attention mask: a causal model never looks ahead.
    """

    input_ids: torch.Tensor
    student_index: torch.Tensor
    teacher_index: torch.Tensor | None
    targets: torch.Tensor
    rows: list[int]  # which rollouts; empty for a padding micro-batch

    def to(self, device: torch.device) -> MicroBatch:
        teacher = None if self.teacher_index is None else self.teacher_index.to(device)
        return MicroBatch(self.input_ids.to(device), self.student_index.to(device), teacher, self.targets.to(device), self.rows)

    def split(self) -> tuple[MicroBatch, MicroBatch]:
        """The students' rows alone and the teachers' alone, for two forwards; `student_index` of each is its own."""
        student, teacher = self.input_ids.chunk(2)
        places = self.teacher_index - student.numel()
        return (
            MicroBatch(student, self.student_index, None, self.targets, self.rows),
            MicroBatch(teacher, places, None, self.targets, self.rows),
        )


def _longest(rollout: Rollout, teacher: bool) -> int:
    prompt = max(len(rollout.prompt_ids), len(rollout.teacher_prompt_ids)) if teacher else len(rollout.prompt_ids)
    return prompt + len(rollout.ids)


def split_rows(rollouts: list[Rollout], rows: list[int], budget: int, teacher: bool) -> list[list[int]]:
    """Rows by falling length, cut wherever padded tokens would pass the budget (a single row may)."""
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda i: (-_longest(rollouts[i], teacher), i)):
        width = _longest(rollouts[batches[-1][0]], teacher) * (1 + teacher) if batches else 0
        if batches and width * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def micro_batch(rollouts: list[Rollout], rows: list[int], teacher: bool, pad_id: int = 0) -> MicroBatch:
    chosen = [rollouts[i] for i in rows]
    streams = [r.prompt_ids + r.ids for r in chosen]
    offsets = [len(r.prompt_ids) for r in chosen]
    if teacher:
        streams += [r.teacher_prompt_ids + r.ids for r in chosen]
        offsets += [len(r.teacher_prompt_ids) for r in chosen]
    width = max(map(len, streams))
    ids = torch.full((len(streams), width), pad_id, dtype=torch.int64)
    for i, stream in enumerate(streams):
        ids[i, : len(stream)] = torch.tensor(stream)
    positions = [r.policy_positions for r in chosen]
    n = len(chosen)

    def index(first: int) -> torch.Tensor:
        places = [(first + i) * width + offsets[first + i] + p - 1 for i in range(n) for p in positions[i]]
        return torch.tensor(places, dtype=torch.int64)

    targets = torch.tensor([r.ids[p] for r, ps in zip(chosen, positions, strict=True) for p in ps], dtype=torch.int64)
    return MicroBatch(ids, index(0), index(n) if teacher else None, targets, rows)


def padding_micro_batch(teacher: bool) -> MicroBatch:
    """The smallest micro-batch that runs every module: short ranks pad with it, since ranks with unequal counts would hang."""
    one = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(torch.zeros(1 + teacher, 2, dtype=torch.int64), one, one + 2 if teacher else None, one, [])
