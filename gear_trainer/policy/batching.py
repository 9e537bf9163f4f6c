"""Rollouts -> micro-batches under a token budget, packed or right-padded, the same number on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from gear_trainer.policy.packing import given
from gear_trainer.rollout import Rollout


@dataclass
class Ends:
    """Where the sequences of a packed row end: `position_ids` [1, T] int64 begin at 0 in each, `cu_seqlens` int32 [R + 1];
    `longest` of them in tokens, which the host knows without a look at the device."""

    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Ends:
        """The ends of sequences of these lengths, on the CPU."""
        places = torch.cat([torch.arange(length) for length in lengths])
        return cls(places[None], torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths))

    def to(self, device: torch.device) -> Ends:
        return Ends(on_device(self.position_ids, device), on_device(self.cu_seqlens, device), self.longest)

    def arguments(self) -> dict[str, Any]:
        """The arguments of a transformers model beside the ids."""
        return given(self.position_ids, self.cu_seqlens, self.longest)


@dataclass
class Rows:
    """R token streams: one forward.

    `input_ids` int64: [1, T] with the streams end to end where `ends` are given, else [R, L], right-padded to the longest, which
    needs no attention mask: a causal model never looks ahead. `index` [n] int64 points into the flattened hidden states, at the
    position that predicts each policy token.
    """

    input_ids: torch.Tensor
    index: torch.Tensor
    ends: Ends | None = None

    def to(self, device: torch.device) -> Rows:
        return Rows(on_device(self.input_ids, device), on_device(self.index, device), self.ends and self.ends.to(device))


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


# --- which rollouts together ------------------------------------------------------------------------------------------------


def split_rows(rollouts: list[Rollout], rows: list[int], budget: int, teacher: bool, packed: bool = False) -> list[list[int]]:
    """Rows in micro-batches of which no forward passes the budget of tokens (a single row's may).

    Padded: by falling length, cut wherever one more would pass it. Packed: each into the first that has room, the longest first.
    """
    sizes = {i: _longest(rollouts[i], teacher) for i in rows}
    batches: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda i: (-sizes[i], i)):
        if packed:
            taken = sizes[row]
            at = next((k for k, left in enumerate(room) if taken <= left), None)
        else:
            taken = sizes[batches[-1][0]] if batches else 0
            at = len(batches) - 1 if batches and taken <= room[-1] else None
        if at is None:
            batches.append([])
            room.append(budget)
            at, taken = len(batches) - 1, sizes[row]
        batches[at].append(row)
        room[at] -= taken
    return batches


def even(rollouts: list[Rollout], split: list[list[int]], count: int, budget: int, teacher: bool) -> list[list[int]]:
    """The rows of a packed split dealt anew to `count` micro-batches, the longest first, each to the one with the fewest tokens.

    Ranks wait for one another in every forward. With as many micro-batches on each, alike in tokens, a pass lasts as long as its
    rank with the most tokens, and holds the least. The fullest comes first; fewer rows than `count` have one each; where dealing
    would pass the budget the split is as it was.
    """
    sizes = {i: _longest(rollouts[i], teacher) for rows in split for i in rows}
    lightest = [(0, k) for k in range(min(count, len(sizes)))]
    batches: list[list[int]] = [[] for _ in lightest]
    for row in sorted(sizes, key=lambda i: (-sizes[i], i)):
        total, k = heapq.heappop(lightest)
        batches[k].append(row)
        heapq.heappush(lightest, (total + sizes[row], k))
    if any(total > budget and len(batches[k]) > 1 for total, k in lightest):
        return split
    return [batches[k] for _, k in sorted(lightest, key=lambda given: (-given[0], given[1]))]


def padding(rollouts: list[Rollout], split: list[list[int]], teacher: bool, wrong_hint: bool, packed: bool) -> tuple[int, int]:
    """Padding and tokens in all, padding included, of the forwards of a split."""
    padded = whole = 0
    for rows in split:
        for prompts in sides([rollouts[i] for i in rows], teacher, wrong_hint):
            lengths = [len(prompt) + len(rollouts[i].ids) for prompt, i in zip(prompts, rows, strict=True)]
            size = sum(lengths) if packed else max(lengths) * len(lengths)
            padded, whole = padded + size - sum(lengths), whole + size
    return padded, whole


@dataclass(frozen=True)
class Amount:
    """The work of forwards: tokens, (token, token it sees) pairs of the attention, tokens that the head predicts."""

    tokens: int = 0
    pairs: int = 0
    predicted: int = 0


def amount(rollouts: list[Rollout], prompts: list[list[int]]) -> Amount:
    """The work of one forward over each of these rollouts behind these prompts, without padding."""
    lengths = [len(prompt) + len(r.ids) for prompt, r in zip(prompts, rollouts, strict=True)]
    return Amount(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(sum(r.mask) for r in rollouts))


def _longest(rollout: Rollout, teacher: bool) -> int:
    prompts = [rollout.prompt_ids, *([rollout.teacher_prompt_ids, rollout.wrong_prompt_ids] if teacher else [])]
    return max(map(len, prompts)) + len(rollout.ids)


def sides(rollouts: list[Rollout], teacher: bool, wrong_hint: bool) -> list[list[list[int]]]:
    """Prompts of the student's rows, of the teacher's, of those behind a wrong hint."""
    prompts = [[r.prompt_ids for r in rollouts]]
    prompts += [[r.teacher_prompt_ids for r in rollouts]] if teacher else []
    return prompts + ([[r.wrong_prompt_ids or r.prompt_ids for r in rollouts]] if wrong_hint else [])


# --- as tensors -------------------------------------------------------------------------------------------------------------


def micro_batch(
    rollouts: list[Rollout], rows: list[int], teacher: bool, wrong_hint: bool = False, packed: bool = False
) -> MicroBatch:
    """The micro-batch of these rollouts, on the CPU."""
    chosen = [rollouts[i] for i in rows]
    targets = torch.tensor([r.ids[p] for r in chosen for p in r.policy_positions], dtype=torch.int64)
    made = iter([_rows(chosen, prompts, packed) for prompts in sides(chosen, teacher, wrong_hint)])
    student, taught = next(made), next(made) if teacher else None
    return MicroBatch(student, taught, targets, rows, next(made) if wrong_hint else None)


def _rows(rollouts: list[Rollout], prompts: list[list[int]], packed: bool) -> Rows:
    streams = [prompt + r.ids for prompt, r in zip(prompts, rollouts, strict=True)]
    lengths = [len(stream) for stream in streams]
    width = max(lengths)
    if packed:
        ids = torch.tensor([[token for stream in streams for token in stream]], dtype=torch.int64)
        firsts = [0, *accumulate(lengths)][:-1]
    else:
        ids = torch.zeros(len(streams), width, dtype=torch.int64)
        for row, stream in zip(ids, streams, strict=True):
            row[: len(stream)] = torch.tensor(stream)
        firsts = [i * width for i in range(len(streams))]
    starts = [first + len(prompt) - 1 for first, prompt in zip(firsts, prompts, strict=True)]
    places = [start + p for start, r in zip(starts, rollouts, strict=True) for p in r.policy_positions]
    return Rows(ids, torch.tensor(places, dtype=torch.int64), Ends.of(lengths) if packed else None)


def padding_micro_batch(teacher: bool, wrong_hint: bool = False, packed: bool = False) -> MicroBatch:
    """The smallest micro-batch that runs every module: short ranks pad with it, since ranks with unequal counts would hang."""
    one = torch.zeros(1, dtype=torch.int64)
    rows = Rows(torch.zeros(1, 2, dtype=torch.int64), one, Ends.of([2]) if packed else None)
    return MicroBatch(rows, rows if teacher else None, one, [], rows if wrong_hint else None)
