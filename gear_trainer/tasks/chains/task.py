"""Notes that lead to notes: each call of a chain needs the answer to the call before, on BFCL's `GorillaFileSystem`.

A file says which one to read next and which one not; the last says what to remove or to move. The file not to read begins a
second chain of the same form, which ends at the wrong file: who goes astray there can still turn back, until the turns are used
up or something is removed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gear_trainer.tasks.base import Deviation, Problem, Task, TaskError
from gear_trainer.tasks.bfcl import package
from gear_trainer.tasks.bfcl.one_class import HELD_OUT_SHARE, NAMES
from gear_trainer.tasks.chains.deviation import deviation
from gear_trainer.tasks.chains.world import CLASS, DONE, END, PARAMETERS, Chain, ChainEpisode
from gear_trainer.tasks.common import SOLUTION, load_template, taught, user
from gear_trainer.tasks.tool_calls import ToolCall, call_text, call_turn, function_schema

MOST_STEPS = 6  # two names a step, and a folder's, out of NAMES
ASKED = ("Read {start} and do what it says.", "Begin with {start} and follow the notes.", "Do what the note {start} leads to.")
# One form a note: told in either order, a model of 0.7 M parameters had not learnt in 600 steps which name is the right one,
# and training stood still at 0.63.
READ = "read {right}, not {wrong}"
REMOVE = "remove {right}, not {wrong}"
MOVE = "put {right} in {folder}, not {wrong}"


@dataclass(frozen=True)
class ChainsTask(Task):
    """Chains of `steps` calls, from 2 to 6.

    `spare`: turns beyond those that the solution needs, so mistakes that can be taken back. `slip`: how probably a step of a
    demonstration goes wrong, in the share `slipping` of them that are no reference solutions; half of those that could turn back
    do. `teacher_template` is a text file with {prompt} and {answer}.
    """

    seed: int = 0
    steps: int = 4
    spare: int = 1
    slip: float = 0.35
    slipping: float = 1.0
    teacher_template: str | None = None
    turn_rewards = True  # what a turn changed in the chance of success, by the exact state: ChainEpisode.chance

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= MOST_STEPS:
            raise TaskError(f"steps: {self.steps} is not between 2 and {MOST_STEPS}")
        if not 0 <= self.spare <= 16:
            raise TaskError(f"spare: {self.spare} is not between 0 and 16")
        if not (0 <= self.slip <= 1 and 0 <= self.slipping <= 1):
            raise TaskError(f"slip, slipping: {self.slip}, {self.slipping} must be between 0 and 1")
        _ = self._template, package.turn_checkers()

    @property
    def max_turns(self) -> int:  # type: ignore[override]
        """Those of the solution, the one that ends it, and the spare ones."""
        return self.steps + 1 + self.spare

    @cached_property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools; the solution needs `cat` and one of `rm` and `mv`."""
        said = {doc["name"]: doc for doc in package.documents(CLASS)}
        schemas = []
        for name, slots in PARAMETERS.items():
            properties = said[name]["parameters"]["properties"]
            parameters = {slot: {"type": "string", "description": properties[slot]["description"]} for slot in slots}
            schemas.append(function_schema(name, said[name]["description"], parameters))
        return schemas

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index); its names, in their order, are never those of a held-out problem."""
        return self._problem(f"train-{index}", random.Random(f"{self.seed}/{index}"), held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        """The same for every seed."""
        return [self._problem(f"held-out-{i}", random.Random(f"held-out/{i}"), held_out=True) for i in range(count)]

    def _problem(self, id: str, rng: random.Random, held_out: bool) -> Problem:
        while True:  # about one draw in five is held out, so this ends after a few
            chain = draw_chain(self.steps, rng)
            if (zlib.crc32(",".join(chain.right).encode()) % HELD_OUT_SHARE == 0) == held_out:
                break
        messages = user(rng.choice(ASKED).format(start=chain.right[0]))
        answer = "\n".join(call_text(*call) for call in chain.gold)
        return Problem(id, messages, taught(messages, self._template, answer), answer, data={"chain": chain})

    def episode(self, problem: Problem) -> ChainEpisode:
        return ChainEpisode(problem.data["chain"], self.max_turns)

    def deviation(self, problem: Problem, turns: Sequence[str]) -> Deviation | None:
        """The place where a rollout left the ways to the solution; see `deviation.py`."""
        return deviation(problem.data["chain"], turns, self.max_turns)

    @property
    def demo_mix(self) -> Sequence[tuple[str, float]]:
        """Reference solutions, and attempts each step of which may be a slip."""
        return (("right", 1 - self.slipping), ("slips", self.slipping))

    def demonstrate(self, problem: Problem, kind: str, rng: random.Random) -> list[str]:
        """The assistant turns of one demonstration: "right", or with "slips" where the dice say so."""
        chain: Chain = problem.data["chain"]
        if kind == "right":
            return [*(call_turn(*call) for call in chain.gold), DONE]
        turns: list[str] = []
        astray = False
        for at in range(self.steps):
            gold = chain.gold[at]
            if astray:
                gold = _elsewhere(chain, at)
            elif rng.random() < self.slip:
                slip = _slip(chain, at, rng)
                turns.append(call_turn(*slip))
                if rng.random() < 0.5:  # noticed
                    turns.append(call_turn(*gold))
                else:
                    astray = slip == _elsewhere(chain, at)
                continue
            turns.append(call_turn(*gold))
        return [*turns, DONE][: self.max_turns]

    def wrong_answer(self, problem: Problem, rng: random.Random) -> str:
        """Another call where all is done."""
        return call_turn("rm", {"file_name": rng.choice(problem.data["chain"].wrong)})


def draw_chain(steps: int, rng: random.Random) -> Chain:
    """Names, notes and what is to be done at the end; no name has two meanings."""
    names = rng.sample(NAMES, 2 * steps)
    right, wrong, folder = tuple(names[:steps]), tuple(names[steps:-1]), names[-1]
    act = rng.choice(("rm", "mv"))
    last = REMOVE if act == "rm" else MOVE
    notes: dict[str, str] = {}
    for at in range(steps - 1):
        said, pair = (last if at == steps - 2 else READ), (right[at + 1], wrong[at])
        notes[right[at]] = said.format(right=pair[0], wrong=pair[1], folder=folder)
        if at:
            notes[wrong[at - 1]] = said.format(right=pair[1], wrong=pair[0], folder=folder)
    notes |= {right[-1]: END, wrong[-1]: END}
    order = rng.sample(sorted(notes), len(notes))
    gold = [ToolCall("cat", {"file_name": name}) for name in right[:-1]] + [_act(act, right[-1], folder)]
    return Chain(right, wrong, folder, {name: notes[name] for name in order}, tuple(gold))


def _act(act: str, name: str, folder: str) -> ToolCall:
    return ToolCall(act, {"file_name": name} if act == "rm" else {"source": name, "destination": folder})


def _elsewhere(chain: Chain, at: int) -> ToolCall:
    """The call of the other chain in the place of the solution's; the first note belongs to both."""
    if at == 0:
        return chain.gold[0]
    act, name = chain.gold[at].name, chain.wrong[at - 1]
    return ToolCall("cat", {"file_name": name}) if act == "cat" else _act(act, name, chain.folder)


def _slip(chain: Chain, at: int, rng: random.Random) -> ToolCall:
    """Another call than the solution's: mostly the other chain's, else a wrong tool or one that brings nothing."""
    kind = rng.choices(("elsewhere", "too early", "nothing", "made"), (0.6, 0.2, 0.1, 0.1))[0]
    if kind == "elsewhere" and at:
        return _elsewhere(chain, at)
    if kind == "nothing":
        return ToolCall("ls", {})
    if kind == "made":
        return ToolCall("touch", {"file_name": rng.choice([n for n in NAMES if n not in chain.notes and n != chain.folder])})
    name = chain.right[at]
    return ToolCall("cat" if at == len(chain.gold) - 1 else "rm", {"file_name": name})
