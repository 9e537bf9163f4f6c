"""Generated conversations over one of BFCL's classes: two user turns of one call each, for models that train on a CPU.

The user says in one of a few phrases what to do; the official checks judge what came of it. The names are common words, so a
small vocabulary holds them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gear_trainer.tasks.base import Problem, Task, TaskError
from gear_trainer.tasks.bfcl import package
from gear_trainer.tasks.bfcl.multi_turn import Item, MultiTurnEpisode, gold_text
from gear_trainer.tasks.common import fill, load_template, user
from gear_trainer.tasks.tool_calls import ToolCall, calls_turn, function_schema

NAMES = (
    "red", "blue", "green", "black", "white", "gold", "river", "stone", "cloud", "storm", "apple", "lemon", "tiger", "horse",
    "eagle", "paper", "glass", "metal", "north", "south", "summer", "winter", "music", "garden",
)  # fmt: skip
HELD_OUT_SHARE = 5  # one tuple of names in five is never trained on
DONE = "done"
DEMO_MIX = (("right", 0.5), ("wrong_name", 0.3), ("skip", 0.2))


class Operation(NamedTuple):
    """One thing to do: the tool, how a user asks for it, and the kind of name that each argument takes ("new": there is none)."""

    tool: str
    phrases: tuple[str, ...]
    slots: dict[str, str]


class Setting(NamedTuple):
    """A class, what may be done with it, and its scenario where names of each kind are there."""

    class_name: str
    operations: tuple[Operation, ...]
    scenario: Callable[[dict[str, list[str]]], dict[str, Any]]


def _files(there: dict[str, list[str]]) -> dict[str, Any]:
    contents: dict[str, Any] = {name: {"type": "file", "content": ""} for name in there["file"]}
    contents |= {name: {"type": "directory", "contents": {}} for name in there["folder"]}
    return {"root": {"work": {"type": "directory", "contents": contents}}}


def _posts(there: dict[str, list[str]]) -> dict[str, Any]:
    return {"username": "me", "password": "", "authenticated": True, "following_list": [*there["friend"]]}


SETTINGS = {
    "files": Setting(
        "GorillaFileSystem",
        (
            Operation("mkdir", ("Make a folder {dir_name}.", "I need a folder {dir_name}."), {"dir_name": "new"}),
            Operation("touch", ("Make a file {file_name}.", "I need a file {file_name}."), {"file_name": "new"}),
            Operation("rm", ("Remove the file {file_name}.", "Throw the file {file_name} away."), {"file_name": "file"}),
            Operation(
                "mv",
                ("Move the file {source} to the folder {destination}.", "Put the file {source} into the folder {destination}."),
                {"source": "file", "destination": "folder"},
            ),
        ),
        _files,
    ),
    "posts": Setting(
        "TwitterAPI",
        (
            Operation("post_tweet", ("Post {content}.", "Write a post that says {content}."), {"content": "new"}),
            Operation(
                "follow_user",
                ("Follow {username_to_follow}.", "I want to follow {username_to_follow}."),
                {"username_to_follow": "new"},
            ),
            Operation(
                "unfollow_user",
                ("Stop following {username_to_unfollow}.", "Unfollow {username_to_unfollow}."),
                {"username_to_unfollow": "friend"},
            ),
        ),
        _posts,
    ),
}


@dataclass(frozen=True)
class OneClassTask(Task):
    """Two requests to one class, `setting` a name of SETTINGS. `teacher_template` is a text file with {question} and {calls}."""

    seed: int = 0
    setting: str = "files"
    teacher_template: str | None = None
    max_turns = 6  # two calls, two ends of a user's turn, and two to spare
    turn_rewards = True  # as in several user turns: 1 for the turn that ends a user's turn rightly
    demo_mix = DEMO_MIX

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise TaskError(f"setting: {self.setting!r} is unknown: use one of {', '.join(SETTINGS)}")
        _ = self._template, package.turn_checkers()

    @cached_property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools that may be called, with the parameters that are asked for."""
        return [_tool_schema(SETTINGS[self.setting].class_name, operation) for operation in SETTINGS[self.setting].operations]

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("question", "calls"))

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index); its names are never those of a held-out problem."""
        return self._problem(f"train-{index}", random.Random(f"{self.seed}/{index}"), held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        """Distinct conversations on held-out names, the same for every seed."""
        seen: dict[str, Problem] = {}
        for index in range(20 * count):
            problem = self._problem(f"held-out-{len(seen)}", random.Random(f"held-out/{index}"), held_out=True)
            seen.setdefault(problem.answer, problem)
            if len(seen) == count:
                break
        return list(seen.values())

    def _problem(self, id: str, rng: random.Random, held_out: bool) -> Problem:
        setting = SETTINGS[self.setting]
        while True:  # about one draw in five is held out, so this ends after a few
            asked, gold, there = _drawn(setting, rng)
            names = ",".join(value for call in gold for value in call.arguments.values())
            if (zlib.crc32(names.encode()) % HELD_OUT_SHARE == 0) == held_out:
                break
        turns = tuple((call,) for call in gold)
        item = Item((setting.class_name,), {setting.class_name: setting.scenario(there)}, turns, (asked[1],))
        calls = gold_text(turns)
        taught = fill(self._template, question=asked[0], calls=calls)
        return Problem(id, user(asked[0]), user(taught), calls, data={"item": item})

    def episode(self, problem: Problem) -> MultiTurnEpisode:
        return MultiTurnEpisode(problem.data["item"])

    def demonstrate(self, problem: Problem, kind: str, rng: random.Random) -> list[str]:
        """The assistant turns of one demonstration: "right", with a "wrong_name" in a call, or with a call left out ("skip")."""
        gold = [turn[0] for turn in problem.data["item"].gold]
        at = rng.randrange(len(gold))
        turns: list[str] = []
        for i, call in enumerate(gold):
            if kind == "skip" and i == at:
                turns.append(DONE)
                continue
            turns += [calls_turn([_renamed(call, rng) if kind == "wrong_name" and i == at else call]), DONE]
        return turns

    def wrong_answer(self, problem: Problem, rng: random.Random) -> str:
        """Another call where all is done."""
        return calls_turn([_renamed(problem.data["item"].gold[-1][0], rng)])


def _drawn(setting: Setting, rng: random.Random) -> tuple[list[str], list[ToolCall], dict[str, list[str]]]:
    """Two requests, their calls, and the names that are there before; no name has two meanings."""
    names = iter(rng.sample(NAMES, len(NAMES)))
    asked: list[str] = []
    gold: list[ToolCall] = []
    there: dict[str, list[str]] = {kind: [] for o in setting.operations for kind in o.slots.values()}
    for operation in rng.choices(setting.operations, k=2):
        chosen = {slot: next(names) for slot in operation.slots}
        for slot, kind in operation.slots.items():
            there[kind].append(chosen[slot])
        asked.append(rng.choice(operation.phrases).format(**chosen))
        gold.append(ToolCall(operation.tool, chosen))
    return asked, gold, there


def _renamed(call: ToolCall, rng: random.Random) -> ToolCall:
    slot = rng.choice(list(call.arguments))
    other = rng.choice([name for name in NAMES if name not in call.arguments.values()])
    return ToolCall(call.name, {**call.arguments, slot: other})


def _tool_schema(class_name: str, operation: Operation) -> dict[str, Any]:
    said = next(doc for doc in package.documents(class_name) if doc["name"] == operation.tool)
    properties = said["parameters"]["properties"]
    parameters = {slot: {"type": "string", "description": properties[slot]["description"]} for slot in operation.slots}
    return function_schema(operation.tool, said["description"], parameters)
