"""The sparse backward: what is left out, what stands in its place, and the bound on the error; plain torch of any floating dtype.

Rows come in blocks of ROWS. A column whose probabilities are small throughout a block is left out of the block's products: the
columns that are kept give dz, dH and dW as ever. Every statistic's dz sums to 0 over the vocabulary, so what the kept columns do
not hold is the sum m of a row's left-out dz, known without a look at them; the tail gives dH that sum times one embedding of the
block, the mean of the left-out ones. docs/mathematics.md derives the bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .stats import STATE_NAMES, SUM_NAMES, Rows, _relative, gradient

ROWS = 128  # of a block
FARTHEST = 1e6  # nats of |log p - log q| that an importance counts at most
ROUNDING = 8  # float32 spacings of a row's importance that its left-out mass is off by: log Z and the logits are rounded


# --- importance of a column -----------------------------------------------------------------------------------------------


def importance(student, teacher, rows: Rows, norm, teacher_norm, stats) -> torch.Tensor:
    """Logits [n, c] -> u [n, c] = p (1 + |log p/q|) + q, the middle term for reverse_kl; 0 in ignored rows. `row_factor` has the
    bound on |dz| that follows.

    norm, teacher_norm: log sum e^(z / T) of each row [n], or less, which makes u larger: see `note_factor`. Where no gradient
    reads the teacher, teacher and teacher_norm are None, and q is 0.
    """
    log_p = _log_prob(student, rows, norm)
    u = log_p.exp()
    if teacher is not None:
        log_q = _log_prob(teacher, rows, teacher_norm)
        if "reverse_kl" in stats:
            u = torch.where(u == 0, 0, u * (1 + (log_p - log_q).abs().clamp_max(FARTHEST)))
        u = u + log_q.exp()
    return torch.where(rows.keep()[:, None], u, 0)


def _log_prob(logits, rows: Rows, norm) -> torch.Tensor:
    relative = _relative(logits, rows, norm.new_zeros(norm.shape))
    norm = torch.where(norm.isfinite(), norm, 0)
    log_p = (relative.x - norm.to(relative.x.dtype)[:, None]).masked_fill(relative.null, -torch.inf)
    return log_p.clamp_min(-1e30)


def note_factor(stats, short: torch.Tensor) -> torch.Tensor:
    """The factor [n] that makes importances noted with norms that fall short an upper bound of the true ones. short: the most
    that the teacher's norm fell short by [n], nats. One part in a hundred is for their float32 sums.
    """
    factor = torch.ones_like(short)
    if "reverse_kl" in stats:
        factor += 1 / math.e + short.clamp_min(0)
    return 1.01 * factor


class Factor(NamedTuple):
    """The factors of each row, [n]: |dz_v| <= plain u_v + entropy p_v |log p_v| in every column but the target's."""

    plain: torch.Tensor
    entropy: torch.Tensor

    def times(self, by: torch.Tensor | float) -> Factor:
        """Both parts, multiplied."""
        return Factor(self.plain * by, self.entropy * by)

    def sums(self, noted: torch.Tensor) -> torch.Tensor:
        """A bound on a block's sums of |dz| [blocks, c], of factors [blocks] that hold for all rows of a block."""
        sums = self.plain[:, None] * noted
        return sums + self.entropy[:, None] * entropy_sums(noted) if self.entropy.any() else sums


def entropy_sums(noted: torch.Tensor) -> torch.Tensor:
    """The most that p |log p| adds up to over a block's rows where p adds up to `noted` at most: x log(ROWS / x), as it is
    concave, and its largest value from ROWS / e on.
    """
    x = noted.clamp(max=ROWS / math.e)
    return torch.where(x > 0, x * (math.log(ROWS) - torch.log(x)), x)


def row_factor(rows: Rows, state: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], beta: float) -> Factor:
    """The factors of the rows, from their row gradients."""
    g = _usable(rows, state, grads)
    plain, entropy = torch.zeros_like(rows.inv_temperature), torch.zeros_like(rows.inv_temperature)
    if "logprobs" in g:
        plain += g["logprobs"].abs()
    if "entropy" in g:
        entropy += g["entropy"].abs()
        plain += entropy * state["entropy"]
    if "reverse_kl" in g:
        plain += g["reverse_kl"].abs() * _finite(state["reverse_kl"]).clamp_min(1)
    if "forward_kl" in g:
        plain += g["forward_kl"].abs()
    if "logsumexp" in g:
        plain += g["logsumexp"].abs()
    if "jsd" in g:
        plain += g["jsd"].abs() * (1 - beta) * (state["mixture_kl"] - math.log1p(-beta)).clamp_min(beta)
    return Factor(plain, entropy).times(rows.inv_temperature)


def _usable(rows: Rows, state: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Row gradients as `stats.gradient` uses them: none of ignored rows and infinite outputs."""
    keep = rows.keep()
    finite = {name: keep & ~state[name].isinf() if name in state else keep for name in grads}
    return {name: torch.where(finite[name], value, 0) for name, value in grads.items()}


def _finite(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isinf(), 0, value)


# --- which columns are kept -------------------------------------------------------------------------------------------------


def kept_columns(sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """The columns that each block keeps, bool [blocks, c]: those whose size is tau or more.

    sizes: what the |dz| of a block's rows add up to at most [blocks, c].  budget: the most that the left-out ones may add up to;
    tau is the largest eighth of an octave that holds it. NaN is kept.
    """
    values = sizes.float()
    # float32 numbers from 0 up are ordered as their bits are: the upper ones make 2048 bins
    bins = torch.where(values.isnan(), torch.inf, values).view(torch.int32) >> 20
    sums = torch.zeros(2048, dtype=torch.float64, device=values.device)
    sums.index_add_(0, bins.flatten(), torch.where(values.isfinite(), values, torch.inf).double().flatten())
    return bins >= (sums.cumsum(0) <= budget).sum()


# --- what the left-out columns add up to ------------------------------------------------------------------------------------


class Mass(NamedTuple):
    """Sums over some columns of a row, [n] float64 each: of p, of q, of -p log p, of p log p/q and of p log p/m."""

    p: torch.Tensor
    q: torch.Tensor
    entropy: torch.Tensor
    reverse_kl: torch.Tensor
    mixture_kl: torch.Tensor

    def add(self, other: Mass, rows: slice) -> None:
        """Add sums over other columns of these rows, in place."""
        for mine, more in zip(self, other, strict=True):
            mine[rows] += more


def kept_mass(sums: torch.Tensor, rows: Rows, state: dict[str, torch.Tensor], mixture: torch.Tensor) -> Mass:
    """The mass of columns whose sums [n, 12] `sweep` made, under the probabilities of the whole vocabulary.

    mixture: their share [n] of KL(student || mixture), as `mixture_sweep` gives it.
    """
    of, inv_t = dict(zip(SUM_NAMES, sums.unbind(-1), strict=True)), rows.inv_temperature.double()
    shift = (of["max"] - state["max"].double()) * inv_t - state["log_z"].double()
    other = (of["teacher_max"] - state["teacher_max"].double()) * inv_t - state["teacher_log_z"].double()
    p, q = of["z"] * shift.exp(), of["teacher_z"] * other.exp()
    entropy = -(shift.exp() * of["first"] + p * shift)
    divergence = shift.exp() * of["cross"] + p * (shift - other)
    seen = of["z"] != 0
    return Mass(p, q, torch.where(seen, entropy, 0), torch.where(seen, divergence, 0), mixture.double())


class Left(NamedTuple):
    """The sums of a row's left-out columns, [n] float64 each: of their dz, and a bound on that of |dz|."""

    signed: torch.Tensor
    most: torch.Tensor


def left_out(kept: Mass, rows: Rows, state: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], beta: float) -> Left:
    """The left-out dz of each row from the mass of its kept columns, because every statistic's terms sum to 0, and
    those of logsumexp to its row gradient.

    p log p/q + q - p is never negative, so the left-out |p log p/q| add up to KL_out + 2 q_out at most; |p log p/m| is at most
    p log 1/(1 - beta) + beta q.
    """
    g = {name: value.double() for name, value in _usable(rows, state, grads).items()}
    of = {name: state[name].double() for name in STATE_NAMES}
    p = (1 - kept.p).clamp_min(0)
    signed = most = torch.zeros_like(p)
    if "logprobs" in g:
        signed, most = signed - g["logprobs"] * p, most + g["logprobs"].abs() * p
    if "logsumexp" in g:
        signed, most = signed + g["logsumexp"] * p, most + g["logsumexp"].abs() * p
    if "entropy" in g:
        own = (of["entropy"] - kept.entropy).clamp_min(0)
        signed = signed + g["entropy"] * (own - of["entropy"] * p)
        most = most + g["entropy"].abs() * (own + of["entropy"] * p)
    if {"reverse_kl", "forward_kl", "jsd"} & g.keys():
        q = (1 - kept.q).clamp_min(0)
    if "reverse_kl" in g:
        kl, used = _finite(of["reverse_kl"]), g["reverse_kl"] != 0
        own = torch.where(used, kl - kept.reverse_kl, 0)
        signed = signed + g["reverse_kl"] * (own - kl * p)
        most = most + g["reverse_kl"].abs() * ((own + 2 * q).clamp_min(0) + kl * p)
    if "forward_kl" in g:
        signed, most = signed + g["forward_kl"] * (p - q), most + g["forward_kl"].abs() * (p + q)
    if "jsd" in g:
        scaled, kl = (1 - beta) * g["jsd"], of["mixture_kl"]
        signed = signed + scaled * (kl - kept.mixture_kl - kl * p)
        most = most + scaled.abs() * (p * (kl - math.log1p(-beta)) + beta * q)
    inv_t = rows.inv_temperature.double()
    return Left(signed * inv_t, most * inv_t)


# --- the definition ---------------------------------------------------------------------------------------------------------


class Sparse(NamedTuple):
    """Sparse gradients of hidden states [N, D] and weight [V, D], and the columns that each block kept, bool [blocks, V]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor


def sparse_gradient(hidden, weight, student, teacher, rows: Rows, state, grads, beta: float, budget: float) -> Sparse:
    """The sparse backward of logits that are all there: student, teacher [N, V] of `hidden` under `weight`, plain (no softcap).

    state, grads: [N] each, by name, as in `gradient`. budget 0 leaves nothing out.
    """
    dz = gradient(student, teacher, rows, state, grads, 0, beta)
    norm = state["max"] * rows.inv_temperature + state["log_z"]
    teacher_norm = state["teacher_max"] * rows.inv_temperature + state["teacher_log_z"]
    u = importance(student, teacher, rows, norm, teacher_norm, grads)
    blocks = [slice(i, i + ROWS) for i in range(0, len(dz), ROWS)]
    factor = row_factor(rows, state, grads, beta)
    mean = Factor(*(torch.stack([part[block].square().mean().sqrt() for block in blocks]) for part in factor))
    sizes = mean.sums(torch.stack([u[block].sum(0) for block in blocks]))
    kept = kept_columns(sizes, budget)
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for i, block in enumerate(blocks):
        if rows.targets is not None:
            kept[i, rows.targets[block][rows.keep()[block]]] = True
        inside, outside = dz[block].masked_fill(~kept[i], 0), dz[block].masked_fill(kept[i], 0)
        d_hidden[block] = inside @ weight + outside.sum(1, keepdim=True) * tail_embedding(sizes[i], kept[i], weight)
        d_weight += inside.T @ hidden[block]
    return Sparse(d_hidden, d_weight, kept)


def tail_embedding(sizes: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean [D] of a block's left-out embeddings, weighted by their sizes; 0 where nothing is left out."""
    out = sizes.masked_fill(kept, 0)
    return (out / out.sum().clamp_min(torch.finfo(out.dtype).tiny)) @ weight
