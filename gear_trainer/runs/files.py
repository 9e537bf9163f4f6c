"""The run's folder: one run at a time in it, nothing overwritten that was not moved aside, and what a step writes there."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from gear_trainer.config import Config, changes
from gear_trainer.errors import ConfigError
from gear_trainer.runs.records import recorded_steps, records_path, to_bytes
from gear_trainer.runs.trackers import flat, open_trackers

STATE = "state.json"  # of a run that ended in good order, see `note_end`


def next_free(path: Path) -> Path:
    """`path`.1, .2, ...: the first that does not exist."""
    n = 1
    while (moved := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return moved


def beside(run_dir: Path, what: str) -> Path:
    """`.NAME.what` beside the run's folder, which a new run of its name moves aside."""
    return run_dir.with_name(f".{run_dir.name}.{what}")


def lock_run(cfg: Config) -> FileLock:
    """Take the run's lock, which this process holds until it ends, however it ends. Raises ConfigError where another has it."""
    try:
        cfg.run_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside(cfg.run_dir, "lock"))
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{cfg.run_dir} is in use by another run of this name{_owner(cfg.run_dir)}: end that one, or give another name="
        ) from None
    except OSError as error:
        raise ConfigError(f"output_dir={cfg.output_dir}: {error.strerror}; give a folder that can be written") from None
    return lock


def _owner(run_dir: Path) -> str:
    try:
        beat = json.loads((beside(run_dir, "ranks") / "rank-0.json").read_text())
        return f" (pid {beat['pid']} on {beat['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def prepare_run_dir(cfg: Config, resume: bool, start: int) -> None:
    """Make the folder of a run that begins after step `start`, and say on the terminal what becomes of an older one."""
    path = cfg.run_dir
    if path.exists() and not (resume and (start or not _has_steps(path))):
        moved = next_free(path)
        path.rename(moved)
        why = "has no checkpoint to resume from" if resume else "existed"
        hint = "; starting at step 1" if resume else " (--resume goes on with a run instead)"
        print(f"{path} {why}: moved to {moved}{hint}", flush=True)
        resume = False
    path.mkdir(parents=True, exist_ok=True)
    stored = path / "config.json"
    if resume and stored.is_file():
        for change in changes(_stored(stored), json.loads(cfg.model_dump_json())):
            print(f"resuming with another value: {change}", flush=True)
    write_whole(stored, cfg.model_dump_json(indent=2))
    (path / STATE).unlink(missing_ok=True)
    if resume:
        print(f"resuming {path} after step {start}" if start else f"{path}: no checkpoint yet, starting at step 1", flush=True)


def note_end(run_dir: Path, state: str, step: int, why: str = "") -> None:
    """Leave word in the run's folder that it ended in good order after this step: finished, or stopped."""
    write_whole(run_dir / STATE, json.dumps({"state": state, "step": step, "why": why}))


def noted_end(run_dir: Path) -> dict[str, Any] | None:
    """The word that `note_end` left there; None of a run that goes on, or that ended in another way."""
    return read_whole(run_dir / STATE)


def read_whole(path: Path) -> dict[str, Any] | None:
    """A small JSON file of a run; None where it is not there or was cut short by a kill."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _has_steps(path: Path) -> bool:
    """Whether a run left anything there that starting over would overwrite."""
    return (path / "metrics.jsonl").exists() or any((path / "rollouts").glob("step-*"))


def _stored(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}  # cut short by a kill: the differences cannot be told


def aside(run_dir: Path, step: int) -> Path:
    """A new folder for what a run that goes on after `step` has past that step: it will be made again."""
    path = run_dir / f"before-resume-at-{step}"
    path = next_free(path) if path.exists() else path
    path.mkdir(parents=True)
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that after a kill or a power cut it is the old one or the new one, never a part. Text as UTF-8."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- what a step writes -----------------------------------------------------------------------------------------------------


class RunFiles:
    """Rank 0's writer: metrics.jsonl, each step's rollouts, and the trackers. What is past a resumed step is moved aside first.

    Raises ConfigError where a tracker cannot start.
    """

    def __init__(self, cfg: Config, resume_step: int):
        self.dir = cfg.run_dir
        (self.dir / "rollouts").mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.dir / "metrics.jsonl"
        _keep_until(self.dir, resume_step)
        self.trackers = open_trackers(cfg, _run_id(self.dir), resume_step)

    def metrics(self, values: dict[str, Any]) -> None:
        """One object a step, flushed to the disk: a killed run loses no finished step."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        numbers = flat(values)
        for tracker in self.trackers:
            tracker.metrics(values["step"], numbers)

    def sample(self, step: int, text: str) -> None:
        """Show a rollout where the metrics are."""
        for tracker in self.trackers:
            tracker.sample(step, text)

    def close(self, failed: bool) -> None:
        """After the last step; `failed`: an error ended the run."""
        for tracker in self.trackers:
            tracker.close(failed)

    def records(self, step: int, rows: pa.Table) -> None:
        """Write a step's rollouts."""
        write_whole(records_path(self.dir, step), to_bytes(rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl; a last line that a kill cut short is left out."""
    steps = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return steps


def _keep_until(run_dir: Path, step: int) -> None:
    """Leave the steps that a resumed run goes on from; those past them will be made again, and move to a folder of their own."""
    metrics = run_dir / "metrics.jsonl"
    steps = read_metrics(metrics)
    files = [records_path(run_dir, n) for n in recorded_steps(run_dir) if n > step]
    past = [m for m in steps if m["step"] > step]
    if past or files:
        moved = aside(run_dir, step)
        write_whole(moved / metrics.name, "".join(json.dumps(m) + "\n" for m in past))
        for path in files:
            path.rename(moved / path.name)
    write_whole(metrics, "".join(json.dumps(m) + "\n" for m in steps if m["step"] <= step))


def _run_id(run_dir: Path) -> str:
    """The id of the run in this folder, made once: a new run of its name has a folder, and an id, of its own."""
    file = run_dir / "tracking.json"
    if not file.is_file():
        write_whole(file, json.dumps({"run_id": uuid.uuid4().hex[:8]}))
    return json.loads(file.read_text())["run_id"]
