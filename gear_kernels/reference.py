"""The only statement of the mathematics: plain torch, any floating dtype (float64 in tests). Back ends are tested against it."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

# --- statistics -------------------------------------------------------------------------------------------------------

LOWEST = -1e30  # the least (z - max) / T: 0 * x must be 0 in value and gradient, also for a mask of finfo.min
STAT_NAMES = ("logprobs", "teacher_logprobs", "entropy", "teacher_entropy", "reverse_kl", "forward_kl")


class _Scaled(NamedTuple):
    """One head's rows relative to their maximum: x = (z - max) / T, 0 where z is -inf (`null`); e = exp(x), 0 there."""

    x: torch.Tensor
    e: torch.Tensor
    null: torch.Tensor
    z: torch.Tensor  # sum of e: [N]; NaN where every logit is -inf
    log_z: torch.Tensor


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, bias=None, softcap=None, scale=None, valid_vocab=None):
    """[..., D] -> [..., V]: softcap * tanh((h W' + bias) * scale / softcap); columns from `valid_vocab` on are -inf."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid_vocab is not None:
        cut = torch.arange(logits.shape[-1], device=logits.device) >= valid_vocab
        logits = logits.masked_fill(cut, -torch.inf)
    return logits


def token_stats(student_logits, teacher_logits, targets, *, inv_temperature, ignore_index, stats) -> dict[str, torch.Tensor]:
    """The six statistics of DESIGN, [N] each, by name; differentiable in the student's logits, never in the teacher's.

    Logits [N, V] of float16/bfloat16 are computed in float32, float32 and float64 in their own dtype. `inv_temperature` [N].
    """
    keep = torch.ones(student_logits.shape[0], dtype=torch.bool, device=student_logits.device)
    if targets is not None:
        keep = targets != ignore_index
    student = _scaled(student_logits, keep, inv_temperature)
    teacher = None if teacher_logits is None else _scaled(teacher_logits.detach(), keep, inv_temperature)
    out = {name: _statistic(name, student, teacher, targets, keep) for name in stats}
    return {name: torch.where(keep, value, 0) for name, value in out.items()}


def _scaled(logits: torch.Tensor, keep: torch.Tensor, inv_temperature: torch.Tensor) -> _Scaled:
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    z = torch.where(keep[:, None], z, 0)  # an ignored row may hold anything: not even 0 * NaN may reach its gradient
    null = z == -torch.inf
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    x = (torch.where(null, top, z) - top) * inv_temperature.to(z.dtype)[:, None]  # top under a null: exp'(x) must stay finite
    x = x.clamp_min(LOWEST)
    e = torch.exp(x).masked_fill(null, 0)
    total = e.sum(-1)
    total = torch.where(null.all(-1), torch.nan, total)
    return _Scaled(x, e, null, total, total.log())


def _statistic(name: str, student: _Scaled, teacher: _Scaled | None, targets, keep) -> torch.Tensor:
    if name == "logprobs":
        return _logprob(student, targets, keep)
    if name == "teacher_logprobs":
        return _logprob(teacher, targets, keep)
    if name == "entropy":
        return _entropy(student)
    if name == "teacher_entropy":
        return _entropy(teacher)
    return _divergence(student, teacher) if name == "reverse_kl" else _divergence(teacher, student)


def _logprob(p: _Scaled, targets, keep) -> torch.Tensor:
    at = torch.where(keep, targets, 0)[:, None]
    x, null = p.x.gather(-1, at)[:, 0], p.null.gather(-1, at)[:, 0]
    return torch.where(null, torch.where(p.log_z.isnan(), torch.nan, -torch.inf), x - p.log_z)


def _entropy(p: _Scaled) -> torch.Tensor:
    return _not_negative(p.log_z - (p.e * p.x).sum(-1) / p.z)


def _divergence(p: _Scaled, q: _Scaled) -> torch.Tensor:
    """KL(p || q): +inf where q is -inf under a finite p, and no gradient there. The maxima's shifts cancel (see x)."""
    difference = (p.x - q.x).masked_fill(p.null | q.null, 0)
    kl = _not_negative((p.e * difference).sum(-1) / p.z - p.log_z + q.log_z)
    infinite = (q.null & ~p.null).any(-1) & ~(p.log_z.isnan() | q.log_z.isnan())
    return torch.where(infinite, torch.inf, kl)


def _not_negative(value: torch.Tensor) -> torch.Tensor:
    return value + (-value).clamp_min(0).detach()  # rounding below 0 is lifted to 0; the gradient stays the formula's


# --- credit -----------------------------------------------------------------------------------------------------------
# GEAR, arXiv 2605.11853, Eq. 2-5 and Algorithm 1. Everything here sees the policy tokens of ONE trajectory, compacted
# (observation tokens are gone before these functions are called, so "next" always means the next policy token), except
# the last two, which are elementwise or per-trajectory reductions over the whole pack. "[ours]" marks what the paper leaves open.


class Segment(NamedTuple):
    """Policy tokens `first` to `last`, both included, of one trajectory."""

    first: int
    last: int
    closed: bool  # False: it reached the last policy token and no rule ended it there


def normalise(signal: torch.Tensor, normalizer: str, quantile: float = 0.95) -> torch.Tensor:
    """Signal [n] (nats) -> g [n] in [0, 1], same dtype. A constant or empty signal gives 0 everywhere (nothing to tell apart).

    relu_max: max(x, 0) / max.  max: the same values, named for a signal that is never negative (the full KL).  minmax:
    (x - min) / (max - min), the paper's literal words.  abs_max: |x| / max |x|.  quantile: max(x, 0) / its q-quantile,
    clipped to 1; where that quantile is 0 (a sparse signal) the max takes its place.  none: x clipped into [0, 1].
    All but minmax are [ours]. Every one of them ends in [0, 1], so that the weight stays within 1 +- alpha / 2.
    """
    big = torch.finfo(signal.dtype).max / 4  # an infinite KL (teacher at -inf) becomes the largest finite one: g = 1, not NaN
    x = signal.clamp(-big, big)
    if x.numel() == 0 or bool((x == x[0]).all()):
        return torch.zeros_like(x)
    if normalizer == "minmax":
        return (x - x.min()) / (x.max() - x.min())
    if normalizer == "none":
        return x.clamp(0, 1)
    x = x.abs() if normalizer == "abs_max" else x.clamp(min=0)
    scale = linear_quantile(x, quantile) if normalizer == "quantile" else x.max()
    scale = torch.where(scale > 0, scale, x.max())
    return (x / scale).clamp(max=1) if scale > 0 else torch.zeros_like(x)


def linear_quantile(x: torch.Tensor, q: float) -> torch.Tensor:
    """The q-quantile of x [n], n >= 1, 0-d, interpolated linearly between the two nearest order statistics."""
    ordered = x.sort().values
    position = q * (x.numel() - 1)  # a Python float: float32 positions would blur from a few 10,000 tokens on
    low = int(position)
    high = min(low + 1, x.numel() - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def entropy_limits(entropy: torch.Tensor, ratio: float, floor: float = 0.0) -> torch.Tensor:
    """Per token [n] (nats): the entropy above which a segment opened there ends. The floor is [ours]; 0 is the literal rule."""
    return ratio * entropy.clamp(min=floor)


def window_mean(x: torch.Tensor, window: int) -> torch.Tensor:
    """Mean of x [n] over the last `window` tokens, the token itself included; fewer at the trajectory's start [ours]."""
    total, count = x.clone(), torch.ones_like(x)
    for shift in range(1, min(window, x.numel())):  # `window` shifted adds, not a cumulative sum: no cancellation
        total[shift:] += x[:-shift]
        count[shift:] += 1
    return total / count


def last_allowed(n: int, max_segment_len: int | None = None, turn_ids: list[int] | None = None) -> list[int]:
    """For each of n tokens, the last token that a segment opened there may reach: end of trajectory, of turn, or length cap."""
    last = [n - 1] * n
    if turn_ids is not None:
        for t in range(n - 2, -1, -1):
            last[t] = last[t + 1] if turn_ids[t] == turn_ids[t + 1] else t
    if max_segment_len is not None:
        last = [min(end, t + max_segment_len - 1) for t, end in enumerate(last)]
    return last


def entropy_segments(onset: list[bool], tested: list[float], limit: list[float], last: list[int]) -> list[Segment]:
    """Algorithm 1: an onset opens a segment; the first later token with tested > the onset's limit ends it and belongs to it.

    `tested` is the entropy, or its window mean for the entropy_window ablation; `onset` all True is entropy_only.
    """
    segments, t, n = [], 0, len(onset)
    while t < n:
        if not onset[t]:
            t += 1
            continue
        end, bound = t + 1, limit[t]
        while end <= last[t] and not tested[end] > bound:
            end += 1
        fired = end <= last[t]
        end = end if fired else last[t]
        segments.append(Segment(t, end, fired or end < n - 1))
        t = end + 1
    return segments


def trigger_segments(onset: list[bool], last: list[int]) -> list[Segment]:
    """kl_only: each onset opens a segment that lasts to just before the next onset."""
    n = len(onset)
    starts = [t for t in range(n) if onset[t]]
    ends = [min(following - 1, last[t]) for t, following in zip(starts, [*starts[1:], n], strict=False)]
    return [Segment(t, end, end < n - 1) for t, end in zip(starts, ends, strict=True)]


def turn_segments(turn_ids: list[int]) -> list[Segment]:
    """A segment per turn (a run of equal turn ids); they cover the trajectory."""
    starts = [t for t in range(len(turn_ids)) if t == 0 or turn_ids[t] != turn_ids[t - 1]]
    return [Segment(a, b - 1, True) for a, b in zip(starts, [*starts[1:], len(turn_ids)], strict=False)]


def fixed_segments(n: int, length: int) -> list[Segment]:
    """Control: segments of one length cover the trajectory; the last one may be shorter [ours]."""
    return [Segment(t, min(t + length, n) - 1, True) for t in range(0, n, length)]


def random_segments(lengths: list[int], n: int, rng: random.Random) -> list[Segment]:
    """Control: segments of these lengths, none overlapping, all orders and places among n tokens equally likely [ours]."""
    lengths = list(lengths)
    rng.shuffle(lengths)
    # Shrink each segment to one slot: a choice of slots is then a choice of places, and each place is met exactly once.
    slots = sorted(rng.sample(range(n - sum(lengths) + len(lengths)), len(lengths)))
    segments, grown = [], 0
    for slot, length in zip(slots, lengths, strict=True):
        segments.append(Segment(slot + grown, slot + grown + length - 1, True))
        grown += length - 1
    return segments


def credit_sources(segments: list[Segment], n: int) -> list[int]:
    """For each of n tokens the token whose g is its credit (Eq. 3): the first of its segment, or itself outside segments."""
    source = list(range(n))
    for first, last, _ in segments:
        source[first : last + 1] = [first] * (last + 1 - first)
    return source


def segment_numbers(segments: list[Segment], n: int) -> list[int]:
    """For each of n tokens the index of its segment, -1 outside segments."""
    numbers = [-1] * n
    for i, (first, last, _) in enumerate(segments):
        numbers[first : last + 1] = [i] * (last + 1 - first)
    return numbers


def credit_weight(credit: torch.Tensor, advantage: torch.Tensor, alpha: float) -> torch.Tensor:
    """Eq. 4-5: w = 0.5 + (0.5 - c) sign(A), W = alpha w + 1 - alpha / 2. Elementwise, any shape."""
    w = 0.5 + (0.5 - credit) * advantage.sign()
    return 1 + alpha * (w - 0.5)  # the same line as alpha w + (1 - alpha / 2), but exactly 1 for A = 0 in any dtype


def renormalise(weights: torch.Tensor, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Weights [n] divided by their mean over each trajectory; sequence [n] int64 names it, lengths [B] counts its tokens."""
    total = torch.zeros(lengths.numel(), dtype=torch.float64, device=weights.device).index_add_(0, sequence, weights.double())
    return (weights / (total / lengths)[sequence]).to(weights.dtype)
