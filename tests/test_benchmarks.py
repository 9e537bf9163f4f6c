"""The benchmarks themselves: the quick report really runs, its answers are right, its instruments measure. Never a time."""

import ast
import io
import json
import math
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
import torch
from rich.console import Console

from benchmarks.harness import cases, environment, measure, peers, tables
from benchmarks.reports import cpu
from gear_kernels import token_stats

OUTPUTS = set(cases.OUTPUTS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(what the run returned, the folder it wrote to, what it printed)"""
    folder, printed = tmp_path_factory.mktemp("results"), io.StringIO()
    return cpu.run(cpu.QUICK, folder, Console(file=printed, width=160)), folder, printed.getvalue()


def rows_of(report, name):
    return [(s, row) for s in report["sections"] for row in s["rows"] if row["name"] == name]


def test_quick_report_has_every_table(quick):
    report, folder, printed = quick
    assert json.loads((folder / "cpu_report.json").read_text()) == report
    text = (folder / "cpu_report.md").read_text()
    wanted = {(k, d, p) for k in ("logits", "hidden") for d in ("float32", "bfloat16") for p in cases.PASSES}
    assert {(s["kind"], s["dtype"], s["passes"]) for s in report["sections"]} == wanted
    assert text.count("\n## ") == len(wanted) and "Quick self-test" in text and peers.OURS in printed
    assert (
        report["quick"] and report["threads"] == torch.get_num_threads() and set(report["versions"]) == set(environment.PACKAGES)
    )


def test_rows_are_whole(quick):
    for section in quick[0]["sections"]:
        assert section["read_gb_s"] > 0 and (section["other_load"] is None or 0 <= section["other_load"] <= 1)
        for row in section["rows"]:
            if row["failure"]:  # a peer that is not installed here, and nothing else
                assert row["failure"].startswith("not installed") and row["timing"] is None
                continue
            t = row["timing"]
            assert 0 < t["low_ms"] <= t["median_ms"] <= t["high_ms"] and row["ratio"] > 0
            grads = set() if section["passes"] == "forward" else {"grad_student", "grad_weight"}
            grads = grads - {"grad_weight"} if section["kind"] == "logits" else grads
            assert set(row["errors"]) == (set(row["gives"]) | grads if row["gives"] else set())
            assert (row["gb_s"] is None) == (section["kind"] == "hidden")


def test_ours_is_right(quick):
    """2e-6 nats in float32. From hidden states the GEMM's own rounding comes on top: there KL alone is promised that."""
    ours = rows_of(quick[0], peers.OURS)
    eager = rows_of(quick[0], "eager torch")
    assert len(ours) == len(eager) == 8
    for (section, row), (_, other) in zip(ours, eager, strict=True):
        assert set(row["errors"]) >= OUTPUTS and not row["wrong"]
        if section["dtype"] == "float32":
            promised = OUTPUTS if section["kind"] == "logits" else {"reverse_kl"}
            assert all(row["errors"][name] <= 2e-6 for name in promised)
            assert all(row["errors"][name] <= 2e-6 + 2 * other["errors"][name] for name in OUTPUTS)
            assert all(e <= 1e-5 for name, e in row["errors"].items() if name.startswith("grad"))


def test_ratios_are_to_the_row_they_name(quick):
    for section in quick[0]["sections"]:
        reference_row = next(row for row in section["rows"] if row["name"] == section["ratio_to"])
        for row in section["rows"]:
            if row["timing"]:
                assert row["ratio"] == pytest.approx(row["timing"]["median_ms"] / reference_row["timing"]["median_ms"])


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_truth_is_that_of_the_package(kind):
    """What answers are held against is the package's reference; the operators, and plain torch written apart, must agree."""
    case = cases.make_case(kind, torch.float32, 40, 97, 8)
    truth = cases.find_truth(case, chunk=16)
    student, teacher = case.student.detach().double(), case.teacher.double()
    if kind == "hidden":
        student, teacher = student @ case.weight.detach().double().T, teacher @ case.weight.detach().double().T
    operators = peers.named(token_stats(student, teacher, case.targets))
    for expected in (operators, peers.eager_stats(student, teacher, case.targets)):
        for name in cases.OUTPUTS:
            torch.testing.assert_close(truth.outputs[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_gradients_of_the_truth_are_those_of_plain_torch(kind):
    case = cases.make_case(kind, torch.float64, 20, 97, 8)
    truth = cases.find_truth(case, chunk=16)
    (eager,) = (p for p in peers.peers(kind) if p.name == peers.EAGER)
    for name in cases.OUTPUTS:
        outputs = {name: eager.load()(case)[name]}
        grads = torch.autograd.grad(case.loss(outputs), case.leaves)
        assert max(truth.errors(outputs, grads).values()) < 1e-12


def test_a_wrong_answer_is_called_wrong():
    case = cases.make_case("logits", torch.float32, 4, 50)
    truth = cases.find_truth(case)
    outputs = peers.eager_stats(case.student, case.teacher, case.targets)
    for name, broken in (("entropy", 0.01), ("reverse_kl", math.nan)):
        row = tables.Row("broken", cases.OUTPUTS, errors=truth.errors({**outputs, name: outputs[name] + broken}, None))
        assert row.wrong and row.is_wrong(name) and not row.is_wrong("logprobs")


def test_update_passes_agree():
    """Log-prob and entropy of one head, forward and backward: ours, TRL's and Liger's."""
    case = cases.make_case("hidden", torch.float32, 16, 300, 32)
    truth = cases.find_truth(case)
    for peer in (p for p in peers.UPDATE_PEERS if "cpu" in p.devices and not p.compiles):
        row, call, _ = tables.first_call(peer, case, truth, "forward+backward")
        assert not row.wrong and (call is not None or row.failure.startswith("not installed")), row


def test_a_missing_peer_is_named():
    with pytest.raises(peers.PeerMissing, match=r"pip install --no-deps no-such-package==1\.0"):
        peers._imported("no_such_module", "no-such-package", "1.0")


# the layout of verl's wheel: only the files under kernel import where there is no more than torch and triton
VERL = {
    "__init__.py": "raise ImportError('no ray here')",
    "utils/__init__.py": "raise ImportError('no omegaconf here')",
    "utils/device.py": "raise ImportError('no packaging here')",
    "utils/kernel/__init__.py": "",
    "utils/kernel/kernels.py": """
from verl.utils.device import get_device_capability, get_device_name, get_torch_device, is_cuda_available
""",
    "utils/kernel/linear_cross_entropy.py": """
def linear_cross_entropy(hidden, weight, labels, temperature, reduction):
    from . import kernels

    assert kernels.get_device_name() == "cuda" and isinstance(temperature, float) and reduction == "none"
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
""",
}


@pytest.fixture
def bare_verl(tmp_path, monkeypatch):
    """verl on the module path, without what it imports."""
    for name, text in VERL.items():
        path = tmp_path / "verl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "verl"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_verl_loads_without_what_it_imports(bare_verl):
    (peer,) = (p for p in peers.peers("hidden", "cuda") if p.name.startswith("verl"))
    case = cases.make_case("hidden", torch.float32, 5, 60, 8)
    truth = cases.find_truth(case)
    for _ in range(2):  # the second finds the stand-ins of the first
        outputs = peer.load()(case)
        assert tuple(outputs) == peer.gives and max(truth.errors(outputs, None).values()) < 1e-5


def test_rounds_take_turns_and_stop():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = measure.interleave(calls, dict.fromkeys("abc", 7.0), rounds=2)
    assert order == list("abcabc") and all(t.rounds == 2 and t.first_ms == 7.0 for t in found.values())
    assert measure.interleave(calls, dict.fromkeys("abc", 7.0), rounds=9, seconds=0)["a"].rounds == 3


PEAKS = """
import torch
from benchmarks.harness import measure

held = torch.ones(16 << 18)
for mib in (2, 48):
    def call():
        torch.ones(mib << 18)  # freed at once, or reused by the second: the peak is one of them
        return torch.ones(mib << 18)

    measure.extra_memory(call)
    # a library's thread that takes a page meanwhile adds to one of them
    print(mib, min(measure.extra_memory(call) or -1 for _ in range(3)))
assert held.sum() == 16 << 18
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's high-water mark is Linux's")
def test_extra_memory_is_exact():
    """In a process of its own: in a heap that other tests have left full of holes, a call may find two that fit."""
    ran = subprocess.run([sys.executable, "-c", PEAKS], cwd=environment.ROOT, capture_output=True, text=True, check=True)
    peaks = {int(mib): float(peak) for mib, peak in map(str.split, ran.stdout.splitlines())}
    if -1 in peaks.values():
        pytest.skip("this system does not let a process reset its peak")
    assert peaks == pytest.approx({2: 2, 48: 48}, abs=1.0)


@pytest.mark.slow
def test_compiled_peers_agree():
    for kind in ("logits", "hidden"):
        case = cases.make_case(kind, torch.float32, 16, 300, 32)
        truth = cases.find_truth(case)
        for peer in (p for p in peers.peers(kind) if p.compiles):
            row, call, _ = tables.first_call(peer, case, truth, "forward+backward")
            assert not row.wrong and (call is not None or row.failure.startswith("not installed")), row


FOLDERS = {
    "harness": 0,
    "credit_truth": 1,
    "reports": 1,
    "gpu": 1,
    "gates": 1,
    "page": 2,
    "": 3,
}  # a folder imports those of a lower number


def imports(path):
    """(file of benchmarks, name) for each name that a file imports from another, inside functions too."""
    for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level):
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            yield (base / f"{alias.name}.py" if base.is_dir() else base.with_suffix(".py")), alias.name


def test_imports_run_downwards_without_a_circle():
    folder = environment.ROOT / "benchmarks"
    found = {path: set(imports(path)) for path in folder.rglob("*.py")}
    edges = {path: {file for file, _ in names} for path, names in found.items()}
    for path, names in found.items():
        for file, name in names:
            assert file.is_file() and not name.startswith("_"), (path, file, name)
            here, there = ("" if p.parent == folder else p.parent.name for p in (path, file))
            assert here == there or FOLDERS[there] < FOLDERS[here], f"{path} imports {file}"
    tuple(TopologicalSorter(edges).static_order())  # raises on a circle
    assert sum(len(files) for files in edges.values()) > 80


def test_pytest_benchmarks_run():
    """Collected when asked for; ours, the scoring pass and the scan run once each, with right answers."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-k", "gear_kernels"]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout + done.stderr
