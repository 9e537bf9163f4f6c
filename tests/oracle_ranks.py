"""Rank script of test_oracle.py: scripted rollouts through the trainer's own path, ZeRO-3 on two ranks.

Its `main` is called with a folder: reads FOLDER/a (an untied model) and FOLDER/rollouts.json, writes FOLDER/CASE.pt for each case
"""

import json
from pathlib import Path

import deepspeed
import deepspeed.ops
import teacher_ranks as plain
import torch
import torch.distributed as dist
from lora_ranks import gathered_set
from scripted_runs import ORACLE, oracle_config

from gear_trainer.policy import lora
from gear_trainer.policy.gather import whole_state_dict
from gear_trainer.rollout import Rollout
from gear_trainer.runs.metrics import Sums
from gear_trainer.tasks.base import Problem
from gear_trainer.train.experience import pack
from gear_trainer.train.schedule import schedule


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
    for name in ORACLE:
        found = case(oracle_config(folder, name), steps)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.barrier()
