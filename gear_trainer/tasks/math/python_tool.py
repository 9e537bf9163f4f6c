"""The tool `python(code)`: an episode of another task with an interpreter beside it, in a sandbox.

A turn with tool calls is answered with what the code printed; a turn without is the other episode's. Calls beyond the episode's
number are answered with an error, so that the model can still say its answer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from gear_trainer.sandbox import End as CallEnd
from gear_trainer.sandbox import Limits, Result, Sandbox, SandboxError, cores, shared_sandbox
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Reply, TaskError
from gear_trainer.tasks.tool_calls import function_schema, read_call, split_calls

_ABOUT = (
    "Run Python code and return what it prints, and the value of a last line that is an expression. "
    "sympy and numpy can be imported. Every call starts afresh; there are no files and no network."
)
_CODE = {"code": {"type": "string", "description": "The Python code to run."}}
_REFUSED = "refused"  # the calls that never reached the sandbox: malformed, or too many


class PythonTool:
    """The tool of a task: `schemas` for the chat template, `turns` that an episode takes, `concurrency`, and episodes.

    sandbox: auto, or the name of a means, see docs/sandbox.md. Raises TaskError where none holds on this machine.
    """

    def __init__(self, calls: int, sandbox: str):
        if calls < 1:
            raise TaskError(f"tool_calls: {calls} must be at least 1")
        try:
            self.sandbox = shared_sandbox(sandbox, Limits())
        except SandboxError as error:
            raise TaskError(str(error)) from error
        self.calls, self.turns, self.concurrency = calls, calls + 1, cores()
        self.schemas = [function_schema("python", _ABOUT, _CODE)]

    def episode(self, inner: Episode) -> PythonEpisode:
        """An episode whose turns without calls are `inner`'s."""
        return PythonEpisode(inner, self.sandbox, self.calls)


class PythonEpisode(Episode):
    """One rollout with at most `calls` calls of the interpreter; every call that did not end well is counted by its end."""

    def __init__(self, inner: Episode, sandbox: Sandbox, calls: int):
        self.inner, self.sandbox, self.left = inner, sandbox, calls
        self.ends: Counter[str] = Counter()

    def step(self, text: str) -> Any:
        """Run the turn's calls, one after the other; without any the turn is the inner episode's."""
        calls = split_calls(text)
        if not calls:
            return self.inner.step(text)
        answers = [self._run(body) for body in calls]
        return Reply([Message("tool", said) for said, _ in answers], calls=len(calls), errors=sum(not ok for _, ok in answers))

    def _run(self, body: str | None) -> tuple[str, bool]:
        call = read_call(body, ("python",))
        if isinstance(call, str):
            wrong = call
        elif set(call.arguments) != {"code"} or not isinstance(call.arguments["code"], str):
            wrong = "the argument is code, a string"
        elif self.left == 0:
            wrong = "no calls are left; give the final answer"
        else:
            self.left -= 1
            result = self.sandbox.run(call.arguments["code"])
            self.ends[result.end] += 1
            return shown(result, self.sandbox.limits), result.end == "done"
        self.ends[_REFUSED] += 1
        return f"error: {wrong}", False

    def outcome(self, end: End) -> Any:
        """The inner episode's, with the calls by how they ended: `python_calls`, `python_error`, `python_time` and so on."""
        inner = self.inner.outcome(end)
        assert isinstance(inner, Outcome), "an episode that is awaited cannot stand beside the tool"
        counts = {f"python_{name}": float(self.ends[name]) for name in (*get_args(CallEnd), _REFUSED) if name != "done"}
        return Outcome(inner.reward, inner.success, inner.metrics | {"python_calls": float(self.ends.total())} | counts)

    def close(self) -> Any:
        return self.inner.close()


def shown(result: Result, limits: Limits) -> str:
    """The text of a call's answer: what it printed, and why it was stopped."""
    why = {
        "memory": f"stopped: more than {limits.memory >> 20} MiB of memory",
        "time": f"stopped after {limits.seconds:g} s",
        "output": f"cut and stopped: more than {limits.output} bytes of output",
        "killed": "stopped: the interpreter crashed",
    }.get(result.end, "" if result.text.strip() else "(no output)")
    return "\n".join(part for part in (result.text.rstrip("\n"), why) if part)
