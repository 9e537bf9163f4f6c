"""The place of this process among the ranks of a launcher, by the variables of torchrun and DeepSpeed."""

from __future__ import annotations

import os


def ranks_here(otherwise: int = 1) -> int:
    """The number of ranks on this machine; that of all where the launcher names no other, `otherwise` where there was none."""
    named = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))  # the second is DeepSpeed's
    return int(next(filter(None, named), otherwise))
