"""token_stats and linear_token_stats: per-token log-probs, entropy and vocabulary-wide KL, differentiable in the student.

Argument checks, autograd and the tiling of hidden states live here; what happens inside a tile of logits is a back end's
(ops.py), what it means is reference.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from . import ops, reference
from .errors import bad_input

DEFAULT_STATS = ("logprobs", "entropy", "reverse_kl")
DEFAULT_WORKSPACE = 256 << 20  # bytes of logits tiles; at V = 151936 about 220 rows of student and teacher in float32
_TEACHER_STATS = ("teacher_logprobs", "teacher_entropy", "reverse_kl", "forward_kl")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenStats(NamedTuple):
    """Per-token statistics in nats, each of the rows' shape; float32 (float64 for float64 inputs); None where not asked for."""

    logprobs: torch.Tensor | None = None  # log-prob of the target token
    teacher_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None  # of the full vocabulary
    teacher_entropy: torch.Tensor | None = None
    reverse_kl: torch.Tensor | None = None  # KL(student || teacher)
    forward_kl: torch.Tensor | None = None  # KL(teacher || student)


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap * tanh((h W' + bias) * scale / softcap); then the op divides by the temperature.

    weight: [V, D].  bias: [V] or None.  softcap: Gemma's final_logit_softcapping.  scale: a factor on the logits (Cohere's
    logit_scale; Granite's logits_scaling is a divisor: pass its inverse).  valid_vocab: columns from here on are padding, they
    count as -inf and are never computed.  group: the process group that shares the vocabulary (not implemented yet).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float | None = None
    valid_vocab: int | None = None
    group: Any = None

    @property
    def columns(self) -> int:
        """Number of logits that are computed: valid_vocab, or V."""
        return self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab


def token_stats(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = DEFAULT_STATS,
) -> TokenStats:
    """Statistics of given logits [N, V] (or [..., V]), in one pass over each row.

    student_logits, teacher_logits: the same shape, float32, bfloat16, float16 or float64, any strides; dtypes may differ unless
    one is float64.  targets: integers [N]; needed for log-probs; a row whose target is `ignore_index` returns 0 and passes no
    gradient, whatever it holds.  temperature: divides both logits; a number or a tensor [N], above 0, not differentiated.
    stats: names of TokenStats fields; the KLs and teacher_* need teacher_logits.

    Sums are float32 in blocks and float64 between blocks in the compiled pass, float32 in the reference (float64 for float64
    inputs); the gradient is computed in float32 and rounded once to the logits' dtype. KL is never negative. -inf logits
    contribute zero and get no gradient; a finite student logit where the teacher's is -inf makes reverse_kl +inf (forward_kl
    the other way round), and a row's infinite output passes no gradient. NaN and +inf logits, and rows of nothing but -inf,
    give NaN in every output that reads them. The teacher never gets a gradient.

    Raises GearKernelsError on shapes, dtypes, devices, unknown or impossible stats, and on the CPU on targets out of range.

    >>> s = token_stats(torch.tensor([[0.0, 0.0]]), targets=torch.tensor([1]), stats=("logprobs", "entropy"))
    >>> [round(x.item(), 4) for x in (s.logprobs, s.entropy)]
    [-0.6931, 0.6931]
    """
    names = _checked_names(stats, targets, teacher_logits is not None, "teacher_logits")
    _check_float("student_logits", student_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise bad_input(f"student_logits has shape {tuple(student_logits.shape)}", "[..., V] with V > 0", "pass logits")
    if teacher_logits is not None:
        _check_float("teacher_logits", teacher_logits)
        _check_alike("teacher_logits", teacher_logits, "student_logits", student_logits, same_dtype=False)
    shape, columns = student_logits.shape[:-1], student_logits.shape[-1]
    rows = _rows(student_logits, shape, columns, targets, temperature, ignore_index)
    student = student_logits.reshape(-1, columns)
    teacher = None if teacher_logits is None else teacher_logits.detach().reshape(-1, columns)
    backend = ops.choose(student.device, student.dtype)
    if backend.name == "reference":
        options = {"inv_temperature": rows.inv_temperature, "ignore_index": ignore_index, "stats": names}
        out = reference.token_stats(student, teacher, rows.targets, **options)
        return _pack([out.get(name) for name in reference.STAT_NAMES], shape)
    return _pack(_LogitsStats.apply(student, teacher, rows, names, backend), shape)


def linear_token_stats(
    student_hidden: torch.Tensor,
    head: Head | torch.Tensor,
    targets: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    teacher_head: Head | torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = DEFAULT_STATS,
    workspace_bytes: int = DEFAULT_WORKSPACE,
) -> TokenStats:
    """Statistics of hidden states [N, D] (or [..., D]) under a head, without ever holding [N, V] logits.

    student_hidden, teacher_hidden: the same leading shape, the dtype of their head's weight.  head: a Head, or just its weight
    [V, D].  teacher_head: the teacher's own; None means that it shares `head`, and then both rows go through one GEMM.
    targets, temperature, ignore_index, stats: as in `token_stats`, as are all rules on -inf, NaN and ignored rows.
    workspace_bytes: bound on the logits tiles alive at a time (at least one row is always processed); besides them the
    backward holds the weight's gradient in float32.

    Logits are float32 whatever the inputs (float64 for float64), never rounded to bfloat16: that alone would bias KL by about
    1e-4 nats. On CUDA the backward's GEMMs read dz rounded to the inputs' dtype; elsewhere all of it is float32. Gradients of
    hidden states, weight and bias are summed in float32 and rounded once to their dtype. A weight that needs no gradient
    costs none. Tiles are recomputed in backward, so a ZeRO-3 partitioned weight must be gathered there too: use FusedHead.

    Raises GearKernelsError as `token_stats`, and on partitioned (size-0) or DTensor weights and on `Head.group`.
    """
    head = _checked_head("head", head)
    names = _checked_names(stats, targets, teacher_hidden is not None, "teacher_hidden")
    if workspace_bytes <= 0:
        raise bad_input(f"workspace_bytes is {workspace_bytes}", "a positive number of bytes", "leave it at its default")
    _check_hidden("student_hidden", student_hidden, head)
    shape = student_hidden.shape[:-1]
    own_teacher = _checked_teacher(student_hidden, teacher_hidden, head, teacher_head)
    rows = _rows(student_hidden, shape, head.columns, targets, temperature, ignore_index)
    backend = ops.choose(student_hidden.device, ops._wide(student_hidden.dtype))
    plan = _Plan(head, own_teacher, rows, names, backend, workspace_bytes)
    teacher = None if teacher_hidden is None else teacher_hidden.detach().flatten(0, -2)
    student = student_hidden.reshape(-1, student_hidden.shape[-1])
    return _pack(_LinearStats.apply(student, head.weight, head.bias, teacher, plan), shape)


# --- argument checks ---------------------------------------------------------------------------------------------------


def _checked_names(stats: Sequence[str], targets, has_teacher: bool, teacher_argument: str) -> tuple[str, ...]:
    if isinstance(stats, str):
        raise bad_input(f"stats is the string {stats!r}", "a sequence of names", f"write stats=({stats!r},)")
    names = tuple(dict.fromkeys(stats))
    for name in names:
        if name not in reference.STAT_NAMES:
            raise bad_input(f"stats names {name!r}", "names out of " + ", ".join(reference.STAT_NAMES), "use one of these")
        if name in _TEACHER_STATS and not has_teacher:
            raise bad_input(f"{name} was asked for without a teacher", teacher_argument, f"pass it, or leave {name} out of stats")
        if "logprobs" in name and targets is None:
            raise bad_input(f"{name} was asked for without targets", "targets", f"pass them, or leave {name} out of stats")
    return names


def _check_plain(name: str, tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise bad_input(f"{name} is a {type(tensor).__name__}", "a torch.Tensor", "convert it")
    if any(base.__name__ == "DTensor" for base in type(tensor).__mro__):
        raise bad_input(
            f"{name} is a DTensor", "a plain tensor", "pass tensor.full_tensor() or, for row shards, tensor.to_local()"
        )


def _check_float(name: str, tensor) -> None:
    _check_plain(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise bad_input(f"{name} has dtype {tensor.dtype}", "float32, bfloat16, float16 or float64", "cast it")


def _check_alike(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, same_dtype: bool) -> None:
    if tensor.shape != other.shape:
        raise bad_input(
            f"{name} has shape {tuple(tensor.shape)}", f"that of {other_name}, {tuple(other.shape)}", "align them row by row"
        )
    if tensor.device != other.device:
        raise bad_input(f"{name} is on {tensor.device}", f"that of {other_name}, {other.device}", "move one of them")
    if tensor.dtype != other.dtype and (same_dtype or torch.float64 in (tensor.dtype, other.dtype)):
        raise bad_input(f"{name} has dtype {tensor.dtype}", f"that of {other_name}, {other.dtype}", "cast one of them")


def _checked_head(name: str, head: Head | torch.Tensor) -> Head:
    head = head if isinstance(head, Head) else Head(head)
    if head.group is not None:
        raise bad_input(f"{name}.group is set", "None: vocabulary-parallel heads are not implemented yet", "gather the head")
    _check_float(f"{name}.weight", head.weight)
    check_gathered(f"{name}.weight", head.weight)
    if head.weight.dim() != 2 or 0 in head.weight.shape:
        raise bad_input(f"{name}.weight has shape {tuple(head.weight.shape)}", "[V, D]", "pass the head's weight matrix")
    if head.bias is not None:
        _check_bias(name, head)
    if head.valid_vocab is not None and not 0 < head.valid_vocab <= head.weight.shape[0]:
        raise bad_input(f"{name}.valid_vocab is {head.valid_vocab}", f"1 to V = {head.weight.shape[0]}", "count the real tokens")
    for option in ("softcap", "scale"):
        value = getattr(head, option)
        if value is not None and not (math.isfinite(value) and value != 0 and (option == "scale" or value > 0)):
            raise bad_input(f"{name}.{option} is {value}", "a finite number, softcap above 0, scale not 0", "use None for none")
    return head


def _check_bias(name: str, head: Head) -> None:
    _check_plain(f"{name}.bias", head.bias)
    check_gathered(f"{name}.bias", head.bias)
    wanted = (head.weight.shape[0],)
    if tuple(head.bias.shape) != wanted or head.bias.dtype != head.weight.dtype or head.bias.device != head.weight.device:
        given = f"{name}.bias is {head.bias.dtype} {tuple(head.bias.shape)} on {head.bias.device}"
        raise bad_input(given, f"{head.weight.dtype} {wanted} on {head.weight.device}", "give the bias of the same layer")


def check_gathered(name: str, weight: torch.Tensor) -> None:
    """Raise on a parameter that ZeRO-3 holds partitioned (size 0 on this rank)."""
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise bad_input(
            f"{name} has shape {tuple(weight.shape)}: ZeRO-3 holds it partitioned",
            "the gathered weight, in forward and in backward",
            "call the head as a module: FusedHead.adopt(lm_head), then lm_head(hidden, targets, ...) inside the engine's forward",
        )
    if weight.numel() == 0:
        raise bad_input(f"{name} is empty: shape {tuple(weight.shape)}", "a whole, gathered weight", "gather the shards first")


def _check_hidden(name: str, hidden, head: Head) -> None:
    _check_float(name, hidden)
    width = head.weight.shape[1]
    if hidden.dim() < 2 or hidden.shape[-1] != width:
        raise bad_input(f"{name} has shape {tuple(hidden.shape)}", f"[..., {width}] for this head", "pass the last hidden states")
    if hidden.dtype != head.weight.dtype:
        raise bad_input(f"{name} has dtype {hidden.dtype}", f"the head weight's {head.weight.dtype}", f"cast {name}")
    if hidden.device != head.weight.device:
        raise bad_input(f"{name} is on {hidden.device}", f"the head weight's {head.weight.device}", "move one of them")


def _checked_teacher(student_hidden, teacher_hidden, head: Head, teacher_head) -> Head | None:
    """The teacher's own head, checked; None where it shares the student's."""
    if teacher_hidden is None:
        if teacher_head is not None:
            raise bad_input("teacher_head was given without teacher_hidden", "both or neither", "pass teacher_hidden")
        return None
    own = None if teacher_head is None else _checked_head("teacher_head", teacher_head)
    _check_hidden("teacher_hidden", teacher_hidden, own or head)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1] or teacher_hidden.device != student_hidden.device:
        given = f"teacher_hidden has rows {tuple(teacher_hidden.shape[:-1])} on {teacher_hidden.device}"
        wanted = f"student_hidden's {tuple(student_hidden.shape[:-1])} on {student_hidden.device}"
        raise bad_input(given, wanted, "align them row by row")
    if own is not None and own.columns != head.columns:
        raise bad_input(f"teacher_head has {own.columns} tokens", f"the student's {head.columns}", "cut both by valid_vocab")
    if own is not None and (own.weight.dtype == torch.float64) != (head.weight.dtype == torch.float64):
        raise bad_input(f"teacher_head is {own.weight.dtype}", f"the student's {head.weight.dtype}", "cast one of them")
    return None if own is not None and _same_head(own, head) else own


def _same_head(a: Head, b: Head) -> bool:
    return (
        a.weight is b.weight and a.bias is b.bias and (a.softcap, a.scale, a.valid_vocab) == (b.softcap, b.scale, b.valid_vocab)
    )


def _rows(like: torch.Tensor, shape: torch.Size, columns: int, targets, temperature, ignore_index: int) -> ops.Rows:
    n = math.prod(shape)
    if targets is not None:
        targets = _checked_targets(targets, like, shape, columns, ignore_index).reshape(n)
    wide = ops._wide(like.dtype)
    if isinstance(temperature, torch.Tensor):
        temperature = _checked_temperature(temperature, like, shape).to(wide)
        inverse = (1.0 / temperature).expand(shape).reshape(n)
    elif not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0):
        raise bad_input(f"temperature is {temperature!r}", "a finite number above 0", "use 1.0 for none")
    else:
        inverse = torch.full((n,), 1.0 / temperature, dtype=wide, device=like.device)
    return ops.Rows(targets, inverse, ignore_index)


def _checked_targets(targets, like: torch.Tensor, shape: torch.Size, columns: int, ignore_index: int) -> torch.Tensor:
    _check_plain("targets", targets)
    if targets.dtype not in (torch.int64, torch.int32):
        raise bad_input(f"targets has dtype {targets.dtype}", "int64 or int32 token ids", "cast them")
    if targets.shape != shape:
        raise bad_input(f"targets has shape {tuple(targets.shape)}", f"one id per row, {tuple(shape)}", "align them row by row")
    if targets.device != like.device:
        raise bad_input(f"targets is on {targets.device}", f"the rows' {like.device}", "move them")
    if like.device.type == "cpu" and targets.numel():  # on a GPU this check would wait for the device
        wrong = targets[((targets < 0) | (targets >= columns)) & (targets != ignore_index)]
        if wrong.numel():
            given = f"targets holds {wrong[0].item()} ({wrong.numel()} out of range)"
            raise bad_input(given, f"0 to {columns - 1}, or ignore_index {ignore_index}", "check the tokenizer, or mask them")
    return targets.detach().long()


def _checked_temperature(temperature: torch.Tensor, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    _check_plain("temperature", temperature)
    if temperature.dim() and temperature.shape != shape:
        raise bad_input(
            f"temperature has shape {tuple(temperature.shape)}", f"a number, or one per row {tuple(shape)}", "expand it"
        )
    if temperature.device != like.device:
        raise bad_input(f"temperature is on {temperature.device}", f"the rows' {like.device}", "move it")
    if like.device.type == "cpu" and not bool((temperature > 0).all() & temperature.isfinite().all()):
        raise bad_input("temperature holds a value that is not above 0 and finite", "temperatures above 0", "clamp it")
    return temperature.detach()


def _pack(values: Sequence[torch.Tensor | None], shape: torch.Size) -> TokenStats:
    return TokenStats(*[None if value is None else value.reshape(shape) for value in values])


# --- autograd ----------------------------------------------------------------------------------------------------------


def _outputs(ctx, values: torch.Tensor, names: tuple[str, ...]) -> tuple[torch.Tensor | None, ...]:
    """The asked-for rows of `values` [6, N] as separate outputs; the teacher's own never carry a gradient."""
    out = tuple(values[i].clone() if name in names else None for i, name in enumerate(reference.STAT_NAMES))
    ctx.mark_non_differentiable(
        *[v for v, name in zip(out, reference.STAT_NAMES, strict=True) if v is not None and "teacher" in name]
    )
    ctx.set_materialize_grads(False)
    return out


def _row_grads(grads: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """[N, 4] in the order of ops.GRADIENT_NAMES; zero where an output was not used."""
    table = like.new_zeros((like.shape[0], len(ops.GRADIENT_NAMES)))
    for column, name in enumerate(ops.GRADIENT_NAMES):
        grad = grads[reference.STAT_NAMES.index(name)]
        if grad is not None:
            table[:, column] = grad
    return table


class _LogitsStats(torch.autograd.Function):
    """token_stats on given logits [N, V]: the back end's pass forward, and its pass backward over the saved logits."""

    @staticmethod
    def forward(ctx, student, teacher, rows: ops.Rows, names, backend: ops.Backend):
        values, state = backend.forward(student, teacher, rows, names)
        ctx.save_for_backward(student, teacher, rows.targets, rows.inv_temperature, state)
        ctx.ignore_index, ctx.backend = rows.ignore_index, backend
        return _outputs(ctx, values, names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        student, teacher, targets, inv_temperature, state = ctx.saved_tensors
        rows = ops.Rows(targets, inv_temperature, ctx.ignore_index)
        dz = ctx.backend.backward(student, teacher, rows, state, _row_grads(grads, inv_temperature), overwrite=False)
        return dz, None, None, None, None


@dataclass(frozen=True)
class _Plan:
    """What linear_token_stats does with its tensors. `teacher_head`: None where the teacher shares the student's head."""

    head: Head
    teacher_head: Head | None
    rows: ops.Rows
    names: tuple[str, ...]
    backend: ops.Backend
    workspace_bytes: int

    def holding(self, weight, bias, teacher_weight, teacher_bias) -> _Plan:
        """The same plan with these parameters: autograd keeps them, the plan between forward and backward does not."""
        own = None if self.teacher_head is None else replace(self.teacher_head, weight=teacher_weight, bias=teacher_bias)
        return replace(self, head=replace(self.head, weight=weight, bias=bias), teacher_head=own)

    def chunks(self, n: int, has_teacher: bool, backward: bool) -> Iterator[slice]:
        """Row slices whose tiles stay within the workspace."""
        tiles = 1 + int(has_teacher) + (self.backend.tile_copies if backward or self.backend.name == "reference" else 0)
        tiles += int(backward and self.head.softcap is not None)  # dz cannot overwrite the capped logits
        item = 8 if self.rows.inv_temperature.dtype == torch.float64 else 4
        size = max(1, self.workspace_bytes // (tiles * item * self.head.columns))
        return (slice(i, min(i + size, n)) for i in range(0, n, size))

    def blocks(self, weight: torch.Tensor) -> Iterator[slice]:
        """Column slices of the head for GEMMs that cannot read its dtype with float32 results, at most 1/8 of the workspace."""
        size = self.head.columns
        if weight.dtype not in (torch.float32, torch.float64):
            size = min(size, max(1, self.workspace_bytes // (8 * 4 * weight.shape[1])))
        return (slice(i, min(i + size, self.head.columns)) for i in range(0, self.head.columns, size))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with float32 result (float64 for float64); float32 accumulation whatever the inputs."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b.to(a.dtype)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # CPU GEMMs have no float32 result for half inputs


def _logits(plan: _Plan, head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """[n, D] -> float32 (float64) logits [n, columns] with the head's options applied, before the temperature."""
    out = torch.empty((hidden.shape[0], head.columns), dtype=ops._wide(hidden.dtype), device=hidden.device)
    for block in plan.blocks(head.weight):
        out[:, block] = _product(hidden, head.weight[block].T)
    if head.bias is not None:
        out += head.bias[: head.columns]
    if head.scale is not None:
        out *= head.scale
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _tiles(plan: _Plan, student: torch.Tensor, teacher: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both logits tiles of a chunk; one GEMM over the stacked rows where the head is shared."""
    if teacher is None:
        return _logits(plan, plan.head, student), None
    if plan.teacher_head is not None:
        return _logits(plan, plan.head, student), _logits(plan, plan.teacher_head, teacher)
    both = _logits(plan, plan.head, torch.cat([student, teacher]))
    return both[: len(student)], both[len(student) :]


@dataclass
class _LinearGrads:
    """Gradients of hidden states, weight and bias, summed over chunks in float32 (float64); None where not needed."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def zeros(cls, needed: Sequence[bool], *tensors: torch.Tensor | None) -> _LinearGrads:
        return cls(
            *[torch.zeros_like(t, dtype=ops._wide(t.dtype)) if need else None for need, t in zip(needed, tensors, strict=True)]
        )

    def add(self, plan: _Plan, rows: slice, dz: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        if self.bias is not None:
            self.bias[: dz.shape[1]] += dz.sum(0)
        if dz.device.type == "cuda":
            dz = dz.to(hidden.dtype)  # tensor cores; the products still accumulate and return float32
        for block in plan.blocks(weight):
            part = dz[:, block]
            if self.hidden is not None:
                self.hidden[rows] += _product(part, weight[block])
            if self.weight is not None and hidden.dtype == part.dtype and part.dtype in (torch.float32, torch.float64):
                self.weight[block].addmm_(part.T, hidden)  # no [V, D] temporary
            elif self.weight is not None:
                self.weight[block] += _product(part.T, hidden)


def _linear_forward(plan: _Plan, student: torch.Tensor, teacher: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    values = student.new_zeros((6, student.shape[0]), dtype=ops._wide(student.dtype))
    states = []
    for part in plan.chunks(student.shape[0], teacher is not None, backward=False):
        tiles = _tiles(plan, student[part], None if teacher is None else teacher[part])
        values[:, part], state = plan.backend.forward(*tiles, plan.rows[part], plan.names)
        states.append(state)
    return values, torch.cat(states) if states and states[0] is not None else None


def _linear_backward(plan: _Plan, student, teacher, state, grads: torch.Tensor, needed: Sequence[bool]) -> _LinearGrads:
    head = plan.head
    total = _LinearGrads.zeros(needed, student, head.weight, head.bias)
    for part in plan.chunks(student.shape[0], teacher is not None, backward=True):
        tile, teacher_tile = _tiles(plan, student[part], None if teacher is None else teacher[part])
        part_state = None if state is None else state[part]
        overwrite = head.softcap is None
        dz = plan.backend.backward(tile, teacher_tile, plan.rows[part], part_state, grads[part], overwrite=overwrite)
        if head.softcap is not None:
            dz *= tile.div_(head.softcap).square_().neg_().add_(1)  # 1 - tanh^2
        if head.scale is not None:
            dz *= head.scale
        total.add(plan, part, dz, student[part], head.weight)
    return total


class _LinearStats(torch.autograd.Function):
    """linear_token_stats: tiles of logits are made, reduced and dropped; backward makes them again.

    Parameters are saved for backward as themselves (not detached): under ZeRO-3 the module's hooks gather them by then.
    """

    @staticmethod
    def forward(ctx, student, weight, bias, teacher, plan: _Plan):
        with torch.autocast(student.device.type, enabled=False):  # it would round the tiles' GEMMs to bfloat16
            values, state = _linear_forward(plan, student, teacher)
        own = plan.teacher_head
        own_tensors = (None, None) if own is None else (own.weight, own.bias)
        ctx.save_for_backward(student, weight, bias, teacher, state, *own_tensors)
        ctx.plan = plan.holding(None, None, None, None)
        return _outputs(ctx, values, plan.names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        student, weight, bias, teacher, state, teacher_weight, teacher_bias = ctx.saved_tensors
        for name, tensor in (("head.weight", weight), ("head.bias", bias), ("teacher_head.weight", teacher_weight)):
            if tensor is not None:
                check_gathered(f"{name} in backward", tensor)
        plan = ctx.plan.holding(weight, bias, teacher_weight, teacher_bias)
        table = _row_grads(grads, plan.rows.inv_temperature)
        with torch.autocast(student.device.type, enabled=False):
            total = _linear_backward(plan, student, teacher, state, table, ctx.needs_input_grad[:3])
        out = [
            None if g is None else g.to(t.dtype)
            for g, t in zip((total.hidden, total.weight, total.bias), (student, weight, bias), strict=True)
        ]
        return *out, None, None
