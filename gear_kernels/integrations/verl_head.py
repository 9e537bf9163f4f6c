"""The operator behind verl's fused head: log-probs and entropy of hidden states, in float32, without logits.

Importing this file puts it there. verl does that in every process when it finds the file's name in its environment:
VERL_USE_EXTERNAL_MODULES=gear_kernels.integrations.verl_head. It is used where actor_rollout_ref.model.use_fused_kernels is set,
with the backends torch and liger, by verl's engines on transformers models.
"""

from __future__ import annotations

import torch
from torch import nn
from verl.utils.experimental import torch_functional  # pyright: ignore[reportMissingImports]

from ..stats import linear_token_stats


class GearLinearForPPO(nn.Module):
    """Takes the place of verl's FusedLinearForPPO: the same call; both results are float32 whatever the weights' dtype."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        del chunk_size, impl_backend  # the operator sizes its tiles itself

    def forward(
        self, hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor, temperature: float = 1.0
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Log-probs of input_ids and entropies, nats, both float32 of input_ids' shape [...].

        hidden_states [..., D] and vocab_weights [V, D] floating; input_ids [...] integers, the tokens that follow; temperature
        divides the logits. Raises GearKernelsError as `linear_token_stats` does.
        """
        stats = linear_token_stats(
            hidden_states, vocab_weights, input_ids, temperature=temperature, stats=("logprobs", "entropy")
        )
        return stats.logprobs, stats.entropy


def patch_fused_head() -> None:
    """Put GearLinearForPPO in the place where verl's patched forwards look their head up, at each call."""
    torch_functional.FusedLinearForPPO = GearLinearForPPO


patch_fused_head()
