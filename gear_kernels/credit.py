"""Credit over packed trajectories: a per-token signal becomes segments, segments become bounded weights on the advantage.

`credit_weights` checks its arguments, gathers the policy tokens, hands them to a credit method (methods.py) and scatters the
result back; GEAR on a CPU is one compiled pass instead.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch

from . import backends
from .errors import GearKernelsError, bad_input
from .methods import METHODS, NORMALIZERS, SEGMENTERS, Gear, Grpo, PolicyCredit, PolicyTokens, check_choice, require


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
) -> Credit:
    """Segments, weights and token advantages of packed trajectories (GEAR, arXiv 2605.11853, Eq. 2-5, Algorithm 1).

    signal      [T] floating, nats: log pi_student - log pi_teacher of the sampled token, or the full KL(student || teacher).
    entropy     [T] floating, nats: the student's, full vocabulary. Signal or entropy may be None where the method has no
                need of it ("grpo": both; "token", "kl_only", "turn", "fixed": entropy).
    advantages  [B] floating, one per sequence.
    cu_seqlens  [B + 1] int32 (or int64): sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1. Sequences may be empty.
    mask        [T] bool, True on policy tokens; None: all are. Tokens outside it are skipped, whatever they hold, as if
                they were not there: a segment runs across them, and they get weight 0, advantage 0 and segment id -1.
    method      a name out of methods.METHODS (a name means its defaults) or a method object such as Gear(alpha=0.4).
    turn_ids    [T] integer; a turn is a run of policy tokens with equal ids. For segmenter "turn" and for stop_at_turn.
    teacher_entropy, forward_kl  [T] floating, nats: the teacher's entropy and KL(teacher || student), for the methods that name
                them in their `needs` (egrsd, sgcd; sc_grpo).

    Returns a `Credit`. No gradient flows. Computed in float64 where signal or entropy is, else in float32 (thresholds too).
    Its diagnostics are taken over policy tokens: share_above_threshold, share_in_segments, segments_per_trajectory
    (trajectories with a policy token), mean_segment_length (policy tokens), share_unclosed (of segments: those that reach
    the last policy token with no rule ending them), mean_signal (nats), mean_weight_positive and mean_weight_negative (W
    where A > 0, A < 0). All finite for finite input: a mean over nothing is 0, for the weights 1.

    Raises GearKernelsError on wrong shapes, dtypes, devices, offsets, unknown methods, missing inputs, and on NaN in a
    policy token's signal or entropy or in an advantage. NaN is looked for in CPU tensors only: on a GPU the look would
    be a synchronisation. The reference back end itself goes through the CPU, so for now this call synchronises.
    """
    method = _resolve(method)
    rows = {"signal": signal, "entropy": entropy, "teacher_entropy": teacher_entropy, "forward_kl": forward_kl}
    given = {**rows, "turn_ids": turn_ids}
    for name in method.needs:
        require(
            given.get(name) is not None, f"{name}: given None", f"[T], for {method} reads it", f"pass {name} or another method"
        )
    total = _check_tensors(rows, advantages, cu_seqlens, mask, turn_ids)
    bounds = cu_seqlens.tolist()
    total = bounds[-1] if total is None else total
    _check_bounds(bounds, total)
    if _compiled(method, cu_seqlens.device):
        return _scan(method, signal, entropy, advantages, cu_seqlens, mask, turn_ids)
    index, tokens = _gather(rows, advantages, cu_seqlens, mask, turn_ids, total)
    if cu_seqlens.device.type == "cpu":
        _check_nan(index, tokens, advantages, bounds)
    result = method.apply(tokens)
    return _scatter(result, tokens, index, total, cu_seqlens.device)


# --- the compiled scan --------------------------------------------------------------------------------------------------

_TALLIES = ("tokens", "above", "inside", "segments", "unclosed", "signal", "positive", "up", "negative", "down")  # csrc/scan.h


def _compiled(method: object, device: torch.device) -> bool:
    """Whether csrc/scan.cpp does it: Gear on a CPU but for `random`, whose places Python's generator draws."""
    able = isinstance(method, Gear) and method.segmenter != "random" and device.type == "cpu"
    return able and backends.choose(device, torch.float32) == "native"


def _scan(method: Gear, signal, entropy, advantages, cu_seqlens, mask, turn_ids) -> Credit:
    """All of it in one pass over each sequence, bitwise equal to `Gear.apply` in the same dtype."""
    dtype = _dtype(signal, entropy)
    total, bounds = signal.numel(), cu_seqlens.long()
    floats = [torch.empty(total, dtype=dtype) for _ in range(4)]
    ids, onsets = torch.empty(total, dtype=torch.int32), torch.empty(total, dtype=torch.bool)
    tallies = torch.empty((bounds.numel() - 1, len(_TALLIES)), dtype=torch.float64)
    rows = [None if x is None else x.detach().to(dtype).contiguous() for x in (signal, entropy, advantages)]
    integers = (None if mask is None else mask.contiguous(), None if turn_ids is None else turn_ids.long().contiguous(), bounds)
    places = _native().scan(*rows, *integers, floats, ids, onsets, tallies, _scan_options(method), torch.get_num_threads())
    for name, place in zip(("signal", "entropy"), places, strict=True):
        if place >= 0:
            raise _nan_at(name, place, cu_seqlens.tolist())
    _check_advantages(advantages)
    return Credit(*floats, ids, onsets, _diagnostics(tallies.sum(0), (tallies[:, 0] > 0).sum()))


def _native():
    return backends._load_native()[0]


def _scan_options(method: Gear):
    options = _native().ScanOptions()
    options.normalizer, options.segmenter = NORMALIZERS.index(method.normalizer), SEGMENTERS.index(method.segmenter)
    options.quantile, options.threshold, options.ratio = method.quantile, method.kl_threshold, method.entropy_ratio
    options.alpha, options.floor, options.longest = method.alpha, method.entropy_floor, method.max_segment_len or 0
    options.fixed, options.window = method.fixed_len, method.window
    options.renormalize, options.stop_at_turn = method.renormalize, method.stop_at_turn
    return options


# --- any other method ---------------------------------------------------------------------------------------------------


def _dtype(*rows: torch.Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in rows)
    return torch.float64 if double else torch.float32


def _gather(rows: dict, advantages, cu_seqlens, mask, turn_ids, total: int) -> tuple[torch.Tensor, PolicyTokens]:
    """Places [n] of the policy tokens in the pack, and the tokens themselves, on the CPU in the dtype of the computation."""
    dtype = _dtype(*rows.values())
    index = torch.arange(total) if mask is None else mask.cpu().nonzero().squeeze(1)
    cu = cu_seqlens.cpu().long()
    batch = cu.numel() - 1
    sequence = torch.repeat_interleave(torch.arange(batch), cu.diff())[index]
    floats = {name: None if x is None else x.cpu().to(dtype)[index] for name, x in rows.items()}
    for name in ("signal", "entropy"):
        if floats[name] is None:
            floats[name] = torch.zeros(index.numel(), dtype=dtype)
    return index, PolicyTokens(
        **floats,
        advantages=advantages.cpu().to(dtype)[sequence],
        turn_ids=None if turn_ids is None else turn_ids.cpu()[index],
        sequence=sequence,
        lengths=torch.bincount(sequence, minlength=batch),
    )


def _scatter(result: PolicyCredit, tokens: PolicyTokens, index: torch.Tensor, total: int, device: torch.device) -> Credit:
    def spread(x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        return torch.full((total,), fill, dtype=x.dtype).index_copy_(0, index, x).to(device)

    return Credit(
        token_advantages=spread(result.weights * tokens.advantages),
        weights=spread(result.weights),
        signal=spread(result.signal),
        credit=spread(result.credit),
        segment_ids=spread(result.segment_ids, -1),
        onsets=spread(result.onsets),
        diagnostics={name: x.to(device) for name, x in _diagnostics(_tally(result, tokens), (tokens.lengths > 0).sum()).items()},
    )


def _tally(result: PolicyCredit, tokens: PolicyTokens) -> torch.Tensor:
    """The sums over policy tokens that the compiled scan takes on its way: [10] float64 in the order of _TALLIES."""
    up, down = tokens.advantages > 0, tokens.advantages < 0
    weights = result.weights.double()
    sums = (
        *(up.numel(), result.above.sum(), (result.segment_ids >= 0).sum(), result.onsets.sum(), result.unclosed),
        *(tokens.signal.double().sum(), up.sum(), torch.where(up, weights, 0).sum()),
        *(down.sum(), torch.where(down, weights, 0).sum()),
    )
    return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in sums])


def _diagnostics(tally: torch.Tensor, trajectories: torch.Tensor) -> dict[str, torch.Tensor]:
    """From sums [10] over policy tokens and the number of trajectories that have one."""
    t = dict(zip(_TALLIES, tally, strict=True))
    tokens, segments = t["tokens"].clamp(min=1), t["segments"].clamp(min=1)
    mean = {
        "share_above_threshold": t["above"] / tokens,
        "share_in_segments": t["inside"] / tokens,
        "segments_per_trajectory": t["segments"] / trajectories.clamp(min=1),
        "mean_segment_length": t["inside"] / segments,
        "share_unclosed": t["unclosed"] / segments,
        "mean_signal": t["signal"] / tokens,
        # 1, the weight that changes nothing, where there is none: a NaN would spoil the logs
        "mean_weight_positive": torch.where(t["positive"] > 0, t["up"] / t["positive"].clamp(min=1), 1.0),
        "mean_weight_negative": torch.where(t["negative"] > 0, t["down"] / t["negative"].clamp(min=1), 1.0),
    }
    return {name: x.float() for name, x in mean.items()}


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


def _check_tensors(rows: dict, advantages, cu_seqlens, mask, turn_ids) -> int | None:
    """Checks types, dtypes, devices and shapes without reading values; returns T, or None where no [T] tensor is given."""
    integers = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    _check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32")
    require(cu_seqlens.numel() > 0, "cu_seqlens: given 0 elements", "[B + 1]", "pass [0] for an empty batch")
    _check_tensor("advantages", advantages, None, "floating", cu_seqlens.device)
    batch = cu_seqlens.numel() - 1
    require(
        advantages.numel() == batch,
        f"advantages: given {advantages.numel()}",
        f"{batch}, one per sequence of cu_seqlens",
        "pass one per trajectory",
    )
    total = None
    rows = {**rows, "mask": mask, "turn_ids": turn_ids}
    kinds = {"mask": ((torch.bool,), "bool"), "turn_ids": (integers, "integer")}
    for name, x in rows.items():
        if x is None:
            continue
        _check_tensor(name, x, *kinds.get(name, (None, "floating")), cu_seqlens.device)
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


def _check_bounds(bounds: list[int], total: int) -> None:
    require(bounds[0] == 0, f"cu_seqlens: given {bounds[0]} first", "0", "prepend 0 to the running sum of lengths")
    for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        require(start <= end, f"cu_seqlens: given {start} then {end} at sequence {b}", "rising offsets", "sum the lengths")
    require(bounds[-1] == total, f"cu_seqlens: given {bounds[-1]} last", f"T = {total}", "cover every packed token, padding too")


def _check_nan(index: torch.Tensor, tokens: PolicyTokens, advantages: torch.Tensor, bounds: list[int]) -> None:
    for name in ("signal", "entropy", "teacher_entropy", "forward_kl"):
        x = getattr(tokens, name)
        bad = None if x is None else x.isnan()
        if bad is not None and bad.any():
            raise _nan_at(name, int(index[int(bad.nonzero()[0])]), bounds)
    _check_advantages(advantages)


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
