"""Entry point: `deepspeed gear_trainer/run.py --config FILE [key=value ...]`, or `torchrun ... -m gear_trainer.run`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # a launcher puts this folder first: our config.py or model.py would shadow other packages' modules

from gear_trainer.config import Config, ConfigError, load_config


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gear_trainer", description="Train an LLM agent with GRPO and token-level credit.")
    parser.add_argument("--config", required=True, help="YAML file, see gear_trainer/configs")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the resolved run, start nothing")
    parser.add_argument("--card", type=float, metavar="GB", help="of a dry run: plan memory for GPUs sold as 80, 141, ... GB")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example train.lr=1e-5")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    _share_cores()
    _quiet()
    try:
        cfg = load_config(args.config, args.overrides)
        return _dry_run(cfg, args.card) if args.dry_run else _train(cfg, args.resume)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("gear_trainer: interrupted before training began", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """Say once, on one of the ranks, why the run ends; what the user can mend is one line. Returns the exit code."""
    from gear_kernels import GearKernelsError
    from gear_trainer.errors import RunError
    from gear_trainer.runs.ranks import Beats
    from gear_trainer.tasks.base import TaskError

    beats, rank = Beats.running, int(os.environ.get("RANK", 0))
    line = beats.blame(error) if beats else None
    if line:
        beats.leave(line)
    if beats:
        beats.fail(error)
    mendable = isinstance(error, (ConfigError, TaskError, GearKernelsError))
    if mendable or isinstance(error, RunError):
        said = f"gear_trainer: {error}\n"
    elif getattr(error, "errno", None) == errno.ENOSPC:
        said = f"gear_trainer: the disk is full ({error.filename or 'a file of the run'}): make room, then --resume goes on\n"
    else:
        said = "".join(traceback.format_exception(error))
    if not rank or _speaks(beats, error, mendable):
        print((f"[rank {rank}] " if rank else "") + said, end="", file=sys.stderr, flush=True)
    return 2 if mendable else 1


def _speaks(beats, error: Exception, mendable: bool) -> bool:
    """Whether a rank other than 0 has something to say that rank 0 does not: the same error is most often raised on all."""
    import torch.distributed as dist

    time.sleep(3)  # a launcher kills all ranks once one has exited: let rank 0 print first
    if not dist.is_initialized():
        return not mendable  # what is checked by then is the same on all ranks; a surprise is not
    return beats is None or not beats.said_by(0, error)


def _share_cores() -> None:
    """Each rank its share of the cores, before torch makes its thread pool (the deepspeed launcher leaves it to us)."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


def _quiet() -> None:
    """Leave the terminal to the run: other libraries' deprecations and loading bars are 30 lines a rank."""
    import logging
    import warnings

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|vllm\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def _dry_run(cfg: Config, sold_as: float | None) -> int:
    from gear_trainer.preflight.checks import dry_run

    dry_run(cfg, sold_as)
    return 0


def _train(cfg: Config, resume: bool) -> int:
    from gear_trainer.preflight.checks import check, check_launch
    from gear_trainer.runs.files import lock_run
    from gear_trainer.runs.interrupts import Interrupts

    check_launch(cfg)
    task, method = check(cfg)
    interrupts = Interrupts()
    lock = lock_run(cfg) if int(os.environ["RANK"]) == 0 else None  # before anything that takes time, or that is written
    _set_environment(cfg)
    from gear_trainer.hints.endpoint import connect
    from gear_trainer.policy.model import check_hub_model, resolve_model_path

    check_hub_model(cfg.model.path)
    # every rank asks for itself, as it will during the run
    endpoint = connect(cfg.writer, cfg.rollout.max_model_len) if cfg.writes_references and cfg.writer.url else None
    model_path = resolve_model_path(cfg, task)  # before the process group: a warm start outlasts a collective's patience
    trainer, start = _build(cfg, task, method, model_path, endpoint, interrupts, resume)
    done = trainer.train(start)
    code = _finish(cfg, trainer, done)
    if lock:
        lock.release()
    return code


def _set_environment(cfg: Config) -> None:
    from gear_trainer.policy.model import choose_accelerator
    from gear_trainer.rollout.engine import engine_class

    engine_class(cfg).prepare(cfg)
    choose_accelerator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _build(cfg: Config, task, method, model_path: str, endpoint, interrupts, resume: bool):
    """Process group, then vLLM (it would make a group of its own), then the ZeRO-3 engine."""
    import logging

    import deepspeed
    import deepspeed.ops
    import torch
    import torch.distributed as dist
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from gear_trainer.hints.siblings import Siblings
    from gear_trainer.hints.writer import PolicyWriter, Writer
    from gear_trainer.policy import checkpoint
    from gear_trainer.policy.model import build_engine
    from gear_trainer.policy.teacher import Teacher, has_own_weights
    from gear_trainer.preflight.checks import check_prompts, sees_sibling, warnings
    from gear_trainer.rollout.chat import Chat
    from gear_trainer.rollout.engine import make_engine
    from gear_trainer.runs.files import prepare_run_dir
    from gear_trainer.runs.ranks import Beats
    from gear_trainer.train.loop import Trainer

    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        # init_distributed would compile a C++ op (100 CPU seconds); a killed build leaves a lock that hangs every later run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    Beats(cfg.run_dir, dist.get_rank(), cfg.world_size, cfg.rank_timeout).start()
    chat = Chat(AutoTokenizer.from_pretrained(model_path), task.tools, cfg.chat_template_args)
    check_prompts(cfg, task, method, chat, endpoint and endpoint.context)
    start = checkpoint.latest_step(cfg) if resume else 0
    if start:
        checkpoint.check(cfg, start)
    if dist.get_rank() == 0:
        prepare_run_dir(cfg, resume, start)
        print(*(f"warning: {line}\n" for line in warnings(cfg, method)), sep="", end="")
        print(f"{cfg.run_dir}: starting vLLM and DeepSpeed on {cfg.world_size} rank(s)", flush=True)
    dist.barrier()
    sampler = make_engine(cfg, model_path)
    sampler.sleep()  # DeepSpeed builds where its KV cache was; the first push wakes it
    dist.barrier()  # ranks drift while vLLM starts; DeepSpeed's own first collective has a short patience
    engine = build_engine(cfg, model_path)
    teacher = Teacher(cfg, engine, model_path) if has_own_weights(cfg, method) else None
    if start:
        checkpoint.load(engine, cfg, start, teacher)
    model = endpoint or PolicyWriter(cfg, chat, sampler)
    writer = Writer(cfg, chat, model, model.context) if cfg.writes_references else None
    writer = Siblings(chat) if sees_sibling(cfg, method) else writer
    return Trainer(cfg, task, chat, method, engine, sampler, teacher, writer, interrupts), start


def _finish(cfg: Config, trainer, done: int) -> int:
    import torch.distributed as dist

    from gear_trainer.policy import checkpoint
    from gear_trainer.report.build import write_report
    from gear_trainer.runs.ranks import Beats

    finished = done == cfg.train.steps
    if finished and cfg.checkpoint.export:
        checkpoint.export(trainer.engine, cfg, trainer.chat.tokenizer)
    if dist.get_rank() == 0:
        if finished:
            print(write_report(cfg.run_dir), flush=True)
        else:
            why = f" ({trainer.interrupts.why})" if trainer.interrupts.why else ""
            print(f"stopped after step {done}{why}; --resume goes on from there", flush=True)
    Beats.running.stop()  # from here on a rank that ends is not lost
    dist.barrier()  # vLLM's own shutdown at exit takes the process groups down
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
