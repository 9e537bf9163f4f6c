"""vLLM in the trainer's own process, one engine per rank. The only file that knows vLLM's internals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from gear_trainer.config import Config, ConfigError
from gear_trainer.errors import RunError
from gear_trainer.rollout import Completion, Request


class PlacementError(RunError):
    """vLLM's model does not stand on the GPU of its rank."""


def set_environment() -> None:
    """Before the first `import vllm` of the process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine in this process: weights are handed over as tensors
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # 7-8 ms a step instead of 44-69 on a shared 2-core machine
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else the first log-probs call compiles for 9-33 s


def take_device() -> torch.device:
    """Make the GPU of this rank the process' current one, and return it; the CPU where there is none.

    It is that of LOCAL_RANK, which DeepSpeed and vLLM read too; without a current one, libraries make their contexts on GPU 0 of
    all ranks. Every rank goes on seeing all GPUs: DeepSpeed counts them to know the ranks of a node (ZeRO++, MiCS), and UUIDs in
    CUDA_VISIBLE_DEVICES need no reading. Where a scheduler shows each rank one GPU, that one is number 0. Raises ConfigError
    where there are fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1:
        os.environ["LOCAL_RANK"] = "0"  # two ranks on one GPU are named by NCCL
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= gpus:
        raise ConfigError(
            f"LOCAL_RANK={local}, but {gpus} GPUs are visible (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): start one rank a GPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def engine_kwargs(cfg: Config, model_path: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` (and of `EngineArgs`) that this configuration means."""
    r = cfg.rollout
    kwargs: dict[str, Any] = {
        "model": model_path,
        "dtype": cfg.model.dtype,
        "max_model_len": r.max_model_len,
        "max_num_seqs": r.max_num_seqs,
        "gpu_memory_utilization": r.gpu_memory_utilization,
        "seed": cfg.seed,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",  # of the tempered distribution, as the trainer computes them
        "enable_sleep_mode": r.sleep_level > 0 and torch.cuda.is_available(),
        "enforce_eager": not torch.cuda.is_available(),
    }
    if torch.cuda.is_available():
        # vLLM's own choice for one GPU an engine takes GPU 0 in every process; this one takes that of LOCAL_RANK
        kwargs["distributed_executor_backend"] = "external_launcher"
    else:
        # vLLM rewinds a seeded request's generator after a partial prefill, which a CPU generator cannot do (it raises)
        kwargs |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, r.max_model_len)}
    if r.kv_cache_mib is not None:
        kwargs["kv_cache_memory_bytes"] = r.kv_cache_mib << 20
    return kwargs | r.engine_args


class ColocatedVllm:
    """A vLLM engine that lives beside the trainer on its rank. Build it after `deepspeed.init_distributed`: vLLM makes a
    default process group of world size 1 where it finds none, and DeepSpeed would take that one."""

    def __init__(self, cfg: Config, model_path: str):
        set_environment()
        from vllm import LLM

        self.sleep_level = cfg.rollout.sleep_level if torch.cuda.is_available() else 0
        device = take_device()
        self.llm = LLM(**engine_kwargs(cfg, model_path))
        check_placement(self.llm, device)
        self.eos = self.llm.get_tokenizer().eos_token_id
        self.sleeping: set[str] = set()
        self.stale = False  # weights dropped by sleep level 2, not pushed since

    def generate(self, requests: list[Request], temperature: float) -> list[Completion]:
        from vllm import SamplingParams

        if self.stale:
            raise RuntimeError("vLLM's weights were dropped by sleep level 2: push before generating")
        params = [
            SamplingParams(temperature=temperature, max_tokens=q.max_tokens, seed=q.seed, logprobs=0, detokenize=False)
            for q in requests
        ]
        prompts = [{"prompt_token_ids": q.prompt_ids} for q in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [self._completion(o.outputs[0]) for o in outputs]

    def _completion(self, out: Any) -> Completion:
        ids = list(out.token_ids)
        logprobs = [step[token].logprob for step, token in zip(out.logprobs, ids, strict=True)]
        return Completion(ids, logprobs, ended=out.finish_reason == "stop" and ids[-1] == self.eos)

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._wake("weights")  # the KV cache stays released until generation: both at once would not fit
        self.llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=weights))
        self.llm.reset_prefix_cache()  # stale KV blocks of the old weights otherwise (log-probs off by 7 nats when left out)
        self.stale = False

    def sleep(self) -> None:
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)
            self.sleeping = {"weights", "kv_cache"}
            self.stale = self.sleep_level == 2

    def wake(self) -> None:
        self._wake("weights", "kv_cache")

    def _wake(self, *tags: str) -> None:
        for tag in tags:
            if tag in self.sleeping:
                self.llm.wake_up(tags=[tag])
                self.sleeping.remove(tag)


def check_placement(llm: Any, device: torch.device) -> None:
    """Raises PlacementError where the engine's model stands on another device than its rank's."""
    for found in llm.collective_rpc(_model_device):
        if found != device:
            raise PlacementError(
                f"rank {os.environ.get('RANK', 0)}: vLLM's model stands on {found}, and the rank's GPU is {device}: "
                "leave rollout.engine_args.distributed_executor_backend out"
            )


def _model_device(worker: Any) -> torch.device:
    return next(worker.model_runner.get_model().parameters()).device
