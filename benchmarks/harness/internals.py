"""All that the benchmarks know of gear_kernels' inside, in one place: what moves there is mended here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from gear_kernels import backends, ops, tiling
from gear_kernels.backends import BACKENDS, Backend, Tile, TileTask, version
from gear_kernels.reference import (
    GRADIENT_NAMES,
    STAT_NAMES,
    STATE_NAMES,
    SUM_NAMES,
    Rows,
    head_logits,
    needs_teacher,
    token_stats,
)
from gear_kernels.stats import linear_call

__all__ = [
    "BACKENDS",
    "Backend",
    "Tile",
    "TileTask",
    "needs_teacher",
    "version",
    "GRADIENT_NAMES",
    "STAT_NAMES",
    "STATE_NAMES",
    "SUM_NAMES",
    "Rows",
    "head_logits",
    "token_stats",
    "IGNORED",
    "KERNEL_MODULES",
    "kernels_of",
    "serving",
    "replaced",
    "taken_for_gpu",
    "tile_limits",
    "joins_in_one_call",
    "body_of",
    "linear_body",
    "default_workspace",
    "plan",
]
IGNORED = -100  # the target of a row that gives nothing
KERNEL_MODULES = ("gear_kernels.triton.stats", "gear_kernels.triton.scan")  # imported where they are used: they need triton


def kernels_of(module: ModuleType) -> list[str]:
    """Names of the Triton kernels that a module launches."""
    return [name for name in vars(module) if name.endswith("_kernel")]


def serving(device: str, dtype: torch.dtype) -> Backend:
    """The back end that serves this device and dtype."""
    return BACKENDS[backends.choose(torch.device(device), dtype)]


@contextlib.contextmanager
def replaced(name: str, **functions: Any) -> Iterator[None]:
    """The back end of this name with other functions, inside the context."""
    with mock.patch.multiple(BACKENDS[name], **functions):
        yield


@contextlib.contextmanager
def taken_for_gpu() -> Iterator[None]:
    """Meta tensors take the path of a GPU, which the Triton back end serves, inside the context."""
    on_gpu = mock.patch.object(tiling, "on_gpu", lambda device: device.type != "cpu")
    with on_gpu, replaced("triton", why_not=lambda device, dtype: None):
        yield


@contextlib.contextmanager
def tile_limits(device: str, tile: int, workspace: int, rows: int) -> Iterator[None]:
    """Other sizes of GEMM tiles on a device: bytes of a tile and of the workspace, rows of a tile."""
    with mock.patch.dict(tiling._LIMITS, {device: tiling.Limits(tile, workspace, rows, max(rows, 8192))}):
        yield


def joins_in_one_call(device: str) -> bool:
    """True where torch adds a product to float32 sums in one call on this device."""
    return tiling.addmm_into_float32(device)


def body_of(operator) -> Callable:
    """The Python function of one of the package's own operators, as a dispatch mode meets it."""
    return getattr(ops, operator._opname)._init_fn


def linear_body(student: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, stats: tuple[str, ...]) -> tiling.Linear:
    """The body of linear_token_stats on the GPU path, for tensors that have no values: targets and temperatures are made here."""
    rows, device = len(student), student.device
    targets, inverse = torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, device=device)
    tensors = (student, weight, None, teacher, None, None, targets, inverse)
    return ops.tiled(ops.LinearCall(*tensors, stats, "triton", tiling.limits(device).workspace))


def default_workspace(device: torch.device) -> int:
    """Bytes that tiles take by default on this device."""
    return tiling.limits(device).workspace


def plan(*arguments, **options) -> ops.Plan:
    """The memory and products of a call of linear_token_stats with these arguments."""
    return ops.plan(linear_call(*arguments, **options))
