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

from ..harness.cases import DTYPES, PASSES, TRAFFIC, Case, Truth, find_truth, make_case, plain
from ..harness.environment import RESULTS, environment
from ..harness.measure import OtherLoad, ReadBandwidth, elapsed_ms, extra_memory, interleave
from ..harness.peers import OURS, gemm_name, gemms, peers
from ..harness.tables import LEGEND, Row, Section, as_dict, first_call, markdown, progress_bar, terminal, terminal_console


@dataclass(frozen=True)
class Effort:
    """Shapes and effort of a report. rounds, seconds: of the timing of one table."""

    logits: tuple[int, int] = (256, 151936)  # N, V
    hidden: tuple[int, int, int] = (128, 151936, 1024)  # N, V, D
    rounds: int = 7
    seconds: float = 14.0
    bandwidth_mib: int = 512
    compiled: bool = True
    quick: bool = False


QUICK = Effort(logits=(16, 1187), hidden=(16, 1187, 64), rounds=3, seconds=1.0, bandwidth_mib=64, compiled=False, quick=True)


# --- what is run -----------------------------------------------------------------------------------------------------------


def _baselines(case: Case, dtype: torch.dtype, passes: str) -> dict[str, Callable]:
    if case.kind == "logits":
        return {}
    return {gemm_name(d): gemms(case, d, passes) for d in dict.fromkeys((torch.float32, dtype))}


# --- one table ---------------------------------------------------------------------------------------------------------------


class Report:
    """Runs all tables, one after the other; `step` is called after every call that is made, for a progress bar."""

    def __init__(self, effort: Effort, step: Callable[[], None] = lambda: None, tell: Callable[[str], None] = lambda text: None):
        self.effort, self.step, self.tell = effort, step, tell
        self.bandwidth = ReadBandwidth(size_mib=effort.bandwidth_mib)

    @torch._inductor.config.patch(force_disable_caches=True)  # compile times of a first run, on every run
    def sections(self) -> list[Section]:
        """All tables: given logits, then hidden states; both dtypes, both passes."""
        found = []
        for kind, shape in (("logits", self.effort.logits), ("hidden", self.effort.hidden)):
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
        timings = interleave(calls, first, self.effort.rounds, self.effort.seconds, self.step)
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
        for peer in peers(case.kind, compiled=self.effort.compiled):
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
            entrants = len(peers(kind, compiled=self.effort.compiled))
            for dtype in DTYPES:
                extra = len(self.bandwidth.calls) + (0 if kind == "logits" else 1 + (dtype != torch.float32))
                total += 2 * (2 * entrants + self.effort.rounds * (entrants + extra))
        return total


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


def run(effort: Effort, output: Path = RESULTS, console: Console | None = None) -> dict:
    """Run the report, print its tables, write cpu_report.json and cpu_report.md to `output`; what the JSON holds."""
    console = console or terminal_console()
    start = time.perf_counter()
    with progress_bar(console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' and the compiler's own
        task = progress.add_task("starting", total=None)
        report = Report(effort, lambda: progress.advance(task), lambda text: progress.update(task, description=text))
        progress.update(task, total=report.expected_calls())
        sections = report.sections()
    for section in sections:
        console.print(terminal(section))
    for line in LEGEND:
        console.print(f"[dim]{line}[/dim]", highlight=False)
    head = {**environment(), "quick": effort.quick, "seconds": round(time.perf_counter() - start, 1)}
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
    effort = QUICK if options.quick else Effort(compiled=not options.no_compile)
    run(effort, options.output)


if __name__ == "__main__":
    main()
