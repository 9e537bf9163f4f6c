"""The memory plan: what each rank holds in each phase, against its card, before anything starts.

Rules are those of the installed DeepSpeed (runtime/zero), vLLM and of the fused operator; activations are counted by running the
model's own code on meta tensors (`meter`). All in bytes. Rows that are allowances, not counts, say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gear_kernels import sparse, tiling
from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.launcher import ranks_here
from gear_trainer.policy import lora
from gear_trainer.policy.frozen import shares_weights
from gear_trainer.policy.hub import known_config, meta_model, model_sizes
from gear_trainer.policy.zero import choose_accelerator, deepspeed_config
from gear_trainer.preflight.meter import Passes, passes
from gear_trainer.recipe import Frozen, Recipe
from gear_trainer.rollout.vllm_colocated import adapter_rank, kv_bytes, memory_share
from gear_trainer.rollout.weight_transfer import CHUNK
from gear_trainer.user_code import said

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB, MIB = 2**30, 2**20

# --- allowances: what is not counted ------------------------------------------------------------------------------------

# Cards are sold in GB that are GiB in all but name: one of 80 has 80 GiB of memory chips, of which the driver keeps 1 to 1.5 %
# (79.1 GiB are reported for an H100 of 80 GB, 139.8 for an H200 of 141).
SEEN_BY_PROGRAMS = 0.985
# CUDA's context 0.5, NCCL's channels 1, cuBLAS' workspaces and the allocator's holes 1.5 GiB: estimates.
CONTEXT = 3 * GIB
GRAPHS = 1 * GIB  # vLLM's captured graphs: an estimate
# A rank of the CPU demo: 426 MiB after the imports, 70 more of libraries' pages and 35 of objects once both engines are built;
# objects and heaps grow by 35 (1 step) to 110 MiB (14 steps) while it samples.
LIBRARIES, OBJECTS = 530 * MIB, 70 * MIB
FROZEN_ROWS = {"teacher": "teacher's weights", "reference": "reference model's weights"}
SUMS = 200  # bytes a row: 12 float64 sums, 7 values and 9 numbers of state in float32, a target


class Card(NamedTuple):
    """The memory that one rank may fill: `total` bytes of a GPU, or its share of this machine's memory."""

    name: str
    total: float
    gpu: bool
    assumed: bool = False  # nobody named it: a plan that does not fit is a warning


ASSUMED = 80  # GB of the card of a configuration that is meant for GPUs, where none is


def card(cfg: Config, sold_as: float | None = None) -> Card:
    """The card of that many GB, else the first GPU here, else this machine's memory divided by its ranks.

    A configuration that is meant for another machine's card gets one of 80 GB.
    """
    if sold_as is not None:
        total = sold_as * SEEN_BY_PROGRAMS * GIB
        return Card(f"a card sold as {sold_as:g} GB ({total / GIB:.1f} GiB for programs)", total, True)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Card(f"{found.name} ({found.total_memory / GIB:.1f} GiB)", found.total_memory, True)
    if for_gpu(cfg):
        return card(cfg, ASSUMED)._replace(
            name=f"a card of {ASSUMED} GB (assumed: there is none here, name yours by --card)", assumed=True
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ranks = beside(cfg)
    return Card(f"this machine's {total / GIB:.1f} GiB over {ranks} rank(s)", total / ranks, False)


def beside(cfg: Config) -> int:
    """The ranks that share a machine's memory: this one's, all of them where no launcher has said."""
    return min(ranks_here(cfg.world_size), cfg.world_size)


def for_gpu(cfg: Config) -> bool:
    """True where a run is for GPUs: without one it needs `rollout.vllm.kv_cache_mib`, so that a configuration that has none is
    meant for another machine."""
    return torch.cuda.is_available() or cfg.rollout.vllm.kv_cache_mib is None


class Sizes(NamedTuple):
    """Numbers of elements of a model's weights. `trained`: of those with gradients, all without LoRA; `layer`, `largest`: of one
    decoder layer, of its largest parameter; `small`: together of the parameters that ZeRO-3 leaves whole."""

    total: int
    trained: int
    head: int
    layers: int
    layer: int
    largest: int
    small: int
    tied: bool
    hidden: int
    vocabulary: int


def sizes_of(lm: PreTrainedModel, threshold: int) -> Sizes:
    """The parameter counts of a model on the meta device; threshold: stage3_param_persistence_threshold."""
    layer = lm.get_output_embeddings()
    assert layer is not None  # a causal model's head
    head, embedding = layer.weight, lm.get_input_embeddings().weight
    whole = list(lm.parameters())
    tables = {id(head), id(embedding)}
    inner = [p for p in whole if id(p) not in tables]
    depth = lm.config.get_text_config().num_hidden_layers
    layers = sum(p.numel() for p in inner)
    small = sum(p.numel() for p in whole if p.numel() <= threshold)
    vocabulary, hidden = head.shape
    trained = sum(p.numel() for p in whole if p.requires_grad)
    return Sizes(
        sum(p.numel() for p in whole), trained, head.numel(), layers, -(-layers // depth), max(p.numel() for p in inner), small,
        head is embedding, hidden, vocabulary,
    )  # fmt: skip


def _policy(cfg: Config) -> PreTrainedModel:
    """The policy's model without memory, its adapters on it where LoRA is on."""
    lm = meta_model(cfg.model.path, cfg.model.dtype, cfg.model.attn_implementation)
    if cfg.lora.rank:
        lm = deepcopy(lm)
        lora.attach(lm, cfg.lora)
    return lm


# --- the plan -----------------------------------------------------------------------------------------------------------

PHASES = ("start", "rollout", "score", "update", "step", "push")


@dataclass(frozen=True)
class Plan:
    """Bytes by phase and row; of each phase its heaviest moment. `host`: of a rank in the machine's memory, beside the card."""

    card: Card
    sizes: Sizes
    phases: dict[str, dict[str, float]]
    moments: dict[str, str]
    host: float
    cache: Cache
    logits: float

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    def of_a_step(self) -> dict[str, float]:
        """The most bytes by a step's phases as they are measured: the optimizer's step lies in the update."""
        found = {phase: self.total(phase) for phase in ("rollout", "score", "update", "push")}
        return found | {"update": max(found["update"], self.total("step"))}

    def over(self) -> list[str]:
        """Phases that do not fit, the worst first; `cache` where no sequence fits into vLLM's."""
        over = sorted((p for p in PHASES if self.total(p) > self.card.total), key=self.total, reverse=True)
        return over or (["cache"] if self.cache.sequences < 1 else [])


class Cache(NamedTuple):
    """vLLM's KV cache: bytes, tokens, sequences of max_model_len, sequences of the run's own longest; how many run at once."""

    size: float
    tokens: float
    sequences: float
    own: float
    wanted: int


class Uncounted(RuntimeError):
    """A model whose code does not run on meta tensors: what it holds cannot be counted."""


def planned(cfg: Config, recipe: Recipe, longest: tuple[tuple[int, int], int], on: Card) -> tuple[Planner, Plan] | None:
    """A planner and its plan for this configuration; None where the model's sizes are not at hand. Raises Uncounted.

    longest: prompts of student and teacher, and a response over all turns, in tokens.
    """
    sizes = known_config(cfg.model.path) and model_sizes(cfg.model.path)
    if not sizes:
        return None
    try:
        planner = Planner(cfg, recipe, sizes, *longest)
        return planner, planner.plan(cfg, on)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise Uncounted(said(error)) from error


def check_start(cfg: Config, recipe: Recipe, longest: tuple[tuple[int, int], int]) -> tuple[Planner, Plan] | None:
    """The plan of a run that is about to start. Raises ConfigError where it cannot fit on the card that it is on.

    None where the card is not known, or what the model holds.
    """
    on = card(cfg)
    if on.assumed:
        return None
    try:
        found = planned(cfg, recipe, longest, on)
    except Uncounted:
        return None
    if found:
        check_plan(*found, cfg)
    return found


class Planner:
    """Plans of one model for any configuration of it: the model and its passes are looked at once."""

    def __init__(self, cfg: Config, recipe: Recipe, sizes: dict[str, Any], prompts: tuple[int, int], response: int):
        """sizes: the fields of the model's config.json. prompts: longest of student and teacher; response: longest, all turns."""
        self.recipe, self.fields = recipe, sizes
        self.student, self.teacher = prompts
        self.response = response
        self.lm = _policy(cfg)
        self._passes: dict[bool, tuple[int, Passes]] = {}

    def plan(self, cfg: Config, card: Card) -> Plan:
        return _Rank(self, cfg, card).plan()

    def tokens(self, cfg: Config) -> int:
        """Tokens of the largest forward, padding included; a full micro-batch is as large packed."""
        wide = max(self.student, self.teacher) + self.response
        rollouts = cfg.rollout.prompts_per_step * cfg.rollout.group_size // cfg.world_size
        return min(cfg.train.tokens_per_micro_batch, rollouts * wide)

    def elements(self, path: str) -> int:
        """Elements of the weights of a reference model of its own; the policy's where its sizes are not at hand."""
        known = known_config(path) and model_sizes(path)
        lm = meta_model(path, "bfloat16", "sdpa") if known else self.lm
        return sum(p.numel() for p in lm.parameters())

    def passes(self, cfg: Config) -> Passes:
        """The bytes of a forward and backward of `tokens`: counted at one number of them, then in proportion."""
        tokens, wide = self.tokens(cfg), max(self.student, self.teacher) + self.response
        checkpointing = cfg.model.gradient_checkpointing
        if checkpointing not in self._passes:
            width = min(wide, tokens)
            rows = max(1, tokens // width)
            self._passes[checkpointing] = rows * width, passes(self.lm, rows, width, checkpointing)
        counted, found = self._passes[checkpointing]
        return Passes(*(size * tokens / counted for size in found))


class _Rank:
    """One configuration on one card: each method is a group of rows, or a moment made of them."""

    def __init__(self, planner: Planner, cfg: Config, card: Card):
        choose_accelerator()
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        made = deepspeed_config(cfg)
        self.planner, self.cfg, self.card = planner, cfg, card
        self.world, self.here = cfg.world_size, beside(cfg)
        self.zero = DeepSpeedZeroConfig(**made["zero_optimization"])
        self.s = sizes_of(planner.lm, self.zero.param_persistence_threshold)
        self.item = 2 if cfg.model.dtype == "bfloat16" else 4
        accumulates = (made.get("data_types") or {}).get("grad_accum_dtype")
        self.accumulated = 4 if accumulates in ("fp32", "float32") else self.item
        self.share, self.trained = self.s.total / self.world, self.s.trained / self.world
        self.adapters, self.head_trains = self.s.trained if cfg.lora.rank else 0, not cfg.lora.rank
        self.passes, self.tokens = planner.passes(cfg), planner.tokens(cfg)
        self.frozen = planner.recipe.frozen
        self.offloaded = self._device(self.zero.offload_optimizer) != "none"
        self.apart = cfg.rollout.engine == "vllm_server"  # on GPUs of its own, or in one process beside all ranks of a machine
        self.asleep = card.gpu and cfg.rollout.vllm.sleep_level > 0

    @staticmethod
    def _device(section: Any) -> str:
        return "none" if section is None else str(getattr(section.device, "value", section.device))

    def plan(self) -> Plan:
        moments = {
            "start": {"vLLM": self._engine_builds(), "DeepSpeed": self._trainer_builds()},
            "rollout": {"sampling": self._rollout()},
            "score": {"layers": self._score_layers(), "head": self._score_head()},
            "update": {"layers": self._update_layers(), "head": self._update_head(), "gradients": self._update_flush()},
            "step": {"AdamW": self._step()},
            "push": {"a bucket": self._push()},
        }
        heaviest = {phase: max(found, key=lambda m, f=found: sum(f[m].values())) for phase, found in moments.items()}
        phases = {phase: {k: v for k, v in moments[phase][m].items() if v} for phase, m in heaviest.items()}
        logits = 4.0 * self.s.vocabulary * self.tokens
        return Plan(self.card, self.s, phases, heaviest, self._host(), self._cache(), logits)

    # --- rows -----------------------------------------------------------------------------------------------------------

    def _base(self) -> dict[str, float]:
        if self.card.gpu:
            return {"CUDA, NCCL: allowance": CONTEXT}
        return {"Python, libraries: measured": LIBRARIES}

    def _states(self, moments: bool = True) -> dict[str, float]:
        """ZeRO-3's. The masters of float32 weights are a copy too: DeepSpeed compares a device with its name, which differ."""
        held = self._base()
        if self._device(self.zero.offload_param) == "none":
            held["weights (ZeRO-3 share)"] = self.share * self.item
        if not self.offloaded:
            held["gradients"] = self.trained * self.accumulated
            held["float32 masters and moments"] = self.trained * (12 if moments else 4)
        for model in self.frozen:
            shadow = 4 if model.weights == "ema" and self.item == 2 else 0
            elements = self.planner.elements(model.path) / self.world if model.path else self._beside(model)
            held[FROZEN_ROWS[model.name]] = elements * (self.item + shadow)
        return held

    def _beside(self, model: Frozen) -> float:
        """A rank's elements of a frozen model that has no path: the policy's weights again, or adapters alone, on those."""
        if not shares_weights(self.cfg, model):
            return self.share
        return self.trained if model.follows else 0.0

    def _bucket(self) -> float:
        """DeepSpeed's gradient bucket. On a CPU only the pages that gradients have touched are there."""
        size = float(self.zero.reduce_bucket_size)
        return self.item * (size if self.card.gpu else min(size, self.s.trained))

    def _trainer(self) -> dict[str, float]:
        held = self._states() | {"gradient buckets": self._bucket(), "whole weights": self._small()}
        if not self.card.gpu:
            held["Python, libraries: measured"] += OBJECTS
        return held

    def _small(self) -> float:
        """Parameters that are never partitioned; a rank alone holds its weights once, whole."""
        return self.s.small * self.item if self.world > 1 else 0.0

    def _whole(self, in_use: int) -> float:
        """Weights that are whole at a time, with those fetched ahead: a buffer being read, one on its way, and the copies made of
        the first. A CPU's gloo gathers through half a buffer more (counted on SmolLM2: 3.5 buffers beside the head).

        None are kept for a backward within stage3_max_reuse_distance: DeepSpeed remembers for each module of a forward what it
        released there first: in scoring, which has no backward (seen on SmolLM2: at the head only the head is whole).
        """
        if self.world == 1:
            return 0.0
        fetch = min(self.zero.prefetch_bucket_size + self.s.largest, self.s.layers)
        return self.item * (max(in_use + fetch, self.s.small) + fetch * (2 if self.card.gpu else 2.5))

    def _vllm(self) -> dict[str, float]:
        """What a rank's engine takes of its card, or the rank's share of what the one server takes of the machine."""
        if not self.apart:
            return self._one_vllm()
        return {} if self.card.gpu else {row: size / self.here for row, size in self._one_vllm().items()}

    def _one_vllm(self) -> dict[str, float]:
        weights = self._served() * self.item
        if self.card.gpu:
            return {"vLLM: weights": weights, "vLLM: KV cache": self._cache().size, "vLLM: prefill, graphs": self._prefill()}
        # both tables stay beside what oneDNN packs of them (counted on SmolLM2, whose one table makes three)
        packed = self.s.head * self.item * (3 if self.s.tied else 2)
        return {"vLLM: weights": weights + packed, "vLLM: KV cache": self._cache().size}

    def _served(self) -> float:
        """Elements of the model that vLLM holds, and of the adapters that it makes room for."""
        return self.s.total - self.adapters + self._pushed_alone()

    def _pushed_alone(self) -> float:
        """Elements of the adapters as vLLM holds them, in its own steps of ranks; 0 where it gets whole weights."""
        return self.adapters * adapter_rank(self.cfg) / max(1, self.cfg.lora.rank)

    def _prefill(self) -> float:
        """vLLM's profiled forward of its longest batch (as the trainer's own), its logits, and graphs."""
        more = self.cfg.rollout.vllm.engine_args
        batch = more.get("max_num_batched_tokens") or (16384 if self.card.total >= 70 * GIB else 8192)
        logits = self.cfg.rollout.vllm.max_num_seqs * self.s.vocabulary * (4 + 4 + self.item)
        return self.passes.score * batch / self.tokens + logits + (0 if more.get("enforce_eager") else GRAPHS)

    def _cache(self) -> Cache:
        """The KV cache of one engine: a rank's, or that of all GPUs of the server, each such a card."""
        r, planner = self.cfg.rollout, self.planner
        gpus = r.server.tensor_parallel_size if self.apart else 1
        if r.vllm.kv_cache_mib is not None:
            size = float(r.vllm.kv_cache_mib * MIB * gpus)
        else:
            taken = self._served() * self.item + (self._prefill() * gpus if self.card.gpu else LIBRARIES)
            card = self.card.total * (gpus if self.card.gpu else self.here)
            size = max(0.0, memory_share(self.cfg) * card - taken)
        token = kv_bytes(self.cfg, planner.fields)
        wanted = min(r.vllm.max_num_seqs, r.prompts_per_step * r.group_size // (1 if self.apart else self.world))
        if token is None:
            return Cache(size, float("inf"), float("inf"), float("inf"), wanted)
        tokens = size / token
        return Cache(size, tokens, tokens / r.max_model_len, tokens / (planner.student + planner.response), wanted)

    def _awake(self) -> dict[str, float]:
        return {} if self.asleep else self._vllm()

    # --- moments --------------------------------------------------------------------------------------------------------

    def _engine_builds(self) -> dict[str, float]:
        return self._base() | self._vllm()

    def _trainer_builds(self) -> dict[str, float]:
        """Before the first step: no moments yet, but float32 gradients of one sub-group, which nobody needs until then."""
        held = self._states(moments=False) | self._awake()
        if self.card.gpu:
            held["gradient buckets"] = self._bucket()
        return held | {"optimizer's temporaries": 0 if self.offloaded else 4 * self._subgroup()}

    def _rollout(self) -> dict[str, float]:
        held = self._trainer() | self._vllm()
        if not self.card.gpu:
            tokens = min(4096, self.cfg.rollout.vllm.max_num_seqs * self.planner.student)
            work = tokens * (self.passes.score / self.tokens + self._copied_adapter())
            held["vLLM: prefill, graphs"] = work / (self.here if self.apart else 1)
        return held

    def _copied_adapter(self) -> float:
        """Bytes a token of a batch that vLLM on a CPU takes for adapters: it copies A or B for every token, a layer at a time."""
        sides = (max(layer.in_features, layer.out_features) for layer in lora.layers(self.planner.lm).values())
        return adapter_rank(self.cfg) * max(sides, default=0) * self.item

    def _score_layers(self) -> dict[str, float]:
        held = self._trainer() | self._awake()
        return held | {"whole weights": self._whole(max(self.s.layer, self.s.head)), "a layer's work": self.passes.score}

    def _score_head(self) -> dict[str, float]:
        held = self._trainer() | self._awake()
        states = self.tokens * self.s.hidden * self.item
        held["fused head"] = 3 * states + self._operator()
        return held | {"whole weights": self._whole(self.s.head) + self._frozen_head("teacher", "reference")}

    def _update_layers(self) -> dict[str, float]:
        """In the backward, beside all that the forward kept. A head's gradient too large for a bucket waits for the next one's
        turn, a tied one for the embedding's at the end; full buckets are copied for the reduce-scatter."""
        held = self._trainer() | self._awake()
        held["activations kept"] = self.passes.kept
        held["a layer's work"] = self.passes.backward - self.passes.kept
        held["whole weights"] = self._whole(max(self.s.layer, self.s.head if self.s.tied else 0))
        if self.head_trains and (self.s.tied or self.s.head > self.zero.reduce_bucket_size):
            held["head's gradient"] = self.s.head * self.item
        if min(self.s.layers, self.s.trained) > self.zero.reduce_bucket_size:
            held["gradient buckets"] += self._reduced(self.zero.reduce_bucket_size)
        return held

    def _update_head(self) -> dict[str, float]:
        held = self._trainer() | self._awake()
        states = self.tokens * self.s.hidden
        distillation = self.planner.recipe.distillation
        rows = 2 if distillation and distillation.full else 1
        held["activations kept"] = self.passes.kept
        # hidden states and their gradient, which is summed in float32
        held["fused head"] = states * (self.item * (rows + 1) + 4) + self._operator() + self._notes()
        held["head's gradient"] = self.s.head * self.item * self.head_trains
        teacher = self._frozen_head("teacher") if rows == 2 else 0.0
        return held | {"whole weights": self._whole(self.s.head) + teacher}

    def _update_flush(self) -> dict[str, float]:
        """The last bucket, once the backward is done."""
        held = self._trainer() | self._awake()
        held["gradient buckets"] += self._reduced(min(self.zero.reduce_bucket_size, self.s.trained))
        if self.head_trains and self.s.head > self.zero.reduce_bucket_size:
            held["head's gradient"] = self.s.head * self.item
        return held | {"whole weights": max(self._small(), self.s.head * self.item * (self.world > 1))}

    def _reduced(self, numel: float) -> float:
        """A bucket interleaved by rank, and this rank's part of it in the dtype of the sums. gloo reduces in one more copy."""
        part = self.accumulated / self.world if self.accumulated != self.item else 0
        return numel * (self.item * (1 if self.card.gpu else 2) + part)

    def _step(self) -> dict[str, float]:
        """AdamW a sub-group at a time: its gradients flat in float32, and the root of the second moments (two on a CPU)."""
        held = self._trainer() | self._awake()
        if not self.offloaded:
            held["optimizer's temporaries"] = self._subgroup() * (8 if self.card.gpu else 12)
        return held

    def _push(self) -> dict[str, float]:
        """A layer gathered, vLLM's copy of it and what it packs of that; the KV cache sleeps where it can. Adapters go by way of
        a file: there is vLLM's copy of them alone."""
        held = self._trainer() | self._awake()
        if self.apart:
            copied = min(float(CHUNK), self.s.total * self.item)
            return held | {"whole weights": self._small() + max(copied, 2.0 * self.item * max(self.s.layer, self.s.head))}
        held["vLLM: weights"] = self._vllm()["vLLM: weights"]
        if adapters := self._pushed_alone():
            return held | {"whole weights": self._small() + adapters * self.item}
        return held | {"whole weights": self._small() + (3 if self.world > 1 else 2) * self.item * max(self.s.layer, self.s.head)}

    def _subgroup(self) -> float:
        return min(self.trained, self.zero.sub_group_size + self.s.head / self.world)

    def _operator(self) -> float:
        """The fused operator's tiles and sums: never the logits."""
        return tiling.limits(torch.device("cuda" if self.card.gpu else "cpu")).workspace + SUMS * self.tokens

    def _notes(self) -> float:
        """The sparse backward's: a number for each column and block of rows, and as many for what it chooses them by."""
        rows, columns = sparse.shape(self.tokens, self.s.vocabulary)
        return 3 * 4.0 * rows * columns * (self.cfg.train.head_backward == "sparse")

    def _frozen_head(self, *names: str) -> float:
        """A frozen model's head, whole while it scores; two of them never are at a time."""
        own = any(model.name in names and not shares_weights(self.cfg, model) for model in self.frozen)
        return self.s.head * self.item if self.world > 1 and own else 0.0

    def _host(self) -> float:
        """In the machine's memory, a rank: what is offloaded. The optimizer's: sums and float32 gradients, masters, moments, and
        the temporaries of its step."""
        if not self.card.gpu:
            return 0.0
        held = 0.0
        if self.offloaded and self._device(self.zero.offload_optimizer) == "cpu":
            held += self.trained * (self.accumulated + 16) + 8 * self._subgroup()
        if self._device(self.zero.offload_param) == "cpu":
            held += self.share * self.item
        if self.cfg.rollout.vllm.sleep_level == 1 and not self.apart:
            held += self._served() * self.item
        return held


# --- refusals -----------------------------------------------------------------------------------------------------------


def check_plan(planner: Planner, plan: Plan, cfg: Config) -> None:
    """Raises ConfigError where the plan does not fit; it names the key that would mend it."""
    over, card = plan.over(), plan.card
    if not over:
        return
    mend = " or ".join(_mends(planner, cfg, card)) or "more or larger cards, or a smaller model"
    if over[0] == "cache":
        raise ConfigError(
            f"memory: beside the weights vLLM's KV cache gets {plan.cache.size / GIB:.1f} GiB, less than one sequence of "
            f"rollout.max_model_len={cfg.rollout.max_model_len}: set {mend}"
        )
    rows = plan.phases[over[0]]
    largest = max(rows, key=rows.__getitem__)
    raise ConfigError(
        f"memory: {over[0]} takes {plan.total(over[0]) / GIB:.1f} GiB a rank ({largest}: {rows[largest] / GIB:.1f}), more than "
        f"{card.name}: set {mend}"
    )


def _mends(planner: Planner, cfg: Config, card: Card) -> Iterator[str]:
    """The first single change that makes everything fit, else the first pair; then the number of ranks that would."""

    def fits(*changes: tuple[str, Any]) -> bool:
        changed = _changed(cfg, dict(changes))
        return changed is not None and not planner.plan(changed, _again(card, changed)).over()

    keys = list(_candidates(cfg, card))
    singles = ([change] for change in keys)
    pairs = ([a, b] for i, a in enumerate(keys) for b in keys[i + 1 :] if a[0] != b[0])
    for found in (next((c for c in group if fits(*c)), None) for group in (singles, pairs)):
        if found:
            yield " and ".join(f"{key}={_text(value)}" for key, value in found)
            break
    ranks = (cfg.world_size * 2**n for n in range(1, 7)) if card.gpu else range(cfg.world_size - 1, 0, -1)
    for world in ranks:
        if fits(("world_size", world)):
            yield f"world_size={world}"
            return


def _candidates(cfg: Config, card: Card) -> Iterator[tuple[str, Any]]:
    """Changes in the order in which they cost: nothing, recomputation, smaller batches, the optimizer's speed."""
    r, t = cfg.rollout, cfg.train
    if card.gpu and r.vllm.sleep_level == 0:
        yield "rollout.vllm.sleep_level", 2
    if r.vllm.kv_cache_mib is None:
        shares = [n / 20 for n in range(18, 1, -1)]
        yield from (("rollout.vllm.gpu_memory_utilization", share) for share in shares if share != r.vllm.gpu_memory_utilization)
    else:
        yield from (("rollout.vllm.kv_cache_mib", r.vllm.kv_cache_mib >> n) for n in range(1, 5))
    if not cfg.model.gradient_checkpointing:
        yield "model.gradient_checkpointing", True
    for n in range(1, 6):
        if t.tokens_per_micro_batch >> n >= r.max_model_len:
            yield "train.tokens_per_micro_batch", t.tokens_per_micro_batch >> n
    if card.gpu and "offload_optimizer" not in cfg.deepspeed.get("zero_optimization", {}):
        yield "deepspeed.zero_optimization.offload_optimizer", {"device": "cpu"}


def _changed(cfg: Config, changes: dict[str, Any]) -> Config | None:
    """The configuration with dotted keys set; None where it would be refused for something else."""
    data = cfg.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        at = data
        for name in sections:
            at = at.setdefault(name, {})
        at[last] = value
    try:
        return Config.model_validate(data)
    except ValueError:
        return None


def _again(given: Card, cfg: Config) -> Card:
    return given if given.gpu else card(cfg)


def _text(value: Any) -> str:
    return "{device: cpu}" if isinstance(value, dict) else str(value).lower() if isinstance(value, bool) else f"{value:g}"


# --- the table ----------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> Any:
    """The plan as rich prints it: a row a holder, a column a phase."""
    from rich.table import Table

    unit, name = (GIB, "GiB") if max(map(plan.total, PHASES)) > 4 * GIB else (MIB, "MiB")
    digits = ".2f" if unit == GIB else ",.0f"
    made = Table(title=f"memory, {name} a rank, of {plan.card.name}", title_justify="left", box=None, pad_edge=False)
    made.add_column("at the heaviest moment of")
    for phase in PHASES:
        made.add_column(phase, justify="right")
    rows = dict.fromkeys(row for phase in PHASES for row in plan.phases[phase])
    for row in sorted(rows, key=_order):
        sizes = (plan.phases[p].get(row) for p in PHASES)
        made.add_row(row, *("·" if size is None else f"{size / unit:{digits}}" for size in sizes))
    made.add_section()
    made.add_row("together", *(f"{plan.total(p) / unit:{digits}}" for p in PHASES), style="bold")
    made.add_row("left", *(f"{(plan.card.total - plan.total(p)) / unit:{digits}}" for p in PHASES))
    made.add_row("which is", *(plan.moments[p] for p in PHASES), style="dim")
    return made


_ROWS = (
    "CUDA", "Python", "weights", "gradients", "float32", "teacher", "reference", "gradient buckets", "whole", "activations",
    "a layer", "fused", "head's", "optimizer", "vLLM: w", "vLLM: K", "vLLM: p",
)  # fmt: skip


def _order(row: str) -> int:
    return max((len(name), i) for i, name in enumerate(_ROWS) if row.startswith(name))[1]


def notes(plan: Plan, cfg: Config) -> list[str]:
    """Lines for what the table cannot say: sizes, KV cache in sequences, logits that are never made, memory beside the card."""
    kv, r = plan.cache, cfg.rollout
    out = [f"{plan.sizes.total / 1e9:.2f} B parameters" + (" (head tied)" if plan.sizes.tied else "")]
    if cfg.lora.rank:
        out.append(f"{plan.sizes.trained / 1e6:.1f} M of them in adapters of lora.rank={cfg.lora.rank}, which alone are trained")
    if kv.tokens < float("inf"):
        out.append(
            f"KV cache: {kv.tokens:,.0f} tokens, {kv.sequences:.0f} sequences of rollout.max_model_len={r.max_model_len} or "
            f"{kv.own:.0f} of the longest that the run makes; {kv.wanted} are sampled at a time"
        )
        if kv.own < kv.wanted:
            out.append(
                "  where lengths are that long the rest waits, or is begun again: more for rollout.vllm." + _cache_key(cfg)
            )
    out.append(f"logits that the fused head never holds: {plan.logits / GIB:.1f} GiB for a micro-batch, of each model")
    if plan.host:
        out.append(f"in the machine's memory: {plan.host / GIB:.1f} GiB a rank (offloaded)")
    return out


def _cache_key(cfg: Config) -> str:
    return "gpu_memory_utilization" if cfg.rollout.vllm.kv_cache_mib is None else "kv_cache_mib"
