"""A report for the terminal: a run's state, its numbers with a sparkline each, its warnings, a rollout coloured by weight; the
tables of an evaluation or a study."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gear_trainer.report import payload, tables
from gear_trainer.runs.records import read_records

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a sparkline
NUMBERS = (
    "held_out_success", "success", "reward_mean", "entropy", "response_length", "tool_calls", "zero_advantage",
    "share_above_threshold", "segments_per_trajectory", "share_unclosed", "mean_weight_positive", "mean_weight_negative",
    "teacher_gain_success", "teacher_gain_failure", "logprob_gap_mean", "grad_norm", "seconds/step",
)  # fmt: skip


def show(folders: Sequence[Path], out: Console) -> None:
    """Print what is there one after the other. Raises ConfigError where a path is none of what `payload.subject` knows."""
    for folder in folders:
        run = payload.describe(folder)
        out.rule(Text(run["name"]))
        step = f"step {run['step']} of {run['steps']}" if run["steps"] else ""
        facts = (run["credit"], run["task"], step, run["state"], run["why"], run["said"])
        out.print(Text(" · ".join(visible(part) for part in facts if part)))
        for table in run["tables"]:
            out.print(_grid(table))
        if run["series"]:
            out.print(_numbers(run["series"]))
        for warning in run["warnings"]:
            out.print(Text(warning["found"], style="bold red"))
            out.print(Text(f"  {warning['reason']}\n  Mend: {warning['mend']}"))
        steps = [key for key in run["recorded"] if isinstance(key, int)]
        if steps and (rollout := _telling(read_records(folder, steps[-1]))):
            out.print(_rollout(rollout, steps[-1]))


def _numbers(series: dict[str, list[list[float]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("number", "first", "last", ""):
        table.add_column(name, justify="left" if name in ("number", "") else "right")
    for name in NUMBERS:
        if name in series:
            values = series[name][1]
            table.add_row(name, f"{values[0]:.4g}", f"{values[-1]:.4g}", sparkline(values))
    return table


def _grid(of: tables.Table) -> Table:
    table = Table(title=Text(f"\n{of.title}", style="bold"), title_justify="left", box=None, pad_edge=False)
    for name in of.head:
        table.add_column(Text(visible(name)))
    for row in of.rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def sparkline(values: Sequence[float]) -> str:
    """The values as a row of blocks, at most WIDTH of them, each the mean of its share of the values."""
    count = min(WIDTH, len(values))
    bounds = [len(values) * k // count for k in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((v - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 3] for v in means)


def _telling(rollouts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rollout with the widest weights, which is the one to read; none where no weight differs from 1."""
    return max((r for r in rollouts if _spread(r)), key=_spread, default=None)


def _spread(rollout: dict[str, Any]) -> float:
    return max((abs(w - 1) for w in rollout["weight"] or [] if w is not None), default=0.0)


def _rollout(r: dict[str, Any], step: int) -> Text:
    """The rollout's text: green weighed up, red weighed down, a bar where a segment opens, grey what the policy did not say."""
    outcome = "solved" if r["success"] else "failed"
    head = (
        f"\nstep {step}, group {r['group']}, sample {r['sample']}, {visible(r['problem'])}: {outcome}, A {r['advantage']:+.3f}\n"
    )
    text, full, before = Text(head, style="bold"), _spread(r), None
    segments = r["segment"] or [None] * len(r["ids"])
    for piece, is_policy, weight, segment in zip(r["tokens"], r["mask"], r["weight"], segments, strict=True):
        if not is_policy:
            text.append(visible(piece), style="not bold dim")
            continue
        if segment is not None and segment >= 0 and segment != before:
            text.append("|", style="not bold yellow")
        before = segment
        tint = min(1.0, abs((weight or 1) - 1) / full) if full else 0.0
        shade = round(40 + 110 * tint)
        color = f"rgb(0,{shade},60)" if (weight or 1) > 1 else f"rgb({shade},30,30)"
        text.append(visible(piece), style=f"not bold white on {color}" if tint > 0.05 else "not bold")
    return text


def visible(text: str) -> str:
    """The text with what a terminal would obey, or nobody would see, as a sign of its own; lines still break. As page/text.js."""
    return "".join(_sign(c) for c in text)


def _sign(c: str) -> str:
    if c == "\n":
        return "↵\n"
    if c == "\t":
        return "→ "
    if c < " " or c == "\x7f":
        return chr(0x2421 if c == "\x7f" else 0x2400 + ord(c))
    return f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else c
