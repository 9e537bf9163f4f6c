"""Rollouts: multi-turn episodes sampled from an engine behind one small protocol."""

from gear_trainer.rollout.engine import Engine, engine_class, make_engine
from gear_trainer.rollout.episodes import roll_out
from gear_trainer.rollout.groups import check_failures, groups_of, is_mixed, leave_out_stale, mixed_groups, troubles
from gear_trainer.rollout.types import Completion, Limits, Request, Rollout, Status, seed_of

__all__ = [
    "Completion", "Engine", "Limits", "Request", "Rollout", "Status", "check_failures", "engine_class", "groups_of", "is_mixed",
    "leave_out_stale", "make_engine", "mixed_groups", "roll_out", "seed_of", "troubles",
]  # fmt: skip
