"""Task families by name. Importing this is light: a task's module, and what that needs, loads when the task is made."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from typing import Any

from gear_trainer.tasks.base import Episode, Outcome, Problem, Reply, Task, TaskError

__all__ = ["TASKS", "Episode", "Outcome", "Problem", "Reply", "Task", "TaskError", "make_task"]

TASKS = {
    "mathapi": "gear_trainer.tasks.mathapi:MathApiTask",
    "sums": "gear_trainer.tasks.sums:SumsTask",
    "gsm8k": "gear_trainer.tasks.math_words:Gsm8kTask",
    "math": "gear_trainer.tasks.math_words:MathTask",
}


def make_task(name: str, seed: int, args: dict[str, Any] | None = None) -> Task:
    """The task of a name in TASKS, or of a user's `module:Class`, with its arguments checked against the constructor's."""
    cls = _find(name)
    args = args or {}
    _check(name, cls, args)
    task = cls(seed=seed, **args)
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r}: {cls.__name__} is not a gear_trainer.tasks.Task: derive it from that class")
    return task


def _find(name: str) -> type:
    target = TASKS.get(name, name)
    if ":" not in target:
        raise TaskError(f"unknown task {name!r}: use one of {', '.join(TASKS)}, or module:Class for a task of your own")
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TaskError(f"task {name!r} cannot be loaded ({error}): check the module path and the class name") from error
    if not inspect.isclass(found):
        raise TaskError(f"task {name!r}: {attribute} is no class: name a class derived from gear_trainer.tasks.Task")
    return found


def _check(name: str, cls: type, args: dict[str, Any]) -> None:
    """Refuse unknown, missing and wrongly typed arguments, listing what the task takes."""
    known = {key: p for key, p in inspect.signature(cls).parameters.items() if key != "seed"}
    hints = typing.get_type_hints(cls) | typing.get_type_hints(cls.__init__)
    listed = ", ".join(f"{key} ({_type_name(hints.get(key))})" for key, p in known.items()) or "none"
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key, value in args.items():
        if key not in known and not open_ended:
            raise TaskError(f"task {name!r} has no argument {key!r}: it takes {listed}")
        if not _fits(value, hints.get(key, Any)):
            wanted = _type_name(hints[key])
            raise TaskError(f"task {name!r}: argument {key} is {value!r}, must be {wanted}; the task takes {listed}")
    required = [key for key, p in known.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for key in required:
        if key not in args:
            raise TaskError(f"task {name!r} needs the argument {key!r}: it takes {listed}")


def _type_name(hint: Any) -> str:
    return "any" if hint is None else str(hint) if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    plain = typing.get_origin(hint) or hint
    return isinstance(value, plain) if inspect.isclass(plain) else True
