"""Held-out sets: the run's own and those beside it, under the same seeds every time, and their figures for a step's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.rollout import Engine, Limits, Rollout, roll_out
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import DataAway, Outcome, Problem, Task, TaskError
from gear_trainer.user_code import said


@dataclass(frozen=True)
class HeldOut:
    """A held-out set: the first `prompts` problems of a task, and how they are sampled. `name` is empty for the run's own."""

    name: str
    task: Task
    chat: Chat
    prompts: int
    limits: Limits
    key: tuple[object, ...]  # its seeds come from it

    @cached_property
    def problems(self) -> list[Problem]:
        """Its problems, in their order; asked for once."""
        return self.task.held_out(self.prompts)

    def sample(self, engine: Engine, part: tuple[int, int] = (0, 1)) -> list[Rollout]:
        """Rollouts of the problems `i % part[1] == part[0]`; the engine is left awake."""
        rank, world = part
        return self.of(engine, [i for i in range(len(self.problems)) if i % world == rank])

    def of(self, engine: Engine, indices: Sequence[int]) -> list[Rollout]:
        """Rollouts of some of its problems, whole groups in a row; the same in any company where the engine honours seeds."""
        engine.wake()  # and stays so: a step that follows samples from these weights
        return roll_out(engine, self.chat, self.task, [(i, self.problems[i]) for i in indices], self.limits, self.key)


def sets_of(cfg: Config, task: Task, chat: Chat) -> list[HeldOut]:
    """The run's own held-out set, then those of eval.sets. Raises TaskError."""
    found = [HeldOut("", task, chat, cfg.eval.prompts, _limits(cfg, cfg.eval.samples), (cfg.seed, "held-out"))]
    for name, spec in cfg.eval.sets.items():
        other = make_task(spec.task, cfg.seed, spec.task_args)
        own = Chat(chat.tokenizer, other.tools, cfg.chat_template_args)
        limits = _limits(cfg, spec.samples or cfg.eval.samples)
        found.append(HeldOut(name, other, own, spec.prompts or cfg.eval.prompts, limits, (cfg.seed, "held-out", name)))
    return found


def _limits(cfg: Config, samples: int) -> Limits:
    e, limits = cfg.eval, Limits.of(cfg.rollout)
    lengths = {"max_new_tokens": e.max_new_tokens, "max_model_len": e.max_model_len}
    own = {name: value for name, value in lengths.items() if value is not None}
    return replace(limits, group_size=samples, temperature=e.temperature, top_p=e.top_p, **own)


def check_sets(cfg: Config, away: list[str] | None = None) -> None:
    """Refuse lengths that the engine of a training run has no room for, and sets that cannot be made.

    away: of a dry run, what the network keeps from this machine is named in it. Raises ConfigError or TaskError.
    """
    if (asked := cfg.eval.max_model_len) and asked > cfg.rollout.max_model_len:
        raise ConfigError(
            f"eval.max_model_len={asked}: the run's engine has a context of rollout.max_model_len={cfg.rollout.max_model_len}; "
            "lower it, or evaluate the finished run at that length"
        )
    for name, spec in cfg.eval.sets.items():
        try:
            make_task(spec.task, cfg.seed, spec.task_args)
        except DataAway as error:
            if away is None:
                raise
            away.append(f"eval.sets.{name}: {error}; the checks of its data are left out")


def measure(sets: list[HeldOut], engine: Engine, part: tuple[int, int]) -> dict[str, Any]:
    """Held-out figures of a step, the same on all ranks. Collective.

    held_out_success: share of the own set's rollouts that succeeded; None where nothing was scored. held_out, where there is more
    to say: by set, its success, what its task reports, and the rollouts that the environment broke off, which count nowhere else.
    """
    out: dict[str, Any] = {}
    for held in sets:
        figures = _figures(held, _gathered([(r.group, _outcome(r)) for r in held.sample(engine, part)]))
        if not held.name:
            out["held_out_success"] = figures.pop("success")
        if figures:
            out.setdefault("held_out", {})[held.name or "own"] = figures
    return out


def _outcome(rollout: Rollout) -> Outcome | None:
    """The outcome of a rollout; None where its environment broke off: what it earned is unknown."""
    return None if rollout.failed else Outcome(rollout.reward, rollout.success, rollout.metrics)


def _gathered(own: list[tuple[int, Outcome | None]]) -> list[tuple[int, Outcome | None]]:
    """All ranks' outcomes by problem, in the problems' order. Collective."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return sorted((found for part in parts for found in part), key=lambda found: found[0])


def _figures(held: HeldOut, outcomes: list[tuple[int, Outcome | None]]) -> dict[str, float | None]:
    scored = [(held.problems[i], outcome) for i, outcome in outcomes if outcome]
    out: dict[str, float | None] = {**reported(held.task, scored)}
    out["success"] = sum(o.success for _, o in scored) / len(scored) if scored else None
    failed = len(outcomes) - len(scored)
    return out | ({"rollouts_failed": failed} if failed else {})


def reported(task: Task, scored: list[tuple[Problem, Outcome]]) -> dict[str, float]:
    """The numbers that a task reports of scored rollouts; none without any. Raises TaskError where it fails."""
    try:
        return {str(name): float(value) for name, value in task.report(scored).items()} if scored else {}
    except Exception as error:
        raise TaskError(f"{type(task).__name__}.report fails ({said(error, where=True)}): mend it") from error
