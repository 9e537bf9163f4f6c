"""Chat rendering that never re-tokenises what the model wrote: prompts once, tool replies as the text between two turns."""

from __future__ import annotations

from typing import Any

_SENTINEL = "\x02assistant-turn\x02"  # stands for the sampled turn while the template renders what follows it


class Chat:
    """Renders prompts and tool replies with the tokenizer's own chat template.

    A conversation is one flat token stream: `prompt_ids(messages)`, then the sampled ids of a turn (its end-of-turn token
    included, verbatim), then `observation_ids(replies)`, then the next sampled turn. Earlier ids are never rendered again, so
    what was sampled is what is scored (a template that drops earlier reasoning, as Qwen3's does, cannot change the past).
    """

    def __init__(self, tokenizer: Any, tools: list[dict[str, Any]] | None = None, template_kwargs: dict[str, Any] | None = None):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path!r} has no chat template: use an instruct model, or put a "
                "chat_template.jinja beside its tokenizer.json"
            )
        self.tokenizer, self.tools, self.kwargs = tokenizer, tools, template_kwargs or {}
        self._observations: dict[tuple[str, ...], list[int]] = {}

    def render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=self.tools, tokenize=False, add_generation_prompt=True, **self.kwargs
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt up to and including the assistant header."""
        return self.encode(self.render(messages))

    def observation_ids(self, replies: list[str]) -> list[int]:
        """What stands between the end-of-turn token of a turn that called tools and the next turn's first sampled token."""
        key = tuple(replies)
        if key not in self._observations:
            head = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _SENTINEL}]
            text = self.render(head + [{"role": "tool", "content": r} for r in replies])
            after = text.split(_SENTINEL, 1)[1]
            eos = self.tokenizer.eos_token
            self._observations[key] = self.encode(after.removeprefix(eos))
        return list(self._observations[key])
