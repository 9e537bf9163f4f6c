"""Credit over packed trajectories: a per-token signal becomes segments, segments become bounded weights on the advantage.

`credit_weights` checks its arguments, gathers the policy tokens, hands them to a credit method and scatters the result
back. A method is any object with `needs` (the names of the inputs it reads) and `apply(PolicyTokens) -> PolicyCredit`;
the package's own are the frozen dataclasses below, the mathematics behind them is in reference.py.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import backends, reference
from .errors import GearKernelsError, bad_input

NORMALIZERS = ("relu_max", "max", "minmax", "abs_max", "quantile", "none")
SEGMENTERS = ("entropy", "token", "kl_only", "entropy_only", "turn", "entropy_window", "random", "fixed")


class Credit(NamedTuple):
    """What `credit_weights` returns: seven [T] tensors on the inputs' device, and the step's diagnostics.

    Floating tensors are float64 where signal or entropy is, else float32. Tokens outside the mask hold 0, -1 and False.
    """

    token_advantages: torch.Tensor  # weights * A, what the policy-gradient loss multiplies with
    weights: torch.Tensor  # W
    signal: torch.Tensor  # g, the normalised signal, in [0, 1]
    credit: torch.Tensor  # c, the g of the segment's first token, or the token's own g outside segments
    segment_ids: torch.Tensor  # int32, from 0 within each sequence, -1 outside segments
    onsets: torch.Tensor  # bool, True on the first token of each segment
    diagnostics: dict[str, torch.Tensor]  # 0-d float32 tensors on the same device, see `credit_weights`


class PolicyTokens(NamedTuple):
    """A method's input: the policy tokens alone, packed without gaps, n of them in B sequences (some may be empty)."""

    signal: torch.Tensor  # [n] nats
    entropy: torch.Tensor  # [n] nats
    advantages: torch.Tensor  # [n], each token's sequence's A
    turn_ids: torch.Tensor | None  # [n] int
    sequence: torch.Tensor  # [n] int64, the sequence of each token
    lengths: torch.Tensor  # [B] int64, policy tokens of each sequence

    def sequences(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int] | None]]:
        """Yields (signal, entropy, turn ids as a list or None) of each sequence."""
        sizes = self.lengths.tolist()
        turns = [None] * len(sizes) if self.turn_ids is None else [x.tolist() for x in self.turn_ids.split(sizes)]
        yield from zip(self.signal.split(sizes), self.entropy.split(sizes), turns, strict=True)


class PolicyCredit(NamedTuple):
    """A method's result, over the same n tokens: see `Credit`."""

    weights: torch.Tensor
    signal: torch.Tensor
    credit: torch.Tensor
    segment_ids: torch.Tensor
    onsets: torch.Tensor
    above: torch.Tensor  # [n] bool, g above the method's threshold
    unclosed: int  # segments that reached the last policy token without a rule ending them there


def _require(condition: bool, given: str, expected: str, mend: str) -> None:
    if not condition:
        raise bad_input(given, expected, mend)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name}: given {value!r}", f"one of {', '.join(choices)}", "correct the name")


def _check_number(name: str, value: object, allowed, expected: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _require(number and allowed(value), f"{name}: given {value!r}", f"a finite number {expected}", "change it")


def _check_integer(name: str, value: object, least: int, mend: str = "change it") -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and value >= least, f"{name}: given {value!r}", f"an integer of at least {least}", mend)


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grpo:
    """W = 1: the sequence's advantage on each of its policy tokens. Reads neither signal nor entropy (either may be None)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        zero, none = torch.zeros_like(tokens.signal), torch.zeros_like(tokens.sequence, dtype=torch.bool)
        ids = torch.full_like(tokens.sequence, -1, dtype=torch.int32)
        return PolicyCredit(torch.ones_like(zero), zero, zero, ids, none, none, 0)


@dataclass(frozen=True)
class Gear:
    """Adaptive-granularity credit: GEAR, arXiv 2605.11853, Eq. 2-5 and Algorithm 1, its ablations and two controls.

    A segment opens at a token with g > kl_threshold and ends with the first later token whose entropy exceeds
    entropy_ratio times the onset's; all of it gets the onset's g as credit c; W = alpha w + 1 - alpha / 2 with
    w = 1 - c for A > 0, c for A < 0, 0.5 for A = 0. So W is within 1 +- alpha / 2 and the sign of A never flips.

    Segmenters: entropy (the paper's rule); token (no segments, c = g); kl_only (up to the next token above the
    threshold); entropy_only (segments cover the trajectory, each ends by the entropy rule); turn (one per turn);
    entropy_window (tests the mean entropy of the last `window` tokens). Controls, ours in detail: random (as many
    segments, as long as the entropy rule gives, anywhere in the trajectory) and fixed (fixed_len tokens each, covering
    the trajectory). In each of them c is the g of the segment's first token, and the token's own g outside segments.

    random draws from a generator seeded by `seed` and the sequence's own signal and length, so a sequence gets the same
    places wherever it is packed; two sequences with equal signals and segment lengths get equal places.
    """

    normalizer: str = "relu_max"  # how g comes from the signal, see reference.normalise
    quantile: float = 0.95  # of normalizer "quantile"
    kl_threshold: float = 0.1  # on g, strict
    entropy_ratio: float = 1.5
    alpha: float = 0.2  # share of the advantage that is redistributed, in [0, 2)
    segmenter: str = "entropy"
    renormalize: bool = False  # divide W by its mean over the trajectory's policy tokens
    max_segment_len: int | None = None  # in policy tokens; like stop_at_turn, without effect on token, turn and fixed
    entropy_floor: float = 0.0  # nats; the onset's entropy counts as at least this much
    stop_at_turn: bool = False  # a segment ends with its turn at the latest; needs turn_ids
    fixed_len: int = 8  # of segmenter "fixed", in policy tokens
    seed: int = 0  # of segmenter "random"
    window: int = 8  # of segmenter "entropy_window", in policy tokens

    def __post_init__(self) -> None:
        _check_choice("Gear.normalizer", self.normalizer, NORMALIZERS)
        _check_choice("Gear.segmenter", self.segmenter, SEGMENTERS)
        _check_number("Gear.quantile", self.quantile, lambda x: 0 < x <= 1, "in (0, 1]")
        _check_number("Gear.kl_threshold", self.kl_threshold, lambda x: 0 <= x <= 1, "in [0, 1], for g is normalised")
        _check_number("Gear.entropy_ratio", self.entropy_ratio, lambda x: x > 0, "above 0")
        _check_number("Gear.alpha", self.alpha, lambda x: 0 <= x < 2, "in [0, 2), or W could reach 0")
        _check_number("Gear.entropy_floor", self.entropy_floor, lambda x: x >= 0, "of nats, at least 0")
        for name in ("fixed_len", "window"):
            _check_integer(f"Gear.{name}", getattr(self, name), 1)
        _check_integer("Gear.seed", self.seed, 0)
        if self.max_segment_len is not None:
            _check_integer("Gear.max_segment_len", self.max_segment_len, 1, mend="pass None for no limit")
        for name in ("renormalize", "stop_at_turn"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"Gear.{name}: given {value!r}", "a bool", "pass True or False")

    @property
    def needs(self) -> tuple[str, ...]:
        entropy = self.segmenter in ("entropy", "entropy_only", "entropy_window", "random")
        turns = self.segmenter == "turn" or self.stop_at_turn
        return ("signal", *(("entropy",) if entropy else ()), *(("turn_ids",) if turns else ()))

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        signals, source, ids, unclosed = [], [], [], 0
        for signal, entropy, turns in tokens.sequences():
            g = reference.normalise(signal, self.normalizer, self.quantile)
            segments, n, start = self.segments(g, signal, entropy, turns), g.numel(), len(source)
            signals.append(g)
            source += [start + t for t in reference.credit_sources(segments, n)]
            ids += reference.segment_numbers(segments, n)
            unclosed += sum(not segment.closed for segment in segments)
        g = torch.cat(signals) if signals else tokens.signal
        source, ids = torch.tensor(source, dtype=torch.int64), torch.tensor(ids, dtype=torch.int32)
        onsets = (source == torch.arange(g.numel())) & (ids >= 0)
        credit = g[source]
        weights = reference.credit_weight(credit, tokens.advantages, self.alpha)
        if self.renormalize:
            weights = reference.renormalise(weights, tokens.sequence, tokens.lengths)
        return PolicyCredit(weights, g, credit, ids, onsets, g > self.kl_threshold, unclosed)

    def segments(
        self, g: torch.Tensor, signal: torch.Tensor, entropy: torch.Tensor, turn_ids: list[int] | None
    ) -> list[reference.Segment]:
        """The segments of one trajectory: g, signal, entropy [n] and its turn ids, policy tokens only."""
        n = g.numel()
        if self.segmenter == "token":
            return []
        if self.segmenter == "turn":
            return reference.turn_segments(turn_ids)
        if self.segmenter == "fixed":
            return reference.fixed_segments(n, self.fixed_len)
        onset = [True] * n if self.segmenter == "entropy_only" else (g > self.kl_threshold).tolist()
        last = reference.last_allowed(n, self.max_segment_len, turn_ids if self.stop_at_turn else None)
        if self.segmenter == "kl_only":
            return reference.trigger_segments(onset, last)
        tested = reference.window_mean(entropy, self.window) if self.segmenter == "entropy_window" else entropy
        limit = reference.entropy_limits(entropy, self.entropy_ratio, self.entropy_floor)
        segments = reference.entropy_segments(onset, tested.tolist(), limit.tolist(), last)
        if self.segmenter == "random":
            lengths = [last - first + 1 for first, last, _ in segments]
            return reference.random_segments(lengths, n, _generator(self.seed, signal))
        return segments


METHODS = {"gear": Gear(), "grpo": Grpo(), **{name: Gear(segmenter=name) for name in SEGMENTERS if name != "entropy"}}


def _generator(seed: int, signal: torch.Tensor) -> random.Random:
    """A generator that depends on the seed and on one sequence's signal [n], not on where it stands in the pack."""
    data = struct.pack(f"<{signal.numel()}d", *signal.tolist())  # its length is the number of policy tokens
    digest = hashlib.blake2b(f"{seed}:".encode() + data, digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


# --- the public operator ----------------------------------------------------------------------------------------------


@torch.no_grad()
def credit_weights(
    signal: torch.Tensor | None,
    entropy: torch.Tensor | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    method: str | Gear | Grpo = "gear",
    turn_ids: torch.Tensor | None = None,
) -> Credit:
    """Segments, weights and token advantages of packed trajectories (GEAR, arXiv 2605.11853, Eq. 2-5, Algorithm 1).

    signal      [T] floating, nats: log pi_student - log pi_teacher of the sampled token, or the full KL(student || teacher).
    entropy     [T] floating, nats: the student's, full vocabulary. Signal or entropy may be None where the method has no
                need of it ("grpo": both; "token", "kl_only", "turn", "fixed": entropy).
    advantages  [B] floating, one per sequence.
    cu_seqlens  [B + 1] int32 (or int64): sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1. Sequences may be empty.
    mask        [T] bool, True on policy tokens; None: all are. Tokens outside it are skipped, whatever they hold, as if
                they were not there: a segment runs across them, and they get weight 0, advantage 0 and segment id -1.
    method      a name (gear, grpo, token, kl_only, entropy_only, turn, entropy_window, random, fixed: a name means its
                defaults) or a method object such as Gear(alpha=0.4).
    turn_ids    [T] integer; a turn is a run of policy tokens with equal ids. For segmenter "turn" and for stop_at_turn.

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
    given = {"signal": signal, "entropy": entropy, "turn_ids": turn_ids}
    for name in method.needs:
        _require(
            given.get(name) is not None, f"{name}: given None", f"[T], for {method} reads it", f"pass {name} or another method"
        )
    total = _check_tensors(signal, entropy, advantages, cu_seqlens, mask, turn_ids)
    bounds = cu_seqlens.tolist()
    total = bounds[-1] if total is None else total
    _check_bounds(bounds, total)
    if _compiled(method, cu_seqlens.device):
        return _scan(method, signal, entropy, advantages, cu_seqlens, mask, turn_ids)
    index, tokens = _gather(signal, entropy, advantages, cu_seqlens, mask, turn_ids, total)
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
    return Credit(*floats, ids, onsets, _tallied(tallies))


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


def _tallied(tallies: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums per sequence [B, 10] -> the diagnostics, as `_diagnostics` takes them from the tokens."""
    t = dict(zip(_TALLIES, tallies.sum(0), strict=True))
    tokens, segments = t["tokens"].clamp(min=1), t["segments"].clamp(min=1)
    trajectories = (tallies[:, 0] > 0).sum().clamp(min=1)
    mean = {
        "share_above_threshold": t["above"] / tokens,
        "share_in_segments": t["inside"] / tokens,
        "segments_per_trajectory": t["segments"] / trajectories,
        "mean_segment_length": t["inside"] / segments,
        "share_unclosed": t["unclosed"] / segments,
        "mean_signal": t["signal"] / tokens,
        "mean_weight_positive": torch.where(t["positive"] > 0, t["up"] / t["positive"].clamp(min=1), 1.0),
        "mean_weight_negative": torch.where(t["negative"] > 0, t["down"] / t["negative"].clamp(min=1), 1.0),
    }
    return {name: x.float() for name, x in mean.items()}


# --- any other method ---------------------------------------------------------------------------------------------------


def _dtype(signal, entropy) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in (signal, entropy))
    return torch.float64 if double else torch.float32


def _gather(signal, entropy, advantages, cu_seqlens, mask, turn_ids, total: int) -> tuple[torch.Tensor, PolicyTokens]:
    """Places [n] of the policy tokens in the pack, and the tokens themselves, on the CPU in the dtype of the computation."""
    dtype = _dtype(signal, entropy)
    index = torch.arange(total) if mask is None else mask.cpu().nonzero().squeeze(1)
    cu = cu_seqlens.cpu().long()
    batch = cu.numel() - 1
    sequence = torch.repeat_interleave(torch.arange(batch), cu.diff())[index]
    floats = [torch.zeros(index.numel(), dtype=dtype) if x is None else x.cpu().to(dtype)[index] for x in (signal, entropy)]
    return index, PolicyTokens(
        *floats,
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
        diagnostics={name: x.float().to(device) for name, x in _diagnostics(result, tokens).items()},
    )


def _diagnostics(result: PolicyCredit, tokens: PolicyTokens) -> dict[str, torch.Tensor]:
    inside = result.segment_ids >= 0
    ones = torch.ones_like(result.weights)
    segments = result.onsets.sum()
    return {
        "share_above_threshold": _mean(ones, result.above),
        "share_in_segments": _mean(ones, inside),
        "segments_per_trajectory": segments / (tokens.lengths > 0).sum().clamp(min=1),
        "mean_segment_length": inside.sum() / segments.clamp(min=1),
        "share_unclosed": result.unclosed / segments.clamp(min=1),
        "mean_signal": _mean(tokens.signal, torch.ones_like(inside)),
        "mean_weight_positive": _mean_where(result.weights, tokens.advantages > 0),
        "mean_weight_negative": _mean_where(result.weights, tokens.advantages < 0),
    }


def _mean(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Sum of x [n] over the chosen tokens, divided by n; 0 for n = 0."""
    return torch.where(chosen, x, 0).double().sum() / max(x.numel(), 1)


def _mean_where(weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean weight of the chosen tokens; 1, the weight that changes nothing, where there is none (a NaN would spoil the logs)."""
    count = chosen.sum()
    return torch.where(count > 0, torch.where(chosen, weights, 0).double().sum() / count.clamp(min=1), 1.0)


# --- argument checks --------------------------------------------------------------------------------------------------


def _resolve(method: object):
    if isinstance(method, str):
        _check_choice("method", method, tuple(METHODS))
        return METHODS[method]
    usable = not isinstance(method, type) and callable(getattr(method, "apply", None)) and hasattr(method, "needs")
    _require(
        usable,
        f"method: given {method!r}",
        f"a name ({', '.join(METHODS)}) or a method object",
        "pass Gear(...) or Grpo()",
    )
    return method


def _check_tensors(signal, entropy, advantages, cu_seqlens, mask, turn_ids) -> int | None:
    """Checks types, dtypes, devices and shapes without reading values; returns T, or None where no [T] tensor is given."""
    integers = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    _check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32")
    _require(cu_seqlens.numel() > 0, "cu_seqlens: given 0 elements", "[B + 1]", "pass [0] for an empty batch")
    _check_tensor("advantages", advantages, None, "floating", cu_seqlens.device)
    batch = cu_seqlens.numel() - 1
    _require(
        advantages.numel() == batch,
        f"advantages: given {advantages.numel()}",
        f"{batch}, one per sequence of cu_seqlens",
        "pass one per trajectory",
    )
    total = None
    rows = {"signal": signal, "entropy": entropy, "mask": mask, "turn_ids": turn_ids}
    kinds = {"mask": ((torch.bool,), "bool"), "turn_ids": (integers, "integer")}
    for name, x in rows.items():
        if x is None:
            continue
        _check_tensor(name, x, *kinds.get(name, (None, "floating")), cu_seqlens.device)
        total = x.numel() if total is None else total
        _require(x.numel() == total, f"{name}: given {x.numel()} tokens", f"{total} as in the other [T] inputs", "pack all alike")
    return total


def _check_tensor(name: str, x: object, dtypes: tuple | None, kind: str, device: torch.device | None = None) -> None:
    _require(isinstance(x, torch.Tensor), f"{name}: given {type(x).__name__}", f"a 1-D {kind} tensor", "pass a tensor")
    fits = x.dtype.is_floating_point if dtypes is None else x.dtype in dtypes
    _require(fits, f"{name}: given dtype {x.dtype}", kind, "convert it")
    _require(x.dim() == 1, f"{name}: given shape {tuple(x.shape)}", "one packed dimension", "flatten it")
    same = device is None or x.device == device
    _require(same, f"{name}: given on {x.device}", f"on {device} like cu_seqlens", "move it")


def _check_bounds(bounds: list[int], total: int) -> None:
    _require(bounds[0] == 0, f"cu_seqlens: given {bounds[0]} first", "0", "prepend 0 to the running sum of lengths")
    for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        _require(start <= end, f"cu_seqlens: given {start} then {end} at sequence {b}", "rising offsets", "sum the lengths")
    _require(bounds[-1] == total, f"cu_seqlens: given {bounds[-1]} last", f"T = {total}", "cover every packed token, padding too")


def _check_nan(index: torch.Tensor, tokens: PolicyTokens, advantages: torch.Tensor, bounds: list[int]) -> None:
    for name, x in (("signal", tokens.signal), ("entropy", tokens.entropy)):
        bad = x.isnan()
        if bad.any():
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
    _require(not bad, f"advantages: given NaN at sequence {bad[:1]}", "numbers", "check the rewards")
