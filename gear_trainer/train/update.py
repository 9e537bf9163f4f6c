"""The update: losses over the experience's columns, optimizer steps, the learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gear_kernels import TokenStats
from gear_kernels.losses import policy_gradient_loss
from gear_trainer.config import Config
from gear_trainer.policy.batching import MicroBatch
from gear_trainer.policy.forward import Forward
from gear_trainer.recipe import Distillation, Recipe
from gear_trainer.runs.metrics import Sums
from gear_trainer.train.experience import Experience
from gear_trainer.train.schedule import Pass

LOGGED = ("clip_fraction", "dual_clip_fraction", "approx_kl")  # of policy_gradient_loss


class Inputs(NamedTuple):
    """A micro-batch's columns, [n] float32 each; `importance` and `teacher` are None where nothing reads them."""

    old: torch.Tensor  # log-probs of the scoring pass
    advantages: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor | None  # min(p_trainer / p_sampler, cap)
    teacher: torch.Tensor | None  # log-probs of the scoring pass's teacher
    counted: torch.Tensor | int  # tokens that the logged means are taken over


class Updater:
    """Steps a policy on a scored and credited experience."""

    def __init__(self, cfg: Config, recipe: Recipe, forward: Forward):
        self.cfg, self.recipe, self.forward = cfg, recipe, forward
        self.engine, self.distill = forward.engine, recipe.distillation

    def __call__(self, step: int, experience: Experience, passes: list[Pass], sums: Sums) -> None:
        """`updates_per_step` optimizer steps, each over whole groups, normalised by the global count of its trajectories.

        Collective. Adds the loss, its parts, grad_norm and updates_skipped, a total: all ranks skip together.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, step)
        sums.declare(*LOGGED, "grad_norm", *(("divergence",) if self.distill else ()))
        sums.mean("updates_skipped", sum(self._step(part, experience, sums) for part in passes), 1)

    def _step(self, part: Pass, experience: Experience, sums: Sums) -> bool:
        """One optimizer step; True where DeepSpeed skipped it."""
        total: torch.Tensor | float = 0.0
        world = self.cfg.world_size
        for batch in part.micro_batches(experience):
            out = self.forward(batch, self.recipe.stats_to_update)
            assert out.logprobs is not None
            inputs = self._inputs(batch, experience, out.logprobs)
            loss, parts = self._loss(out, inputs)
            # DeepSpeed averages over ranks; the weights already are global means. A loss that is not finite makes every gradient
            # NaN, also where a clip would have stopped it: DeepSpeed then skips the step, on all ranks alike.
            self.engine.backward(loss * world * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
            for name, value in parts.items():
                sums.mean(name, value.double() * inputs.counted, inputs.counted)
            total = total + loss.detach().double() * world
        sums.mean("loss", total, 1)
        if not part.count:  # on every rank or on none; with all rewards of every group alike there is nothing to step on
            return False
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        sums.mean("grad_norm", 0.0 if norm is None else norm, 1)
        return not self.engine.was_step_applied()

    def _inputs(self, batch: MicroBatch, e: Experience, like: torch.Tensor) -> Inputs:
        """The columns at the batch's tokens; zeros for a padding micro-batch, whose loss is 0 but in the graph."""
        if not batch.rows:
            zeros = torch.zeros_like(like)
            return Inputs(like.detach(), zeros, zeros, None, like.detach(), 0)
        places = e.tokens(batch.rows)
        names = ("logprobs", "token_advantages", "loss_weights", "sampler_logprobs")
        old, advantages, weights, sampler = (e[name].index_select(0, places) for name in names)
        cap = self.cfg.train.importance_cap
        importance = None if cap is None else (old - sampler).exp().clamp(max=cap)
        teacher = e["teacher_logprobs"].index_select(0, places) if self.recipe.teaches_all else None
        return Inputs(old, advantages, weights, importance, teacher, e["moves"].index_select(0, places).sum().double())

    def _loss(self, out: TokenStats, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert out.logprobs is not None
        loss, parts = self._policy_loss(out.logprobs, inputs)
        if self.distill:
            added, divergence = self._distillation(self.distill, out, inputs)
            return loss + added, parts | {"divergence": divergence}
        return loss, parts

    def _policy_loss(self, logprobs: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The clipped surrogate and the numbers to log."""
        if self.distill and self.distill.alone:
            return logprobs.new_zeros(()), {}
        t = self.cfg.train
        loss, parts = policy_gradient_loss(
            logprobs,
            inputs.old,
            inputs.advantages,
            inputs.weights,
            clip_low=t.clip_low,
            clip_high=t.clip_high,
            dual_clip=t.dual_clip,
            importance_weights=inputs.importance,
        )
        return loss, {name: parts[name] for name in LOGGED}

    def _distillation(self, distill: Distillation, out: TokenStats, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The distillation loss of a micro-batch and its mean divergence; a sampled one is corrected as the surrogate is."""
        if distill.full:
            return distill.loss(out, inputs.old, None, inputs.weights)
        weights = inputs.weights if inputs.importance is None else inputs.weights * inputs.importance
        return distill.loss(out, inputs.old, inputs.teacher, weights)


def learning_rate(cfg: Config, step: int) -> float:
    """The rate of the 1-based step; a pure function, so a resumed run needs no scheduler state."""
    t = cfg.train
    if step <= t.lr_warmup_steps:
        return t.lr * step / t.lr_warmup_steps
    done = (step - 1 - t.lr_warmup_steps) / max(1, t.steps - t.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[t.lr_schedule]
    return t.lr * factor
