"""Rank script of test_head_fsdp.py: gradients of a head under FSDP2 on 2 gloo ranks against one process, by each piece of advice.

Its `main` is called with RESULT.json: rank 0 writes {way: {parameter: relative error}} and a few facts
"""

import faulthandler
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from gear_kernels import FusedHead, GearKernelsError, Head, linear_token_stats

ROWS, WIDTH, VOCAB = 10, 24, 180
STATS = ("logprobs", "entropy", "reverse_kl")


class Model(nn.Module):
    """A backbone and an untied head, which `call` turns into statistics."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head, self.call = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB), call

    def forward(self, x, targets, teacher):
        return self.call(self.lm_head, self.body(x), targets, teacher)


def as_module(head, hidden, targets, teacher):
    return head(hidden, targets, teacher)


def of_weights(whole):
    """The operator with the head's parameters, each made whole by `whole`."""

    def call(head, hidden, targets, teacher):
        return linear_token_stats(hidden, Head(whole(head.weight), whole(head.bias)), targets, teacher)

    return call


WAYS = {
    "FusedHead": as_module,
    "grad_placements": of_weights(lambda p: p.full_tensor(grad_placements=[Partial("avg")])),
    "bare full_tensor": of_weights(lambda p: p.full_tensor()),  # what the message advised once
}


def batch():
    g = torch.Generator().manual_seed(1)
    x, teacher = torch.randn(2, ROWS, WIDTH, generator=g)
    return x, torch.randint(VOCAB, (ROWS,), generator=g), teacher, torch.randn(3, ROWS, generator=g)


def loss_of(out, weights):
    return sum((w * getattr(out, name)).sum() for w, name in zip(weights, STATS, strict=True))


def gradients(model, rows):
    x, targets, teacher, weights = batch()
    loss_of(model(x[rows], targets[rows], teacher[rows]), weights[:, rows]).backward()
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()}


def sharded(call):
    model = Model(call)
    if call is as_module:
        FusedHead.adopt(model.lm_head)
        fully_shard(model.lm_head)  # gathered around its own forward and backward
    else:
        fully_shard(model.lm_head, reshard_after_forward=False)
    return fully_shard(model)


def errors(call, want):
    """FSDP2 averages over ranks; each holds half of the rows."""
    share = slice(dist.get_rank() * ROWS // 2, (dist.get_rank() + 1) * ROWS // 2)
    got = gradients(sharded(call), share)
    return {name: ((2 * got[name] - w).norm() / w.norm()).item() for name, w in want.items()}


def refusal(call):
    try:
        call()
    except GearKernelsError as error:
        return str(error)
    return "no error"


def colwise():
    """What ColwiseParallel's hook leaves of positional targets: logits, or a refusal; and the same head as a vocabulary shard."""
    mesh = init_device_mesh("cpu", (2,))
    x, targets, teacher, weights = batch()
    whole = linear_token_stats(x, Head(*Model(None).lm_head.parameters()), targets, teacher)
    head = parallelize_module(FusedHead.adopt(Model(None).lm_head), mesh, ColwiseParallel())
    shard = Head(head.weight.to_local(), head.bias.to_local(), group=mesh)
    mine = linear_token_stats(x, shard, targets, teacher)
    error = (torch.stack(list(filter(torch.is_tensor, mine))) - torch.stack(list(filter(torch.is_tensor, whole)))).abs().max()
    plain = head(x)
    return {"message": refusal(lambda: head(x, targets, teacher)), "shard": error.item(), "logits": list(plain.shape)}


def late():
    """The message for a head that was adopted after fully_shard."""
    return refusal(lambda: FusedHead.adopt(fully_shard(Model(None).lm_head)))


def main(argv):
    (path,) = argv
    faulthandler.dump_traceback_later(800, exit=True)  # a hang prints nothing by itself
    dist.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    want = gradients(Model(of_weights(lambda p: p)), slice(0, ROWS))
    result = {way: errors(call, want) for way, call in WAYS.items()}
    result["direct"] = refusal(lambda: gradients(sharded(of_weights(lambda p: p)), slice(0, ROWS)))
    result["colwise"], result["late"] = colwise(), late()
    if dist.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()
