"""ACEBench agent: calls run in simulated phones and airlines, a user beside; judged by the state that they leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from gear_trainer.tasks.acebench.calls import Call, call_list, schemas
from gear_trainer.tasks.acebench.data import AGENT, Item, categories_of, read_items, split_items
from gear_trainer.tasks.acebench.package import AceBench, load
from gear_trainer.tasks.acebench.single import LONGEST, accuracies
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.simulated_users import Endpoint, EndpointUser, RuleUser
from gear_trainer.tasks.tool_calls import read_call, split_calls, spoken
from gear_trainer.tasks.users import User

FINISH = "finish conversation"
NUDGE = "Please do not ask me any questions, use the known conditions to solve the problem"  # the official runner's words
MAX_CALLS = 16  # run a turn; more is a runaway
_NATIVE = (
    "You are an agent that acts through tools. Call them until the user's request is fulfilled, as a rule one at a time; "
    f'then answer "{FINISH}".'
)
_NATIVE_TALK = (
    "Write either calls or words to the user, who is asked for what is missing. The calls go through the tools, not as text."
)


class AceAgentEpisode(Episode):
    """One rollout with simulators of its own.

    A call runs in every simulator that has it: all phones share a Wi-Fi. A turn without calls speaks to the user; where there is
    none it is told to go on, as officially.
    """

    def __init__(self, ace: AceBench, problem: Problem, user: User | None, graded: bool):
        self.ace, self.item, self.user, self.graded = ace, problem.data["item"], user, graded
        self.native = problem.tools is not None
        row = self.item.row
        self.worlds = ace.scenarios.load_scenario_instances(row.get("initial_config") or {}, row["involved_classes"], "en")
        self.trace: list[str] = []  # what was sent to the simulators, as milestones are written
        self.history: list[dict[str, Any]] = [{"role": "user", "content": problem.data["opening"]}]
        self.turns = 0

    def step(self, text: str) -> Reply:
        """Run the turn's calls, or hand its words to the user."""
        text = spoken(text).strip()[:LONGEST]
        self.turns += 1
        self.history.append({"role": "assistant", "content": text})
        if FINISH in text and self.turns > 1:
            return Reply()
        calls, errors = self._native_calls(text) if self.native else self._text_calls(text)
        if not calls and not errors and self.user is not None:
            return self._heard(self.user.reply(self.history))
        if calls or not self.native:
            self.trace.append(call_list(calls) if self.native else text)
        if not calls and not (self.native and errors):
            return Reply([Message("user", NUDGE)], len(errors), len(errors))
        answers = [self._run(name, given) for call in calls[:MAX_CALLS] for name, given in call.items()]
        wrong = sum(not ok for _, ok in answers) + len(errors) + len(calls[MAX_CALLS:])
        return Reply(self._shown([answer for answer, _ in answers], errors), len(calls) + len(errors), wrong)

    def outcome(self, end: End) -> Outcome:
        """1 where the simulators' end state is the right one. metrics: `end`, and `process`, the share of milestones passed."""
        check = self.ace.checker
        states = self.ace.scenarios.snapshot_states(self.worlds)
        right = bool(self.trace) and bool(check.check_agent_end_state(states, self.item.truth)["valid"])
        process = 1.0 if right else float(check.milestone_accuracy(self.trace, self.item.milestones))
        metrics = {"end": float(right), "process": process, "out_of_turns": float(end == "turns")}
        return Outcome(process if self.graded else float(right), right, metrics)

    def _text_calls(self, text: str) -> tuple[list[Call], list[str]]:
        """The calls of the official text. With a user, what does not look like calls is for him; without, it is an error."""
        if self.user is not None and not re.search(r"\[.*\]", text):  # as officially, in one line
            return [], []
        try:
            calls = self.ace.parser.decode_execution_calls(text)
        except Exception:  # model text: whatever the parser trips over is no call
            return [], [] if self.user is not None else ["no calls"]
        return calls, []

    def _native_calls(self, text: str) -> tuple[list[Call], list[str]]:
        names = [function["name"] for function in self.item.row["function"]]
        read = [read_call(body, names) for body in split_calls(text)]
        calls: list[Call] = [{call.name: call.arguments} for call in read if not isinstance(call, str)]
        return calls, [call for call in read if isinstance(call, str)]

    def _run(self, name: str, arguments: dict[str, Any]) -> tuple[Any, bool]:
        methods = [] if name.startswith("_") else [getattr(world, name, None) for world in self.worlds.values()]
        methods = [method for method in methods if callable(method)]
        if not methods:
            return f"Error during execution: name '{name}' is not defined", False
        try:
            answer = [method(**arguments) for method in methods][-1]
            return json.loads(json.dumps(answer, default=str)), True
        except Exception as error:  # a simulator's complaint about its arguments is the model's to read
            return f"Error during execution: {error}", False

    def _shown(self, answers: list[Any], errors: list[str]) -> list[Message]:
        if not self.native:
            label = "execution" if self.user is not None else "execution result"
            return [Message("user", f"{label}:{answers}")]
        texts = [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]
        return [Message("tool", text) for text in (*texts, *map(_error, errors))]

    def _heard(self, said: str | None) -> Reply:
        if said is None or FINISH in said:
            return Reply()
        self.history.append({"role": "user", "content": said})
        return Reply([Message("user", said)])


def _error(text: str) -> str:
    return json.dumps({"error": text})


@dataclass(frozen=True)
class AceAgentTask(Task):
    """ACEBench agent (English): multi_step, and multi_turn with a simulated user. Scores: end-to-end, and process (milestones).

    path, categories (agent_multi_step, agent_multi_turn, or agent for both), prompt, train_share, teacher_template: as in
    AceBenchTask. graded: the reward is the process accuracy instead of the end state's. user_url, user_model: the served model
    that plays the user, as officially; without, a rule does. user_cache: a file that keeps its words. A chat keeps the agent's
    own turns, which the official multi_step runner drops: say so beside figures.
    """

    path: str
    categories: str = "agent_multi_step"
    seed: int = 0
    prompt: Literal["official", "tools"] = "official"
    graded: bool = False
    train_share: float = 0.0
    user_url: str | None = None
    user_model: str | None = None
    user_api_key_env: str | None = None
    user_cache: str | None = None
    teacher_template: str | None = None

    max_turns = 20  # the official 40 messages, of which the agent has every second

    def __post_init__(self) -> None:
        if self.prompt not in ("official", "tools"):
            raise TaskError(f'prompt: {self.prompt!r} is not "official" or "tools"')
        _ = self._ace, self._template, self._endpoint, self._items

    @cached_property
    def concurrency(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Episodes that wait for a served user at a time."""
        return 16 if self.user_url else 1

    @cached_property
    def _ace(self) -> AceBench:
        return load()

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    @cached_property
    def _endpoint(self) -> Endpoint | None:
        return Endpoint.of(self.user_url, self.user_model, self.user_api_key_env, self.user_cache)

    @cached_property
    def _items(self) -> tuple[list[Item], list[Item]]:
        items = read_items(self.path, categories_of(self.categories, AGENT))
        for item in items:
            known = set(self._ace.scenarios.CLASS_MODULE_MAPPING)
            if unknown := set(item.row.get("involved_classes") or ["none"]) - known:
                raise TaskError(f"{self.path}: {item.id} involves {sorted(unknown)}: known are {', '.join(sorted(known))}")
        return split_items(items, self.train_share)

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._items[0]))

    def user(self, item: Item) -> User | None:
        """Who speaks beside the agent; nobody in multi_step."""
        if item.category != "agent_multi_turn":
            return None
        question = item.row["question"]
        if self._endpoint is None:
            return RuleUser(f"This is what I was told: {question}", patience=self.max_turns)
        prompt = self._ace.prompts.build_user_simulator_prompt(question, item.row["involved_classes"], "en")
        greeting = self._ace.prompts.agent_prompt_set("en")["user_opening"]
        return EndpointUser(self._endpoint, prompt, greeting, (FINISH,))

    def problem(self, item: Item) -> Problem:
        """The problem of a row; the user's opening words stand in its prompt, so rollouts of a group share them."""
        user, row = self.user(item), item.row
        opening = row["question"] if user is None else user.reply([]) or row["question"]
        if self.prompt == "tools":
            system, asked, tools = self._native_prompt(item), opening, schemas(row["function"])
        else:
            told = f"user:{opening}\n"
            system, asked = self._ace.prompts.build_agent_prompts(
                told, row["function"], row["involved_classes"], item.category, "en"
            )
            tools = None
        messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
        teacher, data = taught(messages, self._template, _solution(item)), {"item": item, "opening": opening}
        return Problem(item.id, messages, teacher, _solution(item), tools, item.category, data=data)

    def _native_prompt(self, item: Item) -> str:
        if item.category == "agent_multi_step":
            return _NATIVE
        prompts, classes = self._ace.prompts.agent_prompt_set("en"), item.row["involved_classes"]
        rules = [prompts[rule] for rule, name in (("travel_policy", "Travel"), ("base_policy", "BaseApi")) if name in classes]
        return "\n\n".join((_NATIVE, *rules, _NATIVE_TALK))

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of the training rows."""
        rows = self._items[0]
        if not rows:
            raise TaskError("ACEBench is a test set, all of it held out: set train_share, as 0.5, to train on a part of it")
        return self.problem(rows[self._order.row(index)])

    def held_out(self, count: int) -> list[Problem]:
        """Held-out rows in a mixed order."""
        return _mapped(self.problem, self._items[1][:count], self.concurrency)

    def episode(self, problem: Problem) -> AceAgentEpisode:
        return AceAgentEpisode(self._ace, problem, self.user(problem.data["item"]), self.graded)

    def report(self, scored: Sequence[tuple[Problem, Outcome]]) -> dict[str, float]:
        """The means of the metrics, and accuracies of categories: `process_<category>` beside each."""
        process = {}
        for category in dict.fromkeys(problem.category for problem, _ in scored):
            shares = [outcome.metrics.get("process", 0.0) for problem, outcome in scored if problem.category == category]
            process[f"process_{category}"] = sum(shares) / len(shares)
        return super().report(scored) | accuracies(scored) | process


def _mapped(make: Callable[[Item], Problem], items: list[Item], size: int) -> list[Problem]:
    if size == 1:
        return [make(item) for item in items]
    with ThreadPoolExecutor(size) as pool:  # each opening is a request
        return list(pool.map(make, items))


def _solution(item: Item) -> str:
    """Milestones and the end state as text. They are no programme: logins and look-ups between them are left out."""
    several = item.milestones and isinstance(item.milestones[0], list)
    steps = item.milestones[0] if several else item.milestones
    return "\n".join(
        (*(str(step).strip() for step in steps), f"The state at the end: {json.dumps(item.truth, ensure_ascii=False)}")
    )
