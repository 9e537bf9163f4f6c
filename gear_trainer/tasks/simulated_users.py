"""Users for want of a person: by a rule, for runs without a network, and behind an OpenAI-compatible endpoint.

Both are functions of the history alone, so rollouts of a group and a resumed run hear the same words to the same history.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import TaskError


@dataclass(frozen=True)
class RuleUser:
    """A user who says all that is wanted at once and agrees to whatever is asked; words that ask nothing end the talk.

    Good for tests and for seeing that a task works; its figures stand beside nobody's.
    """

    opening: str
    facts: str = ""
    patience: int = 8  # answers after the opening

    def reply(self, history: Sequence[dict[str, Any]]) -> str | None:
        """The opening to an empty history, then agreement."""
        said = sum(message["role"] == "user" for message in history)
        if not history or not said:
            return self.opening
        if said > self.patience or "?" not in history[-1]["content"]:
            return None
        return f"This is all that I know: {self.facts} Yes, please go on." if said == 1 and self.facts else "Yes, please go on."


@dataclass(frozen=True)
class EndpointUser:
    """A user played by a served model. prompt: its instructions. greeting: the agent's first words, which it answers.

    stops: a reply with one of these ends the episode. A server that does not answer raises, which ends the rollout as an error.
    """

    endpoint: Endpoint
    prompt: str
    greeting: str
    stops: tuple[str, ...] = ()

    def reply(self, history: Sequence[dict[str, Any]]) -> str | None:
        """The model's answer to the assistant's last words."""
        other = {"assistant": "user", "user": "assistant"}
        chat = [{"role": "system", "content": self.prompt}, {"role": "user", "content": self.greeting}]
        chat += [{"role": other[m["role"]], "content": m["content"]} for m in history if m["role"] in other and m["content"]]
        said = self.endpoint.complete(chat)
        return None if any(stop in said for stop in self.stops) else said


@dataclass(frozen=True)
class Endpoint:
    """A served model at temperature 0, asked once for each chat. Names as in the run's `writer`.

    cache: a file of JSON lines with what it said, which a resumed run reads; ranks may share it.
    """

    url: str
    model: str
    api_key_env: str | None = None
    cache: str | None = None
    max_tokens: int = 512
    timeout: float = 60.0  # seconds, each of three tries
    _said: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _client: list[Any] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise TaskError(f"user_url: {self.url!r} is no http address; give the base URL, as http://127.0.0.1:8000/v1")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise TaskError(f"user_api_key_env: no environment variable {self.api_key_env!r}; export it on every node")
        if self.cache and Path(self.cache).exists():
            self._said.update(_remembered(Path(self.cache)))

    @classmethod
    def of(cls, url: str | None, model: str | None, api_key_env: str | None, cache: str | None) -> Endpoint | None:
        """The endpoint of a task's arguments user_url, user_model and so on; None without an address. Raises TaskError."""
        if url is None:
            return None
        if model is None:
            raise TaskError("user_model is missing: name the model that user_url serves")
        return cls(url, model, api_key_env, cache)

    def complete(self, chat: list[dict[str, str]]) -> str:
        """The model's next words. Raises what the client raises, and RuntimeError for an empty answer."""
        key = hashlib.sha256(json.dumps([self.model, self.max_tokens, chat]).encode()).hexdigest()
        with self._lock:
            if key in self._said:
                return self._said[key]
        answer = self._connected().chat.completions.create(
            model=self.model, messages=chat, max_tokens=self.max_tokens, temperature=0.0, seed=0
        )
        said = answer.choices[0].message.content
        if not said or not said.strip():
            raise RuntimeError(f"the user at {self.url} said nothing")
        return self._remember(key, said.strip())

    def _connected(self) -> Any:
        with self._lock:
            if not self._client:
                try:
                    import openai
                except ImportError as error:
                    raise TaskError(f"user_url needs the package openai ({error}): pip install openai") from error
                key = os.environ[self.api_key_env] if self.api_key_env else "EMPTY"  # never the client's own default
                self._client.append(openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=2))
            return self._client[0]

    def _remember(self, key: str, said: str) -> str:
        with self._lock:
            first = self._said.setdefault(key, said)  # another thread may have asked the same meanwhile
            if self.cache and first is said:
                with Path(self.cache).open("a", encoding="utf-8") as file:  # one write, so ranks do not mix
                    file.write(json.dumps({"key": key, "said": said}) + "\n")
            return first


def _remembered(path: Path) -> dict[str, str]:
    """The lines of a cache, first come first kept; a last line that a killed run cut is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"user_cache: cannot read {path} ({error}): delete it, or name another file") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            found.setdefault(row["key"], row["said"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise TaskError(f"user_cache: {path}, line {number} is no line of a cache: delete it") from error
    return found
