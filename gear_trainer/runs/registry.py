"""The runs of a folder: who goes on, who ended and how, what they came to. Read off their files; nothing is kept besides."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gear_trainer.errors import ConfigError
from gear_trainer.runs.files import noted_end, read_metrics, read_whole
from gear_trainer.runs.ranks import last_beats, lives

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["running", "finished", "stopped", "failed"]
COLORS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    state: running; finished, after its last step; stopped, by who asked for it; failed, by an error, which `why` then is, or
    without a word (killed, a machine that is gone). reward, success: of the last step; held_out: success before training and at
    last; None where there is none. seconds: since anything was written.
    """

    path: Path
    method: str
    task: str
    state: State
    why: str
    step: int
    steps: int
    reward: float | None
    success: float | None
    held_out: tuple[float | None, float | None]
    seconds: float

    def cells(self) -> list[str]:
        """The run as the columns of `table`."""
        before, after = self.held_out
        held_out = "-" if after is None else f"{_number(before)} -> {after:.3f}"
        step = f"{self.step}/{self.steps}"
        figures = [_number(self.reward), _number(self.success), held_out]
        return [str(self.path), self.method, self.task, self.state, step, *figures, f"{_ago(self.seconds)} ago", self.why]

    def line(self) -> str:
        """The run as one line, tabs between the columns."""
        return "\t".join(cell or "-" for cell in self.cells())


def find_runs(folder: Path) -> list[Run]:
    """The runs in a folder, or the one that it is, the last that wrote anything first. Raises ConfigError where there is none."""
    places = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*") if _is_run(path))
    if not places:
        raise ConfigError(f"{folder}: no run there (config.json is missing); give a folder of runs, or a run's own")
    return sorted((look(path) for path in places), key=lambda run: run.seconds)


def look(run_dir: Path, metrics: list[dict[str, Any]] | None = None) -> Run:
    """A run by its folder; what cannot be read of it is left out. metrics: its steps, where they are read already."""
    cfg = read_whole(run_dir / "config.json") or {}
    done = read_metrics(run_dir / "metrics.jsonl") if metrics is None else metrics
    last: dict[str, Any] = done[-1] if done else {}
    steps = cfg.get("train", {}).get("steps", 0)
    state, why = _state(run_dir, complete=0 < steps <= last.get("step", 0))
    solved = [m["held_out_success"] for m in done if m.get("held_out_success") is not None]
    newest = max(path.stat().st_mtime for path in (run_dir, *run_dir.glob("*.json*")))
    return Run(
        run_dir,
        method=cfg.get("credit", ""),
        task=cfg.get("task", ""),
        state=state,
        why=why if cfg else "its config.json cannot be read",
        step=last.get("step", 0),
        steps=steps,
        reward=last.get("reward_mean"),
        success=last.get("success"),
        held_out=(solved[0] if len(solved) > 1 else None, solved[-1] if solved else None),
        seconds=max(0.0, time.time() - newest),
    )


def _state(run_dir: Path, complete: bool) -> tuple[State, str]:
    if ended := noted_end(run_dir):
        return ended["state"], ended["why"]
    beats = last_beats(run_dir)
    if any(lives(beat, age) for beat, age in beats):
        return "running", ""
    words = [f"rank {rank}: {beat['ended']}" for rank, (beat, _) in enumerate(beats) if beat["ended"]]
    words += [f"rank {rank} {why}" for beat, _ in beats for rank, (why, _) in beat.get("lost", {}).items()]
    if complete and not words:
        return "finished", ""  # by a version that left no word
    return "failed", words[0] if words else "without a word: killed, or its machine is gone"


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file()


def table(runs: list[Run]) -> Table:
    """The runs as rich prints them."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    for name in ("run", "method", "task", "state", "step", "reward", "success", "held-out", "written", ""):
        made.add_column(name, justify="right" if name in ("step", "reward", "success", "held-out") else "left")
    for run in runs:
        cells = [Text(cell) for cell in run.cells()]
        cells[3].stylize(COLORS[run.state])
        made.add_row(*cells)
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ago(seconds: float) -> str:
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
