"""A task's episodes behind a guard: what raises, hangs or answers nonsense ends its rollout as an error, never the run.

A task's code runs in a thread beside the trainer's, one call at a time, in the order in which it would run without. A call that
takes longer than the limit is left alone in its thread (Python cannot stop one) and the next call gets a fresh thread. What only
works in the main thread, as signal handlers, needs rollout.turn_timeout=null: then calls are made directly, without a limit.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any

from gear_trainer.tasks.base import Episode, Outcome, Problem, Reply, Task, TaskError

_LONGEST = 300  # characters of an error's message that are kept
_log = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()


class EpisodeError(Exception):
    """An environment that is dead: what its rollout earned is unknown, which is not a reward of 0."""


class Caller:
    """Makes calls within a limit of seconds (None: directly). `abandoned` counts the threads that were left behind."""

    def __init__(self, limit_s: float | None):
        self.limit_s, self.abandoned = limit_s, 0
        self._jobs: SimpleQueue | None = None

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the call returns; raises what it raises, and EpisodeError where it takes too long."""
        if self.limit_s is None:
            return call(*args)
        answer: Future[Any] = Future()
        self._jobs = self._jobs or _start()
        self._jobs.put((answer, partial(contextvars.copy_context().run, call, *args)))  # as a decimal context of the caller's
        try:
            return answer.result(self.limit_s)
        except TimeoutError:
            if answer.done():
                raise  # the task's own
            self._jobs.put(None)  # should the call ever return, its thread ends
            self._jobs, self.abandoned = None, self.abandoned + 1
            raise EpisodeError(f"no answer within {self.limit_s:g} s (rollout.turn_timeout)") from None


def _start() -> SimpleQueue:
    """A thread that serves a queue of calls; it does not keep the process from ending."""
    jobs: SimpleQueue = SimpleQueue()
    threading.Thread(target=_serve, args=(jobs,), name="episodes", daemon=True).start()
    return jobs


def _serve(jobs: SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        answer, call = job
        try:
            answer.set_result(call())
        except BaseException as error:  # also a tool's sys.exit(): it is the rollout's error
            answer.set_exception(error)


@lru_cache
def caller(limit_s: float | None) -> Caller:
    """The caller that all rollouts of this process share for a given limit."""
    return Caller(limit_s)


class Environment:
    """One task's episodes. Every method raises EpisodeError, in one line, for whatever the task's code does."""

    def __init__(self, task: Task, limit_s: float | None):
        self.task, self._caller = task, caller(limit_s)

    def start(self, problem: Problem) -> Episode:
        return self._guarded("episode", problem, lambda episode: episode, self.task.episode, problem)

    def step(self, problem: Problem, episode: Episode, text: str) -> Reply:
        return self._guarded("step", problem, _checked_reply, episode.step, text)

    def outcome(self, problem: Problem, episode: Episode) -> Outcome:
        return self._guarded("outcome", problem, _checked_outcome, episode.outcome)

    def _guarded(self, what: str, problem: Problem, check: Callable[[Any], Any], call: Callable[..., Any], *args: Any) -> Any:
        try:
            return check(self._caller(call, *args))
        except (Exception, SystemExit) as error:
            line = " ".join(f"{what}: {_named(error)}".split())[:_LONGEST]
            self._tell(what, problem, error, line)
            raise EpisodeError(line) from error

    def _tell(self, what: str, problem: Problem, error: BaseException, line: str) -> None:
        """One line for every kind of failure; the metrics count all."""
        task = type(self.task).__name__
        if (kind := (task, what, type(error).__name__)) not in _told:
            _told.add(kind)
            _log.warning(
                "task %s, problem %s: %s; such a rollout gets a fresh try, then its group is dropped (said once)",
                task, problem.id, line,
            )  # fmt: skip


def _named(error: BaseException) -> str:
    return str(error) if isinstance(error, (EpisodeError, TaskError)) else f"{type(error).__name__}: {error}"


def _checked_reply(reply: Reply) -> Reply:
    texts = reply.observations
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TaskError(f"the reply's observations are {texts!r:.60}, must be a list of str")
    if not (isinstance(reply.calls, int) and isinstance(reply.errors, int)):
        raise TaskError(f"the reply's calls and errors are {reply.calls!r:.60} and {reply.errors!r:.60}, must be int")
    _finite("the turn's reward", reply.reward)
    return reply


def _checked_outcome(outcome: Outcome) -> Outcome:
    return Outcome(_finite("the reward", outcome.reward), bool(outcome.success))


def _finite(name: str, value: Any) -> float:
    if not math.isfinite(value):
        raise TaskError(f"{name} is {value}, must be a finite number")
    return float(value)
