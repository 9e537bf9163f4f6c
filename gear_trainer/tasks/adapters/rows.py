"""The part that adapters share: problems out of the rows of a data set, with the ground truth where `teacher_field` says."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gear_trainer.tasks.base import Problem, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught, user
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.sources import source

Row = dict[str, Any]


def field_of(row: Row, path: str) -> Any:
    """The content of a row's field; dots lead into nested ones. Raises TaskError that names the fields that there are."""
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            known = ", ".join(value) if isinstance(value, dict) else "no fields"
            raise TaskError(f"no field {path!r} (there is {known})")
        value = value[name]
    return value


@dataclass(frozen=True)
class RowTask(Task):
    """A task whose problems are the rows of a file (.jsonl, .json, .csv, .parquet) or of a hub data set.

    path, held_out_path: files or hub names; rows that are held out are not trained on. prompt_field: a row's prompt, a chat or
    the text of a user turn. teacher_field: the field with the ground truth, which the teacher alone sees; without one, methods
    that need a teacher refuse the run. success_at: the reward from which an episode is a success.
    """

    path: str
    held_out_path: str
    seed: int = 0
    subset: str | None = None
    split: str = "train"
    held_out_split: str = "test"
    prompt_field: str = "prompt"
    teacher_field: str | None = None
    teacher_template: str | None = None
    success_at: float = 1.0
    max_turns: int = 8
    concurrency: int = 8

    def __post_init__(self) -> None:
        for name in ("max_turns", "concurrency"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}: {getattr(self, name)} must be at least 1")
        _ = self._template, self._train

    @property
    def shows_truth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True where the teacher's prompt holds the ground truth."""
        return self.teacher_field is not None

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    @cached_property
    def _held_out(self) -> list[Row]:
        return self._read(self.held_out_path, self.held_out_split)

    @cached_property
    def _train(self) -> list[Row]:
        kept = {repr(row) for row in self._held_out}
        rows = [row for row in self._read(self.path, self.split) if repr(row) not in kept]
        if not rows:
            raise TaskError(f"every row of {self.path} is held out too: give two different sets")
        return rows

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._train))

    def _read(self, path: str, split: str) -> list[Row]:
        rows = []
        for where, row in source(path, self.subset, split):
            if not isinstance(row, dict):
                raise TaskError(f"{where} is not a JSON object: mend or delete that line")
            try:
                self._chat(row)
                self._truth(row)
            except TaskError as error:
                raise TaskError(f"{where}: {error}") from None
            rows.append(row)
        if not rows:
            raise TaskError(f"{path} holds no rows: give a file with one problem a line")
        return rows

    def _chat(self, row: Row) -> list[dict[str, str]]:
        prompt = field_of(row, self.prompt_field)
        if isinstance(prompt, str):
            return user(prompt)
        turns = prompt if isinstance(prompt, list) else []
        plain = all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in turns)
        if not turns or not plain or turns[-1]["role"] != "user":
            raise TaskError(f"field {self.prompt_field!r} is no text and no chat that ends with a user turn")
        return [{"role": m["role"], "content": m["content"]} for m in turns]

    def _truth(self, row: Row) -> str:
        """The ground truth of a row as text; empty without teacher_field."""
        return str(field_of(row, self.teacher_field)) if self.teacher_field else ""

    @abstractmethod
    def _begun(self, row: Row) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]:
        """The chat and the tools that an episode of the row starts with."""

    def _problem(self, id: str, row: Row) -> Problem:
        messages, tools = self._begun(row)
        truth = self._truth(row)
        teacher = taught(messages, self._template, truth) if truth else messages
        return Problem(id, messages, teacher, truth, tools, str(row.get("category") or ""), data={"row": row})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of all rows that are not held out."""
        at = self._order.row(index)
        return self._problem(f"train-{at}", self._train[at])

    def held_out(self, count: int) -> list[Problem]:
        """The first rows of the held-out set."""
        return [self._problem(f"held-out-{i}", row) for i, row in enumerate(self._held_out[:count])]
