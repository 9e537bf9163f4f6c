"""The world of a chain: its notes, its tools, an episode that knows how many turns the solution still needs."""

from __future__ import annotations

import json
from math import comb
from typing import Any, NamedTuple

from gear_trainer.tasks.base import Message, Reply
from gear_trainer.tasks.bfcl.multi_turn import Item, MultiTurnEpisode
from gear_trainer.tasks.tool_calls import ToolCall, read_calls

CLASS = "GorillaFileSystem"
PARAMETERS = {"cat": ("file_name",), "rm": ("file_name",), "mv": ("source", "destination"), "touch": ("file_name",), "ls": ()}
END = "the end"  # what the last files of both chains hold: a file that is made anew is not the same
DONE = "done"
RIGHT = 0.8  # how probably each turn of the policy is right that `chance` is of: 0.66 with four steps and one spare turn


class Chain(NamedTuple):
    """A problem's world and its solution.

    right: the names of the chain, from the note that the user names to the file that is acted on; wrong: those of the other one,
    without the first. notes: what each file holds. gold: the calls of the solution.
    """

    right: tuple[str, ...]
    wrong: tuple[str, ...]
    folder: str
    notes: dict[str, str]
    gold: tuple[ToolCall, ...]

    def item(self) -> Item:
        """The chain as BFCL's classes and checks take it."""
        files = {name: {"type": "file", "content": text} for name, text in self.notes.items()}
        contents = files | {self.folder: {"type": "directory", "contents": {}}}
        return Item((CLASS,), {CLASS: {"root": {"work": {"type": "directory", "contents": contents}}}}, (self.gold,), ())


class ChainEpisode(MultiTurnEpisode):
    """One rollout in a file system of its own, judged by BFCL's checks when a turn without a call ends it. One call a turn.

    max_turns: after so many it is over. A turn's reward is what it changed in `chance`; their sum is the success less the first.
    """

    def __init__(self, chain: Chain, max_turns: int):
        super().__init__(chain.item())
        self.chain = chain
        self.left = max_turns

    def step(self, text: str) -> Reply:
        """Run the turn's first call, or judge what was done."""
        before = self.chance()
        self.left -= 1
        calls = read_calls(text)
        if not calls:
            reply = self._next_user_turn()
            return Reply(reply.messages, reward=self.chance() - before)
        answer, fine = self._run(calls[0])
        messages = [Message("tool", answer)]
        if len(calls) > 1:
            messages.append(Message("tool", json.dumps({"error": "one call a turn"})))
        return Reply(messages, len(calls), len(calls) - 1 + (not fine), self.chance() - before)

    def in_reach(self) -> bool:
        """True where the turns that are left suffice for the solution."""
        needed = self.turns_needed()
        return needed is not None and needed <= self.left

    def chance(self) -> float:
        """The chance of success of a policy that is right in each turn with probability RIGHT; a wrong one costs it a turn."""
        needed = self.turns_needed()
        if needed is None:
            return 0.0
        return sum(comb(self.left, n) * RIGHT**n * (1 - RIGHT) ** (self.left - n) for n in range(needed, self.left + 1))

    def _run(self, call: ToolCall | str) -> tuple[str, bool]:
        if isinstance(call, ToolCall) and (wrong := self._refused(call)):
            return json.dumps({"error": wrong}), False
        return super()._run(call)

    def _refused(self, call: ToolCall) -> str | None:
        """Why a call is not run: what the chain does not offer would have to be known to `turns_needed` too."""
        if call.name not in PARAMETERS:
            return f"unknown tool; use {', '.join(PARAMETERS)}"
        if set(call.arguments) != set(PARAMETERS[call.name]) or not all(isinstance(v, str) for v in call.arguments.values()):
            return f"{call.name} takes texts: {', '.join(PARAMETERS[call.name]) or 'nothing'}"
        if call.name == "mv" and call.arguments["destination"] != self.chain.folder:
            return "mv: there is no such folder"
        return None

    def turns_needed(self) -> int | None:
        """The number of turns that the solution still needs, the one that ends it among them; None: it is out of reach."""
        folder = self.world.instances[CLASS]._current_dir.contents.get(self.chain.folder)
        if self._done or folder is None or not hasattr(folder, "contents"):
            return 0 if self._done == [None] else None
        there = _texts(self.world.instances[CLASS]._current_dir)
        moved = _texts(folder)
        target, act = self.chain.right[-1], self.chain.gold[-1].name
        acted = target not in there
        kept = {name: text for name, text in self.chain.notes.items() if not (acted and name == target)}
        if any(there.get(name) != text for name, text in kept.items()):
            return None
        if moved != ({target: END} if acted and act == "mv" else {}) or len(folder.contents) != len(moved):
            return None
        made = len(self.world.instances[CLASS]._current_dir.contents) - 1 - len(kept)
        unread = sum(json.dumps({"file_content": self.chain.notes[name]}) not in self._results for name in self.chain.right[:-1])
        return made + unread + (not acted) + 1


def _texts(folder: Any) -> dict[str, str]:
    return {name: item.content for name, item in folder.contents.items() if hasattr(item, "content")}
