"""A step's policy tokens, packed once on the training device: what scoring, credit and the update write and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gear_trainer.config import Config
from gear_trainer.policy.batching import on_device
from gear_trainer.recipe import Recipe
from gear_trainer.rollout import Rollout
from gear_trainer.runs.metrics import Sums
from gear_trainer.train.advantages import group_advantages, penalties

SCORED_BY_TEACHER = ("teacher_logprobs", "signal", "teacher_entropy", "forward_kl")


@dataclass
class Experience:
    """One rank's rollouts of a step and the T policy tokens of its B rollouts, in their order, as columns [T] by name.

    Known before scoring: sampler_logprobs (float32, nats), turn_ids (int64); with turn rewards also turn_rewards (float32) and
    anchors (int64). From scoring, float32, nats: logprobs, entropy (both from the update where the recipe reads them no sooner);
    reference_logprobs with a KL term; teacher_logprobs, signal, teacher_entropy and forward_kl where the recipe reads them, 0
    where no teacher looked; wrong_hint, what was taken from the signal. From credit: token_advantages, weights, normalised (the
    method's signal), float32; segments (int32, -1 outside); moves (bool: of a rollout with a token advantage other than 0, or
    anything else to learn). For the update: loss_weights (float32), by which a sum over tokens is the mean over the optimizer
    step.

    What a host needs to lay out passes is in lists [B]: nothing between scoring and the update looks at a column's values.
    """

    rollouts: list[Rollout]
    advantages: list[float]  # relative to the group; exactly 0 where it has nothing to tell
    teaches: list[bool]  # False where the teacher was to see a reference and has none: the advantage stays as it is
    taught: list[bool]  # scored beside the teacher
    credited: list[int]  # rollouts whose tokens a credit method weighs
    lengths: list[int]  # policy tokens
    device: torch.device
    left_out: list[bool]  # nobody learns from it: dropped, or truncated where such are masked
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    penalty: list[float] | None = None  # of overlong rollouts, in their advantages; None: the run has none

    def __post_init__(self) -> None:
        self.bounds = [0]
        for length in self.lengths:
            self.bounds.append(self.bounds[-1] + length)
        self.cu_seqlens = on_device(torch.tensor(self.bounds, dtype=torch.int32), self.device)  # [B + 1]
        counts = torch.tensor(self.lengths, dtype=torch.int64)
        self.sequence = on_device(torch.arange(len(counts)).repeat_interleave(counts), self.device)  # [T], each token's rollout

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.columns[name]

    def tokens(self, rows: Sequence[int]) -> torch.Tensor:
        """int64 on the device: the places of these rollouts' policy tokens, one rollout after the other."""
        places = [torch.arange(self.bounds[i], self.bounds[i + 1]) for i in rows]
        return on_device(torch.cat(places) if places else torch.empty(0, dtype=torch.int64), self.device)

    def write(self, name: str, places: torch.Tensor, values: torch.Tensor) -> None:
        """Put values at their places; the rest of a new column is 0."""
        if name not in self.columns:
            self.columns[name] = torch.zeros(self.bounds[-1], dtype=values.dtype, device=self.device)
        self.columns[name].index_copy_(0, places, values)

    def over_tokens(self, values: Sequence[float]) -> torch.Tensor:
        """float32 [T]: each rollout's value at all of its tokens."""
        return on_device(torch.tensor(values, dtype=torch.float32), self.device).index_select(0, self.sequence)

    def rows(self, names: Sequence[str], count: int) -> dict[str, list[torch.Tensor | None]]:
        """For records: the first `count` rollouts' values by name, on the CPU; None where no teacher looked."""
        out: dict[str, list[torch.Tensor | None]] = {}
        for name in names:
            if name not in self.columns:
                out[name] = [None] * count
                continue
            parts = self[name][: self.bounds[count]].cpu().split(self.lengths[:count])
            bare = name in SCORED_BY_TEACHER
            out[name] = [None if bare and not t else part for part, t in zip(parts, self.taught[:count], strict=True)]
        return out


def pack(cfg: Config, recipe: Recipe, rollouts: list[Rollout], device: torch.device) -> Experience:
    """The experience of a step's rollouts, before anything is scored. Collective where advantages are scaled by the batch."""
    penalty = penalties(cfg.train, rollouts, cfg.rollout.max_new_tokens)
    experience = pack_with(recipe, rollouts, group_advantages(rollouts, cfg.train.advantages, penalty, device), device)
    experience.penalty = penalty
    return experience


def pack_with(recipe: Recipe, rollouts: list[Rollout], advantages: list[float], device: torch.device) -> Experience:
    """As `pack`, with the rollouts' advantages given."""
    left_out = [r.dropped or (recipe.masks_truncated and r.truncated) for r in rollouts]
    advantages = [0.0 if out else a for out, a in zip(left_out, advantages, strict=True)]
    teaches = [not (recipe.references and r.reference is None) for r in rollouts]
    weighed = [t and a != 0 for t, a in zip(teaches, advantages, strict=True)]
    places = [r.policy_positions for r in rollouts]
    experience = Experience(
        rollouts,
        advantages,
        teaches,
        taught=[recipe.teaches_all or (recipe.needs_teacher and w) for w in weighed],
        credited=[i for i, w in enumerate(weighed) if w or (recipe.by_turn and not left_out[i])],
        lengths=[len(p) for p in places],
        device=device,
        left_out=left_out,
    )
    chosen = list(zip(rollouts, places, strict=True))
    columns = {
        "sampler_logprobs": torch.tensor([r.sampler_logprobs[p] for r, own in chosen for p in own], dtype=torch.float32),
        "turn_ids": torch.tensor([r.turn_ids[p] for r, own in chosen for p in own], dtype=torch.int64),
    }
    if recipe.by_turn:
        columns |= _by_turn(chosen, recipe.declared.outcome_in_last_turn)
    experience.columns = {name: on_device(column, device) for name, column in columns.items()}
    return experience


def _by_turn(chosen: list[tuple[Rollout, list[int]]], outcome_in_last_turn: bool) -> dict[str, torch.Tensor]:
    """Of each policy token its turn's reward and anchor."""
    rewards: list[float] = []
    anchors: list[int] = []
    for r, places in chosen:
        own = list(r.turn_rewards)
        if own and outcome_in_last_turn:
            own[-1] += r.reward
        rewards += [own[r.turn_ids[p]] for p in places]
        anchors += [r.anchors[r.turn_ids[p]] for p in places]
    return {"turn_rewards": torch.tensor(rewards, dtype=torch.float32), "anchors": torch.tensor(anchors, dtype=torch.int64)}


def count(e: Experience, sums: Sums) -> None:
    """Add a scored step's numbers, of rollouts and of tokens."""
    n, known = len(e.rollouts), sum(not r.failed for r in e.rollouts)
    sums.mean("reward_mean", sum(r.reward for r in e.rollouts), known)
    sums.mean("success", sum(r.success for r in e.rollouts), known)
    for name, part in (("tool_calls", "calls"), ("tool_errors", "errors"), ("truncated", "truncated")):
        sums.mean(name, sum(getattr(r, part) for r in e.rollouts), n)
    if e.penalty is not None:
        sums.mean("overlong_penalty", sum(e.penalty), n)
    sums.mean("zero_advantage", sum(a == 0 for a in e.advantages), n)
    sums.total("policy_tokens", sum(e.lengths))
    sums.mean("response_length", sum(e.lengths), n)
    sums.mean_of("entropy", e["entropy"])
    sums.total("nonfinite_tokens", (~e["logprobs"].isfinite()).sum())
    gap = e["logprobs"] - e["sampler_logprobs"]
    sums.mean_of("logprob_gap_mean", gap.abs())
    sums.peak("logprob_gap_max", gap.abs().max() if len(gap) else 0.0)  # none: every prompt fills the context
    sums.mean_of("mismatch_kl", gap.exp() - 1 - gap)  # k3 estimate of KL(sampler || trainer)
    ratio = gap.exp().double()
    sums.mean("effective_sample_size", ratio.sum() ** 2 / (ratio**2).sum() if len(ratio) else 0.0, len(ratio))
    for name, wanted in (("teacher_gain_success", True), ("teacher_gain_failure", False)):
        rows = [i for i, r in enumerate(e.rollouts) if e.taught[i] and r.success is wanted]
        places = e.tokens(rows)
        taught = e["teacher_logprobs"].index_select(0, places) if rows else e["logprobs"].new_zeros(0)
        sums.mean_of(name, taught - e["logprobs"].index_select(0, places))
