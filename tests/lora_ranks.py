"""Rank script of test_lora.py: LoRA under ZeRO-3 against one process's plain models with the same adapters.

Its `main` is called on two ranks with a folder: reads FOLDER/a (an untied model), writes FOLDER/result.json
"""

import json
from pathlib import Path

import deepspeed
import deepspeed.ops
import teacher_ranks as plain
import torch
import torch.distributed as dist
from scripted_runs import SHARDED, WHOLE
from teacher_ranks import worst
from transformers import AutoModelForCausalLM

from gear_trainer.policy import checkpoint, lora
from gear_trainer.policy.frozen import SharedModel
from gear_trainer.policy.gather import whole_state_dict
from gear_trainer.recipe import resolve

EPS = 1e-4  # of Adam: its first steps divide by |gradient|, which stretches the rounding of gradients near 0
LORA = ["lora.rank=4", "lora.alpha=8", f"deepspeed.optimizer.params.eps={EPS}"]  # behind what sets the whole of deepspeed
SOME = "lora.target_modules=[q_proj, down_proj]"  # a gather for each layer and adapter is what this script takes time for
CASES = {
    "rslora, some layers, recomputed": ["credit=grpo", "lora.rslora=true", SOME, "model.gradient_checkpointing=true", WHOLE],
    "teacher and reference initial": ["credit=opsd+grpo", "teacher.weights=initial", "kl.coefficient=0.7", SHARDED],
    "teacher ema": ["credit=opsd+grpo", "teacher.weights=ema", "teacher.ema_rate=0.25", "distill.beta=1", SOME, SHARDED],
    "teacher synced": ["credit=sdar", "distill.coefficient=0.5", "teacher.weights=synced", "teacher.sync_every=2", SOME, WHOLE],
}
STEPS = 3


def load(folder, cfg):
    lm = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32)
    lora.attach(lm, cfg.lora, cfg.seed)
    return lm


def expected(cfg, folder, rollouts):
    """Adapters, and the teacher's, after STEPS steps of one process: {name: tensor} each."""
    student, teacher = load(folder, cfg), load(folder, cfg)
    rule = resolve(cfg).teacher
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], cfg.train.lr, eps=EPS, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        plain.plain_gradients(cfg, student, teacher, rollouts)
        optimizer.step()
        with torch.no_grad():
            for e, w in zip(*(lora.parameters(lm, lora.POLICY) for lm in (teacher, student)), strict=True):
                if rule and rule.weights == "ema":
                    e += rule.ema_rate * (w - e)
                elif rule and rule.weights == "synced" and step % rule.sync_every == 0:
                    e.copy_(w)
    return [{n: p.detach().clone() for n, p in lm.named_parameters() if p.requires_grad} for lm in (student, teacher)]


def relative(got, want):
    return max((((got[n] - w).norm() / w.norm().clamp(min=1e-9)).item() for n, w in want.items()), default=0.0)


def gathered_set(lm, name):
    """A set of adapters, whole, by the policy's names."""
    with deepspeed.zero.GatheredParameters(lora.parameters(lm, name)):
        own = {n: p.detach().clone() for n, p in lm.named_parameters() if f".{name}." in n and ".lora_" in n}
    return {n.replace(f".{name}.", f".{lora.POLICY}."): p for n, p in own.items()}


def case(cfg, folder, rollouts, want):
    """STEPS steps, a checkpoint and an export before the last of them."""
    trainer = plain.make_trainer(cfg, cfg.model.path)
    lm, teacher = trainer.engine.module.lm, trainer.frozen.get("teacher")
    start = whole_state_dict(lm)
    for step in range(1, STEPS):
        plain.train_step(trainer, step, rollouts)
    checkpoint.save(trainer.engine, cfg, STEPS - 1, list(trainer.frozen.values()))
    checkpoint.export(trainer.engine, cfg, Tokenizer)
    scores, _ = plain.train_step(trainer, STEPS, rollouts)  # scored before the update: of the policy that was exported
    out = {"adapters": relative(gathered_set(lm, lora.POLICY), want[0]), "teacher": 0.0}
    if teacher and teacher.rule.follows:
        out["teacher"] = relative(gathered_set(lm, "teacher"), want[1])
    whole = whole_state_dict(lm)
    out["moved"] = sorted({n.split(".")[-2] for n, t in whole.items() if not torch.equal(t, start[n])})
    out["scores"] = [t.tolist() for t in scores["logprobs"]]
    out["shared"] = all(isinstance(model, SharedModel) for model in trainer.frozen.values())
    return out | resumed(cfg, trainer, rollouts, whole)


def resumed(cfg, trainer, rollouts, whole):
    """The last step again from the checkpoint; what that holds; what other adapters are told."""
    fresh = plain.make_trainer(cfg, cfg.model.path)
    checkpoint.check(cfg, STEPS - 1)
    checkpoint.load(fresh.engine, cfg, STEPS - 1, list(fresh.frozen.values()))
    plain.train_step(fresh, STEPS, rollouts)
    again = whole_state_dict(fresh.engine.module.lm)
    same = all(torch.equal(whole[n], again[n]) for n in whole)
    for a, b in zip(trainer.frozen.values(), fresh.frozen.values(), strict=True):
        same &= all(torch.equal(x, y) for x, y in zip(a.kept, b.kept, strict=True))
    trained = sum(p.ds_numel for p in trainer.engine.module.parameters() if p.requires_grad)
    root = cfg.run_dir / "checkpoints" / f"step-{STEPS - 1}"
    return {"resumed bitwise": bool(same), "bytes": sum(p.stat().st_size for p in root.iterdir()), "trained": trained}


class Tokenizer:
    """Stands for the tokenizer, which the export only asks to save itself."""

    @staticmethod
    def save_pretrained(path):
        (Path(path) / "tokenizer.json").write_text("{}")


def main(argv):
    folder = Path(argv[0])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    rollouts = plain.make_rollouts()
    configs = {n: plain.config(folder, f"name=l{i}", "model.dtype=float32", *o, *LORA) for i, (n, o) in enumerate(CASES.items())}
    want = {name: expected(cfg, folder, rollouts) for name, cfg in configs.items()}
    deepspeed.init_distributed("gloo")
    result = {name: worst(case(cfg, folder, rollouts, want[name])) for name, cfg in configs.items()}
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
