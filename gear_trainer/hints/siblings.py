"""A correct sibling for the teacher to see (SC-GRPO, arXiv 2606.18810): another rollout of the group that succeeded, as text, in
place of the ground truth. For a control, a failed sibling in the very same prompt (RLCSD, arXiv 2606.11709)."""

from __future__ import annotations

from gear_trainer.hints import TEMPLATES
from gear_trainer.hints.writer import said, with_reference
from gear_trainer.rollout import Rollout, groups_of
from gear_trainer.rollout.chat import Chat
from gear_trainer.tasks.base import Problem
from gear_trainer.tasks.common import load_template


class Siblings:
    """Gives each rollout of a group the next success after it, in a circle, that is not itself. The only success has none.

    wrong_hint: also the next failure, for the control. Where there is no such failure, a rollout is shown neither.
    """

    def __init__(self, chat: Chat, wrong_hint: bool = False):
        self.chat, self.wrong_hint = chat, wrong_hint
        self.template = load_template(None, TEMPLATES / "sibling_teacher.txt", ("question", "reference"))

    def write(self, rollouts: list[Rollout], key: tuple[object, ...]) -> dict[str, int]:
        """Set `reference` and `teacher_prompt_ids` where there is a sibling, `wrong_prompt_ids` for a control. Returns counts for
        the metrics."""
        counts = {"siblings_shown": 0, "siblings_missing": 0}
        for group in groups_of(rollouts):
            for i, rollout in enumerate(group):
                others = group[i + 1 :] + group[:i]
                sibling = next((r for r in others if r.success), None)
                wrong = next((r for r in others if not (r.success or r.failed)), None)
                if self.wrong_hint and wrong is None:
                    sibling = None
                counts["siblings_missing" if sibling is None else "siblings_shown"] += 1
                if sibling is not None:
                    rollout.reference = said(self.chat, sibling)
                    rollout.teacher_prompt_ids = self.prompt(rollout.problem, rollout.reference)
                    if self.wrong_hint and wrong is not None:
                        rollout.wrong_prompt_ids = self.prompt(rollout.problem, said(self.chat, wrong))
        return counts

    def prompt(self, problem: Problem, reference: str) -> list[int]:
        return self.chat.prompt_ids(with_reference(self.template, problem, reference), problem.tools, problem.tags)
