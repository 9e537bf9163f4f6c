"""Single-digit sums in one turn: a task that a small pretrained model half knows, so rewards vary from the first step."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gear_trainer.tasks.base import End, Episode, Outcome, Problem, Reply, Task
from gear_trainer.tasks.common import fill, last_number, load_template, same_number, user

QUESTION = "What is {a}+{b}? Reply with the number only."
PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
HELD_OUT = [(a, b) for a, b in PAIRS if (3 * a + b) % 5 == 0]  # 17 of 81, spread over rows and columns
TRAINED = [pair for pair in PAIRS if pair not in HELD_OUT]


class SumsEpisode(Episode):
    """One turn; a turn cut by the length limit never reaches `step`, so it scores 0."""

    def __init__(self, problem: Problem):
        self.truth, self.answer = problem.answer, None

    def step(self, text: str) -> Reply:
        """Read the last number of the turn."""
        self.answer = last_number(text)
        return Reply()

    def outcome(self, end: End) -> Outcome:
        """1 where the turn ended and its last number is the sum."""
        right = same_number(self.answer, self.truth)
        return Outcome(float(right), right)


@dataclass(frozen=True)
class SumsTask(Task):
    """Sums of two digits from 1 to 9. `teacher_template` is a text file with {question} and {answer}."""

    seed: int = 0
    teacher_template: str | None = None

    def __post_init__(self) -> None:
        _ = self._template

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, Path(__file__).with_name("teacher.txt"), ("question", "answer"))

    def _problem(self, id: str, a: int, b: int) -> Problem:
        question, answer = QUESTION.format(a=a, b=b), str(a + b)
        teacher = fill(self._template, question=question, answer=answer)
        return Problem(id, user(question), user(teacher), answer, data={"a": a, "b": b})

    def train_problem(self, index: int) -> Problem:
        """One of the 64 trained pairs, a function of (seed, index)."""
        return self._problem(f"train-{index}", *random.Random(f"{self.seed}/{index}").choice(TRAINED))

    def held_out(self, count: int) -> list[Problem]:
        """Up to 17 pairs, the same for every seed."""
        return [self._problem(f"held-out-{i}", a, b) for i, (a, b) in enumerate(HELD_OUT[:count])]

    def episode(self, problem: Problem) -> SumsEpisode:
        return SumsEpisode(problem)
