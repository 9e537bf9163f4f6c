"""Where a rollout leaves the solution: the first turn after which it is out of reach, and the character that says so."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence

from gear_trainer.tasks.base import Deviation
from gear_trainer.tasks.bfcl.one_class import NAMES
from gear_trainer.tasks.chains.world import DONE, PARAMETERS, Chain, ChainEpisode
from gear_trainer.tasks.tool_calls import call_turn


def deviation(chain: Chain, turns: Sequence[str], max_turns: int) -> Deviation | None:
    """The deviation of a rollout; None of one that never left the ways to the solution.

    turns: the texts of its turns, one that was cut among them. max_turns: of an episode. Within a turn the solution counts as
    within reach as long as the text begins a call, or an end, after which it is: a call that is begun is taken to be finished.
    """
    episode = ChainEpisode(chain, max_turns)
    for at, text in enumerate(turns):
        episode.step(text)
        if not episode.in_reach():
            return Deviation(at, _shared(ChainEpisode(chain, max_turns), turns[:at], text))
    return None


def _shared(episode: ChainEpisode, before: Sequence[str], text: str) -> int:
    """The longest beginning that a turn after those before shares with one after which the solution is within reach."""
    for earlier in before:
        episode.step(earlier)
    fine: dict[tuple[str, ...], bool] = {}
    longest = 0
    for kind, way in _ways(episode.chain):
        if kind not in fine:
            trial = copy.deepcopy(episode)
            trial.step(way)
            fine[kind] = trial.in_reach()
        if fine[kind]:
            longest = max(longest, len(os.path.commonprefix([text, way])))
    return longest


def _ways(chain: Chain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every turn that a chain's tools allow, and its kind: names that the chain has not are all alike."""
    yield (DONE,), DONE
    known = {*chain.notes, chain.folder}
    for name, slots in PARAMETERS.items():
        if not slots:
            yield (name,), call_turn(name, {})
        for first in NAMES if slots else ():
            kind = (name, first if first in known else "")
            if len(slots) == 1:
                yield kind, call_turn(name, {slots[0]: first})
            for second in NAMES if len(slots) == 2 else ():
                yield (*kind, second if second == chain.folder else ""), call_turn(name, {slots[0]: first, slots[1]: second})
