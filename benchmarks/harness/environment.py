"""Where files stand, and what machine, commit and versions a measurement is of."""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
import subprocess
from pathlib import Path

import torch

from .internals import version

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "plots"
PACKAGES = ("gear-kernels", "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "numpy")


def environment() -> dict:
    """Date (UTC), commit, processor, threads and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The checkout's commit, 12 digits, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def processor() -> str:
    """The CPU's name and the instruction set that torch uses."""
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if model:
            return f"{model[1]} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()
