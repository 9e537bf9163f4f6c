"""gear_kernels against its peers on this machine's CPU: `python -m benchmarks.reports.cpu [--quick] [--no-compile]`.

Prints tables and writes cpu_report.json and cpu_report.md. Times are medians of interleaved calls; every output is held against
float64, so that a fast wrong answer shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..harness.cases import PASSES, Case, Truth, find_truth, make_case, plain, runner
from ..harness.environment import RESULTS, environment
from ..harness.measure import OtherLoad, ReadBandwidth, elapsed_ms, extra_memory, interleave
from ..harness.peers import OURS, Peer, PeerMissing, peers
from ..harness.tables import LEGEND, Row, Section, as_dict, markdown, terminal

DTYPES = (torch.float32, torch.bfloat16)
# Tensors of [N, V] that a pass over given logits must move at least: both heads read; backward reads them again and writes one
TRAFFIC = {"forward": 2, "forward+backward": 5}


@dataclass(frozen=True)
class Plan:
    """Shapes and effort of a report. rounds, seconds: of the timing of one table."""

    logits: tuple[int, int] = (256, 151936)  # N, V
    hidden: tuple[int, int, int] = (128, 151936, 1024)  # N, V, D
    rounds: int = 7
    seconds: float = 14.0
    bandwidth_mib: int = 512
    compiled: bool = True
    quick: bool = False


QUICK = Plan(logits=(16, 1187), hidden=(16, 1187, 64), rounds=3, seconds=1.0, bandwidth_mib=64, compiled=False, quick=True)


# --- what is run -----------------------------------------------------------------------------------------------------------


def gemms(case: Case, dtype: torch.dtype, passes: str) -> Callable[[], None]:
    """The head's matrix products alone, into buffers that exist: both heads' logits, stacked as one product.

    Backward: the logits again (keeping them is what nobody can afford), then the gradients of hidden states and of the weight.
    Operands are cast to `dtype` beforehand, at no cost here.
    """
    n = len(case.targets)
    weight, hidden = case.weight.detach().to(dtype), torch.cat([case.student.detach(), case.teacher]).to(dtype)
    logits = torch.zeros(2 * n, len(weight), dtype=dtype)
    grad_hidden, grad_weight = torch.zeros_like(hidden[:n]), torch.zeros_like(weight)

    def forward():
        torch.mm(hidden, weight.T, out=logits)

    def both():
        forward()
        forward()
        torch.mm(logits[:n], weight, out=grad_hidden)
        torch.mm(logits[:n].T, hidden[:n], out=grad_weight)

    return forward if passes == "forward" else both


def gemm_name(dtype: torch.dtype) -> str:
    """Name of the table row of `gemms` in this dtype."""
    return f"head GEMMs alone, {plain(dtype)}"


def _baselines(case: Case, dtype: torch.dtype, passes: str) -> dict[str, Callable]:
    if case.kind == "logits":
        return {}
    return {gemm_name(d): gemms(case, d, passes) for d in dict.fromkeys((torch.float32, dtype))}


# --- one table ---------------------------------------------------------------------------------------------------------------


class Report:
    """Runs a plan table by table; `step` is called after every call that is made, for a progress bar."""

    def __init__(self, plan: Plan, step: Callable[[], None] = lambda: None, tell: Callable[[str], None] = lambda text: None):
        self.plan, self.step, self.tell = plan, step, tell
        self.bandwidth = ReadBandwidth(size_mib=plan.bandwidth_mib)

    @torch._inductor.config.patch(force_disable_caches=True)  # compile times of a first run, on every run
    def sections(self) -> list[Section]:
        """All tables: given logits, then hidden states; both dtypes, both passes."""
        found = []
        for kind, shape in (("logits", self.plan.logits), ("hidden", self.plan.hidden)):
            for dtype in DTYPES:
                self.tell(f"{kind} {plain(dtype)}: inputs and float64 truth")
                case = make_case(kind, dtype, *shape)
                truth = find_truth(case)
                found += [self._section(case, truth, shape, dtype, passes) for passes in PASSES]
                del case, truth
                gc.collect()
        return found

    def _section(self, case: Case, truth: Truth, shape: tuple[int, ...], dtype: torch.dtype, passes: str) -> Section:
        torch.compiler.reset()  # compiled peers start afresh in each table, with this one's shapes and dtypes only
        what = f"{case.kind} {plain(dtype)}, {passes}"
        rows, calls, first = self._first_calls(case, truth, passes, what)
        baselines = _baselines(case, dtype, passes)
        for name, call in {**baselines, **self.bandwidth.calls}.items():
            calls[name], first[name] = call, elapsed_ms(call)
        self.tell(f"{what}: timing")
        load = OtherLoad()
        timings = interleave(calls, first, self.plan.rounds, self.plan.seconds, self.step)
        other_load, read_gb_s = load.share(), self.bandwidth.gb_s(timings)
        self.tell(f"{what}: memory")
        for name, row in rows.items():
            row.timing = timings.get(name)
            row.extra_mib = extra_memory(calls[name]) if name in calls else None
            self.step()
        rows |= {name: Row(name, (), timing=timings[name]) for name in baselines}
        ratio_to = OURS if case.kind == "logits" else gemm_name(torch.float32)
        section = Section(case.kind, plain(dtype), passes, shape, ratio_to, read_gb_s, other_load, list(rows.values()))
        _compare(section, timings[ratio_to].median_ms, dtype)
        return section

    def _first_calls(self, case: Case, truth: Truth, passes: str, what: str) -> tuple[dict, dict, dict]:
        """Rows with errors, and of those that work here the call to time and its first milliseconds, all by name."""
        rows, calls, first = {}, {}, {}
        for peer in peers(case.kind, compiled=self.plan.compiled):
            self.tell(f"{what}: first call of {peer.name}")
            rows[peer.name], call, first_ms = first_call(peer, case, truth, passes)
            if call is not None:
                calls[peer.name], first[peer.name] = call, first_ms
            self.step()
        return rows, calls, first

    def expected_calls(self) -> int:
        """Calls of `step` in a run that uses all its rounds."""
        total = 0
        for kind in ("logits", "hidden"):
            entrants = len(peers(kind, compiled=self.plan.compiled))
            for dtype in DTYPES:
                extra = len(self.bandwidth.calls) + (0 if kind == "logits" else 1 + (dtype != torch.float32))
                total += 2 * (2 * entrants + self.plan.rounds * (entrants + extra))
        return total


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


def _compare(section: Section, reference_ms: float, dtype: torch.dtype) -> None:
    for row in section.rows:
        if row.timing is None:
            continue
        row.ratio = row.timing.median_ms / reference_ms
        if section.kind == "logits":
            moved = TRAFFIC[section.passes] * math.prod(section.shape) * dtype.itemsize
            row.gb_s = moved / row.timing.median_ms / 1e6
            row.bandwidth_share = row.gb_s / section.read_gb_s


# --- entry point -------------------------------------------------------------------------------------------------------------


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)  # a log file has no width of its own


def run(plan: Plan, output: Path = RESULTS, console: Console | None = None) -> dict:
    """Run the plan, print its tables, write cpu_report.json and cpu_report.md to `output`; what the JSON holds."""
    console = console or _console()
    start = time.perf_counter()
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' and the compiler's own
        task = progress.add_task("starting", total=None)
        report = Report(plan, lambda: progress.advance(task), lambda text: progress.update(task, description=text))
        progress.update(task, total=report.expected_calls())
        sections = report.sections()
    for section in sections:
        console.print(terminal(section))
    for line in LEGEND:
        console.print(f"[dim]{line}[/dim]", highlight=False)
    head = {**environment(), "quick": plan.quick, "seconds": round(time.perf_counter() - start, 1)}
    found = {**head, "sections": [as_dict(section) for section in sections]}
    output.mkdir(parents=True, exist_ok=True)
    (output / "cpu_report.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "cpu_report.md").write_text(markdown(head, sections))
    console.print(f"{head['seconds']} s; wrote cpu_report.json and cpu_report.md to {output}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: a self-test of a few seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave out the peers that compile (minutes)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the two files go")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan(compiled=not options.no_compile)
    run(plan, options.output)


if __name__ == "__main__":
    main()
