"""Rewards to advantages, one a rollout: the group's baseline, the scale, the penalty of overlong ones."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gear_trainer.config import TrainConfig
from gear_trainer.rollout import Rollout, groups_of

EPS = 1e-6  # beside a standard deviation


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), from 0 to -1: what is added to a rollout's reward.

    0 up to longest - buffer policy tokens, then falling evenly to -1 at `longest`, -1 beyond.
    """
    return -min(max(length - (longest - buffer), 0) / buffer, 1.0)


def penalties(t: TrainConfig, rollouts: list[Rollout], max_new_tokens: int) -> list[float] | None:
    """Each rollout's overlong penalty; None where the configuration has none."""
    if t.overlong_buffer is None:
        return None
    longest = t.overlong_length or max_new_tokens
    return [overlong_penalty(sum(r.mask), longest, t.overlong_buffer) for r in rollouts]


def group_advantages(
    rollouts: list[Rollout], how: str = "grpo", penalty: list[float] | None = None, device: torch.device | None = None
) -> list[float]:
    """Each rollout's advantage, relative to the group of rollouts of one prompt, out of its reward and penalty.

    grpo: (R_k - mean) / (std + 1e-6), the group's (arXiv 2402.03300). dr_grpo: R_k - mean (arXiv 2503.20783). rloo: R_k - the
    mean of the others, which is G / (G - 1) times that (arXiv 2402.14740). batch: (R_k - mean) / (std + 1e-6) with the standard
    deviation of all rewards of the step (Lite PPO, arXiv 2508.08221): then, with ranks, a collective on `device`.

    Exactly 0 where all rewards of a group agree, and in a group of which a rollout failed: its reward is unknown, and the others'
    mean without it is another.
    """
    groups, at = [], 0
    for group in groups_of(rollouts):
        own = penalty[at : at + len(group)] if penalty else [0.0] * len(group)
        rewards = torch.tensor([r.reward + p for r, p in zip(group, own, strict=True)], dtype=torch.float64)
        groups.append((rewards, any(r.failed for r in group)))
        at += len(group)
    scale = _spread([rewards for rewards, failed in groups if not failed], device) if how == "batch" else None
    out: list[float] = []
    for rewards, failed in groups:
        if failed or (rewards == rewards[0]).all():
            out += [0.0] * len(rewards)
            continue
        out += _scaled(rewards - rewards.mean(), rewards.std() if scale is None else scale, how).tolist()
    return out


def _scaled(centred: torch.Tensor, std: torch.Tensor, how: str) -> torch.Tensor:
    if how == "dr_grpo":
        return centred
    if how == "rloo":
        return centred * (len(centred) / (len(centred) - 1))
    return centred / (std + EPS)


def _spread(rewards: list[torch.Tensor], device: torch.device | None) -> torch.Tensor:
    """The standard deviation of all ranks' rewards. Collective."""
    own = torch.cat(rewards) if rewards else torch.zeros(0, dtype=torch.float64)
    count, total = _summed([len(own), own.sum().item()], device)
    (squares,) = _summed([(own - total / max(count, 1)).square().sum().item()], device)
    return torch.tensor(squares / max(count - 1, 1), dtype=torch.float64).sqrt()


def _summed(values: list[float], device: torch.device | None) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
