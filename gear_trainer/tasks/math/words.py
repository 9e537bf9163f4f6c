"""GSM8K and MATH, or files of the same form: one turn of reasoning, the final answer checked by math-verify.

What of a turn is its final answer: answer.py.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from gear_trainer.tasks.base import DataAway, End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import fill, load_template, user
from gear_trainer.tasks.math.answer import last_boxed
from gear_trainer.tasks.math.checker import AnswerChecker, answer_checker
from gear_trainer.tasks.math.python_tool import PythonTool

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_FOREIGN = " Let's think step by step and output the final answer within \\boxed{}."  # some copies of MATH append this
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".jsonl", ".parquet")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One problem of a data set: its text, a worked solution, the final answer."""

    problem: str
    solution: str
    answer: str


RowParser = Callable[[dict[str, Any]], Row | None]


def _field(row: dict[str, Any], *names: str) -> str:
    for name in names:
        value = row.get(name)
        if value is not None and not isinstance(value, (dict, list)) and str(value).strip():
            return str(value).strip()
    raise TaskError(f"no field {' or '.join(map(repr, names))} (the row has {', '.join(map(repr, row)) or 'none'})")


def gsm8k_row(row: dict[str, Any]) -> Row:
    """`question` and `answer`, whose last line is `#### n`; the calculator marks <<48/2=24>> are dropped."""
    problem, text = _field(row, "question"), _field(row, "answer")
    solution, mark, answer = text.rpartition("####")
    if not mark or not answer.strip():
        raise TaskError("the answer does not end in a line '#### n': add it")
    return Row(problem, re.sub(r"<<[^<>]*>>", "", solution).strip(), answer.strip().replace(",", ""))


def math_row(row: dict[str, Any]) -> Row | None:
    """`problem` (or `question`) and `solution`, with `answer` (or `target`) or a boxed answer in the solution.

    None where the solution boxes nothing, as in two of MATH's 7,500 training rows: there is no answer to check against.
    """
    nested = row.get("reward_model")
    if isinstance(nested, dict) and isinstance(nested.get("ground_truth"), dict):
        row = nested["ground_truth"]  # the layout of RL copies: reward_model.ground_truth holds the fields
    problem, solution = _field(row, "problem", "question").removesuffix(_FOREIGN), _field(row, "solution")
    stated = (row.get("answer"), row.get("target"))
    given = next((str(a) for a in stated if a is not None and str(a).strip()), last_boxed(solution))
    if given is None:
        raise TaskError("no field 'answer' or 'target', and no \\boxed{...} in 'solution': add one of them")
    return Row(problem, solution, given.strip()) if given.strip() else None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise TaskError(f"{where} is not valid JSON ({error}): mend or delete that line") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{path}: reading parquet needs the package pyarrow: pip install pyarrow, or give a .jsonl") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise TaskError(f"{path} is not a readable parquet file ({error}): copy it again") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataAway(
            f"{name!r} is no file, so it is read as a hub data set, which needs the package datasets: pip install datasets, "
            "or give the path of a .jsonl or .parquet file"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises a family of its own for every network and name problem
        kind = DataAway if isinstance(error, ConnectionError) else TaskError
        raise kind(f"hub data set {name!r} (subset {subset!r}, split {split!r}) cannot be loaded: {error}") from error
    return ((f"{name}, {split}, row {number}", row) for number, row in enumerate(rows, 1))


def _source(path: str, subset: str | None, split: str) -> Iterator[tuple[str, Any]]:
    file = Path(path).expanduser()
    if file.suffix not in _FILES and not file.exists() and _HUB_NAME.fullmatch(path):
        return _hub_rows(path, subset, split)
    if file.is_dir():
        raise TaskError(f"data file {path} is a directory: give the path of a .jsonl or .parquet file in it")
    if not file.is_file():
        raise TaskError(f"data file {path} does not exist: give the path of a .jsonl or .parquet file, or a hub name owner/set")
    if file.suffix not in _FILES:
        raise TaskError(f"data file {path} must be a .jsonl or .parquet file")
    return _json_lines(file) if file.suffix == ".jsonl" else _parquet_rows(file)


def read_rows(path: str, subset: str | None, split: str, parse: RowParser) -> list[Row]:
    """All rows of a file or hub data set; a bad one raises a TaskError that names file and line."""
    rows: list[Row] = []
    empty: list[str] = []
    for where, raw in _source(path, subset, split):
        if not isinstance(raw, dict):
            raise TaskError(f"{where} is not a JSON object: mend or delete that line")
        try:
            row = parse(raw)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
        if row is None:
            empty.append(where)
        else:
            rows.append(row)
    if empty:
        _log.warning(
            "%d of %d problems have no answer and are left out: %s", len(empty), len(empty) + len(rows), "; ".join(empty[:4])
        )
    if not rows:
        raise TaskError(f"{path} holds no problems: give a file with one problem a line")
    return rows


class MathEpisode(Episode):
    """One turn; a turn cut by the length limit never reaches `step`, so it scores 0."""

    def __init__(self, problem: Problem, checker: AnswerChecker):
        self.gold, self.checker, self.text = problem.answer, checker, None

    def step(self, text: str) -> Reply:
        """Keep the turn; it is checked once, in `outcome`."""
        self.text = text
        return Reply()

    def outcome(self, end: End) -> Outcome:
        """1 where the turn ended and math-verify finds its final answer equal to the gold one."""
        right = self.text is not None and self.checker.equal(self.gold, self.text)
        return Outcome(float(right), right)


@dataclass(frozen=True)
class MathTask(Task):
    """Competition mathematics (MATH's columns).

    `path` and `held_out_path` are .jsonl or .parquet files, or hub names (then `subset`, `split` and `held_out_split` apply;
    `held_out_path` defaults to the same hub name). `teacher_template` is a text file with {problem}, {solution}, {answer} and
    {instruction}; `instruction` ends the student's prompt too. `limit_s` bounds the check of one answer.
    """

    path: str
    held_out_path: str | None = None
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

    parse: ClassVar[RowParser] = staticmethod(math_row)

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
        return load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("problem", "solution", "answer"))

    @cached_property
    def _held_out(self) -> list[Row]:
        path = self.held_out_path
        if path is None:
            if Path(self.path).suffix in _FILES:
                raise TaskError("held_out_path is missing: give a second file, disjoint from path")
            path = self.path
        return read_rows(path, self.subset, self.held_out_split, type(self).parse)

    @cached_property
    def _train(self) -> list[Row]:
        held_out = {row.problem for row in self._held_out}
        rows = [row for row in read_rows(self.path, self.subset, self.split, type(self).parse) if row.problem not in held_out]
        if not rows:
            raise TaskError(f"every problem of {self.path} is held out too: give two different sets")
        return rows

    @cached_property
    def _orders(self) -> dict[int, list[int]]:
        return {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders.clear()  # one epoch at a time is read, so one order is kept
            self._orders[epoch] = random.Random(f"{self.seed}/{epoch}").sample(range(len(self._train)), len(self._train))
        return self._orders[epoch]

    def _problem(self, id: str, row: Row) -> Problem:
        student = f"{row.problem}\n{self.instruction}"
        parts = {"problem": row.problem, "solution": row.solution, "answer": row.answer, "instruction": self.instruction}
        return Problem(id, user(student), user(fill(self._template, **parts)), row.answer, data={"solution": row.solution})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of all rows that are not held out."""
        epoch, at = divmod(index, len(self._train))
        row = self._order(epoch)[at]
        return self._problem(f"train-{row}", self._train[row])

    def held_out(self, count: int) -> list[Problem]:
        """The first rows of the held-out set."""
        return [self._problem(f"held-out-{i}", row) for i, row in enumerate(self._held_out[:count])]

    def episode(self, problem: Problem) -> Episode:
        episode = MathEpisode(problem, self._checker)
        return self._tool.episode(episode) if self._tool else episode


@dataclass(frozen=True)
class Gsm8kTask(MathTask):
    """Grade-school word problems (GSM8K's columns); arguments as in MathTask, hub subset "main"."""

    subset: str | None = "main"

    parse: ClassVar[RowParser] = staticmethod(gsm8k_row)
