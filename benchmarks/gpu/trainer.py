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
RAGGED = tuple(f"{what}, ragged rows {how}" for what in ("score with teacher", "update") for how in ("padded", "packed"))
SHAPES = ((7, 2048), (2, 24))  # rollouts, tokens of each: with their prompts 16,128, a micro-batch of the 8B configuration
PROMPT, HINT, REPEATS = 256, 256, 5
ROUNDING = 0.1  # nats that bfloat16 may part the log-probs of packed and padded rows; a leak between sequences parts them by 1
_NEEDED = ("transformers", "deepspeed", "yaml", "pydantic")


def trainer_items(setting: Setting) -> list[Item]:
    """Scoring without and with a teacher, and an update, of one micro-batch; then of rows of all lengths, padded and packed."""
    rows, tokens = setting.pick(*SHAPES)
    name = f"{MODEL}, ZeRO-3 on one rank, {rows} rollouts of {tokens} tokens"
    return [Item(f"{name}: {what}", lambda what=what: _measured(setting.device)[what], seconds=150) for what in PASSES + RAGGED]


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
    engine = _engine(setting.device)
    lm = engine.module.lm
    batch, lengths = _batch(setting, lm.config.vocab_size, what)
    call = functools.partial(_update if what.startswith("update") else _score, engine, batch)
    apart = {"apart_nats": _packed(setting, engine, what, batch)} if "packed" in what else {}
    call()  # compiles, and fills the allocator
    if not setting.self_test:
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(setting, call) for _ in range(setting.pick(REPEATS, 2))]
    median = statistics.median(seconds)
    lm.config._attn_implementation = "sdpa"
    flops = sum(_flops(lm, prompt + tokens, tokens) for prompt, tokens in lengths)
    figures = {"ms": median * 1e3, "low_ms": min(seconds) * 1e3, "high_ms": max(seconds) * 1e3, "clock": "wall"} | apart
    figures["model_tflop_s"] = (3 if what.startswith("update") else 1) * flops / median / 1e12  # layers made twice count once
    return figures if setting.self_test else {**figures, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def _packed(setting: Setting, engine: Any, what: str, batch: Any) -> float:
    """Let the model take packed rows, and find how far their log-probs are from those of the same rows padded, in nats."""
    from gear_trainer.policy.packing import pack_attention

    lm, found = engine.module.lm, []
    padded, _ = _batch(setting, lm.config.vocab_size, what.replace("packed", "padded"))
    for rows in (padded, batch):
        with torch.no_grad():
            found.append(engine(rows, 1.0, ("logprobs",)).logprobs)
        if rows is padded:
            pack_attention(lm)
    apart = (found[0] - found[1]).abs().max().item()
    assert apart < ROUNDING, f"log-probs of packed rows are {apart:.3g} nats from those of padded ones"
    return apart


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


def _batch(setting: Setting, vocabulary: int, what: str) -> tuple[Any, list[tuple[int, int]]]:
    """A micro-batch on the device, and of each of its forwards' sequences the prompt's length and that of what is scored.

    Ragged: the rollouts have from a share of the tokens up to all of them.
    """
    from gear_trainer.policy.batching import micro_batch
    from gear_trainer.rollout import Rollout

    (rows, tokens), (prompt, hint) = setting.pick(*SHAPES), setting.pick((PROMPT, HINT), (5, 3))
    no_problem: Any = None  # nobody reads it: there is no task
    draw, found, teacher = torch.Generator().manual_seed(0), [], "teacher" in what
    for i in range(rows):
        length = tokens * (i + 1) // rows if "ragged" in what else tokens
        ids = torch.randint(vocabulary, (prompt + hint + length,), generator=draw).tolist()
        rollout = Rollout(no_problem, 0, i, ids[:prompt], ids[: prompt + hint])
        rollout.append(ids[prompt + hint :], [0.0] * length)
        found.append(rollout)
    batch = micro_batch(found, list(range(rows)), teacher, packed="packed" in what).to(torch.device(setting.device))
    return batch, [(p, len(r.ids)) for r in found for p in (prompt, *([prompt + hint] * teacher))]


@functools.cache
def _engine(device: str) -> Any:
    """A ZeRO-3 engine of one rank around a policy of random weights, as the trainer configures it."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before its first import
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

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
    sizes: dict[str, Any] = (model_sizes(MODEL) or {}) | (TINY if device == "cpu" else {})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=F32 if device == "cpu" else BF16)
    checkpoint_layers(lm.eval())
    parameters: Any = list(lm.parameters())  # annotated as a module there
    engine, *_ = deepspeed.initialize(model=Policy(lm), config=config, model_parameters=parameters)
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


def _flops(lm: Any, length: int, scored: int) -> float:
    """Of one sequence's forward: two for each weight of the layers and token, for each weight of the head and scored token, and
    attention's products, of which a causal mask needs half."""
    c = lm.config
    layers = sum(getattr(p, "ds_numel", p.numel()) for p in lm.base_model.layers.parameters())
    attention = 2 * c.num_hidden_layers * length**2 * c.num_attention_heads * c.head_dim
    return 2.0 * layers * length + attention + 2.0 * c.vocab_size * c.hidden_size * scored


if __name__ == "__main__":
    here = Setting(sys.argv[1])
    print(json.dumps({what: _figures(here, what) for what in PASSES + RAGGED}))
