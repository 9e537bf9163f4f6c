"""ACEBench's two ways to write calls: its own text `[Api(key='value')]`, and tool calls through the chat template."""

from __future__ import annotations

import json
import re
from typing import Any

Call = dict[str, dict[str, Any]]  # {name: {argument: value}}, the checker's form
# What their schemas call types, in JSON schema's words.
_TYPES = {
    "dict": "object", "float": "number", "int": "integer", "tuple": "array", "list": "array", "any": "string", "enum": "string",
    "list(string)": "array", "list(enum)": "array", "objectArray": "array",
}  # fmt: skip


def call_list(calls: list[Call]) -> str:
    """Calls in ACEBench's own text."""
    written = [f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" for call in calls for name, given in call.items()]
    return f"[{', '.join(written)}]"


def gold_calls(truth: Any) -> list[Call]:
    """The calls of a `normal` answer, the first where several are right; `name_1`, `name_2` stand for calls of one name."""
    first = truth[0] if isinstance(truth, list) else truth
    return [{re.sub(r"_\d+$", "", name): arguments} for name, arguments in first.items()]


def diagnosis(category: str, truth: Any) -> str:
    """The sentences that the checker looks for in the answer to a `special` problem."""
    if category == "special_irrelevant":
        lines = ["Due to the limitations of the function, I cannot solve this problem."]
    elif category == "special_incomplete":
        lines = [f"Missing necessary parameters ({', '.join(v)}) for the api ({name})" for name, v in truth.items()]
    else:
        lines = [
            f"There is incorrect value ({', '.join(map(str, values))}) for the parameters ({name}) in the conversation history."
            for name, values in truth.items()
        ]
    return f"[{', '.join(json.dumps(line, ensure_ascii=False) for line in lines)}]"


def schemas(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON schemas for the chat template of a problem's functions."""
    return [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description", ""),
                "parameters": _plain(function.get("parameters") or function.get("arguments") or {"type": "object"}),
            },
        }
        for function in functions
    ]


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _plain(value) for key, value in schema.items()}
    if isinstance(plain.get("type"), str):
        plain["type"] = _TYPES.get(plain["type"], plain["type"])
    return plain
