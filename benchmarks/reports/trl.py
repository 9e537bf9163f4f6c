"""A step of TRL's GRPOTrainer with its own head and with this package's: `python -m benchmarks.reports.trl [--quick]`.

The step is the trainer's own: the loss of a batch (log-probs and entropy from hidden states) and its backward, no optimizer.
Both heads take turns in one process; what is compared is their ratio. Writes trl.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..harness.environment import RESULTS, environment
from ..harness.measure import OtherLoad, elapsed_ms, extra_memory, interleave

FILE = "trl.json"


@dataclass(frozen=True)
class Shape:
    """A batch of TRL's: rows, prompt and completion tokens, and the model's vocabulary and width."""

    rows: int = 2
    prompt: int = 16
    completion: int = 48
    vocabulary: int = 151936
    width: int = 256


QUICK = Shape(2, 4, 8, 1187, 64)


def make_trainer(shape: Shape, dtype: torch.dtype, folder: str) -> Any:
    """TRL's own trainer on a two-layer Qwen3 of this shape."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
    )
    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    options = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    args = GRPOConfig(folder, per_device_train_batch_size=shape.rows, num_generations=2, **options)
    data = Dataset.from_list([{"prompt": "a"}] * 8)
    model = Qwen3ForCausalLM(config).to(dtype)
    trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args, data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_batch(shape: Shape) -> dict[str, torch.Tensor]:
    """A scored batch as `_generate_and_score_completions` gives it."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, shape.vocabulary, (shape.rows, shape.prompt + shape.completion), generator=draw)
    ones = torch.ones_like(ids)
    return {
        "prompt_ids": ids[:, : shape.prompt],
        "prompt_mask": ones[:, : shape.prompt],
        "completion_ids": ids[:, shape.prompt :],
        "completion_mask": ones[:, shape.prompt :],
        "advantages": torch.randn(shape.rows, generator=draw),
        "num_items_in_batch": torch.tensor(shape.rows * shape.completion),
    }


def steps(trainer: Any, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], float]]:
    """A step with either head, by name; each returns its loss."""
    from gear_kernels.integrations.trl import use_gear_head

    def step() -> float:
        trainer.model.zero_grad(set_to_none=True)
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item()

    def with_gear() -> float:
        with use_gear_head():
            return step()

    return {"TRL": step, "gear_kernels": with_gear}


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times (ms) and peak memory above what was held (MiB) of both steps in turn, and TRL's over ours."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(shape, dtype, folder)
        calls = steps(trainer, make_batch(shape))
        losses = {name: call() for name, call in calls.items()}
        first = {name: elapsed_ms(call) for name, call in calls.items()}
        timings = interleave(calls, first, rounds, seconds=90.0)
        memory = {}
        for name, call in calls.items():
            trainer.model.zero_grad(set_to_none=True)  # each call makes its gradients anew: they count
            memory[name] = extra_memory(call)
    found = {name: {**asdict(timings[name]), "extra_mib": memory[name], "loss": losses[name]} for name in calls}
    theirs, ours = found["TRL"], found["gear_kernels"]
    ratios = {"time": theirs["median_ms"] / ours["median_ms"], "least_time": theirs["least_ms"] / ours["least_ms"]}
    if theirs["extra_mib"] and ours["extra_mib"]:
        ratios["extra_memory"] = theirs["extra_mib"] / ours["extra_mib"]
    return {"dtype": str(dtype).removeprefix("torch."), "steps": found, "trl_over_ours": ratios}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    shape, load = QUICK if asked.quick else Shape(), OtherLoad()
    tables = [measure(shape, dtype, 3) for dtype in (torch.float32, torch.bfloat16)]
    report = {**environment(), "shape": asdict(shape), "other_load": load.share(), "tables": tables}
    for table in tables:
        Console().print(table["dtype"], table["steps"], table["trl_over_ours"])
    if not asked.quick:
        (asked.output / FILE).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
