"""The contract of a task family: problems, tools, and an episode that answers the model and scores it."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

End = Literal["done", "turns", "length", "error"]  # how an episode ended: by itself, turns or tokens ran out, it broke


class TaskError(ValueError):
    """A task that cannot start: bad arguments, a missing file, a broken line. The message names file, line and mend."""


class DataAway(TaskError):
    """A hub data set out of this machine's reach: no network, or no package `datasets`. A dry run goes on without it."""


@dataclass(frozen=True)
class Problem:
    """One prompt. `messages` and `teacher_messages` are chats ending with a user turn; only the second shows the ground truth.

    tools: JSON schemas of its own; None: the task's. category: what evaluation may split by. key: the same for problems that
    are one and the same under several ids; empty: the id. data: whatever the task's own episode wants to know. max_turns: of its
    episodes, the task's at most; None: that.
    """

    id: str
    messages: list[dict[str, str]]
    teacher_messages: list[dict[str, str]]
    answer: str
    tools: list[dict[str, Any]] | None = None
    category: str = ""
    key: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    max_turns: int | None = None


@dataclass(frozen=True)
class Message:
    """One message of the environment: a tool's answer, or a user's words.

    The content is data: control tokens spelled in it are broken up, and it is cut where it does not fit into the context.
    """

    role: Literal["tool", "user"]
    content: str


@dataclass(frozen=True)
class Reply:
    """The environment's answer to one assistant turn: a message for each tool call, or a user's; none: the episode is over.

    reward: what the turn earned by itself, for methods with turn rewards; the outcome is not in it.
    """

    messages: Sequence[Message] = ()
    calls: int = 0
    errors: int = 0
    reward: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of an episode: what it earned. metrics: named finite numbers beside it, which evaluation averages."""

    reward: float
    success: bool
    metrics: dict[str, float] = field(default_factory=dict)


class Episode(ABC):
    """One rollout's environment. Never raises on model text: a malformed call is answered with a tool error and counted.

    What raises all the same, hangs, or rewards NaN ends the rollout as an error (rollout/guard.py). Its calls come one at a time,
    in threads that are not the main one. Each method may be `async`: all of a process are awaited in one event loop.
    """

    @abstractmethod
    def step(self, text: str) -> Reply | Awaitable[Reply]:
        """Take the decoded text of one assistant turn (without the end-of-turn token)."""

    @abstractmethod
    def outcome(self, end: End) -> Outcome | Awaitable[Outcome]:
        """Score the episode; called once, after the last turn.

        Where `end` is length that turn was cut and never came to `step`; where it is error, `step` raised: then only the metrics
        count.
        """

    def close(self) -> None | Awaitable[None]:  # noqa: B027  (most hold nothing)
        """Let go of what the episode holds. Called once, whatever happened; after a call that hung, while that still hangs."""


class Task(ABC):
    """A family of problems. Problem i is a function of (seed, i) alone, so a resumed run sees the same data."""

    tools: list[dict[str, Any]] | None = None  # JSON schemas, rendered by the chat template, of problems without their own
    max_turns: int = 1
    concurrency: int = 1  # calls of its episodes that may run at a time; 1: in the order of the rollouts, in one thread
    turn_rewards: bool = False  # whether its replies reward turns by themselves
    shows_truth: bool = True  # whether teacher_messages show the ground truth; an adapter may not know where it is

    @abstractmethod
    def train_problem(self, index: int) -> Problem:
        """The index-th training problem of the run (0-based, unbounded: data files are reshuffled each epoch)."""

    @abstractmethod
    def held_out(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, disjoint from training; fewer where the set is smaller."""

    @abstractmethod
    def episode(self, problem: Problem) -> Episode:
        """A fresh environment for one rollout."""

    def callers(self, problem: Problem) -> tuple[str, int]:
        """The callers that make the calls of this problem's episodes: their name, and how many they are; a mixture's parts have
        their own."""
        return "", self.concurrency

    def vote(self, problem: Problem, text: str) -> str | None:
        """The answer that a rollout's last turn gives, equal ones as equal texts, for evaluation's majority; None: none."""
        return None

    def report(self, scored: Sequence[tuple[Problem, Outcome]]) -> dict[str, float]:
        """Numbers of a held-out pass beside its success: the mean of each metric over the outcomes that have it."""
        found: dict[str, list[float]] = {}
        for _, outcome in scored:
            for name, value in outcome.metrics.items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}


@runtime_checkable
class Demonstrable(Protocol):
    """The parts that a task needs beside `Task` for model.path=builtin:tiny-qwen3, whose policy is warmed up on demonstrations.

    `train_problem` is asked for indices from 2**40 on, `held_out` for 100 problems; the turns of a demonstration are played
    through an episode, whose replies become part of it. Every random choice comes from the `rng` that is handed in.
    """

    demo_mix: Sequence[tuple[str, float]]
    """The kinds of demonstration with their weights. "right" is among them: the reference solution, all that the teacher's prompt
    is trained with. The others are what makes outcomes differ: guesses, wrong calls."""

    def demonstrate(self, problem: Problem, kind: str, rng: random.Random) -> list[str]:
        """The assistant's turns, at least one, without end-of-turn tokens."""
        ...

    def wrong_answer(self, problem: Problem, rng: random.Random) -> str:
        """A last turn that is wrong, of the right one's form and length: how far the prompts tell them apart is reported."""
        ...


class DemonstrableTask(Task, Demonstrable):
    """Both in one, for annotations: nobody has to derive from it."""


class Deviation(NamedTuple):
    """The turn, counted from 0, and the number of its characters that a way to the solution may still begin with.

    The token that holds character number `characters` (counted from 0) is the first one after which the solution is out of reach.
    """

    turn: int
    characters: int


@runtime_checkable
class KnowsDeviation(Protocol):
    """The part that a task with a known solution has beside `Task`, for an audit."""

    def deviation(self, problem: Problem, turns: Sequence[str]) -> Deviation | None:
        """The place where a rollout left the ways to the solution; None of one that never did.

        turns: the texts of its turns without end-of-turn tokens, one that was cut among them.
        """
        ...
