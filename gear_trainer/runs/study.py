"""A study: one configuration, several arms of overrides, several seeds. Its file, its runs, and what each of them still needs.

`launches.py` starts the runs, `report/study.py` makes the page of what they came to.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gear_trainer.config import Config, Section, changes, load_config, make_config, read_yaml, validated
from gear_trainer.errors import ConfigError
from gear_trainer.runs.interrupts import EARLY
from gear_trainer.runs.registry import Run, look

METRICS = ("held_out_success", "reward_mean", "success", "entropy", "response_length", "tool_calls")
OF_A_TASK = ("held_out/", "outcome/")  # beginnings of metrics that tasks name
OWN_KEYS = {
    "name": "arms and seeds name the runs",
    "output_dir": "the study's own output_dir holds them",
    "seed": "seeds lists it",
}
# what makes a builtin model beside the seed: arms that differ in it start from different models
STARTS = ("model.path", "task", "task_args", "cache_dir")
COMPARED = ("task", "train.steps", "eval")  # arms that differ in it are not measured alike


class Study(Section):
    """The file of a study."""

    name: str = Field(description="its folder under output_dir: letters, digits, _ - and dots")
    config: str = Field(description="a run's YAML file, from the study's folder on")
    overrides: list[str] = Field(default_factory=list, description="key=value of all runs")
    arms: dict[str, list[str]] = Field(min_length=1, description="by name the key=value that an arm has beside those of all")
    baseline: str = Field(description="the arm that the others are compared with")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1, description="each arm runs once with each")
    metric: str = Field(default="held_out_success", description="the step metric that is compared, `/` between its levels")
    test: Literal["t", "wilcoxon"] = Field(default="t", description="of the differences, paired by seed")
    side_by_side: int = Field(default=1, ge=1, description="runs at a time")
    launcher: Literal["deepspeed", "process"] | None = Field(
        default=None, description="of each run; process: none, for one rank; null: process where world_size is 1"
    )
    output_dir: str = Field(default="studies", description="from the working directory on")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @field_validator("arms", mode="before")
    @classmethod
    def _may_be_empty(cls, value: Any) -> Any:
        """An arm without overrides is one too."""
        return {name: [] if own is None else own for name, own in value.items()} if isinstance(value, dict) else value

    @field_validator("seeds")
    @classmethod
    def _once(cls, value: list[int]) -> list[int]:
        if twice := [seed for seed, count in Counter(value).items() if count > 1]:
            raise ValueError(f"names {twice[0]} twice: once is enough")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Study:
        for what, name in (("name", self.name), *(("arm", name) for name in self.arms)):
            if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
                raise ValueError(f"{what} {name!r}: must be letters, digits, _ - and dots, as it names a folder")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline}: no such arm; there are {', '.join(self.arms)}")
        if self.metric not in METRICS and not self.metric.startswith(OF_A_TASK):
            raise ValueError(f"metric={self.metric}: known are {', '.join((*METRICS, *(f'{name}...' for name in OF_A_TASK)))}")
        for item in (item for own in (self.overrides, *self.arms.values()) for item in own):
            key = item.partition("=")[0]
            if key in OWN_KEYS:
                raise ValueError(f"override {item!r}: {OWN_KEYS[key]}; leave it out")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study. overrides: all that its command gets beside the configuration's file."""

    arm: str
    seed: int
    cfg: Config
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def log(self) -> Path:
        """The file that its terminal goes to, appended to by each start."""
        return Path(self.cfg.output_dir).parent / "logs" / f"{self.name}.log"


@dataclass(frozen=True)
class Plan:
    """A study's runs in the order in which they start, seed by seed, so that a study cut short has whole pairs."""

    study: Study
    config: Path
    cells: tuple[Cell, ...]

    def of(self, arm: str) -> list[Cell]:
        """The arm's runs, in the order of the seeds."""
        return [cell for cell in self.cells if cell.arm == arm]


Need = Literal["nothing", "start", "resume", "wait"]


@dataclass(frozen=True)
class Standing:
    """A run of a study as its files tell it. need: nothing once it is finished, wait while another process has it.

    run: None of one that has not begun. why: the line that an attempt failed with, "" of others.
    """

    cell: Cell
    need: Need
    run: Run | None
    why: str


def load_plan(file: Path) -> Plan:
    """Read a study and check each arm's configuration. Raises ConfigError, in one line."""
    study = validated(Study, read_yaml(file), str(file))
    config = Path(os.path.normpath(file.parent / study.config))
    arms = {arm: _cells(study, config, file, arm) for arm in study.arms}
    for arm in study.arms:
        _check_alike(f"{file}: arm {arm}", arms[study.baseline][0].cfg, arms[arm][0].cfg)
    _check_metric(file, study, arms[study.baseline][0].cfg)
    return Plan(study, config, tuple(cell for row in zip(*arms.values(), strict=True) for cell in row))


def _cells(study: Study, config: Path, file: Path, arm: str) -> list[Cell]:
    given = [*study.overrides, *study.arms[arm], f"output_dir={json.dumps(str(study.folder / 'runs'))}"]
    words = {seed: (*given, f"name={json.dumps(f'{arm}-{seed}')}", f"seed={seed}") for seed in study.seeds}
    try:
        cfg = load_config(config, list(words[study.seeds[0]]))
    except ConfigError as error:
        raise ConfigError(f"{file}: arm {arm}: {error}") from None
    if study.launcher == "process" and cfg.world_size != 1:
        raise ConfigError(f"{file}: arm {arm}: launcher=process starts one rank, and world_size={cfg.world_size}: leave it out")
    named = {seed: cfg.model_copy(update={"name": f"{arm}-{seed}", "seed": seed}) for seed in study.seeds}
    return [Cell(arm, seed, named[seed], words[seed]) for seed in study.seeds]


def _check_alike(where: str, base: Config, own: Config) -> None:
    """What must be the same for all arms is. Raises ConfigError."""
    tiny = any(cfg.model.path.startswith("builtin:tiny-qwen3") for cfg in (base, own))
    for keys, why in (
        (COMPARED, "arms are compared at the same steps on the same held-out problems"),
        (STARTS if tiny else (), "the builtin model is made of it"),
    ):
        for key in keys:
            before, after = ({key: _value(cfg, key)} for cfg in (base, own))
            if differing := changes(before, after):
                raise ConfigError(f"{where} changes {differing[0]}, and {why}: set it for all, under overrides")


def _value(cfg: Config, key: str) -> Any:
    value: Any = cfg.model_dump()
    for name in key.split("."):
        value = value[name]
    return value


def _check_metric(file: Path, study: Study, cfg: Config) -> None:
    if study.metric.startswith("held_out") and not cfg.eval.every:
        raise ConfigError(f"{file}: metric={study.metric} needs evaluations, and eval.every=0 has none: set it above 0")


# --- what the runs need -------------------------------------------------------------------------------------------------------


def standings(plan: Plan) -> list[Standing]:
    """Each run of the study by its files, in the plan's order. Raises ConfigError where one was made with other settings."""
    return [standing_of(cell) for cell in plan.cells]


def standing_of(cell: Cell) -> Standing:
    """One run: what it needs is read off its folder; where it never came to have one, off its log."""
    path = cell.cfg.run_dir
    if not path.exists():
        why = last_line(cell.log)
        return Standing(cell, "start", None, "" if why.endswith(EARLY) else why)
    run = look(path)
    _check_same(cell)
    if run.state == "finished":
        return Standing(cell, "nothing", run, "")
    if run.state == "running":
        return Standing(cell, "wait", run, "")
    return Standing(cell, "resume", run, run.why if run.state == "failed" else "")


def last_line(log: Path) -> str:
    """The line that a start ended with, the trainer's own word before any other; "" where there is no log."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    own = [line for line in lines if "gear_trainer: " in line]
    return (own or lines or [""])[-1].removeprefix("gear_trainer: ")


def _check_same(cell: Cell) -> None:
    """The run in the cell's folder is the planned one. Raises ConfigError: figures of two configurations would be one arm's."""
    path = cell.cfg.run_dir / "config.json"
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # cut short by a kill, so no step was made
    planned = json.loads(cell.cfg.model_dump_json())
    made = json.loads(make_config(stored, where=str(path)).model_dump_json())  # with the defaults of keys that are newer than it
    if planned["train"]["packing"] is None:  # which a run settles
        made["train"]["packing"] = None
    if differing := changes(made, planned):
        said = "; ".join(differing[:3])
        raise ConfigError(f"{cell.cfg.run_dir} was made with other settings ({said}): remove it, or give the study another name")


NEEDS: dict[Need, str] = {"nothing": "finished", "start": "to start", "resume": "to resume", "wait": "run by another process"}


def summary(plan: Plan, found: list[Standing]) -> str:
    """The study as a dry run prints it: each arm that is found with its overrides and what its runs need, and what failed."""
    study = plan.study
    lines = [
        f"{study.folder}: {len(study.arms)} arms x {len(study.seeds)} seeds of {plan.config}, {study.side_by_side} at a time"
    ]
    for arm in dict.fromkeys(s.cell.arm for s in found):
        own = Counter(s.need for s in found if s.cell.arm == arm)
        needs = ", ".join(f"{own[need]} {said}" for need, said in NEEDS.items() if own[need])
        lines.append(f"  {arm}{' (baseline)' if arm == study.baseline else ''}: {' '.join(study.arms[arm]) or '-'}: {needs}")
    lines += [f"  {s.cell.name} failed at step {s.run.step if s.run else 0}: {s.why}" for s in found if s.why]
    return "\n".join(lines)
