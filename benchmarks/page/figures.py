"""docs/figures.md and its pictures, the GEAR paper's figures from our results: `python -m benchmarks.page.figures [--check]`.

Curves come from the committed study, all else from a committed audit. --check writes nothing and fails where the page is another.
"""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gear_kernels import Credit, credit_weights
from gear_kernels.methods import METHODS
from gear_trainer.audit.file import read as read_audit
from gear_trainer.report import payload
from gear_trainer.report.plots import pyplot

from ..harness.environment import PLOTS, RESULTS, ROOT
from .study_pictures import draw_curve, svg

PAGE = ROOT / "docs" / "figures.md"
AUDITED = RESULTS / "credit_truth" / "chains_late.parquet"
TEACHER = "truth"
ARMS = {"grpo": "0.45", "gear_k1_1.0": "C0", "tilt_1.0": "C1", "oracle": "C2"}  # of the study, with their colours
UP, DOWN = (0.31, 0.68, 0.56), (0.93, 0.56, 0.42)  # as in the report's page
LINE, LETTER, HIGH = 66, 4.3, 11.0  # of the credit view: characters of a line; points of a character and of a line
SEGMENTS = 3  # that the shown rollout has at least


class Weighed(NamedTuple):
    """An audit's rollouts that a method weighs, one after the other, policy tokens alone: rows, where each begins, its credit."""

    rows: list[dict[str, Any]]
    bounds: np.ndarray
    credit: Credit


def committed() -> dict[str, Any]:
    """The committed study of chains."""
    return json.loads((RESULTS / "credit_study.json").read_text())


def weighed(file: Path = AUDITED) -> Weighed:
    """GEAR with its defaults over the k1 signal of the teacher that sees the truth."""
    rows = [r for r in payload.rollouts(file, "audit").to_pylist() if r["advantage"] and r[f"k1/{TEACHER}"] is not None]
    policy = [np.array(r["mask"], bool) for r in rows]
    columns = {"signal": f"k1/{TEACHER}", "entropy": "entropy"}
    given = {
        name: torch.from_numpy(np.concatenate([np.array(r[column], np.float32)[m] for r, m in zip(rows, policy, strict=True)]))
        for name, column in columns.items()
    }
    bounds = np.cumsum([0, *(int(m.sum()) for m in policy)])
    advantages = torch.tensor([r["advantage"] for r in rows])
    credit = credit_weights(**given, advantages=advantages, cu_seqlens=torch.from_numpy(bounds).int(), method=METHODS["gear"])
    return Weighed(rows, bounds, credit)


def telling(found: Weighed) -> int:
    """The rollout of the second and third figure: of those that leave the solution and have SEGMENTS, the shortest."""
    lengths = [
        len(row["ids"]) if row["deviation"] >= 0 and found.credit.segment_ids[a:b].max() + 1 >= SEGMENTS else np.inf
        for row, a, b in zip(found.rows, found.bounds, found.bounds[1:], strict=False)
    ]
    return int(np.argmin(lengths))


# --- the four figures -----------------------------------------------------------------------------------------------------------


def curves(study: dict[str, Any]) -> bytes:
    """Held-out success by step: the mean over seeds of each arm, with its 95 % interval."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.6, 3.0), constrained_layout=True)
    for name, color in ARMS.items():
        draw_curve(axis, study["arms"][name]["curve"], color, f"{name}, {study['arms'][name]['final']['n']} seeds")
    axis.set(xlabel="step", ylabel=study["metric"].replace("_", " "))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="lower right")
    return svg(plt, figure)


def credit_view(found: Weighed) -> bytes:
    """The rollout as text: green weighed up, red weighed down, segments underlined, grey what the environment said."""
    plt, i = pyplot(), telling(found)
    r, own = found.rows[i], slice(found.bounds[i], found.bounds[i + 1])
    weights, segments = found.credit.weights[own], found.credit.segment_ids[own]
    policy = {t: k for k, t in enumerate(np.flatnonzero(r["mask"]))}
    spots, height = _laid_out(r["tokens"], r["deviation"])
    figure = plt.figure(figsize=(LINE * LETTER / 72 + 0.1, height * HIGH / 72 + 0.1))
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(0, LINE), ylim=(height, -0.3))
    axis.axis("off")
    full = float((weights - 1).abs().max())
    for t, line, column, text in spots:
        k = policy.get(t)
        if k is not None:
            shift = float(weights[k] - 1) / full
            axis.add_patch(
                plt.Rectangle(
                    (column, line + 0.08), len(text), 0.84, color=UP if shift > 0 else DOWN, alpha=abs(shift) * 0.85, lw=0
                )
            )
            if segments[k] >= 0:
                axis.plot([column, column + len(text)], [line + 0.96] * 2, color="black", lw=0.8, solid_capstyle="butt")
                if k == 0 or segments[k - 1] != segments[k]:
                    axis.plot([column] * 2, [line + 0.08, line + 0.96], color="black", lw=1.2)
        for place, letter in enumerate(text):
            axis.text(column + place + 0.5, line + 0.5, letter, family="DejaVu Sans Mono", fontsize=7, ha="center", va="center",
                      color="black" if k is not None else "0.55", parse_math=False)  # fmt: skip
        if t == r["deviation"]:
            axis.text(column + len(text) + 0.5, line + 0.5, "✗", color="#b02a2a", fontsize=8, ha="center", va="center")
    return svg(plt, figure, "path")


def _laid_out(tokens: list[str], marked: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """Where each token's text stands: (token, line, column, text), in lines of LINE characters at most; and how many lines."""
    spots, line, column = [], 0, 0
    for t, token in enumerate(tokens):
        for n, part in enumerate(token.replace("\n", "↵\n").split("\n")):
            if n:
                line, column = line + 1, 0
            if column + len(part) + 2 > LINE:
                line, column = line + 1, 0
            spots.append((t, line, column, part))
            column += len(part) + (t == marked)  # room for the mark
    return [spot for spot in spots if spot[3]], line + 1


def trajectory(found: Weighed) -> bytes:
    """Signal and entropy along the rollout's policy tokens, its segments shaded, its deviation dotted; V below."""
    plt, i = pyplot(), telling(found)
    r, policy = found.rows[i], np.flatnonzero(found.rows[i]["mask"])
    segments = found.credit.segment_ids[found.bounds[i] : found.bounds[i + 1]].numpy()
    figure, axes = plt.subplots(3, 1, figsize=(7.2, 3.9), sharex=True, constrained_layout=True)
    drawn = {"signal, nats": (f"k1/{TEACHER}", "C0"), "entropy, nats": ("entropy", "C1"), "V": ("value", "C2")}
    for axis, (label, (column, color)) in zip(axes, drawn.items(), strict=True):
        axis.step(range(len(policy)), np.array(r[column])[policy], where="mid", color=color, lw=1.2)
        for own in range(int(segments.max()) + 1):
            inside = np.flatnonzero(segments == own)
            axis.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color="0.5", alpha=0.15, lw=0)
        axis.axvline(int(np.searchsorted(policy, r["deviation"])), color="#b02a2a", ls=":", lw=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    axes[2].set(ylim=(-0.05, 1.05), xlabel="policy token")
    return svg(plt, figure)


def by_sign(found: Weighed) -> dict[str, np.ndarray]:
    """The weights of all policy tokens, by the sign of their trajectory's advantage."""
    lengths = np.diff(found.bounds)
    positive = np.repeat([r["advantage"] > 0 for r in found.rows], lengths)
    weights = found.credit.weights.numpy()
    return {"A > 0": weights[positive], "A < 0": weights[~positive]}


def weights_by_sign(found: Weighed) -> bytes:
    """A histogram of the weights by the sign of the advantage, with the means."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.6, 2.6), constrained_layout=True)
    for (name, weights), color in zip(by_sign(found).items(), (UP, DOWN), strict=True):
        share = np.full(len(weights), 1 / len(weights))
        axis.hist(
            weights,
            bins=np.linspace(0.9, 1.1, 41),
            weights=share,
            color=color,
            alpha=0.6,
            label=f"{name}: mean {weights.mean():.3f}",
        )
        axis.axvline(float(weights.mean()), color=color, lw=1.4)
    axis.set(xlabel="weight W", ylabel="share of policy tokens", yscale="log", xticks=[0.9, 0.95, 1.0, 1.05, 1.1])
    axis.legend(fontsize=8, loc="upper center")
    return svg(plt, figure)


# --- the page -------------------------------------------------------------------------------------------------------------------


def text(study: dict[str, Any], found: Weighed) -> str:
    """docs/figures.md."""
    i, about = telling(found), read_audit(AUDITED)[1]
    r, base = found.rows[i], study["arms"]["grpo"]["final"]
    count = int(found.credit.segment_ids[found.bounds[i] : found.bounds[i + 1]].max()) + 1
    off = int(np.searchsorted(np.flatnonzero(r["mask"]), r["deviation"]))
    finals = ", ".join(f"`{name}` {study['arms'][name]['final']['mean']:.3f}" for name in ARMS)
    means = " and ".join(f"{weights.mean():.3f} where {name}" for name, weights in by_sign(found).items())
    return f"""# The paper's figures

The four kinds of figure that the GEAR paper (arXiv 2605.11853) shows, drawn from results in the repository: a study and an
audited file, both of a 0.6 M-parameter policy on `{about["task"]}`. They show what such figures look like here, and no effect of
the paper's size: [evidence.md](evidence.md) says what holds. The [report's page](report.md) shows the same of any run and saves
its panels as SVG or PNG. `python -m benchmarks.page.figures` draws these and writes this page.

## Curves

![Held-out success by step, four arms](plots/figure_curves.svg)

Held-out success, its mean over {base["n"]} seeds and the 95 % interval of the mean. After the last step:
{finals}. The study is [examples/credit_study](../examples/credit_study/README.md).

## A rollout by its credit

![A rollout whose tokens are coloured by weight](plots/figure_credit.svg)

A rollout that failed, after {about["step"]} steps of training: green is weighed up, red down; a bar opens a segment, a line runs
under it; grey is the environment's. ✗: the first token after which the solution is out of reach. GEAR with its defaults and the
k1 signal; the teacher sees the solution.

## Signal and entropy along it

![Signal, entropy and V along the rollout](plots/figure_trajectory.svg)

The same rollout: the signal (log π of the policy less that of the teacher), the policy's entropy, and V, the measured chance of
success after each token ([audit.md](audit.md)). Shaded: its {count} segments. Dotted: token {off}, where it leaves the solution.

## Weights by the sign of the advantage

![Histogram of weights by sign](plots/figure_weights.svg)

All {len(found.credit.weights):,} policy tokens of the audit's {len(found.rows)} trajectories with an advantage, on a logarithmic
scale. The mean weight is {means}: GEAR weighs successes up and failures down on average, for most
tokens have a signal near 0.
"""


def pictures(study: dict[str, Any], found: Weighed, folder: Path = PLOTS) -> list[Path]:
    """Draw the four; where they went."""
    drawn = {
        "curves": curves(study),
        "credit": credit_view(found),
        "trajectory": trajectory(found),
        "weights": weights_by_sign(found),
    }
    paths = [folder / f"figure_{name}.svg" for name in drawn]
    for path, made in zip(paths, drawn.values(), strict=True):
        path.write_bytes(made)
    return paths


def check() -> list[str]:
    """Lines in which the page is not what the files give."""
    now = text(committed(), weighed()).splitlines()
    return list(difflib.unified_diff(PAGE.read_text().splitlines(), now, "docs/figures.md", "from the files", lineterm=""))


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures, or check the page; 1 where it is another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page.figures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is not what the files give")
    if parser.parse_args(arguments).check:
        print(*(lines := check()), sep="\n", end="")
        return bool(lines)
    study, found = committed(), weighed()
    PAGE.write_text(text(study, found))
    print(*[PAGE, *pictures(study, found)], sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
