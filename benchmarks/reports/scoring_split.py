"""What scoring a step of the demo is made of, on the rollouts that a run kept: both passes, the head, the scan; see demo.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from gear_kernels import FusedHead, TokenStats, credit_weights
from gear_trainer.batching import MicroBatch, micro_batch, split_rows
from gear_trainer.chat import Chat
from gear_trainer.model import hidden_states
from gear_trainer.records import read_records
from gear_trainer.rollout import Rollout
from gear_trainer.tasks import make_task

from ..harness.measure import OtherLoad, elapsed_ms, interleave, keep_freed_blocks, one_thread

STEP = 5  # of the run: early enough for half of the trajectories to have an advantage
STUDENT, TEACHER = ("logprobs", "entropy"), ("logprobs", "entropy", "teacher_logprobs")


def measure(run: Path, rounds: int = 15) -> dict:
    """Milliseconds of each part for one step's trajectories whose advantage is not 0, in one process with the run's last policy,
    on one thread as a rank of the demo.

    parts: "policy" and "teacher", the backbone on the policy's and on the teacher's prompts; "head" as GRPO wants it and "head
    with teacher" as GEAR does; "scan", the credit weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((run / "config.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    FusedHead.adopt(lm.get_output_embeddings())
    task = make_task(config["task"], config["seed"], config["task_args"])
    rollouts, advantages = _rollouts(run, task, Chat(AutoTokenizer.from_pretrained(run / "model"), task.tools))
    rows = split_rows(rollouts, list(range(len(rollouts))), config["train"]["tokens_per_micro_batch"], teacher=True)
    calls = _parts(lm, rollouts, [micro_batch(rollouts, part, teacher=True) for part in rows], advantages)
    keep_freed_blocks()
    with one_thread(), torch.no_grad():
        first, load = {name: elapsed_ms(call) for name, call in calls.items()}, OtherLoad()
        timings = interleave(calls, first, rounds)
    tokens = sum(len(r.policy_positions) for r in rollouts)
    found = {"step": STEP, "trajectories": len(rollouts), "policy_tokens": tokens, "other_load": load.share()}
    return found | {"parts": {name: asdict(t) for name, t in timings.items()}}


def _rollouts(run: Path, task, chat: Chat) -> tuple[list[Rollout], list[float]]:
    """The step's trajectories that have an advantage, with the prompts that their teacher read."""
    kept = [line for line in read_records(run, STEP) if line["advantage"] != 0]
    found = []
    for line in kept:
        problem = task.train_problem(line["group"])
        taught = chat.prompt_ids(problem.teacher_messages)
        mask = [bool(m) for m in line["mask"]]
        found.append(Rollout(problem, line["group"], line["sample"], line["prompt_ids"], taught, line["ids"], mask))
    return found, [line["advantage"] for line in kept]


def _parts(lm, rollouts: list[Rollout], batches: list[MicroBatch], advantages: list[float]) -> dict[str, Callable]:
    head = lm.get_output_embeddings()

    def backbone(which: str) -> list[torch.Tensor]:
        return [hidden_states(lm, getattr(b, which)) for b in batches]

    with torch.no_grad():
        hidden = list(zip(batches, backbone("student"), backbone("teacher"), strict=True))

    def stats(names: tuple[str, ...], taught: bool) -> list[TokenStats]:
        return [head(s, b.targets, t if taught else None, stats=names) for b, s, t in hidden]

    with torch.no_grad():
        scored = stats(TEACHER, True)
    signal, entropy = torch.cat([s.logprobs - s.teacher_logprobs for s in scored]), torch.cat([s.entropy for s in scored])
    order = [row for b in batches for row in b.rows]
    own = torch.tensor([advantages[i] for i in order])
    bounds = torch.tensor([0, *(len(rollouts[i].policy_positions) for i in order)]).cumsum(0).int()
    return {
        "policy": lambda: backbone("student"),
        "teacher": lambda: backbone("teacher"),
        "head": lambda: stats(STUDENT, False),
        "head with teacher": lambda: stats(TEACHER, True),
        "scan": lambda: credit_weights(signal, entropy, own, bounds),
    }
