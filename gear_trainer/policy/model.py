"""The policy: the fused head, and the one forward that every pass of the trainer goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from gear_kernels import FusedHead, Head, TokenStats
from gear_trainer.policy import lora
from gear_trainer.policy.batching import MicroBatch, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Adapters = dict[Literal["student", "teacher"], str | None]


class Policy(nn.Module):
    """HF causal LM whose forward returns per-token statistics instead of logits.

    The fused operator runs inside the head's own forward, called from this forward, called through the DeepSpeed engine: the
    head is gathered only around its own use and gradients are exact. Never call the backbone outside `engine(...)`.
    """

    def __init__(self, lm: PreTrainedModel, head_backward: str = "exact"):
        """head_backward: see `train.head_backward`."""
        super().__init__()
        self.lm, self.head_backward = lm, head_backward
        FusedHead.from_model(lm)

    def forward(
        self,
        batch: MicroBatch,
        temperature: float,
        stats: tuple[str, ...],
        teacher: tuple[torch.Tensor, Head] | None = None,
        jsd_beta: float = 0.5,
        adapters: Adapters | None = None,
    ) -> TokenStats:
        """Statistics of the batch's n policy tokens, each [n] float32 (None where not asked for).

        teacher: hidden states [n, D] and the head of a model with other weights. None: this model on the batch's teacher rows,
        if it has any, as constants. adapters: the LoRA adapters that rows run with, where not the policy's; None: none, the
        starting model.
        """
        student, taught = self._hidden(batch, adapters or {})
        taught, own_head = teacher or (taught, None)
        options = {"teacher_head": own_head, "temperature": temperature, "stats": stats, "jsd_beta": jsd_beta}
        options["backward"] = self.head_backward
        return cast(Any, self.lm.get_output_embeddings())(student, batch.targets, taught, **options)

    def _hidden(self, batch: MicroBatch, adapters: Adapters) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[n, D] of the student's and of the teacher's rows. Two forwards: in one, padded students would be as wide as the
        teacher's hint, and with gradients the teacher would keep activations."""
        taught = None
        if batch.teacher is not None:
            with torch.no_grad(), lora.under(self.lm, adapters.get("teacher", lora.POLICY)):
                taught = hidden_states(self.lm, batch.teacher)
        with lora.under(self.lm, adapters.get("student", lora.POLICY)):
            return hidden_states(self.lm, batch.student), taught


def hidden_states(lm: PreTrainedModel, rows: Rows) -> torch.Tensor:
    """The last hidden states [n, D] of an HF causal LM, without its head, that predict the n policy tokens of the rows."""
    ends = rows.ends.arguments() if rows.ends else {}
    return lm.base_model(input_ids=rows.input_ids, use_cache=False, **ends).last_hidden_state.flatten(0, 1)[rows.index]
