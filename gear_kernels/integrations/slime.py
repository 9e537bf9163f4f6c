"""Token advantages for slime: the function behind its `--custom-advantage-function-path`.

Read against slime's sources of 21 August 2026 (commit 0624b824): `compute_advantages_and_returns` in its Megatron back end calls
the function on each rank of the last pipeline stage. Needs torch alone; docs/verl.md shows a launch.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from ..errors import require
from .common import choose, token_advantages

GIVES = ("signal", "entropy", "turn_ids")  # the inputs of credit methods that slime's passes can make
SETTINGS = ("method", "args")  # the keys of `gear` in the file of --custom-config-path

# rollout_data's column behind each thing that a method may read, and the option that makes slime fill it
_COLUMNS = {
    "log_probs": "add --get-mismatch-metrics, which has slime score the rollouts before it updates",
    "teacher_log_probs": "let a --custom-rm-path function set sample.teacher_log_probs",
    "entropy": "add --use-rollout-entropy",
}


def advantages(args: Namespace, rollout_data: dict[str, Any]) -> None:
    """Fill rollout_data's advantages and returns: a method's weights on the group-normalised rewards, token by token, in place.

    args         slime's. `args.gear` may hold a mapping with `method` (a name, "gear" if left out) and `args` (its fields).
    rollout_data columns of a list a sample: rewards (numbers), loss_masks [t] integer, log_probs [t] (the trainer's own pass,
                 never the engine's), teacher_log_probs [t], entropy [t], all nats; those alone that the method reads.
                 Filled: advantages and returns, lists of float32 [t]; gear/... , 0-d float32, which slime logs.

    Raises GearKernelsError under context parallelism (a rank holds parts of a trajectory), for unknown settings and methods, and
    for a column that is missing, with the option that brings it.
    """
    settings = getattr(args, "gear", None) or {}
    wrong = sorted(set(settings) - set(SETTINGS))
    require(not wrong, f"gear: given {', '.join(wrong)}", f"keys out of {', '.join(SETTINGS)}", "correct the name")
    size = getattr(args, "context_parallel_size", 1)
    mend = "set it to 1 and shorten what a rank holds by --tensor-model-parallel-size"
    require(size == 1, f"--context-parallel-size {size}", "1: segments run over a whole trajectory", mend)
    chosen = choose(settings.get("method", "gear"), GIVES, args=settings.get("args"), trainer="slime").method
    inputs: dict[str, Any] = {}
    if "signal" in chosen.needs:
        pairs = zip(_column(rollout_data, "log_probs"), _column(rollout_data, "teacher_log_probs"), strict=True)
        inputs["signal"] = [own - teacher for own, teacher in pairs]
    if "entropy" in chosen.needs:
        inputs["entropy"] = _column(rollout_data, "entropy")
    out = token_advantages(rollout_data["rewards"], rollout_data["loss_masks"], method=chosen, **inputs)
    rollout_data["advantages"] = out.token_advantages
    rollout_data["returns"] = [row.clone() for row in out.token_advantages]
    rollout_data |= out.metrics


def _column(rollout_data: dict[str, Any], name: str) -> list[torch.Tensor]:
    column = rollout_data.get(name)
    require(bool(column), f"rollout_data without {name}", "a row a sample", _COLUMNS[name])
    assert column is not None
    return column
