"""Figures that must not grow, without a GPU and without a quiet machine: `python -m benchmarks.gates [--check]`.

Writes gates.json; --check compares with it, writes nothing and exits with 1 on any growth. Counted, the same at every run: peak
bytes that torch allocates, dispatched operators, launches of Triton kernels and host synchronisations, on the CPU with small
shapes and on the path of a GPU with meta tensors of the Qwen3-8B shape, which have no values: what cannot be answered without a
value is a synchronisation. Timed: each operation beside a baseline of the same run (eager torch, or a copy of what the scan
moves), on one thread; the gate closes when the ratio is --slower times the committed one in three repeats in a row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gear_kernels

from ..harness.cases import DTYPES, HEAD_SHAPE, PASSES, SMALL, Case, make_case, plain, runner
from ..harness.credit_inputs import SMALL_PACK, TOKEN_BYTES, pack
from ..harness.environment import RESULTS
from ..harness.internals import KERNEL_MODULES, body_of, kernels_of, taken_for_gpu
from ..harness.measure import elapsed_ms, interleave, keep_freed_blocks, one_thread
from ..harness.peers import EAGER, OURS, peers
from ..harness.tables import terminal_console

TABLE = "gates.json"
CREDIT = "credit_weights, typical pack"
_NAMES = {"logits": "token_stats", "hidden": "linear_token_stats"}
SHAPES = {"cpu": SMALL, "gpu": {"logits": (1024, 32003), "hidden": HEAD_SHAPE}}
_REPEATS = 3
_FIGURES = ("peak_bytes", "operators", "launches", "synchronisations")


@dataclass(frozen=True)
class Cost:
    """The cost of one operation. path: cpu, or gpu (meta tensors).  peak_bytes: allocated by torch beyond the inputs, results
    included.  operators: of torch, views left out, the benchmark's own loss included.  launches: of Triton kernels.
    """

    path: str
    operation: str
    peak_bytes: int
    operators: int
    launches: int
    synchronisations: int

    @property
    def key(self) -> tuple[str, str]:
        """The key by which a row is found in another table."""
        return self.path, self.operation

    def __str__(self) -> str:
        return f"{self.path}: {self.operation}"


# --- counting ----------------------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts operators, bytes and looks at values of whatever runs under it, inside the package's own operators too."""

    def __init__(self):
        super().__init__()
        self.operators = self.synchronisations = self.live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "gear_kernels":  # on meta tensors torch would call its fake twin, which allocates results alone
            with self:
                return body_of(func)(*args, **kwargs)
        self._note((args, kwargs), counted=False)
        self.operators += not func.is_view
        try:
            out = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            if not any(x.is_meta for x in _tensors((args, kwargs))):
                raise
            self.synchronisations += 1
            out = _by_zeros(func, args, kwargs)
        self._note(out, counted=True)
        return out

    def _note(self, tree: object, counted: bool) -> None:
        """Hold what is new of a tree's memory; arguments that are new were there before, and cost nothing."""
        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._storages:
                size = storage.nbytes() if counted else 0
                self._storages[key] = weakref.ref(storage, lambda _, key=key: self._drop(key)), size
                self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]


def _tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _by_zeros(func, args: tuple, kwargs: dict):
    """The answer if all values were 0, so that one look at a value does not hide the next."""
    zeros = tree_map_only(torch.Tensor, lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), (args, kwargs))
    out = func(*zeros[0], **zeros[1])
    return out if "device" in kwargs else tree_map_only(torch.Tensor, lambda x: x.to("meta"), out)


class Launches:
    """Takes a Triton kernel's place in its module: a launch is counted, and starts nothing."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *arguments, **options) -> None:
        self.count += 1


def _any_config(*_) -> NamedTuple:
    return importlib.import_module(KERNEL_MODULES[0]).Config(1024, 4)


@contextlib.contextmanager
def gpu_path() -> Iterator[Launches]:
    """Meta tensors take the path of a GPU: the Triton back end, with its kernels replaced by one counter."""
    launches = Launches()
    with contextlib.ExitStack() as stack:
        for module in map(importlib.import_module, KERNEL_MODULES):
            for kernel in kernels_of(module):
                stack.enter_context(mock.patch.object(module, kernel, launches))
            # the real one asks the driver for the device; block and warps change no count
            stack.enter_context(mock.patch.object(module, "config", _any_config))
        # there is no autocast on the meta device, and none is on here
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **options: contextlib.nullcontext()))
        stack.enter_context(taken_for_gpu())
        stack.enter_context(gear_kernels.backend("triton"))
        yield launches


def figures(only: str = "") -> list[Cost]:
    """A row for each operation whose `path: name` holds `only`, CPU first."""
    cpu = [_counted("cpu", *item) for item in _operations("cpu") if only in f"cpu: {item[0]}"]
    with gpu_path() as launches:
        return cpu + [_counted("gpu", *item, launches) for item in _operations("gpu") if only in f"gpu: {item[0]}"]


def _operations(path: str, dtypes: tuple = DTYPES) -> Iterator[tuple[str, Callable]]:
    """(name, call that prepares: it returns what is measured) of all operations."""
    for kind, shape in SHAPES[path].items():
        for dtype in dtypes:
            for passes in PASSES:
                yield _name(kind, dtype, passes), lambda k=kind, d=dtype, s=shape, p=passes: _statistics(path, k, d, s, p)
    yield CREDIT, lambda: pack(*SMALL_PACK).to("cpu" if path == "cpu" else "meta").credit


def _name(kind: str, dtype: torch.dtype, passes: str) -> str:
    return f"{_NAMES[kind]}, {plain(dtype)}, {passes}"


def _statistics(path: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...], passes: str, peer: str = OURS) -> Callable:
    case = make_case(kind, dtype, *shape) if path == "cpu" else _without_values(kind, dtype, *shape)
    (chosen,) = (p for p in peers(kind) if p.name == peer)
    return runner(chosen.load(), case, passes)


def _without_values(kind: str, dtype: torch.dtype, rows: int, columns: int, width: int = 0) -> Case:
    """`make_case` on the meta device."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    weight = empty(columns, width).requires_grad_() if kind == "hidden" else None
    shape = (rows, width or columns)
    row_grads = empty(2, rows, kind=torch.float64)
    return Case(empty(*shape).requires_grad_(), empty(*shape), empty(rows, kind=torch.int64), row_grads, weight)


def _counted(path: str, operation: str, prepare: Callable, launches: Launches | None = None) -> Cost:
    call = prepare()
    with Counter():
        call()  # what is cached at the first call is no cost of the second
    gc.collect()
    before = launches.count if launches else 0
    with Counter() as counter:
        call()
    started = launches.count - before if launches else 0
    return Cost(path, operation, counter.peak, counter.operators, started, counter.synchronisations)


# --- timing ------------------------------------------------------------------------------------------------------------------


def _timed(only: str) -> Iterator[tuple[str, Callable, Callable]]:
    """(name, the operation, its baseline) on the CPU in float32."""
    for kind, shape in SMALL.items():
        for passes in PASSES:
            name = _name(kind, torch.float32, passes)
            if only in ("", name):
                both = (_statistics("cpu", kind, torch.float32, shape, passes, peer) for peer in (OURS, EAGER))
                yield name, *both
    if only in ("", CREDIT):
        p, rows = pack(*SMALL_PACK), torch.ones(TOKEN_BYTES, SMALL_PACK[0], dtype=torch.uint8)
        copy = torch.empty_like(rows)
        yield CREDIT, p.credit, lambda: copy.copy_(rows)


def ratios(only: str = "", rounds: int = 25) -> dict[str, float]:
    """Time of each operation over that of its baseline, by name: the quickest calls on one thread, because two threads that wait
    for one another beside a neighbour's load take anything from one to three times as long.
    """
    found = {}
    keep_freed_blocks()
    with one_thread():
        for name, ours, baseline in _timed(only):
            calls = {"ours": ours, "baseline": baseline}
            times = interleave(calls, {key: elapsed_ms(call) for key, call in calls.items()}, rounds, seconds=1.5)
            found[name] = times["ours"].least_ms / times["baseline"].least_ms
    return found


def typical_ratios() -> dict[str, float]:
    """The ratios that are committed: the median of three runs."""
    runs = [ratios() for _ in range(_REPEATS)]
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


# --- the gates ---------------------------------------------------------------------------------------------------------------


def grown(rows: list[Cost], table: dict, whole: bool = True) -> list[str]:
    """A line for each figure above the table's. Between versions of torch only synchronisations are compared, and that none is
    above 0 in a new row. whole: rows that one of the two lacks are offenders too.
    """
    old, new = {row.key: row for row in (Cost(**r) for r in table["rows"])}, {row.key: row for row in rows}
    lines = [f"{row}: not in the committed table; write it anew" for key, row in new.items() if key not in old] if whole else []
    lines += [f"{row}: in the committed table, but no longer measured" for key, row in old.items() if key not in new and whole]
    names = _FIGURES if table["torch"] == torch.__version__ else _FIGURES[-1:]
    for key in old.keys() & new.keys():
        for name in names:
            now, before = getattr(new[key], name), getattr(old[key], name)
            lines += [f"{new[key]}: {name} {now}, committed {before}"] if now > before else []
    return sorted(lines)


def shrunk(rows: list[Cost], table: dict) -> int:
    """The number of figures below the table's: seen the other way round, they grew."""
    other = {"torch": table["torch"], "rows": [asdict(row) for row in rows]}
    return len(grown([Cost(**row) for row in table["rows"]], other, whole=False))


def slower(table: dict, factor: float, only: str = "") -> list[str]:
    """A line for each operation that is `factor` times the table's ratio in three repeats in a row; one good repeat acquits."""
    lines = []
    for name, before in table["ratios"].items():
        if only in ("", name):
            found = []
            while len(found) < _REPEATS and all(ratio > factor * before for ratio in found):
                found += ratios(name).values()
            if all(ratio > factor * before for ratio in found):
                shown = ", ".join(f"{ratio:.3g}" for ratio in found)
                lines.append(f"cpu: {name}: time / baseline {shown}, committed {before:.3g}; the limit is {factor:g} times that")
    return lines


def write(rows: list[Cost], times: dict[str, float], path: Path) -> None:
    """The table, a row a line so that a change reads well in a diff."""
    body = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    pairs = ",\n".join(f"  {json.dumps(name)}: {ratio}" for name, ratio in times.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'{{\n "torch": {json.dumps(torch.__version__)},\n "rows": [\n{body}\n ],\n'
    path.write_text(head + f' "ratios": {{\n{pairs}\n }}\n}}\n')


def show(rows: list[Cost], times: dict[str, float], console: Console) -> None:
    """The table on a terminal."""
    shown = Table("path", "operation", *(name.replace("_", " ") for name in _FIGURES), "time / baseline, the table's")
    for row in rows:
        ratio = f"{times[row.operation]:.3g}" if row.path == "cpu" and row.operation in times else ""
        shown.add_row(row.path, row.operation, *(f"{getattr(row, name):,}" for name in _FIGURES), ratio)
    console.print(shown)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    parser.add_argument("--only", choices=("counts", "times"), help="with --check: one kind of gate")
    parser.add_argument("--slower", type=float, default=2.0, help="times the committed ratio that closes the time gate")
    parser.add_argument("--table", type=Path, default=RESULTS / TABLE, help="the file that is compared with, or written")
    given = parser.parse_args(arguments)
    if given.only and not given.check:
        parser.error("--only goes with --check; the table is always written whole")
    console, start, lines = terminal_console(), time.perf_counter(), []
    rows = [] if given.only == "times" else figures()
    if given.check:
        table = json.loads(given.table.read_text())
        times = table["ratios"]
        lines += [] if given.only == "times" else grown(rows, table)
        lines += [] if given.only == "counts" else slower(table, given.slower)
    else:
        times = typical_ratios()
        write(rows, times, given.table)
    if rows:
        show(rows, times, console)
    for line in lines:
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    if given.check and (better := shrunk(rows, table)):
        console.print(f"{better} figures are below the table's; write it anew to keep the gain")
    verdict = f"{len(lines)} offenders" if lines else "nothing grew" if given.check else f"wrote {given.table}"
    console.print(f"{time.perf_counter() - start:.0f} s: {verdict}")
    return 1 if lines else 0
