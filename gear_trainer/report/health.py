"""A run's warnings, read off its numbers, each with its reason and how to mend it.

A rule looks at the mean of a number over the run's last quarter (`late`), where it says so against the first quarter (`early`).
Its limits are rules of thumb, ours: a warning says where to look.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

SILENT_TAIL = 0.5  # share of a rollout's policy tokens behind which the teacher says nothing
_NOISE = 1e-3  # nats: gear_kernels.reference.credit.SILENT says of what


class Warning(NamedTuple):
    """A warning: what was found (with its figures), why that matters, what to do, and the number to look at."""

    found: str
    reason: str
    mend: str
    metric: str


class Numbers:
    """A run's numbers by name: means over the first and the last quarter of its steps; None where there is none."""

    def __init__(self, metrics: list[dict[str, Any]]):
        self.steps = [m for m in metrics if m.get("step")]  # not what was evaluated before training

    def _of(self, name: str) -> list[float]:
        values = [m.get(name) for m in self.steps]
        return [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]

    def late(self, name: str) -> float | None:
        """The mean of the last quarter, of one step at least."""
        values = self._of(name)
        return float(np.mean(values[-max(1, len(values) // 4) :])) if values else None

    def early(self, name: str) -> float | None:
        """The mean of the first quarter; None where there are fewer than four steps to compare."""
        values = self._of(name)
        return float(np.mean(values[: len(values) // 4])) if len(values) >= 4 else None


def warnings(metrics: list[dict[str, Any]], silent: float | None = None) -> list[Warning]:
    """All that a run warns of. silent: `silent_tails` of its last recorded step."""
    numbers = Numbers(metrics)
    found = [made for rule in _RULES if (made := rule(numbers))]
    if silent is not None and silent > 0.25:
        found.append(
            Warning(
                f"in {silent:.0%} of the last step's rollouts the teacher is silent over their second half",
                "Its log-probs are the policy's own there: a hint that the context pushed out, or a teacher that is cut off.",
                "Look at such a rollout's signal; check rollout.max_model_len against the teacher's prompt.",
                "mean_signal",
            )
        )
    return found


def silent_tails(rollouts: pa.Table) -> float | None:
    """The share of rollouts, of those that a teacher scored and whose first half has a signal, that have none in their second.

    rollouts: with `raw_signal` and `mask`, see runs/records.py. None where there is no such rollout of 8 policy tokens at least.
    """
    found = []
    for signal, mask in zip(rollouts.column("raw_signal"), rollouts.column("mask"), strict=True):
        policy = mask.values.to_numpy(zero_copy_only=False).astype(bool)
        if not signal.is_valid or policy.sum() < 8:
            continue
        own = np.abs(signal.values.to_numpy(zero_copy_only=False)[policy])
        cut = int(len(own) * SILENT_TAIL)
        if own[:cut].max() >= _NOISE:
            found.append(own[cut:].max() < _NOISE)
    return float(np.mean(found)) if found else None


# --- rules: a warning, or None ------------------------------------------------------------------------------------------------


def _above(name: str, limit: float, said: str, reason: str, mend: str) -> Callable[[Numbers], Warning | None]:
    """Warn where the late mean is above a limit; `{}` in `said` is the figure."""

    def rule(n: Numbers) -> Warning | None:
        value = n.late(name)
        return Warning(said.format(value), reason, mend, name) if value is not None and value > limit else None

    return rule


def _fell(name: str, share: float, least: float, said: str, reason: str, mend: str) -> Callable[[Numbers], Warning | None]:
    """Warn where the late mean is below a share of the early one, which was `least` at least."""

    def rule(n: Numbers) -> Warning | None:
        early, late = n.early(name), n.late(name)
        if early is None or late is None or early < least or late >= share * early:
            return None
        return Warning(said.format(early, late), reason, mend, name)

    return rule


def _no_segments(n: Numbers) -> Warning | None:
    value, above = n.late("segments_per_trajectory"), n.late("share_above_threshold")
    if value is None or value > 0.05 or above is None or n.late("mean_signal") is None:
        return None
    if not n.late("mean_signal"):  # a method without a signal, as grpo
        return None
    return Warning(
        f"next to no segments: {value:.3g} a trajectory",
        "No token stands above the threshold, so all of a trajectory is weighed alike.",
        "Lower credit_args.kl_threshold, or leave signal_floor out; the slider in the credit view shows what it gives.",
        "segments_per_trajectory",
    )


def _teacher_no_better(n: Numbers) -> Warning | None:
    gain = n.late("teacher_gain_success")
    if gain is None or gain > 0:
        return None
    return Warning(
        f"the teacher finds successful rollouts no likelier than the policy does ({gain:+.3g} nats a token)",
        "A teacher that knows the solution raises what leads to it; the signal of one that does not is style.",
        "Read a teacher's prompt (references, task's ground truth); try teacher.wrong_hint=true to take style off.",
        "teacher_gain_success",
    )


def _gap_rises(n: Numbers) -> Warning | None:
    early, late = n.early("logprob_gap_mean"), n.late("logprob_gap_mean")
    if early is None or late is None or late < 1e-3 or late < 2 * early:
        return None
    return Warning(
        f"the sampler's log-probs part from the trainer's: {early:.2g} to {late:.2g} nats a token",
        "Tokens are sampled from another policy than the one that is updated.",
        "Check dtype and that weights arrive (logprob_gap_max by step); train.importance_mode corrects what is left.",
        "logprob_gap_mean",
    )


_RULES: tuple[Callable[[Numbers], Warning | None], ...] = (
    _above(
        "share_above_threshold", 0.9, "{:.0%} of all tokens stand above the threshold",
        "Where nearly everything is marked nothing is: segments cover whole trajectories.",
        "Raise credit_args.kl_threshold, or choose normalizer=quantile.",
    ),
    _no_segments,
    _above(
        "share_unclosed", 0.5, "{:.0%} of the segments are cut by the rollout's end",
        "No later token is more uncertain than entropy_ratio times the segment's first.",
        "Lower credit_args.entropy_ratio, or set max_segment_len or stop_at_turn.",
    ),
    _teacher_no_better,
    _above(
        "silent_trajectories", 0.25, "the teacher is silent in {:.0%} of the trajectories",
        "Rounding noise is normalised there as if it were a signal.",
        "Set credit_args.signal_floor=1e-3; look at what the teacher's prompt holds.",
    ),
    _gap_rises,
    _fell(
        "entropy", 0.2, 0.02, "entropy collapsed: {:.3g} to {:.3g} nats a token",
        "A policy that is sure of everything explores nothing, and its groups agree.",
        "Lower train.lr, raise train.clip_high, or add train.entropy_bonus.",
    ),
    _fell(
        "response_length", 0.5, 1, "responses shrank: {:.4g} to {:.4g} tokens",
        "The policy may have learnt to stop rather than to solve.",
        "Compare a late rollout with an early one; check how the task's reward treats short answers.",
    ),
    _fell(
        "tool_calls", 0.2, 0.2, "tool calls vanish: {:.3g} to {:.3g} a rollout",
        "The policy no longer uses its tools.",
        "Look at tool_errors before they went; check what a call costs in reward, length and time.",
    ),
    _above(
        "zero_advantage", 0.9, "in {:.0%} of the rollouts the group tells nothing",
        "Groups that succeed or fail as one have no advantage, so nothing is learnt from them.",
        "Choose problems nearer to the policy's level, a larger rollout.group_size, or rollout.filter_groups=true.",
    ),
    _above(
        "truncated", 0.3, "tokens ran out in {:.0%} of the rollouts",
        "A rollout that was cut is judged without its answer.",
        "Raise rollout.max_new_tokens and max_model_len, or train.overlong_buffer.",
    ),
    _above(
        "updates_skipped", 0.1, "{:.0%} of the optimizer steps were skipped",
        "Their log-probs or gradients were not finite.",
        "Lower train.lr; look at grad_norm and nonfinite_tokens before them.",
    ),
)  # fmt: skip
