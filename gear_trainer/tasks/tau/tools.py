"""The part that both families share: the tools' schemas and answers, and the calls of a turn run in order."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from gear_trainer.tasks.base import Message, Reply
from gear_trainer.tasks.tool_calls import read_call, split_calls

MAX_CALLS = 16  # run a turn; more is a runaway


def schema_of(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a method, by its hints and its docstring."""
    import pydantic
    from transformers.utils.chat_template_utils import parse_google_format_docstring

    said, arguments, _ = parse_google_format_docstring(inspect.getdoc(tool) or "")
    fields: dict[str, Any] = {}
    for key, parameter in inspect.signature(tool, eval_str=True).parameters.items():
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[key] = (parameter.annotation, pydantic.Field(default, description=(arguments or {}).get(key)))
    parameters = pydantic.create_model(name, **fields).model_json_schema()
    return {"type": "function", "function": {"name": name, "description": said or name, "parameters": parameters}}


def shown(answer: Any) -> str:
    """A tool's answer as the benchmark shows it: text as it is, all else as JSON."""
    return answer if isinstance(answer, str) else json.dumps(_plain(answer))


def run_calls(text: str, tools: Mapping[str, Callable[..., Any]]) -> Reply:
    """The answers to a turn's calls, one message each; none where it has none."""
    bodies, messages, errors = split_calls(text), [], 0
    for body in bodies[:MAX_CALLS]:
        call = read_call(body, tools)
        try:
            if isinstance(call, str):
                raise ValueError(call)
            said = shown(tools[call.name](**call.arguments))
        except Exception as error:  # a tool's complaint is the model's to read
            said, errors = f"Error: {error}", errors + 1
        messages.append(Message("tool", said))
    if left := len(bodies) - len(messages):
        messages.append(Message("tool", f"Error: at most {MAX_CALLS} calls a turn"))
        errors += left
    return Reply(messages, len(bodies), errors)


def _plain(answer: Any) -> Any:
    if hasattr(answer, "model_dump"):
        return answer.model_dump()
    if isinstance(answer, (list, tuple)):
        return [_plain(part) for part in answer]
    if isinstance(answer, dict):
        return {key: _plain(part) for key, part in answer.items()}
    if answer is None or isinstance(answer, str):
        return answer
    return str(answer)
