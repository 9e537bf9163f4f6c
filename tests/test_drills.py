"""Fault drills on the trainer for real, two ZeRO-3 ranks with a vLLM engine each: what was lost, and what was left running.

`GEAR_KILLS=40 pytest tests/test_drills.py -s` kills at 40 moments of a save instead of 6; -s shows the table. `GEAR_MOMENTS=20`
also kills at 20 moments of whole runs, drawn anew each time.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forked_ranks import DEMO, ROOT, free_port

from gear_trainer.build import resolve_model_path
from gear_trainer.config import load_config
from gear_trainer.policy.checkpoint import MANIFEST
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.metrics import MEASURED
from gear_trainer.runs.records import read_records, records_path
from gear_trainer.runs.registry import look
from gear_trainer.tasks import make_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("GEAR_KILLS", 6))
MOMENTS = int(os.environ.get("GEAR_MOMENTS", 0))
TOTAL = KILLS // 2 + 8  # steps; a point that only a later save reaches lets some pass
POINTS = (
    "after the shards", "after latest moved", "before the manifest", "while pruning", "after the manifest", "before latest moves",
    "before the shards",
)  # fmt: skip
SMALL = [
    "rollout.prompts_per_step=2", "rollout.group_size=4", "eval.every=0", "checkpoint.export=false", "checkpoint.every=1",
    "tracking.samples_every=0",  # on a busy machine a run goes on past the first sample, whose lines stand among what was said
]  # fmt: skip
TWELVE = ("train.steps=12", "checkpoint.every=2")
TOLD = ("step ", "memory, GiB", "report:", "resuming")
NOISE = re.compile(r"Triton is installed|^\[rank\d\]:\[W|NUMA binding")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The drills' folder. The demo's warm start is there before the first of them, which waits 10 minutes for its first step:
    making it takes longer on a busy machine."""
    resolve_model_path(load_config(DEMO), make_task("mathapi", 0))
    return tmp_path_factory.mktemp("drills")


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    width = [max(len(str(row[i])) for row in rows) for i in range(5)] if rows else []
    print()
    for row in rows:
        print(" | ".join(str(cell).ljust(w) for cell, w in zip(row, width, strict=True)))


class Drill:
    """Starts runs of one name in a folder and reads what they left; `row` writes a line of the drill's table."""

    def __init__(self, server, out, name, table):
        self.server, self.out, self.name, self.dir, self.starts, self.table = server, out, name, out / name, 0, table

    def row(self, what, outcome, started, lost):
        seconds = f"{time.monotonic() - started:.1f} s"
        left = f"{self.left_running()} processes left"
        self.table.append((what, outcome.replace(str(self.out), "..."), seconds, f"lost: {lost}", left))

    def start(self, *more, **how):
        self.starts += 1
        log = self.out / f"{self.name}.{self.starts}.log"
        return self.server.start(log, f"name={self.name}", f"output_dir={self.out}", *SMALL, *more, **how)

    def metrics(self, name="metrics.jsonl"):
        return [{k: v for k, v in m.items() if k not in MEASURED} for m in read_metrics(self.dir / name)]

    def steps(self):
        return [m["step"] for m in self.metrics()]

    def reached(self, step):
        """Whether the run has finished a step; before the first, whether its ranks watch one another."""
        return len(self.steps()) >= step and (step > 0 or len(list((self.out / f".{self.name}.ranks").glob("rank-*.json"))) == 2)

    def latest(self):
        """The step to go on from: `latest`, or the one finished checkpoint of a kill in the first save."""
        pointer = self.dir / "checkpoints" / "latest"
        if pointer.exists():
            return int(pointer.read_text().removeprefix("step-"))
        return max([0, *(int(p.parent.name.removeprefix("step-")) for p in pointer.parent.glob(f"step-*/{MANIFEST}"))])

    def left_running(self):
        """Processes of the run that still are, a few seconds after its end."""
        deadline = time.monotonic() + 20
        while (left := self._running()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return len(left)

    def _running(self):
        found = []
        for path in (self.out / f".{self.name}.ranks").glob("rank-*.json"):
            with contextlib.suppress(psutil.Error, ValueError, OSError):
                process = psutil.Process(json.loads(path.read_text())["pid"])
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture
def drill(server, out, table, request):
    return Drill(server, out, re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-"), table)


def said(run):
    """What the terminal shows, without the start and the steps."""
    lines = [line for line in run.text().splitlines() if line.strip() and not NOISE.search(line)]
    return [line for line in lines if not line.startswith(TOLD) and "starting vLLM" not in line]


# --- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(server, out, table):
    """The run that the killed ones must equal, and the seconds that one of its saves took."""
    drill = Drill(server, out, "uninterrupted", table)
    run = drill.start(f"train.steps={TOTAL}")
    seconds = _seconds_of_a_save(run, drill, 2)
    assert run.wait() == [0, 0], run.text()[-3000:]
    return drill, seconds


@pytest.mark.parametrize("keep", [1, 2])
def test_D1_killed_inside_a_save_at_many_moments(drill, uninterrupted, keep):
    """Every resume starts, loses one interval at most, and in the end the run is the uninterrupted one."""
    reference, seconds = uninterrupted
    common = (f"checkpoint.keep={keep}", f"train.steps={TOTAL}")
    moments, resumes = [], 0
    for i in range(KILLS // 2):
        before = drill.latest()
        # keep=2 begins with the point after the manifest, in the first save mostly: `latest` was never written then
        point = POINTS[(i // 2 + 4 * (keep - 1)) % len(POINTS)] if i % 2 else None
        late = {"patch": "drill_patches:kill_at", "KILL_AT": point} if point else {}
        torn = drill.dir / "checkpoints" / f"step-{before + 1}"
        started, made = time.monotonic(), _made(torn)
        run = drill.start(*common, *(["--resume"] if i else []), **late)
        if point is None:
            run.until(lambda torn=torn, made=made: _made(torn) not in (0, made))
            time.sleep(1.2 * seconds * (i + 1) / (KILLS // 2))
            run.kill()
        assert run.wait() == [-9, -9], run.text()[-3000:]
        if i:
            assert f"resuming {drill.dir} after step {before}" in run.text() or before == 0
            resumes += 1
        lost = drill.steps()[-1] - drill.latest()
        assert lost in (0, 1), "an interval is lost at most"
        finished = {p.name for p in (drill.dir / "checkpoints").glob("step-*") if (p / MANIFEST).exists()}
        assert drill.latest() == 0 or f"step-{drill.latest()}" in finished
        moments.append((point or f"{seconds * (i + 1) / (KILLS // 2):.2f} s in", lost))
    final = drill.start(*common, "--resume")
    assert final.wait() == [0, 0], final.text()[-3000:]
    assert drill.metrics() == reference.metrics() and drill.steps() == list(range(1, TOTAL + 1))
    for step in range(1, TOTAL + 1):
        assert records_path(drill.dir, step).read_bytes() == records_path(reference.dir, step).read_bytes()
    kept = sorted(p.name for p in (drill.dir / "checkpoints").glob("step-*"))
    assert kept == sorted(f"step-{n}" for n in range(TOTAL - keep + 1, TOTAL + 1))
    lost = sum(steps for _, steps in moments)
    drill.row(
        f"{KILLS // 2} kills inside a save, keep={keep}; the last start",
        f"{resumes + 1} of {resumes + 1} resumes went on",
        started,
        f"{lost} times the step that was being saved",
    )
    print(moments)


@pytest.fixture(scope="module")
def twelve_steps(server, out, table):
    """A run of twelve steps, and the seconds from when its ranks watch one another to step 1, between steps, and to its end."""
    drill, passed = Drill(server, out, "twelve-steps", table), []
    run = drill.start(*TWELVE)
    for done in range(13):
        run.until(lambda done=done: drill.reached(done))
        passed.append(time.monotonic())
    assert run.wait() == [0, 0], run.text()[-3000:]
    passed.append(time.monotonic())
    return drill, [after - before for before, after in zip(passed[:-1], passed[1:], strict=True)]


@pytest.mark.skipif(not MOMENTS, reason="GEAR_MOMENTS=20 (make drills): half a minute a moment")
@pytest.mark.parametrize("moment", range(max(1, MOMENTS)))
def test_killed_at_any_moment_a_resumed_run_is_the_uninterrupted_one(drill, twelve_steps, moment):
    """Between start and end, saves included: every third time all ranks, else one of the two, which the other has to notice."""
    reference, seconds = twelve_steps
    share, whom = (moment + random.random()) / max(1, MOMENTS), ((0, 1), (0,), (1,))[moment % 3]
    done, pause = _moment(seconds, share)
    run = drill.start(*TWELVE)
    run.until(lambda: drill.reached(done))
    time.sleep(pause)
    started = time.monotonic()
    for rank in whom:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pids[rank], signal.SIGKILL)
    expected = [-9 if rank in whom else 1 for rank in (0, 1)]
    codes = run.wait(120)
    what = f"{'both ranks' if len(whom) == 2 else f'rank {whom[0]}'} killed {pause:.2f} s after step {done}"
    by_itself = {0} if len(drill.steps()) == 12 else set()  # behind the last step a rank may have ended before it was killed
    fits = all(code in {want, *by_itself} for code, want in zip(codes, expected, strict=True))
    assert fits and drill.left_running() == 0, (what, codes, run.text()[-3000:])
    before, lost = drill.latest(), len(drill.steps()) - drill.latest()
    assert lost in (0, 1, 2), "the steps since the last save but one that was being made"
    again = drill.start(*TWELVE, "--resume")
    assert again.wait() == [0, 0], (what, again.text()[-3000:])
    assert drill.metrics() == reference.metrics() and drill.steps() == list(range(1, 13)), what
    for number in range(1, 13):
        assert records_path(drill.dir, number).read_bytes() == records_path(reference.dir, number).read_bytes(), what
    drill.row(what, f"went on from step {before}", started, f"{lost} steps and the one begun")
    shutil.rmtree(drill.dir)


def _moment(seconds, share):
    """How many steps are done, and how many seconds ago, when a share of a run's time is over."""
    left = share * sum(seconds)
    for done, interval in enumerate(seconds):
        if left < interval:
            return done, left
        left -= interval
    return len(seconds) - 1, seconds[-1]


def _made(folder):
    """When a folder was made, or last changed; 0 where there is none: an older kill may have left one of that name."""
    return folder.stat().st_ctime_ns if folder.exists() else 0


def _seconds_of_a_save(run, drill, step):
    run.until((drill.dir / "checkpoints" / f"step-{step}").exists)
    started = time.monotonic()
    run.until(lambda: drill.latest() >= step)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def three_steps(server, out, table):
    """A finished run of three steps with both of its checkpoints, to be damaged in copies."""
    drill = Drill(server, out, "three-steps", table)
    run = drill.start("train.steps=3")
    assert run.wait() == [0, 0], run.text()[-3000:]
    return drill


def _copy(drill, source):
    shutil.copytree(source.dir, drill.dir)
    return drill.dir / "checkpoints"


def _resume_refused(drill, what):
    started = time.monotonic()
    before = _files(drill.dir)
    run = drill.start("train.steps=4", "--resume")
    assert run.wait() == [2, 2], run.text()[-3000:]
    lines = said(run)
    assert len(lines) == 1, lines
    assert _files(drill.dir) == before, "nothing was removed or written"
    drill.row(what, lines[0], started, "nothing")
    return lines[0]


def _files(path):
    return {p: p.stat().st_size for p in path.rglob("*") if p.is_file()}


def test_D14_flipped_bytes_in_a_shard(drill, three_steps):
    shard = _copy(drill, three_steps) / "step-3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with shard.open("r+b") as file:
        file.seek(200_000)
        flipped = bytes(255 - b for b in file.read(4096))
        file.seek(200_000)
        file.write(flipped)
    line = _resume_refused(drill, "4,096 flipped bytes in a shard")
    assert str(shard) in line and "write step-2 into" in line


def test_D14_a_torn_shard(drill, three_steps):
    shard = _copy(drill, three_steps) / "step-3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    os.truncate(shard, shard.stat().st_size // 2)
    line = _resume_refused(drill, "a torn shard")
    assert str(shard) in line and "bytes" in line and "write step-2 into" in line


@pytest.mark.parametrize("content", [b"step-9", b"\xff\x00junk", b""])
def test_D12_a_damaged_pointer(drill, three_steps, content):
    pointer = _copy(drill, three_steps) / "latest"
    pointer.write_bytes(content)
    line = _resume_refused(drill, f"`latest` holds {content!r}")
    assert str(pointer) in line and "step-2, step-3" in line


def test_D12_resume_with_checkpoints_deleted_keeps_what_was_there(drill, three_steps):
    shutil.rmtree(_copy(drill, three_steps))
    kept = {p.relative_to(drill.dir): n for p, n in _files(drill.dir).items()}
    started = time.monotonic()
    run = drill.start("train.steps=1", "--resume")
    assert run.wait() == [0, 0], run.text()[-3000:]
    moved = drill.dir.with_name(drill.dir.name + ".1")
    assert {p.relative_to(moved): n for p, n in _files(moved).items()} == kept and drill.steps() == [1]
    assert any("no checkpoint to resume from: moved to" in line for line in said(run))
    drill.row("checkpoints deleted, --resume", "starts at step 1, the old folder moved aside", started, "nothing")


def test_resuming_an_earlier_checkpoint_moves_the_later_steps_aside(drill, three_steps):
    checkpoints = _copy(drill, three_steps)
    (checkpoints / "latest").write_text("step-2")
    run = drill.start("train.steps=3", "--resume")
    assert run.wait() == [0, 0], run.text()[-3000:]
    assert drill.metrics() == three_steps.metrics()
    moved = [p for p in drill.dir.glob("before-resume-at-2*")]
    assert {p.name for folder in moved for p in folder.iterdir()} == {"step-3", "step-00003.parquet", "metrics.jsonl"}


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root alone")
def test_D19_a_full_disk_in_a_save(server, tmp_path, table):
    """On a file system of 20 MB: two checkpoints of 8.4 MB fit, a third beside them does not."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path], check=True)
    try:
        drill = Drill(server, tmp_path, "full", table)
        started = time.monotonic()
        run = drill.start("train.steps=5")
        codes = run.wait()
        lines = said(run)
        assert codes == [1, 1], lines
        assert len(lines) == 1 and "could not be written: the disk is full" in lines[0] and "goes on from step 2" in lines[0], (
            lines
        )
        assert drill.latest() == 2
        drill.row("a full disk in a save", lines[0], started, "step 3")
        subprocess.run(["mount", "-o", "remount,size=60m", tmp_path], check=True)
        resumed = drill.start("train.steps=4", "--resume")
        assert resumed.wait() == [0, 0] and drill.steps() == [1, 2, 3, 4], resumed.text()[-3000:]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# --- numbers ------------------------------------------------------------------------------------------------------------


def test_D15_updates_that_are_not_finite_are_skipped_and_stop_the_run(drill):
    started = time.monotonic()
    run = drill.start("train.steps=9", "checkpoint.every=2", patch="drill_patches:nan_loss_on_one_rank")
    assert run.wait() == [1, 1], run.text()[-3000:]
    metrics = drill.metrics()
    assert [m["updates_skipped"] for m in metrics] == [0, 0, 1, 1, 1]
    assert metrics[2]["grad_norm"] is None and metrics[2]["loss"] is None
    assert metrics[4]["logprob_gap_max"] < 1e-4, "what was skipped on one rank was skipped on both"
    lines = [line for line in said(run) if "Error" in line or line.startswith("gear_trainer")]
    assert len(lines) == 1 and "steps 3 to 5" in lines[0] and "goes on from step 4" in lines[0], lines
    drill.row("a loss of NaN on one rank", lines[0], started, "nothing: no update of it was made")


def test_D15_weights_that_are_not_finite_replace_no_checkpoint(drill):
    started = time.monotonic()
    run = drill.start("train.steps=3", "checkpoint.keep=1", patch="drill_patches:nan_weights_before_the_save")
    assert run.wait() == [1, 1], run.text()[-3000:]
    lines = said(run)
    assert len(lines) == 1 and "weights are not finite, no checkpoint was written; go on from step 1" in lines[0], lines
    assert [p.name for p in (drill.dir / "checkpoints").glob("step-*")] == ["step-1"] and drill.latest() == 1
    found = look(drill.dir)
    assert found.state == "failed" and "weights are not finite" in found.why and found.step == 2
    drill.row("weights of NaN at a save", lines[0], started, "step 2")


def test_D2_D3_D17_a_task_that_misbehaves(drill, out):
    """Raises, 10 MB, NaN, invalid unicode, a forged turn, a sleeper: each costs its own group at most, never the run."""
    started = time.monotonic()
    model = next(path for path in (ROOT / ".cache").glob("warm-start-mathapitask-0-*") if path.is_dir())
    more = ["task=drill_task:RudeTask", f"model.path={model}", "rollout.turn_timeout=2", "rollout.prompts_per_step=8"]
    run = drill.start("train.steps=1", "credit=grpo", *more)
    assert run.wait() == [0, 0], run.text()[-3000:]
    (m,) = drill.metrics()
    assert m["rollouts_failed"] == 12 and m["groups_dropped"] == 3, "those that raise, sleep, or reward NaN"
    assert m["replies_cut"] == 4 and m["texts_escaped"] == 8
    for row in read_records(drill.dir, 1):
        assert len(row["prompt_ids"]) + len(row["ids"]) <= 1024
        if row["problem"].split("-")[0] in ("raises", "nan", "sleeps"):
            assert row["advantage"] == 0
    outcome = f"{m['groups_dropped']:.0f} groups dropped, {m['replies_cut']:.0f} replies cut, {m['texts_escaped']:.0f} escaped"
    drill.row("a task that raises, hangs, returns 10 MB, NaN, forged turns", outcome, started, "its groups")


# --- ranks --------------------------------------------------------------------------------------------------------------


def test_D4_D19_a_second_run_of_the_name_then_a_killed_rank(drill):
    run = drill.start("train.steps=1000")
    run.until(lambda: len(drill.steps()) > 1)
    started = time.monotonic()
    second = drill.start("train.steps=2")
    second.until(lambda: second.codes()[0] is not None) if second.codes()[0] is None else None
    assert second.codes()[0] == 2
    second.kill()  # rank 1 waits for rank 0; a launcher would end it
    lines = said(second)
    assert len(lines) == 1 and f"in use by another run of this name (pid {run.pids[0]} on" in lines[0], lines
    assert run.codes() == [None, None], "the first goes on"
    drill.row("a second run of the name", lines[0], started, "nothing; the first goes on")
    started = time.monotonic()
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait(60) == [1, -9], run.text()[-3000:]
    lines = said(run)
    assert lines == [f"gear_trainer: rank 1 was killed (pid {run.pids[1]}): --resume goes on from the last checkpoint"]
    lost = drill.steps()[-1] - drill.latest()
    assert lost in (0, 1)
    drill.row("one rank killed", lines[0], started, f"{lost} steps and the one begun")


def test_D19_rank_0_killed(drill):
    run = drill.start("train.steps=1000")
    run.until(lambda: len(drill.steps()) > 1)
    started = time.monotonic()
    os.kill(run.pids[0], signal.SIGKILL)
    assert run.wait(60) == [-9, 1], run.text()[-3000:]
    lines = said(run)
    assert lines == [f"gear_trainer: rank 0 was killed (pid {run.pids[0]}): --resume goes on from the last checkpoint"]
    drill.row("rank 0 killed", lines[0], started, "the step begun")


def test_D19_a_stopped_rank(drill):
    """Stopped for a while, the run goes on; stopped for longer than rank_timeout, it ends, names it and shows all stacks."""
    run = drill.start("train.steps=1000", "rank_timeout=12")
    run.until(lambda: len(drill.steps()) > 1)
    os.kill(run.pids[1], signal.SIGSTOP)
    time.sleep(4)
    os.kill(run.pids[1], signal.SIGCONT)
    steps = len(drill.steps())
    run.until(lambda: len(drill.steps()) > steps + 2)
    started = time.monotonic()
    os.kill(run.pids[1], signal.SIGSTOP)
    assert run.wait(120) == [1, -9], run.text()[-3000:]
    assert drill.left_running() == 0, "nobody else would end what is stopped"
    lines = [line for line in said(run) if not line.startswith("  ")]
    assert re.search(rf"rank 1 has been silent for 12 s \(pid {run.pids[1]} on .*, stopped\)", lines[-1]), lines
    assert lines[-2] == f"gear_trainer: all threads are in {drill.out}/.{drill.name}.ranks/rank-*.stack"
    shown = re.findall(r"^gear_trainer: ranks? ([01, ]+) stands? in\n((?:  File .*\n)+)", run.text(), re.MULTILINE)
    assert sorted(", ".join(ranks for ranks, _ in shown).split(", ")) == ["0", "1"] and len(lines) == 2 + len(shown), run.text()
    assert all("loop.py" in stack and "in train" in stack for _, stack in shown), shown
    for path in (drill.out / f".{drill.name}.ranks").glob("*.stack"):
        assert "in _beat" in path.read_text(), "its other threads"
    drill.row("one rank stopped (SIGSTOP), rank_timeout=12", lines[-1], started, "the step begun")


def test_a_rollout_server_killed_in_mid_generation(drill):
    """A stand-in that rank 0 starts as it starts vLLM's; no turn of step 3 is answered before the kill."""
    held = drill.out / "held"
    engine = ["rollout.engine=vllm_server", "max_logprob_gap=1e9"]  # the stand-in's tokens are not the policy's
    run = drill.start("train.steps=9", *engine, patch="drill_patches:stand_in_server", HELD=str(held))
    run.until(held.exists)
    (server,) = [p for p in psutil.Process(run.pids[0]).children() if "fake_vllm.py" in " ".join(p.cmdline())]
    started = time.monotonic()
    server.kill()
    assert run.wait(120) == [1, 1], run.text()[-3000:]
    lines = said(run)
    assert len(lines) == 1 and re.search(r"gear_trainer: rollout server http://\S+ ended \(exit code -9\), see ", lines[0]), lines
    assert drill.steps() == [1, 2] and drill.latest() == 2 and not server.is_running() and drill.left_running() == 0
    drill.row("rollout server killed in mid-generation", lines[0], started, "the step begun")


def test_D5_an_error_on_a_rank_other_than_0_is_shown(drill):
    started = time.monotonic()
    run = drill.start("train.steps=4", patch="drill_patches:error_on_one_rank")
    assert run.wait() == [1, 1], run.text()[-3000:]
    text = "\n".join(said(run))
    assert "[rank 1] Traceback" in text and "ZeroDivisionError: planted" in text
    assert "gear_trainer: rank 1 ended (ZeroDivisionError: planted): --resume goes on from the last checkpoint" in text
    assert "peer" not in text.replace("by peer", "") or "Connection closed" not in text
    drill.row("an error on rank 1", "its traceback marked [rank 1]; rank 0 names it", started, "the step begun")


def test_D16_sigterm_to_the_launcher_alone(drill):
    program = [Path(sys.executable).with_name("deepspeed"), "--log_level", "error", "--num_gpus", "2"]
    program += ["--master_port", str(free_port())]
    arguments = ["--config", DEMO, f"name={drill.name}", f"output_dir={drill.out}", *SMALL, "train.steps=5000"]
    log = (drill.out / "launcher.log").open("w")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [*program, "gear_trainer/run.py", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 900
    while len(drill.steps()) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (drill.out / "launcher.log").read_text()[-3000:]
        time.sleep(0.1)
    process.terminate()
    process.wait(60)
    started, steps = time.monotonic(), len(drill.steps())
    while drill._running() and time.monotonic() - started < 120:
        time.sleep(0.1)
    text = (drill.out / "launcher.log").read_text()
    assert not drill._running() and drill.latest() == drill.steps()[-1], text[-3000:]
    assert "(its launcher is gone); --resume goes on from there" in text
    more = drill.steps()[-1] - steps
    drill.row("SIGTERM to the deepspeed command", "ranks end with a checkpoint", started, f"nothing; {more} more steps")
