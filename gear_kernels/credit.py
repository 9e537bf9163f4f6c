"""Credit over packed trajectories: a per-token signal becomes segments, segments become bounded weights on the advantage.

`credit_weights` checks its arguments and runs the method: one pass over each sequence, compiled for the CPU (csrc/scan.cpp) or
one launch of a Triton kernel (triton/scan.py), for every method that can say itself as a `Scan`; torch for all others.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch

from . import backends, reference
from .errors import GearKernelsError, bad_input
from .methods import (
    FLOAT_INPUTS,
    METHODS,
    NORMALIZERS,
    RULES,
    SCAN_SEGMENTERS,
    Gear,
    Grpo,
    PolicyCredit,
    PolicyTokens,
    Scan,
    check_choice,
    require,
)


class Credit(NamedTuple):
    """What `credit_weights` returns: seven [T] tensors on the inputs' device, and the step's diagnostics.

    Floating tensors are float64 where signal or entropy is, else float32. Tokens outside the mask hold 0, -1 and False.
    """

    token_advantages: torch.Tensor  # weights * A, what the policy-gradient loss multiplies with
    weights: torch.Tensor  # W
    signal: torch.Tensor  # g, the normalised signal, in [0, 1]; for methods without one, the quantity behind the weight
    credit: torch.Tensor  # c, the g of the segment's first token, or the token's own g outside segments
    segment_ids: torch.Tensor  # int32, from 0 within each sequence, -1 outside segments
    onsets: torch.Tensor  # bool, True on the first token of each segment
    diagnostics: dict[str, torch.Tensor]  # 0-d float32 tensors on the same device, see `credit_weights`


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
    turn, gigpo or a method of your own that has no `scan`.
    """
    method = _resolve(method)
    floats = dict(zip(FLOAT_INPUTS, (signal, entropy, teacher_entropy, forward_kl, turn_rewards), strict=True))
    rows = {**floats, "turn_ids": turn_ids, "anchors": anchors}
    for name in method.needs:
        given = {**rows, "groups": groups}.get(name)
        require(given is not None, f"{name}: given None", f"a tensor, for {method} reads it", f"pass {name} or another method")
    total = _check_tensors({**rows, "mask": mask}, {"advantages": advantages, "groups": groups}, cu_seqlens)
    if total is None:
        total = int(cu_seqlens[-1])
    if cu_seqlens.device.type == "cpu":
        _check_bounds(cu_seqlens, total)
    rows = {name: x if name in method.needs else None for name, x in rows.items()}
    pack = Pack(rows, advantages, cu_seqlens, mask, total, _dtype(rows))
    scan, where = _choose(method, cu_seqlens.device)
    if where == "native":
        return _native_scan(pack, scan)
    if cu_seqlens.device.type == "cpu":
        _check_nan(pack)
    if where == "triton":
        return _triton_scan(pack, scan)
    index, tokens = _gather(pack, groups)
    return _scatter(method.apply(tokens), tokens, index, pack)


class Pack(NamedTuple):
    """A checked call: what the method reads of the [T] rows (None: it does not), and the dtype to compute in."""

    rows: dict[str, torch.Tensor | None]
    advantages: torch.Tensor
    cu_seqlens: torch.Tensor
    mask: torch.Tensor | None
    total: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def row(self, name: str | None) -> torch.Tensor | None:
        x = None if name is None else self.rows[name]
        return None if x is None else x.detach().to(self.dtype).contiguous()


def _dtype(rows: dict[str, torch.Tensor | None]) -> torch.dtype:
    double = any(rows[name] is not None and rows[name].dtype == torch.float64 for name in FLOAT_INPUTS)
    return torch.float64 if double else torch.float32


def _choose(method: object, device: torch.device) -> tuple[Scan | None, str]:
    scan = method.scan() if hasattr(method, "scan") else None
    return scan, "reference" if scan is None else backends.choose(device, torch.float32)


# --- one pass over each sequence ------------------------------------------------------------------------------------------

# columns of the tallies [B, 11], sums over a sequence's policy tokens but for silent, its 1 or 0; csrc/scan.h and triton/scan.py
# have the same
TALLIES = ("tokens", "above", "inside", "segments", "unclosed", "signal", "positive", "up", "negative", "down", "silent")


def _outputs(pack: Pack) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape or pack.total, dtype=dtype, device=pack.device)

    # one block: four of 4 MiB would go back to the system at every call, and their page faults take longer than the scan
    floats = list(empty(pack.dtype, 4, pack.total).unbind(0))
    return floats, empty(torch.int32), empty(torch.bool), empty(torch.float64, pack.cu_seqlens.numel() - 1, len(TALLIES))


def _native_scan(pack: Pack, scan: Scan) -> Credit:
    """Bitwise equal to the method's `apply` in the same dtype, but for exp (of ratio and gated_ratio)."""
    floats, ids, onsets, tallies = _outputs(pack)
    rows = (pack.row("signal"), pack.row(scan.second), pack.advantages.detach().to(pack.dtype).contiguous())
    turns, mask = pack.rows["turn_ids"], pack.mask
    bounds = pack.cu_seqlens.long().contiguous()
    integers = (None if mask is None else mask.contiguous(), None if turns is None else turns.long().contiguous(), bounds)
    options = _native_options(scan, pack)
    places = backends._load_native()[0].scan(*rows, *integers, floats, ids, onsets, tallies, options, torch.get_num_threads())
    for name, place in zip(("signal", scan.second), places, strict=True):
        if place >= 0:
            raise _nan_at(name, place, bounds.tolist())
    _check_advantages(pack.advantages)
    return Credit(*floats, ids, onsets, _diagnostics(tallies.sum(0), (tallies[:, 0] > 0).sum()))


def _native_options(scan: Scan, pack: Pack):
    options = backends._load_native()[0].ScanOptions()
    kinds = {"rule": RULES, "normalizer": NORMALIZERS, "segmenter": SCAN_SEGMENTERS}
    for name, value in scan._asdict().items():
        if name not in ("second", "level"):
            setattr(options, name, kinds[name].index(value) if name in kinds else value)
    options.level = 1.0 if scan.level is None else scan.level(pack.row(scan.second), pack.mask).item()
    return options


def _triton_scan(pack: Pack, scan: Scan) -> Credit:
    """One launch, a second one for the diagnostics; entropy_window and cl_egrsd take their windows in torch before."""
    module = backends.load_scan()
    floats, ids, onsets, tallies = _outputs(pack)
    second = _windowed(pack, scan)
    level = None if scan.level is None else scan.level(pack.row(scan.second), pack.mask).view(1)
    rows = module.ScanRows(
        *(pack.row("signal"), second, pack.advantages.detach().to(pack.dtype).contiguous()),
        *(pack.mask, pack.rows["turn_ids"], pack.cu_seqlens, level),
    )
    with backends.on_device(pack.device):
        diagnostics = module.scan(rows, module.ScanOutputs(*floats, ids, onsets, tallies), scan, pack.total)
    return Credit(*floats, ids, onsets, dict(zip(DIAGNOSTICS, diagnostics, strict=True)))


def _windowed(pack: Pack, scan: Scan) -> torch.Tensor | None:
    """The second row as the kernel wants it: [T]; for entropy_window [2 T], the row and then its window means."""
    second = pack.row(scan.second)
    if scan.segmenter == "entropy_window":
        return torch.cat([second, _over_policy_tokens(reference.window_mean, second, pack, scan.window)])
    return second if scan.window == 1 else _over_policy_tokens(reference.least_ahead, second, pack, scan.window - 1)


def _over_policy_tokens(function, x: torch.Tensor, pack: Pack, reach: int) -> torch.Tensor:
    """function(x, sequence, reach) as if the tokens outside the mask were not there; their own results mean nothing."""
    sequence = _sequence(pack)
    if pack.mask is None:
        return function(x, sequence, reach)
    # policy tokens to the front without a look at how many there are; the others are a trajectory of their own behind them
    order = (~pack.mask).byte().argsort(stable=True)
    sequence = torch.where(pack.mask, sequence, pack.cu_seqlens.numel())[order]
    return torch.empty_like(x).index_copy_(0, order, function(x[order], sequence, reach))


# --- any other method -----------------------------------------------------------------------------------------------------


def _sequence(pack: Pack) -> torch.Tensor:
    """int64 [T]: the sequence of each token."""
    lengths = pack.cu_seqlens.diff().long()
    return torch.arange(lengths.numel(), device=pack.device).repeat_interleave(lengths, output_size=pack.total)


def _gather(pack: Pack, groups: torch.Tensor | None) -> tuple[torch.Tensor, PolicyTokens]:
    """Places [n] of the policy tokens in the pack, and the tokens themselves."""
    sequence = _sequence(pack)
    index = torch.arange(pack.total, device=pack.device) if pack.mask is None else pack.mask.nonzero().squeeze(1)
    sequence = sequence[index]
    rows = {name: None if x is None else x[index] for name, x in pack.rows.items()}
    rows |= {name: rows[name].to(pack.dtype) for name in FLOAT_INPUTS if rows[name] is not None}
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
        diagnostics=_diagnostics(_tally(result, tokens), (tokens.lengths > 0).sum()),
    )


def _tally(result: PolicyCredit, tokens: PolicyTokens) -> torch.Tensor:
    """The sums over policy tokens that the scans take on their way: [11] float64 in the order of TALLIES."""
    up, down = tokens.advantages > 0, tokens.advantages < 0
    weights = result.weights.double()
    sums = (
        *(up.numel(), result.above.sum(), (result.segment_ids >= 0).sum(), result.onsets.sum(), result.unclosed),
        *(tokens.signal.double().sum(), up.sum(), torch.where(up, weights, 0).sum()),
        *(down.sum(), torch.where(down, weights, 0).sum(), result.silent),
    )
    full = (torch.full((), float(x), device=up.device) if isinstance(x, int) else x for x in sums)
    return torch.stack([x.double() for x in full])


DIAGNOSTICS = {  # the tally summed, and what it is the mean over
    "share_above_threshold": ("above", "tokens"),
    "share_in_segments": ("inside", "tokens"),
    "segments_per_trajectory": ("segments", "trajectories"),
    "mean_segment_length": ("inside", "segments"),
    "share_unclosed": ("unclosed", "segments"),
    "mean_signal": ("signal", "tokens"),
    "silent_trajectories": ("silent", "trajectories"),
    "mean_weight_positive": ("up", "positive"),
    "mean_weight_negative": ("down", "negative"),
}


def _diagnostics(tally: torch.Tensor, trajectories: torch.Tensor) -> dict[str, torch.Tensor]:
    """From sums [11] over policy tokens and the number of trajectories that have one."""
    t = dict(zip(TALLIES, tally, strict=True)) | {"trajectories": trajectories}
    sums = torch.stack([t[name] for name, _ in DIAGNOSTICS.values()])
    counts = torch.stack([t[name] for _, name in DIAGNOSTICS.values()])
    means = (sums / counts.clamp(min=1)).float()
    # 1, the weight that changes nothing, where there is none: a NaN would spoil the logs
    means[-2:] += counts[-2:] == 0
    return dict(zip(DIAGNOSTICS, means, strict=True))


# --- argument checks --------------------------------------------------------------------------------------------------


def _resolve(method: object):
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        return METHODS[method]
    usable = not isinstance(method, type) and callable(getattr(method, "apply", None)) and hasattr(method, "needs")
    require(
        usable,
        f"method: given {method!r}",
        f"a name ({', '.join(METHODS)}) or a method object",
        "pass Gear(...) or Grpo()",
    )
    return method


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_KINDS = {"mask": ((torch.bool,), "bool"), **{name: (_INTEGERS, "integer") for name in ("turn_ids", "anchors", "groups")}}


def _check_tensors(rows: dict, sequences: dict, cu_seqlens) -> int | None:
    """Checks types, dtypes, devices and shapes without reading values; returns T, or None where no [T] row is given."""
    _check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32")
    require(cu_seqlens.numel() > 0, "cu_seqlens: given 0 elements", "[B + 1]", "pass [0] for an empty batch")
    batch, total = cu_seqlens.numel() - 1, None
    for name, x in sequences.items():
        if x is not None or name == "advantages":
            _check_tensor(name, x, *_KINDS.get(name, (None, "floating")), cu_seqlens.device)
            expected = f"{batch}, one per sequence of cu_seqlens"
            require(x.numel() == batch, f"{name}: given {x.numel()}", expected, "pass one per trajectory")
    for name, x in rows.items():
        if x is None:
            continue
        _check_tensor(name, x, *_KINDS.get(name, (None, "floating")), cu_seqlens.device)
        total = x.numel() if total is None else total
        require(x.numel() == total, f"{name}: given {x.numel()} tokens", f"{total} as in the other [T] inputs", "pack all alike")
    return total


def _check_tensor(name: str, x: object, dtypes: tuple | None, kind: str, device: torch.device | None = None) -> None:
    require(isinstance(x, torch.Tensor), f"{name}: given {type(x).__name__}", f"a 1-D {kind} tensor", "pass a tensor")
    fits = x.dtype.is_floating_point if dtypes is None else x.dtype in dtypes
    require(fits, f"{name}: given dtype {x.dtype}", kind, "convert it")
    require(x.dim() == 1, f"{name}: given shape {tuple(x.shape)}", "one packed dimension", "flatten it")
    same = device is None or x.device == device
    require(same, f"{name}: given on {x.device}", f"on {device} like cu_seqlens", "move it")


def _check_bounds(cu_seqlens: torch.Tensor, total: int) -> None:
    falls = cu_seqlens.diff() < 0
    if falls.any():
        b = int(falls.nonzero()[0])
        start, end = cu_seqlens[b : b + 2].tolist()
        raise bad_input(f"cu_seqlens: given {start} then {end} at sequence {b}", "rising offsets", "sum the lengths")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    require(first == 0, f"cu_seqlens: given {first} first", "0", "prepend 0 to the running sum of lengths")
    require(last == total, f"cu_seqlens: given {last} last", f"T = {total}", "cover every packed token, padding too")


def _check_nan(pack: Pack) -> None:
    for name in FLOAT_INPUTS:
        x = pack.rows[name]
        bad = None if x is None else x.isnan() if pack.mask is None else x.isnan() & pack.mask
        if bad is not None and bad.any():
            raise _nan_at(name, int(bad.nonzero()[0]), pack.cu_seqlens.tolist())
    _check_advantages(pack.advantages)


def _nan_at(name: str, place: int, bounds: list[int]) -> GearKernelsError:
    b = bisect.bisect_right(bounds, place) - 1
    return bad_input(
        f"{name}: given NaN at sequence {b}, position {place - bounds[b]} (packed token {place})",
        "numbers on policy tokens",
        "correct the scores it comes from, or leave the token out of the mask",
    )


def _check_advantages(advantages: torch.Tensor) -> None:
    bad = advantages.isnan().nonzero().flatten().tolist()
    require(not bad, f"advantages: given NaN at sequence {bad[:1]}", "numbers", "check the rewards")
