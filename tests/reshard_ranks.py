"""Rank script of test_resharding.py: a run that two ranks begin, one goes on with, and two end.

Its `main` is called with a folder that holds an untied model, FOLDER/a, and with what to do: `whole` on two ranks, `one` on one,
`back` on two. Each writes FOLDER/WHAT.json.
"""

import json
from pathlib import Path

import deepspeed
import deepspeed.ops
import teacher_ranks as plain
import torch
import torch.distributed as dist
from lora_ranks import gathered_set
from scripted_runs import RESHARDED

from gear_trainer.policy import checkpoint, lora
from gear_trainer.policy.gather import whole_state_dict


def config(folder, i, overrides):
    float32 = [] if any("bfloat16" in one for one in overrides) else ["model.dtype=float32"]
    world = [f"world_size={dist.get_world_size()}", f"name=r{i}", "checkpoint.keep=9"]
    return plain.config(folder, *world, *float32, *overrides)


def state(trainer):
    """All that a step changes, whole, on every rank: weights, what follows them."""
    lm, teacher = trainer.engine.module.lm, trainer.frozen.get("teacher")
    found = whole_state_dict(lm)
    if lora.layers(lm):
        found |= {f"teacher {n}": t for n, t in gathered_set(lm, "teacher").items()}
    elif teacher:
        found |= {f"teacher {n}": t for n, t in whole_state_dict(teacher.engine.module.lm).items()}
    return {n: t.float().cpu() for n, t in found.items()}


def adams_steps(trainer):
    """How often Adam has stepped, by part of the parameters, and on how many tensors that is counted."""
    counts = [s["step"] for s in trainer.engine.optimizer.optimizer.state.values()]
    return [int(step) for step in counts], len({id(step) for step in counts})


def gap(got, want):
    return max(((got[n] - w).norm() / w.norm().clamp(min=1e-9)).item() for n, w in want.items())


def resumed(cfg, step):
    """A trainer from the checkpoint of a step, and whether that was written anew for it."""
    anew = checkpoint.check(cfg, step)
    trainer = plain.make_trainer(cfg, cfg.model.path, resharded=anew)
    checkpoint.load(trainer.engine, cfg, step, list(trainer.frozen.values()))
    return trainer, anew


def whole(cfg, rollouts, folder, name):
    """Four steps; the checkpoint of the second, and the state after each."""
    trainer = plain.make_trainer(cfg, cfg.model.path)
    states = []
    for step in range(1, 5):
        plain.train_step(trainer, step, rollouts)
        states.append(state(trainer))
        if step == 2:
            checkpoint.save(trainer.engine, cfg, step, list(trainer.frozen.values()))
    if dist.get_rank() == 0:
        torch.save(states, folder / f"{name}.pt")
    return {"moved": gap(states[3], states[2])}


def goes_on(cfg, rollouts, folder, name, step):
    """The step after a checkpoint of another number of ranks, and a checkpoint of its own."""
    states = torch.load(folder / f"{name}.pt")
    trainer, anew = resumed(cfg, step)
    out = {"anew": anew, "loaded": gap(state(trainer), states[step - 1]), "steps": adams_steps(trainer)}
    plain.train_step(trainer, step + 1, rollouts)
    out["gap"] = gap(state(trainer), states[step])
    checkpoint.save(trainer.engine, cfg, step + 1, list(trainer.frozen.values()))
    out["own is as it was"] = not checkpoint.check(cfg, step + 1)
    dist.barrier()
    out["left"] = sorted(p.name for p in (cfg.run_dir / "checkpoints").iterdir())
    return out


def main(argv):
    folder, what = Path(argv[0]), argv[1]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    deepspeed.init_distributed("gloo")
    rollouts, result = plain.make_rollouts(), {}
    for i, (name, overrides) in enumerate(RESHARDED.items()):
        cfg = config(folder, i, overrides)
        more = () if what == "whole" else (2 if what == "one" else 3,)
        result[name] = (whole if what == "whole" else goes_on)(cfg, rollouts, folder, f"r{i}", *more)
    if dist.get_rank() == 0:
        (folder / f"{what}.json").write_text(json.dumps(result))
    dist.barrier()
