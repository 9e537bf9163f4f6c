"""Users who speak within an episode, between a turn without a call and the next.

A user has `reply(history)`. The history is a list of chat messages, `{"role": ..., "content": ...}`, up to the assistant's last;
None ends the episode. A user that waits for something (an endpoint) has its task say `concurrency`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class User(Protocol):
    """Whoever speaks next."""

    def reply(self, history: Sequence[dict[str, Any]]) -> str | None:
        """The user's next words; None: nothing more to say, the episode is over."""
        ...


class Scripted:
    """A user with lines to say one after the other, whatever the assistant says."""

    def __init__(self, lines: Iterable[str]):
        self._lines = iter(lines)

    def reply(self, history: Sequence[dict[str, Any]]) -> str | None:
        """The next line; None behind the last."""
        return next(self._lines, None)
