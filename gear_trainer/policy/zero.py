"""The policy under ZeRO-3: DeepSpeed's configuration, partitioned loading, the engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from gear_trainer.config import Config
from gear_trainer.policy import lora
from gear_trainer.policy.model import Policy
from gear_trainer.policy.packing import pack_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, before its first import: left alone it looks for one, and says so."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def deepspeed_config(cfg: Config) -> dict[str, Any]:
    """The DeepSpeed configuration that this run means; `deepspeed:` of the config file is merged over it."""
    t = cfg.train
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of backwards, then one step: micro-batches are cut by tokens
        "gradient_clipping": t.gradient_clipping,  # always explicit: unset means 1.0, not off
        "bf16": {"enabled": cfg.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # unset: the model's, and some 19 micro-batches would be added in bfloat16
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": t.lr, "betas": list(t.betas), "weight_decay": t.weight_decay, "torch_adam": True},
        },
    }
    return _merge(generated, cfg.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return out


def build_engine(cfg: Config, model_path: str, beside: tuple[str, ...] = (), resharded: bool = False):
    """Load the policy partitioned (each rank reads, none holds the whole) and wrap it in a ZeRO-3 engine. Collective.

    beside: names of the sets of LoRA adapters that it holds for models that follow it. resharded: it loads a checkpoint in
    DeepSpeed's universal format. Raises ConfigError where LoRA has no layer to stand on.
    """
    import deepspeed

    config = deepspeed_config(cfg)
    if resharded:
        config["checkpoint"] = config.get("checkpoint", {}) | {"load_universal": True}
    lm, keep_alive = load_partitioned(cfg, model_path, config)
    if cfg.lora.rank:
        lora.attach(lm, cfg.lora, cfg.seed, beside)
    if cfg.model.gradient_checkpointing:
        checkpoint_layers(lm)
    engine, *_ = deepspeed.initialize(
        model=Policy(lm, cfg.train.head_backward),
        config=config,
        model_parameters=[p for p in lm.parameters() if p.requires_grad],  # pyright: ignore[reportArgumentType]  (annotated as one module)
    )
    engine.hf_deepspeed_config = keep_alive
    return engine


def checkpoint_layers(lm: PreTrainedModel) -> None:
    """HF recomputes only layers in training mode, and from_pretrained leaves all in evaluation mode: switch on these alone.

    What is inside them stays in evaluation mode: dropout would make the update's log-probs differ from the scored ones.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in lm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def load_partitioned(cfg: Config, model_path: str, config: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """The HF model, partitioned as `config` (DeepSpeed's) says, and an object to keep as long as its engine. Collective."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(config)  # from_pretrained partitions only while this object lives
    dtype = getattr(torch, cfg.model.dtype)
    lm = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation=cfg.model.attn_implementation)
    if cfg.train.packing:
        pack_attention(lm)
    return lm, keep_alive
