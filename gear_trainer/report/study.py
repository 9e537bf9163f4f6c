"""A study's figures, as JSON and as tables: curves with bands, differences paired by seed with intervals, cost, what failed.

Only finished runs are in the figures; the others are named with their state.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from gear_trainer.config import near, read_yaml
from gear_trainer.errors import ConfigError
from gear_trainer.report.statistics import Difference, Estimate, area, band, estimate, holm, paired
from gear_trainer.report.tables import Interval, Intervals, Table, described, number, p_value, with_interval
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.study import Plan, Standing, standings
from gear_trainer.runs.trackers import flat
from gear_trainer.user_code import said

FIGURES = "study.json"
MEASURES = {"area": "mean over the run (area under the curve)", "final": "after the last step"}
PHASES = ("rollout", "write", "wait", "score", "credit", "update", "push")  # of a step's cost; evaluation is left out
_SET_UP = ("config", "overrides", "seeds", "metric", "baseline", "test", "side_by_side", "settings")
_MEASURED = {
    "area": "The area under the curve is taken by trapezoids over the steps and divided by their span: the curve's mean height. ",
    "final": "",
}
_TESTED = (
    "Intervals are Student's over seeds, those of differences over pairs of runs with one seed, not corrected. Tests: {test}, "
    "two-sided; the last column is Holm's correction over all arms. With fewer than two pairs there is neither."
)

_FAILED = (
    "The same command tries each of them once more, from its last checkpoint on. Until they finish, an arm is judged by the runs "
    "that survived."
)

Elsewhere = dict[tuple[str, int], dict[str, Any]]


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


# --- what a page shows of them ------------------------------------------------------------------------------------------------


def describe(file: Path) -> dict[str, Any]:
    """A study by its FIGURES as a page shows it. Raises ConfigError where the file is none."""
    try:
        found = json.loads(file.read_text())
        return described(
            found["name"],
            "study",
            said=_said(found),
            config=json.dumps({name: found[name] for name in _SET_UP}, indent=2),
            tables=tables(found),
            intervals=_intervals(found),
            arms=[_curves(name, arm, found) for name, arm in found["arms"].items() if arm["curve"]],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: no {FIGURES} of a study ({said(error)}): `gear-trainer study` writes it") from None


def _said(found: dict[str, Any]) -> str:
    failed = sum(run["state"] == "failed" for arm in found["arms"].values() for run in arm["runs"])
    runs = f"{found['finished']} of {found['planned']} runs finished" + (f", {failed} failed" if failed else "")
    arms = f"{len(found['arms'])} arms, {len(found['seeds'])} seeds, {found['metric']}, held against {found['baseline']}"
    return f"{arms}; {runs}"


def _curves(name: str, arm: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """An arm's runs, and their mean with its interval: [step, mean, low, high]."""
    runs = [{"name": run["name"], "points": run["points"]} for run in arm["runs"] if run["points"]]
    curve = [[point[key] for key in ("step", "mean", "low", "high")] for point in arm["curve"]]
    about = {"metric": found["metric"], "baseline": name == found["baseline"], "seeds": arm["final"]["n"]}
    return {"name": name, "curve": curve, "runs": runs} | about


def _intervals(found: dict[str, Any]) -> list[Intervals]:
    """Each measure's differences to the baseline, of the arms that have one."""
    out = []
    for measure, title in MEASURES.items():
        rows = []
        for name, arm in found["arms"].items():
            d = arm["difference"][measure] if arm["difference"] else None
            if d and d["mean"] is not None:
                rows.append(Interval(name, d["mean"], d["low"], d["high"], sure(d)))
        if rows:
            out.append(Intervals(f"{title}, less {found['baseline']}", True, rows))
    return out


def tables(found: dict[str, Any]) -> list[Table]:
    """All figures of a study: differences, cost, what failed, what is not finished, arms, runs."""
    runs = [run for arm in found["arms"].values() for run in arm["runs"]]
    parts = [*(_differences(found, measure) for measure in MEASURES), _cost_table(found)]
    if failed := [run for run in runs if run["state"] == "failed"]:
        rows = [[run["name"], f"{run['step']}/{run['steps']}", run["why"], run["log"]] for run in failed]
        parts.append(Table("Failures", ["run", "step", "why", "log"], rows, _FAILED))
    if open_ := [run for run in runs if run["state"] not in ("finished", "failed")]:
        rows = [[run["name"], run["state"], f"{run['step']}/{run['steps']}"] for run in open_]
        parts.append(Table("Not finished", ["run", "state", "step"], rows))
    arms = [[name, " ".join(arm["overrides"]) or "-"] for name, arm in found["arms"].items()]
    parts.append(Table("Arms", ["arm", "beside the configuration"], arms))
    rows = [[run["name"], run["state"], *(number(run[m]) for m in MEASURES), _hours(run["cost"])] for run in runs]
    return [*parts, Table("Runs", ["run", "state", *MEASURES.values(), "hours"], rows)]


def _differences(found: dict[str, Any], measure: str) -> Table:
    base, rows = found["baseline"], []
    ran = {name: arm for name, arm in found["arms"].items() if arm[measure]["n"]}
    for name, arm in ran.items():
        d = arm["difference"][measure] if arm["difference"] else None
        own = [name, str(arm[measure]["n"]), _mean(arm[measure])]
        if d is None:
            rows.append([*own, "the baseline", "", "", ""])
        else:
            rows.append([*own, _mean(d, "+.3f"), str(d["n"]), p_value(d["p"]), p_value(d["p_holm"])])
    head = ["arm", "seeds", "mean (95 % interval)", f"less {base} (95 % interval)", "pairs", "p", "p, Holm"]
    test = "Wilcoxon's signed ranks" if found["test"] == "wilcoxon" else "paired t"
    left = len(found["arms"]) - len(ran)
    none = f" Of {left} arm(s) no run has finished." if left else ""
    return Table(f"Paired by seed: {MEASURES[measure]}", head, rows, f"{_MEASURED[measure]}{_TESTED.format(test=test)}{none}")


def _mean(e: dict[str, Any], spec: str = ".3f") -> str:
    return with_interval(e["mean"], e["low"], e["high"], spec)


def _cost_table(found: dict[str, Any]) -> Table:
    rows = []
    for name, arm in found["arms"].items():
        if cost := arm["cost"]:
            phases = [number(cost[phase], 2) for phase in PHASES]
            tokens = number(cost["policy_tokens"], 0)
            rows.append([name, _hours(cost), number(cost["step"], 2), number(arm["cost_ratio"], 2), *phases, tokens])
    head = ["arm", "hours a run", "seconds a step", f"of {found['baseline']}", *PHASES, "policy tokens a step"]
    together = f" Up to {found['side_by_side']} runs shared the machine." if found["side_by_side"] > 1 else ""
    said = f"Means over finished runs, seconds by phase; evaluation counts in the hours alone.{together}"
    return Table("Cost", head, rows, said)


def _hours(cost: dict[str, Any] | None) -> str:
    return number(cost["hours"] if cost else None, 2)


def sure(difference: dict[str, Any]) -> bool:
    """Holm's correction of an arm's test, over all arms of a measure, leaves it below 0.05."""
    return difference["p_holm"] is not None and difference["p_holm"] < 0.05
