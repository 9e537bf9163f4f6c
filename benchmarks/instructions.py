"""Instructions of the compiled CPU pass, counted where valgrind is at hand, and its spills of vector registers; see gates.py.

Calls of the package's own operators are recorded, and replay.py makes them again under callgrind, which counts what the one
thread does in each: the pass, libm and libc, and 0.1 to 0.4 % for the binding and the interpreter. The processor that valgrind
shows has no AVX-512, so the AVX2 build is counted; of the AVX-512 build there are the spills, read from the module's disassembly.
Both hold for one compiler, which is kept beside them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from gear_kernels.backends import native as native_backend

from .record import Recorder, recorded

# The pass itself repeats exactly; the interpreter around it by some 200 instructions, at most 0.02 % of a call (seven runs, in
# environments and folders of different size). One instruction more for eight columns is 0.7 to 3 %.
TOLERANCE = 1.005
# one thread, every symbol bound before the first call, and dictionaries that hash alike
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LD_BIND_NOW": "1", "PYTHONHASHSEED": "0"}
_VALGRIND = ("--tool=callgrind", "--quiet", "--vgdb=no", "--dump-before=getppid")  # replay.py calls it between two counts
# GCC's and clang's lines of the section .comment; the C runtime's objects leave theirs there too
_COMPILERS = re.compile(rb"GCC: \([^\0]+|[ \w]*clang version [^\0]+")
_STACK = re.compile(r"[\s,](?:-?0x[0-9a-f]+)?\(%r[sb]p\)")  # without an index: that would be a buffer


@dataclass(frozen=True)
class Row:
    """One call of the compiled pass. elements: logits of one head, or tokens of a pack.  per_element: instructions for each."""

    call: str
    instructions: int
    elements: int
    per_element: float


@dataclass(frozen=True)
class Found:
    """rows: none where they cannot be counted.  spills: instructions of the module that have a vector register and a place on the
    stack, by the register's kind; zmm is of the AVX-512 build alone.  missing: a line for each part left out, and why.
    """

    compiler: str
    instruction_set: str = ""
    rows: list[Row] = field(default_factory=list)
    spills: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def table(self) -> dict:
        """What is committed."""
        return {name: value for name, value in asdict(self).items() if name != "missing"}


# --- counting ----------------------------------------------------------------------------------------------------------------


def measure(only: str = "") -> Found:
    """Counts of the operations whose name holds `only`, and the spills, of the compiled module of this checkout."""
    native, why_not = native_backend.load()
    if native is None:
        return Found("unknown", missing=[f"instructions: not counted, {why_not}"])
    module = Path(native.__file__)
    spills, missing = _spills(module)
    why_not, instruction_set, rows = _why_not(), "", []
    if not why_not:
        recorder, names = recorded(only)
        instruction_set, counts, why_not = _counts(module, recorder)
        rows = [Row(name, count, n, round(count / n, 3)) for (name, n), count in zip(names, counts, strict=not why_not)]
    missing += [f"instructions: not counted, {why_not}"] if why_not else []
    return Found(compiler(module), instruction_set, rows, spills, missing)


def compiler(module: Path) -> str:
    """Who compiled a module, by its own account."""
    return "; ".join(sorted({name.decode().strip() for name in _COMPILERS.findall(module.read_bytes())})) or "unknown"


def _why_not() -> str:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"{sys.platform} on {platform.machine()} is not Linux on x86_64"
    return "" if shutil.which("valgrind") else "no valgrind on this machine"


def _counts(module: Path, recorder: Recorder) -> tuple[str, list[int], str]:
    """The instruction set that served, a count for each call, and why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        calls, arrays, out = (Path(folder) / name for name in ("calls.json", "arrays", "out"))
        calls.write_text(json.dumps(recorder.calls))
        arrays.write_bytes(recorder.arrays)
        child = (sys.executable, "-S", Path(__file__).with_name("replay.py"), module, calls, arrays)
        command = ["valgrind", *_VALGRIND, f"--callgrind-out-file={out}", *map(str, child)]
        done = subprocess.run(command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True, timeout=800)
        if done.returncode:
            return "", [], f"valgrind gave {done.returncode}: {' '.join(done.stderr.splitlines()[-1:])}"
        # out.1 holds what came before the first call
        dumps = [out.with_name(f"out.{k}").read_text() for k in range(2, len(recorder.calls) + 2)]
    return done.stdout.strip(), [int(re.search(r"^totals: (\d+)$", dump, re.M)[1]) for dump in dumps], ""


def _spills(module: Path) -> tuple[dict[str, int], list[str]]:
    """(spills, why there are none). A stripped module does not say whose code it is; the register's kind does."""
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        return {}, ["spills: not counted, no objdump for x86_64 on this machine"]
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(module)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    spilled = [line for line in lines if _STACK.search(line)]
    return {kind: sum(f"%{kind}" in line for line in spilled) for kind in ("ymm", "zmm")}, []


# --- comparing ---------------------------------------------------------------------------------------------------------------


def left_out(found: Found, table: dict | None) -> list[str]:
    """A line for each part that is not compared, and why."""
    other = ""
    if table is None:
        other = "the table has none"
    elif found.compiler != table["compiler"]:
        other = f"compiled by {found.compiler}, the table's by {table['compiler']}"
    elif found.rows and found.instruction_set != table["instruction_set"]:
        other = f"{found.instruction_set} here, {table['instruction_set']} in the table"
    return found.missing + ([f"instructions: not compared, {other}"] if other else [])


def grown(found: Found, table: dict | None, whole: bool = True) -> list[str]:
    """A line for each count above the table's by more than the tolerance, and for more spills. whole: as in gates.py."""
    if table is None or found.compiler != table["compiler"]:
        return []
    lines = _grown_rows(found, table, whole) if found.rows and found.instruction_set == table["instruction_set"] else []
    for kind, now in found.spills.items():
        before = table["spills"].get(kind, now)
        lines += [f"compiled pass: {now} spills of {kind} registers, committed {before}"] if now > before else []
    return lines


def shrunk(found: Found, table: dict | None) -> int:
    """How many counts are below the table's: seen the other way round, they grew."""
    if table is None:
        return 0
    other = Found(**{**table, "rows": [Row(**row) for row in table["rows"]]})
    return len(grown(other, found.table, whole=False))


def _grown_rows(found: Found, table: dict, whole: bool) -> list[str]:
    old, new = {row["call"]: Row(**row) for row in table["rows"]}, {row.call: row for row in found.rows}
    odd = sorted(old.keys() ^ new.keys()) if whole else []
    lines = [f"{call}: instructions in one of the committed table and this tree alone; write it anew" for call in odd]
    for call in sorted(old.keys() & new.keys()):
        now, before = new[call], old[call]
        if now.instructions > TOLERANCE * before.instructions:
            shown = f"{now.instructions} instructions, {now.per_element} for each logit or token"
            lines.append(f"{call}: {shown}, committed {before.instructions}, {before.per_element}")
    return lines


def show(found: Found) -> Table:
    """For the terminal."""
    spills = ", ".join(f"{count} of {kind} registers" for kind, count in found.spills.items()) or "not counted"
    heads = (f"compiled pass, {found.instruction_set or 'not counted'}", "instructions", "for each logit or token")
    shown = Table(*heads, caption=f"{found.compiler}\nspills: {spills}")
    for row in found.rows:
        shown.add_row(row.call, f"{row.instructions:,}", f"{row.per_element:.2f}")
    return shown
