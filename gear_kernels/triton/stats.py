"""The statistics kernels: one online sweep over a tile of both heads' logits, and a backward that takes all gradients at once.

A program owns one row (of one column split) and walks it in blocks. Sums are kept per lane in float32, reduced once at the
end of the tile, and joined with what earlier tiles left in float64: a row is read once, a few scalars are written. All
logits are cast to float32 straight after the load; what is computed is decided at compile time by WANT, a sum of flags.

Terms, as in reference/stats.py: x = (s - max s) / T, y = (t - max t) / T; sums of e^x, e^x x, e^x (x - y). Minus infinity and
masked lanes become LOWEST, so e^x is exactly 0 and products with x stay finite; NaN passes every tl.where and reaches the sums.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..records import Tile, TileTask
from ..reference import sparse
from ..reference.stats import ARGMAX_NAMES, FARTHEST, LOWEST, STAT_NAMES, STATE_NAMES, SUM_NAMES, needs_teacher
from .candidates import CONFIGS, TRIED, Config

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this file was imported: numpy on a CPU, for tests
_constant = (lambda x: x) if INTERPRETED else tl.constexpr  # the compiler takes globals only as constexpr, the interpreter never
_INTERPRETER, _LOWEST, _FARTHEST = (_constant(x) for x in (INTERPRETED, LOWEST, FARTHEST))
_ROWS_AT_ONCE = 8  # of the note kernel
_NOTED, _FARTHEST_NOTED, _AT_ONCE = (_constant(x) for x in (sparse.ROWS, sparse.FARTHEST, _ROWS_AT_ONCE))
_SUMS, _STATE, _VALUES = (_constant(len(names)) for names in (SUM_NAMES, STATE_NAMES, STAT_NAMES))
# Bits of WANT: one for each statistic, but that both log-probs share the sum that they are made of, and that torch finds where
# the largest logits stand; and one for a teacher.
_BITS = {name: 0 if name in ARGMAX_NAMES else 1 << i for i, name in enumerate(STAT_NAMES)}
_BITS["teacher_logprobs"] = _BITS["logprobs"]
_TEACHER_BIT = 1 << len(STAT_NAMES)
LOGPROBS, ENTROPY, TEACHER_ENTROPY, REVERSE_KL, FORWARD_KL, JSD, LOGSUMEXP = (
    _constant(_BITS[name]) for name in ("logprobs", "entropy", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "logsumexp")
)
TEACHER = _constant(_TEACHER_BIT)
# Columns of SUMS: a head's four stand together, the student's first.
_S_MAX, _S_Z, _S_FIRST, _S_CROSS = (_constant(SUM_NAMES.index(name)) for name in ("max", "z", "first", "cross"))
_T_MAX, _T_Z, _T_FIRST, _T_CROSS = (_constant(SUM_NAMES.index(f"teacher_{name}")) for name in ("max", "z", "first", "cross"))
_S_TARGET, _T_TARGET, _S_OUTSIDE, _T_OUTSIDE = (
    _constant(SUM_NAMES.index(name)) for name in ("target", "teacher_target", "outside", "teacher_outside")
)
# Columns of STATE.
_MAX, _LOG_Z, _TEACHER_MAX, _TEACHER_LOG_Z = (
    _constant(STATE_NAMES.index(name)) for name in ("max", "log_z", "teacher_max", "teacher_log_z")
)
_ENTROPY, _REVERSE_KL, _FORWARD_KL, _LOGPROB, _MIXTURE_KL = (
    _constant(STATE_NAMES.index(name)) for name in ("entropy", "reverse_kl", "forward_kl", "logprobs", "mixture_kl")
)
# Columns of the gradients.
_D_LOGPROB, _D_ENTROPY, _D_REVERSE_KL, _D_FORWARD_KL, _D_JSD, _D_LOGSUMEXP = (
    _constant(STAT_NAMES.index(name)) for name in ("logprobs", "entropy", "reverse_kl", "forward_kl", "jsd", "logsumexp")
)


class Logits(NamedTuple):
    """One head's tile as a kernel argument; members that are None disappear at compile time."""

    z: Any  # [n, c], any strides
    row: int
    col: int
    bias: Any  # [c], contiguous
    scale: float | None
    softcap: float | None


class Saved(NamedTuple):
    """The tables that the gradient kernel reads a row of."""

    state: Any  # [n, 9], of finish
    grads: Any  # [n, 10], with respect to each statistic


class Norms(NamedTuple):
    """The numbers that the note kernel takes for each row's log Z, [n] each."""

    student: Any
    teacher: Any


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(u):
    """No libdevice: it is missing in the interpreter. Cephes' polynomial near 0, where 1 - 2 / (e^2u + 1) cancels; 2 ulp."""
    z = u * u
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)
    return tl.where(tl.abs(u) < 0.625, p * z * u + u, far)


@triton.jit
def _finished(z, head, cols, mask):
    """Raw GEMM output -> logits."""
    if head.bias is not None:
        z += tl.load(head.bias + cols, mask=mask, other=0.0).to(tl.float32)
    if head.scale is not None:
        z *= head.scale
    if head.softcap is not None:
        z = head.softcap * _tanh(z / head.softcap)
    return z


@triton.jit
def _logits(head, row, cols, mask):
    """A block of logits in float32, -inf in masked lanes (also after a softcap or a negative scale)."""
    z = tl.load(head.z + row * head.row + cols.to(tl.int64) * head.col, mask=mask, other=float("-inf")).to(tl.float32)
    if (head.bias is not None) or (head.scale is not None) or (head.softcap is not None):
        z = tl.where(mask, _finished(z, head, cols, mask), float("-inf"))
    return z


@triton.jit
def _logit(head, row, col, mask):
    """One logit, 0 where the mask is False."""
    z = tl.load(head.z + row * head.row + col * head.col, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, _finished(z, head, col, mask), 0.0)


@triton.jit
def _at_least(x, low):
    return tl.where(x < low, low, x)  # not tl.maximum: it would swallow a NaN


@triton.jit
def _relative(z, top, inv_t):
    return _at_least((z - top) * inv_t, _LOWEST)


@triton.jit
def _reference_max(m):
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _move(z, first, cross, by, other, EXACT: tl.constexpr):
    """Sums of one head after its reference rose by `by` and the other head's by `other` (in units of x).

    EXACT: the factor in float64. Otherwise float32: nearly always 1 exactly, and float64 exponentials were a third of a tile's
    instructions.
    """
    if EXACT:
        r = tl.exp(-by)
    else:
        r = tl.exp((-by).to(tl.float32)).to(by.dtype)
    return r * z, r * (first - z * by), r * (cross - z * (by - other))


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sum4(a, b, c, d):
    """Four sums over lanes by one reduction: each has its own barriers; the interpreter would add lane after lane in float32."""
    if _INTERPRETER:
        sums = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    else:
        sums = tl.reduce((a, b, c, d), 0, _add4)
    return sums


@triton.jit
def _join(max_a, z_a, max_b, z_b):
    """The joint maximum of two partial sums; a side with z = 0 has seen nothing but -inf."""
    larger = tl.where(max_b > max_a, max_b, max_a)
    return tl.where(z_a == 0, max_b, tl.where(z_b == 0, max_a, larger))


@triton.jit
def _distance(new, old, z, inv_t):
    return tl.where(z == 0, 0.0, (new - old) * inv_t)


@triton.jit
def _read(at, mask):
    """A scalar (mask None) or a masked block of float64 sums."""
    if mask is None:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value


@triton.jit
def _stored(at, mask, TEACHER_TOO: tl.constexpr):
    """The eight float64 sums of both heads that earlier tiles left at `at`; the student's own twice where there is no teacher."""
    s_max, s_z = _read(at + _S_MAX, mask), _read(at + _S_Z, mask)
    s_first, s_cross = _read(at + _S_FIRST, mask), _read(at + _S_CROSS, mask)
    t_max, t_z, t_first, t_cross = s_max, s_z, s_first, s_cross
    if TEACHER_TOO:
        t_max, t_z = _read(at + _T_MAX, mask), _read(at + _T_Z, mask)
        t_first, t_cross = _read(at + _T_FIRST, mask), _read(at + _T_CROSS, mask)
    return s_max, s_z, s_first, s_cross, t_max, t_z, t_first, t_cross


@triton.jit
def _add_stored(stored, own, inv_t, TEACHER_TOO: tl.constexpr, EXACT: tl.constexpr):
    """Joins float64 sums of both heads, `own`, with those of `_stored`; returns all eight."""
    o_max, o_z, o_first, o_cross, p_max, p_z, p_first, p_cross = stored
    s_max, s_z, s_first, s_cross, t_max, t_z, t_first, t_cross = own
    n_max = _join(o_max, o_z, s_max, s_z)
    o_by, s_by = _distance(n_max, o_max, o_z, inv_t), _distance(n_max, s_max, s_z, inv_t)
    o_other, s_other = o_by * 0.0, o_by * 0.0
    if TEACHER_TOO:
        m_max = _join(p_max, p_z, t_max, t_z)
        o_other, s_other = _distance(m_max, p_max, p_z, inv_t), _distance(m_max, t_max, t_z, inv_t)
        p_z, p_first, p_cross = _move(p_z, p_first, p_cross, o_other, o_by, EXACT)
        t_z, t_first, t_cross = _move(t_z, t_first, t_cross, s_other, s_by, EXACT)
        t_max, t_z, t_first, t_cross = m_max, p_z + t_z, p_first + t_first, p_cross + t_cross
    o_z, o_first, o_cross = _move(o_z, o_first, o_cross, o_by, o_other, EXACT)
    s_z, s_first, s_cross = _move(s_z, s_first, s_cross, s_by, s_other, EXACT)
    return n_max, o_z + s_z, o_first + s_first, o_cross + s_cross, t_max, t_z, t_first, t_cross


@triton.jit
def _log_ratio(d, own, other):
    """log p/m from d = log q - log p; log q/m is the same with -d and the parts of both exchanged."""
    return -tl.log(own + other * tl.exp(d))


@triton.jit
def _bounded(d):
    return tl.where(d > _FARTHEST, _FARTHEST, _at_least(d, -_FARTHEST))


# --- sweep ------------------------------------------------------------------------------------------------------------


@triton.jit
def _stored_rest(at, S, T, R, row, first, begin, end, WANT: tl.constexpr):
    """The other four of a row's sums: the target's logit under both heads, this tile's added; rows outside, as they were."""
    s_target = tl.zeros((), tl.float64)
    t_target, s_outside, t_outside = s_target, s_target, s_target
    if WANT & LOGPROBS:
        col = tl.load(R.targets + row) - first
        inside = (col >= begin) & (col < end)
        s_target = tl.load(at + _S_TARGET) + _logit(S, row, col, inside).to(tl.float64)
        if WANT & TEACHER:
            t_target = tl.load(at + _T_TARGET) + _logit(T, row, col, inside).to(tl.float64)
    if WANT & (REVERSE_KL | FORWARD_KL):
        s_outside, t_outside = tl.load(at + _S_OUTSIDE), tl.load(at + _T_OUTSIDE)
    return s_target, t_target, s_outside, t_outside


@triton.jit
def _raised(sums, s_by, t_by, WANT: tl.constexpr):
    """The lanes' sums after the heads' maxima rose by s_by and t_by (in units of x)."""
    s_z, s_first, s_cross, t_z, t_first, t_cross = sums
    r = tl.exp(-s_by)
    if WANT & REVERSE_KL:
        s_cross = r * (s_cross - s_z * (s_by - t_by))
    if WANT & ENTROPY:
        s_first = r * (s_first - s_z * s_by)
    if WANT & TEACHER:
        q = tl.exp(-t_by)
        if WANT & FORWARD_KL:
            t_cross = q * (t_cross - t_z * (t_by - s_by))
        if WANT & TEACHER_ENTROPY:
            t_first = q * (t_first - t_z * t_by)
        t_z *= q
    s_z *= r
    return s_z, s_first, s_cross, t_z, t_first, t_cross


@triton.jit
def _over_lanes(s_max, t_max, sums, WANT: tl.constexpr):
    """The eight float64 sums of both heads from those of the lanes."""
    s_z, s_first, s_cross, t_z, t_first, t_cross = sums
    s_zs, s_firsts, s_crosses, t_zs = _sum4(s_z, s_first, s_cross, t_z)
    t_firsts, t_crosses = t_zs * 0.0, t_zs * 0.0
    if WANT & (TEACHER_ENTROPY | FORWARD_KL):
        t_firsts, t_crosses = tl.sum(t_first, 0), tl.sum(t_cross, 0)
    return (
        _reference_max(s_max).to(tl.float64),
        s_zs.to(tl.float64),
        s_firsts.to(tl.float64),
        s_crosses.to(tl.float64),
        _reference_max(t_max).to(tl.float64),
        t_zs.to(tl.float64),
        t_firsts.to(tl.float64),
        t_crosses.to(tl.float64),
    )


@triton.jit
def _store_sums(at, joined, rest, outside, WANT: tl.constexpr):
    """Writes a row's sums: both heads', then what `_stored_rest` read, with this tile's lanes `outside`."""
    for i in tl.static_range(_S_TARGET):
        if (i < _T_MAX) or (WANT & TEACHER):
            tl.store(at + i, joined[i])
    if WANT & (REVERSE_KL | FORWARD_KL):
        tl.store(at + _S_OUTSIDE, rest[2] + tl.max(outside & 1, 0).to(tl.float64))
        tl.store(at + _T_OUTSIDE, rest[3] + tl.max(outside >> 1, 0).to(tl.float64))
    if WANT & LOGPROBS:
        tl.store(at + _S_TARGET, rest[0])
        if WANT & TEACHER:
            tl.store(at + _T_TARGET, rest[1])


@triton.jit(do_not_specialize=["first", "n"])
def _sweep_kernel(S, T, R, first, SUMS, n, columns, width, MASKED: tl.constexpr, WANT: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, split): adds columns [split * width, ...) of the tile to SUMS [splits, n, 12] float64.

    first: the tile's first column in the vocabulary. All loads that wait for nothing stand above the first reduction, whose
    barrier no later load may cross: a tile of 2048 columns is one block, and its time is that of its chain of loads.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if MASKED:
        target = tl.load(R.targets + row)
        if target == R.ignore_index:
            return
    inv_t = tl.load(R.inv_temperature + row)
    begin = split * width
    end = tl.minimum(begin + width, columns)
    at = SUMS + (split.to(tl.int64) * n + row) * _SUMS
    EARLY: tl.constexpr = (WANT & (TEACHER_ENTROPY | FORWARD_KL)) == 0  # with them the registers do not suffice
    if EARLY:
        stored = _stored(at, None, (WANT & TEACHER) != 0)
        rest = _stored_rest(at, S, T, R, row, first, begin, end, WANT)
    lanes = tl.arange(0, BLOCK)
    s_max = tl.full((), float("-inf"), tl.float32)
    t_max = tl.full((), float("-inf"), tl.float32)
    s_z = tl.zeros((BLOCK,), tl.float32)
    s_first, s_cross = s_z, s_z
    t_z, t_first, t_cross = s_z, s_z, s_z
    outside = tl.zeros((BLOCK,), tl.int32)  # bit 0: student finite, teacher -inf; bit 1: the other way round
    for start in range(begin, end, BLOCK):
        cols = start + lanes
        mask = cols < end
        s = _logits(S, row, cols, mask)
        if EARLY and (WANT & TEACHER):
            t = _logits(T, row, cols, mask)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        s_ref = _reference_max(s_new)
        s_by = tl.where(s_max == float("-inf"), 0.0, (s_ref - s_max) * inv_t)
        t_by = s_by * 0.0
        if WANT & TEACHER:
            if not EARLY:
                t = _logits(T, row, cols, mask)
            t_new = tl.maximum(t_max, tl.max(t, 0))
            t_ref = _reference_max(t_new)
            t_by = tl.where(t_max == float("-inf"), 0.0, (t_ref - t_max) * inv_t)
            t_max = t_new
        s_max = s_new
        if (s_by != 0.0) | (t_by != 0.0):  # a maximum rose: rare after a row's first blocks
            sums = (s_z, s_first, s_cross, t_z, t_first, t_cross)
            s_z, s_first, s_cross, t_z, t_first, t_cross = _raised(sums, s_by, t_by, WANT)
        if WANT & TEACHER:
            y = _relative(t, t_ref, inv_t)
            t_e = tl.exp(y)
            t_z += t_e
        x = _relative(s, s_ref, inv_t)
        s_e = tl.exp(x)
        s_z += s_e
        if WANT & ENTROPY:
            s_first += s_e * x
        if WANT & TEACHER_ENTROPY:
            t_first += t_e * y
        if WANT & REVERSE_KL:
            s_cross += s_e * (x - y)  # the KL is accumulated here: sum e^x (x - y), still without Z
        if WANT & FORWARD_KL:
            t_cross += t_e * (y - x)
        if WANT & (REVERSE_KL | FORWARD_KL):
            s_null, t_null = s == float("-inf"), t == float("-inf")
            outside |= tl.where(t_null, tl.where(s_null, 0, 1), tl.where(s_null, 2, 0))
    own = _over_lanes(s_max, t_max, (s_z, s_first, s_cross, t_z, t_first, t_cross), WANT)
    if not EARLY:
        stored = _stored(at, None, True)
        rest = _stored_rest(at, S, T, R, row, first, begin, end, WANT)
    joined = _add_stored(stored, own, inv_t.to(tl.float64), (WANT & TEACHER) != 0, False)
    _store_sums(at, joined, rest, outside, WANT)


# --- finish -----------------------------------------------------------------------------------------------------------


@triton.jit
def _log_z(z):
    return tl.log(tl.where(z == 0, float("nan"), z))  # every logit -inf: no distribution


@triton.jit
def _not_negative(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _divergence(cross, z, log_z, other_log_z, outside):
    both = log_z + other_log_z
    kl = _not_negative(cross / z - log_z + other_log_z)  # the sum becomes a KL here: the shifts by both log Z
    return tl.where((outside > 0) & (both == both), float("inf"), kl)


@triton.jit(do_not_specialize=["n", "splits"])
def _finish_kernel(SUMS, R, VALUES, STATE, n, splits, MASKED: tl.constexpr, WANT: tl.constexpr, ROWS: tl.constexpr):
    """A block of rows: SUMS [splits, n, 12] of disjoint columns -> VALUES [10, n] and STATE [n, 9]; jsd's, top1's and
    argmax_agreement's places get 0.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < n
    inv_t = tl.load(R.inv_temperature + rows, mask=mask, other=1.0).to(tl.float64)
    zero = tl.zeros((ROWS,), tl.float64)
    s_max, s_z, s_first, s_cross, t_max, t_z, t_first, t_cross = zero, zero, zero, zero, zero, zero, zero, zero
    target, t_target, outside, t_outside = zero, zero, zero, zero
    for split in range(splits):
        at = SUMS + (split * n + rows) * _SUMS
        own = (s_max, s_z, s_first, s_cross, t_max, t_z, t_first, t_cross)
        s_max, s_z, s_first, s_cross, t_max, t_z, t_first, t_cross = _add_stored(_stored(at, mask, True), own, inv_t, True, True)
        target += _read(at + _S_TARGET, mask)
        t_target += _read(at + _T_TARGET, mask)
        outside += _read(at + _S_OUTSIDE, mask)
        t_outside += _read(at + _T_OUTSIDE, mask)
    keep = mask
    if MASKED:
        keep = mask & (tl.load(R.targets + rows, mask=mask, other=0) != R.ignore_index)
    log_z, log_w = _log_z(s_z), zero
    logprob, t_logprob = (target - s_max) * inv_t - log_z, zero
    entropy, t_entropy = _not_negative(log_z - s_first / s_z), zero
    reverse_kl, forward_kl = zero, zero
    if WANT & TEACHER:
        log_w = _log_z(t_z)
        t_logprob = (t_target - t_max) * inv_t - log_w
        t_entropy = _not_negative(log_w - t_first / t_z)
        reverse_kl = _divergence(s_cross, s_z, log_z, log_w, outside)
        forward_kl = _divergence(t_cross, t_z, log_w, log_z, t_outside)
    # in the orders of STAT_NAMES and STATE_NAMES
    values = (logprob, t_logprob, entropy, t_entropy, reverse_kl, forward_kl, zero, s_max * inv_t + log_z, zero, zero)
    state = (s_max, log_z, t_max, log_w, entropy, reverse_kl, forward_kl, logprob, zero)
    for i in tl.static_range(_VALUES):
        tl.store(VALUES + i * n + rows, tl.where(keep, values[i], 0.0).to(tl.float32), mask=mask)
    for i in tl.static_range(_STATE):
        tl.store(STATE + rows * _STATE + i, tl.where(keep, state[i], 0.0).to(tl.float32), mask=mask)


# --- divergence to the mixture ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "beta"])
def _mixture_kernel(S, T, R, STATE, SHARES, n, columns, width, beta, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, split): adds the tile's KL(S || M) and KL(T || M) to SHARES [splits, n, 2] float64."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if MASKED:
        target = tl.load(R.targets + row)
        if target == R.ignore_index:
            return
    inv_t = tl.load(R.inv_temperature + row)
    state = STATE + row * _STATE
    s_max, log_z = tl.load(state + _MAX), tl.load(state + _LOG_Z)
    t_max, log_w = tl.load(state + _TEACHER_MAX), tl.load(state + _TEACHER_LOG_Z)
    begin = split * width
    end = tl.minimum(begin + width, columns)
    lanes = tl.arange(0, BLOCK)
    from_s = tl.zeros((BLOCK,), tl.float32)
    from_t = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        cols = start + lanes
        mask = cols < end
        x = _at_least((_logits(S, row, cols, mask) - s_max) * inv_t - log_z, _LOWEST)
        y = _at_least((_logits(T, row, cols, mask) - t_max) * inv_t - log_w, _LOWEST)
        d = _bounded(y - x)
        from_s += tl.where(mask, tl.exp(x) * _log_ratio(d, 1 - beta, beta), 0.0)
        from_t += tl.where(mask, tl.exp(y) * _log_ratio(-d, beta, 1 - beta), 0.0)
    at = SHARES + (split.to(tl.int64) * n + row) * 2
    tl.store(at, tl.load(at) + tl.sum(from_s, 0).to(tl.float64))
    tl.store(at + 1, tl.load(at + 1) + tl.sum(from_t, 0).to(tl.float64))


# --- gradient ---------------------------------------------------------------------------------------------------------


@triton.jit
def _usable(grad, value):
    return tl.where(tl.abs(value) == float("inf"), 0.0, grad)  # an infinite output passes no gradient


@triton.jit
def _store(at, value, mask, ROUND: tl.constexpr):
    """Round to the output's dtype. ROUND: to bfloat16 by hand, to nearest even, for the interpreter truncates."""
    if ROUND:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "beta"])
def _gradient_kernel(
    S,
    T,
    R,
    first,
    SAVED,
    OUT,
    columns,
    beta,
    MASKED: tl.constexpr,
    WANT: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block): dz of the raw GEMM output, all gradients at once. OUT: a Logits that only names z and its strides."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < columns
    out = OUT.z + row * OUT.row + cols.to(tl.int64) * OUT.col
    if MASKED:
        target = tl.load(R.targets + row)
        if target == R.ignore_index:
            _store(out, tl.zeros((BLOCK,), tl.float32), mask, False)
            return
    inv_t = tl.load(R.inv_temperature + row)
    state, grads = SAVED.state + row * _STATE, SAVED.grads + row * _VALUES
    s = _logits(S, row, cols, mask)
    x = _at_least((s - tl.load(state + _MAX)) * inv_t - tl.load(state + _LOG_Z), _LOWEST)
    p = tl.exp(x)
    factor = tl.zeros((BLOCK,), tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
    if WANT & TEACHER:
        y = _logits(T, row, cols, mask)
        y = _at_least((y - tl.load(state + _TEACHER_MAX)) * inv_t - tl.load(state + _TEACHER_LOG_Z), _LOWEST)
    if WANT & LOGPROBS:
        g = _usable(tl.load(grads + _D_LOGPROB), tl.load(state + _LOGPROB))
        factor -= g
        other -= tl.where(cols == tl.load(R.targets + row) - first, g, 0.0)
    if WANT & ENTROPY:
        factor -= tl.load(grads + _D_ENTROPY) * (x + tl.load(state + _ENTROPY))
    if WANT & LOGSUMEXP:
        factor += tl.load(grads + _D_LOGSUMEXP)
    if WANT & REVERSE_KL:
        kl = tl.load(state + _REVERSE_KL)
        g = _usable(tl.load(grads + _D_REVERSE_KL), kl)
        factor += g * ((x - y) - tl.where(g == 0, 0.0, kl))
    if WANT & FORWARD_KL:
        g = _usable(tl.load(grads + _D_FORWARD_KL), tl.load(state + _FORWARD_KL))
        factor += g
        other += g * tl.exp(y)
    if WANT & JSD:
        from_s = _log_ratio(_bounded(y - x), 1 - beta, beta)
        factor += tl.load(grads + _D_JSD) * (1 - beta) * (from_s - tl.load(state + _MIXTURE_KL))
    dz = inv_t * (p * factor - other)
    if S.softcap is not None:
        capped = s / S.softcap
        dz *= 1 - tl.where(mask, capped * capped, 0.0)
    if S.scale is not None:
        dz *= S.scale
    _store(out, dz, mask, ROUND)


# --- notes for the sparse backward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "first_row"])
def _note_kernel(
    S,
    T,
    R,
    NORMS,
    n,
    first_row,
    NOTED,
    stride,
    columns,
    MASKED: tl.constexpr,
    WANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of rows, block of columns): adds the rows' importances p (1 + |log p/q|) + q to NOTED, one sum a column.

    NORMS: log sum e^(z / T) of each row, or less.  first_row: the tile's first row within its first block.
    """
    block = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    begin = tl.maximum(block * _NOTED - first_row, 0)
    end = tl.minimum(block * _NOTED - first_row + _NOTED, n)
    for start in range(begin, end, _AT_ONCE):
        row = start + tl.arange(0, _AT_ONCE)[:, None]
        keep = row < end
        if MASKED:
            keep = keep & (tl.load(R.targets + row, mask=keep, other=R.ignore_index) != R.ignore_index)
        mask = keep & (cols[None, :] < columns)
        places = cols[None, :] + tl.zeros((_AT_ONCE, 1), tl.int32)
        inv_t = tl.load(R.inv_temperature + row, mask=keep, other=1.0)
        x = _logits(S, row.to(tl.int64), places, mask) * inv_t - tl.load(NORMS.student + row, mask=keep, other=0.0)
        x = _at_least(x, _LOWEST)
        u = tl.exp(x)
        if WANT & TEACHER:
            y = _logits(T, row.to(tl.int64), places, mask) * inv_t - tl.load(NORMS.teacher + row, mask=keep, other=0.0)
            y = _at_least(y, _LOWEST)
            if WANT & REVERSE_KL:
                apart = tl.abs(x - y)
                u += u * tl.where(apart > _FARTHEST_NOTED, _FARTHEST_NOTED, apart)
            u += tl.exp(y)
        sums += tl.sum(u, 0)
    at = NOTED + block.to(tl.int64) * stride + cols
    inside = cols < columns
    tl.store(at, tl.load(at, mask=inside, other=0.0) + sums, mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------


# Chosen by kernel and architecture; no autotuning at the first call. 2048 columns keep the sums of the default set at 8 lanes a
# thread on NVIDIA; narrower rows take fewer warps, for the end of a tile costs each warp as much as 500 columns. Registers and
# spills: benchmarks/results/compile_report.md. Not yet measured on a GPU; what is to be measured: candidates.py.
# The note kernel takes 128 columns of eight rows at a time: a tile of 2048 x 2048 logits is 256 programs for 132 multiprocessors.
_BLOCKS = {
    "sweep": 2048,
    "mixture": 2048,
    "gradient": 1024,
    "note": 128,
}  # columns; 2048 spilled in the gradient of float16, sm_100
_LANES = 256  # columns to a warp of 32
_INTERPRETED = Config(32768, 1)  # there the cost is per tile operation, hardly per element


def config(kernel: str, columns: int, dtype: torch.dtype) -> Config:
    """The table's entry for logits of this dtype, narrowed to the columns there are."""
    needed = max(16, triton.next_power_of_2(columns))
    if INTERPRETED:
        return _INTERPRETED._replace(block=min(_INTERPRETED.block, needed))
    target = triton.runtime.driver.active.get_current_target()
    lanes = _LANES * target.warp_size // 32
    default = Config(_BLOCKS[kernel], _BLOCKS[kernel] * (_ROWS_AT_ONCE if kernel == "note" else 1) // lanes)
    chosen = TRIED.get(kernel) or CONFIGS.get((kernel, str(target.arch), str(dtype).removeprefix("torch.")), default)
    block = min(chosen.block, needed)
    return Config(block, max(1, chosen.num_warps * block // chosen.block))


def splits(rows: int, columns: int) -> int:
    """Column ranges per row: few rows are cut until about 1000 programs run, none below 8192 columns. From the shape alone."""
    return max(1, min(1024 // max(rows, 1), columns // 8192))


@cache  # asked for with every tile
def want(stats: tuple[str, ...]) -> int:
    """The kernels' compile-time flags for these statistics."""
    return sum({_BITS[name] for name in stats} | ({_TEACHER_BIT} if needs_teacher(stats) else set()))


class _Plan:
    """What the launches of one kernel in one call share: block, warps, compile-time arguments, and what Triton made of them.

    The block is the first tile's; a narrower last one takes it too, masked, instead of a kernel of its own. From a shape's second
    launch on, a launch goes past what Triton finds out of its arguments each time (types, alignment, whether a global changed).
    """

    def __init__(self, kernel, chosen: Config, constants: dict[str, Any]):
        self.kernel, self.block = kernel, chosen.block
        self.options = {**constants, "BLOCK": chosen.block}
        self.constants = tuple(self.options.values())  # in the kernel's own order
        self.options["num_warps"] = chosen.num_warps
        self.compiled: dict[tuple[int, ...], Any] = {}

    def launch(self, grid: tuple[int, int, int], arguments: tuple, shape: tuple[int, ...], tensors: tuple) -> None:
        """shape: every integer that Triton specialises on.  tensors: those of the arguments, None among them."""
        compiled = self.compiled.get(shape) if _aligned(tensors) else None
        if compiled is not None:
            compiled[grid](*arguments, *self.constants)
        else:
            compiled = self.kernel[grid](*arguments, **self.options)
            if _aligned(tensors):
                self.compiled[shape] = compiled  # None from Triton's interpreter


def _aligned(tensors: tuple) -> bool:
    """Whether all start at multiples of 16 bytes: the one property of a pointer that Triton compiles for."""
    joined = 0
    for tensor in tensors:
        if tensor is not None:
            joined |= tensor.data_ptr()
    return joined & 15 == 0


def _plan(task: TileTask, kernel: str, student: Tile, **constants: int) -> _Plan:
    """The call's plan for "sweep", "mixture" or "gradient". constants: its compile-time arguments but for MASKED and BLOCK."""
    kept = {} if task.kept is None else task.kept
    plan = kept.get(kernel)
    if plan is None:
        chosen = config(kernel, student.z.shape[1], student.z.dtype)
        masked = {"MASKED": task.rows.targets is not None}
        plan = kept[kernel] = _Plan(globals()[f"_{kernel}_kernel"], chosen, masked | constants)
    return plan


def _argument(tile: Tile) -> Logits:
    z, bias, scale, softcap = tile
    if z.requires_grad:
        z = z.detach()
    return Logits(z, *z.stride(), None if bias is None else bias.detach().contiguous(), scale, softcap)


def _both(student: Tile, teacher: Tile | None) -> tuple[Logits, Logits]:
    first = _argument(student)
    return first, first if teacher is None else _argument(teacher)  # unread without TEACHER; triton 3.6 has no optional tuples


def _width(columns: int, count: int, block: int) -> int:
    """Columns of one of `count` splits: whole blocks."""
    return -(-columns // (count * block)) * block


def sweep(student: Tile, teacher: Tile | None, task: TileTask, sums: torch.Tensor) -> None:
    """Backend.sweep."""
    (n, columns), count = student.z.shape, sums.shape[0]
    if n:
        plan = _plan(task, "sweep", student, WANT=want(task.stats))
        first, second = _both(student, teacher)
        sizes = (*_table(sums), columns, _width(columns, count, plan.block))
        shape = (columns, first.row, first.col, second.row, second.col)
        tensors = (first.z, first.bias, second.z, second.bias, task.rows.targets, task.rows.inv_temperature, sums)
        plan.launch((n, count, 1), (first, second, task.rows, task.first, *sizes), shape, tensors)


def _table(table: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[splits, n, k], perhaps a slice of more rows -> the tensor and the rows that lie between its splits."""
    splits, n, k = table.shape
    return table, table.stride(0) // k if splits > 1 else n


def finish(sums: torch.Tensor, task: TileTask) -> tuple[torch.Tensor, torch.Tensor]:
    """Backend.finish."""
    n, rows = sums.shape[1], 32
    values = torch.empty((len(STAT_NAMES), n), device=sums.device)
    state = torch.empty((n, len(STATE_NAMES)), device=sums.device)
    if n:
        _finish_kernel[(triton.cdiv(n, rows),)](
            *(sums.contiguous(), task.rows, values, state, n, len(sums)),
            MASKED=task.rows.targets is not None,
            WANT=want(task.stats),
            ROWS=rows,
            num_warps=1,
        )
    return values, state


def mixture(student: Tile, teacher: Tile, task: TileTask, state: torch.Tensor, shares: torch.Tensor) -> None:
    """Backend.mixture."""
    (n, columns), count = student.z.shape, shares.shape[0]
    if n:
        plan = _plan(task, "mixture", student)
        first, second = _both(student, teacher)
        sizes = (*_table(shares), columns, _width(columns, count, plan.block))
        shape = (columns, first.row, first.col, second.row, second.col)
        tensors = (first.z, first.bias, second.z, second.bias, task.rows.targets, task.rows.inv_temperature, state, shares)
        plan.launch((n, count, 1), (first, second, task.rows, state, *sizes, task.beta), shape, tensors)


def gradient(
    student: Tile, teacher: Tile | None, task: TileTask, state: torch.Tensor, grads: torch.Tensor, dz: torch.Tensor
) -> None:
    """Backend.gradient."""
    n, columns = student.z.shape
    if n:
        rounded = INTERPRETED and dz.dtype == torch.bfloat16
        plan = _plan(task, "gradient", student, WANT=want(task.stats), ROUND=rounded)
        first, second = _both(student, teacher)
        out = Logits(dz, *dz.stride(), None, None, None)
        shape = (columns, first.row, first.col, second.row, second.col, out.row, out.col)
        rows = task.rows
        tensors = (first.z, first.bias, second.z, second.bias, rows.targets, rows.inv_temperature, state, grads, dz)
        arguments = (first, second, rows, task.first, Saved(state, grads), out, columns, task.beta)
        plan.launch((n, -(-columns // plan.block), 1), arguments, shape, tensors)


def note(
    student: Tile,
    teacher: Tile | None,
    task: TileTask,
    norms: tuple[torch.Tensor, torch.Tensor | None],
    first_row: int,
    noted: torch.Tensor,
) -> None:
    """Backend.note."""
    n, columns = student.z.shape
    if n:
        plan = _plan(task, "note", student, WANT=want(task.stats))
        first, second = _both(student, teacher)
        own, other = norms[0], norms[0] if norms[1] is None else norms[1]
        arguments = (first, second, task.rows, Norms(own, other), n, first_row, noted, noted.stride(0), columns)
        shape = (columns, first.row, first.col, second.row, second.col, noted.stride(0))
        tensors = (first.z, first.bias, second.z, second.bias, task.rows.targets, task.rows.inv_temperature, own, other, noted)
        plan.launch((len(noted), -(-columns // plan.block), 1), arguments, shape, tensors)
