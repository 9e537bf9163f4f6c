"""torch.library operators: what a compiled graph sees of the package, each beside its fake twin and its autograd formula.

gear_kernels::token_stats, linear_token_stats and their backwards are opaque to torch.compile, which may still fuse what stands
around them. A backward takes its forward's arguments, then what has come since. Checks that read values (targets in range) run
inside, where values exist. Calling through torch.library costs tens of microseconds of CPU time a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import parallel, sparse, tiling
from .backends import BACKENDS, TileTask, on_device, wide
from .errors import bad_input
from .reference.stats import BY_NAME, STAT_NAMES, STATE_NAMES, needs_teacher

Body = TypeVar("Body", bound=tiling.Linear)


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
    shards: Sequence[int] = ()  # columns of every rank's shard of the vocabulary; () for equal ones
    rows_sharded: bool = False  # each rank of the group has rows of its own, as many as the others
    keeps: str = ""  # what is held from forward to backward: "logits", "difference" or nothing, see `to_keep`

    @property
    def vocabulary(self) -> int:
        """The number of ids that a target may have."""
        return self.valid_vocab or sum(self.shards) or self.weight.shape[0] * parallel.ranks(self.group)

    @property
    def first(self) -> int:
        """This rank's first column in the vocabulary."""
        rank = parallel.resolve(self.group).rank() if self.group else 0
        return sum(self.shards[:rank]) if self.shards else self.weight.shape[0] * rank

    @property
    def columns(self) -> int:
        """The columns that this rank computes: those of its shard that are no padding."""
        return min(max(self.vocabulary - self.first, 0), self.weight.shape[0])

    def kept_shape(self) -> tuple[int, int, int]:
        """The shape of what is held from forward to backward."""
        heads = {"": 0, "difference": 1, "logits": 2 if needs_teacher(_through(self.stats)) else 1}[self.keeps]
        return (heads, self.student.shape[0], self.columns) if heads else (0, 0, 0)

    def kept_dtype(self) -> torch.dtype:
        """The dtype of what is held."""
        return torch.bfloat16 if self.keeps == "difference" else wide(self.student.dtype)

    def through(self) -> LinearCall:
        """The call as its backward needs it: the statistics that a gradient can come through, the teacher if they read it."""
        stats = _through(self.stats)
        own = {} if needs_teacher(stats) else {"teacher": None, "teacher_weight": None, "teacher_bias": None}
        return self._replace(stats=stats, **own)


class Plan(NamedTuple):
    """A call's memory and products: what is held from forward to backward, in bytes, and the products of [N, D] with the head
    that are made: in the forward pass, anew in the backward pass, and for the gradients.
    """

    keeps: str
    kept_bytes: int
    forward: int
    recomputed: int
    gradients: int


def plan(call: LinearCall) -> Plan:
    """Products and memory of a call with an exact backward, in whole products of all rows with the whole head (its shard).

    jsd takes a second sweep. Of the backward, that of hidden states and of the weight, where they need a gradient.
    """
    through = _through(call.stats)
    forward = (2 if needs_teacher(call.stats) else 1) * (2 if "jsd" in call.stats and call.keeps != "logits" else 1)
    gradients = sum(x.requires_grad for x in (call.student, call.weight)) if through else 0
    saved = {"": 0, "difference": 1, "logits": 2}[call.keeps]
    recomputed = max(0, (2 if needs_teacher(through) else 1) - saved) if gradients else 0
    heads, rows, columns = call.kept_shape()
    return Plan(call.keeps, heads * rows * columns * call.kept_dtype().itemsize, forward, recomputed, gradients)


def to_keep(call: LinearCall) -> str:
    """The logits that this call may hold from forward to backward: the first of these that fits what workspace_bytes has beyond
    the tiles' default.

    "logits": those of all heads that a gradient reads, in the dtype of the statistics; the backward makes none of them anew.
    "difference": teacher minus student in bfloat16, for bfloat16 inputs and no divergence but reverse_kl, in which it is linear;
    the backward makes the student's alone. It moves each term of the gradient by 2^-9 of itself on average, as rounding dz does.
    """
    room, through = call.workspace_bytes - tiling.limits(call.student.device).workspace, _through(call.stats)
    if room <= 0 or not through or call.tolerance or call.rows_sharded:
        return ""
    linear = needs_teacher(through) and not {"forward_kl", "jsd"} & set(through) and call.student.dtype == torch.bfloat16
    for keeps in ("logits", *["difference"] * linear):
        own = call._replace(keeps=keeps)
        heads, rows, columns = own.kept_shape()
        if heads * rows * columns * own.kept_dtype().itemsize <= room:
            return keeps
    return ""


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


def tables(student: Tensor) -> tuple[Tensor, Tensor]:
    """Empty values [10, N] and state [N, 9] for rows like these."""
    n, dtype = student.shape[0], wide(student.dtype)
    return student.new_empty((len(STAT_NAMES), n), dtype=dtype), student.new_empty((n, len(STATE_NAMES)), dtype=dtype)


# --- given logits -----------------------------------------------------------------------------------------------------------

_LOGITS = (
    "Tensor student, Tensor? teacher, Tensor? targets, Tensor inv_temperature, int ignore_index, str[] stats, "
    "float jsd_beta, str backend"
)


@torch.library.custom_op("gear_kernels::token_stats", mutates_args=(), schema=f"({_LOGITS}) -> (Tensor, Tensor)")
def token_stats(*arguments):
    """Statistics of logits [N, V]: values [10, N] as STAT_NAMES (those not asked for may hold anything), state [N, 9]."""
    call = LogitsCall(*arguments)
    columns = call.student.shape[1]
    check_values(call.targets, call.inv_temperature, columns, call.ignore_index)
    with on_device(call.student.device):
        rows = tiling.rows_of(call.targets, call.inv_temperature, call.ignore_index, columns)
        task = TileTask(rows, tuple(call.stats), call.jsd_beta)
        return tiling.logits_forward(call.student, _used_teacher(call.teacher, call.stats), task, call.backend)


@token_stats.register_fake
def _(student, *_):
    return tables(student)


@torch.library.custom_op(
    "gear_kernels::token_stats_backward", mutates_args=(), schema=f"({_LOGITS}, Tensor state, Tensor grads) -> Tensor"
)
def token_stats_backward(*arguments):
    """Gradient of the student's logits from grads [10, N], rounded once to their dtype."""
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
    "float? softcap, float? scale, int? valid_vocab, float? teacher_softcap, float? teacher_scale, str group, float tolerance, "
    "int[] shards, bool rows_sharded, str keeps"
)
_TENSORS = 8  # of a LinearCall


@torch.library.custom_op(
    "gear_kernels::linear_token_stats", mutates_args=(), schema=f"({_LINEAR}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def linear_token_stats(*arguments):
    """Statistics of hidden states [N, D]: values [10, N], state [N, 9], the sparse backward's notes ([0, 0] for an exact one),
    and the logits that are held for the backward ([0, 0, 0] for none).
    """
    call = LinearCall(*arguments)
    call = call._replace(teacher=_used_teacher(call.teacher, call.stats))
    check_values(call.targets, call.inv_temperature, call.vocabulary, call.ignore_index, sharded=bool(call.group))
    # autocast would round the tiles' GEMMs to bfloat16
    with on_device(call.student.device), torch.autocast(call.student.device.type, enabled=False):
        kept = call.student.new_empty(call.kept_shape(), dtype=call.kept_dtype())
        if call.tolerance:
            body = tiled(call)
            notes = sparse.Notes(body)
            values, state = body.forward(notes.add)
            return values, state, notes.finished(state), kept
        if call.rows_sharded:
            values, state = [tiled(part).forward() for part in _rows_in_turn(call)][parallel.resolve(call.group).rank()]
        else:
            values, state = tiled(call, tiling.Kept(call.keeps, kept)).forward()
        return values, state, call.student.new_empty((0, 0), dtype=state.dtype), kept


@linear_token_stats.register_fake
def _(*arguments):
    call = LinearCall(*arguments)
    noted = sparse.shape(call.student.shape[0], call.columns) if call.tolerance else (0, 0)
    kept = call.student.new_empty(call.kept_shape(), dtype=call.kept_dtype())
    return *tables(call.student), call.student.new_empty(noted, dtype=wide(call.student.dtype)), kept


def _rows_in_turn(call: LinearCall) -> Iterator[LinearCall]:
    """The call of each rank's rows in turn, sent to all ranks."""
    for rank in range(parallel.ranks(call.group)):
        given = (call.student, call.teacher, call.targets, call.inv_temperature)
        rows = [None if x is None else parallel.sent(x, rank, call.group) for x in given]
        yield call._replace(**dict(zip(("student", "teacher", "targets", "inv_temperature"), rows, strict=True)))


@torch.library.custom_op(
    "gear_kernels::linear_token_stats_backward",
    mutates_args=(),
    schema=f"({_LINEAR}, Tensor state, Tensor noted, Tensor kept, Tensor grads, bool[] needed) -> Tensor[]",
)
def linear_token_stats_backward(*arguments):
    """Gradients of student, weight and bias from grads [10, N]; size 0 where not needed."""
    *given, state, noted, kept, grads, needed = arguments
    call, table = LinearCall(*given).through(), grads.T.contiguous()
    with on_device(state.device), torch.autocast(state.device.type, enabled=False):
        if call.tolerance:
            out = sparse.SparseBackward(tiled(call), state, table, needed, noted, call.tolerance).run()
        elif call.rows_sharded:
            out = _backward_in_turn(call, state, table, needed)
        else:
            out = tiled(call, tiling.Kept(call.keeps, kept, full=True)).backward(state, table, needed)
    return [state.new_empty(0) if gradient is None else gradient for gradient in out]


@linear_token_stats_backward.register_fake
def _(student, weight, bias, *rest):
    *_, state, _, _, _, needed = rest
    return [torch.empty_like(t) if need else state.new_empty(0) for t, need in zip((student, weight, bias), needed, strict=True)]


def _backward_in_turn(call: LinearCall, state: Tensor, table: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """The backward where each rank has rows of its own: the hidden states' gradient is of them, the head's of all ranks' rows,
    summed in float32 and rounded once.
    """
    own, total = None, [None, None]
    for rank, part in enumerate(_rows_in_turn(call)):
        own_state, own_table = (parallel.sent(x, rank, call.group) for x in (state, table))
        body = tiled(part)
        body.unrounded = True
        hidden, *head = body.backward(own_state, own_table, needed)
        own = hidden if rank == parallel.resolve(call.group).rank() else own
        total = [None if g is None else g.to(state.dtype) if t is None else t.add_(g) for t, g in zip(total, head, strict=True)]
    like = (call.weight, call.bias)
    return [own, *[None if g is None or t is None else g.to(t.dtype) for g, t in zip(total, like, strict=True)]]


def tiled(call: LinearCall, kept: tiling.Kept | None = None, of: type[Body] = tiling.Linear) -> Body:
    """The call as tiling.py takes it: both heads as this rank has them, rows as the back ends read them, what tiles may use of
    the workspace.
    """
    first, columns = call.first, call.columns
    head = tiling.HeadPart(call.weight, call.bias, call.softcap, call.scale, columns)
    own = head
    if call.teacher_weight is not None:
        own = tiling.HeadPart(call.teacher_weight, call.teacher_bias, call.teacher_softcap, call.teacher_scale, columns)
    rows = tiling.rows_of(call.targets, call.inv_temperature, call.ignore_index, call.vocabulary)
    task = TileTask(rows, tuple(call.stats), call.jsd_beta, first, {}, multiplied=True)
    kept = kept if kept is not None and kept.how else None
    workspace = call.workspace_bytes - (0 if kept is None else kept.memory.nbytes)
    return of(call.student, call.teacher, head, own, task, call.backend, call.group, workspace, call.shards, kept)


def _save_linear(ctx, inputs, output):
    # Parameters are saved as themselves: under ZeRO-3 the head module's hooks have gathered them again by the backward.
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.constants = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)  # nothing differentiates what is held: zeros of its size would stand for that


def _linear_gradient(ctx, grads, *_):
    *tensors, state, noted, kept = ctx.saved_tensors
    if grads is None:  # of no output
        return (None,) * len(LinearCall._fields)
    call = LinearCall(*tensors, *ctx.constants)
    weights = {"head.weight": call.weight, "head.bias": call.bias, "teacher_head.weight": call.teacher_weight}
    for name, tensor in weights.items():
        if tensor is not None:
            check_gathered(f"{name} in backward", tensor)
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    out = linear_token_stats_backward(*call, state, noted, kept, grads, needed)
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
