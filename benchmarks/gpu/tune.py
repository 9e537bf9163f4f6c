"""The GPU report's tuning: every candidate for tiles, for the statistics kernels' blocks and for the scan's, timed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from gear_kernels.triton import candidates

from ..harness.cases import OUTPUTS, PASSES
from ..harness.internals import IGNORED, STAT_NAMES, SUM_NAMES, Rows, Tile, TileTask, serving, tile_limits
from .run import BF16, F32, Item, Setting
from .speed import credit_speed, ours_hidden
from .timing import timed

KERNELS = ("sweep", "gradient", "mixture")
_SCAN_PACKS = ("typical, 512 sequences", "segments of two tokens", "long sequences")


def architecture(setting: Setting) -> str:
    """The key of the candidates for this device; an H100's where there is none."""
    if setting.self_test or not torch.cuda.is_available():
        return "90"
    properties = torch.cuda.get_device_properties(0)
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else f"{properties.major}{properties.minor}"
    return candidates.nearest(name.split(":")[0])


# --- tiles ------------------------------------------------------------------------------------------------------------------


def tile_items(setting: Setting) -> list[Item]:
    """Sizes of tiles: reported, applied by nobody but a reader."""
    tried = setting.pick(candidates.TILE_CANDIDATES[architecture(setting)], (candidates.Tiles(1, 16, 4),))
    return [
        Item(
            f"tile {t.tile} MiB, {t.rows} rows, workspace {t.workspace} MiB, {passes}",
            lambda t=t, p=passes: _tiles(setting, t, p),
        )
        for t in tried
        for passes in PASSES
    ]


def _tiles(setting: Setting, sizes: candidates.Tiles, passes: str) -> dict:
    with tile_limits(setting.device, sizes.tile << 20, sizes.workspace << 20, sizes.rows):
        return ours_hidden(setting, OUTPUTS, "default", passes)


# --- blocks of the statistics kernels ---------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """A kernel's tensors at one tile, read and written. The heads lie apart: one for both would be read from the L1 cache."""

    student: Tile
    teacher: Tile
    task: TileTask
    sums: torch.Tensor
    grads: torch.Tensor
    dz: torch.Tensor


def block_items(setting: Setting) -> list[Item]:
    """Blocks and warps of the kernels, on a tile of hidden states first, then on given logits."""
    shapes = setting.pick({"tile": (2048, 2048, F32), "logits": (4096, 151936, BF16)}, {"tile": (8, 64, F32)})
    tried = candidates.STATS_CANDIDATES[architecture(setting)]
    return [
        Item(f"{kernel}, {place}, {config.block}/{config.num_warps}", functools.partial(_block, setting, kernel, shape, config))
        for place, shape in shapes.items()
        for kernel in KERNELS
        for config in tried[kernel]
    ]


def _block(setting: Setting, kernel: str, shape: tuple, config: candidates.Config) -> dict:
    given = inputs(setting, kernel, shape)
    chosen = serving(setting.device, shape[2])
    tiles = given.student, given.teacher, given.task
    _, state = chosen.finish(given.sums, given.task)
    calls = {
        "sweep": lambda: chosen.sweep(*tiles, given.sums),
        "gradient": lambda: chosen.gradient(*tiles, state, given.grads, given.dz),
        "mixture": lambda: chosen.mixture(*tiles, state, given.sums[..., :2].contiguous()),
    }
    with candidates.trying(kernel, config):
        found = timed(calls[kernel], setting, seconds=0.5)
    read = 2 * given.student.z.numel() * given.student.z.element_size()
    written = given.dz.numel() * given.dz.element_size() if kernel == "gradient" else 0
    return {**found, "gb_s": (read + written) / found["ms"] / 1e6}


def inputs(setting: Setting, kernel: str, shape: tuple) -> Inputs:
    """The inputs of one kernel, its sums after a first sweep."""
    n, columns, dtype = shape
    rows = Rows(torch.zeros(n, dtype=torch.int64, device=setting.device), torch.ones(n, device=setting.device), IGNORED)
    task = TileTask(rows, OUTPUTS if kernel != "mixture" else ("jsd",))
    student, teacher = (Tile(z) for z in _logits(setting, shape))
    sums = torch.zeros(1, n, len(SUM_NAMES), dtype=torch.float64, device=setting.device)
    serving(setting.device, dtype).sweep(student, teacher, task, sums)
    dz = torch.empty(n, columns, dtype=setting.pick(BF16, F32), device=setting.device)
    return Inputs(student, teacher, task, sums, torch.ones(n, len(STAT_NAMES), device=setting.device), dz)


@functools.lru_cache(maxsize=1)
def _logits(setting: Setting, shape: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.randn(*shape[:2], device=setting.device).mul_(3)
    teacher = student + 0.3 * torch.randn(*shape[:2], device=setting.device)
    return student.to(shape[2]), teacher.to(shape[2])


# --- blocks of the scan -----------------------------------------------------------------------------------------------------


def scan_items(setting: Setting) -> list[Item]:
    """Blocks and warps of the credit scan on three kinds of packs."""
    tried = candidates.SCAN_CANDIDATES[architecture(setting)]
    return [
        Item(f"scan, {name}, {config.block}/{config.num_warps}", lambda n=name, c=config: _scan(setting, n, c))
        for name in _SCAN_PACKS
        for config in (tried if not setting.self_test else tried[:1])
    ]


def _scan(setting: Setting, name: str, config: candidates.Config) -> dict:
    with candidates.trying("scan", config):
        return credit_speed(setting, name)
