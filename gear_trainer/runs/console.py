"""The terminal of a run: a progress bar, one line a step, and the result."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gear_trainer.config import Config

_LONGEST, _WIDE = 40, 120  # lines of a sample on the terminal, and characters of a line


class Console:
    """A live bar with one printed line a step above it; without a terminal only the lines. `quiet`: ranks other than 0."""

    def __init__(self, cfg: Config, start: int, quiet: bool):
        self.cfg, self.out = cfg, RichConsole(quiet=quiet, highlight=False)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.out, disable=quiet or not self.out.is_terminal, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(f"{cfg.name} · {cfg.credit}", total=cfg.train.steps, completed=start)

        self.told_memory = False

    def start(self) -> None:
        self.bar.start()

    def stop(self) -> None:
        self.bar.stop()

    def step(self, values: dict[str, Any]) -> None:
        self.out.print(_line(values, self.cfg.train.steps), soft_wrap=True)
        if "memory" in values and not self.told_memory:  # once: the trackers have every step's
            self.told_memory = True
            self.out.print(_memory(values), soft_wrap=True)
        self.bar.update(self.task, completed=values["step"])

    def sample(self, text: str) -> None:
        """Print a rollout, its middle left out where it is long."""
        lines = [line for whole in text.splitlines() for line in (textwrap.wrap(whole, _WIDE) or [""])]
        half = _LONGEST // 2
        if len(lines) > _LONGEST:
            lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
        self.out.print("\n".join(f"  | {line}" for line in lines), markup=False, soft_wrap=True, style="dim")


def _line(m: dict[str, Any], steps: int) -> str:
    if m["step"] == 0:
        return f"[bold]before training: {_held_out(m)}[/]"
    parts = [
        f"step {m['step']:>4}/{steps}",
        f"reward {_or_dash(m['reward_mean'])}",
        f"success {_or_dash(m['success'])}",
        f"segments {m['segments_per_trajectory'] or 0:.2f}",
        f"W+ {_or_one(m['mean_weight_positive']):.3f} W- {_or_one(m['mean_weight_negative']):.3f}",
        "[red]gap not finite[/]" if m["logprob_gap_max"] is None else f"gap {m['logprob_gap_max']:.1e}",
        f"{m['tokens_per_second']:.0f} tok/s",
        f"{m['seconds']['step']:.1f} s",
    ]
    if m.get("response_length_p99") is not None:
        parts.insert(3, f"length {m['response_length_p50']}, p99 {m['response_length_p99']}")
    if m.get("mfu"):
        parts.append("MFU " + " ".join(f"{phase} {share:.0%}" for phase, share in m["mfu"].items()))
    if m.get("idle_share") is not None:
        parts.append(f"idle {m['idle_share']:.0%}")
    if m.get("divergence") is not None:
        parts.insert(3, f"divergence {m['divergence']:.3f}")
    if m.get("references_failed"):
        parts.append(f"[yellow]{m['references_failed']:.0f} group(s) without a reference[/]")
    if m.get("updates_skipped"):
        parts.append(f"[red]{m['updates_skipped']:.0f} update(s) skipped: not finite[/]")
    if "held_out_success" in m:
        parts.append(f"[bold]{_held_out(m)}[/]")
    return " | ".join(parts)


def _memory(m: dict[str, Any]) -> str:
    planned = m.get("memory_planned", {})
    beside = {phase: f" of {size:.2f}" for phase, size in planned.items()}
    shown = ", ".join(f"{phase} {size:.2f}{beside.get(phase, '')}" for phase, size in m["memory"].items())
    return f"memory, GiB a rank at most{' of those planned' if planned else ''}: {shown}"


def _held_out(m: dict[str, Any]) -> str:
    more = [f"{name} {_or_dash(f['success'])}" for name, f in m.get("held_out", {}).items() if "success" in f]
    return ", ".join([f"held-out success {_or_dash(m['held_out_success'])}", *more])


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value
