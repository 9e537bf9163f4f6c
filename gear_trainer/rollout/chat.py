"""Chat rendering that never re-tokenises what the model wrote: prompts once, replies as the text between two turns.

What a tool, a user or a data file says is data. `Chat.plain` breaks up whatever spells one of the tokenizer's control tokens, so
that no text opens a turn, closes its own, or ends a block of the template; replies are cut to the room that is left for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, TypeVar

from gear_trainer.tasks.base import Message

Tools = list[dict[str, Any]] | None  # JSON schemas
_SENTINEL = "\x02assistant-turn\x02"  # stands for the sampled turn while the template renders what follows it
T = TypeVar("T")
_KEPT = 512  # replies that are remembered as tokens: siblings often call the same tool with the same arguments


class Observation(NamedTuple):
    """A reply as tokens; of its messages, how many spelled control tokens and how many were cut."""

    ids: list[int]
    escaped: int = 0
    cut: int = 0


class _Same:
    """A problem's tools as a key: equal where they are the same object, which the key keeps alive."""

    def __init__(self, tools: list[dict[str, Any]]):
        self.tools = tools

    def __hash__(self) -> int:
        return id(self.tools)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tools is other.tools


class Chat:
    """Renders prompts and replies with the tokenizer's own chat template. `tools` are those of problems without their own.

    A conversation is one flat token stream: `prompt_ids(messages)`, then the sampled ids of a turn (its end-of-turn token
    included, verbatim), then `observe(messages)`, then the next sampled turn. Earlier ids are never rendered again, so what was
    sampled is what is scored (a template that drops earlier reasoning, as Qwen3's does, cannot change the past).

    A control token is every added token of the tokenizer, "special" or not, but for runs of whitespace: Qwen3's <tool_call> and
    <think> are as good as <|im_end|> at forging structure. Harmless text is rendered and encoded as if nobody had looked at it.
    """

    def __init__(self, tokenizer: Any, tools: list[dict[str, Any]] | None = None, template_kwargs: dict[str, Any] | None = None):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path!r} has no chat template: use an instruct model, or put a "
                "chat_template.jinja beside its tokenizer.json"
            )
        self.tokenizer, self.kwargs = tokenizer, template_kwargs or {}
        self._control, self._break, self._normal = _control(tokenizer)
        self.tools = _mapped(self.plain, tools)
        self._between = lru_cache(_KEPT)(self._encode_between)  # under the task's tools
        self._own_tools = lru_cache(_KEPT)(lambda same: _mapped(self.plain, same.tools) or None)  # shown with every reply

    def plain(self, text: str, tags: Sequence[str] = ()) -> str:
        """A text as data: spellings of control tokens broken up (`< |im_end|>`) but for those of `tags`, lone surrogates
        replaced. Idempotent."""
        if tags:
            parts = re.split(f"({'|'.join(map(re.escape, tags))})", text)
            return "".join(part if part in tags else self.plain(part) for part in parts)
        text = _whole_characters(text)
        while (found := self._spelling(text)) is not None:  # what was broken may leave a spelling around it: <|im_<|im_end|>end|>
            text = self._control.sub(lambda m: m[0][0] + self._break + m[0][1:] if len(m[0]) > 1 else self._break, found)
        return text

    def escapes(self, messages: list[dict[str, Any]], tags: Sequence[str] = ()) -> int:
        """The number of a chat's texts that `plain` has to change."""
        changed: list[bool] = []

        def look(text: str) -> str:
            changed.append(self.plain(text, tags) != text)
            return text

        _data(look, messages)
        return sum(changed)

    def render(self, messages: list[dict[str, Any]], tools: Tools = None, tags: Sequence[str] = ()) -> str:
        """The template's text, every content as data; `tools` and `tags`: a problem's own (tools None: the task's)."""
        shown = self.tools if tools is None else self._own_tools(_Same(tools))
        return self.tokenizer.apply_chat_template(
            _data(partial(self.plain, tags=tags), messages),
            tools=shown,
            tokenize=False,
            add_generation_prompt=True,
            **self.kwargs,
        )

    def encode(self, text: str) -> list[int]:
        """A rendered or a written text: what spells a control token becomes one."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def prompt_ids(self, messages: list[dict[str, Any]], tools: Tools = None, tags: Sequence[str] = ()) -> list[int]:
        """The prompt up to and including the assistant header."""
        return self.encode(self.render(messages, tools, tags))

    def observation_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """The tokens between a turn's end-of-turn token and the next turn's first sampled one: what was said between."""
        roles = [message.role for message in messages]
        return self._said(roles, [self.plain(message.content) for message in messages], tools)

    def observe(self, messages: Sequence[Message], room: int, reserve: int = 0, tools: Tools = None) -> Observation | None:
        """The same in at most `room` tokens: where whole messages do not fit, the long ones are cut in the middle, by as much as
        leaves `reserve` tokens of it free. None where not even cut ones fit."""
        roles, texts = [m.role for m in messages], [self.plain(m.content) for m in messages]
        escaped = sum(text != m.content for text, m in zip(texts, messages, strict=True))
        bound = max(room, 0) * self._widest  # characters: of a longer text the tokens need not be counted
        if sum(map(len, texts)) <= bound and len(ids := self._said(roles, texts, tools)) <= room:
            return Observation(ids, escaped)
        lengths = [len(self.encode(text)) if len(text) <= bound else bound + 1 for text in texts]

        def render(budget: int) -> list[str]:
            most = level(lengths, budget)
            return [text if n <= most else self._shortened(text, most) for text, n in zip(texts, lengths, strict=True)]

        def count(shown: list[str]) -> int:
            return len(self._encode_between(tuple(zip(roles, shown, strict=True)), tools))

        shown = fitted(render, count, room, room - reserve)
        if shown is None:
            return None
        cut = sum(a != b for a, b in zip(shown, texts, strict=True))
        return Observation(self._said(roles, [self.plain(text) for text in shown], tools), escaped, cut)

    def _said(self, roles: list[str], texts: list[str], tools: Tools) -> list[int]:
        messages = tuple(zip(roles, texts, strict=True))
        return list(self._between(messages) if tools is None else self._encode_between(messages, tools))

    def _encode_between(self, messages: tuple[tuple[str, str], ...], tools: Tools = None) -> list[int]:
        head = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _SENTINEL}]
        text = self.render(head + [{"role": role, "content": text} for role, text in messages], tools)
        after = text.split(_SENTINEL, 1)[1]
        return self.encode(after.removeprefix(self.tokenizer.eos_token))

    def _spelling(self, text: str) -> str | None:
        """The form of a text, itself or normalised, in which it spells a control token; None where neither does."""
        return next((form for form in (text, self._normal(text)) if self._control.search(form)), None)

    @cached_property
    def _widest(self) -> int:
        """Characters of the longest token: n tokens hold n times as many at most (composition by the normaliser aside)."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _shortened(self, text: str, most: int) -> str:
        """Head and tail of a text, `most` tokens together, around a line that says how many characters are missing."""
        part, spans = self._spans(text, most - most // 2, head=True)
        head = part[: spans[most - most // 2 - 1][1]] if spans else ""
        rest = text[len(head) :]
        part, spans = self._spans(rest, most // 2, head=False)
        tail = part[spans[-(most // 2)][0] :] if spans else ""
        return f"{head}\n[... {len(rest) - len(tail):,} characters cut ...]\n{tail}"

    def _spans(self, text: str, count: int, head: bool) -> tuple[str, list[tuple[int, int]]]:
        """An end of the text that holds `count` tokens, and where they lie in it; no more of a long text is looked at than that
        takes. No spans where it has fewer."""
        for width in (8 * count, self._widest * count):
            part = text[:width] if head else text[max(0, len(text) - width) :]
            found = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if 0 < count <= len(spans := found["offset_mapping"]):
                return part, spans
        return part, []


def level(lengths: list[int], budget: int) -> int:
    """The largest bound on each of the lengths that keeps their sum within the budget."""
    left = budget
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return share
        left -= length
    return max(lengths)


def fitted(render: Callable[[int], T], count: Callable[[T], int], budget: int, limit: int) -> T | None:
    """`render(budget)`, the budget lowered until that counts at most `limit` tokens; None where it reaches 0."""
    while budget > 0:
        rendered = render(budget)
        over = count(rendered) - limit
        if over <= 0:
            return rendered
        budget -= over
    return None


def _data(change: Callable[[str], str], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with every text in them changed, but for the role, which is the program's word."""
    return [{key: value if key == "role" else _mapped(change, value) for key, value in m.items()} for m in messages]


def _mapped(change: Callable[[str], str], value: Any) -> Any:
    """A value as JSON has it, with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(change, key): _mapped(change, part) for key, part in value.items()}
    return [_mapped(change, part) for part in value] if isinstance(value, list) else value


def _whole_characters(text: str) -> str:
    """Halves of surrogate pairs, which no encoding has, become U+FFFD; whole pairs become their character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _control(tokenizer: Any) -> tuple[re.Pattern[str], str, Callable[[str], str]]:
    """A pattern of all control tokens' spellings, what to break them with, and what the tokenizer does to a text before it looks
    for those of them that it looks for in normalised text."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    normal = normalizer.normalize_str if normalizer is not None and any(token.normalized for token in added) else str
    spelled = {str(token) for token in added}
    spelled |= {form for form in map(normal, spelled) if form.strip()}
    longest_first = sorted(spelled, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"), _breaker(spelled, normal), normal


def _breaker(spelled: set[str], normal: Callable[[str], str]) -> str:
    """A character that survives normalisation and is part of no spelling, so that breaking never makes a new one."""
    for mark in (" ", "\u200b", "\ufffd"):
        form = normal(f"a{mark}b")
        inner = form[form.find("a") + 1 : form.rfind("b")]
        if inner and not any(mark in s or inner in s for s in spelled):
            return mark
    raise ValueError("the tokenizer's added tokens hold every character that could break up their spelling in a tool's reply")
