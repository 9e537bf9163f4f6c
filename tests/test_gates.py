"""The gates on bytes, operators, launches, synchronisations, time: open on the tree as it is, closed on planted regressions."""

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gates import figures as gates
from benchmarks.harness.environment import RESULTS
from gear_kernels import backends, tiling

COMMITTED = json.loads((RESULTS / gates.TABLE).read_text())
LOGITS = "token_stats, float32, forward"
BACKWARD = f"gpu: {LOGITS}+backward"


@pytest.fixture
def planted(monkeypatch):
    """planted(what, path) does `what(student, sums)` before every sweep of a path's back end."""

    def plant(what, path="gpu"):
        name = "triton" if path == "gpu" else "native"
        sweeping = backends.BACKENDS[name].sweep

        def sweep(student, teacher, task, sums):
            kept = what(student.z, sums)
            sweeping(student, teacher, task, sums)
            del kept

        monkeypatch.setattr(backends.BACKENDS[name], "sweep", sweep)

    return plant


def offenders(only):
    return gates.grown(gates.figures(only), COMMITTED, whole=False)


def test_the_tree_as_it_is_passes():
    rows = gates.figures()
    assert gates.grown(rows, COMMITTED) == []
    assert all(row.synchronisations == 0 for row in rows) and all(row.launches > 0 for row in rows if row.path == "gpu")
    assert rows == gates.figures("cpu: token_stats") + rows[4:], "a count is the same at every run"


@pytest.mark.parametrize("path", ["gpu", "cpu"])
def test_an_extra_buffer_of_all_logits_is_caught(planted, path):
    planted(lambda z, sums: torch.empty_like(z), path)
    lines = offenders(f"{path}: {LOGITS}")
    assert sum("peak_bytes" in line for line in lines) >= 1 and all(f"{path}: token_stats" in line for line in lines)
    grown = next(line for line in lines if line.startswith(f"{path}: {LOGITS}: peak_bytes"))
    now, before = (int(word) for word in grown.replace(",", "").split() if word.isdigit())
    rows, columns = gates.SHAPES[path]["logits"]
    assert now - before >= 0.9 * rows * columns * 4


@pytest.mark.parametrize(
    "look",
    [
        lambda z, sums: sums[0, 0, 0].item(),
        lambda z, sums: bool((sums > 0).any()),
        lambda z, sums: sums.cpu(),
        lambda z, sums: z[0][z[0] > 0],
        lambda z, sums: (z[:1] > 0).nonzero(),
        lambda z, sums: z[0, :4].tolist(),
    ],
    ids=["item", "bool", "cpu", "mask", "nonzero", "tolist"],
)
def test_a_host_synchronisation_is_caught(planted, look):
    planted(look)
    lines = [line for line in offenders(BACKWARD) if "synchronisations" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{BACKWARD}: synchronisations") and lines[0].endswith("committed 0")


def test_more_launches_and_operators_are_caught(monkeypatch):
    """Tiles of half the size: about twice the launches, from hidden states."""
    monkeypatch.setitem(tiling._LIMITS, "cuda", tiling._LIMITS["cuda"]._replace(tile=16 << 20))
    lines = offenders("gpu: linear_token_stats, bfloat16")
    assert sum("launches" in line for line in lines) == 2 and sum("operators" in line for line in lines) == 2


def test_another_torch_compares_synchronisations_alone():
    rows = [gates.Cost(**row) for row in COMMITTED["rows"]]
    other = {**COMMITTED, "torch": "0.0"}
    assert gates.grown([replace(rows[0], peak_bytes=1 << 60), *rows[1:]], other) == []
    assert len(gates.grown([replace(rows[0], synchronisations=1), *rows[1:]], other)) == 1
    assert len(gates.grown(rows[1:], COMMITTED)) == len(gates.grown(rows, {**COMMITTED, "rows": COMMITTED["rows"][1:]})) == 1


def test_shrinking_passes():
    smaller = [replace(gates.Cost(**row), peak_bytes=0, operators=0) for row in COMMITTED["rows"]]
    assert gates.grown(smaller, COMMITTED) == []
    assert gates.shrunk(smaller, {**COMMITTED, "torch": torch.__version__}) == 2 * len(smaller)


# --- time --------------------------------------------------------------------------------------------------------------------


def test_times_are_as_committed():
    assert gates.slower(COMMITTED, 2.0) == []


def test_a_sleep_in_the_operator_is_caught(planted):
    planted(lambda z, sums: time.sleep(0.05), "cpu")
    lines = gates.slower(COMMITTED, 2.0, LOGITS)
    assert len(lines) == 1 and lines[0].startswith(f"cpu: {LOGITS}: time / baseline")


def test_one_good_repeat_acquits(monkeypatch):
    found = iter([9.0, 9.0, 1.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(gates, "ratios", lambda name: {name: next(found)})
    table = {"ratios": {"a": 0.6}}
    assert gates.slower(table, 2.0) == [] and len(gates.slower(table, 2.0)) == 1 and next(found, None) is None


def test_the_command_checks_against_a_table(monkeypatch, tmp_path, capsys):
    """What is written passes, and a lower figure in the table is an offender and exit code 1. (Measured elsewhere.)"""
    rows = [gates.Cost(**row) for row in COMMITTED["rows"]]
    monkeypatch.setattr(gates, "figures", lambda: rows)
    monkeypatch.setattr(gates, "typical_ratios", lambda: COMMITTED["ratios"])
    table = tmp_path / "gates.json"
    assert gates.main(["--table", str(table)]) == 0 and json.loads(table.read_text()) == COMMITTED
    check = ["--check", "--only", "counts", "--table", str(table)]
    assert gates.main(check) == 0
    gates.write([replace(rows[0], operators=rows[0].operators - 1), *rows[1:]], COMMITTED["ratios"], table)
    assert gates.main(check) == 1 and "1 offenders" in capsys.readouterr().out
