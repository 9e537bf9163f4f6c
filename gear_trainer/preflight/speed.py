"""The arithmetic of a model's passes, and what cards can do of it in a second: what MFU is measured by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gear_trainer.policy.batching import Amount

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense bfloat16 FLOP/s of the tensor cores, by a part of the card's name; the longest that is in it counts. From the makers' data
# sheets, halved where these count sparse matrices. Cards of one chip that differ by form have names of their own.
PEAKS = {
    "A10": 125e12, "A10G": 70e12, "A100": 312e12, "A800": 312e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12,
    "H20": 148e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12,
    "B200": 2250e12, "GB200": 2500e12, "RTX 4090": 165e12, "RTX 6000 Ada": 364e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_of(card: str) -> float | None:
    """The dense bfloat16 FLOP/s of a card by its name, as `NVIDIA H100 80GB HBM3`; None where it is not in the table."""
    found = [name for name in PEAKS if re.search(rf"\b{re.escape(name)}\b", card)]
    return PEAKS[max(found, key=len)] if found else None


@dataclass(frozen=True)
class ModelCost:
    """Floating-point operations of a decoder's passes, and the peak of the card that they run on, FLOP/s.

    body: parameters that every token is multiplied by, without embeddings and head; of a mixture of experts those that a token
    meets. head: parameters of the head, which is multiplied by predicted tokens alone. wide: layers * heads * head dimension.
    trained: whether weights have gradients; with LoRA only what flows through them has, and adapters count for nothing.
    """

    body: float
    head: float
    wide: float
    trained: bool
    peak: float

    def flops(self, amount: Amount, backward: bool) -> float:
        """2 N a token and 4 * wide a pair of tokens forward; with a backward three times that, without weight gradients N twice.

        Recomputed layers count once, so MFU with gradient checkpointing can reach three quarters at most. Attention counts whole
        where a layer looks through a window.
        """
        weights = 2.0 * (self.body * amount.tokens + self.head * amount.predicted)
        attention = 4.0 * self.wide * amount.pairs
        if not backward:
            return weights + attention
        return (3 if self.trained else 2) * weights + 3 * attention


def model_cost(lm: PreTrainedModel, dtype: str, card: str | None = None) -> ModelCost | None:
    """The arithmetic of a model (on the meta device) on a card of that name, else on this rank's GPU.

    None without a card whose peak is known, and for float32, whose products no one peak bounds.
    """
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    peak = peak_of(card) if card and dtype == "bfloat16" else None
    layer = lm.get_output_embeddings()
    if peak is None or layer is None:
        return None
    head, tables = layer.weight, {id(layer.weight), id(lm.get_input_embeddings().weight)}
    fields = lm.config.get_text_config()
    body = sum(p.numel() * _met(name, fields) for name, p in lm.named_parameters() if id(p) not in tables and "lora_" not in name)
    width = getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    trained = any(p.requires_grad and "lora_" not in name for name, p in lm.named_parameters())
    return ModelCost(body, head.numel(), fields.num_hidden_layers * fields.num_attention_heads * width, trained, peak)


def _met(name: str, fields: object) -> float:
    """The share of a parameter that a token is multiplied by: of the routed experts' those that it is sent to."""
    counts = (getattr(fields, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), None)
    return getattr(fields, "num_experts_per_tok", experts) / experts if experts and ".experts." in name else 1.0
