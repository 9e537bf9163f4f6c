"""Statistics of a few seeds: means with t-intervals, areas under curves, differences paired by seed, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gear_trainer.evaluation.scores import stats

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over n seeds and its 95 % interval; low and high are None where n < 2, all where n is 0."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


class Difference(NamedTuple):
    """The mean difference to the baseline over n seeds that both have, its 95 % t-interval, and the test's p.

    p is None where the test says nothing: fewer than two pairs, or, of the t-test, differences that are all alike and not 0.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, with Student's interval: mean +- t(0.975, n - 1) * s / sqrt(n)."""
    n = len(values)
    if not n:
        return Estimate(None, None, None, 0)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, None, n)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = float(stats().t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def area(points: Sequence[tuple[float, float]]) -> float | None:
    """The area under a curve of (step, value) by trapezoids, over its span of steps: the mean height, in the metric's unit.

    None where fewer than two steps have a value.
    """
    if len(points) < 2:
        return None
    pairs = zip(points, points[1:], strict=False)
    whole = math.fsum((later - step) * (value + after) / 2 for (step, value), (later, after) in pairs)
    return whole / (points[-1][0] - points[0][0])


def band(curves: Sequence[Mapping[int, float]]) -> list[tuple[int, Estimate]]:
    """The mean and its interval at each step that all curves have, in the order of steps."""
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return [(step, estimate([curve[step] for curve in curves])) for step in sorted(shared)]


def paired(arm: Mapping[int, float], baseline: Mapping[int, float], test: str) -> Difference:
    """The arm less the baseline, by seed; test: `t` for the paired t-test, `wilcoxon` for the signed-rank test (exact for few
    seeds), both two-sided."""
    differences = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    found = estimate(differences)
    return Difference(*found, _p(differences, test))


def _p(differences: list[float], test: str) -> float | None:
    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    if test == "wilcoxon":
        return float(stats().wilcoxon(differences).pvalue)
    if max(differences) == min(differences):
        return None
    return float(stats().ttest_1samp(differences, 0.0).pvalue)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) of a family of tests, which keeps the chance of any false alarm below the level.

    The k-th smallest of m is multiplied by m - k + 1, and none falls below the one before it; at most 1. A None is no test.
    """
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    found: list[float | None] = [None] * len(p)
    least = 0.0
    for k, (value, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - k) * value))
        found[i] = least
    return found
