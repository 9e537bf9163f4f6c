"""The triton back end, for CUDA and ROCm devices (a CPU only in Triton's interpreter); triton is imported at the first call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..records import Credit, Pack, check_nan
from ..reference import credit as reference
from ..rules import Rule
from .base import Backend, empty_credit, left_to_reference, on_device


@cache
def load() -> tuple[Any, str | None]:
    """The module of the statistics kernels and None, or None and the reason why triton cannot be imported."""
    try:
        from ..triton import stats
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    return stats, None


class Triton(Backend):
    """The kernels of gear_kernels/triton."""

    name = "triton"
    fused_head = True
    scans = True

    def why_not(self, device, dtype):
        """See Backend.why_not."""
        module, missing = load()
        if module is None:
            return missing
        if device.type == "cpu" and not module.INTERPRETED:
            return "it runs on GPUs (on a CPU only in Triton's interpreter, for tests: TRITON_INTERPRET=1)"
        if device.type not in ("cuda", "cpu"):
            return f"it runs on CUDA and ROCm devices, not on {device.type}"
        return left_to_reference(dtype)

    def splits(self, rows, columns):
        """See Backend.splits."""
        return load()[0].splits(rows, columns)

    def sweep(self, student, teacher, task, sums):
        """See Backend.sweep."""
        load()[0].sweep(student, teacher, task, sums)

    def finish(self, sums, task):
        """See Backend.finish."""
        return load()[0].finish(sums, task)

    def mixture(self, student, teacher, task, state, shares):
        """See Backend.mixture."""
        load()[0].mixture(student, teacher, task, state, shares)

    def note(self, student, teacher, task, norms, first_row, noted):
        """See Backend.note."""
        load()[0].note(student, teacher, task, norms, first_row, noted)

    def gradient(self, student, teacher, task, state, grads, dz):
        """See Backend.gradient."""
        load()[0].gradient(student, teacher, task, state, grads, dz)

    def scan(self, pack, rule):
        """One launch, a second one for the diagnostics; entropy_window and cl_egrsd take their windows in torch before."""
        from ..triton import scan

        if pack.device.type == "cpu":
            check_nan(pack)
        floats, ids, onsets, tallies = empty_credit(pack, len(reference.TALLIES))
        level = None if rule.level is None else rule.level(pack.row(rule.second), pack.mask).view(1)
        rows = scan.ScanRows(
            *(pack.row("signal"), _second(pack, rule), pack.own_advantages()),
            *(pack.mask, pack.rows["turn_ids"], pack.cu_seqlens, level),
        )
        with on_device(pack.device):
            diagnostics = scan.scan(rows, scan.ScanOutputs._make([*floats, ids, onsets, tallies]), rule, pack.total)
        return Credit._make([*floats, ids, onsets, dict(zip(reference.DIAGNOSTICS, diagnostics, strict=True))])


def _second(pack: Pack, rule: Rule) -> torch.Tensor | None:
    """The second row as the kernel wants it: [T]; for entropy_window [2 T], the row and then its window means."""
    second = pack.row(rule.second)
    if second is None:
        return None
    if rule.cut.segmenter == "entropy_window":
        return torch.cat([second, _over_policy_tokens(reference.window_mean, second, pack, rule.cut.window)])
    return second if rule.look_ahead == 0 else _over_policy_tokens(reference.least_ahead, second, pack, rule.look_ahead)


def _over_policy_tokens(function, x: torch.Tensor, pack: Pack, reach: int) -> torch.Tensor:
    """function(x, sequence, reach) as if the tokens outside the mask were not there; their own results mean nothing."""
    sequence = pack.sequence()
    if pack.mask is None:
        return function(x, sequence, reach)
    # policy tokens to the front without a look at how many there are; the others are a trajectory of their own behind them
    order = (~pack.mask).byte().argsort(stable=True)
    sequence = torch.where(pack.mask, sequence, pack.cu_seqlens.numel())[order]
    return torch.empty_like(x).index_copy_(0, order, function(x[order], sequence, reach))
