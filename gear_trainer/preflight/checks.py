"""Everything that can be known to fail before an engine starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import cast

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.evaluation import check_sets
from gear_trainer.hints import endpoint
from gear_trainer.hints.siblings import Siblings
from gear_trainer.hints.writer import Writer, check_room, templates
from gear_trainer.hints.wrong_answer import draw
from gear_trainer.policy import lora
from gear_trainer.policy.hub import check_model_path, known_config, meta_model, model_sizes, tiny_seed
from gear_trainer.policy.zero import deepspeed_config
from gear_trainer.preflight.machine import check_machine, check_port
from gear_trainer.recipe import Recipe, resolve
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.trackers import check_trackers
from gear_trainer.tasks import make_task, task_class
from gear_trainer.tasks.base import DataAway, Task
from gear_trainer.tasks.demonstrations import check_demonstrations


def check(cfg: Config, away: list[str] | None = None) -> tuple[Task, Recipe]:
    """The run's task and recipe. Raises ConfigError, TaskError or GearKernelsError.

    away: of a dry run. What the network keeps from this machine is named in it instead of raised, and the task's class stands for
    the task, for it knows turns and tools without the data.
    """
    recipe = resolve(cfg)
    check_frozen(cfg, recipe)
    check_references(cfg, recipe)
    check_model_path(cfg.model.path)
    check_lora(cfg)
    check_trackers(cfg)
    check_machine(cfg)
    try:
        task = make_task(cfg.task, cfg.seed, cfg.task_args)
    except DataAway as error:
        if away is None:
            raise
        away.append(f"task={cfg.task}: {error}; the checks of its data and prompts are left out")
        task = cast(Task, task_class(cfg.task))
    check_sets(cfg, away)
    if tiny_seed(cfg.model.path, cfg.seed) is not None:
        if not hasattr(task, "demonstrate"):
            raise ConfigError(
                f"model.path={cfg.model.path}: task {cfg.task} has no demonstrations to warm it up with; use task=mathapi"
            )
        check_demonstrations(task)
    check_turns(cfg, recipe, task)
    check_truth(cfg, recipe, task)
    return task, recipe


# Where a parameter is not just one shard a rank in memory; a copy that follows the policy shard by shard would go stale.
_UNFOLLOWED = {"zero_hpz_partition_size": 1, "zero_quantized_nontrainable_weights": False, "mics_shard_size": -1}  # and off


def check_frozen(cfg: Config, recipe: Recipe) -> None:
    """Raises ConfigError where a model that follows the policy does not go with the run's DeepSpeed options, or a reference model
    of its own path is not there or has another vocabulary."""
    if recipe.kl and recipe.kl.reference.path:
        check_reference(cfg, recipe.kl.reference.path)
    following = next((model for model in recipe.frozen if model.follows), None)
    if following is None:
        return
    zero = deepspeed_config(cfg)["zero_optimization"]
    found = [name for name, off in _UNFOLLOWED.items() if zero.get(name, off) != off]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        found.append("offload_param.device=nvme")
    if found:
        raise ConfigError(
            f"{following.key}={following.weights}: does not go with deepspeed.zero_optimization.{found[0]}; "
            f"leave it out, or use {following.key}=initial"
        )


def check_reference(cfg: Config, path: str) -> None:
    """A reference model is there and scores the policy's tokens. Raises ConfigError."""
    check_model_path(path, "kl.reference")
    sizes = [(model_sizes(name) or {}).get("vocab_size") for name in (path, cfg.model.path)]
    shared = cfg.model.path.startswith("builtin:")  # its vocabulary is the task's
    if not shared and None not in sizes and sizes[0] != sizes[1]:
        raise ConfigError(
            f"kl.reference={path}: its vocabulary has {sizes[0]} tokens, that of model.path={cfg.model.path} {sizes[1]}: "
            "give a model of the same tokenizer"
        )


def check_lora(cfg: Config) -> None:
    """Raises ConfigError where LoRA cannot be had, or names no layer of a model whose configuration is at hand."""
    if not cfg.lora.rank:
        return
    if find_spec("peft") is None:
        raise ConfigError(f"lora.rank={cfg.lora.rank} needs peft, which is not installed: pip install peft, or set lora.rank=0")
    if known_config(cfg.model.path) is not None:
        lora.check_targets(meta_model(cfg.model.path, cfg.model.dtype, cfg.model.attn_implementation), cfg.lora)


def check_references(cfg: Config, recipe: Recipe) -> None:
    """Check that a writer of references can use what it is told. Raises ConfigError or TaskError."""
    if recipe.references == "writer":
        endpoint.check_settings(cfg.writer)
        templates(cfg.writer)


def check_turns(cfg: Config, recipe: Recipe, task: Task) -> None:
    """A method of turn rewards needs turns, and rewards for them or the outcome at the last one. Raises ConfigError."""
    if not recipe.by_turn:
        return
    if task.max_turns < 2:
        raise ConfigError(f"credit={cfg.credit} tells turns apart, and task={cfg.task} has one: choose another method")
    if not (task.turn_rewards or recipe.declared.outcome_in_last_turn):
        raise ConfigError(f"credit={cfg.credit} reads turn rewards, and task={cfg.task} gives none: choose another method")


def check_truth(cfg: Config, recipe: Recipe, task: Task) -> None:
    """A teacher that sees the ground truth needs a task that knows it. Raises ConfigError."""
    asked = recipe.needs_teacher or recipe.distillation is not None
    if asked and recipe.references is None and not task.shows_truth:
        raise ConfigError(
            f"credit={cfg.credit} has a teacher that sees the ground truth, and task={cfg.task} was not told where it is: "
            "set task_args.teacher_field, or choose a method without a teacher, as credit=grpo"
        )


def warnings(cfg: Config, recipe: Recipe) -> list[str]:
    """A line for each setting that works and is likely not meant."""
    found = []
    if cfg.train.policy_loss == "gspo" and min(cfg.train.clip_low, cfg.train.clip_high) > 0.01:
        found.append(
            "train.policy_loss=gspo: a sequence's ratio stays close to 1, and at "
            f"train.clip_low={cfg.train.clip_low:g} train.clip_high={cfg.train.clip_high:g} hardly ever clipped; "
            "the paper has 3e-4 and 4e-4"
        )
    if cfg.lora.rank and cfg.train.lr < 5e-6:
        found.append(
            f"train.lr={cfg.train.lr:g} is a rate for all weights: adapters, whose product begins at 0, take about ten times that"
        )
    if recipe.kl and recipe.kl.estimator == "k1":
        found.append("kl.estimator=k1 has no gradient on average, as a loss it is noise; k2 has the KL's, k3 is GRPO's")
    if cfg.model.dtype == "bfloat16" and recipe.stretches_noise:
        # measured on the demo's policy, 64 of its rollouts with the teacher's prompt: the largest error of a rollout's signals
        # against float32 is 8e-4 nats (median) to 0.2, and the largest signal of 38 % of the rollouts is below 1e-3
        found.append(
            "model.dtype=bfloat16 rounds hidden states, so signals are off by about 1e-3 nats: where the teacher has nothing to "
            "say that noise gets the full spread of weights; credit_args.signal_floor=0.001 holds it back"
        )
    return found


def check_launch(cfg: Config) -> None:
    """A launcher started as many ranks as the run is planned for, and they can meet. Raises ConfigError."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ:
        raise ConfigError(
            f"no launcher started this, so it has no rank: use `deepspeed --num_gpus {cfg.world_size} gear_trainer/run.py ...` "
            "or torchrun, with one process too (world_size=1); --dry-run needs none"
        )
    if launched != cfg.world_size:
        raise ConfigError(
            f"world_size={cfg.world_size}, but {launched} process(es) were launched; start with "
            f"`deepspeed --num_gpus {cfg.world_size} gear_trainer/run.py ...` or set world_size={launched}"
        )
    check_port()


def check_prompts(
    cfg: Config, task: Task, recipe: Recipe, chat: Chat, writer_context: int | None = None, sample: int = 64
) -> tuple[int, int]:
    """Longest student and teacher prompt of a sample of the task. Raises ConfigError where no turn would fit behind one, or no
    attempts into the writer's prompt (`writer_context`: an endpoint's tokens)."""
    problems = [draw(task, i, recipe.wrong_answer) for i in range(sample)]
    student = max(len(chat.prompt_ids(p.messages, p.tools, p.tags)) for p in problems)
    teacher = max(len(chat.prompt_ids(p.teacher_messages, p.tools, p.tags)) for p in problems)
    if student + 1 > cfg.rollout.max_model_len:
        raise ConfigError(
            f"rollout.max_model_len={cfg.rollout.max_model_len}: a prompt has {student} tokens; set it to "
            f"{student + task.max_turns * cfg.rollout.max_new_tokens} or more"
        )
    if recipe.references == "writer":
        writer = Writer(cfg, chat, None, writer_context or cfg.writer.max_model_len or cfg.rollout.max_model_len)
        longest = max(problems, key=lambda p: len(chat.prompt_ids(p.messages, p.tools, p.tags)))
        check_room(writer, longest, cfg.rollout.max_new_tokens)
        teacher = writer.longest_teacher_prompt(longest)
    if recipe.references == "siblings":
        bare = max(len(Siblings(chat).prompt(p, "")) for p in problems)
        teacher = bare + min(task.max_turns * cfg.rollout.max_new_tokens, cfg.rollout.max_model_len - student)
    return student, teacher


def lengths(cfg: Config, task: Task, prompts: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """Longest prompt of student and of teacher, and longest response over all turns; bounds where no prompt was looked at."""
    r = cfg.rollout
    student, teacher = prompts or (r.max_model_len - r.max_new_tokens,) * 2
    return (student, teacher), min(task.max_turns * r.max_new_tokens, r.max_model_len - student)
