"""The arms of a learning study, each with its own options and teacher, scored as methods on an audited file of the study's start.

So what a file says of a method in a minute stands beside what the method taught in hours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gear_trainer.config import Config
from gear_trainer.recipe import resolve
from gear_trainer.runs.study import load_plan

from .methods import Entry
from .rollouts import load
from .scoring import Scorer, as_json, teaching

_SEEN = {None: "truth", "ground_truth": "truth", "sibling": "sibling", "wrong_answer": "wrong"}  # teacher.sees, and in a file
_NOT_IN_A_FILE = {"turn_rewards"}  # of the environment; an audit does not hold them


def entry_of(arm: str, cfg: Config) -> Entry | None:
    """An arm's credit method as it is scored. None of one that adds a loss, or reads what a file does not hold."""
    recipe = resolve(cfg)
    if recipe.distillation or _NOT_IN_A_FILE & set(recipe.method.needs):
        return None
    return Entry(arm, recipe.method, recipe.signal)


def scored_arms(study: Path, path: Path, resamples: int, seed: int = 0) -> dict[str, Any]:
    """The arms' figures on a file, as plain data: rows as those of the file's own JSON, under each arm's own teacher.

    Raises ConfigError where the study or the file cannot be read.
    """
    plan, rollouts = load_plan(study), teaching(load(path)[0])
    rows = []
    for arm in plan.study.arms:
        cfg = plan.of(arm)[0].cfg
        if (entry := entry_of(arm, cfg)) is None:
            continue
        teacher = _SEEN[cfg.teacher.sees] if entry.taught else None
        own = rollouts.take(rollouts.shown[teacher]) if teacher else rollouts
        rows.append(Scorer(own, resamples, seed).score(arm, teacher, entry.assign(own, teacher)))
    return {"study": study.stem, "file": path.name, "resamples": resamples, "seed": seed, "rows": as_json(rows)}
