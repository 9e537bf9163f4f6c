"""The pictures of a scored file, drawn from its JSON alone: figures with intervals, and the sweeps as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gear_trainer.report.plots import pyplot

from .measures import MEASURES
from .sweeps import GRIDS

_SHOWN = ("sign", "sign_centred", "spearman", "precision", "recall", "call_contrast", "alignment", "snr")


def draw(found: dict[str, Any], stem: Path) -> list[Path]:
    """STEM.figures.png, and STEM.GRID.png for each sweep; where they went."""
    pictures = {"figures": _figures(found)}
    pictures |= {name: _heat_maps(name, found["sweeps"][name], found) for name in found["sweeps"]}
    paths = []
    for name, picture in pictures.items():
        paths.append(stem.with_name(f"{stem.name}.{name}.png"))
        picture.savefig(paths[-1], dpi=110, metadata={"Software": None})
        pyplot().close(picture)
    return paths


def measured(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The measures of which a row has a figure."""
    return [name for name in names if any(row["figures"][name][0] is not None for row in rows)]


def _figures(found: dict[str, Any]):
    """A panel for each measure that has a figure, a line for each method, a colour for each teacher; a dotted line at chance."""
    shown = measured(_SHOWN, found["rows"]) or ["sign"]
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    teachers = list(dict.fromkeys(row["teacher"] for row in found["rows"]))
    figure, axes = pyplot().subplots(
        1, len(shown), figsize=(3 * len(shown), 1 + 0.4 * len(methods)), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], shown, strict=True):
        for place, teacher in enumerate(teachers):
            rows = [row for row in found["rows"] if row["teacher"] == teacher and None not in row["figures"][name]]
            heights = [methods.index(row["method"]) + 0.8 * ((place + 0.5) / len(teachers) - 0.5) for row in rows]
            values, lows, highs = ([row["figures"][name][i] for row in rows] for i in range(3))
            axis.hlines(heights, lows, highs, color=f"C{place}", linewidth=1)
            axis.plot(values, heights, "o", color=f"C{place}", markersize=3, label=teacher)
        if (chance := MEASURES[name].chance) is not None:
            axis.axvline(chance, color="0.5", linestyle=":")
        axis.set(title=name)
        axis.grid(alpha=0.25, axis="x")
    axes[0, 0].set_yticks(range(len(methods)), methods)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(teachers))
    figure.suptitle(_title(found))
    return figure


def _title(found: dict[str, Any]) -> str:
    about = found["about"]
    return f"{found['file']}: {about.get('task')}, {about.get('model')}, {found['teaching']} trajectories with an advantage"


def _heat_maps(name: str, values: dict[str, list[list[float | None]]], found: dict[str, Any]):
    """A map for each measure of a grid that has a figure, each cell with its number; blank where there was nothing to measure."""
    grid = GRIDS[name]
    told = {measure: cells for measure, cells in values.items() if any(cell is not None for row in cells for cell in row)}
    values = told or values
    figure, axes = pyplot().subplots(1, len(values), figsize=(3.6 * len(values), 3.6), squeeze=False, layout="constrained")
    for axis, (measure, cells) in zip(axes[0], values.items(), strict=True):
        numbers = [[float("nan") if cell is None else cell for cell in row] for row in cells]
        image = axis.imshow(numbers, aspect="auto", cmap="viridis")
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                if cell is not None:
                    light = image.norm(cell) > 0.6  # viridis ends in yellow
                    axis.text(
                        j, i, f"{cell + 0.0:.3f}", ha="center", va="center", fontsize=8, color="black" if light else "white"
                    )
        axis.set_xticks(range(len(grid.column_values)), [str(v) for v in grid.column_values])
        axis.set_yticks(range(len(grid.row_values)), [str(v) for v in grid.row_values])
        axis.set(title=measure, xlabel=grid.columns, ylabel=grid.rows)
    figure.suptitle(f"{_title(found)}; GEAR, teacher {found['swept']}")
    return figure
