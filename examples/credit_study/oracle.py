"""The ceiling: what each turn was worth, from the environment's own state. No method of a trainer knows it."""

from __future__ import annotations

import torch

from gear_kernels.methods import PolicyCredit, PolicyTokens


class Oracle:
    """Â_t = what the token's turn changed in the chance of success, in place of the trajectory's advantage.

    On `task=chains` turn rewards are just that, by the exact state, of a policy that is right in each turn with probability 0.8.
    """

    needs = ("turn_rewards",)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        worth = tokens.turn_rewards
        assert worth is not None, "it is in needs"
        none = torch.zeros_like(worth, dtype=torch.bool)
        ids = torch.full_like(tokens.sequence, -1, dtype=torch.int32)  # no segments
        return PolicyCredit(
            torch.ones_like(worth), worth, worth, ids, onsets=none, above=none, unclosed=0, token_advantages=worth
        )
