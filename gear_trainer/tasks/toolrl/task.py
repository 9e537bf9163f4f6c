"""ToolRL's sets (rlla_4k): one assistant turn on a given history, with calls, a response, or both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import fill, load_template
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.sources import FILES, source
from gear_trainer.tasks.tool_calls import ToolCall, call_text, read_calls, spoken
from gear_trainer.tasks.toolrl.reward import HIGHEST, LOWEST, call_reward, form_reward, same_calls

# The prompts say with these what a reply looks like, and the history holds some.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
REASONS = ("no_call", "broken_call", "needless_call", "other_calls", "no_words", "cut")


class Row(NamedTuple):
    """One row: the chat, and the ground truth's text with its calls read."""

    messages: list[dict[str, str]]
    truth: str
    calls: list[ToolCall]


def read_row(row: Any) -> Row:
    """A row of the training files (`prompt`, `reward_model.ground_truth`) or of the raw ones (`instruction`, `input`, `output`).

    Raises TaskError that says what is missing or broken.
    """
    if not isinstance(row, dict):
        raise TaskError("the row is not an object with columns")
    if "prompt" in row:
        messages, truth = row["prompt"], (row.get("reward_model") or {}).get("ground_truth")
    else:
        messages, truth = [_said("system", row.get("instruction")), _said("user", row.get("input"))], row.get("output")
    if not _is_chat(messages):
        raise TaskError("no chat that ends with a user turn in 'prompt', or in 'instruction' and 'input'")
    if not isinstance(truth, str) or not spoken(truth).strip():
        raise TaskError("no text in 'reward_model.ground_truth', or in 'output'")
    calls = read_calls(truth)
    if broken := [call for call in calls if isinstance(call, str)]:
        raise TaskError(f"a call of the ground truth cannot be read: {broken[0]}")
    return Row([_said(m["role"], m["content"]) for m in messages], truth, [c for c in calls if isinstance(c, ToolCall)])


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _is_chat(messages: Any) -> bool:
    turns = messages if isinstance(messages, list) else []
    plain = all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in turns)
    return bool(turns) and plain and turns[-1]["role"] == "user"


class ToolRlEpisode(Episode):
    """One turn; one that is cut never reaches `step`, and earns what a turn without a call does."""

    def __init__(self, row: Row):
        self._row, self._text = row, None

    def step(self, text: str) -> Reply:
        """Keep the turn; no tool is run."""
        self._text = text
        calls = read_calls(text)
        return Reply(calls=len(calls), errors=sum(isinstance(call, str) for call in calls))

    def outcome(self, end: End) -> Outcome:
        """The graded reward, up to 4 (1 where the ground truth has no call); a success are exactly its calls, in any order."""
        text = self._text or ""
        calls = read_calls(text)
        form = form_reward(self._row.truth, text) if self._text is not None else 0.0
        correct = call_reward(self._row.calls, calls) if self._row.calls else 0.0
        wrong = "cut" if self._text is None else _wrong(self._row, calls, text)
        metrics = {"form": form, "calls": (correct - LOWEST) / (HIGHEST - LOWEST)} if self._row.calls else {"form": form}
        reasons = {f"fail_{name}": float(name == wrong) for name in REASONS}
        return Outcome(form + correct, wrong is None, metrics | reasons)


def _wrong(row: Row, calls: list[ToolCall | str], text: str) -> str | None:
    """Why a turn is no success; None where it is."""
    if any(isinstance(call, str) for call in calls):
        return "broken_call"
    if not row.calls:
        return "needless_call" if calls else None if spoken(text).strip() else "no_words"
    return None if same_calls(row.calls, calls) else "other_calls" if calls else "no_call"


@dataclass(frozen=True)
class ToolRlTask(Task):
    """ToolRL's data, from files.

    `path` and `held_out_path` are .parquet, .json or .jsonl files, or hub names (then `split` and `held_out_split` apply;
    `held_out_path` defaults to the same hub name). Training rows whose chat is held out too are dropped. `teacher_template` is a
    text file with {question} and {answer}.
    """

    path: str
    held_out_path: str | None = None
    seed: int = 0
    split: str = "train"
    held_out_split: str = "test"
    teacher_template: str | None = None

    def __post_init__(self) -> None:
        _ = self._template, self._train  # what is wrong with them is said before any engine starts

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("question", "answer"))

    @cached_property
    def _held_out(self) -> list[Row]:
        path = self.held_out_path
        if path is None:
            if Path(self.path).suffix in FILES:
                raise TaskError("held_out_path is missing: give a second file, disjoint from path")
            path = self.path
        return _rows(path, self.held_out_split)

    @cached_property
    def _train(self) -> list[Row]:
        held_out = {_text(row) for row in self._held_out}
        rows = [row for row in _rows(self.path, self.split) if _text(row) not in held_out]
        if not rows:
            raise TaskError(f"every problem of {self.path} is held out too: give two different sets")
        return rows

    @cached_property
    def _epochs(self) -> Epochs:
        return Epochs(self.seed, len(self._train))

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of all rows that are not held out."""
        row = self._epochs.row(index)
        return self._problem(f"train-{row}", self._train[row])

    def held_out(self, count: int) -> list[Problem]:
        """The first rows of the held-out set."""
        return [self._problem(f"held-out-{i}", row) for i, row in enumerate(self._held_out[:count])]

    def _problem(self, id: str, row: Row) -> Problem:
        *before, last = row.messages
        shown = "\n".join(call_text(*call).replace('"arguments"', '"parameters"', 1) for call in row.calls)
        taught = _said("user", fill(self._template, question=last["content"], answer=row.truth))
        category = "calls" if row.calls else "response"
        return Problem(id, row.messages, [*before, taught], shown, category=category, data={"row": row}, tags=TAGS)

    def episode(self, problem: Problem) -> ToolRlEpisode:
        return ToolRlEpisode(problem.data["row"])


def _text(row: Row) -> str:
    """A chat's words, whatever its spaces."""
    return " ".join(" ".join(m["content"] for m in row.messages).split())


def _rows(path: str, split: str) -> list[Row]:
    rows = []
    for where, raw in source(path, None, split):
        try:
            rows.append(read_row(raw))
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
    if not rows:
        raise TaskError(f"{path} holds no problems: give a file with one problem a line")
    return rows
