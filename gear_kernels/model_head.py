"""Output heads of models: the layer behind the last hidden states, adapters on it, and what the configuration does to logits.

transformers models and peft layers are read by their attributes, neither is imported. What cannot be read is refused by name: a
head that leaves an adapter out gives log-probs that are wrong by whole nats, silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import GearKernelsError, bad_input

# The names that transformers' models have for one thing; logits_scaling is Granite's divisor, but a factor in HyperCLOVA X.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")

# The forwards that are hidden @ weight.T + bias: nn.Linear's own, and FusedHead's, which head.py adds.
PLAIN_FORWARDS: list[Callable[..., Any]] = [nn.Linear.forward]


class ModelHead(NamedTuple):
    """The fields of `Head` that a model has."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float | None


def read(model: nn.Module) -> ModelHead:
    """The head of a causal LM of transformers (or of one that peft wraps). Raises GearKernelsError for one that is no `Head`."""
    layer, config = layer_and_config(model)
    return ModelHead(*weight_and_bias(layer), softcap(config), scale(config))


def layer_and_config(model: nn.Module) -> tuple[nn.Module, Any]:
    """A causal LM's output layer and its text configuration. Raises GearKernelsError for a model that has none."""
    find = getattr(model, "get_output_embeddings", None)
    layer, config = None if find is None else find(), getattr(model, "config", None)
    if layer is None or config is None:
        given, mend = f"the model is a {type(model).__name__} without an output layer", "pass the model itself, not what wraps it"
        raise bad_input(given, "a causal LM with get_output_embeddings() and config", mend)
    if getattr(config, "is_encoder_decoder", False):
        raise bad_input(f"the model is an encoder-decoder, {type(model).__name__}", "a causal LM", "build the Head by hand")
    return layer, config.get_text_config() if hasattr(config, "get_text_config") else config


def softcap(config: Any) -> float | None:
    """The bound on the logits of a model of this configuration (Gemma's final_logit_softcapping)."""
    return _first(config, _SOFTCAPS)


def scale(config: Any) -> float | None:
    """The factor on the logits of a model of this configuration: Cohere's logit_scale, one over Granite's logits_scaling."""
    divisor = _first(config, ("logits_scaling",))
    if divisor is None:
        return _first(config, _FACTORS)
    return divisor if getattr(config, "model_type", "").startswith("hyperclovax") else 1.0 / divisor


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((float(getattr(config, name)) for name in names if getattr(config, name, None)), None)


def weight_and_bias(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An output layer's weight and bias as its next forward has them, adapters merged (differentiably) into the weight."""
    own = _saved_module(layer)
    base = getattr(own, "base_layer", own)
    if not _is_plain(base) or (base is not own and not hasattr(own, "lora_A")):
        raise not_plain(own)
    names = [] if base is own else _active_adapters(own)
    if not names:
        return base.weight, base.bias
    _check_whole(base.weight)
    weight = base.weight.to(torch.promote_types(base.weight.dtype, torch.float32))  # bfloat16 would round most of B A away
    for name in names:
        product = own.lora_B[name].weight.to(weight.dtype) @ own.lora_A[name].weight.to(weight.dtype)
        weight = weight + own.scaling[name] * product
    return weight, None if base.bias is None else base.bias.to(weight.dtype)


# A layer of peft is Any below: what it holds is known by name alone.


def _saved_module(layer: Any) -> Any:
    """What peft's modules_to_save wrapper runs: the active adapter's own copy of the layer."""
    copies = getattr(layer, "modules_to_save", None)
    if copies is None or not hasattr(layer, "original_module"):
        return layer
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in copies]
    return copies[active[0]] if active else layer.original_module


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and type(layer).forward in PLAIN_FORWARDS


def _active_adapters(layer: Any) -> list[str]:
    """The LoRA adapters that the layer's next forward adds to its base; none where they are merged into it or off."""
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:  # its next forward takes them out first
            raise bad_input(f"{_named(layer)}, merged and disabled", "one of the two", "call unmerge_adapter() first")
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        fault = _no_product(layer, name)
        if fault:
            given = f"the head's LoRA adapter {name!r} has {fault[0]}"
            raise bad_input(given, "plain LoRA, weight + scaling * B A", fault[1])
    return names


def _no_product(layer: Any, name: str) -> tuple[str, str] | None:
    """Why this adapter is more than scaling * B A, and the mend."""
    variant, dropout = getattr(layer, "lora_variant", {}).get(name), layer.lora_dropout[name]
    elsewhere = "leave the head out of target_modules, or train it whole by modules_to_save"
    if variant is not None or getattr(layer, "use_dora", {}).get(name):
        return f"the variant {'DoRA' if variant is None else type(variant).__name__}", elsewhere
    if layer.lora_B[name].bias is not None:
        return "a bias of its own", "use lora_bias=False"
    if getattr(dropout, "p", 0) > 0 and dropout.training:
        return f"dropout {dropout.p} while training", "use lora_dropout=0, or model.eval()"
    return None


def _check_whole(weight: torch.Tensor) -> None:
    if weight.numel() == 0 or type(weight).__name__ == "DTensor":
        mend = (
            "call Head.from_model and the op inside the model's forward; under FSDP2 give the head no fully_shard of its own, "
            "the outermost one gathers it; or leave the head out of target_modules"
        )
        raise bad_input("the weight under the head's LoRA adapter is sharded", "a whole weight on each rank", mend)


def not_plain(layer: nn.Module) -> GearKernelsError:
    """The error for a head that is not a plain nn.Linear: what it is, with peft's adapters by name."""
    kind = type(layer).__name__
    if hasattr(layer, "base_layer"):
        mend = "leave the head out of target_modules, train it whole by modules_to_save, or pass a plain LoRA layer's model to "
        return bad_input(_named(layer), "a plain nn.Linear", mend + "Head.from_model(model), which merges the adapter")
    mend = "merge or unwrap it first"
    if hasattr(layer, "original_module"):
        kind, mend = "peft modules_to_save copy", "adopt the head before get_peft_model"
    elif kind.startswith("FSDP"):
        mend = "adopt the head before fully_shard"
    return bad_input(f"the head is a {kind}", "a plain nn.Linear", mend)


def _named(layer: nn.Module) -> str:
    family = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
    adapters = ", ".join(repr(str(name)) for name in getattr(layer, "active_adapters", ())) or "none active"
    return f"the head is a peft {family} layer ({type(layer).__name__}; adapters: {adapters})"
