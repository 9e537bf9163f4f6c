"""A study's curves and differences as pictures, drawn from its study.json alone."""

from __future__ import annotations

import io
from typing import Any

from gear_trainer.report.plots import pyplot
from gear_trainer.report.study import MEASURES, sure

FEWEST = 3  # seeds: of two the interval is ten times as wide, and the others could not be read beside it
_COLUMNS = 4  # of panels


def draw_curves(found: dict[str, Any]) -> bytes:
    """A panel an arm that ran: its runs thin, their mean thick with its band, the baseline's in grey. Returns an SVG."""
    plt, base = pyplot(), found["arms"][found["baseline"]]
    ran = {name: arm for name, arm in found["arms"].items() if arm["curve"]}
    arms = {name: arm for name, arm in ran.items() if name != found["baseline"]} or ran
    rows = -(-len(arms) // _COLUMNS)
    columns = min(_COLUMNS, len(arms))
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.5 * rows), sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, (name, arm) in zip(axes.flat, arms.items(), strict=False):
        draw_curve(axis, base["curve"], "0.45")
        for run in arm["runs"]:
            if run["points"]:
                axis.plot(*zip(*run["points"], strict=True), color="C0", lw=0.6, alpha=0.45)
        draw_curve(axis, arm["curve"], "C0")
        axis.set_title(f"{name} ({arm['final']['n']} seeds)", fontsize=9)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    figure.supxlabel(f"step; grey: {found['baseline']}", fontsize=9)
    figure.supylabel(found["metric"].replace("_", " "), fontsize=9)
    return svg(plt, figure)


def draw_curve(axis: Any, curve: list[dict[str, Any]], color: str, label: str | None = None) -> None:
    """A mean with its interval, as `gear_trainer.report.study.figures` gives it; nothing where no run has finished."""
    if not curve:
        return
    steps = [point["step"] for point in curve]
    axis.plot(steps, [point["mean"] for point in curve], color=color, lw=2, label=label)
    if curve[0]["low"] is not None:
        low, high = ([point[end] for point in curve] for end in ("low", "high"))
        axis.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)


def draw_differences(found: dict[str, Any]) -> bytes:
    """Each arm's difference to the baseline with its 95 % interval, a panel a measure. Returns an SVG.

    Arms that ran with FEWEST seeds, with the number of seeds where it is not all of them.
    """
    plt = pyplot()
    arms = {name: arm["difference"] for name, arm in found["arms"].items() if arm["difference"] and arm["area"]["n"] >= FEWEST}
    size = 9, max(1.8, 1.0 + 0.26 * len(arms))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=size, sharey=True, constrained_layout=True)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for row, difference in enumerate(own[measure] for own in arms.values()):
            if difference["mean"] is None:
                continue
            ends = None
            if difference["low"] is not None:
                ends = [[difference["mean"] - difference["low"]], [difference["high"] - difference["mean"]]]
            color = "C0" if sure(difference) else "0.45"
            axis.errorbar(difference["mean"], row, xerr=ends, fmt="o", ms=4, capsize=3, color=color)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize=9)
        axis.locator_params(axis="x", nbins=6)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.25, axis="x")
    seeds = {name: found["arms"][name]["area"]["n"] for name in arms}
    fewer = {name: f" ({n} seeds)" if n < len(found["seeds"]) else "" for name, n in seeds.items()}
    axes[0].set_yticks(range(len(arms)), [name + fewer[name] for name in arms], fontsize=8)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    what = f"{found['metric'].replace('_', ' ')} less that of {found['baseline']}"
    figure.supxlabel(f"{what}; blue: below 0.05 after Holm's correction", fontsize=9)
    return svg(plt, figure)


def svg(plt: Any, figure: Any, text: str = "none") -> bytes:
    """The figure, the same bytes for the same figure. text: `none`, in the reader's fonts, or `path`, drawn."""
    out = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "study", "svg.fonttype": text}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()
