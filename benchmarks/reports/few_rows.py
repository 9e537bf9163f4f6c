"""Few rows from hidden states, forward and backward: `python -m benchmarks.reports.few_rows [--quick] [--no-compile]`.

Who keeps all logits from forward to backward makes fewer products. Written to few_rows.json: the products of each entrant, ours
with the default workspace and with one that holds the logits, and their times in turn; measure these on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gear_kernels import linear_token_stats

from ..harness.cases import DTYPES, OUTPUTS, QWEN3_VOCABULARY, Case, find_truth, make_case, plain
from ..harness.environment import RESULTS, environment
from ..harness.internals import default_workspace, plan
from ..harness.measure import OtherLoad, interleave
from ..harness.peers import EAGER, OURS, PEERS, Peer, named
from ..harness.tables import first_call, keep_for_page

FILE = "few_rows.json"
HELD = "gear_kernels, logits held"
_PASSES = "forward+backward"


@dataclass(frozen=True)
class Effort:
    """Sizes: rows of hidden states, V, D; rounds and seconds of the timing of one table."""

    rows: tuple[int, ...] = (16, 64, 128, 256)
    vocabulary: int = QWEN3_VOCABULARY
    width: int = 1024
    rounds: int = 7
    seconds: float = 30.0


QUICK = Effort((4, 8), 1187, 32, 2, 1.0)


def room(case: Case, names: tuple[str, ...]) -> int:
    """The workspace that holds both heads' logits (one's, without a teacher) beside the tiles' default."""
    heads = 2 if "reverse_kl" in names else 1
    return default_workspace(case.student.device) + 4 * heads * len(case.student) * len(case.head)


def ours(names: tuple[str, ...], held: bool) -> Callable[[], Callable]:
    """Loads our operator for these outputs."""

    def call(case: Case) -> dict[str, torch.Tensor]:
        teacher = case.teacher if "reverse_kl" in names else None
        given = {"stats": names, "workspace_bytes": room(case, names) if held else None}
        return named(linear_token_stats(case.student, case.head, case.targets, teacher, **given), names)

    return lambda: call


def products(case: Case, peer: Peer) -> int | None:
    """Whole products of rows and head in a forward and backward pass; None of peers whose count is not known here.

    Eager torch and torch.compile keep the logits of both heads: two forward, two for the gradients; cut-cross-entropy on a CPU is
    compiled torch of one head.
    """
    if peer.name in (OURS, HELD):
        teacher = case.teacher if "reverse_kl" in peer.gives else None
        given = {"stats": peer.gives, "workspace_bytes": room(case, peer.gives) if peer.name == HELD else None}
        found = plan(case.student, case.head, case.targets, teacher, **given)
        return found.forward + found.recomputed + found.gradients
    known = {EAGER: 4, "torch.compile": 4, "cut-cross-entropy 25.1": 3}
    return known.get(peer.name)


def entrants(gives: tuple[str, ...], compiled: bool) -> list[Peer]:
    """Ours twice, then the peers that give these outputs, or the log-prob alone."""
    mine = [Peer(name, "hidden", gives, ours(gives, name == HELD)) for name in (OURS, HELD)]
    theirs = [peer for peer in PEERS if peer.kind == "hidden" and peer.name != OURS and "cpu" in peer.devices]
    return mine + [peer for peer in theirs if peer.gives == gives and (compiled or not peer.compiles)]


def race(dtype: torch.dtype, rows: int, gives: tuple[str, ...], effort: Effort, compiled: bool) -> dict:
    """One table: each entrant's products, errors against float64 and times in turn."""
    torch.compiler.reset()
    case = make_case("hidden", dtype, rows, effort.vocabulary, effort.width)
    truth, calls, first, found = find_truth(case), {}, {}, {}
    for peer in entrants(gives, compiled):
        row, call, first_ms = first_call(peer, case, truth, _PASSES)
        if call is not None:
            calls[peer.name], first[peer.name] = call, first_ms
            found[peer.name] = {"name": peer.name, "products": products(case, peer), "errors": row.errors}
    timings = interleave(calls, first, effort.rounds, effort.seconds)
    for name, row in found.items():
        row["timing"] = asdict(timings[name])
    return {"dtype": plain(dtype), "shape": [rows, effort.vocabulary, effort.width], "gives": gives, "rows": list(found.values())}


def show(console: Console, one: dict) -> None:
    """Print a table."""
    table = Table(
        "", "products", "ms", "time / ours", title=f"{', '.join(one['gives'])}, {one['dtype']}, N, V, D = {one['shape']}"
    )
    base = next(row for row in one["rows"] if row["name"] == OURS)["timing"]["median_ms"]
    for row in one["rows"]:
        ms = row["timing"]["median_ms"]
        table.add_row(row["name"], str(row["products"] or ""), f"{ms:.4g}", f"{ms / base:.2f}")
    console.print(table)


def run(effort: Effort, output: Path, compiled: bool) -> dict:
    """Measure, print and write; what the file holds."""
    console, load, races = Console(), OtherLoad(), []
    for dtype in DTYPES:
        for rows in effort.rows:
            for gives in (OUTPUTS, OUTPUTS[:1]):
                races.append(race(dtype, rows, gives, effort, compiled))
                show(console, races[-1])
    found = {**environment(), "other_load": load.share(), "quick": effort is QUICK, "races": races}
    keep_for_page(found, output / FILE, console)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.few_rows", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a self-test of a few seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave out the peers that compile")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    run(QUICK if asked.quick else Effort(), asked.output, not asked.no_compile)


if __name__ == "__main__":
    main()
