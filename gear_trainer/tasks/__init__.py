"""Tasks: problems, and episodes that answer the model and score it. One folder a family; how to write one: docs/tasks.md."""

from gear_trainer.tasks.base import DataAway, Demonstrable, End, Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.registry import TASKS, make_task, task_class

__all__ = [
    "TASKS", "DataAway", "Demonstrable", "End", "Episode", "Message", "Outcome", "Problem", "Reply", "Task", "TaskError",
    "make_task", "task_class",
]  # fmt: skip
