"""Token advantages for OpenRLHF 0.11: an experience maker that scores each rollout behind a teacher's prompt as well.

OpenRLHF has no registry: a trainer of one's own makes this maker in place of RemoteExperienceMaker, and where the method reads
entropy, its actors are PolicyModelActor with `EntropyForward` in front. docs/verl.md shows both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience  # pyright: ignore[reportMissingImports]  (optional, as below)
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # pyright: ignore[reportMissingImports]

from ..errors import require
from .common import choose, token_advantages

GIVES = ("signal", "entropy", "turn_ids")  # the inputs of credit methods that OpenRLHF's passes can make


class EntropyForward:
    """A mixin for PolicyModelActor: its forward's log-probs with the entropies of the same logits, which it drops otherwise."""

    actor: Any
    strategy: Any

    def forward_with_entropy(
        self, sequences: torch.Tensor, action_mask: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [B, A], nats, float32 on the CPU, of sequences [B, T] with action_mask [B, A]."""
        device = torch.cuda.current_device()
        self.actor.eval()
        with torch.no_grad():
            log_probs, output = self.actor(
                sequences.to(device),
                action_mask.to(device),
                attention_mask.to(device),
                return_output=True,
                return_entropy=True,
                ring_attn_group=self.strategy.ring_attn_group,
            )
        self.actor.train()
        return log_probs.cpu(), output.entropy[:, -action_mask.shape[1] :].cpu()


class GearExperienceMaker(RemoteExperienceMaker):
    """RemoteExperienceMaker whose advantages are weighted token by token (GEAR, arXiv 2605.11853, and the methods beside it).

    teacher_prompt: from a sample's prompt and label, both text, to the teacher's prompt, text (the chat template applied). The
    actor's own weights score each response behind it: one forward more. credit: a name or a method object. Raises
    GearKernelsError before work starts for methods and settings that cannot be served.
    """

    def __init__(
        self,
        *args: Any,
        teacher_prompt: Callable[[str, str], str] | None = None,
        credit: str | object = "gear",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.credit, self.teacher_prompt = choose(credit, GIVES, trainer="OpenRLHF").method, teacher_prompt
        self.taught = "signal" in self.credit.needs
        self.entropies: list[torch.Tensor] = []
        self.teacher_log_probs: list[torch.Tensor] = []
        algo = self.args.algo
        require(not self.taught or teacher_prompt is not None, "no teacher_prompt", f"one, for {credit} reads it", "pass it")
        group = self.advantage_estimator not in ("gae", "reinforce")
        given, mend = f"algo.advantage.estimator={self.advantage_estimator}", "choose group_norm, rloo or dr_grpo"
        require(group, given, "one advantage a trajectory", mend)
        in_reward = self.initial_model_group is not None and not algo.kl.use_loss
        require(not in_reward, "a KL penalty in the reward", "one advantage a trajectory", "set algo.kl.use_loss or init_coef=0")

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> Any:
        if group is not self.actor_model_group or "entropy" not in self.credit.needs or self.entropies:
            return super()._dispatch_forward(group, sync_condition, **kwargs)
        kwargs.pop("mm_train_inputs_list", None)  # a list of None: samples with images are refused
        return super()._dispatch_forward(_Renamed(group, "forward_with_entropy"), sync_condition, **kwargs)

    def _flatten_results(self, refs: Any, duplicate_factor: int) -> list[Any]:
        results = super()._flatten_results(refs, duplicate_factor)
        if results and isinstance(results[0], tuple):
            self.entropies = [entropy for _, entropy in results]
            return [log_probs for log_probs, _ in results]
        return results

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """The samples with log-probs, rewards and KL as OpenRLHF makes them; then the teacher's log-probs of the same tokens."""
        pictured = any(any(samples.mm_train_inputs) for samples in samples_list)
        require(not pictured, "samples with images", "text", "use OpenRLHF's own experience maker")
        self.entropies = []
        experiences = super().make_experience(samples_list)
        if self.taught:
            self.teacher_log_probs = self._score_teacher(experiences)
        return experiences

    def _score_teacher(self, experiences: list[Experience]) -> list[torch.Tensor]:
        """Log-probs [B, A] of each experience's responses behind the teacher's prompts, where the student's stand."""
        rows = [self._teacher_rows(experience) for experience in experiences]
        args = self.args
        refs = super()._dispatch_forward(
            self.actor_model_group,
            args.train.colocate_all or args.train.colocate_actor_ref,
            sequences=[_padded([ids for ids, _ in batch], self.tokenizer.pad_token_id) for batch in rows],
            action_mask=[_padded([ids.new_ones(len(ids) - 1) for ids, _ in batch]) for batch in rows],
            attention_mask=[_padded([torch.ones_like(ids) for ids, _ in batch]) for batch in rows],
        )
        scored = self._flatten_results(refs, args.ds.ring_attn_size * args.ds.tensor_parallel_size)
        out = []
        for experience, batch, log_probs in zip(experiences, rows, scored, strict=True):
            aligned = torch.zeros_like(experience.action_log_probs)
            for b, (ids, longer) in enumerate(batch):
                first = int(experience.action_mask[b].int().argmax())  # of the actions: what stands before it is the prompt's
                n = len(ids) - longer - 1 - first
                aligned[b, first : first + n] = log_probs[b, first + longer : first + longer + n]
            out.append(aligned)
        return out

    def _teacher_rows(self, experience: Experience) -> list[tuple[torch.Tensor, int]]:
        """Each sample's token ids [t] with the teacher's prompt in place of its own, and how many tokens longer that makes it."""
        assert self.teacher_prompt is not None
        rows = []
        for b, (prompt, label) in enumerate(zip(experience.prompts, experience.labels, strict=True)):
            text = self.teacher_prompt(prompt, label)
            require(text != prompt, "a teacher's prompt equal to the student's", "another: the signal would be 0", "add to it")
            own, taught = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
            ids = experience.sequences[b][experience.attention_mask[b].bool()]
            same = ids[: len(own)].tolist() == list(own)
            require(same, "a sample that does not begin with its prompt", "the prompt's own tokens", "leave the text as it is")
            rows.append((torch.cat([ids.new_tensor(taught), ids[len(own) :]]), len(taught) - len(own)))
        return rows

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """OpenRLHF's advantages [B, A], one a trajectory, times the method's weights; gear/... joins each experience's info."""
        experiences = super().compute_advantages_and_returns(experiences)
        inputs: dict[str, Any] = {}
        if self.taught:
            pairs = zip(experiences, self.teacher_log_probs, strict=True)
            inputs["signal"] = [row for own, teacher in pairs for row in own.action_log_probs.float() - teacher.float()]
        if "entropy" in self.credit.needs:
            inputs["entropy"] = [row for entropy in self.entropies for row in entropy.float()]
        out = token_advantages(
            [row for experience in experiences for row in experience.advantages],
            [row for experience in experiences for row in experience.action_mask],
            method=self.credit,
            **inputs,
        )
        rows = iter(out.token_advantages)
        for experience in experiences:
            batch = len(experience.advantages)
            experience.advantages = torch.stack([next(rows) for _ in range(batch)])
            experience.info |= {name: value.repeat(batch) for name, value in out.metrics.items()}
        self.entropies, self.teacher_log_probs = [], []
        return experiences


class _Renamed:
    """A group of actors that runs another method in place of `forward`."""

    def __init__(self, group: Any, method: str):
        self.group, self.method = group, method

    def async_run_method_batch(self, method_name: str, **kwargs: Any) -> Any:
        assert method_name == "forward"
        return self.group.async_run_method_batch(method_name=self.method, **kwargs)

    def async_run_method(self, method_name: str) -> Any:
        return self.group.async_run_method(method_name)


def _padded(rows: list[torch.Tensor], fill: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
