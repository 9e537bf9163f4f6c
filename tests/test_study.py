"""Studies: what a file may say, which runs it starts, goes on with or leaves, the statistics, the page; and one for real."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import yaml
from rich.console import Console

from gear_trainer import cli
from gear_trainer.demo.warm_start import ensure_warm_start
from gear_trainer.errors import ConfigError
from gear_trainer.report.statistics import area, band, estimate, holm, paired
from gear_trainer.report.study import describe, figures, tables
from gear_trainer.runs import launches
from gear_trainer.runs.files import note_end, read_metrics
from gear_trainer.runs.launches import Launches, check_devices, command, locked
from gear_trainer.runs.ranks import machine
from gear_trainer.runs.study import Study, load_plan, standings, summary
from gear_trainer.tasks import make_task

ROOT = Path(__file__).parents[1]
CHAINS = str(ROOT / "gear_trainer" / "configs" / "chains_cpu.yaml")
GRID = {
    "name": "s",
    "config": CHAINS,
    "overrides": ["world_size=1", "train.steps=2", "eval.every=1"],
    "arms": {"grpo": ["credit=grpo"], "gear": ["credit=gear", "credit_args.alpha=0.6"]},
    "baseline": "grpo",
    "seeds": [3, 4],
}


def write(tmp_path, **changed):
    """A study's file; a key that is None is left out."""
    study = {key: value for key, value in (GRID | {"output_dir": str(tmp_path / "out")} | changed).items() if value is not None}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def plan_of(tmp_path, **changed):
    return load_plan(write(tmp_path, **changed))


def make_run(cell, values, state=None, why=""):
    """The folder of a run as the trainer leaves it: its configuration as it was settled, a line a step, word of its end."""
    folder = cell.cfg.run_dir
    folder.mkdir(parents=True)
    train = cell.cfg.train.model_copy(update={"packing": True})  # a run settles what was null
    (folder / "config.json").write_text(cell.cfg.model_copy(update={"train": train}).model_dump_json())
    seconds = {"rollout": 3.0, "score": 1.0, "update": 2.0, "eval": 4.0, "step": 10.0}
    rows = [
        {"step": step, "held_out_success": x} | ({"seconds": seconds, "policy_tokens": 50.0} if step else {})
        for step, x in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state:
        note_end(folder, state, len(values) - 1, why)
    return folder


def leave_beat(cell, **beat):
    """The beat of a rank, by default of one whose process is this one."""
    import psutil

    own = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine(), "started": psutil.Process().create_time()}
    folder = cell.cfg.run_dir.with_name(f".{cell.name}.ranks")
    folder.mkdir(parents=True)
    (folder / "rank-0.json").write_text(json.dumps(own | {"ended": None, "run": "x", "lost": {}} | beat))


# --- the file ---------------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_arm_with_every_seed_seed_by_seed(tmp_path):
    plan = plan_of(tmp_path)
    assert [cell.name for cell in plan.cells] == ["grpo-3", "gear-3", "grpo-4", "gear-4"]
    last = plan.cells[-1].cfg
    assert (last.seed, last.credit, last.credit_args, last.train.steps) == (4, "gear", {"alpha": 0.6}, 2)
    assert last.run_dir == tmp_path / "out" / "s" / "runs" / "gear-4"


def test_what_a_run_is_told_is_what_was_planned(tmp_path):
    """The overrides of each command, over the file, are its configuration."""
    from gear_trainer.config import load_config

    plan = plan_of(tmp_path, name="007", arms={"0": None, "1": ["credit=gear"]}, baseline="0")
    for cell in plan.cells:
        assert load_config(plan.config, list(cell.overrides)) == cell.cfg


BAD = [
    ({"armz": {}}, "unknown key armz: did you mean 'arms'?"),
    ({"baseline": None}, "baseline is missing: give it in the file"),
    ({"baseline": "gaer"}, "baseline=gaer: no such arm; there are grpo, gear"),
    ({"arms": {"a b": []}}, "arm 'a b': must be letters"),
    ({"arms": {}}, "arms={}"),
    ({"name": ".."}, "name '..': must be letters"),
    ({"seeds": [1, 2, 1]}, "names 1 twice"),
    ({"seeds": [-1]}, "seeds.0=-1"),
    ({"metric": "held_out_sucess"}, "metric=held_out_sucess: known are held_out_success"),
    ({"overrides": ["eval.every=0"]}, "metric=held_out_success needs evaluations"),
    ({"overrides": ["seed=1"]}, "override 'seed=1': seeds lists it"),
    ({"config": "no.yaml"}, "no.yaml: no such config file"),
    ({"arms": {"grpo": [], "x": ["train.lrr=1"]}}, "arm x: .*unknown key train.lrr: did you mean 'lr'?"),
    ({"arms": {"grpo": [], "x": ["train.steps=9"]}}, "arm x changes train.steps: 2 -> 9, and arms are compared at the same"),
    ({"arms": {"grpo": [], "x": ["eval.prompts=9"]}}, "arm x changes eval.prompts: 200 -> 9"),
    ({"arms": {"grpo": [], "x": ["task_args.slip=0.1"]}}, "arm x changes task_args.slip: .*the builtin model is made of it"),
    ({"overrides": [], "launcher": "process"}, "launcher=process starts one rank, and world_size=2"),
]


@pytest.mark.parametrize("changed, message", BAD)
def test_a_bad_file_gets_one_line(tmp_path, capsys, changed, message):
    file = write(tmp_path, **changed)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as told:
        load_plan(file)
    assert str(told.value).startswith(f"{file}: ") or "no such config file" in message
    assert cli.main(["study", str(file), "--report-only"]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_unknown_arm_is_refused(tmp_path, capsys):
    assert cli.main(["study", str(write(tmp_path)), "--arms", "grpo", "gaer", "--dry-run"]) == 2
    assert "has no such arm: did you mean 'gear'?" in capsys.readouterr().err


def test_the_runs_of_some_arms_alone(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(launches.Launches, "run", lambda self: started.extend(s.cell.name for s in self.waiting) or 0)
    assert cli.main(["study", str(write(tmp_path)), "--arms", "gear"]) == 0 and started == ["gear-3", "gear-4"]


def test_an_unknown_method_is_refused_before_anything_starts(tmp_path, capsys):
    file = write(tmp_path, arms={"grpo": ["credit=grpo"], "x": ["credit=gaer"]})
    assert cli.main(["study", str(file)]) == 2
    assert "arm x: credit=gaer: known are" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["study", "bfcl"])
def test_the_shipped_studies_are_some(name):
    plan = load_plan(ROOT / "examples" / "credit_study" / f"{name}.yaml")
    from gear_trainer.preflight.checks import check

    methods = {arm: check(plan.of(arm)[0].cfg)[1].method for arm in plan.study.arms}  # as `gear-trainer plan` checks them
    assert len(plan.study.seeds) >= 8 and plan.study.baseline == "grpo" and methods["tilt_1.0"].alpha == 1.0


def test_the_page_about_studies_has_every_key_and_a_study(tmp_path):
    text = (ROOT / "docs" / "studies.md").read_text()
    named = {
        name for row in text.splitlines() if row.startswith("| `") for name in row.split("|")[1].replace("`", "").split(", ")
    }
    assert {name.strip() for name in named} == set(Study.model_fields)
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    plan = load_plan(write(tmp_path, **yaml.safe_load(shown) | {"config": CHAINS}))
    assert len(plan.cells) == 4 * 8 and plan.of("tilt_0.6")[7].cfg.credit == "tilt"


# --- what runs need -----------------------------------------------------------------------------------------------------------


def test_finished_runs_are_left_stopped_and_killed_ones_resumed_failed_ones_tried_again(tmp_path):
    plan = plan_of(tmp_path, seeds=[0, 1, 2])
    done, going, stopped, killed, failed, never = plan.cells
    make_run(done, [0.1, 0.2, 0.3], "finished")
    make_run(going, [0.1])
    leave_beat(going)
    make_run(stopped, [0.1, 0.2], "stopped", "its launcher is gone")
    make_run(killed, [0.1, 0.2])
    leave_beat(killed, pid=2**22 + 1)  # above the largest pid
    make_run(failed, [0.1])
    leave_beat(failed, pid=2**22 + 1, ended="ValueError: broken")
    never.log.parent.mkdir(parents=True)
    never.log.write_text("noise\ngear_trainer: the first\n[rank 0] gear_trainer: port 29500 is taken\nnoise\n")
    found = standings(plan)
    assert [s.need for s in found] == ["nothing", "wait", "resume", "resume", "resume", "start"]
    assert [bool(s.why) for s in found] == [False, False, False, True, True, True]
    assert found[4].why == "rank 0: ValueError: broken" and found[5].why.endswith("port 29500 is taken")
    never.log.write_text("noise\ngear_trainer: interrupted before training began\n")
    assert (standings(plan)[5].need, standings(plan)[5].why) == ("start", ""), "who was asked to end has not failed"
    text = summary(plan, found)
    assert "grpo (baseline): credit=grpo: 1 finished, 2 to resume" in text and "gear-2 failed at step 0" in text
    assert "gear: credit=gear credit_args.alpha=0.6: 1 to start, 1 to resume, 1 run by another process" in text
    own = summary(plan, [s for s in found if s.cell.arm == "gear"])
    assert "  gear: " in own and "grpo (baseline)" not in own and "grpo-3 failed" not in own


def test_a_run_of_other_settings_is_no_run_of_the_study(tmp_path):
    plan = plan_of(tmp_path)
    make_run(plan.cells[0], [0.1, 0.2, 0.3], "finished")
    assert standings(plan)[0].need == "nothing"
    other = plan_of(tmp_path, overrides=[*GRID["overrides"], "train.lr=1e-5"])
    with pytest.raises(ConfigError, match=r"grpo-3 was made with other settings \(train.lr: 0.0001 -> 1e-05\): remove it"):
        standings(other)


def test_a_study_runs_once_at_a_time(tmp_path):
    plan = plan_of(tmp_path)
    with locked(plan), pytest.raises(ConfigError, match="another process runs this study"), locked(plan):
        pass
    with locked(plan):
        pass


# --- commands -----------------------------------------------------------------------------------------------------------------


def test_one_rank_needs_no_launcher_and_several_get_deepspeeds(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    plan = plan_of(tmp_path, side_by_side=2)
    words, environment = command(plan, plan.cells[0], True, 0, 20001, 0)
    assert words[:6] == [sys.executable, "-m", "gear_trainer", "train", "--config", CHAINS] and words[6] == "--resume"
    assert words[7:] == list(plan.cells[0].overrides)
    assert environment["WORLD_SIZE"] == "1" and environment["MASTER_PORT"] == "20001" and environment["OMP_NUM_THREADS"] == "4"
    plan = plan_of(tmp_path, side_by_side=2, overrides=[])
    words, environment = command(plan, plan.cells[0], False, 1, 20001, 0)
    at = words.index("--num_gpus")
    assert "deepspeed.launcher.runner" in words and words[at : at + 4] == ["--num_gpus", "2", "--master_port", "20001"]
    assert "RANK" not in environment and environment["OMP_NUM_THREADS"] == "2" and Path(words[at + 4]).name == "run.py"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command(plan, plan.cells[0], False, 1, 20001, 0)[1]["OMP_NUM_THREADS"] == "1"


def test_runs_side_by_side_get_gpus_of_their_own(tmp_path):
    plan = plan_of(tmp_path, side_by_side=2, overrides=[])
    assert "localhost:2,3" in command(plan, plan.cells[0], False, 1, 20001, 4)[0]
    check_devices(plan, 4)
    check_devices(plan, 0)
    with pytest.raises(ConfigError, match="need 4 GPUs, and this machine has 3"):
        check_devices(plan, 3)
    plan = plan_of(tmp_path, side_by_side=2)
    assert command(plan, plan.cells[0], False, 1, 20001, 2)[1]["CUDA_VISIBLE_DEVICES"] == "1"
    plan = plan_of(tmp_path, overrides=[])
    assert "--num_gpus" in command(plan, plan.cells[0], False, 0, 20001, 4)[0]


STAND_IN = """
import json, os, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
name, out = given["name"].strip('"'), given["output_dir"].strip('"')
print(name, "--resume" in sys.argv, flush=True)
if name == "gear-3":
    print("gear_trainer: <b>broken</b>", file=sys.stderr)
    sys.exit(2)
if name == "grpo-4":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    open(os.path.join(os.path.dirname(out), "here"), "w").close()
    time.sleep(600)
if name.endswith("-5"):
    os.makedirs(os.path.join(out, name))
    with open(os.path.join(out, name, "metrics.jsonl"), "w") as file:
        file.writelines(json.dumps({"step": s, "held_out_success": (s + 1) / 10}) + "\\n" for s in range(3))
    with open(os.path.join(out, name, "state.json"), "w") as file:
        json.dump({"state": "finished", "step": 2, "why": ""}, file)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """In the trainer's place a program that ends as its name says, started as the trainer is; the words it was started with."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    started = []
    monkeypatch.setattr(launches, "gpus", lambda: 0)
    monkeypatch.setattr(launches, "POLL", 0.02)

    def start(words, environment, log):
        started.append(words)
        return launches._start([sys.executable, str(tmp_path / "stand_in.py"), *words[4:]], environment, log)

    return started, start


def test_each_run_is_tried_once_and_a_failed_one_does_not_end_the_study(tmp_path, stand_in, capsys):
    started, start = stand_in
    plan = plan_of(tmp_path, side_by_side=2, seeds=[3])
    make_run(plan.cells[0], [0.1, 0.4], "stopped")
    assert Launches(plan, standings(plan), start=start).run() == 1
    assert len(started) == 2 and "--resume" in started[0] and "--resume" not in started[1]
    said = capsys.readouterr().out
    assert "grpo-3: goes on after step 1" in said and "gear-3: failed (exit code 2" in said and "<b>broken</b>" in said
    assert plan.cells[0].log.read_text() == "grpo-3 True\n"
    assert standings(plan)[1].why == "<b>broken</b>", "the next call shows the line, and tries it again"
    Launches(plan, standings(plan), start=start).run()
    assert len(started) == 4 and plan.cells[1].log.read_text().count("<b>broken</b>") == 2


def test_a_terminal_has_a_bar_for_all_and_one_a_run(tmp_path, stand_in, monkeypatch):
    _, start = stand_in
    monkeypatch.setenv("TERM", "xterm")
    plan, out = plan_of(tmp_path, seeds=[3, 5]), io.StringIO()
    make_run(plan.cells[0], [0.1, 0.2, 0.3], "finished")
    Launches(
        plan, standings(plan), Console(file=out, force_terminal=True, width=120, highlight=False, no_color=True), start
    ).run()
    shown = out.getvalue()
    assert "1/4" in shown and "3/4" in shown and "grpo-3" not in shown
    assert "gear-3: failed (exit code 2" in shown and "gear-5: finished" in shown and "held-out success 0.100 -> 0.300" in shown


def test_a_run_goes_on_while_its_ranks_do_though_its_launcher_left(tmp_path, stand_in, monkeypatch):
    _, start = stand_in
    plan = plan_of(tmp_path, arms={"grpo": ["credit=grpo"]}, seeds=[7])
    (cell,) = plan.cells
    looked = []

    def ranks_leave(seconds):
        looked.append(standings(plan)[0].need)
        if looked.count("wait") == 3:
            note_end(cell.cfg.run_dir, "finished", 2)

    def start_ranks(words, environment, log):
        make_run(cell, [0.1, 0.2, 0.3])
        leave_beat(cell)
        return start(words, environment, log)

    monkeypatch.setattr(launches.time, "sleep", ranks_leave)
    assert Launches(plan, standings(plan), start=start_ranks).run() == 0 and looked.count("wait") >= 3


def test_an_interrupt_reaches_the_runs_and_starts_no_more(tmp_path, stand_in, capsys):
    _, start = stand_in
    plan = plan_of(tmp_path, arms={"grpo": ["credit=grpo"]}, seeds=[4, 5, 6])
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def start_and_interrupt(words, environment, log):
        process = start(words, environment, log)
        here, own = str(plan.study.folder / "here"), os.getpid()
        wait = f"while not os.path.exists({here!r}): time.sleep(0.01)"
        watcher = f"import os, signal, time\n{wait}\nos.kill({own}, signal.SIGTERM)"
        subprocess.Popen([sys.executable, "-c", watcher])
        return process

    assert Launches(plan, standings(plan), start=start_and_interrupt).run() == 130
    said = capsys.readouterr().out
    assert "grpo-4: stopped" in said and "grpo-5" not in said
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


# --- statistics -------------------------------------------------------------------------------------------------------------


def test_a_mean_has_students_interval():
    values = [0.61, 0.72, 0.66, 0.58, 0.7]
    found = estimate(values)
    low, high = scipy.stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=scipy.stats.sem(values))
    assert found == pytest.approx((0.654, low, high, 5), abs=1e-12)
    # by hand: t(0.975, 1) = 12.7062, s = 0.1 sqrt(2), so the half width is 1.27062
    assert estimate([0.4, 0.6])[:3] == pytest.approx((0.5, 0.5 - 1.27062, 0.5 + 1.27062), abs=1e-5)
    assert estimate([0.4]) == (0.4, None, None, 1) and estimate([]) == (None, None, None, 0)


def test_an_area_is_the_mean_height_over_uneven_steps():
    points = [(0, 0.0), (10, 1.0), (40, 0.5)]
    assert area(points) == pytest.approx((10 * 0.5 + 30 * 0.75) / 40)
    assert area([(5, 0.3), (9, 0.3)]) == pytest.approx(0.3) and area([(0, 1.0)]) is None and area([]) is None


def test_a_band_is_over_the_steps_that_all_curves_have():
    (first, at_first), (last, at_last) = band([{0: 0.2, 10: 0.4, 20: 0.5}, {0: 0.4, 20: 0.7, 30: 1.0}])
    assert (first, last) == (0, 20) and at_first.mean == pytest.approx(0.3) and at_last == estimate([0.5, 0.7])
    assert band([]) == []


def test_differences_are_paired_by_seed():
    base, arm = {0: 0.5, 1: 0.7, 2: 0.4, 9: 0.0}, {2: 0.6, 1: 0.8, 0: 0.55, 7: 1.0}
    found = paired(arm, base, "t")
    want = scipy.stats.ttest_rel([0.55, 0.8, 0.6], [0.5, 0.7, 0.4])
    interval = want.confidence_interval(0.95)
    assert found == pytest.approx((0.35 / 3, interval.low, interval.high, 3, want.pvalue), abs=1e-12)
    eight = dict(enumerate([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]))
    ranks = paired(eight, dict.fromkeys(eight, 0.0), "wilcoxon")
    assert ranks.p == pytest.approx(2 / 2**8), "all of eight signs alike"
    assert paired({0: 1.0}, {0: 0.5}, "t").p is None and paired({}, {}, "t").n == 0
    assert paired({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}, "t").p == 1.0
    assert paired({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}, "t").p is None, "no spread to hold the difference against"


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.02]) == [0.5, None, 0.04] and holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# --- the page ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """Three seeds of two arms, one run of which failed with markup in its line."""
    plan = plan_of(tmp_path, seeds=[0, 1, 2])
    curves = {"grpo": ([0.1, 0.2, 0.4], [0.1, 0.3, 0.5], [0.2, 0.2, 0.6]), "gear": ([0.1, 0.4, 0.6], [0.1, 0.4, 0.8], [0.2])}
    for cell in plan.cells:
        values = curves[cell.arm][cell.seed]
        make_run(cell, values, "finished" if len(values) == 3 else None)
        if len(values) < 3:
            leave_beat(cell, pid=2**22 + 1, ended="ValueError: <script>alert(1)</script>")
    return plan


def test_figures_come_from_finished_runs_in_pairs(finished):
    found = figures(finished)
    json.dumps(found, allow_nan=False)
    assert (found["planned"], found["finished"]) == (6, 5)
    grpo, gear = found["arms"]["grpo"], found["arms"]["gear"]
    assert grpo["final"]["mean"] == pytest.approx(0.5) and grpo["area"]["mean"] == pytest.approx((0.225 + 0.3 + 0.3) / 3)
    assert [point["step"] for point in gear["curve"]] == [0, 1, 2] and gear["curve"][2]["mean"] == pytest.approx(0.7)
    difference = gear["difference"]["final"]
    want = scipy.stats.ttest_rel([0.6, 0.8], [0.4, 0.5])
    assert (difference["n"], difference["mean"]) == (2, pytest.approx(0.25)) and difference["p"] == pytest.approx(want.pvalue)
    assert difference["p_holm"] == difference["p"] and grpo["difference"] is None
    assert grpo["cost"]["hours"] == pytest.approx(20 / 3600) and grpo["cost"]["step"] == 6.0 and gear["cost_ratio"] == 1.0
    assert gear["runs"][2]["state"] == "failed" and gear["runs"][2]["area"] is None


def test_runs_from_another_machine_count_and_do_not_start(finished, tmp_path, capsys, monkeypatch):
    before = json.loads(json.dumps(figures(finished)))
    file, config = tmp_path / "there.json", tmp_path / "study.yaml"
    file.write_text(json.dumps(before))
    shutil.rmtree(finished.study.folder)
    started = []
    monkeypatch.setattr(launches.Launches, "run", lambda self: started.extend(s.cell.name for s in self.waiting) or 0)
    assert cli.main(["study", str(config), "--add", str(file)]) == 0
    assert started == ["gear-2"] and "5 of 6 runs finished" in capsys.readouterr().out
    after = json.loads((finished.study.folder / "study.json").read_text())
    assert after["arms"]["grpo"] == before["arms"]["grpo"]
    assert after["arms"]["gear"]["difference"] == before["arms"]["gear"]["difference"]

    assert cli.main(["study", str(config), "--add", str(file), "--dry-run"]) == 0
    assert "5 of them finished in another place (--add)" in capsys.readouterr().out

    other = json.loads(file.read_text())
    for changed, message in [
        ({"settings": "x"}, "another configuration"), ({"arms": 3}, "no study.json of a study"),
        ({"arms": {"gear": {"overrides": ["a=b"], "runs": []}}}, "other overrides: a=b"),
    ]:  # fmt: skip
        file.write_text(json.dumps(other | changed))
        assert cli.main(["study", str(config), "--add", str(file)]) == 2 and message in capsys.readouterr().err


def test_tables_have_all_of_it(finished):
    found = {table.title: table for table in tables(figures(finished))}
    last = found["Paired by seed: after the last step"]
    rows = {row[0]: row[1:] for row in last.rows}
    assert rows["grpo"][:3] == ["3", "0.500 (0.252 to 0.748)", "the baseline"] and rows["gear"][0] == "2"
    assert rows["gear"][2].startswith("+0.250 (") and rows["gear"][3] == "2" and last.head[-1] == "p, Holm"
    cost = dict(zip(found["Cost"].head, found["Cost"].rows[1], strict=True))
    assert (cost["arm"], cost["seconds a step"], cost["of grpo"]) == ("gear", "6.00", "1.00")
    (failed,) = found["Failures"].rows
    assert failed[0] == "gear-2" and "<script>alert(1)</script>" in failed[2]
    assert found["Arms"].rows[1] == ["gear", "credit=gear credit_args.alpha=0.6"] and len(found["Runs"].rows) == 6
    assert all(len(row) == len(table.head) for table in found.values() for row in table.rows)


def test_a_folder_and_its_file_have_one_page(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # of the terminal's tables
    assert cli.main(["study", str(tmp_path / "study.yaml"), "--report-only"]) == 0
    page = finished.study.folder / "study.html"
    text = page.read_text()
    assert "5 of 6 runs finished; written: " in capsys.readouterr().out and "alert(1)" not in text, "data is packed"
    page.unlink()
    for given in (finished.study.folder, finished.study.folder / "study.json"):
        assert cli.main(["report", str(given)]) == 0 and page.read_text() == text
    assert cli.main(["report", "--text", str(finished.study.folder)]) == 0
    said = capsys.readouterr().out
    assert "5 of 6 runs finished, 1 failed" in said and "+0.250" in said


def test_a_page_before_any_run_finished_says_so(tmp_path, capsys):
    plan = plan_of(tmp_path)
    assert cli.main(["study", str(tmp_path / "study.yaml"), "--report-only"]) == 0
    assert "0 of 4 runs finished; written: " in capsys.readouterr().out
    shown = describe(plan.study.folder / "study.json")
    assert "0 of 4 runs finished" in shown["said"] and shown["intervals"] == shown["arms"] == []
    (open_,) = (table for table in shown["tables"] if table.title == "Not finished")
    assert ["gear-4", "not begun", "0/2"] in open_.rows


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'])
def test_what_is_no_study_is_refused_in_one_line(tmp_path, capsys, content):
    (tmp_path / "study.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no study.json of a study" in said and said.count("\n") == 1


def test_a_metric_that_no_run_has_is_named(finished, tmp_path):
    write(tmp_path, seeds=[0, 1, 2], metric="outcome/exact")
    with pytest.raises(ConfigError, match="metric=outcome/exact: .*grpo-0 has no such number at any step"):
        figures(load_plan(tmp_path / "study.yaml"))


# --- for real -----------------------------------------------------------------------------------------------------------------


class Forked:
    """A run that `server` forked, as a process that Launches looks after."""

    def __init__(self, ranks):
        self.ranks, self.pid = ranks, ranks.pids[0]

    def poll(self):
        return self.ranks.codes()[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_arms_of_two_seeds_train_and_a_second_call_starts_nothing(tmp_path, server):
    """The trainer's own commands, each with an engine; both arms of a seed solve the same share before training."""
    model = ensure_warm_start(make_task("mathapi", 0), 0, ROOT / ".cache")
    few = ["world_size=1", "task=mathapi", "task_args={}", f"model.path={model}", "train.steps=2", "rollout.prompts_per_step=2"]
    few += ["rollout.group_size=4", "eval.every=2", "eval.prompts=20", "checkpoint.export=false"]
    plan = plan_of(tmp_path, overrides=[*few, "tracking.trackers=[]", "tracking.samples_every=0"], seeds=[0, 1])
    started = []

    def start(words, _environment, log):
        assert words[:4] == [sys.executable, "-m", "gear_trainer", "train"]
        started.append(Forked(server.call(log, "gear_trainer.cli:main", *words[3:], ranks=1)))
        return started[-1]

    code = Launches(plan, standings(plan), start=start).run()
    assert code == 0, "\n".join(cell.log.read_text()[-3000:] for cell in plan.cells)
    lines = {cell.name: read_metrics(cell.cfg.run_dir / "metrics.jsonl") for cell in plan.cells}
    before = {name: steps[0]["held_out_success"] for name, steps in lines.items()}
    assert before["grpo-0"] == before["gear-0"] and before["grpo-1"] == before["gear-1"]
    found = figures(plan)
    assert found["finished"] == 4 and found["arms"]["gear"]["difference"]["area"]["n"] == 2
    assert all(arm["cost"]["step"] > 0 and len(arm["curve"]) == 2 for arm in found["arms"].values())
    assert Launches(plan, standings(plan), start=start).run() == 0 and len(started) == 4
