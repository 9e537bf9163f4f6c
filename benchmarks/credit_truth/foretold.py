"""The arms of a learning study, each with its own options and teacher, scored as methods on an audited file of the study's start.

So what a file says of a method in a minute stands beside what the method taught in hours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gear_trainer.recipe import Recipe, resolve
from gear_trainer.runs.study import load_plan

from .methods import Entry
from .rollouts import load
from .scoring import as_json, scorers_of, teaching

_NOT_IN_A_FILE = {"turn_rewards"}  # of the environment; an audit does not hold them


def entry_of(arm: str, recipe: Recipe) -> Entry | None:
    """An arm's credit method as it is scored. None of one that adds a loss, or reads what a file does not hold."""
    if recipe.distillation or _NOT_IN_A_FILE & set(recipe.method.needs):
        return None
    return Entry(arm, recipe.method, recipe.signal)


def teacher_of(recipe: Recipe) -> str:
    """The file's name of the teacher that a recipe's method reads."""
    return "sibling" if recipe.references == "siblings" else "wrong" if recipe.wrong_answer else "truth"


def scored_arms(study: Path, path: Path, resamples: int, seed: int = 0) -> dict[str, Any]:
    """The arms' figures on a file, as plain data: rows as those of the file's own JSON, under each arm's own teacher.

    Raises ConfigError where the study or the file cannot be read.
    """
    plan, scorers = load_plan(study), scorers_of(teaching(load(path)[0]), resamples, seed)
    rows = []
    for arm in plan.study.arms:
        recipe = resolve(plan.of(arm)[0].cfg)
        if (entry := entry_of(arm, recipe)) is None:
            continue
        teacher = teacher_of(recipe) if entry.taught else None
        scorer = scorers[teacher]
        rows.append(scorer.score(arm, teacher, entry.assign(scorer.rollouts, teacher)))
    return {"study": study.stem, "file": path.name, "resamples": resamples, "seed": seed, "rows": as_json(rows)}
