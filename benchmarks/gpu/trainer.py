"""The trainer's own passes on one GPU, without vLLM: ZeRO-3 on one rank, scoring and an update of one micro-batch of Qwen3-1.7B.

Weights are random: times and memory do not depend on them. The configuration is the trainer's, so what runs here is what trains.
Needs transformers and deepspeed, which a bare machine takes from wheels.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import torch

from ..harness.environment import ROOT
from .run import BF16, F32, Item, Setting, Skip, synchronize

MODEL = "Qwen/Qwen3-1.7B"
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "head_dim": 32}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
PASSES = ("score", "score with teacher", "update")
SHAPES = ((7, 2048), (2, 24))  # rollouts, tokens of each: with their prompts 16,128, a micro-batch of the 8B configuration
PROMPT, HINT, REPEATS = 256, 256, 5
_NEEDED = ("transformers", "deepspeed", "yaml", "pydantic")


def trainer_items(setting: Setting) -> list[Item]:
    """Scoring without and with a teacher, and an update, of one micro-batch."""
    rows, tokens = setting.pick(*SHAPES)
    name = f"{MODEL}, ZeRO-3 on one rank, {rows} rollouts of {tokens} tokens"
    return [Item(f"{name}: {what}", lambda what=what: _measured(setting.device)[what], seconds=150) for what in PASSES]


@functools.cache
def _measured(device: str) -> dict[str, dict]:
    """Figures of each pass, from one process for all: the group of ranks and the engine stay in it. Raises Skip."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise Skip(f"{', '.join(missing)} not installed")
    command = [sys.executable, "-m", "benchmarks.gpu.trainer", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the process ------------------------------------------------------------------------------------------------------------


def _figures(setting: Setting, what: str) -> dict:
    rows, tokens = setting.pick(*SHAPES)
    engine = _engine(setting.device)
    batch, prompts = _batch(setting, engine.module.lm.config.vocab_size, "teacher" in what)
    call = functools.partial(_update if what == "update" else _score, engine, batch)
    call()  # compiles, and fills the allocator
    if not setting.self_test:
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(setting, call) for _ in range(setting.pick(REPEATS, 2))]
    median = statistics.median(seconds)
    flops = sum(_flops(engine.module.lm, rows, prompt + tokens, rows * tokens) for prompt in prompts)
    figures = {"ms": median * 1e3, "low_ms": min(seconds) * 1e3, "high_ms": max(seconds) * 1e3, "clock": "wall"}
    figures["model_tflop_s"] = (3 if what == "update" else 1) * flops / median / 1e12  # layers made twice are counted once
    return figures if setting.self_test else {**figures, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def _seconds(setting: Setting, call) -> float:
    synchronize(setting)
    start = time.perf_counter()
    call()
    synchronize(setting)
    return time.perf_counter() - start


def _score(engine: Any, batch: Any) -> None:
    with torch.no_grad():
        engine(batch, 1.0, ("logprobs", "entropy", *(("teacher_logprobs",) if batch.teacher is not None else ())))


def _update(engine: Any, batch: Any) -> None:
    engine.backward(-engine(batch, 1.0, ("logprobs",)).logprobs.mean())
    engine.step()


def _batch(setting: Setting, vocabulary: int, teacher: bool) -> tuple[Any, list[int]]:
    """A micro-batch on the device, and the lengths of the prompts that each of its rollouts is scored behind."""
    from gear_trainer.policy.batching import micro_batch
    from gear_trainer.rollout import Rollout

    (rows, tokens), (prompt, hint) = setting.pick(*SHAPES), setting.pick((PROMPT, HINT), (5, 3))
    draw, found = torch.Generator().manual_seed(0), []
    for i in range(rows):
        ids = torch.randint(vocabulary, (prompt + hint + tokens,), generator=draw).tolist()
        rollout = Rollout(None, 0, i, ids[:prompt], ids[: prompt + hint])
        rollout.append(ids[prompt + hint :], [0.0] * tokens)
        found.append(rollout)
    batch = micro_batch(found, list(range(rows)), teacher).to(torch.device(setting.device))
    return batch, [prompt, *([prompt + hint] * teacher)]


@functools.cache
def _engine(device: str) -> Any:
    """A ZeRO-3 engine of one rank around a policy of random weights, as the trainer configures it."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before its first import
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from gear_trainer.config import Config
    from gear_trainer.policy.hub import model_sizes
    from gear_trainer.policy.model import Policy
    from gear_trainer.policy.zero import checkpoint_layers, deepspeed_config

    _process_group(device)
    cfg = Config.model_validate(
        {
            "name": "gpu-report",
            "world_size": 1,
            "task": "sums",
            "model": {"path": MODEL, "dtype": "float32" if device == "cpu" else "bfloat16", "gradient_checkpointing": True},
        }
    )
    config = deepspeed_config(cfg)
    keep_alive = HfDeepSpeedConfig(config)  # parameters are partitioned where they are made
    sizes = model_sizes(MODEL) | (TINY if device == "cpu" else {})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=F32 if device == "cpu" else BF16)
    checkpoint_layers(lm.eval())
    engine, *_ = deepspeed.initialize(model=Policy(lm), config=config, model_parameters=list(lm.parameters()))
    engine.hf_deepspeed_config = keep_alive
    return engine


def _process_group(device: str) -> None:
    import logging

    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, 100 CPU seconds
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)


def _flops(lm: torch.nn.Module, rows: int, length: int, scored: int) -> float:
    """Of one forward: two for each weight of the layers and token, for each weight of the head and scored token, and attention's
    products, of which a causal mask needs half."""
    c = lm.config
    layers = sum(getattr(p, "ds_numel", p.numel()) for p in lm.base_model.layers.parameters())
    attention = 2 * c.num_hidden_layers * rows * length**2 * c.num_attention_heads * c.head_dim
    return 2.0 * layers * rows * length + attention + 2.0 * c.vocab_size * c.hidden_size * scored


if __name__ == "__main__":
    here = Setting(sys.argv[1])
    print(json.dumps({what: _figures(here, what) for what in PASSES}))
