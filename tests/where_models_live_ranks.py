"""Ranks of test_where_models_live.py: three optimizer steps of a small Qwen3 with the fused head, by each way of spreading a model.

Two ranks of forked_ranks.py call `main` with the result's path; rank 0 writes {case: {"errors": {parameter: relative error against
one process with whole float64 logits}, "moved": the same of what training changed}} and a few facts.
"""

import faulthandler
import json
import sys
import time
import traceback

import deepspeed
import deepspeed.ops
import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from gear_kernels import FusedHead, GearKernelsError, Head, TokenStats, linear_token_stats

VOCAB, LENGTH, ROWS, STEPS, LR = 256, 12, 4, 3, 1e-2
STATS = ("logprobs", "entropy", "reverse_kl")


class Scored(nn.Module):
    def __init__(self, lm):
        super().__init__()
        FusedHead.adopt(lm.get_output_embeddings())
        self.lm = lm

    def forward(self, ids, targets, teacher_ids):
        body = self.lm.base_model
        with torch.no_grad():
            taught = body(input_ids=teacher_ids, use_cache=False).last_hidden_state
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        return self.lm.get_output_embeddings()(hidden, targets, taught, stats=STATS, workspace_bytes=20_000)


class Merged(nn.Module):
    """LoRA on the head itself: its weight is merged anew in each forward."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, targets, teacher_ids):
        body = self.lm.base_model
        with torch.no_grad():
            taught = body(input_ids=teacher_ids, use_cache=False).last_hidden_state
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        return linear_token_stats(hidden, Head.from_model(self.lm), targets, taught, stats=STATS, workspace_bytes=20_000)


class Plain(nn.Module):
    """The same by whole logits in float64."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, targets, teacher_ids):
        student = self.lm(input_ids=ids).logits.double().log_softmax(-1)
        with torch.no_grad():
            teacher = self.lm(input_ids=teacher_ids).logits.double().log_softmax(-1)
        keep, p = targets != -100, student.exp()
        chosen = student.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        values = (chosen, -(p * student).sum(-1), (p * (student - teacher)).sum(-1))
        return TokenStats(**dict(zip(STATS, (v * keep for v in values), strict=True)))


def tiny_qwen3(tied=False):
    torch.manual_seed(1 + tied)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, head_dim=16, tie_word_embeddings=tied, **sizes)).train()


def batch(step):
    g = torch.Generator().manual_seed(step)
    ids, teacher_ids, targets = torch.randint(VOCAB, (3, ROWS, LENGTH), generator=g)
    targets[torch.rand(ROWS, LENGTH, generator=g) < 0.25] = -100
    return ids, targets, teacher_ids, torch.randn(3, ROWS, LENGTH, generator=g)


def loss_of(out, weights):
    return sum((w * getattr(out, name)).sum() for w, name in zip(weights, STATS, strict=True))


def train(model, backward, step):
    """Each rank takes its half of the rows; frameworks take the mean over the ranks, so the loss is doubled."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    for number in range(STEPS):
        *inputs, weights = (x[..., rows, :] for x in batch(number))
        backward(ranks * loss_of(model(*inputs), weights))
        step()


def whole(model):
    """All parameters as one process would have them. Collective."""
    named = dict(getattr(model, "module", model).named_parameters())
    with deepspeed.zero.GatheredParameters([p for p in named.values() if hasattr(p, "ds_id")]):
        return {
            n.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): (
                p.full_tensor() if isinstance(p, DTensor) else p
            )
            .detach()
            .clone()
            for n, p in named.items()
        }


# --- ways: a model -> what is called, its backward, its optimizer step ------------------------------------------------------------


def by_torch(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return model, lambda loss: loss.backward(), step


def ddp(model):
    return by_torch(DistributedDataParallel(model))


def fsdp(model, **policy):
    lm = model.lm
    for layer in lm.base_model.layers:
        fully_shard(layer, **policy)
    pair = [lm.base_model.embed_tokens, lm.lm_head]
    fully_shard(pair if lm.config.tie_word_embeddings else lm.lm_head, **policy)
    return by_torch(fully_shard(model, **policy))


def fsdp_root(model, **policy):
    for layer in model.lm.base_model.layers:
        fully_shard(layer, **policy)
    return by_torch(fully_shard(model, **policy))


def zero(stage, **more):
    def way(model):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        } | more
        parameters = [p for p in model.parameters() if p.requires_grad]
        engine = deepspeed.initialize(model=model, config=config, model_parameters=parameters)[0]
        return engine, engine.backward, engine.step

    return way


WAYS = {"one": by_torch, "ddp": ddp, "fsdp": fsdp, "fsdp_root": fsdp_root, "zero1": zero(1), "zero2": zero(2), "zero3": zero(3)}


def lora(lm, **options):
    torch.manual_seed(7)
    peft.get_peft_model(lm, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    return lm


BODY = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def checkpointed(lm):
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def wrapped_head(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    model.lm.lm_head = checkpoint_wrapper(model.lm.lm_head)
    return model


MODELS = {
    "untied": lambda w: w(tiny_qwen3()),
    "tied": lambda w: w(tiny_qwen3(True)),
    "ckpt": lambda w: w(checkpointed(tiny_qwen3())),
    "ckpt tied": lambda w: w(checkpointed(tiny_qwen3(True))),
    "ckpthead": lambda w: w(tiny_qwen3()) if w is Plain else wrapped_head(w(tiny_qwen3())),
    "lora": lambda w: _lora_after(w, tiny_qwen3(), **BODY),
    "saved": lambda w: _lora_after(w, tiny_qwen3(), modules_to_save=["lm_head"], **BODY),
    "saved tied": lambda w: _lora_after(w, tiny_qwen3(True), modules_to_save=["lm_head"], **BODY),
    "lorahead": lambda w: (Plain if w is Plain else Merged)(lora(tiny_qwen3(), target_modules=["q_proj", "lm_head"])),
}


def _lora_after(w, lm, **options):
    model = w(lm)
    lora(lm, **options)
    return model


def main(argv):
    faulthandler.dump_traceback_later(380, exit=True)
    path, ways, models = argv
    models = models.replace("_", " ").split(",")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    want, start = {}, {}
    for m in models:
        model = MODELS[m](Plain)
        start[m] = whole(model)
        train(*by_torch(model))
        want[m] = whole(model)
    deepspeed.init_distributed("gloo")
    init_device_mesh("cpu", (2,))
    for w in ways.split(","):
        for m in models:
            t = time.time()
            try:
                parts = WAYS[w](MODELS[m](Scored))
                train(*parts)
                got = whole(parts[0])
                assert got.keys() == want[m].keys(), (got.keys() ^ want[m].keys())
                err = {n: ((got[n] - x).norm() / x.norm()).item() for n, x in want[m].items()}
                moved = sum(not torch.equal(x, start[m][n]) for n, x in want[m].items())
                worst = max(err, key=err.get)
                msg = f"{worst} {err[worst]:.2e} moved {moved} of {len(err)}"
            except Exception as e:
                if dist.get_rank() == 0:
                    traceback.print_exc()
                msg = repr(e)[:500]
            if dist.get_rank() == 0:
                print("##", w, "|", m, "|", msg, f"{time.time() - t:.1f}s", flush=True)
