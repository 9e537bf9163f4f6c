"""The ceiling: A* by the environment's own state, which no method of a trainer knows."""

from __future__ import annotations

from collections import defaultdict

import torch

from gear_kernels.methods import PolicyCredit, PolicyTokens


class Oracle:
    """Â_t = V(state after the token's turn) - V(state before it), in place of the trajectory's advantage.

    On `task=chains` turn rewards are differences of a function of the exact state, so their running sum names the state that a
    turn led to. V of a state is the share of the step's rollouts through it that succeed: the running policy's own value.
    """

    needs = ("turn_rewards", "turn_ids")

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        assert tokens.turn_rewards is not None and tokens.turn_ids is not None, "they are in needs"
        worth = torch.zeros_like(tokens.turn_rewards)
        sizes = tokens.lengths.tolist()
        rows = list(zip(tokens.turn_rewards.split(sizes), tokens.turn_ids.split(sizes), worth.split(sizes), strict=True))
        paths = [states(rewards, turns) for rewards, turns, _ in rows]
        lost = min(state for path in paths for state in path)
        won = defaultdict(list)
        for path in paths:
            for place in enumerate(path):
                won[place].append(path[-1] - lost > 0.999)
        value = {place: sum(each) / len(each) for place, each in won.items()}
        for path, (_, turns, out) in zip(paths, rows, strict=True):
            for turn in range(len(path) - 1):
                out[turns == turn] = value[turn + 1, path[turn + 1]] - value[turn, path[turn]]
        none, ids = torch.zeros_like(worth, dtype=torch.bool), torch.full_like(tokens.sequence, -1, dtype=torch.int32)
        return PolicyCredit(torch.ones_like(worth), worth, worth, ids, none, none, unclosed=0, token_advantages=worth)


def states(rewards: torch.Tensor, turns: torch.Tensor) -> list[float]:
    """The running sum of a trajectory's turn rewards, from 0 before the first turn on; lowest where the solution is lost."""
    path = [0.0]
    for turn in range(int(turns.max()) + 1 if len(turns) else 0):
        path.append(round(path[-1] + float(rewards[turns == turn][0]), 4))
    return path
