"""A whole audit: problem by problem sampled, scored and continued, so that a killed one goes on, into one file.

Each problem starts with nothing cached, and its seeds are its own: on a CPU, where rollouts go lock-step, an audit that was
interrupted ends with the same bytes as one that was not.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from rich.console import Console

from gear_trainer.audit import file
from gear_trainer.audit.rows import columns
from gear_trainer.audit.signals import Columns, Scorer, signals
from gear_trainer.audit.values import Estimator, estimate
from gear_trainer.config import Config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.evaluation import HeldOut
from gear_trainer.evaluation.records import SETTINGS, keep_settings, read_json
from gear_trainer.evaluation.run import AHEAD, locked, progress_bar, settings_of
from gear_trainer.rollout import Engine, Limits, Rollout, check_failures
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks.base import Task

FILE, PARTS = "audit.parquet", "parts"
COUNTS = ("cuts", "cuts_lost", "problems_left_out")
GO_ON = "then the same command goes on"


class Subject(NamedTuple):
    """The model that is audited: its folder or hub name, the training step it is of (0: none), and what makes its engine and its
    scorer, called once, or not at all where nothing is left to do."""

    path: str
    step: int
    engine: Callable[[], Engine]
    scorer: Callable[[], Scorer]


def problems_of(cfg: Config, task: Task, chat: Chat) -> HeldOut:
    """The first held-out problems, never trained on and the same at every checkpoint, to be sampled as training samples."""
    limits = replace(Limits.of(cfg.rollout), group_size=cfg.audit.samples)
    return HeldOut("", task, chat, cfg.audit.problems, limits, (cfg.seed, "audit"))


def audit(cfg: Config, held: HeldOut, subject: Subject, out: Path) -> Path:
    """Audit the problems, and return the file that is written into the folder `out`.

    Raises ConfigError where nothing is held out or an audit of other settings stands there, and RunError where environments
    break too much, episodes cannot be replayed, or the engine's log-probs are not the trainer's.
    """
    if not held.problems:
        raise ConfigError(f"task={cfg.task} has no held-out problems: an audit samples those; give it some")
    with locked(out, "audit"):
        settings = {
            **settings_of(cfg, "audit", held, subject.path, 1),
            **{"step": subject.step, "M": cfg.audit.continuations, "stride": cfg.audit.stride, "date": _begun(out)},
        }
        keep_settings(out, json.loads(json.dumps(settings, default=str)), "an audit")
        final = out / FILE
        if not final.is_file():
            parts = _parts(cfg, held, subject, out / PARTS)
            tables = [file.read(part) for part in parts]
            counts = {name: sum(about[name] for _, about in tables) for name in COUNTS}
            whole = pa.concat_tables([table for table, _ in tables])
            about = settings | counts | {"model": Path(subject.path).name}  # where it stood says nothing on another machine
            file.write(final, {name: whole[name] for name in whole.column_names}, about)
        shutil.rmtree(out / PARTS, ignore_errors=True)
    return final


def _begun(out: Path) -> str:
    """The day on which the audit began, also of one that goes on."""
    before = read_json(out / SETTINGS) if (out / SETTINGS).is_file() else {}
    return before.get("date") or datetime.date.today().isoformat()


def _parts(cfg: Config, held: HeldOut, subject: Subject, folder: Path) -> list[Path]:
    """A file for each problem; those that are not there yet are made."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{index:05}.parquet" for index in range(len(held.problems))]
    missing = [index for index, part in enumerate(parts) if not part.is_file()]
    done = len(parts) - len(missing)
    console = Console(highlight=False)
    if done:
        console.print(f"{folder.parent}: going on after {done} of {len(parts)} problems", soft_wrap=True)
    if not missing:
        return parts
    auditor = _Auditor(cfg, held, subject)
    with progress_bar(console) as bar:
        task = bar.add_task("audit", total=len(parts), completed=done)
        for index in missing:
            auditor.tell = lambda made, index=index: bar.update(task, description=f"audit · problem {index}, {made} cuts")
            file.write(parts[index], *auditor(index))
            bar.update(task, advance=1)
    return parts


class _Auditor:
    """Samples a problem's group, scores it, continues it."""

    def __init__(self, cfg: Config, held: HeldOut, subject: Subject):
        self.cfg, self.held, self.step = cfg, held, subject.step
        self.engine, self.scorer = subject.engine(), subject.scorer()
        self.tell: Callable[[int], None] = lambda made: None

    def __call__(self, index: int) -> tuple[dict[str, list[Any]], dict[str, int]]:
        """The rows of a problem, none where its environment broke off or its prompt could not be continued; with its COUNTS."""
        held, audit = self.held, self.cfg.audit
        self.engine.forget()
        group = held.of(self.engine, [index])
        check_failures(group, held.limits, GO_ON)
        if group[0].dropped:
            return _rows(None), _counts(left_out=1)
        others = [*held.problems[index + 1 :], *held.problems[:index]]
        scored = signals(self.scorer, held.chat, held.task, group, others)
        self._compare(group, scored)
        at_once = self.cfg.rollout.vllm.max_num_seqs * AHEAD[held.limits.schedule]
        key = (*held.key, "continued")
        estimator = Estimator(self.engine, held.chat, held.task, held.limits, key, audit.continuations, at_once)
        values = estimate(group, estimator, audit.stride, self.tell)
        known = [v for v in values if v is not None]
        if len(known) < len(group):
            return _rows(None), _counts(estimator, left_out=1)
        return _rows(columns(held.chat, held.task, group, scored, known, self.step, audit.continuations)), _counts(estimator)

    def _compare(self, group: list[Rollout], scored: Columns) -> None:
        """Raise RunError where the engine samples with other weights than those that score."""
        gaps = [
            (own - torch.tensor([r.sampler_logprobs[place] for place in r.policy_positions])).abs()
            for r, own in zip(group, scored["logprobs"], strict=True)
            if own is not None
        ]
        gap = torch.cat(gaps).mean().item() if sum(map(len, gaps)) else 0.0
        if gap > self.cfg.max_logprob_gap:
            raise RunError(
                f"the engine's log-probs differ from the trainer's by {gap:.3f} nats a token, more than max_logprob_gap="
                f"{self.cfg.max_logprob_gap:g}: engine and scorer hold different weights, or another temperature"
            )


def _rows(found: dict[str, list[Any]] | None) -> dict[str, list[Any]]:
    return {name: [] for name in file.SCHEMA.names} if found is None else found


def _counts(estimator: Estimator | None = None, left_out: int = 0) -> dict[str, int]:
    made, lost = (estimator.made, estimator.lost) if estimator else (0, 0)
    return dict(zip(COUNTS, (made, lost, left_out), strict=True))
