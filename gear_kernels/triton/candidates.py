"""Candidates for a measurement on a GPU to choose among: kernels' blocks and sizes of tiles, by architecture. Imports no triton.

STATS_CANDIDATES[arch][kernel], SCAN_CANDIDATES[arch]: `Config`s, the table's own among them.  TILE_CANDIDATES[arch]: `Tiles`.
arch is str() of Triton's target: "80" (A100), "90" (H100, H200), "100" (B200), "gfx942" (MI300X); `nearest(arch)` gives the key
for any other. kernel: "sweep", "mixture", "gradient". `trying(kernel, config)` puts a candidate in the table's place for a
while, for "scan" too. The winners go into CONFIGS by hand, with the figures that chose them: nothing is tuned at a user's first
call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class Config(NamedTuple):
    """Columns (tokens, in the scan) that a program holds at a time, and its warps."""

    block: int
    num_warps: int


class Tiles(NamedTuple):
    """Sizes for tiling.Limits, at a head of 4096: MiB of both heads' tile, its rows, MiB of tiles and dz together."""

    tile: int
    rows: int
    workspace: int


# By kernel, architecture and dtype of the logits ("float32": tiles of hidden states); where there is no entry, stats.py's rule
# stands. Empty until a GPU has been measured.
CONFIGS: dict[tuple[str, str, str], Config] = {}


def _configs(*pairs: tuple[int, int]) -> tuple[Config, ...]:
    return tuple(Config(*pair) for pair in pairs)


_SWEEP = _configs((512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 16))
_GRADIENT = _configs((512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8), (2048, 8), (2048, 16))
_NVIDIA = {"sweep": _SWEEP, "mixture": _SWEEP, "gradient": _GRADIENT}
# a wavefront has 64 lanes: half the warps hold as many columns a lane
_AMD_SWEEP = _configs((512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
_AMD = {"sweep": _AMD_SWEEP, "mixture": _AMD_SWEEP, "gradient": _configs((512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))}
STATS_CANDIDATES = {"80": _NVIDIA, "90": _NVIDIA, "100": _NVIDIA, "gfx942": _AMD}

_SCAN = _configs((256, 1), (512, 1), (512, 2), (512, 4), (1024, 2), (1024, 4), (2048, 8))
_AMD_SCAN = _configs((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))
SCAN_CANDIDATES = {"80": _SCAN, "90": _SCAN, "100": _SCAN, "gfx942": _AMD_SCAN}

# rows x columns of a head: 2048 x 2048 (in the L2 cache, if at all), 2048 x 4096, 4096 x 2048, 1024 x 8448 (two whole waves of
# 128 x 256 on 132 multiprocessors), 4096 x 4096, 8192 x 2048 (four waves, from memory)
_TILES = tuple(
    Tiles(*sizes)
    for sizes in ((32, 2048, 160), (64, 2048, 160), (64, 4096, 160), (66, 1024, 160), (128, 4096, 320), (128, 8192, 320))
)
_LARGE_CACHE = (*_TILES, Tiles(256, 8192, 640))  # 126 MB of L2 on a B200, 256 MB beside the L2 on an MI300X
TILE_CANDIDATES = {"80": (Tiles(16, 1024, 160), *_TILES), "90": _TILES, "100": _LARGE_CACHE, "gfx942": _LARGE_CACHE}


def nearest(arch: str) -> str:
    """The key of the candidates for an architecture: its own, else the newest NVIDIA one not above it, else AMD's."""
    if arch in STATS_CANDIDATES:
        return arch
    if not arch.isdigit():
        return "gfx942"
    return max((key for key in STATS_CANDIDATES if key.isdigit() and int(key) <= int(arch)), key=int, default="80")


TRIED: dict[str, Config] = {}  # by kernel; `trying` alone writes it


@contextlib.contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Inside, every call of this kernel ("sweep", "mixture", "gradient", "scan") takes this block and these warps."""
    before = dict(TRIED)
    TRIED[kernel] = config
    try:
        yield
    finally:
        TRIED.clear()
        TRIED.update(before)
