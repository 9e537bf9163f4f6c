"""Back-end choice in one place, and the tile functions of each back end behind one signature.

A back end computes the statistics of a tile of logits, forward and backward; everything above it (autograd, argument
checks, GEMMs, chunks) is shared, so a new back end is two functions and one line in BACKENDS.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from . import reference
from .errors import bad_input

ENVIRONMENT = "GEAR_KERNELS_BACKEND"
GRADIENT_NAMES = ("logprobs", "entropy", "reverse_kl", "forward_kl")  # what a gradient can come through, in the tiles' order
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATE = 8  # columns of the compiled pass' state, csrc/rows.h


@dataclass(frozen=True)
class Rows:
    """What a tile function needs per row beside the logits: targets int64 [n] or None, 1 / temperature [n]."""

    targets: torch.Tensor | None
    inv_temperature: torch.Tensor
    ignore_index: int

    def __getitem__(self, rows: slice) -> Rows:
        return replace(
            self, targets=None if self.targets is None else self.targets[rows], inv_temperature=self.inv_temperature[rows]
        )


@dataclass(frozen=True)
class Backend:
    """`forward(student, teacher, rows, stats) -> (values [6, n], state)`: unasked rows of `values` may hold anything.

    `backward(student, teacher, rows, state, grads [n, 4], overwrite) -> dz [n, V]` in the student's dtype; with `overwrite` it
    may write dz over the student's logits. `tile_copies`: tiles of [n, V] that its backward holds beside the logits.
    """

    name: str
    forward: Callable
    backward: Callable
    why_not: Callable[[torch.device, torch.dtype], str | None]  # None: it can serve this device and dtype
    tile_copies: int


# --- reference: autograd through reference.py, so the mathematics stands in one place -----------------------------------


def _reference_forward(student, teacher, rows: Rows, stats):
    out = _reference_stats(student, teacher, rows, stats)
    values = student.new_zeros((6, student.shape[0]), dtype=_wide(student.dtype))
    for name, value in out.items():
        values[reference.STAT_NAMES.index(name)] = value
    return values, None


def _reference_backward(student, teacher, rows: Rows, state, grads, overwrite):
    used = [
        name
        for name in GRADIENT_NAMES
        if (teacher is not None or "kl" not in name) and (rows.targets is not None or name != "logprobs")
    ]
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        out = _reference_stats(leaf, teacher, rows, used)
        incoming = [grads[:, GRADIENT_NAMES.index(name)].to(out[name].dtype) for name in used]
        return torch.autograd.grad([out[name] for name in used], leaf, incoming)[0]


def _reference_stats(student, teacher, rows: Rows, stats):
    options = {"inv_temperature": rows.inv_temperature, "ignore_index": rows.ignore_index, "stats": stats}
    return reference.token_stats(student, teacher, rows.targets, **options)


# --- native: the compiled pass --------------------------------------------------------------------------------------------


@cache
def _load_native():
    """(module, None), or (None, why not)."""
    try:
        from . import _native
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); build it with `pip install -e .`"
    return _native, None


def _native_arguments(student, teacher, rows: Rows):
    inv_temperature = rows.inv_temperature.to(torch.float32).contiguous()
    targets = None if rows.targets is None else rows.targets.contiguous()
    return student.detach(), None if teacher is None else teacher.detach(), targets, rows.ignore_index, inv_temperature


def _native_forward(student, teacher, rows: Rows, stats):
    module, _ = _load_native()
    n = student.shape[0]
    values, state = torch.empty((6, n)), torch.empty((n, _STATE))
    arguments = _native_arguments(student, teacher, rows)
    module.forward(*arguments, values, state, torch.get_num_threads(), instruction_set())
    return values, state


def _native_backward(student, teacher, rows: Rows, state, grads, overwrite):
    module, _ = _load_native()
    dz = student.detach() if overwrite else torch.empty(student.shape, dtype=student.dtype)
    arguments = _native_arguments(student, teacher, rows)
    module.backward(*arguments, state, grads.to(torch.float32).contiguous(), dz, torch.get_num_threads(), instruction_set())
    return dz


def instruction_set() -> str:
    """The compiled pass' instruction set on this processor: avx512, avx2 or baseline."""
    return _load_native()[0].instruction_sets()[-1]


def _native_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    module, missing = _load_native()
    if module is None:
        return missing
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return None if dtype in NATIVE_DTYPES else f"it computes in float32, so {dtype} is left to the reference"


# --- choice ----------------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and logits tiles: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


BACKENDS = {
    "reference": Backend("reference", _reference_forward, _reference_backward, lambda device, dtype: None, tile_copies=8),
    "triton": Backend("triton", None, None, lambda device, dtype: "it is not built yet", tile_copies=0),
    "native": Backend("native", _native_forward, _native_backward, _native_why_not, tile_copies=0),
}
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("gear_kernels_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use this back end inside the block, over GEAR_KERNELS_BACKEND: `with gear_kernels.backend("reference"): ...`.

    Raises GearKernelsError for an unknown name at once, and on use where the back end cannot serve the inputs.
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


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """The back end for inputs of this device and dtype: the one asked for, else the first of the device's list that can.

    A requested back end that cannot serve raises, but for float64 under `native`: the compiled pass computes in float32 and
    leaves float64 to the reference. Without a request, a missing compiled module costs one warning and the reference is used.
    """
    name, where = _requested()
    if name == "native" and dtype == torch.float64 and device.type == "cpu":
        name = "reference"
    if name is not None:
        reason = BACKENDS[name].why_not(device, dtype)
        if reason:
            raise bad_input(
                f"{where} asks for the back end {name!r}, but {reason}", "a back end that can serve", "choose reference"
            )
        return BACKENDS[name]
    if device.type == "cpu" and _load_native()[0] is None:
        _warn_missing(_load_native()[1])
    return next(BACKENDS[n] for n in _preference(device) if BACKENDS[n].why_not(device, dtype) is None)


def _preference(device: torch.device) -> tuple[str, ...]:
    return _PREFERENCE.get(device.type, ("reference",))


@cache
def _warn_missing(reason: str) -> None:
    warnings.warn(f"gear_kernels uses its reference back end, many times slower: {reason}", stacklevel=4)


def show() -> None:
    """Print versions, devices, the back end in use on each device, and why another is not."""
    versions = {name: _version(name) for name in ("gear-kernels", "torch", "triton")}
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
    detail = f" ({instruction_set()}, {torch.get_num_threads()} threads)" if able[:1] == ["native"] else ""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{device} ({what}): {able[0] + detail if able else 'no back end can serve the request'}")
    for name in BACKENDS:
        if name not in able[:1]:
            print(f"  not {name}: {reasons[name] or 'another was asked for' if requested else reasons[name] or 'it is slower'}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
