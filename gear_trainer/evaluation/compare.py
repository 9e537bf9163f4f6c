"""Two evaluations of the same problems, problem by problem: the paired difference and its bootstrap, McNemar's test, tool use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gear_trainer.config import changes
from gear_trainer.errors import ConfigError
from gear_trainer.evaluation.records import read_records, read_result
from gear_trainer.evaluation.scores import Record, bootstrap, groups, interval, stats

_SHOWN = 12  # problems that are named on either side


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Figures of two evaluation folders over the problems that both have scored. Raises ConfigError where there are none."""
    results = read_result(a), read_result(b)
    one, other = _scored(a), _scored(b)
    common = [key for key in one if key in other]
    if not common:
        raise ConfigError(f"{a} and {b} have no problem in common: give two evaluations of one task and its arguments")
    return {
        "a": str(a),
        "b": str(b),
        "problems": len(common),
        "only_a": len(one) - len(common),
        "only_b": len(other) - len(common),
        "differing": _differing(results[0]["settings"], results[1]["settings"]),
        "overall": _paired([(one[key], other[key]) for key in common]),
        "categories": _by_category(one, other, common),
        **_mcnemar([(one[key], other[key]) for key in common]),
    }


def _scored(folder: Path) -> dict[tuple[str, str], list[Record]]:
    """The rollouts of each problem that no environment broke, by its id and what it asks."""
    whole = groups(read_records(folder)).values()
    return {(g[0]["problem"], g[0]["digest"]): g for g in whole if not any(r["end"] == "error" for r in g)}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [line for line in changes(a, b) if not line.startswith(("weights:", "batch:", "set:"))]


def _success(group: list[Record]) -> float:
    return sum(r["success"] for r in group) / len(group)


def _tool_use(group: list[Record]) -> float:
    return sum(r["calls"] > 0 for r in group) / len(group)


def _paired(pairs: list[tuple[list[Record], list[Record]]]) -> dict[str, Any]:
    a, b = (np.array([_success(pair[side]) for pair in pairs]) for side in (0, 1))
    use = [sum(_tool_use(pair[side]) for pair in pairs) / len(pairs) for side in (0, 1)]
    difference = b - a
    spread = bootstrap(difference, np.mean) if len(set(difference.tolist())) > 1 else [float(difference[0])] * 2
    return {
        "problems": len(pairs),
        "mean": [float(a.mean()), float(b.mean())],
        "intervals": [interval(a.tolist()), interval(b.tolist())],
        "difference": float(difference.mean()),
        "interval": spread,
        "tool_use": use,
    }


def _by_category(one: dict, other: dict, common: list) -> dict[str, Any]:
    names = sorted({one[key][0]["category"] for key in common})
    if len(names) < 2:
        return {}
    return {
        name or "none": _paired([(one[key], other[key]) for key in common if one[key][0]["category"] == name]) for name in names
    }


def _mcnemar(pairs: list[tuple[list[Record], list[Record]]]) -> dict[str, Any]:
    """McNemar's exact test of problems that one side solves and the other does not; solved: by more than half of its samples."""
    verdicts = [(a[0]["problem"], _success(a) > 0.5, _success(b) > 0.5) for a, b in pairs]
    only_a = [name for name, in_a, in_b in verdicts if in_a and not in_b]
    only_b = [name for name, in_a, in_b in verdicts if in_b and not in_a]
    n = len(only_a) + len(only_b)
    p = float(stats().binomtest(len(only_b), n).pvalue) if n else 1.0
    return {
        "solved_only_a": len(only_a), "solved_only_b": len(only_b), "mcnemar_p": p,
        "examples_only_a": only_a[:_SHOWN], "examples_only_b": only_b[:_SHOWN],
    }  # fmt: skip
