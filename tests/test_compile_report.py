"""The gate on compiled kernels, for GPUs that need not be there: it passes as committed, and it catches what it should."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from benchmarks.gates import compile_report as report

COMMITTED = [report.Kernel(**row) for row in json.loads((report.RESULTS / report.TABLE).read_text())["rows"]]


@pytest.fixture
def run(capsys):
    """run(*arguments): the command's exit code and output; only the compilers have processes of their own."""

    def call(*arguments):
        code = report.main(list(arguments))
        return code, capsys.readouterr().out

    return call


@pytest.mark.timeout(900)
def test_kernels_are_as_committed(run):
    """A few cases compile to what the table says, and the table is of this tree's kernels: so it speaks for all of them. All of
    them compile in the nightly workflow, by the command without --only.
    """
    code, out = run("--check", "--targets", "sm_90", "--only", report.FEW)
    assert code == 0, out
    few = [row for row in COMMITTED if row.target == "sm_90" and re.search(report.FEW, row.case)]
    assert f"{len(few)} kernels compiled" in out and {row.kernel for row in few} == {row.kernel for row in COMMITTED}
    assert len(COMMITTED) == len({row.key for row in COMMITTED}) and len(COMMITTED) % len(report.TARGETS) == 0
    assert report.faults(COMMITTED) == []


@pytest.mark.parametrize(
    ("before", "after", "noticed"),
    (
        ('"sweep": 2048', '"sweep": 4096', True),
        ("    z = u * u\n", "    z = u * u + 0.0\n", True),
        ("    return z\n", "\n    # a comment, and another docstring below\n    return z\n", False),
        ('"""Raw GEMM output -> logits."""', '"""Logits of raw GEMM output."""', False),
    ),
    ids=("block", "kernel", "comment", "docstring"),
)
def test_a_kernel_that_no_compiled_case_has_is_seen_to_differ(tmp_path, monkeypatch, before, after, noticed):
    """A spill planted where the few cases do not look: the table is not of those kernels. Comments are no kernels."""
    shutil.copytree(report.ROOT / "gear_kernels" / "triton", tmp_path / "gear_kernels" / "triton")
    table = json.loads((report.RESULTS / report.TABLE).read_text())
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.stale(table) == []
    path = tmp_path / "gear_kernels" / "triton" / "stats.py"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    assert [line.startswith("the kernels or cases are not those") for line in report.stale(table)] == [True] * noticed


def test_another_case_is_seen(monkeypatch):
    table = json.loads((report.RESULTS / report.TABLE).read_text())
    more = [*report.statistics_cases(), report.Variant(report.STUDENT, columns=9)]
    monkeypatch.setattr(report, "statistics_cases", lambda: more)
    assert len(report.stale(table)) == 1


def test_another_triton_is_named_and_compares_nothing(monkeypatch, capsys):
    """Its spills are told, its failures count; the committed table is neither compared nor written."""
    spilled, lines = [replace(COMMITTED[0], spills=4), *COMMITTED[1:]], []
    monkeypatch.setattr(report, "compile_all", lambda options, console: (spilled, lines))
    monkeypatch.setattr(report, "_triton_version", lambda folder=None: "9.9" if folder else "0.0")
    monkeypatch.setattr(report, "write", None)
    assert report.main(["--triton", "build/other"]) == 0
    assert "spills 4" in (out := capsys.readouterr().out) and f"Triton 9.9: {len(COMMITTED)} kernels compiled" in out
    lines.append("sm_90: the compiler's process ended with 1")
    assert report.main(["--triton", "build/other"]) == 1


def test_a_real_spill_is_caught(run):
    """All seven statistics in a block of 4096 with two warps: 384 float32 sums a thread and more do not fit."""
    code, out = run("--check", "--targets", "sm_90", "--only", "^all seven, float32, V=151936$", "--config", "4096,2")
    offenders = [line for line in out.splitlines() if line.startswith("sm_90 sweep, all seven") and "spills" in line]
    assert code == 1 and len(offenders) == 1, out


def test_a_failing_compiler_is_caught(run):
    code, out = run("--check", "--targets", "sm_90", "--only", "^default, float32, V=151936$", "--config", "2049,8")
    assert code == 1 and "sm_90: the compiler's process ended with 1; nothing was compiled" in out


def test_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        report.main([])
    assert stopped.value.code == 2 and "Unset it" in capsys.readouterr().err


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
