"""Hidden states to statistics and back in tiles of logits that fit a cache: GEMM a tile, let the back end read it, drop it.

Forward walks columns, then rows: a block of the head is read once and the tile is consumed where it still lies in the cache.
Backward makes each tile again, collects dz over a wider span of columns and runs the two gradient GEMMs once per span, so
that the float32 sums of the hidden states' gradient are read and written once per span, not once per tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from . import parallel
from .backends import BACKENDS, Backend, Task, Tile, _wide
from .reference import STAT_NAMES, STATE_NAMES, SUM_NAMES, Rows, jsd


class Limits(NamedTuple):
    """Sizes of a device type.

    tile, workspace: bytes of both heads' tile; of tiles, dz and weight sums together, by default.  rows, part: of a tile; of a
    round of gradient GEMMs, which holds several tiles.
    """

    tile: int
    workspace: int
    rows: int
    part: int


# cpu: tiles of 1 to 8 MiB ran alike, 4 % faster than whole GEMMs and 20 % than 512-column ones (2 cores, 1 MiB L2 each).
# cuda: 32 MiB of tile lies in the 50 MB L2 of H100/H200 beside the operands, as 2048 rows x 2048 columns: a wider tile has fewer
# ends of rows (each costs a program as much as 500 columns), a taller one fewer reads of the head. At the Qwen3-8B shape (8192
# rows, D = 4096) a round of gradient GEMMs takes all rows and 4096 columns; tiles, dz, weight sums and the hidden gradient's sums
# are 288 MiB in all. Counted on the meta device (tests/test_compile.py), not yet timed on a GPU.
_LIMITS = {"cpu": Limits(4 << 20, 24 << 20, 1024, 1024), "cuda": Limits(32 << 20, 160 << 20, 2048, 8192)}
_NARROWEST = 64  # columns: below it a tile is cut by rows
# Rows up to which student and teacher are copied into one GEMM operand: below, the GEMM gains (128 rows on a CPU: 760 ms against
# 940); above, it is large enough, and on a GPU the copy would be a third of the memory limit.
_STACKED_ROWS = 1024


def limits(device: torch.device) -> Limits:
    """The table's entry for a device."""
    return _LIMITS["cuda" if on_gpu(device) else "cpu"]


def on_gpu(device: torch.device) -> bool:
    """Whether torch's GEMMs of half inputs have float32 results there, and looking at a value would wait for the device."""
    return device.type not in ("cpu", "meta")


class HeadPart(NamedTuple):
    """One head as an operator receives it; `columns` of it are computed on this rank."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float | None
    columns: int


@dataclass
class Linear:
    """One call: rows, heads, and where they are computed. `teacher_head` is `head` itself where the two share it."""

    student: torch.Tensor  # [N, D]
    teacher: torch.Tensor | None
    head: HeadPart
    teacher_head: HeadPart
    task: Task  # task.first: this rank's first column in the vocabulary
    backend: str
    group: str  # "" for none
    workspace: int

    def __post_init__(self):
        self.scratch: dict[str, torch.Tensor] = {}
        self.stacked: torch.Tensor | None = None
        self.wide = _wide(self.student.dtype)

    @property
    def tiles(self) -> Backend:
        return BACKENDS[self.backend]

    # --- sizes ---

    def tile_shape(self) -> tuple[int, int]:
        """Rows and columns of a tile: half of the workspace at most, as many rows as fit while it is not too narrow."""
        n, heads = max(1, len(self.student)), 1 if self.teacher is None else 2
        limit = limits(self.student.device)
        size = self.tile_bytes() // (heads * self.wide.itemsize * (1 + self.tiles.tile_copies))
        rows = max(1, min(n, limit.rows, size // _NARROWEST))
        columns = max(_NARROWEST, min(size // rows, self.widest(self.head), self.widest(self.teacher_head)))
        return rows, max(1, min(self.head.columns, columns - columns % _NARROWEST))

    def tile_bytes(self) -> int:
        return min(limits(self.student.device).tile, self.workspace // 2)

    def widest(self, head: HeadPart) -> int:
        """Columns of a head that a GEMM may take at a time: all, unless they must be copied into a wider dtype first."""
        if not self._widens(head.weight):
            return head.columns
        return max(_NARROWEST, self.workspace // 4 // (head.weight.shape[1] * self.wide.itemsize))

    def _widens(self, weight: torch.Tensor) -> bool:
        return weight.dtype != self.wide and not self.multiplies(weight.dtype)

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether GEMMs of this half dtype have float32 results here; torch's on a CPU do not, the compiled pass' may."""
        return on_gpu(self.student.device) or self.tiles.multiplies(dtype)

    def span(self, rows: int, columns: int, summed: bool) -> int:
        """Columns of one round of gradient GEMMs: dz and the weight's sums take what tiles leave. Several tiles, or a part of one
        where few rows made it wide.
        """
        item = rows * self.dz_dtype.itemsize
        if summed:
            item += self.head.weight.shape[1] * self.wide.itemsize
        fit = (self.workspace - self.tile_bytes()) // item
        return min(self.head.columns, fit // columns * columns or max(_NARROWEST, fit - fit % _NARROWEST))

    def part_rows(self, shape: tuple[int, int]) -> int:
        """Rows of one round of gradient GEMMs: as many as leave a tile's columns within the workspace, none below a tile's."""
        fit = (self.workspace - self.tile_bytes()) // (shape[1] * self.dz_dtype.itemsize)
        return max(shape[0], min(len(self.student), limits(self.student.device).part, fit))

    @property
    def dz_dtype(self) -> torch.dtype:
        """What the gradient GEMMs read: the inputs' dtype where they take it (tensor cores), else float32 (float64)."""
        return self.student.dtype if self.multiplies(self.student.dtype) else self.wide

    # --- tiles ---

    def buffer(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape, the same memory at every call: the tile stays in the cache, and no page faults."""
        count = 1
        for length in shape:
            count *= length
        flat = self.scratch.get(name)
        if flat is None or flat.numel() < count:
            flat = self.scratch[name] = torch.empty(count, dtype=dtype, device=self.student.device)
        return flat[:count].view(shape)

    def walk(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Iterator[tuple[slice, slice, tuple, Task]]:
        """Each tile of a range: its rows, its columns, both heads' logits (until the next one is made) and its task."""
        for block in _blocks(columns, shape[1]):
            for part in _blocks(rows, shape[0]):
                yield part, block, self.logits(part, block), self.task.at(part, self.task.first + block.start)

    def logits(self, rows: slice, columns: slice) -> tuple[Tile, Tile | None]:
        """Both heads' tiles; one GEMM over the stacked rows where they are few and the head is shared."""
        if self.teacher is None:
            return self._tile("student", self.head, self.student[rows], columns), None
        if self.teacher_head is not self.head:
            student = self._tile("student", self.head, self.student[rows], columns)
            return student, self._tile("teacher", self.teacher_head, self.teacher[rows], columns)
        n = len(self.student)
        if rows.stop - rows.start < n or n > _STACKED_ROWS:
            student = self._tile("student", self.head, self.student[rows], columns)
            return student, self._tile("teacher", self.head, self.teacher[rows], columns)
        if self.stacked is None:
            self.stacked = torch.cat([self.student, self.teacher]).to(self.dz_dtype)
        both = self._tile("student", self.head, self.stacked, columns)
        return both._replace(z=both.z[:n]), both._replace(z=both.z[n:])

    def _tile(self, name: str, head: HeadPart, hidden: torch.Tensor, columns: slice) -> Tile:
        z = self.buffer(name + " logits", len(hidden), columns.stop - columns.start, dtype=self.wide)
        self.product(hidden, self.wide_weight(head.weight, columns).T, z)
        bias = None if head.bias is None else head.bias[columns]
        if self.tiles.fused_head:
            return Tile(z, bias, head.scale, head.softcap)
        if bias is not None:
            z += bias
        if head.scale is not None:
            z *= head.scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        return Tile(z)

    def wide_weight(self, weight: torch.Tensor, columns: slice) -> torch.Tensor:
        """The head's block as the GEMM reads it."""
        block = weight[columns]
        if not self._widens(weight):
            return block
        return self.buffer("weight", *block.shape, dtype=self.wide).copy_(block)

    def product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """out = a @ b (out += a @ b), accumulated in float32 (float64) and rounded to out's dtype at the end."""
        if on_gpu(a.device) and a.dtype != out.dtype:
            if add and _addmm_into_float32(a.device.type):
                torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
            elif add:
                out += torch.mm(a, b, out_dtype=out.dtype)
            else:
                torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif self.tiles.multiplies(a.dtype):
            self.tiles.product(a, b, out, add)
        elif add:
            out.addmm_(a.to(out.dtype), b.to(out.dtype))
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    # --- forward ---

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """values [7, N] and state [N, 9]."""
        rows, columns = self.tile_shape()
        splits = self.tiles.splits(rows, columns)
        sums = self.student.new_zeros((splits, len(self.student), len(SUM_NAMES)), dtype=torch.float64)
        whole = slice(0, len(self.student)), slice(0, self.head.columns)
        for part, _, pair, task in self.walk(*whole, (rows, columns)):
            self.tiles.sweep(*pair, task, sums[:, part])
        if self.group:
            sums = parallel.gather_sums(sums, len(self.head.weight), self.group)
        values, state = self.tiles.finish(sums, self.task)
        if "jsd" in self.task.stats:
            add_jsd(values, state, self._mixture(state, rows, columns, splits), self.task)
        return values, state

    def _mixture(self, state: torch.Tensor, rows: int, columns: int, splits: int) -> torch.Tensor:
        shares = self.student.new_zeros((splits, len(self.student), 2), dtype=torch.float64)
        whole = slice(0, len(self.student)), slice(0, self.head.columns)
        for part, _, pair, task in self.walk(*whole, (rows, columns)):
            self.tiles.mixture(*pair, task, state[part], shares[:, part])
        shares = shares.sum(0)
        if self.group:
            parallel.add_up(shares, self.group)
        return shares

    # --- backward ---

    def backward(self, state: torch.Tensor, grads: torch.Tensor, needed: Sequence[bool]) -> list[torch.Tensor | None]:
        """Gradients of hidden states, weight and bias in their own dtype, summed in float32; None where not needed."""
        head, (hidden, weight, bias) = self.head, needed
        out = _Sums(
            torch.zeros_like(self.student, dtype=self.wide) if hidden else None,
            torch.empty_like(head.weight) if weight else None,
            torch.zeros_like(head.bias, dtype=self.wide) if bias else None,
        )
        shape = self.tile_shape()
        rows = self.part_rows(shape)
        summed = weight and self._sums_weight(out.weight, rows)
        for span in _blocks(slice(0, head.columns), self.span(rows, shape[1], summed)):
            block = self._weight_sums(span) if summed else out.weight[span] if weight else None
            for part in _blocks(slice(0, len(self.student)), rows):
                dz = self._dz(part, span, shape, state, grads)
                self._add(out, block, dz, part, span)
            if summed:
                out.weight[span] = block
        if out.weight is not None:
            out.weight[head.columns :] = 0
            if not len(self.student):
                out.weight.zero_()
        if self.group and out.hidden is not None:
            parallel.add_up(out.hidden, self.group)
        like = (self.student, head.weight, head.bias)
        return [None if g is None else g.to(t.dtype) for g, t in zip(out, like, strict=True)]

    def _sums_weight(self, gradient: torch.Tensor, rows: int) -> bool:
        """Whether the weight's gradient is summed in float32 blocks that are rounded once: it is narrower, and no single product
        of the back end gives a block of it.
        """
        single = rows >= len(self.student) and gradient.stride(1) == 1 and self.student.dtype == gradient.dtype
        return gradient.dtype != self.wide and not (single and self.tiles.multiplies(gradient.dtype))

    def _weight_sums(self, span: slice) -> torch.Tensor:
        return self.buffer("weight sums", span.stop - span.start, self.head.weight.shape[1], dtype=self.wide)

    def _dz(self, part: slice, span: slice, shape: tuple[int, int], state: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        dz = self.buffer("dz", part.stop - part.start, span.stop - span.start, dtype=self.dz_dtype)
        for rows, block, (student, teacher), task in self.walk(part, span, shape):
            target = dz[rows.start - part.start : rows.stop - part.start, block.start - span.start : block.stop - span.start]
            self.tiles.gradient(student, teacher, task, state[rows], grads[rows], target)
            if not self.tiles.fused_head:
                _through_head(self.head, student.z, target)
        return dz

    def _add(self, out: _Sums, block: torch.Tensor | None, dz: torch.Tensor, part: slice, span: slice) -> None:
        if out.bias is not None:
            out.bias[span] += dz.sum(0, dtype=self.wide)
        if out.hidden is not None:
            for piece in _blocks(span, self.widest(self.head)):
                own = dz[:, piece.start - span.start : piece.stop - span.start]
                self.product(own, self.wide_weight(self.head.weight, piece), out.hidden[part], add=True)
        if block is not None:
            self.product(dz.T, self.student[part], block, add=part.start > 0)


@cache
def _addmm_into_float32(device: str) -> bool:
    """Whether this torch adds a product of half matrices to a float32 one (its first releases with out_dtype refused)."""
    total, half = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class _Sums(NamedTuple):
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def _blocks(whole: slice, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, whole.stop)) for i in range(whole.start, whole.stop, max(size, 1)))


def _through_head(head: HeadPart, z: torch.Tensor, dz: torch.Tensor) -> None:
    """d loss / d z -> d loss / d (h W' + bias), in place; z, the capped logits, is used up."""
    if head.softcap is not None:
        dz *= z.div_(head.softcap).square_().neg_().add_(1)  # 1 - tanh^2
    if head.scale is not None:
        dz *= head.scale


def add_jsd(values: torch.Tensor, state: torch.Tensor, shares: torch.Tensor, task: Task) -> None:
    """Fill in the two places that `finish` leaves: the jsd [N] and, for the backward, KL(student || mixture)."""
    keep = task.rows.keep()
    values[STAT_NAMES.index("jsd")] = torch.where(keep, jsd(shares, task.beta), 0)
    state[:, STATE_NAMES.index("mixture_kl")] = torch.where(keep, shares[:, 0], 0)


def logits_forward(student: torch.Tensor, teacher: torch.Tensor | None, task: Task, backend: str):
    """values [7, N] and state [N, 9] of given logits [N, V]: one tile that covers the vocabulary."""
    tiles, pair = BACKENDS[backend], (Tile(student), None if teacher is None else Tile(teacher))
    splits = tiles.splits(*student.shape)
    sums = student.new_zeros((splits, len(student), len(SUM_NAMES)), dtype=torch.float64)
    tiles.sweep(*pair, task, sums)
    values, state = tiles.finish(sums, task)
    if "jsd" in task.stats:
        shares = torch.zeros_like(sums[..., :2])
        tiles.mixture(*pair, task, state, shares)
        add_jsd(values, state, shares.sum(0), task)
    return values, state


def rows_of(targets: torch.Tensor | None, inv_temperature: torch.Tensor, ignore_index: int, vocabulary: int) -> Rows:
    """Rows as the back ends read them: contiguous, targets int64.

    Off the CPU, where a check of values would wait for the device, a target out of range makes its row NaN.
    """
    if targets is None:
        return Rows(None, inv_temperature.contiguous(), ignore_index)
    targets = targets.long().contiguous()
    if on_gpu(targets.device):
        wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        inv_temperature = torch.where(wrong, torch.nan, inv_temperature)
    return Rows(targets, inv_temperature.contiguous(), ignore_index)
