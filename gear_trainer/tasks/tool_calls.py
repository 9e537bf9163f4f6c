"""Tool calls in a turn's text, in Qwen3's format: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A well-formed call of a tool that there is."""

    name: str
    arguments: dict[str, Any]


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """The JSON of one call."""
    return json.dumps({"name": name, "arguments": arguments})


def call_turn(name: str, arguments: dict[str, Any]) -> str:
    """One assistant turn with one call."""
    return f"{OPEN}\n{call_text(name, arguments)}\n{CLOSE}"


def split_calls(text: str) -> list[str | None]:
    """The bodies of a turn's tool calls; None stands for a block that was opened and not closed."""
    blocks = text.split(OPEN)[1:]
    return [block.split(CLOSE, 1)[0] if CLOSE in block else None for block in blocks]


def read_call(body: str | None, tools: Collection[str]) -> ToolCall | str:
    """The call that a body holds, or what is wrong with it. Messages are fixed texts: no model text is echoed back."""
    if body is None:
        return "the tool_call block is not closed"
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return "the call is not valid JSON"
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return "a call is an object with name and arguments"
    if not isinstance(call["name"], str) or call["name"] not in tools:
        return f"unknown tool; use {', '.join(tools)}"
    return ToolCall(call["name"], call["arguments"])


def function_schema(name: str, description: str, parameters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of one tool, all of whose parameters are required, as the model sees it through the chat template."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
