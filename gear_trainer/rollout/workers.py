"""The part of a rollout server that runs in the processes of its workers, beside vLLM's own code.

A server is told of it by `--worker-extension-cls gear_trainer.rollout.workers.Extension`: each worker then has the methods of
that class, and has imported this module before it makes its transfer engine. That over gloo is for CPUs what vLLM's NCCL engine
is for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.request import LoRARequest

from gear_trainer.rollout.weight_transfer import Gloo

TIMEOUT = 600.0  # seconds that a worker waits for the trainer's next tensor


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the trainer is met."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Names, dtypes and shapes of the tensors that come next."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """A worker's end: receives whole tensors from the trainer, and loads its part of each."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    group: Gloo | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group."""
        config = self.parallel_config
        rank = init_info.rank_offset + config.data_parallel_index * config.world_size + config.rank
        self.group = Gloo(init_info.master_address, init_info.master_port, rank, init_info.world_size, TIMEOUT)

    def start_weight_update(self) -> None:
        """Make the layers ready for weights as a checkpoint has them."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Receive a chunk. The base class' ends by waiting for an accelerator, which a CPU build refuses."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive tensors in their order, and load each."""
        if self.group is None:
            raise RuntimeError("init_weight_transfer_engine comes before update_weights")
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.send(tensor)
            self.model.load_weights([(name, tensor)])  # pyright: ignore[reportCallIssue]  (every model of vLLM's has it)

    def finish_weight_update(self) -> None:
        """Pack the layers as the CPU's kernels want them."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None


class Extension:
    """Methods of a worker, by name over the server's /collective_rpc."""

    list_loras: Callable[[], set[int]]
    add_lora: Callable[[LoRARequest], bool]

    def adapters(self) -> list[int]:
        """The numbers of the adapters that are loaded."""
        return sorted(self.list_loras())

    def replace_adapter(self, folder: str) -> None:
        """Load a folder's adapter in place of the one that requests sample with, those under way too.

        The server's own /v1/load_lora_adapter with load_inplace keeps that word in each request: vLLM 0.32 then reads the folder
        again in every step of sampling.
        """
        (number,) = self.list_loras()
        self.add_lora(LoRARequest("policy", number, folder, load_inplace=True))


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
