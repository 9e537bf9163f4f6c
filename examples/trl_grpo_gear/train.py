"""GRPO with TRL, GEAR's credit and this package's head: five lines more than TRL's own example.

    python examples/trl_grpo_gear/train.py                                   # a tiny model on sums, two CPU cores, minutes
    accelerate launch examples/trl_grpo_gear/train.py --model Qwen/Qwen3-0.6B --data gsm8k_train.jsonl --bf16

`--data`: JSON lines with `question` and `answer`, GSM8K's form too (what follows #### counts).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import GRPOConfig

from gear_kernels.integrations.trl import GearGRPOTrainer, use_gear_head

HINT = "\n\n(The answer is {answer}. Solve it step by step as if you did not know.)"


def gsm8k(path: str) -> Dataset:
    """Prompts with their `answer`, of a file of questions."""

    def row(raw: dict[str, str]) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": raw["question"]}], "answer": raw["answer"].split("####")[-1].strip()}

    data = load_dataset("json", data_files=path, split="train")
    return data.map(row, remove_columns=data.column_names)


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number that was written is the answer."""
    said = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion[0]["content"]) for completion in completions]
    return [float(bool(found) and found[-1].replace(",", "") == a) for found, a in zip(said, answer, strict=True)]


def teacher_prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    """The student's prompt with the ground truth in it: the row has every column of the data set."""
    *before, last = row["prompt"]
    return [*before, {**last, "content": last["content"] + HINT.format(answer=row["answer"])}]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal LM of the Hub or a folder; left out, the tiny one")
    parser.add_argument("--data", help="JSON lines, with --model")
    parser.add_argument("--credit", default="gear", help="a credit method; grpo: TRL's own advantages")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", default="runs/trl_grpo_gear")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together: pass both, or neither for the tiny run")
    return args


def main() -> None:
    """Train, and write the log beside the model as log.json."""
    asked = parsed()
    use_gear_head()  # for TRL's SFT, DPO, KTO and RLOO too
    common = dict(max_steps=asked.steps, seed=asked.seed, report_to="none", save_strategy="no", logging_steps=1)
    if asked.model:
        model, tokenizer, data, prompt = asked.model, None, gsm8k(asked.data), teacher_prompt
        config = GRPOConfig(asked.output, per_device_train_batch_size=8, num_generations=8, bf16=asked.bf16, **common)
    else:
        import tiny

        tokenizer, prompt = tiny.tokenizer(), tiny.teacher_prompt
        model, data = tiny.warm_start(tokenizer, asked.seed, 150, asked.output), tiny.rows(4000, asked.seed + 2)
        own = dict(per_device_train_batch_size=512, num_generations=8, max_completion_length=4, lr_scheduler_type="constant")
        own |= dict(learning_rate=1e-3, use_cpu=True, bf16=False, gradient_checkpointing=False)
        config = GRPOConfig(asked.output, **own, **common)
    trainer = GearGRPOTrainer(
        model=model,
        reward_funcs=correct,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        credit=asked.credit,
        teacher_prompt=prompt,
    )
    trainer.train()
    Path(asked.output).mkdir(parents=True, exist_ok=True)
    (Path(asked.output) / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
