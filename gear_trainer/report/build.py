"""A finished run as one page: curves, the last step's numbers, and rollouts coloured by token credit.

`python -m gear_trainer report runs/NAME` writes `report.html` and `curve.png` into the run's folder.
`python -m gear_trainer report --compare FILE.png runs/A runs/B ...` draws held-out success of several runs, one colour a method.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from gear_trainer.report.pages import template
from gear_trainer.report.plots import pyplot
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.records import read_records, recorded_steps
from gear_trainer.runs.trackers import flat

_CURVES = ("success", "segments_per_trajectory", "share_above_threshold", "entropy")
_SHOWN = 12  # rollouts on the page: the page stays light at any group size


def write_report(run_dir: Path) -> str:
    """Write the page and its curve. Returns the line that is printed at the end of a run."""
    steps = read_metrics(run_dir / "metrics.jsonl")
    draw_curves(steps, run_dir / "curve.png")
    last = [m for m in steps if m["step"]]
    page = template("report").render(
        name=run_dir.name,
        config=(run_dir / "config.json").read_text(),
        curve=base64.b64encode((run_dir / "curve.png").read_bytes()).decode(),
        metrics=_rows(last[-1]) if last else [],
        rollouts=[_view(r) for r in _last_rollouts(run_dir)],
        held_out=_held_out(steps),
    )
    (run_dir / "report.html").write_text(page)
    return f"{_summary(steps)}report: {run_dir / 'report.html'}"


def draw_curves(steps: list[dict[str, Any]], path: Path) -> None:
    """Success (training prompts, and held-out as points), segments, share above the threshold, entropy."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(_CURVES), figsize=(4 * len(_CURVES), 3.2), constrained_layout=True)
    for axis, name in zip(axes, _CURVES, strict=True):
        points = [(m["step"], m[name]) for m in steps if m.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color="C0", lw=1.5, label="training prompts")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    if held_out := _held_out(steps):
        axes[0].plot(*zip(*held_out, strict=True), "o-", color="C1", label="held-out")
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_comparison(run_dirs: list[Path], path: Path) -> None:
    """Held-out success: a thin line a run, a thick one for each method's mean."""
    plt = pyplot()
    methods: dict[str, list[list[tuple[int, float]]]] = {}
    for run_dir in run_dirs:
        credit = json.loads((run_dir / "config.json").read_text())["credit"]
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


def _rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    plain = {k: v for k, v in metrics.items() if not isinstance(v, dict)}
    nested = flat({k: v for k, v in metrics.items() if isinstance(v, dict)})
    return [(k.replace("_", " ").replace("/", ", "), "-" if v is None else f"{v:g}") for k, v in (plain | nested).items()]


def _last_rollouts(run_dir: Path) -> list[dict[str, Any]]:
    """Of the last step: whole groups, those with both outcomes first, since only they carry credit."""
    steps = recorded_steps(run_dir)
    rollouts = read_records(run_dir, steps[-1]) if steps else []
    return sorted(rollouts, key=lambda r: (r["advantage"] == 0, r["group"], r["sample"]))[:_SHOWN]


def _view(rollout: dict[str, Any]) -> dict[str, Any]:
    columns = ("tokens", "mask", "weight", "segment", "signal", "entropy", "logprobs", "teacher_logprobs")
    length = len(rollout["ids"])
    lists = [rollout[c] or [None] * length for c in columns]
    tokens: list[dict[str, Any]] = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    spread = max([abs(t["weight"] - 1) for t in tokens if t["weight"] is not None], default=0) or 1
    for i, t in enumerate(tokens):
        t["style"] = _style(t, spread)
        t["onset"] = (
            (t["segment"] or 0) >= 0 and t["segment"] is not None and (i == 0 or tokens[i - 1]["segment"] != t["segment"])
        )
    return rollout | {"view": tokens}


def _style(token: dict[str, Any], spread: float) -> str:
    if not token["mask"]:
        return "color:var(--faint)"
    tint = (token["weight"] - 1) / spread
    return f"background:rgba({'46,125,50' if tint > 0 else '198,40,40'},{abs(tint) * 0.45:.2f})"
