"""The back ends behind one signature, and their choice in one place.

A back end computes on tiles of logits; everything above it (argument checks, autograd, GEMMs, tiling, collectives) is shared,
so a new back end is four functions and one line in BACKENDS.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from . import reference
from .errors import bad_input
from .parallel import constant_when_traced
from .reference import GRADIENT_NAMES, STAT_NAMES, STATE_NAMES, Rows

ENVIRONMENT = "GEAR_KERNELS_BACKEND"
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TEACHER_SUMS = ("teacher_entropy", "reverse_kl", "forward_kl", "teacher_logprobs", "jsd")


class Tile(NamedTuple):
    """Logits [n, c] of one head; what still has to be done to them when a back end reads them: softcap * tanh((z + bias) * scale
    / softcap). Back ends that do not apply it themselves (`fused_head`) only ever see None, None, None.
    """

    z: torch.Tensor
    bias: torch.Tensor | None = None  # [c]
    scale: float | None = None
    softcap: float | None = None


class Task(NamedTuple):
    """What is asked of a tile: its rows, the statistics wanted, the mixture's beta, the tile's first column in the vocabulary.

    kept: what a back end works out once for all tiles of a call; None where there is but one tile.
    """

    rows: Rows
    stats: tuple[str, ...]
    beta: float = 0.5
    first: int = 0
    kept: dict | None = None


@dataclass(frozen=True)
class Backend:
    """Tile functions; student and teacher are Tiles, the teacher may be None. K column splits each have their own sums.

    sweep(student, teacher, task, sums [K, n, 12] float64): adds the tile to `sums` (zeros: nothing seen yet).
    finish(sums [K, n, 12], task) -> (values [7, n], state [n, 9]) in float32, or float64 for float64 rows; jsd, and where the
    statistics need no teacher its entries, are left 0.
    mixture(student, teacher, task, state, shares [K, n, 2] float64): adds the tile's share of both divergences to the mixture.
    gradient(student, teacher, task, state, grads [n, 7], dz [n, c]): writes d loss / d (raw GEMM output), rounded to dz's dtype.
    product(a [m, k], b [k, n], out [m, n], add): out = a @ b or out += a @ b in float32, where `multiplies` their dtype; or
    rounds a @ b once from float32 sums, where out has that dtype and not `add`.
    """

    name: str
    sweep: Callable
    finish: Callable
    mixture: Callable
    gradient: Callable
    why_not: Callable[[torch.device, torch.dtype], str | None]  # None: it can serve this device and dtype
    splits: Callable[[int, int], int] = lambda rows, columns: 1
    fused_head: bool = False  # it applies bias, scale and softcap itself
    tile_copies: int = 0  # temporaries of a tile's size that its functions hold
    product: Callable | None = None
    multiplies: Callable[[torch.dtype], bool] = lambda dtype: False  # whether `product` takes operands of this dtype


def needs_teacher(stats: tuple[str, ...]) -> bool:
    """Whether any of these statistics reads the teacher's logits."""
    return any(name in _TEACHER_SUMS for name in stats)


# --- reference ------------------------------------------------------------------------------------------------------------


def _reference_sweep(student, teacher, task: Task, sums):
    tile = reference.sweep(student.z, None if teacher is None else teacher.z, task.rows, task.first)
    sums[0] = reference.merge(torch.stack([sums[0], tile.to(sums.dtype)]), task.rows)


def _reference_finish(sums, task: Task):
    dtype = _wide(task.rows.inv_temperature.dtype)
    out = reference.finish(reference.merge(sums, task.rows), task.rows)
    keep, zero = task.rows.keep(), torch.zeros_like(out["max"])
    if not needs_teacher(task.stats):
        out = {name: value for name, value in out.items() if name in ("max", "log_z", "logprobs", "entropy")}
    values = torch.stack([torch.where(keep, out[name], 0) if name in out else zero for name in STAT_NAMES])
    return values.to(dtype), torch.stack([out.get(name, zero) for name in STATE_NAMES], -1).to(dtype)


def _reference_mixture(student, teacher, task: Task, state, shares):
    shares[0] += reference.mixture_sweep(student.z, teacher.z, task.rows, _named(state), task.beta)


def _reference_gradient(student, teacher, task: Task, state, grads, dz):
    chosen = {name: grads[:, STAT_NAMES.index(name)] for name in task.stats if name in GRADIENT_NAMES}
    other = None if teacher is None else teacher.z
    dz.copy_(reference.gradient(student.z, other, task.rows, _named(state), chosen, task.first, task.beta))


def _named(state: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(STATE_NAMES, state.unbind(-1), strict=True))


# --- native: the compiled pass --------------------------------------------------------------------------------------------


@cache
def _load_native():
    """(module, None), or (None, why not)."""
    try:
        from . import _native
    except ImportError as error:
        return None, f"the compiled module is missing ({error}); build it with `pip install -e .`"
    return _native, None


def _native_call(function: str, student, teacher, task: Task, *tables):
    rows = (task.rows.targets, task.rows.ignore_index, task.rows.inv_temperature, task.first)
    tiles = (student.z, None if teacher is None else teacher.z)
    getattr(_load_native()[0], function)(*tiles, *rows, *tables, torch.get_num_threads(), instruction_set())


def _native_sweep(student, teacher, task: Task, sums):
    moments = "teacher_entropy" in task.stats or "forward_kl" in task.stats
    _native_call("sweep", student, teacher, task, moments, sums)


def _native_finish(sums, task: Task):
    n = sums.shape[1]
    values, state = torch.empty((len(STAT_NAMES), n)), torch.empty((n, len(STATE_NAMES)))
    rows = (task.rows.targets, task.rows.ignore_index, task.rows.inv_temperature, needs_teacher(task.stats))
    _load_native()[0].finish(sums, *rows, values, state, torch.get_num_threads(), instruction_set())
    return values, state


def _native_mixture(student, teacher, task: Task, state, shares):
    _native_call("mixture", student, teacher, task, state, task.beta, shares)


def _native_gradient(student, teacher, task: Task, state, grads, dz):
    _native_call("gradient", student, teacher, task, state, task.beta, grads, dz)


def _native_product(a, b, out, add: bool):
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    _load_native()[0].product(a, b, out, add, torch.get_num_threads())


@cache
def _native_multiplies(dtype: torch.dtype) -> bool:
    """bfloat16 on a processor with AVX512-BF16: 4 times the rate of float32 GEMMs on a Zen 5."""
    return dtype == torch.bfloat16 and _load_native()[0].has_product()


def _native_splits(rows: int, columns: int) -> int:
    """Few rows: cut them, so that every core has work. From the shape alone, or results would change with the thread count."""
    return max(1, min(16 // max(rows, 1), columns // 8192))


@cache  # asked for with every tile
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


# --- triton ---------------------------------------------------------------------------------------------------------------


@cache
def _load_triton():
    try:
        from .triton import stats
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    return stats, None


def load_scan():
    """The module of the Triton scan."""
    from .triton import scan

    return scan


def _triton_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    module, missing = _load_triton()
    if module is None:
        return missing
    if device.type == "cpu" and not module.INTERPRETED:
        return "it runs on GPUs (on a CPU only in Triton's interpreter, for tests: TRITON_INTERPRET=1)"
    if device.type not in ("cuda", "cpu"):
        return f"it runs on CUDA and ROCm devices, not on {device.type}"
    return None if dtype in NATIVE_DTYPES else f"it computes in float32, so {dtype} is left to the reference"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a tensor's device the current one inside: Triton launches there and torch on the tensor's own, and the two differ
    where a model lies on several GPUs of one process.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _triton(function: str) -> Callable:
    return lambda *arguments: getattr(_load_triton()[0], function)(*arguments)  # triton is imported at the first call


# --- choice ----------------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and logits tiles: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_REFERENCE = (_reference_sweep, _reference_finish, _reference_mixture, _reference_gradient)
_NATIVE = (_native_sweep, _native_finish, _native_mixture, _native_gradient)
_TRITON = tuple(_triton(name) for name in ("sweep", "finish", "mixture", "gradient"))
BACKENDS = {
    "reference": Backend("reference", *_REFERENCE, lambda device, dtype: None, tile_copies=8),
    "triton": Backend("triton", *_TRITON, _triton_why_not, splits=_triton("splits"), fused_head=True),
    "native": Backend(
        "native", *_NATIVE, _native_why_not, splits=_native_splits, product=_native_product, multiplies=_native_multiplies
    ),
}
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
    if device.type == "cpu" and _load_native()[0] is None:
        _warn_missing(_load_native()[1])
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
    half = ", bfloat16 products" if able[:1] == ["native"] and _native_multiplies(torch.bfloat16) else ""
    detail = f" ({instruction_set()}{half}, {torch.get_num_threads()} threads)" if able[:1] == ["native"] else ""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{device} ({what}): {able[0] + detail if able else 'no back end can serve the request'}")
    for name in BACKENDS:
        if name not in able[:1]:
            print(f"  not {name}: {reasons[name] or 'another was asked for' if requested else reasons[name] or 'it is slower'}")


def version(package: str) -> str:
    """Of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
