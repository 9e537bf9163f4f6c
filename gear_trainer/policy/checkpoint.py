"""Checkpoints that resume exactly, and the export in HF format.

A checkpoint holds ZeRO-3's shards (parameters, float32 masters, Adam's moments) and those of a teacher or a reference model that
follows the policy. With LoRA these are the adapters' alone, and `adapter_config.json` says what they are.
Nothing else has state: problems, sampling seeds and the learning rate are functions of (seed, step).

`checkpoints/step-N` is finished once `manifest.json` stands in it, with the size and SHA-256 of every file; `checkpoints/latest`
names the finished one to go on from. A kill at any moment leaves `latest` on a finished one, or one finished folder without any
`latest`, the first: what is above it is removed before the next save, what is below it only after `latest` has moved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.policy import lora, reshard
from gear_trainer.policy.frozen import FrozenModel
from gear_trainer.policy.gather import adapter_state_dict, whole_state_dict
from gear_trainer.runs.files import aside, sync, write_whole

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-\d+")


def save(engine: Any, cfg: Config, step: int, frozen: Sequence[FrozenModel] = ()) -> None:
    """Write `checkpoints/step-N`, then point `latest` at it. Collective.

    Raises RunError where the weights are not finite (nothing is written then) or the files cannot be written.
    """
    root = _root(cfg)
    before = latest_step(cfg)
    _check_finite(engine, step, before)
    if dist.get_rank() == 0:
        _clear_above(root, before)
        if before and not (root / "latest").exists():  # a kill came before the first pointer
            write_whole(root / "latest", f"step-{before}")
    dist.barrier()
    try:
        engine.save_checkpoint(
            str(root),
            tag=f"step-{step}",
            client_state={"step": step},
            save_latest=False,
            exclude_frozen_parameters=bool(cfg.lora.rank),
        )
        if cfg.lora.rank and dist.get_rank() == 0:
            lora.write_config(root / f"step-{step}", engine.module.lm)
        for model in _following(frozen):
            torch.save(model.state(), _file_of(root / f"step-{step}", model, dist.get_rank()))
        _finish(root / f"step-{step}", cfg.checkpoint.keep)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError about positions
        if not isinstance(error, OSError) and "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise RunError(_cannot_write(root, step, before, error)) from error


def _finish(folder: Path, keep: int) -> None:
    """Have the shards on the disk, list them, move `latest`, prune. In this order, each step done before the next."""
    sums = {path.name: _describe(path, flush=True) for path in _own_files(folder)}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sums)
    if dist.get_rank() == 0:
        files = {name: entry for part in gathered for name, entry in part.items()}
        write_whole(folder / MANIFEST, json.dumps(files, indent=1, sort_keys=True))
        sync(folder.parent)
        write_whole(folder.parent / "latest", folder.name)
        for old in [path for path in _steps(folder.parent) if _number(path) < _number(folder)][: -(keep - 1) or None]:
            _remove(old)
    dist.barrier()


def _own_files(folder: Path) -> list[Path]:
    """The files that this rank answers for: those that it has written; rank 0 for those that bear no rank."""
    own = []
    for path in sorted([*folder.glob("*.pt"), *folder.glob(lora.CONFIG)]):
        found = re.search(r"rank_?(\d+)", path.name)
        if int(found.group(1) if found else 0) % dist.get_world_size() == dist.get_rank():  # more ranks may have written it
            own.append(path)
    return own


def _describe(path: Path, flush: bool = False) -> list[Any]:
    """[bytes, SHA-256], at 1.5 s a GB from the page cache."""
    if flush:
        sync(path)
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _cannot_write(root: Path, step: int, before: int, error: Exception) -> str:
    free = shutil.disk_usage(root).free
    reason = "the disk is full" if free < 1 << 20 or getattr(error, "errno", None) == errno.ENOSPC else str(error).splitlines()[0]
    return (
        f"{root}/step-{step} could not be written: {reason} ({free / 1e9:.2f} GB free there); make room, "
        f"then --resume goes on {f'from step {before}' if before else 'from the start, as no checkpoint was finished'}"
    )


def _check_finite(engine: Any, step: int, before: int) -> None:
    """Every rank looks at its own shards: a policy of NaN must never replace one that can be gone on with."""
    shards = [getattr(p, "ds_tensor", p.detach()) for p in engine.module.parameters()]
    bad = torch.tensor(int(not all(bool(torch.isfinite(t).all()) for t in shards)), device=engine.device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if bad:
        where = f"step {before}, the last checkpoint," if before else "the start, as no checkpoint was finished,"
        raise RunError(
            f"step {step}: the policy's weights are not finite, no checkpoint was written; go on from {where} with --resume "
            "and a lower train.lr"
        )


def latest_step(cfg: Config) -> int:
    """The step that --resume goes on from; 0 where no checkpoint was finished. Raises ConfigError where `latest` is damaged."""
    root = _root(cfg)
    pointer = root / "latest"
    finished = [path.name for path in _finished(root)]
    if not pointer.is_file():
        if len(finished) < 2:  # a kill in the first save leaves one finished and no pointer yet
            return _number(root / finished[0]) if finished else 0
        raise ConfigError(f"{pointer} is missing: write one of {', '.join(finished)} into it, the checkpoint to go on from")
    text = pointer.read_bytes().decode("utf-8", "replace").strip()
    if not _STEP.fullmatch(text) or not (root / text).is_dir():
        known = f"write one of {', '.join(finished)} into it" if finished else "start anew without --resume"
        raise ConfigError(f"{pointer} says {text[:40]!r}, which is no checkpoint in {root}: {known}")
    return _number(root / text)


def check(cfg: Config, step: int) -> bool:
    """Hold `checkpoints/step-N` to its manifest, before any engine starts; each rank reads its own files. Collective.

    True where another number of ranks wrote it: then it stands there anew for this one (`reshard`), and the engine that loads it
    is built to read that. Raises ConfigError, the same on all ranks, where a file is damaged; RunError where there is no room.
    """
    root = _root(cfg)
    folder = root / f"step-{step}"
    lora.check_resumed(folder, cfg.lora)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _damage(folder))
    damaged = [text for text in found if text]
    if damaged:
        others = [path.name for path in _finished(root) if path != folder]
        mend = f"write {others[-1]} into {root}/latest to go on from there" if others else "no other one is left: start anew"
        raise ConfigError(f"{damaged[0]}; the checkpoint cannot be used: copy the file again, or {mend}")
    ranks = _writers(folder)
    if ranks == dist.get_world_size():
        return False
    reshard.make_universal(folder, ranks)
    return True


def _writers(folder: Path) -> int:
    """The number of ranks that wrote a checkpoint."""
    return len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))


def load(engine: Any, cfg: Config, step: int, frozen: Sequence[FrozenModel] = ()) -> None:
    """Load `checkpoints/step-N`, which `check` has passed. Collective. Raises ConfigError where it is for other frozen models."""
    root = _root(cfg)
    folder = root / f"step-{step}"
    anew = engine.load_universal_checkpoint()
    tag = reshard.universal(folder).name if anew else folder.name
    path, _ = engine.load_checkpoint(str(root), tag=tag, load_module_strict=not cfg.lora.rank)  # the rest is the start's
    if path is None:
        raise ConfigError(f"{folder}: DeepSpeed could not load it; remove it and set `latest` to an earlier step")
    if anew:
        reshard.own_steps(engine.optimizer.optimizer)
        reshard.drop_universal(folder)
    for model in _following(frozen):
        ranks = range(_writers(folder)) if anew else [dist.get_rank()]
        files = [_file_of(folder, model, rank) for rank in ranks]
        for file in files:
            if not file.is_file():
                rule = model.rule
                raise ConfigError(f"{file} is missing: the run had no {rule.key}={rule.weights}; resume as it was started")
        parts = [torch.load(file, weights_only=True) for file in files]
        model.load_state(reshard.own_shards(parts, model.params) if anew else parts[0])


def _damage(folder: Path) -> str | None:
    """What is wrong with this rank's part of a checkpoint; None where nothing is."""
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return f"{manifest} is missing or damaged"
    own = {path.name: path for path in _own_files(folder)}
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
        if name in own and _describe(path)[1] != digest:
            return f"{path} is damaged: its bytes are not those that were written (SHA-256)"
    return None


def _following(frozen: Sequence[FrozenModel]) -> list[FrozenModel]:
    return [model for model in frozen if model.rule.follows]


def _file_of(folder: Path, model: FrozenModel, rank: int) -> Path:
    return folder / f"{model.rule.name}_rank{rank}.pt"


def export(engine: Any, cfg: Config, tokenizer: Any) -> None:
    """The policy as an HF directory, `runs/NAME/model`, whole tensors in the training dtype. Collective.

    With LoRA the adapters are merged into it, and by themselves in `runs/NAME/adapter`, as peft's PeftModel.from_pretrained reads
    them onto the starting model.
    """
    lm = engine.module.lm
    weights = whole_state_dict(lm)
    adapter = adapter_state_dict(lm) if cfg.lora.rank else None
    if dist.get_rank() == 0:
        path = cfg.run_dir / "model"
        lm.save_pretrained(str(path), state_dict=weights)
        tokenizer.save_pretrained(str(path))
        if adapter is not None:
            lora.write(cfg.run_dir / "adapter", lm, adapter)
    dist.barrier()


def export_step(run: Path, step: int, base: str, dtype: str) -> Path:
    """The policy of a run's `checkpoints/step-N` as an HF directory, `RUN/model-step-N`, written on the first call. One process.

    base: the folder or hub name of the model that the run started from, which has the configuration and the tokenizer. Raises
    ConfigError where the checkpoint is missing or damaged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, final = run / "checkpoints", run / f"model-step-{step}"
    if final.exists():
        return final
    folder = root / f"step-{step}"
    if not (folder / MANIFEST).is_file():
        known = ", ".join(path.name for path in _finished(root)) or "none"
        raise ConfigError(f"{folder}: no finished checkpoint there; the run has {known}")
    for name, entry in json.loads((folder / MANIFEST).read_text()).items():
        if not (folder / name).is_file() or _describe(folder / name) != entry:
            raise ConfigError(f"{folder / name} is missing or damaged (SHA-256): copy it again, or evaluate another step")
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    _load_trained(lm, folder)
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.save_pretrained(str(temporary), state_dict=whole_state_dict(lm))
    AutoTokenizer.from_pretrained(base).save_pretrained(str(temporary))
    temporary.rename(final)
    return final


def _load_trained(lm: Any, folder: Path) -> None:
    """Put what a checkpoint holds into the model that the run started from: all of its weights, or adapters."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if (folder / lora.CONFIG).is_file():
        lora.attach_saved(lm, folder)
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):  # DeepSpeed's way
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, exclude_frozen_parameters=True)
    assert weights is not None  # of a tag that is there
    missing, unknown = lm.load_state_dict({name.removeprefix("lm."): value for name, value in weights.items()}, strict=False)
    left = {name for name, p in lm.named_parameters() if p.requires_grad} & set(missing)
    assert not left and not unknown, (left, unknown)


def _root(cfg: Config) -> Path:
    return cfg.run_dir / "checkpoints"


def _steps(root: Path) -> list[Path]:
    """The step folders there by rising number, finished or not."""
    return sorted((path for path in root.glob("step-*") if _STEP.fullmatch(path.name)), key=_number)


def _finished(root: Path) -> list[Path]:
    return [path for path in _steps(root) if (path / MANIFEST).is_file()]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _clear_above(root: Path, step: int) -> None:
    """Remove what a kill left unfinished past `step`. A finished one stands there where `latest` was set back: it moves aside."""
    for path in _steps(root):
        if _number(path) > step:
            if (path / MANIFEST).is_file():
                path.rename(aside(root.parent, step) / path.name)
            else:
                _remove(path)
    for path in (*root.glob("*.removing"), *root.glob("*.universal*")):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """In two moves, so that a folder that bears a step's name is never half empty."""
    gone = path.with_name(f"{path.name}.removing")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)
