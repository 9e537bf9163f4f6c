"""TRL's `environment_factory` classes: `reset(**row)`, public methods as tools, `get_reward()` or `reward` or a reward function.

TRL itself is not needed. Schemas come from hints and docstrings by transformers, as there.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gear_trainer.tasks.adapters.rows import Row, RowTask
from gear_trainer.tasks.awaiting import resolved
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, TaskError
from gear_trainer.tasks.tool_calls import read_call, split_calls
from gear_trainer.user_code import load_class, load_object, said

MAX_CALLS = 16  # run a turn; more is a runaway
_OWN = ("reset", "get_reward")


class TrlEpisode(Episode):
    """One environment of its own; a turn without calls is the last."""

    def __init__(self, task: TrlTask, problem: Problem):
        self.task, self.row, self.turns = task, problem.data["row"], []
        self.world, observed = task.reset(self.row)
        if observed != problem.data["observed"]:
            raise RuntimeError("reset() says something else than for the prompt: make it a function of the row (a seed in it)")
        self.tools = task.tools_of(self.row)

    def step(self, text: str) -> Reply:
        """Run the turn's calls one after the other; what one raises is its answer, as in TRL."""
        self.turns.append(text)
        bodies = split_calls(text)
        if not bodies:
            return Reply()
        answers = [self._run(body) for body in bodies[:MAX_CALLS]]
        answers += [(str({"error": f"at most {MAX_CALLS} calls a turn"}), False)] * bool(bodies[MAX_CALLS:])
        return Reply([Message("tool", said) for said, _ in answers], len(bodies), sum(not ok for _, ok in answers))

    def _run(self, body: str | None) -> tuple[str, bool]:
        call = read_call(body, self.tools)
        if isinstance(call, str):
            return str({"error": call}), False
        try:
            return str(resolved(getattr(self.world, call.name)(**call.arguments))), True
        except Exception as error:
            return str({"error": str(error)}), False

    def outcome(self, end: End) -> Outcome:
        """The environment's reward, which it keeps through turns that were cut."""
        reward = self.task.reward_of(self.world, self.row, self.turns)
        return Outcome(reward, reward >= self.task.success_at)


@dataclass(frozen=True)
class TrlTask(RowTask):
    """Rows played through an environment class written for TRL's GRPOTrainer.

    environment: `module:Class`, or a mapping of names to such, of which a row's field `environment` picks one. reward:
    `module:function` with TRL's signature; without, the class' `get_reward`, else its attribute `reward`. teacher_field may also
    name a method of the environment that needs no argument. The other arguments are RowTask's.
    """

    environment: str | dict[str, str] = ""
    reward: str | None = None

    def __post_init__(self) -> None:
        _ = self._classes, self._reward, self._schemas
        super().__post_init__()
        for row in (self._train[0], self._held_out[0]):
            first, second = self._probe(row), self._probe(row)
            if first != second:
                raise TaskError(
                    f"environment: two resets of one row differ ({first!r}, {second!r}): make it a function of the row"
                )

    def _probe(self, row: Row) -> str:
        try:
            return self.reset(row)[1]
        except Exception as error:  # the user's own code
            name = self.class_of(row).__name__
            raise TaskError(f"environment {name}: a row cannot be begun ({said(error, where=True)}): mend the class") from error

    @cached_property
    def _classes(self) -> dict[str | None, type]:
        if not self.environment:
            raise TaskError("environment is missing: name the class as module:Class")
        named = self.environment if isinstance(self.environment, dict) else {None: self.environment}
        return {name: _environment(spec) for name, spec in named.items()}

    @cached_property
    def _schemas(self) -> dict[type, list[dict[str, Any]]]:
        hidden = (*_OWN, self.teacher_field)
        return {cls: _schemas_of(cls, hidden) for cls in self._classes.values()}

    @cached_property
    def _reward(self) -> Callable[..., Any] | None:
        if self.reward is None:
            return None
        try:
            found = load_object(self.reward)
        except ImportError as error:
            raise TaskError(f"reward={self.reward} cannot be loaded ({error}): name a function as module:function") from error
        if not callable(found):
            raise TaskError(f"reward={self.reward} is no function")
        return found

    def class_of(self, row: Row) -> type:
        """The environment class of a row."""
        if not isinstance(self.environment, dict):
            return self._classes[None]
        if row.get("environment") not in self._classes:
            raise TaskError(f"field 'environment' is {row.get('environment')!r}: use one of {', '.join(self.environment)}")
        return self._classes[row["environment"]]

    def tools_of(self, row: Row) -> list[str]:
        """The names of the tools of a row's environment."""
        return [schema["function"]["name"] for schema in self._schemas[self.class_of(row)]]

    def reset(self, row: Row) -> tuple[Any, str]:
        """A fresh environment of a row, and what its reset says."""
        world = self.class_of(row)()
        given = {k: v for k, v in row.items() if k != "environment"} if isinstance(self.environment, dict) else row
        return world, _text(resolved(world.reset(**given)))

    def reward_of(self, world: Any, row: Row, turns: list[str]) -> float:
        """The reward of an episode. Raises where nobody says."""
        if self._reward is not None:
            rest = {name: [value] for name, value in row.items() if name != "prompt"}
            chat = [{"role": "assistant", "content": turn} for turn in turns]
            found = resolved(self._reward(environments=[world], prompts=[self._chat(row)], completions=[chat], **rest))
            return float(found[0])
        if hasattr(world, "get_reward"):
            return float(resolved(world.get_reward()))
        if not hasattr(world, "reward"):
            raise RuntimeError(f"{type(world).__name__} has no get_reward() and no reward: set task_args.reward")
        return float(world.reward)

    def _chat(self, row: Row) -> list[dict[str, str]]:
        self.class_of(row)
        return super()._chat(row)

    def _truth(self, row: Row) -> str:
        name = self.teacher_field
        if name and name not in row and callable(getattr(self.class_of(row), name, None)):
            return str(resolved(getattr(self.reset(row)[0], name)()))
        return super()._truth(row)

    def _begun(self, row: Row) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]:
        *head, last = self._chat(row)
        asked = last["content"] + self.reset(row)[1]
        return [*head, {**last, "content": asked}], self._schemas[self.class_of(row)] or None

    def _problem(self, id: str, row: Row) -> Problem:
        problem = super()._problem(id, row)
        problem.data["observed"] = problem.messages[-1]["content"].removeprefix(self._chat(row)[-1]["content"])
        return problem

    def episode(self, problem: Problem) -> TrlEpisode:
        return TrlEpisode(self, problem)


def _environment(spec: str) -> type:
    try:
        cls = load_class(spec)
    except ImportError as error:
        raise TaskError(f"environment={spec} cannot be loaded ({error}): name it as module:Class") from error
    if not callable(getattr(cls, "reset", None)):
        raise TaskError(f"environment={spec} has no reset(): TRL's environments have one")
    return cls


def _schemas_of(cls: type, hidden: tuple[str | None, ...]) -> list[dict[str, Any]]:
    from transformers.utils.chat_template_utils import get_json_schema

    public = [name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")]
    names = [name for name in public if name not in hidden]
    try:
        return [get_json_schema(getattr(cls, name)) for name in names]
    except Exception as error:  # its own family, for hints and docstrings that are missing
        raise TaskError(f"environment {cls.__name__}: a tool has no schema ({said(error)})") from error


def _text(observed: Any) -> str:
    if observed is None:
        return ""
    return observed if isinstance(observed, str) else json.dumps(observed, default=str)
