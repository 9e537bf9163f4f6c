"""The GPU report's self-test on this machine: every check passes, the files are whole, and what goes wrong is caught."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_report as report
from benchmarks.gpu_checks import correctness_items
from benchmarks.gpu_compare import compare, compare_gradients, problem
from benchmarks.gpu_items import Item, Setting
from benchmarks.peers import OURS
from benchmarks.projections import HEAD_SHAPE

SETTING = Setting("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the report, its JSON, its Markdown, what was told)"""
    folder, told = tmp_path_factory.mktemp("results"), []
    found = report.run(SETTING, tuple(report.PHASES), folder, told.append)
    (path,) = folder.glob("gpu_*.json")
    return found, json.loads(path.read_text()), path.with_suffix(".md").read_text(), told


def items(found, phase):
    return found["phases"][phase]["items"]


def test_self_test_passes(made):
    found, stored, text, told = made
    assert report.failures(found) == [] and "No failures." in text
    assert set(stored["phases"]) == set(report.PHASES) and stored["self_test"]
    for phase, result in stored["phases"].items():
        assert result["items"] and result["missed"] == 0 and f"## {phase}" in text
        assert sum(line.startswith(f"[{phase} ") for line in told) == len(result["items"])


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_items_are_listed_without_touching_the_device(device):
    for make, seconds in report.PHASES.values():
        names = [item.name for item in make(Setting(device))]
        assert names and len(names) == len(set(names)) and seconds > 0
    assert sum(report.PHASES[name][1] for name in report._DEFAULT_PHASES) < 540


def test_only_gpu_items_are_skipped(made):
    wanted = {item.name: item.gpu_only for item in correctness_items(SETTING)}
    for item in items(made[0], "correctness"):
        assert item["status"] == ("skipped" if wanted[item["name"]] else "passed"), item
        assert item["status"] == "passed" or wanted[item["name"]] in item["reason"]
    assert sum(not reason for reason in wanted.values()) > 45


def test_ours_is_timed(made):
    ours = [item for item in items(made[0], "speed") if OURS in item["name"]]
    assert len(ours) == 8
    for item in ours:
        figures = item["figures"]
        assert 0 < figures["low_ms"] <= figures["ms"] <= figures["high_ms"] and figures["of_roofline"] > 0
        assert figures["error"] < 1e-5 and "goal_ms" not in figures


def test_overheads_have_the_hosts_share(made):
    found = items(made[0], "overheads")
    assert len(found) == 6 and all(item["figures"]["host_us"] > 0 for item in found)
    assert all(item["figures"]["low_ms"] <= item["figures"]["ms"] for item in found)


@pytest.mark.parametrize(("module", "enough"), [("gpu_report", True), ("credit_report", False)])
def test_torch_and_triton_are_enough(module, enough):
    """A bare GPU machine has nothing else that the package or the benchmarks know. (Another report does need rich.)"""
    others = ("rich", "matplotlib", "pytest", "transformers", "deepspeed", "einops", "trl", "liger_kernel", "vllm", "yaml")
    script = f"import sys; sys.modules.update(dict.fromkeys({others})); import benchmarks.{module}"
    done = subprocess.run([sys.executable, "-c", script], cwd=report.ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == enough, done.stderr
    assert enough or "No module named 'rich" in done.stderr


def test_goals_and_floors_beside_the_times():
    """On a GPU's report: 2 and 6 GEMMs at the measured ceiling, and the goals of DESIGN.md."""
    flops = 2 * 2 * math.prod(HEAD_SHAPE)
    figures = {"ms": 27.0, "beside_results_mib": 400.0, "floor_flops": flops, "label": "default"}
    speed = {"items": [{"name": "hidden bfloat16, ours, default, forward", "status": "passed", "figures": figures}], "missed": 0}
    ceilings = {"items": [{"name": "GEMM", "status": "passed", "figures": {"tflop_s": 790.0}}], "missed": 0}
    report.with_floors({"self_test": False, "phases": {"ceilings": ceilings, "speed": speed}})
    assert figures["floor_ms"] == pytest.approx(25.8, abs=0.05) and figures["of_roofline"] == pytest.approx(0.956, abs=1e-3)
    assert figures["goal_met"] and not figures["memory_met"] and figures["goal_ms"] == 28.5


def test_wrong_values_are_caught():
    given = problem(SETTING, 4, 50)
    want, got = given.exact(), given.run()
    assert compare(got, want) < 2e-6
    for broken in (1e-4, math.nan, math.inf):
        wrong = got["entropy"].clone()
        wrong[3] += broken
        with pytest.raises(AssertionError, match="entropy: 1 of 4 wrong"):
            compare({**got, "entropy": wrong}, want)


def test_wrong_gradients_are_caught():
    right = torch.randn(3, 5, dtype=torch.float64)
    assert compare_gradients([right.float()], [right], torch.float32) < 1e-6
    for broken in (1e-3, math.nan):
        wrong = right.clone()
        wrong[1, 1] += broken
        with pytest.raises(AssertionError, match="gradient 0"):
            compare_gradients([wrong.float()], [right], torch.float32)


def test_a_failing_item_is_a_line(monkeypatch, tmp_path):
    def boom():
        raise ValueError("planted | here")

    monkeypatch.setitem(report.PHASES, "ceilings", (lambda setting: [Item("bad", boom), Item("good", dict)], 9))
    found = report.run(SETTING, ("machine", "ceilings"), tmp_path, lambda line: None)
    assert [item["status"] for item in items(found, "ceilings")] == ["failed", "passed"]
    (line,) = report.failures(found)
    assert line.startswith("ceilings: bad: ValueError: planted | here (gpu_report.py:")
    assert "planted / here" in next(tmp_path.glob("*.md")).read_text()


# --- processes -----------------------------------------------------------------------------------------------------------


def test_a_phase_in_its_own_process():
    found = report.run_phase("machine", SETTING, 120, lambda line: None)
    assert found["missed"] == 0 and found["items"][0]["status"] == "passed" and found["items"][0]["figures"]["torch"]


def test_a_process_that_cannot_start_is_reported(monkeypatch):
    monkeypatch.setattr(report, "_worker_options", lambda setting: ["--no-such-option"])
    found = report.run_phase("machine", SETTING, 120, lambda line: None)
    assert [i["status"] for i in found["items"]] == ["failed"] and "no-such-option" in found["items"][0]["reason"]


def test_the_time_budget_ends_a_phase():
    found = report.run_phase("correctness", SETTING, 0.2, lambda line: None)
    assert report.failures({"phases": {"correctness": found}}) == ["correctness: correctness: nothing ran in 0 s"]


def scripted(lines, codes):
    """`_process` by script: for each start, the lines of the process and its exit code."""

    def process(phase, setting, start, deadline, errors):
        errors.write("the last words")
        return (lambda: codes[start]), iter(lines[start])

    return process


def test_a_crash_costs_one_item(monkeypatch):
    def began(name):
        return {"begin": name, "of": 3}

    def passed(name):
        return {"name": name, "status": "passed", "seconds": 0.1, "figures": {}}

    lines = {0: [began("a"), passed("a"), began("b")], 2: [began("c"), passed("c")]}
    monkeypatch.setattr(report, "_process", scripted(lines, {0: -11, 2: 0}))
    found = report.run_phase("correctness", replace(SETTING, device="cuda"), 60, lambda line: None)
    assert [(i["name"], i["status"]) for i in found["items"]] == [("a", "passed"), ("b", "failed"), ("c", "passed")]
    assert "ended with -11: the last words" in found["items"][1]["reason"] and found["missed"] == 0


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = report.run(Setting("cuda"), ("machine", "ceilings"), tmp_path, lambda line: None)
    assert not list(tmp_path.iterdir()) and list(found["phases"]) == ["machine"] and "--self-test" in report.failures(found)[0]
