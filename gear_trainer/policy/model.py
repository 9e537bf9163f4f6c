"""The policy under ZeRO-3: loading, the fused head, and the one forward that every pass of the trainer goes through."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from gear_kernels import FusedHead, Head, TokenStats
from gear_trainer.config import Config, ConfigError, parse_yaml
from gear_trainer.policy.batching import MicroBatch, Rows
from gear_trainer.tasks.base import Task
from gear_trainer.user_code import said


def resolve_model_path(cfg: Config, task: Task) -> str:
    """A local directory or hub name for `model.path`; builtin: models are made on first use and cached. Raises ConfigError."""
    spec = cfg.model.path
    if spec == "builtin:tiny-qwen3":
        from gear_trainer.demo.warm_start import ensure_warm_start

        return str(ensure_warm_start(task, cfg.seed, Path(cfg.cache_dir)))
    if spec == "builtin:smollm2":
        from gear_trainer.demo.smollm2 import ensure_smollm2

        try:
            return str(ensure_smollm2(Path(cfg.cache_dir)))
        except ModuleNotFoundError as error:
            raise ConfigError(f"model.path={spec}: {error}") from None
    check_model_path(spec)
    return spec


def check_model_path(spec: str) -> None:
    """Fail early, before any engine: a directory without a model, or a hub name that cannot be had."""
    if spec.startswith("builtin:"):
        if spec not in ("builtin:tiny-qwen3", "builtin:smollm2"):
            raise ConfigError(f"model.path={spec}: known are builtin:tiny-qwen3 and builtin:smollm2")
        return
    path = Path(spec)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.path={spec}: the directory has no config.json; point at a model saved in HF format")
        return
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ConfigError(f"model.path={spec}: no such directory; give a local HF directory or a hub name like Qwen/Qwen3-8B")


def check_hub_model(spec: str) -> None:
    """A hub name whose configuration is neither cached nor reachable. Network: only for names that are no directory."""
    if spec.startswith("builtin:") or Path(spec).is_dir():
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path={spec}: not a local directory, and the hub's copy cannot be had ({reason}); "
            "download the model and give its path"
        ) from None


def offline_without_hub() -> None:
    """Where the hub cannot be reached, say so to its clients before they are imported: each would try for half a minute."""
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def model_sizes(spec: str) -> dict[str, Any] | None:
    """The fields of the model's config.json, without weights, network or transformers; None where it is not at hand.

    From its directory; from the sizes that ship in configs/models, under the model's name with -- for / and :; or from the hub's
    cache. Raises ConfigError where a directory's cannot be read.
    """
    if spec == "builtin:tiny-qwen3":
        from gear_trainer.demo.warm_start import sizes

        return sizes()
    if shipped := _shipped_sizes(spec):
        return shipped
    file = Path(spec) / "config.json" if Path(spec).is_dir() else _cached_config(spec)
    try:
        fields = json.loads(file.read_text()) if file else None
        return fields and fields | fields.get("text_config", {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.path={spec}: {file} cannot be read ({said(error)}): mend it") from None


def known_config(spec: str) -> Any | None:
    """transformers' configuration of a directory or hub name, without the network; None where it is not at hand."""
    from transformers import AutoConfig

    if shipped := _shipped_sizes(spec):
        return AutoConfig.for_model(**shipped)
    try:
        return AutoConfig.from_pretrained(spec, local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(spec).is_dir():
            raise ConfigError(f"model.path={spec}: its config.json cannot be read ({said(error)}): mend it") from None
        return None


def _shipped_sizes(spec: str) -> dict[str, Any] | None:
    file = Path(__file__).parents[1] / "configs" / "models" / f"{re.sub('[/:]', '--', spec)}.yaml"
    return parse_yaml(file.read_text()) if file.is_file() and not Path(spec).is_dir() else None


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


class Policy(nn.Module):
    """HF causal LM whose forward returns per-token statistics instead of logits.

    The fused operator runs inside the head's own forward, called from this forward, called through the DeepSpeed engine: the
    head is gathered only around its own use and gradients are exact. Never call the backbone outside `engine(...)`.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        config = lm.config.get_text_config()
        FusedHead.adopt(
            lm.get_output_embeddings(),
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=_logit_scale(config),
        )

    def forward(
        self,
        batch: MicroBatch,
        temperature: float,
        stats: tuple[str, ...],
        teacher: tuple[torch.Tensor, Head] | None = None,
        jsd_beta: float = 0.5,
    ) -> TokenStats:
        """Statistics of the batch's n policy tokens, each [n] float32 (None where not asked for).

        teacher: hidden states [n, D] and the head of a model with other weights. None: this model on the batch's teacher rows,
        if it has any, as constants.
        """
        student, taught = self._hidden(batch)
        taught, own_head = teacher or (taught, None)
        options = {"teacher_head": own_head, "temperature": temperature, "stats": stats, "jsd_beta": jsd_beta}
        return self.lm.get_output_embeddings()(student, batch.targets, taught, **options)

    def _hidden(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[n, D] of the student's and of the teacher's rows. Two forwards, each as wide as its own longest row: in one, students
        would be padded to the teacher's hint, and with gradients the teacher would keep activations."""
        taught = None
        if batch.teacher is not None:
            with torch.no_grad():
                taught = hidden_states(self.lm, batch.teacher)
        return hidden_states(self.lm, batch.student), taught


def hidden_states(lm: nn.Module, rows: Rows) -> torch.Tensor:
    """The last hidden states [n, D] of an HF causal LM, without its head, that predict the n policy tokens of the rows."""
    return lm.base_model(input_ids=rows.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows.index]


def _logit_scale(config: Any) -> float | None:
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return None


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


def build_engine(cfg: Config, model_path: str):
    """Load the policy partitioned (each rank reads, none holds the whole) and wrap it in a ZeRO-3 engine. Collective."""
    import deepspeed

    config = deepspeed_config(cfg)
    lm, keep_alive = load_partitioned(cfg, model_path, config)
    if cfg.model.gradient_checkpointing:
        checkpoint_layers(lm)
    engine, *_ = deepspeed.initialize(model=Policy(lm), config=config, model_parameters=list(lm.parameters()))
    engine.hf_deepspeed_config = keep_alive
    return engine


def checkpoint_layers(lm: nn.Module) -> None:
    """HF recomputes only layers in training mode, and from_pretrained leaves all in evaluation mode: switch on these alone.

    What is inside them stays in evaluation mode: dropout would make the update's log-probs differ from the scored ones.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in lm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def load_partitioned(cfg: Config, model_path: str, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The HF model, partitioned as `config` (DeepSpeed's) says, and an object to keep as long as its engine. Collective."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(config)  # from_pretrained partitions only while this object lives
    dtype = getattr(torch, cfg.model.dtype)
    return AutoModelForCausalLM.from_pretrained(
        model_path, dtype=dtype, attn_implementation=cfg.model.attn_implementation
    ), keep_alive


def learning_rate(cfg: Config, step: int) -> float:
    """Of the 1-based step; a pure function, so a resumed run needs no scheduler state."""
    import math

    t = cfg.train
    if step <= t.lr_warmup_steps:
        return t.lr * step / t.lr_warmup_steps
    done = (step - 1 - t.lr_warmup_steps) / max(1, t.steps - t.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[t.lr_schedule]
    return t.lr * factor
