"""A task's episodes behind a guard: what raises, hangs or answers nonsense ends its rollout as an error, never the run.

A task's code runs in threads beside the trainer's, `Task.concurrency` calls at a time, the parts of a mixture each with threads
of its own; with one, in the order in which it would run without. A call that takes longer than the limit is left alone in its
thread (Python cannot stop one) and a fresh thread takes over. What only works in the main thread, as signal handlers, needs
rollout.turn_timeout=null: then calls are made directly, one after the other, without a limit.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from queue import Empty, SimpleQueue
from typing import Any

from gear_trainer.tasks.awaiting import leave, resolved
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, Task, TaskError

_LONGEST = 300  # characters of an error's message that are kept
_log = logging.getLogger(__name__)
_told: set[tuple[str, str, str]] = set()


class EpisodeError(Exception):
    """An environment that is dead: what its rollout earned is unknown, which is not a reward of 0."""


class Overdue(EpisodeError):
    """A call that took too long, and goes on in a thread that nobody waits for."""


# --- calls in threads ---------------------------------------------------------------------------------------------------


class Callers:
    """Makes calls, `size` at a time in the order in which they came, each within a limit of seconds (None: directly, at once).

    `abandoned` counts the threads that were left behind.
    """

    def __init__(self, limit_s: float | None, size: int = 1):
        self.limit_s, self.size, self.abandoned = limit_s, size, 0
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._threads: list[_Caller] = []

    def start(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """A future of what the call returns or raises; Overdue where it took too long when somebody looked (`leave_overdue`)."""
        answer: Future[Any] = Future()
        work = partial(contextvars.copy_context().run, call, *args)  # as a decimal context of the caller's
        if self.limit_s is None:
            _answer(answer, lambda: resolved(work()))
            return answer
        self._jobs.put((answer, work))
        if len(self._threads) < self.size:
            self._threads.append(_Caller(self._jobs))
        return answer

    def wait(self, answer: Future[Any]) -> None:
        """Return when the answer is there."""
        while not answer.done():
            wait([answer], self.patience())
            self.leave_overdue()

    def patience(self) -> float:
        """Seconds until a call may be overdue."""
        assert self.limit_s is not None, "direct calls are never waited for"
        begun = [job[1] for thread in self._threads if (job := thread.job)]
        return max(0.0, min(begun, default=time.monotonic()) + self.limit_s - time.monotonic())

    def leave_overdue(self) -> None:
        """Answer calls that took too long with Overdue, and put fresh threads in their threads' place."""
        for thread in list(self._threads):
            job = thread.job
            if job is None or self.limit_s is None or time.monotonic() - job[1] < self.limit_s:
                continue
            if _settled(job[0].set_exception, Overdue(f"no answer within {self.limit_s:g} s (rollout.turn_timeout)")):
                self.abandoned += 1
                self._threads[self._threads.index(thread)] = _Caller(self._jobs)
                if thread.awaited:
                    leave(thread.awaited)


class _Caller(threading.Thread):
    """A thread that serves a queue of calls, until one of its answers comes too late. It keeps no process from ending."""

    def __init__(self, jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]]):
        super().__init__(name="episodes", daemon=True)
        self.jobs = jobs
        self.job: tuple[Future[Any], float] | None = None  # the answer that is worked on, and since when
        self.awaited: Future[Any] | None = None
        self.start()

    def run(self) -> None:
        in_time = True
        while in_time:
            answer, work = self.jobs.get()
            self.awaited, self.job = None, (answer, time.monotonic())
            in_time = _answer(answer, lambda work=work: resolved(work(), self._await))
            self.job = None

    def _await(self, handle: Future[Any]) -> None:
        self.awaited = handle


def _answer(answer: Future[Any], work: Callable[[], Any]) -> bool:
    """Settle an answer by what work returns or raises; False where it was settled before. An episode that comes too late is
    closed."""
    try:
        value = work()
    except BaseException as error:  # also a tool's sys.exit(): it is the rollout's error
        return _settled(answer.set_exception, error)
    in_time = _settled(answer.set_result, value)
    if not in_time and isinstance(value, Episode):
        resolved(value.close())
    return in_time


def _settled(settle: Callable[[Any], None], value: Any) -> bool:
    try:
        settle(value)
    except InvalidStateError:
        return False
    return True


@lru_cache
def callers(limit_s: float | None, size: int, name: str) -> Callers:
    """The callers that all rollouts of this process share for a given limit, concurrency, and name (`Task.callers`)."""
    return Callers(limit_s, size)


# --- a task's episodes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One call of a task's code that a rollout waits for. `what` it is, `problem`: for messages; `check`: makes the result."""

    what: str
    problem: Problem
    check: Callable[[Any], Any]
    call: Callable[..., Any]
    args: tuple[Any, ...]


class Environment:
    """Makes a task's calls; whatever they do comes out as a checked result or an EpisodeError of one line."""

    def __init__(self, task: Task, limit_s: float | None):
        self.task, self.limit_s = task, limit_s
        self._used: set[Callers] = set()
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()

    def _callers(self, problem: Problem) -> Callers:
        name, size = self.task.callers(problem)
        self._used.add(found := callers(self.limit_s, size, name))
        return found

    def start(self, problem: Problem) -> Ask:
        """A fresh episode."""
        return Ask("episode", problem, lambda episode: episode, self.task.episode, (problem,))

    def step(self, problem: Problem, episode: Episode, text: str) -> Ask:
        """The episode's Reply to a turn."""
        return Ask("step", problem, _checked_reply, episode.step, (text,))

    def outcome(self, problem: Problem, episode: Episode, end: End) -> Ask:
        """The episode's Outcome, of finite numbers."""
        return Ask("outcome", problem, _checked_outcome, episode.outcome, (end,))

    def close(self, problem: Problem, episode: Episode) -> Ask:
        """The episode's end; None."""
        return Ask("close", problem, lambda _: None, episode.close, ())

    def begin(self, ask: Ask) -> Future[Any]:
        """Start a call; `finished` hands it back once it is done, for `result`."""
        answer = self._callers(ask.problem).start(ask.call, *ask.args)
        answer.add_done_callback(self._done.put)
        return answer

    def finished(self, block: bool) -> list[Future[Any]]:
        """Calls that are done, each once, in the order in which they ended; `block`: at least one."""
        found: list[Future[Any]] = []
        self._leave_overdue()
        while block and self._done.empty() and not found:
            with suppress(Empty):
                found.append(self._done.get(timeout=min(one.patience() for one in self._used)))
            self._leave_overdue()
        while not self._done.empty():  # nobody else takes from it
            found.append(self._done.get())
        return found

    def result(self, ask: Ask, answer: Future[Any]) -> Any:
        """The checked result of a call that is done. Raises EpisodeError."""
        try:
            return ask.check(answer.result())
        except (Exception, SystemExit) as error:
            line = " ".join(f"{ask.what}: {_named(error)}".split())[:_LONGEST]
            self._tell(ask, error, line)
            raise (Overdue if isinstance(error, Overdue) else EpisodeError)(line) from error

    def ask(self, ask: Ask) -> Any:
        """Make one call and wait for it. Raises EpisodeError."""
        answer = self.begin(ask)
        self._callers(ask.problem).wait(answer)
        return self.result(ask, answer)

    def _leave_overdue(self) -> None:
        for one in self._used:
            one.leave_overdue()

    def _tell(self, ask: Ask, error: BaseException, line: str) -> None:
        """One line for every kind of failure; the metrics count all."""
        task = type(self.task).__name__
        if (kind := (task, ask.what, type(error).__name__)) not in _told:
            _told.add(kind)
            costs = "such a rollout gets a fresh try, then its group is dropped"
            costs = costs if ask.what != "close" else "what it held may stay"
            _log.warning("task %s, problem %s: %s; %s (said once)", task, ask.problem.id, line, costs)


def _named(error: BaseException) -> str:
    return str(error) if isinstance(error, (EpisodeError, TaskError)) else f"{type(error).__name__}: {error}"


def _checked_reply(reply: Reply) -> Reply:
    if not isinstance(reply, Reply):
        raise TaskError(f"step gives {reply!r:.60}, must be a Reply")
    said = reply.messages
    if not isinstance(said, (list, tuple)) or not all(isinstance(message, Message) for message in said):
        raise TaskError(f"the reply's messages are {said!r:.60}, must be a list of Message")
    for message in said:
        if message.role not in ("tool", "user") or not isinstance(message.content, str):
            raise TaskError(f"the reply has {message!r:.80}, whose role must be tool or user, and whose content a str")
    if not (isinstance(reply.calls, int) and isinstance(reply.errors, int)):
        raise TaskError(f"the reply's calls and errors are {reply.calls!r:.60} and {reply.errors!r:.60}, must be int")
    _finite("the turn's reward", reply.reward)
    return reply


def _checked_outcome(outcome: Outcome) -> Outcome:
    metrics = {str(name): _finite(f"the metric {name}", value) for name, value in outcome.metrics.items()}
    return Outcome(_finite("the reward", outcome.reward), bool(outcome.success), metrics)


def _finite(name: str, value: Any) -> float:
    if not math.isfinite(value):
        raise TaskError(f"{name} is {value}, must be a finite number")
    return float(value)
