"""A frozen, ZeRO-3 partitioned model beside the policy: a teacher with weights of its own, or what the KL term holds it to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gear_kernels import Head, linear_token_stats
from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.policy.batching import Rows
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


class FrozenModel:
    """Scores in the policy's place, or beside it. Its weights follow the policy shard by shard: no rank ever needs more than its
    own part.

    The state that follows is `kept`: the model's own shards, or float32 ones beside them for the average of bfloat16 weights
    (a small rate would be lost to rounding). Build it after the policy's engine, with the same ranks. Collective.
    """

    def __init__(self, cfg: Config, policy: Any, model_path: str, rule: Frozen):
        """model_path: the policy's, where the rule names no other."""
        self.rule, self.policy = rule, policy
        self.engine = _frozen_engine(cfg, rule.path or model_path)
        own, wanted = (engine.module.lm.config.get_text_config().vocab_size for engine in (self.engine, policy))
        if own != wanted:
            raise ConfigError(
                f"{rule.key}={rule.path}: its vocabulary has {own} tokens, the policy's {wanted}: give a model like it"
            )
        self.params = list(self.engine.module.lm.parameters())
        own = [p.ds_tensor for p in self.params]
        wide = rule.weights == "ema" and cfg.model.dtype != "float32"
        self.kept = [t.float() for t in own] if wide else own

    # --- scoring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def hidden(self, rows: Rows) -> torch.Tensor:
        """Hidden states [n, D] that predict the n policy tokens of a micro-batch's rows. Collective."""
        return self.engine(rows)

    @torch.no_grad()
    def logprobs(self, rows: Rows, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probs [n], float32, of the n policy tokens `targets` behind the rows' prompts, in nats. Collective."""
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

    # --- following the policy ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After the update of the 1-based step: mix the policy in, or copy it where a sync is due."""
        synced = self.rule.weights == "synced"
        if not self.rule.follows or (synced and step % self.rule.sync_every):
            return
        for kept, policy in zip(self.kept, self.policy.module.lm.parameters(), strict=True):
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
        self.engine.optimizer.partition_all_parameters()


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
