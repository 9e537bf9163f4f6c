"""The dry run (`plan`, or `--dry-run`) prints the resolved run, the shape of a step, memory, both engines' configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.policy.hub import offline_without_hub
from gear_trainer.policy.packing import UNKNOWN, why_padded
from gear_trainer.policy.zero import deepspeed_config
from gear_trainer.preflight import memory
from gear_trainer.preflight.checks import check, check_prompts, lengths, warnings
from gear_trainer.recipe import Recipe
from gear_trainer.rollout.chat import Chat
from gear_trainer.rollout.engine import engine_class
from gear_trainer.tasks.base import Task


def geometry(cfg: Config, recipe: Recipe, task: Task, prompts: tuple[int, int] | None) -> list[tuple[str, str]]:
    """The step's shape, as rows of a table; upper bounds where lengths are not known before sampling."""
    r, t = cfg.rollout, cfg.train
    (student, teacher), response = lengths(cfg, task, prompts)
    rollouts = r.prompts_per_step * r.group_size
    per_rank = rollouts // cfg.world_size
    wide = max(student, teacher) + response
    at_once = max(1, t.tokens_per_micro_batch // wide)
    alone = max(1, t.tokens_per_micro_batch // (student + response))
    again = f"; up to {recipe.gen_batches} batches for mixed groups" if recipe.gen_batches > 1 else ""
    writer = cfg.writer.url or "the policy itself"
    measured = "" if prompts else " (tokenizer not at hand: bound by max_model_len)"
    return [
        ("ranks", f"{cfg.world_size}, one vLLM engine each"),
        ("prompts x group", f"{r.prompts_per_step} x {r.group_size} = {rollouts} rollouts a step, {per_rank} a rank{again}"),
        ("prompt tokens", f"student <= {student}, teacher <= {teacher}{measured}"),
        ("response tokens", f"<= {response} in {task.max_turns} turn(s)"),
        ("tokens a step", f"<= {rollouts * (student + response):,} student, {rollouts * wide:,} teacher"),
        ("sequences", _sequences(cfg, recipe)),
        ("micro-batches a rank", f"<= {-(-per_rank // at_once)} to score, {-(-per_rank // alone)} to train"),
        ("optimizer steps", f"{t.updates_per_step} a step, {t.steps * t.updates_per_step} in all"),
        *([("references", f"<= {cfg.writer.max_tokens} tokens, by {writer}")] if recipe.references == "writer" else []),
    ]


def _sequences(cfg: Config, recipe: Recipe) -> str:
    why = why_padded(cfg, recipe, memory.for_gpu(cfg))
    if why == UNKNOWN:
        return f"packed where the model can: {why}"
    return f"padded: {why}" if why else "packed: no padding"


def dry_run(cfg: Config, sold_as: float | None = None) -> None:
    """Check all that a run checks, without the network where it cannot be reached, and print the plan.

    sold_as: GB of the cards to plan for; None: those of this machine. Raises ConfigError where memory would not do.
    """
    away: list[str] = []
    offline_without_hub()
    task, recipe = check(cfg, away)
    print_plan(cfg, task, recipe, sold_as)
    for line in away:
        print(f"left out: {line}")


def print_plan(cfg: Config, task: Task, recipe: Recipe, sold_as: float | None = None) -> None:
    """The resolved run. Loads a tokenizer and a model configuration where they are on this machine, never weights.

    Raises ConfigError at the end where the memory plan does not fit.
    """
    import yaml
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    out.print(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), markup=False)
    out.print(f"credit method: {recipe.method}", markup=False)
    if recipe.distillation:
        until = f" alone up to step {recipe.until}, the method alone after it" if recipe.until else ""
        out.print(f"distillation{until}: {recipe.distillation}", markup=False)
    if recipe.kl:
        shared = ", the teacher's copy" if recipe.kl.shared else ""
        out.print(f"reference model: {cfg.kl.reference}{shared}, {recipe.kl.coefficient:g} x {recipe.kl.estimator}", markup=False)
    prompts = None
    if Path(cfg.model.path).is_dir() and isinstance(task, Task):
        from transformers import AutoTokenizer

        chat = Chat(AutoTokenizer.from_pretrained(cfg.model.path), task.tools, cfg.chat_template_args)
        prompts = check_prompts(cfg, task, recipe, chat)
    shape = Table(title="step geometry", title_justify="left", show_header=False, box=None)
    for row in geometry(cfg, recipe, task, prompts):
        shape.add_row(*row)
    out.print(shape)
    planned = _planned(out, cfg, recipe, lengths(cfg, task, prompts), sold_as)
    out.print(yaml.safe_dump({"deepspeed": deepspeed_config(cfg)}, sort_keys=False), markup=False)
    out.print(engine_class(cfg).describe(cfg), markup=False)
    for line in warnings(cfg, recipe):
        out.print(f"warning: {line}", markup=False, soft_wrap=True)
    if planned:
        _check_memory(out, *planned, cfg)


def _planned(
    out: Any, cfg: Config, recipe: Recipe, longest: tuple[tuple[int, int], int], sold_as: float | None
) -> tuple[memory.Planner, memory.Plan] | None:
    """The memory plan, printed; None where there is none."""
    try:
        planned = memory.planned(cfg, recipe, longest, memory.card(cfg, sold_as))
    except memory.Uncounted as error:
        out.print(f"memory plan left out: {error}", markup=False, soft_wrap=True)
        return None
    if planned:
        plan = planned[1]
        out.print()
        out.print(memory.table(plan))
        for line in memory.notes(plan, cfg):
            out.print(line, markup=False, soft_wrap=True)
        out.print()
    return planned


def _check_memory(out: Any, planner: memory.Planner, plan: memory.Plan, cfg: Config) -> None:
    try:
        memory.check_plan(planner, plan, cfg)
    except ConfigError as error:
        if not plan.card.assumed:
            raise
        out.print(f"warning: {error}", markup=False, soft_wrap=True)
