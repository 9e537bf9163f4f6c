"""The performance page is what the JSON gives, its models are right, and the scaling benchmark really runs. Never a time."""

import dataclasses
import io
import json
import re
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.harness.environment import RESULTS
from benchmarks.harness.peers import EAGER, OURS
from benchmarks.page import performance_page, plots
from benchmarks.reports import demo, few_rows, projections, scaling, sparse_backward, sparse_training
from gear_kernels import tiling

ROOT = Path(__file__).parents[1]
COMPILED = json.loads((RESULTS / "compile_report.json").read_text())
PAGES = ("README.md", "docs/operators.md", "docs/credit.md", "docs/performance.md")


def test_the_page_is_up_to_date():
    assert performance_page.check() == []


def test_a_changed_page_and_a_missing_picture_are_found(tmp_path):
    changed = tmp_path / "performance.md"
    changed.write_text(performance_page.PAGE.read_text().replace("met", "surpassed", 1))
    lines = performance_page.check(changed, tmp_path)
    assert any("surpassed" in line for line in lines) and any("no such picture" in line for line in lines)


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_resolve(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"benchmarks/results/[\w.-]+\w", text):
        assert (ROOT / path).exists(), path


def test_quicker_peers_are_all_on_the_page():
    text = performance_page.PAGE.read_text()
    for section in json.loads((RESULTS / "cpu_report.json").read_text())["sections"]:
        rows = performance_page.timed(section)
        for row in rows.values():
            if row["gives"] and row["timing"]["median_ms"] < rows[OURS]["timing"]["median_ms"]:
                assert f"| {performance_page.heading(section)} | {row['name']} |" in text


def test_limits_that_do_not_hold_are_called_missed():
    assert performance_page.held("1x", True) == "1x, met" and "**missed**" in performance_page.held("1x", False)
    assert "busy" in performance_page.load_note([0.01, 0.3]) and "busy" not in performance_page.load_note([0.01, None])


def test_a_gpus_report_goes_on_the_page():
    figures = {"ms": 27.5, "goal_ms": 28.5, "goal_met": True, "of_roofline": 0.94, "beside_results_mib": 280.0, "error": 1e-6}
    speed = [{"name": "hidden, ours", "figures": figures}, {"name": "a peer", "status": "skipped", "reason": "not installed"}]
    machine = {"device": "H", "torch": "2.11", "triton": "3.6", "commit": "abc"}
    phases = {"machine": {"items": [{"figures": machine}]}, "speed": {"items": speed}}
    text = "\n".join(performance_page.gpus({"gpu_h.json": {"date": "2026-01-01T", "phases": phases}}, COMPILED))
    assert "| 27.5 ms, met |" in text and "| hidden, ours | 27.5 | 94% | 280 | 1.0e-06 |" in text and "not installed" in text
    assert "results/gpu_h.json" in text and "Nothing on this page" not in text
    assert "Nothing on this page was measured on a GPU" in "\n".join(performance_page.gpus({}, COMPILED))


# --- models --------------------------------------------------------------------------------------------------------------------


def test_the_head_on_one_gpu_is_the_designs_floor():
    assert projections.head_ms(1, "forward")["products"] == pytest.approx(25.8, abs=0.05)
    assert projections.head_ms(1, "forward+backward")["products"] == pytest.approx(77.4, abs=0.05)
    assert (
        projections.head_ms(1, "forward+backward")["all_gather"] == projections.head_ms(1, "forward+backward")["all_reduce"] == 0
    )


def test_the_head_on_eight_gpus_by_hand():
    gpu = projections.Gpu(flops=1e6, memory=1.0, link=1e3)
    found = projections.head_ms(8, "forward+backward", (10, 80, 5), gpu)
    assert found["products"] == pytest.approx(6 * 2 * 10 * 80 * 5 / 8 / 1e6 * 1e3)  # 6 ms
    assert found["all_gather"] == pytest.approx(7 * 121 * 8)  # seven ranks' 10 x 12 sums and a size, 8 bytes, at a byte a ms
    assert found["all_reduce"] == pytest.approx(2 * 7 / 8 * 10 * 5 * 4)
    assert projections.head_ms(8, "forward", (10, 80, 5), gpu)["all_reduce"] == 0


def test_qwen3_8b_has_its_size():
    model = projections.Model()
    assert model.bytes / 2 == pytest.approx(8.19e9, rel=1e-3)  # its model card: 8.2 B
    assert model.weights == 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    assert model.cache == 147456


def test_a_step_by_hand():
    model = projections.Model(layers=1, width=2, heads_width=2, cache_width=1, inner=3, vocabulary=10)
    assert model.weights == 2 * 4 + 2 * 2 + 18 and model.bytes == 2 * (30 + 40) and model.cache == 4
    assert model.body(4) == 2 * 30 * 4 + 2 * 2 * 4 * 4 and model.head(3) == 120
    step = projections.Step(trajectories=6, prompt=1, response=3, hint=2, taught=0.5, gpus=2)
    gpu = projections.Gpu(flops=10.0, memory=10.0, link=10.0)
    grpo, gear = (projections.step_seconds(m, step, model, gpu) for m in ("grpo", "gear"))
    assert grpo["score"] == pytest.approx(3 * 0.5 * (304 + 120) / 10) and grpo["teacher"] == 0
    assert gear["score"] == pytest.approx(3 * (304 + 120) / 10)
    assert gear["teacher"] == pytest.approx(3 * 0.5 * (2 * 30 * 6 + 2 * 2 * 36 + 120) / 10)
    assert grpo["update"] == pytest.approx(3 * 0.5 * 4 * (304 + 120) / 10)
    assert grpo["rollout"] == pytest.approx(3 * (140 + 3 * 4 * 2.5) / 10)
    assert grpo["push"] == pytest.approx(70 / 10 + 140 / 10)
    assert grpo["credit"] == pytest.approx(3 * 3 * 33 / 10)
    assert all(gear[k] == grpo[k] for k in grpo.keys() - {"score", "teacher"})


def test_the_committed_models_are_these():
    committed = json.loads((RESULTS / scaling.FILE).read_text())
    assert committed["model"] == json.loads(json.dumps(projections.everything())) and not committed["quick"]


# --- the sparse backward -------------------------------------------------------------------------------------------------------


def test_quick_sparse_report_is_told_and_drawn(tmp_path):
    """Every error lies under its bound, but for float32; times stay where only errors are measured anew."""
    found = sparse_backward.run(tmp_path, sparse_backward.QUICK, tmp_path, errors_only=False, compiled=False)
    for point in found["curves"][0]["points"]:
        assert max(point["errors"]) <= point["bound"] + 1e-4 and point["bound"] <= point["tolerance"]
    names = [row["name"] for row in found["times"]["races"][0]["rows"]]
    assert names == [sparse_backward.EXACT, sparse_backward.SPARSE, sparse_backward.COARSE, "eager torch"]
    again = sparse_backward.run(tmp_path, sparse_backward.QUICK, tmp_path, errors_only=True, compiled=False)
    assert again["times"] == found["times"]
    text = "\n".join(performance_page.sparse(again))
    assert all(name in text for name in names) and "(plots/sparse_backward.png)" in text
    committed = json.loads((RESULTS / sparse_backward.FILE).read_text())
    assert [path.name for path in plots.draw_sparse(committed, tmp_path)] == ["sparse_backward.png"]


def test_training_with_either_backward_is_told_and_drawn(tmp_path, monkeypatch):
    """Made-up runs of one step: the page has each line's seeds, and the head's share of the timed update."""
    for model, backward, seed in product(sparse_training.MODELS, sparse_training.BACKWARDS, (0, 1)):
        step = {"step": 1, "policy_tokens": 9, "zero_advantage": 0.5, "held_out_success": 0.75 + seed / 8}
        step |= {"seconds": dict.fromkeys(demo.PHASES, 1.0) | {"step": 5.0}}
        step |= {"head_kept": 0.25, "head_bound": 0.001} if backward == "sparse" else {}
        folder = tmp_path / sparse_training.folder_of(model, backward, seed)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 0, "held_out_success": 0.5}\n' + json.dumps(step) + "\n")
    timing = dict.fromkeys(("backbone", *sparse_training.BACKWARDS), {"median_ms": 100.0})
    made = {"tokens": 9, "shape": [50, 4], "other_load": 0.0, **timing}
    monkeypatch.setattr(sparse_training, "parts", lambda run: made)  # of a real run: test_end_to_end.py
    found = sparse_training.run([0, 1], tmp_path, tmp_path, Console(file=io.StringIO(), width=160), read=True)
    assert json.loads((tmp_path / sparse_training.FILE).read_text()) == found
    text = "\n".join(performance_page.trained(tmp_path))
    assert "| SmolLM2-135M | sparse | 0.625, 0.688 | 0.750, 0.875 | 25.0% | 1.0e-03 | 100 of 200 ms |" in text
    assert "| the demo | exact | 0.625, 0.688 | 0.750, 0.875 | 100.0% | 0.0e+00 | 100 of 200 ms |" in text
    (drawn,) = plots.draw_sparse_training(found, tmp_path)
    assert drawn.stat().st_size > 5000 and "(plots/sparse_training.png)" in text


# --- few rows ------------------------------------------------------------------------------------------------------------------


def test_quick_few_rows_report_counts_products_and_is_told(tmp_path):
    """Ours with the logits held makes as many products as eager torch, which keeps them; every answer is right."""
    assert "not measured yet" in performance_page.few(tmp_path)[0]
    found = few_rows.run(few_rows.QUICK, tmp_path, compiled=False)
    for one in found["races"]:
        made = {row["name"]: row["products"] for row in one["rows"]}
        both = "reverse_kl" in one["gives"]
        assert made[performance_page.OURS] == (6 if both else 4) and made[few_rows.HELD] == (4 if both else 3)
        assert not both or made["eager torch"] == 4
        assert all(error < 0.1 for row in one["rows"] for error in row["errors"].values() if row["name"].startswith("gear"))
    text = "\n".join(performance_page.few(tmp_path))
    assert text.count(few_rows.HELD) == len(found["races"]) == 8


# --- scaling -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a quick run gives, and its folder: a point each way, two processes."""
    folder = tmp_path_factory.mktemp("scaling")
    return scaling.run(scaling.QUICK, scaling.PARTS, folder, Console(file=io.StringIO(), width=160)), folder


def test_quick_scaling_has_every_point(quick):
    found, folder = quick
    assert json.loads((folder / scaling.FILE).read_text()) == found and found["quick"]
    assert len(found["points"]["points"]) == len(scaling.QUICK.shapes()) * 2
    for axis in range(3):
        assert len(scaling.series(found["points"], axis, "forward")) == 2
    for one in found["points"]["points"]:
        assert set(one["rows"]) == {OURS, EAGER, scaling.GEMMS}
        assert all(0 < r["low_ms"] <= r["median_ms"] <= r["high_ms"] for r in one["rows"].values())
    assert set(found["ranks"]["processes"]["2"]) == {"forward", "forward+backward", "barrier", "all_gather", "all_reduce"}
    drawn = plots.draw(found, folder)
    assert [path.stem for path in drawn] == ["scaling_time", "scaling_memory", "ranks"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_a_part_alone_keeps_the_others(quick, tmp_path):
    found, folder = quick
    (tmp_path / scaling.FILE).write_text((folder / scaling.FILE).read_text())
    again = scaling.run(scaling.QUICK, ("model",), tmp_path, Console(file=io.StringIO()))
    assert again == found


def test_shapes_vary_one_size_at_a_time():
    plan = scaling.Sizes()
    assert plan.base in plan.shapes() and len(plan.shapes()) == len(plan.rows) + len(plan.columns) + len(plan.widths) - 2
    assert all(sum(a != b for a, b in zip(shape, plan.base, strict=True)) <= 1 for shape in plan.shapes())
    assert all(plan.ranks_shape[1] % count == 0 for count in plan.processes)
    assert dataclasses.replace(plan, rows=(64,)).shapes().count(plan.base) == 1


def test_nothing_is_drawn_of_parts_that_are_missing(tmp_path):
    assert plots.draw({"model": projections.everything()}, tmp_path) == []


# --- the demo ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path):
    """A folder of two seeds of both methods, two steps each: GEAR scores for 3 s and more, GRPO for 2."""
    for method, score in (("gear", 3.0), ("grpo", 2.0)):
        for seed in (0, 1):
            lines = [{"step": 0, "held_out_success": 0.5}]
            for i in (1, 2):
                seconds = dict.fromkeys(demo.PHASES, 1.0) | {"score": score + i + 10 * seed, "step": 9.0 + i, "eval": 1.0}
                lines.append({"step": i, "policy_tokens": 10 * i, "zero_advantage": 0.5, "seconds": seconds})
            lines[-1]["held_out_success"] = 0.75
            folder = tmp_path / f"{method}-{seed}"
            folder.mkdir()
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_runs_become_medians_and_pictures(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "scoring", lambda run: {"of": run.name})  # of a real run: test_end_to_end.py
    found = demo.run([0, 1], made_up, tmp_path, Console(file=io.StringIO(), width=160), read=True)
    assert json.loads((tmp_path / demo.FILE).read_text()) == found and found["other_load"] is None
    first = next(run for run in found["runs"] if (run["method"], run["seed"]) == ("gear", 0))
    assert first["seconds"] == dict.fromkeys(demo.PHASES, 1.0) | {"score": 4.5}
    assert found["split"] == {"of": "gear-0"}
    assert first["step"] == 9.5 and first["policy_tokens"] == 15 and first["steps"] == 2  # without the evaluation
    assert first["held_out"] == {"0": 0.5, "2": 0.75}
    assert demo.typical(found["runs"], "gear")["seconds"]["score"] == 9.5  # of 4.5 and 14.5
    drawn = plots.draw_demo(found, tmp_path)
    assert [path.stem for path in drawn] == ["demo", "step_phases"] and all(path.stat().st_size > 5000 for path in drawn)


def test_a_run_without_steps_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "held_out_success": 0.5}\n')
    with pytest.raises(SystemExit, match="no step with seconds by phase"):
        demo.summary(path)


# --- numbers in the documents --------------------------------------------------------------------------------------------------

MEASURED = re.compile(r"\b\d[\d,.]*\s?(?:ms|us|µs|s|seconds|minutes|hours|x|times|%|[KMG]i?B|[GM]B/s|TFLOP/s|tokens/s)(?![\w-])")
# what is set, promised or derived, and checked elsewhere: document, the words around it
SETTINGS = (
    ("docs/operators.md", "24 MiB on a CPU, 160 MiB on a GPU"),  # tests/test_stats.py, and below
    ("docs/credit.md", "timeout · (1 + max_retries) + 10 s"),  # gear_trainer/hints/endpoint.py
    ("docs/credit.md", "the top 20 % entropies"),  # methods.HighEntropy
)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "docs/performance.md"])
def test_measured_numbers_are_written_by_the_script(name):
    """None by hand in the documents, and nothing of the script's own in the README is changed by hand (test above)."""
    text = (ROOT / name).read_text()
    if performance_page.BEGIN in text:
        text = text.split(performance_page.BEGIN)[0] + text.split(performance_page.END)[1]
    for document, words in SETTINGS:
        if document == name:
            assert words in text
            text = text.replace(words, "")
    assert MEASURED.findall(text) == []


def test_the_documents_name_the_workspace_that_is():
    cpu, gpu = (tiling._LIMITS[device].workspace >> 20 for device in ("cpu", "cuda"))
    assert f"{cpu} MiB on a CPU, {gpu} MiB on a GPU" in (ROOT / "docs/operators.md").read_text()
