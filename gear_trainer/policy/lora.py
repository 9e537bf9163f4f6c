"""LoRA: adapters on the policy's linear layers, trained in place of its weights. Without them the policy is the starting model.

peft puts its layers into the model in place, so the model stays what transformers made: its names gain `base_layer`,
`lora_A.NAME` and `lora_B.NAME`. A teacher or a reference model that follows the policy is one more set on the same weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gear_kernels import model_head
from gear_trainer.config import LoraConfig, near
from gear_trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY = "default"  # peft's name of the adapters that are trained
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # an adapter's files, in peft's format


# --- attaching ----------------------------------------------------------------------------------------------------------


def attach(lm: PreTrainedModel, lora: LoraConfig, seed: int = 0, others: tuple[str, ...] = ()) -> None:
    """Freeze the model, and put adapters on its linear layers in place, which begin at a product of 0 and are trained.

    They have the model's dtype. seed: of their first weights, the same on every rank. others: names of further sets, which
    begin as the policy's and are not trained. Raises ConfigError where `lora.target_modules` names no linear layer.
    """
    from peft import LoraConfig as PeftConfig

    targets = check_targets(lm, lora)
    for name in (POLICY, *others):
        scale = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
        _inject(lm, PeftConfig(**scale, target_modules=targets, task_type="CAUSAL_LM"), name, seed)
    _settle(lm)


def attach_saved(lm: PreTrainedModel, folder: Path) -> None:
    """Freeze the model, and put the policy's adapters on it as the adapter_config.json of the folder has them; no weights."""
    from peft import LoraConfig as PeftConfig

    _inject(lm, PeftConfig.from_pretrained(str(folder)), POLICY)
    _settle(lm)


def _inject(lm: PreTrainedModel, config: Any, name: str, seed: int = 0) -> None:
    from peft import inject_adapter_in_model

    on_meta = lm.get_input_embeddings().weight.device.type == "meta"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of a second set, which is meant
        torch.default_generator.manual_seed(seed)  # a GPU's generators are nobody's here
        inject_adapter_in_model(config, lm, name, low_cpu_mem_usage=on_meta)


def _settle(lm: PreTrainedModel) -> None:
    """Adapters in the model's dtype, the policy's in use, and they alone with gradients."""
    lm.requires_grad_(False)
    dtype = next(lm.parameters()).dtype  # the embedding's
    for found, layer in layers(lm).items():
        if not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise ConfigError(f"lora.target_modules: {found} is a {kind}, and only nn.Linear is merged: name other layers")
        layer.set_adapter(POLICY)
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            p.data = p.data.to(dtype)  # peft makes float32 of bfloat16; ZeRO-3 has one dtype, its masters are float32
            p.requires_grad_(is_policys(name))


def check_targets(lm: PreTrainedModel, lora: LoraConfig) -> str | list[str]:
    """`lora.target_modules`, each of which ends the name of a linear layer in the body of this model. Raises ConfigError."""
    if isinstance(lora.target_modules, str):
        return lora.target_modules
    tables = {id(lm.get_output_embeddings()), id(lm.get_input_embeddings())}
    linear = [n.removesuffix(".base_layer") for n, m in lm.named_modules() if isinstance(m, nn.Linear) and id(m) not in tables]
    known = {n.rpartition(".")[2] for n in linear if ".lora_" not in n}
    for target in lora.target_modules:
        found = [n for n, m in lm.named_modules() if n == target or n.endswith(f".{target}")]
        if any(id(lm.get_submodule(n)) in tables for n in found):
            raise ConfigError(
                f"lora.target_modules: {target} is the embedding or the head, which stay as they are: take it out of the list"
            )
        if not any(n == target or n.endswith(f".{target}") for n in linear):
            raise ConfigError(f"lora.target_modules: {target} is no linear layer of this model{near(target, known)}")
    return lora.target_modules


def layers(lm: nn.Module) -> dict[str, Any]:
    """The layers of the model that have adapters, by the names that they bear in the model without; none without LoRA."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A")}


# --- which adapters a forward runs with ---------------------------------------------------------------------------------


@contextmanager
def under(lm: nn.Module, adapters: str | None) -> Iterator[None]:
    """A context in which forwards run with the adapters of that name; None: with none, as the starting model.

    peft's own switches also change which parameters have gradients, which ZeRO-3 has settled when its engine was made.
    """
    if adapters == POLICY:
        yield
        return
    found = layers(lm).values()
    try:
        for layer in found:
            layer._disable_adapters, layer._active_adapter = adapters is None, [adapters or POLICY]
        yield
    finally:
        for layer in found:
            layer._disable_adapters, layer._active_adapter = False, [POLICY]


def parameters(lm: nn.Module, adapters: str) -> list[nn.Parameter]:
    """The parameters of a set of adapters, in the same order for each set."""
    return [p for name, p in lm.named_parameters() if ".lora_" in name and f".{adapters}." in name]


def is_policys(name: str) -> bool:
    """True for a parameter of the policy, false for one of another set of adapters on the same weights."""
    return ".lora_" not in name or f".{POLICY}." in name


# --- weights out of a model with adapters: whole ones, see gather.py -----------------------------------------------------


@torch.no_grad()
def merged(layer: Any) -> torch.Tensor:
    """A layer's weight with the policy's adapters added, summed in float32 and rounded to the weight's dtype."""
    return model_head.weight_and_bias(layer)[0].to(layer.get_base_layer().weight.dtype)


# --- files, in peft's format --------------------------------------------------------------------------------------------


def file_name(name: str) -> str:
    """A parameter's name in an adapter's file."""
    return f"base_model.model.{name.replace(f'.{POLICY}.', '.')}"


def write(folder: Path, lm: Any, weights: dict[str, torch.Tensor]) -> None:
    """The policy's adapters as peft and vLLM load them. weights: see gather.adapter_state_dict."""
    from safetensors.torch import save_file

    write_config(folder, lm)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def write_config(folder: Path, lm: Any) -> None:
    """The adapters' rank, scale and layers."""
    config = lm.peft_config[POLICY]
    config.base_model_name_or_path, config.inference_mode = lm.config._name_or_path or None, True
    config.save_pretrained(str(folder))


def check_resumed(folder: Path, lora: LoraConfig) -> None:
    """Raises ConfigError where a checkpoint's folder holds other adapters than the section's, or other weights than adapters."""
    file = folder / CONFIG
    saved: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"r": 0}
    asked = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora} if lora.rank else {"r": 0}
    for (name, now), key in zip(asked.items(), ("rank", "alpha", "rslora"), strict=False):
        if saved.get(name) != now:
            raise ConfigError(
                f"{folder}: written with lora.{key}={saved.get(name)}, resumed with {now}; resume as it was started"
            )
    named = sorted(saved.get("target_modules", ()))
    if lora.rank and not isinstance(lora.target_modules, str) and sorted(lora.target_modules) != named:
        raise ConfigError(
            f"{folder}: written with adapters on {', '.join(named)}, resumed with lora.target_modules="
            f"{', '.join(sorted(lora.target_modules))}; resume as it was started"
        )
