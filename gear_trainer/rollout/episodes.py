"""Episodes from their prompts to their outcomes, lock-step or continuously.

A rollout's way is written once, as a generator (`Course`) that hands out what it waits for: a turn of the engine, or a call of
its environment. Two drivers bring what was asked for. Lock-step takes all rollouts to their next turn and samples these in one
batch. Continuous keeps the engine at work: what ended in a step goes to its environment, and once that has answered, the next
request joins the running batch. A turn's seed is that of its (group, sample, turn), so that an engine that honours seeds samples
the same tokens either way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any

from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.engine import Engine
from gear_trainer.rollout.guard import Ask, Environment, EpisodeError, Overdue
from gear_trainer.rollout.types import Completion, Limits, Request, Rollout, Status, seed_of
from gear_trainer.tasks.base import Episode, Outcome, Problem, Reply, Task


def roll_out(
    engine: Engine, chat: Chat, task: Task, problems: Iterable[tuple[int, Problem]], limits: Limits, key: tuple[object, ...]
) -> list[Rollout]:
    """Sample `limits.group_size` episodes for each (group index, problem), as `limits.schedule` says.

    A rollout whose environment breaks off is tried once more from its prompt, under other seeds. Where that fails too it is
    `failed`, without reward or success, and its whole group `dropped`. Every episode is closed, also where the engine raises.
    """
    rollouts = [
        Rollout(p, group, k, prompt, teacher, escaped=escaped)
        for group, p in problems
        for prompt, teacher, escaped in [_prompts(chat, p, limits)]
        for k in range(limits.group_size)
    ]
    _play(engine, chat, task, rollouts, limits, key)
    if broken := [i for i, r in enumerate(rollouts) if r.failed]:
        again = [_fresh(rollouts[i]) for i in broken]
        _play(engine, chat, task, again, limits, (*key, "again"))
        for i, rollout in zip(broken, again, strict=True):
            rollouts[i] = rollout
        lost = {r.group for r in rollouts if r.failed}
        for rollout in rollouts:
            rollout.dropped = rollout.group in lost
    return rollouts


def _prompts(chat: Chat, problem: Problem, limits: Limits) -> tuple[list[int], list[int], int]:
    """Both prompts, and how many texts were escaped in them. One that leaves no room for a turn is cut to the context: it ends as
    `length`, and nothing is sampled behind it."""
    student, teacher = (chat.prompt_ids(m, problem.tools, problem.tags) for m in (problem.messages, problem.teacher_messages))
    if len(student) >= limits.max_model_len:
        student, teacher = student[: limits.max_model_len], teacher[: limits.max_model_len]
    return student, teacher, sum(chat.escapes(m, problem.tags) for m in (problem.messages, problem.teacher_messages))


def _fresh(r: Rollout) -> Rollout:
    """The same rollout at its start; what was counted of its first try stays."""
    again = Rollout(r.problem, r.group, r.sample, r.prompt_ids, r.teacher_prompt_ids)
    again.escaped, again.cut, again.failures = r.escaped, r.cut, r.failures
    return again


def _play(engine: Engine, chat: Chat, task: Task, rollouts: list[Rollout], limits: Limits, key: tuple[object, ...]) -> None:
    """One try of every rollout, from its prompt to its outcome."""
    world = Environment(task, limits.turn_timeout)
    drive(engine, [Course(r, chat, world, limits, key) for r in rollouts], world, limits)


def drive(engine: Engine, courses: list[Course], world: Environment, limits: Limits) -> None:
    """Take courses to their ends, as `limits.schedule` says. Every episode is closed, also where the engine raises."""
    try:
        (continuous if limits.schedule == "continuous" else lockstep)(engine, courses, world)
    finally:
        for course in courses:
            course.abandon()


# --- one rollout --------------------------------------------------------------------------------------------------------


class Course:
    """One try of a rollout. `waits_for`: the turn or the call that it cannot go on without; None at its end."""

    def __init__(self, rollout: Rollout, chat: Chat, world: Environment, limits: Limits, key: tuple[object, ...]):
        self.rollout, self.chat, self.world, self.limits, self.key = rollout, chat, world, limits, key
        self.episode: Episode | None = None  # while it is open
        self._way = self._whole()
        self.waits_for: Request | Ask | None = next(self._way)

    def call(self) -> Future[Any]:
        """Start the call that is waited for."""
        assert isinstance(self.waits_for, Ask)
        if self.waits_for.what == "close":
            self.episode = None
        return self.world.begin(self.waits_for)

    def take(self, answer: Future[Any]) -> None:
        """Go on with what that call came to."""
        assert isinstance(self.waits_for, Ask)
        try:
            value = self.world.result(self.waits_for, answer)
        except EpisodeError as error:
            self._advance(self._way.throw, error)
        else:
            self.go_on(value)

    def go_on(self, value: Any) -> None:
        """Take what was waited for."""
        self._advance(self._way.send, value)

    def abandon(self) -> None:
        """Close the episode where a driver was broken off before its end."""
        self._way.close()
        if self.episode is not None:
            with suppress(EpisodeError):
                self.world.ask(self.world.close(self.rollout.problem, self.episode))

    def _advance(self, move: Callable[[Any], Request | Ask], value: Any) -> None:
        try:
            self.waits_for = move(value)
        except StopIteration:
            self.waits_for = None

    def _whole(self) -> Generator[Request | Ask, Any, None]:
        r, world = self.rollout, self.world
        try:
            self.episode = episode = yield world.start(r.problem)
            yield from self._scored(episode)
        except EpisodeError as error:
            self._broken(error)
        if self.episode is not None:
            with suppress(EpisodeError):  # the guard has said it; what the rollout earned is known
                yield world.close(r.problem, self.episode)

    def _scored(self, episode: Episode) -> Generator[Request | Ask, Any, None]:
        r = self.rollout
        try:
            r.status = yield from self._turns(episode)
        except Overdue:
            raise  # the call goes on: no other is made beside it
        except EpisodeError as error:
            self._broken(error)
        try:
            earned: Outcome = yield self.world.outcome(r.problem, episode, r.status.value)
        except EpisodeError:
            if not r.failed:
                raise
            return
        r.metrics = earned.metrics
        if not r.failed:
            r.reward, r.success = earned.reward, earned.success

    def _broken(self, error: EpisodeError) -> None:
        self.rollout.failures = [*self.rollout.failures, str(error)]
        self.rollout.status = Status.ERROR

    def _turns(self, episode: Episode) -> Generator[Request | Ask, Any, Status]:
        """Sample turns and have them answered, until one side ends it."""
        r, limits, most = self.rollout, self.limits, self.world.task.max_turns
        most = min(r.problem.max_turns or most, most)
        for turn in range(most):
            if limits.room(r) <= 0:  # the prompt fills the context
                return Status.LENGTH
            completion = yield from self.turn(turn)
            r.append(completion.ids, completion.logprobs, completion.token_versions)
            r.turn_rewards.append(0.0)
            if not completion.ended:
                return Status.LENGTH
            reply: Reply = yield self.world.step(r.problem, episode, self.chat.tokenizer.decode(completion.ids[:-1]))
            r.turn_rewards[-1] = reply.reward
            r.calls += reply.calls
            r.errors += reply.errors
            r.turns += 1
            if not reply.messages:
                return Status.DONE
            if turn + 1 < most and not self._answer(reply):
                return Status.LENGTH
        return Status.TURNS

    def turn(self, turn: int, begun: Sequence[int] = ()) -> Generator[Request | Ask, Any, Completion]:
        """Sample a turn, or what follows the tokens that it begins with; the completion is of the latter alone."""
        r, limits = self.rollout, self.limits
        seed, room = seed_of(*self.key, r.group, r.sample, turn), limits.room(r) - len(begun)
        return (yield Request([*r.prompt_ids, *r.ids, *begun], room, seed, limits.temperature, limits.top_p))

    def _answer(self, reply: Reply) -> bool:
        """Append a reply, cut where it does not fit with a turn behind it; False where even that is too much."""
        r, limits = self.rollout, self.limits
        left = limits.left(r)
        reserve = min(limits.max_new_tokens, left // 2)
        observation = self.chat.observe(reply.messages, left - 1, reserve, r.problem.tools)
        if observation is None:
            return False
        r.escaped += observation.escaped
        r.cut += observation.cut
        r.append(observation.ids, None)
        r.anchors.append(seed_of(observation.ids))
        return True


# --- drivers ------------------------------------------------------------------------------------------------------------


def lockstep(engine: Engine, courses: list[Course], world: Environment) -> None:
    """Every turn of all rollouts in one batch: an environment that takes its time holds up the others' next turn."""
    calls: dict[Future[Any], Course] = {}
    ready = courses
    while ready:
        _call(ready, calls)
        while calls:
            _call(_answered(calls, world, block=True), calls)
        asking = [(course, course.waits_for) for course in courses if isinstance(course.waits_for, Request)]
        ready = [course for course, _ in asking]
        completions = engine.generate([request for _, request in asking]) if asking else []
        for course, completion in zip(ready, completions, strict=True):
            course.go_on(completion)


def continuous(engine: Engine, courses: list[Course], world: Environment) -> None:
    """A finished turn's next request joins the running batch as soon as its environment has answered."""
    calls: dict[Future[Any], Course] = {}
    sampling: dict[int, Course] = {}
    tickets = count()
    ready = courses
    while ready or calls or sampling:
        while ready:  # what is answered at once goes on at once
            _call(ready, calls)
            for course in ready:
                if isinstance(course.waits_for, Request):
                    engine.submit(ticket := next(tickets), course.waits_for)
                    sampling[ticket] = course
            ready = _answered(calls, world, block=False)
        for ticket, completion in engine.collect() if sampling else []:
            course = sampling.pop(ticket)
            course.go_on(completion)
            ready.append(course)
        ready += _answered(calls, world, block=not (ready or sampling))


def _call(ready: list[Course], calls: dict[Future[Any], Course]) -> None:
    """Start the calls that courses wait for, in their order."""
    for course in ready:
        if isinstance(course.waits_for, Ask):
            calls[course.call()] = course


def _answered(calls: dict[Future[Any], Course], world: Environment, block: bool) -> list[Course]:
    """Hand courses what their calls came to, and return them; `block`: one at least, where there are calls."""
    moved = []
    for answer in world.finished(block and bool(calls)):
        moved.append(calls.pop(answer))
        moved[-1].take(answer)
    return moved
