"""The run's configuration: a YAML file, then dotted command-line overrides, checked in full before anything starts.

Every field is documented where it stands; `python -m gear_trainer.run --config FILE --dry-run` prints the resolved result.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gear_trainer.errors import ConfigError

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
MOVED = {
    f"rollout.{key}": f"rollout.vllm.{key}"
    for key in ("max_num_seqs", "gpu_memory_utilization", "kv_cache_mib", "sleep_level", "engine_args")
} | {"train.std_advantages": "train.advantages (true: grpo, false: dr_grpo)"}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


Schema = TypeVar("Schema", bound=Section)


class ModelConfig(Section):
    path: str = Field(
        description="HF directory or hub name; builtin:tiny-qwen3 (the task's warm-started demo model, made of the "
        "run's seed; builtin:tiny-qwen3@N: of seed N) or builtin:smollm2"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of the parameters and of vLLM; masters are float32"
    )
    attn_implementation: str = Field(
        default="sdpa", description="as in transformers: sdpa, flash_attention_2, eager, a hub kernel"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute layers in the backward pass (non-reentrant)")

    @field_validator("attn_implementation")
    @classmethod
    def _known_attention(cls, value: str) -> str:
        if value not in ATTENTION and "/" not in value:
            raise ValueError(f"known are {', '.join(ATTENTION)}, or a hub kernel such as kernels-community/flash-attn2")
        return value


class LoraConfig(Section):
    rank: int = Field(default=0, ge=0, le=512, description="of the adapters that are trained in the weights' place; 0: no LoRA")
    alpha: int = Field(default=32, ge=1, description="an adapter's product is multiplied by alpha / rank")
    rslora: bool = Field(default=False, description="multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="names of linear layers, as [q_proj, v_proj]; all-linear: every one but the head"
    )
    push: Literal["adapter", "merged"] = Field(
        default="adapter",
        description="what the rollout engine gets: the adapters alone, or the weights with the adapters added and rounded to "
        "model.dtype, layer by layer, which decode faster",
    )

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("names no layer: leave it out for all linear layers but the head")
        return value


class VllmConfig(Section):
    max_num_seqs: int = Field(default=64, ge=1, description="sequences that one engine decodes at a time")
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, lt=1, description="vLLM's share of a GPU (weights and KV cache); null: 0.45, and 0.9 of a server's"
    )
    kv_cache_mib: int | None = Field(default=None, ge=1, description="size of the KV cache instead of a share; needed on a CPU")
    sleep_level: Literal[0, 1, 2] = Field(
        default=0, description="GPU: 1 offloads, 2 drops vLLM's weights while the trainer works"
    )
    engine_args: dict[str, Any] = Field(default_factory=dict, description="anything else for vLLM's LLM(...)")


class ServerConfig(Section):
    url: str | None = Field(
        default=None,
        description="base URL of a vLLM server that runs already, as http://10.0.0.2:8000; null: rank 0 starts one. The dry run "
        "prints the command",
    )
    devices: list[int] = Field(
        default_factory=list, description="numbers of the GPUs of the server that rank 0 starts; no rank uses them"
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs (processes on a CPU) that the model is split over")
    start_timeout: float = Field(default=900.0, gt=0, description="seconds that a server may take until it serves")
    timeout: float = Field(
        default=120.0, gt=0, description="seconds without an answer after which a server counts as lost, and the run ends"
    )


class RolloutConfig(Section):
    prompts_per_step: int = Field(default=8, ge=1, description="over all ranks; each rank takes an equal share of whole groups")
    group_size: int = Field(default=8, ge=2, description="rollouts per prompt (G): the group that advantages are relative to")
    temperature: float = Field(
        default=1.0, gt=0, description="of the sampler, and of every log-prob; top_p and top_k stay off (bias)"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="per assistant turn")
    max_model_len: int = Field(default=1024, ge=8, description="vLLM's context: prompt, all turns and tool replies together")
    turn_timeout: float | None = Field(
        default=60.0,
        gt=0,
        description="seconds that the task's environment may take for a turn; null: no limit, in the main thread",
    )
    schedule: Literal["lockstep", "continuous"] | None = Field(
        default=None,
        description="lockstep: every turn of all rollouts in one batch; continuous: a finished turn's next request joins the "
        "running batch at once; null: lockstep on a CPU, where a resumed run is exact, continuous on a GPU",
    )
    max_failed_share: float = Field(
        default=0.5, ge=0, le=1, description="of a step's rollouts on a rank: where environments break more of them, the run ends"
    )
    engine: str = Field(
        default="vllm_colocated",
        description="vllm_colocated: in each rank's process; vllm_server: one server for all ranks; or module:Class",
    )
    engine_options: dict[str, Any] = Field(default_factory=dict, description="arguments of an engine of your own")
    vllm: VllmConfig = VllmConfig()
    server: ServerConfig = ServerConfig()
    staleness: int = Field(
        default=0,
        ge=0,
        description="steps that sampling runs ahead of training; 0: they take turns. Groups with a token that was sampled by "
        "weights of more steps ago are left out",
    )
    filter_groups: bool | None = Field(
        default=None,
        description="sample again for groups that all succeed or all fail (DAPO); null is the method's own (on for sgcd)",
    )
    filter_spread: float | None = Field(
        default=None,
        ge=0,
        description="of filter_groups, for graded rewards: a group stays where its highest and lowest reward differ by more "
        "than this; null: where some of it succeed and some fail",
    )
    max_num_gen_batches: int = Field(
        default=3,
        ge=1,
        description="of filter_groups: batches sampled for one step at most, the first included; then such groups stay",
    )
    records: int = Field(
        default=128,
        ge=0,
        description="rollouts of a step that are kept with all their tokens in rollouts/step-N.parquet, rounded up to "
        "whole groups, as many of each rank; 0: none",
    )


class WriterConfig(Section):
    enabled: bool | None = Field(
        default=None, description="write credit references and show them to the teacher; null is the method's own (on for sgcd)"
    )
    url: str | None = Field(
        default=None,
        description="base URL of an OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1; null: the policy itself",
    )
    model: str | None = Field(default=None, description="the endpoint's name of it; may be left out where it serves one model")
    api_key_env: str | None = Field(default=None, description="the environment variable that holds the endpoint's key")
    max_tokens: int = Field(default=512, ge=1, description="of a reference")
    temperature: float = Field(default=1.0, ge=0)
    max_model_len: int | None = Field(
        default=None, ge=8, description="the endpoint's context; null: what it reports, else rollout.max_model_len"
    )
    template: str | None = Field(
        default=None, description="text file with {question} and {attempts} in place of the shipped prompt"
    )
    teacher_template: str | None = Field(default=None, description="text file with {question} and {reference}")
    timeout: float = Field(default=60.0, gt=0, description="seconds, of one request to the endpoint")
    max_retries: int = Field(
        default=2, ge=0, description="of a request, with growing pauses; then its group goes without a reference"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    steps: int = Field(default=100, ge=1, description="rollout steps")
    lr: float = Field(default=1e-6, gt=0, description="of AdamW, 1 at most")
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clipping: float = Field(default=1.0, ge=0, description="global norm; 0 is off")
    policy_loss: Literal["clip", "gspo", "cispo"] = Field(
        default="clip",
        description="clip: PPO's and GRPO's, a ratio a token; gspo: the sequence's ratio; cispo: the clipped ratio as a weight",
    )
    clip_low: float = Field(
        default=0.2, gt=0, le=1, description="ratio is clipped to [1 - clip_low, 1 + clip_high]; 1: no lower bound (cispo)"
    )
    clip_high: float = Field(default=0.2, gt=0, description="above clip_low for DAPO's clip-higher")
    dual_clip: float | None = Field(
        default=None, gt=1, description="bounds a token of negative advantage by dual_clip * A; 3 is usual"
    )
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = Field(
        default="seq_mean_token_mean", description="GEAR's and GRPO's: mean over tokens, then over trajectories"
    )
    advantages: Literal["grpo", "dr_grpo", "rloo", "batch"] = Field(
        default="grpo",
        description="reward less the group's mean, divided by the group's standard deviation; dr_grpo: not divided; rloo: less "
        "the mean of the others; batch: divided by the standard deviation of the step's rewards",
    )
    entropy_bonus: float = Field(default=0.0, ge=0, description="coefficient of the policy's entropy, which is raised; 0 is off")
    importance_mode: Literal["truncate", "mask", "sequence_mask"] = Field(
        default="truncate",
        description="against vLLM's mismatch, k = p_trainer / p_sampler as a weight: cut at its bounds; 0 outside them (IcePop); "
        "0 in a whole rollout whose geometric mean of k is outside",
    )
    importance_cap: float | None = Field(
        default=2.0, gt=0, description="the upper bound of importance weights; null: no importance weights"
    )
    importance_floor: float | None = Field(default=None, gt=0, description="their lower bound (IcePop: 0.5 with a cap of 5)")
    overlong_buffer: int | None = Field(
        default=None,
        ge=1,
        description="policy tokens before overlong_length over which the reward falls by 1, evenly (DAPO); null is off",
    )
    overlong_length: int | None = Field(
        default=None, ge=1, description="policy tokens at which the whole 1 is taken off; null: rollout.max_new_tokens"
    )
    mask_truncated: bool = Field(
        default=False, description="leave rollouts that tokens ran out in out of the loss (DAPO's overlong filtering)"
    )
    updates_per_step: int = Field(default=1, ge=1, description="optimizer steps over a step's rollouts, split by prompt")
    tokens_per_micro_batch: int = Field(
        default=16384, ge=16, description="tokens in one forward, padding included, of the student's rows or of the teacher's"
    )
    head_backward: Literal["exact", "sparse"] = Field(
        default="exact",
        description="sparse: the head's backward leaves out tokens of the vocabulary that hardly matter to a block of rows, "
        "within a relative error of 2^-9 of its gradients; it pays below about 1 nat of entropy",
    )
    packing: bool | None = Field(
        default=None,
        description="lay the sequences of a micro-batch end to end in place of padding them to its longest; null: where the "
        "model and its attention can, which the dry run and the run's first lines say",
    )


class TeacherConfig(Section):
    weights: Literal["rollout", "initial", "ema", "synced"] = Field(
        default="rollout",
        description="whose: the policy's own (no second copy; in the update pass those of the moment), the starting model's, "
        "their moving average, or the policy's at the last sync",
    )
    ema_rate: float = Field(default=0.01, gt=0, le=1, description="of ema: share of the policy mixed in after each step")
    sync_every: int = Field(default=10, ge=1, description="of synced: steps between copies of the policy")
    sees: Literal["ground_truth", "sibling", "wrong_answer"] | None = Field(
        default=None,
        description="in its prompt: the task's ground truth, a correct rollout of the group, or the ground truth of another "
        "problem (a control); null is the method's own",
    )
    wrong_hint: bool = Field(
        default=False,
        description="of sees=sibling: take from the signal what a failed rollout in the same prompt makes of it (RLCSD)",
    )


class KlConfig(Section):
    coefficient: float = Field(default=0.0, ge=0, description="of KL(policy || reference model) in the loss; 0 is off")
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="of a token's KL, from d = log p_reference - log p: -d, d^2 / 2, or e^d - 1 - d (GRPO)"
    )
    reference: str = Field(
        default="initial",
        description="initial: the starting model; ema: the policy's moving average; or an HF directory or hub name",
    )
    ema_rate: float = Field(default=0.01, gt=0, le=1, description="of ema: share of the policy mixed in after each step")


class DistillConfig(Section):
    variant: Literal["full", "sampled"] = Field(
        default="full",
        description="of opsd: divergence over the whole vocabulary, or policy gradient of the sampled tokens' log ratio",
    )
    beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of opsd, full: 0 is KL(teacher || student), 1 KL(student || teacher), between them JSD",
    )
    coefficient: float | None = Field(
        default=None,
        gt=0,
        description="of the distillation loss; null: 1 for opsd alone, 0.1 beside a credit method, 0.01 for sdar",
    )
    until_step: int | None = Field(
        default=None,
        ge=1,
        description="distil first, then RL: the distillation loss alone up to this step, the credit method alone after it; "
        "null: both at once",
    )


class EvalSet(Section):
    """A held-out set beside the run's own."""

    task: str = Field(description="as the run's: a name or module:Class, of which only the held-out problems are asked for")
    task_args: dict[str, Any] = Field(default_factory=dict)
    prompts: int | None = Field(default=None, ge=1, description="null: eval.prompts")
    samples: int | None = Field(default=None, ge=1, description="null: eval.samples")


class EvalConfig(Section):
    every: int = Field(
        default=20, ge=0, description="steps between held-out evaluations; before and after training always; 0: none"
    )
    prompts: int = Field(default=200, ge=1, description="problems of a set, its first ones")
    samples: int = Field(default=1, ge=1, description="rollouts of each problem")
    temperature: float = Field(default=1.0, ge=0, description="0.6 in GEAR's paper")
    top_p: float = Field(default=1.0, gt=0, le=1, description="0.95 in GEAR's paper")
    max_new_tokens: int | None = Field(default=None, ge=1, description="per assistant turn; null: rollout.max_new_tokens")
    max_model_len: int | None = Field(
        default=None,
        ge=8,
        description="context; null: rollout.max_model_len, which it may exceed in the command evaluate alone",
    )
    sets: dict[str, EvalSet] = Field(default_factory=dict, description="held-out sets beside the run's own, by a name for each")

    @field_validator("sets")
    @classmethod
    def _plain_names(cls, value: dict[str, EvalSet]) -> dict[str, EvalSet]:
        for name in value:
            if not re.fullmatch(r"\w[\w\-]*", name):
                raise ValueError(f"{name!r}: must be letters, digits, _ and -, as it names a metric and a folder")
        return value


class AuditConfig(Section):
    """The command audit's; see docs/audit.md."""

    problems: int = Field(default=32, ge=1, description="held-out problems, the first ones")
    samples: int = Field(default=8, ge=2, description="trajectories of each problem, sampled as in training")
    continuations: int = Field(
        default=64, ge=1, description="from each cut (M): a value's standard error is at most 0.5 / sqrt(M)"
    )
    stride: int = Field(
        default=4, ge=1, description="tokens that the policy was not certain of between the first cuts; 1: a cut behind each"
    )


class CheckpointConfig(Section):
    every: int = Field(default=20, ge=1, description="steps between checkpoints; the last step always writes one")
    keep: int = Field(default=2, ge=1, description="how many are kept")
    export: bool = Field(default=True, description="write the final policy in HF format to runs/NAME/model")


class TrackingConfig(Section):
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=["tensorboard"],
        description="who gets each step's metrics beside metrics.jsonl; wandb and trackio are packages to be installed",
    )
    project: str = Field(default="gear-trainer", min_length=1, description="of wandb and trackio")
    samples_every: int = Field(
        default=20, ge=0, description="steps between rollouts shown as text, on the terminal and by the trackers; 0: none"
    )

    @field_validator("trackers")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"names {twice[0]} twice: once is enough")
        return value


class Config(Section):
    name: str = Field(description="the run's folder under output_dir: letters, digits, _ - and dots, not dots alone")
    output_dir: str = "runs"
    cache_dir: str = Field(default=".cache", description="warm starts and unpacked models")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything; below 2**32, as numpy and vLLM take no other")
    world_size: int = Field(ge=1, description="ranks (GPUs, or processes on a CPU) that the run is planned for")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    task: str = Field(description="mathapi, sums, gsm8k, math, or module:Class")
    task_args: dict[str, Any] = Field(default_factory=dict)
    chat_template_args: dict[str, Any] = Field(default_factory=dict, description="for example enable_thinking: false")
    credit: str = Field(
        default="gear",
        description="a credit method such as gear or grpo, or your own module:Class; a distillation loss (opsd, sdar); "
        "or both: opsd+gear",
    )
    credit_args: dict[str, Any] = Field(default_factory=dict, description="fields of the method, for example alpha: 0.4")
    signal: Literal["k1", "reverse_kl"] | None = Field(
        default=None, description="sampled-token log ratio, or the full-vocabulary KL; null is the method's own (k1 but for sgcd)"
    )
    rollout: RolloutConfig = RolloutConfig()
    writer: WriterConfig = WriterConfig()
    train: TrainConfig = TrainConfig()
    teacher: TeacherConfig = TeacherConfig()
    kl: KlConfig = KlConfig()
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    audit: AuditConfig = AuditConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    max_logprob_gap: float = Field(
        default=0.5,
        gt=0,
        description="nats; a mean trainer-vs-vLLM gap above it on the first step stops the run (weights not in sync)",
    )
    rank_timeout: float = Field(
        default=600.0,
        gt=0,
        description="seconds without a sign of life after which a rank counts as lost, and the run ends naming it",
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged over the generated DeepSpeed config")

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def prompts_per_rank(self) -> int:
        return self.rollout.prompts_per_step // self.world_size

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.\-]+", value) or not value.strip("."):  # "." is output_dir itself, ".." the folder above it
            raise ValueError("must be letters, digits, _ - and dots, and not dots alone: it names one folder under output_dir")
        return value

    @model_validator(mode="after")
    def _finite(self) -> Config:
        for key, value in leaves(self.model_dump()):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}={value}: must be a finite number")
        return self

    @model_validator(mode="after")
    def _one_deepspeed(self) -> Config:
        """What the generated DeepSpeed configuration must say for this trainer is not overwritten."""
        for key, (allowed, mend) in _generated(self).items():
            value = _at(self.deepspeed, key)
            if value is not None and value not in allowed:
                raise ValueError(f"deepspeed.{key}={value!r}: {mend}")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Config:
        r, t = self.rollout, self.train
        if t.lr > 1:
            raise ValueError(f"train.lr={t.lr}: AdamW moves every weight by about that in a step; a policy takes 1e-6 to 1e-3")
        if t.lr_warmup_steps > t.steps:
            raise ValueError(
                f"train.lr_warmup_steps={t.lr_warmup_steps} is longer than the run of train.steps={t.steps}: the learning rate "
                "would never be reached, lower it"
            )
        if r.prompts_per_step % self.world_size:
            raise ValueError(
                f"rollout.prompts_per_step={r.prompts_per_step} does not split over world_size={self.world_size}: "
                "groups stay whole on a rank, make it a multiple"
            )
        if self.prompts_per_rank % t.updates_per_step:
            raise ValueError(
                f"train.updates_per_step={t.updates_per_step} does not divide the {self.prompts_per_rank} prompts of a rank: "
                "each optimizer step takes whole groups"
            )
        if r.max_new_tokens >= r.max_model_len:
            raise ValueError(
                f"rollout.max_new_tokens={r.max_new_tokens} leaves no room for a prompt in "
                f"rollout.max_model_len={r.max_model_len}: raise max_model_len"
            )
        if r.staleness and r.turn_timeout is None:
            raise ValueError(
                f"rollout.staleness={r.staleness} samples in a thread, and rollout.turn_timeout=null asks for the main one: set "
                "a limit in seconds, or rollout.staleness=0"
            )
        new, context = self.eval.max_new_tokens or r.max_new_tokens, self.eval.max_model_len or r.max_model_len
        if new >= context:
            raise ValueError(
                f"eval.max_new_tokens: {new} leave no room for a prompt in a context of {context}: raise eval.max_model_len"
            )
        _check_bounds(t, r.max_new_tokens)
        if t.tokens_per_micro_batch < r.max_model_len:
            raise ValueError(
                f"train.tokens_per_micro_batch={t.tokens_per_micro_batch} is less than one sequence of "
                f"rollout.max_model_len={r.max_model_len}: raise it"
            )
        return self


def _check_bounds(t: TrainConfig, max_new_tokens: int) -> None:
    """What belongs together in the objective. Raises ValueError."""
    cap, floor = t.importance_cap, t.importance_floor
    if cap is None and (floor is not None or t.importance_mode != "truncate"):
        raise ValueError(
            f"train.importance_cap=null switches importance weights off, and train.importance_mode={t.importance_mode} with "
            f"importance_floor={floor} asks for them: set a cap"
        )
    if cap is not None and floor is not None and floor >= cap:
        raise ValueError(f"train.importance_floor={floor} is not below train.importance_cap={cap}: lower it")
    if t.policy_loss == "cispo" and t.dual_clip is not None:
        raise ValueError("train.dual_clip bounds the clipped surrogate, which train.policy_loss=cispo has not: leave it out")
    if t.overlong_length is not None and t.overlong_buffer is None:
        raise ValueError("train.overlong_length is read with train.overlong_buffer alone: set both, or leave it out")
    longest = t.overlong_length or max_new_tokens
    if t.overlong_buffer is not None and t.overlong_buffer > longest:
        raise ValueError(
            f"train.overlong_buffer={t.overlong_buffer} is longer than the {longest} tokens at which it ends "
            "(train.overlong_length, else rollout.max_new_tokens): lower it"
        )


def _generated(cfg: Config) -> dict[str, tuple[tuple[Any, ...], str]]:
    """DeepSpeed keys that this trainer decides: what may stand there all the same, and the mend for anything else."""
    tokens = "micro-batches are cut by tokens; leave it out, see rollout.prompts_per_step and train.tokens_per_micro_batch"
    dtype = f"model.dtype={cfg.model.dtype} decides it; leave it out, and set model.dtype"
    rate = "the trainer sets the rate of each step; leave it out, and set train.lr, lr_schedule and lr_warmup_steps"
    return {
        "train_batch_size": ((), tokens),
        "train_micro_batch_size_per_gpu": ((1,), tokens),
        "gradient_accumulation_steps": ((1,), tokens),
        "managed_gradient_accumulation": ((False,), tokens),
        "fp16.enabled": ((False,), dtype),
        "bf16.enabled": ((cfg.model.dtype == "bfloat16",), dtype),
        "scheduler": ((), rate),
        "optimizer.params.lr": ((cfg.train.lr,), rate),
        "zero_optimization.stage": ((3,), "this trainer needs stage 3, whose shards it gathers, pushes and saves; leave it out"),
    }


def _at(section: Any, key: str) -> Any:
    """The value of a dotted key under `deepspeed`, None where it is not given."""
    above = "deepspeed"
    for name in key.split("."):
        if not isinstance(section, dict):
            raise ValueError(f"{above}={section!r}: must be a section of `key: value` lines")
        section, above = section.get(name), f"{above}.{name}"
        if section is None:
            return None
    return section


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values below sections and lists, each with its dotted key."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if inside is None:
        yield key, value
        return
    for name, item in inside:
        yield from leaves(item, f"{key}.{name}" if key else str(name))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for floats: 4e-1, 1e5 and 1.5e3 are numbers, as in YAML 1.2 and JSON, not texts."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML) and validate. Raises ConfigError."""
    return make_config(read_yaml(Path(path)), overrides, str(path))


def make_config(data: dict[str, Any], overrides: list[str] | None = None, where: str = "the command line") -> Config:
    """The same of values that are at hand; `where` they come from, for messages. Raises ConfigError."""
    for item in overrides or []:
        _override(data, item)
    return validated(Config, data, where)


def validated(schema: type[Schema], data: dict[str, Any], where: str) -> Schema:
    """The values as a section of this schema; `where` they come from, for messages. Raises ConfigError."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e, schema) for e in error.errors())) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The top level of a YAML file. Raises ConfigError where there is none, or nothing that can be read."""
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "no *.yaml there"
        raise ConfigError(f"{path}: no such config file ({near})")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: no text in UTF-8 (byte {error.start}): give a YAML file, or save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{path}: {line}not valid YAML ({problem}): mend the line") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level, found {type(data).__name__}")
    return data


def _override(data: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r}: expected key=value, for example train.lr=1e-5")
    *parents, last = key.split(".")
    for name in parents:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {item!r}: {name} is a value, not a section")
    try:
        data[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not valid YAML ({error.__class__.__name__}); quote it") from None


def _explain(error: Mapping[str, Any], schema: type[Section]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        if key in MOVED:
            return f"unknown key {key}: it is {MOVED[key]} now"
        known = _fields_at(error["loc"][:-1], schema)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "known keys here: " + ", ".join(known)
        return f"unknown key {key}: {hint}"
    if error["type"] == "missing":
        return f"{key} is missing: give it in the file" + (f" or as {key}=VALUE" if schema is Config else "")
    message = error["msg"].removeprefix("Value error, ")
    return message if key == "config" else f"{key}={error['input']!r}: {message}"


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: what was likely meant."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]!r}?" if close else ": leave it out"


def _fields_at(loc: tuple[Any, ...], schema: type[Section]) -> list[str]:
    cls: Any = schema
    for name in loc:
        named = get_args(cls)  # of dict[str, Section] any name leads to the section
        cls = named[1] if named else cls.model_fields[name].annotation
    return sorted(cls.model_fields)


def changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two dumped configurations, as `key: old -> new`."""
    out = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            out += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            out.append(f"{prefix}{key}: {old} -> {new}")
    return out
