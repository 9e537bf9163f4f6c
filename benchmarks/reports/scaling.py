"""The growth of cost: `python -m benchmarks.reports.scaling [--quick] [--parts points,ranks,model]`.

Time and memory of linear_token_stats against rows, vocabulary and width, beside eager torch and the plain GEMMs; the same over a
vocabulary cut between processes; and the written models of projections.py. Writes scaling.json, from which the page is drawn;
parts that are not run keep their old figures.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from gear_kernels import Head, linear_token_stats

from ..harness.cases import OUTPUTS, PASSES, make_case, runner
from ..harness.environment import RESULTS, ROOT, environment
from ..harness.measure import OtherLoad, elapsed_ms, extra_memory, interleave
from ..harness.peers import EAGER, OURS, gemm_name, gemms, peers
from ..harness.tables import keep_for_page, progress_bar
from . import projections

FILE = "scaling.json"
PARTS = ("points", "ranks", "model")
GEMMS = gemm_name(torch.float32)
AXES = ("N", "V", "D")


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured. base: N, V, D, of which one is varied at a time.  ranks_shape: V is cut among `processes`,
    which have a thread each.
    """

    base: tuple[int, int, int] = (64, 32003, 512)
    rows: tuple[int, ...] = (4, 16, 64, 256, 1024)
    columns: tuple[int, ...] = (2003, 8003, 32003, 128003)
    widths: tuple[int, ...] = (64, 128, 512, 2048)
    ranks_shape: tuple[int, ...] = (128, 64000, 512)
    processes: tuple[int, ...] = (1, 2)
    rounds: int = 9
    seconds: float = 12.0
    quick: bool = False

    def shapes(self) -> list[tuple[int, ...]]:
        """Every point once, in order of size."""
        varied = ((i, x) for i, values in enumerate((self.rows, self.columns, self.widths)) for x in values)
        return sorted({(*self.base[:i], x, *self.base[i + 1 :]) for i, x in varied})


QUICK = Sizes((8, 203, 16), (4, 8), (101, 203), (16, 32), (8, 204, 16), (2,), rounds=3, seconds=0.5, quick=True)


# --- against N, V and D --------------------------------------------------------------------------------------------------------


def point(shape: tuple[int, ...], passes: str, sizes: Sizes) -> dict:
    """One shape and pass: quartiles and extra memory of ours and eager torch, quartiles of the GEMMs."""
    case = make_case("hidden", torch.float32, *shape)
    entrants = {p.name: runner(p.load(), case, passes) for p in peers("hidden", compiled=False) if p.name in (OURS, EAGER)}
    calls = entrants | {GEMMS: gemms(case, torch.float32, passes)}
    first = {name: elapsed_ms(call) for name, call in calls.items()}
    found = {name: asdict(t) for name, t in interleave(calls, first, sizes.rounds, sizes.seconds).items()}
    for name, call in entrants.items():
        found[name]["extra_mib"] = extra_memory(call)
    return {"shape": shape, "passes": passes, "rows": found}


def points(sizes: Sizes, step: Callable[[str], None]) -> dict:
    """All points. `step` is told of each before it starts."""
    found, load = [], OtherLoad()  # over all of them: a small point is over before the system's clock ticks
    for shape, passes in itertools.product(sizes.shapes(), PASSES):
        step(f"{passes}, N, V, D = {shape}")
        found.append(point(shape, passes, sizes))
        gc.collect()
    return {"base": sizes.base, "other_load": load.share(), "points": found}


def series(measured: dict, axis: int, passes: str) -> list[dict]:
    """The points along one axis through the base, in order."""
    base = measured["base"]
    near = [p for p in measured["points"] if p["passes"] == passes]
    line = [p for p in near if all(p["shape"][i] == base[i] for i in range(3) if i != axis)]
    return sorted(line, key=lambda p: p["shape"][axis])


# --- against the number of processes -------------------------------------------------------------------------------------------


def worker(path: Path, sizes: Sizes) -> None:
    """One rank, started by torchrun: rank 0 writes the timings of both passes and of their collectives alone."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    case = make_case("hidden", torch.float32, *sizes.ranks_shape)
    size = sizes.ranks_shape[1] // ranks
    part = case.head.detach()[rank * size : (rank + 1) * size].clone().requires_grad_()
    head = Head(part, group=dist.group.WORLD) if ranks > 1 else Head(part)

    def both() -> tuple[torch.Tensor, ...]:
        out = linear_token_stats(case.student, head, case.targets, case.teacher, stats=OUTPUTS)
        return torch.autograd.grad(case.loss({name: getattr(out, name) for name in OUTPUTS}), [case.student, part])

    def forward() -> object:
        with torch.no_grad():
            return linear_token_stats(case.student, head, case.targets, case.teacher, stats=OUTPUTS)

    calls = {"forward": forward, "forward+backward": both}
    calls = {name: _together(call) for name, call in (calls | _collectives(sizes, ranks)).items()}
    first = {name: elapsed_ms(call) for name, call in calls.items()}
    timings = interleave(calls, first, sizes.rounds, float("inf"))  # ranks must not disagree about when to stop
    memory = {name: extra_memory(calls[name]) for name in PASSES}
    if rank == 0:
        path.write_text(json.dumps({name: asdict(t) | {"extra_mib": memory.get(name)} for name, t in timings.items()}))
    dist.destroy_process_group()


def _together(call: Callable) -> Callable:
    """Ranks start at once; one that waits for a late one would seem slow."""

    def started() -> object:
        dist.barrier()
        return call()

    return started


def _collectives(sizes: Sizes, ranks: int) -> dict[str, Callable]:
    """What crosses the ranks in the two passes, alone; and the barrier that every timing holds."""
    n, _, d = sizes.ranks_shape
    sums, grads = torch.zeros(n * 12 + 1, dtype=torch.float64), torch.zeros(n, d)
    everyone = [torch.zeros_like(sums) for _ in range(ranks)]
    return {
        "barrier": lambda: None,
        "all_gather": lambda: dist.all_gather(everyone, sums),
        "all_reduce": lambda: dist.all_reduce(grads),
    }


def ranks(sizes: Sizes, step: Callable[[str], None]) -> dict:
    """The timings by number of processes; one thread each, so that two have twice the cores of one."""
    found, load = {}, OtherLoad()
    for count in sizes.processes:
        step(f"{count} processes")
        found[str(count)] = _ranks_of(count, sizes)
    return {"shape": sizes.ranks_shape, "threads_each": 1, "other_load": load.share(), "processes": found}


def _ranks_of(count: int, sizes: Sizes) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timings.json"
        # a rank was ended by SIGABRT once, beside other tests' ranks, and never in 80 runs since: they may start anew
        launch = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "--nproc_per_node", str(count)]
        worker = ["-m", "benchmarks.reports.scaling", "--worker", str(path), *(["--quick"] if sizes.quick else [])]
        command = [sys.executable, *launch, *worker]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{count} ranks ended with {done.returncode}:\n{done.stderr}")
        return json.loads(path.read_text())


# --- all of it -----------------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, parts: tuple[str, ...], progress: Progress) -> dict:
    """The parts asked for, each with the machine and the moment it was measured on."""
    total = len(sizes.shapes()) * len(PASSES) * ("points" in parts) + len(sizes.processes) * ("ranks" in parts)
    task = progress.add_task("starting", total=total)

    def step(text: str) -> None:
        progress.update(task, description=text)
        progress.advance(task, 1 if step.started else 0)
        step.started = True

    step.started = False
    found = {}
    if "points" in parts:
        found["points"] = environment() | points(sizes, step)
    if "ranks" in parts:
        found["ranks"] = environment() | ranks(sizes, step)
    if "model" in parts:
        found["model"] = projections.everything()
    progress.update(task, completed=total)
    return found


def run(sizes: Sizes, parts: tuple[str, ...], output: Path, console: Console) -> dict:
    """Measure and write scaling.json to `output`; what the JSON holds."""
    path = output / FILE
    old = json.loads(path.read_text()) if path.is_file() else {}
    with progress_bar(console) as progress:
        new = measure(sizes, parts, progress)
    found = json.loads(json.dumps(old | new | {"quick": sizes.quick}))
    keep_for_page(found, path, console)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a self-test of a few seconds, into a temporary folder")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; the others keep what the file holds")
    parser.add_argument("--output", type=Path, help="where scaling.json goes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    sizes = QUICK if given.quick else Sizes()
    if given.worker:
        return worker(given.worker, sizes)
    if unknown := set(given.parts.split(",")) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    aside = Path(tempfile.mkdtemp(prefix="scaling-")) if given.quick else None
    run(sizes, tuple(given.parts.split(",")), given.output or aside or RESULTS, Console())


if __name__ == "__main__":
    main()
