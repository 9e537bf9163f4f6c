"""What a task family gives the trainer: problems, tools, and an episode that answers the model and scores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


class TaskError(ValueError):
    """A task that cannot start: bad arguments, a missing file, a broken line. The message names file, line and mend."""


class DataAway(TaskError):
    """A hub data set out of this machine's reach: no network, or no package `datasets`. A dry run goes on without it."""


@dataclass(frozen=True)
class Problem:
    """One prompt. `messages` and `teacher_messages` are chats ending with a user turn; only the second shows the ground truth."""

    id: str
    messages: list[dict[str, str]]
    teacher_messages: list[dict[str, str]]
    answer: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The environment's answer to one assistant turn: one text per tool call; none means that the episode is over.

    The texts are data: control tokens spelled in them are broken up, and they are cut where they do not fit into the context.

    reward: what the turn earned by itself, for methods with turn rewards; the outcome is not in it.
    """

    observations: list[str] = field(default_factory=list)
    calls: int = 0
    errors: int = 0
    reward: float = 0.0


@dataclass(frozen=True)
class Outcome:
    reward: float
    success: bool


class Episode(ABC):
    """One rollout's environment. Never raises on model text: a malformed call is answered with a tool error and counted.

    What raises all the same, hangs, or rewards NaN ends the rollout as an error (rollout/episodes.py). All of it runs in one
    thread, which is not the main one.
    """

    @abstractmethod
    def step(self, text: str) -> Reply:
        """Take the decoded text of one assistant turn (without the end-of-turn token)."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """Score the episode; called once, after the last turn (which may have been cut by the length limit)."""


class Task(ABC):
    """A family of problems. Problem i is a function of (seed, i) alone, so a resumed run sees the same data."""

    tools: list[dict[str, Any]] | None = None  # JSON schemas, rendered by the chat template
    max_turns: int = 1
    turn_rewards: bool = False  # whether its replies reward turns by themselves

    @abstractmethod
    def train_problem(self, index: int) -> Problem:
        """The index-th training problem of the run (0-based, unbounded: data files are reshuffled each epoch)."""

    @abstractmethod
    def held_out(self, count: int) -> list[Problem]:
        """The first `count` held-out problems, disjoint from training; fewer where the set is smaller."""

    @abstractmethod
    def episode(self, problem: Problem) -> Episode: ...
