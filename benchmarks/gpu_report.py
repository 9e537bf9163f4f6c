"""Everything that only a GPU can tell, in one command of under nine minutes: `python -m benchmarks.gpu_report [--wheels DIR]`.

Needs torch 2.11, triton 3.6 and this repository, nothing installed. Phases: the machine, its ceilings (bandwidth, GEMM),
correctness of every kernel against float64, speed and memory beside the peers whose wheels lie in DIR, overheads of launches and
CUDA graphs, and with --tune a sweep over block sizes and tiles. Each phase has its own process and time budget; a check that
fails, or takes its process down, is a line of the report, and the report is written anew after each phase. The exit code is 1 if
a check failed or was not reached.

--self-test runs all of it on the CPU with tiny shapes; what needs a GPU is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import gear_kernels
from gear_kernels.backends import version

from .gpu_checks import correctness_items
from .gpu_items import Item, Setting, Skip, is_fatal, synchronize
from .gpu_overheads import overhead_items
from .gpu_speed import ceiling_items, speed_items, tune_items

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# milliseconds: what is aimed at, and the GEMMs alone at the 790 TFLOP/s that cuBLAS reaches on an H200 (DESIGN.md, section 4)
GOALS = {("default", "forward"): (28.5, 25.8), ("default", "forward+backward"): (85.0, 77.4)}
GOAL_MIB = 0.3 * 1024  # beside the results
_FATAL = 3  # exit code of a worker whose CUDA context is lost


# --- the machine ------------------------------------------------------------------------------------------------------------


def machine_items(setting: Setting) -> list[Item]:
    """What this ran on."""
    return [Item("machine", lambda: _machine(setting))]


def _machine(setting: Setting) -> dict:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        gear_kernels.show()
    found = {"device": platform.machine(), "commit": _commit(), "python": platform.python_version()}
    if not setting.self_test:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --self-test runs on the CPU")
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "total_gib": total / 2**30, "free_gib": free / 2**30}
        found |= {"cuda": torch.version.cuda or f"ROCm {torch.version.hip}", "driver": _driver()}
    versions = {name: version(name) for name in ("torch", "triton", "trl", "liger-kernel", "verl", "cut-cross-entropy")}
    return {**found, **versions, "show": shown.getvalue()}


def _commit() -> str:
    return _output("git", "rev-parse", "--short=12", "HEAD") + (" and changes" if _output("git", "status", "-s", "-uno") else "")


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


# --- running items ----------------------------------------------------------------------------------------------------------

# name: items, seconds
PHASES: dict[str, tuple[Callable[[Setting], list[Item]], int]] = {
    "machine": (machine_items, 30),
    "ceilings": (ceiling_items, 40),
    "correctness": (correctness_items, 230),
    "speed": (speed_items, 190),
    "overheads": (overhead_items, 20),
    "tune": (tune_items, 150),
}
_DEFAULT_PHASES = ("machine", "ceilings", "correctness", "speed", "overheads")  # 510 seconds


def work(phase: str, setting: Setting, start: int = 0) -> Iterator[dict]:
    """Run a phase's items from `start` on: {"begin": name, "of": count} before each, its outcome after it."""
    items = PHASES[phase][0](setting)
    for item in items[start:]:
        yield {"begin": item.name, "of": len(items)}
        begin, fatal = time.perf_counter(), False
        outcome = {"name": item.name, "status": "passed"}
        try:
            if item.gpu_only and setting.self_test:
                raise Skip(f"needs a GPU: {item.gpu_only}")
            outcome["figures"] = item.run()
            synchronize(setting)
        except Skip as skip:
            outcome |= {"status": "skipped", "reason": str(skip)}
        except Exception as error:  # a failure is a line of the report
            outcome |= {"status": "failed", "reason": _described(error)}
            fatal = is_fatal(error)
        yield {**outcome, "seconds": round(time.perf_counter() - begin, 2)}
        if fatal:
            raise SystemExit(_FATAL)
        _clean(setting)


def _clean(setting: Setting) -> None:
    if setting.device == "cuda" and torch.cuda.memory_reserved() > 1 << 30:
        gc.collect()
        torch.cuda.empty_cache()


def _described(error: Exception) -> str:
    ours = (str(ROOT / "gear_kernels"), str(ROOT / "benchmarks"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ours)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:600]}{where}"


def run_phase(phase: str, setting: Setting, seconds: float, tell: Callable[[str], None]) -> dict:
    """A phase in processes of its own: {"items": outcomes, "missed": items not reached}. A process that dies costs one item."""
    items, count, deadline = [], 0, time.perf_counter() + seconds
    while True:
        running = None
        with tempfile.TemporaryFile("w+") as errors:
            code, lines = _process(phase, setting, len(items), deadline, errors)
            for line in lines:
                if "begin" in line:
                    running, count = line["begin"], line["of"]
                else:
                    items.append(line)
                    running = None
                    tell(f"[{phase} {len(items)}/{count}] {_line(line)}")
            late = time.perf_counter() >= deadline
            if running is not None:
                reason = f"the phase's {seconds:.0f} s were over" if late else f"its process ended with {code()}: {_tail(errors)}"
                status = "skipped" if late and phase != "correctness" else "failed"
                items.append({"name": running, "status": status, "reason": reason, "seconds": None})
                tell(f"[{phase} {len(items)}/{count}] {_line(items[-1])}")
            elif not count or (code() not in (0, _FATAL) and not late):
                reason = f"nothing ran in {seconds:.0f} s" if late else _tail(errors)
                items.append({"name": phase, "status": "failed", "reason": reason, "seconds": None})
                return {"items": items, "missed": max(count - len(items), 0)}
        if late or len(items) >= count:
            return {"items": items, "missed": count - len(items)}


def _process(phase: str, setting: Setting, start: int, deadline: float, errors) -> tuple[Callable[[], int], Iterator[dict]]:
    """Its exit code (once the lines are used up), and the lines that it writes; killed at the deadline."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--worker", phase, "--start", str(start), *_worker_options(setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (setting.wheels, os.environ.get("PYTHONPATH"))))}
    pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its compiler's helpers too, or the pipe would stay open

    timer = threading.Timer(max(deadline - time.perf_counter(), 0.1), kill)
    timer.start()

    def lines() -> Iterator[dict]:
        try:
            for line in process.stdout:
                if line.startswith('{"') and line.endswith("}\n"):  # anything else is a library's chatter
                    yield json.loads(line)
            process.wait()
        finally:
            timer.cancel()
            kill()

    return lambda: process.returncode, lines()


def _worker_options(setting: Setting) -> list[str]:
    return ["--self-test"] if setting.self_test else []


def _tail(errors) -> str:
    errors.seek(0)
    return errors.read().strip()[-600:]


def _line(outcome: dict) -> str:
    figures = {k: v for k, v in outcome.get("figures", {}).items() if k in ("ms", "gb_s", "tflop_s", "error", "gradient_error")}
    shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
    return f"{outcome['name']}: {outcome['status']} {shown}{outcome.get('reason', '')}"


# --- the report -------------------------------------------------------------------------------------------------------------


def with_floors(report: dict) -> None:
    """Add to the speed phase what the measured ceilings and the goals make of each time, in place."""
    ceilings = {i["name"]: i["figures"] for i in report["phases"].get("ceilings", {}).get("items", []) if "figures" in i}
    tflop_s = max((f["tflop_s"] for f in ceilings.values() if "tflop_s" in f), default=None)
    gb_s = max((f["gb_s"] for f in ceilings.values() if "gb_s" in f), default=None)
    for item in report["phases"].get("speed", {}).get("items", []):
        figures = item.get("figures", {})
        flops, moved = figures.pop("floor_flops", None), figures.pop("floor_bytes", None)
        floor = flops / tflop_s / 1e9 if flops and tflop_s else moved / gb_s / 1e6 if moved and gb_s else None
        if floor:
            figures |= {"floor_ms": floor, "of_roofline": floor / figures["ms"]}
        goal = GOALS.get((figures.pop("label", None), item["name"].rsplit(", ", 1)[-1]))
        if goal and not report["self_test"]:
            figures |= {"goal_ms": goal[0], "design_floor_ms": goal[1], "goal_met": figures["ms"] <= goal[0]}
            figures |= {"goal_mib": GOAL_MIB, "memory_met": figures["beside_results_mib"] <= GOAL_MIB}


def failures(report: dict) -> list[str]:
    """A line for each item that failed, and for each phase but tuning that was cut short."""
    found = []
    for phase, result in report["phases"].items():
        found += [f"{phase}: {i['name']}: {i['reason']}" for i in result["items"] if i["status"] == "failed"]
        if result["missed"] and phase == "correctness":
            found.append(f"{phase}: {result['missed']} items were not reached")
    return found


LEGEND = (
    "ms: median (low, high: quartiles) of single warm calls by CUDA events. first_s: the first call, with its compiling. "
    "extra_mib: peak memory above what was held; beside_results_mib: without the gradients. error: against float64, in nats, the "
    "largest of the outputs named on 32 rows. floor_ms: the GEMMs (jsd: made twice) or the bytes that cannot be saved, at the "
    "best ceiling above; of_roofline: floor / time. A peer that gives less than all outputs is held against the same floor. "
    "host_us: until a call returns; graph_ms: the same replayed as a CUDA graph."
)


def markdown(report: dict) -> str:
    """The whole report; a table per phase."""
    head = f"{report['date']}, {report['seconds']:.0f} s." + (" Self-test: figures mean nothing." if report["self_test"] else "")
    lines = ["# GPU report", "", head, ""]
    wrong = failures(report)
    lines += ["**Failures**", "", *[f"- {_plain_text(line)}" for line in wrong]] if wrong else ["No failures."]
    for phase, result in report["phases"].items():
        counts = {s: sum(i["status"] == s for i in result["items"]) for s in ("passed", "failed", "skipped")}
        lines += ["", f"## {phase}", "", ", ".join(f"{n} {s}" for s, n in counts.items()) + f", {result['missed']} not reached"]
        lines += ["", LEGEND] if phase in ("speed", "overheads") else []
        lines += ["", *(_machine_lines(result) if phase == "machine" else _table(result["items"]))]
    return "\n".join(lines) + "\n"


def _machine_lines(result: dict) -> list[str]:
    return [f"- {k}: {_cell(v)}" for i in result["items"] for k, v in i.get("figures", {}).items()]


def _table(items: list[dict]) -> list[str]:
    heads = list(dict.fromkeys(name for item in items for name in item.get("figures", {})))
    lines = ["| item | status | " + " | ".join(heads) + " | s |", "| --- | --- |" + " --- |" * (len(heads) + 1)]
    for item in items:
        cells = [_cell(item.get("figures", {}).get(name)) for name in heads]
        status = item["status"] + (f": {_plain_text(item['reason'])}" if "reason" in item else "")
        lines.append(f"| {item['name']} | {status} | " + " | ".join([*cells, _cell(item["seconds"])]) + " |")
    return lines


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _plain_text(str(value))


def _plain_text(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")


def write(report: dict, folder: Path) -> Path:
    """gpu_<device>_<date>.json and .md; the path of the latter."""
    figures = next((i["figures"] for i in report["phases"]["machine"]["items"] if "figures" in i), {"device": "unknown"})
    device = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    path = folder / f"gpu_{device}_{report['date'][:10]}.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(_finite(report), indent=1) + "\n")
    path.write_text(markdown(report))
    return path


def _finite(value):
    """NaN and infinities as text: JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def in_process(phase: str, setting: Setting, seconds: float, tell: Callable[[str], None]) -> dict:
    """`run_phase` without processes, for the self-test."""
    items = [line for line in work(phase, setting) if "status" in line]
    for i, item in enumerate(items):
        tell(f"[{phase} {i + 1}/{len(items)}] {_line(item)}")
    return {"items": items, "missed": 0}


def run(setting: Setting, phases: Sequence[str], folder: Path, tell: Callable[[str], None] = print) -> dict:
    """All phases; the report is written after each."""
    start = time.perf_counter()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"date": date, "self_test": setting.self_test, "seconds": 0.0, "phases": {}}
    for phase in phases:
        runner = in_process if setting.self_test else run_phase
        report["phases"][phase] = runner(phase, setting, PHASES[phase][1], tell)
        report["seconds"] = round(time.perf_counter() - start, 1)
        if phase == "speed":
            with_floors(report)
        if phase == "machine" and failures(report):
            break
        tell(f"{report['seconds']} s; wrote {write(report, folder)} and .json")
    for line in failures(report):
        tell(f"FAILED {line}")
    return report


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument(
        "--wheels", type=Path, help="a folder with wheels of peers (trl, liger-kernel, verl, cut-cross-entropy; packaging)"
    )
    parser.add_argument("--phases", default=",".join(_DEFAULT_PHASES), help="comma-separated; machine comes first")
    parser.add_argument("--tune", action="store_true", help="also sweep block sizes and tiles; two and a half minutes more")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the two files go")
    parser.add_argument("--worker", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = "cpu" if given.self_test else "cuda"
    if given.worker:
        for line in work(given.worker, Setting(device), given.start):
            print(json.dumps(line), flush=True)
        return 0
    phases = list(dict.fromkeys(["machine", *given.phases.split(","), *["tune"] * given.tune]))
    with unpacked(given.wheels) as folder:
        report = run(Setting(device, folder), phases, given.output)
    return 1 if failures(report) else 0


if __name__ == "__main__":
    sys.exit(main())
