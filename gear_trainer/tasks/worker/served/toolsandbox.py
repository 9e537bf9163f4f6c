"""ToolSandbox behind serve.py, in an environment of its own (docs/agents.md has its packages).

Splits: all, or one of the benchmark's categories in lower case, as multiple_tool_call; `multiple_tool_call/base` leaves the
variants of its scenarios out. The reward is the milestones' similarity; success is 1.
"""

import contextlib
import copy
import importlib
import json
import os
import random

CALLS = 4  # a turn; the benchmark runs parallel calls in each of their orders
VARIANTS = ("_distraction_tools", "_scrambled", "_all_tools")


def _plain(value):
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


class Worker:
    """Scenarios by name. user_url, user_model: a served model plays the user; without, the user leaves after the first answer."""

    holds = None

    def __init__(self, user_url=None, user_model=None, user_api_key_env=None, seed=0):
        common, roles = "tool_sandbox.common.", "tool_sandbox.roles."
        self.contexts = importlib.import_module(common + "execution_context")
        self.messages = importlib.import_module(common + "message_conversion")
        self.tool_conversion = importlib.import_module(common + "tool_conversion")
        backend = importlib.import_module(common + "tool_discovery").ToolBackend
        named_scenarios = importlib.import_module("tool_sandbox.scenarios").named_scenarios
        self.role = self.contexts.RoleType
        base = importlib.import_module(roles + "base_role").BaseRole
        self.agent = type("Agent", (base,), {"role_type": self.role.AGENT})
        self.executor = importlib.import_module(roles + "execution_environment").ExecutionEnvironment()
        self.user = self._user(user_url, user_model, user_api_key_env) if user_url else None
        random.seed(seed)  # the order of tools, in every process the same
        self.scenarios = named_scenarios(preferred_tool_backend=backend.DEFAULT)

    def _user(self, url, model, key):
        cls = importlib.import_module("tool_sandbox.roles.openai_api_user").OpenAIAPIUser
        user = cls.__new__(cls)  # its own constructor knows one address alone
        user.model_name = model
        user.openai_client = importlib.import_module("openai").OpenAI(base_url=url, api_key=os.environ[key] if key else "EMPTY")
        return user

    def tasks(self, split):
        category, _, part = split.partition("/")
        names = []
        for name, scenario in self.scenarios.items():
            if category != "all" and category.upper() not in {str(c).upper() for c in scenario.categories}:
                continue
            if part != "base" or not any(mark in name for mark in VARIANTS):
                names.append(name)
        if not names:
            known = sorted({str(c).lower() for s in self.scenarios.values() for c in s.categories})
            raise ValueError("no scenario of split {!r}: use all, {}".format(split, ", ".join(known)))
        return names

    def reset(self, task, seed):
        scenario = self.scenarios[task]
        self.contexts.set_current_context(copy.deepcopy(scenario.starting_context))
        begun = self.contexts.get_current_context()
        for index, message in enumerate(self.agent.get_messages()):  # what prepares the console
            if (message.sender, message.recipient) == (self.role.SYSTEM, self.role.EXECUTION_ENVIRONMENT):
                self.executor.respond(ending_index=index)
        context = self.contexts.get_current_context()
        state = {"scenario": scenario, "context": context, "start": begun.max_sandbox_message_index, "calls": 0}
        said = {
            "messages": self._chat(begun.first_user_sandbox_message_index),
            "tools": self.tool_conversion.convert_to_openai_tools(self.agent.get_available_tools()),
            "truth": self._milestones(scenario),
            "category": "multiple_tool_call"
            if "MULTIPLE_TOOL_CALL" in {str(c).upper() for c in scenario.categories}
            else "other",
        }
        return state, json.loads(json.dumps(said, default=str))

    def _chat(self, first):
        roles = {self.role.SYSTEM: "system", self.role.USER: "user"}
        seen = []
        for index, m in enumerate(self.agent.get_messages()):
            for_agent = m.recipient == self.role.AGENT and self.role.AGENT in m.visible_to and m.sender in roles
            if for_agent and (m.sender == self.role.SYSTEM or index >= first):
                seen.append({"role": roles[m.sender], "content": m.content})
        systems = [m["content"] for m in seen if m["role"] == "system"]
        head = [{"role": "system", "content": "\n".join(systems)}] if systems else []
        return head + [m for m in seen if m["role"] != "system"]

    def _milestones(self, scenario):
        lines = []
        for number, stone in enumerate(scenario.evaluation.milestone_matcher.milestones, 1):
            for wanted in stone.snapshot_constraints:
                if wanted.target_dataframe is not None:
                    for row in wanted.target_dataframe.to_dicts():
                        given = {key: _plain(value) for key, value in row.items() if value is not None}
                        lines.append(f"{number}. {wanted.database_namespace}: {json.dumps(given)}")
        return "\n".join(lines)

    def step(self, state, text, calls):
        self.contexts.set_current_context(state["context"])
        replies, errors = [], 0
        if calls:
            replies, errors = self._execute(state, calls[:CALLS])
            refused = len(calls) - len(calls[:CALLS])
            replies += [f"Error: at most {CALLS} calls a turn"] * refused
            errors += refused
            shown = [{"role": "tool", "content": reply} for reply in replies]
        else:
            self.agent.add_messages([self._message(self.role.USER, text)])
            shown = [] if self.user is None else self._ask_user(self.user)
        state["context"] = self.contexts.get_current_context()
        over = len(self.agent.get_messages()) - 1 - state["start"] >= state["scenario"].max_messages
        return {"messages": [] if over else shown, "errors": errors}

    def _message(self, recipient, content, **more):
        return self.messages.Message(sender=self.role.AGENT, recipient=recipient, content=content, **more)

    def _execute(self, state, calls):
        context, tools = self.contexts.get_current_context(), set(self.agent.get_available_tools())
        sent, replies = [], []
        for call in calls:
            if call is None or call["name"] not in tools:
                replies.append("Error: no call of a tool that there is")
                continue
            state["calls"] += 1
            name = "call_{}".format(state["calls"])
            code = "{0}_parameters = {1!r}\n{0}_response = {2}(**{0}_parameters)\nprint(repr({0}_response))".format(
                name, call["arguments"], context.get_execution_facing_tool_name(call["name"])
            )
            more = {"openai_tool_call_id": name, "openai_function_name": call["name"]}
            sent.append(self._message(self.role.EXECUTION_ENVIRONMENT, code, **more))
            replies.append(None)
        errors = len(replies) - len(sent)
        if sent:
            self.agent.add_messages(sent)
            self.executor.respond()
            answers = self.agent.get_messages()[-len(sent) :]
            errors += sum(m.tool_call_exception is not None for m in answers)
            waiting = iter(answers)
            replies = [next(waiting).content if reply is None else reply for reply in replies]
        return replies, errors

    def _ask_user(self, user):
        """The user's words, behind his own calls; none where he left."""
        while True:
            last = self.agent.get_messages()[-1]
            if last.recipient == self.role.USER:
                user.respond()
            elif last.recipient == self.role.EXECUTION_ENVIRONMENT:
                self.executor.respond()
                if not self.agent.get_messages()[-1].conversation_active:
                    return []
            else:
                return [{"role": "user", "content": last.content}]

    def evaluate(self, state, end):
        scenario = state["scenario"]
        found = scenario.evaluation.evaluate(execution_context=state["context"], max_turn_count=scenario.max_messages)
        metrics = {"similarity": found.similarity, "milestones": found.milestone_similarity, "turns": found.turn_count}
        return {"reward": found.similarity, "success": found.similarity >= 1 - 1e-9, "metrics": metrics}

    def close(self, state):
        with contextlib.suppress(KeyError):
            del state["context"]
