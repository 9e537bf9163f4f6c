"""Tool calls in a turn's text, in Qwen3's format: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`.

What stands before the last `</think>` is thought, not said: a call that is mentioned there is none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THOUGHT = "</think>"

_NOT_CLOSED = "the tool_call block is not closed"
_NO_JSON = "the call is not valid JSON"
_NO_CALL = "a call is an object with name and arguments"


class ToolCall(NamedTuple):
    """A well-formed call."""

    name: str
    arguments: dict[str, Any]


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """The JSON of one call."""
    return json.dumps({"name": name, "arguments": arguments})


def call_turn(name: str, arguments: dict[str, Any]) -> str:
    """One assistant turn with one call."""
    return calls_turn([ToolCall(name, arguments)])


def calls_turn(calls: Iterable[ToolCall]) -> str:
    """One assistant turn with a block for each call."""
    return "\n".join(f"{OPEN}\n{call_text(*call)}\n{CLOSE}" for call in calls)


def spoken(text: str) -> str:
    """The part of a turn that is said: the text behind its last `</think>`, all of it where there is none."""
    return text.rpartition(THOUGHT)[2]


def split_calls(text: str) -> list[str | None]:
    """The bodies of a turn's tool calls; None stands for a block that was opened and not closed."""
    blocks = spoken(text).split(OPEN)[1:]
    return [block.split(CLOSE, 1)[0] if CLOSE in block else None for block in blocks]


def read_calls(text: str) -> list[ToolCall | str]:
    """The calls of a turn, of whatever tool, in their order; in the place of a broken one what is wrong with it, a fixed text.

    A block holds one JSON object, or several, one a line. The arguments stand under "arguments" or "parameters"; other keys are
    left alone. NaN and infinities are no JSON.
    """
    return [call for body in split_calls(text) for call in _read_block(body)]


def _read_block(body: str | None) -> list[ToolCall | str]:
    if body is None:
        return [_NOT_CLOSED]
    whole = _read_loose(body)
    lines = [line for line in body.splitlines() if line.strip()]
    return [_read_loose(line) for line in lines] if whole == _NO_JSON and len(lines) > 1 else [whole]


def _read_loose(text: str) -> ToolCall | str:
    try:
        call = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NO_JSON
    if isinstance(call, dict) and isinstance(name := call.get("name"), str):
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, dict):
            return ToolCall(name, arguments)
    return _NO_CALL


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def read_call(body: str | None, tools: Collection[str]) -> ToolCall | str:
    """The call of one of `tools` that a body holds, with nothing beside its two keys, or what is wrong with it.

    Messages are fixed texts: no model text is echoed back.
    """
    if body is None:
        return _NOT_CLOSED
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return _NO_JSON
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return _NO_CALL
    if not isinstance(call["name"], str) or call["name"] not in tools:
        return f"unknown tool; use {', '.join(tools)}"
    return ToolCall(call["name"], call["arguments"])


def function_schema(name: str, description: str, parameters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of one tool, all of whose parameters are required, as the model sees it through the chat template."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
