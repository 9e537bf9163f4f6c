"""Log-probs of a few tokens a row from hidden states, the mass of all others beside them, and divergences over that support.

One product of hidden states with the head gives both, tile by tile: torch takes the tokens' logits out of a tile, the back end
sums what is left. One more in the backward makes the tiles anew, two give the gradients. What it means is reference/top_k.py's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends import Tile, TileTask, finished, on_device
from .errors import bad_input
from .ops import LinearCall
from .reference import top_k as reference
from .reference.stats import STAT_NAMES, STATE_NAMES, SUM_NAMES, merge
from .stats import Head, linear_call
from .tiling import Linear, Pair, on_gpu, through_head

_STATS = ("logsumexp",)
_IGNORED = -100


class TokenLogprobs(NamedTuple):
    """Log-probs of K tokens a row, as may be kept of a teacher in place of its hidden states.

    tokens: int64 [..., K], distinct within a row; -1 stands for none.  logprobs: [..., K], nats, -inf for none.  rest: [...], log
    of what all other tokens' probabilities add up to, -inf where there are none.
    """

    tokens: Tensor
    logprobs: Tensor
    rest: Tensor

    @property
    def buckets(self) -> Tensor:
        """The log-probs of the tokens, then of the rest: [..., K + 1]; they add up to 1."""
        return torch.cat([self.logprobs, self.rest[..., None]], -1)


class TopKDivergences(NamedTuple):
    """Divergences [...] over K tokens and one bucket of all others, nats; at most those over the whole vocabulary."""

    reverse_kl: Tensor  # KL(student || teacher)
    forward_kl: Tensor  # KL(teacher || student)


def linear_token_logprobs(
    hidden: Tensor,
    head: Head | Tensor,
    tokens: Tensor | int,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    workspace_bytes: int | None = None,
) -> TokenLogprobs:
    """The log-probs of K tokens a row, and of the rest, without ever holding [N, V] logits.

    hidden: [N, D] (or [..., D]).  head: a Head, or just its weight [V, D]; not a vocabulary shard.  tokens: ids [..., K], int64,
    -1 for none; or a number K: each row's K most likely tokens, in falling order, -1 where fewer have a finite logit. Among equal
    logits it is open which are taken.  mask: bool [...], False on rows that return tokens -1 and zeros, and pass no gradient.
    temperature, workspace_bytes: as in `linear_token_stats`, as are dtypes and accuracy; nothing is held for the backward.

    Differentiable in hidden states, weight and bias, through `logprobs` and `rest` at once; which tokens are the most likely is a
    constant. Raises GearKernelsError as `linear_token_stats`, for K below 1 or above the vocabulary, and on the CPU for tokens
    out of range or twice in a row.
    """
    shape = hidden.shape[:-1]
    targets = None if mask is None else torch.where(_checked_mask(mask, shape), 0, _IGNORED)
    given = {"temperature": temperature, "ignore_index": _IGNORED, "stats": _STATS, "workspace_bytes": workspace_bytes}
    call = linear_call(hidden, head, targets, **given)
    if call.group:
        raise bad_input(
            "head is a vocabulary shard", "the whole head on each rank", "gather the shards, or use linear_token_stats"
        )
    ids, k = _checked_tokens(tokens, shape, call)
    found = _op(*_arguments(call, ids, k))
    return TokenLogprobs(*(x.reshape(*shape, *x.shape[1:]) for x in found[:3]))


def top_k_divergences(student: TokenLogprobs, teacher: TokenLogprobs) -> TopKDivergences:
    """Reverse and forward KL over the same K tokens and one bucket of all others; the gradient goes to the student alone.

    For SDPO's support pass the student's own K most likely tokens to the teacher, for verl's and TRL's the teacher's to the
    student; without the bucket, subtract each one's logprobs.logsumexp(-1) and set `rest` to -inf. Raises GearKernelsError where
    the two are of other shapes; that the tokens are the same is looked at on the CPU alone.
    """
    if student.logprobs.shape != teacher.logprobs.shape:
        given = f"the student has log-probs {tuple(student.logprobs.shape)}, the teacher {tuple(teacher.logprobs.shape)}"
        raise bad_input(given, "the same tokens", "pass one's tokens to linear_token_logprobs of the other")
    if not on_gpu(student.tokens.device) and not torch.equal(student.tokens, teacher.tokens):
        raise bad_input("student and teacher have other tokens", "the same", "pass one's tokens to the other's call")
    p, q = student.buckets, teacher.buckets.detach()
    return TopKDivergences(reference.divergence(p, q), reference.divergence(q, p))


# --- argument checks ------------------------------------------------------------------------------------------------------------


def _checked_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        given = f"mask is {mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"mask is a {type(mask).__name__}"
        raise bad_input(given, f"bool, one per row, {tuple(shape)}", "compare it with something")
    return mask


def _checked_tokens(tokens: Tensor | int, shape: torch.Size, call: LinearCall) -> tuple[Tensor | None, int]:
    """The tokens [N, K] or None, and K."""
    if isinstance(tokens, int) and not isinstance(tokens, bool):
        if not 1 <= tokens <= call.vocabulary:
            raise bad_input(f"tokens is {tokens}", f"1 to {call.vocabulary} tokens a row", "ask for fewer")
        return None, tokens
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.shape[:-1] != shape or not tokens.shape[-1]:
        given = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise bad_input(f"tokens is {given}", f"int64 {(*shape, 'K')}, or a number", "pass ids of the vocabulary, -1 for none")
    if tokens.device != call.student.device:
        raise bad_input(f"tokens is on {tokens.device}", f"the rows' {call.student.device}", "move them")
    tokens = tokens.detach().reshape(call.student.shape[0], tokens.shape[-1])
    return tokens, tokens.shape[1]


def _check_values(tokens: Tensor | None, call: LinearCall) -> None:
    """Where looking waits for nothing: ids within the vocabulary, none twice in a row."""
    if tokens is None or on_gpu(tokens.device):
        return
    ordered = tokens.sort(-1).values
    if ((tokens < -1) | (tokens >= call.vocabulary)).any():
        raise bad_input("tokens holds ids out of range", f"0 to {call.vocabulary - 1}, -1 for none", "check the tokenizer")
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise bad_input("tokens holds an id twice in a row", "distinct ids", "write -1 in place of the second")


# --- the operator ---------------------------------------------------------------------------------------------------------------

_FIELDS = (
    "student",
    "weight",
    "bias",
    "targets",
    "inv_temperature",
    "backend",
    "workspace_bytes",
    "softcap",
    "scale",
    "valid_vocab",
)
_SCHEMA = (
    "Tensor student, Tensor weight, Tensor? bias, Tensor? targets, Tensor inv_temperature, str backend, int workspace_bytes, "
    "float? softcap, float? scale, int? valid_vocab, Tensor? tokens, int k"
)


def _arguments(call: LinearCall, tokens: Tensor | None, k: int) -> tuple:
    return *(getattr(call, name) for name in _FIELDS), tokens, k


def _read(arguments) -> tuple[LinearCall, Tensor | None, int]:
    *given, tokens, k = arguments
    none = dict.fromkeys(("teacher", "teacher_weight", "teacher_bias"))
    return LinearCall(**dict(zip(_FIELDS, given, strict=True)), **none, stats=_STATS, ignore_index=_IGNORED), tokens, k


@torch.library.custom_op(
    "gear_kernels::linear_token_logprobs", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _op(*arguments):
    """Tokens [N, K], their log-probs [N, K], the rest's [N], state [N, 9]."""
    call, tokens, k = _read(arguments)
    ops.check_values(call.targets, call.inv_temperature, call.vocabulary, call.ignore_index)
    _check_values(tokens, call)
    with on_device(call.student.device), torch.autocast(call.student.device.type, enabled=False):
        body = ops.tiled(call)
        search = _Search(body, tokens, k)
        _, state = body.forward(search.add)
        return *search.finished(state), state


@_op.register_fake
def _(*arguments):
    call, _, k = _read(arguments)
    n = call.student.shape[0]
    like = ops.tables(call.student)[1]
    ids = call.student.new_empty((n, k), dtype=torch.int64)
    return ids, like.new_empty((n, k)), like.new_empty((n,)), like


@torch.library.custom_op(
    "gear_kernels::linear_token_logprobs_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor logprobs, Tensor rest, Tensor state, Tensor grads, Tensor rest_grads, bool[] needed) -> Tensor[]",
)
def _backward(*arguments):
    """Gradients of student, weight and bias; size 0 where not needed."""
    *given, logprobs, rest, state, grads, rest_grads, needed = arguments
    call, tokens, _ = _read(given)
    assert tokens is not None
    with on_device(state.device), torch.autocast(state.device.type, enabled=False):
        body = ops.tiled(call, of=_Body)
        out = body.differentiate(tokens, TokenLogprobs(tokens, logprobs, rest), state, (grads, rest_grads), needed)
    return [state.new_empty(0) if gradient is None else gradient for gradient in out]


@_backward.register_fake
def _(*arguments):
    (student, weight, bias), needed, state = arguments[:3], arguments[-1], arguments[-4]
    return [torch.empty_like(t) if need else state.new_empty(0) for t, need in zip((student, weight, bias), needed, strict=True)]


def _save(ctx: Any, inputs, output) -> None:
    ctx.tensors = len(inputs)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.constants, ctx.k = inputs[5:10], inputs[11]


def _gradient(ctx: Any, _, grads, rest_grads, __):
    *given, tokens, logprobs, rest, state = ctx.saved_tensors
    ops.check_gathered("head.weight in backward", given[1])
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    out = _backward(*given, *ctx.constants, tokens, ctx.k, logprobs, rest, state, grads, rest_grads, needed)
    return *[g if need else None for g, need in zip(out, needed, strict=True)], *[None] * (ctx.tensors - 3)


_op.register_autograd(_gradient, setup_context=_save)


# --- forward --------------------------------------------------------------------------------------------------------------------


class _Search:
    """What a forward pass keeps beside its sums: the tokens' logits, and the sums over all other columns."""

    def __init__(self, call: Linear, tokens: Tensor | None, k: int):
        self.call, self.given, self.k = call, tokens, k
        n, like = call.rows, call.student
        self.tokens = like.new_full((n, k), -1, dtype=torch.int64) if tokens is None else tokens
        self.logits = like.new_full((n, k), -torch.inf, dtype=call.wide)
        self.displaced = like.new_full((n,), -torch.inf, dtype=torch.float64)  # log sum e^(z / T) of what better ones drove out
        self.sums: Tensor | None = None
        self.kept: dict = {}  # of the back end; the call's own is for tiles that may have a bias

    def add(self, rows: slice, columns: slice, pair: Pair, task: TileTask, sums: Tensor) -> None:
        """A tile that the sums have; it is used up."""
        z = finished(pair[0])
        if self.sums is None:
            self.sums = sums.new_zeros((len(sums), self.call.rows, len(SUM_NAMES)))
        if self.given is None:
            self._keep_best(rows, columns, z, task)
        else:
            at, inside = _places(self.tokens[rows], columns)
            self.logits[rows] = torch.where(inside, z.gather(1, at), self.logits[rows])
            _take_out(z, at, inside)
        self.call.tiles.sweep(Tile(z), None, task._replace(kept=self.kept), self.sums[:, rows])

    def _keep_best(self, rows: slice, columns: slice, z: Tensor, task: TileTask) -> None:
        """Join the tile's best with those of the tiles before; z loses its own."""
        values, at = z.topk(min(self.k, z.shape[1]), -1)
        z.scatter_(1, at, -torch.inf)
        values, at = (torch.cat([mine[rows], new], 1) for mine, new in ((self.logits, values), (self.tokens, at + columns.start)))
        best, chosen = values.topk(self.k, -1)
        self.logits[rows], self.tokens[rows] = best, at.gather(1, chosen)
        lost = values.scatter(1, chosen, -torch.inf) * task.rows.inv_temperature[:, None]
        self.displaced[rows] = torch.logaddexp(self.displaced[rows], lost.double().logsumexp(-1))

    def finished(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probs and rest, now that every row's log Z is known."""
        rows, of = self.call.task.rows, dict(zip(STATE_NAMES, state.double().unbind(-1), strict=True))
        inverse, keep = rows.inv_temperature.double(), rows.keep()
        logprobs = (self.logits - of["max"][:, None]) * inverse[:, None] - of["log_z"][:, None]
        rest = self.displaced
        if self.sums is not None:
            sums = dict(zip(SUM_NAMES, merge(self.sums, rows).unbind(-1), strict=True))
            rest = torch.logaddexp(rest, sums["max"] * inverse + sums["z"].log())
        rest = rest - (of["max"] * inverse + of["log_z"])
        tokens = torch.where(keep[:, None] & (logprobs != -torch.inf), self.tokens, -1)
        return tokens, torch.where(keep[:, None], logprobs, 0).to(state.dtype), torch.where(keep, rest, 0).to(state.dtype)


def _places(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where tokens [n, K] stand in these columns, and which of them do."""
    at = tokens - columns.start
    inside = (at >= 0) & (at < columns.stop - columns.start)
    return torch.where(inside, at, 0), inside


def _take_out(z: Tensor, at: Tensor, inside: Tensor) -> None:
    """Set these logits to -inf, in place; those outside are aimed at column 0 and change nothing."""
    z.scatter_reduce_(1, at, torch.where(inside, -torch.inf, torch.inf).to(z.dtype), "amin")


# --- backward -------------------------------------------------------------------------------------------------------------------


class _Body(Linear):
    """A backward pass: tiles without the tokens' columns, as one distribution of the rest, then the tokens' own dz.

    With the row gradients g of the log-probs, g_r of the rest, and their sum G: dz_v T = g_v - p_v G of a token and
    p_v / r (g_r - r G) of the others. p_v / r is formed in one exponential: of a rest of e^-200 nothing else is finite.
    """

    def differentiate(self, tokens: Tensor, found: TokenLogprobs, state: Tensor, grads: tuple[Tensor, Tensor], needed):
        """The gradients of hidden states, weight and bias, None where not needed. grads: of logprobs [N, K] and rest [N]."""
        rows = self.task.rows
        keep, inverse = rows.keep(), rows.inv_temperature
        own = torch.where(keep[:, None] & found.logprobs.isfinite(), grads[0], 0)
        rest = torch.where(keep & found.rest.isfinite(), grads[1], 0)
        total = own.sum(-1) + rest
        norm, top = (state[:, STATE_NAMES.index(name)] for name in ("log_z", "max"))
        self.tokens, self.own = tokens, (own - found.logprobs.exp() * total[:, None]) * inverse[:, None]
        self.own.masked_fill_((tokens < 0) | ~keep[:, None], 0)
        logits = (found.logprobs + norm[:, None]) / inverse[:, None] + top[:, None]
        through_head(self.head, torch.where(found.logprobs.isfinite(), logits, 0), self.own)
        table = state.new_zeros((len(state), len(STAT_NAMES)))
        table[:, STAT_NAMES.index("logsumexp")] = rest - torch.where(found.rest.isfinite(), found.rest.exp(), 0) * total
        state = state.clone()
        state[:, STATE_NAMES.index("log_z")] = norm + torch.where(found.rest.isfinite(), found.rest, 0)
        return self.backward(state, table, needed)

    def scaled(self, grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """See Linear.scaled: one power of two for both parts of dz."""
        inverse = self.task.rows.inv_temperature[:, None]
        both, unit = super().scaled(torch.cat([grads, self.own / inverse], 1))
        if unit is not None:
            self.own = both[:, grads.shape[1] :] * inverse
        return both[:, : grads.shape[1]].contiguous(), unit

    def tile_dz(
        self, rows: slice, columns: slice, pair: Pair, task: TileTask, per_row: tuple[Tensor, Tensor], target: Tensor
    ) -> None:
        """See Linear.tile_dz."""
        z = finished(pair[0])
        at, inside = _places(self.tokens[rows], columns)
        _take_out(z, at, inside)
        self.tiles.gradient(Tile(z), None, task, *per_row, target)
        if self.head.softcap is not None:
            z.clamp_min_(-self.head.softcap)  # where the slope is 0, not 0 * inf
        through_head(self.head, z, target)
        target.scatter_add_(1, at, torch.where(inside, self.own[rows], 0).to(target.dtype))
