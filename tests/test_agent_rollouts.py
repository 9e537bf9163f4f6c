"""Agent tasks through the trainer's own rollouts, and through a run of it: the policy is scripted, all else is what a run has."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace

import pytest
from scripted_agent import Script, Speaker, lines

from gear_trainer.demo.qwen3_tokenizer import subset_tokenizer
from gear_trainer.evaluation import records
from gear_trainer.rollout import Limits, Status, roll_out
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.files import read_metrics
from gear_trainer.runs.records import read_records
from gear_trainer.tasks import make_task

DATA = os.environ.get("GEAR_DATA")
SCHEDULES = ("lockstep", "continuous")


def guessing(folder, environment):
    """Arguments of TRL's task over rows of a number each."""
    paths = {}
    for name, numbers in (("path", range(6)), ("held_out_path", range(6, 10))):
        file = folder / f"{name}.jsonl"
        rows = [{"prompt": f"Guess the number of row {n}.", "number": n} for n in numbers]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(file)
    return paths | {"environment": f"stand_in_worlds:{environment}", "teacher_field": "number"}


def sums(folder):
    """Arguments of a mathematics task with the tool."""
    paths = {}
    for name, pairs in (("path", range(2, 8)), ("held_out_path", range(11, 15))):
        file = folder / f"sums_{name}.jsonl"
        rows = [{"problem": f"How much is {n} times 7?", "answer": str(n * 7), "solution": f"{n} x 7"} for n in pairs]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(file)
    return paths | {"tool": "python"}


def tokenizer_of(task, problems, folder):
    """Qwen3's tokens for all that these problems say and are told."""
    texts = [m["content"] for p in problems for m in (*p.messages, *p.teacher_messages)]
    texts += [turn for p in problems for said in lines(p) for turn in said]
    texts += [json.dumps(tool) for p in problems for tool in (p.tools or task.tools or [])]
    return subset_tokenizer(texts, folder, max_length=16384)


CASES = {
    "mock": ("tau-solo", "tau2", lambda folder: {"domain": "mock"}, 7),
    "telecom": ("tau-solo", "tau2", lambda folder: {"domain": "telecom"}, 2),
    "acebench": ("acebench-agent", "evalscope", lambda folder: {"path": f"{DATA}/acebench_en", "graded": True}, 6),
    "acebench, a user": (
        "acebench-agent",
        "evalscope",
        lambda folder: {"path": f"{DATA}/acebench_en", "graded": True, "categories": "agent_multi_turn"},
        6,
    ),
    "TRL": ("trl", "transformers", lambda folder: guessing(folder, "Guessing"), 4),
    "TRL, async": ("trl", "transformers", lambda folder: guessing(folder, "AsyncGuessing"), 4),
    "python": ("math", "math_verify", sums, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_agents_through_rollouts(case, tmp_path):
    """Each group has a rollout that says the ground truth and one that falls short: the first earns more, nothing fails, all
    calls are answered in the stream, and both schedules give the same."""
    name, package, args, count = CASES[case]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    if case.startswith("acebench") and DATA is None:
        pytest.skip("GEAR_DATA names no folder with acebench_en/")
    task = make_task(name, 0, args(tmp_path))
    problems = task.held_out(count)
    assert len(problems) == count
    chat = Chat(tokenizer_of(task, problems, tmp_path / "tokenizer"), task.tools)
    limits = Limits(2, 1.0, 512, 1 << 15, 600.0)
    found = {}
    for schedule in SCHEDULES:
        engine = Speaker(Script.of(chat, problems))
        found[schedule] = roll_out(engine, chat, task, enumerate(problems), replace(limits, schedule=schedule), ("key",))
    for right, wrong in zip(found["lockstep"][::2], found["lockstep"][1::2], strict=True):
        assert (right.failures, right.status, wrong.status) == ([], Status.DONE, Status.DONE), right.problem.id
        assert right.reward > wrong.reward or (case == "mock" and right.reward == 1.0), right.problem.id
        said = chat.tokenizer.decode(right.ids)
        assert said.count("<tool_response>") == said.count("<tool_call>") and said.count("<|im_end|>") == 2 * right.turns - 1
        assert right.calls == sum(turn.count("<tool_call>") for turn in lines(right.problem)[0]) or "acebench" in case
        assert right.metrics.keys() == wrong.metrics.keys()
    streams = [[(r.ids, r.mask, r.reward, r.metrics, r.calls, r.errors) for r in rollouts] for rollouts in found.values()]
    assert streams[0] == streams[1]


# --- a whole run ----------------------------------------------------------------------------------------------------------

slow = [pytest.mark.slow, pytest.mark.timeout(3600)]


def tiny_model(task, problems, folder):
    """An untrained Qwen3 of two layers that reads these problems."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tokenizer_of(task, problems, folder)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, max_position_embeddings=16384, **heads)
    config.eos_token_id = tokenizer.eos_token_id
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, server):
    """Two steps on two ranks over ACEBench's agents, a TRL class of async tools, and mathematics with code in the sandbox."""
    import yaml

    if DATA is None or importlib.util.find_spec("evalscope") is None:
        pytest.skip("GEAR_DATA names no folder with acebench_en/, or evalscope is not installed")
    folder = tmp_path_factory.mktemp("agents")
    args = {"path": f"{DATA}/acebench_en", "graded": True, "train_share": 0.5}
    parts = {
        "ace": {"task": "acebench-agent", "args": args},
        "trl": {"task": "trl", "args": guessing(folder, "AsyncGuessing")},
        "maths": {"task": "math", "args": sums(folder)},
    }
    plain = {"task": "math", "args": {key: value for key, value in parts["maths"]["args"].items() if key != "tool"}}
    task = make_task("mixture", 0, {"parts": parts | {"maths": plain}})  # the same problems; the ranks open the sandbox
    tiny_model(task, [*map(task.train_problem, range(12)), *task.held_out(6)], folder / "model")
    config = {
        "name": "agents", "output_dir": str(folder), "world_size": 2, "task": "mixture", "task_args": {"parts": parts},
        "model": {"path": str(folder / "model"), "dtype": "float32"}, "credit": "gear",
        "rollout": {
            "engine": "scripted_agent:SpeakingVllm", "prompts_per_step": 6, "group_size": 2, "max_new_tokens": 256,
            "max_model_len": 6144, "turn_timeout": 600.0, "vllm": {"kv_cache_mib": 64, "max_num_seqs": 16},
        },
        "train": {"steps": 2, "lr": 1.0e-3, "tokens_per_micro_batch": 12288}, "eval": {"every": 2, "prompts": 3},
        "checkpoint": {"every": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    ranks = server.start(folder / "log", "--config", str(folder / "run.yaml"))
    assert ranks.wait(3200) == [0, 0], ranks.text()[-6000:]
    return folder / "agents"


@pytest.mark.parametrize("step", (1, 2))
class TestRun:
    """What stands in a run's files."""

    pytestmark = slow

    def test_agents_are_trained_on(self, run, step):
        metrics = next(m for m in read_metrics(run / "metrics.jsonl") if m["step"] == step)
        assert metrics["logprob_gap_max"] < 1e-3 and metrics["rollouts_failed"] == 0 and metrics["updates_skipped"] == 0
        assert 0 < metrics["success"] < 1 and metrics["tool_calls"] > 0 and metrics["grad_norm"] > 0
        rows = read_records(run, step)
        assert len(rows) == 12
        for right, wrong in zip(rows[::2], rows[1::2], strict=True):
            assert right["reward"] > wrong["reward"] and right["advantage"] > 0 > wrong["advantage"]
            policy = [token for token, mine in zip(right["tokens"], right["mask"], strict=True) if mine]
            assert "<tool_response>" not in policy and policy[-1] == "<|im_end|>"
        parts = {row["problem"].split("/")[0] for row in rows}
        assert parts == {"ace", "trl", "maths"}

    def test_code_ran_in_the_sandbox(self, run, step):
        rows = [row for row in read_records(run, step) if row["problem"].startswith("maths/")]
        assert len(rows) == 4
        for row in rows:
            said = row["response"].split("<tool_response>")[1].split("</tool_response>")[0]
            assert ("ZeroDivisionError" in said) != (row["reward"] == 1.0) and row["response"].count("\\boxed{") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", (None, 1))
def test_a_finished_run_is_evaluated_by_vllm(run, server, step):
    """Its last model, and a checkpoint: an untrained model solves nothing, and all that it says is judged and counted."""
    what = [] if step is None else ["--step", str(step)]
    given = ["--run", str(run), *what, "--samples", "2", "rollout.engine=vllm_colocated", "eval.max_new_tokens=16"]
    log = run.parent / f"evaluation-{step}.log"
    ranks = server.start(log, ranks=1, patch="drill_patches:evaluates", EVALUATE=json.dumps(given))
    assert ranks.wait(3200) == [0], ranks.text()[-6000:]
    folder = run / "evaluation" / ("model" if step is None else "step-1") / "mixture"
    result = records.read_result(folder)
    assert result["settings"]["samples"] == 2 and f"written: {folder}" in ranks.text()
    kept = records.read_records(folder)
    assert len(kept) == 6 and {one["end"] for one in kept} <= {"done", "turns", "length"}
    assert {one["problem"].split("/")[0] for one in kept} == {"ace", "trl", "maths"} and not any(one["success"] for one in kept)
    assert (run / "model-step-1").is_dir() or step is None
