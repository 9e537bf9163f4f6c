"""NVIDIA's own instruments over single operators: ncu's counters of a sweep, compute-sanitizer's word on three small calls.

`python -m benchmarks.gpu.tools small|head` is what they start; where a tool is missing, or may not read the device, the item is
skipped with the reason.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..harness.cases import HEAD_SHAPE, make_case
from ..harness.credit_inputs import pack
from ..harness.environment import ROOT
from ..harness.peers import ours_call
from .run import BF16, Item, Setting, Skip

_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
# One pass over the counters must do: a second would find the tile in the cache that the first has read.
_COUNTERS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "dram_read_mib",
    "dram__bytes_write.sum": "dram_written_mib",
    "lts__t_bytes.sum": "l2_mib",
}
_SCALE = {"us": 1e-3, "dram_read_mib": 2**-20, "dram_written_mib": 2**-20, "l2_mib": 2**-20}  # of nanoseconds and of bytes
_REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler", "Device not supported")
_WRONG = 9  # compute-sanitizer's exit code for what it found


def profile_items(setting: Setting) -> list[Item]:
    """Bytes that a sweep and a gradient kernel draw from memory in the middle of a call at HEAD_SHAPE."""
    reason = "ncu reads a GPU's counters"
    return [
        Item(f"ncu, {kernel}", functools.partial(_counters, kernel), reason, seconds=90)
        for kernel in ("_sweep_kernel", "_gradient_kernel")
    ]


def sanitizer_items(setting: Setting) -> list[Item]:
    """Statistics of logits and of hidden states with their backward, and the scan, on small inputs."""
    return [Item("compute-sanitizer, memcheck", _memcheck, "it watches a GPU's memory", seconds=120)]


def _counters(kernel: str) -> dict:
    """Medians of eight launches; the caches are left as the launches before leave them."""
    options = ["--clock-control", "none", "--cache-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    options += ["-k", f"regex:{kernel}", "--launch-skip", "40", "--launch-count", "8", "--metrics", ",".join(_COUNTERS)]
    return counted(_run("ncu", *options, what="head").stdout)


def counted(text: str) -> dict:
    """Figures of ncu's raw page as CSV: a line of names, one of units, then a line a launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]
    if not rows:
        raise Skip(f"ncu counted nothing: {text[-300:]}")
    if absent := [counter for counter in _COUNTERS if not re.fullmatch(r"[\d.,]+", rows[0].get(counter) or "")]:
        raise Skip(f"ncu gives no {', '.join(absent)}")
    found: dict[str, float] = {"launches": len(rows)}
    for counter, name in _COUNTERS.items():
        found[name] = statistics.median(float(row[counter].replace(",", "")) for row in rows) * _SCALE[name]
    return found


def _memcheck() -> dict:
    done = _run("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", str(_WRONG), what="small", caching=False)
    assert done.returncode != _WRONG, done.stdout[-1500:]
    errors = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout)
    return {"errors": int(errors[1]) if errors else 0}


def _run(tool: str, *options: str, what: str, caching: bool = True) -> subprocess.CompletedProcess:
    """A tool over `python -m benchmarks.gpu.tools what`. caching: False gives each tensor an allocation of its own."""
    path = shutil.which(tool) or next((str(p) for f in _FOLDERS for p in Path("/").glob(f"{f[1:]}/{tool}")), None)
    if path is None:
        raise Skip(f"{tool} is not installed")
    environment = os.environ if caching else {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [path, *options, sys.executable, "-m", "benchmarks.gpu.tools", what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    refused = [line.strip() for line in output.splitlines() if any(word in line for word in _REFUSED)]
    if refused:
        raise Skip(f"{tool}: {refused[0][:200]}")
    if done.returncode not in (0, _WRONG):
        kind = Skip if tool == "ncu" else RuntimeError  # under compute-sanitizer it may be our kernels
        raise kind(f"{tool} ended with {done.returncode}: {output[-1500:]}")
    return done


def main(what: str, device: str = "cuda") -> None:
    """The calls that are watched."""
    if what == "head":
        _call("hidden", *HEAD_SHAPE, device)()
        return
    for kind, shape in {"logits": (64, 1187), "hidden": (40, 2003, 64)}.items():
        _call(kind, *shape, device=device)()
    pack(1 << 12, 16, masked=0.3).to(device).credit()
    if device == "cuda":
        torch.cuda.synchronize()


def _call(kind: str, rows: int, columns: int, width: int = 0, device: str = "cuda") -> Callable[[], tuple]:
    return ours_call(make_case(kind, BF16, rows, columns, width, device=device, sampled=False), "forward+backward")


if __name__ == "__main__":
    main(sys.argv[1])
