"""The back ends, one a file behind one class (base.py), and their choice in one place."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator
from functools import cache

import torch

from ..errors import bad_input
from ..parallel import constant_when_traced
from ..records import Tile, TileTask
from . import native, reference, triton
from .base import Backend, finished, on_device, wide

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "Backend",
    "Tile",
    "TileTask",
    "backend",
    "choose",
    "finished",
    "on_device",
    "show",
    "version",
    "wide",
]

ENVIRONMENT = "GEAR_KERNELS_BACKEND"
BACKENDS = {one.name: one for one in (reference.Reference(), triton.Triton(), native.Native())}
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("gear_kernels_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use this back end inside the block, over GEAR_KERNELS_BACKEND: `with gear_kernels.backend("reference"): ...`.

    The backward of what was computed inside uses it too; code compiled inside by torch.compile keeps it. Raises
    GearKernelsError for an unknown name at once, and on use where the back end cannot serve the inputs.
    """
    token = _override.set(_known(name, "backend(...)"))
    try:
        yield
    finally:
        _override.reset(token)


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise bad_input(
            f"{where} names the back end {name!r}", "one of " + ", ".join(BACKENDS), f"use one of these names in {where}"
        )
    return name


def _requested() -> tuple[str | None, str]:
    if _override.get() is not None:
        return _override.get(), "backend(...)"
    name = os.environ.get(ENVIRONMENT) or None
    return (None if name is None else _known(name, ENVIRONMENT)), ENVIRONMENT


@constant_when_traced  # a compiled graph keeps the choice made when it was traced
def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the back end for inputs of this device and dtype: the one asked for, else the first of the list that can.

    A requested back end that cannot serve raises, but for float64 under `native` and `triton`: they compute in float32 and
    leave float64 to the reference. Without a request, a missing compiled module costs one warning and the reference is used.
    """
    name, where = _requested()
    if name is not None and dtype == torch.float64 and BACKENDS[name].why_not(device, torch.float32) is None:
        name = "reference"
    if name is not None:
        reason = BACKENDS[name].why_not(device, dtype)
        if reason:
            given = f"{where} asks for the back end {name!r}, but {reason}"
            raise bad_input(given, "a back end that can serve", "choose " + " or ".join(_able(device, dtype)))
        return name
    missing = native.load()[1]
    if device.type == "cpu" and missing is not None:
        _warn_missing(missing)
    return _able(device, dtype)[0]


def _able(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The back ends that can serve this device and dtype, those that are chosen without a request first; never empty."""
    names = dict.fromkeys((*_preference(device), *BACKENDS))
    return [name for name in names if BACKENDS[name].why_not(device, dtype) is None]


def _preference(device: torch.device) -> tuple[str, ...]:
    return _PREFERENCE.get(device.type, ("reference",))


@cache
def _warn_missing(reason: str) -> None:
    warnings.warn(f"gear_kernels uses its reference back end, many times slower: {reason}", stacklevel=4)


def show() -> None:
    """Print versions, devices, the back end in use on each device, and why another is not."""
    versions = {name: version(name) for name in ("gear-kernels", "torch", "triton")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + f", Python {platform.python_version()}")
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    name, where = _requested()
    if name is not None:
        print(f"{where} asks for {name}")
    for device in devices:
        _show_device(device, name)


def _show_device(device: torch.device, requested: str | None) -> None:
    reasons = {name: b.why_not(device, torch.float32) for name, b in BACKENDS.items()}
    able = [n for n in ([requested] if requested else _preference(device)) if reasons[n] is None]
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{device} ({what}): {able[0] + BACKENDS[able[0]].detail() if able else 'no back end can serve the request'}")
    for name in BACKENDS:
        if name not in able[:1]:
            print(f"  not {name}: {reasons[name] or 'another was asked for' if requested else reasons[name] or 'it is slower'}")


def version(package: str) -> str:
    """The version of an installed package, found without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
