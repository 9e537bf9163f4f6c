"""torch.library operators: what a compiled graph sees of the package, each beside its fake twin and its autograd formula.

gear_kernels::token_stats, linear_token_stats and their backwards are opaque to torch.compile, which may still fuse what stands
around them. Checks that read values (targets in range) run inside, where values exist. Calling through torch.library costs
tens of microseconds of CPU time a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import parallel, tiling
from .backends import BACKENDS, TileTask, on_device, wide
from .errors import bad_input
from .reference.stats import BY_NAME, STAT_NAMES, STATE_NAMES, needs_teacher


class Numbers(NamedTuple):
    """The constants of a `linear_token_stats` call, as floats because a schema has no other record; 0 stands for None."""

    ignore_index: float
    jsd_beta: float
    workspace_bytes: float
    softcap: float
    scale: float
    valid_vocab: float  # of the whole vocabulary, also where it is sharded
    teacher_softcap: float
    teacher_scale: float


def check_values(targets: Tensor | None, inv_temperature: Tensor, columns: int, ignore_index: int, sharded: bool = False) -> None:
    """Raise on targets outside the vocabulary and temperatures not above 0: on the CPU, where looking waits for nothing."""
    if targets is not None and not tiling.on_gpu(targets.device):
        wrong = targets[((targets < 0) | (targets >= columns)) & (targets != ignore_index)]
        if wrong.numel():
            given = f"targets holds {wrong[0].item()} ({wrong.numel()} out of range)"
            mend = "check the tokenizer, or mask them" + ("" if sharded else "; a vocabulary shard needs Head(group=...)")
            raise bad_input(given, f"0 to {columns - 1}, or ignore_index {ignore_index}", mend)
    if not tiling.on_gpu(inv_temperature.device) and not bool((inv_temperature > 0).all() & inv_temperature.isfinite().all()):
        raise bad_input("temperature holds a value that is not above 0 and finite", "temperatures above 0", "clamp it")


def _used_teacher(teacher: Tensor | None, stats: Sequence[str]) -> Tensor | None:
    return teacher if needs_teacher(tuple(stats)) else None


def _through(stats: Sequence[str]) -> tuple[str, ...]:
    """The statistics that a gradient can come through: the backward computes these terms and no others."""
    return tuple(name for name in stats if BY_NAME[name].gradient)


def _tables(student: Tensor) -> tuple[Tensor, Tensor]:
    n, dtype = student.shape[0], wide(student.dtype)
    return student.new_empty((len(STAT_NAMES), n), dtype=dtype), student.new_empty((n, len(STATE_NAMES)), dtype=dtype)


# --- given logits -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "gear_kernels::token_stats",
    mutates_args=(),
    schema="(Tensor student, Tensor? teacher, Tensor? targets, Tensor inv_temperature, int ignore_index, str[] stats, "
    "float jsd_beta, str backend) -> (Tensor, Tensor)",
)
def token_stats(student, teacher, targets, inv_temperature, ignore_index, stats, jsd_beta, backend):
    """Logits [N, V] -> values [7, N] in the order of STAT_NAMES (those not asked for may hold anything), state [N, 9]."""
    check_values(targets, inv_temperature, student.shape[1], ignore_index)
    with on_device(student.device):
        rows = tiling.rows_of(targets, inv_temperature, ignore_index, student.shape[1])
        return tiling.logits_forward(student, _used_teacher(teacher, stats), TileTask(rows, tuple(stats), jsd_beta), backend)


@token_stats.register_fake
def _(student, teacher, targets, inv_temperature, ignore_index, stats, jsd_beta, backend):
    return _tables(student)


@torch.library.custom_op(
    "gear_kernels::token_stats_backward",
    mutates_args=(),
    schema="(Tensor student, Tensor? teacher, Tensor? targets, Tensor inv_temperature, Tensor state, Tensor grads, "
    "int ignore_index, str[] stats, float jsd_beta, str backend) -> Tensor",
)
def token_stats_backward(student, teacher, targets, inv_temperature, state, grads, ignore_index, stats, jsd_beta, backend):
    """grads [7, N] -> gradient of the student's logits, rounded once to their dtype."""
    through, dz = _through(stats), torch.empty(student.shape, dtype=student.dtype, device=student.device)
    teacher = _used_teacher(teacher, through)
    pair = (tiling.Tile(student), None if teacher is None else tiling.Tile(teacher))
    with on_device(student.device):
        task = TileTask(tiling.rows_of(targets, inv_temperature, ignore_index, student.shape[1]), through, jsd_beta)
        BACKENDS[backend].gradient(*pair, task, state, grads.T.contiguous(), dz)
    return dz


@token_stats_backward.register_fake
def _(student, teacher, targets, inv_temperature, state, grads, ignore_index, stats, jsd_beta, backend):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _save_logits(ctx, inputs, output):
    student, teacher, targets, inv_temperature, ctx.ignore_index, ctx.stats, ctx.beta, ctx.backend = inputs
    ctx.save_for_backward(student, teacher, targets, inv_temperature, output[1])


def _logits_gradient(ctx, grads, _):
    return token_stats_backward(*ctx.saved_tensors, grads, ctx.ignore_index, ctx.stats, ctx.beta, ctx.backend), *[None] * 7


token_stats.register_autograd(_logits_gradient, setup_context=_save_logits)


# --- hidden states ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "gear_kernels::linear_token_stats",
    mutates_args=(),
    schema="(Tensor student, Tensor weight, Tensor? bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? targets, Tensor inv_temperature, str[] stats, float[] numbers, str[] where) -> (Tensor, Tensor)",
)
def linear_token_stats(
    student, weight, bias, teacher, teacher_weight, teacher_bias, targets, inv_temperature, stats, numbers, where
):
    """Hidden states [N, D] -> values [7, N], state [N, 9]. teacher_weight None: the head is shared. where: back end, group."""
    numbers, sharded = Numbers(*numbers), bool(where[1])
    check_values(targets, inv_temperature, _vocabulary(weight, numbers, where[1]), int(numbers.ignore_index), sharded)
    saved = (student, weight, bias, _used_teacher(teacher, stats), teacher_weight, teacher_bias, targets, inv_temperature)
    with (
        on_device(student.device),
        torch.autocast(student.device.type, enabled=False),
    ):  # it would round the tiles' GEMMs to bfloat16
        return _linear(saved, tuple(stats), numbers, where).forward()


@linear_token_stats.register_fake
def _(student, weight, bias, teacher, teacher_weight, teacher_bias, targets, inv_temperature, stats, numbers, where):
    return _tables(student)


@torch.library.custom_op(
    "gear_kernels::linear_token_stats_backward",
    mutates_args=(),
    schema="(Tensor?[] saved, Tensor state, Tensor grads, str[] stats, float[] numbers, str[] where, bool[] needed) -> Tensor[]",
)
def linear_token_stats_backward(saved, state, grads, stats, numbers, where, needed):
    """The eight tensors of the forward and grads [7, N] -> gradients of student, weight and bias; size 0 where not needed."""
    through = _through(stats)
    if not needs_teacher(through):
        saved = [*saved[:3], None, None, None, *saved[6:]]
    with on_device(state.device), torch.autocast(state.device.type, enabled=False):
        out = _linear(saved, through, Numbers(*numbers), where).backward(state, grads.T.contiguous(), needed)
    return [state.new_empty(0) if gradient is None else gradient for gradient in out]


@linear_token_stats_backward.register_fake
def _(saved, state, grads, stats, numbers, where, needed):
    return [torch.empty_like(t) if need else state.new_empty(0) for t, need in zip(saved[:3], needed, strict=True)]


def _vocabulary(weight: Tensor, numbers: Numbers, group: str) -> int:
    """Ids that a target may have."""
    return int(numbers.valid_vocab) or weight.shape[0] * parallel.ranks(group)


def _linear(saved: Sequence[Tensor | None], stats: tuple[str, ...], numbers: Numbers, where: Sequence[str]) -> tiling.Linear:
    student, weight, bias, teacher, teacher_weight, teacher_bias, targets, inv_temperature = saved
    backend, group = where
    first = weight.shape[0] * parallel.resolve(group).rank() if group else 0
    columns = min(max(_vocabulary(weight, numbers, group) - first, 0), weight.shape[0])
    head = tiling.HeadPart(weight, bias, numbers.softcap or None, numbers.scale or None, columns)
    own = head
    if teacher_weight is not None:
        options = (numbers.teacher_softcap or None, numbers.teacher_scale or None)
        own = tiling.HeadPart(teacher_weight, teacher_bias, *options, columns)
    rows = tiling.rows_of(targets, inv_temperature, int(numbers.ignore_index), _vocabulary(weight, numbers, group))
    task = TileTask(rows, stats, numbers.jsd_beta, first, {})
    return tiling.Linear(student, teacher, head, own, task, backend, group, int(numbers.workspace_bytes))


def _save_linear(ctx, inputs, output):
    # Parameters are saved as themselves: under ZeRO-3 the head module's hooks have gathered them again by the backward.
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.stats, ctx.numbers, ctx.where = inputs[8:]


def _linear_gradient(ctx, grads, _):
    *saved, state = ctx.saved_tensors
    for name, tensor in (("head.weight", saved[1]), ("head.bias", saved[2]), ("teacher_head.weight", saved[4])):
        if tensor is not None:
            check_gathered(f"{name} in backward", tensor)
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    out = linear_token_stats_backward(saved, state, grads, ctx.stats, ctx.numbers, ctx.where, needed)
    return *[g if need else None for g, need in zip(out, needed, strict=True)], *[None] * 8


linear_token_stats.register_autograd(_linear_gradient, setup_context=_save_linear)


def check_gathered(name: str, weight: Tensor) -> None:
    """Raise on a parameter that ZeRO-3 holds partitioned (size 0 on this rank)."""
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise bad_input(
            f"{name} has shape {tuple(weight.shape)}: ZeRO-3 holds it partitioned",
            "the gathered weight, in forward and in backward",
            "call the head as a module: FusedHead.adopt(lm_head), then lm_head(hidden, targets, ...) inside the engine's forward",
        )
    if weight.numel() == 0:
        raise bad_input(f"{name} is empty: shape {tuple(weight.shape)}", "a whole, gathered weight", "gather the shards first")
