"""A study as one page and as JSON: curves with bands, figures with intervals, differences paired by seed, cost, what failed.

Only finished runs are in the figures; the others are named with their state.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

from gear_trainer.config import near, read_yaml
from gear_trainer.errors import ConfigError
from gear_trainer.report.pages import template
from gear_trainer.report.plots import pyplot
from gear_trainer.report.statistics import Difference, Estimate, area, band, estimate, holm, paired
from gear_trainer.runs.files import read_metrics, write_whole
from gear_trainer.runs.study import Plan, Standing, standings
from gear_trainer.runs.trackers import flat
from gear_trainer.user_code import said

PAGE, FIGURES = "study.html", "study.json"
MEASURES = {"area": "mean over the run (area under the curve)", "final": "after the last step"}
PHASES = ("rollout", "write", "wait", "score", "credit", "update", "push")  # of a step's cost; evaluation is left out
_COLUMNS = 4  # of panels


Elsewhere = dict[tuple[str, int], dict[str, Any]]


def write_study(plan: Plan, elsewhere: Elsewhere | None = None) -> str:
    """Write the page and its figures into the study's folder. Returns the line that is printed. Raises ConfigError.

    elsewhere: finished runs that were made in another place, by arm and seed, as `read_elsewhere` gives them.
    """
    found = figures(plan, elsewhere)
    folder = plan.study.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FIGURES, json.dumps(found, indent=1) + "\n")
    write_whole(folder / PAGE, page(found))
    return f"{found['finished']} of {found['planned']} runs finished; written: {folder / PAGE}, {folder / FIGURES}"


# --- figures ----------------------------------------------------------------------------------------------------------------


def figures(plan: Plan, elsewhere: Elsewhere | None = None) -> dict[str, Any]:
    """All that the page shows, by arm, as JSON takes it. Raises ConfigError where no finished run has the metric."""
    study = plan.study
    by_arm: dict[str, list[Standing]] = {arm: [] for arm in study.arms}
    for standing in standings(plan):
        by_arm[standing.cell.arm].append(standing)
    others = elsewhere or {}
    runs = {arm: [others.get((arm, s.cell.seed)) or _run(s, study.metric) for s in own] for arm, own in by_arm.items()}
    done = {arm: [run for run in own if run["state"] == "finished"] for arm, own in runs.items()}
    arms: dict[str, Any] = {}
    for arm, own in done.items():
        curves = [dict(run["points"]) for run in own if run["points"]]
        arms[arm] = {
            "overrides": study.arms[arm],
            "curve": [{"step": step, **e._asdict()} for step, e in band(curves)],
            **{measure: _estimate(own, measure)._asdict() for measure in MEASURES},
            "cost": _cost([run["cost"] for run in own if run["cost"]]),
            "runs": runs[arm],
        }
    _compare(arms, done, study.baseline, study.test)
    return {
        "name": study.name,
        "metric": study.metric,
        "baseline": study.baseline,
        "test": study.test,
        "seeds": study.seeds,
        "side_by_side": study.side_by_side,
        "config": study.config,
        "settings": _settings(plan),
        "overrides": study.overrides,
        "planned": len(plan.cells),
        "finished": sum(len(own) for own in done.values()),
        "arms": arms,
    }


def _settings(plan: Plan) -> str:
    """A hash of what all runs of a study are made with, but for the arms' own overrides."""
    study = plan.study
    parts = [read_yaml(plan.config), study.overrides, study.metric]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_elsewhere(plan: Plan, files: list[Path]) -> Elsewhere:
    """The finished runs of other FIGURES of this study, by arm and seed; an earlier file's count where two have the same.

    Raises ConfigError where a file cannot be read, or is of other settings.
    """
    found: Elsewhere = {}
    for file in files:
        try:
            other = json.loads(file.read_text())
            settings, arms = other["settings"], {a: (own["overrides"], own["runs"]) for a, own in other["arms"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--add {file}: no {FIGURES} of a study ({said(error)})") from None
        if settings != _settings(plan):
            raise ConfigError(f"--add {file}: its runs have another configuration, other overrides or another metric")
        for arm, (overrides, runs) in arms.items():
            if overrides != plan.study.arms.get(arm, overrides):
                raise ConfigError(f"--add {file}: its arm {arm} has other overrides: {' '.join(overrides)}")
            for run in (run for run in runs if run["state"] == "finished"):
                found.setdefault((arm, run["seed"]), run)
    return found


def _run(standing: Standing, metric: str) -> dict[str, Any]:
    """A run's line: its state, and of a finished one its curve, figures and cost."""
    cell, run = standing.cell, standing.run
    state = run.state if run else "failed" if standing.why else "not begun"
    found = {"name": cell.name, "seed": cell.seed, "state": state, "why": standing.why, "step": run.step if run else 0}
    found |= {"steps": cell.cfg.train.steps, "log": str(cell.log), "points": [], "area": None, "final": None, "cost": None}
    if state != "finished":
        return found
    steps = read_metrics(cell.cfg.run_dir / "metrics.jsonl")
    numbers = [(m["step"], flat(m)) for m in steps]
    points = [(step, values[metric]) for step, values in numbers if metric in values]
    if not points:
        known = {name for _, values in numbers for name in values}
        raise ConfigError(f"metric={metric}: {cell.cfg.run_dir} has no such number at any step{near(metric, known)}")
    return found | {"points": points, "area": area(points), "final": points[-1][1], "cost": _seconds(steps)}


def _seconds(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A run's cost: hours in all, and of a step without evaluation its mean seconds, those of its phases, policy tokens."""
    timed = [m for m in steps if m.get("seconds")]
    if not timed:
        return None
    evaluation = math.fsum(m["seconds"].get("eval", 0.0) for m in timed)
    whole = math.fsum(m["seconds"]["step"] for m in timed)
    phases = {name: math.fsum(m["seconds"].get(name, 0.0) for m in timed) / len(timed) for name in PHASES}
    tokens = math.fsum(m["policy_tokens"] for m in timed) / len(timed)
    return {"hours": whole / 3600, "step": (whole - evaluation) / len(timed), **phases, "policy_tokens": tokens}


def _cost(costs: list[dict[str, float]]) -> dict[str, float] | None:
    return {name: math.fsum(c[name] for c in costs) / len(costs) for name in costs[0]} if costs else None


def _by_seed(runs: list[dict[str, Any]], measure: str) -> dict[int, float]:
    return {run["seed"]: run[measure] for run in runs if run[measure] is not None}


def _estimate(runs: list[dict[str, Any]], measure: str) -> Estimate:
    return estimate(list(_by_seed(runs, measure).values()))


def _compare(arms: dict[str, Any], done: dict[str, list[dict[str, Any]]], baseline: str, test: str) -> None:
    """Put each arm's difference to the baseline beside its figures, corrected over all arms of a measure, and its cost."""
    others = [arm for arm in arms if arm != baseline]
    base = arms[baseline]["cost"]
    for arm in arms:
        own = arms[arm]["cost"]
        arms[arm]["cost_ratio"] = own["step"] / base["step"] if own and base and base["step"] else None
        arms[arm]["difference"] = None if arm == baseline else {}
    for measure in MEASURES:
        against = _by_seed(done[baseline], measure)
        found: list[Difference] = [paired(_by_seed(done[arm], measure), against, test) for arm in others]
        for arm, difference, p in zip(others, found, holm([d.p for d in found]), strict=True):
            arms[arm]["difference"][measure] = {**difference._asdict(), "p_holm": p}


# --- the page ---------------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """The page's HTML, complete in itself: nothing is asked of another host."""
    runs = [run for arm in found["arms"].values() for run in arm["runs"]]
    shown = any(arm["curve"] for arm in found["arms"].values())
    return template("study").render(
        found=found,
        measures=MEASURES,
        differences=_uri(draw_differences(found)) if shown and len(found["arms"]) > 1 else None,
        curves=_uri(draw_curves(found)) if shown else None,
        unfinished=[run for run in runs if run["state"] not in ("finished", "failed")],
        failed=[run for run in runs if run["state"] == "failed"],
        phases=PHASES,
        number=_number,
        span=_span,
        p_value=_p_value,
    )


def _number(value: float | None, spec: str = ".3f") -> str:
    return "-" if value is None else f"{value:{spec}}"


def _span(e: dict[str, Any], spec: str = ".3f") -> str:
    """A mean with its interval."""
    if e["mean"] is None:
        return "-"
    return f"{e['mean']:{spec}}" + ("" if e["low"] is None else f" ({e['low']:{spec}} to {e['high']:{spec}})")


def _p_value(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw_curves(found: dict[str, Any]) -> bytes:
    """A panel an arm that ran: its runs thin, their mean thick with its band, the baseline's in grey. Returns an SVG."""
    plt, base = pyplot(), found["arms"][found["baseline"]]
    ran = {name: arm for name, arm in found["arms"].items() if arm["curve"]}
    arms = {name: arm for name, arm in ran.items() if name != found["baseline"]} or ran
    rows = -(-len(arms) // _COLUMNS)
    columns = min(_COLUMNS, len(arms))
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.5 * rows), sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, (name, arm) in zip(axes.flat, arms.items(), strict=False):
        _draw_curve(axis, base["curve"], "0.45")
        for run in arm["runs"]:
            if run["points"]:
                axis.plot(*zip(*run["points"], strict=True), color="C0", lw=0.6, alpha=0.45)
        _draw_curve(axis, arm["curve"], "C0")
        axis.set_title(f"{name} ({arm['final']['n']} seeds)", fontsize=9)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    figure.supxlabel(f"step; grey: {found['baseline']}", fontsize=9)
    figure.supylabel(found["metric"].replace("_", " "), fontsize=9)
    return _svg(plt, figure)


def _draw_curve(axis: Any, curve: list[dict[str, Any]], color: str) -> None:
    if not curve:
        return
    steps = [point["step"] for point in curve]
    axis.plot(steps, [point["mean"] for point in curve], color=color, lw=2)
    if curve[0]["low"] is not None:
        low, high = ([point[end] for point in curve] for end in ("low", "high"))
        axis.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)


def draw_differences(found: dict[str, Any]) -> bytes:
    """Each arm's difference to the baseline with its 95 % interval, a panel a measure; arms that ran. Returns an SVG."""
    plt = pyplot()
    arms = {name: arm["difference"] for name, arm in found["arms"].items() if arm["difference"] is not None and arm["curve"]}
    size = 9, max(1.8, 1.0 + 0.26 * len(arms))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, sharey=True, constrained_layout=True)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for row, difference in enumerate(own[measure] for own in arms.values()):
            if difference["mean"] is None:
                continue
            sure = difference["p_holm"] is not None and difference["p_holm"] < 0.05
            ends = None
            if difference["low"] is not None:
                ends = [[difference["mean"] - difference["low"]], [difference["high"] - difference["mean"]]]
            axis.errorbar(difference["mean"], row, xerr=ends, fmt="o", ms=4, capsize=3, color="C0" if sure else "0.45")
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25, axis="x")
    axes[0].set_yticks(range(len(arms)), list(arms), fontsize=8)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(f"less {found['baseline']}; blue: below 0.05 after Holm's correction", fontsize=9)
    return _svg(plt, figure)


def _svg(plt: Any, figure: Any) -> bytes:
    """The figure, the same bytes for the same figure."""
    out = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
