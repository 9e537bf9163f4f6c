"""The mathematics of credit: how a signal is normalised, cut into segments and turned into weights, for every method.

GEAR is arXiv 2605.11853, Eq. 2-5 and Algorithm 1. Where one TRAJECTORY is spoken of, functions see its policy tokens alone,
compacted (observation tokens are gone before, so "next" always means the next policy token); the others are elementwise, or take
a whole pack with each token's trajectory in `sequence`. "[ours]" marks what a paper leaves open. The compiled scans
(csrc/scan.cpp, triton/scan.py) are tested against this file.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

# --- the signal of one trajectory ---------------------------------------------------------------------------------------

# Nats, of a trajectory's scale. The demo's policy with hidden states in bfloat16 in place of float32: the largest error of a
# trajectory's signals is 8e-4 (median of 64), so a smaller scale is noise.
SILENT = 1e-3


def normalise(signal: torch.Tensor, normalizer: str, quantile: float = 0.95, floor: float = 0.0) -> tuple[torch.Tensor, bool]:
    """Signal [n] (nats) -> g [n] in [0, 1], same dtype, and whether the trajectory is silent.

    g = min(raw / max(scale, floor), 1). A constant or empty signal gives 0 everywhere (nothing to tell apart). By normalizer:
    relu_max: raw max(x, 0), scale its largest.  max: the same values, named for a signal that is never negative (the full KL).
    minmax: raw x - min, scale max - min, the paper's literal words.  abs_max: raw |x|, scale its largest.  quantile: raw
    max(x, 0), scale its q-quantile; where that is 0 (a sparse signal) the max takes its place.  none: x clipped into [0, 1], no
    scale, never silent. All but minmax are [ours]. Every one of them ends in [0, 1], so that the weight stays within
    1 +- alpha / 2. A floor (nats) above 0 is [ours]: g goes to 0 with the signal, and nothing jumps where the scale meets it.
    Silent: the scale is below the floor or below SILENT; a constant signal's is 0.
    """
    x = bounded(signal)  # an infinite KL becomes g = 1, not NaN
    if normalizer == "none":
        return (torch.zeros_like(x) if _constant(x) else x.clamp(0, 1)), False
    if _constant(x):
        return torch.zeros_like(x), x.numel() > 0
    raw = x - x.min() if normalizer == "minmax" else x.abs() if normalizer == "abs_max" else x.clamp(min=0)
    scale = linear_quantile(raw, quantile) if normalizer == "quantile" else raw.max()
    scale = torch.where(scale > 0, scale, raw.max())
    g = (raw / scale.clamp(min=floor)).clamp(max=1) if scale > 0 else torch.zeros_like(x)
    return g, bool(scale < max(floor, SILENT))


def _constant(x: torch.Tensor) -> bool:
    return x.numel() == 0 or bool((x == x[0]).all())


def bounded(x: torch.Tensor) -> torch.Tensor:
    """Infinite values (a KL where the teacher is at -inf) become finite ones far outside all others: products stay numbers."""
    big = torch.finfo(x.dtype).max / 4
    return x.clamp(-big, big)


def linear_quantile(x: torch.Tensor, q: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The q-quantile of x [n] where mask [n] is True, 0-d, interpolated linearly between the two nearest order statistics.

    Positions are float64: float32 ones would blur from a few 10,000 tokens on. No element at all gives 0.
    """
    last = _count(x, mask) - 1
    position = q * last.double()
    low = position.long()
    a, b = _order_statistics(x, mask, (low, torch.minimum(low + 1, last)))
    return a + (position - low).to(x.dtype) * (b - a)


def _count(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return torch.full((), x.numel(), device=x.device) if mask is None else mask.sum()


def _order_statistics(x: torch.Tensor, mask: torch.Tensor | None, places: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The values of x [n], where mask is True, at these places (0-d int64) of their ascending order; 0 of nothing.

    A sort and no look at a value; on a CPU, where looks cost nothing, a selection (13 ms a million instead of 90).
    """
    ranks = [place.clamp(min=0) for place in places]
    if x.device.type != "cpu":
        ordered = (x if mask is None else x.masked_fill(~mask, torch.inf)).sort().values
        return [ordered.index_select(0, place.view(1))[0] if ordered.numel() else ordered.new_zeros(()) for place in ranks]
    chosen = x if mask is None else x[mask]
    return [chosen.kthvalue(int(place) + 1).values if chosen.numel() else chosen.new_zeros(()) for place in ranks]


# --- its segments -------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """A segment: policy tokens `first` to `last`, both included, of one trajectory."""

    first: int
    last: int
    closed: bool  # False: it reached the last policy token and no rule ended it there


def entropy_limits(entropy: torch.Tensor, ratio: float, floor: float = 0.0) -> torch.Tensor:
    """The entropy above which a segment opened at each token ends, [n] nats. The floor is [ours]; 0 is the literal rule."""
    return ratio * entropy.clamp(min=floor)


def window_mean(x: torch.Tensor, sequence: torch.Tensor, window: int) -> torch.Tensor:
    """Mean of x [n] over a trajectory's last `window` tokens, the token itself included; fewer at its start [ours].

    sequence [n] names the trajectory of each token, so a whole pack may be given.
    """
    total, count = x.clone(), torch.ones_like(x)
    for shift in range(1, min(window, x.numel())):  # `window` shifted adds, not a cumulative sum: no cancellation
        same = sequence[shift:] == sequence[:-shift]
        total[shift:] += torch.where(same, x[:-shift], 0)
        count[shift:] += same
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
    """Segments of kl_only: each onset opens a segment that lasts to just before the next onset."""
    n = len(onset)
    starts = [t for t in range(n) if onset[t]]
    ends = [min(following - 1, last[t]) for t, following in zip(starts, [*starts[1:], n], strict=False)]
    return [Segment(t, end, end < n - 1) for t, end in zip(starts, ends, strict=True)]


def turn_segments(turn_ids: list[int]) -> list[Segment]:
    """Segments of turns, one each (a run of equal turn ids); they cover the trajectory."""
    starts = [t for t in range(len(turn_ids)) if t == 0 or turn_ids[t] != turn_ids[t - 1]]
    return [Segment(a, b - 1, True) for a, b in zip(starts, [*starts[1:], len(turn_ids)], strict=False)]


def stable_segments(onset: list[bool], entropy: list[float], factor: float) -> list[Segment]:
    """SGCD [ours]: an onset opens a segment that goes on while the entropy stays within `factor` of the onset's, up and down."""
    segments, t, n = [], 0, len(onset)
    while t < n:
        if not onset[t]:
            t += 1
            continue
        end = t + 1
        while end < n and entropy[t] <= factor * entropy[end] and entropy[end] <= factor * entropy[t]:
            end += 1
        segments.append(Segment(t, end - 1, end < n))
        t = end
    return segments


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


# --- weights ------------------------------------------------------------------------------------------------------------
# A rule for each method, elementwise over a pack's policy tokens. Their signal is the sampled log-ratio, k1: signal = lpS - lpT,
# so the papers' delta is -signal; GEAR's and SGCD's may be the full KL.


def gear_weight(credit: torch.Tensor, advantage: torch.Tensor, alpha: float) -> torch.Tensor:
    """Eq. 4-5: w = 0.5 + (0.5 - c) sign(A), W = alpha w + 1 - alpha / 2. Elementwise, any shape."""
    w = 0.5 + (0.5 - credit) * advantage.sign()
    return 1 + alpha * (w - 0.5)  # the same line as alpha w + (1 - alpha / 2), but exactly 1 for A = 0 in any dtype


def renormalise(weights: torch.Tensor, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Weights [n] divided by their mean over each trajectory; sequence [n] int64 names it, lengths [B] counts its tokens."""
    return (weights / _means(weights, sequence, lengths)).to(weights.dtype)


def tilt(weights: torch.Tensor, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Control [ours]: the mean of weights [n] over each trajectory, on all of its tokens; the rest as in `renormalise`."""
    return _means(weights, sequence, lengths).to(weights.dtype)


def _means(weights: torch.Tensor, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean weight of each token's trajectory, float64 [n]."""
    total = torch.zeros(lengths.numel(), dtype=torch.float64, device=weights.device).index_add_(0, sequence, weights.double())
    return (total / lengths)[sequence]


def bounded_ratio(signal: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """The ratio exp(sign(A) delta) clipped to 1 +- clip, delta = -signal: the teacher's log-prob minus the student's."""
    return torch.exp(-bounded(signal) * advantage.sign()).clamp(1 - clip, 1 + clip)


def mixed_ratio(ratio: torch.Tensor, mix: float) -> torch.Tensor:
    """RLSD, arXiv 2604.03128: W = 1 - mix + mix * ratio, of the `bounded_ratio`."""
    return 1 - mix + mix * ratio


def entropy_gate(entropy: torch.Tensor, level: torch.Tensor, slope: float, floor: float) -> torch.Tensor:
    """EGRSD, arXiv 2605.13255: clip(1 - slope * H / level, floor, 1), which multiplies the `bounded_ratio`."""
    return (1 - slope * (entropy / level)).clamp(floor, 1)


def largest_or_one(entropy: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """EGRSD's level: the largest entropy [n] of a pack where mask [n] is True, at least 1 nat, 0-d."""
    if not entropy.numel():
        return entropy.new_ones(())
    return (entropy if mask is None else entropy.masked_fill(~mask, 0)).amax().clamp(min=1)


def least_ahead(x: torch.Tensor, sequence: torch.Tensor, ahead: int) -> torch.Tensor:
    """The least of x[t], ..., x[t + ahead] within each trajectory; x [n], sequence [n] names the trajectory."""
    least = x.clone()
    for k in range(1, min(ahead, x.numel() - 1) + 1):
        same = sequence[k:] == sequence[:-k]
        least[:-k] = torch.where(same, torch.minimum(least[:-k], x[k:]), least[:-k])
    return least


def share(divergence: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """SC-GRPO, arXiv 2606.18810: W = D / (D + level), D = KL(teacher || student); an infinite D gives 1, not NaN."""
    d = bounded(divergence)
    return d / (d + level)


def share_level(divergence: torch.Tensor, quantile: float, least: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """SC-GRPO's level: the pack's quantile of D [n] where mask is True [ours: of the pack], at least `least` nats, 0-d."""
    return linear_quantile(bounded(divergence), quantile, mask).clamp(min=least)


def clipped_delta(signal: torch.Tensor, bound: float) -> torch.Tensor:
    """AMR-SD's I = clip(delta, +-bound), nats."""
    return (-signal).clamp(-bound, bound)


def margin_weight(delta: torch.Tensor, advantage: torch.Tensor, up: float, down: float, margin: float) -> torch.Tensor:
    """AMR-SD, arXiv 2605.18529: W = 1 + up max(0, I - margin) for A >= 0, 1 + down max(0, -I - margin) for A < 0."""
    rise, fall = up * (delta - margin).clamp(min=0), down * (-delta - margin).clamp(min=0)
    return 1 + torch.where(advantage >= 0, rise, fall)


def at_least(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """High-entropy tokens, arXiv 2506.01939: W = 1 where x >= level, else 0."""
    return (x >= level).to(x.dtype)


def top_share(x: torch.Tensor, share: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The least of the ceil(share n) largest of x [n] where mask is True, 0-d; at least one counts."""
    count = _count(x, mask)
    kept = (share * count.double()).ceil().long().clamp(min=1)
    return _order_statistics(x, mask, (count - kept,))[0]


def lift(saliency: torch.Tensor, gamma: float, cap: float) -> torch.Tensor:
    """SGCD, arXiv 2606.12634: W = clip(1 + gamma s, 1, cap), s the segment's first g inside segments and 0 outside [ours]."""
    return (1 + gamma * saliency).clamp(1, cap)


# --- turns --------------------------------------------------------------------------------------------------------------
# Over the whole pack: sequence [n] int64 names the trajectory of each policy token, turn_ids [n] its turn; a turn is a run
# of equal ids within a trajectory. No value is looked at by the host, so these run on a GPU as they stand.


def turn_onsets(turn_ids: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """The first token of each turn, bool [n]."""
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = (turn_ids[1:] != turn_ids[:-1]) | (sequence[1:] != sequence[:-1])
    return first


def turn_numbers(onsets: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """The number of each token's turn, int32 [n], from 0 within its trajectory."""
    number = onsets.cumsum(0) - 1
    starts = torch.ones_like(onsets)
    starts[1:] = sequence[1:] != sequence[:-1]
    before = torch.where(starts, number, 0).cummax(0).values  # numbers only rise, so the latest start's is the largest
    return (number - before).int()


def turn_returns(rewards: torch.Tensor, onsets: torch.Tensor, sequence: torch.Tensor, gamma: float) -> torch.Tensor:
    """The return of each token's turn, float64 [n]: its reward plus gamma times the next turn's return (GiGPO, Eq. 5)."""
    n = rewards.numel()
    last = torch.ones_like(onsets)
    last[:-1] = onsets[1:]
    value = torch.where(last, rewards.double(), 0)
    factor = torch.where(last, gamma, torch.ones_like(value))
    factor[:-1].masked_fill_(sequence[1:] != sequence[:-1], 0)
    step = 1
    while step < n:  # value_t + factor_t * value_{t+1}, over spans that double: log2(n) passes instead of a loop over tokens
        value[:-step], factor[:-step] = value[:-step] + factor[:-step] * value[step:], factor[:-step] * factor[step:]
        factor[-step:] = 0
        step *= 2
    return value


def group_relative(
    x: torch.Tensor, counted: torch.Tensor, keys: tuple[torch.Tensor, ...], std: bool, eps: float = 1e-6
) -> torch.Tensor:
    """The advantage within groups, float64 [n]: x minus the mean, with `std` over (deviation + eps); exactly 0 where one agrees.

    A group is the tokens whose keys [n] (integers) all agree; mean and deviation are those of its `counted` tokens (bool [n]).
    """
    order = torch.arange(x.numel(), device=x.device)
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    starts = torch.zeros_like(counted)
    for key in keys:
        starts[1:] |= key[order][1:] != key[order][:-1]
    group = torch.empty_like(order)
    group[order] = starts.cumsum(0)
    x, weight = x.double(), counted.double()
    zeros = torch.zeros_like(x)
    count = zeros.index_add(0, group, weight)
    centred = x - (zeros.index_add(0, group, weight * x) / count.clamp(min=1))[group]
    low = zeros.scatter_reduce(0, group, x, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, x, "amax", include_self=False)
    if std:
        variance = zeros.index_add(0, group, weight * centred.square()) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[group]
    return torch.where((low == high)[group], 0, centred)


def turn_part(relative: torch.Tensor, weight: float, advantage: torch.Tensor) -> torch.Tensor:
    """MT-GRPO and GiGPO: A + this part [n], weight times what a turn has over its like (`group_relative`), in A's dtype."""
    return (weight * relative).to(advantage.dtype)


# --- diagnostics --------------------------------------------------------------------------------------------------------

# The columns of the tallies [B, 11]: sums over a sequence's policy tokens but for silent, its 1 or 0; csrc/tables.h has them too.
TALLIES = ("tokens", "above", "inside", "segments", "unclosed", "signal", "positive", "up", "negative", "down", "silent")
# The tally summed, and what it is the mean over. A mean over nothing is 0; of the last two, the weights, 1.
DIAGNOSTICS = {
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


def diagnostics(tally: torch.Tensor, trajectories: torch.Tensor) -> dict[str, torch.Tensor]:
    """The diagnostics, 0-d float32 each, from tallies summed over sequences [11] and the trajectories with a policy token."""
    t = dict(zip(TALLIES, tally, strict=True)) | {"trajectories": trajectories}
    sums = torch.stack([t[name] for name, _ in DIAGNOSTICS.values()])
    counts = torch.stack([t[name] for _, name in DIAGNOSTICS.values()])
    means = (sums / counts.clamp(min=1)).float()
    means[-2:] += counts[-2:] == 0  # the weight that changes nothing: a NaN would spoil the logs
    return dict(zip(DIAGNOSTICS, means, strict=True))
