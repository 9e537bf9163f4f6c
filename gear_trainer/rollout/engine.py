"""The contract of an inference engine with the trainer, and the engine that a configuration names."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.rollout.types import Completion, Request
from gear_trainer.user_code import load_class

ENGINES = {
    "vllm_colocated": "gear_trainer.rollout.vllm_colocated:ColocatedVllm",
    "vllm_server": "gear_trainer.rollout.vllm_server:ServerVllm",
}


class Engine(ABC):
    """An inference engine of one rank: samples turns, and takes the policy's weights after each step.

    The run makes it by `cls(cfg, model_path, **cfg.rollout.engine_options)`, on every rank, in the process group.
    """

    version = 0  # the run's pushes so far, those before a resume among them: the trainer sets it, each push adds 1
    samples_beside_training = False  # any thread may sample, also while another pushes: what rollout.staleness needs

    @abstractmethod
    def generate(self, requests: list[Request]) -> list[Completion]:
        """Sample all of them and return when the last one ended, in the order in which they were asked for."""

    @abstractmethod
    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take new weights, and forget every cache that the old ones filled. Consumes the iterator to its end."""

    def push_adapter(self, folder: Path) -> None:
        """Take new LoRA adapters on the model that the engine was made with, as peft writes them, and forget every cache that the
        old ones filled. The folder is gone when this returns. Only for `lora.push=adapter`."""
        raise NotImplementedError(f"{type(self).__name__} takes whole weights only")

    def submit(self, ticket: int, request: Request) -> None:
        """Let a request join the running batch; `collect` hands it back under its ticket. Here: it waits for `collect`."""
        vars(self).setdefault("_waiting", {})[ticket] = request

    def collect(self) -> list[tuple[int, Completion]]:
        """Work on what was submitted until something ended or a step is done; what ended, each with its ticket. May be nothing
        while requests are under way. Here: all that waits, to its end."""
        waiting = vars(self).pop("_waiting", {})
        return list(zip(waiting, self.generate(list(waiting.values())), strict=True))

    def forget(self) -> None:  # noqa: B027  (may do nothing, as the next two)
        """Forget what is cached of earlier prompts: what is sampled next is that of a fresh engine, bit by bit."""

    def sleep(self) -> None:  # noqa: B027
        """Leave the GPU's memory to the trainer, as far as the engine can."""

    def wake(self) -> None:  # noqa: B027
        """Be ready to generate."""

    @classmethod
    def prepare(cls, cfg: Config) -> None:
        """Settle environment and device of the process, before any library that reads them is imported."""
        take_device()

    @classmethod  # noqa: B027
    def check(cls, cfg: Config, sizes: dict[str, Any] | None) -> None:
        """Raise ConfigError for what is known to fail before an engine starts. `sizes`: the model's config.json, where known."""

    @classmethod
    def describe(cls, cfg: Config) -> str:
        """The engine's lines of the dry run."""
        return f"engine: {cfg.rollout.engine}\n"


def engine_class(cfg: Config) -> type[Engine]:
    """The class that `rollout.engine` names, known or `module:Class`. Raises ConfigError."""
    name = cfg.rollout.engine
    target = ENGINES.get(name, name)
    if ":" not in target:
        raise ConfigError(f"rollout.engine={name}: unknown; use {', '.join(ENGINES)}, or module:Class for an engine of your own")
    try:
        cls = load_class(target)
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine={name}: cannot be loaded ({error}): check the module path and the class name"
        ) from None
    if not issubclass(cls, Engine):
        raise ConfigError(f"rollout.engine={name}: {cls.__name__} is no gear_trainer.rollout.Engine: derive it from that class")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ConfigError(f"rollout.engine={name}: {cls.__name__} has no {', '.join(missing)}: write them")
    if cfg.rollout.staleness and not cls.samples_beside_training:
        raise ConfigError(
            f"rollout.staleness={cfg.rollout.staleness}: rollout.engine={name} samples in turn with the trainer; set "
            "rollout.engine=vllm_server, or rollout.staleness=0"
        )
    takes = inspect.signature(cls).parameters
    if cfg.lora.rank and cfg.lora.push == "adapter" and cls.push_adapter is Engine.push_adapter:
        raise ConfigError(f"lora.push=adapter: rollout.engine={name} has no push_adapter: set lora.push=merged, or write it")
    for option in cfg.rollout.engine_options:
        if option not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            known = ", ".join(list(takes)[2:]) or "none"
            raise ConfigError(f"rollout.engine_options.{option}: unknown; {cls.__name__} takes {known}")
    return cls


def make_engine(cfg: Config, model_path: str) -> Engine:
    """The engine that `rollout.engine` names, holding the model of that folder. Raises ConfigError."""
    make = cast("Callable[..., Engine]", engine_class(cfg))
    return make(cfg, model_path, **cfg.rollout.engine_options)


def take_device() -> torch.device:
    """Make the GPU of this rank the process' current one, and return it; the CPU where there is none.

    It is that of LOCAL_RANK, which DeepSpeed and vLLM read too; without a current one, libraries make their contexts on GPU 0 of
    all ranks. Every rank goes on seeing all GPUs: DeepSpeed counts them to know the ranks of a node (ZeRO++, MiCS), and UUIDs in
    CUDA_VISIBLE_DEVICES need no reading. Where a scheduler shows each rank one GPU, that one is number 0. Raises ConfigError
    where there are fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1:
        os.environ["LOCAL_RANK"] = "0"  # two ranks on one GPU are named by NCCL
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= gpus:
        raise ConfigError(
            f"LOCAL_RANK={local}, but {gpus} GPUs are visible (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): start one rank a GPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
