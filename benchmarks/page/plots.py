"""The pictures of docs/plots, drawn from scaling.json, demo.json, sparse_backward.json and sparse_training.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from ..harness.cases import PASSES
from ..harness.peers import EAGER, OURS
from ..reports import projections
from ..reports.demo import METHODS, PHASES, typical
from ..reports.scaling import AXES, GEMMS, series
from ..reports.sparse_training import BACKWARDS

_COLORS = {OURS: "C0", EAGER: "C1", GEMMS: "0.45"}
_AXIS_LABELS = ("N, rows (tokens)", "V, vocabulary", "D, width of hidden states")


def draw(found: dict, folder: Path) -> list[Path]:
    """A picture for each part that `found` holds; where they went."""
    wanted = {"scaling_time": ("points", _times), "scaling_memory": ("points", _memory), "ranks": ("ranks", _ranks)}
    drawn = {name: picture for name, (part, picture) in wanted.items() if part in found and "model" in found}
    return _save(drawn, found, folder)


def draw_demo(found: dict, folder: Path) -> list[Path]:
    """The demo's curves and the seconds of its steps; where they went."""
    return _save({"demo": _curves, "step_phases": _step}, found, folder)


def draw_sparse(found: dict, folder: Path) -> list[Path]:
    """The sparse backward's errors and share of columns; where the picture went."""
    return _save({"sparse_backward": _sparse}, found, folder)


def draw_sparse_training(found: dict, folder: Path) -> list[Path]:
    """Held-out success of runs with either backward; where the picture went."""
    return _save({"sparse_training": _trained}, found, folder)


def _save(drawn: dict, found: dict, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in drawn.items():
        figure = picture(found)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
        _pyplot().close(figure)
    return paths


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _times(found: dict):
    return _grid(found["points"], (OURS, EAGER, GEMMS), "median_ms", "time, ms (median, quartiles)")


def _memory(found: dict):
    return _grid(found["points"], (OURS, EAGER), "extra_mib", "peak extra memory, MiB")


def _grid(measured: dict, names: tuple[str, ...], what: str, label: str):
    """A row of panels for each pass, a panel for each of N, V, D."""
    figure, axes = _pyplot().subplots(2, 3, figsize=(12, 6.6), sharey="row", constrained_layout=True)
    for (row, passes), (column, letter) in ((r, c) for r in enumerate(PASSES) for c in enumerate(AXES)):
        axis, line = axes[row][column], series(measured, column, passes)
        for name in names:
            _line(axis, [p["shape"][column] for p in line], [p["rows"][name] for p in line], what, name)
        others = ", ".join(f"{a} = {b}" for a, b in zip(AXES, measured["base"], strict=True) if a != letter)
        axis.set(xscale="log", yscale="log", xlabel=_AXIS_LABELS[column], title=f"{passes} ({others})")
        sizes = [p["shape"][column] for p in line]
        axis.set_xticks(sizes, [str(x) for x in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25, which="both")
    for row in axes:
        row[0].set_ylabel(label)
    axes[0][0].legend(fontsize=9)
    return figure


def _line(axis, sizes: list[int], rows: list[dict], what: str, name: str) -> None:
    values = [max(row[what], 0.01) for row in rows]  # a logarithm has no room for a peak that nobody saw
    style = {"color": _COLORS[name], "label": name, "linestyle": "--" if name == GEMMS else "-", "marker": "o", "markersize": 4}
    axis.plot(sizes, values, **style)
    if what == "median_ms":
        axis.fill_between(sizes, [r["low_ms"] for r in rows], [r["high_ms"] for r in rows], color=_COLORS[name], alpha=0.15)


def _ranks(found: dict):
    """Measured on this machine's cores, and beside it the model of GPUs."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    measured, model = found["ranks"], found["model"]
    for axis in axes:
        axis.set(xscale="log", yscale="log", ylabel="time, ms")  # before the ticks: a new scale brings its own
    for passes, color in zip(PASSES, ("C0", "C1"), strict=True):
        times = {int(k): v[passes]["median_ms"] for k, v in measured["processes"].items()}
        whole = {int(k): sum(v.values()) for k, v in model["head_ms"][passes].items()}
        for axis, values in zip(axes, (times, whole), strict=True):
            _speedup(axis, values, passes, color)
    shapes = [", ".join(f"{a} = {b}" for a, b in zip(AXES, s, strict=True)) for s in (measured["shape"], model["head_shape"])]
    axes[0].set(title=f"measured: gloo, one core a process\n{shapes[0]}, float32", xlabel="processes")
    axes[1].set(title=f"model, not measured: GPUs, products and collectives\n{shapes[1]}, bfloat16", xlabel="GPUs")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9)
    return figure


def _speedup(axis, values: Mapping[int, float], passes: str, color: str) -> None:
    counts = sorted(values)
    axis.plot(counts, [values[c] for c in counts], "o-", color=color, label=passes)
    axis.plot(counts, [values[counts[0]] * counts[0] / c for c in counts], ":", color=color, label="an even split")
    axis.set_xticks(counts, [str(c) for c in counts], minor=False)
    axis.set_xticks([], minor=True)
    low, high = min(values.values()), max(values.values())
    axis.set_yticks([t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low / 3 < t < high * 3], minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_yticks([], minor=True)


def _curves(found: dict):
    """Held-out success of the demo's runs by method."""
    figure, axis = _pyplot().subplots(figsize=(8, 4.2), constrained_layout=True)
    _held_out(axis, {m.upper(): [run["held_out"] for run in found["runs"] if run["method"] == m] for m in METHODS})
    return figure


def _held_out(axis, lines: dict[str, list[dict[str, float]]]) -> None:
    """Held-out success by step: each run thin, the mean of a line's runs thick."""
    for color, (name, runs) in zip(("C1", "C0"), lines.items(), strict=True):
        steps = [int(step) for step in runs[0]]
        for run in runs:
            axis.plot(steps, list(run.values()), color=color, linewidth=1, alpha=0.5)
        means = [statistics.mean(run[str(step)] for run in runs) for step in steps]
        axis.plot(steps, means, "o-", color=color, linewidth=3, label=f"{name}, mean of {len(runs)} seeds")
    axis.set(xlabel="step", ylabel="held-out success", ylim=(0, 1))
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")


def _trained(found: dict):
    """Held-out success by backward, a panel for each model."""
    names = list(found["updates"])
    figure, axes = _pyplot().subplots(1, len(names), figsize=(12, 4), constrained_layout=True)
    for axis, name in zip(axes, names, strict=True):
        own = [run for run in found["runs"] if run["model"] == name]
        _held_out(axis, {b: [run["held_out"] for run in own if run["backward"] == b] for b in BACKWARDS})
        axis.set_title(name)
    return figure


def _step(found: dict):
    """Bars of a step by phase: the demo's medians, and the model of Qwen3-8B."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(12, 3.4), constrained_layout=True)
    measured = {m: typical(found["runs"], m)["seconds"] for m in METHODS}
    model = {m: projections.step_seconds(m) for m in METHODS}
    steps = projections.Step()
    titles = (
        "measured: the demo on two CPU cores, medians",
        f"model, not measured: Qwen3-8B, {steps.gpus} GPUs, {steps.trajectories} trajectories",
    )
    for axis, seconds, title in zip(axes, (measured, model), titles, strict=True):
        _bars(axis, seconds)
        axis.set(title=title, xlabel="seconds a step")
        axis.grid(alpha=0.25, axis="x")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=9, ncols=6, loc="outside lower center")
    return figure


def _bars(axis, seconds: dict[str, dict[str, float]]) -> None:
    names = [*PHASES[:2], "teacher", *PHASES[2:]]
    starts = dict.fromkeys(seconds, 0.0)
    for i, name in enumerate(names):
        widths = [phases.get(name, 0.0) for phases in seconds.values()]
        label = "teacher's part of score" if name == "teacher" else name
        axis.barh([m.upper() for m in seconds], widths, left=list(starts.values()), color=f"C{i}", label=label)
        starts = {m: starts[m] + w for m, w in zip(seconds, widths, strict=True)}
    for i, total in enumerate(starts.values()):
        axis.text(total, i, f" {total:.3g} s", va="center", fontsize=9)
    axis.set_xlim(0, 1.14 * max(starts.values()))


def _sparse(found: dict):
    """Against the tolerance: the bound, the errors beside what rounding to bfloat16 does, and the columns in the products."""
    figure, axes = _pyplot().subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for color, one in zip(("C0", "C1", "C2"), found["curves"], strict=False):
        points = [p for p in one["points"] if p["bound"] > 0]
        at, label = [p["tolerance"] for p in points], f"{one['entropy']:.2f} nats"
        for axis, which in zip(axes, (0, 1), strict=False):
            axis.plot(at, [p["errors"][which] for p in points], "o-", color=color, markersize=4, label=label)
            axis.plot(at, [p["bound"] for p in points], ":", color=color)
            axis.axhline(one["rounded"][which], color=color, linestyle="--", linewidth=0.8)
        axes[2].plot([p["tolerance"] for p in one["points"]], [p["kept"] for p in one["points"]], "o-", color=color, markersize=4)
    for axis, what in zip(axes, ("error of dH", "error of dW", "share of columns in the products"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tolerance", title=what)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=9, title="dotted: proved bound\ndashed: dz in bfloat16")
    return figure
