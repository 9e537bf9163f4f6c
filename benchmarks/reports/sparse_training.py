"""Training with the sparse backward and the exact one: `python -m benchmarks.reports.sparse_training [--seeds 0,1,2] [--read]`.

Trains the demo and SmolLM2-135M on two ranks with `train.head_backward=exact` and `=sparse`, each with the same seeds (two
minutes a run on two cores), and keeps held-out success by step, the seconds of an update, and the columns and the bound that runs
logged. Then times, in one process on one kept step, what an update is made of: the backbone's forward and backward, and
the head's with either backward. Writes sparse_training.json. --read takes the runs that lie in --runs already.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from gear_trainer.policy.batching import MicroBatch
from gear_trainer.policy.model import hidden_states
from gear_trainer.runs.files import read_metrics

from ..harness.environment import RESULTS, environment
from ..harness.measure import OtherLoad, elapsed_ms, interleave, keep_freed_blocks, one_thread
from ..harness.tables import keep_for_page
from .demo import asked, kept_step, summary, train

FILE = "sparse_training.json"
BACKWARDS = ("exact", "sparse")
TIMED_STEP = 4


@dataclass(frozen=True)
class Model:
    """A model to train: a name for tables, its configuration, and options of this report's."""

    name: str
    config: str
    options: tuple[str, ...] = ()


MODELS = (
    Model("the demo", "gear_trainer/configs/mathapi_cpu.yaml", ("model.path=builtin:tiny-qwen3@0",)),  # one start for all seeds
    Model("SmolLM2-135M", "gear_trainer/configs/smollm2_cpu.yaml", ("eval.every=2",)),
)


def folder_of(model: Model, backward: str, seed: int) -> str:
    """The name of a run."""
    return f"{Path(model.config).stem}-{backward}-{seed}"


def logged(path: Path) -> dict:
    """The median share of columns in a run's head products and the largest bound, as it logged them; 1 and 0 of an exact head."""
    steps = [line for line in read_metrics(path) if line.get("head_kept") is not None]
    if not steps:
        return {"kept": 1.0, "bound": 0.0}
    return {"kept": statistics.median(s["head_kept"] for s in steps), "bound": max(s["head_bound"] for s in steps)}


def collect(folder: Path, seeds: Iterable[int]) -> list[dict]:
    """The summaries of a folder's runs."""
    found = []
    for model, backward, seed in ((m, b, s) for m in MODELS for s in seeds for b in BACKWARDS):
        path = folder / folder_of(model, backward, seed) / "metrics.jsonl"
        found.append({"model": model.name, "backward": backward, "seed": seed, **summary(path), **logged(path)})
    return found


def parts(run: Path, rounds: int = 9) -> dict:
    """The parts of an update on one kept step, in milliseconds on one thread: "backbone", and the head by its backward."""
    lm, rollouts, advantages, batches = kept_step(run, TIMED_STEP)
    head, grads = lm.get_output_embeddings(), torch.tensor(advantages)
    with torch.no_grad():
        hidden = [hidden_states(lm, b.student) for b in batches]

    def lengths(b: MicroBatch) -> list[int]:
        return [len(rollouts[i].policy_positions) for i in b.rows]

    def backbone() -> None:
        for b in batches:
            hidden_states(lm, b.student).sum().backward()

    def through(backward: str) -> Callable[[], None]:
        def call() -> None:
            for b, states in zip(batches, hidden, strict=True):
                out = head(states.requires_grad_(), b.targets, stats=("logprobs",), backward=backward).logprobs
                (out * torch.repeat_interleave(grads[b.rows], torch.tensor(lengths(b)))).sum().backward()

        return call

    calls: dict[str, Callable] = {"backbone": backbone} | {name: through(name) for name in BACKWARDS}
    keep_freed_blocks()
    with one_thread():
        first, load = {name: elapsed_ms(call) for name, call in calls.items()}, OtherLoad()
        timings = interleave(calls, first, rounds)
    tokens, shape = sum(len(states) for states in hidden), list(head.weight.shape)
    return {"tokens": tokens, "shape": shape, "other_load": load.share(), **{name: asdict(t) for name, t in timings.items()}}


def run(seeds: list[int], folder: Path, output: Path, console: Console, read: bool = False) -> dict:
    """Train unless `read`; write and return what the file holds."""
    wanted = [(m, b, s) for m in MODELS for s in seeds for b in BACKWARDS]
    for model, backward, seed in [] if read else track(wanted, "training", console=console):
        options = [*model.options, f"train.head_backward={backward}", f"seed={seed}"]
        train(model.config, folder, folder_of(model, backward, seed), options)
    updates = {m.name: parts(folder / folder_of(m, "exact", seeds[0])) for m in MODELS}
    found = {**environment(), "runs": collect(folder, seeds), "updates": updates}
    keep_for_page(found, output / FILE, console)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    seeds, folder, read = asked("sparse_training", __doc__, arguments)
    run(seeds, folder, RESULTS, Console(), read)


if __name__ == "__main__":
    main()
