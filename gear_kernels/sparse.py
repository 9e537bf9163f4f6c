"""The sparse backward of hidden states: forward notes how much each column matters to each block of rows, backward multiplies the
columns that matter.

What is left out, what takes its place and the bound on the error are reference/sparse.py's. `Notes` walks along with a forward
pass; `SparseBackward` chooses columns, measures what the choice can be off by, and chooses again until the tolerance is kept.
Where that would take most columns, or too many tries, the exact backward runs: the tolerance is kept in any case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from .backends import Tile, TileTask, finished
from .reference import sparse
from .reference.stats import BY_NAME, STAT_NAMES, STATE_NAMES, SUM_NAMES, Rows, merge, needs_teacher
from .tiling import HeadPart, Linear, Pair, pieces, through_head

TOLERANCE = 2.0**-9  # of a gradient's relative error: what rounding to bfloat16 may do to a number
_HINTS = 64  # one column in so many is looked at before the forward pass, for a first idea of each row's log Z
_SAMPLED = 16  # rows that tell which columns to look at, where targets do not
_MOST = 0.5  # share of columns from which on the exact backward is as fast
_TRIES = 4
_FIRST = 0.2  # of the first budget, by which most calls are done at the first try
_NEAR = 2.0**-14  # of a logit and 1: more than two orders of sums round it apart
_SAFETY = 0.7  # of the budget that a next try is given, relative to what the last one says would do


class Report(NamedTuple):
    """A backward pass, as it was done. bound: no gradient's relative error is larger, but for rounding; 0 where it was exact.
    kept: the share of columns in the products.  tries: choices of columns that were multiplied.
    """

    bound: float
    kept: float
    tries: int


_listening: list[list[Report]] = []


@contextlib.contextmanager
def reports() -> Iterator[list[Report]]:
    """Collect the reports of all sparse backward passes of this process inside the block, of any thread, in their order."""
    found: list[Report] = []
    _listening.append(found)
    try:
        yield found
    finally:
        _listening[:] = [one for one in _listening if one is not found]


def shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the notes on so many rows and columns."""
    return -(-rows // sparse.ROWS), columns


def _through(stats: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in stats if BY_NAME[name].gradient)


# --- gathered columns -------------------------------------------------------------------------------------------------------


class Gathered(NamedTuple):
    """Some rows' logits in some columns, and the student's head there [k, D] as products read it."""

    pair: Pair
    task: TileTask
    weight: torch.Tensor


def gather(call: Linear, rows: slice, index: torch.Tensor, stats: tuple[str, ...], teacher: bool) -> Gathered:
    """The logits of `rows` in the columns `index` [k], ascending; their task counts columns as they stand there."""
    call.operands.clear()
    heads = {True: ("gathered", call.head)}
    if teacher and call.teacher_head is not call.head:
        heads[False] = ("gathered for the teacher", call.teacher_head)
    for own, (name, head) in heads.items():
        block = call.buffer(name, len(index), head.weight.shape[1], dtype=head.weight.dtype)
        torch.index_select(head.weight, 0, index, out=block)
        block = block.to(call.wide) if call.widens(head.weight) else block
        call.operands[own] = (block.T, None if head.bias is None else head.bias[index])
    student, taught, targets, inv_temperature = call.cut[rows]
    pair = call.logits(student, taught if teacher else None, slice(0, len(index)))
    own = Rows(None if targets is None else _places(targets, index, call.task.rows.ignore_index), inv_temperature, _IGNORED)
    weight = call.operands[True][0].T
    return Gathered(pair, call.task._replace(rows=own, stats=stats, first=0, kept={}), weight)


_IGNORED = -2


def _places(targets: torch.Tensor, index: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Where each target [n] stands in `index`: -1 where it does not, -2 of an ignored row."""
    at = torch.searchsorted(index, targets).clamp_max(len(index) - 1)
    at = torch.where(index[at] == targets, at, -1)
    return torch.where(targets == ignore_index, _IGNORED, at)


def _sums(call: Linear, found: Gathered) -> torch.Tensor:
    """The partial sums [n, 12] of gathered logits."""
    n, k = found.pair[0].z.shape
    sums = call.student.new_zeros((call.tiles.splits(n, k), n, len(SUM_NAMES)), dtype=torch.float64)
    call.tiles.sweep(*found.pair, found.task, sums)
    return merge(sums, found.task.rows)


# --- forward ----------------------------------------------------------------------------------------------------------------


class Notes:
    """The notes of a forward pass: importances summed over blocks of rows, [blocks, columns].

    p and q need each row's log Z, which is known when all tiles are done. A tile's notes are taken with that of the tiles so far,
    or of the columns that are targets most often, whichever is larger: never too large, so that the importances never are too
    small, and of a model's own samples close to it.
    """

    def __init__(self, call: Linear):
        self.call, self.stats = call, _through(call.task.stats)
        self.teacher = needs_teacher(self.stats)
        self.table = torch.zeros(shape(call.rows, call.head.columns), dtype=call.wide, device=call.student.device)
        # of the heads whose logits are read
        self.floor = call.student.new_full((1 + self.teacher, call.rows), -torch.inf, dtype=torch.float64)
        if call.rows:
            self._look_ahead("logprobs" in self.stats)
        self.least = torch.full_like(self.floor[0], torch.inf)  # of the norms that the teacher's logits were noted with

    def _look_ahead(self, own_targets: bool) -> None:
        """A floor of each row's log Z, from the columns that have most of the mass, those of its block's targets among them."""
        call, columns = self.call, self.call.head.columns
        every = slice(0, call.rows)
        mass = torch.bincount(_own_targets(call, every), minlength=columns) if own_targets else self._sampled_mass()
        index = mass.topk(columns // _HINTS).indices
        for rows in _blocks(call.rows):
            own = _own_targets(call, rows) if own_targets else index[:0]
            for piece in _parts(torch.cat([index, own]).unique(), widest(call, sparse.ROWS)):
                found = gather(call, rows, piece, self.stats, self.teacher)
                so_far = _log_sums(_sums(call, found)[None], found.task.rows, self.teacher)
                self.floor[:, rows] = torch.logaddexp(self.floor[:, rows], so_far)
        call.operands.clear()

    def _sampled_mass(self) -> torch.Tensor:
        """What the student gives each column, over a few rows."""
        call, rows = self.call, self.call.task.rows.keep().nonzero().flatten()
        hidden = call.student[rows[:: max(1, len(rows) // _SAMPLED)]]
        z = torch.empty((len(hidden), call.head.columns), dtype=call.wide, device=hidden.device)
        for piece in pieces(slice(0, call.head.columns), widest(call, len(hidden))):
            call.operands.clear()
            z[:, piece] = finished(call.logits(hidden, None, piece)[0])
        return torch.softmax(z, -1).sum(0)

    def add(self, rows: slice, columns: slice, pair: Pair, task: TileTask, sums: torch.Tensor) -> None:
        """Note a tile, whose sums [K, n, 12] it is part of by now."""
        so_far = torch.maximum(self.floor[:, rows], _log_sums(sums, task.rows, self.teacher))
        noted = torch.where(so_far.isfinite(), so_far, 0).to(self.call.wide)
        if self.teacher:
            least, norms = self.least[rows], (noted[0], noted[1])
            torch.minimum(least, torch.where(so_far[1].isfinite(), so_far[1], torch.inf), out=least)
        else:
            pair, norms = (pair[0], None), (noted[0], None)
        first = rows.start // sparse.ROWS
        blocks = self.table[first : -(-rows.stop // sparse.ROWS), columns]
        self.call.tiles.note(*pair, task._replace(stats=self.stats), norms, rows.start % sparse.ROWS, blocks)

    def finished(self, state: torch.Tensor) -> torch.Tensor:
        """The notes as upper bounds, now that every row's log Z is known: [blocks, columns]."""
        of = dict(zip(STATE_NAMES, state.unbind(-1), strict=True))
        short = torch.zeros_like(of["log_z"])
        if "reverse_kl" in self.stats:
            norm = of["teacher_max"] * self.call.task.rows.inv_temperature + of["teacher_log_z"]
            short = torch.where(self.call.task.rows.keep() & norm.isfinite(), norm - self.least.to(norm.dtype), 0)
        factor = sparse.note_factor(self.stats, short)
        self.table *= torch.stack([block.amax() for block in factor.split(sparse.ROWS)])[:, None] if len(factor) else 1
        return self.table


def _own_targets(call: Linear, rows: slice) -> torch.Tensor:
    """The targets of these rows that are not ignored; those out of range, whose rows are NaN on a GPU, moved into it."""
    part = call.task.rows.part(rows)
    assert part.targets is not None
    return part.targets[part.keep()].clamp(0, call.head.columns - 1)


def _blocks(rows: int) -> list[slice]:
    return list(pieces(slice(0, rows), sparse.ROWS))


def _parts(index: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    return index.split(size) if len(index) else ()


def _log_sums(sums: torch.Tensor, rows: Rows, teacher: bool) -> torch.Tensor:
    """log sum e^(z / T) of the student over the columns of `sums` [K, n, 12], or less where these are split, and of the teacher
    where it is read: [1 or 2, n].
    """
    inverse, heads = rows.inv_temperature.to(sums.dtype), _OF_HEADS[: 1 + teacher]
    return torch.stack([(sums[..., top] * inverse + sums[..., z].log()).amax(0) for top, z in heads])


_OF_HEADS = [(SUM_NAMES.index(top), SUM_NAMES.index(z)) for top, z in (("max", "z"), ("teacher_max", "teacher_z"))]


def widest(call: Linear, rows: int) -> int:
    """Columns that are gathered at a time: their head, twice where it is widened, logits and dz of `rows` rows, in half of the
    workspace.
    """
    width = max(call.head.weight.shape[1], call.teacher_head.weight.shape[1])
    return max(64, call.workspace // 2 // ((2 * width + 3 * rows) * call.wide.itemsize))


# --- backward ---------------------------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """The sums of an attempt: gradients, None where not needed, and the mass of each row's kept columns."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mass: sparse.Mass


@dataclass
class SparseBackward:
    """A backward pass. state [N, 9], noted [blocks, columns]: the forward's; grads [N, 10]; needed: of hidden, weight, bias."""

    call: Linear
    state: torch.Tensor
    grads: torch.Tensor
    needed: Sequence[bool]
    noted: torch.Tensor
    tolerance: float

    def __post_init__(self):
        self.scaled, self.unit = self.call.scaled(self.grads)
        self.blocks = _blocks(self.call.rows)
        self.teacher = self.call.teacher is not None
        self.named: dict[str, torch.Tensor] = dict(zip(STATE_NAMES, self.state.unbind(-1), strict=True))
        self.row_grads = {name: self.scaled[:, STAT_NAMES.index(name)] for name in self.call.task.stats}
        rows, beta = self.call.task.rows, self.call.task.beta
        # of d loss / d (raw GEMM output): the softcap's slope is 1 at most
        self.scale = abs(1.0 if self.call.head.scale is None else self.call.head.scale)
        self.factor = sparse.row_factor(rows, self.named, self.row_grads, beta).times(self.scale)

    def run(self) -> list[torch.Tensor | None]:
        """The gradients, None where not needed, and a Report to who listens."""
        found, report = self._search()
        for one in _listening if self.blocks else ():
            one.append(report)
        return self.call.backward(self.state, self.grads, self.needed) if found is None else found

    def _search(self) -> tuple[list[torch.Tensor | None] | None, Report]:
        budget = self._first_budget()
        for tries in range(_TRIES if self.blocks else 0):
            kept = self._choose(budget)
            share = kept.float().mean().item()
            if not share <= _MOST:
                return None, Report(0.0, 1.0, tries)
            gradients, bound = self._attempt(kept)
            if bound <= self.tolerance:
                return gradients, Report(bound, share, tries + 1)
            budget *= min(_SAFETY * self.tolerance / bound, 0.5) if bound < torch.inf else 0.1
        return None, Report(0.0, 1.0, _TRIES if self.blocks else 0)

    # --- the choice ---

    def _first_budget(self) -> float:
        """A guess at what the left-out |dz| may add up to: a share of the tolerance times the sizes of the rows' gradients."""
        sizes = torch.zeros_like(self.factor.plain)
        for name, g in self.row_grads.items():
            of = self.named[{"jsd": "mixture_kl", "logsumexp": "log_z"}.get(name, name)]
            size = -torch.expm1(of) if name == "logprobs" else torch.ones_like(of) if name == "logsumexp" else of.clamp(0, 1)
            sizes += torch.where(self.call.task.rows.keep(), g, 0).abs() * size
        return (_FIRST * self.tolerance * self.scale * (sizes * self.call.task.rows.inv_temperature)).sum().item()

    @cached_property
    def sizes(self) -> torch.Tensor:
        """The sums of |dz| of each block in each column, about: [blocks, c]."""
        mean = (torch.stack([x.square().mean().sqrt() for x in part.split(sparse.ROWS)]) for part in self.factor)
        return sparse.Factor(*mean).sums(self.noted)

    def _choose(self, budget: float) -> torch.Tensor:
        kept = sparse.kept_columns(self.sizes, budget)
        if self.call.task.rows.targets is not None:
            for own, rows in zip(kept, self.blocks, strict=True):
                own[_own_targets(self.call, rows)] = True
        return kept

    # --- the products ---

    def _attempt(self, kept: torch.Tensor) -> tuple[list[torch.Tensor | None], float]:
        """The gradients from these columns [blocks, c], and the bound on their relative error."""
        call = self.call
        totals, index = self._totals(), [row.nonzero().flatten() for row in kept]
        for span in self._spans(totals.weight):
            sums = None if totals.weight is None else self._weight_sums(totals.weight, span)
            for rows, columns in zip(self.blocks, index, strict=True):
                inside = columns[(columns >= span.start) & (columns < span.stop)]
                for piece in _parts(inside, widest(call, sparse.ROWS)):
                    self._multiply(rows, piece, totals, sums, span.start)
            if sums is not None and totals.weight is not None and sums.dtype != totals.weight.dtype:
                totals.weight[span] = sums if self.unit is None else sums.mul_(self.unit)
        call.operands.clear()
        unit = 1.0 if self.unit is None else self.unit
        bounds = [] if totals.hidden is None else [self._add_tail(totals.hidden, totals.mass, kept)]
        if totals.weight is not None:
            lengths = torch.linalg.vector_norm(call.student, dim=1, dtype=call.wide)
            bounds.append(_relative(self._left_error(lengths, kept) * unit, totals.weight))
        if totals.bias is not None:
            bounds.append(_relative(self._left_error(torch.ones_like(self.factor.plain), kept), totals.bias))
        for total in (totals.hidden, totals.bias):
            if total is not None and self.unit is not None:
                total *= self.unit
        pairs = ((totals.hidden, call.student), (totals.weight, call.head.weight), (totals.bias, call.head.bias))
        return [None if g is None or of is None else g.to(of.dtype) for g, of in pairs], max(bounds, default=0.0)

    def _totals(self) -> Totals:
        call, (hidden, weight, bias) = self.call, self.needed
        mass = sparse.Mass(*torch.zeros(len(sparse.Mass._fields), call.rows, dtype=torch.float64, device=self.state.device))
        return Totals(
            torch.zeros_like(call.student, dtype=call.wide) if hidden else None,
            torch.zeros_like(call.head.weight) if weight else None,
            torch.zeros_like(call.head.bias, dtype=call.wide) if bias and call.head.bias is not None else None,
            mass,
        )

    def _spans(self, weight: torch.Tensor | None) -> list[slice]:
        """All columns at once, or where their sums are wider than the weight, as many as fit a quarter of the workspace."""
        whole = slice(0, self.call.head.columns)
        if weight is None or weight.dtype == self.call.wide:
            return [whole]
        return list(pieces(whole, max(64, self.call.workspace // 4 // (weight.shape[1] * self.call.wide.itemsize))))

    def _weight_sums(self, weight: torch.Tensor, span: slice) -> torch.Tensor:
        """Where the weight's gradient is summed: itself, or a wider block that is rounded once."""
        if weight.dtype == self.call.wide:
            return weight[span]
        return self.call.buffer("weight sums", span.stop - span.start, weight.shape[1], dtype=self.call.wide).zero_()

    def _multiply(self, rows: slice, index: torch.Tensor, totals: Totals, sums: torch.Tensor | None, first: int) -> None:
        """Add what a block of rows has in some columns; `sums` begins at the column `first`."""
        call = self.call
        found = gather(call, rows, index, call.task.stats, self.teacher)
        student, teacher = found.pair
        self._align(student, call.head, self.named["max"][rows])
        if teacher is not None:
            self._align(teacher, call.teacher_head, self.named["teacher_max"][rows])
        totals.mass.add(self._mass(found, rows), rows)
        dz = call.buffer("dz", *student.z.shape, dtype=call.dz_dtype)
        call.tiles.gradient(student, teacher, found.task, self.state[rows], self.scaled[rows], dz)
        if not call.tiles.fused_head:
            through_head(call.head, student.z, dz)
        if totals.bias is not None:
            totals.bias.index_add_(0, index, dz.sum(0, dtype=call.wide))
        if totals.hidden is not None:
            call.product(dz, found.weight, totals.hidden[rows], add=True)
        if sums is not None:
            part = call.buffer("weight part", len(index), sums.shape[1], dtype=call.wide)
            call.product(dz.T, call.student[rows], part)
            sums.index_add_(0, index - first, part)

    def _align(self, tile: Tile, head: HeadPart, top: torch.Tensor) -> None:
        """Shift a row's logits, in place, so that its largest is the forward's, where they differ by rounding.

        A product of gathered columns rounds otherwise than one of all: 1e-5 of a logit of 100, and by as much 1 - p of a token
        that the policy is sure of, 1e-6, was off: 0.3 % of a whole gradient where 0.14 % was promised.
        """
        if (
            head.softcap is not None and self.call.tiles.fused_head
        ):  # raw logits, whose shift is not theirs; a softcap keeps them small
            return
        gap = top - finished(tile).amax(-1)
        shift = torch.where(gap.abs() <= _NEAR * (1 + top.abs()), gap, 0)
        raw = head.scale if self.call.tiles.fused_head and head.scale is not None else 1.0
        tile.z.add_((shift / raw)[:, None])

    def _mass(self, found: Gathered, rows: slice) -> sparse.Mass:
        call, (student, teacher) = self.call, found.pair
        shares = self.state.new_zeros((call.tiles.splits(*student.z.shape), len(student.z), 2), dtype=torch.float64)
        if "jsd" in call.task.stats and teacher is not None:
            call.tiles.mixture(student, teacher, found.task, self.state[rows], shares)
        named = {name: value[rows] for name, value in self.named.items()}
        return sparse.kept_mass(_sums(call, found), found.task.rows, named, shares.sum(0)[:, 0])

    # --- what is left out ---

    def _add_tail(self, hidden: torch.Tensor, mass: sparse.Mass, kept: torch.Tensor) -> float:
        """Add the tail to the hidden states' gradient; the bound on its relative error. A softcap's slopes differ from column to
        column, so there the left-out sum is not known, and nothing is added.
        """
        call, block = self.call, torch.arange(self.call.rows, device=hidden.device) // sparse.ROWS
        gone = sparse.left_out(mass, call.task.rows, self.named, self.row_grads, call.task.beta)
        left = self.noted.masked_fill(kept, 0)
        noted = self.factor.plain * left.sum(1)[block]
        if self.factor.entropy.any():
            noted += self.factor.entropy * sparse.entropy_sums(left).sum(1)[block]
        rounding = sparse.ROUNDING * torch.finfo(self.state.dtype).eps * (self.factor.plain + self.factor.entropy)
        most = torch.minimum(self.scale * gone.most + rounding, noted.double())
        centre, distance = self._spread
        reach = distance.expand_as(kept).masked_fill(kept, 0).amax(1)
        if call.head.softcap is None:
            mean = self._mean_embeddings(self.sizes.masked_fill(kept, 0))
            reach = reach + torch.linalg.vector_norm(mean - centre, dim=1)
            signed = (gone.signed * (call.head.scale or 1.0)).clamp(-most, most)
            hidden += signed.to(hidden.dtype)[:, None] * mean[block]
        return _relative(torch.linalg.vector_norm(most * reach.double()[block]), hidden)

    def _mean_embeddings(self, left: torch.Tensor) -> torch.Tensor:
        """The mean of each block's left-out rows of the head, weighted by importance: [blocks, D]."""
        call = self.call
        share = (left / left.sum(1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)).to(call.dz_dtype)
        mean = torch.zeros((len(left), call.head.weight.shape[1]), dtype=call.wide, device=left.device)
        for piece in self._head_pieces():
            call.product(share[:, piece].contiguous(), call.wide_weight(call.head.weight, piece), mean, add=True)
        return mean

    @cached_property
    def _spread(self) -> tuple[torch.Tensor, torch.Tensor]:
        """About the mean of the head's rows [D], and how far each lies from it [c]; 0 in place of the mean under a softcap."""
        call, parts = self.call, list(self._head_pieces())
        centre = torch.zeros(call.head.weight.shape[1], dtype=call.wide, device=self.state.device)
        if call.head.softcap is None:  # any point would do
            centre = call.head.weight[: call.head.columns : _HINTS].mean(0, dtype=call.wide)
        far = [torch.linalg.vector_norm(call.head.weight[piece].to(call.wide) - centre, dim=1) for piece in parts]
        return centre, torch.cat(far) * (1 + 1e-5)

    def _head_pieces(self) -> Iterator[slice]:
        return pieces(slice(0, self.call.head.columns), widest(self.call, sparse.ROWS))

    def _left_error(self, lengths: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """A bound on the norm of the left-out columns' gradient; lengths [N]: of what each row multiplies its dz with."""
        parts = self.factor.times(lengths)
        most = sparse.Factor(*(torch.stack([x.amax() for x in part.split(sparse.ROWS)]) for part in parts))
        return torch.linalg.vector_norm(most.sums(self.noted).masked_fill(kept, 0).sum(0))


def _relative(error: torch.Tensor, gradient: torch.Tensor) -> float:
    """The most that an error of this norm is of the true gradient, which is shorter than the given one by as much at most."""
    off, size = error.item(), torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).item()
    return 0.0 if off == 0 else off / (size - off) if size > off else torch.inf if off == off else torch.nan
