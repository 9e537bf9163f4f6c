"""The mathematics of the statistics and the table of them, in plain torch of any floating dtype (float64 in tests).

A row's statistics come from sums over its vocabulary that can be taken tile by tile: `sweep` sums one tile, `merge` joins
disjoint tiles (or vocabulary shards), `finish` makes the statistics. With x = (s - max s) / T, y = (t - max t) / T and
Z = sum e^x these are sums of e^x, e^x x and e^x (x - y); the divergence to the mixture needs Z first, so a second sweep.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..errors import GearKernelsError, bad_input

LOWEST = -1e30  # the least (z - max) / T: 0 * x must be 0 in value and gradient, also for a mask of finfo.min
FARTHEST = 80.0  # log p - log q is cut there inside the mixture: e^80 is finite in float32, and e^-80 changes no sum


# --- the table ----------------------------------------------------------------------------------------------------------


class Stat(NamedTuple):
    """A statistic: its name, what it reads, and whether a gradient comes through it (to the student alone)."""

    name: str
    needs_target: bool = False
    needs_teacher: bool = False
    gradient: bool = False
    teacher_moments: bool = False  # it reads teacher_first or teacher_cross, sums under the teacher's own distribution


# The order is that of `values`, of `grads` and of TokenStats; csrc/tables.h has it too, and is compared when it is loaded.
STATISTICS = (
    Stat("logprobs", needs_target=True, gradient=True),
    Stat("teacher_logprobs", needs_target=True, needs_teacher=True),
    Stat("entropy", gradient=True),
    Stat("teacher_entropy", needs_teacher=True, teacher_moments=True),
    Stat("reverse_kl", needs_teacher=True, gradient=True),
    Stat("forward_kl", needs_teacher=True, gradient=True, teacher_moments=True),
    Stat("jsd", needs_teacher=True, gradient=True),
    Stat("logsumexp", gradient=True),
    Stat("top1", needs_target=True),
    Stat("argmax_agreement", needs_teacher=True),
)
BY_NAME = {stat.name: stat for stat in STATISTICS}
STAT_NAMES = tuple(BY_NAME)
ARGMAX_NAMES = ("top1", "argmax_agreement")  # what needs to know where the largest logit stands; no sum says it
GRADIENT_NAMES = tuple(stat.name for stat in STATISTICS if stat.gradient)
# The columns of `sums`. max: largest logit, 0 while all are -inf; z: sum e^x; first: sum e^x x; cross: sum e^x (x - y); target:
# the target's logit, 0 in tiles without it; outside: above 0 where a logit is finite and the other head's -inf.
SUM_NAMES = (
    *("max", "z", "first", "cross", "teacher_max", "teacher_z", "teacher_first", "teacher_cross"),
    *("target", "teacher_target", "outside", "teacher_outside"),
)
# The columns of `state`: all that the backward needs beside the logits. mixture_kl: KL(student || mixture).
STATE_NAMES = ("max", "log_z", "teacher_max", "teacher_log_z", "entropy", "reverse_kl", "forward_kl", "logprobs", "mixture_kl")


def needs_teacher(names: Iterable[str]) -> bool:
    """True where any of these statistics reads the teacher's logits."""
    return any(BY_NAME[name].needs_teacher for name in names)


class _NotLogits(GearKernelsError, AttributeError):
    """Both types: hasattr(stats, "dtype") stays False."""


class TokenStats(NamedTuple):
    """Per-token statistics in nats (the last two are 0 or 1), each of the rows' shape; None where not asked for.

    float32, or float64 for float64 inputs.
    """

    logprobs: torch.Tensor | None = None  # log-prob of the target token
    teacher_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None  # of the full vocabulary
    teacher_entropy: torch.Tensor | None = None
    reverse_kl: torch.Tensor | None = None  # KL(student || teacher)
    forward_kl: torch.Tensor | None = None  # KL(teacher || student)
    jsd: torch.Tensor | None = None  # beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student
    logsumexp: torch.Tensor | None = None  # log sum exp(z / T)
    top1: torch.Tensor | None = None  # 1 where the target is the student's most likely token (the first of equals), else 0
    argmax_agreement: torch.Tensor | None = None  # 1 where student and teacher have the same most likely token, else 0

    @property
    def dtype(self):
        """The dtype of logits, which a wrapper asks for that takes these for them: peft's LoRA layer around an adopted head."""
        given = "token statistics were taken for logits: a layer around FusedHead, such as peft's LoRA, adds to its output"
        mend = "leave the head out of target_modules, or use Head.from_model(model), which merges the adapter"
        raise _NotLogits(*bad_input(given, "FusedHead called by its model, without an adapter around it", mend).args)


assert TokenStats._fields == STAT_NAMES  # written out for those who read or type-check, and the same


# --- rows and heads -----------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows of a tile beside their logits: targets int64 [n] or None (whole-vocabulary ids), 1 / temperature [n]."""

    targets: torch.Tensor | None
    inv_temperature: torch.Tensor
    ignore_index: int

    def part(self, rows: slice) -> Rows:
        """The rows of a slice."""
        targets = None if self.targets is None else self.targets[rows]
        return self._replace(targets=targets, inv_temperature=self.inv_temperature[rows])

    def keep(self) -> torch.Tensor:
        """The rows that are not ignored, bool [n]."""
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
    """Logits [..., V] of hidden states [..., D]: softcap * tanh((h W' + bias) * scale / softcap); -inf from `valid_vocab` on."""
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
        assert t is not None
        mixture = _mixture(s, state["log_z"], t, state["teacher_log_z"], jsd_beta)
        state["jsd"] = jsd(mixture.sum(-2), jsd_beta)
    if set(ARGMAX_NAMES) & set(stats):
        columns = torch.stack([largest(head.z)[1] for head in (s, s if t is None else t)])
        state |= agreements(columns, rows, state, stats)
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
    heads = [sums[..., i : i + 4].unbind(-1) for i in (SUM_NAMES.index("max"), SUM_NAMES.index("teacher_max"))]
    tops = [torch.where(z == 0, -torch.inf, top).amax(0) for top, z, _, _ in heads]
    tops = [torch.where(top == -torch.inf, 0, top) for top in tops]
    moved = [torch.where(z == 0, 0, (new - top) * inv_t) for new, (top, z, _, _) in zip(tops, heads, strict=True)]
    out = []
    for new, by, other, (_, z, first, cross) in zip(tops, moved, reversed(moved), heads, strict=True):
        r = torch.exp(-by)
        out += [new, (r * z).sum(0), (r * (first - z * by)).sum(0), (r * (cross - z * (by - other))).sum(0)]
    return torch.cat([torch.stack(out, -1), sums[..., SUM_NAMES.index("target") :].sum(0)], -1)


def finish(sums: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
    """Sums [n, 12] over the whole vocabulary -> every statistic but jsd and ARGMAX_NAMES, and the rest of STATE_NAMES but
    mixture_kl, [n] each.

    A row of nothing but -inf has no distribution: NaN. KL(p || q) is +inf where q is -inf under a finite p, without a gradient.
    """
    s, inv_t = dict(zip(SUM_NAMES, sums.unbind(-1), strict=True)), rows.inv_temperature.to(sums.dtype)
    log_z, log_w = (torch.where(s[z] == 0, torch.nan, s[z]).log() for z in ("z", "teacher_z"))
    out = {"max": s["max"], "log_z": log_z, "teacher_max": s["teacher_max"], "teacher_log_z": log_w}
    out["logprobs"] = _logprob(s["target"], s["max"], log_z, inv_t)
    out["teacher_logprobs"] = _logprob(s["teacher_target"], s["teacher_max"], log_w, inv_t)
    out["entropy"] = _not_negative(log_z - s["first"] / s["z"])
    out["logsumexp"] = s["max"] * inv_t + log_z
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


# --- where the largest logit stands ------------------------------------------------------------------------------------------


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row [n] and its column int64 [n], the first of equal ones."""
    top = logits.detach().max(-1)
    return top.values, top.indices


def agreements(columns: torch.Tensor, rows: Rows, state: dict[str, torch.Tensor], stats) -> dict[str, torch.Tensor]:
    """Those of ARGMAX_NAMES that `stats` has, [n] each, from the columns [2, n] of student's and teacher's largest logits.

    NaN where a head that is read has no distribution. A tie goes to the first column, so a target that is as likely as one before
    it is not top1.
    """
    others = {"top1": (rows.targets, 0), "argmax_agreement": (columns[1], state["teacher_log_z"])}
    found = {}
    for name in (name for name in ARGMAX_NAMES if name in stats):
        other, log_w = others[name]
        same = (columns[0] == other).to(state["log_z"].dtype)
        found[name] = torch.where((state["log_z"].detach() + log_w).isnan(), torch.nan, same)
    return found


# --- the mixture of both heads, and the gradient --------------------------------------------------------------------------


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
    """The generalised Jensen-Shannon divergence beta KL(T || M) + (1 - beta) KL(S || M) (arXiv 2306.13649), from [n, 2]."""
    from_s, from_t = _not_negative(mixture).unbind(-1)
    return beta * from_t + (1 - beta) * from_s


def gradient(
    student, teacher, rows: Rows, state: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], first: int, beta: float
):
    """The gradient of sum(grads * statistics) in a tile [n, c] of student logits: what autograd makes of `token_stats`.

    dz_v = [gl (1[v = y] - p) - gH p (log p + H) + gK p (log p/q - KL) + gF (p - q) + gJ (1 - beta) p (log p/m - KL(S||M))
    + gZ p] / T.
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
        assert rows.targets is not None
        hit = torch.arange(first, first + p.shape[-1], device=p.device) == rows.targets[:, None]
        dz += g["logprobs"] * (hit.to(p.dtype) - p)
    if "entropy" in g:
        dz -= g["entropy"] * p * (log_p + of["entropy"])
    if "logsumexp" in g:
        dz += g["logsumexp"] * p
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
