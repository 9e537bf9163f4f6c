"""A rollout engine on transformers' `generate`: what a step costs without vLLM.

`rollout.engine=benchmarks.reports.transformers_engine:TransformersEngine` names it, in a run that starts where `benchmarks` can
be imported. It holds a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessor

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.rollout import Completion, Engine, Request
from gear_trainer.rollout.engine import take_device


class SeededDraws(LogitsProcessor):
    """A draw for each row by its request's own seed, in any company: the drawn token alone keeps a finite score.

    The largest of p / e is a draw from p where e are independent exponential variables. `logprobs`: those of the drawn tokens,
    in nats and of the tempered distribution, a tensor [rows] for each decoding step.
    """

    def __init__(self, requests: list[Request], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(q.seed) for q in requests]
        self.temperature = torch.tensor([[q.temperature] for q in requests], device=device)
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        log_p = (scores.float() / self.temperature).log_softmax(-1)
        noise = torch.empty_like(log_p)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        drawn = (log_p - noise.log()).argmax(-1, keepdim=True)
        self.logprobs.append(log_p.gather(-1, drawn).squeeze(-1))
        return torch.full_like(log_p, -torch.inf).scatter_(-1, drawn, 0.0)


class TransformersEngine(Engine):
    """The engine: `generate` on this rank's device, all requests of a call in one batch, padded on the left."""

    def __init__(self, cfg: Config, model_path: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = take_device()
        lm: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=cfg.model.dtype)
        self.lm = lm.to(self.device).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    @torch.no_grad()
    def generate(self, requests: list[Request]) -> list[Completion]:
        from transformers import GenerationConfig

        ids, mask = self._padded([q.prompt_ids for q in requests])
        draws = SeededDraws(requests, self.device)
        how = GenerationConfig(
            max_new_tokens=max(q.max_tokens for q in requests),
            do_sample=False,  # of one finite score: the draw was made before
            eos_token_id=self.eos,
            pad_token_id=self.pad,
        )
        out = self.lm.generate(ids, attention_mask=mask, generation_config=how, logits_processor=[draws])
        rows, logprobs = out[:, ids.shape[1] :].tolist(), torch.stack(draws.logprobs, 1).tolist()
        return [self._completion(q, row, lp) for q, row, lp in zip(requests, rows, logprobs, strict=True)]

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.lm.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            own[name].data.copy_(tensor)
        self.version += 1

    @classmethod
    def check(cls, cfg: Config, sizes: dict[str, Any] | None) -> None:
        """Nothing but whole distributions is drawn from. Raises ConfigError."""
        if cfg.eval.every and cfg.eval.top_p != 1:
            raise ConfigError(f"eval.top_p={cfg.eval.top_p}: {cls.__name__} draws from whole distributions: set 1")

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts and what of them is no padding, both [rows, longest]."""
        longest = max(map(len, prompts))
        ids = [[self.pad] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _completion(self, request: Request, row: list[int], logprobs: list[float]) -> Completion:
        """The row up to its end of turn, or to what the request may have."""
        length = row.index(self.eos) + 1 if self.eos in row else len(row)
        kept = min(length, request.max_tokens)
        return Completion(row[:kept], logprobs[:kept], row[kept - 1] == self.eos, self.version)
