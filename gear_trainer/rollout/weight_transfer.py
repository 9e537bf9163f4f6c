"""The trainer's end of vLLM's weight transfer: rank 0 of a group whose other ranks are the workers of a server.

A transfer is a request to the server, in which its workers wait for tensors, and a broadcast of these by the trainer, at the same
time. The broadcast runs in a thread that nobody has to wait for, the request in the caller's with a limit of seconds: a server
that is lost ends in an error of the request, never in a collective that hangs.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented all the same)

Named = list[tuple[str, torch.Tensor]]
CHUNK = 512 << 20  # bytes of weights that are copied at a time; a single larger tensor is a chunk of its own


class TransferError(RuntimeError):
    """Weights that did not get to the server's workers."""


class Group(Protocol):
    """A group of the trainer and a server's workers, of which the trainer is rank 0."""

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast a tensor, and return when it is on its way or there."""
        ...

    def finish(self) -> None:
        """Return when all that was sent may be freed."""
        ...


class Transfer:
    """Sends weights to the workers of one server. `post(path, body)` makes a request to it, and raises where that fails.

    backend: what the server's --weight-transfer-config names, nccl or gloo. host: where its workers reach this process. timeout:
    seconds that the meeting, or a chunk of weights, may take.
    """

    def __init__(self, post: Callable[[str, Any], Any], backend: str, host: str, workers: int, timeout: float):
        self.post, self.timeout = post, timeout
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        where = {"master_address": host, "master_port": port, "world_size": workers + 1}
        self.group: Group = meanwhile(
            lambda: join(backend, host, port, workers + 1, timeout),
            lambda: post("/init_weight_transfer_engine", {"init_info": {**where, "rank_offset": 1}}),
            timeout,
        )

    def send(self, chunk: Named) -> None:
        """Hand over a chunk; the server has begun an update."""
        update = {
            "names": [name for name, _ in chunk],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
            "shapes": [list(tensor.shape) for _, tensor in chunk],
        }
        meanwhile(lambda: self._broadcast(chunk), lambda: self.post("/update_weights", {"update_info": update}), self.timeout)

    def _broadcast(self, chunk: Named) -> None:
        for _, tensor in chunk:
            self.group.send(tensor)
        self.group.finish()


def meanwhile(ours: Callable[[], Any], request: Callable[[], Any], timeout: float) -> Any:
    """The result of `ours`, which runs in a thread while the request does here. Raises what the request raises, and TransferError
    where `ours` raises or outlasts the request by the timeout."""
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(ours())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, name="weights on their way", daemon=True).start()
    try:
        request()
    except Exception as error:
        if result.done() and (cause := result.exception()):  # the server waited for what never came
            raise TransferError(f"{type(cause).__name__}: {cause}") from error
        raise
    try:
        return result.result(timeout)
    except TimeoutError:
        raise TransferError(f"weights were not taken within {timeout:g} s") from None
    except Exception as error:
        raise TransferError(f"{type(error).__name__}: {error}") from error


def chunks(weights: Iterator[tuple[str, torch.Tensor]], device: torch.device, limit: int = CHUNK) -> Iterator[Named]:
    """Copies of the weights on the device, `limit` bytes at a time or one tensor. Runs the iterator to its end."""
    chunk: Named = []
    held = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if chunk and held + size > limit:
            yield chunk
            chunk, held = [], 0
        chunk.append((name, tensor.detach().to(device, copy=True).contiguous()))
        held += size
    if chunk:
        yield chunk


class Gloo:
    """A group on CPUs, which both ends make alike."""

    def __init__(self, host: str, port: int, rank: int, world: int, timeout: float):
        limit = timedelta(seconds=timeout)
        self.store = TCPStore(host, port, world, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        self.group = dist.ProcessGroupGloo(PrefixStore("weights", self.store), rank, world, limit)

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast rank 0's tensor into everybody's."""
        how = dist.BroadcastOptions()
        how.rootRank = how.rootTensor = 0
        self.group.broadcast([tensor], how).wait()  # pyright: ignore[reportAttributeAccessIssue]  (the stubs leave it out)

    def finish(self) -> None:
        """Do nothing: a broadcast is over when it returns."""


class Nccl:
    """A group on GPUs; the workers' end is vLLM's own."""

    def __init__(self, host: str, port: int, world: int, device: torch.device):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        torch.cuda.set_device(device)  # of this thread
        self.device = device
        self.group = trainer_init({"master_address": host, "master_port": port, "world_size": world})

    def send(self, tensor: torch.Tensor) -> None:
        """Enqueue a broadcast of the tensor."""
        torch.cuda.set_device(self.device)
        self.group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())

    def finish(self) -> None:
        """Wait for the broadcasts."""
        torch.cuda.current_stream().synchronize()


def join(backend: str, host: str, port: int, world: int, timeout: float) -> Group:
    """Rank 0's end of a group. Blocks until all are there; raises where they are not."""
    if backend == "nccl":
        return Nccl(host, port, world, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return Gloo(host, port, 0, world, timeout)
