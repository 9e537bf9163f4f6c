"""Episodes under both schedules: the same tokens, an engine that is kept at work, tools that wait for nobody, episodes closed."""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scripted_engine import Scripted

from gear_trainer.config import load_config
from gear_trainer.errors import RunError
from gear_trainer.rollout import Limits, Status, check_failures, engine_class, make_engine, roll_out
from gear_trainer.rollout.guard import callers
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import Episode, Message, Outcome, Problem, Reply, Task

DEMO = "gear_trainer/configs/mathapi_cpu.yaml"
SCHEDULES = ("lockstep", "continuous")


class Chat:
    """Token lists for texts, so that no tokenizer is needed: a reply of n messages is n tokens."""

    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))

    def prompt_ids(self, messages, tools=None, tags=()):
        return [len(messages)] * 3

    def escapes(self, messages, tags=()):
        return 0

    def observe(self, messages, room, reserve=0, tools=None):
        ids = [1000 + len(m.content) for m in messages]
        return SimpleNamespace(ids=ids, escaped=0, cut=0) if len(ids) <= room else None


class Talk(Task):
    """`turns` turns, each answered; what an episode does in a step, `act(episode, turn)`, is the test's."""

    max_turns = 5

    def __init__(self, act=lambda episode, turn: None, turns=4, concurrency=1):
        self.act, self.turns, self.concurrency, self.episodes = act, turns, concurrency, []

    def train_problem(self, index):
        return Problem(str(index), [{"role": "user", "content": "q"}], [{"role": "user", "content": "q"}], "")

    def held_out(self, count):
        return []

    def episode(self, problem):
        self.episodes.append(Talker(self, problem))
        return self.episodes[-1]


class Talker(Episode):
    def __init__(self, task, problem):
        self.task, self.problem, self.turn, self.ends, self.closed = task, problem, 0, [], 0
        self.number = len(task.episodes)

    def step(self, text):
        self.turn += 1
        said = self.task.act(self, self.turn)
        if said is not None:
            return said
        more = () if self.turn == self.task.turns else (Message("tool", "x" * (len(text) % 7)),)
        return Reply(more, calls=1, reward=float(len(text) % 3))

    def outcome(self, end):
        self.ends.append(end)
        return Outcome(float(self.turn % 2), self.turn % 2 == 1, {"turns": self.turn})

    def close(self):
        self.closed += 1


def play(task, schedule, engine=None, groups=1, size=4, timeout=None, new=64, length=1000):
    engine = engine or Scripted(None, None, slots=4)
    limits = Limits(size, 1.0, new, length, timeout, schedule)
    return roll_out(engine, Chat(), task, [(i, task.train_problem(i)) for i in range(groups)], limits, ("key",))


def test_a_problem_may_have_fewer_turns_than_its_task():
    task = Talk()
    task.train_problem = lambda i: Problem(str(i), [{"role": "user", "content": "q"}], [], "", max_turns=(2, 9, None)[i])
    for schedule in SCHEDULES:
        found = play(task, schedule, groups=3, size=1)
        assert [(r.turns, r.status) for r in found] == [(2, Status.TURNS), (4, Status.DONE), (4, Status.DONE)]
    assert [e.ends for e in task.episodes[:3]] == [["turns"], ["done"], ["done"]]


# --- schedules ----------------------------------------------------------------------------------------------------------


def test_both_schedules_sample_the_same_tokens_and_continuous_idles_less():
    """In the engine's own steps: 48 rollouts of 4 turns of 1 to 32 tokens on 12 slots, with tools that answer at once."""
    engines, rollouts = {}, {}
    for schedule in SCHEDULES:
        engines[schedule] = Scripted(None, None, slots=12)
        found = play(Talk(), schedule, engines[schedule], groups=12, size=4)
        rollouts[schedule] = [replace(r, problem=None) for r in found]
    assert rollouts["lockstep"] == rollouts["continuous"]
    assert {(r.group, r.sample, r.turns, r.status) for r in rollouts["continuous"]} == {
        (group, sample, 4, Status.DONE) for group in range(12) for sample in range(4)
    }
    step, flow = (engines[schedule] for schedule in SCHEDULES)
    assert step.busy == flow.busy == sum(len(r.policy_positions) for r in rollouts["lockstep"])
    print(f"idle: lockstep {step.idle_share:.3f} of {step.steps} steps, continuous {flow.idle_share:.3f} of {flow.steps}")
    assert flow.steps < step.steps and flow.idle_share < step.idle_share / 2


def test_one_slot_a_rollout_shows_what_a_batch_waits_for():
    """With a slot for each rollout lock-step waits for the longest turn of all, continuous for the longest rollout."""
    engines = {schedule: Scripted(None, None, slots=16) for schedule in SCHEDULES}
    rollouts = [play(Talk(), schedule, engine, groups=4, size=4) for schedule, engine in engines.items()]
    assert engines["continuous"].steps == max(len(r.policy_positions) for r in rollouts[0])
    turns = [[sum(m and t == turn for m, t in zip(r.mask, r.turn_ids, strict=True)) for r in rollouts[0]] for turn in range(4)]
    assert engines["lockstep"].steps == sum(map(max, turns)) > engines["continuous"].steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_retry_has_seeds_of_its_own_and_the_same_under_both_schedules(schedule):
    def act(episode, turn):
        if (episode.number, turn) == (1, 2):
            raise OSError("planted")

    task = Talk(act)
    rollouts = play(task, schedule)
    assert len(task.episodes) == 5 and not any(r.failed or r.dropped for r in rollouts)
    assert [len(r.failures) for r in rollouts] == [0, 1, 0, 0] and rollouts[1].failures[0].startswith("step: OSError: planted")
    assert rollouts[1].ids != play(Talk(), schedule)[1].ids and rollouts[0].ids == play(Talk(), "lockstep")[0].ids
    assert [replace(r, problem=None) for r in rollouts] == [replace(r, problem=None) for r in play(Talk(act), "lockstep")]


def test_the_default_follows_the_machine(monkeypatch):
    cfg = load_config(DEMO).rollout
    assert Limits.of(cfg).schedule == "lockstep" and Limits.of(cfg).max_failed_share == 0.5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Limits.of(cfg).schedule == "continuous"
    assert Limits.of(load_config(DEMO, ["rollout.schedule=lockstep"]).rollout).schedule == "lockstep"


def test_an_engine_that_only_generates_serves_both():
    class Whole(Scripted):
        submit, collect = Scripted.__mro__[1].submit, Scripted.__mro__[1].collect

        def generate(self, requests):
            return [self._turn(request) for request in requests]

    found = [[replace(r, problem=None) for r in play(Talk(), s, Whole(None, None), groups=3)] for s in SCHEDULES]
    assert found[0] == found[1]


def test_the_scripted_engine_by_name():
    cfg = load_config(DEMO, ["rollout.engine=scripted_engine:Scripted", "rollout.engine_options.slots=7"])
    assert make_engine(cfg, "folder").slots == 7 and issubclass(engine_class(cfg), Scripted)
    engine = make_engine(cfg, "folder")
    engine.push(iter([("a", None)]))
    rollout = play(Talk(), "continuous", engine)[0]
    assert rollout.turns == 4 and rollout.versions == [1 if policy else -1 for policy in rollout.mask]


# --- tools that take their time -----------------------------------------------------------------------------------------


def test_a_tool_that_sleeps_holds_up_no_other_episode():
    """It sleeps until all others are closed, whatever their turns; nothing here looks at a clock."""
    woken = threading.Event()

    class Counted(Talk):
        def episode(self, problem):
            episode = super().episode(problem)
            episode.close = lambda close=episode.close: (close(), sum(e.closed for e in self.episodes) == 7 and woken.set())
            return episode

    def act(episode, turn):
        if episode.number == 0 and turn == 1:
            assert woken.wait(300), "the others wait for this one"

    task = Counted(act, concurrency=2)
    rollouts = play(task, "continuous", size=8, timeout=600.0)
    assert woken.is_set() and all(r.status == Status.DONE and r.turns == 4 for r in rollouts)
    assert rollouts[0].ids == play(Talk(), "lockstep", size=8)[0].ids


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_many_tools_run_at_a_time_as_the_task_allows(schedule):
    barrier, lock, most, now = threading.Barrier(4), threading.Lock(), [0], [0]

    def act(episode, turn):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if turn == 1 and schedule == "lockstep":
            barrier.wait(300)  # passes if four are in here
        with lock:
            now[0] -= 1

    rollouts = play(Talk(act, concurrency=4), schedule, size=8, timeout=600.0)
    assert all(r.status == Status.DONE for r in rollouts) and most[0] <= 4


def test_with_a_concurrency_of_one_calls_come_in_the_order_of_the_rollouts():
    seen = []
    play(Talk(lambda episode, turn: seen.append((turn, episode.number, threading.get_ident()))), "lockstep", timeout=600.0)
    assert [(turn, number) for turn, number, _ in seen] == [(t, n) for t in range(1, 5) for n in range(4)]
    assert len({thread for *_, thread in seen}) == 1 and seen[0][2] != threading.get_ident()


class Part(Talk):
    """Half of a mixture, whose calls `act` is told of; its arguments have no annotations."""

    act = staticmethod(lambda episode, turn: None)

    def __init__(self, seed=0, slow=False):
        super().__init__(lambda episode, turn: Part.act(episode, turn))
        self.slow = slow


def test_a_slow_part_of_a_mixture_holds_up_no_other(monkeypatch):
    """A call of the slow part is at work until the quick part's four episodes took their last turn; nothing looks at a clock."""
    quick_ended, slow_threads, last_turns, at_work = threading.Event(), set(), [], []

    def act(episode, turn):
        if episode.task.slow:
            at_work.append(episode)
            slow_threads.add(threading.get_ident())
            assert len(at_work) == 1 and quick_ended.wait(300), "the quick part's episodes wait for this call"
            at_work.remove(episode)
        elif turn == episode.task.turns:
            last_turns.append(episode)
            if len(last_turns) == 4:
                quick_ended.set()

    monkeypatch.setattr(Part, "act", staticmethod(act))
    parts = {"slow": {"task": "test_rollouts:Part", "args": {"slow": True}}, "quick": {"task": "test_rollouts:Part"}}
    rollouts = play(make_task("mixture", 0, {"parts": parts}), "continuous", groups=2, size=4, timeout=600.0)
    assert all(r.status == Status.DONE and r.turns == 4 and not r.failures for r in rollouts)
    assert sorted(r.problem.category for r in rollouts) == ["quick"] * 4 + ["slow"] * 4
    assert len(last_turns) == 4 and len(slow_threads) == 1


# --- async --------------------------------------------------------------------------------------------------------------


class Async(Talk):
    def episode(self, problem):
        self.episodes.append(AsyncTalker(self, problem))
        return self.episodes[-1]


class AsyncTalker(Talker):
    async def step(self, text):
        self.loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        await self.task.act(self, self.turn + 1) if self.task.act else None
        self.turn += 1
        return Reply() if self.turn == self.task.turns else Reply([Message("user", "and?")])

    async def outcome(self, end):
        assert asyncio.get_running_loop() is self.loop
        return super().outcome(end)

    async def close(self):
        super().close()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timeout", [None, 600.0])
def test_async_episodes_are_awaited_in_one_loop(schedule, timeout):
    task = Async(None, concurrency=4)
    rollouts = play(task, schedule, timeout=timeout)
    assert all(r.status == Status.DONE and r.turns == 4 for r in rollouts)
    assert len({id(e.loop) for e in task.episodes}) == 1 and [e.closed for e in task.episodes] == [1] * 4


def test_async_steps_run_side_by_side():
    here = []

    async def meet(episode, turn):
        here.append(episode.number)
        while turn == 1 and len(set(here)) < 4:  # all four have to be in their first turn
            await asyncio.sleep(0.001)

    assert all(r.status == Status.DONE for r in play(Async(meet, concurrency=4), "lockstep", timeout=600.0))


def test_an_async_step_that_hangs_is_cancelled_and_one_that_blocks_the_loop_is_left():
    cancelled, never = [], threading.Event()

    async def hang(episode, turn):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(episode.number)
            raise

    async def block(episode, turn):
        never.wait(3600)

    rollouts = play(Async(hang), "lockstep", size=2, timeout=0.2)
    assert all(r.failed and "no answer within 0.2 s (rollout.turn_timeout)" in r.failures[0] for r in rollouts)
    assert play(Async(block), "lockstep", size=2, timeout=0.2)[0].failed
    assert play(Async(None), "lockstep", size=2, timeout=60.0)[0].status == Status.DONE, "a fresh loop took over"
    assert sorted(cancelled) == [0, 1, 2, 3]
    never.set()


# --- ends ---------------------------------------------------------------------------------------------------------------


def broken(episode, turn):
    raise OSError("away")


ENDS = {
    "done": (lambda: Talk(), {}, ["done"], Status.DONE),
    "turns": (lambda: Talk(turns=9), {}, ["turns"], Status.TURNS),
    "a turn is cut": (lambda: Talk(), {"new": 1}, ["length"], Status.LENGTH),
    "no room for a reply": (lambda: Talk(lambda e, t: Reply([Message("tool", "x")] * 900)), {}, ["length"], Status.LENGTH),
    "no room for a turn": (lambda: Talk(), {"length": 2}, ["length"], Status.LENGTH),
    "step raises": (lambda: Talk(broken), {}, ["error"], Status.ERROR),
    "step answers nonsense": (lambda: Talk(lambda e, t: "text"), {}, ["error"], Status.ERROR),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timeout", [None, 600.0])
@pytest.mark.parametrize("way", ENDS)
def test_every_episode_is_told_its_end_once_and_closed(schedule, timeout, way):
    make, more, ends, status = ENDS[way]
    task = make()
    rollouts = play(task, schedule, timeout=timeout, **more)
    assert {r.status for r in rollouts} == {status}
    assert (r := rollouts[0]).truncated == (status == "length") and r.failed == r.dropped == (status == "error")
    assert [e.ends for e in task.episodes] == [ends] * len(task.episodes) and {e.closed for e in task.episodes} == {1}
    assert len(task.episodes) == (8 if status == "error" else 4)
    assert r.metrics == {"turns": task.episodes[-1].turn} and (r.reward == 0.0 or not r.failed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_episode_that_hangs_is_closed_while_it_hangs_and_not_scored(schedule):
    freed = {}

    def hang(episode, turn):
        if turn == 2:
            freed[episode.number] = threading.Event()
            freed[episode.number].wait(3600)

    task = Talk(hang)
    before = callers(0.2, 1, "").abandoned
    rollouts = play(task, schedule, size=2, timeout=0.2)
    assert all(r.failed and r.turns == 1 for r in rollouts) and callers(0.2, 1, "").abandoned == before + 4
    assert [(e.ends, e.closed) for e in task.episodes] == [([], 1)] * 4
    for event in freed.values():
        event.set()


def test_an_episode_that_comes_too_late_is_closed_when_it_comes():
    late, closed = threading.Event(), threading.Event()

    class Slow(Talk):
        def episode(self, problem):
            late.wait(3600)
            episode = super().episode(problem)
            episode.close = closed.set
            return episode

    (rollout,) = play(Slow(), "lockstep", size=1, timeout=0.2)
    assert rollout.failed and rollout.failures[0].startswith("episode: no answer within") and not closed.is_set()
    late.set()
    assert closed.wait(300)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_outcome_or_a_close_that_breaks(schedule, caplog):
    """The first costs the rollout, the second nothing but a line."""

    class Unscored(Talk):
        def episode(self, problem):
            episode = super().episode(problem)
            episode.outcome = lambda end: 1 / 0
            return episode

    class Stuck(Talk):
        def episode(self, problem):
            episode = super().episode(problem)
            episode.close = lambda: 1 / 0
            return episode

    task = Unscored()
    rollouts = play(task, schedule)
    assert all(r.failed and r.failures == ["outcome: ZeroDivisionError: division by zero"] * 2 for r in rollouts)
    assert [e.closed for e in task.episodes] == [1] * 8
    rollouts = play(Stuck(), schedule)
    assert not any(r.failures for r in rollouts) and {r.status for r in rollouts} == {Status.DONE}
    assert not caplog.records or "what it held may stay" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timeout", [None, 600.0])
def test_an_engine_that_raises_leaves_no_episode_open(schedule, timeout):
    class Dies(Scripted):
        def collect(self):
            if self.steps == 40:
                raise RuntimeError("the engine died")
            return super().collect()

    task = Talk()
    with pytest.raises(RuntimeError, match="the engine died"):
        play(task, schedule, Dies(None, None), timeout=timeout)
    assert len(task.episodes) == 4 and [e.closed for e in task.episodes] == [1] * 4


# --- a share too large --------------------------------------------------------------------------------------------------


def test_the_run_ends_where_more_than_a_share_of_its_rollouts_fails():
    def act(episode, turn):
        if episode.problem.id == "1":
            broken(episode, turn)

    rollouts = play(Talk(act), "lockstep", groups=2)
    limits = Limits.of(load_config(DEMO).rollout)
    check_failures(rollouts, limits)  # a half, which is not more than that
    check_failures([], limits)
    said = r"^4 of 8 rollouts failed twice, more than rollout.max_failed_share=0.25, the first as "
    said += r"'step: OSError: away': mend [^\n]*$"
    with pytest.raises(RunError, match=said):
        check_failures(rollouts, replace(limits, max_failed_share=0.25))
    with pytest.raises(ValueError, match=re.escape("rollout.max_failed_share=2")):
        load_config(DEMO, ["rollout.max_failed_share=2"])
