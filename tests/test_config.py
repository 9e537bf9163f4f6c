"""Bad input gets one message that names the file, the key and the mend, before anything starts."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gear_kernels import Gear, Grpo
from gear_kernels.methods import Rlsd
from gear_trainer import run
from gear_trainer.config import changes, load_config, parse_yaml
from gear_trainer.errors import ConfigError
from gear_trainer.policy.hub import check_model_path, model_sizes
from gear_trainer.policy.zero import deepspeed_config
from gear_trainer.preflight.checks import check, check_launch
from gear_trainer.preflight.machine import check_machine, check_port
from gear_trainer.recipe import resolve
from gear_trainer.rollout.vllm_colocated import engine_arguments, engine_kwargs, kv_bytes
from gear_trainer.runs.trackers import flat
from gear_trainer.tasks import TaskError, make_task
from gear_trainer.train.update import learning_rate

DATA = os.environ.get("GEAR_DATA")
CONFIGS = Path(__file__).parents[1] / "gear_trainer" / "configs"
DEMO = CONFIGS / "mathapi_cpu.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    cfg = load_config(path)
    assert cfg.prompts_per_rank * cfg.world_size == cfg.rollout.prompts_per_step
    resolve(cfg)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.stepz=3"], r"mathapi_cpu.yaml: unknown key train.stepz: did you mean 'steps'\?"),
        (["nonsense=3"], r"unknown key nonsense: known keys here: .*world_size"),
        (["train.lr=fast"], r"train.lr='fast': .*number"),
        (["train.lr=-1"], r"train.lr=-1: .*greater than 0"),
        (["rollout.kv_cache_mib=9"], r"^[^;]*unknown key rollout.kv_cache_mib: it is rollout.vllm.kv_cache_mib now$"),
        (["rollout.engine_args.seed=9"], r"unknown key rollout.engine_args: it is rollout.vllm.engine_args now"),
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
        (["credit=grpo", "credit_args={alpha: 0.1}"], r"credit=grpo takes no credit_args: drop them"),
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
        (["model.path=builtin:gpt"], "known are builtin:tiny-qwen3, with @SEED behind it too, and builtin:smollm2"),
        (["model.path=builtin:tiny-qwen3@x"], "known are builtin:tiny-qwen3"),
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
        recipe = resolve(cfg)
        distillation = recipe.distillation
        return type(recipe.method), distillation and (
            distillation.name,
            distillation.full,
            distillation.coefficient,
            distillation.alone,
        )

    assert made() == (Gear, None) and made("credit=grpo") == (Grpo, None)
    assert made("credit=opsd") == (Grpo, ("opsd", True, 1.0, True))
    assert made("credit=opsd+gear") == made("credit=gear+opsd") == (Gear, ("opsd", True, 0.1, False))
    assert made("credit=opsd + grpo", "distill.variant=sampled") == (Grpo, ("opsd", False, 0.1, False))
    assert made("credit=sdar") == made("credit=sdar+grpo") == (Grpo, ("sdar", False, 0.01, False))
    assert made("credit=sdar+rlsd", "distill.coefficient=0.5") == (Rlsd, ("sdar", False, 0.5, False))
    stats = [resolve(load_config(DEMO, ["credit=opsd", f"distill.beta={b}"])).distillation.stats for b in (0, 0.3, 1)]
    assert stats == [("forward_kl",), ("jsd",), ("reverse_kl",)]


def test_a_second_copy_only_where_it_is_read():
    def own(*overrides):
        teacher = resolve(load_config(DEMO, list(overrides))).teacher
        return teacher and teacher.weights

    assert not own() and own("teacher.weights=ema") == "ema" and own("teacher.weights=initial", "credit=opsd+grpo") == "initial"
    assert not own("teacher.weights=ema", "credit=grpo")


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
    assert resolve(load_config(DEMO)).method.normalizer == "relu_max"
    assert resolve(load_config(DEMO, ["signal=reverse_kl"])).method.normalizer == "max"
    assert resolve(load_config(DEMO, ["signal=reverse_kl", "credit_args={normalizer: minmax}"])).method.normalizer == "minmax"
    assert resolve(load_config(DEMO, ["credit=rlsd", "credit_args.mix=0.25"])).method.mix == 0.25
    for arguments, message in (
        (["credit=rlsd", "signal=reverse_kl"], "signal=reverse_kl: rlsd reads k1"),
        (["credit=sgcd", "credit_args.alpha=1"], "credit_args.alpha: unknown; sgcd takes cap, gamma"),
        (["credit=sgcd", "credit_args.cap=0"], "credit_args: Sgcd.cap: given 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(load_config(DEMO, arguments))


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory):
    """A directory with Qwen3-8B's published sizes and a tokenizer, no weights; and a data file in GSM8K's form."""
    from transformers import Qwen3Config

    from gear_trainer.demo.qwen3_tokenizer import subset_tokenizer

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
    assert vllm.cache_config.block_size == kwargs.get("block_size", 16), "the blocks that check_kv_cache counts in"
    assert engine_kwargs(load_config(DEMO, ["rollout.vllm.engine_args.block_size=64"]), "x")["block_size"] == 64
    made = DeepSpeedConfig(deepspeed_config(cfg) | {"train_batch_size": 1})
    assert made.zero_config.stage == 3 and made.bfloat16_config.enabled and made.gradient_clipping == 1.0


@pytest.fixture
def dry_run(capsys, monkeypatch):
    """A dry run in this process, without the network: its code, what it printed and what it said of errors."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read off the environment long ago

    def done(config, *arguments):
        code = run.main(["--config", str(CONFIGS / config), "--dry-run", *map(str, arguments)])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return done


def test_dry_run_prints_the_resolved_run(qwen3_8b, dry_run):
    done = dry_run("qwen3_8b.yaml", *qwen3_8b)
    assert done.code == 0, done.err
    for wanted in (
        "128 x 8 = 1024 rollouts a step, 128 a rank",
        "8.19 B",
        "micro-batches a rank",
        "kl_threshold=0.1",
        "stage: 3",
    ):
        assert wanted in done.out, wanted


def test_the_dry_run_plans_for_a_card(dry_run):
    done = dry_run("qwen3_8b.yaml", "--card", 80)
    assert done.code == 0, done.err
    assert "a card sold as 80 GB (78.8 GiB for programs)" in done.out and "8.19 B parameters" in done.out
    done = dry_run("qwen3_8b.yaml", "--card", 80, "world_size=1")
    assert done.code == 2 and done.err.count("\n") == 1 and "offload_optimizer={device: cpu}" in done.err
    assert "vLLM: KV cache" in done.out, "the plan is printed before it is refused"


def test_errors_end_with_code_2_and_one_line(tmp_path, dry_run):
    done = _run("--config", DEMO, "--dry-run", "train.stepz=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'steps'" in done.stderr
    (tmp_path / "data.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{broken\n')
    data = f"task_args={{path: {tmp_path}/data.jsonl, held_out_path: {tmp_path}/data.jsonl}}"
    done = dry_run("qwen3_8b.yaml", data)
    assert done.code == 2 and "data.jsonl" in done.err and "line 2" in done.err


def _run(*args, environment=None):
    command = [sys.executable, "-m", "gear_trainer.run", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | (environment or {}))


@pytest.mark.parametrize("credit", ["turn", "gigpo"])
def test_turn_methods_need_a_task_with_turns(credit):
    with pytest.raises(ConfigError, match=f"credit={credit} tells turns apart, and task=sums has one"):
        check(load_config(DEMO, [f"credit={credit}", "task=sums", "model.path=builtin:smollm2"]))
    task, recipe = check(load_config(DEMO, [f"credit={credit}"]))
    assert task.turn_rewards and recipe.by_turn


# --- what use found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "..", "....", "a/b", "a b", ""])
def test_D6_a_name_is_one_folder_below_output_dir(name):
    with pytest.raises(ConfigError, match="name=.*not dots alone"):
        load_config(DEMO, [f"name='{name}'"])
    assert load_config(DEMO, ["name=.a.b-c_1"]).run_dir == Path("runs/.a.b-c_1")


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_D8_the_8b_config_is_dry_run_without_the_network(tmp_path):
    clean = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = _run("--config", CONFIGS / "qwen3_8b.yaml", "--dry-run", environment=OFFLINE | clean)
    assert done.returncode == 0, done.stderr[-3000:]
    for wanted in (
        "8.19 B",
        "of a card of 80 GB (assumed",
        "vLLM: KV cache",
        "128 x 8 = 1024 rollouts a step",
        "stage: 3",
        "model: Qwen/Qwen3-8B",
    ):
        assert wanted in done.stdout, wanted
    (left_out,) = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert "openai/gsm8k" in left_out and "its data and prompts are left out" in left_out


# What a shipped config's file is called where GEAR_DATA has another; the cards that its first lines name.
NAMED_HERE = {
    "arpo": ["task_args.path=data/arpo/math_5k.jsonl"],
    "toolrl": ["task_args.path=data/toolrl/rlla_sft.json"],
}
CARDS = {"qwen3_4b_1gpu": 141, "arpo_qwen3_4b": 141, "toolrl_qwen3_4b": 141}
WITH_THE_TOOL = ["task_args.tool=python", "rollout.max_model_len=8192"]  # as the first lines of the arpo configs say


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="GEAR_DATA names no folder with the sets that configs name")
@pytest.mark.parametrize("more", [[], WITH_THE_TOOL], ids=["", "tool"])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_dry_run_for_its_card(path, more, tmp_path, monkeypatch, dry_run):
    """The memory plan fits, and the task is made where its data are on this machine."""
    if more and not path.stem.startswith("arpo"):
        pytest.skip("the tool is mathematics'")
    if path.stem.startswith("tau") and importlib.util.find_spec("tau2") is None:
        pytest.skip("the package tau2 is not installed")
    (tmp_path / "data").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    given = [*NAMED_HERE.get(path.stem.split("_")[0], []), *more]
    said = dry_run(path.name, "--card", CARDS.get(path.stem, 80), *given)
    assert said.code == 0, said.err
    wanted = ["step geometry", "which is"] if "cpu" not in path.stem else ["step geometry"]
    assert all(text in said.out for text in wanted) and "warning: this" not in said.out
    left_out = [line for line in said.out.splitlines() if line.startswith("left out: ")]
    assert all("openai/gsm8k" in line for line in left_out)
    assert not more or "in 4 turn(s)" in said.out


def test_D8_a_run_does_not_start_without_its_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    cfg, away = load_config(CONFIGS / "qwen3_8b.yaml"), []
    with pytest.raises(TaskError, match="needs the package datasets"):
        check(cfg)
    task, _ = check(cfg, away)
    assert task.max_turns == 1 and len(away) == 1
    with pytest.raises(TaskError, match="none.jsonl does not exist"):  # a file is never left out
        check(load_config(CONFIGS / "qwen3_8b.yaml", ["task_args={path: none.jsonl, held_out_path: none.jsonl}"]), away)


def test_D8_the_requirements_name_datasets():
    root = CONFIGS.parents[1]
    for name in ("cpu", "cuda"):
        assert "\ndatasets==" in (root / "requirements" / f"{name}.txt").read_text()
    closure = (root / "requirements" / "cpu.txt").read_text()  # installed without resolution
    assert all(f"\n{name}==" in closure for name in ("pandas", "multiprocess", "xxhash", "dill", "pyarrow", "fsspec"))
    assert '"datasets"' in (root / "pyproject.toml").read_text()


def test_D8_shipped_sizes_are_those_of_the_models(qwen3_8b):
    shipped, built = model_sizes("Qwen/Qwen3-8B"), model_sizes(qwen3_8b[0].partition("=")[2])
    assert {k: built[k] for k in shipped} == shipped
    small = model_sizes("builtin:smollm2")
    assert (small["num_hidden_layers"], small["num_key_value_heads"], small["max_position_embeddings"]) == (30, 3, 8192)
    assert model_sizes("nobody/nothing-of-that-name") is None


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_D9_a_taken_port_is_one_line(taken, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", str(taken))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ConfigError, match=f"port {taken} .*in use.*--master_port {taken + 1}.*make train PORT={taken + 1}"):
        check_launch(load_config(DEMO))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun: its agent listens there
    check_launch(load_config(DEMO))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("RANK", "1")  # only rank 0 listens
    check_launch(load_config(DEMO))


def test_D9_a_free_port_stays_free(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    check_port()
    check_port()
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.slow
def test_D9_a_second_run_ends_with_that_line(taken, tmp_path):
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error", "--num_gpus", "2"]
    command = [*deepspeed, "--master_port", str(taken), "gear_trainer/run.py", "--config", DEMO]
    done = subprocess.run(
        [*map(str, command), f"output_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"],
        cwd=CONFIGS.parents[1],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(CONFIGS.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,  # a net under a hang
    )
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    assert done.returncode == 2
    assert sum("--master_port" in line and line.startswith("gear_trainer: port") for line in said) == 1
    assert len(said) <= 3 and not any("Traceback" in line for line in said), said  # the launcher adds a line of its own
    assert not (tmp_path / "runs").exists()


def test_D9_make_hands_the_port_on():
    root = CONFIGS.parents[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}  # the tests are run by make
    for more, wanted in ((["PORT=29511"], "--num_gpus 2 --master_port 29511 gear_trainer/run.py"), ([], "--num_gpus 2 gear_tr")):
        command = ["make", "-n", "train", "PLATFORM=cpu", *more]
        made = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert wanted in " ".join(made.stdout.splitlines()[-1].split()), made.stdout


def test_D12_without_a_launcher_one_is_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no launcher started this.*deepspeed --num_gpus 1 .*--dry-run needs none"):
        check_launch(load_config(DEMO, ["world_size=1"]))


@pytest.mark.parametrize("content", [b"\x80\x04\x95binary", b"name: \xff\n", b"\x00\x01\x02", "name: é".encode("utf-16")])
def test_D12_a_binary_config_file_is_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x.yaml: (no text in UTF-8|not valid YAML)") as caught:
        load_config(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, value", [("4e-1", 0.4), ("1e5", 1e5), ("-2E3", -2e3), ("1.5e3", 1500.0), (".5e1", 5.0), ("3.e2", 300.0)]
)
def test_D12_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    cfg = load_config(DEMO, [f"credit_args.alpha={text}"])
    assert cfg.credit_args["alpha"] == value and isinstance(cfg.credit_args["alpha"], float)
    (tmp_path / "x.yaml").write_text(DEMO.read_text() + f"credit_args: {{alpha: {text}}}\n")
    assert load_config(tmp_path / "x.yaml").credit_args == {"alpha": value}


def test_D12_what_is_no_number_stays_a_text():
    texts = ["e5", "4e", "1e5x", "0x1e5z", "4e-", "1-e5", "'4e-1'"]
    assert [parse_yaml(text) for text in texts] == [text.strip("'") for text in texts]
    assert parse_yaml("[7, 1.5, true, null, 1_000]") == [7, 1.5, True, None, 1000]


def test_D12_a_directory_as_data_is_called_one(tmp_path):
    with pytest.raises(TaskError, match="is a directory: give the path of a .jsonl"):
        make_task("gsm8k", 0, {"path": str(tmp_path), "held_out_path": str(tmp_path)})


def test_D12_tensorboard_gets_the_seconds_of_a_step():
    values = {"step": 3, "reward": 0.5, "seconds": {"step": 2.0, "rollout": 1.0}, "note": "x"}
    assert flat(values) == {"reward": 0.5, "seconds/step": 2.0, "seconds/rollout": 1.0}


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lr=.inf", r"train.lr=inf: must be a finite number"),
        ("train.lr=.nan", r"train.lr=nan: "),
        ("max_logprob_gap=.inf", r"max_logprob_gap=inf: must be a finite number"),
        ("credit_args.alpha=.nan", r"credit_args.alpha=nan: must be a finite number"),
        ("deepspeed={zero_optimization: {reduce_bucket_size: [1, -.inf]}}", r"reduce_bucket_size.1=-inf: must be a finite"),
        ("train.betas=[2, 3]", r"train.betas.0=2: .*less than 1; train.betas.1=3: .*less than 1"),
        ("train.betas=[-0.1, 0.9]", r"train.betas.0=-0.1: .*greater than or equal to 0"),
        ("seed=-1", r"seed=-1: .*greater than or equal to 0"),
        ("seed=1e20", r"seed=1e\+20: "),
        ("seed=4294967296", r"seed=4294967296: .*less than 4294967296"),
        ("model.attn_implementation=foo", r"model.attn_implementation='foo': known are sdpa, eager"),
        ("train.lr_warmup_steps=61", r"train.lr_warmup_steps=61 is longer than the run of train.steps=60: .*lower it"),
        ("deepspeed.zero_optimization.stage=2", r"deepspeed.zero_optimization.stage=2: this trainer needs stage 3"),
        ("deepspeed.zero_optimization=2", r"deepspeed.zero_optimization=2: must be a section"),
        ("deepspeed.train_batch_size=64", r"deepspeed.train_batch_size=64: .*see rollout.prompts_per_step"),
        ("deepspeed.train_micro_batch_size_per_gpu=auto", r"train_micro_batch_size_per_gpu='auto': micro-batches are cut"),
        ("deepspeed.gradient_accumulation_steps=4", r"gradient_accumulation_steps=4: micro-batches are cut by tokens"),
        ("deepspeed.bf16.enabled=true", r"deepspeed.bf16.enabled=True: model.dtype=float32 decides it"),
        ("deepspeed.fp16.enabled=true", r"deepspeed.fp16.enabled=True: model.dtype=float32 decides it"),
        ("deepspeed.scheduler={type: WarmupLR}", r"deepspeed.scheduler=.*set train.lr, lr_schedule"),
        ("train.lr=1e6", r"train.lr=1000000.0: AdamW moves every weight"),
        ("deepspeed.optimizer.params.lr=1", r"deepspeed.optimizer.params.lr=1: .*set train.lr"),
    ],
)
def test_D18_values_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(DEMO, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "rollout.vllm.kv_cache_mib=1",
            r"rollout.vllm.kv_cache_mib=1: one sequence of rollout.max_model_len=1024 takes 2 MiB .*raise it to 2",
        ),
        (
            "rollout.max_model_len=1025",
            r"rollout.max_model_len=1025: the model builtin:tiny-qwen3 has 1024 positions; set it to 1024",
        ),
        (
            "rollout.vllm.engine_args={max_num_batched_tokenz: 1}",
            r"max_num_batched_tokenz: vLLM takes .*did you mean 'max_num_batched_tokens'",
        ),
        (
            "deepspeed={zero_optimisation: {}}",
            r"deepspeed.zero_optimisation: DeepSpeed has no .*did you mean 'zero_optimization'",
        ),
        ("deepspeed={zero_optimization: {stage3_tipo: 1}}", r"deepspeed: stage3_tipo: Extra inputs are not permitted"),
        ("deepspeed={communication_data_type: x}", r"deepspeed: ValueError: Invalid communication_data_type"),
        ("output_dir=/proc/x", r"output_dir=/proc/x: cannot be written in /proc \(.*\): name another folder"),
        ("cache_dir=/dev/null/x", r"cache_dir=/dev/null/x: cannot be written in /dev/null \(Not a directory\)"),
        (f"output_dir={DEMO}", r"output_dir=.*mathapi_cpu.yaml: cannot be written \(Not a directory\)"),
    ],
)
def test_D18_what_machine_and_model_refuse_is_said_first(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(load_config(DEMO, [override]))
    assert "\n" not in str(caught.value)


def test_D18_what_works_is_let_through(tmp_path):
    check_machine(load_config(DEMO, ["rollout.vllm.kv_cache_mib=2", f"output_dir={tmp_path}/a/b", f"cache_dir={tmp_path}"]))
    assert not list(tmp_path.iterdir()), "a look leaves nothing behind"
    check_machine(load_config(DEMO, ["rollout.vllm.engine_args={block_size: 16, enable_prefix_caching: true}"]))
    same = "{train_micro_batch_size_per_gpu: 1, bf16: {enabled: false}, zero_optimization: {stage: 3}"
    more = "flops_profiler: {enabled: false}, aio: {}, wandb: {enabled: false}, activation_checkpointing: {}, autotuning: {}}"
    check_machine(load_config(DEMO, [f"deepspeed={same}, communication_data_type: fp32, {more}"]))
    load_config(DEMO, ["model.attn_implementation=kernels-community/flash-attn2", "train.lr_warmup_steps=60", "seed=4294967295"])


def test_D18_a_cache_holds_one_sequence_of_the_model(tmp_path, qwen3_8b):
    cfg = load_config(CONFIGS / "qwen3_8b.yaml", qwen3_8b)
    assert kv_bytes(cfg, model_sizes("Qwen/Qwen3-8B")) == 2 * 36 * 8 * 128 * 2
    blocks = math.ceil(4096 / 128) + 1
    with pytest.raises(ConfigError, match=f"takes {math.ceil(blocks * 128 * 147456 / 2**20)} MiB"):
        check_machine(
            load_config(
                CONFIGS / "qwen3_8b.yaml", [*qwen3_8b, "rollout.vllm.kv_cache_mib=500", "rollout.vllm.engine_args.block_size=128"]
            )
        )
    with pytest.raises(ConfigError, match="has 40960 positions"):
        check_machine(
            load_config(CONFIGS / "qwen3_8b.yaml", ["rollout.max_model_len=40961", "train.tokens_per_micro_batch=50000"])
        )
    other = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    assert kv_bytes(cfg, other | {"layer_types": ["full_attention", "sliding_attention"]}) is None
    assert kv_bytes(cfg, other | {"kv_lora_rank": 8}) is None and kv_bytes(cfg, {}) is None


def test_D18_engine_arguments_are_vllms_own():
    from vllm.engine.arg_utils import EngineArgs

    assert engine_arguments() == set(EngineArgs.__dataclass_fields__)
