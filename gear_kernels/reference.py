"""The only statement of the mathematics: plain torch, any floating dtype (float64 in tests). Back ends are tested against it."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

# --- statistics -------------------------------------------------------------------------------------------------------
# A row's statistics come from sums over its vocabulary that can be taken tile by tile: `sweep` sums one tile, `merge` joins
# disjoint tiles (or vocabulary shards), `finish` makes the statistics. With x = (s - max s) / T, y = (t - max t) / T and
# Z = sum e^x these are sums of e^x, e^x x and e^x (x - y); the divergence to the mixture needs Z first, so a second sweep.

LOWEST = -1e30  # the least (z - max) / T: 0 * x must be 0 in value and gradient, also for a mask of finfo.min
FARTHEST = 80.0  # log p - log q is cut there inside the mixture: e^80 is finite in float32, and e^-80 changes no sum
STAT_NAMES = ("logprobs", "teacher_logprobs", "entropy", "teacher_entropy", "reverse_kl", "forward_kl", "jsd")
GRADIENT_NAMES = ("logprobs", "entropy", "reverse_kl", "forward_kl", "jsd")  # what a gradient can come through
# The columns of `sums`. max: largest logit, 0 while all are -inf; z: sum e^x; first: sum e^x x; cross: sum e^x (x - y); target:
# the target's logit, 0 in tiles without it; outside: above 0 where a logit is finite and the other head's -inf.
SUM_NAMES = (
    *("max", "z", "first", "cross", "teacher_max", "teacher_z", "teacher_first", "teacher_cross"),
    *("target", "teacher_target", "outside", "teacher_outside"),
)
# The columns of `state`: all that the backward needs beside the logits. mixture_kl: KL(student || mixture).
STATE_NAMES = ("max", "log_z", "teacher_max", "teacher_log_z", "entropy", "reverse_kl", "forward_kl", "logprobs", "mixture_kl")


class Rows(NamedTuple):
    """What a tile needs per row beside the logits: targets int64 [n] or None (whole-vocabulary ids), 1 / temperature [n]."""

    targets: torch.Tensor | None
    inv_temperature: torch.Tensor
    ignore_index: int

    def part(self, rows: slice) -> Rows:
        targets = None if self.targets is None else self.targets[rows]
        return self._replace(targets=targets, inv_temperature=self.inv_temperature[rows])

    def keep(self) -> torch.Tensor:
        """bool [n]: rows that are not ignored."""
        if self.targets is None:
            return torch.ones_like(self.inv_temperature, dtype=torch.bool)
        return self.targets != self.ignore_index


class _Relative(NamedTuple):
    """A tile of one head relative to `top`: x = (z - top) / T, 0 where z is -inf (`null`); e = exp(x), 0 there."""

    z: torch.Tensor
    top: torch.Tensor
    null: torch.Tensor
    x: torch.Tensor
    e: torch.Tensor


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


def token_stats(student, teacher, rows: Rows, stats, jsd_beta: float = 0.5) -> dict[str, torch.Tensor]:
    """The statistics of whole rows [N, V], [N] each, by name; differentiable in the student's logits, never in the teacher's.

    Logits of float16/bfloat16 are computed in float32, float32 and float64 in their own dtype.
    """
    keep = rows.keep()
    s = _relative(student, rows)
    t = None if teacher is None else _relative(teacher.detach(), rows)
    state = finish(_sums(s, t, rows, 0), rows)
    if "jsd" in stats:
        mixture = _mixture(s, state["log_z"], t, state["teacher_log_z"], jsd_beta)
        state["jsd"] = jsd(mixture.sum(-2), jsd_beta)
    return {name: torch.where(keep, state[name], 0) for name in stats}


def _relative(logits: torch.Tensor, rows: Rows, top: torch.Tensor | None = None) -> _Relative:
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    z = torch.where(rows.keep()[:, None], z, 0)  # an ignored row may hold anything: not even 0 * NaN may reach its gradient
    null = z == -torch.inf
    if top is None:
        top = z.detach().amax(-1)
        top = torch.where(top == -torch.inf, 0, top)
    shift = top.to(z.dtype)[:, None]
    x = (torch.where(null, shift, z) - shift) * rows.inv_temperature.to(z.dtype)[:, None]  # under a null exp' must stay finite
    x = x.clamp_min(LOWEST)
    return _Relative(z, top, null, x, torch.exp(x).masked_fill(null, 0))


def sweep(student, teacher, rows: Rows, first: int = 0) -> torch.Tensor:
    """Logits [n, c] of the columns first, first + 1, ... -> their sums [n, 12]; teacher columns are 0 without a teacher."""
    return _sums(_relative(student, rows), None if teacher is None else _relative(teacher.detach(), rows), rows, first)


def _sums(s: _Relative, t: _Relative | None, rows: Rows, first: int) -> torch.Tensor:
    zero = torch.zeros_like(s.top)
    target, teacher_target = (zero if h is None else _target_logit(h.z, rows, first) for h in (s, t))
    if t is None:
        return torch.stack([*_moments(s, zero[:, None]), *[zero] * 4, target, *[zero] * 3], -1)
    difference = (s.x - t.x).masked_fill(s.null | t.null, 0)
    outside, teacher_outside = ((q.null & ~p.null).any(-1).to(s.top.dtype) for p, q in ((s, t), (t, s)))
    return torch.stack(
        [*_moments(s, difference), *_moments(t, -difference), target, teacher_target, outside, teacher_outside], -1
    )


def _moments(p: _Relative, difference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return p.top, p.e.sum(-1), (p.e * p.x).sum(-1), (p.e * difference).sum(-1)


def _target_logit(z: torch.Tensor, rows: Rows, first: int) -> torch.Tensor:
    if rows.targets is None:
        return torch.zeros_like(z[:, 0])
    at = rows.targets - first
    inside = (at >= 0) & (at < z.shape[-1]) & rows.keep()
    return torch.where(inside, z.gather(-1, torch.where(inside, at, 0)[:, None])[:, 0], 0)


def merge(sums: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Sums [K, n, 12] over disjoint columns -> [n, 12] over all of them."""
    inv_t = rows.inv_temperature.to(sums.dtype)
    heads = [sums[..., i : i + 4].unbind(-1) for i in (0, 4)]
    tops = [torch.where(z == 0, -torch.inf, top).amax(0) for top, z, _, _ in heads]
    tops = [torch.where(top == -torch.inf, 0, top) for top in tops]
    moved = [torch.where(z == 0, 0, (new - top) * inv_t) for new, (top, z, _, _) in zip(tops, heads, strict=True)]
    out = []
    for new, by, other, (_, z, first, cross) in zip(tops, moved, reversed(moved), heads, strict=True):
        r = torch.exp(-by)
        out += [new, (r * z).sum(0), (r * (first - z * by)).sum(0), (r * (cross - z * (by - other))).sum(0)]
    return torch.cat([torch.stack(out, -1), sums[..., 8:].sum(0)], -1)


def finish(sums: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
    """Sums [n, 12] over the whole vocabulary -> every statistic but jsd, and the rest of STATE_NAMES but mixture_kl, [n] each.

    A row of nothing but -inf has no distribution: NaN. KL(p || q) is +inf where q is -inf under a finite p, without a gradient.
    """
    s, inv_t = dict(zip(SUM_NAMES, sums.unbind(-1), strict=True)), rows.inv_temperature.to(sums.dtype)
    log_z, log_w = (torch.where(s[z] == 0, torch.nan, s[z]).log() for z in ("z", "teacher_z"))
    out = {"max": s["max"], "log_z": log_z, "teacher_max": s["teacher_max"], "teacher_log_z": log_w}
    out["logprobs"] = _logprob(s["target"], s["max"], log_z, inv_t)
    out["teacher_logprobs"] = _logprob(s["teacher_target"], s["teacher_max"], log_w, inv_t)
    out["entropy"] = _not_negative(log_z - s["first"] / s["z"])
    out["teacher_entropy"] = _not_negative(log_w - s["teacher_first"] / s["teacher_z"])
    for name, cross, z, p, q, outside in (
        ("reverse_kl", s["cross"], s["z"], log_z, log_w, s["outside"]),
        ("forward_kl", s["teacher_cross"], s["teacher_z"], log_w, log_z, s["teacher_outside"]),
    ):
        kl = _not_negative(cross / z - p + q)
        out[name] = torch.where((outside > 0) & ~(p.isnan() | q.isnan()), torch.inf, kl)
    return out


def _logprob(target, top, log_z, inv_t):
    """A target at -inf has log-prob -inf and passes no gradient."""
    impossible = target == -torch.inf
    value = (torch.where(impossible, 0, target) - top) * inv_t - log_z
    return torch.where(impossible, torch.where(log_z.isnan(), torch.nan, -torch.inf), value)


def mixture_sweep(student, teacher, rows: Rows, state: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    """A tile's share of KL(S || M) and KL(T || M), M = beta T + (1 - beta) S: [n, 2]; shares of disjoint tiles add."""
    s, t = _relative(student, rows, state["max"]), _relative(teacher, rows, state["teacher_max"])
    return _mixture(s, state["log_z"], t, state["teacher_log_z"], beta).sum(-2)


def _mixture(s: _Relative, log_z, t: _Relative, log_w, beta: float) -> torch.Tensor:
    log_p, log_q = s.x - log_z[:, None].to(s.x.dtype), t.x - log_w[:, None].to(s.x.dtype)
    from_s, from_t = _log_ratios(s, t, log_q - log_p, beta)
    return torch.stack([_prob(log_p, s.null) * from_s, _prob(log_q, t.null) * from_t], -1)


def _prob(log_p: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    """0 where the logit is -inf, but NaN throughout a row of nothing else."""
    return torch.where(null & ~log_p.isnan(), 0, log_p.exp())


def _log_ratios(s: _Relative, t: _Relative, d: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log p/m and log q/m from d = log q - log p."""
    d = torch.where(s.null, FARTHEST, torch.where(t.null, -FARTHEST, d)).clamp(-FARTHEST, FARTHEST)
    return -torch.log(1 - beta + beta * d.exp()), -torch.log(beta + (1 - beta) * (-d).exp())


def jsd(mixture: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(T || M) + (1 - beta) KL(S || M) (generalised Jensen-Shannon divergence, arXiv 2306.13649), from [n, 2]."""
    from_s, from_t = _not_negative(mixture).unbind(-1)
    return beta * from_t + (1 - beta) * from_s


def gradient(
    student, teacher, rows: Rows, state: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], first: int, beta: float
):
    """d(sum of grads * statistics) / d(student logits) of a tile [n, c]: what autograd makes of `token_stats`, tile by tile.

    dz_v = [gl (1[v = y] - p) - gH p (log p + H) + gK p (log p/q - KL) + gF (p - q) + gJ (1 - beta) p (log p/m - KL(S||M))] / T.
    state, grads: [n] each, by name; an output that is infinite, and an ignored row, passes none.
    """
    keep, s = rows.keep(), _relative(student, rows, state["max"])
    finite = {name: keep & ~state[name].isinf() if name in state else keep for name in grads}
    g = {name: torch.where(finite[name], value, 0)[:, None] for name, value in grads.items()}
    of = {name: value[:, None] for name, value in state.items()}
    log_p = s.x - of["log_z"]
    p = _prob(log_p, s.null)
    dz = torch.zeros_like(p)
    if "logprobs" in g:
        hit = torch.arange(first, first + p.shape[-1], device=p.device) == rows.targets[:, None]
        dz += g["logprobs"] * (hit.to(p.dtype) - p)
    if "entropy" in g:
        dz -= g["entropy"] * p * (log_p + of["entropy"])
    if teacher is not None:
        t = _relative(teacher, rows, state["teacher_max"])
        log_q = t.x - of["teacher_log_z"]
        if "reverse_kl" in g:
            dz += g["reverse_kl"] * p * ((log_p - log_q) - torch.where(g["reverse_kl"] == 0, 0, of["reverse_kl"]))
        if "forward_kl" in g:
            dz += g["forward_kl"] * (p - _prob(log_q, t.null))
        if "jsd" in g:
            from_s, _ = _log_ratios(s, t, log_q - log_p, beta)
            dz += g["jsd"] * (1 - beta) * p * (from_s - of["mixture_kl"])
    return dz * rows.inv_temperature.to(p.dtype)[:, None]


def _not_negative(value: torch.Tensor) -> torch.Tensor:
    return value + (-value).clamp_min(0).detach()  # rounding below 0 is lifted to 0; the gradient stays the formula's


# --- credit -----------------------------------------------------------------------------------------------------------
# GEAR, arXiv 2605.11853, Eq. 2-5 and Algorithm 1. Everything here sees the policy tokens of ONE trajectory, compacted
# (observation tokens are gone before these functions are called, so "next" always means the next policy token), except
# the last two, which are elementwise or per-trajectory reductions over the whole pack. "[ours]" marks what the paper leaves open.


# Nats, of a trajectory's scale. The demo's policy with hidden states in bfloat16 in place of float32: the largest error of a
# trajectory's signals is 8e-4 (median of 64), so a smaller scale is noise.
SILENT = 1e-3


class Segment(NamedTuple):
    """Policy tokens `first` to `last`, both included, of one trajectory."""

    first: int
    last: int
    closed: bool  # False: it reached the last policy token and no rule ended it there


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


def top_share(x: torch.Tensor, share: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The least of the ceil(share n) largest of x [n] where mask is True, 0-d; at least one counts."""
    count = _count(x, mask)
    kept = (share * count.double()).ceil().long().clamp(min=1)
    return _order_statistics(x, mask, (count - kept,))[0]


def _count(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return torch.full((), x.numel(), device=x.device) if mask is None else mask.sum()


def _order_statistics(x: torch.Tensor, mask: torch.Tensor | None, places: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The values of x [n], where mask is True, at these places (0-d int64) of their ascending order; 0 of nothing.

    A sort and no look at a value; on a CPU, where looks cost nothing, a selection (13 ms a million instead of 90).
    """
    places = [place.clamp(min=0) for place in places]
    if x.device.type != "cpu":
        ordered = (x if mask is None else x.masked_fill(~mask, torch.inf)).sort().values
        return [ordered.index_select(0, place.view(1))[0] if ordered.numel() else ordered.new_zeros(()) for place in places]
    chosen = x if mask is None else x[mask]
    return [chosen.kthvalue(int(place) + 1).values if chosen.numel() else chosen.new_zeros(()) for place in places]


def entropy_limits(entropy: torch.Tensor, ratio: float, floor: float = 0.0) -> torch.Tensor:
    """Per token [n] (nats): the entropy above which a segment opened there ends. The floor is [ours]; 0 is the literal rule."""
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
    """kl_only: each onset opens a segment that lasts to just before the next onset."""
    n = len(onset)
    starts = [t for t in range(n) if onset[t]]
    ends = [min(following - 1, last[t]) for t, following in zip(starts, [*starts[1:], n], strict=False)]
    return [Segment(t, end, end < n - 1) for t, end in zip(starts, ends, strict=True)]


def turn_segments(turn_ids: list[int]) -> list[Segment]:
    """A segment per turn (a run of equal turn ids); they cover the trajectory."""
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


def credit_weight(credit: torch.Tensor, advantage: torch.Tensor, alpha: float) -> torch.Tensor:
    """Eq. 4-5: w = 0.5 + (0.5 - c) sign(A), W = alpha w + 1 - alpha / 2. Elementwise, any shape."""
    w = 0.5 + (0.5 - credit) * advantage.sign()
    return 1 + alpha * (w - 0.5)  # the same line as alpha w + (1 - alpha / 2), but exactly 1 for A = 0 in any dtype


def renormalise(weights: torch.Tensor, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Weights [n] divided by their mean over each trajectory; sequence [n] int64 names it, lengths [B] counts its tokens."""
    total = torch.zeros(lengths.numel(), dtype=torch.float64, device=weights.device).index_add_(0, sequence, weights.double())
    return (weights / (total / lengths)[sequence]).to(weights.dtype)


def bounded_ratio(signal: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """exp(sign(A) delta) clipped to 1 +- clip, with delta = -signal the teacher's log-prob minus the student's. Elementwise."""
    return torch.exp(-bounded(signal) * advantage.sign()).clamp(1 - clip, 1 + clip)


def least_ahead(x: torch.Tensor, sequence: torch.Tensor, ahead: int) -> torch.Tensor:
    """The least of x[t], ..., x[t + ahead] within each trajectory; x [n], sequence [n] names the trajectory."""
    least = x.clone()
    for k in range(1, min(ahead, x.numel() - 1) + 1):
        same = sequence[k:] == sequence[:-k]
        least[:-k] = torch.where(same, torch.minimum(least[:-k], x[k:]), least[:-k])
    return least


# Turns over the whole pack: sequence [n] int64 names the trajectory of each policy token, turn_ids [n] its turn; a turn is a run
# of equal ids within a trajectory. No value is looked at by the host, so these run on a GPU as they stand.


def turn_onsets(turn_ids: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Bool [n]: the first token of each turn."""
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = (turn_ids[1:] != turn_ids[:-1]) | (sequence[1:] != sequence[:-1])
    return first


def turn_numbers(onsets: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """int32 [n]: the number of each token's turn, from 0 within its trajectory."""
    number = onsets.cumsum(0) - 1
    starts = torch.ones_like(onsets)
    starts[1:] = sequence[1:] != sequence[:-1]
    before = torch.where(starts, number, 0).cummax(0).values  # numbers only rise, so the latest start's is the largest
    return (number - before).int()


def turn_returns(rewards: torch.Tensor, onsets: torch.Tensor, sequence: torch.Tensor, gamma: float) -> torch.Tensor:
    """float64 [n]: each token's turn's reward plus gamma times the return of the trajectory's next turn (GiGPO, Eq. 5)."""
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
    """float64 [n]: x minus the mean of its group, over (standard deviation + eps) with `std`; exactly 0 where a group agrees.

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
