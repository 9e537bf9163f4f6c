"""Rollouts: multi-turn episodes sampled in batches from an engine behind one small protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch

from gear_trainer.chat import Chat
from gear_trainer.tasks.base import Episode, Problem, Task


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sampled turn. `logprobs` are the sampler's own, of the tempered distribution, in nats; `ended`: it closed its turn."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


class Sampler(Protocol):
    """What the trainer needs of an inference engine (one per rank)."""

    def generate(self, requests: list[Request], temperature: float) -> list[Completion]: ...

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take new weights, and forget every cache that the old ones filled. Consumes the iterator to its end."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@dataclass
class Rollout:
    """One trajectory as a flat token stream after its prompt. `mask` is True on policy tokens, False on tool replies."""

    problem: Problem
    group: int
    sample: int
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)  # 0 where mask is False
    turn_ids: list[int] = field(default_factory=list)
    turns: int = 0
    calls: int = 0
    errors: int = 0
    truncated: bool = False
    reward: float = 0.0
    success: bool = False
    turn_rewards: list[float] = field(default_factory=list)  # the environment's, of each turn by itself
    anchors: list[int] = field(default_factory=list)  # names what each turn answers: the prompt, then the last tool replies
    reference: str | None = None  # what the teacher reads beside the question, where a credit reference was written

    def __post_init__(self) -> None:
        self.anchors = self.anchors or [seed_of(self.prompt_ids)]

    def append(self, ids: list[int], logprobs: list[float] | None) -> None:
        self.ids += ids
        self.mask += [logprobs is not None] * len(ids)
        self.sampler_logprobs += logprobs if logprobs is not None else [0.0] * len(ids)
        self.turn_ids += [self.turns] * len(ids)

    @property
    def policy_positions(self) -> list[int]:
        return [i for i, is_policy in enumerate(self.mask) if is_policy]


def seed_of(*parts: object) -> int:
    """A 31-bit seed from a name: equal in every process and every run, so that a resumed run samples the same tokens."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1


def roll_out(
    sampler: Sampler, chat: Chat, task: Task, problems: Iterable[tuple[int, Problem]], limits: Limits, key: tuple[object, ...]
) -> list[Rollout]:
    """Sample `limits.group_size` episodes for each (group index, problem), all of a turn's requests in one batch."""
    rollouts = [
        Rollout(p, group, k, prompt, teacher)
        for group, p in problems
        for prompt, teacher in [(chat.prompt_ids(p.messages), chat.prompt_ids(p.teacher_messages))]
        for k in range(limits.group_size)
    ]
    episodes = [task.episode(r.problem) for r in rollouts]
    active = list(zip(rollouts, episodes, strict=True))
    for turn in range(task.max_turns):
        active = [(r, e) for r, e in active if limits.room(r) > 0]
        if not active:
            break
        requests = [Request(r.prompt_ids + r.ids, limits.room(r), seed_of(*key, r.group, r.sample, turn)) for r, _ in active]
        completions = sampler.generate(requests, limits.temperature)
        last = turn + 1 == task.max_turns
        active = [(r, e) for (r, e), c in zip(active, completions, strict=True) if _take_turn(r, e, c, chat, last_turn=last)]
    for rollout, episode in zip(rollouts, episodes, strict=True):
        outcome = episode.outcome()
        rollout.reward, rollout.success = outcome.reward, outcome.success
    return rollouts


def groups_of(rollouts: list[Rollout]) -> list[list[Rollout]]:
    """Rollouts that stand in a row and are of one group."""
    return [list(group) for _, group in groupby(rollouts, key=lambda r: r.group)]


def is_mixed(group: list[Rollout]) -> bool:
    """Whether some succeeded and some failed: such a group shows what made the difference."""
    return 0 < sum(r.success for r in group) < len(group)


def mixed_groups(
    sample: Callable[[int, list[int]], list[Rollout]], slots: int, batches: int
) -> tuple[list[Rollout], dict[str, int]]:
    """`slots` groups; those that are not mixed make way for fresh ones, `sample(batch, slots)`, until `batches` were sampled.

    DAPO's dynamic sampling with a cap: what is not mixed in the last batch stays. Also returns the counts `mixed_groups` (of
    the first batch) and `resampled_groups`.
    """
    groups: dict[int, list[Rollout]] = {}
    wanted, left = list(range(slots)), []
    for batch in range(batches):
        groups |= zip(wanted, groups_of(sample(batch, wanted)), strict=True)
        wanted = [slot for slot in wanted if not is_mixed(groups[slot])]
        left.append(len(wanted))
        if not wanted:
            break
    counts = {"mixed_groups": slots - left[0], "resampled_groups": sum(left[:-1])}
    return [r for slot in range(slots) for r in groups[slot]], counts


@dataclass(frozen=True)
class Limits:
    group_size: int
    temperature: float
    max_new_tokens: int
    max_model_len: int

    def room(self, rollout: Rollout) -> int:
        used = len(rollout.prompt_ids) + len(rollout.ids)
        return min(self.max_new_tokens, self.max_model_len - used)


def _take_turn(rollout: Rollout, episode: Episode, completion: Completion, chat: Chat, *, last_turn: bool) -> bool:
    """Append one sampled turn and the environment's answer; True if the model is to speak again."""
    rollout.append(completion.ids, completion.logprobs)
    if not completion.ended:
        rollout.truncated = True
        rollout.turn_rewards.append(0.0)
        return False
    reply = episode.step(chat.tokenizer.decode(completion.ids[:-1]))
    rollout.turn_rewards.append(reply.reward)
    rollout.calls += reply.calls
    rollout.errors += reply.errors
    rollout.turns += 1
    if not reply.observations or last_turn:
        return False
    observation = chat.observation_ids(reply.observations)
    rollout.append(observation, None)
    rollout.anchors.append(seed_of(observation))
    return True
