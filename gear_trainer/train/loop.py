"""The loop: roll out, score, assign credit, update, push. One SPMD program, the same on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from gear_kernels import credit_weights
from gear_kernels.losses import aggregation_weights, policy_gradient_loss
from gear_kernels.methods import signals_of
from gear_trainer.config import Config
from gear_trainer.errors import RunError
from gear_trainer.hints.siblings import Siblings
from gear_trainer.hints.writer import Writer
from gear_trainer.policy import checkpoint
from gear_trainer.policy.batching import MicroBatch, micro_batch, padding_micro_batch, split_rows
from gear_trainer.policy.gather import gathered_weights
from gear_trainer.policy.model import learning_rate
from gear_trainer.policy.teacher import Teacher
from gear_trainer.recipe import TEACHER_ROWS, make_distillation
from gear_trainer.rollout import Engine, Limits, Rollout, check_failures, groups_of, mixed_groups, roll_out, troubles
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.console import Console
from gear_trainer.runs.interrupts import Interrupts
from gear_trainer.runs.metrics import Phases, RunFiles, Sums
from gear_trainer.runs.records import Records
from gear_trainer.tasks.base import Problem, Task

BAD_STEPS = 3  # in a row, of updates skipped or log-probs that are not finite; then the run ends: nothing is learnt any more


class SyncError(RunError):
    """vLLM does not hold the trainer's weights."""


class NonFiniteError(RunError):
    """Losses, gradients or log-probs were not finite for too long."""


@dataclass
class Scores:
    """Per rollout, over its policy tokens, float32 on the CPU; signal and teacher are None where no teacher pass was due."""

    sampler_logprobs: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    signal: list[torch.Tensor | None]
    teacher_logprobs: list[torch.Tensor | None]
    teacher_entropy: list[torch.Tensor | None]  # of the methods that read it, as forward_kl
    forward_kl: list[torch.Tensor | None]


@dataclass
class TokenCredit:
    """Per rollout, over its policy tokens: A-hat (Eq. 5), W, the normalised signal g, and segment ids (-1 outside)."""

    advantages: list[torch.Tensor]
    weights: list[torch.Tensor]
    signal: list[torch.Tensor]
    segments: list[torch.Tensor]


def group_advantages(rollouts: list[Rollout], divide_by_std: bool, eps: float = 1e-6) -> list[float]:
    """A_k = (R_k - mean) / (std + eps) within each group of rollouts of one prompt (GRPO); exactly 0 where all rewards agree, and
    in a group of which a rollout failed: its reward is unknown, and the others' mean without it is another."""
    out: list[float] = []
    for group in groups_of(rollouts):
        rewards = torch.tensor([r.reward for r in group], dtype=torch.float64)
        if (rewards == rewards[0]).all() or any(r.failed for r in group):
            out += [0.0] * len(rewards)
            continue
        centred = rewards - rewards.mean()
        out += (centred / (rewards.std() + eps) if divide_by_std else centred).tolist()
    return out


class Trainer:
    def __init__(
        self,
        cfg: Config,
        task: Task,
        chat: Chat,
        method: Any,
        engine: Any,
        sampler: Engine,
        teacher: Teacher | None = None,
        writer: Writer | Siblings | None = None,
        interrupts: Interrupts | None = None,
    ):
        """teacher: None where the policy itself is the teacher, or where nothing reads one. writer: gives the teacher something
        to see in place of the ground truth."""
        self.cfg, self.task, self.chat, self.method = cfg, task, chat, method
        self.engine, self.sampler, self.teacher, self.writer = engine, sampler, teacher, writer
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), engine.device
        self.phases, self.interrupts, self.gap_checked = Phases(), interrupts or Interrupts(), False
        self.records = Records(cfg, chat)
        self.limits = Limits.of(cfg.rollout)
        self.needs_teacher = bool({"signal", *TEACHER_ROWS} & set(method.needs))
        self.signal = cfg.signal or signals_of(method)[0]
        self.distill = make_distillation(cfg)
        self.distill_scored = self.distill is not None and not self.distill.full  # from the scoring pass, every trajectory

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self, start: int) -> int:
        """Run steps start + 1 to cfg.train.steps. Returns the last finished step (earlier if a stop was asked for)."""
        cfg = self.cfg
        files = RunFiles(cfg, start) if self.rank == 0 else None
        console = Console(cfg, start, quiet=self.rank != 0)
        self.interrupts.arm()
        bad_steps = 0
        self.push()  # after a resume vLLM holds the initial checkpoint, not the policy
        if start == 0 and cfg.eval.every:
            self._report(files, console, {"step": 0, "held_out_success": self.evaluate()})
        with console:
            for step in range(start + 1, cfg.train.steps + 1):
                values = self.step(step, files)
                self._report(files, console, values)
                bad_steps = bad_steps + 1 if values["updates_skipped"] or values["nonfinite_tokens"] else 0
                if bad_steps == BAD_STEPS:
                    raise NonFiniteError(self._nonfinite(step))
                stop = self._stop_agreed()
                if step % cfg.checkpoint.every == 0 or step == cfg.train.steps or stop:
                    checkpoint.save(self.engine, cfg, step, self.teacher)
                if stop:
                    return step
        return cfg.train.steps

    def step(self, step: int, files: RunFiles | None) -> dict[str, Any]:
        cfg, sums = self.cfg, Sums()
        with self.phases("rollout"):
            rollouts = self._sample(step, sums)
        with self.phases("write"):
            self._write_references(step, rollouts, sums)
        with self.phases("rollout"):
            self.sampler.sleep()
        advantages = group_advantages(rollouts, cfg.train.std_advantages)
        taught = [0.0 if self.writer and r.reference is None else a for r, a in zip(rollouts, advantages, strict=True)]
        with self.phases("score"):
            scores = self.score(rollouts, taught)
        with self.phases("credit"):
            credit = self.credit(step, rollouts, taught, scores, sums)
        for i, (a, t) in enumerate(zip(advantages, taught, strict=True)):
            credit.advantages[i] = credit.advantages[i] + (a - t)  # a group without a reference keeps its A: W = 1
        _count(sums, rollouts, advantages, scores)
        nonfinite = {"nonfinite_tokens": sum(int((~torch.isfinite(x)).sum()) for x in scores.logprobs)}
        for name, count in (troubles(rollouts) | nonfinite).items():
            sums.add(name, count, 1 / self.world)  # over all ranks
        self._check_gap(step, sums)
        with self.phases("update"):
            self.update(step, rollouts, credit, scores, sums)
            if self.teacher:
                self.teacher.follow(step)
        with self.phases("push"):
            self.push()
        held_out = None
        if cfg.eval.every and (step % cfg.eval.every == 0 or step == cfg.train.steps):
            with self.phases("eval"):
                held_out = self.evaluate()
        with self.phases("records"):
            self._write_records(files, step, rollouts, advantages, scores, credit)
        return self._metrics(step, sums, held_out)

    def _sample(self, step: int, sums: Sums) -> list[Rollout]:
        """The step's rollouts. Ranks may sample different numbers of batches, so nothing in here is a collective."""
        cfg = self.cfg
        self.sampler.wake()

        def sample(batch: int, slots: list[int]) -> list[Rollout]:
            problems = self._problems(step, batch, slots)
            return roll_out(self.sampler, self.chat, self.task, problems, self.limits, (cfg.seed, step))

        rollouts, counts = mixed_groups(sample, cfg.prompts_per_rank, cfg.gen_batches)
        if cfg.gen_batches > 1:
            sums.add("mixed_groups", counts["mixed_groups"], cfg.prompts_per_rank)
            sums.add("resampled_groups", counts["resampled_groups"], 1 / self.world)
        check_failures(rollouts, self.limits)
        return rollouts

    def _problems(self, step: int, batch: int, slots: list[int]) -> list[tuple[int, Problem]]:
        """Fresh problems for some of the rank's places in a step. Every step owns the indices of all batches that it may sample,
        so what an index holds never depends on what was sampled before."""
        cfg = self.cfg
        first = ((step - 1) * cfg.gen_batches + batch) * cfg.rollout.prompts_per_step + self.rank * cfg.prompts_per_rank
        return [(first + slot, self.task.train_problem(first + slot)) for slot in slots]

    def _write_references(self, step: int, rollouts: list[Rollout], sums: Sums) -> None:
        if self.writer:
            for name, count in self.writer.write(rollouts, (self.cfg.seed, step)).items():
                sums.add(name, count, 1 / self.world)

    # --- phases -----------------------------------------------------------------------------------------------------

    def score(self, rollouts: list[Rollout], advantages: list[float]) -> Scores:
        """One no-grad pass: student everywhere; the teacher (prompt with the ground truth) where A is not 0 or a loss asks."""
        n = len(rollouts)
        scores = Scores([_sampled(r) for r in rollouts], *([None] * n for _ in range(6)))
        taught = [self.distill_scored or (self.needs_teacher and a != 0) for a in advantages]
        for teacher in (True, False) if self.needs_teacher or self.distill_scored else (False,):
            for batch in self._micro_batches(rollouts, [i for i in range(n) if taught[i] == teacher], teacher):
                with torch.no_grad():
                    out = self._forward(batch, self._score_stats(teacher))
                _spread(scores, out, batch, rollouts, self.signal)
        return scores

    def _forward(self, batch: MicroBatch, stats: tuple[str, ...]) -> Any:
        """The engine's statistics of a micro-batch; its teacher rows, if any, under the teacher's weights. Collective."""
        batch, temperature = batch.to(self.device), self.limits.temperature
        options = {"jsd_beta": self.distill.jsd_beta} if self.distill else {}
        if self.teacher is None or batch.teacher is None:
            return self.engine(batch, temperature, stats, **options)
        hidden = self.teacher.hidden(batch.teacher)
        with self.teacher.head() as head:
            return self.engine(replace(batch, teacher=None), temperature, stats, (hidden, head), **options)

    def _score_stats(self, teacher: bool) -> tuple[str, ...]:
        student = ("logprobs", "entropy")
        full = ("reverse_kl",) if self.signal == "reverse_kl" else ()
        rows = tuple(name for name in TEACHER_ROWS if name in self.method.needs)
        return student + (("teacher_logprobs",) + full + rows if teacher else ())

    def credit(self, step: int, rollouts: list[Rollout], advantages: list[float], scores: Scores, sums: Sums) -> TokenCredit:
        """Weights for the trajectories that teach (A not 0, or turn rewards); the others keep W = 1 and A-hat = 0."""
        ones = [torch.ones_like(x) for x in scores.logprobs]
        zeros = [torch.zeros_like(x) for x in scores.logprobs]
        none = [torch.full_like(x, -1, dtype=torch.int32) for x in scores.logprobs]
        out = TokenCredit(list(zeros), list(ones), list(zeros), list(none))
        by_turn = "turn_rewards" in self.method.needs
        rows = [i for i, a in enumerate(advantages) if (by_turn and not rollouts[i].dropped) or a != 0]
        lengths = [len(scores.logprobs[i]) for i in rows]
        turns = [rollouts[i].turn_ids[p] for i in rows for p in rollouts[i].policy_positions]
        credit = credit_weights(
            _cat([scores.signal[i] for i in rows]) if self.needs_teacher else None,
            _cat([scores.entropy[i] for i in rows]),
            torch.tensor([advantages[i] for i in rows]),
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            method=self.method.at(step) if hasattr(self.method, "at") else self.method,
            **{name: _cat([getattr(scores, name)[i] for i in rows]) for name in TEACHER_ROWS if name in self.method.needs},
            **(self._turn_inputs([rollouts[i] for i in rows]) if by_turn else {}),
            turn_ids=torch.tensor(turns, dtype=torch.int64),
        )
        for name, values in zip(
            ("advantages", "weights", "signal", "segments"),
            (credit.token_advantages, credit.weights, credit.signal, credit.segment_ids),
            strict=True,
        ):
            for i, part in zip(rows, values.split(lengths), strict=True):
                getattr(out, name)[i] = part
        for name, value in credit.diagnostics.items():
            sums.add(name, value.item() * len(rows), len(rows))  # a rank that has no such trajectory counts for nothing
        return out

    def _turn_inputs(self, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
        """Of each policy token its turn's reward and anchor, of each rollout its group."""
        rewards, anchors = [], []
        for r in rollouts:
            own = list(r.turn_rewards)
            if own and getattr(self.method, "outcome_in_last_turn", False):
                own[-1] += r.reward
            turns = [r.turn_ids[p] for p in r.policy_positions]
            rewards += [own[t] for t in turns]
            anchors += [r.anchors[t] for t in turns]
        return {
            "turn_rewards": torch.tensor(rewards, dtype=torch.float32),
            "anchors": torch.tensor(anchors, dtype=torch.int64),
            "groups": torch.tensor([r.group for r in rollouts], dtype=torch.int64),
        }

    def update(self, step: int, rollouts: list[Rollout], credit: TokenCredit, scores: Scores, sums: Sums) -> None:
        """`updates_per_step` optimizer steps, each over whole groups, normalised by the global count of its trajectories."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, step)
        share = len(rollouts) // self.cfg.train.updates_per_step
        for first in range(0, len(rollouts), share):
            self._update_once(range(first, first + share), rollouts, credit, scores, sums)

    def _update_once(self, part: range, rollouts: list[Rollout], credit: TokenCredit, scores: Scores, sums: Sums) -> None:
        token_weights = self._token_weights([len(scores.logprobs[i]) for i in part])
        weight_of = dict(zip(part, token_weights, strict=True))
        # the rest has no gradient; the means count it
        rows = [i for i in part if (self.distill and not rollouts[i].dropped) or credit.advantages[i].any()]
        ran, distill = False, self.distill
        stats = ("logprobs", *(distill.stats if distill else ()))
        sums.add("updates_skipped", 0.0, 0)
        for name in ("clip_fraction", "dual_clip_fraction", "approx_kl", "grad_norm", *(("divergence",) if distill else ())):
            sums.add(name, 0.0, 0)
        for batch in self._micro_batches(rollouts, rows, teacher=bool(distill and distill.full)):
            out = self._forward(batch, stats)
            inputs = self._loss_inputs(batch, [scores.logprobs, credit.advantages, weight_of], out.logprobs)
            loss, parts = self._policy_loss(batch, out.logprobs, inputs, scores)
            if distill:
                added, parts["divergence"] = self._distillation(batch, out, inputs, scores)
                loss = loss + added
            ran = True
            # DeepSpeed averages over ranks; the weights already are global means. A loss that is not finite makes every gradient
            # NaN, also where a clip would have stopped it: DeepSpeed then skips the step, on all ranks alike.
            self.engine.backward(loss * self.world * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
            n = len(batch.targets) if batch.rows else 0
            for name, value in parts.items():
                sums.add(name, value.item() * n, n)
            sums.add("loss", loss.item() * self.world, 0)
        sums.add("loss", 0.0, 1)
        if ran:  # on every rank or on none; with all rewards of every group alike there is nothing to step on
            self.engine.step()
            sums.add("updates_skipped", not self.engine.was_step_applied(), 0)
            sums.add("grad_norm", float(self.engine.get_global_grad_norm() or 0.0))
        sums.add("updates_skipped", 0.0, 1 / self.cfg.train.updates_per_step)  # a total: all ranks skip together

    def _policy_loss(
        self, batch: MicroBatch, logprobs: torch.Tensor, inputs: list[torch.Tensor], scores: Scores
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The clipped surrogate and the numbers to log; inputs: old log-probs, advantages, token weights."""
        if self.distill and self.distill.alone:
            return logprobs.new_zeros(()), {}
        t = self.cfg.train
        loss, parts = policy_gradient_loss(
            logprobs,
            *inputs,
            clip_low=t.clip_low,
            clip_high=t.clip_high,
            dual_clip=t.dual_clip,
            importance_weights=self._importance_weights(batch, scores),
        )
        return loss, {name: parts[name] for name in ("clip_fraction", "dual_clip_fraction", "approx_kl")}

    def _distillation(
        self, batch: MicroBatch, out: Any, inputs: list[torch.Tensor], scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The distillation loss of a micro-batch and its mean divergence; a sampled one is corrected as the surrogate is."""
        old, _, weights = inputs
        if self.distill.full:
            return self.distill.loss(out, old, None, weights)
        factors = self._importance_weights(batch, scores)
        weights = weights if factors is None else weights * factors
        (teacher,) = self._loss_inputs(batch, [scores.teacher_logprobs], old)
        return self.distill.loss(out, old, teacher, weights)

    def push(self) -> None:
        """Hand the policy's weights to vLLM, layer by layer. Collective."""
        self.sampler.push(gathered_weights(self.engine.module.lm))

    def evaluate(self) -> float:
        """Share of held-out problems solved, one sample each, the same seeds every time."""
        cfg = self.cfg
        problems = self.task.held_out(cfg.eval.prompts)
        mine = [(i, p) for i, p in enumerate(problems) if i % self.world == self.rank]
        limits = replace(self.limits, group_size=1, temperature=cfg.eval.temperature)
        self.sampler.wake()  # and stays so: the next step samples from these weights
        rollouts = roll_out(self.sampler, self.chat, self.task, mine, limits, (cfg.seed, "held-out"))
        sums = Sums()
        sums.add("success", sum(r.success for r in rollouts), len(rollouts))
        return sums.means(self.device)["success"]

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _micro_batches(self, rollouts: list[Rollout], rows: list[int], teacher: bool):
        """This rank's micro-batches, padded to the largest count of any rank: every engine call is a collective."""
        budget = self.cfg.train.tokens_per_micro_batch
        split = split_rows(rollouts, rows, budget, teacher)
        count = torch.tensor(len(split), device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        for k in range(int(count)):
            yield micro_batch(rollouts, split[k], teacher) if k < len(split) else padding_micro_batch(teacher)

    def _token_weights(self, lengths: list[int]) -> list[torch.Tensor]:
        counts = torch.tensor([sum(lengths), len(lengths)], dtype=torch.float64, device=self.device)
        dist.all_reduce(counts)
        weights = aggregation_weights(
            lengths,
            self.cfg.train.aggregation,
            n_tokens_global=int(counts[0]),
            n_seqs_global=int(counts[1]),
            max_len=self.cfg.rollout.max_model_len,
        )
        return list(weights.split(lengths))

    def _loss_inputs(self, batch: MicroBatch, sources: list[Any], like: torch.Tensor) -> list[torch.Tensor]:
        """Each source's values at the batch's tokens; zeros for a padding micro-batch, whose loss is 0 but in the graph."""
        if not batch.rows:
            return [like.detach(), *(torch.zeros_like(like) for _ in sources[1:])]
        return [torch.cat([source[i] for i in batch.rows]).to(like) for source in sources]

    def _importance_weights(self, batch: MicroBatch, scores: Scores) -> torch.Tensor | None:
        cap = self.cfg.train.importance_cap
        if cap is None or not batch.rows:
            return None
        gap = torch.cat([scores.logprobs[i] - scores.sampler_logprobs[i] for i in batch.rows])
        return gap.exp().clamp(max=cap).to(self.device)

    def _check_gap(self, step: int, sums: Sums) -> None:
        """Self-check on the first step of every start: weights that did not arrive show as nats, not as rounding."""
        if self.gap_checked:
            return
        self.gap_checked = True
        mean = sums.means(self.device)["logprob_gap_mean"]
        if mean is not None and not mean <= self.cfg.max_logprob_gap:  # None: nothing was sampled; NaN is too far
            raise SyncError(
                f"step {step}: trainer and vLLM differ by {mean:.3g} nats a token on the same tokens "
                f"(max_logprob_gap={self.cfg.max_logprob_gap}): the pushed weights did not arrive, or the models differ"
            )

    def _metrics(self, step: int, sums: Sums, held_out: float | None) -> dict[str, Any]:
        seconds = self.phases.split()
        means = {k: _number(v) for k, v in sums.means(self.device).items()}
        tokens = means.pop("policy_tokens") * self.world
        total = sum(seconds.values())
        out = {"step": step, **means, "lr": learning_rate(self.cfg, step), "policy_tokens": tokens}
        if held_out is not None:
            out["held_out_success"] = held_out
        return out | {"tokens_per_second": round(tokens / total, 1), "seconds": seconds | {"step": round(total, 3)}}

    def _report(self, files: RunFiles | None, console: Console, values: dict[str, Any]) -> None:
        if files:
            files.metrics(values)
        console.step(values)

    def _write_records(self, files, step, rollouts, advantages, scores, credit) -> None:
        """Each rank makes its own lines, rank 0 writes them all to one file."""
        if not self.records.share:
            return
        columns = {name: getattr(scores, name) for name in ("logprobs", "teacher_logprobs", "entropy")}
        columns |= {"signal": credit.signal, "segment": credit.segments, "weight": credit.weights}
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(self.records.lines(rollouts, advantages, columns), gathered)
        if files:
            files.records(step, "".join(gathered))

    def _nonfinite(self, step: int) -> str:
        last = checkpoint.latest_step(self.cfg)
        where = f"step {last}, the last checkpoint" if last else "the start, as there is no checkpoint"
        return (
            f"steps {step - BAD_STEPS + 1} to {step}: losses, gradients or log-probs were not finite, and updates skipped; "
            f"--resume goes on from {where}: lower train.lr, or look at the rewards and advantages in the run's rollouts"
        )

    def _stop_agreed(self) -> bool:
        flag = torch.tensor(int(self.interrupts.asked), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def _number(value: float | None) -> float | None:
    """Six digits of it; None for what was not counted or is not finite, which JSON cannot say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)


def _sampled(rollout: Rollout) -> torch.Tensor:
    return torch.tensor([rollout.sampler_logprobs[p] for p in rollout.policy_positions])


def _spread(scores: Scores, out: Any, batch: MicroBatch, rollouts: list[Rollout], signal_name: str) -> None:
    """Cut a micro-batch's packed statistics into its rollouts."""
    if not batch.rows:
        return
    lengths = [len(rollouts[i].policy_positions) for i in batch.rows]
    teacher = batch.teacher is not None
    parts = {"logprobs": out.logprobs, "entropy": out.entropy}
    if teacher:
        parts["teacher_logprobs"] = out.teacher_logprobs
        parts |= {name: getattr(out, name) for name in TEACHER_ROWS if getattr(out, name) is not None}
        parts["signal"] = out.logprobs - out.teacher_logprobs if signal_name == "k1" else out.reverse_kl
    for name, values in parts.items():
        for i, part in zip(batch.rows, values.float().cpu().split(lengths), strict=True):
            getattr(scores, name)[i] = part


def _count(sums: Sums, rollouts: list[Rollout], advantages: list[float], scores: Scores) -> None:
    """The rollout-side numbers of a step (means over all ranks once reduced)."""
    n = len(rollouts)
    sums.add("reward_mean", sum(r.reward for r in rollouts), n - sum(r.failed for r in rollouts))
    sums.add("success", sum(r.success for r in rollouts), n - sum(r.failed for r in rollouts))
    sums.add("tool_calls", sum(r.calls for r in rollouts), n)
    sums.add("tool_errors", sum(r.errors for r in rollouts), n)
    sums.add("truncated", sum(r.truncated for r in rollouts), n)
    sums.add("zero_advantage", sum(a == 0 for a in advantages), n)
    sums.add("policy_tokens", sum(len(x) for x in scores.logprobs))
    sums.add("response_length", sum(len(x) for x in scores.logprobs), n)
    sums.mean_of("entropy", torch.cat(scores.entropy))
    gap = torch.cat(scores.logprobs) - torch.cat(scores.sampler_logprobs)
    sums.mean_of("logprob_gap_mean", gap.abs())
    sums.peak("logprob_gap_max", gap.abs().max() if len(gap) else 0.0)  # none: every prompt fills the context
    sums.mean_of("mismatch_kl", gap.exp() - 1 - gap)  # k3 estimate of KL(sampler || trainer)
    ratio = gap.exp().double()
    sums.add("effective_sample_size", float(ratio.sum() ** 2 / (ratio**2).sum()) if len(ratio) else 0.0, len(ratio))
    for name, wanted in (("teacher_gain_success", True), ("teacher_gain_failure", False)):
        gains = [t - s for t, s, r in zip(scores.teacher_logprobs, scores.logprobs, rollouts, strict=True)
                 if t is not None and r.success is wanted]  # fmt: skip
        sums.mean_of(name, _cat(gains))
