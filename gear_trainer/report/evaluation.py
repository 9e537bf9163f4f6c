"""An evaluation as a page in Markdown with a plot; two of them compared, as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gear_trainer.report.plots import pyplot
from gear_trainer.runs.files import write_whole

RESULT, COMPARISON = "result", "comparison"  # files by these names, with .md, .png, .json
_MOST = 40  # categories that are drawn; the table has all


def line(result: dict[str, Any]) -> str:
    """The result in one line for the terminal."""
    row, settings = result["overall"], result["settings"]
    if row["mean"] is None:
        return f"{settings['set']}: nothing was scored; {_lost(result)}"
    parts = [f"held-out success: {row['mean']:.3f} of {row['problems']} problems (95 % interval {_span(row['interval'])})"]
    if row["samples"] > 1:
        parts.append(f"mean of {row['samples']} samples; solved by one of them: {row['pass'][str(row['samples'])]:.3f}")
    if row["samples"] > 2 and row["majority"] is not None:
        parts.append(f"by the majority: {row['majority']:.3f}")
    if result["lost"]:
        parts.append(_lost(result))
    return f"{settings['set']}: " + ", ".join(parts)


def write_page(folder: Path, result: dict[str, Any], paper: dict[str, Any] | None = None) -> Path:
    """Write the page and its plot into an evaluation's folder. Returns the page."""
    draw(result, folder / f"{RESULT}.png")
    write_whole(folder / f"{RESULT}.md", page(result, paper))
    return folder / f"{RESULT}.md"


def page(result: dict[str, Any], paper: dict[str, Any] | None = None) -> str:
    """The page's Markdown."""
    s = result["settings"]
    parts = [f"# {s['set']}: {s['model']}", line(result) + ".", f"![]({RESULT}.png)", _figures(result), _ends(result)]
    if metrics := _metrics(result):
        parts.append(metrics)
    if result["lost"]:
        rows = [[lost["problem"], lost["failure"]] for lost in result["lost"]]
        parts.append(f"## Left out\n\n{_lost(result)}.\n\n{_table(['problem', 'why'], rows)}")
    if paper:
        parts.append(_paper(result, paper))
    rows = [[key, f"`{value}`"] for key, value in s.items()]
    parts.append(f"## Set-up\n\n{_table(['what', 'value'], rows)}")
    return "\n\n".join(parts) + "\n"


def _lost(result: dict[str, Any]) -> str:
    return f"{len(result['lost'])} problem(s) left out, as their environment broke off twice"


def _rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return result["categories"] | {"all": result["overall"]}


def _figures(result: dict[str, Any]) -> str:
    whole = result["overall"]
    k = whole["samples"]
    passes = [n for n in whole["pass"] if n != "1"]
    head = ["category", "problems", f"mean@{k}", "95 % interval", *(f"pass@{n}" for n in passes)]
    head += [f"maj@{k}"] * (k > 1) + ["reward", "tool use", "calls", "call errors", "tokens"]
    rows = []
    for name, row in _rows(result).items():
        cells = [name, str(row["problems"]), _number(row["mean"]), _span(row["interval"])]
        cells += [_number(row["pass"].get(n)) for n in passes] + [_number(row["majority"])] * (k > 1)
        cells += [_number(row["reward"]), _percent(row["tool_use"]), _number(row["calls"], 2), _percent(row["call_errors"])]
        rows.append([*cells, _number(row["tokens"], 0)])
    said = "Intervals are percentiles of a bootstrap over problems. Tool use: rollouts with a call at least; calls a rollout."
    if k > 1:
        said += f" Of pass@{k}: {_span(whole['pass_interval'])}" + (
            f"; of maj@{k}: {_span(whole['majority_interval'])}." if whole["majority_interval"] else "."
        )
    return f"## Figures\n\n{_table(head, rows)}\n\n{said}"


def _ends(result: dict[str, Any]) -> str:
    ends = list(result["overall"]["ends"])
    rows = [[name, *(_percent(row["ends"][end]) for end in ends), str(row["no_room"])] for name, row in _rows(result).items()]
    said = "done: by itself; turns: with its last turn; length: tokens ran out. No room: prompts that fill the context."
    if result["retried"]:
        said += f" {result['retried']} rollout(s) broke off once and were tried again."
    return f"## Why episodes ended\n\n{_table(['category', *ends, 'no room'], rows)}\n\n{said}"


def _metrics(result: dict[str, Any]) -> str:
    names = list(result["overall"]["metrics"])
    if not names:
        return ""
    rows = [[name, *(_number(row["metrics"].get(n)) for n in names)] for name, row in _rows(result).items()]
    return f"## The task's own figures\n\n{_table(['category', *names], rows)}"


def _paper(result: dict[str, Any], paper: dict[str, Any]) -> str:
    row = result["overall"]
    rows = [["this evaluation", result["settings"]["model"], _number(row["mean"]), _span(row["interval"])]]
    rows += [
        [method, model, _number(value), ""] for model, methods in paper["figures"].items() for method, value in methods.items()
    ]
    differs = "\n".join(f"* {text}" for text in paper["differs"])
    return (
        f"## Beside the paper: {paper['benchmark']}\n\n{_table(['what', 'model', 'figure', '95 % interval'], rows)}\n\n"
        f"The paper's are single runs, mean@16, without intervals (arXiv 2605.11853). What differs in the set-up:\n\n{differs}"
    )


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
        means = [_number(value) for value in row["mean"]]
        use = [_percent(value) for value in row["tool_use"]]
        rows.append([name, str(row["problems"]), *means, f"{row['difference']:+.3f}", _span(row["interval"], "+.3f"), *use])
    parts = [
        f"# A: {found['a']}, B: {found['b']}",
        _table(head, rows),
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


def _table(head: list[str], rows: list[list[str]]) -> str:
    plain = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *plain])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _span(ends: list[float], spec: str = ".3f") -> str:
    return f"{ends[0]:{spec}} to {ends[1]:{spec}}"
