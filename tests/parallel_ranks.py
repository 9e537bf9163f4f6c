"""Rank script of test_parallel.py: a vocabulary-parallel head on 2 gloo ranks against the whole head in one process.

Its `main` is called with RESULT.json: rank 0 writes {case: {quantity: error}} and a few facts
"""

import datetime
import faulthandler
import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import gear_kernels
from gear_kernels import GearKernelsError, Head, linear_token_stats, reference

ALL, N, D, V = reference.STAT_NAMES, 12, 24, 732
CASES = {  # name: (options of the head, dtype, back end)
    "plain": ({}, torch.float32, "native"),
    "bias": ({"bias": True}, torch.float32, "native"),
    "every option": ({"bias": True, "softcap": 4.0, "scale": 1.7, "valid_vocab": 701}, torch.float32, "native"),
    "second shard empty": ({"valid_vocab": 300}, torch.float32, "native"),
    "own teacher head": ({"own": True}, torch.float32, "native"),
    "reference": ({"bias": True}, torch.float32, "reference"),
    "float64": ({"bias": True, "valid_vocab": 500}, torch.float64, "reference"),
    "bfloat16": ({}, torch.bfloat16, "native"),
    "unequal shards": ({"shards": (500, 232), "bias": True, "own": True}, torch.float32, "native"),
    "unequal shards, second empty": ({"shards": (500, 232), "valid_vocab": 400}, torch.float32, "reference"),
    "rows sharded": ({"sequence_parallel": True, "bias": True, "own": True}, torch.float32, "native"),
    "rows sharded, unequal": ({"sequence_parallel": True, "shards": (1, 731), "softcap": 4.0}, torch.float32, "native"),
    "rows sharded, bfloat16": ({"sequence_parallel": True}, torch.bfloat16, "native"),
}


def tensors(dtype):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, D, generator=g)
    teacher = student + 0.2 * teacher
    weight, own = torch.randn(2, V, D, generator=g) * 0.5
    bias = torch.randn(V, generator=g)
    targets = torch.randint(290, (N,), generator=g)
    targets[3], targets[4] = -100, 299
    weight[366:, 0] += 0.5  # the largest logits lie in the second shard more often than not
    return *(x.to(dtype) for x in (student, teacher, weight, own, bias)), targets


def run(group, options, dtype):
    """values [7, N] and the gradients of hidden states, (this rank's shard of) weight and bias; group None: the whole head."""
    options = dict(options)
    student, teacher, weight, own, bias, targets = tensors(dtype)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    part = share(options, rank, ranks)
    lines = slice(rank * N // ranks, (rank + 1) * N // ranks) if options.get("sequence_parallel") else slice(None)
    if group is None:
        options = {name: value for name, value in options.items() if name not in ("shards", "sequence_parallel")}
    student, teacher, targets = (x[lines].clone() for x in (student, teacher, targets))
    student.requires_grad_()
    weight = weight[part].clone().requires_grad_()
    bias = bias[part].clone().requires_grad_() if options.pop("bias", False) else None
    cut = {name: options[name] for name in ("shards", "sequence_parallel") if name in options}
    other = Head(own[part].clone(), group=group, **cut) if options.pop("own", False) else None
    head = Head(weight, bias, group=group, **options)
    out = linear_token_stats(
        student, head, targets, teacher, teacher_head=other, temperature=0.8, stats=ALL, workspace_bytes=60_000
    )
    row_weights = torch.linspace(-1, 1, N)[lines]
    loss = sum((getattr(out, name) * row_weights * (i + 1)).sum() for i, name in enumerate(reference.GRADIENT_NAMES))
    loss.backward()
    found = {"values": torch.stack(list(out)).detach(), "hidden": student.grad, "weight": weight.grad}
    return found | ({"bias": bias.grad} if bias is not None else {})


def share(options, rank, ranks):
    """The columns of a rank."""
    first, second = options.get("shards", (V // 2, V // 2))
    return slice(0, V) if ranks == 1 else slice(0, first) if rank == 0 else slice(first, first + second)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def compare(options, dtype, group):
    whole, mine = run(None, options, dtype), run(group, options, dtype)
    rank = dist.get_rank()
    lines = slice(rank * N // 2, (rank + 1) * N // 2) if options.get("sequence_parallel") else slice(None)
    cut = {"values": (slice(None), lines), "hidden": lines} | dict.fromkeys(("weight", "bias"), share(options, rank, 2))
    errors = {name: error(mine[name], whole[name][cut[name]]) for name in mine}
    worst = torch.tensor(list(errors.values()), dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(errors, worst.tolist(), strict=True))


def collectives(group):
    """How often each collective is called in a forward and a backward with all statistics."""
    counts, originals = {}, {}
    for name in ("all_gather", "all_reduce"):
        originals[name] = getattr(dist, name)
        counts[name] = 0

        def counted(*arguments, _name=name, **options):
            counts[_name] += 1
            return originals[_name](*arguments, **options)

        setattr(dist, name, counted)
    try:
        run(group, {}, torch.float32)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


def few_rows_of_a_real_vocabulary(group):
    """One row, whose tiles are cut into splits: of one number on a rank, of another on the other."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, 8, generator=g), torch.randn(50_000, 8, generator=g)
    rank, errors = dist.get_rank(), []
    for shards, valid in (((45_000, 5_000), None), (None, 26_000)):  # padding is cut from the second shard alone
        first, second = shards or (25_000, 25_000)
        mine = weight[:first] if rank == 0 else weight[first : first + second]
        whole = linear_token_stats(hidden, Head(weight, valid_vocab=valid), stats=("entropy",)).entropy
        head = Head(mine.clone(), group=group, shards=shards, valid_vocab=valid)
        errors.append(error(linear_token_stats(hidden, head, stats=("entropy",)).entropy, whole))
    return max(errors)


def whole_head_and_sharded_rows():
    """Each rank has rows of its own and the whole head: no collective but the weight's, which the caller's all_reduce adds up."""
    student, teacher, weight, _, _, targets = tensors(torch.float32)
    grads = []
    for lines in (slice(None), slice(dist.get_rank() * N // 2, (dist.get_rank() + 1) * N // 2)):
        leaf = weight.clone().requires_grad_()
        out = linear_token_stats(student[lines], leaf, targets[lines], teacher[lines])
        (out.logprobs + out.reverse_kl).sum().backward()
        grads.append(leaf.grad)
    dist.all_reduce(grads[1])
    return error(grads[1], grads[0])


def refused_shards(group):
    """What is said of shards that are not this rank's, and of options that need a group."""
    student, _, weight, _, _, _ = tensors(torch.float32)
    heads = (
        Head(weight[:366], group=group, shards=(300, 432)),
        Head(weight, shards=(366, 366)),
        Head(weight, sequence_parallel=True),
    )
    said = []
    for head in heads:
        try:
            linear_token_stats(student, head, stats=("entropy",))
        except GearKernelsError as problem:
            said.append(str(problem))
    return said


def unequal_shards(group):
    student, _, weight, _, _, targets = tensors(torch.float32)
    mine = weight[:366] if dist.get_rank() == 0 else weight[366:-1]
    try:
        linear_token_stats(student, Head(mine, group=group), targets, stats=("logprobs",))
    except GearKernelsError as problem:
        return str(problem)


def lone_refusal():
    """Rank 0 alone raises on its arguments: what each rank reads. The other waits until the group's timeout, here 5 seconds."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    student, _, weight, _, _, targets = tensors(torch.float32)
    mine = weight[dist.get_rank() * 366 :][:366]
    try:
        linear_token_stats(student, Head(mine, group=group), targets + 1000 * (dist.get_rank() == 0), stats=("logprobs",))
        found = "no error"
    except (GearKernelsError, RuntimeError) as problem:
        found = f"{type(problem).__name__}: {problem}"
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    return everyone


def compiled(group):
    student, _, weight, _, _, targets = tensors(torch.float32)
    part = weight[dist.get_rank() * 366 : (dist.get_rank() + 1) * 366]

    def loss(h):
        return linear_token_stats(h, Head(part, group=group), targets, stats=("logprobs", "entropy")).logprobs * 2

    return torch.equal(torch.compile(loss, fullgraph=True, backend="aot_eager")(student), loss(student))


def main(argv):
    (path,) = argv
    faulthandler.dump_traceback_later(800, exit=True)  # a hang prints nothing by itself; the tests import this file, so not above
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    results = {}
    for name, (options, dtype, backend) in CASES.items():
        with gear_kernels.backend(backend):
            results[name] = compare(options, dtype, group)
    results["mesh"] = compare({}, torch.float32, init_device_mesh("cpu", (2,)))
    results["collectives"] = collectives(group)
    results["unequal"] = unequal_shards(group)
    results["compiled"] = compiled(group)
    results["few rows"] = few_rows_of_a_real_vocabulary(group)
    results["whole head"] = whole_head_and_sharded_rows()
    results["refused"] = refused_shards(group)
    results["lone refusal"] = lone_refusal()
    if dist.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()
