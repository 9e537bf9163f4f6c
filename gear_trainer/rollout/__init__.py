"""Rollouts: multi-turn episodes sampled in batches from an engine behind one small protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch

from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.episodes import Environment, EpisodeError
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
    escaped: int = 0  # texts of both prompts and of tool replies that spelled control tokens
    cut: int = 0  # tool replies that did not fit into the context whole
    failures: list[str] = field(default_factory=list)  # one line for each try that the environment broke off
    failed: bool = False  # the last try too: what it earned is unknown
    dropped: bool = False  # one of its group failed: nobody learns from the group

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
    """Sample `limits.group_size` episodes for each (group index, problem), all of a turn's requests in one batch.

    A rollout whose environment breaks off is tried once more from its prompt, under other seeds. Where that fails too it is
    `failed`, without reward or success, and its whole group `dropped`.
    """
    rollouts = [
        Rollout(p, group, k, prompt, teacher, escaped=escaped)
        for group, p in problems
        for prompt, teacher, escaped in [_prompts(chat, p, limits)]
        for k in range(limits.group_size)
    ]
    _play(sampler, chat, task, rollouts, limits, key)
    if broken := [i for i, r in enumerate(rollouts) if r.failed]:
        again = [_fresh(rollouts[i]) for i in broken]
        _play(sampler, chat, task, again, limits, (*key, "again"))
        for i, rollout in zip(broken, again, strict=True):
            rollouts[i] = rollout
        lost = {r.group for r in rollouts if r.failed}
        for rollout in rollouts:
            rollout.dropped = rollout.group in lost
    return rollouts


def _prompts(chat: Chat, problem: Problem, limits: Limits) -> tuple[list[int], list[int], int]:
    """Both prompts, and how many texts were escaped in them. One that leaves no room for a turn is cut to the context: it ends as
    `length`, and nothing is sampled behind it."""
    student, teacher = chat.prompt_ids(problem.messages), chat.prompt_ids(problem.teacher_messages)
    if len(student) >= limits.max_model_len:
        student, teacher = student[: limits.max_model_len], teacher[: limits.max_model_len]
    return student, teacher, chat.escapes(problem.messages) + chat.escapes(problem.teacher_messages)


def _fresh(r: Rollout) -> Rollout:
    """The same rollout at its start; what was counted of its first try stays."""
    again = Rollout(r.problem, r.group, r.sample, r.prompt_ids, r.teacher_prompt_ids)
    again.escaped, again.cut, again.failures = r.escaped, r.cut, r.failures
    return again


def _play(sampler: Sampler, chat: Chat, task: Task, rollouts: list[Rollout], limits: Limits, key: tuple[object, ...]) -> None:
    """One try of every rollout, from its prompt to its outcome."""
    world = Environment(task, limits.turn_timeout)
    episodes = [_unless_broken(r, world.start, r.problem) for r in rollouts]
    for rollout in rollouts:
        rollout.truncated = limits.room(rollout) <= 0  # the prompt fills the context
    active = [(r, e) for r, e in zip(rollouts, episodes, strict=True) if not (r.failed or r.truncated)]
    for turn in range(task.max_turns):
        if not active:
            break
        requests = [Request(r.prompt_ids + r.ids, limits.room(r), seed_of(*key, r.group, r.sample, turn)) for r, _ in active]
        completions = sampler.generate(requests, limits.temperature)
        last = turn + 1 == task.max_turns
        active = [
            (r, e)
            for (r, e), c in zip(active, completions, strict=True)
            if _unless_broken(r, _take_turn, r, e, c, chat, world, limits, last)
        ]
    for rollout, episode in zip(rollouts, episodes, strict=True):
        if not rollout.failed and (outcome := _unless_broken(rollout, world.outcome, rollout.problem, episode)):
            rollout.reward, rollout.success = outcome.reward, outcome.success


def _unless_broken(rollout: Rollout, call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns; None, and the rollout `failed`, where the environment broke off."""
    try:
        return call(*args)
    except EpisodeError as error:
        rollout.failures = [*rollout.failures, str(error)]
        rollout.failed = True
        return None


def groups_of(rollouts: list[Rollout]) -> list[list[Rollout]]:
    """Rollouts that stand in a row and are of one group."""
    return [list(group) for _, group in groupby(rollouts, key=lambda r: r.group)]


def troubles(rollouts: list[Rollout]) -> dict[str, int]:
    """Counts of what went wrong around the model: texts that spelled control tokens, replies cut, tries that the environment
    broke off and what they cost."""
    return {
        "texts_escaped": sum(r.escaped for r in rollouts),
        "replies_cut": sum(r.cut for r in rollouts),
        "rollouts_retried": sum(bool(r.failures) for r in rollouts),
        "rollouts_failed": sum(r.failed for r in rollouts),
        "groups_dropped": len({r.group for r in rollouts if r.failed}),
    }


def is_mixed(group: list[Rollout]) -> bool:
    """Whether some succeeded and some failed: such a group shows what made the difference. Without an outcome there is none."""
    return not any(r.failed for r in group) and 0 < sum(r.success for r in group) < len(group)


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
    turn_timeout: float | None = None  # seconds of the environment's part of a turn

    def room(self, rollout: Rollout) -> int:
        """Tokens that its next turn may have."""
        return min(self.max_new_tokens, self.left(rollout))

    def left(self, rollout: Rollout) -> int:
        """Tokens of the context that the rollout has not used."""
        return self.max_model_len - len(rollout.prompt_ids) - len(rollout.ids)


def _take_turn(
    rollout: Rollout, episode: Episode, completion: Completion, chat: Chat, world: Environment, limits: Limits, last_turn: bool
) -> bool:
    """Append one sampled turn and the environment's answer; True if the model is to speak again."""
    rollout.append(completion.ids, completion.logprobs)
    rollout.turn_rewards.append(0.0)
    if not completion.ended:
        rollout.truncated = True
        return False
    reply = world.step(rollout.problem, episode, chat.tokenizer.decode(completion.ids[:-1]))
    rollout.turn_rewards[-1] = reply.reward
    rollout.calls += reply.calls
    rollout.errors += reply.errors
    rollout.turns += 1
    return bool(reply.observations) and not last_turn and _answer(rollout, reply.observations, chat, limits)


def _answer(rollout: Rollout, replies: list[str], chat: Chat, limits: Limits) -> bool:
    """Append the replies, cut where they do not fit with a turn behind them; False, and the end, where even that is too much."""
    left = limits.left(rollout)
    observation = chat.observe(replies, left - 1, reserve=min(limits.max_new_tokens, left // 2))
    if observation is None:
        rollout.truncated = True
        return False
    rollout.escaped += observation.escaped
    rollout.cut += observation.cut
    rollout.append(observation.ids, None)
    rollout.anchors.append(seed_of(observation.ids))
    return True
