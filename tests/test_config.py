"""Bad input gets one message that names the file, the key and the mend, before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gear_kernels import Gear, Grpo
from gear_kernels.methods import Rlsd
from gear_trainer.config import ConfigError, changes, load_config
from gear_trainer.distill import make_distillation
from gear_trainer.model import check_model_path, deepspeed_config, learning_rate
from gear_trainer.plan import check, check_launch, make_method, memory_plan
from gear_trainer.rollout.vllm_colocated import engine_kwargs
from gear_trainer.teacher import has_own_weights

CONFIGS = Path(__file__).parents[1] / "gear_trainer" / "configs"
DEMO = CONFIGS / "mathapi_cpu.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    cfg = load_config(path)
    assert cfg.prompts_per_rank * cfg.world_size == cfg.rollout.prompts_per_step
    make_method(cfg)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.stepz=3"], r"mathapi_cpu.yaml: unknown key train.stepz: did you mean 'steps'\?"),
        (["nonsense=3"], r"unknown key nonsense: known keys here: .*world_size"),
        (["train.lr=fast"], r"train.lr='fast': .*number"),
        (["train.lr=-1"], r"train.lr=-1: .*greater than 0"),
        (["rollout.group_size=1"], r"rollout.group_size=1: .*greater than or equal to 2"),
        (["teacher.weights=best"], r"teacher.weights='best': .*'rollout', 'initial', 'ema' or 'synced'"),
        (["teacher.ema_rate=0"], r"teacher.ema_rate=0: .*greater than 0"),
        (["teacher.sync_every=0"], r"teacher.sync_every=0: .*greater than or equal to 1"),
        (["distill.beta=1.5"], r"distill.beta=1.5: .*less than or equal to 1"),
        (["distill.variant=half"], r"distill.variant='half': .*'full' or 'sampled'"),
        (["distill.coefficient=0"], r"distill.coefficient=0: .*greater than 0"),
        (["signal=k9"], r"signal='k9': .*'k1' or 'reverse_kl'"),
        (["rollout.prompts_per_step=7"], r"does not split over world_size=2: .* make it a multiple"),
        (["train.updates_per_step=3"], r"updates_per_step=3 does not divide the 8 prompts"),
        (["rollout.max_new_tokens=2000"], r"leaves no room for a prompt .* raise max_model_len"),
        (["train.tokens_per_micro_batch=100"], r"less than one sequence .* raise it"),
        (["credit=grpo", "credit_args={alpha: 0.1}"], r"credit=grpo takes no credit_args: drop them"),
        (["train.lr"], r"override 'train.lr': expected key=value"),
        (["name.x=1"], r"override 'name.x=1': name is a value, not a section"),
        (["train.lr={"], r"not valid YAML .*quote it"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, overrides)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("name: a\nmodel: [\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: line 3: not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "short.yaml").write_text("name: a\nworld_size: 1\nmodel: {path: x/y}\n")
    with pytest.raises(ConfigError, match="task is missing: give it in the file or as task=VALUE"):
        load_config(tmp_path / "short.yaml")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["credit=magic"], "credit=magic: known are gear, grpo"),
        (["credit=opsd+magic"], "credit=opsd\\+magic: 'magic' is unknown; known are gear, .* opsd, sdar, or a \\+ of two"),
        (["credit=opsd+"], "'' is unknown"),
        (["credit=gear+grpo"], "give one credit method and at most one of opsd and sdar"),
        (["credit=opsd+sdar"], "give one credit method and at most one of opsd and sdar"),
        (["credit=opsd", "credit_args={alpha: 1}"], "credit_args.alpha: unknown; grpo takes none"),
        (
            ["teacher.weights=ema", "deepspeed={zero_optimization: {zero_hpz_partition_size: 2}}"],
            "teacher.weights=ema: does not go with deepspeed.zero_optimization.zero_hpz_partition_size; leave it out",
        ),
        (
            ["teacher.weights=synced", "deepspeed={zero_optimization: {offload_param: {device: nvme}}}"],
            "zero_optimization.offload_param.device=nvme",
        ),
        (
            ["teacher.weights=ema", "deepspeed={zero_optimization: {zero_quantized_nontrainable_weights: true}}"],
            "zero_optimization.zero_quantized_nontrainable_weights",
        ),
        (["credit_args={alpa: 1}"], "credit_args.alpa: unknown; gear takes alpha"),
        (["credit_args={alpha: 3}"], "alpha"),
        (["model.path=./nowhere"], r"model.path=./nowhere: no such directory"),
        (["model.path=builtin:gpt"], "known are builtin:tiny-qwen3 and builtin:smollm2"),
        (["task=sums"], "task sums has no demonstrations"),
        (["task=chess"], "chess"),
        (["task_args={wrong: 1}"], "wrong"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(load_config(DEMO, overrides))


def test_credit_names_a_method_a_distillation_loss_or_both():
    def made(*overrides):
        cfg = load_config(DEMO, list(overrides))
        method, distillation = make_method(cfg), make_distillation(cfg)
        return type(method), distillation and (distillation.name, distillation.full, distillation.coefficient, distillation.alone)

    assert made() == (Gear, None) and made("credit=grpo") == (Grpo, None)
    assert made("credit=opsd") == (Grpo, ("opsd", True, 1.0, True))
    assert made("credit=opsd+gear") == made("credit=gear+opsd") == (Gear, ("opsd", True, 0.1, False))
    assert made("credit=opsd + grpo", "distill.variant=sampled") == (Grpo, ("opsd", False, 0.1, False))
    assert made("credit=sdar") == made("credit=sdar+grpo") == (Grpo, ("sdar", False, 0.01, False))
    assert made("credit=sdar+rlsd", "distill.coefficient=0.5") == (Rlsd, ("sdar", False, 0.5, False))
    stats = [make_distillation(load_config(DEMO, ["credit=opsd", f"distill.beta={b}"])).stats for b in (0, 0.3, 1)]
    assert stats == [("forward_kl",), ("jsd",), ("reverse_kl",)]


def test_a_second_copy_only_where_it_is_read():
    def own(*overrides):
        cfg = load_config(DEMO, list(overrides))
        return has_own_weights(cfg, make_method(cfg))

    assert not own() and own("teacher.weights=ema") and own("teacher.weights=initial", "credit=opsd+grpo")
    assert not own("teacher.weights=ema", "credit=grpo")


def test_memory_plan_lists_the_teacher(qwen3_8b):
    from transformers import AutoConfig

    cfg = load_config(CONFIGS / "qwen3_8b.yaml", [*qwen3_8b, "teacher.weights=ema"])
    rows = dict(memory_plan(cfg, AutoConfig.from_pretrained(cfg.model.path), make_method(cfg)))
    assert rows["teacher"] == "5.72 GiB a rank (ema weights and their float32 average)"  # 8.19 B * 6 bytes / 8 ranks
    assert rows["gathered head"].startswith("2.32 GiB")
    cfg = load_config(CONFIGS / "qwen3_8b.yaml", qwen3_8b)
    assert "teacher" not in dict(memory_plan(cfg, AutoConfig.from_pretrained(cfg.model.path), make_method(cfg)))


def test_changes_between_two_configurations_are_named():
    a, b = (load_config(DEMO, o).model_dump(mode="json") for o in ([], ["train.lr=1", "credit=grpo"]))
    assert changes(a, b) == ["credit: gear -> grpo", "train.lr: 0.0003 -> 1.0"] and changes(a, a) == []


def test_model_directory_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json"):
        check_model_path(str(tmp_path))


def test_launch_with_another_number_of_ranks(monkeypatch):
    cfg = load_config(DEMO)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="world_size=2, but 3 process.* --num_gpus 2"):
        check_launch(cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(cfg)


def test_learning_rate_schedules():
    cfg = load_config(DEMO, ["train.steps=10", "train.lr=1", "train.lr_warmup_steps=2", "train.lr_schedule=linear"])
    rates = [learning_rate(cfg, s) for s in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(1 / 8)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_deepspeed_section_is_merged_over():
    cfg = load_config(DEMO, ["deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}, gradient_clipping: 0.5}"])
    made = deepspeed_config(cfg)
    assert made["zero_optimization"]["stage"] == 3 and made["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert made["gradient_clipping"] == 0.5


def test_full_kl_signal_takes_the_max_normaliser():
    assert make_method(load_config(DEMO)).normalizer == "relu_max"
    assert make_method(load_config(DEMO, ["signal=reverse_kl"])).normalizer == "max"
    assert make_method(load_config(DEMO, ["signal=reverse_kl", "credit_args={normalizer: minmax}"])).normalizer == "minmax"
    assert make_method(load_config(DEMO, ["credit=rlsd", "credit_args.mix=0.25"])).mix == 0.25
    for arguments, message in (
        (["credit=rlsd", "signal=reverse_kl"], "signal=reverse_kl: rlsd reads k1"),
        (["credit=sgcd", "credit_args.alpha=1"], "credit_args.alpha: unknown; sgcd takes cap, gamma"),
        (["credit=sgcd", "credit_args.cap=0"], "credit_args: Sgcd.cap: given 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_method(load_config(DEMO, arguments))


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory):
    """A directory with Qwen3-8B's published sizes and a tokenizer, no weights; and a data file in GSM8K's form."""
    from transformers import Qwen3Config

    from gear_trainer.tokenizer import subset_tokenizer

    folder = tmp_path_factory.mktemp("qwen3-8b")
    subset_tokenizer(["Question: what is 1 + 1? Answer: 2"], folder)
    Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, vocab_size=151936, max_position_embeddings=40960, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    for name, start in (("train", 0), ("test", 100)):
        rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(start, start + 40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{path: {folder}/train.jsonl, held_out_path: {folder}/test.jsonl}}"
    return [f"model.path={folder}", f"task_args={data}", "rollout.max_model_len=4096"]


def test_qwen3_8b_engine_configurations_build(qwen3_8b):
    """DeepSpeed's and vLLM's own validation accept what the shipped 8B configuration means."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from vllm.engine.arg_utils import EngineArgs

    cfg = load_config(CONFIGS / "qwen3_8b.yaml", qwen3_8b)
    kwargs = engine_kwargs(cfg, cfg.model.path) | {"enable_sleep_mode": False}
    EngineArgs(**(engine_kwargs(cfg, cfg.model.path))).create_model_config()
    vllm = EngineArgs(**kwargs).create_engine_config()
    assert vllm.model_config.max_model_len == 4096 and str(vllm.model_config.dtype) == "torch.bfloat16"
    made = DeepSpeedConfig(deepspeed_config(cfg) | {"train_batch_size": 1})
    assert made.zero_config.stage == 3 and made.bfloat16_config.enabled and made.gradient_clipping == 1.0


def test_dry_run_prints_the_resolved_run(qwen3_8b):
    done = _run("--config", CONFIGS / "qwen3_8b.yaml", "--dry-run", *qwen3_8b)
    assert done.returncode == 0, done.stderr[-3000:]
    for wanted in (
        "128 x 8 = 1024 rollouts a step, 128 a rank",
        "8.19 B",
        "micro-batches a rank",
        "kl_threshold=0.1",
        "stage: 3",
    ):
        assert wanted in done.stdout, wanted


def test_errors_end_with_code_2_and_one_line(tmp_path):
    done = _run("--config", DEMO, "--dry-run", "train.stepz=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'steps'" in done.stderr
    (tmp_path / "data.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{broken\n')
    data = f"task_args={{path: {tmp_path}/data.jsonl, held_out_path: {tmp_path}/data.jsonl}}"
    done = _run("--config", CONFIGS / "qwen3_8b.yaml", "--dry-run", data)
    assert done.returncode == 2 and "data.jsonl" in done.stderr and "line 2" in done.stderr


def _run(*args):
    command = [sys.executable, "-m", "gear_trainer.run", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("credit", ["turn", "gigpo"])
def test_turn_methods_need_a_task_with_turns(credit):
    with pytest.raises(ConfigError, match=f"credit={credit} tells turns apart, and task=sums has one"):
        check(load_config(DEMO, [f"credit={credit}", "task=sums", "model.path=builtin:smollm2"]))
    task, method = check(load_config(DEMO, [f"credit={credit}"]))
    assert task.turn_rewards and "turn_rewards" in method.needs
