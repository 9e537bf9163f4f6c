"""Ranks of test_integrations_trl.py: GearGRPOTrainer on two of them, with DDP and under DeepSpeed ZeRO-3.

forked_ranks.py calls `main` with a folder. Rank 0 writes, for each way, the parameters after two
steps, what was logged, and whether the parameters were sharded.
"""

import os
from pathlib import Path

import deepspeed.ops
import torch

from gear_trainer.policy.gather import gathered

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main(argv):
    (folder,) = argv
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pure gloo; else a C++ op is compiled at the first use
    os.environ["HF_HUB_OFFLINE"] = "1"
    import test_integrations_trl as here  # what it builds

    found = {}
    for way, zero in (("DDP", None), ("ZeRO-3", ZERO3)):
        trainer = here.on_two_ranks(Path(folder, way), zero)
        trainer.train()
        parameters = list(trainer.model.parameters())
        with gathered(parameters):
            found[way] = torch.cat([p.detach().flatten() for p in parameters])
        history = [
            {name: x for name, x in log.items() if "time" not in name and "per_second" not in name}
            for log in trainer.state.log_history
        ]
        found[f"{way}, log"] = history
        found[f"{way}, sharded"] = any(getattr(p, "ds_status", None) is not None for p in parameters)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, Path(folder, "found.pt"))
