"""The GPU report's self-test on this machine: every check passes, the files are whole, and what goes wrong is caught."""

import json
import math
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_gpu import SimulatedGpu

from benchmarks.gpu import page, report, run, speed, timing, tools, tune
from benchmarks.gpu.checks import compare, compare_gradients, correctness_items, problem
from benchmarks.gpu.run import F32, Item, Part, Phase, Setting, Skip, work
from benchmarks.harness import measure
from benchmarks.harness.cases import HEAD_SHAPE
from benchmarks.harness.credit_inputs import Pack
from benchmarks.harness.peers import OURS
from gear_kernels import backends
from gear_kernels.triton import candidates

SETTING = Setting("cpu")


def quiet(line):
    """Tells nobody."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the report, its JSON, its Markdown, what was told, the journal's lines)"""
    folder, told = tmp_path_factory.mktemp("results"), []
    with measure.one_thread():  # on tiny inputs more of them only wait for each other
        found = report.run(SETTING, report.Plan(tuple(report.PHASES), 600), folder, tell=told.append)
    (path,) = folder.glob("gpu_*.json")
    journal = [json.loads(line) for line in (folder / page.JOURNAL).read_text().splitlines()]
    return found, json.loads(path.read_text()), path.with_suffix(".md").read_text(), told, journal


def items(found, phase):
    return found["phases"][phase]["items"]


def test_self_test_passes(made):
    found, stored, text, told, journal = made
    assert report.failures(found) == [] and "No failures." in text
    assert set(stored["phases"]) == set(report.PHASES) and stored["self_test"]
    for phase, result in stored["phases"].items():
        assert result["items"] and result["missed"] == 0 and f"## {phase}" in text
        assert sum(line.startswith(f"[{phase} ") for line in told) == len(result["items"])
        assert [line["name"] for line in journal if line["phase"] == phase] == [item["name"] for item in result["items"]]


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_items_are_listed_without_touching_the_device(device):
    for phase in report.PHASES.values():
        names = [item.name for item in phase.items(Setting(device))]
        assert names and len(names) == len(set(names)) and phase.seconds > 0


def test_only_gpu_items_are_skipped(made):
    wanted = {item.name: item.gpu_only for item in correctness_items(SETTING)}
    for item in items(made[0], "correctness"):
        assert item["status"] == ("skipped" if wanted[item["name"]] else "passed"), item
        assert item["status"] == "passed" or wanted[item["name"]] in item["reason"]
    assert sum(not reason for reason in wanted.values()) > 45


def test_ours_is_timed(made):
    found = [item for phase in ("headline", "speed") for item in items(made[0], phase) if OURS in item["name"]]
    assert len(found) == 2 * speed.REPEATS + 2 + 2 + 4
    for item in found:
        figures = item["figures"]
        assert 0 < figures["low_ms"] <= figures["ms"] <= figures["high_ms"] and figures["of_roofline"] > 0
        assert figures["error"] < 1e-5 and "goal_ms" not in figures and figures["host_us"] > 0 and figures["clock"] == "wall"


def test_overheads_have_the_hosts_share(made):
    head, *found = items(made[0], "overheads")
    assert head["figures"]["tiles"] >= 1 and head["figures"]["host_us_a_tile"] * head["figures"]["tiles"] > 0
    assert len(found) == 6 and all(item["figures"]["host_us"] > 0 for item in found)
    assert all(item["figures"]["low_ms"] <= item["figures"]["ms"] for item in found)


BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys(OTHERS))
try:
    import rich
except ImportError:
    runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def test_torch_and_triton_are_enough(monkeypatch):
    """A phase in its own process; a bare GPU machine has nothing else that the package or the benchmarks know."""
    others = ("rich", "matplotlib", "pytest", "transformers", "deepspeed", "einops", "trl", "liger_kernel", "vllm", "yaml")
    program, flag, module, *options = run.command("machine", SETTING, Part())
    assert (program, flag, module) == (sys.executable, "-m", "benchmarks.gpu")
    script = BARE.replace("OTHERS", repr(others))
    monkeypatch.setattr(run, "command", lambda *_: [program, "-c", script, *options])
    found = run.run_phase("machine", report.PHASES["machine"], SETTING, 120, quiet)
    assert found["missed"] == 0 and found["items"][0]["status"] == "passed" and found["items"][0]["figures"]["torch"]


def test_goals_and_floors_beside_the_times():
    """On a GPU's report: 2 and 6 GEMMs at the measured ceiling, and the goals of docs/architecture.md."""
    flops = 2 * 2 * math.prod(HEAD_SHAPE)
    figures = {"ms": 27.0, "beside_results_mib": 400.0, "floor_flops": flops, "label": "default", "passes": "forward"}
    headline = {"items": [{"name": "ours", "status": "passed", "figures": figures}], "missed": 0}
    card = {"items": [{"name": "GEMM", "status": "passed", "figures": {"tflop_s": 790.0}}], "missed": 0}
    for _ in range(2):  # it is done after every phase
        page.with_floors({"self_test": False, "phases": {"card": card, "headline": headline}})
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


def planted(*runs, **options):
    """A phase of items named a, b, ..."""
    return Phase(lambda setting: [Item(name, run) for name, run in zip("abcdef", runs, strict=False)], 9, **options)


def boom():
    raise ValueError("planted | here")


def test_a_failing_item_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setitem(report.PHASES, "card", planted(boom, dict))
    found = report.run(SETTING, report.Plan(("machine", "card"), 60), tmp_path, tell=quiet)
    assert [item["status"] for item in items(found, "card")] == ["failed", "passed"]
    (line,) = report.failures(found)
    assert line.startswith("card: a: ValueError: planted | here")
    assert "planted / here" in next(tmp_path.glob("*.md")).read_text()


# --- R1: small calls by graph, large ones behind a filler, the host apart -------------------------------------------------------


def test_R1_a_small_kernel_is_timed_and_not_its_launch(monkeypatch):
    gpu = SimulatedGpu().install(monkeypatch, timing)
    found = timing.timed(lambda: gpu.launch(8.0, host_us=50.0), Setting("cuda"))
    assert found["ms"] == pytest.approx(0.008) and found["host_us"] == pytest.approx(50.0) and found["clock"] == "graph of 50"
    assert timing.alone_ms(lambda: gpu.launch(8.0, host_us=50.0), Setting("cuda")) == pytest.approx(0.058)


def test_R1_a_large_call_starts_behind_a_busy_device(monkeypatch):
    gpu = SimulatedGpu().install(monkeypatch, timing)

    def tiles():
        for _ in range(300):
            gpu.launch(100.0, host_us=60.0)

    assert measure.elapsed_ms(tiles, "cuda") == pytest.approx(30.0)
    found = timing.timed(tiles, Setting("cuda"))
    assert found["ms"] == pytest.approx(30.0) and found["host_us"] == pytest.approx(300 * 60.0) and found["clock"] == "filler"


def test_R1_calls_take_turns_and_one_that_cannot_be_captured_is_still_timed(monkeypatch):
    gpu, order = SimulatedGpu().install(monkeypatch, timing), []

    def copy(name):
        order.append(name)
        gpu.launch(40.0, 200.0)

    found = timing.timed([lambda n=n: copy(n) for n in "abc"], Setting("cuda"))
    graph = "".join(order[-27 - 10 :][:27])  # the capture comes last but for the ten calls of host_us
    assert graph == "abc" * 9 and found["clock"] == "graph of 27" and found["ms"] == pytest.approx(0.04)

    def stubborn():
        if gpu.captured is not None:
            gpu.captured = None
            raise RuntimeError("not while a stream is capturing")
        gpu.launch(40.0, 200.0)

    found = timing.timed(stubborn, Setting("cuda"))
    assert "not captured" in found["clock"] and found["ms"] == pytest.approx(0.04)


class OnCpu(torch.overrides.TorchFunctionMode):
    """Tensors asked for on CUDA are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def moved(value):
            return "cpu" if str(value).startswith("cuda") and isinstance(value, str | torch.device) else value

        return function(*map(moved, args), **{name: moved(value) for name, value in (kwargs or {}).items()})


class Tiny(Setting):
    """A GPU's setting with the self-test's sizes."""

    def pick(self, full, tiny):
        return tiny


@pytest.fixture(scope="module")
def tuned():
    """Of each item of blocks and scan: (phase, outcome, pairs of logits that its kernel was given, candidates that stood)."""
    found, pairs, stood = [], set(), set()

    def kernel(student, teacher, *rest):
        pairs.add((student.z, teacher.z))
        stood.update(candidates.TRIED.items())
        gpu.launch(8.0, 50.0)

    def scan(self, *rest):
        stood.update(candidates.TRIED.items())
        gpu.launch(40.0, 200.0)

    with pytest.MonkeyPatch.context() as patch, OnCpu(), measure.one_thread():
        gpu = SimulatedGpu().install(patch, timing)
        for name in tune.KERNELS:
            patch.setattr(backends.BACKENDS["reference"], name, kernel)
        patch.setattr(backends, "choose", lambda device, dtype: "reference")
        patch.setattr(Pack, "credit", scan)
        for phase in ("blocks", "scan"):
            for line in work(report.PHASES[phase].items(Tiny("cuda")), Tiny("cuda")):
                if "begin" in line:
                    pairs.clear(), stood.clear()
                else:
                    found.append((phase, line, set(pairs), set(stood)))
    return found


def test_R1_blocks_and_scans_are_timed_by_graphs(tuned):
    for phase, line, _, _ in tuned:
        assert line["status"] == "passed" and line["figures"]["clock"].startswith("graph of "), line
        assert line["figures"]["ms"] == pytest.approx({"blocks": 0.008, "scan": 0.04}[phase])
        assert line["figures"]["host_us"] == pytest.approx({"blocks": 50.0, "scan": 200.0}[phase])


# --- R4: what is tuned, in which order, on what --------------------------------------------------------------------------------


def test_R4_student_and_teacher_are_two_tensors(tuned):
    for line, pairs in ((line, pairs) for phase, line, pairs, _ in tuned if phase == "blocks"):
        ((student, teacher),) = pairs
        assert student.untyped_storage().data_ptr() != teacher.untyped_storage().data_ptr(), line["name"]
        assert (student - teacher).abs().max() > 0.1


def test_R4_every_candidate_is_tried_tiles_first():
    cuda = Setting("cuda")
    order = [phase for plan in report.PLANS.values() for phase in plan.phases]
    assert order.index("headline") < order.index("tiles") < order.index("blocks") < order.index("scan")
    tiles, blocks, scans = ([i.name for i in report.PHASES[p].items(cuda)] for p in ("tiles", "blocks", "scan"))
    for t in candidates.TILE_CANDIDATES["90"]:
        assert sum(name.startswith(f"tile {t.tile} MiB, {t.rows} rows, ") for name in tiles) == 2
    for kernel, configs in candidates.STATS_CANDIDATES["90"].items():
        assert all(f"{kernel}, tile, {c.block}/{c.num_warps}" in blocks for c in configs)
    assert all(f"scan, typical, 512 sequences, {c.block}/{c.num_warps}" in scans for c in candidates.SCAN_CANDIDATES["90"])
    places = [name.split(", ")[1] for name in blocks]
    assert places == sorted(places, key=["tile", "logits"].index)


def test_R4_candidates_stand_while_they_are_timed(tuned):
    for _, line, _, stood in tuned:
        ((kernel, config),) = stood
        kinds = line["name"].split(", ")
        assert kernel == kinds[0] and f"{config.block}/{config.num_warps}" == kinds[-1]
    assert {phase for phase, *_ in tuned} == {"blocks", "scan"} and not candidates.TRIED


def test_R4_ceilings_are_the_products_of_the_operators(monkeypatch):
    found = {(p.rows, p.inner, p.columns, p.result, p.add, p.turned) for p in speed.products()}
    tiles = ((2048, 2048), (2048, 4096), (4096, 4096), (8192, 1024), (8192, 2048))
    assert {(rows, 4096, columns, F32, False, False) for rows, columns in tiles} <= found
    assert {(8192, columns, 4096, F32, True, False) for columns in (4096, 8192)} <= found
    assert {(columns, 8192, 4096, result, False, True) for columns in (4096, 8192) for result in (F32, torch.bfloat16)} <= found
    written, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: written.append(out.data_ptr()) or real(a, b, out=out))
    speed.ceiling_items(SETTING)[0].run()
    assert len(set(written)) == 3 and all(a != b for a, b in zip(written, written[1:], strict=False))


# --- R2: smoke first, correctness side by side ---------------------------------------------------------------------------------


def test_R2_parts_are_the_whole_and_no_kind_is_last():
    found = correctness_items(Setting("cuda"))
    parts = [part for i in range(8) for part in Part(i, 8).take(found)]
    assert sorted(item.name for item in parts) == sorted(item.name for item in found)
    for kind in ("credit ", "linear ", ""):  # the last: all
        at = [i for i, item in enumerate(found) if item.name.startswith(kind)]
        assert abs(sum(at) / len(at) / len(found) - 0.5) < 0.1, kind


def test_R2_smoke_comes_first_and_ends_the_report(monkeypatch, tmp_path):
    assert all(plan.phases[:2] == ("machine", "smoke") for plan in (*report.PLANS.values(), report.DEFAULT))
    monkeypatch.setitem(report.PHASES, "smoke", planted(boom, strict=True, vital=True))
    told = []
    found = report.run(SETTING, report.Plan(("machine", "smoke", "card"), 60), tmp_path, tell=told.append)
    assert list(found["phases"]) == ["machine", "smoke"]
    whole = "\n".join(told)
    assert "Traceback (most recent call last)" in whole and 'raise ValueError("planted | here")' in whole
    assert 'raise ValueError("planted | here")' in next(tmp_path.glob("*.md")).read_text()


SCRIPT = """
import json, os, sys, time
first, of, done = map(int, sys.argv[1].split(","))
names = "abcdefgh"[first::of]
for name in names[done:]:
    print(json.dumps({"begin": name, "of": len(names), "seconds": SECONDS, "peer": name == PEER}), flush=True)
    BODY
    print(json.dumps({"name": name, "status": "passed", "seconds": 0.1, "figures": {}}), flush=True)
"""


def scripted(monkeypatch, body, seconds=20, peer=""):
    """Workers in real processes that run `body` for each of eight items a ... h, without importing torch."""
    script = SCRIPT.replace("BODY", body.replace("\n", "\n    ")).replace("SECONDS", str(seconds)).replace("PEER", repr(peer))
    part = lambda phase, setting, part: [sys.executable, "-S", "-c", script, ",".join(map(str, part))]  # noqa: E731
    monkeypatch.setattr(run, "command", part)


def run_phase(phase, seconds=60.0):
    noted = []
    found = run.run_phase("correctness", phase, replace(SETTING, device="cuda"), seconds, noted.append)
    assert sorted(i["name"] for i in noted) == sorted(i["name"] for i in found["items"])
    return found


def test_R2_correctness_runs_side_by_side(monkeypatch, tmp_path):
    """Each worker's first item waits until all four have begun."""
    assert report.PHASES["correctness"].workers == max(1, os.cpu_count() // 2)
    body = "open(os.path.join(FOLDER, str(first)), 'w').close()\nwhile len(os.listdir(FOLDER)) < 4: time.sleep(0.01)"
    scripted(monkeypatch, body.replace("FOLDER", repr(str(tmp_path))))
    found = run_phase(planted(workers=4))
    assert found["missed"] == 0 and [i["name"] for i in found["items"]] == list("abcdefgh")
    assert all(i["status"] == "passed" for i in found["items"])


def test_a_crash_costs_one_item(monkeypatch):
    scripted(monkeypatch, "if name == 'c': print('the last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)")
    found = run_phase(planted())
    assert [(i["name"], i["status"]) for i in found["items"]] == [(n, "failed" if n == "c" else "passed") for n in "abcdefgh"]
    assert "ended with -11: the last words" in found["items"][2]["reason"] and found["missed"] == 0


def test_a_hang_costs_one_item_and_a_peers_is_no_failure(monkeypatch):
    scripted(monkeypatch, "if name in 'bg': time.sleep(60)", seconds=0.4, peer="g")
    found = run_phase(planted(workers=2))
    assert {i["name"]: i["status"] for i in found["items"]} == {
        **dict.fromkeys("acdefh", "passed"),
        "b": "failed",
        "g": "skipped",
    }
    assert "not done in its 0.4 s" in found["items"][1]["reason"]


def test_the_phases_time_ends_it(monkeypatch):
    scripted(monkeypatch, "if name == 'c': time.sleep(60)")
    found = run_phase(planted(strict=True), seconds=1.0)
    assert [i["status"] for i in found["items"]] == ["passed", "passed", "failed"] and found["missed"] == 5
    late = {"phases": {"correctness": {**found, "strict": True}}}
    assert report.failures(late)[-1] == "correctness: 5 items were not reached"
    assert run_phase(planted(), seconds=1.0)["items"][-1]["status"] == "skipped"


def test_a_process_that_cannot_start_is_reported(monkeypatch):
    monkeypatch.setattr(run, "command", lambda *_: [sys.executable, "-S", "-c", "raise SystemExit('no such option')"])
    found = run_phase(planted())
    assert [i["status"] for i in found["items"]] == ["failed"] and "no such option" in found["items"][0]["reason"]


# --- R3: nothing that was measured is lost ----------------------------------------------------------------------------------


def killed():
    raise KeyboardInterrupt


def test_R3_a_killed_run_keeps_its_items(monkeypatch, tmp_path):
    monkeypatch.setitem(report.PHASES, "card", planted(lambda: {"ms": 1.5}, killed))
    with pytest.raises(KeyboardInterrupt):
        report.run(SETTING, report.Plan(("card",), 60), tmp_path, tell=quiet)
    (line,) = map(json.loads, (tmp_path / page.JOURNAL).read_text().splitlines())
    assert (line["phase"], line["name"], line["status"], line["figures"]) == ("card", "a", "passed", {"ms": 1.5})


def test_R3_files_go_to_OUT(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setitem(report.PHASES, "card", planted(dict))
    assert report.main(["--self-test", "--phases", "card"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 3 and names[-1] == page.JOURNAL and names[0].startswith("gpu_") and names[0].endswith(".json")
    monkeypatch.delenv("OUT")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert report.main(["--self-test", "--phases", "card"]) == 0 and (tmp_path / "results" / page.JOURNAL).is_file()


def test_R3_a_slow_machine_does_not_end_the_report(monkeypatch, tmp_path):
    machine = report.PHASES["machine"]
    assert machine.seconds >= 120 and not machine.vital and machine.items(SETTING)[0].seconds >= 120
    monkeypatch.setitem(report.PHASES, "machine", replace(machine, items=planted(boom).items))
    monkeypatch.setitem(report.PHASES, "card", planted(dict))
    found = report.run(SETTING, report.Plan(("machine", "card"), 60), tmp_path, tell=quiet)
    assert [items(found, phase)[0]["status"] for phase in ("machine", "card")] == ["failed", "passed"]
    assert (tmp_path / f"gpu_unknown_{found['date'][:10]}.json").is_file()


def test_R3_a_budget_is_cut_by_the_phases_shares():
    for plan in (*report.PLANS.values(), report.DEFAULT):
        assert plan.budget <= 540 and set(plan.phases) <= set(report.PHASES)
        left, spent = plan.budget - 60, 0.0  # less what machine and smoke take
        for i in range(2, len(plan.phases)):
            seconds = report.shares(plan.phases[i:], left - spent)
            assert seconds >= 0.8 * report.PHASES[plan.phases[i]].seconds
            spent += seconds
        assert spent == pytest.approx(left)
    half = report.shares(("card", "headline"), 10.0)
    assert half == pytest.approx(10 * report.PHASES["card"].seconds / sum(report.PHASES[p].seconds for p in ("card", "headline")))
    assert report.shares(("machine", "card"), 500.0) == 120


def test_R2_tritons_cache_is_kept_and_used(monkeypatch, tmp_path):
    there, here, file = tmp_path / "there", tmp_path / "here", tmp_path / report.CACHE
    (there / "key").mkdir(parents=True)
    (there / "key" / "k.cubin").write_bytes(b"code")
    (there / "key" / "__grp__k.json").write_text(json.dumps({"child_paths": {"k.cubin": str(there / "key" / "k.cubin")}}))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    report.keep_cache(file)
    assert tarfile.is_tarfile(file)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here))
    report.use_cache(file)
    (path,) = json.loads((here / "key" / "__grp__k.json").read_text())["child_paths"].values()
    assert Path(path) == here / "key" / "k.cubin" and Path(path).read_bytes() == b"code"


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        report.main(["--output", str(tmp_path)])
    assert end.value.code == 2 and "--self-test" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- NVIDIA's tools -------------------------------------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 7
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","lts__t_bytes.sum"
"","","byte","byte","ns","byte"
"0","_sweep_kernel","1,048,576","0","9000","33554432"
"1","_sweep_kernel","3145728","2097152","7000","33554432"
"""


def test_counters_of_ncu():
    found = tools.counted(NCU)
    assert found == {"launches": 2, "us": 8.0, "dram_read_mib": 2.0, "dram_written_mib": 1.0, "l2_mib": 32.0}
    with pytest.raises(Skip, match="counted nothing"):
        tools.counted("==WARNING== No kernels were profiled.")


def test_a_missing_tool_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "_FOLDERS", (str(tmp_path),))
    with pytest.raises(Skip, match="ncu is not installed"):
        tools._counters("_sweep_kernel")
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\necho '========= Device not supported. Please refer to the list'")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    with pytest.raises(Skip, match="compute-sanitizer: .* Device not supported"):
        tools._memcheck()


def test_what_the_tools_watch_runs():
    tools.main("small", "cpu")
