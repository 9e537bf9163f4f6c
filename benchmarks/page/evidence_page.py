"""docs/evidence.md and its pictures from benchmarks/results: `python -m benchmarks.page.evidence_page [--check]`.

No number on the page is written by hand. --check writes nothing and fails where the page is another.
"""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from statistics import median
from typing import Any

from gear_trainer.report.statistics import paired
from gear_trainer.report.study import sure
from gear_trainer.report.tables import p_value, with_interval

from ..credit_truth.measures import MEASURES, NEAR
from ..credit_truth.pictures import draw, measured
from ..harness.environment import PLOTS, RESULTS, ROOT
from .foretold_section import FORETOLD, draw_foretold, foretelling, foretold, in_short
from .performance_page import table
from .study_pictures import draw_curves, draw_differences

PAGE = ROOT / "docs" / "evidence.md"
FOLDER = RESULTS / "credit_truth"
STUDIES = {"credit_study": "study", "credit_study_bfcl": "bfcl"}  # results, and their files in examples/credit_study
SPIKES = ("precision", "recall")
AGREEMENT = ("sign_centred", "spearman", "call_contrast", "alignment", "snr")
CONFIGS = {  # of an audited file's task: what its command is given
    "chains": "--config gear_trainer/configs/chains_cpu.yaml",
    "bfcl-one-class": "--config gear_trainer/configs/bfcl_files_cpu.yaml",
    "sums": "--config gear_trainer/configs/smollm2_cpu.yaml",
}
PRETRAINED = {"sums": "SmolLM2-135M on "}  # tasks whose model is no warm start
TEACHERS = {
    "truth": "the reference solution",
    "sibling": "a successful rollout of the group",
    "wrong": "another problem's solution",
    "nothing": "nothing",
}


def cell(figure: list[float | None], spec: str = ".2f") -> str:
    """A figure with its 95 % interval; empty where there was nothing to measure."""
    return with_interval(*figure, spec=spec, none="")


def figures_of(found: dict[str, Any], method: str, teacher: str) -> dict[str, list[float | None]] | None:
    """The figures of a method under a teacher; None where the file has no such row."""
    return next((row["figures"] for row in found["rows"] if (row["method"], row["teacher"]) == (method, teacher)), None)


def subject(found: dict[str, Any]) -> str:
    """The policy and the trajectories of an audited file, in words."""
    about = found["about"]
    arguments = about.get("task_args") or {}
    spare = f" with {arguments['spare'] or 'no'} turns to spare" if "spare" in arguments else ""
    setting = f" ({arguments['setting']})" if "setting" in arguments else ""
    when = f"step {about['step']}" if about["step"] else "the start"
    return f"{PRETRAINED.get(about['task'], '')}`{about['task']}`{setting}{spare}, {when}"


# --- do spikes mark deviations? ---------------------------------------------------------------------------------------------


def answer(found: dict[str, Any], teacher: str) -> str:
    """One sentence: where GEAR's onsets stand under a teacher, beside segments at random places."""
    own, random = figures_of(found, "gear", teacher), figures_of(found, "random", teacher)
    if own is None or random is None or own["precision"][0] is None:
        return f"A teacher that sees {TEACHERS[teacher]}: no onset in a trajectory that deviated."
    apart = (own["precision"][1] or 0) > (random["precision"][2] or 1)
    below = (own["precision"][2] or 1) < (random["precision"][1] or 0)
    verdict = "more than" if apart else "less than" if below else "not told apart from"
    return (
        f"A teacher that sees {TEACHERS[teacher]}: {own['precision'][0]:.0%} of the onsets stand within {NEAR} tokens of the "
        f"deviation, and {own['recall'][0]:.0%} of the deviations have one; {verdict} segments at random places "
        f"({random['precision'][0]:.0%}, {random['recall'][0]:.0%})."
    )


def hint(found: dict[str, Any]) -> str:
    """One sentence: whether the teacher finds more when what it is shown is true."""
    own, other = (figures_of(found, "gear", teacher) for teacher in ("truth", "wrong"))
    if own is None or other is None or own["recall"][0] is None or other["recall"][0] is None:
        return "It is not known whether what the teacher is shown matters."
    (_, low, high), (_, other_low, other_high) = ([x or 0.0 for x in figures["recall"]] for figures in (own, other))
    if low > other_high or high < other_low:
        return "What the teacher is shown matters: the intervals of recall under the truth and under a wrong answer lie apart."
    return (
        f"**It does not matter here whether what the teacher is shown is true**: recall is {own['recall'][0]:.2f} with the truth "
        f"and {other['recall'][0]:.2f} with another problem's solution."
    )


def spikes(files: list[dict[str, Any]]) -> list[str]:
    """Onsets against exact deviations: a table for all files and teachers, and the answer for each."""
    rows, lines = [], []
    for found in (f for f in files if f["deviated"]):
        lines += [f"* {subject(found)}, {found['deviated']} trajectories that deviated:"]
        for teacher in (t for t in TEACHERS if figures_of(found, "gear", t)):
            lines += [f"    * {answer(found, teacher)}"]
            for method in ("gear", "random", "fixed"):
                own = figures_of(found, method, teacher)
                if own is not None and own["recall"][0] is not None:
                    rows.append([subject(found), TEACHERS[teacher], f"`{method}`", *(cell(own[name]) for name in SPIKES)])
        lines += [f"    * {hint(found)}"]
        oracle = figures_of(found, "oracle", "-") or {}
        rows.append([subject(found), "", "`oracle`", *(cell(oracle[name]) for name in SPIKES if oracle)])
    said = (
        "A deviation is the first token after which the solution is out of reach. Where turns are to spare, the first mistake is "
        "not yet one: the chance of success falls before, and `oracle`, the tokens that A* says surely lost something, shows how "
        "far that goes."
    )
    heads = ["policy", "the teacher sees", "segments", *SPIKES]
    return ["## Do spikes mark deviations?", "", said, "", *lines, "", *table(heads, rows)]


# --- does the credit agree with the truth? ------------------------------------------------------------------------------------


def agreement(found: dict[str, Any]) -> list[str]:
    """Every method under the teacher that sees the truth, or none, on one file."""
    told = [row for row in found["rows"] if row["teacher"] in ("truth", "-")]
    names = measured(AGREEMENT, told)
    rows = [[f"`{row['method']}`", *(cell(row["figures"][name]) for name in names)] for row in told]
    head = f"### {subject(found)[0].upper()}{subject(found)[1:]}"
    said = (
        f"{found['trajectories']} trajectories, {found['teaching']} with an advantage; {found['decided_tokens']} of "
        f"{found['policy_tokens']} policy tokens are decided, {found['decided_of_other_sign']:.0%} of these against the sign of "
        f"the trajectory's advantage, which no weight can mend; M = {found['about']['M']} continuations a cut."
    )
    stem = f"plots/{picture(found).name}"
    shown = [f"![all measures, methods and teachers]({stem}.figures.png)", ""]
    return [head, "", said, "", *table(["method", *names], rows), *shown, *sweeps(found, stem)]


def ranks(files: list[dict[str, Any]]) -> list[str]:
    """A line for each file: how the weights of GEAR, of random places and of the best method rank tokens beside A*."""
    lines = ["* Do weights rank a trajectory's tokens as their true advantage does? Spearman's correlation, 1 for the oracle:"]
    for found in files:
        own = {row["method"]: row["figures"]["spearman"] for row in found["rows"] if row["teacher"] == "truth"}
        best = max((name for name in own if own[name][0] is not None), key=lambda name: own[name][0])
        lines.append(
            f"    * {subject(found)}: GEAR {cell(own['gear'])}, random places {cell(own['random'])}, the best of "
            f"{len(own)} methods on this file, `{best}`, {cell(own[best])}."
        )
    return lines


def sweeps(found: dict[str, Any], stem: str) -> list[str]:
    """The heat maps of GEAR's options."""
    return [line for name in found["sweeps"] for line in (f"![GEAR's {name.replace('_', ' and ')}]({stem}.{name}.png)", "")]


def picture(found: dict[str, Any]) -> Path:
    """Where a file's pictures stand, without the measure's name and the ending."""
    return PLOTS / f"truth_{Path(found['file']).stem}"


# --- does it learn faster? --------------------------------------------------------------------------------------------------


def learning(stem: str, study: dict[str, Any]) -> list[str]:
    """A study: differences to the baseline, paired by seed, and what they say."""
    arms, base = study["arms"], study["baseline"]
    ran = ran_of(study)
    rows = []
    for name, arm in ran.items():
        own = [f"`{name}`", str(arm["area"]["n"]), _mean(arm["area"]), _mean(arm["final"])]
        more = [_mean(arm["difference"][m]) for m in ("area", "final")] if arm["difference"] else ["", ""]
        holm = arm["difference"]["area"]["p_holm"] if arm["difference"] else None
        rows.append([*own, *more, "" if holm is None else p_value(holm)])
    heads = [
        "arm",
        "seeds",
        "mean over the run",
        "after the last step",
        f"less `{base}`: mean",
        "last",
        "p (Holm), mean",
    ]
    left = [f"`{name}`" for name in arms if name not in ran]
    return [
        f"### The study `{study['name']}`",
        "",
        f"{study['finished']} runs of {max(r['steps'] for arm in ran.values() for r in arm['runs'])} steps, held-out success; "
        f"differences are paired by seed, with Student's 95 % intervals. {_wall(study, ran)}",
        "",
        *verdicts(ran, base),
        "",
        *table(heads, rows),
        *([f"Not run yet: {', '.join(left)}.", ""] if left else []),
        f"![differences](plots/{stem}_differences.svg)",
        "",
        f"![curves](plots/{stem}_curves.svg)",
        "",
    ]


def _wall(study: dict[str, Any], ran: dict[str, Any]) -> str:
    """What a run took, and what all of the study would take; a median, for a run that was paused counts its pause."""
    run = median(run["cost"]["hours"] for arm in ran.values() for run in arm["runs"] if run["cost"])
    beside, planned = study["side_by_side"], study["planned"]
    whole = planned * run / beside
    took = f"{whole:.0f} hours" if whole >= 2 else f"{60 * whole:.0f} minutes"
    return (
        f"The steps of a run took {60 * run:.1f} minutes (the median; {beside} at a time on two cores that did other work too): "
        f"all {planned} would take about {took}."
    )


CONTROLS = {  # arms that GEAR's is held against beside the baseline
    "tilt_1.0": "its tilt alone, so what telling tokens apart adds",
    "random_1.0": "segments at random places, so what the places add",
    "wrong_answer_1.0": "GEAR whose teacher sees another problem's solution, so what the truth adds",
}


def choice(ran: dict[str, Any]) -> list[str]:
    """A sentence for each control on what GEAR has beyond it, by the same seeds; none where one of them has not run."""
    lines = []
    for control, text in CONTROLS.items():
        if not {"gear_k1_1.0", control} <= ran.keys():
            continue
        gear, other = (
            {r["seed"]: r["area"] for r in ran[arm]["runs"] if r["area"] is not None} for arm in ("gear_k1_1.0", control)
        )
        d = paired(gear, other, "t")
        p = "" if d.p is None else f"; p = {d.p:.3f} by a paired t-test, uncorrected"
        lines.append(f"* GEAR less {text}: {_mean(d._asdict())}, over {d.n} seeds{p}.")
    return lines


def verdicts(ran: dict[str, Any], base: str) -> list[str]:
    """The differences in words, a null result included."""
    told = {
        name: arm["difference"]["area"] for name, arm in ran.items() if arm["difference"] and arm["difference"]["area"]["n"] > 1
    }
    apart = [f"`{name}` ({d['mean']:+.3f})" for name, d in told.items() if sure(d)]
    lines = [
        f"* Below 0.05 after Holm's correction over {len(told)} arms: {', '.join(apart)}."
        if apart
        else f"* **None of the {len(told)} arms differs from `{base}` at 0.05 after Holm's correction.**"
    ]
    if "oracle" in told:
        d = told["oracle"]
        can = (
            "credit can matter here"
            if d["low"] is not None and d["low"] > 0
            else "these runs do not show that credit can matter here"
        )
        lines.append(f"* The oracle, told what each turn was worth: {_mean(d)} over the run; {can}.")
    return [*lines, *choice(ran)]


def _mean(e: dict[str, Any]) -> str:
    return cell([e["mean"], e["low"], e["high"]], ".3f")


# --- the page ---------------------------------------------------------------------------------------------------------------


ASKED = """# Does the credit find the mistake?

Written by `python -m benchmarks.page.evidence_page` from the files of `benchmarks/results`: no number here was written by hand.

GEAR's premise is that a spike of divergence, between the policy and itself shown the ground truth, marks where a trajectory
went wrong, and that credit placed there teaches faster. Both can be measured where an environment is cheap: the chance of success
after each token by [continuations](audit.md), the first token after which the solution is out of reach exactly. What the figures
ask and what they are blind to: [the measures](credit_truth.md), [studies](studies.md).
"""
NOT_SHOWN = """## What this does not show

* The models are tiny (0.74 M parameters, three layers) and trained on demonstrations that slip on purpose. Whether a large
  model's spikes mark its mistakes is open; the commands below are the same for one. The one pretrained model, SmolLM2-135M,
  adds two digits: problems of GSM8K and MAWPS it hardly ever solves, and without a success no token's worth can be told.
* One start for all seeds of the study: seeds differ in problems and sampling, not in the policy they begin from.
* A weight multiplies a trajectory's advantage: a right step of a failed trajectory is still pushed down. The tables say how
  often.
* A file's gradient is that of a table policy, not of a network ([why](credit_truth.md#measures)).
* The oracle takes V of a state as the share of the step's 64 rollouts through it that succeed: exact states, noisy values.
* Runs shared a machine that did other work: how long a method takes is not measured here.
"""
RERUN = """## Rerun

`make evidence-fast` makes the figures of the committed files anew, in a minute, and fails if one moved. The files themselves, and
the studies, whose time stands above:

```
{audits}
{studies}
```

`START` is the folder that `python -m gear_trainer.demo.warm_start --task chains --task-args '{{steps: 4, spare: 2}}'` prints (for
`bfcl-one-class` with its `'{{setting: files}}'`), ten minutes of a core; `RUN` a run of the study. For Qwen3-8B the same commands
take another file: `gear-trainer audit --run RUN --step 20` on a run of `gear_trainer/configs/qwen3_8b.yaml`, and a study whose
`config` it is.
"""


def read() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The scored files that were audited, and the studies that are there; `scored` of a study are its arms on a file."""
    files = [json.loads(path.with_suffix(".json").read_text()) for path in sorted(FOLDER.glob("*.parquet"))]
    found = {stem: RESULTS / f"{stem}.json" for stem in STUDIES}
    studies = {stem: json.loads(path.read_text()) for stem, path in found.items() if path.is_file()}
    for stem, study in studies.items():
        if (scored := FOLDER / f"{stem}_arms.json").is_file():
            study["scored"] = json.loads(scored.read_text())
    return files, studies


def short(files: list[dict[str, Any]], studies: dict[str, dict[str, Any]]) -> list[str]:
    """The answers in a few lines, by the first file of known deviations and the studies."""
    known = next((found for found in files if found["deviated"]), None)
    lines = [f"* {subject(known)}. {answer(known, 'truth')}", f"* {hint(known)}"] if known else []
    lines += ranks(files)
    for study in studies.values():
        said = [*verdicts(ran_of(study), study["baseline"]), *in_short(study)]
        lines += [f"* The study `{study['name']}`:", *(f"    {line}" for line in said)]
    return ["## In short", "", *lines, ""]


def ran_of(study: dict[str, Any]) -> dict[str, Any]:
    """The arms of a study that have a finished run."""
    return {name: arm for name, arm in study["arms"].items() if arm["area"]["n"]}


def text(files: list[dict[str, Any]], studies: dict[str, dict[str, Any]]) -> str:
    """The page."""
    agree = ["## Does the credit agree with the truth?", "", *_legend(), ""]
    lines = [*short(files, studies), *spikes(files), *agree, *(line for found in files for line in agreement(found))]
    learns = ["## Does it learn faster?", "", *(line for stem, study in studies.items() for line in learning(stem, study))]
    told = [line for study in studies.values() for line in foretelling(study, AGREEMENT)]
    return "\n".join([ASKED, *lines, *learns, *told, NOT_SHOWN, rerun(files, studies)])


def rerun(files: list[dict[str, Any]], studies: dict[str, dict[str, Any]]) -> str:
    """The commands behind the committed files."""
    audits = []
    for about in (found["about"] for found in files):
        of = f"--run RUN --step {about['step']}" if about["step"] else CONFIGS[about["task"]]
        of += f" model.dtype={about['dtype']}" if about["task"] in PRETRAINED else " model.path=START"
        spare = "".join(f" task_args.{name}={value}" for name, value in about["task_args"].items() if name == "spare")
        keys = {"problems": about["problems"], "continuations": about["M"], "stride": about["stride"]}
        more = "".join(f" audit.{name}={n}" for name, n in keys.items())
        audits.append(f"gear-trainer audit {of} world_size=1{spare}{more}")
    runs = [
        f"gear-trainer study examples/credit_study/{STUDIES[stem]}.yaml --arms {' '.join(ran_of(study))}"
        for stem, study in studies.items()
    ]
    return RERUN.format(audits="\n".join(audits), studies="\n".join(runs))


def _legend() -> list[str]:
    return [f"* `{name}`: {MEASURES[name].asks}" for name in AGREEMENT]


def pictures(files: list[dict[str, Any]], studies: dict[str, dict[str, Any]]) -> list[Path]:
    """Draw all pictures; where they went."""
    paths = [path for found in files for path in draw(found, picture(found))]
    for stem, study in studies.items():
        for name, made in (("differences", draw_differences), ("curves", draw_curves)):
            paths.append(PLOTS / f"{stem}_{name}.svg")
            paths[-1].write_bytes(made(study))
        if study.get("scored"):
            paths.append(PLOTS / FORETOLD)
            paths[-1].write_bytes(draw_foretold(foretold(study, "alignment"), study))
    return paths


def check() -> list[str]:
    """Lines in which the page is not what the files give."""
    now = text(*read()).splitlines()
    return list(difflib.unified_diff(PAGE.read_text().splitlines(), now, "docs/evidence.md", "from the files", lineterm=""))


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check it; 1 where it is another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page.evidence_page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is not what the files give")
    if parser.parse_args(arguments).check:
        print(*(lines := check()), sep="\n", end="")
        return bool(lines)
    files, studies = read()
    PAGE.write_text(text(files, studies))
    print(*[PAGE, *pictures(files, studies)], sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
