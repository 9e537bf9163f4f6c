"""Pages that ask for nothing, of runs, audits, evaluations and studies: figures, curves, rollouts coloured by token credit.

`python -m gear_trainer report runs/NAME` writes `report.html` into the run's folder; with `--together FILE.html` several runs are
one page. `python -m gear_trainer report --compare FILE.png runs/A runs/B ...` draws their held-out success, one colour a method.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gear_trainer.report import evaluation, payload, study
from gear_trainer.report.pages import run_page
from gear_trainer.report.plots import pyplot
from gear_trainer.runs.files import read_metrics, write_whole
from gear_trainer.runs.study import Plan

PAGES = {"run": "report.html", "audit": "report.html", "evaluation": "result.html", "study": "study.html"}
BUDGET = 3 << 20  # bytes of rollouts in a page; a third more as text, so that a page stays below 5 MB


def write_report(path: Path) -> str:
    """Write the page of a run, an audit, an evaluation or a study, where `page_of` says. Returns the line that is printed.

    Raises ConfigError where it is none of them.
    """
    page = page_of(path)
    write_pages([path], page)
    return f"{_summary(read_metrics(path / 'metrics.jsonl'))}report: {page}"


def page_of(path: Path) -> Path:
    """The page of what stands at a path: in its folder, or beside a file under its name. Raises ConfigError."""
    return path / PAGES[payload.subject(path).kind] if path.is_dir() else path.with_suffix(".html")


def write_pages(paths: Sequence[Path], file: Path) -> None:
    """Write one page of these runs, audits, evaluations and studies. Raises ConfigError where a path is none of them."""
    shown = payload.manifest(paths)
    packs = payload.sample(paths, shown, BUDGET)
    write_whole(file, run_page(shown, packs))


def write_study(plan: Plan, elsewhere: study.Elsewhere | None = None) -> str:
    """Write the figures and the page into the study's folder. Returns the line that is printed. Raises ConfigError.

    elsewhere: finished runs that were made in another place, by arm and seed, as `study.read_elsewhere` gives them.
    """
    found = study.figures(plan, elsewhere)
    folder = plan.study.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / study.FIGURES, json.dumps(found, indent=1) + "\n")
    write_pages([folder], page_of(folder))
    return f"{found['finished']} of {found['planned']} runs finished; written: {page_of(folder)}, {folder / study.FIGURES}"


def write_evaluation(folder: Path, result: dict[str, Any], paper: dict[str, Any] | None = None) -> Path:
    """Write the page of an evaluation, and the same as Markdown with a plot, into its folder. Returns the page.

    paper: the published figures that it is set beside, see evaluation/paper.py.
    """
    write_whole(folder / evaluation.PAPER, json.dumps(paper)) if paper else (folder / evaluation.PAPER).unlink(missing_ok=True)
    evaluation.draw(result, folder / f"{evaluation.RESULT}.png")
    write_whole(folder / f"{evaluation.RESULT}.md", evaluation.page(result, paper))
    write_pages([folder], page_of(folder))
    return page_of(folder)


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
