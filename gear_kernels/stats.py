"""token_stats and linear_token_stats: per-token log-probs, entropy and vocabulary-wide KL, differentiable in the student.

The public functions and their argument checks. The operators behind them are in ops.py, the tiling of hidden states in
tiling.py; what happens inside a tile is a back end's (backends/), what it means is reference/stats.py's, with the table of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from . import backends, model_head, ops, parallel, sparse, tiling
from .errors import bad_input, check_choice, check_number
from .reference.stats import BY_NAME, STAT_NAMES, TokenStats

DEFAULT_STATS = ("logprobs", "entropy", "reverse_kl")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap * tanh((h W' + bias) * scale / softcap); then the op divides by the temperature.

    weight: [V, D], or this rank's [V / ranks, D] where a group is given.  bias: [V] or None, sharded likewise.  softcap: Gemma's
    final_logit_softcapping.  scale: a factor on the logits (Cohere's logit_scale; Granite's logits_scaling is a divisor: pass its
    inverse).  valid_vocab: columns from here on are padding, they count as -inf and are never computed; always counted over the
    whole vocabulary.  group: the process group (or one-dimensional DeviceMesh) whose ranks hold shards of the vocabulary in rank
    order, as Megatron and vLLM cut it; hidden states, targets and results are the same on all of them. See parallel.py for the
    collectives.  shards: the rows of every rank's shard, where they are not equal; the same list on all ranks.
    sequence_parallel: each rank of the group has hidden states, targets and results of rows of its own, as many rows on each (pad
    with ignored ones); they are sent round, never gathered. The weight's gradient is that of all ranks' rows. Without a group,
    where each rank has the whole head, rows may be sharded as they are: the weight's gradient is then this rank's rows' part.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float | None = None
    valid_vocab: int | None = None
    group: Any = None
    shards: Sequence[int] | None = None
    sequence_parallel: bool = False

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> Head:
        """The head of a causal LM (transformers', or peft's around it): weight, bias, softcap, scale and adapters as it has them.

        Plain LoRA on the head is merged in float32, weight + scaling * B A, and its gradient reaches A and B: a new [V, D]
        tensor, so call this again after every optimiser step. bfloat16 hidden states go with it (see `linear_token_stats`).

        Raises GearKernelsError, naming the adapter, for what is no such sum (DoRA, lora_bias, dropout while training, other peft
        layers), for layers other than nn.Linear, and for sharded weights under an adapter.
        """
        return cls(*model_head.read(model))


def token_stats(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = DEFAULT_STATS,
    jsd_beta: float = 0.5,
) -> TokenStats:
    """Statistics of given logits [N, V] (or [..., V]), in one pass over each row (two for jsd).

    student_logits, teacher_logits: the same shape, float32, bfloat16, float16 or float64, any strides; dtypes may differ unless
    one is float64. Cut padded columns off by a slice, logits[:, :valid_vocab].  targets: integers [N]; needed for log-probs; a
    row whose target is `ignore_index` returns 0 and passes no gradient, whatever it holds.  temperature: divides both logits; a
    number or a tensor [N], above 0, float32 or float64, not differentiated.  stats: names of TokenStats fields; the divergences
    and teacher_* need teacher_logits.  jsd_beta: between 0 and 1, the teacher's share of the mixture (arXiv 2306.13649).

    Sums are float32 in blocks and float64 between blocks and tiles (float64 throughout for float64 inputs); the gradient is
    computed in float32 and rounded once to the logits' dtype. Divergences are never negative. -inf logits contribute zero and get
    no gradient; a finite student logit where the teacher's is -inf makes reverse_kl +inf (forward_kl the other way round; jsd
    stays finite), and a row's infinite output passes no gradient. NaN and +inf logits, and rows of nothing but -inf, give NaN in
    every output that reads them. The teacher never gets a gradient. Repeats are bitwise equal.

    Raises GearKernelsError on shapes, dtypes, devices, unknown or impossible stats, and on the CPU on targets out of range. On a
    GPU that check would wait for the device: there such a row's log-probs are NaN.

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
        _check_alike("teacher_logits", teacher_logits, "student_logits", student_logits)
    _check_no_tangents({"student_logits": student_logits})
    shape, columns = student_logits.shape[:-1], student_logits.shape[-1]
    targets, inverse = _rows(student_logits, shape, targets, temperature)
    student = student_logits.reshape(-1, columns)
    teacher = None if teacher_logits is None else teacher_logits.detach().reshape(-1, columns)
    backend = backends.choose(student.device, student.dtype)
    call = ops.LogitsCall(student, teacher, targets, inverse, ignore_index, names, _checked_beta(jsd_beta), backend)
    values, _ = ops.token_stats(*call)
    return _pack(values, names, shape)


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
    jsd_beta: float = 0.5,
    workspace_bytes: int | None = None,
    backward: str = "exact",
    backward_tolerance: float = sparse.TOLERANCE,
) -> TokenStats:
    """Statistics of hidden states [N, D] (or [..., D]) under a head, without ever holding [N, V] logits.

    student_hidden, teacher_hidden: the same leading shape, the dtype of their head's weight; bfloat16 and float16 also with a
    float32 head: they are widened, and their gradients rounded once.  head: a Head, or just its weight [V, D].  teacher_head:
    the teacher's own; None means that it shares `head`, and then both rows go through one GEMM. Heads of unequal width (padding)
    need one valid_vocab on both.  targets, temperature, ignore_index, stats, jsd_beta: as in `token_stats`, as are all rules on
    -inf, NaN and ignored rows.  workspace_bytes: bound on the logits tiles and dz alive at a time (at least 64 columns of one
    row); None means 24 MiB on a CPU, 160 MiB on a GPU. What is given beyond that holds logits from forward to backward, where all
    fit, and saves their products: `ops.plan` of `linear_call` says what and how many, `ops.to_keep` when. Besides them the
    backward holds the hidden states' gradient in float32, and for half inputs a block of the weight's, or one product gives it.

    Logits are float32 whatever the inputs (float64 for float64), never rounded to bfloat16: that alone would bias KL by about
    1e-4 nats. On CUDA, and with bfloat16 on processors with AVX512-BF16, the backward's GEMMs read dz rounded to the inputs'
    dtype; elsewhere all of it is float32. Gradients of hidden states, weight and bias are summed in float32 and rounded once
    to their dtype. A weight that needs no gradient costs none. Tiles are recomputed in backward, so a ZeRO-3 partitioned
    weight must be gathered there too: use FusedHead.

    backward: "exact", or "sparse": columns that hardly matter to a block of rows are left out of the backward's products, as many
    as keep every gradient's relative error (Frobenius norm) within backward_tolerance, above 0 and below 1, beside rounding; 2^-9
    by default, what rounding dz to bfloat16 costs. Pays where policies are sure of themselves (entropies below 1 nat); flat
    distributions get the exact backward. Not with a vocabulary shard. `sparse.reports()` collects the bounds that were kept. It
    holds one number a column for every 128 rows from forward to backward, and looks at values: on a GPU it waits for the device.
    Forward-mode tangents (jvp) are refused. Reentrant checkpointing
    (use_reentrant=True) returns a plain tuple in the fields' order: TokenStats(*out).

    Raises GearKernelsError as `token_stats`, on partitioned (size-0) or DTensor weights, and on a vocabulary shard without group.
    """
    call = linear_call(
        student_hidden,
        head,
        targets,
        teacher_hidden,
        teacher_head=teacher_head,
        temperature=temperature,
        ignore_index=ignore_index,
        stats=stats,
        jsd_beta=jsd_beta,
        workspace_bytes=workspace_bytes,
        backward=backward,
        backward_tolerance=backward_tolerance,
    )
    values, *_ = ops.linear_token_stats(*call)
    return _pack(values, tuple(call.stats), student_hidden.shape[:-1])


def linear_call(
    student_hidden: torch.Tensor,
    head: Head | torch.Tensor,
    targets: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    teacher_head: Head | torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = DEFAULT_STATS,
    jsd_beta: float = 0.5,
    workspace_bytes: int | None = None,
    backward: str = "exact",
    backward_tolerance: float = sparse.TOLERANCE,
) -> ops.LinearCall:
    """The operator's checked call that `linear_token_stats` makes of its arguments, for who runs its backward on his own.

    Raises GearKernelsError as `linear_token_stats`.
    """
    head = _checked_head("head", head)
    names = _checked_names(stats, targets, teacher_hidden is not None, "teacher_hidden")
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise bad_input(f"workspace_bytes is {workspace_bytes}", "a positive number of bytes", "leave it at its default")
    student_hidden = _checked_hidden("student_hidden", student_hidden, head)
    teacher_hidden, own = _checked_teacher(student_hidden, teacher_hidden, head, teacher_head)
    _check_no_tangents({"student_hidden": student_hidden, "head.weight": head.weight, "head.bias": head.bias})
    targets, inverse = _rows(student_hidden, student_hidden.shape[:-1], targets, temperature)
    rows = (student_hidden, teacher_hidden, targets, inverse)
    constants = {"ignore_index": int(ignore_index), "jsd_beta": _checked_beta(jsd_beta)}
    constants["tolerance"] = _checked_tolerance(backward, backward_tolerance, head, student_hidden)
    return _linear_call(rows, head, own, names, workspace_bytes, **constants)


def _linear_call(rows, head: Head, own: Head | None, names, workspace_bytes: int | None, **constants) -> ops.LinearCall:
    """The checked call as the operator takes it. rows: student and teacher hidden states, targets, 1 / temperature."""
    student_hidden, teacher_hidden, targets, inverse = rows
    call = ops.LinearCall(
        student=student_hidden.flatten(0, -2),
        weight=head.weight,
        bias=head.bias,
        teacher=None if teacher_hidden is None else teacher_hidden.detach().flatten(0, -2),
        teacher_weight=None if own is None else own.weight.detach(),
        teacher_bias=None if own is None or own.bias is None else own.bias.detach(),
        targets=targets,
        inv_temperature=inverse,
        stats=names,
        backend=backends.choose(student_hidden.device, student_hidden.dtype),
        workspace_bytes=int(workspace_bytes or tiling.limits(student_hidden.device).workspace),
        **constants,
        softcap=_number(head.softcap),
        scale=_number(head.scale),
        teacher_softcap=None if own is None else _number(own.softcap),
        teacher_scale=None if own is None else _number(own.scale),
        valid_vocab=None if head.valid_vocab is None else int(head.valid_vocab),
        group="" if head.group is None else parallel.group_name("head", head.group),
        shards=tuple(head.shards or ()),
        rows_sharded=head.sequence_parallel,
    )
    return call._replace(keeps=ops.to_keep(call)) if _differentiates(head, student_hidden) else call


# --- argument checks ---------------------------------------------------------------------------------------------------


def _checked_names(stats: Sequence[str], targets, has_teacher: bool, teacher_argument: str) -> tuple[str, ...]:
    if isinstance(stats, str):
        raise bad_input(f"stats is the string {stats!r}", "a sequence of names", f"write stats=({stats!r},)")
    names = tuple(dict.fromkeys(stats))
    for name in names:
        if name not in BY_NAME:
            raise bad_input(f"stats names {name!r}", "names out of " + ", ".join(STAT_NAMES), "use one of these")
        if BY_NAME[name].needs_teacher and not has_teacher:
            raise bad_input(f"{name} was asked for without a teacher", teacher_argument, f"pass it, or leave {name} out of stats")
        if BY_NAME[name].needs_target and targets is None:
            raise bad_input(f"{name} was asked for without targets", "targets", f"pass them, or leave {name} out of stats")
    return names


def _check_plain(name: str, tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise bad_input(f"{name} is a {type(tensor).__name__}", "a torch.Tensor", "convert it")
    if type(tensor).__name__ == "DTensor":
        # a bare full_tensor() hands each rank its slice of its own gradient, not of the ranks' mean: 97 % off on 2 ranks
        mend = (
            "under fully_shard make it a FusedHead first, FusedHead.adopt(lm_head), and call that as a module, lm_head(hidden, "
            'targets, ...), or pass tensor.full_tensor(grad_placements=[Partial("avg")]); where tensor parallelism shards the '
            "vocabulary, pass Head(tensor.to_local(), group=mesh)"
        )
        raise bad_input(f"{name} is a DTensor", "a plain tensor", mend)


def _check_no_tangents(tensors: dict[str, torch.Tensor | None]) -> None:
    """Refuse forward-mode differentiation: torch.library has no formula for it and would return tangents of 0."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            given = f"{name} carries a forward-mode tangent (jvp)"
            raise bad_input(given, "reverse mode alone", "use backward() or torch.autograd.grad")


def _check_float(name: str, tensor) -> None:
    _check_plain(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise bad_input(f"{name} has dtype {tensor.dtype}", "float32, bfloat16, float16 or float64", "cast it")


def _check_alike(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.shape != other.shape:
        raise bad_input(
            f"{name} has shape {tuple(tensor.shape)}", f"that of {other_name}, {tuple(other.shape)}", "align them row by row"
        )
    if tensor.device != other.device:
        raise bad_input(f"{name} is on {tensor.device}", f"that of {other_name}, {other.device}", "move one of them")
    if tensor.dtype != other.dtype and torch.float64 in (tensor.dtype, other.dtype):
        raise bad_input(f"{name} has dtype {tensor.dtype}", f"that of {other_name}, {other.dtype}", "cast one of them")


def _checked_head(name: str, head: Head | torch.Tensor) -> Head:
    if isinstance(head, torch.nn.Module):
        mend = "pass Head.from_model(model), which reads scale, softcap and adapters too, or the layer's weight"
        raise bad_input(f"{name} is a {type(head).__name__} module", "a Head or a weight", mend)
    head = head if isinstance(head, Head) else Head(head)
    _check_float(f"{name}.weight", head.weight)
    ops.check_gathered(f"{name}.weight", head.weight)
    if head.weight.dim() != 2 or 0 in head.weight.shape:
        raise bad_input(f"{name}.weight has shape {tuple(head.weight.shape)}", "[V, D]", "pass the head's weight matrix")
    if head.bias is not None:
        _check_bias(name, head.bias, head.weight)
    if head.group is None and getattr(head.weight, "tensor_model_parallel", False):
        given = f"{name}.weight is marked tensor_model_parallel: a vocabulary shard without its group"
        raise bad_input(given, "Head(weight, group=...)", "pass the tensor-parallel process group")
    total = _checked_shards(name, head)
    if head.valid_vocab is not None and not 0 < head.valid_vocab <= total:
        raise bad_input(f"{name}.valid_vocab is {head.valid_vocab}", f"1 to V = {total}", "count the real tokens")
    for option in ("softcap", "scale"):
        value = getattr(head, option)
        if value is not None and not (math.isfinite(value) and value != 0 and (option == "scale" or value > 0)):
            raise bad_input(f"{name}.{option} is {value}", "a finite number, softcap above 0, scale not 0", "use None for none")
    return head


def _checked_shards(name: str, head: Head) -> int:
    """The rows of the whole head, all ranks' together."""
    group = "" if head.group is None else parallel.group_name(name, head.group)
    for option in ("shards", "sequence_parallel"):
        if getattr(head, option) and not group:
            raise bad_input(
                f"{name}.{option} was given without a group", "both or neither", "pass group, the ranks that share the head"
            )
    if not head.shards:
        return head.weight.shape[0] * parallel.ranks(group)
    rank, own = parallel.resolve(group).rank(), head.weight.shape[0]
    if len(head.shards) != parallel.ranks(group) or min(head.shards) < 1 or head.shards[rank] != own:
        wanted = f"{parallel.ranks(group)} numbers of rows, that of rank {rank} {own}"
        raise bad_input(f"{name}.shards is {list(head.shards)}", wanted, "pass the rows of every rank's shard in rank order")
    return sum(head.shards)


def _check_bias(name: str, bias: torch.Tensor, weight: torch.Tensor) -> None:
    _check_plain(f"{name}.bias", bias)
    ops.check_gathered(f"{name}.bias", bias)
    wanted = (weight.shape[0],)
    if tuple(bias.shape) != wanted or bias.dtype != weight.dtype or bias.device != weight.device:
        given = f"{name}.bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise bad_input(given, f"{weight.dtype} {wanted} on {weight.device}", "give the bias of the same layer")


def _checked_hidden(name: str, hidden, head: Head) -> torch.Tensor:
    """Hidden states in their head's dtype: halves are widened for a float32 head (TRL's cast_lm_head_to_fp32), which is exact."""
    _check_float(name, hidden)
    width = head.weight.shape[1]
    if hidden.dim() < 2 or hidden.shape[-1] != width:
        raise bad_input(f"{name} has shape {tuple(hidden.shape)}", f"[..., {width}] for this head", "pass the last hidden states")
    widened = hidden.dtype in _HALVES and head.weight.dtype == torch.float32
    if hidden.dtype != head.weight.dtype and not widened:
        raise bad_input(f"{name} has dtype {hidden.dtype}", f"the head weight's {head.weight.dtype}", f"cast {name}")
    if hidden.device != head.weight.device:
        raise bad_input(f"{name} is on {hidden.device}", f"the head weight's {head.weight.device}", "move one of them")
    return hidden.to(head.weight.dtype)


def _checked_teacher(student_hidden, teacher_hidden, head: Head, teacher_head) -> tuple[torch.Tensor | None, Head | None]:
    """The teacher's hidden states and its own head, checked; no head where it shares the student's."""
    if teacher_hidden is None:
        if teacher_head is not None:
            raise bad_input("teacher_head was given without teacher_hidden", "both or neither", "pass teacher_hidden")
        return None, None
    own = None if teacher_head is None else _checked_head("teacher_head", teacher_head)
    teacher_hidden = _checked_hidden("teacher_hidden", teacher_hidden, own or head)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1] or teacher_hidden.device != student_hidden.device:
        given = f"teacher_hidden has rows {tuple(teacher_hidden.shape[:-1])} on {teacher_hidden.device}"
        wanted = f"student_hidden's {tuple(student_hidden.shape[:-1])} on {student_hidden.device}"
        raise bad_input(given, wanted, "align them row by row")
    if own is not None:
        _check_heads_match(own, head)
    return teacher_hidden, None if own is not None and _same_head(own, head) else own


def _check_heads_match(own: Head, head: Head) -> None:
    count, wanted = (h.valid_vocab or h.weight.shape[0] for h in (own, head))
    if count != wanted:
        raise bad_input(f"teacher_head has {count} tokens", f"the student's {wanted}", "cut both by valid_vocab")
    if (own.weight.dtype == torch.float64) != (head.weight.dtype == torch.float64):
        raise bad_input(f"teacher_head is {own.weight.dtype}", f"the student's {head.weight.dtype}", "cast one of them")
    if tuple(own.shards or ()) != tuple(head.shards or ()) or own.sequence_parallel != head.sequence_parallel:
        raise bad_input("teacher_head is sharded otherwise than head", "the same shards", "shard both heads and their rows alike")
    if own.group is not head.group:
        raise bad_input("teacher_head.group is not head.group", "one group", "shard both heads over the same ranks")
    if head.group is not None and own.weight.shape[0] != head.weight.shape[0]:
        given = f"teacher_head's shard has {own.weight.shape[0]} rows"
        raise bad_input(given, f"the student's {head.weight.shape[0]}", "pad both heads to one size before sharding")


def _same_head(a: Head, b: Head) -> bool:
    return (
        a.weight is b.weight and a.bias is b.bias and (a.softcap, a.scale, a.valid_vocab) == (b.softcap, b.scale, b.valid_vocab)
    )


def _rows(like: torch.Tensor, shape: torch.Size, targets, temperature) -> tuple[torch.Tensor | None, torch.Tensor]:
    """targets [n] or None, and 1 / temperature [n] in the dtype of the statistics."""
    n = math.prod(shape)
    if targets is not None:
        targets = _checked_targets(targets, like, shape).reshape(n)
    wide = backends.wide(like.dtype)
    if isinstance(temperature, torch.Tensor):
        temperature = _checked_temperature(temperature, like, shape).to(wide)
        return targets, (1.0 / temperature).expand(shape).reshape(n)
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0):
        raise bad_input(f"temperature is {temperature!r}", "a finite number above 0", "use 1.0 for none")
    return targets, torch.full((n,), 1.0 / temperature, dtype=wide, device=like.device)


def _checked_targets(targets, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    _check_plain("targets", targets)
    if targets.dtype not in (torch.int64, torch.int32):
        raise bad_input(f"targets has dtype {targets.dtype}", "int64 or int32 token ids", "cast them")
    if targets.shape != shape:
        raise bad_input(f"targets has shape {tuple(targets.shape)}", f"one id per row, {tuple(shape)}", "align them row by row")
    if targets.device != like.device:
        raise bad_input(f"targets is on {targets.device}", f"the rows' {like.device}", "move them")
    return targets.detach()


def _checked_temperature(temperature: torch.Tensor, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    _check_plain("temperature", temperature)
    if temperature.dim() and temperature.shape != shape:
        raise bad_input(
            f"temperature has shape {tuple(temperature.shape)}", f"a number, or one per row {tuple(shape)}", "expand it"
        )
    if temperature.dtype in _HALVES:  # FSDP2's policies cast every input: 0.7 is 0.1 % off, which is nats of a log-prob
        given = f"temperature has dtype {temperature.dtype}, rounded"
        raise bad_input(given, "float32 or float64", "pass a number, or cast it before the model, not within")
    if temperature.device != like.device:
        raise bad_input(f"temperature is on {temperature.device}", f"the rows' {like.device}", "move it")
    return temperature.detach()


def _checked_beta(beta: float) -> float:
    if not (isinstance(beta, int | float) and 0 < beta < 1):
        mend = "use stats=('forward_kl',) for 0 and ('reverse_kl',) for 1"
        raise bad_input(f"jsd_beta is {beta!r}", "a number between 0 and 1, both excluded", mend)
    return float(beta)


def _checked_tolerance(backward: str, tolerance: float, head: Head, hidden: torch.Tensor) -> float:
    """The operator's tolerance: 0, an exact backward, also where there will be none."""
    check_choice("backward", backward, ("exact", "sparse"))
    check_number("backward_tolerance", tolerance, lambda value: 0 < value < 1, "between 0 and 1, both excluded")
    if backward == "exact":
        return 0.0
    if head.group is not None:
        given = 'backward="sparse" with a vocabulary shard'
        raise bad_input(given, "the whole head on each rank", 'use backward="exact" with Head(group=...)')
    return float(tolerance) if _differentiates(head, hidden) else 0.0


def _differentiates(head: Head, hidden: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, head.weight, head.bias))


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _pack(values: torch.Tensor, names: tuple[str, ...], shape: torch.Size) -> TokenStats:
    """[10, n] -> the asked-for fields; those without a gradient, the teacher's own, never carry one."""
    out = dict(zip(STAT_NAMES, values.unbind(0), strict=True))
    return TokenStats(**{name: (out[name] if BY_NAME[name].gradient else out[name].detach()).reshape(shape) for name in names})
