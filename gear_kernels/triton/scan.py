"""The credit scan: a program takes one packed sequence through normalise, segment, weigh and the step's sums. One launch.

GEAR's rule jumps from an onset to the segment's end, so a program jumps too: within a block of tokens it finds the next onset and
then the first token that ends the segment, each by one reduction over the block, and carries an open segment into the next block.
A block costs two reductions for every segment in it (segments of two tokens: one reduction a token, the worst case) instead of a
step for every token. Blocks are read twice, once for the normaliser; the per-sequence quantile is a radix search over the bits of
the values, 11 counts (21 in float64) instead of a sort.

Computed in the dtype of the rows, float32 or float64, without fused multiply-adds: what decides (g above the threshold, entropy
above its limit) is bitwise reference/credit.py's. A rule's, normaliser's or segmenter's number is its place in rules.py's tables.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference.credit import DIAGNOSTICS, SILENT, TALLIES
from ..rules import NORMALIZERS, RULES, SCAN_SEGMENTERS, Rule, lower
from .candidates import TRIED, Config
from .stats import INTERPRETED

_constant = (lambda x: x) if INTERPRETED else tl.constexpr
_INTERPRETER = _constant(INTERPRETED)
fp64 = tl.float64  # the annotation of a kernel's float64 argument is this very word
_GEAR, _RATIO, _GATED_RATIO, _SHARE, _MARGIN, _AT_LEAST, _LIFT = (
    _constant([rule.name for rule in RULES].index(name))
    for name in ("gear", "ratio", "gated_ratio", "share", "margin", "at_least", "lift")
)
_RELU_MAX, _MINMAX, _ABS_MAX, _QUANTILE, _NONE = (
    _constant(NORMALIZERS.index(name)) for name in ("relu_max", "minmax", "abs_max", "quantile", "none")
)
_TOKEN, _KL_ONLY, _TURN, _WINDOW, _FIXED, _STABLE = (
    _constant(SCAN_SEGMENTERS.index(name)) for name in ("token", "kl_only", "turn", "entropy_window", "fixed", "stable")
)
_BIG32, _BIG64 = (_constant(torch.finfo(dtype).max / 4) for dtype in (torch.float32, torch.float64))
_TALLIES, _DIAGNOSTICS = _constant(len(TALLIES)), _constant(len(DIAGNOSTICS))
_SILENT = _constant(SILENT)
_N_TOKENS, _ABOVE, _INSIDE, _SEGMENTS, _UNCLOSED, _SIGNAL = (
    _constant(TALLIES.index(name)) for name in ("tokens", "above", "inside", "segments", "unclosed", "signal")
)
_POSITIVE, _UP, _NEGATIVE, _DOWN, _QUIET = (
    _constant(TALLIES.index(name)) for name in ("positive", "up", "negative", "down", "silent")
)


class ScanRows(NamedTuple):
    """Inputs; members that are None disappear at compile time. Floating rows share one dtype."""

    signal: Any  # [T]
    second: Any  # [T]; for entropy_window [2 T], its window means behind it
    advantages: Any  # [B]
    mask: Any  # [T] bool
    turns: Any  # [T] integer
    bounds: Any  # [B + 1] integer
    level: Any  # [1]


class ScanOutputs(NamedTuple):
    """The outputs of a scan, as in Credit; tallies [B, 11] float64 in the order of reference.credit.TALLIES."""

    token_advantages: Any
    weights: Any
    signal: Any
    credit: Any
    segment_ids: Any
    onsets: Any
    tallies: Any


class Traits(NamedTuple):
    """A rule as the kernel is compiled for it; the members are constants to the compiler."""

    rule: Any
    normalizer: Any
    segmenter: Any
    segmented: Any  # there are segments
    covers: Any  # they cover the sequence: every token may open one
    by_entropy: Any  # one ends with the first token above the limit
    by_turn: Any  # one ends before another turn
    limited: Any  # one has `longest` policy tokens at most
    breaks: Any  # one ends before a token that it may not have: another turn, too many tokens, another onset, another entropy
    renormalize: Any


@cache
def traits(rule: Rule) -> Traits:
    """The compile-time side of a rule."""
    n, segmenter = lower(rule), rule.cut.segmenter
    by_turn, limited = segmenter == "turn" or n.stop_at_turn, n.longest > 0
    found = Traits(
        rule=n.rule,
        normalizer=n.normalizer,
        segmenter=n.segmenter,
        segmented=rule.segmented,
        covers=segmenter in ("entropy_only", "turn", "fixed"),
        by_entropy=segmenter in ("entropy", "entropy_only", "entropy_window"),
        by_turn=by_turn,
        limited=limited,
        breaks=by_turn or limited or segmenter in ("kl_only", "stable"),
        renormalize=n.renormalize,
    )
    return Traits(*map(tl.constexpr, found))


class Scan(NamedTuple):
    """One argument of three, for a kernel takes at most 12; a rule's numbers stand apart, since a tuple's floats are float32."""

    rows: Any  # ScanRows
    out: Any  # ScanOutputs
    traits: Any  # Traits


class Sequence(NamedTuple):
    """In the kernel: what one sequence's tokens are held against, scalars in the dtype of the rows."""

    like: Any  # 0
    low: Any  # of the signal
    scale: Any
    threshold: Any
    ratio: Any
    floor: Any
    longest: Any


class Block(NamedTuple):
    """In the kernel: a block of tokens, [BLOCK] each but for base and seen."""

    base: Any  # its first token
    lanes: Any
    mask: Any  # the policy's
    onsets: Any  # those that may open a segment
    over: Any  # those above the threshold
    second: Any
    tested: Any  # what is held against the limit: the second row or its window mean
    turns: Any
    ranks: Any  # policy tokens of the sequence before each
    seen: Any  # policy tokens before the block


class Open(NamedTuple):
    """In the kernel: an open segment, carried from block to block."""

    is_open: Any  # 1 or 0
    held: Any  # its first token's g
    limit: Any  # of the entropy; stable: its first token's
    turn: Any
    last_rank: Any  # of the last token that it may have


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def _as(number, like):
    """A float64 kernel argument in the dtype of `like`, as torch takes a Python number (which the interpreter hands over)."""
    if _INTERPRETER:
        value = number + like * 0
    else:
        value = number.to(like.dtype)
    return value


@triton.jit
def _smaller(a, b):
    return tl.where(b < a, b, a)


@triton.jit
def _larger(a, b):
    return tl.where(b > a, b, a)


@triton.jit
def _clip(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _bounded(x):
    if x.dtype == tl.float64:
        y = _clip(x, -_BIG64, _BIG64)
    else:
        y = _clip(x, -_BIG32, _BIG32)
    return y


@triton.jit
def _divide(x, y):
    """Rounded to nearest: `/` on float32 is not, and g stands against a threshold."""
    if x.dtype == tl.float64:
        z = x / y
    else:
        z = tl.div_rn(x, y)
    return z


@triton.jit
def _policy(ROWS, at, inside):
    """Which tokens of a block are the policy's."""
    if ROWS.mask is not None:
        inside = inside & (tl.load(ROWS.mask + at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _signal(ROWS, at, mask, like):
    if ROWS.signal is not None:
        x = _bounded(tl.load(ROWS.signal + at, mask=mask, other=0.0))
    else:
        x = like * tl.where(mask, 0.0, 0.0)
    return x


@triton.jit
def _raw(x, low, NORMALIZER: tl.constexpr):
    """The signal before it is divided by its scale."""
    if NORMALIZER == _MINMAX:
        v = x - low
    elif NORMALIZER == _ABS_MAX:
        v = tl.abs(x)
    else:
        v = tl.where(x <= 0, 0.0, x)  # <=: no -0.0, whose bits would be the largest
    return v


@triton.jit
def _clipped(ROWS, at, end, like):
    """(max(signal, 0), which tokens are the policy's) of a block."""
    mask = _policy(ROWS, at, at < end)
    return _raw(_signal(ROWS, at, mask, like), like, _RELU_MAX), mask


@triton.jit
def _quantile(ROWS, start, end, count, q, like, BLOCK: tl.constexpr):
    """Linear between the two nearest order statistics of max(x, 0), as reference.linear_quantile.

    The lower one is found digit by digit, three bits a round: values that are not negative order as their bits do.
    """
    position = (q + tl.zeros((), tl.float64)) * (_larger(count, 1) - 1).to(tl.float64)
    rank = position.to(tl.int64)
    WIDE: tl.constexpr = like.dtype == tl.float64
    ROUNDS: tl.constexpr = 21 if WIDE else 11
    digits = tl.arange(0, 8).to(tl.uint64)
    found = tl.zeros((), tl.uint64)
    for i in range(ROUNDS):
        shift = (ROUNDS - 1 - i) * 3
        candidates = found + (digits << shift)
        below = tl.zeros((8,), tl.int32)
        for base in range(start, end, BLOCK):
            v, mask = _clipped(ROWS, base + tl.arange(0, BLOCK), end, like)
            if WIDE:
                bits = v.to(tl.uint64, bitcast=True)
            else:
                bits = v.to(tl.uint32, bitcast=True).to(tl.uint64)
            below += tl.sum((mask[:, None] & (bits[:, None] < candidates[None, :])).to(tl.int32), 0)
        digit = tl.sum(((below <= rank) & (tl.arange(0, 8) > 0)).to(tl.int32), 0)
        found += digit.to(tl.uint64) << shift
    if WIDE:
        a = found.to(tl.float64, bitcast=True)
    else:
        a = found.to(tl.uint32).to(tl.float32, bitcast=True)
    upto = tl.zeros((), tl.int64)
    above = like + float("inf")
    for base in range(start, end, BLOCK):
        v, mask = _clipped(ROWS, base + tl.arange(0, BLOCK), end, like)
        upto += tl.sum((mask & (v <= a)).to(tl.int32), 0)
        above = _smaller(above, tl.min(tl.where(mask & (v > a), v, float("inf")), 0))
    b = tl.where((upto > rank + 1) | (above == float("inf")), a, above)
    return a + (position - rank.to(tl.float64)).to(like.dtype) * (b - a)


@triton.jit
def _scale(ROWS, start, end, q, signal_floor, like, NORMALIZER: tl.constexpr, BLOCK: tl.constexpr):
    """(low, scale, silent) of a sequence: g = min(raw / scale, 1); scale 0 where every g is 0; silent: the tally, 1 or 0."""
    low, high = like * 0 + float("inf"), like * 0 - float("inf")
    count = tl.zeros((), tl.int64)
    for base in range(start, end, BLOCK):
        at = base + tl.arange(0, BLOCK)
        mask = _policy(ROWS, at, at < end)
        x = _signal(ROWS, at, mask, like)
        low = _smaller(low, tl.min(tl.where(mask, x, float("inf")), 0))
        high = _larger(high, tl.max(tl.where(mask, x, -float("inf")), 0))
        count += tl.sum(mask.to(tl.int32), 0)
    if NORMALIZER == _MINMAX:
        scale = high - low
    elif NORMALIZER == _ABS_MAX:
        scale = _larger(-low, high)
    elif NORMALIZER == _NONE:
        scale = like * 0 + 1.0
    elif NORMALIZER == _QUANTILE:
        scale = _quantile(ROWS, start, end, count, q, like, BLOCK)
        scale = tl.where(scale > 0, scale, high)
    else:
        scale = high
    scale = tl.where((low < high) & (scale > 0), scale, 0.0)
    silent = (scale < _larger(signal_floor, _SILENT)) & (count > 0)
    if NORMALIZER == _NONE:
        silent = count < 0
    else:
        scale = tl.where(scale > 0, _larger(scale, signal_floor), 0.0)
    return low, scale, silent.to(tl.float64)


@triton.jit
def _normalised(x, low, scale, NORMALIZER: tl.constexpr):
    g = _divide(_raw(x, low, NORMALIZER), tl.where(scale > 0, scale, 1.0) + x * 0)
    return tl.where(scale > 0, _smaller(g, 1.0), 0.0)


@triton.jit
def _second(ROWS, at, mask, like):
    if ROWS.second is not None:
        e = tl.load(ROWS.second + at, mask=mask, other=0.0)
    else:
        e = like * tl.where(mask, 0.0, 0.0)
    return e


@triton.jit
def _turn(ROWS, at, mask):
    if ROWS.turns is not None:
        turn = tl.load(ROWS.turns + at, mask=mask, other=0).to(tl.int64)
    else:
        turn = tl.where(mask, 0, 0).to(tl.int64)
    return turn


@triton.jit
def _ratio(x, sign, by):
    return _clip(tl.exp(-x * sign), 1 - by, 1 + by)


@triton.jit
def _weight(RULE: tl.constexpr, credit, x, e, sign, level, a, b, c, ratio):
    """(weight, the quantity shown as signal and credit) of the rules without segments, and the weight of the others."""
    shown = credit
    if RULE == _GEAR:
        weight = 1 + a * (0.5 + (0.5 - credit) * sign - 0.5)
    elif RULE == _LIFT:
        weight = _clip(1 + a * credit, 1.0, b)
    elif RULE == _RATIO:
        shown = _ratio(x, sign, b)
        weight = 1 - a + a * shown
    elif RULE == _GATED_RATIO:
        shown = _clip(1 - b * _divide(e, level + e * 0), c, 1.0)
        weight = _ratio(x, sign, a) * shown
    elif RULE == _SHARE:
        shown = _divide(_bounded(e), _bounded(e) + level)
        weight = shown
    elif RULE == _MARGIN:
        shown = _clip(-x, -ratio, ratio)
        up, down = a * _larger(shown - c, 0.0), b * _larger(-shown - c, 0.0)
        weight = 1 + tl.where(sign < 0, down, up)
    else:
        shown = tl.where(e >= level, 1.0, 0.0) + e * 0
        weight = shown
    return weight, shown


# --- segments ---------------------------------------------------------------------------------------------------------


@triton.jit
def _block(ROWS, TRAITS, total, base, seen, mask, over, second, BLOCK: tl.constexpr):
    """The block as the segmenters read it; what this one does not read stands for something that costs nothing."""
    lanes = tl.arange(0, BLOCK)
    onsets, tested, turns, ranks = over, second, lanes, lanes
    if TRAITS.covers:
        onsets = mask
    if TRAITS.segmenter == _WINDOW:
        tested = tl.load(ROWS.second + total + (base + lanes), mask=mask, other=0.0)
    if TRAITS.by_turn:
        turns = _turn(ROWS, base + lanes, mask)
    if TRAITS.limited:
        ranks = seen + tl.cumsum(mask.to(tl.int32), 0).to(tl.int64) - 1
    return Block(base, lanes, mask, onsets, over, second, tested, turns, ranks, seen)


@triton.jit
def _open(ROWS, TRAITS, sequence, block, segment, pos, BLOCK: tl.constexpr):
    """From `pos` on, where no segment is open, the next onset: (the segment's first lane here, whether it opens, the segment)."""
    free = tl.min(tl.where(block.onsets & (block.lanes >= pos), block.lanes, BLOCK), 0)
    opens = (segment.is_open == 0) & (free < BLOCK)
    begin = tl.where(opens, free, pos)
    # scalars of the onset, from the cache: reductions over the block would cost as much as the search
    here = block.base + begin
    limit, turn, last_rank = segment.limit, segment.turn, segment.last_rank
    g = _normalised(_signal(ROWS, here, opens, sequence.like), sequence.low, sequence.scale, TRAITS.normalizer)
    held = tl.where(opens, g, segment.held)
    if TRAITS.by_entropy:
        own = _larger(_second(ROWS, here, opens, sequence.like), sequence.floor)
        limit = tl.where(opens, sequence.ratio * own, limit)
    if TRAITS.segmenter == _STABLE:
        limit = tl.where(opens, _second(ROWS, here, opens, sequence.like), limit)
    if TRAITS.by_turn:
        turn = tl.where(opens, _turn(ROWS, here, opens), turn)
    if TRAITS.limited:
        rank = block.seen + tl.sum((block.mask & (block.lanes < begin)).to(tl.int32), 0)
        last_rank = tl.where(opens, rank + sequence.longest - 1, last_rank)
    return begin, opens, Open(segment.is_open, held, limit, turn, last_rank)


@triton.jit
def _close(TRAITS, sequence, block, segment, running, later, BLOCK: tl.constexpr):
    """The end of a running segment among the `later` tokens: (the first lane behind it, whether a rule ended it here)."""
    # `ending` is the segment's last token, `breaking` the first one that it may not have
    ending = tl.full((), BLOCK, tl.int32)
    breaking = ending
    if TRAITS.by_entropy:
        ending = tl.min(tl.where(later & (block.tested > segment.limit), block.lanes, BLOCK), 0)
    breaks = later & (block.lanes < 0)
    if TRAITS.segmenter == _KL_ONLY:
        breaks = later & block.over
    if TRAITS.segmenter == _STABLE:
        far = (segment.limit > sequence.ratio * block.second) | (block.second > sequence.ratio * segment.limit)
        breaks = later & far
    if TRAITS.by_turn:
        breaks = breaks | (later & (block.turns != segment.turn))
    if TRAITS.limited:
        breaks = breaks | (later & (block.ranks > segment.last_rank))
    if TRAITS.breaks:
        breaking = tl.min(tl.where(breaks, block.lanes, BLOCK), 0)
    ended = running & ((ending < BLOCK) | (breaking < BLOCK))
    return tl.where(ended, tl.where(breaking <= ending, breaking, ending + 1), BLOCK), ended


@triton.jit
def _cut(ROWS, TRAITS, sequence, block, segment, segments, credit, BLOCK: tl.constexpr):
    """The block's segments, opened and closed one after another: (credit, ids, onsets, the open one, how many so far)."""
    ids = tl.full((BLOCK,), -1, tl.int32)
    first = ids > 0
    pos = tl.zeros((), tl.int32)
    while pos < BLOCK:
        begin, opens, segment = _open(ROWS, TRAITS, sequence, block, segment, pos, BLOCK)
        running = opens | (segment.is_open != 0)
        later = block.mask & (block.lanes >= tl.where(opens, begin + 1, pos))
        stop, ended = _close(TRAITS, sequence, block, segment, running, later, BLOCK)
        segments += opens.to(tl.int32)
        covered = running & block.mask & (block.lanes >= begin) & (block.lanes < stop)
        credit = tl.where(covered, segment.held, credit)
        ids = tl.where(covered, segments - 1, ids)
        first = first | (opens & (block.lanes == begin))
        is_open = (running & (ended == 0)).to(tl.int32)
        segment = Open(is_open, segment.held, segment.limit, segment.turn, segment.last_rank)
        pos = tl.where(running, stop, BLOCK)
    return credit, ids, first, segment, segments


# --- the scan ---------------------------------------------------------------------------------------------------------


@triton.jit
def _renormalised(ROWS, OUT, start, end, mean, advantage, BLOCK: tl.constexpr):
    """Divides a sequence's stored weights by their mean; returns their new sum."""
    weights = tl.zeros((), tl.float64)
    tl.debug_barrier()  # other threads of the program may have stored what is read here
    for base in range(start, end, BLOCK):
        at = base + tl.arange(0, BLOCK)
        mask = _policy(ROWS, at, at < end)
        weight = tl.load(OUT.weights + at, mask=mask, other=0.0)
        weight = (weight.to(tl.float64) / mean).to(advantage.dtype)
        tl.store(OUT.weights + at, weight, mask=mask)
        tl.store(OUT.token_advantages + at, weight * advantage, mask=mask)
        weights += tl.sum(tl.where(mask, weight, 0.0).to(tl.float64), 0)
    return weights


@triton.jit
def _tally_row(OUT, row, counts, signals, advantage, weights, silent):
    """Stores a sequence's tallies, in the order of TALLIES; counts: the first five."""
    tokens = counts[0].to(tl.float64)
    up, down = (advantage > 0).to(tl.float64), (advantage < 0).to(tl.float64)
    up_weights, down_weights = tl.where(advantage > 0, weights, 0.0), tl.where(advantage < 0, weights, 0.0)
    rest = (signals, up * tokens, up_weights, down * tokens, down_weights, silent)
    for i in tl.static_range(_TALLIES):
        if i < 5:
            tl.store(OUT.tallies + row * _TALLIES + i, counts[i].to(tl.float64))
        else:
            tl.store(OUT.tallies + row * _TALLIES + i, rest[i - 5])


@triton.jit(do_not_specialize=["total", "longest"])
def _scan_kernel(
    SCAN,
    total,
    longest,
    quantile: fp64,
    signal_floor: fp64,
    threshold: fp64,
    ratio: fp64,
    floor: fp64,
    a: fp64,
    b: fp64,
    c: fp64,
    BLOCK: tl.constexpr,
):
    """Program b: sequence b of the pack, block by block: normalise, segment, weigh, store, and at its end the tallies."""
    ROWS, OUT = SCAN.rows, SCAN.out  # not the traits: what is assigned is no constant any more
    row = tl.program_id(0).to(tl.int64)
    start = _clip(tl.load(ROWS.bounds + row).to(tl.int64), 0, total)
    end = _clip(tl.load(ROWS.bounds + row + 1).to(tl.int64), 0, total)
    advantage = tl.load(ROWS.advantages + row)
    sign = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0)).to(advantage.dtype)
    like = tl.zeros((), advantage.dtype)  # 0 in the dtype of the rows
    a, b, c, ratio, floor = _as(a, like), _as(b, like), _as(c, like), _as(ratio, like), _as(floor, like)
    threshold, signal_floor = _as(threshold, like), _as(signal_floor, like)
    level = like + 1.0
    if ROWS.level is not None:
        level = tl.load(ROWS.level)
    low, scale, silent = like, like, tl.zeros((), tl.float64)
    if SCAN.traits.segmented:
        low, scale, silent = _scale(ROWS, start, end, quantile, signal_floor, like, SCAN.traits.normalizer, BLOCK)
    sequence = Sequence(like, low, scale, threshold, ratio, floor, longest)
    segment = Open(tl.zeros((), tl.int32), like, like, tl.zeros((), tl.int64), tl.zeros((), tl.int64))
    segments, seen, above, inside = tl.zeros((), tl.int32), tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    weights, signals = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for base in range(start, end, BLOCK):
        at = base + tl.arange(0, BLOCK)
        mask = _policy(ROWS, at, at < end)
        x = _signal(ROWS, at, mask, like)
        e = _second(ROWS, at, mask, like)
        credit = x * 0
        g = credit
        ids = tl.full((BLOCK,), -1, tl.int32)
        first = ids > 0
        if SCAN.traits.segmented:
            g = _normalised(x, low, scale, SCAN.traits.normalizer)
            over = mask & (g > threshold)
            above += tl.sum(over.to(tl.int32), 0)
            if SCAN.traits.rule == _GEAR:
                credit = g
            if SCAN.traits.segmenter != _TOKEN:
                block = _block(ROWS, SCAN.traits, total, base, seen, mask, over, e, BLOCK)
                credit, ids, first, segment, segments = _cut(ROWS, SCAN.traits, sequence, block, segment, segments, credit, BLOCK)
                inside += tl.sum((mask & (ids >= 0)).to(tl.int32), 0)
        weight, shown = _weight(SCAN.traits.rule, credit, x, e, sign, level, a, b, c, ratio)
        if not SCAN.traits.segmented:
            g, credit = shown, shown
        here = at < end
        weight = tl.where(mask, weight, 0.0)
        tl.store(OUT.token_advantages + at, tl.where(mask, weight * advantage, 0.0), mask=here)
        tl.store(OUT.weights + at, weight, mask=here)
        tl.store(OUT.signal + at, tl.where(mask, g, 0.0), mask=here)
        tl.store(OUT.credit + at, tl.where(mask, credit, 0.0), mask=here)
        tl.store(OUT.segment_ids + at, ids, mask=here)
        tl.store(OUT.onsets + at, first, mask=here)
        seen += tl.sum(mask.to(tl.int32), 0)
        weights += tl.sum(weight.to(tl.float64), 0)
        signals += tl.sum(tl.where(mask, x, 0.0).to(tl.float64), 0)
    if SCAN.traits.renormalize:
        mean = weights / _larger(seen, 1).to(tl.float64)
        weights = _renormalised(ROWS, OUT, start, end, mean, advantage, BLOCK)
    unclosed = segment.is_open
    if (SCAN.traits.segmenter == _TURN) or (SCAN.traits.segmenter == _FIXED):
        unclosed = unclosed * 0  # the end of the trajectory closes these
    _tally_row(OUT, row, (seen, above, inside, segments, unclosed), signals, advantage, weights, silent)


@triton.jit
def _column(sums, columns, i: tl.constexpr):
    return tl.sum(tl.where(columns == i, sums, 0.0), 0)


@triton.jit
def _mean(total, count, empty):
    return tl.where(count > 0, total / _larger(count, 1.0), empty)


@triton.jit(do_not_specialize=["sequences"])
def _tally_kernel(TALLIES, OUT, sequences, ROWS: tl.constexpr):
    """One program: TALLIES [B, 11] -> OUT [9] float32, as reference.credit.diagnostics."""
    columns = tl.arange(0, 16)
    sums = tl.zeros((16,), tl.float64)
    trajectories = tl.zeros((16,), tl.float64)
    for base in range(0, sequences, ROWS):
        rows = base + tl.arange(0, ROWS)
        mask = (rows < sequences)[:, None] & (columns < _TALLIES)[None, :]
        block = tl.load(TALLIES + rows.to(tl.int64)[:, None] * _TALLIES + columns[None, :], mask=mask, other=0.0)
        sums += tl.sum(block, 0)
        trajectories += tl.sum(tl.where(block > 0, 1.0, 0.0).to(tl.float64), 0)
    tokens, inside = _column(sums, columns, _N_TOKENS), _column(sums, columns, _INSIDE)
    segments = _column(sums, columns, _SEGMENTS)
    present = _column(trajectories, columns, _N_TOKENS)  # trajectories with a policy token
    means = (  # in the order of DIAGNOSTICS
        _mean(_column(sums, columns, _ABOVE), tokens, 0.0),
        _mean(inside, tokens, 0.0),
        _mean(segments, present, 0.0),
        _mean(inside, segments, 0.0),
        _mean(_column(sums, columns, _UNCLOSED), segments, 0.0),
        _mean(_column(sums, columns, _SIGNAL), tokens, 0.0),
        _mean(_column(sums, columns, _QUIET), present, 0.0),
        _mean(_column(sums, columns, _UP), _column(sums, columns, _POSITIVE), 1.0),
        _mean(_column(sums, columns, _DOWN), _column(sums, columns, _NEGATIVE), 1.0),
    )
    for i in tl.static_range(_DIAGNOSTICS):
        tl.store(OUT + i, means[i].to(tl.float32))


# --- launches ---------------------------------------------------------------------------------------------------------

_LANES = {True: 256, False: 128}  # tokens to a warp of 32, with segments or without: there 8 rounded divisions a thread spilled


def config(tokens: int, sequences: int, segmented: bool) -> Config:
    """From the shape alone. 512 tokens by two warps leave room for six programs of 168 registers on a streaming multiprocessor:
    512 sequences run in one round on an H100 (1024 by four: three programs, and two rounds), and a reduction waits for two warps.
    Few long sequences take blocks of 2048 (4096 spilled), many short ones blocks of their mean length. Not yet measured on a GPU;
    what is to be measured: candidates.py.
    """
    if INTERPRETED:
        longest, least = 32768, 16
    else:
        longest, least = 2048 if segmented and tokens > 16384 * sequences else 512, 128
    chosen = TRIED.get("scan") or Config(longest, 1 if INTERPRETED else longest // _LANES[segmented])
    block = min(chosen.block, max(least, triton.next_power_of_2(-(-tokens // max(sequences, 1)))))
    return Config(block, max(1, chosen.num_warps * block // chosen.block))


def scan(rows: ScanRows, out: ScanOutputs, rule: Rule, total: int) -> tuple[torch.Tensor, ...]:
    """Fills `out`; returns the nine diagnostics, 0-d float32 each."""
    sequences, n = rows.advantages.numel(), lower(rule)
    chosen = config(total, sequences, rule.segmented)
    if sequences:
        _scan_kernel[(sequences,)](
            *(Scan(rows, out, traits(rule)), total, n.longest),
            *(n.quantile, n.signal_floor, n.threshold, n.ratio, n.floor, n.a, n.b, n.c),
            BLOCK=chosen.block,
            num_warps=chosen.num_warps,
            enable_fp_fusion=False,
        )
    diagnostics = torch.empty(len(DIAGNOSTICS), dtype=torch.float32, device=rows.advantages.device)
    _tally_kernel[(1,)](out.tallies, diagnostics, sequences, ROWS=64, num_warps=4)
    return diagnostics.unbind(0)
