"""Made-up audited trajectories whose truth is planted: for the tests and for a try without a model. Nothing here was measured.

A trajectory has `calls` turns. In each the policy chooses, at one token, the right call with probability `right` or a wrong one,
after which the solution is out of reach; all other tokens are filler and worth nothing. So V is right^(calls left), or 0, and
the deviation is the first wrong choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gear_trainer.audit import file

ABOUT = {
    "task": "synthetic",
    "task_args": {},
    "model": "none: made up, not measured",
    "step": 0,
    "temperature": 1.0,
    "versions": {},
}
_RIGHT, _WRONG, _REPLY, _FILLER = 1, 2, 3, 10  # ids; the last is the first of ten fillers


def columns(
    problems: int = 125, samples: int = 8, calls: int = 4, turn: int = 40, right: float = 0.8, many: int = 64, seed: int = 0
) -> dict[str, list[Any]]:
    """The columns of an audit's file, `problems` x `samples` trajectories of `calls` turns with `turn` policy tokens.

    many: M, the continuations behind each value; 0: values are exact, said to be of a million continuations. Teachers: truth and
    sibling put 2 nats on a wrong choice, the sibling where another sample succeeded; wrong puts them on a random token; all three
    add noise of 0.3 nats; nothing agrees with the policy.
    """
    rng = np.random.default_rng(seed)
    rows = [_trajectory(rng, calls, turn, right, many) for _ in range(problems * samples)]
    success = np.array([row["success"] for row in rows]).reshape(problems, samples)
    advantage = (success - success.mean(1, keepdims=True)) / (success.std(1, ddof=1, keepdims=True) + 1e-4)
    found: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in file.SCHEMA.names}
    found |= {
        "problem": [f"synthetic-{i // samples}" for i in range(len(rows))],
        "group": [i // samples for i in range(len(rows))],
    }
    found |= {"sample": [i % samples for i in range(len(rows))], "advantage": advantage.ravel().tolist()}
    for i, helped in enumerate(np.repeat(success.sum(1), samples) - success.ravel() > 0):
        if not helped:
            for name in file.TEACHER_COLUMNS:
                found[f"{name}/sibling"][i] = None
    return found


def _trajectory(rng: np.random.Generator, calls: int, turn: int, right: float, many: int) -> dict[str, Any]:
    chosen = rng.random(calls) < right
    at = np.arange(calls) * (turn + 3) + turn // 2  # a choice in the middle of each turn, 3 tokens of reply behind it
    size = calls * (turn + 3) - 3
    mask = np.arange(size) % (turn + 3) < turn
    ids = np.where(mask, _FILLER + rng.integers(10, size=size), _REPLY)
    ids[at] = np.where(chosen, _RIGHT, _WRONG)
    logprobs, entropy = np.log(rng.uniform(0.05, 0.2, size)), rng.uniform(0.5, 2.5, size)
    logprobs[at] = np.log(np.where(chosen, right, 1 - right))
    alive = np.concatenate([[True], np.logical_and.accumulate(chosen)])
    exact = np.where(alive, right ** np.arange(calls, -1.0, -1), 0.0)
    seen = exact if not many else np.where((exact > 0) & (exact < 1), rng.binomial(many, exact) / many, exact)
    value = seen[np.searchsorted(at, np.arange(size), side="right")]
    lost = np.flatnonzero(~chosen)
    success = not len(lost)
    row: dict[str, Any] = {
        **{"step": 0, "reward": float(success), "success": success, "end": "done", "v0": float(seen[0])},
        **{"value_samples": many or 1_000_000, "deviation": file.NO_DEVIATION if success else int(at[lost[0]])},
        **{"ids": ids.tolist(), "tokens": [str(i) for i in ids], "mask": mask.tolist()},
        "turn": np.where(mask, np.arange(size) // (turn + 3), -1).tolist(),
        **{"logprobs": logprobs.tolist(), "entropy": entropy.tolist(), "value": np.where(mask, value, np.nan).tolist()},
    }
    return row | _teachers(rng, logprobs, at[lost], mask)


def _teachers(rng: np.random.Generator, logprobs: np.ndarray, lost: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    found = {}
    for teacher in file.TEACHERS:
        k1 = np.zeros(len(mask)) if teacher == "nothing" else rng.normal(0, 0.3, len(mask))
        if teacher in ("truth", "sibling"):
            k1[lost] += 2
        elif teacher == "wrong":
            k1[rng.choice(np.flatnonzero(mask))] += 2
        said = (logprobs - k1, np.abs(k1), np.abs(k1), np.full(len(mask), 1.0))
        found |= {f"{name}/{teacher}": x.tolist() for name, x in zip(file.TEACHER_COLUMNS, said, strict=True)}
    return found
