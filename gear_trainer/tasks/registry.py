"""Task families by name. Importing this is light: a task's module, and what that needs, loads when the task is made."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, cast

from gear_trainer.tasks.awaiting import resolved
from gear_trainer.tasks.base import Problem, Task, TaskError
from gear_trainer.user_code import load_class, said

TASKS = {
    "mathapi": "gear_trainer.tasks.mathapi.task:MathApiTask",
    "sums": "gear_trainer.tasks.arithmetic.sums:SumsTask",
    "gsm8k": "gear_trainer.tasks.math.words:Gsm8kTask",
    "math": "gear_trainer.tasks.math.words:MathTask",
    "bfcl": "gear_trainer.tasks.bfcl.single_turn:BfclTask",
    "bfcl-multi-turn": "gear_trainer.tasks.bfcl.multi_turn:MultiTurnTask",
    "bfcl-one-class": "gear_trainer.tasks.bfcl.one_class:OneClassTask",
    "chains": "gear_trainer.tasks.chains.task:ChainsTask",
    "toolrl": "gear_trainer.tasks.toolrl.task:ToolRlTask",
    "acebench": "gear_trainer.tasks.acebench.single:AceBenchTask",
    "acebench-agent": "gear_trainer.tasks.acebench.agent:AceAgentTask",
    "trl": "gear_trainer.tasks.adapters.trl:TrlTask",
    "reasoning-gym": "gear_trainer.tasks.adapters.reasoning_gym:ReasoningGymTask",
    "skyrl": "gear_trainer.tasks.adapters.skyrl:SkyRlTask",
    "openenv": "gear_trainer.tasks.adapters.openenv:OpenEnvTask",
    "mcp": "gear_trainer.tasks.adapters.mcp:McpTask",
    "worker": "gear_trainer.tasks.worker.task:WorkerTask",
    "tau-airline": "gear_trainer.tasks.tau.airline:TauAirlineTask",
    "tau-solo": "gear_trainer.tasks.tau.solo:TauSoloTask",
    "mixture": "gear_trainer.tasks.mixture.task:MixtureTask",
}


def make_task(name: str, seed: int, args: dict[str, Any] | None = None) -> Task:
    """The task of a name in TASKS, or of a user's `module:Class`, with its arguments checked against the constructor's.

    A user's task is asked for a problem of each kind and an episode, so that what is wrong with it is said before anything
    starts. Raises TaskError.
    """
    cls = task_class(name)
    args = args or {}
    _check(name, cls, args)
    make = cast("Callable[..., Task]", cls)
    if name in TASKS:
        return make(seed=seed, **args)
    task = _asked(name, f"{cls.__name__}(...)", lambda: make(seed=seed, **args))
    _try_task(name, task)
    return task


def task_class(name: str) -> type[Task]:
    """The class behind a task's name. Raises TaskError."""
    target = TASKS.get(name, name)
    if ":" not in target:
        raise TaskError(f"unknown task {name!r}: use one of {', '.join(TASKS)}, or module:Class for a task of your own")
    try:
        cls = load_class(target)
    except ImportError as error:
        raise TaskError(
            f"task {name!r} cannot be loaded ({error}): check the module path and the class name, and that the module imports"
        ) from error
    if not issubclass(cls, Task):
        raise TaskError(f"task {name!r}: {cls.__name__} is not a gear_trainer.tasks.Task: derive it from that class")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TaskError(f"task {name!r}: {cls.__name__} has no {', '.join(missing)}: write them, see docs/tasks.md")
    return cls


def _asked(name: str, what: str, call: Callable[[], Any]) -> Any:
    """What a user's class answers; whatever it raises becomes a TaskError that says which call it was."""
    try:
        return call()
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"task {name!r}: {what} fails ({said(error, where=True)}): mend the class") from error


def _try_task(name: str, task: Task) -> None:
    """Ask for a problem of each kind and an episode, as a run does; refuse other types than docs/tasks.md names."""
    for what in ("max_turns", "concurrency"):
        value = getattr(task, what)
        _require(name, isinstance(value, int) and value >= 1, f"{what} is {value!r}: make it a whole number of at least 1")
    _require(name, task.tools is None or isinstance(task.tools, list), "tools must be None or a list of JSON schemas")
    problem = _asked(name, "train_problem(0)", lambda: task.train_problem(0))
    held_out = _asked(name, "held_out(1)", lambda: task.held_out(1))
    _require(name, isinstance(held_out, list), f"held_out(1) returns {type(held_out).__name__}: return a list of Problem")
    for what, found in [("train_problem(0)", problem), *(("held_out(1)", p) for p in held_out)]:
        _require(name, isinstance(found, Problem), f"{what} gives {type(found).__name__}: make it a gear_trainer.tasks.Problem")
        _require(
            name, found.tools is None or isinstance(found.tools, list), f"{what}.tools must be None or a list of JSON schemas"
        )
        for chat in ("messages", "teacher_messages"):
            text = f"{what}.{chat} must be a list of {{'role': ..., 'content': ...}} that ends with a user turn"
            _require(name, _is_chat(getattr(found, chat)), text)
    episode = _asked(name, "episode(problem)", lambda: task.episode(problem))
    for method in ("step", "outcome", "close"):
        text = f"episode(problem) gives {type(episode).__name__}, without {method}(): derive it from gear_trainer.tasks.Episode"
        _require(name, callable(getattr(episode, method, None)), text)
    _asked(name, "episode(problem).close()", lambda: resolved(episode.close()))


def _require(name: str, condition: bool, message: str) -> None:
    if not condition:
        raise TaskError(f"task {name!r}: {message}")


def _is_chat(messages: Any) -> bool:
    turns = messages if isinstance(messages, list) else []
    plain = all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in turns)
    return bool(turns) and plain and turns[-1]["role"] == "user"


def _check(name: str, cls: type, args: dict[str, Any]) -> None:
    """Refuse unknown, missing and wrongly typed arguments, listing what the task takes."""
    parameters = inspect.signature(cls).parameters
    if "seed" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TaskError(f"task {name!r}: {cls.__name__} takes no `seed`: add it, a run hands it its own (seed: int = 0)")
    known = {key: p for key, p in parameters.items() if key != "seed"}
    hints = _hints(cls)
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


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls) | typing.get_type_hints(cls.__init__)
    except NameError:  # a user's class may name types that only a type checker imports
        return {}


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
    return isinstance(value, plain) if inspect.isclass(plain) and plain is not Any else True
