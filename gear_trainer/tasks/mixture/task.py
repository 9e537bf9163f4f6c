"""Several tasks in one run, for one model of several domains: whose problem an index is, is a function of (seed, index) alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import zip_longest
from typing import Any, cast

from gear_trainer.tasks.base import DemonstrableTask, Episode, Outcome, Problem, Task, TaskError
from gear_trainer.tasks.registry import make_task

LONGEST_BLOCK = 10_000  # problems after which the shares come out exactly
OTHER = "other"  # the kind of all demonstrations that are not right


@dataclass(frozen=True)
class MixtureTask(Task):
    """Tasks by name with their weights: `parts` is {name: {task: ..., weight: 1, args: {...}}}.

    Weights 2 and 1 mean that of each three problems in a row two are the first task's, in an order drawn anew for every block of
    three; each task is asked for its own indices 0, 1, 2, ... as it would be alone. Held-out problems are dealt evenly, whatever
    the weights. A problem's id and category begin with its part's name. It brings its own tools and limit of turns. Each
    part's calls are made by callers of its own, as many as it has alone: a slow part holds up no other. `turn_rewards` holds
    where all parts have turn rewards.
    """

    parts: dict[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        tasks = list(self._tasks.values())
        _ = self._counts
        own = {
            "max_turns": max(task.max_turns for task in tasks),
            "concurrency": sum(task.concurrency for task in tasks),
            "turn_rewards": all(task.turn_rewards for task in tasks),
            "shows_truth": all(task.shows_truth for task in tasks),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        if not self.parts:
            raise TaskError("parts names no task: give {name: {task: ..., weight: 1, args: {...}}}")
        return {name: self._make(name, part) for name, part in self.parts.items()}

    def _make(self, name: str, part: Any) -> Task:
        if not isinstance(part, dict) or "task" not in part or set(part) - {"task", "weight", "args"}:
            raise TaskError(f"parts.{name} is {part!r}: give {{task: ..., weight: 1, args: {{...}}}}")
        try:
            return make_task(part["task"], self.seed, part.get("args"))
        except TaskError as error:
            raise type(error)(f"parts.{name}: {error}") from error

    @cached_property
    def _counts(self) -> dict[str, int]:
        """How many problems of a block are each part's."""
        weights = {name: _weight(name, part.get("weight", 1)) for name, part in self.parts.items()}
        whole = math.lcm(*(weight.denominator for weight in weights.values()))
        counts = {name: int(weight * whole) for name, weight in weights.items()}
        shared = math.gcd(*counts.values())
        counts = {name: count // shared for name, count in counts.items()}
        if sum(counts.values()) > LONGEST_BLOCK:
            raise TaskError(
                f"parts: these weights come out even after {sum(counts.values())} problems: give rounder ones, as 2 and 1"
            )
        return counts

    @cached_property
    def _orders(self) -> dict[int, list[str]]:
        return {}

    def _order(self, block: int) -> list[str]:
        if block not in self._orders:
            self._orders.clear()  # a step reads one block after the other
            names = [name for name, count in self._counts.items() for _ in range(count)]
            random.Random(f"{self.seed}/mixture/{block}").shuffle(names)
            self._orders[block] = names
        return self._orders[block]

    def _problem(self, name: str, inner: Problem) -> Problem:
        task = self._tasks[name]
        tools = task.tools if inner.tools is None else inner.tools
        return replace(
            inner,
            id=f"{name}/{inner.id}",
            tools=tools,
            category=f"{name}/{inner.category}" if inner.category else name,
            key=f"{name}/{inner.key}" if inner.key else "",
            max_turns=inner.max_turns or task.max_turns,
            data={"part": name, "problem": inner},
        )

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): its part by the order of its block, and in that part the next index."""
        block, at = divmod(index, sum(self._counts.values()))
        order = self._order(block)
        name = order[at]
        return self._problem(name, self._tasks[name].train_problem(block * self._counts[name] + order[:at].count(name)))

    def held_out(self, count: int) -> list[Problem]:
        """The parts' first held-out problems, dealt in turn until a part has no more."""
        hands = [[(name, p) for p in task.held_out(count)] for name, task in self._tasks.items()]
        dealt = [one for deal in zip_longest(*hands) for one in deal if one is not None]
        return [self._problem(name, inner) for name, inner in dealt[:count]]

    def episode(self, problem: Problem) -> Episode:
        return self._tasks[problem.data["part"]].episode(problem.data["problem"])

    def callers(self, problem: Problem) -> tuple[str, int]:
        """The callers of the problem's part."""
        part = problem.data["part"]
        name, size = self._tasks[part].callers(problem.data["problem"])
        return f"{part}/{name}", size

    def vote(self, problem: Problem, text: str) -> str | None:
        """The vote of the problem's part."""
        return self._tasks[problem.data["part"]].vote(problem.data["problem"], text)

    def report(self, scored: Sequence[tuple[Problem, Outcome]]) -> dict[str, float]:
        """Each part's own report of its problems, its names behind the part's."""
        found: dict[str, float] = {}
        for name, task in self._tasks.items():
            own = [(problem.data["problem"], outcome) for problem, outcome in scored if problem.data["part"] == name]
            found |= {f"{name}/{metric}": value for metric, value in task.report(own).items()}
        return found

    # --- demonstrations, where every part has some ------------------------------------------------------------------------

    @property
    def demo_mix(self) -> Sequence[tuple[str, float]]:
        """Right demonstrations as often as the parts have them by their weights, and all others under one name."""
        right = 0.0
        for name, task in self._demonstrable().items():
            weights = dict(task.demo_mix)
            right += self._counts[name] / sum(self._counts.values()) * weights.get("right", 0.0) / sum(weights.values())
        return (("right", right), (OTHER, 1.0 - right))

    @property
    def demonstrate(self) -> Callable[[Problem, str, random.Random], list[str]]:
        """The demonstrations of a problem's part; an attribute only where every part has some."""
        tasks = self._demonstrable()

        def play(problem: Problem, kind: str, rng: random.Random) -> list[str]:
            task, inner = tasks[problem.data["part"]], problem.data["problem"]
            others = Counter({name: weight for name, weight in task.demo_mix if name != "right" and weight > 0})
            if kind == OTHER and others:
                kind = rng.choices(list(others), list(others.values()))[0]
            return task.demonstrate(inner, kind if kind != OTHER else "right", rng)

        return play

    @property
    def wrong_answer(self) -> Callable[[Problem, random.Random], str]:
        """A wrong last turn of a problem's part; an attribute as `demonstrate` is."""
        tasks = self._demonstrable()
        return lambda problem, rng: tasks[problem.data["part"]].wrong_answer(problem.data["problem"], rng)

    def _demonstrable(self) -> dict[str, DemonstrableTask]:
        for name, task in self._tasks.items():
            if not hasattr(task, "demonstrate"):
                raise AttributeError(f"the part {name} has no demonstrations")
        return {name: cast(DemonstrableTask, task) for name, task in self._tasks.items()}


def _weight(name: str, weight: Any) -> Fraction:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise TaskError(f"parts.{name}.weight is {weight!r}: give a number above 0")
    return Fraction(str(weight))
