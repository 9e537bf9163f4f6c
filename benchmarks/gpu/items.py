"""What the files of the GPU report share: where it runs, a line of it, and why a line may be left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Skip(Exception):
    """An item cannot run here; says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large: "cuda", or the CPU for the self-test."""

    device: str
    wheels: str | None = None

    @property
    def self_test(self) -> bool:
        return self.device == "cpu"

    def pick(self, full, tiny):
        """`full` on a GPU, `tiny` in the self-test."""
        return tiny if self.self_test else full


@dataclass(frozen=True)
class Item:
    """One line of the report. run: gives figures by name; raises Skip, or anything else for a failure."""

    name: str
    run: Callable[[], dict]
    gpu_only: str = ""  # why it cannot run on a CPU
    seconds: float = 20.0  # its limit
    peer: bool = False  # someone else's code: what goes wrong in it is no failure


def synchronize(setting: Setting) -> None:
    """Wait for the device: what went wrong on it is raised here."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def is_fatal(error: Exception) -> bool:
    """After these the process' CUDA context answers nothing any more."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)
