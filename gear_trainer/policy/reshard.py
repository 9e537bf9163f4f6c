"""A checkpoint for another number of ranks than wrote it: DeepSpeed's universal format, and shards of models that follow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gear_trainer.errors import RunError

WORKERS = 4  # processes that read shards: each holds one whole


def universal(folder: Path) -> Path:
    """Where `make_universal` puts what it makes of a checkpoint's folder."""
    return folder.with_name(f"{folder.name}.universal")


def make_universal(folder: Path, ranks: int) -> None:
    """Write a checkpoint's masters and moments anew, whole by parameter, for any number of ranks. Rank 0 works. Collective.

    DeepSpeed's own converter does it, in a process of its own: it forks workers, and this one holds a process group. Takes the
    checkpoint's size on the disk again, until `drop_universal`. Raises RunError, the same on all ranks, where it fails.
    """
    said: list[str] = [""]
    if dist.get_rank() == 0:
        said = [_converted(folder, ranks)]
    dist.broadcast_object_list(said)
    if said[0]:
        raise RunError(
            f"{folder}: written by {ranks} ranks, and cannot be made into shards for {dist.get_world_size()} ({said[0]}): make "
            "room on the disk, or resume with as many ranks"
        )


def _converted(folder: Path, ranks: int) -> str:
    """The last line of what went wrong; empty where nothing did."""
    final = universal(folder)
    partial = final.with_name(f"{final.name}.partial")
    for old in (final, partial):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder, "--output_folder", partial]
    command += ["--num_extract_workers", str(min(ranks, WORKERS)), "--num_merge_workers", "1"]
    # no rank: what it imports would look for its peers
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder.parent / "latest_universal").unlink(missing_ok=True)  # the run's own `latest` names the checkpoint
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        return (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    partial.rename(final)
    return ""


def drop_universal(folder: Path) -> None:
    """Remove what `make_universal` made, once every rank has read its part. Collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(universal(folder))


def own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each part of the parameters its own count of Adam's steps.

    A universal checkpoint is loaded with one tensor for all parts, which each would raise: with k parts by k a step.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def own_shards(parts: list[list[torch.Tensor]], params: list[Any]) -> list[torch.Tensor]:
    """This rank's shards of a model by those of all the ranks that wrote it, each in the order of its parameters.

    ZeRO-3 deals a parameter out evenly, rank by rank; what the last ones get beyond its end is padding.
    """
    rank, found = dist.get_rank(), []
    for shards, p in zip(zip(*parts, strict=True), params, strict=True):
        size = p.ds_tensor.numel()
        whole = torch.zeros(size * dist.get_world_size(), dtype=shards[0].dtype)
        whole[: p.ds_numel] = torch.cat([shard.flatten() for shard in shards])[: p.ds_numel]
        found.append(whole[rank * size : (rank + 1) * size].clone())
    return found
