"""The mathematics task: one turn of reasoning, the final answer checked by math-verify.

The sets and their columns: rows.py. What of a turn is its final answer: answer.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import fill, load_template, user
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.math.answer import plain_answer
from gear_trainer.tasks.math.checker import AnswerChecker, Verdict, answer_checker
from gear_trainer.tasks.math.python_tool import PythonTool
from gear_trainer.tasks.math.rows import Row, RowParser, any_row, gsm8k_row, normalised, read_rows
from gear_trainer.tasks.sources import FILES

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_log = logging.getLogger(__name__)


class MathEpisode(Episode):
    """One turn; a turn cut by the length limit never reaches `step`, so it scores 0."""

    def __init__(self, problem: Problem, checker: AnswerChecker):
        self.gold, self.checker, self.text = problem.answer, checker, None

    def step(self, text: str) -> Reply:
        """Keep the turn; it is checked once, in `outcome`."""
        self.text = text
        return Reply()

    def outcome(self, end: End) -> Outcome:
        """1 where the turn ended and math-verify finds its final answer equal to the gold one.

        The metrics say why not, each 1 where it is so: no_answer, unreadable (math-verify finds nothing in the answer) and
        check_broken (the check passed its limits of time or memory).
        """
        return judged(self.checker, self.gold, self.text)


def judged(checker: AnswerChecker, gold: str, text: str | None) -> Outcome:
    """The outcome of a last turn, None where there was none: reward 1 or 0, with a metric for each reason beside being wrong."""
    verdict = checker.judge(gold, text) if text is not None else Verdict.NO_ANSWER
    reasons = (Verdict.NO_ANSWER, Verdict.UNREADABLE, Verdict.CHECK_BROKEN)
    right = verdict is Verdict.RIGHT
    return Outcome(float(right), right, {reason.value: float(verdict is reason) for reason in reasons})


@dataclass(frozen=True)
class MathTask(Task):
    """Mathematics problems: MATH, MATH500, AIME, ARPO's set, SVAMP, MAWPS, told apart by their columns (rows.py).

    `path` and `held_out_path` are .jsonl, .json, .csv or .parquet files, or hub names (then `subset`, `split` and
    `held_out_split` apply; `held_out_path` defaults to the same hub name). `held_out_path` may name several sets, each by a path
    or by {path, subset, split}, of any of these columns: {gsm8k: .../test.jsonl, aime24: .../test.jsonl}. Training rows
    that are held out in one of them, by normalised text, are left out.

    `teacher_template` is a text file with {problem}, {solution}, {answer} and {instruction}; without {solution} where the set has
    none. `instruction` ends the student's prompt too. `limit_s` bounds the check of one answer, in seconds of a processor.
    """

    path: str
    held_out_path: str | dict[str, Any] | None = None
    seed: int = 0
    subset: str | None = None
    split: str = "train"
    held_out_split: str = "test"
    instruction: str = INSTRUCTION
    teacher_template: str | None = None
    limit_s: float = 5.0
    tool: str | None = None  # python: code that the model writes runs in a sandbox, see docs/sandbox.md
    tool_calls: int = 3  # calls an episode
    sandbox: str = "auto"

    parse: ClassVar[RowParser] = staticmethod(any_row)

    def __post_init__(self) -> None:
        if self.limit_s <= 0:
            raise TaskError(f"limit_s: {self.limit_s} must be above 0")
        if self.tool not in (None, "python"):
            raise TaskError(f"tool: {self.tool!r} must be python, or null for none")
        # what is wrong with them is said before any engine starts
        _ = self._template, self._train, self._checker
        if tool := self._tool:  # a dry run without the data asks the class, so that these are no properties
            for name, value in {"tools": tool.schemas, "max_turns": tool.turns, "concurrency": tool.concurrency}.items():
                object.__setattr__(self, name, value)

    @cached_property
    def _tool(self) -> PythonTool | None:
        return PythonTool(self.tool_calls, self.sandbox) if self.tool else None

    @cached_property
    def _checker(self) -> AnswerChecker:
        try:
            return answer_checker(self.limit_s)
        except ModuleNotFoundError as error:
            raise TaskError(str(error)) from error

    @cached_property
    def _template(self) -> str:
        solved = self.teacher_template is None or any(row.solution for row in self._train)
        placeholders = ("problem", "solution", "answer") if solved else ("problem", "answer")
        return load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), placeholders)

    @cached_property
    def _answer_template(self) -> str:
        """The teacher's prompt of a row without a solution."""
        if "{solution}" not in self._template:
            return self._template
        return load_template(None, Path(__file__).with_name("teacher_answer.txt"), ("problem", "answer"))

    @cached_property
    def _held_out(self) -> dict[str, list[Row]]:
        """The held-out rows by the name of their set, "" for the one of a plain path."""
        given = self.held_out_path
        if isinstance(given, dict):
            return {name: self._held_out_set(name, where) for name, where in _named(given).items()}
        if given is None:
            if Path(self.path).suffix in FILES:
                raise TaskError("held_out_path is missing: give a second file, disjoint from path")
            given = self.path
        return {"": read_rows(given, self.subset, self.held_out_split, type(self).parse)}

    def _held_out_set(self, name: str, where: Any) -> list[Row]:
        one = where if isinstance(where, dict) else {"path": where}
        known = {"path": None, "subset": None, "split": self.held_out_split}
        if set(one) - set(known) or not isinstance(one.get("path"), str):
            raise TaskError(f"held_out_path.{name} is {where!r}: give a path, or {{path: ..., subset: ..., split: ...}}")
        return read_rows(**(known | one), parse=any_row)

    @cached_property
    def _train(self) -> list[Row]:
        held_out = {normalised(row.problem) for rows in self._held_out.values() for row in rows}
        rows = read_rows(self.path, self.subset, self.split, type(self).parse)
        kept = [row for row in rows if normalised(row.problem) not in held_out]
        if not kept:
            raise TaskError(f"every problem of {self.path} is held out too: give two different sets")
        if len(kept) < len(rows):
            _log.warning(
                "%d of %d problems of %s are held out too, and not trained on", len(rows) - len(kept), len(rows), self.path
            )
        return kept

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._train))

    def _problem(self, id: str, row: Row, category: str = "") -> Problem:
        student = f"{row.problem}\n{self.instruction}"
        parts = {"problem": row.problem, "solution": row.solution, "answer": row.answer, "instruction": self.instruction}
        taught = fill(self._template if row.solution else self._answer_template, **parts)
        return Problem(id, user(student), user(taught), row.answer, category=category, data={"solution": row.solution})

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the held-out sets, which their problems carry as category; none of a plain path."""
        return tuple(name for name in self._held_out if name)

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of all rows that are not held out."""
        row = self._order.row(index)
        return self._problem(f"train-{row}", self._train[row])

    def held_out(self, count: int) -> list[Problem]:
        """The first rows of the held-out set; of several, the first rows of each, dealt in turn until a set has no more."""
        dealt = zip_longest(*([(name, i, row) for i, row in enumerate(rows)] for name, rows in self._held_out.items()))
        picked = [one for deal in dealt for one in deal if one is not None][:count]
        return [self._problem(f"{name or 'held-out'}-{i}", row, name) for name, i, row in picked]

    def vote(self, problem: Problem, text: str) -> str | None:
        """The turn's final answer, without what is only spelling."""
        return plain_answer(problem.answer, text)

    def episode(self, problem: Problem) -> Episode:
        episode = MathEpisode(problem, self._checker)
        return self._tool.episode(episode) if self._tool else episode


def _named(sets: Mapping[Any, Any]) -> dict[str, Any]:
    if not sets or not all(isinstance(name, str) and name for name in sets):
        raise TaskError("held_out_path names no set: give a path, or a path for each name, as {gsm8k: .../test.jsonl}")
    return dict(sets)


@dataclass(frozen=True)
class Gsm8kTask(MathTask):
    """Grade-school word problems (GSM8K's columns); arguments as in MathTask, hub subset "main"."""

    subset: str | None = "main"

    parse: ClassVar[RowParser] = staticmethod(gsm8k_row)
