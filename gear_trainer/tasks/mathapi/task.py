"""Two-turn tool use on the executable `MathAPI` class of bfcl-eval: call a tool, read its answer, say the result."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import fill, last_number, load_template, same_number, user
from gear_trainer.tasks.tool_calls import call_text, call_turn, function_schema, read_call, split_calls

PHRASES = {
    "add": ("What is {a} + {b}?", "Add {a} and {b}.", "Find the sum of {a} and {b}.", "Compute {a} plus {b}.", "{a} + {b} = ?"),
    "subtract": (
        "What is {a} - {b}?",
        "From {a} subtract {b}.",
        "Find the difference of {a} and {b}.",
        "Compute {a} minus {b}.",
        "{a} - {b} = ?",
    ),
    "multiply": (
        "What is {a} * {b}?",
        "Multiply {a} and {b}.",
        "Find the product of {a} and {b}.",
        "Compute {a} times {b}.",
        "{a} * {b} = ?",
    ),
}
TRUTH = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b}
HELD_OUT_SHARE = 5  # one operand pair in five is never trained on
LIMIT = 1e12  # larger operands are refused: their products would fill the context with digits
MAX_CALLS = 8  # calls run per turn; a longer list is a runaway, and its answers would fill the context
DEMO_MIX = (("right", 0.45), ("guess", 0.30), ("wrong_tool", 0.25))


def _new_api() -> Any:
    try:
        from bfcl_eval.eval_checker.multi_turn_eval.func_source_code.math_api import MathAPI
    except ImportError as error:
        raise TaskError(
            f"the task mathapi needs the packages bfcl-eval and mpmath ({error}): pip install --no-deps bfcl-eval mpmath"
        ) from error
    return MathAPI()


def _held_out(a: int, b: int) -> bool:
    return zlib.crc32(f"{a},{b}".encode()) % HELD_OUT_SHARE == 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_call(body: str | None) -> tuple[str, float, float] | str:
    """A call's tool and operands, or what is wrong with it."""
    call = read_call(body, TRUTH)
    if isinstance(call, str):
        return call
    name, arguments = call
    if set(arguments) != {"a", "b"}:
        return "the arguments are a and b"
    a, b = arguments["a"], arguments["b"]
    if not _number(a) or not _number(b):
        return "the arguments must be numbers"
    if not (abs(a) <= LIMIT and abs(b) <= LIMIT):  # false for NaN too
        return "the numbers are too large"
    return name, a, b


def _plain(value: float) -> float:
    """Integral numbers as ints, others without binary noise (0.1 + 0.2 is 0.3)."""
    return int(value) if float(value).is_integer() else round(value, 10)


class MathApiEpisode(Episode):
    """One rollout with an API instance of its own."""

    def __init__(self, problem: Problem):
        self.api, self.truth, self.answer = _new_api(), problem.answer, None

    def _run(self, body: str | None) -> tuple[str, bool]:
        checked = check_call(body)
        if isinstance(checked, str):
            return json.dumps({"error": checked}), False
        name, a, b = checked
        reply = getattr(self.api, name)(a, b)
        shown = {key: _plain(value) if _number(value) else value for key, value in reply.items()}
        return json.dumps(shown), "error" not in reply

    def step(self, text: str) -> Reply:
        """Answer every tool call of the turn; a turn without one is the final answer."""
        calls = split_calls(text)
        if not calls:
            self.answer = last_number(text)
            return Reply()
        self.answer = None
        replies = [self._run(body) for body in calls[:MAX_CALLS]]
        messages = [Message("tool", text) for text, _ in replies]
        dropped = len(calls) - len(replies)
        if dropped:
            messages.append(Message("tool", json.dumps({"error": f"at most {MAX_CALLS} calls a turn"})))
        found = [ok and same_number(last_number(text), self.truth) for text, ok in replies]
        errors = dropped + sum(not ok for _, ok in replies)
        return Reply(messages, calls=len(calls), errors=errors, reward=float(any(found)))

    def outcome(self, end: End) -> Outcome:
        """1 where the last ended turn is an answer and its last number is the truth."""
        right = same_number(self.answer, self.truth)
        return Outcome(float(right), right)


@dataclass(frozen=True)
class MathApiTask(Task):
    """Sums, differences and products of 1-2 digit numbers, to be computed by a tool call.

    `max_operand` bounds the operands; `teacher_template` is a text file with {question}, {calls} and {answer}.
    """

    seed: int = 0
    max_operand: int = 99
    teacher_template: str | None = None
    max_turns = 2
    turn_rewards = True  # 1 for a turn whose calls bring the answer

    def __post_init__(self) -> None:
        if not 9 <= self.max_operand <= 999_999:
            raise TaskError(f"max_operand: {self.max_operand} is not between 9 and 999999")
        _ = self._template

    @cached_property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the three tools that may be called."""
        number = {"type": "number"}
        return [function_schema(name, f"{name} two numbers", {"a": number, "b": number}) for name in TRUTH]

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("question", "calls", "answer"))

    def _draw(self, rng: random.Random, held_out: bool) -> tuple[str, str, int, int]:
        while True:  # about one draw in five is held out, so this ends after a few
            top = rng.choice((9, self.max_operand))
            a, b = rng.randint(1, top), rng.randint(1, top)
            if _held_out(a, b) == held_out:
                tool = rng.choice(tuple(TRUTH))
                return rng.choice(PHRASES[tool]).format(a=a, b=b), tool, a, b

    def _problem(self, id: str, question: str, tool: str, a: int, b: int) -> Problem:
        answer = str(TRUTH[tool](a, b))
        teacher = fill(self._template, question=question, calls=call_text(tool, {"a": a, "b": b}), answer=answer)
        return Problem(id, user(question), user(teacher), answer, data={"tool": tool, "a": a, "b": b})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index); its operand pair is never one of the held-out pairs."""
        return self._problem(f"train-{index}", *self._draw(random.Random(f"{self.seed}/{index}"), False))

    def held_out(self, count: int) -> list[Problem]:
        """Distinct questions on held-out operand pairs, the same for every seed, so runs compare on equal prompts."""
        seen: dict[str, Problem] = {}
        for index in range(20 * count):
            drawn = self._draw(random.Random(f"held-out/{index}"), True)
            seen.setdefault(drawn[0], self._problem(f"held-out-{len(seen)}", *drawn))
            if len(seen) == count:
                break
        return list(seen.values())

    def episode(self, problem: Problem) -> MathApiEpisode:
        return MathApiEpisode(problem)

    demo_mix = DEMO_MIX

    def demonstrate(self, problem: Problem, kind: str, rng: random.Random) -> list[str]:
        """The assistant turns of one demonstration: "right", a "guess" without the tool, or a call of the "wrong_tool"."""
        tool, a, b = problem.data["tool"], problem.data["a"], problem.data["b"]
        if kind == "guess":
            return [self._guess(problem.answer, rng)]
        if kind == "wrong_tool":
            tool = rng.choice([name for name in TRUTH if name != tool])
        return [call_turn(tool, {"a": a, "b": b}), str(TRUTH[tool](a, b))]

    def wrong_answer(self, problem: Problem, rng: random.Random) -> str:
        """A final answer of the right length that is not the truth."""
        return self._guess(problem.answer, rng)

    def _guess(self, answer: str, rng: random.Random) -> str:
        digits = len(answer.lstrip("-"))
        while True:
            number = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
            if str(number) != answer:
                return str(number)
