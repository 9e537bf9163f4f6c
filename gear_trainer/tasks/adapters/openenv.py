"""OpenEnv servers: reset, step and reward over a connection, tools by the environment's own list, or whole turns as actions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gear_trainer.tasks.adapters.rows import Row, RowTask
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, TaskError
from gear_trainer.tasks.tool_calls import read_call, split_calls, spoken
from gear_trainer.user_code import load_class, said

MAX_CALLS = 16  # run a turn; more is a runaway


class OpenEnvEpisode(Episode):
    """One client of its own. The last reward that the environment named is the outcome."""

    def __init__(self, task: OpenEnvTask, problem: Problem):
        self.task, self.names = task, [schema["function"]["name"] for schema in problem.tools or []]
        self.world, observed = task.reset(problem.data["row"])
        self.reward = 0.0
        if observed != problem.data["observed"]:
            self.world.close()
            raise RuntimeError("reset says something else than for the prompt: put a seed into the row's field `reset`")

    def step(self, text: str) -> Reply:
        """Hand the turn over, or each of its calls; the episode ends where the environment says so, or nothing is called."""
        if self.task.action_field:
            seen, done = self._act({self.task.action_field: spoken(text).strip()})
            return Reply() if done else Reply([Message("user", seen)])
        bodies, messages, errors = split_calls(text), [], 0
        for body in bodies[:MAX_CALLS]:
            call = read_call(body, self.names)
            if isinstance(call, str):
                messages.append(Message("tool", f"Error: {call}"))
                errors += 1
                continue
            seen, done = self._act({"type": "call_tool", "tool_name": call.name, "arguments": call.arguments})
            messages.append(Message("tool", seen))
            if done:
                return Reply((), len(bodies), errors)
        return Reply(messages, len(bodies), errors + len(bodies[MAX_CALLS:]))

    def _act(self, action: dict[str, Any]) -> tuple[str, bool]:
        result = self.world.step(action)
        if result.reward is not None:
            self.reward = float(result.reward)
        return self.task.seen(result.observation), bool(result.done)

    def outcome(self, end: End) -> Outcome:
        """The last reward."""
        return Outcome(self.reward, self.reward >= self.task.success_at)

    def close(self) -> None:
        self.world.close()


@dataclass(frozen=True)
class OpenEnvTask(RowTask):
    """Rows played on an OpenEnv server.

    base_url: the server's address. client: its class, the generic one unless named. A row's field `reset` holds the arguments
    of reset, as {"seed": 3}: what it says stands behind the prompt. action_field: the turn's text is the action's field of that
    name; without, the environment's tools are offered and called. observation_field: what of an observation the model reads, the
    whole as JSON unless named. The other arguments are RowTask's.
    """

    base_url: str = ""
    client: str = "openenv.core.generic_client:GenericEnvClient"
    action_field: str | None = None
    observation_field: str | None = None

    def __post_init__(self) -> None:
        if not self.base_url:
            raise TaskError("base_url is missing: give the address of the OpenEnv server")
        super().__post_init__()
        _ = self._tools

    @cached_property
    def _client(self) -> type:
        try:
            return load_class(self.client)
        except ImportError as error:
            raise TaskError(
                f"client={self.client} cannot be loaded ({error}): pip install openenv, or name another class"
            ) from error

    @cached_property
    def _tools(self) -> list[dict[str, Any]] | None:
        if self.action_field:
            return None
        world = self._connected()
        try:
            listed = world.step({"type": "list_tools"}).observation["tools"]
        except Exception as error:  # the client's own families
            raise TaskError(
                f"base_url={self.base_url} lists no tools ({said(error)}): set action_field to act by text"
            ) from error
        finally:
            world.close()
        return [
            {"type": "function", "function": {"name": t["name"], "description": t.get("description", ""), "parameters": schema}}
            for t in listed
            for schema in [t.get("input_schema") or t.get("inputSchema") or {"type": "object"}]
        ]

    def _connected(self) -> Any:
        world = self._client(base_url=self.base_url)
        return world.sync() if hasattr(world, "sync") else world

    def reset(self, row: Row) -> tuple[Any, str]:
        """A client at the start of a row, and what reset says."""
        world = self._connected()
        try:
            return world, self.seen(world.reset(**(row.get("reset") or {})).observation)
        except BaseException:
            world.close()
            raise

    def seen(self, observation: Any) -> str:
        """The text of an observation that the model reads."""
        if self.observation_field and isinstance(observation, dict):
            observation = observation.get(self.observation_field, "")
        return observation if isinstance(observation, str) else json.dumps(observation, default=str)

    def _begun(self, row: Row) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]:
        *head, last = self._chat(row)
        world, observed = self.reset(row)
        world.close()
        return [*head, {**last, "content": f"{last['content']}\n{observed}"}], self._tools

    def _problem(self, id: str, row: Row) -> Problem:
        problem = super()._problem(id, row)
        problem.data["observed"] = problem.messages[-1]["content"].removeprefix(self._chat(row)[-1]["content"] + "\n")
        return problem

    def episode(self, problem: Problem) -> OpenEnvEpisode:
        return OpenEnvEpisode(self, problem)
