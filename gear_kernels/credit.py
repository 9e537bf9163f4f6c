"""Credit over packed trajectories: a per-token signal becomes segments, segments become bounded weights on the advantage.

`credit_weights` checks its arguments, packs them and runs the method: its `rule`, where it has one, by the back end's scan
(csrc/scan.cpp, triton/scan.py) in one pass over each sequence; otherwise its own `apply`, in torch.
"""

from __future__ import annotations

from typing import Any

import torch

from . import backends
from .errors import bad_input, require
from .methods import Gear, Grpo, PolicyCredit, PolicyTokens, resolve
from .records import FLOAT_INPUTS, Credit, Pack, check_nan
from .reference import credit as reference

__all__ = ["Credit", "Gear", "Grpo", "credit_weights"]

# --- the public operator ----------------------------------------------------------------------------------------------


@torch.no_grad()
def credit_weights(
    signal: torch.Tensor | None,
    entropy: torch.Tensor | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    method: str | Gear | Grpo | object = "gear",
    turn_ids: torch.Tensor | None = None,
    teacher_entropy: torch.Tensor | None = None,
    forward_kl: torch.Tensor | None = None,
    turn_rewards: torch.Tensor | None = None,
    anchors: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
) -> Credit:
    """Segments, weights and token advantages of packed trajectories (GEAR, arXiv 2605.11853, Eq. 2-5, Algorithm 1).

    signal      [T] floating, nats: log pi_student - log pi_teacher of the sampled token, or the full KL(student || teacher).
    entropy     [T] floating, nats: the student's, full vocabulary. Signal or entropy may be None where the method has no
                need of it ("grpo": both; "token", "kl_only", "tool_call", "fixed": entropy).
    advantages  [B] floating, one per sequence.
    cu_seqlens  [B + 1] int32 (or int64): sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1. Sequences may be empty.
    mask        [T] bool, True on policy tokens; None: all are. Tokens outside it are skipped, whatever they hold, as if
                they were not there: a segment runs across them, and they get weight 0, advantage 0 and segment id -1.
    method      a name out of methods.METHODS (a name means its defaults) or a method object such as Gear(alpha=0.4).
    turn_ids    [T] integer; a turn is a run of policy tokens with equal ids. For segmenter "turn", stop_at_turn, turn and gigpo.
    teacher_entropy, forward_kl  [T] floating, nats: the teacher's entropy and KL(teacher || student), for the methods that name
                them in their `needs` (egrsd, sgcd; sc_grpo).
    turn_rewards  [T] floating: the reward of each token's turn. anchors [T] integer: names what the turn answered.
                groups [B] integer: names each sequence's group of siblings. For turn and gigpo.

    Returns a `Credit`. No gradient flows. Computed in float64 where an input row is, else in float32 (thresholds too).
    Its diagnostics are taken over policy tokens: share_above_threshold, share_in_segments, segments_per_trajectory
    (trajectories with a policy token), mean_segment_length (policy tokens), share_unclosed (of segments: those that reach
    the last policy token with no rule ending them), mean_signal (nats), silent_trajectories (share of trajectories with a policy
    token whose scale, what the normaliser divides by without a floor, is below max(signal_floor, 1e-3 nats); a constant
    signal's is 0; the share is 0 for methods without a normaliser), mean_weight_positive and mean_weight_negative (W where
    A > 0, A < 0). All finite for finite input: a mean over nothing is 0, for the weights 1.

    Raises GearKernelsError on wrong shapes, dtypes, devices, unknown methods, missing inputs; for CPU tensors also on offsets
    that do not rise from 0 to T and on NaN in a policy token's row or in an advantage. On a GPU these looks would be
    synchronisations: offsets are cut to [0, T], NaN spreads. There nothing synchronises, but for `random`, and for a mask with
    turn, gigpo or a method of your own that has no `rule`.
    """
    chosen = resolve(method)
    floats = dict(zip(FLOAT_INPUTS, (signal, entropy, teacher_entropy, forward_kl, turn_rewards), strict=True))
    rows = {**floats, "turn_ids": turn_ids, "anchors": anchors}
    pack = _checked(chosen, rows, {"advantages": advantages, "groups": groups}, cu_seqlens, mask)
    rule = chosen.rule() if hasattr(chosen, "rule") else None
    if rule is not None:
        backend = backends.BACKENDS[backends.choose(pack.device, torch.float32)]
        if backend.scans:
            return backend.scan(pack, rule)
    if pack.device.type == "cpu":
        check_nan(pack)
    index, tokens = _gather(pack, groups)
    return _scatter(chosen.apply(tokens), tokens, index, pack)


def _dtype(rows: dict[str, torch.Tensor | None]) -> torch.dtype:
    double = any((x := rows[name]) is not None and x.dtype == torch.float64 for name in FLOAT_INPUTS)
    return torch.float64 if double else torch.float32


# --- a method's own torch ----------------------------------------------------------------------------------------------------


def _gather(pack: Pack, groups: torch.Tensor | None) -> tuple[torch.Tensor, PolicyTokens]:
    """Places [n] of the policy tokens in the pack, and the tokens themselves."""
    sequence = pack.sequence()
    index = torch.arange(pack.total, device=pack.device) if pack.mask is None else pack.mask.nonzero().squeeze(1)
    sequence = sequence[index]
    rows: dict[str, Any] = {name: None if x is None else x[index] for name, x in pack.rows.items()}  # by PolicyTokens' names
    rows |= {name: x.to(pack.dtype) for name in FLOAT_INPUTS if (x := rows[name]) is not None}
    for name in ("signal", "entropy"):
        if rows[name] is None:
            rows[name] = torch.zeros(index.numel(), dtype=pack.dtype, device=pack.device)
    counts = torch.zeros(pack.advantages.numel(), dtype=torch.int64, device=pack.device)
    return index, PolicyTokens(
        **rows,
        groups=None if groups is None else groups[sequence],
        advantages=pack.advantages.to(pack.dtype)[sequence],
        sequence=sequence,
        lengths=counts.index_add_(0, sequence, torch.ones_like(sequence)),
    )


def _scatter(result: PolicyCredit, tokens: PolicyTokens, index: torch.Tensor, pack: Pack) -> Credit:
    def spread(x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        return torch.full((pack.total,), fill, dtype=x.dtype, device=pack.device).index_copy_(0, index, x)

    own = result.token_advantages
    return Credit(
        token_advantages=spread(result.weights * tokens.advantages if own is None else own),
        weights=spread(result.weights),
        signal=spread(result.signal),
        credit=spread(result.credit),
        segment_ids=spread(result.segment_ids, -1),
        onsets=spread(result.onsets),
        diagnostics=reference.diagnostics(_tally(result, tokens), (tokens.lengths > 0).sum()),
    )


def _tally(result: PolicyCredit, tokens: PolicyTokens) -> torch.Tensor:
    """The sums over policy tokens that the scans take on their way: [11] float64 in the order of reference.credit.TALLIES."""
    up, down = tokens.advantages > 0, tokens.advantages < 0
    weights = result.weights.double()
    sums = (
        *(up.numel(), result.above.sum(), (result.segment_ids >= 0).sum(), result.onsets.sum(), result.unclosed),
        *(tokens.signal.double().sum(), up.sum(), torch.where(up, weights, 0).sum()),
        *(down.sum(), torch.where(down, weights, 0).sum(), result.silent),
    )
    full = (torch.full((), float(x), device=up.device) if isinstance(x, int) else x for x in sums)
    return torch.stack([x.double() for x in full])


# --- argument checks --------------------------------------------------------------------------------------------------


def _checked(method, rows: dict, sequences: dict, cu_seqlens: torch.Tensor, mask: torch.Tensor | None) -> Pack:
    """The call as a Pack. rows: the [T] inputs by name.  sequences: the [B] inputs."""
    for name in method.needs:
        given = {**rows, "groups": sequences["groups"]}.get(name)
        require(given is not None, f"{name}: given None", f"a tensor, for {method} reads it", f"pass {name} or another method")
    total = _check_tensors({**rows, "mask": mask}, sequences, cu_seqlens)
    if total is None:
        total = int(cu_seqlens[-1])
    if cu_seqlens.device.type == "cpu":
        _check_bounds(cu_seqlens, total)
    rows = {name: x if name in method.needs else None for name, x in rows.items()}
    return Pack(rows, sequences["advantages"], cu_seqlens, mask, total, _dtype(rows))


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_KINDS: dict[str, tuple[tuple[torch.dtype, ...] | None, str]] = {
    "mask": ((torch.bool,), "bool"),
    **{name: (_INTEGERS, "integer") for name in ("turn_ids", "anchors", "groups")},
}


def _check_tensors(rows: dict, sequences: dict, cu_seqlens) -> int | None:
    """Checks types, dtypes, devices and shapes without reading values; returns T, or None where no [T] row is given."""
    _check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32")
    require(cu_seqlens.numel() > 0, "cu_seqlens: given 0 elements", "[B + 1]", "pass [0] for an empty batch")
    batch, total = cu_seqlens.numel() - 1, None
    for name, x in sequences.items():
        if x is not None or name == "advantages":
            x = _check_tensor(name, x, *_KINDS.get(name, (None, "floating")), cu_seqlens.device)
            expected = f"{batch}, one per sequence of cu_seqlens"
            require(x.numel() == batch, f"{name}: given {x.numel()}", expected, "pass one per trajectory")
    for name, x in rows.items():
        if x is None:
            continue
        x = _check_tensor(name, x, *_KINDS.get(name, (None, "floating")), cu_seqlens.device)
        total = x.numel() if total is None else total
        require(x.numel() == total, f"{name}: given {x.numel()} tokens", f"{total} as in the other [T] inputs", "pack all alike")
    return total


def _check_tensor(name: str, x: object, dtypes: tuple | None, kind: str, device: torch.device | None = None) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise bad_input(f"{name}: given {type(x).__name__}", f"a 1-D {kind} tensor", "pass a tensor")
    fits = x.dtype.is_floating_point if dtypes is None else x.dtype in dtypes
    require(fits, f"{name}: given dtype {x.dtype}", kind, "convert it")
    require(x.dim() == 1, f"{name}: given shape {tuple(x.shape)}", "one packed dimension", "flatten it")
    same = device is None or x.device == device
    require(same, f"{name}: given on {x.device}", f"on {device} like cu_seqlens", "move it")
    return x


def _check_bounds(cu_seqlens: torch.Tensor, total: int) -> None:
    falls = cu_seqlens.diff() < 0
    if falls.any():
        b = int(falls.nonzero()[0])
        start, end = cu_seqlens[b : b + 2].tolist()
        raise bad_input(f"cu_seqlens: given {start} then {end} at sequence {b}", "rising offsets", "sum the lengths")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    require(first == 0, f"cu_seqlens: given {first} first", "0", "prepend 0 to the running sum of lengths")
    require(last == total, f"cu_seqlens: given {last} last", f"T = {total}", "cover every packed token, padding too")
