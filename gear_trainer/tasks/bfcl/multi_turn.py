"""BFCL of several user turns: scripted users, executable classes, and the official state and response checks a user turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.bfcl import package
from gear_trainer.tasks.bfcl.schemas import schema
from gear_trainer.tasks.bfcl.shares import Shares
from gear_trainer.tasks.bfcl.world import World
from gear_trainer.tasks.common import fill, load_template, user
from gear_trainer.tasks.tool_calls import ToolCall, call_text, read_calls
from gear_trainer.tasks.users import Scripted

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
REASONS = ("no_call", "state", "response", "steps", "cut")
MAX_STEPS = 20  # assistant turns with calls in one user turn; the package forces one that goes on to quit, and the item fails
MAX_CALLS = 64  # calls run in one assistant turn; a longer list is a runaway
MORE_TOOLS = "I have updated some more functions you can choose from. What about now?"  # the package's words


@dataclass(frozen=True)
class Item:
    """One item, as an episode needs it. gold: the calls of each user turn, which is not judged where there are none; says: the
    user's words from the second turn on."""

    classes: tuple[str, ...]
    scenarios: dict[str, Any]
    gold: tuple[tuple[ToolCall, ...], ...]
    says: tuple[str, ...]
    long_context: bool = False

    def world(self) -> World:
        """The item's world before the first call."""
        return World(self.classes, self.scenarios, self.long_context)


class MultiTurnEpisode(Episode):
    """One rollout in a world of its own, beside one that lives through the ground truth.

    A turn without a call ends the user's turn, which is judged then; the user goes on whatever the verdict is.
    """

    def __init__(self, item: Item):
        self.item, self.world, self._truth = item, item.world(), item.world()
        self._user = Scripted(item.says)
        self._done: list[str | None] = []  # of each finished user turn why it is wrong
        self._results: list[str] = []  # of every call so far
        self._steps, self._called, self._forced = 0, False, False  # of this user turn

    def step(self, text: str) -> Reply:
        """Run the turn's calls, or let the user speak."""
        calls = read_calls(text)
        if not calls:
            return self._next_user_turn()
        run = [self._run(call) for call in calls[:MAX_CALLS]]
        messages = [Message("tool", answer) for answer, _ in run]
        if dropped := len(calls) - len(run):
            messages.append(Message("tool", _error(f"at most {MAX_CALLS} calls a turn")))
        self._steps += 1
        self._forced = self._steps > MAX_STEPS
        errors = dropped + sum(not fine for _, fine in run)
        return Reply(() if self._forced else messages, calls=len(calls), errors=errors)

    def _run(self, call: ToolCall | str) -> tuple[str, bool]:
        if isinstance(call, str):
            return _error(call), False
        self._called = True
        answer, fine = self.world.run(call)
        self._results.append(answer)
        return answer, fine

    def _next_user_turn(self) -> Reply:
        self._done.append(self._wrong())
        self._steps, self._called = 0, False
        said = self._user.reply(())
        judged = bool(self.item.gold[len(self._done) - 1])
        return Reply(() if said is None else [Message("user", said)], reward=float(judged and self._done[-1] is None))

    def _wrong(self) -> str | None:
        """Why the user turn that ends here is wrong, by the package's checks."""
        at = len(self._done)
        gold = self.item.gold[at]
        truth = [self._truth.run(call)[0] for call in gold]
        if not gold:
            return None
        if not self._called:
            return "no_call"
        state_checker, response_checker = package.turn_checkers()
        if not state_checker(self.world.instances, self._truth.instances)["valid"]:
            return "state"
        return None if response_checker(self._results, truth, at)["valid"] else "response"

    def outcome(self, end: End) -> Outcome:
        """1 where every user turn came to its end and was right; `right_turns`: the share of those that call for something."""
        judged = [i for i, gold in enumerate(self.item.gold) if gold]
        right = sum(self._done[i] is None for i in judged if i < len(self._done))
        finished = len(self._done) == len(self.item.gold)
        unfinished = "steps" if self._forced else None if finished else "cut"
        wrong = next((reason for reason in self._done if reason), unfinished)
        metrics = {f"fail_{name}": float(name == wrong) for name in REASONS}
        return Outcome(float(wrong is None), wrong is None, metrics | {"right_turns": right / len(judged)})


def _error(text: str) -> str:
    return json.dumps({"error": text})


@dataclass(frozen=True)
class MultiTurnTask(Task):
    """Conversations of 1 to 8 user turns over eight executable classes.

    `categories` are names of CATEGORIES; `classes` keeps the items whose classes are all among these. `train_share` is the share
    of the scenarios that may be trained on, the others are held out (a scenario's variants in the four categories stay together):
    with 0 all are. `max_turns` bounds the assistant turns of an episode. `teacher_template` has {question} and {calls}.
    """

    seed: int = 0
    categories: Sequence[str] = CATEGORIES
    classes: Sequence[str] = ()
    train_share: float = 0.0
    max_turns: int = 8 * (MAX_STEPS + 1)
    teacher_template: str | None = None
    turn_rewards = True  # 1 for the turn that ends a user's turn rightly

    def __post_init__(self) -> None:
        if isinstance(self.categories, str) or not self.categories:
            raise TaskError(f"categories: {self.categories!r} must be a list of names, of {', '.join(CATEGORIES)}")
        if unknown := [name for name in self.categories if name not in CATEGORIES]:
            raise TaskError(f"categories: BFCL has no {unknown[0]!r} of several turns: use names of {', '.join(CATEGORIES)}")
        if not self._shares.held_out:
            raise TaskError(f"classes: no item of {', '.join(self.categories)} has only {', '.join(self.classes)}")
        _ = package.turn_checkers()

    @cached_property
    def _shares(self) -> Shares:
        template = load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("question", "calls"))
        wanted = set(self.classes)
        rows = [
            (category, row, answer)
            for category in self.categories
            for row, answer in zip(package.rows(category), package.answers(category), strict=True)
            if not wanted or wanted >= set(row["involved_classes"])
        ]
        problems = [_problem(template, *row) for row in rows]
        return Shares(problems, self.train_share, self.seed, {p.id for p in problems})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index) over the training share, each epoch in a new order."""
        return self._shares.train_problem(index)

    def held_out(self, count: int) -> list[Problem]:
        """The first held-out items, category by category."""
        return self._shares.held_out[:count]

    def episode(self, problem: Problem) -> MultiTurnEpisode:
        return MultiTurnEpisode(problem.data["item"])


def _problem(template: str, category: str, row: dict[str, Any], answer: list[list[str]]) -> Problem:
    functions = {doc["name"]: schema(doc) for name in row["involved_classes"] for doc in package.documents(name)}
    later = {int(turn): [functions.pop(name) for name in names] for turn, names in row.get("missed_function", {}).items()}
    said = [_said(turn, later.get(at)) for at, turn in enumerate(row["question"])]
    bare = Item(tuple(row["involved_classes"]), row["initial_config"], (), tuple(said[1:]), "long_context" in category)
    reader = bare.world()
    item = replace(bare, gold=tuple(tuple(map(reader.gold_call, calls)) for calls in answer))
    shown = gold_text(item.gold)
    return Problem(
        row["id"], user(said[0]), user(fill(template, question=said[0], calls=shown)), shown, list(functions.values()), category,
        key=f"multi_turn_{row['id'].rpartition('_')[2]}", data={"item": item},
    )  # fmt: skip


def _said(turn: list[dict[str, str]], tools: list[dict[str, Any]] | None) -> str:
    """The words of a user's turn; where tools are shown from it on, these first."""
    words = [message["content"] for message in turn] or [MORE_TOOLS]
    return "\n".join([*map(json.dumps, tools or ()), *words])


def gold_text(gold: Sequence[Sequence[ToolCall]]) -> str:
    """The calls of each user turn, for the teacher."""
    lines = []
    for number, calls in enumerate(gold, 1):
        lines += [f"User turn {number}:", *(call_text(*call) for call in calls)] if calls else [f"User turn {number}: no call"]
    return "\n".join(lines)
