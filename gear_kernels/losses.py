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

import torch
from torch import nn

from .errors import bad_input
from .stats import Head, linear_token_stats

_LOG_RATIO_LIMIT, _K3_LIMIT = 20.0, 10.0  # nats; e^20 is 4.9e8
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


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
    trainer to sampler. Computed in the dtype of logprobs.

    Returns the loss (a scalar) and detached scalars over the tokens of weight other than 0: tokens (their number), clip_fraction
    (where the clipped term is the smaller), dual_clip_fraction (where c A is the larger, 0 without dual_clip), ratio_mean,
    ratio_max, approx_kl (KL(old || new) by r - 1 - log r, nats, at most 10 a token); 0 if there are no tokens. Raises
    GearKernelsError where shapes differ, and for a dual_clip that is not above 1.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise bad_input(f"dual_clip is {dual_clip}", "a number above 1, or None", "3.0 is usual")
    given = {"old_logprobs": old_logprobs, "token_advantages": token_advantages, "token_weights": token_weights}
    if importance_weights is not None:
        given["importance_weights"] = importance_weights
    _check_shapes(logprobs, given)
    used = token_weights != 0
    log_ratio = _bounded(torch.where(used, logprobs - old_logprobs.detach(), 0))
    ratio = log_ratio.exp()
    advantages = torch.where(used, token_advantages, 0).detach()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    term, bounded = torch.minimum(plain, clipped), torch.zeros_like(used)
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        term, bounded = torch.maximum(term, floor), floor > term
    weights = token_weights if importance_weights is None else token_weights * torch.where(used, importance_weights, 0)
    loss = -(weights.detach() * term).sum()
    metrics = _policy_metrics(log_ratio.detach(), used, (clipped < plain).detach())
    return loss, metrics | {"dual_clip_fraction": (bounded & used).sum() / metrics["tokens"].clamp_min(1)}


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
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss sum of token_weights * a divergence of student and teacher over the whole vocabulary, from hidden states [..., D].

    beta: 1 is reverse KL(S || T), 0 forward KL(T || S), between the generalised Jensen-Shannon divergence beta KL(T || M) +
    (1 - beta) KL(S || M) with M = beta T + (1 - beta) S (GKD, arXiv 2306.13649; OPSD). As in TRL the two ends are the KLs
    themselves, not the limits of the formula between them, which vanish; no factor temperature^2. head, teacher_head,
    temperature, workspace_bytes: as in `linear_token_stats`; head may also be a FusedHead, then called as a module (ZeRO-3).
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
    call["teacher_head"] = teacher_head
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
