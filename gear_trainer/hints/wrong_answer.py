"""A teacher that sees what belongs to another problem: a control, for it knows nothing of this one's solution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gear_trainer.tasks.base import Problem, Task, TaskError

TRIES = 64  # problems looked at for one with another answer


def wrong_messages(problem: Problem, others: Iterable[Problem]) -> list[dict[str, str]] | None:
    """The hint of the first of the other problems that has another answer, around this one's question.

    None where there is no such problem, or where the teacher's chat is not the student's with a hint around its last message.
    """
    asked = problem.messages[-1]["content"]
    for other in others:
        *head, last = other.teacher_messages
        around = last["content"].split(other.messages[-1]["content"])
        if other.answer != problem.answer and head == other.messages[:-1] and len(around) == 2:
            return [*problem.messages[:-1], {**last, "content": asked.join(around)}]
    return None


def draw(task: Task, index: int, wrong_answer: bool) -> Problem:
    """The training problem of an index, as its teacher is to see it. Raises TaskError as `wrongly_taught` does."""
    return wrongly_taught(task, index) if wrong_answer else task.train_problem(index)


def wrongly_taught(task: Task, index: int) -> Problem:
    """The training problem of an index, its teacher shown the answer of a later one. Raises TaskError where none will do."""
    problem = task.train_problem(index)
    shown = wrong_messages(problem, map(task.train_problem, range(index + 1, index + 1 + TRIES)))
    if shown is None:
        raise TaskError(
            f"no wrong answer to show for problem {problem.id}: none of the next {TRIES} has another answer that is shown around "
            "the last message"
        )
    return replace(problem, teacher_messages=shown)
