"""A model's directory or hub name: whether it can be had, and its sizes, without its weights."""

from __future__ import annotations

import json
import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from gear_trainer.config import parse_yaml
from gear_trainer.errors import ConfigError
from gear_trainer.user_code import said

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tiny_seed(spec: str, seed: int) -> int | None:
    """The seed that `model.path`'s tiny demo model is made of: the run's, or N of builtin:tiny-qwen3@N; None of others."""
    name, at, own = spec.partition("@")
    if name != "builtin:tiny-qwen3" or (at and not own.isdecimal()):
        return None
    return int(own) if at else seed


def check_model_path(spec: str, key: str = "model.path") -> None:
    """Fail early, before any engine: a directory without a model, or a hub name that cannot be had. key: that gives it."""
    if spec.startswith("builtin:") and key == "model.path":
        if spec != "builtin:smollm2" and tiny_seed(spec, 0) is None:
            raise ConfigError(f"{key}={spec}: known are builtin:tiny-qwen3, with @SEED behind it too, and builtin:smollm2")
        return
    path = Path(spec)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{key}={spec}: the directory has no config.json; point at a model saved in HF format")
        return
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ConfigError(f"{key}={spec}: no such directory; give a local HF directory or a hub name like Qwen/Qwen3-8B")


def check_hub_model(spec: str, key: str = "model.path") -> None:
    """A hub name whose configuration is neither cached nor reachable. Network: only for names that are no directory."""
    if spec.startswith("builtin:") or Path(spec).is_dir():
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{key}={spec}: not a local directory, and the hub's copy cannot be had ({reason}); "
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
    if shipped := _shipped_sizes(spec):
        return shipped
    file = Path(spec) / "config.json" if Path(spec).is_dir() else _cached_config(spec)
    try:
        fields = json.loads(file.read_text()) if file else None
        return fields and fields | fields.get("text_config", {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.path={spec}: {file} cannot be read ({said(error)}): mend it") from None


def known_config(spec: str) -> Any | None:
    """The configuration that transformers makes of a directory or hub name, without the network; None where it is not at hand."""
    from transformers import AutoConfig

    if shipped := _shipped_sizes(spec):
        return AutoConfig.for_model(**shipped)
    try:
        return AutoConfig.from_pretrained(spec, local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(spec).is_dir():
            raise ConfigError(f"model.path={spec}: its config.json cannot be read ({said(error)}): mend it") from None
        return None


@cache
def meta_model(path: str, dtype: str, attention: str) -> PreTrainedModel:
    """The model of a path whose `model_sizes` are at hand, without memory."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager"} if attention == "eager" else {}  # the others hold what flash kernels hold
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(known_config(path), dtype=getattr(torch, dtype), **eager).eval()


def _shipped_sizes(spec: str) -> dict[str, Any] | None:
    name = re.sub("[/:]", "--", spec.partition("@")[0] if spec.startswith("builtin:") else spec)
    file = Path(__file__).parents[1] / "configs" / "models" / f"{name}.yaml"
    return parse_yaml(file.read_text()) if file.is_file() and not Path(spec).is_dir() else None


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
