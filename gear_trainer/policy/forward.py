"""The calls of every pass: a micro-batch's statistics by the policy, its teacher rows under the teacher's weights, and what the
reference model says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gear_kernels import TokenStats
from gear_trainer.policy.batching import MicroBatch
from gear_trainer.policy.frozen import FrozenModel


@dataclass(frozen=True)
class Forward:
    """The policy's engine, its teacher and its reference model.

    teacher: None where the policy itself is the teacher, or where nothing reads one. reference: None without a KL term.
    """

    engine: Any
    teacher: FrozenModel | None
    temperature: float
    jsd_beta: float | None = None  # where a statistic is the Jensen-Shannon divergence
    reference: FrozenModel | None = None

    def __call__(self, batch: MicroBatch, stats: tuple[str, ...]) -> TokenStats:
        """Statistics of a micro-batch's n policy tokens, each [n] float32 (None where not asked for). Collective."""
        options = {} if self.jsd_beta is None else {"jsd_beta": self.jsd_beta}
        if self.teacher is None or batch.teacher is None:
            return self.engine(batch, self.temperature, stats, **options)
        return self.teacher.score(batch, self.temperature, stats, **options)

    def reference_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """Log-probs [n] of a micro-batch's policy tokens under the reference model's weights, float32, nats. Collective."""
        assert self.reference is not None  # the recipe has a KL term
        return self.reference.logprobs(batch.student, batch.targets, self.temperature)
