"""The page of evidence is what the committed files give, and says what figures say, a null result included."""

import copy
import json
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats

from benchmarks.credit_truth.evidence import STUDY
from benchmarks.credit_truth.foretold import entry_of, teacher_of
from benchmarks.credit_truth.measures import MEASURES
from benchmarks.credit_truth.pictures import draw
from benchmarks.page import evidence_page, figures
from benchmarks.page.evidence_page import FOLDER, answer, ranks, verdicts
from benchmarks.page.foretold_section import draw_foretold, foretelling, foretold, in_short
from gear_trainer.recipe import resolve
from gear_trainer.runs.study import load_plan


@pytest.fixture(scope="module")
def found():
    """A scored file, of made-up trajectories."""
    made = json.loads((FOLDER / "synthetic.json").read_text())
    made["about"] |= {"M": 8}
    return made


def test_the_page_is_up_to_date():
    assert evidence_page.check() == []


def test_pictures_of_the_page_are_there():
    files, studies = evidence_page.read()
    assert files, "audited files are committed"
    for line in evidence_page.text(files, studies).splitlines():
        if line.startswith("!["):
            assert (evidence_page.PAGE.parent / line.split("](")[1].rstrip(")")).is_file(), line


def test_the_papers_figures_are_drawn_from_the_committed_files(tmp_path):
    assert figures.check() == []
    named = [line.split("](plots/")[1].rstrip(")") for line in figures.PAGE.read_text().splitlines() if line.startswith("![")]
    weighed = figures.weighed()
    drawn = figures.pictures(figures.committed(), weighed, tmp_path)
    assert [path.name for path in drawn] == named and all((figures.PLOTS / name).is_file() for name in named)
    shown = weighed.rows[figures.telling(weighed)]
    assert not shown["success"] and shown["deviation"] >= 0
    for (_, weights), positive in zip(figures.by_sign(weighed).items(), (True, False), strict=True):
        own = [w for r, a, b in zip(weighed.rows, weighed.bounds, weighed.bounds[1:], strict=False)
               if (r["advantage"] > 0) == positive for w in weighed.credit.weights[a:b].tolist()]  # fmt: skip
        assert weights.tolist() == own
    ElementTree.parse(drawn[1])


def test_a_verdict_follows_the_intervals(found):
    changed = copy.deepcopy(found)
    rows = {(row["method"], row["teacher"]): row["figures"] for row in changed["rows"]}
    rows["random", "truth"]["precision"] = [0.1, 0.05, 0.15]
    cases = {"more than": [0.9, 0.8, 0.95], "less than": [0.01, 0.0, 0.04], "not told apart from": [0.12, 0.05, 0.2]}
    for verdict, figure in cases.items():
        rows["gear", "truth"]["precision"] = figure
        assert verdict in answer(changed, "truth") and f"{figure[0]:.0%} of the onsets" in answer(changed, "truth")
    rows["gear", "truth"]["precision"] = [None] * 3
    assert "no onset" in answer(changed, "truth")


def arm(mean, low, high, p):
    figure = {"mean": mean, "low": low, "high": high, "n": 8}
    return {"difference": {"area": {**figure, "p_holm": p}}}


def test_the_ranking_of_tokens_is_told_of_every_file(found):
    changed = copy.deepcopy(found)
    rows = {row["method"]: row["figures"] for row in changed["rows"] if row["teacher"] == "truth"}
    for name, figure in {"gear": [-0.2, -0.3, -0.1], "random": [0.0, None, None], "sgcd": [2.0, 1.0, 3.0]}.items():
        rows[name]["spearman"] = figure
    _, line = ranks([changed])
    best = f"the best of {len(rows)} methods on this file, `sgcd`, 2.00 (1.00 to 3.00)."
    assert line.endswith(f"GEAR -0.20 (-0.30 to -0.10), random places 0.00, {best}")


@pytest.mark.parametrize("arms", [6, 12])
def test_a_file_and_a_study_are_set_side_by_side(arms):
    rng = np.random.default_rng(arms)
    x, y = rng.normal(size=(2, arms))
    rows = [{"method": f"a{i}", "over_grpo": {"alignment": [v, v - 1, v + 1], "snr": [None] * 3}} for i, v in enumerate(x)]
    made = {f"a{i}": {"difference": {"area": {"mean": v, "n": 2}}} for i, v in enumerate(y)}
    made |= {"base": {"difference": None}, "once": {"difference": {"area": {"mean": 0.1, "n": 1}}}}
    rows += [{"method": name, "over_grpo": {"alignment": [0, 0, 0], "snr": [None] * 3}} for name in ("base", "once", "gone")]
    study = {"name": "s", "baseline": "base", "metric": "reward", "arms": made, "scored": {"file": "f", "rows": rows}}
    told = foretold(study, "alignment")
    assert told.arms == [f"a{i}" for i in range(arms)], "without the baseline, arms of one seed, and others"
    rho, p = told.correlation()
    known = scipy.stats.spearmanr(x, y)
    assert np.isclose(rho, known.statistic) and np.isclose(p, known.pvalue, atol=0.05)
    text = "\n".join(foretelling(study, ["alignment", "snr"]))
    assert f"| `alignment` | {arms} | {rho:+.2f} |" in text and "`snr`" not in text
    assert f"a rank correlation of {rho:+.2f} over {arms} arms" in in_short(study)[0]
    assert all(f"a{i}" in draw_foretold(told, study).decode() for i in range(arms))
    assert foretelling(study | {"scored": None}, ["alignment"]) == in_short(study | {"scored": None}) == []


def test_an_arm_is_scored_with_its_own_options():
    plan = load_plan(STUDY)
    recipes = {arm: resolve(plan.of(arm)[0].cfg) for arm in plan.study.arms}
    made = {arm: entry_of(arm, recipe) for arm, recipe in recipes.items()}
    assert [arm for arm, entry in made.items() if entry is None] == ["gigpo", "turn", "oracle", "opsd", "opsd_grpo", "opsd_gear"]
    assert made["gear_k1_1.8"].method.alpha == 1.8 and made["gear_k1_1.8"].signal == "k1"
    assert made["gear_kl_1.0"].method.normalizer == "max" and made["gear_kl_1.0"].signal == "reverse_kl"
    shown = {arm: teacher_of(recipe) for arm, recipe in recipes.items()}
    assert [arm for arm, teacher in shown.items() if teacher == "sibling"] == ["sc_grpo", "sibling_1.0"], "one by its own default"
    assert [arm for arm, teacher in shown.items() if teacher == "wrong"] == ["wrong_answer_1.0"]


def test_what_has_no_figure_has_no_panel(found, tmp_path):
    """A file whose deviations are not known, and one in which no trajectory has an advantage."""
    sizes = {}
    for case, left_out in {"all": (), "unknown": ("precision", "recall", "call_contrast"), "none": MEASURES}.items():
        changed = copy.deepcopy(found)
        for name in left_out:
            for row in changed["rows"]:
                row["figures"][name] = [None] * 3
            for maps in changed["sweeps"].values():
                if name in maps:
                    maps[name] = [[None for _ in cells] for cells in maps[name]]
        sizes[case] = [plt.imread(path).shape[1] for path in draw(changed, tmp_path / case)]
    assert len(set(map(len, sizes.values()))) == 1 and all(a > b for a, b in zip(sizes["all"], sizes["unknown"], strict=True))


def test_a_null_result_is_said():
    ran = {"grpo": {"difference": None}, "gear": arm(0.01, -0.02, 0.04, 0.6), "oracle": arm(0.02, -0.01, 0.05, 0.3)}
    lines = " ".join(verdicts(ran, "grpo"))
    assert "None of the 2 arms differs from `grpo`" in lines and "do not show that credit can matter here" in lines
    ran["oracle"] = arm(0.1, 0.06, 0.14, 0.001)
    lines = " ".join(verdicts(ran, "grpo"))
    assert "`oracle` (+0.100)" in lines and "credit can matter here" in lines and "None of" not in lines


def test_what_telling_tokens_apart_adds_is_paired_by_seed():
    def runs(*areas):
        return {"runs": [{"seed": seed, "area": area} for seed, area in enumerate(areas)]}

    ran = {"gear_k1_1.0": runs(0.62, 0.712, 0.661, None), "tilt_1.0": runs(0.61, 0.70, 0.65, 0.9)}
    line, *_ = evidence_page.choice(ran | {"random_1.0": ran["gear_k1_1.0"]})
    p = scipy.stats.ttest_rel([0.62, 0.712, 0.661], [0.61, 0.70, 0.65]).pvalue
    assert "0.011 (" in line and f"over 3 seeds; p = {p:.3f}" in line
    same = evidence_page.choice(ran | {"random_1.0": ran["gear_k1_1.0"]})[1]
    assert "segments at random places" in same and "0.000 (0.000 to 0.000), over 3 seeds" in same
    assert evidence_page.choice({"tilt_1.0": ran["tilt_1.0"]}) == []
