"""The executable world of one BFCL item: an instance of each of its classes, and calls on them."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from gear_trainer.tasks.bfcl import package
from gear_trainer.tasks.tool_calls import ToolCall

FAILED = "Error during execution: "  # how the package begins the answer to a call that raised
_LARGEST = 10**100
_STEEPEST = 1000  # of exponents, precisions and places: MathAPI raises whole numbers to them, at any size
_STEEP = ("exponent", "precision", "decimal_places")
_ALONE = threading.Lock()  # logarithm sets mpmath's precision, which is the process'; parts of a mixture call at the same time


class World:
    """Instances of `classes` in their scenarios, which only this object's calls change. No call raises."""

    def __init__(self, classes: Sequence[str], scenarios: dict[str, Any], long_context: bool = False):
        self.instances = {name: package.new_instance(name, scenarios.get(name, {}), long_context) for name in classes}
        self.methods: dict[str, Callable[..., Any]] = {}
        for instance in self.instances.values():  # of two classes' methods of one name the later class's, as in the package
            found = inspect.getmembers(instance, inspect.ismethod)
            self.methods |= {name: method for name, method in found if not name.startswith("_")}

    def run(self, call: ToolCall) -> tuple[str, bool]:
        """The text that a call is answered with, as the package writes it, and whether the tool could do what was asked."""
        try:
            result = self._value(call)
            if isinstance(result, dict):
                return _written(result), "error" not in result
            return (result if isinstance(result, str) else str(result)), True
        except Exception as error:  # arguments that the tool does not take, or cannot work with
            return f"{FAILED}{error}", False

    def _value(self, call: ToolCall) -> Any:
        if call.name not in self.methods:
            raise NameError(f"name '{call.name}' is not defined")
        for name, value in call.arguments.items():
            _check_size(name, value)
        method: Any = self.methods[call.name]
        arguments = copy.deepcopy(_shared_defaults(method.__func__) | call.arguments)
        with _ALONE:
            return method(**arguments)

    def gold_call(self, text: str) -> ToolCall:
        """A call of the ground truth, which the package writes as Python, with every argument under its name."""
        node: Any = ast.parse(text.strip(), mode="eval").body
        method = inspect.signature(self.methods[node.func.id])
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        bound = method.bind(*(ast.literal_eval(value) for value in node.args), **named)
        return ToolCall(node.func.id, dict(bound.arguments))


@cache
def _shared_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Lists that are default values: one such list would be shared by all episodes of a process, and some methods add to it."""
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return {name: value for name, value in defaults.items() if isinstance(value, list)}


def _written(result: dict[str, Any]) -> str:
    try:
        return json.dumps(result)
    except Exception:  # an instance of a class of its own in it
        return str(result)


def _check_size(name: str, value: Any) -> None:
    """Refuse numbers that would keep a process busy for hours: no time limit stops arithmetic."""
    numbers = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, (int, float))]
    if any(abs(n) > (_STEEPEST if name in _STEEP else _LARGEST) for n in numbers):
        raise ValueError(f"{name} is too large")
