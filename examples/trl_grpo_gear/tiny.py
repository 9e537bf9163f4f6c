"""A stand-in for a real model and data set, so that the example runs on two CPU cores in a minute: sums up to 8.

The model is a two-layer Qwen3 over a vocabulary of characters. Its warm start, by TRL's SFTTrainer, teaches it the form of an
answer, to guess sums (right in three of ten rows of the data), and to trust a hint where the prompt has one.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
HINT = " (it is {answer})"


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with a chat template that writes messages one after the other."""
    names = ["<pad>", "<eos>", *"0123456789+= (?)abcdefghijklmnopqrstuvwxyz"]
    tok = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("<pad>|<eos>|."), behavior="isolated")
    tok.decoder = decoders.Fuse()
    tok.add_special_tokens(["<pad>", "<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    fast.chat_template = TEMPLATE
    return fast


def model(tok: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with a head of its own, randomly made from a seed."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tok),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def rows(count: int, seed: int) -> Dataset:
    """Prompts with their `answer`: 3+4= and 7."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(5), draw.randrange(5)) for _ in range(count)]
    return Dataset.from_list([{"prompt": [_said("user", f"{a}+{b}=")], "answer": str(a + b)} for a, b in pairs])


def warm_start(tok: PreTrainedTokenizerFast, seed: int, steps: int, output: str) -> Qwen3ForCausalLM:
    """The stand-in after its warm start: right in some three of ten sums, and nearly always where the prompt has a hint."""
    draw, made = random.Random(seed), []
    for row in rows(64 * steps, seed + 1):
        hinted = draw.random() < 0.5
        answer = row["answer"] if hinted or draw.random() < 0.3 else str(draw.randrange(9))
        told = HINT.format(answer=answer) if hinted else ""
        asked = _said("user", told + row["prompt"][0]["content"])
        made.append({"prompt": [asked], "completion": [_said("assistant", answer)]})
    args = SFTConfig(
        output,
        per_device_train_batch_size=64,
        max_steps=steps,
        learning_rate=5e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        seed=seed,
        logging_steps=50,
    )
    trainer = SFTTrainer(model(tok, seed), args=args, train_dataset=Dataset.from_list(made), processing_class=tok)
    trainer.train()
    return trainer.model


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def teacher_prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The hint that the warm start taught, before the question."""
    return [_said("user", HINT.format(answer=row["answer"]) + row["prompt"][0]["content"])]
