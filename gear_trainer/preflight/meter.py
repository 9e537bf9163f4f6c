"""The memory of a model's passes, counted without any: its own code runs on meta tensors, and every storage is noted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gear_trainer.policy.zero import checkpoint_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Passes(NamedTuple):
    """Bytes of a micro-batch beside the weights and their gradients: the most that a pass without gradients holds; what is kept
    from the forward to the backward; the most that the backward holds, the kept part included."""

    score: float
    kept: float
    backward: float


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is entered: `live` now, `peak` at most; given ones are free.

    A value that is looked at reads 1: models look at one, whether ids are packed sequences, and 1 says that they are not.
    """

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {id(t.untyped_storage()): t for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


@contextmanager
def _flash() -> Iterator[None]:
    """Meta tensors would take the attention that writes out every score; the devices of a run take a flash kernel.

    A function mode would not do: it is left while autograd runs, and checkpointed layers are run again there.
    """
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True
    )[0]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@cache
def passes(lm: PreTrainedModel, rows: int, width: int, checkpointing: bool) -> Passes:
    """The bytes that a micro-batch [rows, width] of a model on the meta device holds, its head apart; packed, as many tokens hold
    the same.

    Two and three of the model's layers are run (or all that it has) and the rest is counted as the third: layers are alike.
    """
    layers = _layers(lm)
    if checkpointing:
        checkpoint_layers(lm)
    total = len(layers)
    few, more = (_run(lm, layers, min(n, total), rows, width) for n in (2, 3))
    left = max(0, total - 2)
    lm.gradient_checkpointing_disable()
    lm.eval()
    return Passes(*(a + left * (b - a) for a, b in zip(few, more, strict=True)))


def _layers(lm: PreTrainedModel) -> nn.ModuleList:
    return max((m for m in lm.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))


def _run(lm: PreTrainedModel, layers: nn.ModuleList, count: int, rows: int, width: int) -> Passes:
    given = [*lm.parameters(), *lm.buffers()]
    with _flash(), _only(layers, count), _no_gradients_kept(lm):
        with Meter(given) as score, torch.no_grad():
            _hidden(lm, rows, width)
        with Meter(given) as meter:
            hidden = _hidden(lm, rows, width)
            kept = meter.live
            hidden.backward(torch.empty_like(hidden))
    return Passes(score.peak, kept, meter.peak)


def _hidden(lm: PreTrainedModel, rows: int, width: int) -> torch.Tensor:
    """From embeddings: the gradient of the table that gives them is not a layer's."""
    like = lm.get_input_embeddings().weight
    assert isinstance(like, torch.Tensor)
    embeddings = torch.empty(rows, width, like.shape[1], dtype=like.dtype, device="meta", requires_grad=True)
    return lm.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state


@contextmanager
def _only(layers: nn.ModuleList, count: int) -> Iterator[None]:
    whole = list(layers)
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(whole[count:])


@contextmanager
def _no_gradients_kept(lm: PreTrainedModel) -> Iterator[None]:
    """ZeRO-3 moves each parameter's gradient away as it comes."""
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in lm.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
