"""The trainer mode `gear_sync` of verl 0.9: its synchronous trainer, with token advantages by a credit method.

Importing this file registers the mode. verl does that in every process when it finds the file's name in its environment:
VERL_USE_EXTERNAL_MODULES=gear_kernels.integrations.verl. docs/verl.md shows a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq  # pyright: ignore[reportMissingImports]  (verl's own needs, here and below)
from omegaconf import DictConfig, OmegaConf, open_dict  # pyright: ignore[reportMissingImports]
from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer  # pyright: ignore[reportMissingImports]
from verl.utils.debug import marked_timer  # pyright: ignore[reportMissingImports]
from verl.utils.import_utils import load_class_from_fqn  # pyright: ignore[reportMissingImports]
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # pyright: ignore[reportMissingImports]
from verl.workers.utils.padding import response_from_nested  # pyright: ignore[reportMissingImports]

from ..errors import bad_input, require
from .common import Choice, choose, token_advantages

GIVES = ("signal", "entropy", "teacher_entropy", "turn_ids")  # the inputs of credit methods that verl's passes can make
SETTINGS = ("method", "args", "teacher_prompt")  # the keys under `gear` in verl's configuration
TEACHER = "gear_teacher"  # the partition where the teacher's rows lie while they are scored

Row = Mapping[str, Any]

# Columns of the model's, which no teacher's prompt needs: they are most of what a batch weighs.
_TENSORS = (
    *("input_ids", "position_ids", "attention_mask", "loss_mask", "log_probs", "old_log_probs", "rollout_log_probs", "entropy"),
    *("ref_log_prob", "values", "rm_scores", "routed_experts", "teacher_ids", "teacher_logprobs", "metrics"),
)


def ground_truth_prompt(row: Row) -> list[dict[str, Any]]:
    """The row's chat with its ground truth behind the last turn: what the teacher reads unless `gear.teacher_prompt` is set.

    row: the data set's columns and the row's prompts, responses and response_mask. Returns messages. Raises GearKernelsError
    where reward_model.ground_truth is missing.
    """
    answer = (row.get("reward_model") or {}).get("ground_truth")
    if answer is None:
        given, expected = "a row without reward_model.ground_truth", "the ground truth, which the teacher reads"
        raise bad_input(given, expected, "add the column, or set gear.teacher_prompt=<package.module.function>")
    *head, last = row["raw_prompt"]
    return [*head, {**last, "content": f"{last['content']}\n\nA known good solution:\n{answer}"}]


@register_trainer("gear_sync")
class GearSync(PPOTrainerSync):
    """PPOTrainerSync whose advantages are weighted token by token (GEAR, arXiv 2605.11853, and the methods beside it).

    One more forward a step: the actor's own weights score each response behind the teacher's prompt, right after verl's pass for
    the old log-probs, whose entropy is used as well. Settings, all optional: `+gear.method` (a name, or package.module.object),
    `+gear.args` (fields of a named method), `+gear.teacher_prompt` (package.module.function of a row: see `ground_truth_prompt`;
    it returns messages, or token ids). Raises GearKernelsError before work starts for settings that cannot be served.
    """

    def __init__(self, config: DictConfig):
        self.credit, self.teacher_prompt = settings(config)
        # verl asks for the name "sync" where it chooses the buffer, the loader and what a checkpoint holds
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_old_log_prob(batch, metrics)
        if {"signal", "teacher_entropy"} & set(self.credit.method.needs):
            with marked_timer("teacher_log_prob", self.timing_raw, color="blue"):
                self._score_teacher(batch)
        return batch

    def _score_teacher(self, batch: Any) -> None:
        """Score the responses behind the teacher's prompts; teacher_log_probs (and teacher_entropy) join the batch's columns."""
        rows = [self._teacher_row(row, tag) for row, tag in zip(_rows(batch), batch.tags, strict=True)]
        entropy = "teacher_entropy" in self.credit.method.needs
        taught = tq.kv_batch_put(
            keys=batch.keys, partition_id=TEACHER, fields=list_of_dict_to_tensordict(rows), tags=[{} for _ in rows]
        )
        temperature = self.config.actor_rollout_ref.rollout.temperature
        taught.extra_info = {"calculate_entropy": entropy, "compute_loss": False, "temperature": temperature}
        names = ["log_probs", *(["entropy"] if entropy else []), "response_mask"]
        try:
            self.actor_rollout_wg.compute_log_prob(taught)
            data = tq.kv_batch_get(keys=batch.keys, partition_id=TEACHER, select_fields=names)
        finally:
            tq.kv_clear(keys=batch.keys, partition_id=TEACHER)
        mask = data["response_mask"]
        scored = {f"teacher_{name}": response_from_nested(data[name], mask) for name in names if name != "response_mask"}
        _write(batch, scored)

    def _teacher_row(self, row: Row, tag: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The row with the teacher's prompt in place of its own. Rows that verl added to fill the batch up stay as they are."""
        prompt = row["prompts"] if tag.get("is_padding") else self._teacher_prompt_ids(row)
        ids = torch.cat([prompt, row["responses"]])
        return {
            "prompts": prompt,
            "responses": row["responses"],
            "response_mask": row["response_mask"],
            "loss_mask": row["response_mask"],
            "input_ids": ids,
            "position_ids": torch.arange(ids.numel()),
        }

    def _teacher_prompt_ids(self, row: Row) -> torch.Tensor:
        """Token ids [t] of the teacher's prompt of one row."""
        own, taught = row["prompts"].tolist(), self.teacher_prompt(row)
        if len(taught) and isinstance(taught[0], Mapping):
            taught = spliced(own, self._templated(row["raw_prompt"]), self._templated(taught))
        taught = [int(token) for token in taught]
        mend = "let gear.teacher_prompt add what the teacher shall know"
        require(taught != own, "a teacher's prompt equal to the student's", "another: the signal would be 0 everywhere", mend)
        require(bool(taught), "an empty teacher's prompt", "one token at least", mend)
        return torch.tensor(taught, dtype=torch.int64)

    def _templated(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        options = self.config.data.get("apply_chat_template_kwargs") or {}
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False, **options)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        inputs = _columns(self.credit)
        names = ["advantages", "response_mask", *{column for columns in inputs.values() for column in columns}]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        out = token_advantages(
            data["advantages"],
            data["response_mask"],
            method=self.credit.method,
            step=self.global_steps,
            **{name: _difference(*(data[column] for column in columns)) for name, columns in inputs.items()},
        )
        _write(batch, {"advantages": out.token_advantages})
        metrics.update({name: value.item() for name, value in out.metrics.items()})
        return batch


def settings(config: DictConfig) -> tuple[Choice, Callable[[Row], Any]]:
    """The credit method and the teacher's prompt of a configuration. Raises GearKernelsError for what gear_sync cannot serve."""
    gear = OmegaConf.to_container(config.gear, resolve=True) if config.get("gear") else {}
    assert isinstance(gear, dict)
    wrong = sorted(set(map(str, gear)) - set(SETTINGS))
    require(not wrong, f"gear: given {', '.join(wrong)}", f"keys out of {', '.join(SETTINGS)}", "correct the name")
    algorithm = config.algorithm
    bypass = (algorithm.get("rollout_correction") or {}).get("bypass_mode", False)
    given, expected = "algorithm.rollout_correction.bypass_mode=True", "verl's own pass, which entropy comes from"
    require(not bypass, given, expected, "set it to False")
    group = algorithm.adv_estimator != "gae" and not config.critic.get("enable")
    given, expected = f"algorithm.adv_estimator={algorithm.adv_estimator}", "one advantage a trajectory, without a critic"
    require(group, given, expected, "set algorithm.adv_estimator=grpo and leave critic.enable out")
    method = gear.get("method", "gear")
    if isinstance(method, str) and "." in method:
        method = load_class_from_fqn(method, "gear.method")
    path = gear.get("teacher_prompt")
    teacher_prompt = load_class_from_fqn(path, "gear.teacher_prompt") if path else ground_truth_prompt
    return choose(method, GIVES, args=gear.get("args"), trainer="verl's gear_sync"), teacher_prompt


def spliced(prompt: list[int], plain: list[int], taught: list[int]) -> list[int]:
    """The prompt [n] with the end of `plain`, from where `taught` differs, replaced by that of `taught`: token ids.

    plain and taught are the chat template's without tools; what stands before the difference (tools in the system's turn) is the
    prompt's own. Raises GearKernelsError where the prompt does not end as plain does.
    """
    pairs = zip(plain, taught, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(taught)))
    tail = plain[same:]
    if prompt[len(prompt) - len(tail) :] != tail:
        given = "a row whose prompt does not end as the chat template of its raw_prompt"
        raise bad_input(given, "one that does", "let gear.teacher_prompt return token ids, made of the row's prompts")
    return prompt[: len(prompt) - len(tail)] + taught[same:]


def _columns(credit: Choice) -> dict[str, tuple[str, ...]]:
    """The columns of the batch that each input of the method is made of."""
    columns = {
        "signal": ("old_log_probs", "teacher_log_probs"),
        "entropy": ("entropy",),
        "teacher_entropy": ("teacher_entropy",),
    }
    return {name: columns[name] for name in credit.method.needs if name in columns}


def _difference(rows: Any, minus: Any = None) -> torch.Tensor:
    """Jagged rows, less other rows of the same lengths: jagged tensors made apart do not subtract."""
    if minus is None:
        return rows
    return torch.nested.nested_tensor_from_jagged(rows.values() - minus.values(), offsets=rows.offsets())


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The batch as one mapping a row, without the model's columns. Raises GearKernelsError on images and on M-RoPE positions."""
    names = None if batch.fields is None else [name for name in batch.fields if name not in _TENSORS]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    columns = {name: _listed(data.get(name)) for name in data.keys() if name not in _TENSORS}  # noqa: SIM118 - a TensorDict
    positions = tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id, select_fields=["position_ids"])
    flat = _listed(positions["position_ids"])[0].dim() == 1
    plain = flat and not any(columns.get("multi_modal_inputs", ()))
    require(plain, "rows with images, video or M-RoPE positions", "text with one position a token", "use trainer_mode=sync")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _listed(column: Any) -> list[Any]:
    """A column as a list of rows: tensors of a tensor, Python objects of whatever TransferQueue holds objects in."""
    if isinstance(column, torch.Tensor):
        return list(column.unbind())
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _write(batch: Any, columns: dict[str, Any]) -> None:
    fields = TensorDict(columns, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
