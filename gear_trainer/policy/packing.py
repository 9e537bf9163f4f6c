"""Packed sequences: whether a run's models take them, and the attention that keeps each sequence to itself.

A packed forward is one row [1, T] of whole sequences, end to end. transformers would find their ends by a look at `position_ids`,
for which a GPU is waited for, and give sdpa a mask [T, T], with which a CPU computes all of it. Here the ends come with the row:
nothing is looked at, nothing masked, and what is between two sequences is not computed.

On a CPU each sequence is a call of sdpa by itself. Seconds of one thread, forward and backward of a 0.7 M-parameter Qwen3, packed
and padded: 24 sequences of 160 tokens +-35 % 0.55 and 1.01 (sdpa with a mask 2.93), 64 of 60 tokens +-10 % 0.54 and 0.60, 24 of
160 tokens alike 0.62 and 0.56.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.policy.hub import known_config, meta_model
from gear_trainer.recipe import Recipe
from gear_trainer.user_code import said

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNKNOWN = "the model's configuration is not at hand"
PACKABLE = {"full_attention", "sliding_attention"}  # kinds of layers; the others carry something from token to token
WIDEST_HEAD = 256  # of flash attention

# --- whether ----------------------------------------------------------------------------------------------------------------


def settle(cfg: Config, recipe: Recipe, path: str) -> tuple[Config, str | None]:
    """The configuration with `train.packing` true or false, and why sequences are padded where they are.

    path: of the policy, where `model.path` is a builtin name. Raises ConfigError where train.packing=true cannot be.
    """
    why = why_padded(cfg, recipe, torch.cuda.is_available(), path)
    train = cfg.train.model_copy(update={"packing": why is None})
    return cfg.model_copy(update={"train": train}), why


def why_padded(cfg: Config, recipe: Recipe, gpu: bool, path: str | None = None) -> str | None:
    """The reason why the sequences of a run are padded, as a phrase; None where they are packed. gpu: the run is for one.

    Raises ConfigError where train.packing=true cannot be; UNKNOWN is no reason for that.
    """
    if cfg.train.packing is False:
        return "train.packing=false"
    why = _of_attention(cfg, gpu) or _of_models(cfg, recipe, gpu, path or cfg.model.path)
    if why and why != UNKNOWN and cfg.train.packing:
        raise ConfigError(f"train.packing=true: {why}; leave it out, and sequences are padded")
    return why


def _of_attention(cfg: Config, gpu: bool) -> str | None:
    kernel = cfg.model.attn_implementation
    if "flash" in kernel:
        return None
    if kernel != "sdpa":
        return f"model.attn_implementation={kernel} has no packed form, sdpa and flash_attention_2 have"
    if not gpu:
        return None
    if cfg.model.dtype != "bfloat16":
        return f"model.dtype={cfg.model.dtype}: a GPU's kernel for packed sequences takes bfloat16"
    if "window_size" not in _varlen_arguments() or torch.version.hip:
        return f"torch {torch.__version__} has no varlen_attn with windows for this GPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than the kernel for packed sequences (Ampere and later)"
    return None


def _of_models(cfg: Config, recipe: Recipe, gpu: bool, policy: str) -> str | None:
    """The first reason of any model that sees the rows: the policy, a reference model of its own path."""
    flat = gpu and cfg.model.attn_implementation == "sdpa"
    for path in dict.fromkeys([policy, *(model.path for model in recipe.frozen if model.path)]):
        if known_config(path) is None:
            return UNKNOWN
        try:
            # on meta tensors experts are grouped in bfloat16 alone; what is asked does not depend on it
            why = _of_model(meta_model(path, "bfloat16", cfg.model.attn_implementation), flat)
        except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
            why = f"a trial on meta tensors failed ({said(error)})"
        if why:
            return f"{path}: {why}"
    return None


class Call(NamedTuple):
    """A layer's call of its attention in the trial: was it told the ends and given no mask, its window, the widths of heads."""

    told: bool
    window: int | None
    widths: set[int]


def _of_model(lm: PreTrainedModel, flat: bool) -> str | None:
    """Why a model on the meta device takes no packed rows: by what its class says, then by a trial of its code.

    flat: for torch's own flash kernel, which takes heads of one width. About 100 of transformers 5.19's causal models were made
    small and tried: the 61 decoders that pass have the hidden states of padded rows.
    """
    config, name = lm.config.get_text_config(), type(lm).__name__
    layers: int = config.num_hidden_layers
    kinds: list[str] = list(getattr(config, "layer_types", None) or ())
    if others := set(kinds) - PACKABLE:
        return f"it has layers of {', '.join(sorted(others))}"
    if lm._is_stateful:
        return "its layers carry a state from token to token"
    if not lm._supports_attention_backend:
        return f"{name} has an attention of its own"
    calls = _trial(lm)
    if len(calls) != layers:
        return f"{len(calls)} of its {layers} layers are attention"
    if not all(call.told for call in calls):
        return f"{name} does not hand the ends of sequences to its attention"
    window = layers if getattr(config, "sliding_window", None) else 0
    if sum(call.window is not None for call in calls) != (kinds.count("sliding_attention") if kinds else window):
        return f"{name} does not hand its sliding window to its attention"  # but to a mask: phimoe
    if flat and any(len(call.widths) > 1 or max(call.widths) > WIDEST_HEAD or max(call.widths) % 8 for call in calls):
        return f"its heads of queries and values are not of one width, a multiple of 8 up to {WIDEST_HEAD}"
    return None


def _trial(lm: PreTrainedModel) -> list[Call]:
    """The calls of the attention in a forward of two sequences on the meta device."""
    calls: list[Call] = []

    def attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, sliding_window=None, **_):
        told = cu_seq_lens_q is not None and attention_mask is None
        calls.append(Call(told, sliding_window, {query.shape[-1], value.shape[-1]}))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    own = lm.config._attn_implementation
    _use(lm, "packed_trial", attention)
    try:
        with torch.no_grad():
            ids = torch.empty(1, 5, dtype=torch.int64, device="meta")
            ends = torch.empty(3, dtype=torch.int32, device="meta")
            lm.base_model(input_ids=ids, use_cache=False, **given(ids, ends, 3))
    finally:
        lm.config._attn_implementation = own
    return calls


# --- the attention ----------------------------------------------------------------------------------------------------------


def given(position_ids: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> dict[str, Any]:
    """The arguments by which transformers' models hand the ends of sequences to their attention."""
    ends = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": position_ids, **ends}


def pack_attention(lm: PreTrainedModel) -> None:
    """Have a loaded model's attention take packed rows, and these alone, by the kernel that it was loaded with."""
    kernel = lm.config._attn_implementation
    assert kernel == "sdpa" or (kernel and "flash" in kernel), kernel  # of others why_padded says that they are padded
    if kernel == "sdpa":
        _use(lm, "packed_sdpa", packed_sdpa)
    else:  # neither `flash` nor a slash: transformers would look for a kernel of that name
        _use(lm, "packed_" + kernel.replace("flash", "fa").replace("/", "_"), partial(packed_flash, kernel))


def _use(lm: PreTrainedModel, name: str, attention: Callable[..., Any]) -> None:
    """Without a mask function of its name transformers makes no mask, and so has nothing to look at."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    lm.config._attn_implementation = name


def packed_sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence: query [1, H, T, D], key and value [1, KV, T, D] -> [1, T, H, D].

    cu_seq_lens_q: int32 [R + 1], where sequences begin, on the query's device. sliding_window: tokens that each one sees, itself
    included. Raises RunError without the sequences' ends.
    """
    ends = _told(cu_seq_lens_q)
    if query.device.type == "cuda":
        return _varlen(query, key, value, ends, max_length_q, scaling, sliding_window), None
    return _one_by_one(module, (query, key, value), ends.tolist(), scaling, sliding_window), None


def packed_flash(
    kernel: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As `packed_sdpa`, by one of transformers' flash kernels. It takes its kernel's name from the module's configuration."""
    from transformers.integrations.flash_attention import flash_attention_forward

    _told(options.get("cu_seq_lens_q"))
    named = SimpleNamespace(config=SimpleNamespace(_attn_implementation=kernel), is_causal=True, modules=module.modules)
    return flash_attention_forward(named, query, key, value, None, **options)  # pyright: ignore[reportArgumentType]


def _told(ends: torch.Tensor | None) -> torch.Tensor:
    if ends is None:
        raise RunError("train.packing=true: the model's attention was not told where sequences end; set train.packing=false")
    return ends


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The flash kernel that comes with torch."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    grouped: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in _varlen_arguments() else {}
    )  # 2.11 takes fewer heads of keys unasked
    seen = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=seen, **grouped)
    assert isinstance(out, torch.Tensor)
    return out[None]


def _varlen_arguments() -> Sequence[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


def _one_by_one(
    module: Any, states: tuple[torch.Tensor, ...], ends: list[int], scaling: float | None, window: int | None
) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = [end - start for start, end in pairwise(ends)]
    parts = []
    # split: the gradient of a slice is a row of zeros as long as all of them, 20 sequences of 400 tokens spent 15 % on these
    for query, key, value in zip(*(x.split(lengths, dim=2) for x in states), strict=True):
        length = query.shape[2]
        mask = _band(length, window, query.device) if window is not None and length > window else None
        parts.append(sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=True)[0])
    return torch.cat(parts, dim=1)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, length, length]: each token sees itself and window - 1 before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)[None, None]
