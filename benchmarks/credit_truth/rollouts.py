"""Audited trajectories as packed arrays of their policy tokens: the truth of each token's credit, and what a method may read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gear_trainer.audit import file
from gear_trainer.errors import ConfigError

CORRECTED = "truth-wrong"  # the signal under the truth less the signal under a wrong answer
_ODD, _GOLDEN = np.uint64(0xD1342543DE82EF95), np.uint64(0x9E3779B97F4A7C15)


class Table(NamedTuple):
    """The coordinates of a table policy's gradient: C pairs of a state and a token that was sampled there.

    state [n] and pair [n] are those of each token; of [C], p [C] and problem [C] each pair's state, probability and problem.
    """

    state: np.ndarray
    pair: np.ndarray
    of: np.ndarray
    p: np.ndarray
    problem: np.ndarray


@dataclass(frozen=True)
class Rollouts:
    """Trajectories, B of them with n policy tokens in all, packed one after the other.

    rows [B]: advantage (GRPO's), reward, success, v0, samples (M), deviation (counted in the trajectory's policy tokens; -1 none,
    -2 unknown), group, problem (numbered from 0). tokens [n]: action (the id), logprobs, entropy, value, turn, state (a hash of
    the problem and all tokens before), anchor (a hash of what the turn answers). teachers: by name the [n] columns k1,
    reverse_kl, forward_kl, teacher_entropy (nats), 0 where `shown` [B] is False. kept: what measures work out once for all
    methods.
    """

    lengths: np.ndarray
    rows: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    teachers: dict[str, dict[str, np.ndarray]]
    shown: dict[str, np.ndarray]
    kept: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def bounds(self) -> np.ndarray:
        """The first token of each trajectory and the end, int64 [B + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def trajectory(self) -> np.ndarray:
        """The trajectory of each token, int64 [n]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def truth(self) -> np.ndarray:
        """A*_t = V_t - V_{t-1}, float64 [n]; a trajectory's sum is its success less V_0."""
        return np.round(self.tokens["value"] - self._before, 6)  # equal differences stay equal: ranks have ties

    @cached_property
    def _before(self) -> np.ndarray:
        value = self.tokens["value"]
        before = np.concatenate([[0.0], value[:-1]])
        before[self.bounds[:-1]] = self.rows["v0"]
        return before

    @cached_property
    def error(self) -> np.ndarray:
        """The standard error of A*, float64 [n]: of two shares of M continuations, each with a success and a failure added.

        Without these, 64 of 64 would have no error. The last token's value is the outcome, without error.
        """
        many = self.rows["samples"][self.trajectory]
        after = _variance(self.tokens["value"], many)
        after[self.bounds[1:] - 1] = 0
        return np.sqrt(after + _variance(self._before, many))

    @cached_property
    def decided(self) -> np.ndarray:
        """Tokens whose A* is further from 0 than 3 standard errors, bool [n]."""
        return np.abs(self.truth) > 3 * self.error

    @cached_property
    def deviation(self) -> np.ndarray:
        """The packed place of each trajectory's deviation, int64 [B]; -1 where there is none or none is known."""
        own = self.rows["deviation"]
        return np.where(own >= 0, self.bounds[:-1] + own, -1)

    @cached_property
    def table(self) -> Table:
        """The policy as a table: a row of logits for each state, of which only the sampled tokens' are known."""
        states, state = np.unique(self.tokens["state"], return_inverse=True)
        pairs, pair = np.unique(state * (1 << 31) + self.tokens["action"], return_inverse=True)  # both fit into 63 bits
        problem = np.empty(len(states), dtype=np.int64)
        problem[state] = self.over_tokens(self.rows["problem"])
        p = np.bincount(pair, weights=np.exp(self.tokens["logprobs"])) / np.bincount(pair)
        return Table(state, pair, pairs >> 31, p, problem[pairs >> 31])

    def over_tokens(self, row: np.ndarray) -> np.ndarray:
        """A value a trajectory [B] on each of its tokens [n]."""
        return row[self.trajectory]

    def sums(self, x: np.ndarray) -> np.ndarray:
        """The sum of x [n] over each trajectory, float64 [B]."""
        return np.add.reduceat(x.astype(np.float64), self.bounds[:-1])  # no trajectory is empty; ten times a bincount's speed

    def take(self, keep: np.ndarray) -> Rollouts:
        """The trajectories where keep [B] is True."""
        tokens = keep[self.trajectory]
        rows = {name: x[keep] for name, x in self.rows.items()}
        return replace(
            self,
            lengths=self.lengths[keep],
            rows=rows | {"problem": np.unique(rows["problem"], return_inverse=True)[1]},
            tokens={name: x[tokens] for name, x in self.tokens.items()},
            teachers={t: {name: x[tokens] for name, x in columns.items()} for t, columns in self.teachers.items()},
            shown={name: x[keep] for name, x in self.shown.items()},
            kept={},
        )


def _variance(value: np.ndarray, many: np.ndarray) -> np.ndarray:
    share = (value * many + 1) / (many + 2)
    return share * (1 - share) / many


# --- reading ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[Rollouts, dict[str, Any]]:
    """A file's trajectories that have policy tokens, and what the file says about itself. Raises ConfigError on bad data."""
    table, about = file.read(path)
    lists = {name: table[name].combine_chunks() for name in file.LISTS}
    sizes = _sizes(lists["ids"])
    for name, column in lists.items():
        wrong = np.flatnonzero(_sizes(column)[(valid := _valid(column))] != sizes[valid])
        if len(wrong):
            raise ConfigError(f"{path}: {name}: a list of trajectory {np.flatnonzero(valid)[wrong[0]]} is not as long as its ids")
    mask = _flat(lists["mask"]).astype(bool)
    row = np.repeat(np.arange(len(sizes)), sizes)
    asked = zip(table["step"].to_pylist(), table["problem"].to_pylist(), strict=True)  # another checkpoint, another policy
    problem = np.unique([f"{step}/{name}" for step, name in asked], return_inverse=True)[1]
    found = Rollouts(
        lengths=np.bincount(row[mask], minlength=len(sizes)),
        rows=_rows(table, problem, mask, sizes, path),
        tokens={
            "action": _flat(lists["ids"])[mask].astype(np.int64),
            "turn": _flat(lists["turn"])[mask].astype(np.int64),
            **{name: _flat(lists[name])[mask].astype(np.float64) for name in ("logprobs", "entropy", "value")},
            "state": _states(_flat(lists["ids"]), row, problem)[mask],
            "anchor": _anchors(_flat(lists["ids"]), mask, _flat(lists["turn"]), row, problem),
        },
        teachers={},
        shown={},
    )
    found = _with_teachers(found, lists, mask, row)
    found = found.take(found.lengths > 0)
    _check(found, path)
    return found, about


def _valid(column: pa.Array) -> np.ndarray:
    return column.is_valid().to_numpy(zero_copy_only=False)


def _sizes(column: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _flat(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False)


def _rows(table: pa.Table, problem: np.ndarray, mask: np.ndarray, sizes: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    names = {"advantage": "advantage", "reward": "reward", "success": "success", "v0": "v0", "samples": "value_samples"}
    rows = {ours: table[theirs].to_numpy().astype(np.float64) for ours, theirs in names.items()}
    place = table["deviation"].to_numpy().astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    for i in np.flatnonzero(place >= 0):
        if place[i] >= sizes[i] or not mask[starts[i] + place[i]]:
            raise ConfigError(f"{path}: deviation: {place[i]} of trajectory {i} is no policy token of it")
    before = np.concatenate([[0], np.cumsum(mask)])
    known = place >= 0
    at = np.where(known, starts + np.where(known, place, 0), 0)
    own = before[at] - before[np.where(known, starts, 0)]
    return rows | {
        "deviation": np.where(known, own, place),
        "group": table["group"].to_numpy().astype(np.int64),
        "problem": problem,
    }


def _states(ids: np.ndarray, row: np.ndarray, problem: np.ndarray) -> np.ndarray:
    """A hash of the problem and of every token before, the environment's too, uint64 of each token."""
    position = np.arange(len(ids)) - np.searchsorted(row, row)
    prefix = _sum_before(_mixed(ids.astype(np.uint64)) * _powers(position), row)
    return _mixed(prefix ^ _mixed(problem.astype(np.uint64))[row])


def _anchors(ids: np.ndarray, mask: np.ndarray, turn: np.ndarray, row: np.ndarray, problem: np.ndarray) -> np.ndarray:
    """A hash of what its turn answers, int64 of each policy token: the problem's prompt, or the replies since the turn before."""
    place, start = np.arange(len(ids)), np.searchsorted(row, row)
    since = place - np.maximum.accumulate(np.where(mask, place, start))  # the last policy token, or the row's beginning
    terms = np.where(mask, np.uint64(0), _mixed(ids.astype(np.uint64)) * _powers(since))
    replied = _sum_before(terms, row)
    first = mask & np.concatenate([[True], ~mask[:-1] | (row[1:] != row[:-1]) | (turn[1:] != turn[:-1])])[: len(ids)]
    begun = np.flatnonzero(first)
    opening = np.concatenate([[True], row[begun][1:] != row[begun][:-1]])[: len(begun)]
    earlier = np.where(opening, np.uint64(0), np.roll(replied[begun], 1))
    prompt = _mixed(_mixed(problem.astype(np.uint64)))[row[begun]]
    anchors = np.where(opening, prompt, _mixed(replied[begun] - earlier))
    return anchors[np.cumsum(first)[mask] - 1].view(np.int64)


def _powers(exponent: np.ndarray) -> np.ndarray:
    """An odd number to these powers modulo 2^64: what makes a sum over tokens depend on their order."""
    return np.cumprod(np.full(int(exponent.max(initial=0)) + 1, _ODD))[exponent]


def _sum_before(terms: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The sum modulo 2^64 of a row's terms before each place."""
    total = np.cumsum(terms) - terms
    return total - total[np.searchsorted(row, row)]


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of each value, uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _with_teachers(found: Rollouts, lists: dict[str, pa.Array], mask: np.ndarray, row: np.ndarray) -> Rollouts:
    teachers, shown = {}, {}
    for teacher in file.TEACHERS:
        columns = {name: lists[f"{name}/{teacher}"] for name in file.TEACHER_COLUMNS}
        there = np.logical_and.reduce([_valid(column) for column in columns.values()])
        if there.any():
            spread = {name: _spread(column, row)[mask] for name, column in columns.items()}
            seen = there[row[mask]]
            spread["k1"] = np.where(seen, found.tokens["logprobs"] - spread.pop("teacher_logprobs"), 0)
            teachers[teacher], shown[teacher] = {name: np.where(seen, x, 0) for name, x in spread.items()}, there
    if "truth" in teachers and "wrong" in teachers:
        truth, wrong = teachers["truth"], teachers["wrong"]
        teachers[CORRECTED] = truth | {name: truth[name] - wrong[name] for name in ("k1", "reverse_kl")}
        shown[CORRECTED] = shown["truth"] & shown["wrong"]
    return replace(found, teachers=teachers, shown=shown)


def _spread(column: pa.Array, row: np.ndarray) -> np.ndarray:
    """A list column over all tokens, 0 where a row has no list."""
    out = np.zeros(len(row))
    out[_valid(column)[row]] = _flat(column)
    return out


def _check(r: Rollouts, path: Path) -> None:
    if not len(r):
        raise ConfigError(f"{path}: no trajectory with a policy token")
    for name in ("logprobs", "entropy", "value"):
        bad = np.flatnonzero(np.isnan(r.tokens[name]))
        if len(bad):
            raise ConfigError(f"{path}: {name}: NaN on a policy token of trajectory {r.trajectory[bad[0]]}")
    for teacher, columns in r.teachers.items():
        for name, x in columns.items():
            if np.isnan(x).any():
                at = r.trajectory[np.isnan(x).argmax()]
                raise ConfigError(f"{path}: {name}/{teacher}: NaN on a policy token of trajectory {at}")
    if (r.rows["samples"] < 1).any():
        raise ConfigError(f"{path}: value_samples: at least 1 continuation is behind each value")
    off = np.abs(r.tokens["value"][r.bounds[1:] - 1] - r.rows["success"]) > 1e-6
    if off.any():
        raise ConfigError(f"{path}: value: after the last policy token of trajectory {off.argmax()} it is not its success")
