"""ACEBench's parser, checker, prompts and simulators, out of evalscope, which keeps the official ones under their licence.

evalscope's own `__init__` pulls in two dozen packages that these files do not use. So bare packages stand in for their parents
while they load.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gear_trainer.tasks.base import TaskError

VERSION = "1.14.1"  # the layout is private to evalscope, so another version may have moved it
_HOME = "evalscope.benchmarks.acebench"
_SIMULATORS = "evalscope.third_party.acebench"
_BARE = ("evalscope", "evalscope.benchmarks", _HOME, "evalscope.third_party")


class AceBench(NamedTuple):
    """The modules that a task reads."""

    parser: Any
    checker: Any
    prompts: Any
    scenarios: Any


@cache
def load() -> AceBench:
    """The official parts. Raises TaskError that names the install line."""
    stand_ins = {} if "evalscope" in sys.modules else _stand_ins()
    sys.modules.update(stand_ins)
    try:
        for name in ("base_api", "food_services", "message", "reminder", "travel"):
            importlib.import_module(f"{_SIMULATORS}.en.{name}")  # where scenarios looks for them, parents or not
        return AceBench(*(importlib.import_module(f"{_HOME}.{name}") for name in AceBench._fields))
    except ImportError as error:
        raise _missing(error) from error
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _stand_ins() -> dict[str, types.ModuleType]:
    spec = importlib.util.find_spec("evalscope")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("no package evalscope")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    bare = {}
    for name in _BARE:
        bare[name] = types.ModuleType(name)
        bare[name].__path__ = [str(root.joinpath(*name.split(".")))]
    return bare


def _missing(why: object) -> TaskError:
    return TaskError(f"ACEBench needs evalscope {VERSION} ({why}): pip install --no-deps evalscope=={VERSION}")
