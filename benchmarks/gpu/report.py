"""Everything that only a GPU can tell, in three commands of under ten minutes: `python -m benchmarks.gpu --call 1`, 2, 3.

Needs torch 2.11, triton 3.6 and this repository, nothing installed; benchmarks/README.md says how to run it on a bare machine.
Each phase has its own processes and share of the time, each item its own limit. An item that fails, or takes its process down, is
a line of the report, on the disk at once (items.jsonl); the report itself is written anew after each phase. The exit code is 1 if
an item failed or a check was not reached.

--self-test runs all of it on the CPU with tiny shapes; what needs a GPU is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import gear_kernels

from ..harness.environment import RESULTS, ROOT, commit
from ..harness.internals import version
from .checks import correctness_items
from .page import Journal, failures, line, with_floors, write
from .run import Item, Part, Phase, Setting, in_process, run_phase, work
from .smoke import smoke_items
from .speed import card_items, ceiling_items, headline_items, overhead_items, peer_items, shape_items, speed_items
from .tools import profile_items, sanitizer_items
from .trainer import trainer_items
from .tune import block_items, scan_items, tile_items

CACHE = "triton_cache.tgz"
say = functools.partial(print, flush=True)

# --- the machine ------------------------------------------------------------------------------------------------------------


def machine_items(setting: Setting) -> list[Item]:
    """The item that says what this ran on."""
    return [Item("machine", lambda: _machine(setting), seconds=120)]


def _machine(setting: Setting) -> dict:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        gear_kernels.show()
    found = {"device": platform.machine(), "commit": commit(), "python": platform.python_version()}
    if not setting.self_test:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "total_gib": total / 2**30, "free_gib": free / 2**30}
        found |= {"cuda": torch.version.cuda or f"ROCm {torch.version.hip}", "driver": _driver()}
    versions = {name: version(name) for name in ("torch", "triton", "trl", "liger-kernel", "verl", "cut-cross-entropy")}
    return {**found, **versions, "show": shown.getvalue()}


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


# --- phases -----------------------------------------------------------------------------------------------------------------

PHASES: dict[str, Phase] = {
    "machine": Phase(machine_items, 120, own=True),  # a cold start of torch and CUDA alone can take a minute
    "smoke": Phase(smoke_items, 150, own=True, strict=True, vital=True),
    "card": Phase(card_items, 25),
    "ceilings": Phase(ceiling_items, 40),
    "headline": Phase(headline_items, 90),
    "tiles": Phase(tile_items, 60),
    "blocks": Phase(block_items, 60),
    "scan": Phase(scan_items, 60),
    "profile": Phase(profile_items, 60),
    "correctness": Phase(correctness_items, 180, workers=max(1, (os.cpu_count() or 2) // 2), strict=True),
    "sanitizer": Phase(sanitizer_items, 60),
    "overheads": Phase(overhead_items, 30),
    "speed": Phase(speed_items, 60),
    "shapes": Phase(shape_items, 60),
    "trainer": Phase(trainer_items, 120),
    "peers": Phase(peer_items, 120),
}


class Plan(NamedTuple):
    """One command of the plan: its phases, most telling first, and its seconds."""

    phases: tuple[str, ...]
    budget: float


PLANS = {
    "1": Plan(("machine", "smoke", "card", "ceilings", "headline", "tiles", "blocks", "profile"), 420),
    "2": Plan(("machine", "smoke", "card", "correctness", "headline", "scan", "sanitizer"), 540),
    "3": Plan(("machine", "smoke", "card", "overheads", "speed", "shapes", "trainer", "peers"), 540),
}
DEFAULT = Plan(("machine", "smoke", "card", "headline", "correctness", "overheads", "speed"), 540)
_RESERVE = 10  # seconds of a budget for the files at its end


def shares(phases: Sequence[str], left: float) -> float:
    """Seconds for the first of these phases when so many are left for all; what it does not use goes to the others."""
    limits = [PHASES[name].seconds for name in phases]
    return max(1.0, min(left, limits[0]) if PHASES[phases[0]].own else left * limits[0] / sum(limits))


def run(setting: Setting, plan: Plan, folder: Path, name: str = "", tell: Callable[[str], None] = say) -> dict:
    """All phases of a plan; an item's line is written when it ends, the report after each phase."""
    start, now = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"date": now, "call": name, "self_test": setting.self_test, "seconds": 0.0, "phases": {}}
    with contextlib.closing(Journal(folder, now)) as journal:
        for i, phase in enumerate(plan.phases):
            left = plan.budget - _RESERVE - (time.perf_counter() - start)
            report["phases"][phase] = _phase(phase, setting, shares(plan.phases[i:], left), journal, tell)
            report["seconds"] = round(time.perf_counter() - start, 1)
            with_floors(report)
            tell(f"{report['seconds']} s; wrote {write(report, folder)} and .json")
            if PHASES[phase].vital and failures(report):
                tell(f"{phase} failed: nothing after it would mean anything")
                break
            if not setting.self_test:
                keep_cache(folder / CACHE)
    for text in failures(report):
        tell(f"FAILED {text}")
    return report


def _phase(name: str, setting: Setting, seconds: float, journal: Journal, tell: Callable[[str], None]) -> dict:
    phase, done = PHASES[name], itertools.count(1)

    def note(outcome: dict) -> None:
        journal.add(name, outcome)
        tell(f"[{name} {next(done)}] {line(outcome)}")
        if phase.vital and "traceback" in outcome:
            tell(outcome["traceback"])

    result = in_process(phase, setting, note) if setting.self_test else run_phase(name, phase, setting, seconds, note)
    return {**result, "strict": phase.strict, "vital": phase.vital}


# --- Triton's cache ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where Triton keeps what it has compiled."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def keep_cache(file: Path) -> None:
    """Pack Triton's cache, if there is one."""
    folder = cache_folder()
    if folder.is_dir():
        with tarfile.open(file, "w:gz", compresslevel=3) as archive:
            archive.add(folder, ".")


def use_cache(file: Path) -> None:
    """Unpack a packed cache to where Triton looks. A group of files is listed by absolute paths, which may have been others'."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python before 3.11.4 has none
        archive.extractall(folder, **safely)
    for group in folder.glob("*/__grp__*"):
        paths = json.loads(group.read_text())
        paths["child_paths"] = {name: str(group.parent / name) for name in paths["child_paths"]}
        group.write_text(json.dumps(paths))


@contextlib.contextmanager
def unpacked(wheels: Path | None) -> Iterator[str | None]:
    """A folder for the module path that holds the wheels of another, unpacked; None for none."""
    if wheels is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        sys.path.insert(0, folder)  # for the self-test, which has no processes
        yield folder
        sys.path.remove(folder)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--wheels", type=Path, help="a folder with wheels of peers (trl, liger-kernel, verl, cut-cross-entropy; packaging)"
    )
    parser.add_argument("--call", choices=PLANS, help="one of three plans, each under ten minutes; without it a short one of all")
    parser.add_argument("--phases", help=f"comma-separated, instead of a plan's: {', '.join(PHASES)}")
    parser.add_argument("--budget", type=float, help="seconds in all, cut among the phases; the plan's own by default")
    parser.add_argument("--cache", type=Path, help=f"a {CACHE} of an earlier call: its kernels need no compiling")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT") or RESULTS, help="where the files go; $OUT if it is set"
    )
    parser.add_argument("--worker", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0,1,0", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    setting = Setting("cpu" if given.self_test else "cuda")
    if given.worker:
        for outcome in work(PHASES[given.worker].items(setting), setting, Part(*map(int, given.part.split(",")))):
            print(json.dumps(outcome), flush=True)
        return 0
    if not given.self_test and not torch.cuda.is_available():
        parser.exit(2, "torch sees no CUDA device; --self-test runs on the CPU\n")
    plan = PLANS.get(given.call, DEFAULT)
    if given.phases:
        plan = plan._replace(phases=tuple(dict.fromkeys(["machine", *given.phases.split(",")])))
    if given.budget:
        plan = plan._replace(budget=given.budget)
    if given.cache:
        use_cache(given.cache)
    with unpacked(given.wheels) as folder:
        report = run(replace(setting, wheels=folder), plan, Path(given.output), given.call or "")
    return 1 if failures(report) else 0
