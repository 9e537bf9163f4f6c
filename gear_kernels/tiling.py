"""Hidden states to statistics and back in tiles of logits that fit a cache: GEMM a tile, let the back end read it, drop it.

Forward walks columns, then rows: a block of the head is read once and the tile is consumed where it still lies in the cache.
Backward makes each tile again, collects dz over a wider span of columns and runs the two gradient GEMMs once per span, so
that the float32 sums of the hidden states' gradient are read and written once per span, not once per tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, NamedTuple, TypeVarTuple, cast

import torch

from . import parallel
from .backends import BACKENDS, Tile, TileTask, finished, wide
from .reference.stats import ARGMAX_NAMES, STAT_NAMES, STATE_NAMES, SUM_NAMES, Rows, agreements, jsd, largest, merge

Cuts = TypeVarTuple("Cuts")  # tensors that a _Cut cuts, None among them


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
_WIDE = 4096  # width of the hidden states that the table's tiles are for
_NARROWEST = 64  # columns: below it a tile is cut by rows
# Values of a block of the weight's gradient from which on its GEMM is a whole wave of 128 x 256 tiles for the 132 multiprocessors
# of an H100, and has no reason to cut its sums among them.
_UNSPLIT = 1 << 22
# Rows up to which student and teacher are copied into one GEMM operand: below, the GEMM gains (128 rows on a CPU: 760 ms against
# 940); above, it is large enough, and on a GPU the copy would be a third of the memory limit.
_STACKED_ROWS = 1024


def limits(device: torch.device) -> Limits:
    """The table's entry for a device."""
    return _LIMITS["cuda" if on_gpu(device) else "cpu"]


def on_gpu(device: torch.device) -> bool:
    """True of a GPU: torch's GEMMs of half inputs have float32 results, and looking at a value waits for the device."""
    return device.type not in ("cpu", "meta")


Pair = tuple[Tile, Tile | None]  # of the student and the teacher
Note = Callable[[slice, slice, Pair, TileTask, torch.Tensor], None]  # a tile's rows and columns, logits, task, sums [K, n, 12]


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
    task: TileTask  # task.first: this rank's first column in the vocabulary
    backend: str
    group: str  # "" for none
    workspace: int
    shards: Sequence[int] = ()  # columns of every rank's shard; () for equal ones
    kept: Kept | None = None
    unrounded: bool = False  # the weight's gradient stays in the dtype of its sums

    def __post_init__(self):
        self.tiles, self.on_gpu = BACKENDS[self.backend], on_gpu(self.student.device)
        self.rows = len(self.student)
        self.scratch: dict[str, torch.Tensor] = {}
        self.views: dict[tuple, torch.Tensor] = {}  # of the scratch memory: a view costs the host 2 us, a tile has several
        self.operands: dict[bool, tuple[torch.Tensor, torch.Tensor | None]] = {}  # of the block of columns that is walked
        self.cut = _Cut(self.student, self.teacher, self.task.rows.targets, self.task.rows.inv_temperature)
        self.stacked: torch.Tensor | None = None
        self.wide = wide(self.student.dtype)

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
        """Bytes of both heads' tile. On a GPU twice the table's, and twice again, where the hidden states are that much narrower
        and the workspace allows it: a tile's host time is the same, and its GEMM would end sooner than that.
        """
        size, width = limits(self.student.device).tile, self.head.weight.shape[1]
        while self.on_gpu and 2 * width <= _WIDE and 4 * size <= self.workspace:
            size, width = 2 * size, 2 * width
        return min(size, self.workspace // 2)

    def widest(self, head: HeadPart) -> int:
        """Columns of a head that a GEMM may take at a time: all, unless they must be copied into a wider dtype first."""
        if not self.widens(head.weight):
            return head.columns
        return max(_NARROWEST, self.workspace // 4 // (head.weight.shape[1] * self.wide.itemsize))

    def widens(self, weight: torch.Tensor) -> bool:
        return weight.dtype != self.wide and not self.multiplies(weight.dtype)

    def multiplies(self, dtype: torch.dtype) -> bool:
        """True where GEMMs of this half dtype have float32 results here; torch's on a CPU do not, the compiled pass' may."""
        return self.on_gpu or self.tiles.multiplies(dtype)

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
        """The dtype of dz, which gradient GEMMs read: the inputs' where they take it (tensor cores), else float32 (float64)."""
        return self.student.dtype if self.multiplies(self.student.dtype) else self.wide

    # --- tiles ---

    def buffer(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape, the same memory at every call: the tile stays in the cache, and no page faults."""
        view = self.views.get((name, shape))
        if view is not None:
            return view
        count = 1
        for length in shape:
            count *= length
        flat = self.scratch.get(name)
        if flat is None or flat.numel() < count:
            self.views.clear()  # they would keep the former memory
            flat = self.scratch[name] = torch.empty(count, dtype=dtype, device=self.student.device)
        return self.views.setdefault((name, shape), flat[:count].view(shape))

    def walk(self, rows: slice, columns: slice, shape: tuple[int, int]) -> Iterator[tuple[slice, slice, Pair, TileTask]]:
        """Each tile of a range: its rows, its columns, both heads' logits (until the next one is made) and its task."""
        task, parts = self.task, []
        for part in pieces(rows, shape[0]):
            student, teacher, targets, inv_temperature = self.cut[part]
            parts.append((part, student, teacher, Rows(targets, inv_temperature, task.rows.ignore_index)))
        for block in pieces(columns, shape[1]):
            self.operands.clear()
            first = task.first + block.start
            for part, student, teacher, own in parts:
                pair = self.logits(student, teacher, block) if self.kept is None else self.kept.pair(self, part, block)
                yield part, block, pair, task._replace(rows=own, first=first)

    def logits(self, student: torch.Tensor, teacher: torch.Tensor | None, columns: slice) -> Pair:
        """Both heads' tiles of these hidden states; one GEMM over the stacked rows where they are few and the head is shared."""
        if teacher is None:
            return self._tile("student", self.head, student, columns), None
        n = self.rows
        if self.teacher_head is not self.head or student.shape[0] < n or n > _STACKED_ROWS:
            tile = self._tile("student", self.head, student, columns)
            return tile, self._tile("teacher", self.teacher_head, teacher, columns)
        if self.stacked is None:
            assert self.teacher is not None
            self.stacked = torch.cat([self.student, self.teacher]).to(self.dz_dtype)
        both = self._tile("student", self.head, self.stacked, columns)
        return both._replace(z=both.z[:n]), both._replace(z=both.z[n:])

    def _tile(self, name: str, head: HeadPart, hidden: torch.Tensor, columns: slice) -> Tile:
        weight, bias = self.operands.get(head is self.head) or self._operand(head, columns)
        z = self.buffer(name + " logits", hidden.shape[0], columns.stop - columns.start, dtype=self.wide)
        self.product(hidden, weight, z)
        return self._with_options(head, z, bias)

    def kept_tile(self, head: HeadPart, z: torch.Tensor, columns: slice) -> Tile:
        """The tile of logits that were made before."""
        bias = None if head.bias is None else head.bias[columns]
        return Tile(z, bias, head.scale, head.softcap) if self.tiles.fused_head else Tile(z)

    def _with_options(self, head: HeadPart, z: torch.Tensor, bias: torch.Tensor | None) -> Tile:
        if self.tiles.fused_head:
            return Tile(z, bias, head.scale, head.softcap)
        if bias is not None:
            z += bias
        if head.scale is not None:
            z *= head.scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        return Tile(z)

    def _operand(self, head: HeadPart, columns: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A head's block as the GEMM reads it [D, c], and its bias; for all rows of the block, where no other head's is widened
        into the same memory.
        """
        if self.widens(head.weight):
            self.operands.clear()
        bias = None if head.bias is None else head.bias[columns]
        return self.operands.setdefault(head is self.head, (self.wide_weight(head.weight, columns).T, bias))

    def wide_weight(self, weight: torch.Tensor, columns: slice) -> torch.Tensor:
        """The head's block as the GEMM reads it."""
        block = weight[columns]
        if not self.widens(weight):
            return block
        return self.buffer("weight", *block.shape, dtype=self.wide).copy_(block)

    def product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """The product out = a @ b (out += a @ b), accumulated in float32 (float64) and rounded to out's dtype at the end."""
        if self.on_gpu and a.dtype != out.dtype:
            if add and addmm_into_float32(a.device.type):
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

    def forward(self, note: Note | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The forward pass: values [10, N] and state [N, 9]. note: called on each tile that is summed, with the sums so far."""
        rows, columns = self.tile_shape()
        splits = self.tiles.splits(rows, columns)
        sums = self.student.new_zeros((splits, len(self.student), len(SUM_NAMES)), dtype=torch.float64)
        cut, whole = _Cut(sums, dim=1), (slice(0, len(self.student)), slice(0, self.head.columns))
        tops = Largest(self.student, self.task.stats)
        for part, block, pair, task in self.walk(*whole, (rows, columns)):
            self.tiles.sweep(*pair, task, *cut[part])
            tops.add(part, pair, task.first)
            if note is not None:
                note(part, block, pair, task, *cut[part])
        if self.kept is not None:
            self.kept.full = True
        if self.group:  # shards of unequal width may have been cut into unequal numbers of splits
            sums = merge(sums, self.task.rows)[None]
            sums = parallel.gather_sums(sums, len(self.head.weight), self.group, self.shards)
        values, state = self.tiles.finish(sums, self.task)
        tops.finish(values, state, self.task, self.group)
        if "jsd" in self.task.stats:
            add_jsd(values, state, self._mixture(state, rows, columns, splits), self.task)
        return values, state

    def _mixture(self, state: torch.Tensor, rows: int, columns: int, splits: int) -> torch.Tensor:
        shares = self.student.new_zeros((splits, len(self.student), 2), dtype=torch.float64)
        cut, states, whole = _Cut(shares, dim=1), _Cut(state), (slice(0, len(self.student)), slice(0, self.head.columns))
        for part, _, (student, teacher), task in self.walk(*whole, (rows, columns)):
            assert teacher is not None
            self.tiles.mixture(student, teacher, task, *states[part], *cut[part])
        shares = shares.sum(0)
        if self.group:
            parallel.add_up(shares, self.group)
        return shares

    # --- backward ---

    def backward(self, state: torch.Tensor, grads: torch.Tensor, needed: Sequence[bool]) -> list[torch.Tensor | None]:
        """Gradients of hidden states, weight and bias in their own dtype, summed in float32; None where not needed.

        Rounds of a span of columns and a part of the rows: dz tile by tile, then the gradient GEMMs.
        """
        head, (hidden, weight, bias) = self.head, needed
        out = _Sums(
            torch.zeros_like(self.student, dtype=self.wide) if hidden else None,
            torch.empty_like(head.weight, dtype=self.wide if self.unrounded else None) if weight else None,
            torch.zeros_like(head.bias, dtype=self.wide) if bias and head.bias is not None else None,
        )
        grads, unit = self.scaled(grads)
        per_row, shape = _Cut(state, grads), self.tile_shape()
        rows = self.part_rows(shape)
        summed = out.weight is not None and self._sums_weight(out.weight, rows)
        for span in pieces(slice(0, head.columns), self.span(rows, shape[1], summed)):
            own = summed or (weight and self._splits_sums(span))
            block = None if out.weight is None else self._weight_sums(span) if own else out.weight[span]
            for part in pieces(slice(0, len(self.student)), rows):
                dz = self._dz(part, span, shape, per_row)
                self._add(out, block, dz, part, span)
            if block is not None and unit is not None:
                block *= unit
            if own and out.weight is not None and block is not None:
                out.weight[span] = block
        if out.weight is not None:
            out.weight[head.columns :] = 0
            if not len(self.student):
                out.weight.zero_()
        for total in (out.hidden, out.bias):
            if total is not None and unit is not None:
                total *= unit
        if self.group and out.hidden is not None:
            parallel.add_up(out.hidden, self.group)
        like = (self.student, *((out.weight, out.bias) if self.unrounded else (head.weight, head.bias)))
        return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(out, like, strict=True)]

    def scaled(self, grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Row gradients as dz is made from, and what sums of dz are to be multiplied by: None, nothing, unless dz is float16.

        A mean over a batch makes gradients of 1e-7 a row, and float16 ends at 6e-8: columns of a probability below 0.1 would get
        none. A power of two, found without a look at its value, brings the largest to between 8 and 16: it changes no digit, and
        leaves room for terms of 4000 nats.
        """
        if self.dz_dtype != torch.float16:
            return grads, None
        rows = self.task.rows
        largest = torch.where(rows.keep()[:, None], grads * rows.inv_temperature[:, None], 0).abs().amax()
        exponent = (4 - torch.frexp(largest).exponent).clamp(-100, 100)
        exponent = torch.where((largest > 0) & largest.isfinite(), exponent, 0)
        one = torch.ones_like(largest)
        return grads * torch.ldexp(one, exponent), torch.ldexp(one, -exponent)

    def _sums_weight(self, gradient: torch.Tensor, rows: int) -> bool:
        """Whether the weight's gradient is summed in float32 blocks that are rounded once: it is narrower, and no single product
        gives a block of it, or dz is scaled.
        """
        single = rows >= len(self.student) and gradient.stride(1) == 1 and self.student.dtype == gradient.dtype
        direct = single and self.multiplies(gradient.dtype) and self.dz_dtype != torch.float16
        return gradient.dtype != self.wide and not direct

    def _splits_sums(self, span: slice) -> bool:
        """Whether a GPU's GEMM may cut the sums over the rows of so narrow a block among processors, and add them up in bfloat16:
        torch allows it by default, and only float32 results keep it from it.
        """
        weight = self.head.weight
        return self.on_gpu and weight.dtype != self.wide and (span.stop - span.start) * weight.shape[1] < _UNSPLIT

    def _weight_sums(self, span: slice) -> torch.Tensor:
        return self.buffer("weight sums", span.stop - span.start, self.head.weight.shape[1], dtype=self.wide)

    def _dz(self, part: slice, span: slice, shape: tuple[int, int], per_row: _Cut[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """dz of a round, tile by tile. per_row: of state and row gradients."""
        dz = self.buffer("dz", part.stop - part.start, span.stop - span.start, dtype=self.dz_dtype)
        for rows, block, pair, task in self.walk(part, span, shape):
            target = self._window(dz, rows.start - part.start, rows.stop - part.start, block.start - span.start, block)
            self.tile_dz(rows, block, pair, task, per_row[rows], target)
        return dz

    def tile_dz(
        self,
        rows: slice,
        columns: slice,
        pair: Pair,
        task: TileTask,
        per_row: tuple[torch.Tensor, torch.Tensor],
        target: torch.Tensor,
    ) -> None:
        """The dz of a tile, of its raw GEMM output, written to `target`. per_row: its rows of state and row gradients."""
        self.tiles.gradient(*pair, task, *per_row, target)
        if not self.tiles.fused_head:
            z, spare = pair[0].z, self.kept is not None and self.head.softcap is not None  # kept logits may serve once more
            through_head(self.head, z.clone() if spare else z, target)

    def _window(self, dz: torch.Tensor, top: int, bottom: int, left: int, columns: slice) -> torch.Tensor:
        """A tile's place in dz, a view of `buffer`; every span has the same ones."""
        key = ("window", dz.shape, top, bottom, left, columns.stop - columns.start)
        window = self.views.get(key)
        if window is None:
            window = self.views[key] = dz[top:bottom, left : left + columns.stop - columns.start]
        return window

    def _add(self, out: _Sums, block: torch.Tensor | None, dz: torch.Tensor, part: slice, span: slice) -> None:
        if out.bias is not None:
            out.bias[span] += dz.sum(0, dtype=self.wide)
        if out.hidden is not None:
            for piece in pieces(span, self.widest(self.head)):
                own = dz[:, piece.start - span.start : piece.stop - span.start]
                self.product(own, self.wide_weight(self.head.weight, piece), out.hidden[part], add=True)
        if block is not None:
            self.product(dz.T, self.student[part], block, add=part.start > 0)


@dataclass
class Kept:
    """Logits that a call holds from its forward to its backward pass. how: "logits", of all heads as `Linear.logits` has them,
    memory [heads, N, columns]; "difference", teacher minus student in bfloat16, memory [1, N, columns], from which the teacher's
    are made anew without a product. full: the forward pass is over.
    """

    how: str
    memory: torch.Tensor
    full: bool = False

    def pair(self, call: Linear, rows: slice, columns: slice) -> Pair:
        """Both heads' logits in a tile, made and kept, or as they were kept."""
        heads, own = (call.head, call.teacher_head), self.memory[:, rows, columns]
        if self.full and self.how == "logits":
            first, *rest = (call.kept_tile(head, z, columns) for head, z in zip(heads, own, strict=False))
            return first, rest[0] if call.teacher is not None and rest else None
        student, teacher, *_ = call.cut[rows]
        if self.full:
            first = call.logits(student, None, columns)[0]
            z = call.buffer("teacher logits", *first.z.shape, dtype=call.wide)
            torch.add(first.z, own[0], out=z).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # -inf + inf
            return first, call.kept_tile(call.teacher_head, z, columns)
        pair = call.logits(student, teacher, columns)
        first, other = pair
        if self.how == "logits":
            for z, tile in zip(own, pair, strict=False):
                assert tile is not None
                z.copy_(tile.z)
        elif other is not None:
            own[0].copy_((other.z - first.z).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf))  # -inf - -inf
        return pair


class Largest:
    """Where the largest logits of rows stand, tile by tile; nothing is looked for where no statistic asks."""

    def __init__(self, like: torch.Tensor, stats: Sequence[str]):
        self.heads = 0 if not set(ARGMAX_NAMES) & set(stats) else 2 if "argmax_agreement" in stats else 1
        if self.heads:
            self.values = like.new_full((2, len(like)), -torch.inf, dtype=torch.float64)
            self.columns = torch.full((2, len(like)), -1, dtype=torch.int64, device=like.device)

    def add(self, rows: slice, pair: Pair, first: int) -> None:
        """A tile whose first column is `first` in the vocabulary; tiles of a row come in the order of their columns."""
        for i, tile in enumerate(pair[: self.heads]):
            assert tile is not None
            values, columns = self.values[i, rows], self.columns[i, rows]
            value, at = largest(finished(tile))
            rises = value > values
            columns.copy_(torch.where(rises, at + first, columns))
            values.copy_(torch.where(rises, value.to(values.dtype), values))

    def finish(self, values: torch.Tensor, state: torch.Tensor, task: TileTask, group: str = "") -> None:
        """Fill in the places of `values` [10, N] that the back ends leave."""
        if not self.heads:
            return
        columns = parallel.first_largest(self.values, self.columns, group) if group else self.columns
        named: dict[str, torch.Tensor] = dict(zip(STATE_NAMES, state.unbind(-1), strict=True))
        for name, value in agreements(columns, task.rows, named, task.stats).items():
            values[STAT_NAMES.index(name)] = torch.where(task.rows.keep(), value, 0)


@cache
def addmm_into_float32(device: str) -> bool:
    """True where this torch adds a product of half matrices to a float32 one on this type of device ("cuda"); it is asked once.

    Its first releases with out_dtype refused a float32 sum, and those before have no such argument; there each round of gradient
    GEMMs makes a second float32 matrix of the hidden states' size (128 MiB at 8192 x 4096) and adds it.
    """
    total, half = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


class _Sums(NamedTuple):
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


class _Cut(Generic[*Cuts]):
    """Rows of tensors (along `dim`), each slice made once: it costs the host 2 us, and every block of columns has the same."""

    def __init__(self, *tensors: *Cuts, dim: int = 0):
        self.tensors, self.dim = tensors, dim
        self.parts: dict[tuple[int, int], tuple[*Cuts]] = {}

    def __getitem__(self, rows: slice) -> tuple[*Cuts]:
        key = rows.start, rows.stop
        part = self.parts.get(key)
        if part is None:
            length = rows.stop - rows.start
            tensors = cast("tuple[torch.Tensor | None, ...]", self.tensors)
            part = tuple(None if t is None else t.narrow(self.dim, rows.start, length) for t in tensors)
            part = self.parts[key] = cast("tuple[*Cuts]", part)
        return part


def pieces(whole: slice, size: int) -> Iterator[slice]:
    """The slices of a range, `size` long but for the last."""
    return (slice(i, min(i + size, whole.stop)) for i in range(whole.start, whole.stop, max(size, 1)))


def through_head(head: HeadPart, z: torch.Tensor, dz: torch.Tensor) -> None:
    """Turn d loss / d z into d loss / d (h W' + bias), in place; z, the capped logits, is used up."""
    if head.softcap is not None:
        dz *= z.div_(head.softcap).square_().neg_().add_(1)  # 1 - tanh^2
    if head.scale is not None:
        dz *= head.scale


def add_jsd(values: torch.Tensor, state: torch.Tensor, shares: torch.Tensor, task: TileTask) -> None:
    """Fill in the two places that `finish` leaves: the jsd [N] and, for the backward, KL(student || mixture)."""
    keep = task.rows.keep()
    values[STAT_NAMES.index("jsd")] = torch.where(keep, jsd(shares, task.beta), 0)
    state[:, STATE_NAMES.index("mixture_kl")] = torch.where(keep, shares[:, 0], 0)


def logits_forward(student: torch.Tensor, teacher: torch.Tensor | None, task: TileTask, backend: str):
    """The forward pass of given logits [N, V]: values [10, N], state [N, 9]; one tile that covers the vocabulary."""
    tiles, first, second = BACKENDS[backend], Tile(student), None if teacher is None else Tile(teacher)
    splits = tiles.splits(*student.shape)
    sums = student.new_zeros((splits, len(student), len(SUM_NAMES)), dtype=torch.float64)
    tiles.sweep(first, second, task, sums)
    values, state = tiles.finish(sums, task)
    tops = Largest(student, task.stats)
    tops.add(slice(0, len(student)), (first, second), 0)
    tops.finish(values, state, task)
    if "jsd" in task.stats:
        assert second is not None
        shares = torch.zeros_like(sums[..., :2])
        tiles.mixture(first, second, task, state, shares)
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
