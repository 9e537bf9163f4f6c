"""Figures of an evaluation: mean@k, pass@k, maj@k with intervals over problems, by category; calls of tools; how episodes ended.

A problem of which the environment broke a rollout off is left out of every figure, and named: what it earned is unknown.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gear_trainer.errors import ConfigError
from gear_trainer.evaluation.held_out import reported
from gear_trainer.tasks.base import Outcome, Problem, Task

Record = dict[str, Any]  # one rollout, as evaluation/records.py writes it
RESAMPLES = 10_000
ENDS = ("done", "turns", "length", "error")


def stats() -> Any:
    """The module scipy.stats. Raises ConfigError with the install line where it is missing."""
    try:
        import scipy.stats
    except ImportError:
        raise ConfigError("intervals and tests of an evaluation need the package scipy: pip install scipy") from None
    return scipy.stats


def pass_at(k: int, solved: int, samples: int) -> float:
    """The unbiased estimate of pass@k: the chance that k of the samples, drawn without replacement, hold a solved one."""
    return 1 - math.comb(samples - solved, k) / math.comb(samples, k)


def majority(votes: Sequence[str | None], solved: Sequence[bool]) -> float:
    """The success of the answer that most samples gave; of several as frequent ones their mean, and 0 where none gave any."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    chosen = [vote for vote, count in counts.items() if count == most]
    return _mean([_mean([float(s) for v, s in zip(votes, solved, strict=True) if v == vote]) for vote in chosen])


def interval(values: Sequence[float]) -> list[float]:
    """The 95 % interval of a mean over problems: percentiles of a bootstrap that draws problems, under one seed.

    Where all values are the same there is nothing to draw, and it is Wilson's of as many draws, wide rather than narrow.
    """
    if len(set(values)) < 2:
        n = len(values)
        low, high = stats().binomtest(round(n * values[0]), n).proportion_ci(method="wilson") if n else (0.0, 1.0)
        return [float(low), float(high)]
    return bootstrap(np.asarray(values, dtype=float), np.mean)


def bootstrap(values: np.ndarray, statistic: Callable[..., Any]) -> list[float]:
    """The 95 % percentile interval of a statistic of the values, [problems], under one seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats().bootstrap(
            (values,), statistic, n_resamples=RESAMPLES, batch=256, method="percentile", rng=np.random.default_rng(0)
        )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def groups(records: Sequence[Record]) -> dict[int, list[Record]]:
    """The rollouts of each problem by its index, samples in order."""
    found: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["index"], r["sample"])):
        found.setdefault(record["index"], []).append(record)
    return found


def summarize(task: Task, problems: Sequence[Problem], records: Sequence[Record]) -> dict[str, Any]:
    """All figures of an evaluation, as result.json holds them."""
    whole = groups(records)
    lost = {i: rollouts for i, rollouts in whole.items() if any(r["end"] == "error" for r in rollouts)}
    scored = {i: rollouts for i, rollouts in whole.items() if i not in lost}
    categories = sorted({problems[i].category for i in scored})
    by_category = {
        name or "none": _row(task, problems, {i: g for i, g in scored.items() if problems[i].category == name})
        for name in categories
    }
    return {
        "overall": _row(task, problems, scored),
        "categories": by_category if len(categories) > 1 else {},
        "lost": [{"problem": problems[i].id, "failure": _failure(rollouts)} for i, rollouts in lost.items()],
        "retried": sum(bool(r["failures"]) for r in records),
    }


def _failure(rollouts: list[Record]) -> str:
    return next(r["failures"][-1] for r in rollouts if r["end"] == "error")


def _row(task: Task, problems: Sequence[Problem], scored: dict[int, list[Record]]) -> dict[str, Any]:
    """Figures of some problems' rollouts; None for what there is nothing to count of."""
    rollouts = [r for group in scored.values() for r in group]
    samples = max(map(len, scored.values()), default=0)
    means = [_mean([float(r["success"]) for r in group]) for group in scored.values()]
    solved = [sum(r["success"] for r in group) for group in scored.values()]
    passed = {k: [pass_at(k, s, samples) for s in solved] for k in _powers(samples)}
    ends = Counter(r["end"] for r in rollouts)
    outcomes = [(problems[r["index"]], Outcome(r["reward"], r["success"], r["metrics"])) for r in rollouts]
    row: dict[str, Any] = {
        "problems": len(scored),
        "samples": samples,
        "mean": _mean_or_none(means),
        "interval": interval(means),
        "reward": _mean_or_none([r["reward"] for r in rollouts]),
        "pass": {str(k): _mean_or_none(values) for k, values in passed.items()},
        "pass_interval": interval(passed[samples]) if samples else [0.0, 1.0],
        "majority": None,
        "majority_interval": None,
        "metrics": reported(task, outcomes),
        "ends": {end: ends[end] / len(rollouts) if rollouts else 0.0 for end in ENDS if end != "error"},
        "no_room": sum(r["end"] == "length" and not r["tokens"] for r in rollouts),
    }
    if any(r["vote"] is not None for r in rollouts):
        voted = [majority([r["vote"] for r in g], [r["success"] for r in g]) for g in scored.values()]
        row |= {"majority": _mean(voted), "majority_interval": interval(voted)}
    return row | _calls(rollouts)


def _calls(rollouts: list[Record]) -> dict[str, Any]:
    """The use of tools, and what an episode took."""
    calls = sum(r["calls"] for r in rollouts)
    return {
        "tool_use": _mean_or_none([float(r["calls"] > 0) for r in rollouts]),
        "calls": _mean_or_none([r["calls"] for r in rollouts]),
        "call_errors": sum(r["errors"] for r in rollouts) / calls if calls else None,
        "turns": _mean_or_none([r["turns"] for r in rollouts]),
        "tokens": _mean_or_none([r["tokens"] for r in rollouts]),
    }


def _powers(samples: int) -> list[int]:
    """The k of pass@k: powers of two, and all samples."""
    return sorted({1 << i for i in range(samples.bit_length()) if 1 << i <= samples} | ({samples} if samples else set()))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None
