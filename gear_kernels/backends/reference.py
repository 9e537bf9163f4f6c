"""The reference back end: plain torch, on any device, in float64 for float64 inputs."""

from __future__ import annotations

import torch

from ..records import Tile, TileTask
from ..reference import stats
from .base import Backend, wide

# what of `finish` is there without a teacher
_STUDENT = {"max", "log_z", *(stat.name for stat in stats.STATISTICS if not stat.needs_teacher)} - set(stats.ARGMAX_NAMES)


class Reference(Backend):
    """The mathematics of reference/stats.py, a tile at a time; credit is the method's own torch."""

    name = "reference"
    tile_copies = 8

    def why_not(self, device, dtype):
        """Never: it serves every device and dtype."""
        return None

    def sweep(self, student, teacher, task, sums):
        """See Backend.sweep."""
        tile = stats.sweep(student.z, _z(teacher), task.rows, task.first)
        sums[0] = stats.merge(torch.stack([sums[0], tile.to(sums.dtype)]), task.rows)

    def finish(self, sums, task: TileTask):
        """See Backend.finish."""
        dtype = wide(task.rows.inv_temperature.dtype)
        out = stats.finish(stats.merge(sums, task.rows), task.rows)
        keep, zero = task.rows.keep(), torch.zeros_like(out["max"])
        if not stats.needs_teacher(task.stats):
            out = {name: value for name, value in out.items() if name in _STUDENT}
        values = torch.stack([torch.where(keep, out[name], 0) if name in out else zero for name in stats.STAT_NAMES])
        return values.to(dtype), torch.stack([out.get(name, zero) for name in stats.STATE_NAMES], -1).to(dtype)

    def mixture(self, student, teacher, task, state, shares):
        """See Backend.mixture."""
        shares[0] += stats.mixture_sweep(student.z, teacher.z, task.rows, _named(state), task.beta)

    def gradient(self, student, teacher, task, state, grads, dz):
        """See Backend.gradient."""
        chosen = {name: grads[:, stats.STAT_NAMES.index(name)] for name in task.stats if stats.BY_NAME[name].gradient}
        dz.copy_(stats.gradient(student.z, _z(teacher), task.rows, _named(state), chosen, task.first, task.beta))


def _z(tile: Tile | None) -> torch.Tensor | None:
    return None if tile is None else tile.z


def _named(state: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(stats.STATE_NAMES, state.unbind(-1), strict=True))
