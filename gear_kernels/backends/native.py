"""The native back end: the pass and the scan that are compiled for the CPU (csrc/)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..records import Credit, Pack, Tile, TileTask, check_advantages, nan_at
from ..reference import credit, sparse, stats
from ..rules import NORMALIZERS, RULES, SCAN_SEGMENTERS, Rule, lower
from .base import Backend, empty_credit, left_to_reference

# What the compiled module writes and reads by number: csrc/tables.h has the same lists.
TABLES = {
    "sums": stats.SUM_NAMES,
    "values": stats.STAT_NAMES,
    "state": stats.STATE_NAMES,
    "rules": tuple(rule.name for rule in RULES),
    "normalizers": NORMALIZERS,
    "segmenters": SCAN_SEGMENTERS,
    "tallies": credit.TALLIES,
    "note_rows": (str(sparse.ROWS),),
}
MEND = "install a wheel that has it, or from source with a C++ compiler: docs/install.md"


@cache
def load() -> tuple[Any, str | None]:
    """The compiled module and None, or None and the reason why there is none that fits this package."""
    try:
        from .. import _native  # pyright: ignore[reportAttributeAccessIssue] - compiled, without stubs
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); {MEND}"
    found = {name: tuple(names) for name, names in getattr(_native, "tables", dict)().items()}
    other = ", ".join(name for name in TABLES if found.get(name) != TABLES[name])
    if other:
        return None, f"the compiled module was built from other sources (its {other} differ); {MEND}"
    return _native, None


class Native(Backend):
    """The compiled pass, with the best instruction set of this processor, on as many threads as torch has."""

    name = "native"
    scans = True

    def why_not(self, device, dtype):
        """See Backend.why_not."""
        module, missing = load()
        if module is None:
            return missing
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        return left_to_reference(dtype)

    def detail(self):
        """The instruction set, products and threads."""
        half = ", bfloat16 products" + ", AMX" * has_tiles() if self.multiplies(torch.bfloat16) else ""
        return f" ({instruction_set()}{half}, {torch.get_num_threads()} threads)"

    def splits(self, rows, columns):
        """Few rows are cut, so that every core has work; from the shape alone, or results would change with the thread count."""
        return max(1, min(16 // max(rows, 1), columns // 8192))

    def sweep(self, student, teacher, task, sums):
        """See Backend.sweep."""
        moments = any(stats.BY_NAME[name].teacher_moments for name in task.stats)
        _call("sweep", student, teacher, task, moments, sums)

    def finish(self, sums, task):
        """See Backend.finish."""
        n = sums.shape[1]
        values, state = torch.empty((len(stats.STAT_NAMES), n)), torch.empty((n, len(stats.STATE_NAMES)))
        rows = (task.rows.targets, task.rows.ignore_index, task.rows.inv_temperature, stats.needs_teacher(task.stats))
        load()[0].finish(sums, *rows, values, state, torch.get_num_threads(), instruction_set())
        return values, state

    def mixture(self, student, teacher, task, state, shares):
        """See Backend.mixture."""
        _call("mixture", student, teacher, task, state, task.beta, shares)

    def note(self, student, teacher, task, norms, first_row, noted):
        """See Backend.note."""
        _call("note", student, teacher, task, *norms, first_row, "reverse_kl" in task.stats, noted)

    def gradient(self, student, teacher, task, state, grads, dz):
        """See Backend.gradient."""
        _call("multiplied_gradient" if task.multiplied else "gradient", student, teacher, task, state, task.beta, grads, dz)

    def multiplies(self, dtype):
        """See Backend.multiplies: bfloat16 on a processor with AVX512-BF16, 4 times the rate of float32 GEMMs on a Zen 5; a Xeon
        is as fast as in float32 with it, and five times as fast with AMX.
        """
        return _multiplies(dtype)

    def product(self, a, b, out, add):
        """See Backend.product."""
        a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
        load()[0].product(a, b, out, add, has_tiles(), torch.get_num_threads())

    def scan(self, pack, rule):
        """Bitwise equal to the method's `apply` in the same dtype, but for exp (of RatioRule and GatedRatioRule)."""
        floats, ids, onsets, tallies = empty_credit(pack, len(credit.TALLIES))
        rows = (pack.row("signal"), pack.row(rule.second), pack.own_advantages())
        turns, mask = pack.rows["turn_ids"], pack.mask
        bounds = pack.cu_seqlens.long().contiguous()
        integers = (None if mask is None else mask.contiguous(), None if turns is None else turns.long().contiguous(), bounds)
        outputs = (floats, ids, onsets, tallies)
        places = load()[0].scan(*rows, *integers, *outputs, _options(pack, rule), torch.get_num_threads())
        for name, place in zip(("signal", rule.second), places, strict=True):
            if name is not None and place >= 0:
                raise nan_at(name, place, bounds.tolist())
        check_advantages(pack.advantages)
        return Credit._make([*floats, ids, onsets, credit.diagnostics(tallies.sum(0), (tallies[:, 0] > 0).sum())])


@cache  # asked for with every tile
def instruction_set() -> str:
    """The compiled pass' instruction set on this processor: avx512, avx2 or baseline."""
    return load()[0].instruction_sets()[-1]


@cache
def has_tiles() -> bool:
    """True where products of bfloat16 use AMX, which asks the system for each thread's room once."""
    return load()[0].may_use_tiles()


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and load()[0].has_product()


def _call(function: str, student: Tile, teacher: Tile | None, task: TileTask, *tables) -> None:
    rows = (task.rows.targets, task.rows.ignore_index, task.rows.inv_temperature, task.first)
    tiles = (student.z, None if teacher is None else teacher.z)
    getattr(load()[0], function)(*tiles, *rows, *tables, torch.get_num_threads(), instruction_set())


def _options(pack: Pack, rule: Rule):
    options = load()[0].ScanOptions()
    for name, value in lower(rule)._asdict().items():
        setattr(options, name, value)
    options.level = 1.0 if rule.level is None else rule.level(pack.row(rule.second), pack.mask).item()
    return options
