"""AppWorld behind serve.py, in an environment of its own (docs/agents.md has its packages). One world a process.

Splits are AppWorld's: train, dev, test_normal, test_challenge. The tool is `execute(code)` in a shell that keeps its state; the
reward is the share of the task's tests that pass, success all of them.
"""

import contextlib
import importlib

TOOL = {
    "type": "function",
    "function": {
        "name": "execute",
        "description": "Run Python code in a shell that keeps its variables; what it prints comes back. `apis` holds the apps.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}
INSTRUCTION = (
    "You act for {name} ({email}, {phone}) through code. Learn about the apps with apis.api_docs.show_app_descriptions(), "
    "apis.api_docs.show_api_descriptions(app_name=...) and apis.api_docs.show_api_doc(app_name=..., api_name=...); passwords are "
    "in apis.supervisor.show_account_passwords(). When the task is done, call apis.supervisor.complete_task(answer=...), without "
    "an answer where none is asked for."
)
LONGEST = 20_000  # characters of an output that are shown


class Worker:
    """Worlds by task id. root: where `appworld download data` put its files; experiment: the name that outputs go under."""

    holds = 1

    def __init__(self, root=None, experiment="gear_trainer"):
        self.appworld, self.experiment = importlib.import_module("appworld"), experiment
        if root:
            self.appworld.update_root(root)

    def tasks(self, split):
        return self.appworld.load_task_ids(split)

    def reset(self, task, seed):
        world = self.appworld.AppWorld(task_id=task, experiment_name=self.experiment)
        who = world.task.supervisor
        about = {"name": f"{who.first_name} {who.last_name}", "email": who.email, "phone": who.phone_number}
        messages = [
            {"role": "system", "content": INSTRUCTION.format(**about)},
            {"role": "user", "content": world.task.instruction},
        ]
        return world, {"messages": messages, "tools": [TOOL], "truth": self._truth(world.task), "category": task.split("_")[0]}

    def _truth(self, task):
        """The reference solution; tests have none."""
        truth = getattr(task, "ground_truth", None)
        return getattr(truth, "solution_code", None) or getattr(truth, "compiled_solution_code", None) or ""

    def step(self, state, text, calls):
        if not calls:
            return {"messages": []}
        messages, errors = [], 0
        for call in calls:
            if call is None or call["name"] != "execute" or not isinstance(call["arguments"].get("code"), str):
                messages.append({"role": "tool", "content": "Error: call execute with code"})
                errors += 1
                continue
            said = str(state.execute(call["arguments"]["code"]))
            errors += said.startswith("Execution failed")
            messages.append({"role": "tool", "content": said[:LONGEST]})
        return {"messages": [] if state.task_completed() else messages, "errors": errors}

    def evaluate(self, state, end):
        tests = state.evaluate()
        share = tests.pass_count / max(1, tests.num_tests)
        return {"reward": share, "success": bool(tests.success), "metrics": {"passed": share}}

    def close(self, state):
        with contextlib.suppress(Exception):
            state.close()
