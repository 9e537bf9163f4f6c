"""Tables of a report, and their rendering: a rich table for a terminal, Markdown and JSON for files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import Case, Truth, runner
from .measure import Timing
from .peers import OURS, Peer, PeerMissing

if TYPE_CHECKING:  # the GPU report writes its tables on machines that have no rich
    from rich.console import Console, Group
    from rich.progress import Progress

WRONG_NATS = 1e-3  # an output further off is called wrong: KLs of on-policy distillation are of the order of 1e-4 to 1e-1
WRONG_GRADIENT = 1e-2  # relative to the largest entry; rounding a gradient to bfloat16 costs 0.4 % of an entry at most
_ERROR_COLUMNS = {  # column head: names of errors that go into it
    "logprob": ("logprobs",),
    "entropy": ("entropy",),
    "KL": ("reverse_kl", "mean_reverse_kl"),
    "dX": ("grad_student",),
    "dW": ("grad_weight",),
}
LEGEND = (
    "Errors against float64: logprob, entropy, KL (reverse) in nats, the largest over all rows; dX, dW (gradients of the "
    "student's logits or hidden states and of the weight), the largest error over the largest entry. An empty cell: the peer "
    f"does not give it. WRONG: off by more than {WRONG_NATS:g} nats or {WRONG_GRADIENT:.0%}.",
    "forward: without autograd. forward+backward: through a weighted sum of all the outputs that a peer gives (of the KL, its "
    "mean).",
    "Logits given: GB/s counts what must move, 2 tensors of [N, V] forward and 5 with backward (2 + 2 read, 1 written); the "
    "share is of the better of two plain reductions in the same run, over a buffer far larger than the caches.",
    "Hidden states: the GEMMs are those of the head alone in float32, student and teacher stacked, into buffers that exist; 2 "
    "forward, 6 with backward (4 for logits, made twice, then dX and dW). Who keeps all logits from forward to backward makes 4 "
    "of them, and may come out below 1.",
    "other load: the processors' time that other processes took during the timing; above some 5 % the times mean little.",
    "extra MiB: peak resident memory above what was held before the call, outputs and gradients included. compile s: excess of "
    "the first call over the median, with the compiler's disk caches off.",
)


def is_wrong(name: str, error: float) -> bool:
    """True where an output's error is above WRONG_NATS, a gradient's ("grad_...") above WRONG_GRADIENT, or NaN."""
    return not error <= (WRONG_GRADIENT if name.startswith("grad") else WRONG_NATS)


@dataclass
class Row:
    """One implementation in one table. gives: names of its outputs.  ratio: see Section.  gb_s, bandwidth_share: of what must
    move, logits given only.  errors: nats for outputs, relative for gradients.  failure: why it has no times.
    """

    name: str
    gives: tuple[str, ...]
    note: str = ""
    timing: Timing | None = None
    ratio: float | None = None
    gb_s: float | None = None
    bandwidth_share: float | None = None
    extra_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    compiles: bool = False

    @property
    def wrong(self) -> bool:
        """True where any output or gradient is wrong."""
        return any(self.is_wrong(name) for name in self.errors)

    def is_wrong(self, name: str) -> bool:
        """True where the output's or gradient's error of this name is."""
        return is_wrong(name, self.errors[name])


@dataclass
class Section:
    """One table. ratio of a row: its time over that of `ratio_to`.  shape: rows, columns (vocabulary) and, with a head, width."""

    kind: str
    dtype: str
    passes: str
    shape: tuple[int, ...]
    ratio_to: str
    read_gb_s: float
    other_load: float | None
    rows: list[Row]


def first_call(peer: Peer, case: Case, truth: Truth, passes: str) -> tuple[Row, Callable | None, float]:
    """The row with its errors, the call to time (None where the peer fails here) and the first call's milliseconds."""
    row = Row(peer.name, peer.gives, peer.note, compiles=peer.compiles)
    try:
        call = runner(peer.load(), case, passes)
        start = time.perf_counter()
        outputs, grads = call()
        first_ms = (time.perf_counter() - start) * 1e3
    except PeerMissing as error:
        row.failure = f"not installed: {error}"
    except Exception as error:  # a peer that breaks is a line of the report, not its end
        if peer.name == OURS:
            raise
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    else:
        row.errors = truth.errors(outputs, grads)
        return row, call, first_ms
    return row, None, math.nan


def columns(section: Section) -> list[str]:
    """Column heads of a section's table."""
    middle = ["GB/s", "of read"] if section.kind == "logits" else []
    ratio = "time / ours" if section.kind == "logits" else "time / GEMMs"
    return ["", "median ms", "quartiles", ratio, *middle, "extra MiB", *_error_heads(section), "compile s"]


def _error_heads(section: Section) -> list[str]:
    forward = section.passes == "forward"
    hidden = section.kind == "hidden"
    return [c for c in _ERROR_COLUMNS if not (c == "dX" and forward) and not (c == "dW" and (forward or not hidden))]


def cells(row: Row, section: Section) -> list[str]:
    """A row's cells, as text."""
    width = len(columns(section))
    if row.failure or row.timing is None:
        return [row.name, "failed", *[""] * (width - 2)]
    t = row.timing
    middle = [f"{row.gb_s:.1f}", f"{row.bandwidth_share:.0%}"] if section.kind == "logits" else []
    memory = "" if row.extra_mib is None else f"{row.extra_mib:.1f}"
    errors = [_error_cell(row, head) for head in _error_heads(section)]
    compile_s = f"{max(0.0, t.first_ms - t.median_ms) / 1e3:.1f}" if row.compiles else ""
    times = [f"{t.median_ms:.4g}", f"{t.low_ms:.3g}-{t.high_ms:.3g}", f"{row.ratio:.2f}"]
    return [row.name, *times, *middle, memory, *errors, compile_s]


def _error_cell(row: Row, head: str) -> str:
    for name in _ERROR_COLUMNS[head]:
        if name in row.errors:
            mean = "mean " if name.startswith("mean_") else ""
            return f"{'WRONG ' if row.is_wrong(name) else ''}{mean}{row.errors[name]:.1e}"
    return ""


def notes(section: Section) -> list[str]:
    """Lines that a reader of single rows needs: failures, and what a peer does not give."""
    return [f"{row.name}: {row.failure or row.note}" for row in section.rows if row.failure or row.note]


def title(section: Section) -> str:
    """A section's heading: what is given, the shape, the dtype, the pass."""
    names = ("N", "V") if section.kind == "logits" else ("N", "V", "D")
    shape = ", ".join(f"{name} = {size}" for name, size in zip(names, section.shape, strict=True))
    given = "logits given" if section.kind == "logits" else "hidden states, shared head"
    load = "" if section.other_load is None else f", other load {section.other_load:.0%}"
    return f"{given}: {shape}, {section.dtype}, {section.passes} (read bandwidth {section.read_gb_s:.1f} GB/s{load})"


def terminal_console(width: int = 160) -> Console:
    """A terminal as wide as it is, or a log file, which has no width of its own."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress_bar(console: Console) -> Progress:
    """A bar for each task that is added, with its count and time; gone when it is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def terminal(section: Section) -> Group:
    """The section for a terminal; rows with a wrong figure in red."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title(section), title_justify="left")
    for i, name in enumerate(columns(section)):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in section.rows:
        style = "red" if row.wrong or row.failure else "bold" if row.name == OURS else None
        table.add_row(*cells(row, section), style=style)
    return Group(table, *[Text(note, style="dim") for note in notes(section)], Text())


def markdown(head: dict, sections: list[Section]) -> str:
    """The whole report as Markdown. head: environment() and "quick"."""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    where = f"{head['cpu']}, {head['threads']} threads, Python {head['python']}"
    lines = ["# CPU report", "", f"{head['date']}, commit {head['commit']}. {where}, {versions}."]
    if head["quick"]:
        lines += ["", "Quick self-test: shapes too small to mean anything."]
    lines += ["", *[f"- {line}" for line in LEGEND]]
    for section in sections:
        rows = [cells(row, section) for row in section.rows]
        lines += ["", f"## {title(section)}", "", *markdown_table(columns(section), rows)]
        lines += ["", *[f"- {note}" for note in notes(section)]] if notes(section) else []
    return "\n".join(lines) + "\n"


def markdown_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [_markdown_row(heads), "|" + " --- |" * len(heads), *map(_markdown_row, rows)]


def _markdown_row(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "/") for text in texts) + " |"


def as_dict(section: Section) -> dict:
    """The section for JSON."""
    found: Any = finite(asdict(section))
    for row, source in zip(found["rows"], section.rows, strict=True):
        row["wrong"] = source.wrong
    return found


def keep_for_page(found: dict[str, Any], path: Path, console: Console) -> None:
    """Write a report's JSON where the performance page reads it, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {path}; `python -m benchmarks.page` draws it")


def finite(value):
    """A tree of plain values for JSON, which has no NaN and no infinities: they become text, and tuples lists."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
