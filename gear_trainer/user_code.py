"""A task or credit method of the user's own, named as `module:Class` in the configuration."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from gear_trainer.config import ConfigError


def load_class(spec: str) -> type:
    """Import the class that `module:Class` names. The working directory is searched too, behind all that is installed.

    Raises ImportError, whatever the module itself raised.
    """
    module, _, attribute = spec.partition(":")
    if not {os.getcwd(), ""} & set(sys.path):
        sys.path.append(os.getcwd())  # a launcher starts run.py by its path, and Python then looks beside that file alone
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ImportError(said(error)) from error
    if not inspect.isclass(found):
        raise ImportError(f"{attribute} is no class")
    return found


def said(error: BaseException, where: bool = False) -> str:
    """An exception's type and text in one line; `where`: and the file and line that raised it, unless that is the trainer's."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__) if where else []
    file = Path(frames[-1].filename) if frames else None
    theirs = file is not None and Path(__file__).parent not in file.parents
    return f"{type(error).__name__}: {text}" + (f" at {file.name}:{frames[-1].lineno}" if theirs else "")


def own_method(spec: str, args: dict[str, Any]) -> Any:
    """The credit method of the class `module:Class`, made with `credit_args` and tried on a few tokens. Raises ConfigError."""
    try:
        cls = load_class(spec)
        takes = list(inspect.signature(cls).parameters)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"credit={spec}: cannot be loaded ({error}): check the module path and the class name") from None
    unknown = sorted(set(args) - set(takes))
    if unknown:
        raise ConfigError(f"credit_args.{unknown[0]}: unknown; {cls.__name__} takes {', '.join(sorted(takes)) or 'none'}")
    try:
        method = cls(**args)
    except Exception as error:
        raise ConfigError(f"credit_args: {cls.__name__} cannot be made ({said(error, where=True)})") from None
    _check_method(spec, method)
    return method


def _check_method(spec: str, method: Any) -> None:
    """Raises ConfigError where `needs` or `apply` are not what credit_weights asks for (docs/credit.md)."""
    from gear_kernels.methods import INPUTS

    needs, name = getattr(method, "needs", None), type(method).__name__
    if not isinstance(needs, (tuple, list)) or not callable(getattr(method, "apply", None)):
        raise ConfigError(
            f"credit={spec}: {name} must have `needs`, a tuple of input names, and a method `apply` (docs/credit.md); add them"
        )
    if set(needs) <= set(INPUTS):  # others are named by the check of inputs
        try:
            _try_method(method)
        except Exception as error:
            raise ConfigError(f"credit={spec}: {name} fails on two made-up sequences ({said(error, where=True)})") from None


def _try_method(method: Any) -> None:
    """One call as the trainer makes it, on two sequences of three tokens."""
    import torch

    from gear_kernels import credit_weights
    from gear_kernels.methods import FLOAT_INPUTS

    rows: dict[str, Any] = {name: torch.linspace(-0.1, 0.4, 6) if name in method.needs else None for name in FLOAT_INPUTS}
    turns = torch.tensor([0, 0, 1, 0, 1, 1])
    first = method.at(1) if hasattr(method, "at") else method
    credit = credit_weights(
        rows.pop("signal"),
        rows.pop("entropy"),
        torch.tensor([1.0, -1.0]),
        torch.tensor([0, 3, 6], dtype=torch.int32),
        method=first,
        turn_ids=turns,
        anchors=turns,
        groups=torch.tensor([0, 0]),
        **rows,
    )
    if not credit.token_advantages.isfinite().all():
        raise ValueError("a token's advantage is not finite")
