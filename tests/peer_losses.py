"""Formulas of TRL, verl and OpenRLHF that the trainer's own are compared with.

TRL's are compiled out of its installed files: importing its trainers loads vLLM, 16 CPU seconds for one method. verl 0.9.1 and
OpenRLHF 0.11.2 do not install beside this project's pins: theirs are written down here, on padded [B, T] tensors as they have.
"""

import ast
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch


def _compiled(file, names, inside=None):
    """The functions or classes of a file of TRL by name, without its imports."""
    root = Path(find_spec("trl").submodule_search_locations[0])
    body = ast.parse((root / file).read_text()).body
    if inside:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == inside).body
    found = [node for node in body if getattr(node, "name", None) in names]
    space = {"torch": torch, "nanmin": torch.min, "nanmax": torch.max}
    exec(compile(ast.Module(found, []), file, "exec"), space)
    return [space[name] for name in names]


class TrlTrainer:
    """What TRL's `GRPOTrainer._compute_loss` reads of its trainer: one process, one step, no accumulation."""

    compute_loss, off_policy_mask = _compiled("trainer/grpo_trainer.py", ["_compute_loss", "get_off_policy_mask"], "GRPOTrainer")

    def __init__(self, logprobs, entropy, **settings):
        self.model, self.args = (
            SimpleNamespace(training=True),
            SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        )
        self.accelerator = SimpleNamespace(
            num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x
        )
        self._metrics = defaultdict(lambda: defaultdict(list))
        self._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)
        self.aux_loss_enabled = self.use_adaptive_entropy = False
        self.top_entropy_quantile, self.off_policy_mask_threshold, self.current_gradient_accumulation_steps = 1.0, None, 1
        self.importance_sampling_level, self.loss_type, self.beta = "token", "grpo", 0.0
        self.epsilon_low = self.epsilon_high = 0.2
        self.use_vllm = self.vllm_importance_sampling_correction = False
        self.entropy_coef = settings.pop("entropy_coef", 0.0)
        self._entropy_bonus_enabled = self.entropy_coef != 0
        vars(self).update(settings)

    def loss(self, mask, **inputs):
        ids = torch.zeros_like(mask, dtype=torch.int64)
        given = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask}
        return type(self).compute_loss(self, self.model, given | {"num_items_in_batch": mask.sum()} | inputs)


(trl_overlong,) = _compiled("rewards/other_rewards.py", ["_SoftOverlongPunishment"])


def trl_importance(difference, mask, mode, low, high):
    """`vllm_importance_sampling_mode` of TRL 1.16, `_generate_and_score_completions`; [B, T] or [B, 1]."""
    difference = difference * mask
    ratio = (difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high)
    low = -torch.inf if low is None else low
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def trl_advantages(rewards, group, how):
    """`scale_rewards` group, none and batch of TRL 1.16's GRPO, and its RLOO; eps 1e-6 where TRL has 1e-4."""
    grouped = rewards.view(-1, group)
    if how == "rloo":
        return (grouped - (grouped.sum(1, keepdim=True) - grouped) / (group - 1)).flatten()
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    if how == "dr_grpo":
        return centred
    std = rewards.std() if how == "batch" else grouped.std(1).repeat_interleave(group)
    return centred / (std + 1e-6)


def openrlhf_importance(difference, mask, level, low, high):
    """`is_correction_mode=mask` of OpenRLHF 0.11.2's PolicyLoss (models/loss.py): token is ICEPOP, seq is seq-mask-tis."""
    if level == "seq":
        statistic = ((difference * mask).sum(-1) / mask.sum(-1)).unsqueeze(-1).exp()
    else:
        statistic = difference.exp()
    return torch.where((statistic >= low) & (statistic <= high), difference.exp(), 0.0)


def verl_gspo(old, new, advantages, mask, low, high):
    """`compute_policy_loss_gspo` of verl 0.9.1 (trainer/ppo/core_algos.py) with seq-mean-token-mean."""
    log_ratio = ((new - old) * mask).sum(-1) / mask.sum(-1)
    ratio = (new - new.detach() + log_ratio.detach().unsqueeze(-1)).clamp(max=10.0).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return ((losses * mask).sum(-1) / mask.sum(-1)).mean()


def verl_cispo(old, new, advantages, mask, low, high):
    """`compute_policy_loss_cispo` of verl 0.9.1 with token-mean."""
    ratio = (new - old).clamp(-20.0, 20.0).exp().clamp(1 - low, 1 + high).detach()
    return (-ratio * advantages * new * mask).sum() / mask.sum()


def verl_kl(new, reference, kind):
    """`kl_penalty_forward` of verl 0.9.1."""
    if kind == "k1":
        return new - reference
    if kind == "k2":
        return 0.5 * (new - reference).square()
    d = (reference - new).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)
