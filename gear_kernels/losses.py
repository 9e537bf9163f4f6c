"""Losses on top of per-token outputs: short torch, any shape, weights given by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import bad_input

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def policy_gradient_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    token_advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-sum of token_weights * importance_weights * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): the clipped surrogate.

    All arguments have one shape, such as [T]; r = exp(logprobs - old_logprobs). Only `logprobs` is differentiated. Tokens of
    weight 0 contribute exactly nothing, whatever they hold. token_weights: see `aggregation_weights`. importance_weights: a
    factor per token, such as the truncated ratio of trainer to sampler. Computed in the dtype of logprobs.

    Returns the loss (a scalar) and detached scalars over the tokens of weight other than 0: tokens (their number), clip_fraction
    (where the clipped term is the smaller), ratio_mean, ratio_max, approx_kl (KL(old || new) by r - 1 - log r, nats); 0 if there
    are no tokens. Raises GearKernelsError where shapes differ.
    """
    given = {"old_logprobs": old_logprobs, "token_advantages": token_advantages, "token_weights": token_weights}
    if importance_weights is not None:
        given["importance_weights"] = importance_weights
    for name, tensor in given.items():
        if tensor.shape != logprobs.shape:
            raise bad_input(
                f"{name} has shape {tuple(tensor.shape)}", f"logprobs' {tuple(logprobs.shape)}", "align token by token"
            )
    used = token_weights != 0
    log_ratio = torch.where(used, logprobs - old_logprobs.detach(), 0)
    ratio = log_ratio.exp()
    advantages = torch.where(used, token_advantages, 0).detach()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    weights = token_weights if importance_weights is None else token_weights * torch.where(used, importance_weights, 0)
    loss = -(weights.detach() * torch.minimum(plain, clipped)).sum()
    return loss, _policy_metrics(log_ratio.detach(), used, (clipped < plain).detach())


def _policy_metrics(log_ratio: torch.Tensor, used: torch.Tensor, clipped: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = used.sum()
    count = tokens.clamp_min(1)
    ratio = torch.where(used, log_ratio.exp(), 0)
    ratio_max = ratio.max() if ratio.numel() else ratio.sum()
    k3 = torch.where(used, torch.expm1(log_ratio) - log_ratio, 0)  # expm1: r - 1 loses all digits near r = 1
    means = {"clip_fraction": (clipped & used).sum() / count, "ratio_mean": ratio.sum() / count, "approx_kl": k3.sum() / count}
    return {"tokens": tokens, "ratio_max": ratio_max, **means}


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
    if mode == "seq_mean_token_sum_norm" and (max_len is None or max_len <= 0):
        raise bad_input(f"max_len is {max_len}", f"a positive length for {mode}", "pass the longest response allowed")
    tokens = lengths.sum() if n_tokens_global is None else n_tokens_global
    seqs = lengths.numel() if n_seqs_global is None else n_seqs_global
    ones = torch.ones(lengths.shape, dtype=torch.float64, device=lengths.device)
    per_sequence = {
        "token_mean": lambda: ones / tokens,
        "seq_mean_token_mean": lambda: ones / seqs / lengths.clamp_min(1),
        "seq_mean_token_sum": lambda: ones / seqs,
        "seq_mean_token_sum_norm": lambda: ones / seqs / max_len,
    }[mode]()
    return per_sequence.float().repeat_interleave(lengths)
