"""V after the tokens of sampled trajectories, by Monte-Carlo continuations of replayed episodes (docs/audit.md says the rule).

V_t = P(success | everything up to and including token t) under the sampling policy. A *state* is a token that the policy was not
certain of with the certain ones after it, which share its V; state 0 is the prompt. V is estimated at some states, the *cuts*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gear_trainer.errors import RunError
from gear_trainer.rollout import Completion, Engine, Limits, Request, Rollout
from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.episodes import Course, drive
from gear_trainer.rollout.guard import Ask, Environment, EpisodeError
from gear_trainer.tasks.base import Task

CERTAIN = math.log1p(-1e-4)  # nats: a token of more log-prob shares its predecessor's V
APART = 2.0  # standard errors: between two cuts that differ by more another one is made


class Estimate(NamedTuple):
    """V at a cut, and the variance of its estimate, with one success and one failure added: 64 of 64 would have none."""

    value: float
    variance: float

    @classmethod
    def of(cls, successes: int, continuations: int) -> Estimate:
        """The estimate that the continuations of a cut came to."""
        share = (successes + 1) / (continuations + 2)
        return cls(successes / continuations, share * (1 - share) / continuations)

    def differs(self, other: Estimate) -> bool:
        """True where the two are more than `APART` standard errors of their difference apart."""
        return abs(self.value - other.value) > APART * math.sqrt(self.variance + other.variance)


class Values(NamedTuple):
    """V along a trajectory: v0 before its first token, `value` after each token of its ids (NaN outside the mask; after the last
    one of the policy the success itself); the cuts that were made for it and those that could not be continued."""

    v0: float
    value: list[float]
    cuts: int
    lost: int


# --- one continuation ---------------------------------------------------------------------------------------------------


class Continuation(Course):
    """A fresh episode that is led through the first `cut` tokens of a recorded trajectory, then sampled on to its end.

    Its turns up to there are the recorded ones; one that the cut goes through is sampled on behind its tokens. Where the
    environment answers otherwise than it did, the continuation fails.
    """

    def __init__(
        self, recorded: Rollout, cut: int, chat: Chat, world: Environment, limits: Limits, key: tuple[object, ...]
    ) -> None:
        self.recorded, self.cut, self.replays = recorded, cut, True
        own = Rollout(recorded.problem, recorded.group, recorded.sample, recorded.prompt_ids, recorded.teacher_prompt_ids)
        super().__init__(own, chat, world, limits, key)

    def turn(self, turn: int, begun: Sequence[int] = ()) -> Generator[Request | Ask, Any, Completion]:
        """The recorded turn, what follows its part before the cut, or a turn of its own."""
        if not self.replays:
            return (yield from super().turn(turn, begun))
        recorded, start = self.recorded, len(self.rollout.ids)
        if self.rollout.ids != recorded.ids[:start]:
            raise EpisodeError("replay: the environment answered otherwise than in the trajectory")
        end = start
        while end < len(recorded.ids) and recorded.mask[end] and recorded.turn_ids[end] == turn:
            end += 1
        own = slice(start, max(start, min(end, self.cut)))
        ids, logprobs = recorded.ids[own], recorded.sampler_logprobs[own]
        if start < end <= self.cut:
            return Completion(ids, logprobs, ended=True)
        self.replays = False
        more = yield from super().turn(turn, ids)
        return Completion(ids + more.ids, logprobs + more.logprobs, more.ended, more.version)

    @property
    def why_lost(self) -> str | None:
        """The reason why nothing is known of its outcome; None where it is."""
        if self.rollout.failed:
            return self.rollout.failures[-1]
        if self.rollout.ids[: self.cut] != self.recorded.ids[: self.cut]:
            return "replay: the episode ended before the trajectory did"
        return None


class Estimator:
    """Estimates V after the first tokens of trajectories, from `continuations` of each.

    Equal beginnings within a group are continued once: the first that asks names the seeds, which are functions of (key, problem,
    sample, cut, number of the continuation, turn). at_once: continuations that are open at a time, those of one cut at least.
    `lost` counts cuts of which a continuation failed, `made` all.
    """

    def __init__(
        self, engine: Engine, chat: Chat, task: Task, limits: Limits, key: tuple[object, ...], continuations: int, at_once: int
    ):
        self.engine, self.chat, self.limits, self.key = engine, chat, limits, key
        self.world = Environment(task, limits.turn_timeout)
        self.continuations, self.together = continuations, max(1, at_once // continuations)
        self.found: dict[tuple[int, tuple[int, ...]], Estimate | None] = {}
        self.made = self.lost = 0
        self.why = ""  # the first cut was lost

    def __call__(self, cuts: Sequence[tuple[Rollout, int]]) -> list[Estimate | None]:
        """V after the first `cut` ids of each (trajectory, cut); None where it could not be continued."""
        names = [(r.group, tuple(r.ids[:cut])) for r, cut in cuts]
        fresh = {name: cut for name, cut in zip(reversed(names), reversed(cuts), strict=True) if name not in self.found}
        asked = [name for name in dict.fromkeys(names) if name in fresh]
        for at in range(0, len(asked), self.together):
            part = asked[at : at + self.together]
            self.found |= zip(part, self._continued([fresh[name] for name in part]), strict=True)
        return [self.found[name] for name in names]

    def _continued(self, cuts: list[tuple[Rollout, int]]) -> list[Estimate | None]:
        numbers = range(self.continuations)
        courses = [[self._course(r, cut, m) for m in numbers] for r, cut in cuts]
        drive(self.engine, [course for own in courses for course in own], self.world, self.limits)
        return [self._estimate(own) for own in courses]

    def _course(self, recorded: Rollout, cut: int, number: int) -> Continuation:
        return Continuation(recorded, cut, self.chat, self.world, self.limits, (*self.key, cut, number))

    def _estimate(self, courses: list[Continuation]) -> Estimate | None:
        self.made += 1
        if why := next((course.why_lost for course in courses if course.why_lost), None):
            self.lost, self.why = self.lost + 1, self.why or why
            return None
        return Estimate.of(sum(course.rollout.success for course in courses), self.continuations)

    def check(self) -> None:
        """Raise RunError where more cuts were lost than the limits' `max_failed_share`: V would be a guess."""
        if self.lost > self.limits.max_failed_share * self.made:
            raise RunError(
                f"{self.lost} of {self.made} cuts could not be continued, more than rollout.max_failed_share="
                f"{self.limits.max_failed_share:g}, the first as {self.why!r}: an audit replays episodes, so the task must "
                "answer the same turns with the same words; mend it, then the same command goes on"
            )


# --- along a trajectory -------------------------------------------------------------------------------------------------


def states(rollout: Rollout) -> list[list[int]]:
    """The places in `ids` of the policy's tokens, by state: first the certain ones that share V_0, which may be none."""
    found: list[list[int]] = [[]]
    for place in rollout.policy_positions:
        if rollout.sampler_logprobs[place] <= CERTAIN:
            found.append([])
        found[-1].append(place)
    return found


class Track:
    """V along one trajectory, as far as it is known. `stride`: every so many-th state is among its first cuts."""

    def __init__(self, rollout: Rollout, stride: int):
        self.rollout, self.stride, self.states = rollout, stride, states(rollout)
        self.known: dict[int, Estimate] = {}
        self.lost: set[int] = set()

    def wanted(self) -> list[int]:
        """The states to be estimated next; none where V is known well enough.

        First the prompt, the last state of each turn, and every `stride`-th one. Then, between two neighbours that differ, the
        middle one of those between. The last state's V is the success, which needs no estimate.
        """
        last = len(self.states) - 1
        if not self.known and not self.lost:
            if last:
                self.known[last] = Estimate(float(self.rollout.success), 0.0)
            turns = [self.rollout.turn_ids[own[0]] if own else -1 for own in self.states]
            ends = {state for state, (turn, after) in enumerate(pairwise(turns)) if turn != after}
            return sorted({0, *ends, *range(0, last, self.stride)} - {last} | {0})
        return list(self._between())

    def _between(self) -> Iterator[int]:
        for before, after in pairwise(sorted(self.known)):
            open_ = [state for state in range(before + 1, after) if state not in self.lost]
            if open_ and self.known[before].differs(self.known[after]):
                yield open_[len(open_) // 2]

    def cut(self, state: int) -> int:
        """The number of `ids` before which a state's V holds."""
        return self.states[state][-1] + 1 if state else 0

    def take(self, state: int, found: Estimate | None) -> None:
        """Keep what a cut came to; None: it was lost."""
        if found is None:
            self.lost.add(state)
        else:
            self.known[state] = found

    def values(self) -> Values | None:
        """V after each token, evenly between the cuts where nothing says more; None where V_0 is not known."""
        if 0 not in self.known:
            return None
        known = sorted(self.known)
        at = np.interp(range(len(self.states)), known, [self.known[state].value for state in known])
        value = [math.nan] * len(self.rollout.ids)
        for own, v in zip(self.states, at, strict=True):
            for place in own:
                value[place] = float(v)
        if own := self.rollout.policy_positions:
            value[own[-1]] = float(self.rollout.success)
        return Values(self.known[0].value, value, len(self.known) + len(self.lost), len(self.lost))


def estimate(
    rollouts: Sequence[Rollout], estimator: Estimator, stride: int, tell: Callable[[int], None] = lambda made: None
) -> list[Values | None]:
    """V along each trajectory, with cuts where it moves; None where the prompt itself could not be continued.

    tell: hears of the number of cuts that were made, between rounds. Raises RunError where too many cuts are lost.
    """
    tracks = [Track(r, stride) for r in rollouts]
    while wanted := [(track, state) for track in tracks for state in track.wanted()]:
        found = estimator([(track.rollout, track.cut(state)) for track, state in wanted])
        for (track, state), v in zip(wanted, found, strict=True):
            track.take(state, v)
        tell(estimator.made)
    estimator.check()
    return [track.values() for track in tracks]
