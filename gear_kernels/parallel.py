"""Vocabulary (tensor) parallelism: each rank holds an equal slice of the head's rows, in rank order.

What crosses the ranks is a row's twelve partial sums, never logits. Collectives of one `linear_token_stats` call: one all_gather
of [N, 12] float64 in forward (and one all_reduce of [N, 2] float64 for jsd), one all_reduce of the hidden states' gradient
[N, D] in float32 in backward, where that gradient is asked for. None of them waits for the device.

Either all ranks pass the argument checks or none does: these run before the first collective and ask no other rank. Where one
rank alone raises (a target out of range in its copy), the others wait in the all_gather until the group's timeout ends it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from .errors import bad_input


def constant_when_traced(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, which doubles this package's import time."""
    function._dynamo_marked_constant = True
    return function


def group_name(name: str, group) -> str:
    """The name under which a compiled graph finds a process group (or one-dimensional DeviceMesh) again."""
    if isinstance(group, dist.ProcessGroup):
        return group.group_name
    if getattr(group, "ndim", None) == 1 and hasattr(group, "get_group"):
        return group.get_group().group_name
    raise bad_input(
        f"{name}.group is a {type(group).__name__}",
        "a torch.distributed process group or a one-dimensional DeviceMesh",
        "pass the group whose ranks share the vocabulary",
    )


def resolve(name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    # torch has no public name for it
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


@constant_when_traced
def ranks(name: str) -> int:
    """Number of ranks of the group of this name; "" is one."""
    return resolve(name).size() if name else 1


def gather_sums(sums: torch.Tensor, shard_rows: int, name: str) -> torch.Tensor:
    """Sums [K, n, 12] of this rank's shard -> [K * ranks, n, 12] of all; one all_gather, which carries each shard's size too.

    Shards of unequal size put tokens at the wrong ids: an error on the CPU, NaN on a GPU (no device synchronisation).
    """
    group = resolve(name)
    mine = torch.cat([sums.flatten(), sums.new_full((1,), shard_rows)])
    everyone = mine.new_empty((group.size(), mine.numel()))
    dist.all_gather(list(everyone.unbind(0)), mine, group=group)
    out, sizes = everyone[:, :-1].reshape(-1, *sums.shape[1:]), everyone[:, -1]
    equal = (sizes == shard_rows).all()
    if sums.device.type == "cpu" and not equal:
        raise bad_input(
            f"the ranks' vocabulary shards have {[int(x) for x in sizes]} rows",
            "shards of one size",
            "pad the head to a multiple of the ranks and pass valid_vocab, the number of real tokens",
        )
    return torch.where(equal, out, torch.nan)


def add_up(tensor: torch.Tensor, name: str) -> None:
    """Sum over the ranks, in place: one all_reduce."""
    dist.all_reduce(tensor, group=resolve(name))
