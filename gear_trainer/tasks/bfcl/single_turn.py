"""BFCL's categories of one user turn: the calls of one assistant turn, judged by the official checker without running them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.bfcl import package
from gear_trainer.tasks.bfcl.schemas import first_call, schema
from gear_trainer.tasks.bfcl.shares import Shares
from gear_trainer.tasks.common import fill, load_template
from gear_trainer.tasks.tool_calls import ToolCall, call_text, read_calls

CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
RELEVANCE = ("irrelevance", "live_irrelevance", "live_relevance")  # whether to call at all; nothing more is judged
# Why an answer is wrong: the words in which the checker's error types end, of which the first that is in one is counted.
REASONS = (
    "wrong_count", "wrong_func_name", "missing_required", "unexpected_param", "missing_optional", "type_error", "value_error",
    "cannot_find_match",
)  # fmt: skip
OWN_REASONS = ("no_call", "broken_call", "needless_call", "cut", "other")
_UNSTATED = {"irrelevance": "none: no tool fits; answer in words", "relevance": "a call of the tool that fits"}


def reasons(wrong: str | None) -> dict[str, float]:
    """The metrics `fail_...`: 1 for the reason why an answer is wrong, 0 for the others."""
    return {f"fail_{name}": float(name == wrong) for name in (*REASONS, *OWN_REASONS)}


def judge(item: dict[str, Any], category: str, calls: Sequence[ToolCall | str]) -> str | None:
    """Why the calls of an answer are wrong; None where they are right.

    A broken call is counted as one that is there: it never passes. (The package's own runner drops it and judges the rest.)
    """
    if category in RELEVANCE:
        called = any(isinstance(call, ToolCall) for call in calls)
        wanted = category == "live_relevance"
        return None if called == wanted else "no_call" if wanted else "needless_call"
    if not calls:
        return "no_call"
    read = [call for call in calls if isinstance(call, ToolCall)]
    if len(read) < len(calls):
        return "broken_call"
    try:
        verdict = package.ast_checker()(
            item["function"], [{call.name: call.arguments} for call in read], item["ground_truth"], category
        )
    except Exception:  # the checker's own code on shapes that it does not expect: objects where it looks for lists
        return "other"
    kind = verdict.get("error_type", "")
    return None if verdict["valid"] else next((name for name in REASONS if name in kind), "other")


class SingleTurnEpisode(Episode):
    """One turn; one that is cut never reaches `step`, so it scores 0."""

    def __init__(self, item: dict[str, Any], category: str):
        self._item, self._category = item, category
        self._calls: list[ToolCall | str] | None = None

    def step(self, text: str) -> Reply:
        """Read the calls; none is run."""
        self._calls = read_calls(text)
        return Reply(calls=len(self._calls), errors=sum(isinstance(call, str) for call in self._calls))

    def outcome(self, end: End) -> Outcome:
        """1 where the official checker accepts the calls."""
        wrong = "cut" if self._calls is None else judge(self._item, self._category, self._calls)
        return Outcome(float(wrong is None), wrong is None, reasons(wrong))


@dataclass(frozen=True)
class BfclTask(Task):
    """Calls for one user turn, by category; names keep their dots.

    `categories` are names of CATEGORIES and RELEVANCE. `train_share` is the share of the items that may be trained on, the others
    are held out: with 0 all are. `teacher_template` is a text file with {question} and {calls}.
    """

    seed: int = 0
    categories: Sequence[str] = ("parallel", "multiple", "parallel_multiple")
    train_share: float = 0.0
    teacher_template: str | None = None

    def __post_init__(self) -> None:
        known = (*CATEGORIES, *RELEVANCE)
        if isinstance(self.categories, str) or not self.categories:
            raise TaskError(f"categories: {self.categories!r} must be a list of names, of {', '.join(known)}")
        if unknown := [name for name in self.categories if name not in known]:
            raise TaskError(f"categories: BFCL has no {unknown[0]!r} of one turn: use names of {', '.join(known)}")
        _ = self._shares, package.ast_checker()

    @cached_property
    def _shares(self) -> Shares:
        template = load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("question", "calls"))
        items = [(category, item) for category in self.categories for item in _items(category)]
        problems = [_problem(template, category, item) for category, item in items]
        taught = {p.id for p in problems if judge(p.data["item"], p.category, p.data["gold"]) is None}
        return Shares(problems, self.train_share, self.seed, taught)

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index) over the training share, each epoch in a new order.

        Items whose ground truth the checker refuses are left out.
        """
        return self._shares.train_problem(index)

    def held_out(self, count: int) -> list[Problem]:
        """The first held-out items, category by category."""
        return self._shares.held_out[:count]

    def episode(self, problem: Problem) -> SingleTurnEpisode:
        return SingleTurnEpisode(problem.data["item"], problem.category)


def _items(category: str) -> list[dict[str, Any]]:
    rows = package.rows(category)
    answers = package.answers(category) if category in CATEGORIES else [[]] * len(rows)
    return [{**row, "ground_truth": answer} for row, answer in zip(rows, answers, strict=True)]


def _problem(template: str, category: str, item: dict[str, Any]) -> Problem:
    required = {function["name"]: function["parameters"].get("required", ()) for function in item["function"]}
    gold = [first_call(possible, required.get(next(iter(possible)), ())) for possible in item["ground_truth"]]
    shown = "\n".join(call_text(*call) for call in gold) or _UNSTATED["irrelevance" if "irrelevance" in category else "relevance"]
    *before, last = item["question"][0]
    taught = {**last, "content": fill(template, question=last["content"], calls=shown)}
    return Problem(
        item["id"], [*before, last], [*before, taught], shown, [schema(function) for function in item["function"]], category,
        data={"item": item, "gold": gold},
    )  # fmt: skip
