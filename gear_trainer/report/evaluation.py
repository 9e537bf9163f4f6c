"""An evaluation as tables, as Markdown and as a plot; two of them compared, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gear_trainer.evaluation.records import ROLLOUTS, read_result
from gear_trainer.report.plots import pyplot
from gear_trainer.report.tables import Interval, Intervals, Table, described, grid, markdown, number, percent, span
from gear_trainer.runs.files import read_whole, write_whole

RESULT, COMPARISON = "result", "comparison"  # files by these names, with .md, .png, .json; the first one's page is RESULT.html
PAPER = "paper.json"  # the published figures that a result was set beside
SAMPLES = "samples"  # the key of its rollouts
_MOST = 40  # categories that are drawn; the table has all


def line(result: dict[str, Any]) -> str:
    """The result in one line for the terminal."""
    row, settings = result["overall"], result["settings"]
    if row["mean"] is None:
        return f"{settings['set']}: nothing was scored; {_lost(result)}"
    parts = [f"held-out success: {row['mean']:.3f} of {row['problems']} problems (95 % interval {span(*row['interval'])})"]
    if row["samples"] > 1:
        parts.append(f"mean of {row['samples']} samples; solved by one of them: {row['pass'][str(row['samples'])]:.3f}")
    if row["samples"] > 2 and row["majority"] is not None:
        parts.append(f"by the majority: {row['majority']:.3f}")
    if result["lost"]:
        parts.append(_lost(result))
    return f"{settings['set']}: " + ", ".join(parts)


def page(result: dict[str, Any], paper: dict[str, Any] | None = None) -> str:
    """The result as Markdown."""
    s = result["settings"]
    parts = [f"# {s['set']}: {s['model']}", line(result) + ".", f"![]({RESULT}.png)", *map(markdown, tables(result, paper))]
    rows = [[key, f"`{value}`"] for key, value in s.items()]
    return "\n\n".join([*parts, markdown(Table("Set-up", ["what", "value"], rows))]) + "\n"


def describe(folder: Path) -> dict[str, Any]:
    """A finished evaluation as a page shows it. Raises ConfigError where there is none."""
    result, paper = read_result(folder), read_whole(folder / PAPER)
    s, k = result["settings"], result["overall"]["samples"]
    rows = [
        Interval(name, row["mean"], row["interval"][0], row["interval"][1])
        for name, row in _rows(result).items()
        if row["mean"] is not None
    ]
    return described(
        f"{s['set']}: {s['model']}",
        "evaluation",
        said=line(result),
        task=s["task"],
        recorded=[SAMPLES] if (folder / ROLLOUTS).is_file() else [],
        config=json.dumps(s, indent=2),
        tables=tables(result, paper),
        intervals=[Intervals(f"mean@{k}", False, rows)] if rows else [],
    )


def tables(result: dict[str, Any], paper: dict[str, Any] | None = None) -> list[Table]:
    """All figures of a result, beside the paper's where they are given."""
    found = [_figures(result), _ends(result)]
    if names := list(result["overall"]["metrics"]):
        rows = [[name, *(number(row["metrics"].get(n)) for n in names)] for name, row in _rows(result).items()]
        found.append(Table("The task's own figures", ["category", *names], rows))
    if result["lost"]:
        rows = [[lost["problem"], lost["failure"]] for lost in result["lost"]]
        found.append(Table("Left out", ["problem", "why"], rows, f"{_lost(result)}."))
    return [*found, _paper(result, paper)] if paper else found


def _lost(result: dict[str, Any]) -> str:
    return f"{len(result['lost'])} problem(s) left out, as their environment broke off twice"


def _rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return result["categories"] | {"all": result["overall"]}


def _figures(result: dict[str, Any]) -> Table:
    whole = result["overall"]
    k = whole["samples"]
    passes = [n for n in whole["pass"] if n != "1"]
    head = ["category", "problems", f"mean@{k}", "95 % interval", *(f"pass@{n}" for n in passes)]
    head += [f"maj@{k}"] * (k > 1) + ["reward", "tool use", "calls", "call errors", "tokens"]
    rows = []
    for name, row in _rows(result).items():
        cells = [name, str(row["problems"]), number(row["mean"]), span(*row["interval"])]
        cells += [number(row["pass"].get(n)) for n in passes] + [number(row["majority"])] * (k > 1)
        cells += [number(row["reward"]), percent(row["tool_use"]), number(row["calls"], 2), percent(row["call_errors"])]
        rows.append([*cells, number(row["tokens"], 0)])
    said = "Intervals are percentiles of a bootstrap over problems. Tool use: rollouts with a call at least; calls a rollout."
    if k > 1:
        said += f" Of pass@{k}: {span(*whole['pass_interval'])}" + (
            f"; of maj@{k}: {span(*whole['majority_interval'])}." if whole["majority_interval"] else "."
        )
    return Table("Figures", head, rows, said)


def _ends(result: dict[str, Any]) -> Table:
    ends = list(result["overall"]["ends"])
    rows = [[name, *(percent(row["ends"][end]) for end in ends), str(row["no_room"])] for name, row in _rows(result).items()]
    said = "done: by itself; turns: with its last turn; length: tokens ran out. No room: prompts that fill the context."
    if result["retried"]:
        said += f" {result['retried']} rollout(s) broke off once and were tried again."
    return Table("Why episodes ended", ["category", *ends, "no room"], rows, said)


def _paper(result: dict[str, Any], paper: dict[str, Any]) -> Table:
    row = result["overall"]
    rows = [["this evaluation", result["settings"]["model"], number(row["mean"]), span(*row["interval"])]]
    rows += [
        [method, model, number(value), ""] for model, methods in paper["figures"].items() for method, value in methods.items()
    ]
    said = "The paper's are single runs, mean@16, without intervals (arXiv 2605.11853). What differs in the set-up:\n\n"
    said += "\n".join(f"* {text}" for text in paper["differs"])
    return Table(f"Beside the paper: {paper['benchmark']}", ["what", "model", "figure", "95 % interval"], rows, said)


def write_comparison(folder: Path, found: dict[str, Any]) -> Path:
    """Write the figures and the page of a comparison into a folder. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{COMPARISON}.json", json.dumps(found, indent=1))
    write_whole(folder / f"{COMPARISON}.md", comparison(found))
    return folder / f"{COMPARISON}.md"


def comparison(found: dict[str, Any]) -> str:
    """Two evaluations compared, as Markdown."""
    head = ["category", "problems", "A", "B", "B - A", "95 % interval", "tool use, A", "tool use, B"]
    rows = []
    for name, row in (found["categories"] | {"all": found["overall"]}).items():
        means = [number(value) for value in row["mean"]]
        use = [percent(value) for value in row["tool_use"]]
        rows.append([name, str(row["problems"]), *means, f"{row['difference']:+.3f}", span(*row["interval"], spec="+.3f"), *use])
    parts = [
        f"# A: {found['a']}, B: {found['b']}",
        grid(head, rows),
        f"{found['problems']} problems that both have scored ({found['only_a']} more in A, {found['only_b']} in B); the interval "
        "of B - A is that of a bootstrap over problems, paired.",
        f"Solved by more than half of the samples: {found['solved_only_a']} in A alone, {found['solved_only_b']} in B alone; "
        f"McNemar's exact p = {found['mcnemar_p']:.3g}.",
    ]
    for side in "ab":
        if names := found[f"examples_only_{side}"]:
            parts.append(f"In {side.upper()} alone: {', '.join(names)}.")
    differing = "".join(f"\n* {text}" for text in found["differing"]) or " nothing."
    return "\n\n".join([*parts, f"What differs in the set-up:{differing}"]) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Success by category with its intervals, pass@k over k, the use of tools, and why episodes ended."""
    plt = pyplot()
    rows = dict(list(_rows(result).items())[-_MOST:])
    scored = {name: row for name, row in rows.items() if row["mean"] is not None}
    figure, axes = plt.subplots(1, 4, figsize=(16, max(3.0, 1.2 + 0.32 * len(rows))), constrained_layout=True)
    names, places = list(scored), range(len(scored))
    means = [row["mean"] for row in scored.values()]
    spread = [[max(0.0, abs(r["mean"] - r["interval"][side])) for r in scored.values()] for side in (0, 1)]
    axes[0].barh(places, means, xerr=spread, color="C0", alpha=0.8, capsize=3)
    axes[0].set(title=f"mean@{result['overall']['samples']}, 95 % interval", xlim=(0, 1))
    axes[2].barh(places, [row["tool_use"] for row in scored.values()], color="C2", alpha=0.8)
    axes[2].set(title="rollouts that call a tool", xlim=(0, 1))
    left = [0.0] * len(scored)
    for i, end in enumerate(result["overall"]["ends"]):
        shares = [row["ends"][end] for row in scored.values()]
        axes[3].barh(places, shares, left=left, color=f"C{i}", alpha=0.8, label=end)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes[3].set(title="why episodes ended", xlim=(0, 1))
    axes[3].legend(fontsize=8, loc="lower right")
    for axis in (axes[0], axes[2], axes[3]):
        axis.set_yticks(list(places), names if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
    for name, row in scored.items():
        style = {"color": "black", "lw": 2} if name == "all" else {"lw": 0.8, "alpha": 0.6}
        axes[1].plot([int(k) for k in row["pass"]], list(row["pass"].values()), "o-", **style)
    axes[1].set(title="pass@k", ylim=(0, 1), xlabel="k", xscale="log")
    axes[1].set_xticks([int(k) for k in result["overall"]["pass"]], list(result["overall"]["pass"]), minor=False)
    axes[1].minorticks_off()
    axes[1].grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)
