"""Scores of sampled tokens by the student and by each teacher: the trainer's own forward, in one process, on whole weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gear_kernels import TokenStats
from gear_trainer.audit.file import TEACHER_COLUMNS
from gear_trainer.config import Config
from gear_trainer.hints.siblings import Siblings
from gear_trainer.hints.wrong_answer import wrong_messages
from gear_trainer.policy.batching import micro_batch, split_rows
from gear_trainer.policy.forward import Forward
from gear_trainer.policy.model import Policy
from gear_trainer.rollout import Rollout
from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.engine import take_device
from gear_trainer.tasks.base import Problem, Task

STUDENT_COLUMNS = ("logprobs", "entropy")
Columns = dict[str, list[torch.Tensor | None]]


class Scorer:
    """The model of a folder or hub name as student and as teacher, with the statistics that the trainer's scoring computes."""

    def __init__(self, cfg: Config, model_path: str):
        from transformers import AutoModelForCausalLM

        dtype, self.device = getattr(torch, cfg.model.dtype), take_device()
        lm = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation=cfg.model.attn_implementation)
        policy = Policy(lm.eval().requires_grad_(False)).to(self.device)
        self.forward = Forward(policy, None, cfg.rollout.temperature)
        self.budget = cfg.train.tokens_per_micro_batch

    @torch.no_grad()
    def __call__(self, rollouts: list[Rollout]) -> dict[str, list[torch.Tensor]]:
        """STUDENT_COLUMNS and TEACHER_COLUMNS of each rollout's n policy tokens, float32 [n] on the CPU, nats; the teacher reads
        its `teacher_prompt_ids`."""
        stats = (*STUDENT_COLUMNS, *TEACHER_COLUMNS)
        found: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * len(rollouts) for name in stats}
        spoken = [i for i, r in enumerate(rollouts) if any(r.mask)]
        for rows in split_rows(rollouts, spoken, self.budget, teacher=True):
            out: TokenStats = self.forward(micro_batch(rollouts, rows, teacher=True).to(self.device), stats)
            lengths = [sum(rollouts[i].mask) for i in rows]
            for name in stats:
                for i, values in zip(rows, getattr(out, name).float().cpu().split(lengths), strict=True):
                    found[name][i] = values
        return found


def signals(scorer: Scorer, chat: Chat, task: Task, group: list[Rollout], others: Sequence[Problem]) -> Columns:
    """The columns of `file.SCHEMA` that a forward makes, by name: of each rollout of a group, [n] over its policy tokens.

    None where a teacher could not be had. others: problems of the task, whose solutions are wrong here.
    """
    found: Columns = {}
    for teacher, prompts in teachers(chat, task, group, others).items():
        shown = [i for i, prompt in enumerate(prompts) if prompt is not None]
        scored = scorer([replace(group[i], teacher_prompt_ids=prompts[i] or []) for i in shown])
        names = {name: f"{name}/{teacher}" for name in TEACHER_COLUMNS}
        if teacher == "nothing":  # which everyone can be shown
            names |= {name: name for name in STUDENT_COLUMNS}
        for name, column in names.items():
            found[column] = [None] * len(group)
            for i, values in zip(shown, scored[name], strict=True):
                found[column][i] = values
    return found


def teachers(chat: Chat, task: Task, group: list[Rollout], others: Sequence[Problem]) -> dict[str, list[list[int] | None]]:
    """Each teacher's prompt for each rollout of a group, as tokens; None where it has nothing to show.

    truth: the task's ground truth. sibling: another rollout that succeeded. wrong: what the task shows for another problem,
    around this one's question. nothing: the student's own prompt.
    """
    problem = group[0].problem
    siblings = [replace(r, reference=None) for r in group]
    Siblings(chat).write(siblings, ())
    wrong = wrong_messages(problem, others) if task.shows_truth else None
    wrong_ids = None if wrong is None else chat.prompt_ids(wrong, problem.tools, problem.tags)
    return {
        "truth": [r.teacher_prompt_ids if task.shows_truth else None for r in group],
        "sibling": [None if r.reference is None else r.teacher_prompt_ids for r in siblings],
        "wrong": [wrong_ids] * len(group),
        "nothing": [r.prompt_ids for r in group],
    }
