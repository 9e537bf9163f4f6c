"""When a run ends before its last step: weights that did not arrive, numbers that are not finite, a stop that was asked for."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.errors import RunError
from gear_trainer.policy import checkpoint

BAD_STEPS = 3  # in a row, of updates skipped or log-probs that are not finite; then the run ends: nothing is learnt any more


class SyncError(RunError):
    """vLLM does not hold the trainer's weights."""


class NonFiniteError(RunError):
    """Losses, gradients or log-probs were not finite for too long."""


def check_gap(cfg: Config, step: int, mean: float | None) -> None:
    """Raises SyncError where the first step's mean gap of log-probs (nats; None: nothing was sampled) is too wide."""
    if mean is not None and not mean <= cfg.max_logprob_gap:  # NaN is too far
        raise SyncError(
            f"step {step}: trainer and vLLM differ by {mean:.3g} nats a token on the same tokens "
            f"(max_logprob_gap={cfg.max_logprob_gap}): the pushed weights did not arrive, or the models differ"
        )


class Finite:
    """Counts the steps in a row that brought nothing."""

    def __init__(self, cfg: Config):
        self.cfg, self.bad = cfg, 0

    def check(self, step: int, values: dict) -> None:
        """Raises NonFiniteError after too many of them."""
        self.bad = self.bad + 1 if values["updates_skipped"] or values["nonfinite_tokens"] else 0
        if self.bad < BAD_STEPS:
            return
        last = checkpoint.latest_step(self.cfg)
        where = f"step {last}, the last checkpoint" if last else "the start, as there is no checkpoint"
        raise NonFiniteError(
            f"steps {step - BAD_STEPS + 1} to {step}: losses, gradients or log-probs were not finite, and updates skipped; "
            f"--resume goes on from {where}: lower train.lr, or look at the rewards and advantages in the run's rollouts"
        )


def agreed(asked: bool, device: torch.device) -> bool:
    """True where any rank asks for it. Collective."""
    flag = torch.tensor(int(asked), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
