"""The rollouts that a run keeps: runs/NAME/rollouts/step-NNNNN.jsonl, one JSON object a rollout, in whole groups."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.rollout import Rollout
from gear_trainer.rollout.chat import Chat

Columns = dict[str, list[torch.Tensor | None]]  # by name, for each rollout the values of its policy tokens, or None
COLUMNS = {  # a record's key: the column of the step's experience
    "logprobs": "logprobs", "teacher_logprobs": "teacher_logprobs", "entropy": "entropy", "signal": "normalised",
    "segment": "segments", "weight": "weights",
}  # fmt: skip


class Records:
    """Makes the lines of this rank's share, so that rank 0 has nothing to do but to write them.

    A token takes some 90 bytes in ten columns: 1024 rollouts of 2048 tokens are 190 MB a step, hence a sample.
    """

    def __init__(self, cfg: Config, chat: Chat):
        self.share = _share(cfg)
        self.chat = chat
        # one call for every token that ever came, not for every place where one stands: 15 to 25 us each
        self.piece = functools.cache(lambda token: chat.tokenizer.decode([token]))

    def lines(self, rollouts: list[Rollout], advantages: list[float], columns: Columns) -> str:
        """The first of this rank's groups, which are as good a sample as any: problems come in no order."""
        kept = list(zip(rollouts, advantages, strict=True))[: self.share]
        return "".join(json.dumps(self._record(r, a, columns, i)) + "\n" for i, (r, a) in enumerate(kept))

    def gathered(self, rollouts: list[Rollout], advantages: list[float], columns: Columns) -> str:
        """All ranks' lines on rank 0, nothing on the others. Collective."""
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.lines(rollouts, advantages, columns), parts)
        return "".join(parts or [])

    def text(self, r: Rollout, advantage: float) -> str:
        """A rollout to be read: what it earned, its prompt and its turns, without characters that a terminal would obey."""
        earned = f"reward {r.reward:g}, {'success' if r.success else 'no success'}, advantage {advantage:+.3f}, {r.status.value}"
        prompt, response = (self.chat.tokenizer.decode(ids) for ids in (r.prompt_ids, r.ids))
        text = f"problem {r.problem.id}: {earned}\nPROMPT\n{prompt}\nRESPONSE\n{response}\nANSWER {r.problem.answer}"
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)

    def _record(self, r: Rollout, advantage: float, columns: Columns, i: int) -> dict[str, Any]:
        """A rollout as one JSON object; the token lists run over `ids`, None (or -1) on tool replies."""
        return {
            "problem": r.problem.id,
            "group": r.group,
            "sample": r.sample,
            "reward": r.reward,
            "success": r.success,
            "advantage": round(advantage, 6),
            "calls": r.calls,
            "errors": r.errors,
            "truncated": r.truncated,
            "failures": r.failures,
            "dropped": r.dropped,
            "texts_escaped": r.escaped,
            "replies_cut": r.cut,
            "prompt": self.chat.tokenizer.decode(r.prompt_ids),
            "response": self.chat.tokenizer.decode(r.ids),
            "answer": r.problem.answer,
            "reference": r.reference,
            "prompt_ids": r.prompt_ids,
            "ids": r.ids,
            "tokens": [self.piece(t) for t in r.ids],
            "mask": [int(m) for m in r.mask],
            "sampler_logprobs": [round(x, 6) if m else None for x, m in zip(r.sampler_logprobs, r.mask, strict=True)],
            "versions": [v if v >= 0 else None for v in r.versions],
            **{key: _over_ids(columns[name][i], r.mask) for key, name in COLUMNS.items()},
        }


def _over_ids(values: torch.Tensor | None, mask: list[bool]) -> list[float | None] | None:
    """Six digits of each policy token's value, None on tool replies and for what is not finite, which JSON cannot say."""
    if values is None:
        return None
    given = iter(values.tolist())
    rounded = (round(x, 6) if math.isfinite(x) else None for x in given)
    return [next(rounded) if is_policy else None for is_policy in mask]


def _share(cfg: Config) -> int:
    """Rollouts that each rank keeps of a step: whole groups, as many on every rank."""
    r = cfg.rollout
    groups = -(-r.records // (r.group_size * cfg.world_size))
    return min(groups, cfg.prompts_per_rank) * r.group_size


def records_path(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:05d}.jsonl"


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps of which a run kept rollouts, in order."""
    return sorted(int(path.stem.split("-")[1]) for path in (run_dir / "rollouts").glob("step-*.jsonl"))


def read_records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts that a run kept of a step, ordered by rank. Raises FileNotFoundError where it kept none."""
    return [json.loads(line) for line in records_path(run_dir, step).read_text().splitlines()]
