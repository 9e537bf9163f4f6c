"""Rows of the mathematics sets: GSM8K, MATH and its relatives (MATH500, AIME24, AIME25), SVAMP, MAWPS, and RL copies (ARPO).

`gsm8k_row` and `math_row` read one set's columns, `any_row` whichever it finds; column names count without their case.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gear_trainer.tasks.base import TaskError
from gear_trainer.tasks.math.answer import final_answer, last_boxed
from gear_trainer.tasks.sources import source

_FOREIGN = " Let's think step by step and output the final answer within \\boxed{}."  # some copies of MATH append this
_SLOT = re.compile(r"\bnumber(\d+)\b")
_WHOLE = re.compile(r"(-?\d+)\.0+")
# A form feed where \frac lost its backslash, a tab where \triangle did: AIME25 and ARPO's set are published so.
_DAMAGE = re.compile(r"[\x07\x08\x0b\x0c]|\t(?=riangle|imes|heta|ext\{|an\b|au\b)")
_SPELLINGS = re.compile(r"\\(?:left|right|displaystyle|[dt](?=frac))|\\[^a-z]")  # of LaTeX, that are no part of a problem
_WORDS = re.compile(r"[^\W_]+|[-+*/<>=^|!]")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One problem of a data set: its text, a worked solution ("" where the set has none), the final answer."""

    problem: str
    solution: str
    answer: str


RowParser = Callable[[dict[str, Any]], Row | None]


def normalised(problem: str) -> str:
    """A problem's text as the same problem of another set would read: words, numbers and operators alone."""
    text = unicodedata.normalize("NFKC", problem).casefold()
    text = _SPELLINGS.sub(lambda m: "\\" if m[0] in ("\\d", "\\t") else " ", text)
    return " ".join(_WORDS.findall(text)) or problem


def read_rows(path: str, subset: str | None, split: str, parse: RowParser) -> list[Row]:
    """All rows of a file or hub data set; a bad one raises a TaskError that names file and line.

    Left out, and counted in a warning: rows without an answer, or with one that no turn could give, and rows whose `ability` is
    another than mathematics.
    """
    rows: list[Row] = []
    empty, broken, others, damaged = [], [], [], []
    for where, raw in source(path, subset, split):
        if not isinstance(raw, dict):
            raise TaskError(f"{where} is not a JSON object: mend or delete that line")
        if raw.get("ability") not in (None, "", "math"):
            others.append(where)
            continue
        try:
            row = parse(raw)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
        if row is None or final_answer(row.answer, f"\\boxed{{{row.answer}}}") is None:
            (empty if row is None else broken).append(where)
            continue
        rows.append(row)
        if _DAMAGE.search(row.problem):
            damaged.append(where)
    total = len(rows) + len(empty) + len(broken) + len(others)
    _warn(empty, total, "have no answer and are left out")
    _warn(broken, total, "have an answer whose braces do not close and are left out")
    _warn(others, total, "are no mathematics (by their `ability`) and are left out")
    _warn(damaged, total, "hold control characters where LaTeX lost a backslash, and are shown so")
    if not rows:
        raise TaskError(f"{path} holds no problems: give a file with one problem a line")
    return rows


def _warn(places: list[str], total: int, what: str) -> None:
    if places:
        _log.warning("%d of %d problems %s: %s", len(places), total, what, "; ".join(places[:4]))


# --- one row ------------------------------------------------------------------------------------------------------------


def any_row(row: dict[str, Any]) -> Row | None:
    """A row of any of the sets, told apart by its columns. Raises TaskError that lists them where it is of none."""
    columns = {key.casefold() for key in row}
    if {"numbers", "equation"} <= columns:
        return mawps_row(row)
    if {"body", "question"} <= columns:
        return svamp_row(row)
    if {"question", "answer"} <= columns and "####" in str(row.get("answer")):
        return gsm8k_row(row)
    return math_row(row)


def gsm8k_row(row: dict[str, Any]) -> Row:
    """A row of GSM8K: `question`, and `answer` with a last line `#### n`; the calculator marks <<48/2=24>> are dropped."""
    problem, text = _field(row, "question"), _field(row, "answer")
    solution, mark, answer = text.rpartition("####")
    if not mark or not answer.strip():
        raise TaskError("the answer does not end in a line '#### n': add it")
    return Row(problem, re.sub(r"<<[^<>]*>>", "", solution).strip(), answer.strip().replace(",", ""))


def math_row(row: dict[str, Any]) -> Row | None:
    """A row of MATH: `problem` (or `question`), with `answer` (or `target`), with `solution`, or with both.

    Without an answer it is what the solution boxes; None where that is nothing, as in two of MATH's 7,500 training rows, or where
    the answer is blank and there is no solution, as in one of ARPO's: there is nothing to check against. AIME25 and ARPO's set
    have no solutions.
    """
    row = _inner(row)
    problem = _field(row, "problem", "question").removesuffix(_FOREIGN)
    solution = _optional(row, "solution") or ""
    stated = (_value(row, "answer"), _value(row, "target"))
    given = next((_number(a) for a in stated if a is not None and str(a).strip()), last_boxed(solution))
    if given is None and not solution and any(a is not None for a in stated):
        return None
    if given is None:
        raise TaskError(f"no field 'answer' or 'target', and no \\boxed{{...}} in 'solution' ({_listed(row)}): add one of them")
    return Row(problem, solution, given.strip()) if given.strip() else None


def svamp_row(row: dict[str, Any]) -> Row:
    """A row of SVAMP: `Body`, `Question`, `Answer`; the `Equation` is its solution."""
    body, question, answer = _field(row, "body"), _field(row, "question"), _number(_field(row, "answer"))
    equation = _optional(row, "equation")
    problem = f"{body}{'' if body[-1] in '.,;:?!' else ','} {question}"
    return Row(problem, f"{_plain(equation)} = {answer}" if equation else "", answer)


def mawps_row(row: dict[str, Any]) -> Row:
    """A row of MAWPS: `Question` with slots number0, number1, ... that `Numbers` fill; the prefix `Equation` is its solution."""
    numbers = [_number(text) for text in _field(row, "numbers").split()]
    answer = _number(_field(row, "answer"))

    def filled(text: str) -> str:
        slots = [int(slot) for slot in _SLOT.findall(text)]
        if missing := [slot for slot in slots if slot >= len(numbers)]:
            raise TaskError(f"number{missing[0]} has no value in 'Numbers', which holds {len(numbers)}: add it")
        return _SLOT.sub(lambda m: numbers[int(m[1])], text)

    equation = _infix(filled(_field(row, "equation")).split())
    return Row(filled(_field(row, "question")), f"{equation} = {answer}", answer)


def _inner(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of RL copies in one layer: reward_model.ground_truth holds them all (MATH), or the answer alone (ARPO)."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if isinstance(truth, dict):
        return truth
    if truth is None:
        return row
    extra, prompt = row.get("extra_info"), row.get("prompt")
    asked = extra.get("question") if isinstance(extra, dict) else None
    if not asked and isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        asked = prompt[-1].get("content")
    return row | {"problem": asked, "answer": truth}


def _value(row: dict[str, Any], name: str) -> Any:
    """A column's value, its name with any case."""
    return row[name] if name in row else next((value for key, value in row.items() if str(key).casefold() == name), None)


def _optional(row: dict[str, Any], *names: str) -> str | None:
    for name in names:
        value = _value(row, name)
        if value is not None and not isinstance(value, (dict, list)) and str(value).strip():
            return str(value).strip()
    return None


def _field(row: dict[str, Any], *names: str) -> str:
    found = _optional(row, *names)
    if found is None:
        raise TaskError(f"no field {' or '.join(map(repr, names))} ({_listed(row)})")
    return found


def _listed(row: dict[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'none'}"


def _number(value: Any) -> str:
    """A value as text, whole numbers without the .0 of a float."""
    text = str(value).strip()
    return whole[1] if (whole := _WHOLE.fullmatch(text)) else text


def _plain(equation: str) -> str:
    return " ".join(map(_number, equation.split()))


def _infix(tokens: Iterable[str]) -> str:
    """An equation in prefix notation, `- + 10 37 6`, as `(10 + 37) - 6`. Raises TaskError where it is none."""
    left = iter(tokens)

    def term(inside: bool) -> str:
        token = next(left, None)
        if token is None:
            raise TaskError("the 'Equation' breaks off: give operators before their two operands")
        if token not in ("+", "-", "*", "/"):
            return _number(token)
        text = f"{term(True)} {token} {term(True)}"
        return f"({text})" if inside else text

    equation = term(False)
    if rest := next(left, None):
        raise TaskError(f"the 'Equation' goes on behind its end with {rest!r}: give operators before their two operands")
    return equation
