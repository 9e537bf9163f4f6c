"""Rank script of test_oracle.py: scripted rollouts through the trainer's own path, ZeRO-3 on two ranks.

Its `main` is called with a folder: reads FOLDER/a (an untied model) and FOLDER/rollouts.json, writes FOLDER/CASE.pt for each case
"""

import json
import re
from pathlib import Path

import deepspeed
import deepspeed.ops
import teacher_ranks as plain
import torch
import torch.distributed as dist
from lora_ranks import gathered_set
from teacher_ranks import PACKED, SHARDED, TEMPERATURE, VOCAB, WHOLE  # noqa: F401  (test_oracle.py reads them here)

from gear_trainer.policy import lora
from gear_trainer.policy.gather import whole_state_dict
from gear_trainer.rollout import Rollout
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem
from gear_trainer.train.experience import pack
from gear_trainer.train.schedule import schedule

# Adam's first step is lr g / (|g| + eps): with its own 1e-8 a g that is 0 but for rounding would be a step of the whole rate, in
# the direction of the rounding. Gradients here are about 1e-2.
EPS = "deepspeed.optimizer.params.eps=1.0e-2"
PADDED = "train.packing=false"
GEAR = ["credit=gear", "credit_args.entropy_ratio=1.2"]  # 1.5 of a random model's entropy is hardly ever reached
TWICE = "train.updates_per_step=2"
CASES = {
    "grpo": ["credit=grpo", "train.aggregation=token_mean", "train.weight_decay=0.1", "train.gradient_clipping=2",
             "train.lr=0.02", "train.lr_warmup_steps=2", PADDED, WHOLE],
    "gear, padded": [*GEAR, PADDED, SHARDED],
    "gear, packed": [*GEAR, PACKED, SHARDED],
    "gear, kl": [*GEAR, "kl.coefficient=0.5", "train.entropy_bonus=0.05", PACKED, SHARDED],
    "gspo": ["credit=grpo", "train.policy_loss=gspo", "train.clip_low=0.02", "train.clip_high=0.02", TWICE, PACKED, SHARDED],
    "two updates": [*GEAR, "train.clip_low=0.1", "train.clip_high=0.2", "kl.coefficient=0.1", TWICE, PACKED, WHOLE],
    "lora": [*GEAR, "kl.coefficient=0.5", "lora.rank=4", "lora.alpha=8", TWICE, PACKED, SHARDED],
}  # fmt: skip


def config(folder, name, *overrides):
    """A case's configuration; overrides go over it."""
    run = re.sub(r"\W+", "-", name)
    common = [f"name={run}", "model.dtype=float32", "rollout.group_size=3", "train.importance_cap=2"]
    return plain.config(folder, *common, *CASES[name], EPS, *overrides)


def as_rollout(k, sample, scripted):
    r = Rollout(Problem(str(k), [], [], ""), scripted["group"], sample, scripted["prompt"], scripted["teacher"])
    r.ids, r.mask, r.sampler_logprobs, r.reward = (scripted[name] for name in ("ids", "mask", "sampler", "reward"))
    r.turn_ids, r.reference = [0] * len(r.ids), "written"
    return r


def trained(lm):
    return gathered_set(lm, lora.POLICY) if lora.layers(lm) else whole_state_dict(lm)


def case(cfg, steps):
    trainer = plain.make_trainer(cfg, cfg.model.path)
    lm = trainer.engine.module.lm
    start, numbers = trained(lm), []
    for number, rollouts in enumerate(steps, 1):
        own = [as_rollout(i, i % cfg.rollout.group_size, r) for i, r in enumerate(plain.mine(rollouts))]
        sums = Sums()
        experience = pack(cfg, trainer.recipe, own, trainer.device)
        trainer.learn(number, experience, schedule(cfg, trainer.recipe, experience), sums)
        numbers.append(sums.read(trainer.device))
    return {"start": start, "weights": trained(lm), "steps": numbers}


def main(argv):
    folder = Path(argv[0])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    deepspeed.init_distributed("gloo")
    steps = json.loads((folder / "rollouts.json").read_text())
    for name in CASES:
        found = case(config(folder, name), steps)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.barrier()
