"""What `credit` says: a credit method, a distillation loss (opsd, sdar), or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gear_kernels import TokenStats
from gear_kernels.losses import divergence_loss, divergence_stat, sampled_distillation_loss, sdar_loss
from gear_kernels.methods import METHODS
from gear_trainer.config import Config, ConfigError

LOSSES = ("opsd", "sdar")
TEACHER_ROWS = ("teacher_entropy", "forward_kl")  # what some methods read beside the signal


@dataclass(frozen=True)
class Distillation:
    """A loss that pulls the policy towards its teacher on every trajectory, those of advantage 0 too.

    opsd, full: the generalised JSD over the whole vocabulary, gradient to the student only. opsd, sampled: reverse KL as a policy
    gradient of the sampled tokens. sdar: the gated term of arXiv 2605.15155. Both of these read the scoring pass's teacher.
    """

    name: str
    variant: str
    beta: float
    coefficient: float
    alone: bool  # no policy-gradient term beside it

    @property
    def full(self) -> bool:
        return self.name == "opsd" and self.variant == "full"

    @property
    def stats(self) -> tuple[str, ...]:
        """What the update pass must compute beside the log-probs."""
        return (divergence_stat(self.beta)[0],) if self.full else ()

    @property
    def jsd_beta(self) -> float:
        return divergence_stat(self.beta)[1]

    def loss(
        self, out: TokenStats, old: torch.Tensor, teacher: torch.Tensor | None, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted loss over n policy tokens, times the coefficient, and their mean divergence (nats), both scalars.

        old, teacher: [n] log-probs of the scoring pass; the full variant reads neither. weights: [n], see aggregation_weights.
        """
        if self.full:
            loss, metrics = divergence_loss(getattr(out, self.stats[0]), weights)
        elif self.name == "sdar":
            loss, metrics = sdar_loss(out.logprobs, teacher, weights)
        else:
            loss, metrics = sampled_distillation_loss(out.logprobs, old, teacher, weights)
        return self.coefficient * loss, metrics["divergence"]


def parse_credit(credit: str) -> tuple[str, str | None]:
    """`credit` as (name of its credit method or module:Class, name of its distillation loss or None). Raises ConfigError."""
    parts = [part.strip() for part in credit.split("+")]
    for part in parts:
        if part not in METHODS and part not in LOSSES and ":" not in part:
            which = "" if part == credit else f"{part!r} is unknown; "
            known = f"known are {', '.join((*METHODS, *LOSSES))}, or a + of two such as opsd+gear"
            raise ConfigError(f"credit={credit}: {which}{known}; module:Class for a method of your own")
    methods, losses = [p for p in parts if p not in LOSSES], [p for p in parts if p in LOSSES]
    if len(methods) > 1 or len(losses) > 1:
        raise ConfigError(f"credit={credit}: give one credit method and at most one of {' and '.join(LOSSES)} beside it")
    return methods[0] if methods else "grpo", losses[0] if losses else None


def make_distillation(cfg: Config) -> Distillation | None:
    """None where `credit` names no distillation loss. Raises ConfigError."""
    _, name = parse_credit(cfg.credit)
    if name is None:
        return None
    alone = cfg.credit.strip() == "opsd"  # sdar alone is sdar+grpo, as in its paper
    coefficient = {"sdar": 0.01, "opsd": 1.0 if alone else 0.1}[name]
    d = cfg.distill
    return Distillation(name, d.variant, d.beta, d.coefficient if d.coefficient is not None else coefficient, alone)


def reads_teacher(cfg: Config, method: Any) -> bool:
    """Whether anything in the run asks for the teacher's view of a token."""
    return make_distillation(cfg) is not None or bool({"signal", *TEACHER_ROWS} & set(method.needs))
