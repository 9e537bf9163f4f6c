"""Vocabulary (tensor) parallelism: each rank holds a slice of the head's rows, in rank order.

What crosses the ranks is a row's twelve partial sums, never logits. Collectives of one `linear_token_stats` call: one all_gather
of [N, 12] float64 in forward (and one all_reduce of [N, 2] float64 for jsd, one all_gather of [N, 4] float64 for top1 and
argmax_agreement), one all_reduce of the hidden states' gradient [N, D] in float32 in backward, where that gradient is asked for.
None of them waits for the device.

Where the rows are sharded too (Head.sequence_parallel), each rank's rows go round in turn: its hidden states are broadcast, then
come the collectives above for them, so that a rank holds at most another rank's rows beside its own, never all of them.

Either all ranks pass the argument checks or none does: these run before the first collective and ask no other rank. Where one
rank alone raises (a target out of range in its copy), the others wait in the all_gather until the group's timeout ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def gather_sums(sums: torch.Tensor, shard_rows: int, name: str, shards: Sequence[int] = ()) -> torch.Tensor:
    """Sums [K, n, 12] of this rank's shard -> [K * ranks, n, 12] of all; one all_gather, which carries each shard's size too.

    shards: the sizes that all ranks' shards are to have; () for this one's. Others put tokens at the wrong ids: an error on the
    CPU, NaN on a GPU (no device synchronisation).
    """
    group = resolve(name)
    mine = torch.cat([sums.flatten(), sums.new_full((1,), shard_rows)])
    everyone = mine.new_empty((group.size(), mine.numel()))
    dist.all_gather(list(everyone.unbind(0)), mine, group=group)
    out, sizes = everyone[:, :-1].reshape(-1, *sums.shape[1:]), everyone[:, -1]
    equal = (sizes == shard_rows).all()
    if shards:  # one by one: a list copied to a GPU would wait for it
        equal = torch.stack([size == wanted for size, wanted in zip(sizes.unbind(), shards, strict=True)]).all()
    if sums.device.type == "cpu" and not equal:
        raise bad_input(
            f"the ranks' vocabulary shards have {[int(x) for x in sizes]} rows",
            f"rows {list(shards)}" if shards else "shards of one size",
            "pass Head(shards=...), the rows of every rank's shard, on all ranks alike",
        )
    return torch.where(equal, out, torch.nan)


def add_up(tensor: torch.Tensor, name: str) -> None:
    """Sum over the ranks, in place: one all_reduce."""
    dist.all_reduce(tensor, group=resolve(name))


def first_largest(values: torch.Tensor, columns: torch.Tensor, name: str) -> torch.Tensor:
    """The columns [heads, n] of the largest of all ranks' values [heads, n] float64, the first rank's of equal ones.

    One all_gather.
    """
    mine = torch.stack([values, columns.to(values.dtype)])
    everyone = mine.new_empty((resolve(name).size(), *mine.shape))
    dist.all_gather(list(everyone.unbind(0)), mine, group=resolve(name))
    first = everyone[:, 0].max(0).indices
    return everyone[:, 1].gather(0, first[None])[0].long()


def sent(tensor: torch.Tensor, rank: int, name: str) -> torch.Tensor:
    """The tensor that this rank of the group has under the same name, shape and dtype: one broadcast."""
    group = resolve(name)
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if group.rank() == rank:
        out.copy_(tensor)
    dist.broadcast(out, dist.get_global_rank(group, rank), group=group)
    return out
