"""FusedHead: a model's head layer that returns token statistics instead of logits, for use under ZeRO-3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from . import model_head
from .errors import bad_input
from .reference.stats import BY_NAME
from .sparse import TOLERANCE
from .stats import DEFAULT_STATS, Head, TokenStats, linear_token_stats


class FusedHead(nn.Linear):
    """An nn.Linear whose forward, given targets or stats, runs `linear_token_stats` in place of the matrix product.

    Running inside the module's own forward is what makes it exact under DeepSpeed ZeRO-3: the engine's hooks gather the weight
    around this module only, in forward and again in backward. So call it as a module (never `.forward`), from inside the
    engine's forward. State-dict names, tied weights and `generate()` are those of the plain layer.
    """

    softcap: float | None = None
    scale: float | None = None

    def __init__(self, *args, softcap: float | None = None, scale: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.softcap, self.scale = softcap, scale

    @classmethod
    def adopt(cls, linear: nn.Linear, softcap: float | None = None, scale: float | None = None) -> FusedHead:
        """Turn a model's head into a FusedHead in place: same object, same Parameter. Call it before deepspeed.initialize.

        softcap, scale: what the model does to its logits after the head (see Head); pass them, the model's own code is bypassed.
        Raises GearKernelsError for anything but a plain nn.Linear: quantised and LoRA layers, which are named, compute something
        else. A LoRA layer that peft puts around an adopted head raises when it is given targets; see `Head.from_model`.
        """
        if type(linear) not in (nn.Linear, cls):
            raise model_head.not_plain(linear)
        linear.__class__ = cls
        adopted = cast(FusedHead, linear)
        adopted.softcap, adopted.scale = softcap, scale
        return adopted

    @classmethod
    def from_model(cls, model: nn.Module) -> FusedHead:
        """Turn the output layer of a causal LM (transformers') into a FusedHead in place, with its softcap and scale: `adopt`.

        Call it before get_peft_model, DDP, fully_shard or deepspeed.initialize. Raises GearKernelsError as `adopt`, and for a
        model without an output layer.
        """
        layer, config = model_head.layer_and_config(model)
        return cls.adopt(cast(nn.Linear, layer), model_head.softcap(config), model_head.scale(config))

    def __call__(self, hidden: torch.Tensor, *positional, **named) -> torch.Tensor | TokenStats:
        """Calls `forward`. What follows hidden travels by name, because the hook of torch's ColwiseParallel drops all but the
        first positional argument: logits came back, and now the sharded weight is refused.
        """
        return super().__call__(hidden, **dict(zip(("targets", "teacher_hidden"), positional, strict=False)), **named)

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        teacher_hidden: torch.Tensor | None = None,
        *,
        teacher_head: Head | torch.Tensor | None = None,
        temperature: float | torch.Tensor = 1.0,
        ignore_index: int = -100,
        stats: Sequence[str] | None = None,
        jsd_beta: float = 0.5,
        workspace_bytes: int | None = None,
        backward: str = "exact",
        backward_tolerance: float = TOLERANCE,
    ) -> torch.Tensor | TokenStats:
        """From hidden [..., D] to logits [..., V] without targets and stats (scale and softcap are left to the model, as before);
        otherwise TokenStats of shape [...], see `linear_token_stats`.

        stats=None asks for entropy, with targets for logprobs, with teacher_hidden for reverse_kl. The teacher's hidden states
        go through this same head as constants, or through teacher_head where another model's weights are the teacher: whole
        tensors, that must stay whole until the backward pass is done (gather them around both, or pass a detached alias).
        """
        if targets is None and stats is None and teacher_hidden is None:
            return super().forward(hidden)
        if stats is None:
            lacks_target, lacks_teacher = targets is None, teacher_hidden is None
            asked = [BY_NAME[name] for name in DEFAULT_STATS]
            stats = [s.name for s in asked if not (s.needs_target and lacks_target or s.needs_teacher and lacks_teacher)]
        _check_outputs_stay_whole(self)
        out = linear_token_stats(
            hidden,
            Head(self.weight, self.bias, self.softcap, self.scale),
            targets,
            teacher_hidden,
            teacher_head=teacher_head,
            temperature=temperature,
            ignore_index=ignore_index,
            stats=stats,
            jsd_beta=jsd_beta,
            workspace_bytes=workspace_bytes,
            backward=backward,
            backward_tolerance=backward_tolerance,
        )
        # Fields are views of one tensor: written in place they would lose the hook by which FSDP2 gathers the weight in backward
        return TokenStats(*(None if field is None else field.clone() for field in out))

    def extra_repr(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in ("softcap", "scale") if getattr(self, name) is not None)
        return super().extra_repr() + options


def _check_outputs_stay_whole(head: nn.Module) -> None:
    """Refuse FSDP2's rounding of what the head or its root returns: accelerate's policy for bf16 has it, in nats up to 1/256 of
    a log-prob, silently.
    """
    state = getattr(head, "_get_fsdp_state", lambda: None)()
    context = getattr(state, "_state_ctx", None)
    for part in (state, getattr(context, "iter_forward_root", None)):
        dtype = getattr(getattr(part, "_mp_policy", None), "output_dtype", None)
        if dtype in (torch.bfloat16, torch.float16):
            given = f"fully_shard's mp_policy rounds the statistics to output_dtype={dtype}"
            raise bad_input(given, "float32 statistics", "pass MixedPrecisionPolicy(..., output_dtype=None), or torch.float32")


model_head.PLAIN_FORWARDS.append(FusedHead.forward)
