"""The product's main job for real: DeepSpeed ZeRO-3 on two ranks, vLLM rollouts, tool calls, GEAR credit, kill and resume.

Ctrl-C meets a run that was started as a user types it, as others are in test_drills.py and test_two_hosts.py. The rest have no
launcher: see forked_ranks.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_openai import fake_openai
from forked_ranks import DEMO, ROOT, free_port

from benchmarks.reports import demo as demo_report
from benchmarks.reports import sparse_training
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.metrics import MEASURED
from gear_trainer.runs.records import read_records, recorded_steps
from gear_trainer.runs.registry import look

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS = 24  # of the demo


def _launch(name, out, *more):
    """A run as a user types it."""
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*deepspeed, "gear_trainer/run.py", "--config", DEMO, f"name={name}", f"output_dir={out}", *more]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    log = (out / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _run(server, name, out, *more, **how):
    """A whole run without a launcher; its metrics."""
    run = server.start(out / f"{name}.log", f"name={name}", f"output_dir={out}", *more, **how)
    assert run.wait(3200) == [0, 0], run.text()[-6000:]
    return read_metrics(out / name / "metrics.jsonl")


def _same(got, want):
    for key in want.keys() - set(MEASURED):
        assert got[key] == pytest.approx(want[key], rel=1e-6, abs=1e-9), (got["step"], key)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def demo(out, server):
    """The shipped demo, 24 of its 60 steps, evaluated before and after."""
    return _run(server, "demo", out, f"train.steps={STEPS}", f"eval.every={STEPS}")


def test_demo_learns(demo):
    held_out = [m["held_out_success"] for m in demo if "held_out_success" in m]
    assert held_out[-1] >= 0.65 and held_out[-1] - held_out[0] >= 0.25, held_out
    assert {m["padding_share"] for m in demo if m["step"]} == {0.0}, "packed unless told otherwise"


def test_trainer_and_vllm_agree_at_every_step(demo):
    steps = demo[1:]
    assert len(steps) == STEPS and max(m["logprob_gap_max"] for m in steps) < 1e-4


def test_every_step_logs_what_the_method_asks_for(demo):
    for m in demo[1:]:
        assert 0 < m["share_above_threshold"] < 1 and m["segments_per_trajectory"] > 0
        assert 0.9 <= m["mean_weight_positive"] <= 1.1 and 0.9 <= m["mean_weight_negative"] <= 1.1
        phases = {"rollout", "wait", "score", "credit", "update", "push", "records"}
        assert phases | {"step"} <= m["seconds"].keys() and m["tokens_per_second"] > 0
        assert phases <= m["memory"].keys() and m["memory_planned"].keys() == {"rollout", "score", "update", "push"}
        assert 0 <= m["idle_share"] < 1 and 0 < m["response_length_p50"] <= m["response_length_p99"]
        assert m["tool_calls"] > 0 and m["clip_fraction"] == 0, "one update a step is on-policy: nothing is clipped"


def test_the_teacher_knows_more(demo):
    first = demo[1]
    assert first["teacher_gain_success"] > first["teacher_gain_failure"] + 0.1


def test_rollout_files_hold_tokens_masks_and_credit(demo, out):
    assert recorded_steps(out / "demo") == list(range(1, STEPS + 1))
    rows = read_records(out / "demo", 1)
    assert len(rows) == 128 and len({(r["group"], r["sample"]) for r in rows}) == 128
    for r in rows:
        lists = [r[k] for k in ("ids", "tokens", "mask", "logprobs", "entropy", "weight", "segment")]
        assert len({len(x) for x in lists}) == 1 and "".join(r["tokens"]) == r["response"]
        assert (r["advantage"] == 0) == (r["teacher_logprobs"] is None)
        assert all((w is None) == (not m) for w, m in zip(r["weight"], r["mask"], strict=True))
    assert any("<tool_response>" in r["response"] for r in rows)


def test_the_exported_policy_is_an_hf_model(demo, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "demo" / "model")
    assert len(AutoTokenizer.from_pretrained(out / "demo" / "model")) == model.config.vocab_size
    assert (out / "demo" / "report.html").stat().st_size > 10_000 and list((out / "demo" / "tensorboard").iterdir())


def test_scoring_is_split_by_part_from_what_a_run_kept(demo, out):
    found = demo_report.scoring(out / "demo", rounds=2)
    kept = read_records(out / "demo", demo_report.SCORED_STEP)
    scored = [sum(line["mask"]) for line in kept if line["advantage"] != 0]
    assert (found["trajectories"], found["policy_tokens"]) == (len(scored), sum(scored)) and len(scored) > 0
    ms = {name: part["median_ms"] for name, part in found["parts"].items()}
    assert set(ms) == {"policy", "teacher", "head", "head with teacher", "scan"} and min(ms.values()) > 0


def test_an_update_is_split_into_backbone_and_head(demo, out):
    found = sparse_training.parts(out / "demo", rounds=2)
    kept = [line for line in read_records(out / "demo", sparse_training.TIMED_STEP) if line["advantage"] != 0]
    assert found["tokens"] == sum(sum(line["mask"]) for line in kept) > 0
    assert min(found[name]["median_ms"] for name in ("backbone", *sparse_training.BACKWARDS)) > 0


def test_kill_9_and_resume_repeats_the_uninterrupted_run(demo, out, server):
    start = ("name=killed", f"output_dir={out}", "checkpoint.every=3")
    run = server.start(out / "killed.log", *start)
    run.until(lambda: len(read_metrics(out / "killed" / "metrics.jsonl")) > 4)  # step 0 and four more; the checkpoint is step 3's
    run.kill()
    assert run.wait() == [-9, -9]
    resumed = _run(server, "killed", out, "checkpoint.every=3", "train.steps=5", "--resume")
    assert [m["step"] for m in resumed] == list(range(6))
    assert "resuming" in (out / "killed.log").read_text()
    for got, want in zip(resumed[3:], demo[3:6], strict=True):
        _same(got, want)


def test_without_the_push_vllm_falls_behind(out, server):
    metrics = _run(server, "unpushed", out, "train.steps=6", "eval.every=0", patch="drill_patches:pushes_end")
    gaps = [m["logprob_gap_max"] for m in metrics]
    assert max(gaps[:3]) < 1e-4, "steps 1 to 3 sample from pushed weights"
    assert min(gaps[3:]) > 1e-2 and metrics[-1]["logprob_gap_mean"] > 10 * metrics[0]["logprob_gap_mean"], gaps


def test_sgcd_with_both_writers(out, server):
    """Filter, references, masking and splice in a run; an endpoint that fails costs references only."""
    with fake_openai(behave=lambda body: 500 if body["seed"] % 3 == 0 else "Attempt 1: call the tool, then copy.") as endpoint:
        small = ["credit=sgcd", "train.steps=4", "eval.every=0", "rollout.prompts_per_step=8", "checkpoint.export=false"]
        metrics = _run(server, "sgcd", out, *small, patch="drill_patches:change_writer", WRITER_URL=endpoint.url)
    seeds = [body["seed"] for body in endpoint.requests if body["max_tokens"] > 1]
    assert sum(m["references_failed"] for m in metrics[2:]) == sum(seed % 3 == 0 for seed in seeds) > 0
    assert sum(m["references_written"] for m in metrics[2:]) == sum(seed % 3 != 0 for seed in seeds) > 0
    assert all(m["references_written"] > 0 and m["seconds"]["write"] > 0 for m in metrics)
    for m in metrics:
        rows = read_records(out / "sgcd", m["step"])
        assert len({r["group"] for r in rows if r["reference"]}) == m["references_written"]
        for r in rows:
            weights = [w for w in r["weight"] if w is not None]
            assert all(1 <= w <= 2 for w in weights) and (r["reference"] is None) == (r["teacher_logprobs"] is None)
            assert r["reference"] or set(weights) == {1.0}, "no reference: plain advantages"
    assert {r["reference"] for r in rows} <= {None, "[masked]: call the tool, then copy."}


SMALL = ("eval.every=0", "rollout.prompts_per_step=8", "checkpoint.export=false")
KL_OF_AN_AVERAGE = (
    "credit=gear", "kl.coefficient=0.05", "kl.reference=ema", "kl.ema_rate=0.5", "train.entropy_bonus=0.01",
    "train.importance_mode=mask", "train.importance_floor=0.5", "train.importance_cap=5", "train.advantages=batch",
    "train.overlong_buffer=8", "train.mask_truncated=true",
)  # fmt: skip


def test_kl_to_an_average_entropy_bonus_and_icepop_resume_exactly(out, server):
    """Step 3 from the checkpoint of step 2, whose reference model is neither the start's nor the policy's."""
    more = (*SMALL, *KL_OF_AN_AVERAGE, "train.steps=3", "checkpoint.every=1")
    whole = _run(server, "kl", out, *more)
    checkpoints = out / "kl" / "checkpoints"
    for rank in range(2):
        assert (checkpoints / "step-2" / f"reference_rank{rank}.pt").stat().st_size > 1e6  # half of 0.7 M parameters in float32
    (checkpoints / "latest").write_text("step-2")
    resumed = _run(server, "kl", out, *more, "--resume")
    assert [m["step"] for m in resumed] == [1, 2, 3]
    _same(resumed[2], whole[2])
    first, *later = whole
    assert first["reference_kl"] == pytest.approx(0, abs=1e-6) and min(m["reference_kl"] for m in later) > 1e-5
    assert all(m["importance_masked"] == 0 and -1 <= m["overlong_penalty"] <= 0 and m["grad_norm"] > 0 for m in whole)


@pytest.mark.parametrize(
    "name, more",
    [
        (
            "gspo",
            ["train.policy_loss=gspo", "train.clip_low=3e-4", "train.clip_high=4e-4", "train.importance_mode=sequence_mask"],
        ),
        ("cispo", ["train.policy_loss=cispo", "train.clip_low=1", "train.aggregation=token_mean", "train.advantages=rloo"]),
    ],
)
def test_other_policy_losses_run(out, server, name, more):
    """Four updates a step: ratios leave 1, the sequences' by so little that only the paper's clip sees it."""
    four = ("train.steps=2", "train.updates_per_step=4", "train.lr=1e-3")
    metrics = _run(server, name, out, *SMALL, *more, *four)
    assert [m["step"] for m in metrics] == [1, 2] and all(m["updates_skipped"] == 0 for m in metrics)
    assert all(m["approx_kl"] > 0 and 0 <= m["clip_fraction"] < 1 for m in metrics), metrics
    assert name != "gspo" or min(m["clip_fraction"] for m in metrics) > 0


def test_ctrl_c_leaves_a_checkpoint_at_the_step_it_stopped(out):
    process = _launch("stopped", out, "eval.every=0", "rollout.prompts_per_step=4")
    while len(read_metrics(out / "stopped" / "metrics.jsonl")) < 2:
        assert process.poll() is None, (out / "stopped.log").read_text()[-6000:]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(600)
    deadline = time.monotonic() + 300
    while _ranks("name=stopped") and time.monotonic() < deadline:
        time.sleep(0.2)
    steps = [m["step"] for m in read_metrics(out / "stopped" / "metrics.jsonl")]
    assert (out / "stopped" / "checkpoints" / "latest").read_text() == f"step-{steps[-1]}"
    found = look(out / "stopped")
    assert (found.state, found.step, found.method) == ("stopped", steps[-1], "gear")


def _ranks(marker):
    found = [p for p in psutil.process_iter(["cmdline", "status"]) if marker in (p.info["cmdline"] or [])]
    return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]
