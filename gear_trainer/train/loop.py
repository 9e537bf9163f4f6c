"""The loop: roll out, score, assign credit, update, push. One SPMD program, the same on every rank."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gear_trainer import evaluation
from gear_trainer.config import Config
from gear_trainer.hints.siblings import Siblings
from gear_trainer.hints.writer import Writer
from gear_trainer.policy import checkpoint, lora
from gear_trainer.policy.forward import Forward
from gear_trainer.policy.frozen import FrozenModel
from gear_trainer.policy.gather import adapter_state_dict, gathered_weights
from gear_trainer.recipe import Recipe
from gear_trainer.rollout import Engine, Rollout
from gear_trainer.rollout.chat import Chat
from gear_trainer.runs.interrupts import Interrupts
from gear_trainer.runs.metrics import Phases, Sums
from gear_trainer.tasks.base import Task
from gear_trainer.train.credit import assign
from gear_trainer.train.experience import Experience, count, pack
from gear_trainer.train.guards import Finite, agreed, check_gap
from gear_trainer.train.sample import StepSampler
from gear_trainer.train.schedule import Schedule, schedule
from gear_trainer.train.score import score
from gear_trainer.train.update import Updater
from gear_trainer.train.watch import Watch


class Trainer:
    """A run on this rank.

    frozen: the models beside the policy by name, `teacher` and `reference`; a reference model that the recipe shares with the
    teacher is not there. references: gives the teacher something to see in place of the ground truth. watch: shows the run.
    """

    def __init__(
        self,
        cfg: Config,
        recipe: Recipe,
        task: Task,
        chat: Chat,
        engine: Any,
        sampler: Engine,
        frozen: dict[str, FrozenModel] | None = None,
        references: Writer | Siblings | None = None,
        interrupts: Interrupts | None = None,
        watch: Watch | None = None,
    ):
        self.cfg, self.recipe, self.task, self.chat = cfg, recipe, task, chat
        self.engine, self.sampler, self.frozen, self.references = engine, sampler, frozen or {}, references
        self.rank, self.device = dist.get_rank(), engine.device
        self.phases, self.interrupts, self.gap_checked = Phases(), interrupts or Interrupts(), False
        self.watch = watch or Watch(cfg, chat)
        self.held_out = evaluation.sets_of(cfg, task, chat)
        self.sample = StepSampler(cfg, recipe, task, chat, sampler, self.rank)
        teacher = self.frozen.get("teacher")
        reference = self.frozen.get("reference", teacher if recipe.kl else None)
        self.forward = Forward(engine, teacher, cfg.rollout.temperature, recipe.jsd_beta, reference)
        self.update = Updater(cfg, recipe, self.forward)

    def train(self, start: int) -> int:
        """Run steps start + 1 to cfg.train.steps. Returns the last finished step (earlier if a stop was asked for)."""
        cfg, finite = self.cfg, Finite(self.cfg)
        self.interrupts.arm()
        with self.watch:
            self.sampler.version = start  # a resumed run's weights have the numbers of one that was never interrupted
            self.push()  # after a resume vLLM holds the initial checkpoint, not the policy
            if start == 0 and cfg.eval.every:
                self.watch.report({"step": 0, **self.evaluate()})
            for step in range(start + 1, cfg.train.steps + 1):
                values = self.step(step)
                self.watch.report(values)
                finite.check(step, values)
                stop = agreed(self.interrupts.asked, self.device)
                if step % cfg.checkpoint.every == 0 or step == cfg.train.steps or stop:
                    checkpoint.save(self.engine, cfg, step, tuple(self.frozen.values()))
                if stop:
                    return step
        return cfg.train.steps

    def step(self, step: int) -> dict[str, Any]:
        """One step of the algorithm, and its metrics. Collective."""
        cfg, sums, recipe = self.cfg, Sums(), self.recipe.at(step)
        with self.phases("rollout"):
            rollouts = self.sample(step, sums)
        with self.phases("write"):
            self.write_references(step, rollouts, sums)
        with self.phases("rollout"):
            self.sampler.sleep()
        with self.phases("wait"):
            dist.barrier()  # for the slowest rank's rollouts; scoring would wait for them unseen
        with self.phases("score"):
            experience = pack(cfg, recipe, rollouts, self.device)
            passes = schedule(cfg, recipe, experience)
        self.watch.count_work(recipe, experience, passes, sums)
        self.learn(step, experience, passes, sums)
        with self.phases("push"):
            self.push()
        held_out = {}
        if cfg.eval.every and (step % cfg.eval.every == 0 or step == cfg.train.steps):
            with self.phases("eval"):
                held_out = self.evaluate()
        with self.phases("records"):
            figures = self.watch.keep(step, experience)
        return self.watch.values(step, sums, self.phases, figures | held_out, self.device)

    def learn(self, step: int, experience: Experience, passes: Schedule, sums: Sums) -> None:
        """Score, credit, update. The host waits for no value here, but for the first step's check of the pushed weights, which
        comes last: what a recipe scores first or not, the log-probs are there then, and nothing was saved yet."""
        recipe = self.recipe.at(step)
        with self.phases("score"):
            score(recipe, experience, passes.score, self.forward)
        with self.phases("credit"):
            assign(recipe, experience, step, sums)
        sums.mean("padding_share", *passes.padding)
        with self.phases("update"):
            self.update(step, experience, passes.update, sums)
            for model in self.frozen.values():
                model.follow(step)
        count(experience, sums)
        if not self.gap_checked:  # weights that did not arrive show as nats, not as rounding
            self.gap_checked = True
            check_gap(self.cfg, step, sums.read(self.device)["logprob_gap_mean"])

    def write_references(self, step: int, rollouts: list[Rollout], sums: Sums) -> None:
        """Let the teacher see something else than the ground truth, where the recipe says so."""
        if self.references:
            for name, value in self.references.write(rollouts, (self.cfg.seed, step)).items():
                sums.total(name, value)

    def push(self) -> None:
        """Hand the policy's weights to the rollout engine, layer by layer, or with LoRA its adapters alone. Collective."""
        lm, chosen = self.engine.module.lm, self.cfg.lora
        if chosen.rank == 0 or chosen.push == "merged":
            self.sampler.push(gathered_weights(lm))
            return
        adapter = adapter_state_dict(lm)
        with tempfile.TemporaryDirectory(prefix="gear-adapter-") as folder:  # engines read files, a few MB of page cache
            lora.write(Path(folder), lm, adapter)
            self.sampler.push_adapter(Path(folder))

    def evaluate(self) -> dict[str, Any]:
        """Figures of the held-out sets, under the same seeds every time. Collective."""
        return evaluation.measure(self.held_out, self.sampler, (self.rank, dist.get_world_size()))
