"""Losses on top of per-token outputs: short torch, any shape, weights given by the caller.

Every loss is a weighted sum over tokens, so `aggregation_weights` (which mean) and the loss (of what) are chosen apart, and the
sums of micro-batches and ranks add up to the whole. Tokens of weight 0 contribute exactly nothing, whatever they hold.

Log ratios are cut at +-20 before they are raised (+-11 in float16), and the k3 estimate of a KL at 10 nats a token, as in verl:
e^88.8 is +inf in float32, and 0 * inf made NaN of the gradient of a token that was clipped. A token beyond a cut keeps its finite
value and passes no gradient through it; within the cuts nothing is changed, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .errors import bad_input
from .sparse import TOLERANCE
from .stats import Head, linear_token_stats

_LOG_RATIO_LIMIT, _K3_LIMIT = 20.0, 10.0  # nats; e^20 is 4.9e8
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
IMPORTANCE_MODES = ("truncate", "mask", "sequence_mask")


def policy_gradient_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    token_advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate loss: -sum token_weights * importance_weights * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    All arguments have one shape, such as [T]; r = exp(logprobs - old_logprobs), the log ratio cut at +-20: a token beyond that
    passes no gradient. Only `logprobs` is differentiated.
    token_weights: see `aggregation_weights`. clip_high above clip_low is DAPO's clip-higher (arXiv 2503.14476). dual_clip: a
    number c above 1 bounds the term of a token of negative advantage from below by c A, so that a ratio that exploded cannot
    rule the step (arXiv 1912.09729); None for none. importance_weights: a factor per token, such as the truncated ratio of
    trainer to sampler (`importance_weights`). Computed in the dtype of logprobs.

    Returns the loss (a scalar) and detached scalars over the tokens of weight other than 0: tokens (their number), clip_fraction
    (where the clipped term is the smaller), dual_clip_fraction (where c A is the larger, 0 without dual_clip), ratio_mean,
    ratio_max, approx_kl (KL(old || new) by r - 1 - log r, nats, at most 10 a token); 0 if there are no tokens. Raises
    GearKernelsError where shapes differ, and for a dual_clip that is not above 1.
    """
    _check_dual_clip(dual_clip)
    given = _surrogate(logprobs, old_logprobs, token_advantages, token_weights, importance_weights)
    return _clipped(given, _bounded(given.log_ratio), (clip_low, clip_high), dual_clip)


def gspo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    token_advantages: torch.Tensor,
    token_weights: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    importance_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate loss with the ratio of the whole sequence: GSPO-token (arXiv 2507.18071, section 4.3).

    As `policy_gradient_loss`, but every token's r is s = exp(mean of logprobs - old_logprobs over its sequence's tokens of weight
    other than 0), whose gradient goes through the token's own log-prob: r_t = sg[s] * exp(logprobs_t - sg[logprobs_t]). With one
    advantage and one weight for all tokens of a sequence this is GSPO itself, in value and gradient. Such ratios stay close to 1:
    the defaults of the clip are the paper's. [T] packed tokens; cu_seqlens: int [B + 1], where sequences begin and end.

    Returns the loss and the metrics of `policy_gradient_loss`, of the sequences' ratios. Raises GearKernelsError as that does.
    """
    _check_dual_clip(dual_clip)
    given = _surrogate(logprobs, old_logprobs, token_advantages, token_weights, importance_weights)
    mean = _sequence_means(given.log_ratio.detach(), given.used, cu_seqlens)
    own = torch.where(given.used, logprobs - logprobs.detach(), 0)  # 0 in value, the token's own gradient
    return _clipped(given, _bounded(mean + own), (clip_low, clip_high), dual_clip)


def cispo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    token_advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.2,
    importance_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """CISPO's loss: -sum token_weights * importance_weights * sg[clip(r, 1 - clip_low, 1 + clip_high)] * A * logprobs.

    The clipped ratio is a constant weight, so that a clipped token still has a gradient (MiniMax-M1, arXiv 2506.13585). With
    clip_low = 1 the ratio has no lower bound, as in that paper. Arguments of one shape, as in `policy_gradient_loss`. Only
    `logprobs` is differentiated.

    Returns the loss and detached scalars: tokens, clip_fraction (of ratios outside the bounds), ratio_mean, ratio_max, approx_kl.
    Raises GearKernelsError where shapes differ.
    """
    given = _surrogate(logprobs, old_logprobs, token_advantages, token_weights, importance_weights)
    log_ratio = _bounded(given.log_ratio.detach())
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(given.weights * clipped * given.advantages * torch.where(given.used, logprobs, 0)).sum()
    return loss, _policy_metrics(log_ratio, given.used, clipped != ratio)


class _Surrogate(NamedTuple):
    """Checked arguments of a policy loss; whatever a token of weight 0 holds is 0 here."""

    used: torch.Tensor  # weight other than 0
    log_ratio: torch.Tensor  # logprobs - old_logprobs, differentiable
    advantages: torch.Tensor
    weights: torch.Tensor  # with the importance weights


def _surrogate(logprobs, old_logprobs, token_advantages, token_weights, importance_weights) -> _Surrogate:
    given = {"old_logprobs": old_logprobs, "token_advantages": token_advantages, "token_weights": token_weights}
    if importance_weights is not None:
        given["importance_weights"] = importance_weights
    _check_shapes(logprobs, given)
    used = token_weights != 0
    log_ratio = torch.where(used, logprobs - old_logprobs.detach(), 0)
    advantages = torch.where(used, token_advantages, 0).detach()
    weights = token_weights if importance_weights is None else token_weights * torch.where(used, importance_weights, 0)
    return _Surrogate(used, log_ratio, advantages, weights.detach())


def _clipped(
    given: _Surrogate, log_ratio: torch.Tensor, clip: tuple[float, float], dual_clip: float | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of bounded log ratios, and its metrics."""
    used, advantages, ratio = given.used, given.advantages, log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    term, bounded = torch.minimum(plain, clipped), torch.zeros_like(used)
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        term, bounded = torch.maximum(term, floor), floor > term
    loss = -(given.weights * term).sum()
    metrics = _policy_metrics(log_ratio.detach(), used, (clipped < plain).detach())
    return loss, metrics | {"dual_clip_fraction": (bounded & used).sum() / metrics["tokens"].clamp_min(1)}


def _check_dual_clip(dual_clip: float | None) -> None:
    if dual_clip is not None and not dual_clip > 1:
        raise bad_input(f"dual_clip is {dual_clip}", "a number above 1, or None", "3.0 is usual")


def _sequence_means(values: torch.Tensor, used: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """For each token the mean of `values` [T] over its sequence's used tokens (0 without any); unused values are 0 already."""
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or values.dim() != 1:
        raise bad_input(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} for tokens {tuple(values.shape)}",
            "integers [B + 1] for packed tokens [T]",
            "lay the sequences end to end",
        )
    offsets = cu_seqlens.long()
    # not index_add_: its order of additions on a GPU is another one every time
    sums, counts = (torch.segment_reduce(x.double(), "sum", offsets=offsets, unsafe=True) for x in (values, used))
    means = sums / counts.clamp_min(1)
    return means.repeat_interleave(offsets.diff(), output_size=values.numel()).to(values.dtype)


def importance_weights(
    logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mode: str = "truncate",
    *,
    cap: float = 2.0,
    floor: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [T] that correct the policy gradient where the engine that sampled and the trainer give other log-probs (nats).

    With k = exp(logprobs - sampler_logprobs), the trainer's before the update: `truncate` is k within [floor, cap] (truncated
    importance sampling, fengyao.notion.site/off-policy-rl); `mask` is k where it lies in [floor, cap], else 0 (IcePop, arXiv
    2510.18855: 0.5 to 5); `sequence_mask` is k where the geometric mean of its sequence's k lies there, else 0. floor None: no
    lower bound. A k that is not a number counts as outside; `truncate` keeps it. cu_seqlens: int [B + 1], of sequence_mask.
    Nothing is differentiated.

    Raises GearKernelsError on an unknown mode, bounds in the wrong order, shapes, and on a sequence_mask without cu_seqlens.
    """
    if mode not in IMPORTANCE_MODES:
        raise bad_input(f"mode is {mode!r}", "one of " + ", ".join(IMPORTANCE_MODES), "use one of these")
    low = 0.0 if floor is None else floor
    if not 0 <= low < cap:
        raise bad_input(f"floor is {floor} and cap {cap}", "0 <= floor < cap", "IcePop takes 0.5 and 5")
    _check_shapes(logprobs, {"sampler_logprobs": sampler_logprobs})
    log_ratio = (logprobs - sampler_logprobs).detach()
    ratio = log_ratio.exp()
    if mode == "truncate":
        return ratio.clamp(min=floor, max=cap)
    judged = ratio
    if mode == "sequence_mask":
        if cu_seqlens is None:
            raise bad_input("cu_seqlens is None", "integers [B + 1] for sequence_mask", "pass where sequences begin and end")
        judged = _sequence_means(log_ratio, torch.ones_like(log_ratio, dtype=torch.bool), cu_seqlens).exp()
    return torch.where((judged >= low) & (judged <= cap) & ratio.isfinite(), ratio, 0)


def _bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """Log ratios whose exponential is finite in their dtype: within +-20, in float16 +-11."""
    limit = min(_LOG_RATIO_LIMIT, math.floor(math.log(torch.finfo(log_ratio.dtype).max)))
    return log_ratio.clamp(-limit, limit)


def _k3(d: torch.Tensor) -> torch.Tensor:
    """e^d - 1 - d of bounded log ratios, at most 10; expm1, because e^d - 1 loses all digits near d = 0."""
    return (torch.expm1(d) - d).clamp(max=_K3_LIMIT)


def _check_shapes(first: torch.Tensor, others: dict[str, torch.Tensor], owner: str = "logprobs'") -> None:
    for name, tensor in others.items():
        if tensor.shape != first.shape:
            given, wanted = f"{name} has shape {tuple(tensor.shape)}", f"{owner} {tuple(first.shape)}"
            raise bad_input(given, wanted, "align token by token")


def _policy_metrics(log_ratio: torch.Tensor, used: torch.Tensor, clipped: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = used.sum()
    count = tokens.clamp_min(1)
    ratio = torch.where(used, log_ratio.exp(), 0)
    ratio_max = ratio.max() if ratio.numel() else ratio.sum()
    k3 = torch.where(used, _k3(log_ratio), 0)
    means = {"clip_fraction": (clipped & used).sum() / count, "ratio_mean": ratio.sum() / count, "approx_kl": k3.sum() / count}
    return {"tokens": tokens, "ratio_max": ratio_max, **means}


def reference_kl_loss(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, token_weights: torch.Tensor, *, estimator: str = "k3"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss sum of token_weights * an estimate of KL(policy || reference) from sampled tokens' log-probs, all of one shape.

    With d = reference_logprobs - logprobs: k1 is -d (unbiased, noisy, its gradient is zero on average), k2 is d^2 / 2 (its
    gradient is the KL's on average), k3 is e^d - 1 - d (unbiased, never negative; GRPO's, arXiv 2402.03300), d cut at +-20 and k3
    at 10 nats (d = 2.6): a token beyond passes no gradient. For the exact KL over the vocabulary use the reverse_kl statistic,
    the reference as teacher. Only `logprobs` is differentiated.

    Returns the loss and the detached mean over tokens of weight other than 0, `reference_kl` (nats). Raises GearKernelsError on
    shapes and on an unknown estimator.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise bad_input(f"estimator is {estimator!r}", "k1, k2 or k3", "use one of these")
    _check_shapes(logprobs, {"reference_logprobs": reference_logprobs, "token_weights": token_weights})
    used = token_weights != 0
    d = torch.where(used, reference_logprobs.detach() - logprobs, 0)
    value = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: _k3(_bounded(d))}[estimator]()
    mean = torch.where(used, value.detach(), 0).sum() / used.sum().clamp_min(1)
    return (token_weights.detach() * value).sum(), {"reference_kl": mean}


def distillation_loss(
    student_hidden: torch.Tensor,
    head: Head | torch.Tensor | nn.Module,
    teacher_hidden: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    beta: float = 1.0,
    teacher_head: Head | torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    workspace_bytes: int | None = None,
    backward: str = "exact",
    backward_tolerance: float = TOLERANCE,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss sum of token_weights * a divergence of student and teacher over the whole vocabulary, from hidden states [..., D].

    beta: 1 is reverse KL(S || T), 0 forward KL(T || S), between the generalised Jensen-Shannon divergence beta KL(T || M) +
    (1 - beta) KL(S || M) with M = beta T + (1 - beta) S (GKD, arXiv 2306.13649; OPSD). As in TRL the two ends are the KLs
    themselves, not the limits of the formula between them, which vanish; no factor temperature^2. head, teacher_head,
    temperature, workspace_bytes, backward, backward_tolerance: as in `linear_token_stats`; head may also be a FusedHead, then
    called as a module (ZeRO-3).
    token_weights: [...], see `aggregation_weights`. Differentiated in student_hidden and the student's head alone.

    Returns the loss and the detached mean over tokens of weight other than 0, `divergence` (nats). Raises GearKernelsError on
    beta outside [0, 1], on shapes, and as `linear_token_stats`.
    """
    name, jsd_beta = divergence_stat(beta)
    if token_weights.shape != student_hidden.shape[:-1]:
        given = f"token_weights has shape {tuple(token_weights.shape)}"
        raise bad_input(given, f"one weight per row, {tuple(student_hidden.shape[:-1])}", "align token by token")
    targets = torch.where(token_weights != 0, 0, -100)  # no log-prob is asked for: they only mark the rows to skip
    call = {"temperature": temperature, "stats": (name,), "jsd_beta": jsd_beta, "workspace_bytes": workspace_bytes}
    call |= {"teacher_head": teacher_head, "backward": backward, "backward_tolerance": backward_tolerance}
    if isinstance(head, nn.Module):
        out = head(student_hidden, targets, teacher_hidden, **call)
    else:
        out = linear_token_stats(student_hidden, head, targets, teacher_hidden, **call)
    return divergence_loss(getattr(out, name), token_weights)


def divergence_stat(beta: float) -> tuple[str, float]:
    """The divergence of `distillation_loss` as (TokenStats field, jsd_beta to ask for it with).

    reverse_kl at beta 1, forward_kl at 0, jsd between. Raises GearKernelsError on beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise bad_input(
            f"beta is {beta}", "a number from 0 (forward KL) to 1 (reverse KL)", "0.5 is the Jensen-Shannon divergence"
        )
    ends: dict[float, tuple[str, float]] = {0: ("forward_kl", 0.5), 1: ("reverse_kl", 0.5)}  # 0.5: unread there
    return ends.get(beta, ("jsd", float(beta)))


def divergence_loss(divergence: torch.Tensor, token_weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss sum of token_weights * divergence [...], nats: `distillation_loss` where the statistics were already taken.

    Differentiated in `divergence`, in its dtype. Returns the loss and the detached mean over tokens of weight other than 0,
    `divergence` (nats, 0 without such tokens). Raises GearKernelsError where shapes differ.
    """
    _check_shapes(divergence, {"token_weights": token_weights}, "the divergence's")
    used = token_weights != 0
    value = torch.where(used, divergence, 0)
    return (token_weights.detach() * value).sum(), {"divergence": value.detach().sum() / used.sum().clamp_min(1)}


def sampled_distillation_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, token_weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Reverse KL(policy || teacher) from the sampled tokens alone, as a policy gradient: their reward is lpT - lpS.

    -sum of token_weights * r * (lpT - lpS), r = exp(logprobs - old_logprobs), lpT - lpS held constant, the log ratio cut at +-20
    (a token beyond passes no gradient): on policy (r = 1) the gradient is -token_weights * (lpT - lpS) in logprobs, on average
    that of the full KL, and the loss is its k1 estimate. (The estimate's own gradient would be 0 on average: see
    `reference_kl_loss`.) All arguments have one shape, nats, any floating dtype. Only `logprobs` is differentiated.

    Returns the loss and the detached mean of lpS - lpT over tokens of weight other than 0, `divergence` (nats; noisy, may be
    negative). Raises GearKernelsError where shapes differ.
    """
    used, gap = _teacher_gap(logprobs, teacher_logprobs, token_weights, old_logprobs=old_logprobs)
    ratio = _bounded(torch.where(used, logprobs - old_logprobs.detach(), 0)).exp()
    return -(token_weights.detach() * ratio * gap.detach()).sum(), _gap_metrics(gap, used)


def sdar_loss(
    logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, token_weights: torch.Tensor, *, sharpness: float = 5.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss sum of token_weights * sigmoid(sharpness * d) * d, d = lpT - lpS: SDAR's distillation term (arXiv 2605.15155).

    The gate is held constant (the paper's "detached signals") and the gradient goes through lpS alone, so it is
    -token_weights * sigmoid(sharpness * d): minimising raises every sampled token, those that the teacher prefers by nearly
    their whole weight, those that it rejects by nearly nothing. Over samples of the policy that is a policy gradient with
    sigmoid(sharpness * d) as the reward: it moves the policy towards the teacher, though the loss itself is no divergence and
    may be negative. The paper weighs the term by 0.01. All arguments have one shape, nats, any floating dtype.

    Returns the loss and detached means over tokens of weight other than 0: `divergence` (lpS - lpT, nats) and `gate`. Raises
    GearKernelsError where shapes differ.
    """
    used, gap = _teacher_gap(logprobs, teacher_logprobs, token_weights)
    gate = torch.sigmoid(sharpness * gap.detach())
    metrics = _gap_metrics(gap, used) | {"gate": torch.where(used, gate, 0).sum() / used.sum().clamp_min(1)}
    return (token_weights.detach() * gate * gap).sum(), metrics


def _teacher_gap(logprobs, teacher_logprobs, token_weights, **others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens count, and lpT - lpS on them (0 elsewhere), differentiable in lpS."""
    _check_shapes(logprobs, {"teacher_logprobs": teacher_logprobs, "token_weights": token_weights, **others})
    used = token_weights != 0
    return used, torch.where(used, teacher_logprobs.detach() - logprobs, 0)


def entropy_loss(entropy: torch.Tensor, token_weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss -sum of token_weights * entropy [...], nats: times a small coefficient a bonus that keeps a policy exploring
    (arXiv 1602.01783, section 4).

    Differentiated in `entropy`, in its dtype. Returns the loss and the detached mean over tokens of weight other than 0,
    `entropy` (nats, 0 without such tokens). Raises GearKernelsError where shapes differ.
    """
    loss, metrics = divergence_loss(entropy, token_weights)
    return -loss, {"entropy": metrics["divergence"]}


def _gap_metrics(gap: torch.Tensor, used: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"divergence": -gap.detach().sum() / used.sum().clamp_min(1)}


def aggregation_weights(
    lengths: torch.Tensor | Sequence[int],
    mode: str,
    *,
    max_len: int | None = None,
    n_tokens_global: int | torch.Tensor | None = None,
    n_seqs_global: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-token weights, float32 [sum(lengths)] in packed order, that make a weighted sum over tokens the chosen mean.

    lengths: int [B] or a list, the policy tokens of each sequence. mode: token_mean (1 / tokens), seq_mean_token_mean
    (1 / sequences / own length), seq_mean_token_sum (1 / sequences), seq_mean_token_sum_norm (1 / sequences / max_len, Dr. GRPO).
    Give the counts of the whole optimiser step over all ranks and micro-batches as n_tokens_global and n_seqs_global, and the
    parts' sums add up to the exact global mean (undo any averaging over ranks yourself); None counts `lengths` alone.

    With masked streams: `w = torch.zeros(T); w[mask] = aggregation_weights(mask_lengths, mode)`.
    Raises GearKernelsError for an unknown mode, and for a missing max_len.

    >>> aggregation_weights(torch.tensor([1, 3]), "seq_mean_token_mean")
    tensor([0.5000, 0.1667, 0.1667, 0.1667])
    """
    if mode not in AGGREGATIONS:
        raise bad_input(f"mode is {mode!r}", "one of " + ", ".join(AGGREGATIONS), "use one of these")
    if not isinstance(lengths, torch.Tensor):
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if lengths.dim() != 1 or lengths.is_floating_point():
        raise bad_input(f"lengths is {lengths.dtype} {tuple(lengths.shape)}", "integers [B]", "count the policy tokens")
    tokens = lengths.sum() if n_tokens_global is None else n_tokens_global
    seqs = lengths.numel() if n_seqs_global is None else n_seqs_global
    ones = torch.ones(lengths.shape, dtype=torch.float64, device=lengths.device)
    per_sequence = ones / (tokens if mode == "token_mean" else seqs)
    if mode == "seq_mean_token_mean":
        per_sequence = per_sequence / lengths.clamp_min(1)
    elif mode == "seq_mean_token_sum_norm":
        if max_len is None or max_len <= 0:
            raise bad_input(f"max_len is {max_len}", f"a positive length for {mode}", "pass the longest response allowed")
        per_sequence = per_sequence / max_len
    return per_sequence.float().repeat_interleave(lengths)
