"""Intervals by the percentile bootstrap: units are drawn with replacement, every measure of a method from the same draws."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from .measures import Measure

LEVELS = (2.5, 97.5)  # per cent


class Figure(NamedTuple):
    """A value with its interval of 95 %; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float


class Draws:
    """Counts of how often each of `units` units is drawn, in `resamples` draws of as many; a function of the seed."""

    def __init__(self, units: int, resamples: int, seed: int):
        self.units, self.resamples, self.seed = units, resamples, seed

    @cached_property
    def counts(self) -> np.ndarray:
        """Float64 [resamples, units]."""
        rng = np.random.default_rng((self.seed, self.units))
        drawn = rng.integers(self.units, size=(self.resamples, self.units))
        return np.stack([np.bincount(row, minlength=self.units) for row in drawn]).astype(np.float64)

    def values(self, measure: Measure, parts: np.ndarray) -> np.ndarray:
        """The measure of all units, then of each draw, [1 + resamples]; parts [units, k]."""
        return measure.value(np.concatenate([parts.sum(0, keepdims=True), self.counts @ parts]))


def figure(values: np.ndarray) -> Figure:
    """The first value and the interval of the others; draws in which there was nothing to measure are left out."""
    others = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(others):
        return Figure(float(values[0]), np.nan, np.nan)
    return Figure(float(values[0]), *(float(x) for x in np.percentile(others, LEVELS)))
