"""The parts of the package bfcl-eval that serve: its data files, its checkers, its executable classes. Nothing of it is copied.

Loaded when it is asked for, without the vendors' SDKs that the package names and only its model handlers need.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from gear_trainer.tasks.base import TaskError

_MODEL_CONFIG = "bfcl_eval.constants.model_config"
_MULTI_TURN = "bfcl_eval.eval_checker.multi_turn_eval"
Checker = Callable[..., dict[str, Any]]


def part(module: str) -> Any:
    """A module of the package. Raises TaskError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TaskError(
            f"the tasks of BFCL need the packages bfcl-eval and mpmath ({error}): pip install --no-deps bfcl-eval mpmath"
        ) from error


def _lines(*path: str) -> list[dict[str, Any]]:
    part("bfcl_eval")
    file = files("bfcl_eval").joinpath("data", *path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"{file} cannot be read ({error}): install bfcl-eval==2026.3.23, whose data are meant") from error
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def rows(category: str) -> list[dict[str, Any]]:
    """The items of a category as the package has them."""
    return _lines(f"BFCL_v4_{category}.json")


def answers(category: str) -> list[Any]:
    """The `ground_truth` of each item of a category, in their order."""
    return [row["ground_truth"] for row in _lines("possible_answer", f"BFCL_v4_{category}.json")]


@cache
def documents(class_name: str) -> list[dict[str, Any]]:
    """The descriptions of a class's functions."""
    config = part("bfcl_eval.constants.executable_backend_config")
    return _lines("multi_turn_func_doc", config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name])


def new_instance(class_name: str, scenario: dict[str, Any], long_context: bool = False) -> Any:
    """A fresh instance of an executable class in a scenario, which is read and never written to by what is called later."""
    config = part("bfcl_eval.constants.executable_backend_config")
    instance = getattr(part(config.CLASS_FILE_PATH_MAPPING[class_name]), class_name)()
    if class_name not in config.STATELESS_CLASSES:
        instance._load_scenario(copy.deepcopy(scenario), long_context=long_context)
        if long_context:  # its long lists belong to the module, for all instances
            vars(instance).update(copy.deepcopy(vars(instance)))
    return instance


@cache
def turn_checkers() -> tuple[Checker, Checker]:
    """The official checks of one user turn: of the instances' state, and of the calls' results."""
    module = part(f"{_MULTI_TURN}.multi_turn_checker")
    return module.state_checker, module.response_checker


@cache
def ast_checker() -> Checker:
    """The official checker of calls: (functions, calls, possible answers, category) -> {"valid": bool, "error_type": str}.

    It reads one flag of a module that imports every vendor's SDK, so a stand-in serves while it is imported: names keep their
    dots, as with the package's own Qwen handler.
    """
    real = sys.modules.get(_MODEL_CONFIG)
    part("bfcl_eval")
    stand_in: Any = types.ModuleType(_MODEL_CONFIG)
    stand_in.MODEL_CONFIG_MAPPING = defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    sys.modules[_MODEL_CONFIG] = stand_in
    try:
        check = part("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
    finally:
        del sys.modules[_MODEL_CONFIG]
        if real is not None:
            sys.modules[_MODEL_CONFIG] = real
    python = part("bfcl_eval.constants.enums").Language.PYTHON
    return lambda functions, calls, possible, category: check(functions, calls, possible, python, category, "any")
