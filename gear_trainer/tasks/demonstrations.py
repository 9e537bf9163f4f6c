"""Demonstrations of a task: played through its episodes, and looked at before the minutes of a warm start."""

from __future__ import annotations

import math
import random
from typing import cast

from gear_trainer.tasks.awaiting import resolved
from gear_trainer.tasks.base import DemonstrableTask, Message, Problem, Task, TaskError
from gear_trainer.user_code import said

OFFSET = 1 << 40  # demonstrations use problem indices that no run reaches
DEMANDED = ("demo_mix", "demonstrate", "wrong_answer")  # of Demonstrable


def play(task: Task, problem: Problem, turns: list[str]) -> list[tuple[Message, ...]]:
    """The environment's messages after each turn of a demonstration."""
    episode = task.episode(problem)
    try:
        return [tuple(resolved(episode.step(turn)).messages) for turn in turns]
    finally:
        resolved(episode.close())


def check_demonstrations(task: Task) -> None:
    """One demonstration of each kind, before the minutes of a warm start. Raises TaskError that names what is missing."""
    name = type(task).__name__
    if not hasattr(task, "demonstrate"):
        raise TaskError(f"{name} has no demonstrations, so no warm start: give a pretrained model's folder as the model")
    if missing := [part for part in DEMANDED if not hasattr(task, part)]:
        raise TaskError(f"{name} has no {', '.join(missing)}, which a warm start asks for: see docs/tasks.md")
    try:
        wrong = _wrong_demonstrations(cast(DemonstrableTask, task))
    except Exception as error:  # the task's own code
        raise TaskError(f"{name}: a demonstration fails ({said(error, where=True)}): see docs/tasks.md") from error
    if wrong:
        raise TaskError(f"{name}{wrong}: see docs/tasks.md")


def _wrong_demonstrations(task: DemonstrableTask) -> str | None:
    weights = dict(task.demo_mix)
    if "right" not in weights:
        return f'.demo_mix has no kind "right", only {", ".join(map(repr, weights)) or "nothing"}'
    if min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
        return f".demo_mix has weights {list(weights.values())}: they must be 0 or more, with a sum above 0"
    rng, problem = random.Random("check"), task.train_problem(OFFSET)
    for kind in weights:
        turns = task.demonstrate(problem, kind, rng)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            return f".demonstrate(problem, {kind!r}, rng) gives {turns!r}: it must be a list of texts, one a turn"
        play(task, problem, turns)
    wrong = task.wrong_answer(problem, rng)
    if not isinstance(wrong, str) or wrong == problem.answer:
        return f".wrong_answer(problem, rng) gives {wrong!r}: it must be a text other than the answer {problem.answer!r}"
    return None
