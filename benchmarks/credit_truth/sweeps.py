"""GEAR's options over grids: what its threshold, ratio, share and normaliser change of the measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gear_kernels import Gear
from gear_kernels.methods import NORMALIZERS

from .measures import MEASURES, parts_of
from .methods import Entry
from .rollouts import Rollouts


class Grid(NamedTuple):
    """Two options of GEAR with their values, and the measures that they can change."""

    rows: str
    row_values: Sequence[Any]
    columns: str
    column_values: Sequence[Any]
    measures: tuple[str, ...]


GRIDS = {
    "threshold_ratio": Grid(
        *("kl_threshold", (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), "entropy_ratio", (1.0, 1.25, 1.5, 2.0, 4.0)),
        ("sign_centred", "spearman", "precision", "recall", "call_contrast", "alignment"),
    ),
    # W is linear in alpha, so neither ranks nor onsets move with it; `max` of a signed signal is relu_max
    "normalizer_alpha": Grid(
        *("normalizer", tuple(n for n in NORMALIZERS if n != "max"), "alpha", (0.1, 0.2, 0.5, 1.0, 1.9)),
        ("spearman", "recall", "call_contrast", "alignment"),
    ),
}


def sweep(rollouts: Rollouts, teacher: str) -> dict[str, dict[str, list[list[float | None]]]]:
    """By grid and measure the values over the grid, rows by columns, of the trajectories that the teacher has seen."""
    seen = rollouts.take(rollouts.shown[teacher])
    return {name: _over(grid, seen, teacher) for name, grid in GRIDS.items()}


def _over(grid: Grid, rollouts: Rollouts, teacher: str) -> dict[str, list[list[float | None]]]:
    found: dict[str, list[list[float | None]]] = {name: [] for name in grid.measures}
    for row in grid.row_values:
        for values in found.values():
            values.append([])
        for column in grid.column_values:
            entry = Entry("gear", Gear(**{grid.rows: row, grid.columns: column}))
            assigned = entry.assign(rollouts, teacher)
            parts = parts_of(grid.measures, rollouts, assigned)
            for name, values in found.items():
                value = float(MEASURES[name].value(parts[name].sum(0)))
                values[-1].append(None if np.isnan(value) else round(value, 6))
    return found
