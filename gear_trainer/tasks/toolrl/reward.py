"""ToolRL's reward of one turn: 0 or 1 for its form, -3 to 3 for its calls where the ground truth has some."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gear_trainer.tasks.tool_calls import THOUGHT, ToolCall, spoken

HIGHEST, LOWEST = 3.0, -3.0  # of the calls
_CALLS, _WORDS = r"<tool_call>\n.*?\n</tool_call>", r"<response>.*?</response>"


def form_reward(truth: str, text: str) -> float:
    """1 where the turn is thought and then what the ground truth has (calls, a response or both), each once; else 0.

    Tags are counted behind the last `</think>`: one that is mentioned in thought costs nothing.
    """
    parts = [pattern for tag, pattern in (("<tool_call>", _CALLS), ("<response>", _WORDS)) if tag in spoken(truth)]
    said = spoken(text)
    if any(said.count(tag) > 1 for tag in ("<tool_call>", "</tool_call>", "<response>", "</response>")):
        return 0.0
    thought = text.removesuffix(said)
    begun = thought.startswith("<think>") and thought.endswith(THOUGHT)
    return float(begun and re.fullmatch("".join(f"\n{part}" for part in parts), said, re.DOTALL) is not None)


def call_reward(truth: Sequence[ToolCall], calls: Sequence[ToolCall | str]) -> float:
    """-3 for no or a broken call, 3 for the very calls; between them by names, parameters' names and values.

    Names: the overlap of both lists as multisets. For each call of the ground truth, in order: of the unused calls of its name
    the one with most (overlap of its parameters' names + equal values). Their sum, over the most that it can be.
    """
    read = [call for call in calls if isinstance(call, ToolCall)]
    if not read or len(read) < len(calls):
        return LOWEST
    if list(truth) == read:
        return HIGHEST
    score, most = overlap([call.name for call in truth], [call.name for call in read]), 1.0
    for gold in truth:
        most += 1 + len(gold.arguments)
        scores = [_likeness(gold, call) for call in read]
        if scores and max(scores) > 0:
            best = scores.index(max(scores))
            score += scores[best]
            read.pop(best)
    return (HIGHEST - LOWEST) * score / most + LOWEST


def _likeness(gold: ToolCall, call: ToolCall) -> float:
    if call.name != gold.name:
        return 0.0
    equal = sum(key in call.arguments and call.arguments[key] == value for key, value in gold.arguments.items())
    return overlap(list(gold.arguments), list(call.arguments)) + equal


def overlap(one: list[str], other: list[str]) -> float:
    """The Jaccard index of two lists as multisets: what both hold over what either holds; 1 where both are empty."""
    a, b = Counter(one), Counter(other)
    return (a & b).total() / (a | b).total() if a or b else 1.0


def same_calls(truth: Sequence[ToolCall], calls: Sequence[ToolCall | str]) -> bool:
    """True where the calls are the ground truth's, in any order."""
    return len(truth) == len(calls) and Counter(map(_key, truth)) == Counter(map(_key, calls))


def _key(call: Any) -> str:
    return json.dumps(call, sort_keys=True)
