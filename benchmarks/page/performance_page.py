"""docs/performance.md and its pictures from the JSON files of benchmarks/results: `python -m benchmarks.page [--check]`.

No number on the page is written by hand but the limits below; the README's figures between its two `figures` comments are
written too. --check writes nothing and fails where either is another, or a picture is missing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import statistics
from pathlib import Path

from ..gpu.page import GOALS
from ..harness.cases import HEAD_SHAPE, PASSES
from ..harness.environment import PLOTS, RESULTS, ROOT
from ..harness.peers import EAGER, OURS
from ..harness.tables import markdown_table
from ..reports import demo, few_rows, sparse_backward, sparse_training, step_beside_trl
from ..reports.credit import LOOP, TYPICAL
from ..reports.scaling import AXES, FILE, GEMMS, series
from .plots import draw, draw_demo, draw_sparse, draw_sparse_training

PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: by python -m benchmarks.page -->\n", "<!-- /figures -->"
# what a measurement is held to; the goals of docs/architecture.md (Goals on a GPU) are higher
LIMITS = {"torch.compile": 2.5, EAGER: 12.0, "bandwidth": 0.8, "scan_ms": 15.0, "loop": 100.0, "hostile": 5.0}
BUSY = 0.05  # other load above which times mean little (tables.LEGEND)


def held(text: str, fine: bool) -> str:
    """A figure beside whether its limit holds."""
    return f"{text}, {'met' if fine else '**missed**'}"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines of a table, with an empty one after it."""
    return [*markdown_table(heads, rows), ""]


def origin(found: dict) -> str:
    """Where and when a file's figures were taken."""
    versions = f"torch {found['versions']['torch']}"
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    return f"{found['cpu']}, {threads}, {versions}, commit {found['commit']}, {found['date'][:10]}"


def load_note(shares: list[float | None]) -> str:
    """The share that other processes took, in words; a busy machine is called one."""
    known = [s for s in shares if s is not None]
    if not known:
        return "The system does not tell how busy the machine was."
    busy = " **The machine was busy: measure again.**" if max(known) > BUSY else ""
    return f"Other processes took at most {max(known):.1%} of the processors' time.{busy}"


# --- the operators on a CPU ----------------------------------------------------------------------------------------------------


def timed(section: dict) -> dict[str, dict]:
    """The rows of a section that have times, by name."""
    return {row["name"]: row for row in section["rows"] if row["timing"]}


def heading(section: dict) -> str:
    """A section's table, in a cell's length."""
    shape = ", ".join(f"{a} = {b}" for a, b in zip(AXES, section["shape"], strict=False))
    return f"{section['kind']}, {shape}, {section['dtype']}, {section['passes']}"


def logits(report: dict) -> list[str]:
    """Logits given: each ratio beside its limit."""
    rows = []
    for section in (s for s in report["sections"] if s["kind"] == "logits"):
        found = timed(section)
        ours = found[OURS]["timing"]["median_ms"]
        cells = [heading(section).removeprefix("logits, "), f"{ours:.3g} ms"]
        for peer in ("torch.compile", EAGER):
            ratio = found[peer]["timing"]["median_ms"] / ours if peer in found else None
            cells.append("not run" if ratio is None else held(f"{ratio:.2f}x", ratio >= LIMITS[peer]))
        share = found[OURS]["bandwidth_share"]
        cells += [
            held(f"{share:.1%} of {section['read_gb_s']:.0f} GB/s", share >= LIMITS["bandwidth"]),
            f"{found[OURS]['extra_mib']:.1f} MiB",
        ]
        rows.append(cells)
    limits = (f"torch.compile (limit {LIMITS['torch.compile']}x)", f"eager torch (limit {LIMITS[EAGER]:.0f}x)")
    heads = ["", OURS, *limits, f"of the read bandwidth (limit {LIMITS['bandwidth']:.0%})", "extra memory"]
    text = (
        "The share counts what must move, 2 tensors of [N, V] forward and 5 with backward, over the bandwidth of plain reads in "
        "the same run. The limit was set for float32 forward, a pure read; bfloat16 halves the bytes and not the arithmetic, and "
        "a backward writes too: their misses are shown all the same. The bandwidth that a virtual machine gets changes between "
        "tables, the pass' own time much less."
    )
    return ["### Logits given", "", text, "", *table(heads, rows)]


def hidden(report: dict) -> list[str]:
    """From hidden states: beside the GEMMs alone, in float32 and, where there is one, in the inputs' dtype."""
    rows = []
    for section in (s for s in report["sections"] if s["kind"] == "hidden"):
        found = timed(section)
        ours = found[OURS]
        cells = [heading(section).removeprefix("hidden, "), f"{ours['timing']['median_ms']:.4g} ms"]
        cells += [f"{found[section['ratio_to']]['timing']['median_ms']:.4g} ms", f"{ours['ratio']:.2f}"]
        peers = (EAGER, "torch.compile", "TRL 1.16")
        cells += [f"{found[p]['timing']['median_ms']:.4g} ms" if p in found else "not run" for p in peers]
        memory = [found[p]["extra_mib"] for p in (OURS, EAGER) if p in found]
        rows.append([*cells, " / ".join(f"{m:.0f}" for m in memory)])
    heads = [
        "",
        OURS,
        "limit: float32 GEMMs alone",
        "ours / limit",
        EAGER,
        "torch.compile",
        "TRL 1.16",
        "extra MiB, ours / eager",
    ]
    text = (
        "The GEMMs alone write into buffers that exist; with backward they are six. Below 1 is possible: tiles that stay in the "
        "cache serve the product too. Peers with bfloat16 logits are wrong there; the next table says by how much."
    )
    return ["### From hidden states", "", text, "", *table(heads, rows)]


def slower(report: dict) -> list[str]:
    """All rows of all tables that take less time than ours, with what they give and what is wrong about it."""
    rows = []
    for section in report["sections"]:
        found = timed(section)
        ours = found[OURS]["timing"]["median_ms"]
        quicker = [r for r in found.values() if r["gives"] and r["timing"]["median_ms"] < ours]
        rows += [[heading(section), r["name"], f"{r['timing']['median_ms'] / ours:.2f}", *_answer(r)] for r in quicker]
    text = (
        f"Every peer that takes less time than {OURS} in any table of the CPU report; the ratio is its time over ours. For few "
        "rows eager torch and torch.compile keep all logits for the backward and make four products where the default workspace "
        "makes six; a peer that gives log-prob alone has no teacher to multiply, and makes three where it keeps them; and "
        "bfloat16 products with bfloat16 results are quicker, and off by the error shown. A `workspace_bytes` that holds the "
        "logits too makes four, and three for log-probs alone, as they do ([operators.md](operators.md#numbers))."
    )
    heads = ["table", "peer", "its time / ours", "gives", "largest error, nats"]
    return ["## What is not faster than the peers", "", text, "", *table(heads, rows)]


def few(results: Path) -> list[str]:
    """Products and times of few rows, ours with the logits held too; where they have been measured."""
    text = "Forward and backward of few rows, with logits held and without: `python -m benchmarks.reports.few_rows`"
    if not (results / few_rows.FILE).is_file():
        return [f"{text}; not measured yet.", ""]
    found, rows = _read(results, few_rows.FILE), []
    for one in found["races"]:
        ours = next(row for row in one["rows"] if row["name"] == OURS)["timing"]["median_ms"]
        case = f"{', '.join(one['gives'])}, N = {one['shape'][0]}, {one['dtype']}"
        for row in one["rows"]:
            ms = row["timing"]["median_ms"]
            error = _largest_error(row, one["gives"])
            rows.append([case, row["name"], str(row["products"] or "-"), f"{ms:.4g} ms", f"{ms / ours:.2f}", f"{error:.1e}"])
    lines = [f"{text}: {origin(found)}. {load_note([found['other_load']])}", ""]
    lines += [
        "For bfloat16 inputs the peers hold logits rounded to bfloat16, half of the bytes; the last column is what that costs.",
        "",
    ]
    return lines + table(["", "", "products", "median", "time / ours", "largest error, nats"], rows)


def _answer(row: dict) -> list[str]:
    return [", ".join(row["gives"]), f"{_largest_error(row, row['gives']):.1e}" + (", **wrong**" if row["wrong"] else "")]


def _largest_error(row: dict, gives: list[str]) -> float:
    return max(float(row["errors"][name]) for name in gives)


# --- the sparse backward -------------------------------------------------------------------------------------------------------


def sparse(found: dict) -> list[str]:
    """Errors beside the bound that was proved, and beside bfloat16's; times where they were measured."""
    temperatures = ", ".join(str(one["temperature"]) for one in found["curves"])
    shape = f"V, D = {', '.join(map(str, found['shape']))}"
    text = (
        f"`python -m benchmarks.reports.sparse_backward`: {origin(found)}. The backward of log-probs of {found['rows']} tokens "
        f"of GSM8K under SmolLM2-135M ({shape}) at temperatures {temperatures}, targets sampled from the model, against float64. "
        "The bound is what the call proved of both gradients. The last columns are what rounding d loss / d logits to bfloat16 "
        "does, which every bfloat16 backward does at least, and what cut-cross-entropy's rule on a GPU does: to leave out, and "
        "to put nothing in their place, columns whose probabilities are below 2^-12 in a whole block of 128 rows."
    )
    rows = []
    for one in found["curves"]:
        for p in (p for p in one["points"] if p["tolerance"] in _SHOWN):
            cells = [f"{one['entropy']:.2f} nats", f"{p['tolerance']:.1e}", f"{p['bound']:.1e}", f"{p['kept']:.1%}"]
            rows.append([*cells, *(f"{x:.1e}" for x in (*p["errors"], *one["rounded"], *one["filtered"]))])
    heads = ["entropy", "tolerance", "bound", "columns kept", "dH error", "dW error", "bfloat16: dH", "bfloat16: dW"]
    heads += ["2^-12: dH", "2^-12: dW"]
    lines = ["## The sparse backward", "", text, "", *table(heads, rows)]
    lines += picture("sparse_backward", "Errors and share of columns against the tolerance")
    return lines + (_sparse_times(found["times"]) if "times" in found else ["Times of it have not been measured yet.", ""])


_SHOWN = (2.0**-5, 2.0**-7, 2.0**-9)  # tolerances in the table; the picture has all


def _sparse_times(times: dict) -> list[str]:
    rows = []
    for one in times["races"]:
        exact = next(r for r in one["rows"] if r["name"] == sparse_backward.EXACT)["timing"]["median_ms"]
        case = f"{one['name']}, N, V, D = {', '.join(map(str, one['shape']))}, {one['entropy']:.2f} nats, {one['kept']:.1%} kept"
        for row in one["rows"]:
            ms = row["timing"]["median_ms"]
            rows.append([case, row["name"], f"{ms:.0f}", f"{exact / ms:.2f}x", *(f"{e:.1e}" for e in row["errors"])])
    where = f"float32 ({origin(times)}). {load_note([times['other_load']])}"
    text = f"Log-probs forward and backward, {where} Errors: to our exact one."
    return [text, "", *table(["", "", "ms", "exact / it", "dH error", "dW error"], rows)]


def trained(results: Path) -> list[str]:
    """Runs with either backward, and the head's share of an update."""
    text = "Training with either backward, the same seeds: `python -m benchmarks.reports.sparse_training`"
    if not (results / sparse_training.FILE).is_file():
        return [f"{text}; not measured yet.", ""]
    found, rows = _read(results, sparse_training.FILE), []
    for model, backward in ((m, b) for m in found["updates"] for b in sparse_training.BACKWARDS):
        runs = [run for run in found["runs"] if (run["model"], run["backward"]) == (model, backward)]
        ends = [list(run["held_out"].values())[-1] for run in runs]
        middle = [statistics.mean(list(run["held_out"].values())) for run in runs]
        kept, bound = statistics.median(run["kept"] for run in runs), max(run["bound"] for run in runs)
        one = found["updates"][model]
        head, rest = (one[name]["median_ms"] for name in (backward, "backbone"))
        shown = [", ".join(f"{x:.3f}" for x in values) for values in (middle, ends)]
        rows.append([model, backward, *shown, f"{kept:.1%}", f"{bound:.1e}", f"{head:.0f} of {head + rest:.0f} ms"])
    sizes = {model: (one["tokens"], *one["shape"]) for model, one in found["updates"].items()}
    shapes = "; ".join(f"{model}: N, V, D = {', '.join(map(str, size))}" for model, size in sizes.items())
    loads = load_note([u["other_load"] for u in found["updates"].values()])
    heads = ["", "backward", "mean held-out success, by seed", "at the end", "columns kept", "largest bound", "head in an update"]
    lines = [f"{text}: {origin(found)}. The update is one kept step's forward and backward on one thread ({shapes}). {loads}", ""]
    return lines + table(heads, rows) + picture("sparse_training", "Held-out success with either backward")


# --- credit --------------------------------------------------------------------------------------------------------------------


def credit(report: dict) -> list[str]:
    """The scan: typical, against the loop, and the worst pack."""
    rows = {r["what"]: r for r in report["rows"]}
    typical, loop = rows[TYPICAL]["median_ms"], rows[LOOP]["to_typical"]
    packs = [r for r in report["rows"][: report["rows"].index(rows["method grpo"])] if r["what"] != TYPICAL]
    worst = max(packs, key=lambda r: r["to_typical"])
    limits = [
        [
            f"{report['tokens']} tokens, {TYPICAL}",
            held(f"{typical:.3g} ms", typical <= LIMITS["scan_ms"]),
            f"{LIMITS['scan_ms']:g} ms",
        ],
        ["Python loop / ours", held(f"{loop:.0f}x", loop >= LIMITS["loop"]), f"{LIMITS['loop']:g}x"],
        [f"worst pack ({worst['what']}) / typical", held(f"{worst['to_typical']:.2f}x", worst["to_typical"] <= LIMITS["hostile"])]
        + [f"{LIMITS['hostile']:g}x"],
    ]
    methods = [r for r in report["rows"] if r["what"].startswith("method ")]
    slow = sorted(methods, key=lambda r: -r["median_ms"])[:3]
    named = ", ".join(f"{r['what'].removeprefix('method ')} {r['median_ms']:.0f} ms" for r in slow)
    note = f"The limits are GEAR's. The slowest of the other methods on the typical pack: {named}."
    lines = ["## Credit", "", f"`python -m benchmarks.reports.credit`: {origin(report)}. {load_note([report['other_load']])}", ""]
    return [*lines, *table(["", "measured", "limit"], limits), note + _table_link("credit_report.md"), ""]


def _table_link(name: str) -> str:
    return f" All rows: [benchmarks/results/{name}](../benchmarks/results/{name})."


# --- scaling -------------------------------------------------------------------------------------------------------------------


def picture(name: str, text: str) -> list[str]:
    """Markdown lines of one of the pictures."""
    return [f"![{text}](plots/{name}.png)", ""]


def growth(found: dict) -> list[str]:
    """Against N, V and D: the figures of the largest and smallest point of each axis, and the pictures."""
    measured = found["points"]
    rows = []
    for axis, passes in ((a, p) for a in range(len(AXES)) for p in PASSES):
        line = series(measured, axis, passes)
        rows += [_point(AXES[axis], axis, passes, p) for p in line]
    heads = ["varied", "pass", "ours, ms", "GEMMs alone (limit), ms", "ours / limit", "eager / ours", "extra MiB, ours / eager"]
    base = ", ".join(f"{a} = {b}" for a, b in zip(AXES, measured["base"], strict=True))
    lines = ["## How cost grows", "", f"`python -m benchmarks.reports.scaling`: {origin(measured)}."]
    lines += [f"One size varied at a time around {base}, float32. {load_note([measured['other_load']])}", ""]
    lines += picture("scaling_time", "Time against rows, vocabulary and width") + table(heads, rows)
    return lines + picture("scaling_memory", "Peak extra memory against rows, vocabulary and width")


def _point(letter: str, axis: int, passes: str, one: dict) -> list[str]:
    ours, eager, floor = (one["rows"][name]["median_ms"] for name in (OURS, EAGER, GEMMS))
    memory = [one["rows"][name]["extra_mib"] for name in (OURS, EAGER)]
    known = " / ".join("not told" if m is None else f"{m:.1f}" for m in memory)
    times = [f"{ours:.3g}", f"{floor:.3g}", f"{ours / floor:.2f}", f"{eager / ours:.2f}x"]
    return [f"{letter} = {one['shape'][axis]}", passes, *times, known]


def ranks(found: dict) -> list[str]:
    """Processes on this machine; GPUs by the model."""
    measured, model = found["ranks"], found["model"]
    shape = ", ".join(f"{a} = {b}" for a, b in zip(AXES, measured["shape"], strict=True))
    rows = []
    for passes in PASSES:
        times = {int(k): v[passes]["median_ms"] for k, v in measured["processes"].items()}
        for count, ms in times.items():
            limit = times[1] / count
            rows.append([passes, str(count), f"{ms:.4g}", f"{limit:.4g}", f"{limit / ms:.0%}"])
    alone = measured["processes"][max(measured["processes"], key=int)]
    collectives = ", ".join(f"{name} {alone[name]['median_ms']:.2g} ms" for name in ("barrier", "all_gather", "all_reduce"))
    lines = [
        "## A vocabulary cut among ranks",
        "",
        f"Measured: {shape}, float32, gloo, {measured['threads_each']} thread a process",
    ]
    lines[-1] += f" ({origin(measured)}). {load_note([measured['other_load']])}"
    lines += [
        f"Two processes on two cores also share their cache and memory. Alone, among the most processes: {collectives}.",
        "",
    ]
    lines += table(["pass", "processes", "ms", "limit: an even split of one, ms", "of the limit"], rows)
    return lines + picture("ranks", "Time against the number of ranks, measured and modelled") + _gpu_ranks(model)


def _gpu_ranks(model: dict) -> list[str]:
    rows = []
    for passes, by_rank in model["head_ms"].items():
        for count, parts in by_rank.items():
            cells = [f"{parts[name]:.3g}" for name in ("products", "all_gather", "all_reduce")]
            rows.append([passes, count, *cells, f"{sum(parts.values()):.3g}"])
    gpu, shape = model["gpu"], ", ".join(f"{a} = {b}" for a, b in zip(AXES, model["head_shape"], strict=True))
    text = (
        f"**Model, not measured** (`benchmarks/reports/projections.py`): {shape}, bfloat16; products at "
        f"{gpu['flops'] / 1e12:g} TFLOP/s, collectives at {gpu['link'] / 1e9:g} GB/s one way, one after another. "
        "Milliseconds, a floor:"
    )
    return [text, "", *table(["pass", "GPUs", "products", "all-gather", "all-reduce", "sum"], rows)]


def step(runs: dict, model: dict) -> list[str]:
    """A GEAR step relative to a GRPO step, phase by phase."""
    grpo, gear = (demo.typical(runs["runs"], method) for method in demo.METHODS)
    rows = [
        [n, f"{grpo['seconds'][n]:.3f}", f"{gear['seconds'][n]:.3f}", _ratio(gear["seconds"][n], grpo["seconds"][n])]
        for n in demo.PHASES
    ]
    rows.append(["whole step", f"{grpo['step']:.3f}", f"{gear['step']:.3f}", _ratio(gear["step"], grpo["step"])])
    seeds = len(runs["runs"]) // len(demo.METHODS)
    text = (
        f"`python -m benchmarks.reports.demo`: {origin(runs)}, {seeds} seeds a method, one run after the other on two ranks. "
        f"{load_note([runs['other_load']])} Seconds by the runs' own timers: medians over the {grpo['steps']:g} steps of a run, "
        "then over the seeds. score holds the teacher's pass. That and update cover only trajectories whose advantage is not 0; "
        f"in the median step {grpo['zero_advantage']:.0%} (GRPO) and {gear['zero_advantage']:.0%} (GEAR) had one of 0. update is "
        "the same work a trajectory in both, so how far it differs tells how far such runs scatter. Medians of phases do not "
        "add up to that of the step, which also writes files."
    )
    lines = ["## A GEAR step beside a GRPO step", "", text, "", *table(["phase", "GRPO, s", "GEAR, s", "GEAR / GRPO"], rows)]
    lines += picture("step_phases", "Seconds by phase, measured and modelled")
    return lines + _split(runs["split"]) + _model_step(model) + _curves(runs)


def beside_trl(found: dict) -> list[str]:
    """The demo's step beside TRL's, rates and their ratios."""
    one = {e["name"]: e for e in found["entrants"]}
    theirs = one[step_beside_trl.THEIRS]
    idle = 1 - one[step_beside_trl.OURS]["trajectories"] / found["sequences"]
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if name in ("trl", *step_beside_trl.PACKAGES))
    text = [
        f"`python -m benchmarks.reports.step_beside_trl`: {origin(found)}; {versions}.",
        "The demo's model, problems, tools, sizes and loss in both trainers, at a learning rate next to 0, so that all sample",
        f"from one policy; a thread a process, {found['rounds']} steps each, in turn, behind one that warms up.",
        f"{load_note([found['other_load']])} The processors' seconds are what a busy machine moves least: read these.",
        "",
        f"* A step samples some {theirs['tokens']:.0f} tokens; rates are these over seconds. *Generation* holds the tools' work;",
        "  *update* rewards, scoring, credit and the optimizer's step. With GRPO and one update a step neither scores what it",
        "  learns from before. Trajectories of advantage 0 are only scored in ours: here",
        f"  {idle:.0%} of them, and more as a policy learns. GEAR scores all, with a teacher.",
        "* gear_trainer pushes the weights to its sampler in each step; TRL samples from those that it trains.",
        "* A model of 0.7 M parameters is mostly overhead: of larger ones these ratios say little.",
        "* TRL with vLLM was not run: 1.16 takes vLLM up to 0.31. Nothing of it was measured on GPUs, where all of it differs.",
    ]
    rows = [
        [e["name"], *(f"{e['tokens_per_second'][n]:.0f}" for n in step_beside_trl.RATES), f"{e['seconds']['step']:.2f}"]
        for e in found["entrants"]
    ]
    rows += [[f"{r['of']} **/** {r['to']}", *(f"{r[n]:.2f}x" for n in step_beside_trl.RATES), ""] for r in found["ratios"]]
    heads = ["tokens a second of", "generation", "update", "step", "step, of the processors", "seconds a step"]
    return ["## The demo's step beside TRL", "", *text, "", *table(heads, rows)]


def _split(found: dict) -> list[str]:
    """What scoring a step is made of."""
    ms = {name: t["median_ms"] for name, t in found["parts"].items()}
    parts = [
        ("policy's pass", ms["policy"], ms["policy"]),
        ("teacher's pass", 0.0, ms["teacher"]),
        ("head", ms["head"], ms["head with teacher"]),
        ("scan", 0.0, ms["scan"]),
    ]
    parts.append(("sum", *(sum(part[i] for part in parts) for i in (1, 2))))
    text = (
        f"Scoring by part, on the {found['trajectories']} trajectories ({found['policy_tokens']} policy tokens) of step "
        f"{found['step']} of the GEAR run whose advantage is not 0: one process, one thread, float32, no engine round the model, "
        f"medians of {found['parts']['scan']['rounds']} rounds. A run's score phase also gathers each layer's weights (ZeRO-3) "
        f"and waits for the other rank. {load_note([found['other_load']])}"
    )
    rows = [[name, f"{grpo:.3g}" if grpo else "", f"{gear:.3g}", _ratio(gear, grpo)] for name, grpo, gear in parts]
    return [text, "", *table(["part", "GRPO, ms", "GEAR, ms", "GEAR / GRPO"], rows)]


def _curves(runs: dict) -> list[str]:
    """Held-out success of every run, first and last."""
    rows = []
    for method in demo.METHODS:
        for one in (run for run in runs["runs"] if run["method"] == method):
            steps = list(one["held_out"])
            rows.append([method, str(one["seed"]), *(f"{one['held_out'][at]:.3f}" for at in (steps[0], steps[-1]))])
    text = "Held-out success of the same runs before and after: the demo shows that the whole path works, and ranks no method."
    heads = ["method", "seed", "before", f"after {steps[-1]} steps"]
    return ["### What the demo learns", "", text, "", *table(heads, rows)]


def _model_step(model: dict) -> list[str]:
    s, seconds = model["step"], model["step_seconds"]
    grpo, gear = seconds["grpo"], seconds["gear"]
    rows = [[n, f"{grpo[n]:.3g}", f"{gear[n]:.3g}", _ratio(gear[n], grpo[n])] for n in grpo]
    whole = sum(grpo.values()), sum(gear.values())
    rows.append(["sum", *(f"{x:.3g}" for x in whole), _ratio(whole[1], whole[0])])
    text = (
        f"**Model, not measured** (`benchmarks/reports/projections.py`): Qwen3-8B, {s['gpus']} H200, {s['trajectories']} "
        f"trajectories of {s['prompt']} + {s['response']} tokens; the teacher's prompt is {s['hint']} longer, its pass over "
        f"{s['taught']:.0%} of them. Products at {model['gpu']['flops'] / 1e12:g} TFLOP/s, sampling at "
        f"{model['gpu']['memory'] / 1e12:g} TB/s; launches, waits and the optimizer are left out, so seconds are floors and the "
        "ratio is what to read:"
    )
    return [text, "", *table(["phase", "GRPO, s", "GEAR, s", "GEAR / GRPO"], rows)]


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "only GEAR" if a else ""


# --- GPUs ----------------------------------------------------------------------------------------------------------------------


def gpus(reports: dict[str, dict], compiled: dict) -> list[str]:
    """The goals beside what was measured, which without a report is nothing."""
    rows = []
    for (outputs, passes), (goal, floor) in GOALS.items():
        cells = [f"{outputs} outputs, {passes}", f"{goal:g} ms", f"{floor:g} ms"]
        rows.append([*cells, *(_gpu_cells(reports, goal) or ["not measured yet"])])
    spills, targets = sum(r["spills"] for r in compiled["rows"]), dict.fromkeys(r["target"] for r in compiled["rows"])
    text = (
        f"Compiled, not run: {len(compiled['rows'])} Triton kernels for {', '.join(targets)} (Triton {compiled['triton']}), "
        f"{spills} bytes spilled."
    )
    lines = ["## GPUs", "", *table([f"N, V, D = {', '.join(map(str, HEAD_SHAPE))}", "goal", "GEMMs alone", "measured"], rows)]
    never = (
        "**Nothing on this page was measured on a GPU.** Never run on one: every Triton kernel (they run in Triton's interpreter "
        "and compile), CUDA graphs, NCCL, the CUDA branches of the benchmarks' instruments, colocated vLLM on CUDA and the "
        "Qwen3-8B configuration. `python -m benchmarks.gpu` measures the goals above."
    )
    measured = [line for name, report in reports.items() for line in _gpu_speed(name, report)]
    return [*lines, text + _table_link("compile_report.md"), "", *(measured or [never])]


def _gpu_cells(reports: dict[str, dict], goal: float) -> list[str]:
    items = [i.get("figures", {}) for r in reports.values() for i in _gpu_items(r)]
    return [held(f"{f['ms']:.3g} ms", f["goal_met"]) for f in items if f.get("goal_ms") == goal][:1]


def _gpu_items(report: dict) -> list[dict]:
    return [i for phase in ("headline", "speed", "shapes", "peers") for i in report["phases"].get(phase, {}).get("items", [])]


def _gpu_speed(name: str, report: dict) -> list[str]:
    """One report's times beside the roofline that it measured, ours and the peers'."""
    (machine,) = (i["figures"] for i in report["phases"]["machine"]["items"])
    where = f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}"
    rows = []
    for item in _gpu_items(report):
        f = item.get("figures", {"ms": math.nan})
        share = f"{f['of_roofline']:.0%}" if "of_roofline" in f else ""
        memory = f"{f['beside_results_mib']:.0f}" if "beside_results_mib" in f else ""
        error = f"{f['error']:.1e}" if isinstance(f.get("error"), float) else ""
        rows.append([item["name"], item.get("reason", f"{f['ms']:.3g}"), share, memory, error])
    heads = ["", "ms", "of the roofline", "MiB beside results", "largest error, nats"]
    link = f"All rows: [benchmarks/results/{name}](../benchmarks/results/{name})."
    return [f"### {machine['device']}", "", f"{where}, {report['date'][:10]}. {link}", "", *table(heads, rows)]


# --- the page ------------------------------------------------------------------------------------------------------------------

HEAD = """# Performance

Written by `python -m benchmarks.page` from the JSON files of [benchmarks/results](../benchmarks/results); every
figure stands beside its limit. Medians; ratios above 1x say how many times as long the other takes. Models are called models.
"""


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    cpu, scan, compiled, found, runs = (
        _read(results, name) for name in ("cpu_report.json", "credit_report.json", "compile_report.json", FILE, demo.FILE)
    )
    reports = {path.name: json.loads(path.read_text()) for path in sorted(results.glob("gpu_*.json"))}
    loads = load_note([s["other_load"] for s in cpu["sections"]])
    lines = [*HEAD.splitlines(), "", "## The operators on a CPU", ""]
    lines += [f"`python -m benchmarks.reports.cpu`: {origin(cpu)}. {loads}{_table_link('cpu_report.md')}", ""]
    lines += (
        logits(cpu)
        + hidden(cpu)
        + slower(cpu)
        + few(results)
        + sparse(_read(results, sparse_backward.FILE))
        + trained(results)
        + credit(scan)
        + growth(found)
        + ranks(found)
        + step(runs, found["model"])
    )
    lines += beside_trl(_read(results, step_beside_trl.FILE))
    return "\n".join([*lines, *gpus(reports, compiled)]).rstrip() + "\n"


def _read(results: Path, name: str) -> dict:
    return json.loads((results / name).read_text())


def readme(text: str, results: Path = RESULTS) -> str:
    """The README with its figures written anew: the operators beside the peers, and the scan."""
    cpu, scan = (_read(results, name) for name in ("cpu_report.json", "credit_report.json"))
    peers = (EAGER, "torch.compile", "TRL 1.16")
    rows = []
    for section in (s for s in cpu["sections"] if s["dtype"] == "float32"):
        found = timed(section)
        ours, eager = found[OURS], found[EAGER]["extra_mib"]
        cells = [heading(section).replace(", float32", ""), f"{ours['timing']['median_ms']:.4g} ms"]
        cells += [f"{found[p]['timing']['median_ms']:.4g} ms" if p in found else "-" for p in peers]
        rows.append([*cells, f"{ours['extra_mib']:.0f} / {eager:.0f} MiB"])
    heads = ["two CPU cores, float32", OURS, *peers, "extra memory, ours / eager"]
    of = {r["what"]: r for r in scan["rows"]}
    credit_line = (
        f"{of[TYPICAL]['median_ms']:.3g} ms, {of[LOOP]['to_typical']:.0f} times as fast as the algorithm as a Python loop."
    )
    lines = [*table(heads, rows), f"GEAR's weights of {scan['tokens']:,} packed tokens: {credit_line}"]
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + rest.split(END, 1)[1]


def check(path: Path = PAGE, plots: Path = PLOTS, front: Path = README) -> list[str]:
    """Lines about what is out of date: a diff, and pictures that the page names and nobody drew."""
    wanted, lines = page(), []
    for file, text in ((path, wanted), (front, readme(front.read_text()))):
        old = file.read_text() if file.is_file() else ""
        lines += difflib.unified_diff(old.splitlines(), text.splitlines(), "committed", "from the JSON", lineterm="", n=0)
    names = [part.split(")")[0] for part in wanted.split("](plots/")[1:]]
    return lines + [
        f"{name}: no such picture; `python -m benchmarks.page` draws it" for name in names if not (plots / name).is_file()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed page, write nothing")
    if parser.parse_args(arguments).check:
        lines = check()
        print("\n".join(lines) or "the page is up to date")
        return 1 if lines else 0
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    drawn = draw(_read(RESULTS, FILE), PLOTS) + draw_demo(_read(RESULTS, demo.FILE), PLOTS)
    for path in RESULTS.glob(sparse_backward.FILE):
        drawn += draw_sparse(json.loads(path.read_text()), PLOTS)
    for path in RESULTS.glob(sparse_training.FILE):
        drawn += draw_sparse_training(json.loads(path.read_text()), PLOTS)
    names = ", ".join(path.name for path in drawn)
    print(f"wrote {PAGE.relative_to(ROOT)}, its pictures ({names}) and the figures of {README.name}")
    return 0
