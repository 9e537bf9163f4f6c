"""A correct sibling for the teacher to see (SC-GRPO, arXiv 2606.18810): another rollout of the group that succeeded, as text, in
place of the ground truth."""

from __future__ import annotations

from gear_trainer.hints import TEMPLATES
from gear_trainer.hints.writer import said, with_reference
from gear_trainer.rollout import Rollout, groups_of
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks.base import Problem
from gear_trainer.tasks.common import load_template


class Siblings:
    """Gives each rollout of a group the next success after it, in a circle, that is not itself. The only success has none."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.template = load_template(None, TEMPLATES / "sibling_teacher.txt", ("question", "reference"))

    def write(self, rollouts: list[Rollout], key: tuple[object, ...]) -> dict[str, int]:
        """Set `reference` and `teacher_prompt_ids` where there is a sibling. Returns counts for the metrics."""
        counts = {"siblings_shown": 0, "siblings_missing": 0}
        for group in groups_of(rollouts):
            for i, rollout in enumerate(group):
                others = group[i + 1 :] + group[:i]
                sibling = next((r for r in others if r.success), None)
                counts["siblings_missing" if sibling is None else "siblings_shown"] += 1
                if sibling is not None:
                    rollout.reference = said(self.chat, sibling)
                    rollout.teacher_prompt_ids = self.prompt(rollout.problem, rollout.reference)
        return counts

    def prompt(self, problem: Problem, reference: str) -> list[int]:
        return self.chat.prompt_ids(with_reference(self.template, problem, reference), problem.tools, problem.tags)
