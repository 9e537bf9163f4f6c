"""Credit references (SGCD, arXiv 2606.12634): a language model reads a mixed group's rollouts with their verdicts and writes,
step by step, what made the difference; masked, that text stands in the teacher's prompt in place of the ground truth."""

from __future__ import annotations

import re
from itertools import chain, zip_longest
from typing import Protocol

from gear_trainer.config import Config, ConfigError, WriterConfig
from gear_trainer.hints import TEMPLATES
from gear_trainer.hints.masking import PLACEHOLDER, mask
from gear_trainer.rollout import Engine, Request, Rollout, groups_of, is_mixed, seed_of
from gear_trainer.rollout.chat import Chat, fitted, level
from gear_trainer.tasks.base import Problem
from gear_trainer.tasks.common import fill, load_template, user

LEAST = 32  # tokens; of an attempt cut shorter than this little can be read, so fewer are shown
_CUT = " [...] "


class WriterModel(Protocol):
    context: int  # tokens of prompt and reference together

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str | None]:
        """One text for each prompt, None where there is none. Never raises for what an endpoint does."""
        ...


class PolicyWriter:
    """The policy itself, through the rank's rollout engine."""

    def __init__(self, cfg: Config, chat: Chat, engine: Engine):
        self.context, self.writer, self.engine = cfg.rollout.max_model_len, cfg.writer, engine
        self.chat = Chat(chat.tokenizer, None, chat.kwargs)  # a reference is text: no tools

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str | None]:
        if not prompts:
            return []
        ids = [self.chat.prompt_ids(user(prompt)) for prompt in prompts]
        w = self.writer
        completions = self.engine.generate([Request(p, w.max_tokens, s, w.temperature) for p, s in zip(ids, seeds, strict=True)])
        return [self.chat.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]


class Writer:
    """Gives mixed groups their reference. `model` None: only prompts can be made, which the checks before a run need."""

    def __init__(self, cfg: Config, chat: Chat, model: WriterModel | None, context: int):
        w = cfg.writer
        self.template, self.teacher_template = templates(w)
        self.chat, self.model, self.max_tokens = chat, model, w.max_tokens
        self.room, self.max_model_len = context - w.max_tokens, cfg.rollout.max_model_len
        self._asking = Chat(chat.tokenizer, None, chat.kwargs)

    def write(self, rollouts: list[Rollout], key: tuple[object, ...]) -> dict[str, int]:
        """Set `reference` and `teacher_prompt_ids` of mixed groups' rollouts, seeded by key. Returns counts for the metrics."""
        groups = [group for group in groups_of(rollouts) if is_mixed(group)]
        asked = [(group, prompt) for group in groups if (prompt := self.prompt(group)) is not None]
        seeds = [seed_of(*key, group[0].group, "writer") for group, _ in asked]
        assert self.model is not None  # a run has one
        texts = self.model.complete([prompt for _, prompt in asked], seeds)
        masked = [self._splice(group, text) for (group, _), text in zip(asked, texts, strict=True) if text]
        written = [text for text in masked if text is not None]
        return {
            "references_written": len(written),
            "references_failed": len(groups) - len(written),
            "reference_masks": sum(text.count(PLACEHOLDER) for text in written),
        }

    def prompt(self, group: list[Rollout]) -> str | None:
        """The writer's prompt: its attempts cut in the middle, or left out, until it fits; None where nothing would be left."""
        attempts = [(f"({'success' if r.success else 'failure'})", self._encode(said(self.chat, r))) for r in _alternating(group)]
        question = _question(group[0].problem)

        def render(budget: int) -> str:
            return self.chat.plain(fill(self.template, question=question, attempts=self._attempts(attempts, budget)))

        return fitted(render, self._count, self.attempt_room(group[0].problem), self.room)

    def attempt_room(self, problem: Problem) -> int:
        """Tokens that the writer's prompt leaves for attempts."""
        return self.room - self._count(fill(self.template, question=_question(problem), attempts=""))

    def teacher_prompt(self, problem: Problem, reference: str) -> list[int]:
        """The teacher's prompt with a reference in place of the ground truth, as tokens."""
        return self.chat.prompt_ids(with_reference(self.teacher_template, problem, reference), problem.tools, problem.tags)

    def longest_teacher_prompt(self, problem: Problem) -> int:
        """Tokens, at most. A reference gives way where the prompt and a rollout would pass max_model_len."""
        bare = len(self.teacher_prompt(problem, ""))
        return min(bare + self.max_tokens, self.max_model_len)

    def _splice(self, group: list[Rollout], text: str) -> str | None:
        """Mask a written reference, cut it to its bound and put it into the group's teacher prompts."""
        problem = group[0].problem
        text = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL)  # of a reasoning model, only the result
        ids = self._encode(mask(self.chat.plain(text), problem.answer).strip())

        def render(budget: int) -> str:
            return self._decode(ids[:budget]).strip()

        def count(reference: str) -> int:
            return len(self.teacher_prompt(problem, reference))

        reference = fitted(render, count, self.max_tokens, self.max_model_len - max(len(r.ids) for r in group))
        if not reference:
            return None
        prompt = self.teacher_prompt(problem, reference)
        for rollout in group:
            rollout.reference, rollout.teacher_prompt_ids = reference, prompt
        return reference

    def _attempts(self, attempts: list[tuple[str, list[int]]], budget: int) -> str:
        shown = list(attempts)
        while len(shown) > 2 and budget < LEAST * len(shown) and sum(len(ids) for _, ids in shown) > budget:
            shown.pop()
        most = level([len(ids) for _, ids in shown], budget)
        return "\n".join(f"{i}. {verdict}\n{self._cut(ids, most)}" for i, (verdict, ids) in enumerate(shown, 1))

    def _cut(self, ids: list[int], most: int) -> str:
        if len(ids) <= most:
            return self._decode(ids)
        head = most // 2
        return self._decode(ids[:head]) + _CUT + self._decode(ids[len(ids) - (most - head) :])

    def _encode(self, text: str) -> list[int]:
        return self.chat.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self.chat.tokenizer.decode(ids)

    def _count(self, prompt: str) -> int:
        return len(self._asking.prompt_ids(user(prompt)))


def with_reference(template: str, problem: Problem, reference: str) -> list[dict[str, str]]:
    """The student's chat with the reference in its last message."""
    text = fill(template, question=problem.messages[-1]["content"], reference=reference)
    return [*problem.messages[:-1], *user(text)]


def said(chat: Chat, rollout: Rollout) -> str:
    """A rollout as text. It is data wherever it is shown: what the model sampled may spell control tokens."""
    return chat.plain(chat.tokenizer.decode(rollout.ids, skip_special_tokens=True)).strip()


def templates(cfg: WriterConfig) -> tuple[str, str]:
    """The writer's and the teacher's prompt. Raises TaskError."""
    return (
        load_template(cfg.template, TEMPLATES / "sgcd_writer.txt", ("question", "attempts")),
        load_template(cfg.teacher_template, TEMPLATES / "sgcd_teacher.txt", ("question", "reference")),
    )


def check_room(writer: Writer, problem: Problem, max_new_tokens: int) -> None:
    """Raises ConfigError where no two attempts fit into the writer's prompt, or no reference into the teacher's."""
    room = writer.attempt_room(problem)
    if room < 2 * LEAST:
        raise ConfigError(
            f"writer: its prompt leaves {room} tokens for a group's attempts, at least {2 * LEAST} are needed: raise "
            f"rollout.max_model_len (with a url, writer.max_model_len) by {2 * LEAST - room}, or lower "
            f"writer.max_tokens={writer.max_tokens}"
        )
    bare = len(writer.teacher_prompt(problem, ""))
    least = bare + LEAST + max_new_tokens
    if least > writer.max_model_len:
        raise ConfigError(
            f"rollout.max_model_len={writer.max_model_len}: the teacher's prompt has {bare} tokens without its reference; "
            f"set it to {least} or more"
        )


def _question(problem: Problem) -> str:
    """The task's text for the writer; of a longer chat, every message with its role."""
    if len(problem.messages) == 1:
        return problem.messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in problem.messages)


def _alternating(group: list[Rollout]) -> list[Rollout]:
    """A success, a failure, a success, ...: whatever is left out at the end, both kinds stay."""
    good, bad = [r for r in group if r.success], [r for r in group if not r.success]
    return [r for r in chain(*zip_longest(good, bad)) if r is not None]
