"""Checkpoints that resume exactly, and the export in HF format.

A checkpoint holds ZeRO-3's shards (parameters, float32 masters, Adam's moments) and those of a teacher that follows the policy.
Nothing else has state: problems, sampling seeds and the learning rate are functions of (seed, step).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gear_trainer.config import Config, ConfigError
from gear_trainer.sync import whole_state_dict
from gear_trainer.teacher import Teacher


def save(engine: Any, cfg: Config, step: int, teacher: Teacher | None = None) -> None:
    """Write `checkpoints/step-N`, then point `latest` at it in one rename: a kill between leaves the one before. Collective."""
    root = cfg.run_dir / "checkpoints"
    engine.save_checkpoint(str(root), tag=f"step-{step}", client_state={"step": step}, save_latest=False)
    if teacher is not None and teacher.follows:
        torch.save(teacher.state(), _teacher_file(root, step))
    dist.barrier()
    if dist.get_rank() == 0:
        partial = root / "latest.partial"
        partial.write_text(f"step-{step}")
        partial.replace(root / "latest")
        for old in sorted(root.glob("step-*"), key=_step)[: -cfg.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()


def latest_step(cfg: Config) -> int:
    """The step that --resume goes on from; 0 where no checkpoint was finished."""
    pointer = cfg.run_dir / "checkpoints" / "latest"
    return _step(Path(pointer.read_text())) if pointer.is_file() else 0


def load(engine: Any, cfg: Config, step: int, teacher: Teacher | None = None) -> None:
    """Collective. Raises ConfigError where the checkpoint was written by another number of ranks, or for another teacher."""
    root = cfg.run_dir / "checkpoints"
    ranks = len(list((root / f"step-{step}").glob("*zero_pp_rank_*_optim_states.pt")))
    if ranks != dist.get_world_size():
        raise ConfigError(f"{root}/step-{step}: written by {ranks} ranks, resumed with {dist.get_world_size()}; use as many")
    path, _ = engine.load_checkpoint(str(root), tag=f"step-{step}")
    if path is None:
        raise ConfigError(f"{root}/step-{step}: DeepSpeed could not load it; remove it and set `latest` to an earlier step")
    if teacher is not None and teacher.follows:
        own = _teacher_file(root, step)
        if not own.is_file():
            raise ConfigError(f"{own} is missing: the run had no teacher.weights={cfg.teacher.weights}; resume as it was started")
        teacher.load_state(torch.load(own, weights_only=True))


def _teacher_file(root: Path, step: int) -> Path:
    return root / f"step-{step}" / f"teacher_rank{dist.get_rank()}.pt"


def export(engine: Any, cfg: Config, tokenizer: Any) -> None:
    """The policy as an HF directory, `runs/NAME/model`, whole tensors in the training dtype. Collective."""
    lm = engine.module.lm
    weights = whole_state_dict(lm)
    if dist.get_rank() == 0:
        path = cfg.run_dir / "model"
        lm.save_pretrained(str(path), state_dict=weights)
        tokenizer.save_pretrained(str(path))
    dist.barrier()


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def next_free(path: Path) -> Path:
    """`path`.1, .2, ...: the first that does not exist. A new run moves an older one of its name there: nothing is lost."""
    n = 1
    while (moved := path.with_name(f"{path.name}.{n}")).exists():
        n += 1
    return moved
