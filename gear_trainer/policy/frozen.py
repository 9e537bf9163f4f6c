"""A frozen, ZeRO-3 partitioned model beside the policy: a teacher with weights of its own, or what the KL term holds it to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gear_kernels import Head, TokenStats, linear_token_stats
from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.policy import lora
from gear_trainer.policy.batching import MicroBatch, Rows
from gear_trainer.policy.gather import gathered
from gear_trainer.policy.model import hidden_states
from gear_trainer.policy.zero import deepspeed_config, load_partitioned
from gear_trainer.recipe import Frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Backbone(nn.Module):
    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm

    def forward(self, rows: Rows) -> torch.Tensor:
        return hidden_states(self.lm, rows)


class FrozenModel(ABC):
    """Scores in the policy's place, or beside it. Its weights follow the policy shard by shard: no rank ever needs more than its
    own part.

    The state that follows is `kept`: the model's own shards, or float32 ones beside them for the average of bfloat16 weights
    (a small rate would be lost to rounding). `followed`: the policy's parameters, in the order of `params`. Build it after the
    policy's engine, with the same ranks. Collective.
    """

    def __init__(self, cfg: Config, engine: Any, rule: Frozen, params: list[Any], followed: list[Any]):
        """engine: the one that holds `params`, which are ZeRO-3's as `followed` are."""
        self.rule, self.engine, self.params, self.followed = rule, engine, params, followed
        own = [p.ds_tensor for p in params]
        wide = rule.weights == "ema" and cfg.model.dtype != "float32"
        self.kept = [t.float() for t in own] if wide else own

    # --- scoring ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, batch: MicroBatch, temperature: float, stats: tuple[str, ...], **options: Any) -> TokenStats:
        """The policy's statistics [n] of a micro-batch with this model as the teacher of its teacher rows. Collective."""

    @abstractmethod
    def logprobs(self, rows: Rows, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probs [n], float32, of the n policy tokens `targets` behind the rows' prompts, in nats. Collective."""

    # --- following the policy ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After the update of the 1-based step: mix the policy in, or copy it where a sync is due."""
        synced = self.rule.weights == "synced"
        if not self.rule.follows or (synced and step % self.rule.sync_every):
            return
        for kept, policy in zip(self.kept, self.followed, strict=True):
            new = policy.ds_tensor.to(kept)
            kept.copy_(new) if synced else kept.lerp_(new, self.rule.ema_rate)
        self._publish()

    def state(self) -> list[torch.Tensor]:
        """This rank's shards of what follows, in the order of the model's parameters, on the CPU."""
        return [t.to("cpu", copy=True) for t in self.kept]

    @torch.no_grad()
    def load_state(self, state: list[torch.Tensor]) -> None:
        """Raises ConfigError where the shards are another model's or another rule's."""
        have, want = ([(t.shape, t.dtype) for t in tensors] for tensors in (state, self.kept))
        if have != want:
            raise ConfigError(
                f"{self.rule.key}={self.rule.weights}: the checkpoint's {self.rule.name} has other shards; "
                f"resume with the model.dtype, {self.rule.key} and model that it was written with"
            )
        for kept, saved in zip(self.kept, state, strict=True):
            kept.copy_(saved)
        self._publish()

    def _publish(self) -> None:
        """Let the next forward see `kept`. ZeRO-3 holds small parameters whole between forwards: those copies are dropped."""
        for p, kept in zip(self.params, self.kept, strict=True):
            if kept is not p.ds_tensor:
                p.ds_tensor.copy_(kept)
        optimizer = self.engine.optimizer  # of an engine that trains nothing it is the partitioning itself
        getattr(optimizer, "parameter_offload", optimizer).partition_all_parameters()


class SeparateModel(FrozenModel):
    """A frozen model with all its weights, in an engine of its own."""

    def __init__(self, cfg: Config, policy: Any, model_path: str, rule: Frozen):
        """model_path: the policy's, where the rule names no other."""
        self.policy = policy
        engine = _frozen_engine(cfg, rule.path or model_path)
        own, wanted = (engine.module.lm.config.get_text_config().vocab_size for engine in (engine, policy))
        if own != wanted:
            raise ConfigError(
                f"{rule.key}={rule.path}: its vocabulary has {own} tokens, the policy's {wanted}: give a model like it"
            )
        followed = list(policy.module.lm.parameters())
        super().__init__(cfg, engine, rule, list(engine.module.lm.parameters()), followed)

    def score(self, batch: MicroBatch, temperature: float, stats: tuple[str, ...], **options: Any) -> TokenStats:
        assert batch.teacher is not None
        hidden = self.hidden(batch.teacher)
        with self.head() as head:
            return self.policy(replace(batch, teacher=None), temperature, stats, (hidden, head), **options)

    @torch.no_grad()
    def hidden(self, rows: Rows) -> torch.Tensor:
        """Hidden states [n, D] that predict the n policy tokens of a micro-batch's rows. Collective."""
        return self.engine(rows)

    @torch.no_grad()
    def logprobs(self, rows: Rows, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        hidden = self.hidden(rows)
        with self.head() as head:
            out = linear_token_stats(hidden, head, targets, temperature=temperature, stats=("logprobs",))
        assert out.logprobs is not None
        return out.logprobs

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The model's own head, whole while the context lasts (and as long as a backward pass holds on to it). Collective."""
        layer, like = self.engine.module.lm.get_output_embeddings(), self.policy.module.lm.get_output_embeddings()
        with gathered([p for p in (layer.weight, layer.bias) if p is not None]):
            bias = None if layer.bias is None else layer.bias.detach()
            yield Head(layer.weight.detach(), bias, like.softcap, like.scale)


class SharedModel(FrozenModel):
    """A frozen model on the weights that a policy with LoRA keeps as they were: the starting model where the adapters are off,
    or what a set of adapters of its own, which follows the policy's, makes of it. It costs no second copy of the weights.
    """

    def __init__(self, cfg: Config, policy: Any, rule: Frozen):
        self.adapters = rule.name if rule.follows else None
        own, followed = (lora.parameters(policy.module.lm, name) if rule.follows else [] for name in (rule.name, lora.POLICY))
        super().__init__(cfg, policy, rule, own, followed)

    def score(self, batch: MicroBatch, temperature: float, stats: tuple[str, ...], **options: Any) -> TokenStats:
        return self.engine(batch, temperature, stats, adapters={"teacher": self.adapters}, **options)

    @torch.no_grad()
    def logprobs(self, rows: Rows, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        batch = MicroBatch(rows, None, targets, [])
        out = self.engine(batch, temperature, ("logprobs",), adapters={"student": self.adapters})
        assert out.logprobs is not None
        return out.logprobs


def frozen_model(cfg: Config, policy: Any, model_path: str, rule: Frozen) -> FrozenModel:
    """The model that the rule describes, beside the policy's engine. Collective. Raises ConfigError for another vocabulary."""
    return SharedModel(cfg, policy, rule) if shares_weights(cfg, rule) else SeparateModel(cfg, policy, model_path, rule)


def shares_weights(cfg: Config, rule: Frozen) -> bool:
    """True where the model stands on the policy's own weights, which LoRA leaves as they were."""
    return cfg.lora.rank > 0 and rule.path is None


def _frozen_engine(cfg: Config, model_path: str) -> Any:
    import deepspeed

    config = deepspeed_config(cfg)
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    lm, keep_alive = load_partitioned(cfg, model_path, config)
    lm.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=_Backbone(lm), config=config)
    engine.eval()
    engine.hf_deepspeed_config = keep_alive
    return engine
