"""Checks of a run's machine, its model's sizes, its engine and DeepSpeed, made before any of them starts."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gear_trainer.config import Config, near
from gear_trainer.errors import ConfigError
from gear_trainer.policy.hub import model_sizes
from gear_trainer.policy.zero import choose_accelerator, deepspeed_config
from gear_trainer.rollout.engine import engine_class
from gear_trainer.user_code import said

PORT = 29500  # the launchers' own, where none is named


def check_machine(cfg: Config) -> None:
    """Folders that can be written, lengths that the model and the KV cache hold, known engine keys. Raises ConfigError."""
    for key, folder in (("output_dir", cfg.output_dir), ("cache_dir", cfg.cache_dir)):
        check_folder(key, Path(folder))
    sizes = model_sizes(cfg.model.path)
    if sizes is not None:
        check_positions(cfg, sizes)
    engine_class(cfg).check(cfg, sizes)
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
    """Check that rank 0 can open the port that all ranks meet at. Raises ConfigError.

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
        assert error.errno is not None  # the system's own
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


# --- keys that are handed on --------------------------------------------------------------------------------------------


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
            raise ConfigError(f"deepspeed.{name}: DeepSpeed has no such key{near(name, asked.names)}")


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
