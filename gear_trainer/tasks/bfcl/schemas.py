"""BFCL's descriptions of functions as JSON schemas, and its acceptable values as calls."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gear_trainer.tasks.tool_calls import ToolCall

# The package's own table for models that read JSON schemas; what is not in it is a string.
_TYPES = {
    "integer": "integer", "number": "number", "float": "number", "string": "string", "boolean": "boolean", "bool": "boolean",
    "array": "array", "list": "array", "dict": "object", "object": "object", "tuple": "array", "any": "string",
}  # fmt: skip


def schema(function: dict[str, Any]) -> dict[str, Any]:
    """The tool as the chat template shows it: the package's description, its types under their JSON names."""
    return {"type": "function", "function": {**function, "parameters": {**_typed(function["parameters"]), "type": "object"}}}


def _typed(described: dict[str, Any]) -> dict[str, Any]:
    found = {**described, "type": _TYPES.get(described.get("type", "string"), "string")}
    if isinstance(properties := described.get("properties"), dict):
        found["properties"] = {name: _typed(value) for name, value in properties.items()}
    if isinstance(items := described.get("items"), dict):
        found["items"] = _typed(items)
    return found


def first_call(possible: dict[str, Any], required: Collection[str]) -> ToolCall:
    """The call with the first acceptable value of each parameter. "" among the values means "may be left out", and where it is
    the first it is: unless the parameter is required."""
    ((name, parameters),) = possible.items()
    chosen = {key: _first(values, key in required) for key, values in parameters.items()}
    return ToolCall(name, {key: _plain(value) for key, value in chosen.items() if value != ""})


def _first(values: list[Any], required: bool) -> Any:
    return next((value for value in values if value != "" or not required), "")


def _plain(value: Any) -> Any:
    """A value without the lists of alternatives under the keys of an object, or of the objects in a list."""
    if isinstance(value, dict):
        chosen = {key: _first(part, False) if isinstance(part, list) else part for key, part in value.items()}
        return {key: part for key, part in chosen.items() if part != ""}
    return [_plain(part) for part in value] if isinstance(value, list) else value
