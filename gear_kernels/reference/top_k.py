"""Log-probs of a few tokens of each row, the mass of all others in one bucket, and divergences over that support; plain torch.

For tokens S of a row: log p_v of v in S, and log r, r = sum of p_v over all others. With the tokens as K buckets and the others
as one more, KL(P' || Q') <= KL(P || Q), as for any sums of probabilities. SDPO (arXiv 2601.20802) takes this support with the
student's most likely tokens, a cache of a teacher with its own.
"""

from __future__ import annotations

import torch

from .stats import Rows


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V], tokens [N, K] (-1: none) -> their log-probs [N, K], -inf for none, and log of the others' mass [N].

    0 in ignored rows. A log-prob of -inf, and an empty rest, -inf, pass no gradient.
    """
    keep = rows.keep()[:, None]
    z = torch.where(keep, logits, 0) * rows.inv_temperature[:, None]
    norm = z.logsumexp(-1, keepdim=True)
    own = (tokens[:, :, None] == torch.arange(z.shape[1], device=z.device)).any(1)
    none = (tokens < 0) | (z.gather(1, tokens.clamp_min(0)) == -torch.inf)
    logprobs = torch.where(none, -torch.inf, z.gather(1, tokens.clamp_min(0)) - norm)
    others = z.masked_fill(own, -torch.inf)
    empty = (others == -torch.inf).all(-1, keepdim=True)
    rest = torch.where(empty, -torch.inf, torch.where(empty, 0, others).logsumexp(-1, keepdim=True) - norm)
    return torch.where(keep, logprobs, 0), torch.where(keep, rest, 0)[:, 0]


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Log-probs of buckets [..., K + 1] under two distributions -> KL(p || q) in nats [...], never negative.

    Buckets without p count 0; +inf where a bucket has p and no q, without a gradient.
    """
    null, outside = log_p == -torch.inf, (log_q == -torch.inf) & (log_p != -torch.inf)
    difference = torch.where(null | outside, 0, log_p) - torch.where(null | outside, 0, log_q)
    value = (torch.where(null, 0, log_p).exp() * difference).masked_fill(null, 0).sum(-1)
    value = value + (-value).clamp_min(0).detach()
    return torch.where(outside.any(-1), torch.inf, value)
