"""The gate on the compiled pass' instructions: open on the tree as it is, closed on one instruction more in its loops."""

import json
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gates, instructions

COMMITTED = json.loads((gates.RESULTS / gates.TABLE).read_text())["instructions"]
SOURCE = Path(gates.__file__).parents[1] / "gear_kernels/csrc"
ROW = instructions.Row("sweep, float32, student alone", 2_000_000, 500_000, 4.0)
FOUND = instructions.Found("GCC", "avx2", [ROW], {"ymm": 80, "zmm": 16})
POLYNOMIAL = "vf p = f * 1.5345812010e-4f + "
ONE_MORE = "vf p = (f * 1e-9f + 1.5345812010e-4f) * f + "


@pytest.fixture(scope="module")
def found():
    """Of the tree as it is; skips where it cannot be held against the table."""
    found = instructions.measure()
    if why_not := [line for line in instructions.left_out(found, COMMITTED) if line.startswith("instructions")]:
        pytest.skip("; ".join(why_not))
    return found


def compiled(folder, flags, isa, lanes, change=None):
    """rows.cpp alone as a library, compiled as in CMakeLists.txt, with one piece of its text changed."""
    if not shutil.which("c++"):
        pytest.skip("no c++ on this machine")
    text = (SOURCE / "rows.cpp").read_text()
    if change:
        assert text.count(change[0]) == 1
        text = text.replace(*change)
    source, library = folder / "rows.cpp", folder / f"{isa}.so"
    source.write_text(text)
    command = ["c++", "-shared", "-fPIC", "-std=gnu++17", "-O3", "-DNDEBUG", "-ffp-contract=fast", "-mfma", *flags]
    defines = [f"-DGEAR_ISA={isa}", f"-DGEAR_LANES={lanes}", f"-I{SOURCE}"]
    subprocess.run([*command, *defines, str(source), "-o", str(library)], check=True)
    if instructions.compiler(library) != COMMITTED["compiler"]:
        pytest.skip("c++ is not the compiler of the committed counts")
    return library


def test_the_tree_as_it_is_passes(found):
    assert instructions.grown(found, COMMITTED) == []
    assert 3 < found.rows[0].per_element < 6, "AVX2 sums eight logits in some 32 instructions"


@pytest.mark.parametrize("change, closed", [(None, False), ((POLYNOMIAL, ONE_MORE), True)], ids=["as it is", "one more"])
def test_one_more_instruction_for_eight_logits_is_caught(found, monkeypatch, tmp_path, change, closed):
    """The copy takes its place in the module by preload: the module finds each build by an exported function."""
    library = compiled(tmp_path, ["-mavx2"], "avx2", 8, change)
    monkeypatch.setitem(instructions._ENVIRONMENT, "LD_PRELOAD", str(library))
    lines = instructions.grown(instructions.measure("float32, student alone"), COMMITTED, whole=False)
    calls = ["gradient, float32, student alone", "sweep, float32, student alone"]
    assert [line.split(":")[0] for line in lines] == (calls if closed else [])


@pytest.mark.skipif(not shutil.which("objdump") or platform.machine() != "x86_64", reason="no objdump for x86_64")
def test_spills_are_caught(tmp_path):
    """A compiler that may not use five of the registers spills more."""
    flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    own, _ = instructions._spills(compiled(tmp_path, flags, "avx512", 16))
    fewer = [f"-ffixed-xmm{k}" for k in range(16, 21)]
    more, _ = instructions._spills(compiled(tmp_path, [*flags, *fewer], "avx512", 16))
    assert own["zmm"] == COMMITTED["spills"]["zmm"] < more["zmm"]
    lines = instructions.grown(instructions.Found(COMMITTED["compiler"], spills={"zmm": more["zmm"]}), COMMITTED)
    assert len(lines) == 1 and "spills of zmm registers" in lines[0]


def test_growth_beyond_half_a_percent_is_an_offender():
    def grown(found, whole=True):
        return instructions.grown(found, FOUND.table, whole)

    within, beyond, less = (replace(FOUND, rows=[replace(ROW, instructions=n)]) for n in (2_009_999, 2_010_001, 1_900_000))
    assert grown(FOUND) == grown(within) == grown(less) == [] and len(grown(beyond)) == 1
    assert instructions.shrunk(less, FOUND.table) == 1 and instructions.shrunk(beyond, FOUND.table) == 0
    other = replace(FOUND, rows=[replace(ROW, call="sweep, float16")])
    assert len(grown(other)) == 2 and grown(other, whole=False) == []
    assert len(grown(replace(FOUND, spills={"ymm": 81, "zmm": 17}))) == 2


@pytest.mark.parametrize("change", [{"compiler": "clang"}, {"instruction_set": "baseline"}])
def test_counts_of_another_compiler_or_instruction_set_are_left_out(change):
    other = replace(FOUND, rows=[replace(ROW, instructions=1 << 40)], **change)
    assert instructions.grown(other, FOUND.table) == [] and instructions.grown(other, None) == []
    (line,) = instructions.left_out(other, FOUND.table)
    assert "not compared" in line and next(iter(change.values())) in line
    assert instructions.left_out(FOUND, FOUND.table) == [] and "none" in instructions.left_out(FOUND, None)[0]


def test_a_machine_without_the_tools_says_so_and_keeps_the_table(monkeypatch, tmp_path, capsys):
    """The gate is open there, with a line for each thing that is not there. (The other counts are measured elsewhere.)"""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(instructions.sys, "platform", "linux")
    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    table = json.loads((gates.RESULTS / gates.TABLE).read_text())
    monkeypatch.setattr(gates, "figures", lambda: [gates.Row(**row) for row in table["rows"]])
    monkeypatch.setattr(gates, "typical_ratios", lambda: table["ratios"])
    path = tmp_path / "gates.json"
    path.write_text(json.dumps(table))
    for arguments in (["--check", "--only", "counts"], []):
        assert gates.main([*arguments, "--table", str(path)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert "instructions: not counted, no valgrind on this machine" in shown
        assert "spills: not counted, no objdump for x86_64 on this machine" in shown
    assert "instructions: the former ones stay in the table" in shown
    assert json.loads(path.read_text())["instructions"] == COMMITTED


def test_a_valgrind_that_fails_says_so(monkeypatch, tmp_path):
    broken = tmp_path / "valgrind"
    broken.write_text("#!/bin/sh\necho no such tool >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(instructions, "_why_not", lambda: "")
    got = instructions.measure("typical pack")
    assert got.rows == [] and got.missing[-1] == "instructions: not counted, valgrind gave 3: no such tool"
