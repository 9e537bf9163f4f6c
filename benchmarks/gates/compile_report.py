"""Every Triton kernel, compiled for GPUs that need not be there: `python -m benchmarks.gates.compile_report [--check]`.

Writes compile_report.json and compile_report.md: registers, spills, shared memory and the widest global load and store of each
specialisation on each target. --check compiles again, compares with the JSON and exits with 1 on any spill, shared memory over
the target's limit, missing row, growth of registers or shared memory, or narrower load or store; and, compiling nothing for it,
on a table that was written from other kernels than the tree's, so that a few cases (--only) guard all of them. --triton DIR does
it with the Triton of that folder (`pip install --target DIR --no-deps triton==...`) and names what spills there; the Makefile's
compile-matrix is all versions.

Kernels are compiled through the package's own launchers, called with meta tensors: nothing here repeats an argument list or a
block size. A target has its own process, because a fatal back-end error ends it. Never run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from gear_kernels.methods import METHODS, NORMALIZERS, Gear

from ..harness.cases import OUTPUTS, SEVEN, plain
from ..harness.environment import RESULTS, ROOT
from ..harness.internals import (
    IGNORED,
    KERNEL_MODULES,
    STAT_NAMES,
    STATE_NAMES,
    SUM_NAMES,
    Rows,
    Tile,
    TileTask,
    kernels_of,
    needs_teacher,
)
from ..harness.tables import markdown_table, progress_bar, terminal_console

TABLE = "compile_report.json"
ALIGNED, RAGGED = 151936, 32003
TILE = 512  # columns of a narrow tile of hidden states; from 2048 columns on the kernel is that of V = 151936
_KIB = 1024
# name: Triton's target, and the bytes of shared memory that one program may have (the compilers do not check this)
TARGETS: dict[str, tuple[tuple[str, int | str, int], int]] = {
    "sm_80": (("cuda", 80, 32), 163 * _KIB),
    "sm_90": (("cuda", 90, 32), 227 * _KIB),
    "sm_100": (("cuda", 100, 32), 227 * _KIB),
    "gfx942": (("hip", "gfx942", 64), 64 * _KIB),
}
_PROCESSES = 2  # a compile keeps one core busy
# A case of each kind of statistics, logits and scan, for every test run: 17 of a target's 121 kernels.
FEW = (
    "^(default, (float32|bfloat16), V=151936|all seven, bfloat16, V=151936|student only, float32, V=512, dz bfloat16|"
    "default, float32, V=32003|jsd, float32, V=32003|masked|gear|gear, quantile, masked|rlsd, masked|high_entropy)$"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled. registers: per thread (AMD: vector registers).  spills: bytes of memory per thread (AMD: scratch;
    scalar registers that run out are kept in lanes of vector ones, which are counted).  shared: bytes per program.
    load_bits, store_bits: of one access to global memory by a thread: the widest vector, or where there is none the most
    frequent single value (16 or 32 then: not vectorised).
    """

    target: str
    kernel: str
    case: str
    block: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int

    @property
    def key(self) -> tuple[str, str, str]:
        """The key by which a row is found in another table."""
        return self.target, self.kernel, self.case

    def __str__(self) -> str:
        return f"{self.target} {self.kernel}, {self.case} (block {self.block}, {self.num_warps} warps)"


# --- what is compiled ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A call of a launcher of the package with meta tensors; every kernel that it starts becomes a row named `case`."""

    case: str
    call: Callable[[], Any]


@dataclass(frozen=True)
class Family:
    """Kernels of one module: its attributes named *_kernel. `launches` lists what to call, given the module."""

    module: str
    launches: Callable[[ModuleType], list[Launch]]


DEFAULT, STUDENT, EVERY = OUTPUTS, OUTPUTS[:2], SEVEN
_NAMES = {DEFAULT: "default", STUDENT: "student only", EVERY: "all seven"}
SUBSETS = (DEFAULT, STUDENT, EVERY, ("reverse_kl",), ("forward_kl",), ("jsd",))
HEADS = {"": {}, "bias": {"bias": True}, "bias scale softcap": {"bias": True, "scale": 0.0625, "softcap": 30.0}}
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


_ROWS = 64  # of no consequence: kernels do not specialise on it


@dataclass(frozen=True)
class Variant:
    """One specialisation of the statistics kernels. dtype: of the logits.  out: of dz; None: the same.  strided: logits whose
    columns are not adjacent in memory.
    """

    stats: tuple[str, ...]
    dtype: torch.dtype = _F32
    out: torch.dtype | None = None
    columns: int = ALIGNED
    masked: bool = True
    head: str = ""
    strided: bool = False

    @property
    def name(self) -> str:
        """As it stands in the table."""
        parts = [_NAMES.get(self.stats, *self.stats[:1]), plain(self.dtype), f"V={self.columns}"]
        parts += [f"dz {plain(self.out)}"] if self.out else []
        parts += [] if self.masked else ["unmasked"]
        return ", ".join([*parts, *[self.head] * bool(self.head), *["strided"] * self.strided])


def _meta(*shape: int, dtype: torch.dtype = _F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def statistics_cases() -> list[Variant]:
    """Specialisations that the sweep and the gradient kernel share; `out` counts for the gradient alone."""
    needs_targets = {subset: "logprobs" in subset for subset in SUBSETS}
    cases = [Variant(s, masked=needs_targets[s]) for s in SUBSETS]
    cases += [Variant(s, _F32, _BF16, masked=needs_targets[s]) for s in SUBSETS]  # hidden states in bfloat16: logits stay float32
    cases += [Variant(s, _BF16, masked=needs_targets[s]) for s in SUBSETS]
    cases += [Variant(s, _F32, _BF16, columns=TILE) for s in (DEFAULT, STUDENT, EVERY)]
    cases += [Variant(s, _F16) for s in (DEFAULT, EVERY)] + [
        Variant(("reverse_kl",), masked=True),
        Variant(DEFAULT, _F32, _F16),
    ]
    cases += [
        Variant(s, dtype, columns=RAGGED) for s, dtype in ((DEFAULT, _F32), (DEFAULT, _BF16), (DEFAULT, _F16), (EVERY, _F32))
    ]
    cases += [Variant(s, _F32, _BF16, head=head) for s in (DEFAULT, EVERY) for head in HEADS if head]
    cases += [
        Variant(STUDENT, _F32, _BF16, head="bias scale softcap"),
        Variant(DEFAULT, columns=1),
        Variant(EVERY, _BF16, strided=True),
        *(Variant(("logsumexp",), out=out, masked=False) for out in (None, _BF16)),
    ]
    return cases


def note_cases() -> list[Variant]:
    """Specialisations of the sparse backward's notes: by dtype, of one head and of two, with and without the divergence."""
    subsets = (DEFAULT, STUDENT, ("forward_kl",))
    cases = [Variant(s, dtype, masked="logprobs" in s) for s in subsets for dtype in (_F32, _BF16, _F16)]
    cases += [Variant(DEFAULT, columns=columns) for columns in (RAGGED, 1)]  # one of 512 columns takes the same block
    return cases + [Variant(DEFAULT, head=head) for head in HEADS if head] + [Variant(DEFAULT, _BF16, strided=True)]


def statistics_launches(module: ModuleType) -> list[Launch]:
    """Sweep and gradient for all of `statistics_cases`, notes, mixture and finish for those that they tell apart."""
    found = []
    for case in statistics_cases():
        found.append(Launch(case.name, lambda case=case: _gradient(module, case)))
        if case.out is None or case.head or case.columns == TILE:
            found.append(Launch(case.name, lambda case=case: _sweep(module, case)))
    jsd = [Variant(("jsd",), dtype, masked=masked) for dtype in (_F32, _BF16, _F16) for masked in (True, False)]
    jsd += [
        Variant(("jsd",), columns=TILE),
        Variant(("jsd",), columns=RAGGED),
        Variant(("jsd",), columns=1),
        Variant(("jsd",), head="bias scale softcap"),
    ]
    found += [Launch(case.name, lambda case=case: _mixture(module, case)) for case in jsd]
    found += [Launch(case.name, lambda case=case: _note(module, case)) for case in note_cases()]
    return found + [
        Launch("masked" if masked else "unmasked", lambda masked=masked: _finish(module, masked)) for masked in (True, False)
    ]


def _task(stats: tuple[str, ...], masked: bool):
    return TileTask(Rows(_meta(_ROWS, dtype=torch.int64) if masked else None, _meta(_ROWS), IGNORED), stats)


def _pair(case: Variant):
    """Both heads' tiles; None for the teacher where no statistic needs it."""
    z = _meta(case.columns, _ROWS, dtype=case.dtype).T if case.strided else _meta(_ROWS, case.columns, dtype=case.dtype)
    options = dict(HEADS[case.head])
    if options.pop("bias", False):
        options["bias"] = _meta(case.columns, dtype=_BF16)
    tile = Tile(z, **options)
    return tile, tile if needs_teacher(case.stats) else None


def _sums() -> torch.Tensor:
    return _meta(1, _ROWS, len(SUM_NAMES), dtype=torch.float64)


def _sweep(module: ModuleType, case: Variant) -> None:
    module.sweep(*_pair(case), _task(case.stats, case.masked), _sums())


def _gradient(module: ModuleType, case: Variant) -> None:
    student, teacher = _pair(case)
    dz = torch.empty_like(student.z, dtype=case.out or case.dtype)
    module.gradient(
        student, teacher, _task(case.stats, case.masked), _meta(_ROWS, len(STATE_NAMES)), _meta(_ROWS, len(STAT_NAMES)), dz
    )


def _finish(module: ModuleType, masked: bool) -> None:
    module.finish(_sums(), _task(EVERY, masked))


def _note(module: ModuleType, case: Variant) -> None:
    pair, norms = _pair(case), (_meta(_ROWS), _meta(_ROWS) if needs_teacher(case.stats) else None)
    module.note(*pair, _task(case.stats, case.masked), norms, 0, _meta(1, case.columns))


def _mixture(module: ModuleType, case: Variant) -> None:
    module.mixture(
        *_pair(case), _task(case.stats, case.masked), _meta(_ROWS, len(STATE_NAMES)), _meta(1, _ROWS, 2, dtype=torch.float64)
    )


def scan_launches(module: ModuleType) -> list[Launch]:
    """The scan for every rule, normaliser and segmenter, masked or not, at 1024 tokens a sequence; other block sizes for GEAR."""
    cases = {name: METHODS[name] for name in METHODS if hasattr(METHODS[name], "rule") and METHODS[name].rule() is not None}
    cases |= {f"gear, {name}": Gear(normalizer=name) for name in NORMALIZERS if name != "relu_max"}
    cases["gear, caps"] = Gear(max_segment_len=64, stop_at_turn=True, renormalize=True)
    found = [
        Launch(f"{name}{', masked' * masked}", lambda m=m, masked=masked: _scan(module, m.rule(), masked))
        for name, m in cases.items()
        for masked in (False, True)
    ]
    sizes = ((1, "1"), (131072, "131072"))
    found += [Launch(f"gear, {n} tokens", lambda size=size: _scan(module, Gear().rule(), False, size)) for size, n in sizes]
    return [*found, Launch("gear, float64", lambda: _scan(module, Gear().rule(), False, dtype=torch.float64))]


def _scan(module: ModuleType, rule, masked: bool, tokens: int = 1024, dtype: torch.dtype = _F32) -> None:
    def row(kind: torch.dtype, length: int = tokens) -> torch.Tensor:
        return _meta(length, dtype=kind)

    second = None if rule.second is None else row(dtype, 2 * tokens if rule.cut.segmenter == "entropy_window" else tokens)
    turns = row(torch.int64) if rule.cut.segmenter == "turn" or rule.cut.stop_at_turn else None
    bounds = row(torch.int32, 2)
    level = None if rule.level is None else row(dtype, 1)
    rows = (row(dtype), second, row(dtype, 1), row(torch.bool) if masked else None, turns, bounds, level)
    out = (*(row(dtype) for _ in range(4)), row(torch.int32), row(torch.bool), _meta(1, 11, dtype=torch.float64))
    module.scan(module.ScanRows(*rows), module.ScanOutputs(*out), rule, tokens)


FAMILIES = tuple(map(Family, KERNEL_MODULES, (statistics_launches, scan_launches)))


# --- one target, in its own process -----------------------------------------------------------------------------------------


class StubDriver:
    """Stands in for a GPU's driver: Triton's compiler asks it for the target, and for nothing that needs the device."""

    def __init__(self, target):
        self._target = target

    def is_active(self) -> bool:
        return True

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _Recorder:
    """Takes a kernel's place in its module: a launch compiles and notes what came out, and starts nothing."""

    def __init__(self, kernel, compiled: list):
        self._kernel, self._compiled = kernel, compiled

    def __getitem__(self, grid):
        def compile_only(*arguments, **options):
            log = io.StringIO()
            with contextlib.redirect_stdout(log):  # ptxas' own report on this very compile
                compiled = self._kernel.warmup(*arguments, grid=grid, **options)
            self._compiled.append((compiled, options, log.getvalue()))

        return compile_only


def worker(target: str, only: str, config: tuple[int, int] | None) -> None:
    """Print the number of launches, then each Kernel as a line of JSON. config: block and warps in place of the package's own."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    knobs.nvidia.dump_ptxas_log = True
    stub: Any = StubDriver(GPUTarget(*TARGETS[target][0]))  # as much of a DriverBase as compiling asks for
    driver.set_active(stub)
    compiled: list = []
    chosen = [(kernel, launch) for kernel, launch in _launches(compiled, config) if re.search(only, launch.case)]
    print(json.dumps(len(chosen)), flush=True)
    seen = set()
    for _, launch in chosen:
        compiled.clear()
        launch.call()
        for one in compiled:
            if one[0] in seen:  # the scan's launches share the kernel of the diagnostics
                continue
            seen.add(one[0])
            print(json.dumps(asdict(_row(target, launch.case, *one))), flush=True)


def _launches(compiled: list, config: tuple[int, int] | None) -> Iterator[tuple[str, Launch]]:
    for family in FAMILIES:
        module: Any = importlib.import_module(family.module)
        for name in kernels_of(module):
            setattr(module, name, _Recorder(getattr(module, name), compiled))
        if config:
            module.config = functools.partial(_fixed, module.Config(*config))
        yield from ((family.module, launch) for launch in family.launches(module))


def _fixed(config, *_):
    return config


def _row(target: str, case: str, compiled, options: dict, log: str) -> Kernel:
    measure = _amd if TARGETS[target][0][0] == "hip" else _nvidia
    block = next(value for name, value in options.items() if name in ("BLOCK", "ROWS"))
    kernel = compiled.metadata.name.strip("_").removesuffix("_kernel")
    return Kernel(target, kernel, case, block, options["num_warps"], **measure(compiled, log), shared=compiled.metadata.shared)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's report; is it the same specialisation twice?\n{text[:2000]}")
    return int(found[1])


def _nvidia(compiled, log: str) -> dict[str, int]:
    def width(access: str) -> int:
        found = re.findall(rf"{access}\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s", compiled.asm["ptx"])
        return _width([(int(count or 1), int(bits)) for count, bits in found])

    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spills": _number(r"(\d+) bytes spill stores", log),
        "load_bits": width("ld"),
        "store_bits": width("st"),
    }


_AMD_BITS = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32}


def _amd(compiled, _: str) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def width(access: str) -> int:
        pattern = rf"%s_{access}_(ubyte|byte|ushort|short|dword)(?:x(\d))?"
        # single values pass through scalar and global instructions, which the compiler merges; blocks through buffer ones
        found = re.findall(pattern % "buffer", text) or re.findall(pattern % "global", text)
        return _width([(int(count or 1), _AMD_BITS[kind]) for kind, count in found])

    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "spills": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "load_bits": width("load"),
        "store_bits": width("store"),
    }


def _width(accesses: list[tuple[int, int]]) -> int:
    """Bits of the widest vector access (values, bits of each); where there is none, of the most frequent single one."""
    vectors = [count * bits for count, bits in accesses if count > 1]
    return max(vectors) if vectors else Counter(bits for _, bits in accesses).most_common(1)[0][0]


# --- all targets -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """One run's choices. only: a regular expression for the names of cases.  config: block and warps in place of the package's
    table.  triton: the folder of another version than the installed one.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    only: str = ""
    config: tuple[int, int] | None = None
    triton: Path | None = None

    @property
    def partial(self) -> bool:
        """True where the result is not the whole table of the package as it is."""
        return self != Options()


def compile_all(options: Options, console: Console) -> tuple[list[Kernel], list[str]]:
    """Rows of all targets, and a line for everything that went wrong on the way."""
    with progress_bar(console) as progress, ThreadPoolExecutor(_PROCESSES) as pool:
        tasks = [progress.add_task(name, total=None) for name in options.targets]
        jobs = [pool.submit(_compile, n, options, progress, t) for n, t in zip(options.targets, tasks, strict=True)]
        done = [job.result() for job in jobs]
    return [row for rows, _ in done for row in rows], [line for _, lines in done for line in lines]


def _compile(target: str, options: Options, progress: Progress, task: Any) -> tuple[list[Kernel], list[str]]:
    command = [sys.executable, "-m", "benchmarks.gates.compile_report", "--worker", target, "--only", options.only]
    command += ["--config", ",".join(map(str, options.config))] if options.config else []
    rows: list[Kernel] = []
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as cache:
        # a fresh cache: a compile that failed with a mere message must not be answered from an old one
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        if options.triton:
            environment["PYTHONPATH"] = os.pathsep.join([str(options.triton.resolve()), os.environ.get("PYTHONPATH", "")])
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                if isinstance(found, int):
                    progress.update(task, total=found)
                else:
                    rows.append(Kernel(**found))
                    progress.advance(task)
        errors.seek(0)
        return rows, _failures(target, rows, process.returncode, errors.read())


def _failures(target: str, rows: list[Kernel], code: int, stderr: str) -> list[str]:
    lines = [f"{target}: {line.strip()}" for line in stderr.splitlines() if "error:" in line.lower()]
    if code or lines:
        last = f"the last kernel compiled was {rows[-1].kernel}, {rows[-1].case}" if rows else "nothing was compiled"
        lines.append(f"{target}: the compiler's process ended with {code}; {last}\n{stderr[-2000:]}")
    return lines


def faults(rows: list[Kernel]) -> list[str]:
    """A line for each row that spills or asks for more shared memory than its target has."""
    found = [f"{row}: spills {row.spills}" for row in rows if row.spills]
    limits = {name: limit for name, (_, limit) in TARGETS.items()}
    return found + [
        f"{row}: {row.shared} bytes of shared memory, the limit is {limits[row.target]}"
        for row in rows
        if row.shared > limits[row.target]
    ]


def regressions(rows: list[Kernel], committed: list[Kernel], grown: bool = True) -> list[str]:
    """A line for each row that one table lacks, and, where `grown` asks for it, for each figure worse than the committed one."""
    old, new = ({row.key: row for row in table} for table in (committed, rows))
    found = [f"{row}: not compiled, but in the committed table" for key, row in old.items() if key not in new]
    found += [f"{row}: not in the committed table; write it anew" for key, row in new.items() if key not in old]
    if grown:
        found += [line for key in new.keys() & old.keys() for line in _worse(new[key], old[key])]
    return sorted(found)


def _worse(row: Kernel, old: Kernel) -> Iterator[str]:
    for name, sign in (("registers", 1), ("shared", 1), ("load_bits", -1), ("store_bits", -1)):
        now, before = getattr(row, name), getattr(old, name)
        if sign * now > sign * before:
            yield f"{row}: {name} {now}, committed {before}"


def check(rows: list[Kernel], path: Path, options: Options) -> list[str]:
    """All offenders against the committed table. Figures are compared only between tables of one Triton version."""
    table = json.loads(path.read_text())
    committed = [Kernel(**row) for row in table["rows"]]
    return stale(table) + _compared(rows, committed, table["triton"] == _triton_version(), options)


def stale(table: dict) -> list[str]:
    """A line where the table is of other kernels or cases, which is seen without a compiler."""
    mend = "the kernels or cases are not those of the committed table; write it anew: python -m benchmarks.gates.compile_report"
    return [] if table.get("kernels") == fingerprint() else [mend]


def fingerprint() -> str:
    """A hash of the kernels and their launchers, without comments and docstrings, and of the cases; the same in every Python."""
    paths = sorted((ROOT / "gear_kernels" / "triton").glob("*.py"))
    code = [piece for path in paths for piece in _code(path)]
    cases = [launch.case for family in FAMILIES for launch in family.launches(importlib.import_module(family.module))]
    return hashlib.sha256("".join([*code, *cases]).encode()).hexdigest()[:16]


def _code(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in (tokenize.COMMENT, tokenize.NL)]
    starts = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.ENCODING)
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        docstring = token.type == tokenize.STRING and before.type in starts and after.type == tokenize.NEWLINE
        if not docstring:
            yield token.string or tokenize.tok_name[token.type]


def _compared(rows: list[Kernel], committed: list[Kernel], grown: bool, options: Options) -> list[str]:
    committed = [row for row in committed if row.target in options.targets and re.search(options.only, row.case)]
    return faults(rows) + regressions(rows, committed, grown)


def _triton_version(folder: Path | None = None) -> str:
    """Of the installed Triton, or of the one in a folder."""
    if folder is None:
        return importlib.metadata.version("triton")
    return next(one.version for one in importlib.metadata.distributions(path=[str(folder)]) if one.name == "triton")


# --- entry point ---------------------------------------------------------------------------------------------------------------


_LEGEND = (
    "Registers per thread, then the widest load and store of global memory in bits, then bytes of shared memory; spills where "
    "there are any."
)


def markdown(rows: list[Kernel], version: str) -> str:
    """A table per kernel: a line per case, a column per target."""
    lines = ["# Compile report", "", f"Triton {version}, {len(rows)} kernels.", "", _LEGEND]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        sizes = {t: sorted({(r.block, r.num_warps) for r in own if r.target == t}, reverse=True) for t in TARGETS}
        lines += ["", f"## {kernel}", "", "Block/warps: " + ", ".join(f"{t} {_pairs(sizes[t])}" for t in TARGETS if sizes[t])]
        table = []
        for case in dict.fromkeys(row.case for row in own):
            cells = {row.target: row for row in own if row.case == case}
            table.append([case, *(_cell(cells.get(target)) for target in TARGETS)])
        lines += ["", *markdown_table(["case", *TARGETS], table)]
    return "\n".join(lines) + "\n"


def _pairs(sizes: list[tuple[int, int]]) -> str:
    return " and ".join(f"{block}/{warps}" for block, warps in sizes)


def _cell(row: Kernel | None) -> str:
    if row is None:
        return ""
    return f"{row.registers}, {row.load_bits}/{row.store_bits}, {row.shared}" + f", spills {row.spills}" * bool(row.spills)


def write(rows: list[Kernel], folder: Path) -> None:
    """compile_report.json, a row a line so that a change reads well in a diff, and compile_report.md."""
    version = _triton_version()
    body = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    head = f'{{\n "triton": {json.dumps(version)},\n "kernels": {json.dumps(fingerprint())},\n "rows": [\n'
    (folder / TABLE).write_text(f"{head}{body}\n ]\n}}\n")
    (folder / TABLE).with_suffix(".md").write_text(markdown(rows, version))


def run(options: Options, folder: Path, checking: bool, console: Console) -> int:
    """Compile, then check or write; the exit code. A partial table is printed, never written. Another Triton's spills are named,
    and its failures alone count.
    """
    start = time.perf_counter()
    rows, lines = compile_all(options, console)
    if options.triton:
        found = [*lines, *faults(rows)]
        for line in found:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        version = _triton_version(options.triton)
        console.print(
            f"Triton {version}: {len(rows)} kernels compiled in {time.perf_counter() - start:.0f} s, {len(found)} lines above"
        )
        return 1 if lines else 0
    lines += check(rows, folder / TABLE, options) if checking else faults(rows)
    if options.partial and not checking:
        console.print(markdown(rows, _triton_version()), markup=False)
    elif not checking and not lines:
        write(rows, folder)
    for line in lines:
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    verdict = f"{len(lines)} offenders" if lines else "all within limits" + (" and the committed table" if checking else "")
    console.print(f"{len(rows)} kernels compiled in {time.perf_counter() - start:.0f} s: {verdict}")
    return 1 if lines else 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.compile_report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; a partial table is printed, not written")
    parser.add_argument("--only", default="", help="a regular expression for names of cases; likewise")
    parser.add_argument("--config", help="BLOCK,WARPS to try in place of the package's own table; likewise")
    parser.add_argument("--triton", type=Path, metavar="DIR", help="a folder with another Triton; nothing is compared or written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the table")
    parser.add_argument("--worker", choices=TARGETS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no", "n"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.")
    config = None
    if given.config:
        block, warps = map(int, given.config.split(","))
        config = block, warps
    if given.worker:
        worker(given.worker, given.only, config)
        return 0
    options = Options(tuple(given.targets.split(",")), given.only, config, given.triton)
    return run(options, given.output, given.check, terminal_console(200))


if __name__ == "__main__":
    sys.exit(main())
