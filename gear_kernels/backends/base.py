"""The back end's contract: one class. Everything above it (argument checks, autograd, GEMMs, tiling, collectives) is shared.

A new back end is a subclass in a file of its own, and its entry in BACKENDS.
"""

from __future__ import annotations

import contextlib

import torch

from ..records import Credit, Pack, Tile, TileTask
from ..reference import sparse
from ..rules import Rule

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


class Backend:
    """A back end: functions on tiles of logits, and the credit scan.

    Student and teacher are Tiles, the teacher may be None. K column splits each have their own sums. The last axes of the tables
    are in the order of reference.SUM_NAMES (sums), STAT_NAMES (values, grads) and STATE_NAMES (state).
    """

    name: str
    fused_head = False  # it applies bias, scale and softcap itself
    tile_copies = 0  # temporaries of a tile's size that its functions hold
    scans = False  # whether it has a scan; else the method's own torch runs

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason why it cannot serve this device and dtype; None: it can."""
        raise NotImplementedError

    def detail(self) -> str:
        """Details of its use here, for `show`."""
        return ""

    def splits(self, rows: int, columns: int) -> int:
        """The number of column splits for a tile of this shape."""
        return 1

    def sweep(self, student: Tile, teacher: Tile | None, task: TileTask, sums: torch.Tensor) -> None:
        """Adds the tile to `sums` [K, n, 12] float64 (zeros: nothing seen yet)."""
        raise NotImplementedError

    def finish(self, sums: torch.Tensor, task: TileTask) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums [K, n, 12] -> values [10, n] and state [n, 9] in float32, or float64 for float64 rows.

        The jsd, and where the statistics need no teacher its entries, are left 0.
        """
        raise NotImplementedError

    def mixture(self, student: Tile, teacher: Tile, task: TileTask, state: torch.Tensor, shares: torch.Tensor) -> None:
        """Adds the tile's share of both divergences to the mixture to `shares` [K, n, 2] float64."""
        raise NotImplementedError

    def note(
        self,
        student: Tile,
        teacher: Tile | None,
        task: TileTask,
        norms: tuple[torch.Tensor, torch.Tensor | None],
        first_row: int,
        noted: torch.Tensor,
    ) -> None:
        """Adds the tile's importances, summed over blocks of sparse.ROWS rows, to `noted` [blocks, c]: what the sparse backward
        chooses columns by. Here in torch, on any device.

        norms: of student and teacher [n], in the logits' dtype, see `sparse.importance`.  first_row: the tile's first row within
        its first block.  task.stats: those that a gradient comes through.
        """
        own, other = finished(student), None if teacher is None else finished(teacher)
        found = sparse.importance(own, other, task.rows, *norms, task.stats).to(noted.dtype)
        starts = range(-first_row, len(found), sparse.ROWS)
        for block, start in zip(noted, starts, strict=True):
            block += found[max(start, 0) : start + sparse.ROWS].sum(0)

    def gradient(
        self, student: Tile, teacher: Tile | None, task: TileTask, state: torch.Tensor, grads: torch.Tensor, dz: torch.Tensor
    ) -> None:
        """Row gradients [n, 10] -> dz [n, c], d loss / d (raw GEMM output), rounded to dz's dtype."""
        raise NotImplementedError

    def multiplies(self, dtype: torch.dtype) -> bool:
        """True where `product` takes operands of this dtype."""
        return False

    def product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        """Writes the product a [m, k] @ b [k, n] to `out`, or adds it, in float32; or, not to `add`, rounds it to a's dtype."""
        raise NotImplementedError

    def scan(self, pack: Pack, rule: Rule) -> Credit:
        """The rule over each sequence of the pack. Raises on NaN where looking at values waits for nothing."""
        raise NotImplementedError


def finished(tile: Tile) -> torch.Tensor:
    """The logits of a tile, bias, scale and softcap applied where a back end with `fused_head` was to do it."""
    z = tile.z if tile.bias is None else tile.z + tile.bias
    z = z if tile.scale is None else z * tile.scale
    return z if tile.softcap is None else tile.softcap * torch.tanh(z / tile.softcap)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and logits tiles: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def left_to_reference(dtype: torch.dtype) -> str | None:
    """The reason why a back end that computes in float32 cannot serve this dtype; None: it can."""
    return None if dtype in HALVES_AND_FLOAT else f"it computes in float32, so {dtype} is left to the reference"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a tensor's device the current one inside: Triton launches there and torch on the tensor's own, and the two differ
    where a model lies on several GPUs of one process.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def empty_credit(pack: Pack, tallies: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for a scan's results: four floating rows, segment ids, onsets [T], and tallies [B, n] float64."""

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape or pack.total, dtype=dtype, device=pack.device)

    # one block: four of 4 MiB would go back to the system at every call, and their page faults take longer than the scan
    floats = list(empty(pack.dtype, 4, pack.total).unbind(0))
    return floats, empty(torch.int32), empty(torch.bool), empty(torch.float64, pack.cu_seqlens.numel() - 1, tallies)
