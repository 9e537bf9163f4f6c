"""torch.library operators: what a compiled graph sees of the package, each beside its fake twin and its autograd formula.

gear_kernels::token_stats, linear_token_stats and their backwards are opaque to torch.compile, which may still fuse what stands
around them. A backward takes its forward's arguments, then what has come since. Checks that read values (targets in range) run
inside, where values exist. Calling through torch.library costs tens of microseconds of CPU time a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import parallel, sparse, tiling
from .backends import BACKENDS, TileTask, on_device, wide
from .errors import bad_input
from .reference.stats import BY_NAME, STAT_NAMES, STATE_NAMES, needs_teacher


class LogitsCall(NamedTuple):
    """A call of the operator token_stats, in the order of its schema: rows as tensors, then its constants."""

    student: Tensor  # [N, V]
    teacher: Tensor | None  # [N, V]
    targets: Tensor | None  # [N]
    inv_temperature: Tensor  # [N]
    ignore_index: int
    stats: Sequence[str]
    jsd_beta: float
    backend: str


class LinearCall(NamedTuple):
    """A call of the operator linear_token_stats, in the order of its schema: eight tensors, then its constants."""

    student: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    teacher: Tensor | None  # [N, D]
    teacher_weight: Tensor | None  # None: the head is shared
    teacher_bias: Tensor | None
    targets: Tensor | None  # [N]
    inv_temperature: Tensor  # [N]
    stats: Sequence[str]
    backend: str
    workspace_bytes: int
    ignore_index: int = -100
    jsd_beta: float = 0.5
    softcap: float | None = None
    scale: float | None = None
    valid_vocab: int | None = None  # of the whole vocabulary, also where it is sharded
    teacher_softcap: float | None = None
    teacher_scale: float | None = None
    group: str = ""  # of the ranks that share the vocabulary; "" for none
    tolerance: float = 0.0  # of the sparse backward; 0: the backward is exact

    @property
    def vocabulary(self) -> int:
        """The number of ids that a target may have."""
        return self.valid_vocab or self.weight.shape[0] * parallel.ranks(self.group)

    def through(self) -> LinearCall:
        """The call as its backward needs it: the statistics that a gradient can come through, the teacher if they read it."""
        stats = _through(self.stats)
        own = {} if needs_teacher(stats) else {"teacher": None, "teacher_weight": None, "teacher_bias": None}
        return self._replace(stats=stats, **own)


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

_LOGITS = (
    "Tensor student, Tensor? teacher, Tensor? targets, Tensor inv_temperature, int ignore_index, str[] stats, "
    "float jsd_beta, str backend"
)


@torch.library.custom_op("gear_kernels::token_stats", mutates_args=(), schema=f"({_LOGITS}) -> (Tensor, Tensor)")
def token_stats(*arguments):
    """Statistics of logits [N, V]: values [7, N] as STAT_NAMES (those not asked for may hold anything), state [N, 9]."""
    call = LogitsCall(*arguments)
    columns = call.student.shape[1]
    check_values(call.targets, call.inv_temperature, columns, call.ignore_index)
    with on_device(call.student.device):
        rows = tiling.rows_of(call.targets, call.inv_temperature, call.ignore_index, columns)
        task = TileTask(rows, tuple(call.stats), call.jsd_beta)
        return tiling.logits_forward(call.student, _used_teacher(call.teacher, call.stats), task, call.backend)


@token_stats.register_fake
def _(student, *_):
    return _tables(student)


@torch.library.custom_op(
    "gear_kernels::token_stats_backward", mutates_args=(), schema=f"({_LOGITS}, Tensor state, Tensor grads) -> Tensor"
)
def token_stats_backward(*arguments):
    """Gradient of the student's logits from grads [7, N], rounded once to their dtype."""
    *given, state, grads = arguments
    call = LogitsCall(*given)
    through, dz = _through(call.stats), _like(call.student)
    teacher = _used_teacher(call.teacher, through)
    pair = (tiling.Tile(call.student), None if teacher is None else tiling.Tile(teacher))
    with on_device(call.student.device):
        rows = tiling.rows_of(call.targets, call.inv_temperature, call.ignore_index, call.student.shape[1])
        task = TileTask(rows, through, call.jsd_beta)
        BACKENDS[call.backend].gradient(*pair, task, state, grads.T.contiguous(), dz)
    return dz


@token_stats_backward.register_fake
def _(student, *_):
    return _like(student)


def _like(student: Tensor) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _save_logits(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.constants = inputs[4:]


def _logits_gradient(ctx, grads, _):
    *rows, state = ctx.saved_tensors
    call = LogitsCall(*rows, *ctx.constants)
    return token_stats_backward(*call, state, grads), *[None] * (len(call) - 1)


token_stats.register_autograd(_logits_gradient, setup_context=_save_logits)


# --- hidden states ----------------------------------------------------------------------------------------------------------

_LINEAR = (
    "Tensor student, Tensor weight, Tensor? bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? targets, Tensor inv_temperature, str[] stats, str backend, int workspace_bytes, int ignore_index, float jsd_beta, "
    "float? softcap, float? scale, int? valid_vocab, float? teacher_softcap, float? teacher_scale, str group, float tolerance"
)
_TENSORS = 8  # of a LinearCall


@torch.library.custom_op("gear_kernels::linear_token_stats", mutates_args=(), schema=f"({_LINEAR}) -> (Tensor, Tensor, Tensor)")
def linear_token_stats(*arguments):
    """Statistics of hidden states [N, D]: values [7, N], state [N, 9], the sparse backward's notes ([0, 0] for an exact one)."""
    call = LinearCall(*arguments)
    call = call._replace(teacher=_used_teacher(call.teacher, call.stats))
    check_values(call.targets, call.inv_temperature, call.vocabulary, call.ignore_index, sharded=bool(call.group))
    # autocast would round the tiles' GEMMs to bfloat16
    with on_device(call.student.device), torch.autocast(call.student.device.type, enabled=False):
        body = tiled(call)
        if not call.tolerance:
            return *body.forward(), call.student.new_empty((0, 0), dtype=body.wide)
        notes = sparse.Notes(body)
        values, state = body.forward(notes.add)
        return values, state, notes.finished(state)


@linear_token_stats.register_fake
def _(*arguments):
    call = LinearCall(*arguments)
    noted = sparse.shape(call.student.shape[0], call.valid_vocab or call.weight.shape[0]) if call.tolerance else (0, 0)
    return *_tables(call.student), call.student.new_empty(noted, dtype=wide(call.student.dtype))


@torch.library.custom_op(
    "gear_kernels::linear_token_stats_backward",
    mutates_args=(),
    schema=f"({_LINEAR}, Tensor state, Tensor noted, Tensor grads, bool[] needed) -> Tensor[]",
)
def linear_token_stats_backward(*arguments):
    """Gradients of student, weight and bias from grads [7, N]; size 0 where not needed."""
    *given, state, noted, grads, needed = arguments
    call, table = LinearCall(*given).through(), grads.T.contiguous()
    with on_device(state.device), torch.autocast(state.device.type, enabled=False):
        if call.tolerance:
            out = sparse.SparseBackward(tiled(call), state, table, needed, noted, call.tolerance).run()
        else:
            out = tiled(call).backward(state, table, needed)
    return [state.new_empty(0) if gradient is None else gradient for gradient in out]


@linear_token_stats_backward.register_fake
def _(student, weight, bias, *rest):
    *_, state, _, _, needed = rest
    return [torch.empty_like(t) if need else state.new_empty(0) for t, need in zip((student, weight, bias), needed, strict=True)]


def tiled(call: LinearCall) -> tiling.Linear:
    """The call as tiling.py takes it: both heads as this rank has them, rows as the back ends read them."""
    first = call.weight.shape[0] * parallel.resolve(call.group).rank() if call.group else 0
    columns = min(max(call.vocabulary - first, 0), call.weight.shape[0])
    head = tiling.HeadPart(call.weight, call.bias, call.softcap, call.scale, columns)
    own = head
    if call.teacher_weight is not None:
        own = tiling.HeadPart(call.teacher_weight, call.teacher_bias, call.teacher_softcap, call.teacher_scale, columns)
    rows = tiling.rows_of(call.targets, call.inv_temperature, call.ignore_index, call.vocabulary)
    task = TileTask(rows, tuple(call.stats), call.jsd_beta, first, {})
    return tiling.Linear(call.student, call.teacher, head, own, task, call.backend, call.group, call.workspace_bytes)


def _save_linear(ctx, inputs, output):
    # Parameters are saved as themselves: under ZeRO-3 the head module's hooks have gathered them again by the backward.
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.constants = inputs[_TENSORS:]


def _linear_gradient(ctx, grads, *_):
    *tensors, state, noted = ctx.saved_tensors
    call = LinearCall(*tensors, *ctx.constants)
    weights = {"head.weight": call.weight, "head.bias": call.bias, "teacher_head.weight": call.teacher_weight}
    for name, tensor in weights.items():
        if tensor is not None:
            check_gathered(f"{name} in backward", tensor)
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    out = linear_token_stats_backward(*call, state, noted, grads, needed)
    return *[g if need else None for g, need in zip(out, needed, strict=True)], *[None] * (len(call) - 3)


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
