"""The gate on compiled kernels, for GPUs that need not be there: it passes as committed, and it catches what it should."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import compile_report as report

COMMITTED = [report.Row(**row) for row in json.loads((report.RESULTS / report.TABLE).read_text())["rows"]]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "benchmarks.compile_report", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_kernels_are_as_committed():
    done = run("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(COMMITTED)} kernels compiled" in done.stdout
    assert len(COMMITTED) == len({row.key for row in COMMITTED}) and len(COMMITTED) % len(report.TARGETS) == 0


def test_a_real_spill_is_caught():
    """All seven statistics in a block of 8192 with two warps: 128 float32 sums a thread and more do not fit."""
    arguments = ("--check", "--targets", "sm_90", "--only", "^all seven, float32, V=151936$", "--config", "8192,2")
    done = run(*arguments)
    offenders = [line for line in done.stdout.splitlines() if line.startswith("sm_90 sweep, all seven") and "spills" in line]
    assert done.returncode == 1 and len(offenders) == 1, done.stdout + done.stderr


def test_a_failing_compiler_is_caught():
    done = run("--check", "--targets", "sm_90", "--only", "^default, float32, V=151936$", "--config", "2049,8")
    assert done.returncode == 1 and "sm_90: the compiler's process ended with 1; nothing was compiled" in done.stdout


def test_interpreter_is_refused():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "Unset it" in done.stderr


@pytest.mark.parametrize(
    ("change", "offence"),
    (
        ({"registers": 300}, "registers 300, committed"),
        ({"shared": 9999}, "shared 9999, committed"),
        ({"load_bits": 8}, "load_bits 8, committed"),
        ({"spills": 64}, "spills 64"),
        ({"shared": 1 << 20}, "bytes of shared memory, the limit is"),
        ({"case": "new"}, "not in the committed table"),
        ({"case": "new"}, "not compiled, but in the committed table"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_offence_is_caught(change, offence):
    planted = [replace(COMMITTED[0], **change), *COMMITTED[1:]]
    lines = report.faults(planted) + report.regressions(planted, COMMITTED)
    assert any(offence in line and line.startswith(COMMITTED[0].target) for line in lines) and len(lines) <= 2


def test_shrinking_passes():
    smaller = [replace(row, registers=row.registers - 1, shared=0, load_bits=512) for row in COMMITTED]
    assert not report.faults(smaller) + report.regressions(smaller, COMMITTED)


def test_another_triton_compares_no_figures(tmp_path):
    planted = [replace(COMMITTED[0], registers=300), *COMMITTED[1:]]
    report.write(COMMITTED, tmp_path)
    assert report.check(planted, tmp_path / report.TABLE, report.Options())
    table = json.loads((tmp_path / report.TABLE).read_text())
    (tmp_path / report.TABLE).write_text(json.dumps({**table, "triton": "0.0"}))
    assert not report.check(planted, tmp_path / report.TABLE, report.Options())


def test_stderr_errors_fail():
    assert report._failures("sm_90", COMMITTED, 0, "warning: fine") == []
    lines = report._failures("sm_90", COMMITTED, 0, "loc(1): error: unsupported\n")
    assert len(lines) == 2 and lines[0].endswith("error: unsupported")
