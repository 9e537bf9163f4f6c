"""Written models of what no machine here can measure: 8 GPUs on one head, and a step of Qwen3-8B. Models, not measurements.

Each is a sum of floors: operations over the rate that cuBLAS reaches, bytes over the rate of the memory or the link. Kernels'
launches, waits, optimizer states and everything that is not a matrix product are left out, so real times are longer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..harness.cases import HEAD_SHAPE, PRODUCTS

RANKS = (1, 2, 4, 8)
_SUMS = 12  # float64 of a row that cross the ranks (gear_kernels/parallel.py), and one word for the shard's size


@dataclass(frozen=True)
class Gpu:
    """An H200. flops: cuBLAS' in bfloat16 (docs/architecture.md); the rest is NVIDIA's data sheet, bytes/s, the link one way."""

    flops: float = 790e12
    memory: float = 4.8e12
    link: float = 450e9


@dataclass(frozen=True)
class Model:
    """Qwen3-8B by its sizes."""

    layers: int = 36
    width: int = 4096
    heads_width: int = 4096
    cache_width: int = 1024
    inner: int = 12288
    vocabulary: int = 151936

    @property
    def weights(self) -> int:
        """Parameters in the layers' matrix products."""
        attention = 2 * self.width * self.heads_width + 2 * self.width * self.cache_width
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def cache(self) -> int:
        """Bytes of keys and values a token, bfloat16."""
        return self.layers * 2 * self.cache_width * 2

    @property
    def bytes(self) -> int:
        """The whole model in bfloat16, with the input embedding (untied)."""
        return 2 * (self.weights + 2 * self.vocabulary * self.width)

    def body(self, tokens: int) -> float:
        """Operations of one forward over a sequence: two a weight and token, and causal attention, half of its square."""
        return 2 * self.weights * tokens + self.layers * 2 * 2 * self.heads_width * tokens * tokens / 2

    def head(self, tokens: int) -> float:
        """Operations of the head's product for these tokens."""
        return 2.0 * tokens * self.vocabulary * self.width


@dataclass(frozen=True)
class Step:
    """A step of training. hint: what the teacher's prompt has more.  taught: share of trajectories whose advantage is not 0;
    one is the worst case for GEAR, since only these are shown to the teacher.  gpus: each has the whole model to sample from.
    """

    trajectories: int = 1024
    prompt: int = 256
    response: int = 1024
    hint: int = 128
    taught: float = 1.0
    gpus: int = 8


def head_ms(ranks: int, passes: str, shape: tuple[int, int, int] = HEAD_SHAPE, gpu: Gpu = Gpu()) -> dict[str, float]:  # noqa: B008
    """Milliseconds of linear_token_stats over a vocabulary cut among `ranks` GPUs: products and collectives, one after another.

    Forward: one all-gather, each rank receives the others' sums. Backward: one all-reduce of the hidden gradient [N, D] in
    float32, which as a ring sends and receives 2 (ranks - 1) / ranks of its bytes.
    """
    n, v, d = shape
    gather = (ranks - 1) * (n * _SUMS + 1) * 8
    reduce = 2 * (ranks - 1) / ranks * n * d * 4 if passes == "forward+backward" else 0.0
    products = PRODUCTS[passes] * 2 * n * v * d / ranks
    return {"products": products / gpu.flops * 1e3, "all_gather": gather / gpu.link * 1e3, "all_reduce": reduce / gpu.link * 1e3}


def step_seconds(method: str, step: Step = Step(), model: Model = Model(), gpu: Gpu = Gpu()) -> dict[str, float]:  # noqa: B008
    """Seconds of a step of "gear" or "grpo" by phase; the work is cut evenly among the GPUs.

    rollout: every response token reads all weights once a batch and its own cache, nothing else. score: the policy's forward,
    GRPO's over those alone that the update leaves out (`Recipe.scores_first`); GEAR adds the teacher's, over a longer prompt,
    and its half of the head. update: forward, its recomputation (gradient
    checkpointing) and a backward of twice the forward; the head's product twice, then its two gradients. credit: the scan's
    33 bytes a token (two sweeps of signal and entropy, five outputs). push: each GPU gathers the others' shards and writes all.
    """
    share = step.trajectories / step.gpus
    whole, policy = step.prompt + step.response, step.response
    forward = model.body(whole) + model.head(policy)
    scored = 1.0 if method == "gear" else 1 - step.taught
    teacher = step.taught * (model.body(whole + step.hint) + model.head(policy)) if method == "gear" else 0.0
    update = step.taught * (4 * model.body(whole) + 4 * model.head(policy))
    cached = share * model.cache * (step.prompt + policy / 2)
    gathered = (step.gpus - 1) / step.gpus * model.bytes
    return {
        "rollout": policy * (model.bytes + cached) / gpu.memory,
        "score": share * scored * forward / gpu.flops,
        "teacher": share * teacher / gpu.flops,
        "credit": share * policy * 33 / gpu.memory,
        "update": share * update / gpu.flops,
        "push": gathered / gpu.link + model.bytes / gpu.memory,
    }


def everything() -> dict:
    """The models' entries in scaling.json: assumptions and results."""
    heads = {p: {str(r): head_ms(r, p) for r in RANKS} for p in PRODUCTS}
    steps = {method: step_seconds(method) for method in ("grpo", "gear")}
    return {"gpu": asdict(Gpu()), "model": asdict(Model()), "step": asdict(Step()), "head_shape": HEAD_SHAPE} | {
        "head_ms": heads,
        "step_seconds": steps,
    }
