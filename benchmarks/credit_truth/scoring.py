"""Every method under every teacher: all measures with intervals, and how far each is from GRPO's on the same trajectories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gear_trainer.errors import ConfigError
from gear_trainer.user_code import said

from .bootstrap import Draws, Figure, figure
from .measures import MEASURES, Assigned, parts_of
from .methods import ORACLES, Entry, tilt
from .rollouts import Rollouts

TILTED = "gear"  # whose tilt is scored, beside that of the user's methods


@dataclass
class Row:
    """The figures of one method under one teacher ("-": it reads none), and their differences from GRPO's, by measure."""

    method: str
    teacher: str
    trajectories: int
    figures: dict[str, Figure]
    over_grpo: dict[str, Figure] = field(default_factory=dict)


class Scorer:
    """The trajectories that one teacher has seen, or all, with the draws and GRPO's values that every method there is held to."""

    def __init__(self, rollouts: Rollouts, resamples: int, seed: int):
        self.rollouts = rollouts
        units = {"trajectory": len(rollouts), "problem": int(rollouts.rows["problem"].max()) + 1}
        self._draws = {by: Draws(many, resamples, seed) for by, many in units.items()}
        self._baseline = self._values(Assigned(rollouts.over_tokens(rollouts.rows["advantage"])))

    def _values(self, assigned: Assigned) -> dict[str, np.ndarray]:
        parts = parts_of(MEASURES, self.rollouts, assigned)
        return {name: self._draws[m.by].values(m, parts[name]) for name, m in MEASURES.items()}

    def score(self, method: str, teacher: str | None, assigned: Assigned) -> Row:
        """A row of the table."""
        values = self._values(assigned)
        over = {name: figure(x - self._baseline[name]) for name, x in values.items()}
        figures = {name: figure(x) for name, x in values.items()}
        return Row(method, teacher or "-", len(self.rollouts), figures, over)


def teaching(rollouts: Rollouts) -> Rollouts:
    """The trajectories whose advantage is not 0: the others teach a method that multiplies it nothing. Raises ConfigError."""
    keep = rollouts.rows["advantage"] != 0
    if not keep.any():
        raise ConfigError("every trajectory's advantage is 0: audit problems of which some samples succeed and some fail")
    return rollouts.take(keep)


def scorers_of(rollouts: Rollouts, resamples: int, seed: int) -> dict[str | None, Scorer]:
    """A scorer for each teacher that has seen a trajectory, of those that it has seen; under None that of all trajectories."""
    everyone = Scorer(rollouts, resamples, seed)
    scorers: dict[str | None, Scorer] = {None: everyone}
    for teacher, shown in rollouts.shown.items():
        if shown.any():
            scorers[teacher] = everyone if shown.all() else Scorer(rollouts.take(shown), resamples, seed)
    return scorers


def score(rollouts: Rollouts, entries: list[Entry], resamples: int = 1000, seed: int = 0) -> list[Row]:
    """A row for each method and teacher, controls last. rollouts: as `teaching` gives them."""
    scorers = scorers_of(rollouts, resamples, seed)
    rows, controls = [], []
    for entry in entries:
        for teacher in entry.teachers(rollouts):
            if teacher not in scorers:
                continue
            scorer = scorers[teacher]
            assigned = _assigned(entry, scorer.rollouts, teacher)
            rows.append(scorer.score(entry.name, teacher, assigned))
            if entry.name == TILTED or entry.own:
                controls.append(scorer.score(f"tilt of {entry.name}", teacher, tilt(scorer.rollouts, assigned)))
    controls += [scorers[None].score(name, None, control(rollouts)) for name, control in ORACLES.items()]
    return rows + controls


def _assigned(entry: Entry, rollouts: Rollouts, teacher: str | None) -> Assigned:
    try:
        return entry.assign(rollouts, teacher)
    except Exception as error:
        if not entry.own:
            raise
        raise ConfigError(f"--method {entry.name}: {said(error, where=True)}") from None


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain data: [value, low, high] of each measure, rounded to 6 digits, None for what could not be measured."""
    return [
        {
            "method": row.method,
            "teacher": row.teacher,
            "trajectories": row.trajectories,
            "figures": {name: _plain(f) for name, f in row.figures.items()},
            "over_grpo": {name: _plain(f) for name, f in row.over_grpo.items()},
        }
        for row in rows
    ]


def _plain(f: Figure) -> list[float | None]:
    return [None if np.isnan(x) else round(x, 6) + 0.0 for x in f]  # + 0.0: no -0.0
