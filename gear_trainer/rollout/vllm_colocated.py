"""vLLM in the trainer's own process, one engine per rank. The only file that knows vLLM's internals."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from gear_trainer.config import Config, near
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.rollout.engine import Engine, take_device
from gear_trainer.rollout.types import Completion, Request

if TYPE_CHECKING:
    from vllm.inputs import TokensPrompt


CPU_SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # 7-8 ms a step instead of 44-69 on a shared 2-core machine
    "TORCHDYNAMO_DISABLE": "1",  # else the first log-probs call compiles for 9-33 s
}
# Tokens of a block of the KV cache: a turn computes again what stands in no full block. vLLM takes 128 on a CPU. For a rollout of
# chains (five turns, 230 tokens) a core works 36 ms with 128, 27 with 32, to the same tokens.
CPU_BLOCK = 32
BESIDE_TRAINER, ALONE = 0.45, 0.9  # vLLM's share of a GPU where none is given
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


class PlacementError(RunError):
    """vLLM's model does not stand on the GPU of its rank."""


def set_environment() -> None:
    """Before the first `import vllm` of the process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine in this process: weights are handed over as tensors
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        for name, value in CPU_SETTINGS.items():
            os.environ.setdefault(name, value)


def engine_kwargs(cfg: Config, model_path: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` (and of `EngineArgs`) that this configuration means."""
    r, v = cfg.rollout, cfg.rollout.vllm
    kwargs: dict[str, Any] = {
        "model": model_path,
        "dtype": cfg.model.dtype,
        "max_model_len": r.max_model_len,
        "max_num_seqs": v.max_num_seqs,
        "gpu_memory_utilization": memory_share(cfg),
        "seed": cfg.seed,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",  # of the tempered distribution, as the trainer computes them
        "enable_sleep_mode": v.sleep_level > 0 and torch.cuda.is_available(),
        "enforce_eager": not torch.cuda.is_available(),
    }
    if torch.cuda.is_available():
        # vLLM's own choice for one GPU an engine takes GPU 0 in every process; this one takes that of LOCAL_RANK
        kwargs["distributed_executor_backend"] = "external_launcher"
    else:
        # vLLM rewinds a seeded request's generator after a partial prefill, which a CPU generator cannot do (it raises)
        kwargs |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, r.max_model_len)}
        kwargs["block_size"] = CPU_BLOCK
    if v.kv_cache_mib is not None:
        kwargs["kv_cache_memory_bytes"] = v.kv_cache_mib << 20
    if rank := adapter_rank(cfg):
        kwargs |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return kwargs | v.engine_args


def memory_share(cfg: Config) -> float:
    """vLLM's share of a GPU."""
    given = cfg.rollout.vllm.gpu_memory_utilization
    return given or (ALONE if cfg.rollout.engine == "vllm_server" else BESIDE_TRAINER)


def adapter_rank(cfg: Config) -> int:
    """The rank of LoRA adapters that vLLM makes room for; 0 where it samples with whole weights."""
    alone = cfg.lora.rank > 0 and cfg.lora.push == "adapter"
    return min(rank for rank in LORA_RANKS if rank >= cfg.lora.rank) if alone else 0


class ColocatedVllm(Engine):
    """A vLLM engine that lives beside the trainer on its rank. Build it after `deepspeed.init_distributed`: vLLM makes a
    default process group of world size 1 where it finds none, and DeepSpeed would take that one."""

    def __init__(self, cfg: Config, model_path: str):
        set_environment()
        from vllm import LLM

        self.sleep_level = cfg.rollout.vllm.sleep_level if torch.cuda.is_available() else 0
        device = take_device()
        self.llm = LLM(**engine_kwargs(cfg, model_path))
        check_placement(self.llm, device)
        self.eos = self.llm.get_tokenizer().eos_token_id
        self.sleeping: set[str] = set()
        self.stale = False  # weights dropped by sleep level 2, not pushed since
        self.adapter = _adapter("policy") if adapter_rank(cfg) else None  # what every request samples with
        self.tickets: dict[str, int] = {}  # of requests under way, by vLLM's name for them

    def generate(self, requests: list[Request]) -> list[Completion]:
        self._check_weights()
        prompts: list[TokensPrompt] = [{"prompt_token_ids": q.prompt_ids} for q in requests]
        outputs = self.llm.generate(prompts, [_sampling(q) for q in requests], use_tqdm=False, lora_request=self.adapter)
        return [self._completion(o.outputs[0]) for o in outputs]

    def submit(self, ticket: int, request: Request) -> None:
        self._check_weights()
        prompt: TokensPrompt = {"prompt_token_ids": request.prompt_ids}
        (name,) = self.llm.enqueue(prompt, _sampling(request), use_tqdm=False, lora_request=self.adapter)
        self.tickets[_own_name(name)] = ticket

    def collect(self) -> list[tuple[int, Completion]]:
        outputs = self.llm.llm_engine.step()
        finished = ((o.request_id, o.outputs[0]) for o in outputs if o.finished)  # pyright: ignore[reportIndexIssue]  (no pooling)
        return [(self.tickets.pop(_own_name(name)), self._completion(out)) for name, out in finished]

    def _check_weights(self) -> None:
        if self.stale:
            raise RuntimeError("vLLM's weights were dropped by sleep level 2: push before generating")

    def _completion(self, out: Any) -> Completion:
        ids = list(out.token_ids)
        logprobs = [step[token].logprob for step, token in zip(out.logprobs, ids, strict=True)]
        return Completion(ids, logprobs, out.finish_reason == "stop" and ids[-1] == self.eos, self.version)

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._wake("weights")  # the KV cache stays released until generation: both at once would not fit
        self.llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=weights))
        self.llm.reset_prefix_cache()  # stale KV blocks of the old weights otherwise (log-probs off by 7 nats when left out)
        self.stale = False
        self.version += 1

    def push_adapter(self, folder: Path) -> None:
        self._wake("weights")
        self.llm.llm_engine.add_lora(_adapter(str(folder), load_inplace=True))
        self.llm.reset_prefix_cache()
        self.version += 1

    def forget(self) -> None:
        self.llm.reset_prefix_cache()

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

    @classmethod
    def prepare(cls, cfg: Config) -> None:
        set_environment()
        take_device()

    @classmethod
    def check(cls, cfg: Config, sizes: dict[str, Any] | None) -> None:
        """The KV cache holds a sequence, and vLLM knows its arguments. Raises ConfigError."""
        if sizes is not None:
            check_kv_cache(cfg, sizes)
        if adapter_rank(cfg):
            check_adapters(cfg)
            check_they_stand(cfg)
        if cfg.rollout.vllm.engine_args:
            check_engine_args(cfg)

    @classmethod
    def describe(cls, cfg: Config) -> str:
        """The arguments of vLLM's LLM(...), as YAML."""
        return yaml.safe_dump({"vllm": engine_kwargs(cfg, cfg.model.path)}, sort_keys=False)


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    drawn = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    return SamplingParams(**drawn, max_tokens=request.max_tokens, logprobs=0, detokenize=False)


def _adapter(path: str, **options: Any) -> Any:
    """vLLM's one adapter: a request that names it is sampled with what was loaded last; a path is read where it is loaded."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", 1, path, **options)


def _own_name(request_id: str) -> str:
    """A request's number; vLLM hangs random letters behind it in some places and not in others."""
    return request_id.partition("-")[0]


def check_placement(llm: Any, device: torch.device) -> None:
    """Raises PlacementError where the engine's model stands on another device than its rank's."""
    for found in llm.collective_rpc(_model_device):
        if found != device:
            raise PlacementError(
                f"rank {os.environ.get('RANK', 0)}: vLLM's model stands on {found}, and the rank's GPU is {device}: "
                "leave rollout.vllm.engine_args.distributed_executor_backend out"
            )


def _model_device(worker: Any) -> torch.device:
    return next(worker.model_runner.get_model().parameters()).device


# --- looked at before a start ------------------------------------------------------------------------------------------


def check_kv_cache(cfg: Config, sizes: dict[str, Any]) -> None:
    """vLLM's KV cache holds one sequence at least. Raises ConfigError."""
    v, context = cfg.rollout.vllm, cfg.rollout.max_model_len
    token = kv_bytes(cfg, sizes)
    if v.kv_cache_mib is None or token is None:
        return
    block = int(v.engine_args.get("block_size") or (16 if torch.cuda.is_available() else CPU_BLOCK))
    blocks = -(-context // block) + 1  # vLLM keeps one empty
    needed = -(-blocks * block * token // 2**20)
    if v.kv_cache_mib < needed:
        raise ConfigError(
            f"rollout.vllm.kv_cache_mib={v.kv_cache_mib}: one sequence of rollout.max_model_len={context} takes {needed} MiB "
            f"({token:,} bytes a token, blocks of {block}); raise it to {needed}, or to that times the sequences at a time"
        )


def kv_bytes(cfg: Config, sizes: dict[str, Any]) -> int | None:
    """Bytes of keys and values a token, None for models that keep another cache (latent, windows, states)."""
    more = cfg.rollout.vllm.engine_args
    plain = set(sizes.get("layer_types") or ["full_attention"]) == {"full_attention"} and "kv_lora_rank" not in sizes
    if not plain or not {"num_hidden_layers", "num_key_value_heads"} <= sizes.keys():
        return None
    width = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    each = 1 if "fp8" in str(more.get("kv_cache_dtype")) else 2 if cfg.model.dtype == "bfloat16" else 4
    return 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * width * each


def check_they_stand(cfg: Config) -> None:
    """vLLM keeps the model that adapters stand on. Raises ConfigError."""
    if cfg.rollout.vllm.sleep_level == 2:
        raise ConfigError(
            "rollout.vllm.sleep_level=2 drops the weights that the adapters of lora.push=adapter stand on: "
            "set rollout.vllm.sleep_level=1, or lora.push=merged"
        )


def check_adapters(cfg: Config) -> None:
    """vLLM has room for the adapters' rank. Raises ConfigError."""
    v = cfg.rollout.vllm
    room = v.engine_args.get("max_lora_rank", cfg.lora.rank)
    if not v.engine_args.get("enable_lora", True) or room < cfg.lora.rank:
        raise ConfigError(
            f"rollout.vllm.engine_args: no room for adapters of lora.rank={cfg.lora.rank} in vLLM: leave enable_lora and "
            "max_lora_rank out, they follow from lora.rank"
        )


def check_engine_args(cfg: Config) -> None:
    """Refuse what vLLM's LLM(...) does not take, or what would hang. Raises ConfigError; unknown names pass without vLLM."""
    if (parallel := cfg.rollout.vllm.engine_args.get("tensor_parallel_size", 1)) != 1:
        raise ConfigError(
            f"rollout.vllm.engine_args.tensor_parallel_size={parallel}: every rank has an engine of its own on its one GPU, and "
            "this one would wait for GPUs of other ranks: leave it out"
        )
    known = engine_arguments()
    for name in cfg.rollout.vllm.engine_args:
        if known and name not in known:
            raise ConfigError(f"rollout.vllm.engine_args.{name}: vLLM takes no such argument{near(name, known)}")


def engine_arguments() -> set[str]:
    """Fields of vLLM's EngineArgs, read from its source: importing it takes 17 s and settles its environment variables."""
    spec = find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / "engine" / "arg_utils.py" if folders else None
    if file is None or not file.is_file():
        return set()
    classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"]
    fields = (node.target for cls in classes for node in cls.body if isinstance(node, ast.AnnAssign))
    return {target.id for target in fields if isinstance(target, ast.Name)}
