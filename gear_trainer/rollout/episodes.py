"""Episodes from their prompts to their outcomes: all of a turn's requests in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.engine import Engine
from gear_trainer.rollout.guard import Environment, EpisodeError
from gear_trainer.rollout.types import Completion, Limits, Request, Rollout, Status, seed_of
from gear_trainer.tasks.base import Episode, Problem, Task


def roll_out(
    engine: Engine, chat: Chat, task: Task, problems: Iterable[tuple[int, Problem]], limits: Limits, key: tuple[object, ...]
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
    _play(engine, chat, task, rollouts, limits, key)
    if broken := [i for i, r in enumerate(rollouts) if r.failed]:
        again = [_fresh(rollouts[i]) for i in broken]
        _play(engine, chat, task, again, limits, (*key, "again"))
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


def _play(engine: Engine, chat: Chat, task: Task, rollouts: list[Rollout], limits: Limits, key: tuple[object, ...]) -> None:
    """One try of every rollout, from its prompt to its outcome."""
    world = Environment(task, limits.turn_timeout)
    episodes = [_unless_broken(r, world.start, r.problem) for r in rollouts]
    for rollout in rollouts:
        if not rollout.failed and limits.room(rollout) <= 0:  # the prompt fills the context
            rollout.status = Status.LENGTH
    active = [(r, e) for r, e in zip(rollouts, episodes, strict=True) if not (r.failed or r.truncated)]
    for turn in range(task.max_turns):
        if not active:
            break
        requests = [
            Request(r.prompt_ids + r.ids, limits.room(r), seed_of(*key, r.group, r.sample, turn), limits.temperature)
            for r, _ in active
        ]
        completions = engine.generate(requests)
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
        rollout.status = Status.ERROR
        return None


def _take_turn(
    rollout: Rollout, episode: Episode, completion: Completion, chat: Chat, world: Environment, limits: Limits, last_turn: bool
) -> bool:
    """Append one sampled turn and the environment's answer; True if the model is to speak again."""
    rollout.append(completion.ids, completion.logprobs)
    rollout.versions.append(completion.version)
    rollout.turn_rewards.append(0.0)
    if not completion.ended:
        rollout.status = Status.LENGTH
        return False
    reply = world.step(rollout.problem, episode, chat.tokenizer.decode(completion.ids[:-1]))
    rollout.turn_rewards[-1] = reply.reward
    rollout.calls += reply.calls
    rollout.errors += reply.errors
    rollout.turns += 1
    if reply.observations and last_turn:
        rollout.status = Status.TURNS
    return bool(reply.observations) and not last_turn and _answer(rollout, reply.observations, chat, limits)


def _answer(rollout: Rollout, replies: list[str], chat: Chat, limits: Limits) -> bool:
    """Append the replies, cut where they do not fit with a turn behind them; False, and the end, where even that is too much."""
    left = limits.left(rollout)
    observation = chat.observe(replies, left - 1, reserve=min(limits.max_new_tokens, left // 2))
    if observation is None:
        rollout.status = Status.LENGTH
        return False
    rollout.escaped += observation.escaped
    rollout.cut += observation.cut
    rollout.append(observation.ids, None)
    rollout.anchors.append(seed_of(observation.ids))
    return True
