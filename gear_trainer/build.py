"""A run put together in the one order that works: process group, rollout engine, ZeRO-3 engine, teacher, trainer."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.policy.hub import check_model_path, tiny_seed
from gear_trainer.recipe import Recipe
from gear_trainer.runs.interrupts import Interrupts
from gear_trainer.tasks import make_task
from gear_trainer.tasks.base import Task

if TYPE_CHECKING:
    from gear_trainer.evaluation import HeldOut
    from gear_trainer.rollout import Engine
    from gear_trainer.rollout.chat import Chat


def resolve_model_path(cfg: Config, task: Task) -> str:
    """A local directory or hub name for `model.path`; builtin: models are made on first use and cached. Raises ConfigError."""
    spec = cfg.model.path
    if (seed := tiny_seed(spec, cfg.seed)) is not None:
        from gear_trainer.demo.warm_start import ensure_warm_start

        own = task if seed == cfg.seed else make_task(cfg.task, seed, cfg.task_args)
        return str(ensure_warm_start(own, seed, Path(cfg.cache_dir)))
    if spec == "builtin:smollm2":
        from gear_trainer.demo.smollm2 import ensure_smollm2

        try:
            return str(ensure_smollm2(Path(cfg.cache_dir)))
        except ModuleNotFoundError as error:
            raise ConfigError(f"model.path={spec}: {error}") from None
    check_model_path(spec)
    return spec


def set_environment(cfg: Config) -> None:
    """Settle the process' GPU and what the engines and tokenizers read of the environment, before they are imported."""
    from gear_trainer.policy.zero import choose_accelerator
    from gear_trainer.rollout.engine import engine_class

    engine_class(cfg).prepare(cfg)
    choose_accelerator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def alone(command: str = "evaluate") -> None:
    """Make this process the only rank, as vLLM's launcher wants to read it. Raises ConfigError under a launcher of several."""
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ConfigError(f"{command} is one process, but {launched} were launched: start it without a launcher")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        os.environ.setdefault(name, str(value))


def prepare_evaluation(
    cfg: Config, base: str, run: Path | None, step: int | None
) -> tuple[list[HeldOut], Callable[[], Engine], str]:
    """The held-out sets, what makes the engine, and the model's folder or hub name, as of `prepare_model`."""
    from gear_trainer.evaluation import sets_of

    task, chat, engine, path = prepare_model(cfg, base, run, step)
    return sets_of(cfg, task, chat), engine, path


def prepare_model(cfg: Config, base: str, run: Path | None, step: int | None) -> tuple[Task, Chat, Callable[[], Engine], str]:
    """The task, the model's chat, what makes its engine, and its folder or hub name; all is checked that can be before.

    base: model.path as the run was given it; run, step: of a checkpoint, whose model is written beside it on first use. Raises
    ConfigError or TaskError.
    """
    from transformers import AutoTokenizer

    from gear_trainer.policy.hub import check_hub_model, model_sizes
    from gear_trainer.rollout.chat import Chat
    from gear_trainer.rollout.engine import engine_class, make_engine
    from gear_trainer.tasks import make_task

    task = make_task(cfg.task, cfg.seed, cfg.task_args)
    check_hub_model(cfg.model.path)
    if run is not None and step is not None:
        from gear_trainer.policy.checkpoint import export_step

        of_run = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": base})})
        path = str(export_step(run, step, resolve_model_path(of_run, task), cfg.model.dtype))
    else:
        path = resolve_model_path(cfg, task)
    engine_class(cfg).check(cfg, model_sizes(path))
    chat = Chat(AutoTokenizer.from_pretrained(path), task.tools, cfg.chat_template_args)
    return task, chat, lambda: make_engine(cfg, path), path


def build(
    cfg: Config, task: Task, recipe: Recipe, model_path: str, endpoint: Any, interrupts: Interrupts | None, resume: bool
) -> tuple[Any, int]:
    """The trainer, and the step that it goes on from. Collective.

    endpoint: the connected writer of references, None where the policy writes or nobody does. Raises ConfigError where the run
    cannot work with what is seen only now: the tokenizer's lengths, the card's memory, the checkpoint.
    """
    import torch.distributed as dist

    from gear_trainer.policy import checkpoint
    from gear_trainer.policy.frozen import frozen_model, shares_weights
    from gear_trainer.policy.packing import settle
    from gear_trainer.policy.zero import build_engine
    from gear_trainer.rollout.engine import make_engine
    from gear_trainer.runs.files import RunFiles
    from gear_trainer.train.loop import Trainer
    from gear_trainer.train.watch import Watch

    _meet(cfg)
    cfg, why_padded = settle(cfg, recipe, model_path)
    chat, yardsticks = _checked(cfg, task, recipe, model_path, endpoint)
    start = checkpoint.latest_step(cfg) if resume else 0
    resharded = bool(start) and checkpoint.check(cfg, start)
    files = None
    if dist.get_rank() == 0:
        _announce(cfg, recipe, why_padded, resume, start)
        files = RunFiles(cfg, start)  # a tracker that does not start is told of before the engines do
    dist.barrier()
    sampler = make_engine(cfg, model_path)
    sampler.sleep()  # DeepSpeed builds where its KV cache was; the first push wakes it
    dist.barrier()  # ranks drift while vLLM starts; DeepSpeed's own first collective has a short patience
    beside = tuple(rule.name for rule in recipe.frozen if rule.follows and shares_weights(cfg, rule))
    engine = build_engine(cfg, model_path, beside, resharded)
    frozen = {rule.name: frozen_model(cfg, engine, model_path, rule) for rule in recipe.frozen}
    if start:
        checkpoint.load(engine, cfg, start, tuple(frozen.values()))
    references = _references(cfg, recipe, chat, endpoint, sampler)
    watch = Watch(cfg, chat, start, files, yardsticks)
    return Trainer(cfg, recipe, task, chat, engine, sampler, frozen, references, interrupts, watch), start


def _meet(cfg: Config) -> None:
    """The process group, before vLLM: it would make a group of its own. Collective. Raises RunError where not all ranks come."""
    import deepspeed
    import deepspeed.ops
    import torch
    import torch.distributed as dist
    from deepspeed.constants import default_pg_timeout
    from transformers.utils import logging as transformers_logging

    from gear_trainer.runs.ranks import Beats

    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        # init_distributed would compile a C++ op (100 CPU seconds); a killed build leaves a lock that hangs every later run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # a rank that hangs is told of, with the stacks of all, before torch gives up the collective that the others wait in
    patience = max(default_pg_timeout, timedelta(seconds=cfg.rank_timeout + 60))
    try:
        deepspeed.init_distributed(verbose=False, timeout=patience)
    except dist.DistError as error:  # its text is a page of the store's C++ stack
        where, why = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")), str(error).splitlines()[0]
        raise RunError(
            f"the {cfg.world_size} ranks did not meet at {where} ({why}): see what the other machines' ranks say; all of them "
            "must reach that address, within the minutes of DEEPSPEED_TIMEOUT"
        ) from error
    Beats(cfg.run_dir, dist.get_rank(), cfg.world_size, cfg.rank_timeout).start()


def _checked(cfg: Config, task: Task, recipe: Recipe, model_path: str, endpoint: Any) -> tuple[Any, Any]:
    """The model's chat, once its prompts fit into the context and the run into the card, and what the run is held against.

    Raises ConfigError.
    """
    from transformers import AutoTokenizer

    from gear_trainer.preflight.checks import check_prompts, lengths
    from gear_trainer.preflight.memory import check_start
    from gear_trainer.preflight.speed import model_cost
    from gear_trainer.rollout.chat import Chat
    from gear_trainer.train.watch import Yardsticks

    chat = Chat(AutoTokenizer.from_pretrained(model_path), task.tools, cfg.chat_template_args)
    prompts = check_prompts(cfg, task, recipe, chat, endpoint and endpoint.context)
    found = check_start(cfg, recipe, lengths(cfg, task, prompts))
    if not found:
        return chat, None
    planner, plan = found
    return chat, Yardsticks(plan.of_a_step(), model_cost(planner.lm, cfg.model.dtype))


def _announce(cfg: Config, recipe: Recipe, why_padded: str | None, resume: bool, start: int) -> None:
    """Make the run's folder and say what starts; rank 0's."""
    from gear_trainer.preflight.checks import warnings
    from gear_trainer.runs.files import prepare_run_dir

    prepare_run_dir(cfg, resume, start)
    print(*(f"warning: {line}\n" for line in warnings(cfg, recipe)), sep="", end="")
    sequences = f"padded ({why_padded})" if why_padded else "packed"
    print(f"{cfg.run_dir}: starting vLLM and DeepSpeed on {cfg.world_size} rank(s), sequences {sequences}", flush=True)


def _references(cfg: Config, recipe: Recipe, chat: Any, endpoint: Any, sampler: Any) -> Any:
    """Who shows the teacher something in place of the ground truth, or None."""
    from gear_trainer.hints.siblings import Siblings
    from gear_trainer.hints.writer import PolicyWriter, Writer

    if recipe.references == "siblings":
        return Siblings(chat, recipe.wrong_hint)
    if recipe.references is None:
        return None
    model = endpoint or PolicyWriter(cfg, chat, sampler)
    return Writer(cfg, chat, model, model.context)


def finish(cfg: Config, trainer: Any, done: int) -> int:
    """Export and report a run that ended after step `done`. Returns the exit code. Collective."""
    import torch.distributed as dist

    from gear_trainer.policy import checkpoint
    from gear_trainer.report.build import write_report
    from gear_trainer.runs.files import note_end
    from gear_trainer.runs.ranks import Beats

    finished = done == cfg.train.steps
    if finished and cfg.checkpoint.export:
        checkpoint.export(trainer.engine, cfg, trainer.chat.tokenizer)
    if dist.get_rank() == 0:
        note_end(cfg.run_dir, "finished" if finished else "stopped", done, trainer.interrupts.why)  # the page says it too
        if finished:
            print(write_report(cfg.run_dir), flush=True)
        else:
            why = f" ({trainer.interrupts.why})" if trainer.interrupts.why else ""
            print(f"stopped after step {done}{why}; --resume goes on from there", flush=True)
    assert Beats.running is not None  # since the ranks met
    Beats.running.stop()  # from here on a rank that ends is not lost
    dist.barrier()  # vLLM's own shutdown at exit takes the process groups down
    return 0 if finished else 130
