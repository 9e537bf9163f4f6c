"""Groups of rollouts of one problem: which of them teach, which make way for fresh ones, what went wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from gear_trainer.errors import RunError
from gear_trainer.rollout.types import Limits, Rollout


def groups_of(rollouts: list[Rollout]) -> list[list[Rollout]]:
    """Rollouts that stand in a row and are of one group."""
    return [list(group) for _, group in groupby(rollouts, key=lambda r: r.group)]


def troubles(rollouts: list[Rollout]) -> dict[str, int]:
    """Counts of what went wrong around the model: texts that spelled control tokens, replies cut, tries that the environment
    broke off and what they cost."""
    return {
        "texts_escaped": sum(r.escaped for r in rollouts),
        "replies_cut": sum(r.cut for r in rollouts),
        "rollouts_retried": sum(bool(r.failures) for r in rollouts),
        "rollouts_failed": sum(r.failed for r in rollouts),
        "groups_dropped": len({r.group for r in rollouts if r.failed}),
    }


def check_failures(
    rollouts: list[Rollout], limits: Limits, after: str = "then --resume goes on from the last checkpoint"
) -> None:
    """Raise RunError where environments broke more of a step's rollouts than `limits.max_failed_share`: a service is down, or the
    task broken, and each step would cost its time for next to nothing. `after`: how to go on once it is mended."""
    failed = [r for r in rollouts if r.failed]
    if len(failed) > limits.max_failed_share * len(rollouts):
        raise RunError(
            f"{len(failed)} of {len(rollouts)} rollouts failed twice, more than rollout.max_failed_share="
            f"{limits.max_failed_share:g}, the first as {failed[0].failures[-1]!r}: mend the task or its services, "
            f"{after}"
        )


def leave_out_stale(rollouts: list[Rollout], version: int, staleness: int) -> int:
    """Drop each group that has a token of weights from before push `version - staleness`. Returns the number of groups."""
    oldest = version - staleness
    stale = {r.group for r in rollouts if any(0 <= sampled < oldest for sampled in r.versions)}
    for rollout in rollouts:
        rollout.dropped = rollout.dropped or rollout.group in stale
    return len(stale)


def is_mixed(group: list[Rollout], spread: float | None = None) -> bool:
    """True where some succeeded and some failed: such a group shows what made the difference; one without an outcome does not.

    spread: for graded rewards, True where the highest and the lowest of them differ by more than that.
    """
    if any(r.failed for r in group):
        return False
    if spread is not None:
        return max(r.reward for r in group) - min(r.reward for r in group) > spread
    return 0 < sum(r.success for r in group) < len(group)


def mixed_groups(
    sample: Callable[[int, list[int]], list[Rollout]], slots: int, batches: int, spread: float | None = None
) -> tuple[list[Rollout], dict[str, int]]:
    """`slots` groups; those that are not mixed make way for fresh ones, `sample(batch, slots)`, until `batches` were sampled.

    DAPO's dynamic sampling with a cap: what is not mixed in the last batch stays. spread: as in `is_mixed`. Also returns the
    counts `mixed_groups` (of the first batch) and `resampled_groups`.
    """
    groups: dict[int, list[Rollout]] = {}
    wanted, left = list(range(slots)), []
    for batch in range(batches):
        groups |= zip(wanted, groups_of(sample(batch, wanted)), strict=True)
        wanted = [slot for slot in wanted if not is_mixed(groups[slot], spread)]
        left.append(len(wanted))
        if not wanted:
            break
    counts = {"mixed_groups": slots - left[0], "resampled_groups": sum(left[:-1])}
    return [r for slot in range(slots) for r in groups[slot]], counts
