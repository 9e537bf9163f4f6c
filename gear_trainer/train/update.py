"""The update: losses over the experience's columns, optimizer steps, the learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gear_kernels import TokenStats, sparse
from gear_kernels.losses import cispo_loss, entropy_loss, gspo_loss, importance_weights, policy_gradient_loss
from gear_trainer.config import Config
from gear_trainer.policy.batching import MicroBatch, on_device
from gear_trainer.policy.forward import Forward
from gear_trainer.recipe import Distillation, Recipe
from gear_trainer.runs.metrics import Sums
from gear_trainer.train.experience import Experience
from gear_trainer.train.schedule import Pass
from gear_trainer.train.score import keep

LOGGED = ("clip_fraction", "dual_clip_fraction", "approx_kl")  # of the policy losses


class Inputs(NamedTuple):
    """A micro-batch's columns, [n] float32 each; `importance`, `teacher` and `reference` are None where nothing reads them."""

    old: torch.Tensor  # log-probs before the step's first update
    advantages: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor | None  # of p_trainer / p_sampler, see gear_kernels.losses.importance_weights
    teacher: torch.Tensor | None  # log-probs of the scoring pass's teacher
    reference: torch.Tensor | None  # log-probs of the reference model
    cu_seqlens: torch.Tensor  # int32 [rollouts + 1]
    counted: torch.Tensor | int  # tokens that the logged means are taken over


class Updater:
    """Steps a policy on a credited experience, and scores what `Recipe.scores_first` leaves to it."""

    def __init__(self, cfg: Config, recipe: Recipe, forward: Forward):
        self.cfg, self.recipe, self.forward, self.engine = cfg, recipe, forward, forward.engine

    def __call__(self, step: int, experience: Experience, passes: list[Pass], sums: Sums) -> None:
        """`updates_per_step` optimizer steps, each over whole groups, normalised by the global count of its trajectories.

        Collective. Adds the loss, its parts, grad_norm, and updates_skipped, a total: all ranks skip together; of a sparse head
        the share of columns that were kept, and the largest bound on the error.
        """
        recipe = self.recipe.at(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, step)
        sums.declare(*LOGGED, "grad_norm", *(("divergence",) if self.recipe.distillation else ()))
        sums.declare(*(("reference_kl",) if recipe.kl else ()), *(("importance_masked",) if self._masks else ()))
        if self.cfg.train.head_backward == "sparse":
            sums.declare("head_kept")
            sums.peak("head_bound", 0.0)
        sums.mean("updates_skipped", sum(self._step(recipe, part, experience, sums) for part in passes), 1)

    @property
    def _masks(self) -> bool:
        """True where importance weights may be 0."""
        return self.cfg.train.importance_mode != "truncate"

    def _step(self, recipe: Recipe, part: Pass, experience: Experience, sums: Sums) -> bool:
        """One optimizer step; True where DeepSpeed skipped it."""
        total: torch.Tensor | float = 0.0
        world = self.cfg.world_size
        for batch in part.micro_batches(experience):
            out = self.forward(batch, recipe.stats_to_update)
            assert out.logprobs is not None
            if batch.rows and not recipe.scores_first:
                keep(recipe, experience, batch.rows, out)
            inputs = self._inputs(recipe, batch, experience, out.logprobs)
            loss, parts = self._loss(recipe, out, inputs)
            # DeepSpeed averages over ranks; the weights already are global means. A loss that is not finite makes every gradient
            # NaN, also where a clip would have stopped it: DeepSpeed then skips the step, on all ranks alike.
            with sparse.reports() as heads:
                self.engine.backward(loss * world * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
            for report in heads:
                sums.mean("head_kept", report.kept, 1)
                sums.peak("head_bound", report.bound)
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

    def _inputs(self, recipe: Recipe, batch: MicroBatch, e: Experience, like: torch.Tensor) -> Inputs:
        """The columns at the batch's tokens; zeros for a padding micro-batch, whose loss is 0 but in the graph."""
        bounds = torch.tensor([0, *(e.lengths[i] for i in batch.rows)] if batch.rows else [0, 1]).cumsum(0).to(torch.int32)
        cu_seqlens = on_device(bounds, like.device)
        if not batch.rows:
            zeros, old = torch.zeros_like(like), like.detach()
            return Inputs(old, zeros, zeros, None, old, old, cu_seqlens, 0)
        places = e.tokens(batch.rows)
        names = ("logprobs", "token_advantages", "loss_weights", "sampler_logprobs")
        old, advantages, weights, sampler = (e[name].index_select(0, places) for name in names)
        teacher = e["teacher_logprobs"].index_select(0, places) if recipe.teaches_all else None
        reference = e["reference_logprobs"].index_select(0, places) if recipe.kl else None
        counted = e["moves"].index_select(0, places).sum().double()
        importance = self._importance(old, sampler, cu_seqlens)
        return Inputs(old, advantages, weights, importance, teacher, reference, cu_seqlens, counted)

    def _importance(self, old: torch.Tensor, sampler: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor | None:
        t = self.cfg.train
        if t.importance_cap is None:
            return None
        bounds = {"cap": t.importance_cap, "floor": t.importance_floor}
        return importance_weights(old, sampler, t.importance_mode, **bounds, cu_seqlens=cu_seqlens)

    def _loss(self, recipe: Recipe, out: TokenStats, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the recipe's terms, and the numbers to log."""
        assert out.logprobs is not None
        loss, parts = self._policy_loss(recipe, out.logprobs, inputs)
        if recipe.distillation:
            added, parts["divergence"] = self._distillation(recipe.distillation, out, inputs)
            loss = loss + added
        if recipe.kl:
            assert inputs.reference is not None
            added, parts["reference_kl"] = recipe.kl.loss(out.logprobs, inputs.reference, inputs.weights)
            loss = loss + added
        if recipe.entropy_bonus:
            assert out.entropy is not None
            loss = loss + recipe.entropy_bonus * entropy_loss(out.entropy, inputs.weights)[0]
        if inputs.importance is not None and self._masks:
            parts["importance_masked"] = (inputs.importance == 0).double().mean()
        return loss, parts

    def _policy_loss(
        self, recipe: Recipe, logprobs: torch.Tensor, inputs: Inputs
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The surrogate of `train.policy_loss` and its numbers."""
        if recipe.distillation and recipe.distillation.alone:
            return logprobs.new_zeros(()), {}
        t = self.cfg.train
        given = logprobs, inputs.old, inputs.advantages, inputs.weights
        options = {"clip_low": t.clip_low, "clip_high": t.clip_high, "importance_weights": inputs.importance}
        if t.policy_loss == "cispo":
            loss, parts = cispo_loss(*given, **options)
        elif t.policy_loss == "gspo":
            loss, parts = gspo_loss(*given, inputs.cu_seqlens, dual_clip=t.dual_clip, **options)
        else:
            loss, parts = policy_gradient_loss(*given, dual_clip=t.dual_clip, **options)
        return loss, {name: parts[name] for name in LOGGED if name in parts}

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
