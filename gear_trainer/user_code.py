"""A task or credit method of the user's own, named as `module:Class` in the configuration."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def load_object(spec: str) -> Any:
    """Import what `module:name` names. The working directory is searched too, behind all that is installed.

    Raises ImportError, whatever the module itself raised.
    """
    module, _, attribute = spec.partition(":")
    if not {os.getcwd(), ""} & set(sys.path):
        sys.path.append(os.getcwd())  # a launcher starts run.py by its path, and Python then looks beside that file alone
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ImportError(said(error)) from error


def load_class(spec: str) -> type:
    """Import the class that `module:Class` names, as `load_object` does. Raises ImportError."""
    found = load_object(spec)
    if not inspect.isclass(found):
        raise ImportError(f"{spec.partition(':')[2]} is no class")
    return found


def said(error: BaseException, where: bool = False) -> str:
    """An exception's type and text in one line; `where`: and the file and line that raised it, unless that is the trainer's."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__) if where else []
    file = Path(frames[-1].filename) if frames else None
    theirs = file if file is not None and Path(__file__).parent not in file.parents else None
    return f"{type(error).__name__}: {text}" + (f" at {theirs.name}:{frames[-1].lineno}" if theirs else "")
