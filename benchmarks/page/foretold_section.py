"""The section of docs/evidence.md on whether a scored file foretells a study, with its picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.stats import permutation_test, rankdata

from gear_trainer.report.plots import pyplot
from gear_trainer.report.statistics import holm
from gear_trainer.report.tables import p_value

from .performance_page import table
from .study_pictures import svg

FORETOLD = "credit_study_foretold.svg"
FEW = 4  # arms that no correlation is made of
SEEDS = 2  # that an arm counts with
DRAWS = 10_000


class Foretold(NamedTuple):
    """Arms of a study that a file scores too: what each adds to the baseline, in a measure on the file and in learning."""

    arms: list[str]
    scored: list[float]
    learned: list[float]

    def correlation(self) -> tuple[float, float]:
        """Spearman's over the arms, and its two-sided p by permutation (scipy; exact up to DRAWS orders)."""
        x, y = rankdata(self.scored), rankdata(self.learned)
        y = (y - y.mean()) / y.std() / len(y)

        def rho(x: Any, axis: int = -1) -> Any:
            return ((x - x.mean(axis, keepdims=True)) / x.std(axis, keepdims=True) * y).sum(axis)

        found = permutation_test((x,), rho, permutation_type="pairings", n_resamples=DRAWS, vectorized=True, rng=0)
        return float(found.statistic), float(found.pvalue)


def foretold(study: dict[str, Any], measure: str) -> Foretold:
    """The study's arms with what the measure said of them and what they learned over the run, the baseline left out."""
    names, scored, learned = [], [], []
    for row in study["scored"]["rows"]:
        difference = (study["arms"].get(row["method"]) or {}).get("difference")
        said = row["over_grpo"][measure][0]
        if difference and difference["area"]["n"] >= SEEDS and said is not None:
            names.append(row["method"])
            scored.append(said)
            learned.append(difference["area"]["mean"])
    return Foretold(names, scored, learned)


def in_short(study: dict[str, Any]) -> list[str]:
    """A line on alignment alone; nothing where no file scores the study's arms, or too few of them ran."""
    told = foretold(study, "alignment") if study.get("scored") else None
    if told is None or len(told.arms) <= FEW:
        return []
    rho, p = told.correlation()
    return [
        "* What a file says before training and what is learned: an arm's alignment with the gradient of the true advantage and "
        f"its gain in held-out success go together with a rank correlation of {rho:+.2f} over {len(told.arms)} arms "
        f"(p {'' if p < 0.001 else '= '}{p_value(p)}, uncorrected)."
    ]


def foretelling(study: dict[str, Any], measures: Sequence[str]) -> list[str]:
    """The section on the arms of a study as a file scores them; nothing where none does."""
    if not study.get("scored"):
        return []
    found = {name: foretold(study, name) for name in measures}
    told = {name: f for name, f in found.items() if len(f.arms) > FEW and len(set(f.scored)) > 1}
    figures = {name: f.correlation() for name, f in told.items()}
    corrected = holm([p for _, p in figures.values()])
    rows = [
        [f"`{name}`", str(len(told[name].arms)), f"{rho:+.2f}", p_value(p), p_value(holms)]
        for (name, (rho, p)), holms in zip(figures.items(), corrected, strict=True)
    ]
    base, file = study["baseline"], study["scored"]["file"]
    said = (
        f"Each arm of the study `{study['name']}` with its own options and teacher, scored on `{file}`, which is of the policy "
        f"that all its runs begin from: what it adds to `{base}` in a measure, beside what it added in held-out success over the "
        "run. Spearman's correlation over the arms that a file can score and that ran with two seeds or more, with p by "
        "permutation, then corrected after Holm over the measures. Arms are relatives of one another, so p is too small."
    )
    heads = ["measure", "arms", "correlation", "p", "p (Holm)"]
    shown = [f"![what alignment says of an arm, and what the arm learned](plots/{FORETOLD})", ""]
    return ["## Does a file foretell a study?", "", said, "", *table(heads, rows), *shown]


def draw_foretold(told: Foretold, study: dict[str, Any]) -> bytes:
    """The arms of a `Foretold` by their ranks, which do not lie on one another: across, by the measure on a file; up, by what was
    learned. Each with both numbers, less the baseline's. Returns an SVG."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    x, y = rankdata(told.scored), rankdata(told.learned)
    for i, name in enumerate(told.arms):
        said = f"{name}: {told.scored[i]:+.2f}, {told.learned[i]:+.3f}"
        left = x[i] > len(x) / 2  # where there is room
        axis.annotate(
            said,
            (x[i], y[i]),
            xytext=(-6 if left else 6, -3),
            textcoords="offset points",
            fontsize=8,
            ha="right" if left else "left",
        )
    axis.plot([1, len(x)], [1, len(x)], color="0.8", lw=0.8, zorder=0)
    axis.plot(x, y, "o", ms=5, color="C0")
    base = study["baseline"]
    axis.set_xlabel(
        f"rank of the alignment with the true advantage's gradient, before training (first number, less {base}'s)", fontsize=9
    )
    axis.set_ylabel(f"rank of the {study['metric'].replace('_', ' ')} over the run (second)", fontsize=9)
    axis.margins(0.06)
    axis.grid(alpha=0.25)
    return svg(plt, figure)
