"""Runs as one page that asks for nothing: curves, rollouts coloured by token credit, warnings; and held-out curves as a figure.

`python -m gear_trainer report runs/NAME` writes `report.html` into the run's folder; with `--together FILE.html` several runs are
one page. `python -m gear_trainer report --compare FILE.png runs/A runs/B ...` draws their held-out success, one colour a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gear_trainer.report import payload
from gear_trainer.report.pages import run_page
from gear_trainer.report.plots import pyplot
from gear_trainer.runs.files import read_metrics, write_whole

PAGE = "report.html"
BUDGET = 3 << 20  # bytes of rollouts in a page; a third more as text, so that a page stays below 5 MB


def write_report(folder: Path) -> str:
    """Write the page of a run, or of an audit, into its folder. Returns the line that is printed at the end of a run."""
    write_pages([folder], folder / PAGE)
    return f"{_summary(read_metrics(folder / 'metrics.jsonl'))}report: {folder / PAGE}"


def write_pages(folders: Sequence[Path], file: Path) -> None:
    """Write one page of these runs and audits. Raises ConfigError where a folder is neither."""
    shown = payload.manifest(folders)
    packs = payload.sample(folders, shown, BUDGET)
    write_whole(file, run_page(shown, packs))


def draw_comparison(run_dirs: list[Path], path: Path) -> None:
    """Held-out success: a thin line a run, a thick one for each method's mean. Raises ConfigError where a folder is no run's."""
    plt = pyplot()
    methods: dict[str, list[list[tuple[int, float]]]] = {}
    for run_dir in run_dirs:
        credit = payload.describe(run_dir)["credit"]
        methods.setdefault(credit, []).append(_held_out(read_metrics(run_dir / "metrics.jsonl")))
    figure, axis = plt.subplots(figsize=(6.4, 3.4), constrained_layout=True)
    for i, (credit, runs) in enumerate(methods.items()):
        for run in runs:
            axis.plot(*zip(*run, strict=True), color=f"C{i}", lw=0.8, alpha=0.5)
        mean = [(points[0][0], sum(v for _, v in points) / len(points)) for points in zip(*runs, strict=False)]
        axis.plot(*zip(*mean, strict=True), "o-", color=f"C{i}", lw=2.2, label=f"{credit} (mean of {len(runs)})")
    axis.set(ylim=(0, 1), xlabel="step", ylabel="held-out success")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _held_out(steps: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(m["step"], m["held_out_success"]) for m in steps if m.get("held_out_success") is not None]


def _summary(steps: list[dict[str, Any]]) -> str:
    held_out = _held_out(steps)
    if len(held_out) < 2:
        return ""
    (_, before), (step, after) = held_out[0], held_out[-1]
    return f"held-out success: {before:.3f} before, {after:.3f} after {step} steps ({after - before:+.3f})\n"
