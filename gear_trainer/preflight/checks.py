"""Everything that can be known to fail before an engine starts, and what `--dry-run` prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gear_kernels import Gear, GearKernelsError
from gear_kernels.methods import INPUTS, METHODS, signals_of
from gear_trainer.config import Config, ConfigError
from gear_trainer.demo.warm_start import check_demonstrations
from gear_trainer.hints import endpoint
from gear_trainer.hints.siblings import Siblings
from gear_trainer.hints.writer import Writer, check_room, templates
from gear_trainer.policy.model import check_model_path, deepspeed_config, known_config, model_sizes, offline_without_hub
from gear_trainer.policy.teacher import check_teacher
from gear_trainer.preflight import memory
from gear_trainer.preflight.machine import check_machine, check_port
from gear_trainer.recipe import make_distillation, parse_credit
from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.engine import engine_class
from gear_trainer.tasks import make_task, task_class
from gear_trainer.tasks.base import DataAway, Task
from gear_trainer.user_code import own_method, said


def check(cfg: Config, away: list[str] | None = None) -> tuple[Task, Any]:
    """The run's task and credit method. Raises ConfigError, TaskError or GearKernelsError.

    away: of a dry run. What the network keeps from this machine is named in it instead of raised, and the task's class stands for
    the task, for it knows turns and tools without the data.
    """
    method = make_method(cfg)
    check_teacher(cfg)
    check_inputs(cfg, method)
    check_model_path(cfg.model.path)
    check_machine(cfg)
    try:
        task = make_task(cfg.task, cfg.seed, cfg.task_args)
    except DataAway as error:
        if away is None:
            raise
        away.append(f"task={cfg.task}: {error}; the checks of its data and prompts are left out")
        task = task_class(cfg.task)
    if cfg.model.path == "builtin:tiny-qwen3":
        if not hasattr(task, "demonstrate"):
            raise ConfigError(
                f"model.path=builtin:tiny-qwen3: task {cfg.task} has no demonstrations to warm it up with; use task=mathapi"
            )
        check_demonstrations(task)
    check_turns(cfg, method, task)
    return task, method


def make_method(cfg: Config) -> Any:
    """The credit method of `credit`, W = 1 where it names a distillation loss alone. Raises ConfigError."""
    name, _ = parse_credit(cfg.credit)
    method = own_method(name, cfg.credit_args) if ":" in name else _known_method(name, cfg)
    allowed = signals_of(method)
    if cfg.signal is not None and cfg.signal not in allowed:
        raise ConfigError(f"signal={cfg.signal}: {name} reads {' or '.join(allowed)}; leave signal out")
    return method


def _known_method(name: str, cfg: Config) -> Any:
    method = METHODS[name]
    fields = {field: getattr(method, field) for field in method.__dataclass_fields__}
    unknown = sorted(set(cfg.credit_args) - set(fields))
    if unknown:
        raise ConfigError(f"credit_args.{unknown[0]}: unknown; {name} takes {', '.join(sorted(fields)) or 'none'}")
    if isinstance(method, Gear) and cfg.signal == "reverse_kl":
        fields["normalizer"] = "max"  # the full KL is never negative: there is nothing below 0 to clip
    try:
        return type(method)(**(fields | cfg.credit_args))
    except GearKernelsError as error:
        raise ConfigError(f"credit_args: {error}") from None


def check_inputs(cfg: Config, method: Any) -> None:
    """Everything that the method reads is at hand. Raises ConfigError."""
    missing = [name for name in method.needs if name not in INPUTS]
    if missing:
        raise ConfigError(f"credit={cfg.credit} reads {', '.join(missing)}, which this trainer does not make: choose another")
    if cfg.writes_references:
        if not {"signal", "teacher_entropy", "forward_kl"} & set(method.needs):
            raise ConfigError(f"writer.enabled: credit={cfg.credit} asks no teacher, so nobody would read references: drop it")
        if sees_sibling(cfg, method):
            raise ConfigError(
                f"teacher.sees=sibling: credit={cfg.credit} has references written for its teacher; drop one of them"
            )
        endpoint.check_settings(cfg.writer)
        templates(cfg.writer)


def sees_sibling(cfg: Config, method: Any) -> bool:
    """Whether the teacher's prompt shows a correct sibling in place of the ground truth."""
    own = getattr(method, "teacher_sees", "ground_truth")
    return (cfg.teacher.sees or own) == "sibling"


def check_turns(cfg: Config, method: Any, task: Task) -> None:
    """A method of turn rewards needs turns, and rewards for them or the outcome at the last one. Raises ConfigError."""
    if "turn_rewards" not in method.needs:
        return
    if task.max_turns < 2:
        raise ConfigError(f"credit={cfg.credit} tells turns apart, and task={cfg.task} has one: choose another method")
    if not (task.turn_rewards or getattr(method, "outcome_in_last_turn", False)):
        raise ConfigError(f"credit={cfg.credit} reads turn rewards, and task={cfg.task} gives none: choose another method")


def warnings(cfg: Config, method: Any) -> list[str]:
    """A line for each setting that works and is likely not meant."""
    divides = isinstance(method, Gear) and method.normalizer != "none"
    if cfg.model.dtype == "bfloat16" and divides and method.signal_floor == 0:
        # measured on the demo's policy, 64 of its rollouts with the teacher's prompt: the largest error of a rollout's signals
        # against float32 is 8e-4 nats (median) to 0.2, and the largest signal of 38 % of the rollouts is below 1e-3
        return [
            "model.dtype=bfloat16 rounds hidden states, so signals are off by about 1e-3 nats: where the teacher has nothing to "
            "say that noise gets the full spread of weights; credit_args.signal_floor=0.001 holds it back"
        ]
    return []


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
    cfg: Config, task: Task, method: Any, chat: Chat, writer_context: int | None = None, sample: int = 64
) -> tuple[int, int]:
    """Longest student and teacher prompt of a sample of the task. Raises ConfigError where no turn would fit behind one, or no
    attempts into the writer's prompt (`writer_context`: an endpoint's tokens)."""
    problems = [task.train_problem(i) for i in range(sample)]
    student = max(len(chat.prompt_ids(p.messages, p.tools)) for p in problems)
    teacher = max(len(chat.prompt_ids(p.teacher_messages, p.tools)) for p in problems)
    if student + 1 > cfg.rollout.max_model_len:
        raise ConfigError(
            f"rollout.max_model_len={cfg.rollout.max_model_len}: a prompt has {student} tokens; set it to "
            f"{student + task.max_turns * cfg.rollout.max_new_tokens} or more"
        )
    if cfg.writes_references:
        writer = Writer(cfg, chat, None, writer_context or cfg.writer.max_model_len or cfg.rollout.max_model_len)
        longest = max(problems, key=lambda p: len(chat.prompt_ids(p.messages, p.tools)))
        check_room(writer, longest, cfg.rollout.max_new_tokens)
        teacher = writer.longest_teacher_prompt(longest)
    if sees_sibling(cfg, method):
        bare = max(len(Siblings(chat).prompt(p, "")) for p in problems)
        teacher = bare + min(task.max_turns * cfg.rollout.max_new_tokens, cfg.rollout.max_model_len - student)
    return student, teacher


def lengths(cfg: Config, task: Task, prompts: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """Longest prompt of student and of teacher, and longest response over all turns; bounds where no prompt was looked at."""
    r = cfg.rollout
    student, teacher = prompts or (r.max_model_len - r.max_new_tokens,) * 2
    return (student, teacher), min(task.max_turns * r.max_new_tokens, r.max_model_len - student)


def geometry(cfg: Config, task: Task, prompts: tuple[int, int] | None) -> list[tuple[str, str]]:
    """The step's shape, as rows of a table; upper bounds where lengths are not known before sampling."""
    r, t = cfg.rollout, cfg.train
    (student, teacher), response = lengths(cfg, task, prompts)
    rollouts = r.prompts_per_step * r.group_size
    per_rank = rollouts // cfg.world_size
    wide = max(student, teacher) + response
    at_once = max(1, t.tokens_per_micro_batch // wide)
    alone = max(1, t.tokens_per_micro_batch // (student + response))
    again = f"; up to {cfg.gen_batches} batches for mixed groups" if cfg.gen_batches > 1 else ""
    writer = cfg.writer.url or "the policy itself"
    measured = "" if prompts else " (tokenizer not at hand: bound by max_model_len)"
    return [
        ("ranks", f"{cfg.world_size}, one vLLM engine each"),
        ("prompts x group", f"{r.prompts_per_step} x {r.group_size} = {rollouts} rollouts a step, {per_rank} a rank{again}"),
        ("prompt tokens", f"student <= {student}, teacher <= {teacher}{measured}"),
        ("response tokens", f"<= {response} in {task.max_turns} turn(s)"),
        ("tokens a step", f"<= {rollouts * (student + response):,} student, {rollouts * wide:,} teacher"),
        ("micro-batches a rank", f"<= {-(-per_rank // at_once)} to score, {-(-per_rank // alone)} to train"),
        ("optimizer steps", f"{t.updates_per_step} a step, {t.steps * t.updates_per_step} in all"),
        *([("references", f"<= {cfg.writer.max_tokens} tokens, by {writer}")] if cfg.writes_references else []),
    ]


def dry_run(cfg: Config, sold_as: float | None = None) -> None:
    """Check all that a run checks, without the network where it cannot be reached, and print the plan.

    sold_as: GB of the cards to plan for; None: those of this machine. Raises ConfigError where memory would not do.
    """
    away: list[str] = []
    offline_without_hub()
    task, method = check(cfg, away)
    print_plan(cfg, task, method, sold_as)
    for line in away:
        print(f"left out: {line}")


def print_plan(cfg: Config, task: Task, method: Any, sold_as: float | None = None) -> None:
    """The resolved run. Loads a tokenizer and a model configuration where they are on this machine, never weights.

    Raises ConfigError at the end where the memory plan does not fit.
    """
    import yaml
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    out.print(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), markup=False)
    out.print(f"credit method: {method}", markup=False)
    if distillation := make_distillation(cfg):
        out.print(f"distillation: {distillation}", markup=False)
    prompts = None
    if Path(cfg.model.path).is_dir() and isinstance(task, Task):
        from transformers import AutoTokenizer

        chat = Chat(AutoTokenizer.from_pretrained(cfg.model.path), task.tools, cfg.chat_template_args)
        prompts = check_prompts(cfg, task, method, chat)
    shape = Table(title="step geometry", title_justify="left", show_header=False, box=None)
    for row in geometry(cfg, task, prompts):
        shape.add_row(*row)
    out.print(shape)
    planned = _planned(out, cfg, method, lengths(cfg, task, prompts), sold_as)
    out.print(yaml.safe_dump({"deepspeed": deepspeed_config(cfg)}, sort_keys=False), markup=False)
    out.print(engine_class(cfg).describe(cfg), markup=False)
    for line in warnings(cfg, method):
        out.print(f"warning: {line}", markup=False, soft_wrap=True)
    if planned:
        _check_memory(out, *planned, cfg)


def _planned(
    out: Any, cfg: Config, method: Any, longest: tuple[tuple[int, int], int], sold_as: float | None
) -> tuple[memory.Planner, memory.Plan] | None:
    """The memory plan, printed; None where the model's sizes are not at hand, or its code does not run without memory."""
    sizes = known_config(cfg.model.path) and model_sizes(cfg.model.path)
    if not sizes:
        return None
    try:
        planner = memory.Planner(cfg, method, sizes, *longest)
        plan = planner.plan(cfg, memory.card(cfg, sold_as))
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        out.print(f"memory plan left out: {said(error)}", markup=False, soft_wrap=True)
        return None
    out.print()
    out.print(memory.table(plan))
    for line in memory.notes(plan, cfg):
        out.print(line, markup=False, soft_wrap=True)
    out.print()
    return planner, plan


def _check_memory(out: Any, planner: memory.Planner, plan: memory.Plan, cfg: Config) -> None:
    try:
        memory.check_plan(planner, plan, cfg)
    except ConfigError as error:
        if not plan.card.assumed:
            raise
        out.print(f"warning: {error}", markup=False, soft_wrap=True)
