"""What a run needs of its machine, its model's sizes, vLLM and DeepSpeed, looked at before any of them starts."""

from __future__ import annotations

import ast
import difflib
import os
import socket
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.policy.hub import model_sizes
from gear_trainer.policy.zero import choose_accelerator, deepspeed_config
from gear_trainer.user_code import said

PORT = 29500  # the launchers' own, where none is named


def check_machine(cfg: Config) -> None:
    """Folders that can be written, lengths that the model and the KV cache hold, known engine keys. Raises ConfigError."""
    for key, folder in (("output_dir", cfg.output_dir), ("cache_dir", cfg.cache_dir)):
        check_folder(key, Path(folder))
    sizes = model_sizes(cfg.model.path)
    if sizes is not None:
        check_positions(cfg, sizes)
        check_kv_cache(cfg, sizes)
    if cfg.rollout.engine_args:
        check_engine_args(cfg)
    if cfg.deepspeed:
        check_deepspeed(cfg)


def check_folder(key: str, folder: Path) -> None:
    """Try to write where the folder is, or would be made. Raises ConfigError."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".gear-", dir=there))
    except OSError as error:
        where = "" if there == folder else f" in {there}"
        raise ConfigError(f"{key}={folder}: cannot be written{where} ({error.strerror}): name another folder") from None


def check_port() -> None:
    """Whether rank 0 can open the port that all ranks meet at. Raises ConfigError.

    Under torchrun the launcher's own process holds it, and has opened it already.
    """
    if os.environ.get("RANK") != "0" or "MASTER_PORT" not in os.environ:
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = int(os.environ["MASTER_PORT"])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise ConfigError(
            f"port {port} of this machine cannot be opened ({os.strerror(error.errno)}), another run may hold it: start with "
            f"`deepspeed --master_port {port + 1} ...`, or `make train PORT={port + 1}`"
        ) from None


# --- the model's sizes --------------------------------------------------------------------------------------------------


def check_positions(cfg: Config, sizes: dict[str, Any]) -> None:
    """The engine's context is no longer than the model's. Scaled positions are left to vLLM. Raises ConfigError."""
    longest = sizes.get("max_position_embeddings")
    rope = sizes.get("rope_parameters") or sizes.get("rope_scaling") or {}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if longest and scaling in ("default", "llama3") and cfg.rollout.max_model_len > longest:
        raise ConfigError(
            f"rollout.max_model_len={cfg.rollout.max_model_len}: the model {cfg.model.path} has {longest} positions; "
            f"set it to {longest} or less"
        )


def check_kv_cache(cfg: Config, sizes: dict[str, Any]) -> None:
    """vLLM's KV cache holds one sequence at least. Raises ConfigError."""
    r = cfg.rollout
    token = kv_bytes(cfg, sizes)
    if r.kv_cache_mib is None or token is None:
        return
    block = int(r.engine_args.get("block_size") or _block_size())
    blocks = -(-r.max_model_len // block) + 1  # vLLM keeps one empty
    needed = -(-blocks * block * token // 2**20)
    if r.kv_cache_mib < needed:
        raise ConfigError(
            f"rollout.kv_cache_mib={r.kv_cache_mib}: one sequence of rollout.max_model_len={r.max_model_len} takes {needed} MiB "
            f"({token:,} bytes a token, blocks of {block}); raise it to {needed}, or to that times the sequences at a time"
        )


def kv_bytes(cfg: Config, sizes: dict[str, Any]) -> int | None:
    """Bytes of keys and values a token, None for models that keep another cache (latent, windows, states)."""
    more = cfg.rollout.engine_args
    plain = set(sizes.get("layer_types") or ["full_attention"]) == {"full_attention"} and "kv_lora_rank" not in sizes
    if not plain or not {"num_hidden_layers", "num_key_value_heads"} <= sizes.keys():
        return None
    width = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    each = 1 if "fp8" in str(more.get("kv_cache_dtype")) else 2 if cfg.model.dtype == "bfloat16" else 4
    return 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * width * each


def _block_size() -> int:
    import torch

    return 16 if torch.cuda.is_available() else 128  # vLLM's own choice by platform


# --- keys that are handed on --------------------------------------------------------------------------------------------


def check_engine_args(cfg: Config) -> None:
    """Refuse what vLLM's LLM(...) does not take, or what would hang. Raises ConfigError; unknown names pass without vLLM."""
    if (parallel := cfg.rollout.engine_args.get("tensor_parallel_size", 1)) != 1:
        raise ConfigError(
            f"rollout.engine_args.tensor_parallel_size={parallel}: every rank has an engine of its own on its one GPU, and this "
            "one would wait for GPUs of other ranks: leave it out"
        )
    known = engine_arguments()
    for name in cfg.rollout.engine_args:
        if known and name not in known:
            raise ConfigError(f"rollout.engine_args.{name}: vLLM takes no such argument{_near(name, known)}")


def engine_arguments() -> set[str]:
    """Fields of vLLM's EngineArgs, read from its source: importing it takes 17 s and settles its environment variables."""
    spec = find_spec("vllm")
    file = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py" if spec else None
    if file is None or not file.is_file():
        return set()
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"]
    return {node.target.id for cls in classes for node in cls.body if isinstance(node, ast.AnnAssign)}


def check_deepspeed(cfg: Config) -> None:
    """Hand the merged configuration to DeepSpeed's own validation, and refuse keys that it never looks at. Raises ConfigError."""
    choose_accelerator()
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked(deepspeed_config(cfg))
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"deepspeed: {key}: {first['msg']}; correct the key or its value ({error.title})") from None
    except Exception as error:
        raise ConfigError(f"deepspeed: {said(error)}; correct the section") from None
    for name in cfg.deepspeed:
        if name not in asked.names:
            raise ConfigError(f"deepspeed.{name}: DeepSpeed has no such key{_near(name, asked.names)}")


class _Asked(dict):
    """A dictionary that remembers which keys it was asked for: DeepSpeed keeps no list of those that it knows."""

    def __init__(self, items: dict[str, Any]):
        super().__init__(items)
        self.names: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> _Asked:
        return self  # `name in config.keys()` is a question too

    def __copy__(self) -> _Asked:
        return self


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ": leave it out"
