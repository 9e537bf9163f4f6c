"""Rank script of test_head_zero3.py: gradients through FusedHead under ZeRO-3 against one process's plain logits, many cases.

Its `main` is called with RESULT.json: rank 0 writes {case: {parameter: relative error}} and a few facts
"""

import faulthandler
import json

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from gear_kernels import FusedHead, GearKernelsError, TokenStats, linear_token_stats

VOCAB, LENGTH, ROWS = 512, 12, 6
STATS = ("logprobs", "entropy", "reverse_kl")
TEMPERATURE = 0.8
# Each rank's micro-batches as rows of the global batch: same number of micro-batches, uneven sizes.
WHOLE = [[[0, 1, 2]], [[3, 4, 5]]]
UNEVEN = [[[0], [1, 2]], [[3, 4], [5]]]
CASES = {  # name: (micro-batches, options)
    "one": (WHOLE, {}),
    "checkpointed": (WHOLE, {"layers": True}),
    "head checkpointed": (WHOLE, {"layers": True, "head": True}),
    "uneven": (UNEVEN, {"unmanaged": True}),
    "uneven checkpointed": (UNEVEN, {"unmanaged": True, "layers": True}),
}


class Policy(nn.Module):
    """The trainer's shape in small: the head is called as a module, inside the engine's forward."""

    def __init__(self, lm, checkpoint_head=False):
        super().__init__()
        FusedHead.adopt(lm.lm_head)
        self.lm, self.checkpoint_head = lm, checkpoint_head

    def forward(self, ids, targets=None, teacher_hidden=None):
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state
        if targets is None:
            return hidden

        def head(h, t):  # a small workspace: several tiles
            return self.lm.lm_head(h, targets, t, temperature=TEMPERATURE, stats=STATS, workspace_bytes=20_000)

        if self.checkpoint_head:
            return checkpoint(head, hidden, teacher_hidden, use_reentrant=False)
        return head(hidden, teacher_hidden)


def tiny_qwen3(tied):
    torch.manual_seed(1 + tied)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).train()


def batch():
    g = torch.Generator().manual_seed(0)
    ids, teacher_ids, targets = torch.randint(VOCAB, (3, ROWS, LENGTH), generator=g)
    targets[torch.rand(ROWS, LENGTH, generator=g) < 0.25] = -100
    return ids, teacher_ids, targets, torch.randn(3, ROWS, LENGTH, generator=g)


def loss_of(out, weights):
    return (weights[0] * out.logprobs + weights[1] * out.entropy + weights[2] * out.reverse_kl).sum()


def plain_gradients(lm):
    """One process, all rows, whole logits, statistics in float64 by log_softmax."""
    ids, teacher_ids, targets, weights = batch()
    student = (lm(input_ids=ids).logits.double() / TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        teacher = (lm(input_ids=teacher_ids).logits.double() / TEMPERATURE).log_softmax(-1)
    keep = targets != -100
    chosen = student.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    p = student.exp()
    values = (chosen, -(p * student).sum(-1), (p * (student - teacher)).sum(-1))
    loss_of(TokenStats(logprobs=values[0] * keep, entropy=values[1] * keep, reverse_kl=values[2] * keep), weights).backward()
    return {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}


def engine_of(lm, options):
    if options.get("layers"):
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    if options.get("unmanaged"):
        config["managed_gradient_accumulation"] = False
    return deepspeed.initialize(model=Policy(lm, options.get("head", False)), config=config)[0]


def run_case(tied, micro_batches, options):
    """This case's gradients, whole on every rank, by parameter name."""
    engine = engine_of(tiny_qwen3(tied), options)
    ids, teacher_ids, targets, weights = batch()
    for rows in micro_batches[dist.get_rank()]:
        with torch.no_grad():
            teacher_hidden = engine(teacher_ids[rows])
        out = engine(ids[rows], targets[rows], teacher_hidden)
        assert isinstance(out, TokenStats) and out.forward_kl is None and out.logprobs.shape == (len(rows), LENGTH)
        engine.backward(loss_of(out, weights[:, rows]) * dist.get_world_size())  # DeepSpeed averages over ranks
    weight = engine.module.lm.lm_head.weight
    assert weight.numel() == 0, "the head stayed gathered"
    gradients = {n.removeprefix("lm."): safe_get_full_grad(p) for n, p in engine.module.named_parameters()}
    return gradients, outside_message(engine, weight)


def outside_message(engine, weight):
    """What a user reads who uses the partitioned weight outside its module."""
    try:
        linear_token_stats(torch.zeros(1, 64), weight, stats=("entropy",))
    except GearKernelsError as error:
        return str(error)
    return "no error"


def main(argv):
    (path,) = argv
    faulthandler.dump_traceback_later(800, exit=True)  # a hang prints nothing by itself
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    want = {tied: plain_gradients(tiny_qwen3(tied)) for tied in (False, True)}  # before DeepSpeed replaces F.linear
    deepspeed.init_distributed("gloo")
    result = {}
    for tied in (False, True):
        for name, (micro_batches, options) in CASES.items():
            got, message = run_case(tied, micro_batches, options)
            assert got.keys() == want[tied].keys()
            errors = {n: ((got[n] - w).norm() / w.norm()).item() for n, w in want[tied].items()}
            result[f"{'tied' if tied else 'untied'}, {name}"] = {"errors": errors, "message": message}
    if dist.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()
