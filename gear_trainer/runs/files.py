"""The run's folder: one run at a time in it, and nothing in it is overwritten that was not moved aside."""

from __future__ import annotations

import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from gear_trainer.config import Config, ConfigError, changes


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
    if resume:
        print(f"resuming {path} after step {start}" if start else f"{path}: no checkpoint yet, starting at step 1", flush=True)


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


def write_whole(path: Path, text: str) -> None:
    """Write a file so that after a kill or a power cut it is the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
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
