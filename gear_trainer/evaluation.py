"""Held-out problems on any engine: the pass that training makes between its steps, and the same one on a finished model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gear_trainer.config import Config
from gear_trainer.rollout import Engine, Limits, Rollout, groups_of, make_engine, roll_out
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks.base import Task


def held_out(
    cfg: Config, engine: Engine, chat: Chat, task: Task, part: tuple[int, int] = (0, 1), samples: int = 1
) -> list[Rollout]:
    """Rollouts of the held-out problems `i % part[1] == part[0]`, under the same seeds every time. The engine is left awake."""
    rank, world = part
    problems = [(i, p) for i, p in enumerate(task.held_out(cfg.eval.prompts)) if i % world == rank]
    engine.wake()  # and stays so: the next step samples from these weights
    limits = replace(Limits.of(cfg.rollout), group_size=samples, temperature=cfg.eval.temperature)
    return roll_out(engine, chat, task, problems, limits, (cfg.seed, "held-out"))


@dataclass(frozen=True)
class Result:
    """The figures of a held-out pass: `samples` rollouts of each of `problems` problems."""

    problems: int
    samples: int
    success: float  # mean over all rollouts
    passed: float  # share of problems that one sample at least solved

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `success`, as if a problem's samples were one draw: wide rather than narrow."""
        if not self.problems:
            return 0.0, 1.0
        z, n, p = 1.96, self.problems, self.success
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval()
        line = f"held-out success: {self.success:.3f} of {self.problems} problems (95 % interval {low:.3f} to {high:.3f})"
        return line if self.samples == 1 else f"{line}, mean of {self.samples} samples; solved by one of them: {self.passed:.3f}"


def summarize(rollouts: list[Rollout]) -> Result:
    """The result of a held-out pass."""
    groups = groups_of(rollouts)
    solved = sum(any(r.success for r in group) for group in groups)
    share = len(groups) or 1
    samples = len(groups[0]) if groups else 1
    return Result(len(groups), samples, sum(r.success for r in rollouts) / (len(rollouts) or 1), solved / share)


def evaluate(cfg: Config, task: Task, model_path: str, samples: int = 1) -> Result:
    """The result of a model directory or hub name on an engine in this process, without DeepSpeed."""
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(model_path), task.tools, cfg.chat_template_args)
    return summarize(held_out(cfg, make_engine(cfg, model_path), chat, task, samples=samples))
