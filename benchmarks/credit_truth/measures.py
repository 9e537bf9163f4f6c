"""Measures of token advantages against the truth of credit, A*: each a few lines over packed tokens.

A measure is a value of sums over units: `parts` gives each unit's addends [U, k], `value` what their sums [..., k] mean; so a
bootstrap is one matrix product. The units are trajectories; for the measures of gradients problems, of which no two share a
coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .rollouts import Rollouts

NEAR = 2  # policy tokens between an onset and the deviation that it found


class Assigned(NamedTuple):
    """A method's token advantages [n] and onsets, bool [n]; onsets are None of a method without segments."""

    advantages: np.ndarray
    onsets: np.ndarray | None = None


Parts = Callable[[Rollouts, Assigned], np.ndarray]


class Measure(NamedTuple):
    """A measure: `asks` is its question, `chance` what a method that knows nothing gets, None where a control has to show it."""

    asks: str
    parts: Parts
    value: Callable[[np.ndarray], np.ndarray]
    by: str = "trajectory"
    chance: float | None = None


# --- values of sums -----------------------------------------------------------------------------------------------------


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0: nothing was there to measure."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b != 0)


def mean(sums: np.ndarray) -> np.ndarray:
    """The first sum over the last."""
    return _quotient(sums[..., 0], sums[..., -1])


def second_mean(sums: np.ndarray) -> np.ndarray:
    """The second sum over the last."""
    return _quotient(sums[..., 1], sums[..., -1])


def cosine(sums: np.ndarray) -> np.ndarray:
    """The cosine <a, b> / (|a| |b|), of the sums <a, b>, |a|^2, |b|^2."""
    return _quotient(sums[..., 0], np.sqrt(sums[..., 1] * sums[..., 2]))


def contrast(sums: np.ndarray) -> np.ndarray:
    """(a - b) / (|a| + |b|) of the first two sums, in [-1, 1]."""
    a, b = sums[..., 0], sums[..., 1]
    return _quotient(a - b, np.abs(a) + np.abs(b))


def signal_to_noise(sums: np.ndarray) -> np.ndarray:
    """The mean over the standard deviation of x = <a, b>, whose sum is the first, that of its square and of 1 the last two.

    NaN where all x are alike up to rounding: one problem, or one that was drawn again and again.
    """
    average = mean(sums)
    variance = _quotient(sums[..., -2], sums[..., -1]) - average**2
    return _quotient(average, np.sqrt(np.where(variance > 1e-9 * average**2, variance, 0)))


# --- signs and ranks ----------------------------------------------------------------------------------------------------


def sign(r: Rollouts, a: Assigned) -> np.ndarray:
    """Decided tokens whose advantage has the sign of A*, and decided tokens, [B, 2]; an advantage of 0 counts one half."""
    return _agreement(r, a.advantages, r.truth)


def sign_centred(r: Rollouts, a: Assigned) -> np.ndarray:
    """The same of advantages less the trajectory's mean, against A* less its mean, [B, 2]."""
    return _agreement(r, centred(r, a.advantages), centred(r, r.truth))


def _agreement(r: Rollouts, x: np.ndarray, truth: np.ndarray) -> np.ndarray:
    agree = 0.5 * (1 + np.sign(x) * np.sign(truth))
    return np.stack([r.sums(np.where(r.decided, agree, 0)), r.sums(r.decided)], axis=1)


def centred(r: Rollouts, x: np.ndarray) -> np.ndarray:
    """The values less their trajectory's mean, [n]; rounding is 0."""
    average, size = r.over_tokens(r.sums(x) / r.lengths), r.over_tokens(_largest(r, np.abs(x)))
    moved = x - average
    return np.where(np.abs(moved) > 1e-6 * size, moved, 0)  # float32 weights times one advantage agree to 1e-7


def _largest(r: Rollouts, x: np.ndarray) -> np.ndarray:
    return np.maximum.reduceat(x, r.bounds[:-1])


def spearman(r: Rollouts, a: Assigned) -> np.ndarray:
    """Spearman's rank correlation of advantages and A* in each trajectory, and 1, [B, 2]; 0, 0 where A* is the same everywhere.

    Equal values share their mean rank. Advantages that are the same everywhere have correlation 0: they say nothing.
    """
    x, y = centred(r, ranks(r, a.advantages)), true_ranks(r)
    xy, xx, yy = r.sums(x * y), r.sums(x * x), r.sums(y * y)
    told = yy > 0
    rho = np.divide(xy, np.sqrt(xx * yy), out=np.zeros(len(r)), where=told & (xx > 0))
    return np.stack([rho, told], axis=1)


def true_ranks(r: Rollouts) -> np.ndarray:
    """The ranks of A* within each trajectory less their mean, [n]; sorted once for all methods."""
    if "ranks" not in r.kept:
        r.kept["ranks"] = centred(r, ranks(r, r.truth))
    return r.kept["ranks"]


def ranks(r: Rollouts, x: np.ndarray) -> np.ndarray:
    """Ranks within each trajectory up to a constant of it, float64 [n]; equal values get the mean of theirs."""
    order = np.lexsort((x, r.trajectory))
    value, where = x[order], r.trajectory[order]
    new = np.concatenate([[True], (value[1:] != value[:-1]) | (where[1:] != where[:-1])])
    first = np.flatnonzero(new)
    last = np.concatenate([first[1:], [len(x)]]) - 1
    out = np.empty(len(x))
    out[order] = ((first + last) / 2)[np.cumsum(new) - 1]
    return out


# --- the deviation ------------------------------------------------------------------------------------------------------
# Of trajectories that lost the solution and were told so: a deviation, and A < 0.


def _blamed(r: Rollouts) -> np.ndarray:
    return (r.deviation >= 0) & (r.rows["advantage"] < 0)


def _near(r: Rollouts) -> np.ndarray:
    """Tokens at most NEAR from the deviation of their trajectory, where it is one that counts, bool [n]."""
    distance = np.abs(np.arange(len(r.trajectory)) - r.over_tokens(r.deviation))
    return r.over_tokens(_blamed(r)) & (distance <= NEAR)


def precision(r: Rollouts, a: Assigned) -> np.ndarray:
    """Onsets near the deviation, and onsets, in trajectories that deviated, [B, 2]."""
    if a.onsets is None:
        return np.zeros((len(r), 2))
    return np.stack([r.sums(a.onsets & _near(r)), r.sums(a.onsets & r.over_tokens(_blamed(r)))], axis=1)


def recall(r: Rollouts, a: Assigned) -> np.ndarray:
    """1 where an onset is near the deviation, and 1 where there is a deviation, [B, 2]."""
    if a.onsets is None:
        return np.zeros((len(r), 2))
    return np.stack([r.sums(a.onsets & _near(r)) > 0, _blamed(r)], axis=1)


def on_the_call(r: Rollouts, a: Assigned) -> np.ndarray:
    """The mean weight on the deviation's turn, that on the rest of the trajectory's policy tokens, and 1, [B, 3].

    A weight is the token's advantage over the trajectory's. Trajectories of one turn alone have no rest and count for nothing.
    """
    blamed = _blamed(r)
    turn = r.tokens["turn"]
    call = r.over_tokens(blamed) & (turn == r.over_tokens(turn[np.maximum(r.deviation, 0)]))
    inside = r.sums(call)
    outside = r.lengths - inside
    counts = blamed & (outside > 0)
    weights = a.advantages / r.over_tokens(np.where(blamed, r.rows["advantage"], 1.0))
    on, off = r.sums(np.where(call, weights, 0)), r.sums(np.where(call, 0, weights))
    means = [np.divide(x, many, out=np.zeros(len(r)), where=counts) for x, many in ((on, inside), (off, outside))]
    return np.stack([*means, counts], axis=1)


# --- gradients ----------------------------------------------------------------------------------------------------------


def gradient(r: Rollouts, x: np.ndarray) -> np.ndarray:
    """The policy gradient of a table policy with token advantages x [n], in the coordinates of `Rollouts.table`, [C].

    Its derivative in the logit of token v in state s is the sum over the visits of s of x (1[v was sampled] - p_v).
    """
    table = r.table
    visits = np.bincount(table.state, weights=x)
    return np.bincount(table.pair, weights=x) - table.p * visits[table.of]


def gradients(r: Rollouts, a: Assigned) -> np.ndarray:
    """The products <g, g*>, |g|^2, |g*|^2 of the gradients with the advantages and with A*, <g, g*>^2 and 1, [P, 5].

    <g, g*> is the rise of each problem's success, to first order, along the method's gradient.
    """
    g, best = gradient(r, a.advantages), gradient(r, r.truth)
    rise, own, true = (np.bincount(r.table.problem, weights=x) for x in (g * best, g * g, best * best))
    return np.stack([rise, own, true, rise**2, np.ones_like(rise)], axis=1)


# --- all of them --------------------------------------------------------------------------------------------------------

MEASURES = {
    "sign": Measure("Has the token advantage the sign of A*? Decided tokens", sign, mean),
    "sign_centred": Measure("Does it go up or down within the trajectory as A* does?", sign_centred, mean, chance=0.5),
    "spearman": Measure("Does it rank a trajectory's tokens as A* does?", spearman, mean, chance=0.0),
    "precision": Measure(f"Is an onset within {NEAR} tokens of the deviation?", precision, mean),
    "recall": Measure(f"Is there an onset within {NEAR} tokens of the deviation?", recall, mean),
    "call_weight": Measure("What is the mean weight on the deviation's turn?", on_the_call, mean),
    "rest_weight": Measure("What is it on the rest of that trajectory?", on_the_call, second_mean),
    "call_contrast": Measure("Has the deviation's turn more weight than the rest?", on_the_call, contrast, chance=0.0),
    "alignment": Measure("Does the gradient point where A*'s does? Cosine, table policy", gradients, cosine, "problem"),
    "snr": Measure("Is its gain large beside its spread over problems?", gradients, signal_to_noise, "problem"),
}


def parts_of(names: Iterable[str], rollouts: Rollouts, assigned: Assigned) -> dict[str, np.ndarray]:
    """The parts of each measure by its name; measures that share a function share its result."""
    made: dict[Parts, np.ndarray] = {}
    for name in names:
        parts = MEASURES[name].parts
        if parts not in made:
            made[parts] = parts(rollouts, assigned)
    return {name: made[MEASURES[name].parts] for name in names}
