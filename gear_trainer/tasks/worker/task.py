"""A task behind worker processes."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, Task, TaskError
from gear_trainer.tasks.common import SOLUTION, load_template, taught
from gear_trainer.tasks.epochs import Epochs
from gear_trainer.tasks.tool_calls import read_call, split_calls, spoken
from gear_trainer.tasks.worker.process import Pool, WorkerDied, WorkerError

_HERE = Path(__file__).parent
SERVED = {"toolsandbox": "toolsandbox.py", "appworld": "appworld.py"}


class WorkerEpisode(Episode):
    """One episode of a worker. A worker that dies ends it as an error."""

    def __init__(self, task: WorkerTask, problem: Problem):
        self.task, self.problem = task, problem
        self.worker, self.number = task.pool.take()
        try:
            self.worker.ask("reset", episode=self.number, task=problem.data["task"], seed=problem.data["seed"])
        except (WorkerError, WorkerDied):
            task.pool.leave(self.worker, self.number)
            raise

    def step(self, text: str) -> Reply:
        """Hand the turn and its calls over."""
        names = [schema["function"]["name"] for schema in self.problem.tools or []]
        read = [read_call(body, names) for body in split_calls(text)]
        calls = [None if isinstance(call, str) else {"name": call.name, "arguments": call.arguments} for call in read]
        answer = self.worker.ask("step", episode=self.number, text=spoken(text).strip(), calls=calls)
        messages = [Message(message["role"], message["content"]) for message in answer["messages"]]
        return Reply(messages, len(calls), int(answer.get("errors", 0)))

    def outcome(self, end: End) -> Outcome:
        """The worker's evaluation."""
        found = self.worker.ask("evaluate", episode=self.number, end=end)
        metrics = {name: float(value) for name, value in (found.get("metrics") or {}).items()}
        return Outcome(float(found["reward"]), bool(found["success"]), metrics)

    def close(self) -> None:
        try:
            self.worker.ask("close", episode=self.number)
        except WorkerDied:
            pass  # said where it happened
        finally:
            self.task.pool.leave(self.worker, self.number)


@dataclass(frozen=True)
class WorkerTask(Task):
    """Tasks of an environment in a Python of its own: ToolSandbox, AppWorld, or whatever a file with a `Worker` class serves.

    python: that environment's interpreter. worker: toolsandbox, appworld or the path of a file as serve.py describes. options:
    its own. split, held_out_split: names of its splits; tasks that are held out are not trained on. timeout: seconds for an
    answer. max_turns, concurrency: an episode's turns, and the requests at a time.
    """

    python: str
    worker: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    split: str = "train"
    held_out_split: str = "test"
    timeout: float = 120.0
    teacher_template: str | None = None
    max_turns: int = 30
    concurrency: int = 4

    def __post_init__(self) -> None:
        for name in ("max_turns", "concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise TaskError(f"{name}: {getattr(self, name)} must be above 0")
        _ = self._template, self._train

    @cached_property
    def shows_truth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True where the worker says what is right, judged by the first task."""
        return bool(self.train_problem(0).answer)

    @cached_property
    def pool(self) -> Pool:
        """The worker processes."""
        interpreter = shutil.which(self.python)
        if interpreter is None:
            raise TaskError(f"python={self.python} is no program: give the interpreter of the environment with the package")
        served = _HERE / "served" / SERVED[self.worker] if self.worker in SERVED else Path(self.worker).expanduser()
        if not served.is_file():
            raise TaskError(f"worker={self.worker} is no file: use one of {', '.join(SERVED)}, or the path of a worker's file")
        return Pool([interpreter, str(_HERE / "serve.py"), str(served), json.dumps(self.options)], self.timeout)

    @cached_property
    def _template(self) -> str:
        return load_template(self.teacher_template, SOLUTION, ("prompt", "answer"))

    def _ask(self, do: str, **request: Any) -> Any:
        """A question before the run. Raises TaskError."""
        try:
            return self.pool.first().ask(do, **request)
        except (WorkerError, WorkerDied) as error:
            raise TaskError(f"worker={self.worker} with python={self.python}: {error}") from error

    @cached_property
    def _held_out(self) -> list[str]:
        return self._ask("tasks", split=self.held_out_split)

    @cached_property
    def _train(self) -> list[str]:
        kept = set(self._held_out)
        names = [name for name in self._ask("tasks", split=self.split) if name not in kept]
        if not names:
            raise TaskError(f"split={self.split}: every task of it is held out too, or there is none")
        return names

    @cached_property
    def _order(self) -> Epochs:
        return Epochs(self.seed, len(self._train))

    def _problem(self, name: str, seed: int) -> Problem:
        """A task as its reset shows it."""
        try:
            worker, number = self.pool.take()
            try:
                begun = worker.ask("reset", episode=number, task=name, seed=seed)
                worker.ask("close", episode=number)
            finally:
                self.pool.leave(worker, number)
        except (WorkerError, WorkerDied) as error:
            raise TaskError(f"task {name!r} of worker={self.worker}: {error}") from error
        messages, truth = begun["messages"], str(begun.get("truth") or "")
        teacher = taught(messages, self._template, truth) if truth else messages
        data = {"task": name, "seed": seed}
        return Problem(name, messages, teacher, truth, begun.get("tools"), begun.get("category") or "", data=data)

    def train_problem(self, index: int) -> Problem:
        """A function of (seed, index): each epoch is a new order of the training tasks."""
        return self._problem(self._train[self._order.row(index)], random.Random(f"{self.seed}/{index}").getrandbits(31))

    def held_out(self, count: int) -> list[Problem]:
        """The first tasks of the held-out split, under one seed."""
        return [self._problem(name, 0) for name in self._held_out[:count]]

    def episode(self, problem: Problem) -> WorkerEpisode:
        return WorkerEpisode(self, problem)
