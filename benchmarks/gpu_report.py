"""Everything that only a GPU can tell, in one command of under nine minutes: `python -m benchmarks.gpu_report [--wheels DIR]`.

Needs torch 2.11, triton 3.6 and this repository, nothing installed. Phases: the machine, its ceilings (bandwidth, GEMM),
correctness of every kernel against float64, speed and memory beside the peers whose wheels lie in DIR, and with --tune a sweep
over block sizes and tiles. Each phase has its own process and time budget; a check that fails, or takes its process down, is a
line of the report, and the report is written anew after each phase. The exit code is 1 if a check failed or was not reached.

--self-test runs all of it on the CPU with tiny shapes; what needs a GPU is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import gear_kernels
from gear_kernels import Head, backends, linear_token_stats, reference, stats, tiling, token_stats
from gear_kernels.reference import GRADIENT_NAMES, STAT_NAMES

from .cases import Case, make_case
from .measure import MIB, ReadBandwidth, elapsed_ms, extra_memory
from .peers import ALL as DEFAULT
from .peers import OURS, Peer, PeerMissing, eager_stats, peers

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SHAPE = (8192, 151936, 4096)  # N, V, D: that of DESIGN.md's limits
# milliseconds: what is aimed at, and the GEMMs alone at the 790 TFLOP/s that cuBLAS reaches on an H200 (DESIGN.md, section 4)
GOALS = {("default", "forward"): (28.5, 25.8), ("default", "forward+backward"): (85.0, 77.4)}
GOAL_MIB = 0.3 * 1024  # beside the results
PASSES = ("forward", "forward+backward")
SUBSETS = (("logprobs", "entropy"), DEFAULT, ("reverse_kl",), ("forward_kl",), ("jsd",), ("teacher_logprobs", "teacher_entropy"))
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_FATAL = 3  # exit code of a worker whose CUDA context is lost


class Skip(Exception):
    """An item cannot run here; says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large: "cuda", or the CPU for the self-test."""

    device: str
    wheels: str | None = None

    @property
    def self_test(self) -> bool:
        return self.device == "cpu"

    def pick(self, full, tiny):
        """`full` on a GPU, `tiny` in the self-test."""
        return tiny if self.self_test else full


@dataclass(frozen=True)
class Item:
    """One line of the report. run: gives figures by name; raises Skip, or anything else for a failure."""

    name: str
    run: Callable[[], dict]
    gpu_only: str = ""  # why it cannot run on a CPU


# --- the machine -------------------------------------------------------------------------------------------------------------


def machine_items(setting: Setting) -> list[Item]:
    """What this ran on."""
    return [Item("machine", lambda: _machine(setting))]


def _machine(setting: Setting) -> dict:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        gear_kernels.show()
    found = {"device": platform.machine(), "commit": _commit(), "python": platform.python_version()}
    if not setting.self_test:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --self-test runs on the CPU")
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "total_gib": total / 2**30, "free_gib": free / 2**30}
        found |= {"cuda": torch.version.cuda or f"ROCm {torch.version.hip}", "driver": _driver()}
    versions = {name: _version(name) for name in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")}
    return {**found, **versions, "show": shown.getvalue()}


def _commit() -> str:
    return _output("git", "rev-parse", "--short=12", "HEAD") + (" and changes" if _output("git", "status", "-s", "-uno") else "")


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- ceilings ----------------------------------------------------------------------------------------------------------------


def ceiling_items(setting: Setting) -> list[Item]:
    """GB/s (1e9 bytes) and TFLOP/s that this device reaches."""
    n, vocab, width = setting.pick(SHAPE, (64, 512, 32))
    tile = max(64, tiling.limits(torch.device(setting.device)).tile // (8 * n))  # columns of both heads' float32 tile
    return [
        Item("copy", lambda: _copy_ceiling(setting)),
        Item("read", lambda: _read_ceiling(setting)),
        Item("GEMM, bfloat16 result", lambda: _gemm_ceiling(setting, 2 * n, vocab // 2, width, vocab // 2, _BF16)),
        Item("GEMM, float32 result", lambda: _gemm_ceiling(setting, 2 * n, vocab // 2, width, vocab // 2, _F32)),
        Item("GEMM, float32 tiles", lambda: _gemm_ceiling(setting, 2 * n, min(16 * tile, vocab), width, min(tile, vocab), _F32)),
    ]


def _copy_ceiling(setting: Setting) -> dict:
    words = torch.ones(setting.pick(2 << 30, 4 << 20) // 4, device=setting.device)
    target = torch.empty_like(words)
    times = _times(lambda: target.copy_(words), setting)
    return {**_spread(times), "gb_s": 2 * words.numel() * 4 / statistics.median(times) / 1e6}


def _read_ceiling(setting: Setting) -> dict:
    size = setting.pick(4096, 4)
    calls = ReadBandwidth(setting.device, size).calls.values()
    times = min((_times(call, setting) for call in calls), key=statistics.median)
    return {**_spread(times), "gb_s": size * MIB / statistics.median(times) / 1e6}


def _gemm_ceiling(setting: Setting, rows: int, columns: int, width: int, tile: int, result: torch.dtype) -> dict:
    """[rows, width] x [width, columns] in tiles of so many columns into one buffer."""
    hidden, weight = (torch.randn(size, width, device=setting.device).to(_BF16) for size in (rows, columns))
    out = torch.empty(rows, tile, dtype=result, device=setting.device)
    options = {"out_dtype": result} if result != _BF16 and setting.device == "cuda" else {}
    if setting.self_test:
        out = out.to(_BF16)  # a CPU has no float32 result for bfloat16 operands

    def call():
        for start in range(0, columns - tile + 1, tile):
            torch.mm(hidden, weight[start : start + tile].T, out=out, **options)

    times = _times(call, setting)
    return {**_spread(times), "tflop_s": 2 * rows * width * (columns // tile * tile) / statistics.median(times) / 1e9}


def _times(call: Callable, setting: Setting, seconds: float = 2.0, rounds: int = 20) -> list[float]:
    """Milliseconds of warm calls: at least three, until `rounds` or `seconds` are spent."""
    for _ in range(setting.pick(3, 1)):
        call()
    found, start = [], time.perf_counter()
    while len(found) < 3 or (len(found) < setting.pick(rounds, 3) and time.perf_counter() - start < seconds):
        found.append(elapsed_ms(call, setting.device))
    return found


def _spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": middle, "low_ms": low, "high_ms": high}


# --- correctness: inputs and comparison ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Logits [n, V] of both heads, targets [n] (one of them ignored) and temperatures [n]."""

    student: torch.Tensor
    teacher: torch.Tensor
    targets: torch.Tensor | None
    temperature: torch.Tensor

    def run(self, names: Sequence[str] = STAT_NAMES, student: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """token_stats of the package."""
        own = self.student if student is None else student
        found = token_stats(own, self.teacher, self.targets, temperature=self.temperature, stats=names)
        return _named(found, names)

    def exact(self, names: Sequence[str] = STAT_NAMES, student: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The definition, in float64."""
        rows = reference.Rows(self.targets, 1.0 / self.temperature.double(), -100)
        own = (self.student if student is None else student).double()
        return reference.token_stats(own, self.teacher.double(), rows, tuple(names))

    def part(self, rows: list[int]) -> Problem:
        """Some of the rows."""
        return Problem(*(None if x is None else x[rows] for x in (self.student, self.teacher, self.targets, self.temperature)))


def _named(found: stats.TokenStats, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: getattr(found, name) for name in names}


def problem(setting: Setting, n: int, vocab: int, dtype: torch.dtype = _F32, seed: int = 0, masked: bool = True) -> Problem:
    """Random inputs; entropies and divergences as of language models, roughly."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=setting.device)
    student = normal(n, vocab) * 3
    teacher = student + normal(n, vocab) * 0.5
    targets = torch.randint(vocab, (n,), generator=generator, device=setting.device)
    if masked and n > 1:
        targets[n // 2] = -100
    temperature = torch.rand(n, generator=generator, device=setting.device) + 0.5
    return Problem(student.to(dtype), teacher.to(dtype), targets, temperature)


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], atol: float = 2e-6, rtol: float = 5e-7) -> float:
    """The largest absolute error in nats; raises where a value is beyond atol + rtol * |wanted|. NaN and infinities must match."""
    worst = 0.0
    for name, right in want.items():
        value = got[name].double()
        wrong = ~torch.isclose(value, right, rtol=rtol, atol=atol, equal_nan=True)
        finite = value.isfinite() & right.isfinite()
        error = (value - right)[finite].abs().max().item() if finite.any() else 0.0
        if wrong.any():
            at = int(wrong.nonzero()[0])
            example = f"row {at} is {value[at].item():.9g} for {right[at].item():.9g}"
            raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong; {example}; worst error {error:.2g}")
        worst = max(worst, error)
    return worst


def compare_gradients(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: torch.dtype, limit: float = 1.0) -> float:
    """The largest error over the largest entry; raises beyond `limit` roundings of the dtype (float32: 3e-6), or on NaN."""
    rounding = {_F32: 3e-6, _BF16: 2**-8, _F16: 2**-10}[dtype] * limit
    worst = 0.0
    for i, (value, right) in enumerate(zip(got, want, strict=True)):
        scale = right.abs().max().item()
        error = (value.double() - right).abs().max().item()
        if not error <= rounding * scale + 1e-6:
            raise AssertionError(f"gradient {i}: error {error:.3g}, largest entry {scale:.3g}, allowed {rounding:.2g} of it")
        worst = max(worst, error / max(scale, 1e-30))
    return worst


def weighted(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss through every differentiable output that is finite, with fixed weights by row."""
    total = torch.zeros((), dtype=torch.float64, device=next(iter(values.values())).device)
    for i, name in enumerate(GRADIENT_NAMES):
        if name in values:
            rows = torch.arange(len(values[name]), device=total.device)
            total = total + (torch.where(values[name].isfinite(), values[name], 0).double() * torch.cos(rows * 1.7 + i)).sum()
    return total


def _gradients(function: Callable, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(weighted(function(*leaves)), leaves)


def check(given: Problem, names: Sequence[str] = STAT_NAMES, atol: float = 2e-6) -> dict:
    """Values and gradients of given logits against float64."""
    error = compare(given.run(names), given.exact(names), atol)
    if not set(names) & set(GRADIENT_NAMES):
        return {"error": error}
    got = _gradients(lambda s: given.run(names, s), given.student)
    want = _gradients(lambda s: given.exact(names, s), given.student.double())
    if got[0].dtype != given.student.dtype:
        raise AssertionError(f"gradient of dtype {got[0].dtype}")
    return {"error": error, "gradient_error": compare_gradients(got, want, given.student.dtype)}


# --- correctness: given logits ---------------------------------------------------------------------------------------------------


def correctness_items(setting: Setting) -> list[Item]:
    """Every kernel, on shapes and inputs that have broken kernels."""
    return [*_shape_items(setting), *_edge_items(setting), *linear_items(setting), *_graph_items(setting)]


def _shape_items(setting: Setting) -> list[Item]:
    vocabularies = setting.pick((1, 127, 1187, 32003, 151936), (1, 127, 1187))
    found = [
        Item(f"{_plain(dtype)}, V={vocab}", lambda v=vocab, d=dtype: check(problem(setting, 5, v, d, seed=v)))
        for vocab, dtype in itertools.product(vocabularies, (_F32, _BF16, _F16))
    ]
    found += [
        Item(f"subset {'+'.join(names)}", lambda names=names: check(problem(setting, 9, 1187, seed=1), names)) for names in SUBSETS
    ]
    found.append(Item("divergences, no targets", lambda: _check_without_targets(setting)))
    for n in setting.pick((0, 1, 2, 300, 5000), (0, 1, 40)):
        vocab = setting.pick(32003 if n <= 300 else 1187, 1187)
        found.append(Item(f"N={n}, V={vocab}", lambda n=n, v=vocab: check(problem(setting, n, v, _BF16)) if n else _no_rows(setting)))
    draw = random.Random(0)
    for seed in range(setting.pick(8, 4)):
        n, vocab, dtype = draw.randint(1, 200), draw.randint(2, setting.pick(9000, 300)), draw.choice((_F32, _BF16, _F16))
        name = f"random: {_plain(dtype)}, N={n}, V={vocab}"
        found.append(Item(name, lambda n=n, v=vocab, d=dtype, s=seed: check(problem(setting, n, v, d, s))))
    return found


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_without_targets(setting: Setting) -> dict:
    full = problem(setting, 6, 1187, masked=False)
    return check(Problem(full.student, full.teacher, None, full.temperature), ("entropy", "reverse_kl", "forward_kl", "jsd"))


def _no_rows(setting: Setting) -> dict:
    empty = problem(setting, 2, 300).part([])
    leaf = empty.student.detach().requires_grad_()
    values = empty.run(STAT_NAMES, leaf)
    (gradient,) = torch.autograd.grad(weighted(values), leaf)
    assert gradient.shape == (0, 300) and all(v.shape == (0,) for v in values.values())
    return {}


def _edge_items(setting: Setting) -> list[Item]:
    checks = (_all_ignored, _masked_vocabulary, _teacher_zero, _rows_of_nothing, _strided, _mixed_dtypes, _tiny_divergence)
    found = [Item(f.__name__.strip("_").replace("_", " "), functools.partial(f, setting)) for f in checks]
    raises = "on a CPU they raise instead"
    return found + [
        Item("targets out of range", lambda: _targets_out_of_range(setting), raises),
        Item("more than 2^31 logits", lambda: _large(setting), "needs some 20 GiB"),
    ]


def _all_ignored(setting: Setting) -> dict:
    given = problem(setting, 7, 1187)
    given.targets.fill_(-100)
    given.student[2] = math.nan
    values = given.run()
    (gradient,) = _gradients(lambda s: given.run(STAT_NAMES, s), given.student)
    assert not any(v.any() for v in values.values()) and not gradient.any(), "an ignored row gave something"
    return {}


def _masked_vocabulary(setting: Setting) -> dict:
    """-inf in both heads: whole first blocks, and single columns."""
    given = problem(setting, 6, setting.pick(20000, 700), masked=False)
    for z in (given.student, given.teacher):
        z[0, :-5] = -math.inf
        z[1, : z.shape[1] // 2] = -math.inf
        z[2, ::3] = -math.inf
    given.targets[:3] = given.student.shape[1] - 1
    given.targets[4] = 0
    given.student[4, 0] = given.teacher[4, 0] = -math.inf  # a target that cannot be
    return check(given)


def _teacher_zero(setting: Setting) -> dict:
    """Finite under the student, -inf under the teacher, and the other way round: one of the divergences is infinite."""
    given = problem(setting, 6, 1187, masked=False)
    given.teacher[0, 7] = given.student[1, 9] = -math.inf
    given.targets[:2] = 11
    found = check(given)
    values = given.run()
    assert values["reverse_kl"][0] == math.inf and values["forward_kl"][1] == math.inf
    return found


def _rows_of_nothing(setting: Setting) -> dict:
    """Rows of -inf and of NaN are NaN, and leave their neighbours alone."""
    given = problem(setting, 6, 1187, masked=False)
    given.student[1] = -math.inf
    given.student[3, 5] = math.nan
    return {"error": compare(given.run(), given.exact())}


def _strided(setting: Setting) -> dict:
    """Slices that start off the 16 byte grid, transposed logits, gaps between rows."""
    wide = problem(setting, 9, 1200, _BF16)
    views = (lambda z: z[:, 1:1188], lambda z: z.T.contiguous().T, lambda z: z[:, :640], lambda z: z[:, ::2])
    errors = []
    for view in views:
        student, teacher = view(wide.student), view(wide.teacher)
        targets = torch.where(wide.targets >= 0, wide.targets % student.shape[1], wide.targets)
        errors.append(check(Problem(student, teacher, targets, wide.temperature)))
    return {name: max(e[name] for e in errors) for name in errors[0]}


def _mixed_dtypes(setting: Setting) -> dict:
    given = problem(setting, 6, 1187, _BF16)
    return check(Problem(given.student, given.teacher.float(), given.targets, given.temperature))


def _tiny_divergence(setting: Setting) -> dict:
    """A true KL of 5e-5 nats: the mean error over the rows may be 1 % of it, and no row is negative."""
    n, vocab = setting.pick((256, 151936), (64, 1187))
    base = problem(setting, n, vocab, masked=False)
    noise = torch.randn(base.student.shape, generator=torch.Generator(setting.device).manual_seed(1), device=setting.device)
    given = Problem(base.student, base.student + 0.01 * noise, base.targets, torch.ones_like(base.temperature))
    got, want = given.run(("reverse_kl",))["reverse_kl"], given.exact(("reverse_kl",))["reverse_kl"]
    bias = (got.double() - want).mean().item()
    assert not (got < 0).any() and abs(bias) <= 0.01 * want.mean().item(), f"mean error {bias:.2g} at a KL of {want.mean():.2g}"
    return {"error": (got - want).abs().max().item(), "bias": bias, "mean_kl": want.mean().item()}


def _targets_out_of_range(setting: Setting) -> dict:
    given = problem(setting, 6, 1187, masked=False)
    given.targets[1], given.targets[2] = 1187, -7
    nan = given.run(("logprobs",))["logprobs"].isnan()
    assert nan.tolist() == [False, True, True, False, False, False], f"NaN in {nan.tolist()}"
    return {}


def _large(setting: Setting) -> dict:
    """bfloat16 logits of 2.49e9 elements; the rows at both ends and around the 2^31st element are checked."""
    n, vocab = 16384, 151936
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        raise Skip("less than 24 GiB of memory are free")
    generator = torch.Generator(setting.device).manual_seed(0)
    student = torch.empty(n, vocab, dtype=_BF16, device=setting.device).normal_(0, 3, generator=generator)
    teacher = torch.empty_like(student).normal_(0, 0.5, generator=generator).add_(student)
    targets = torch.randint(vocab, (n,), generator=generator, device=setting.device)
    given = Problem(student.requires_grad_(), teacher, targets, torch.ones(n, device=setting.device))
    at = 2**31 // vocab
    picked = [0, at - 1, at, at + 1, n - 1]
    values = given.run()
    (gradient,) = torch.autograd.grad(weighted(values), student)
    error = compare({name: v[picked] for name, v in values.items()}, given.part(picked).exact())
    rows = torch.tensor(picked, device=setting.device)
    leaf = student.detach()[picked].double().requires_grad_()
    small = Problem(leaf, teacher[picked], targets[picked], given.temperature[picked])
    terms = [
        (value * torch.cos(rows * 1.7 + GRADIENT_NAMES.index(name))).sum()
        for name, value in small.exact(GRADIENT_NAMES, leaf).items()
    ]
    (want,) = torch.autograd.grad(torch.stack(terms).sum(), leaf)
    return {"error": error, "gradient_error": compare_gradients([gradient[picked]], [want], _BF16)}
