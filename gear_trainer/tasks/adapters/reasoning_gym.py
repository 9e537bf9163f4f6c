"""Generators of reasoning-gym by name: a question, an answer between `<answer>` tags, a score in [0, 1]."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught
from gear_trainer.tasks.tool_calls import spoken
from gear_trainer.user_code import said

INSTRUCTION = "Think step by step, then give the final answer alone between <answer> and </answer>."
_SPAN = 10**6  # held-out entries have seeds below it, a run of seed s trains on those from (s + 1) times it on
_KEPT = 200  # entries that are held out
_TRIES = 50


class ReasoningGymEpisode(Episode):
    """One turn, scored by the generator."""

    def __init__(self, problem: Problem, task: ReasoningGymTask):
        self.entry, self.task, self.text = problem.data["entry"], task, None

    def step(self, text: str) -> Reply:
        """Keep the turn; it is scored once, in `outcome`."""
        self.text = spoken(text)
        return Reply()

    def outcome(self, end: End) -> Outcome:
        """The score of what stands in the last answer tags; 0 where there are none, as `unanswered`."""
        answer = None if self.text is None else self.task.gym.utils.extract_answer(self.text)
        score, unscored = 0.0, False
        if answer is not None:
            try:
                score = float(self.task.data.score_answer(answer, self.entry))
            except Exception:  # some scorers trip over what they do not expect
                unscored = True
        return Outcome(score, score >= 1, {"unanswered": float(answer is None), "unscored": float(unscored)})


@dataclass(frozen=True)
class ReasoningGymTask(Task):
    """A generator of reasoning-gym, whose entries know their answers.

    generator: its name, as leg_counting. options: its own arguments. A question that is held out is never trained on.
    teacher_template: a text file with {prompt} and {answer}; teacher_field: the entry's field that the teacher sees.
    """

    generator: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    teacher_field: str = "answer"
    teacher_template: str | None = None

    def __post_init__(self) -> None:
        _ = self._template
        if self.teacher_field not in self.entry(0):
            raise TaskError(f"teacher_field: entries have no {self.teacher_field!r}, but {', '.join(self.entry(0))}")

    @cached_property
    def gym(self) -> Any:
        """The package."""
        try:
            importlib.import_module("reasoning_gym.utils")
            return importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise TaskError(f"reasoning-gym is missing ({error}): pip install reasoning-gym") from error

    @cached_property
    def data(self) -> Any:
        """The generator; its i-th entry is made with seed i."""
        try:
            return self.gym.create_dataset(self.generator, seed=0, size=_SPAN, **self.options)
        except Exception as error:  # unknown names, unknown or bad options: of several families
            raise TaskError(f"generator={self.generator} cannot be made with {self.options} ({said(error)})") from error

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    @cached_property
    def _kept(self) -> dict[str, int]:
        """The held-out questions with their seeds."""
        kept: dict[str, int] = {}
        for seed in range(4 * _KEPT):
            kept.setdefault(self.entry(seed)["question"], seed)
            if len(kept) == _KEPT:
                break
        return kept

    def entry(self, seed: int) -> dict[str, Any]:
        """The entry of a seed."""
        return self.data[seed]

    def _problem(self, id: str, seed: int) -> Problem:
        entry = self.entry(seed)
        messages = [{"role": "user", "content": f"{entry['question'].rstrip()}\n{INSTRUCTION}"}]
        teacher = taught(messages, self._template, str(entry[self.teacher_field]))
        return Problem(id, messages, teacher, str(entry["answer"]), category=self.generator, data={"entry": entry})

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index), never a held-out question."""
        for again in range(_TRIES):
            seed = (self.seed + 1) * _SPAN + index + again * 10**9
            if self.entry(seed)["question"] not in self._kept:
                return self._problem(f"train-{index}", seed)
        raise TaskError(f"generator={self.generator}: nearly all its questions are held out: give it options with more of them")

    def held_out(self, count: int) -> list[Problem]:
        """Distinct questions, the same for every seed, 200 at most."""
        return [self._problem(f"held-out-{seed}", seed) for seed in list(self._kept.values())[:count]]

    def episode(self, problem: Problem) -> ReasoningGymEpisode:
        return ReasoningGymEpisode(problem, self)
