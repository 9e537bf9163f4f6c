"""Ranks of test_where_models_live.py: three optimizer steps of a small Qwen3 with the fused head, in each place for a model.

forked_ranks.py calls `main` in two of them with the result's path and the cases, {way: models}; rank 0 writes relative errors
against one process with whole float64 logits, {way: {model: {parameter: error}}}, and a few facts. The models are those that
docs/where_models_live.md shows.
"""

import contextlib
import faulthandler
import json
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import deepspeed.ops
import peft
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from gear_kernels import GearKernelsError, TokenStats

VOCAB, LENGTH, ROWS, STEPS = 256, 12, 4, 3
ADAM = {"lr": 1e-2, "eps": 0.1}  # a gradient that is 1 % off then moves each parameter by 2.5e-5 of it or more
STATS = ("logprobs", "entropy", "reverse_kl")
TILES = 20_000  # bytes of workspace: several tiles
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shown():
    """What the page's code defines: Scored, sharded, AdaptedHead."""
    page = Path(__file__).parents[1] / "docs" / "where_models_live.md"
    names = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)), names)
    return SimpleNamespace(**names)


page = shown()


class Plain(nn.Module):
    """The same model by whole logits in float64."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, targets, teacher_ids, **options):
        student = self.lm(input_ids=ids).logits.double().log_softmax(-1)
        with torch.no_grad():
            teacher = self.lm(input_ids=teacher_ids).logits.double().log_softmax(-1)
        keep, p = targets != -100, student.exp()
        chosen = student.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        values = (chosen, -(p * student).sum(-1), (p * (student - teacher)).sum(-1))
        return TokenStats(**dict(zip(STATS, (v * keep for v in values), strict=True)))


# --- models: a class around a small Qwen3 -> the model --------------------------------------------------------------------------


def tiny_qwen3(tied=False, layers=2):
    torch.manual_seed(1 + tied)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    config = Qwen3Config(vocab_size=VOCAB, num_hidden_layers=layers, tie_word_embeddings=tied, initializer_range=0.1, **sizes)
    return Qwen3ForCausalLM(config).train()


def checkpointed(kind):
    """Decoder layers and the head recompute in the backward."""
    lm = tiny_qwen3()
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = kind(lm)
    lm.set_output_embeddings(checkpoint_wrapper(lm.lm_head))
    return model


def with_lora(kind, tied=False, **options):
    """LoRA put into a model that has its head already; peft changes the layers in place."""
    model = kind(tiny_qwen3(tied))
    torch.manual_seed(7)
    names = ["q_proj", "v_proj", "down_proj", *options.pop("more", ())]
    peft.get_peft_model(model.lm, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, **options))
    return model


MODELS = {
    "untied": lambda kind: kind(tiny_qwen3()),
    "tied": lambda kind: kind(tiny_qwen3(tied=True)),
    "one layer": lambda kind: kind(tiny_qwen3(layers=1)),
    "checkpointed": checkpointed,
    "LoRA": with_lora,
    "saved head": partial(with_lora, modules_to_save=["lm_head"]),
    "tied, saved head": partial(with_lora, tied=True, modules_to_save=["lm_head"]),
    "LoRA head": partial(with_lora, more=["lm_head"]),
}

# --- ways: a model -> what is called, its backward, its optimizer's step --------------------------------------------------------


def by_torch(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return model, lambda loss: loss.backward(), step


def by_deepspeed(model, stage, **more):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, config=config | more, model_parameters=trained)[0]
    return engine, engine.backward, engine.step


def fsdp2_outermost(model):
    """The head is left to the outermost group."""
    for layer in model.lm.base_model.layers:
        fully_shard(layer)
    return by_torch(fully_shard(model))


def fsdp2_compiled(model):
    """As torchtitan does: blocks are compiled, then sharded."""
    for part in (*model.lm.base_model.layers, model.lm.lm_head):
        part.compile(fullgraph=True, backend="aot_eager")
    return by_torch(page.sharded(model))


def ddp_compiled(model):
    return by_torch(DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager")))


WAYS = {
    "DDP": lambda model: by_torch(DistributedDataParallel(model)),
    "DDP, unused parameters looked for": lambda model: by_torch(DistributedDataParallel(model, find_unused_parameters=True)),
    "DDP, compiled": ddp_compiled,
    "FSDP2": lambda model: by_torch(page.sharded(model)),
    "FSDP2, outermost": fsdp2_outermost,
    "FSDP2, compiled": fsdp2_compiled,
    "ZeRO-1": partial(by_deepspeed, stage=1),
    "ZeRO-2": partial(by_deepspeed, stage=2),
    "ZeRO-3": partial(by_deepspeed, stage=3),
}

# --- three steps ----------------------------------------------------------------------------------------------------------------


def batch(step):
    """This rank's rows of the step's batch: ids, targets, the teacher's ids [rows, T], and weights of statistics [3, rows, T]."""
    g = torch.Generator().manual_seed(step)
    ids, teacher_ids, targets = torch.randint(VOCAB, (3, ROWS, LENGTH), generator=g)
    targets[torch.rand(ROWS, LENGTH, generator=g) < 0.25] = -100
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    whole = (ids, targets, teacher_ids, torch.randn(3, ROWS, LENGTH, generator=g))
    return [x[..., rows, :] for x in whole]


def loss_of(out, weights):
    """The global sum, for frameworks that take the mean over ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return ranks * sum((w * getattr(out, name)).sum() for w, name in zip(weights, STATS, strict=True))


def train(model, backward, step, write=False):
    """write: a statistic is written in place, as a user may."""
    for number in range(STEPS):
        *inputs, weights = batch(number)
        out = model(*inputs, stats=STATS, workspace_bytes=TILES)
        if write:
            out.logprobs.mul_(1.0)
        backward(loss_of(out, weights))
        step()


def whole(model):
    """All parameters by the names of the bare model, as one process would have them. Collective."""
    named = dict(getattr(model, "module", model).named_parameters())
    with deepspeed.zero.GatheredParameters([p for p in named.values() if hasattr(p, "ds_id")]):
        values = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named.items()}
    return {re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", name): value for name, value in values.items()}


def trained_by_one(name):
    """Parameters after three steps of one process, and of those that it moved how far, as a share."""
    model = MODELS[name](Plain)
    before = whole(model)
    train(*by_torch(model))
    after = whole(model)
    moved = {n: ((after[n] - value).norm() / value.norm()).item() for n, value in before.items()}
    return after, {n: share for n, share in moved.items() if share}


def errors(way, name, want):
    torch._dynamo.reset()
    parts = WAYS[way](MODELS[name](page.AdaptedHead if name == "LoRA head" else page.Scored))
    train(*parts, write=way == "FSDP2")
    got = whole(parts[0])
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return {n: ((got[n] - w).norm() / w.norm()).item() for n, w in want.items()}


# --- bfloat16 -------------------------------------------------------------------------------------------------------------------

ROUNDED = {  # way, and what its forward runs under
    "DDP, autocast": (WAYS["DDP"], partial(torch.autocast, "cpu", dtype=torch.bfloat16)),
    "FSDP2, bfloat16": (lambda model: by_torch(page.sharded(model, mp_policy=BFLOAT16)), contextlib.nullcontext),
    "ZeRO-2, bfloat16": (partial(by_deepspeed, stage=2, bf16={"enabled": True}), contextlib.nullcontext),
    "ZeRO-3, bfloat16": (partial(by_deepspeed, stage=3, bf16={"enabled": True}), contextlib.nullcontext),
}


def first_step(parts, context=contextlib.nullcontext):
    """Statistics [3, rows, T] of this rank's rows, and the whole gradient of the head's weight."""
    model, backward, _ = parts
    *inputs, weights = batch(0)
    with context():
        out = model(*inputs, stats=STATS, workspace_bytes=TILES)
    values = torch.stack([getattr(out, name) for name in STATS]).detach().clone()
    backward(loss_of(out, weights))
    weight = getattr(model, "module", model).lm.lm_head.weight
    grad = safe_get_full_grad(weight) if weight.grad is None else weight.grad
    return values, (grad.full_tensor() if isinstance(grad, DTensor) else grad).double()


def rounding(case, truth):
    """Errors of our head and of plain logits in the same system: root mean squares of statistics, the gradient's relative one."""
    way, context = ROUNDED[case]
    rank, found = dist.get_rank(), {}
    for name, kind in {"ours": page.Scored, "plain": Plain}.items():
        values, grad = first_step(way(kind(tiny_qwen3())), context)
        squares = (values.double() - truth[0][:, rank * ROWS // 2 : (rank + 1) * ROWS // 2]).square().sum((1, 2))
        dist.all_reduce(squares)
        shares = dict(zip(STATS, (squares / (ROWS * LENGTH)).sqrt().tolist(), strict=True))
        found[name] = {**shares, "gradient": ((grad - truth[1]).norm() / truth[1].norm()).item(), "dtype": str(values.dtype)}
    return found


# --- what is refused, and when the weight is whole ------------------------------------------------------------------------------


def refusals():
    def run(model, **more):
        *inputs, _ = batch(0)
        model(*inputs, stats=STATS, **more)

    def tied_alone():
        model = page.Scored(tiny_qwen3(tied=True))
        fully_shard(model.lm.lm_head)
        run(fully_shard(model))

    rounds = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    calls = {
        "output_dtype": lambda: run(page.sharded(page.Scored(tiny_qwen3()), mp_policy=rounds)),
        "temperatures": lambda: run(
            page.sharded(page.Scored(tiny_qwen3()), mp_policy=BFLOAT16), temperature=torch.full((ROWS // 2, LENGTH), 0.7)
        ),
        "LoRA head": lambda: run(page.sharded(MODELS["LoRA head"](page.AdaptedHead))),
        "tied head alone": tied_alone,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "no error"
        except (GearKernelsError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def gathered():
    """Whether the head's weight is whole: before the head, within it, after it; and warnings about its results."""
    model, seen = page.sharded(page.Scored(tiny_qwen3())), {}
    head = model.lm.lm_head

    def look(when):
        seen[when] = not isinstance(head.weight, DTensor)

    model.lm.model.norm.register_forward_hook(lambda *_: look("before"))
    head.register_forward_pre_hook(lambda *_: look("within"))
    *inputs, _ = batch(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(*inputs, stats=STATS)
    look("after")
    return {"whole": seen, "warnings": [str(w.message) for w in caught if "view" in str(w.message)]}


def main(argv):
    faulthandler.dump_traceback_later(1400, exit=True)  # a hang prints nothing by itself
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    path, cases = argv[0], json.loads(argv[1])
    want = {name: trained_by_one(name) for name in sorted({name for names in cases.values() for name in names})}
    truth = first_step(by_torch(Plain(tiny_qwen3())))
    dist.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    result = {"moved": {name: moved for name, (_, moved) in want.items()}}
    result["gathered"], result["refused"] = gathered(), refusals()
    deepspeed.init_distributed("gloo")
    result["errors"] = {way: {name: errors(way, name, want[name][0]) for name in names} for way, names in cases.items()}
    result["rounding"] = {case: rounding(case, truth) for case in ROUNDED}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
