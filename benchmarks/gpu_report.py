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
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import gear_kernels
from gear_kernels import Gear, Head, backends, linear_token_stats, reference, stats, tiling, token_stats
from gear_kernels.backends import backend, version
from gear_kernels.methods import METHODS, NORMALIZERS
from gear_kernels.reference import GRADIENT_NAMES, STAT_NAMES

from .cases import Case, make_case, plain
from .credit_report import inputs_of as credit_inputs
from .credit_report import packs as credit_packs
from .measure import MIB, ReadBandwidth, elapsed_ms, extra_memory
from .peers import ALL as DEFAULT
from .peers import OURS, Peer, PeerMissing, _trl, eager_stats, peers

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


# --- the machine ------------------------------------------------------------------------------------------------------------


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
    versions = {name: version(name) for name in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")}
    return {**found, **versions, "show": shown.getvalue()}


def _commit() -> str:
    return _output("git", "rev-parse", "--short=12", "HEAD") + (" and changes" if _output("git", "status", "-s", "-uno") else "")


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


# --- ceilings ---------------------------------------------------------------------------------------------------------------


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


# --- correctness: inputs and comparison -------------------------------------------------------------------------------------


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
    """The largest absolute error in nats; raises beyond atol + rtol * |wanted|. NaN and infinities must match."""
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
    rounding = {_F32: 3e-6, _BF16: 1.02 * 2**-8, _F16: 2**-10}[dtype] * limit
    worst = 0.0
    for i, (value, right) in enumerate(zip(got, want, strict=True)):
        scale = right.abs().max().item()
        error = (value.double() - right).abs().max().item()
        if not error <= rounding * scale + 1e-6:
            raise AssertionError(f"gradient {i}: error {error:.3g}, largest entry {scale:.3g}, allowed {rounding:.2g} of it")
        worst = max(worst, error / scale if scale > 1e-6 else error)
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


# --- correctness: given logits ----------------------------------------------------------------------------------------------


def correctness_items(setting: Setting) -> list[Item]:
    """Every kernel, on shapes and inputs that have broken kernels."""
    return [*_shape_items(setting), *_edge_items(setting), *linear_items(setting), *_graph_items(setting), *credit_items(setting)]


def _shape_items(setting: Setting) -> list[Item]:
    vocabularies = setting.pick((1, 127, 1187, 32003, 151936), (1, 127, 1187))
    found = [
        Item(f"{plain(dtype)}, V={vocab}", lambda v=vocab, d=dtype: check(problem(setting, 5, v, d, seed=v)))
        for vocab, dtype in itertools.product(vocabularies, (_F32, _BF16, _F16))
    ]
    found += [
        Item(f"subset {'+'.join(names)}", lambda names=names: check(problem(setting, 9, 1187, seed=1), names))
        for names in SUBSETS
    ]
    found.append(Item("divergences, no targets", lambda: _check_without_targets(setting)))
    for n in setting.pick((0, 1, 2, 300, 5000), (0, 1, 40)):
        vocab = setting.pick(32003 if n <= 300 else 1187, 1187)
        found.append(
            Item(f"N={n}, V={vocab}", lambda n=n, v=vocab: check(problem(setting, n, v, _BF16)) if n else _no_rows(setting))
        )
    draw = random.Random(0)
    for seed in range(setting.pick(8, 4)):
        n, vocab, dtype = draw.randint(1, 200), draw.randint(2, setting.pick(9000, 300)), draw.choice((_F32, _BF16, _F16))
        name = f"random: {plain(dtype)}, N={n}, V={vocab}"
        found.append(Item(name, lambda n=n, v=vocab, d=dtype, s=seed: check(problem(setting, n, v, d, s))))
    return found


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


# --- correctness: hidden states ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """Hidden states [n, d], head tensors and options of linear_token_stats. leaves: what gets gradients."""

    student: torch.Tensor
    teacher: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    own: torch.Tensor | None  # the teacher's own weight
    targets: torch.Tensor
    options: dict  # softcap, scale, valid_vocab
    workspace: int | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Hidden states, weight, and the bias where there is one."""
        return [x for x in (self.student, self.weight, self.bias) if x is not None]

    def run(self, student, weight, bias=None, names: Sequence[str] = STAT_NAMES) -> dict[str, torch.Tensor]:
        """linear_token_stats of the package."""
        own = None if self.own is None else Head(self.own, **self.options)
        options = {"teacher_head": own, "stats": names, "workspace_bytes": self.workspace, "temperature": 0.8}
        head = Head(weight, bias, **self.options)
        return _named(linear_token_stats(student, head, self.targets, self.teacher, **options), names)

    def exact(self, student, weight, bias=None, names: Sequence[str] = STAT_NAMES) -> dict[str, torch.Tensor]:
        """The definition, in float64."""
        logits = reference.head_logits(student.double(), weight.double(), _double(bias), **self.options)
        own, own_bias = (weight, bias) if self.own is None else (self.own, None)
        with torch.no_grad():
            other = reference.head_logits(self.teacher.double(), own.double(), _double(own_bias), **self.options)
        temperature = torch.full((len(student),), 1 / 0.8, dtype=torch.float64, device=student.device)
        return reference.token_stats(logits, other, reference.Rows(self.targets, temperature, -100), tuple(names))


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


def linear(setting: Setting, dtype=_F32, shape=(37, 1187, 64), bias=False, own=False, workspace=None, **options) -> Linear:
    """Random hidden states and head; logits of a standard deviation of 3."""
    n, vocab, width = shape
    generator = torch.Generator(setting.device).manual_seed(vocab + width)
    normal = functools.partial(torch.randn, generator=generator, device=setting.device)
    student, weight = normal(n, width), normal(vocab, width) * (3 / math.sqrt(width))
    teacher, other = student + 0.15 * normal(n, width), weight + 0.1 * normal(vocab, width) / math.sqrt(width)
    targets = torch.randint(options.get("valid_vocab", vocab), (n,), generator=generator, device=setting.device)
    if n > 1:
        targets[n // 2] = -100
    tensors = (student.to(dtype), teacher.to(dtype), weight.to(dtype))
    return Linear(
        *tensors, normal(vocab).to(dtype) if bias else None, other.to(dtype) if own else None, targets, options, workspace
    )


def check_linear(given: Linear, atol: float = 2e-5, names: Sequence[str] = STAT_NAMES) -> dict:
    """Values and all gradients against float64. The GEMM's own float32 rounding comes on top of the statistics': 2e-5 nats."""
    error = compare(given.run(*given.leaves, names=names), given.exact(*given.leaves, names=names), atol, rtol=2e-6)
    got = _gradients(lambda *x: given.run(*x, names=names), *given.leaves)
    want = _gradients(lambda *x: given.exact(*x, names=names), *(x.double() for x in given.leaves))
    dtype = given.student.dtype
    return {"error": error, "gradient_error": compare_gradients(got, want, dtype, limit=10 if dtype == _F32 else 2)}


def linear_items(setting: Setting) -> list[Item]:
    """Heads of all kinds, tiles cut every way, autocast."""
    heads = {
        "plain": {},
        "bias": {"bias": True},
        "scale": {"scale": 0.5},
        "softcap": {"softcap": 5.0},
        "bias scale softcap": {"bias": True, "scale": -0.7, "softcap": 8.0},
        "valid_vocab": {"valid_vocab": 1153, "bias": True},
        "own teacher head": {"own": True, "softcap": 9.0},
    }
    found = [
        Item(f"linear {plain(dtype)}, {name}", lambda d=dtype, h=head: check_linear(linear(setting, d, **h)))
        for name, head in heads.items()
        for dtype in ((_F32, _BF16) if name == "plain" else (_BF16,))
    ]
    found.append(Item("linear float16, plain", lambda: check_linear(linear(setting, _F16))))
    shapes = setting.pick([(1, 151936, 256), (700, 32003, 128), (33, 127, 64), (5, 1, 16)], [(1, 1187, 16), (5, 1, 16)])
    found += [Item(f"linear {s}", lambda s=s: check_linear(linear(setting, _BF16, s))) for s in shapes]
    for workspace in (64 << 10, 1 << 20):
        run = functools.partial(linear, setting, _BF16, (150, 2003, 64), workspace=workspace, bias=True)
        found.append(Item(f"linear, workspace {workspace >> 10} KiB", lambda run=run: check_linear(run())))
    found.append(Item("linear, default set", lambda: check_linear(linear(setting, _BF16), names=DEFAULT)))
    return [*found, Item("linear under autocast", lambda: _autocast(setting))]


def _autocast(setting: Setting) -> dict:
    given = linear(setting, _F32)
    with torch.autocast(setting.device, dtype=_BF16):
        return check_linear(given)


# --- correctness: how it runs -----------------------------------------------------------------------------------------------


def _calls(setting: Setting) -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """Forward and backward of both operators as functions of their leaves, and the leaves: few rows, and many."""
    vocab = setting.pick(32003, 1187)
    few, many, hidden = problem(setting, 3, vocab), problem(setting, 64, vocab, _BF16), linear(setting, _BF16, (48, 2003, 64))
    return {
        "logits, few rows": (lambda s: _both(few.run(STAT_NAMES, s), s), [few.student]),
        "logits": (lambda s: _both(many.run(STAT_NAMES, s), s), [many.student]),
        "hidden states": (lambda h, w: _both(hidden.run(h, w), h, w), hidden.leaves),
    }


def _both(values: dict[str, torch.Tensor], *leaves: torch.Tensor) -> list[torch.Tensor]:
    gradients = torch.autograd.grad(weighted(values), leaves)
    return [*(value.detach() for value in values.values()), *gradients]


def _fresh(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [leaf.detach().clone().requires_grad_() for leaf in leaves]


def _same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise AssertionError(f"tensor {i} differs {what}, by {(a.double() - b.double()).abs().max().item():.3g}")


def _graph_items(setting: Setting) -> list[Item]:
    kinds = {
        "repeats": (_repeats, ""),
        "torch.compile": (_compile, ""),
        "no host synchronisation": (_no_sync, "CUDA's sync debug mode"),
        "CUDA graph": (_graph, "CUDA graphs"),
        "another stream": (_stream, "CUDA streams"),
    }
    return [
        Item(f"{kind}: {name}", lambda f=function, name=name: f(setting, name), reason)
        for kind, (function, reason) in kinds.items()
        for name in ("logits, few rows", "logits", "hidden states")
    ]


def _repeats(setting: Setting, name: str) -> dict:
    function, leaves = _calls(setting)[name]
    first = function(*_fresh(leaves))
    for _ in range(setting.pick(10, 2)):
        _same(function(*_fresh(leaves)), first, "from the first call")
    return {}


def _compile(setting: Setting, name: str) -> dict:
    """The graph must be whole; what inductor makes of the loss may round otherwise."""
    vocab = setting.pick(1187, 300)
    given, hidden = problem(setting, 12, vocab, _BF16), linear(setting, _BF16, (12, vocab, 64))
    if name == "hidden states":
        function, leaves = (lambda h, w: weighted(hidden.run(h, w))), hidden.leaves
    else:
        given = given.part([0, 1, 2]) if "few" in name else given
        function, leaves = (lambda s: weighted(given.run(STAT_NAMES, s))), [given.student]
    compiled = torch.compile(function, fullgraph=True, backend=setting.pick("inductor", "aot_eager"))
    got, want = (torch.autograd.grad(f(*x), x) for f, x in ((compiled, _fresh(leaves)), (function, _fresh(leaves))))
    return {"gradient_error": compare_gradients(got, [w.double() for w in want], _BF16)}


def _no_sync(setting: Setting, name: str) -> dict:
    function, leaves = _calls(setting)[name]
    function(*_fresh(leaves))  # compiles, and loads cuBLAS
    fresh = _fresh(leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*fresh)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def _graph(setting: Setting, name: str) -> dict:
    """Captured once, replayed on other inputs."""
    function, leaves = _calls(setting)[name]
    static = _fresh(leaves)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*static)
    others = [leaf * 0.9 for leaf in leaves]
    with torch.no_grad():
        for leaf, other in zip(static, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    _same(captured, function(*_fresh(others)), "from the eager call")
    return {}


def _stream(setting: Setting, name: str) -> dict:
    """On a side stream while the default stream is busy."""
    function, leaves = _calls(setting)[name]
    want = function(*_fresh(leaves))
    fresh, busy, side = _fresh(leaves), torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        busy = busy @ busy * 1e-3
    with torch.cuda.stream(side):
        got = function(*fresh)
    torch.cuda.synchronize()
    _same(got, want, "on another stream")
    return {}


# --- credit ---------------------------------------------------------------------------------------------------------------


def credit_items(setting: Setting) -> list[Item]:
    """Every method on packs of every kind against the reference back end on the CPU, then how the scan runs."""
    tokens = setting.pick(1 << 16, 1 << 10)
    methods = {**METHODS, "gear, caps": Gear(max_segment_len=5, stop_at_turn=True, renormalize=True)}
    methods |= {f"gear, {name}": Gear(normalizer=name) for name in NORMALIZERS}
    found = [Item(f"credit {name}", lambda m=method: _credit_same(setting, m, tokens)) for name, method in methods.items()]
    gpu = "CUDA's profiler and sync debug mode"
    return [*found, Item("credit, launches and synchronisations", lambda: _credit_launches(setting), gpu_only=gpu)]


def _credit_same(setting: Setting, method: object, tokens: int) -> dict:
    """Segments equal to the reference's, weights within a few roundings; twice the same bits."""
    worst = 0.0
    for p in credit_packs(tokens).values():
        more = credit_inputs(method, p)
        with backend("reference"):
            want = p.credit(method, **more)
        there = {name: x.to(setting.device) for name, x in more.items()}
        got, again = (p.to(setting.device).credit(method, **there) for _ in range(2))
        _same(got[:6], again[:6], "from the first call")
        _same([got.segment_ids.cpu(), got.onsets.cpu()], [want.segment_ids, want.onsets], "from the reference")
        for a, b in zip(got[:4], want[:4], strict=True):
            worst = max(worst, (a.cpu() - b).abs().max().item() if a.numel() else 0.0)
        for name, value in got.diagnostics.items():
            assert abs(value.item() - want.diagnostics[name].item()) <= 1e-4 * (1 + abs(value.item())), name
    assert worst <= 2e-6, f"off by {worst:.3g}"
    return {"error": worst}


def _credit_launches(setting: Setting) -> dict:
    p = credit_packs(1 << 16)["typical, 512 sequences"].to(setting.device)
    p.credit()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            p.credit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("_scan_kernel" in name for name in names) == 1 and len(names) <= 3, names
    return {"kernels": len(names)}


def _credit_speed(setting: Setting, name: str) -> dict:
    p = credit_packs(setting.pick(1 << 20, 1 << 12))[name].to(setting.device)
    floor = {"floor_bytes": 29 * p.signal.numel()}  # two rows read, four floats, an id and a flag written
    return {**_spread(_times(p.credit, setting)), **floor}


# --- speed ------------------------------------------------------------------------------------------------------------------


def speed_items(setting: Setting) -> list[Item]:
    """Ours first, then the peers that need no compiling, then those that do."""
    _bare_trl()
    ours = [
        Item(f"hidden bfloat16, {OURS}, {label}, {passes}", lambda s=names, p=passes, n=label: _ours_hidden(setting, s, n, p))
        for label, names in (("default", DEFAULT), ("all seven", STAT_NAMES))
        for passes in PASSES
    ]
    ours += [Item(f"credit, {name}", lambda n=name: _credit_speed(setting, n)) for name in credit_packs(1 << 10)]
    logits = [("logits", _BF16), ("logits", _F32)]
    for kind, dtype in logits:
        peer = next(p for p in peers(kind) if p.name == OURS)
        ours += [_peer_item(setting, peer, kind, dtype, passes) for passes in PASSES]
    others = []
    for kind, dtype in (("hidden", _BF16), *logits):
        entrants = peers(kind, setting.device, compiled=not setting.self_test)
        others += [(p, _peer_item(setting, p, kind, dtype, passes)) for p in entrants if p.name != OURS for passes in PASSES]
    return ours + [item for _, item in sorted(others, key=lambda pair: pair[0].compiles)]


def _bare_trl() -> None:
    """Import trl's kernels where transformers is missing: they ask it for one function, whether there is triton."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("transformers") is not None:
        return
    stand_ins = {name: types.ModuleType(name) for name in ("transformers", "transformers.utils")}
    stand_ins["transformers.utils"].is_triton_available = lambda *_: True
    sys.modules.update(stand_ins)
    try:
        for module in ("chunked_divergence", "chunked_logprob", "logprob_entropy"):
            with contextlib.suppress(Exception):  # then the peer says what is missing when its turn comes
                _trl(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]  # others must not take it for the real one


def _peer_item(setting: Setting, peer: Peer, kind: str, dtype: torch.dtype, passes: str) -> Item:
    name = f"{kind} {plain(dtype)}, {peer.name} ({'+'.join(peer.gives)}), {passes}"
    return Item(name, lambda: _peer(setting, peer, _case(setting, kind, dtype), passes))


@functools.lru_cache(maxsize=1)  # some 6 GB; items of one case follow each other
def _case(setting: Setting, kind: str, dtype: torch.dtype) -> Case:
    n, vocab, width = setting.pick(SHAPE, (16, 1187, 32))
    return make_case(kind, dtype, n, vocab, width, setting.device)


def _peer(setting: Setting, peer: Peer, case: Case, passes: str) -> dict:
    try:
        function = peer.load()
        return {**_measured(setting, case, function, case.loss, passes), **_floor(setting, case, passes, "default")}
    except PeerMissing as error:
        raise Skip(f"not installed: {error}") from error
    except Exception as error:
        if peer.name == OURS or _is_fatal(error):
            raise
        raise Skip(f"{type(error).__name__}: {error}"[:300]) from error


def _ours_hidden(setting: Setting, names: tuple[str, ...], label: str, passes: str) -> dict:
    case = _case(setting, "hidden", _BF16)

    def function(case: Case) -> dict[str, torch.Tensor]:
        return _named(linear_token_stats(case.student, case.weight, case.targets, case.teacher, stats=names), names)

    return {**_measured(setting, case, function, weighted, passes), **_floor(setting, case, passes, label), "label": label}


def _measured(setting: Setting, case: Case, function: Callable, loss: Callable, passes: str) -> dict:
    """Time, peak memory beside what was held (results included, and without the gradients), error of the outputs."""

    def forward():
        with torch.no_grad():
            return function(case)

    def both():
        return torch.autograd.grad(loss(function(case)), case.leaves)

    call = forward if passes == "forward" else both
    start = time.perf_counter()
    call()
    _synchronize(setting)
    first = time.perf_counter() - start
    found = {**_spread(_times(call, setting, seconds=3.0, rounds=12)), "first_s": first}
    extra = extra_memory(call, setting.device)
    results = 0 if passes == "forward" else sum(leaf.numel() * leaf.element_size() for leaf in case.leaves) / MIB
    if extra is not None:
        found |= {"extra_mib": extra, "beside_results_mib": extra - results}
    return {**found, "error": _error(case, forward())}


def _error(case: Case, outputs: dict[str, torch.Tensor], rows: int = 32) -> float:
    """The largest error of the outputs that `eager_stats` has too, over the first rows, in nats."""
    student, teacher = case.student.detach()[:rows].double(), case.teacher[:rows].double()
    if case.weight is not None:
        weight = case.weight.detach().double()
        student, teacher = student @ weight.T, teacher @ weight.T
    want = eager_stats(student, teacher, case.targets[:rows])
    errors = [(outputs[k][:rows].double() - w).abs().max().item() for k, w in want.items() if k in outputs and outputs[k].dim()]
    return max(errors, default=math.nan)


def _floor(setting: Setting, case: Case, passes: str, label: str) -> dict:
    """What must be done at least: GEMM flops from hidden states, bytes of logits moved. jsd needs the logits a second time."""
    sweeps = 2 if label == "all seven" else 1
    n = len(case.targets)
    if case.weight is None:
        tensors = 2 * sweeps + (3 if passes != "forward" else 0)
        return {"floor_bytes": tensors * case.student.numel() * case.student.element_size()}
    gemms = 2 * sweeps + (4 if passes != "forward" else 0)
    return {"floor_flops": gemms * 2 * n * case.weight.numel()}


# --- tuning -----------------------------------------------------------------------------------------------------------------


def tune_items(setting: Setting) -> list[Item]:
    """Blocks and warps of the kernels, then sizes of tiles: reported, applied by nobody but a reader."""
    found = []
    shapes = setting.pick({"tile": (2048, 2048, _F32), "logits": (4096, 151936, _BF16)}, {"tile": (8, 64, _F32)})
    for kernel, (place, shape) in itertools.product(("sweep", "gradient", "mixture"), shapes.items()):
        for block, warps in ((512, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (4096, 16)):
            name = f"{kernel}, {place}, {block}/{warps}"
            run = functools.partial(_tune_kernel, setting, kernel, shape, block, warps)
            found.append(Item(name, run, "the table of blocks is for compiled kernels"))
    for tile, rows, workspace in setting.pick(
        ((32, 2048, 160), (16, 2048, 160), (64, 2048, 160), (32, 4096, 160), (32, 8192, 160), (64, 4096, 160), (32, 2048, 320)),
        ((1, 16, 4),),
    ):
        name = f"tile {tile} MiB, {rows} rows, workspace {workspace} MiB"
        limits = tiling.Limits(tile << 20, workspace << 20, rows, max(rows, 8192))
        found.append(Item(name, functools.partial(_tune_tiles, setting, limits)))
    return found


def _tune_kernel(setting: Setting, kernel: str, shape: tuple, block: int, warps: int) -> dict:
    import triton

    from gear_kernels.triton import stats as kernels

    n, columns, dtype = shape
    student = _tune_logits(setting, shape)
    sums = torch.zeros(1, n, len(reference.SUM_NAMES), dtype=torch.float64, device=setting.device)
    rows = reference.Rows(torch.zeros(n, dtype=torch.int64, device=setting.device), torch.ones(n, device=setting.device), -100)
    task, tile = backends.Task(rows, DEFAULT if kernel != "mixture" else ("jsd",)), backends.Tile(student)
    kernels.sweep(tile, tile, task, sums)
    _, state = kernels.finish(sums, task)
    calls = {
        "sweep": lambda: kernels.sweep(tile, tile, task, sums),
        "gradient": lambda: kernels.gradient(tile, tile, task, state, torch.ones(n, 7, device=setting.device), dz),
        "mixture": lambda: kernels.mixture(tile, tile, task, state, torch.zeros_like(sums[..., :2])),
    }
    dz = torch.empty(n, columns, dtype=_BF16, device=setting.device)
    key = (kernel, str(triton.runtime.driver.active.get_current_target().arch))
    before = dict(kernels._CONFIGS)
    kernels._CONFIGS[key] = kernels.Config(block, warps)
    try:
        times = _times(calls[kernel], setting, seconds=0.5)
    finally:
        kernels._CONFIGS.clear()
        kernels._CONFIGS.update(before)
    return {**_spread(times), "gb_s": 2 * student.numel() * student.element_size() / statistics.median(times) / 1e6}


@functools.lru_cache(maxsize=1)
def _tune_logits(setting: Setting, shape: tuple) -> torch.Tensor:
    return torch.randn(shape[0], shape[1], device=setting.device).mul_(3).to(shape[2])


def _tune_tiles(setting: Setting, limits: tiling.Limits) -> dict:
    before = dict(tiling._LIMITS)
    tiling._LIMITS[setting.device] = limits
    try:
        found = {}
        for passes in PASSES:
            measured = _ours_hidden(setting, DEFAULT, "default", passes)
            found |= {f"{passes} ms": measured["ms"], f"{passes} MiB": measured.get("beside_results_mib")}
        return found
    finally:
        tiling._LIMITS.clear()
        tiling._LIMITS.update(before)


# --- running items ----------------------------------------------------------------------------------------------------------

# name: items, seconds
PHASES: dict[str, tuple[Callable[[Setting], list[Item]], int]] = {
    "machine": (machine_items, 30),
    "ceilings": (ceiling_items, 40),
    "correctness": (correctness_items, 230),
    "speed": (speed_items, 190),
    "tune": (tune_items, 150),
}
_DEFAULT_PHASES = ("machine", "ceilings", "correctness", "speed")  # 490 seconds


def work(phase: str, setting: Setting, start: int = 0) -> Iterator[dict]:
    """Run a phase's items from `start` on: {"begin": name, "of": count} before each, its outcome after it."""
    items = PHASES[phase][0](setting)
    for item in items[start:]:
        yield {"begin": item.name, "of": len(items)}
        begin, fatal = time.perf_counter(), False
        outcome = {"name": item.name, "status": "passed"}
        try:
            if item.gpu_only and setting.self_test:
                raise Skip(f"needs a GPU: {item.gpu_only}")
            outcome["figures"] = item.run()
            _synchronize(setting)
        except Skip as skip:
            outcome |= {"status": "skipped", "reason": str(skip)}
        except Exception as error:  # a failure is a line of the report
            outcome |= {"status": "failed", "reason": _described(error)}
            fatal = _is_fatal(error)
        yield {**outcome, "seconds": round(time.perf_counter() - begin, 2)}
        if fatal:
            raise SystemExit(_FATAL)
        _clean(setting)


def _synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def _clean(setting: Setting) -> None:
    if setting.device == "cuda" and torch.cuda.memory_reserved() > 1 << 30:
        gc.collect()
        torch.cuda.empty_cache()


def _described(error: Exception) -> str:
    ours = (str(ROOT / "gear_kernels"), str(ROOT / "benchmarks"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ours)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:600]}{where}"


def _is_fatal(error: Exception) -> bool:
    """After these the process' CUDA context answers nothing any more."""
    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def run_phase(phase: str, setting: Setting, seconds: float, tell: Callable[[str], None]) -> dict:
    """A phase in processes of its own: {"items": outcomes, "missed": items not reached}. A process that dies costs one item."""
    items, count, deadline = [], 0, time.perf_counter() + seconds
    while True:
        running = None
        with tempfile.TemporaryFile("w+") as errors:
            code, lines = _process(phase, setting, len(items), deadline, errors)
            for line in lines:
                if "begin" in line:
                    running, count = line["begin"], line["of"]
                else:
                    items.append(line)
                    running = None
                    tell(f"[{phase} {len(items)}/{count}] {_line(line)}")
            late = time.perf_counter() >= deadline
            if running is not None:
                reason = f"the phase's {seconds:.0f} s were over" if late else f"its process ended with {code()}: {_tail(errors)}"
                status = "skipped" if late and phase != "correctness" else "failed"
                items.append({"name": running, "status": status, "reason": reason, "seconds": None})
                tell(f"[{phase} {len(items)}/{count}] {_line(items[-1])}")
            elif not count or (code() not in (0, _FATAL) and not late):
                reason = f"nothing ran in {seconds:.0f} s" if late else _tail(errors)
                items.append({"name": phase, "status": "failed", "reason": reason, "seconds": None})
                return {"items": items, "missed": max(count - len(items), 0)}
        if late or len(items) >= count:
            return {"items": items, "missed": count - len(items)}


def _process(phase: str, setting: Setting, start: int, deadline: float, errors) -> tuple[Callable[[], int], Iterator[dict]]:
    """Its exit code (once the lines are used up), and the lines that it writes; killed at the deadline."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--worker", phase, "--start", str(start), *_worker_options(setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (setting.wheels, os.environ.get("PYTHONPATH"))))}
    pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its compiler's helpers too, or the pipe would stay open

    timer = threading.Timer(max(deadline - time.perf_counter(), 0.1), kill)
    timer.start()

    def lines() -> Iterator[dict]:
        try:
            for line in process.stdout:
                if line.startswith('{"') and line.endswith("}\n"):  # anything else is a library's chatter
                    yield json.loads(line)
            process.wait()
        finally:
            timer.cancel()
            kill()

    return lambda: process.returncode, lines()


def _worker_options(setting: Setting) -> list[str]:
    return ["--self-test"] if setting.self_test else []


def _tail(errors) -> str:
    errors.seek(0)
    return errors.read().strip()[-600:]


def _line(outcome: dict) -> str:
    figures = {k: v for k, v in outcome.get("figures", {}).items() if k in ("ms", "gb_s", "tflop_s", "error", "gradient_error")}
    shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
    return f"{outcome['name']}: {outcome['status']} {shown}{outcome.get('reason', '')}"


# --- the report -------------------------------------------------------------------------------------------------------------


def with_floors(report: dict) -> None:
    """Add to the speed phase what the measured ceilings and the goals make of each time, in place."""
    ceilings = {i["name"]: i["figures"] for i in report["phases"].get("ceilings", {}).get("items", []) if "figures" in i}
    tflop_s = max((f["tflop_s"] for f in ceilings.values() if "tflop_s" in f), default=None)
    gb_s = max((f["gb_s"] for f in ceilings.values() if "gb_s" in f), default=None)
    for item in report["phases"].get("speed", {}).get("items", []):
        figures = item.get("figures", {})
        flops, moved = figures.pop("floor_flops", None), figures.pop("floor_bytes", None)
        floor = flops / tflop_s / 1e9 if flops and tflop_s else moved / gb_s / 1e6 if moved and gb_s else None
        if floor:
            figures |= {"floor_ms": floor, "of_roofline": floor / figures["ms"]}
        goal = GOALS.get((figures.pop("label", None), item["name"].rsplit(", ", 1)[-1]))
        if goal and not report["self_test"]:
            figures |= {"goal_ms": goal[0], "design_floor_ms": goal[1], "goal_met": figures["ms"] <= goal[0]}
            figures |= {"goal_mib": GOAL_MIB, "memory_met": figures["beside_results_mib"] <= GOAL_MIB}


def failures(report: dict) -> list[str]:
    """A line for each item that failed, and for each phase but tuning that was cut short."""
    found = []
    for phase, result in report["phases"].items():
        found += [f"{phase}: {i['name']}: {i['reason']}" for i in result["items"] if i["status"] == "failed"]
        if result["missed"] and phase == "correctness":
            found.append(f"{phase}: {result['missed']} items were not reached")
    return found


LEGEND = (
    "ms: median (low, high: quartiles) of single warm calls by CUDA events. first_s: the first call, with its compiling. "
    "extra_mib: peak memory above what was held; beside_results_mib: without the gradients. error: against float64, in nats, the "
    "largest of the outputs named on 32 rows. floor_ms: the GEMMs (jsd: made twice) or the bytes that cannot be saved, at the "
    "best ceiling above; of_roofline: floor / time. A peer that gives less than all outputs is held against the same floor."
)


def markdown(report: dict) -> str:
    """The whole report; a table per phase."""
    head = f"{report['date']}, {report['seconds']:.0f} s." + (" Self-test: figures mean nothing." if report["self_test"] else "")
    lines = ["# GPU report", "", head, ""]
    wrong = failures(report)
    lines += ["**Failures**", "", *[f"- {_plain_text(line)}" for line in wrong]] if wrong else ["No failures."]
    for phase, result in report["phases"].items():
        counts = {s: sum(i["status"] == s for i in result["items"]) for s in ("passed", "failed", "skipped")}
        lines += ["", f"## {phase}", "", ", ".join(f"{n} {s}" for s, n in counts.items()) + f", {result['missed']} not reached"]
        lines += ["", LEGEND] if phase == "speed" else []
        lines += ["", *(_machine_lines(result) if phase == "machine" else _table(result["items"]))]
    return "\n".join(lines) + "\n"


def _machine_lines(result: dict) -> list[str]:
    return [f"- {k}: {_cell(v)}" for i in result["items"] for k, v in i.get("figures", {}).items()]


def _table(items: list[dict]) -> list[str]:
    heads = list(dict.fromkeys(name for item in items for name in item.get("figures", {})))
    lines = ["| item | status | " + " | ".join(heads) + " | s |", "| --- | --- |" + " --- |" * (len(heads) + 1)]
    for item in items:
        cells = [_cell(item.get("figures", {}).get(name)) for name in heads]
        status = item["status"] + (f": {_plain_text(item['reason'])}" if "reason" in item else "")
        lines.append(f"| {item['name']} | {status} | " + " | ".join([*cells, _cell(item["seconds"])]) + " |")
    return lines


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _plain_text(str(value))


def _plain_text(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")


def write(report: dict, folder: Path) -> Path:
    """gpu_<device>_<date>.json and .md; the path of the latter."""
    figures = next((i["figures"] for i in report["phases"]["machine"]["items"] if "figures" in i), {"device": "unknown"})
    device = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    path = folder / f"gpu_{device}_{report['date'][:10]}.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(_finite(report), indent=1) + "\n")
    path.write_text(markdown(report))
    return path


def _finite(value):
    """NaN and infinities as text: JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def in_process(phase: str, setting: Setting, seconds: float, tell: Callable[[str], None]) -> dict:
    """`run_phase` without processes, for the self-test."""
    items = [line for line in work(phase, setting) if "status" in line]
    for i, item in enumerate(items):
        tell(f"[{phase} {i + 1}/{len(items)}] {_line(item)}")
    return {"items": items, "missed": 0}


def run(setting: Setting, phases: Sequence[str], folder: Path, tell: Callable[[str], None] = print) -> dict:
    """All phases; the report is written after each."""
    start = time.perf_counter()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"date": date, "self_test": setting.self_test, "seconds": 0.0, "phases": {}}
    for phase in phases:
        runner = in_process if setting.self_test else run_phase
        report["phases"][phase] = runner(phase, setting, PHASES[phase][1], tell)
        report["seconds"] = round(time.perf_counter() - start, 1)
        if phase == "speed":
            with_floors(report)
        if phase == "machine" and failures(report):
            break
        tell(f"{report['seconds']} s; wrote {write(report, folder)} and .json")
    for line in failures(report):
        tell(f"FAILED {line}")
    return report


@contextlib.contextmanager
def unpacked(wheels: Path | None) -> Iterator[str | None]:
    """A folder for the module path that holds the wheels of another, unpacked; None for none."""
    if wheels is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        sys.path.insert(0, folder)  # for the self-test, which has no processes
        yield folder
        sys.path.remove(folder)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument(
        "--wheels", type=Path, help="a folder with wheels of peers (trl, liger-kernel, cut-cross-entropy; packaging)"
    )
    parser.add_argument("--phases", default=",".join(_DEFAULT_PHASES), help="comma-separated; machine comes first")
    parser.add_argument("--tune", action="store_true", help="also sweep block sizes and tiles; two and a half minutes more")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the two files go")
    parser.add_argument("--worker", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = "cpu" if given.self_test else "cuda"
    if given.worker:
        for line in work(given.worker, Setting(device), given.start):
            print(json.dumps(line), flush=True)
        return 0
    phases = list(dict.fromkeys(["machine", *given.phases.split(","), *["tune"] * given.tune]))
    with unpacked(given.wheels) as folder:
        report = run(Setting(device, folder), phases, given.output)
    return 1 if failures(report) else 0


if __name__ == "__main__":
    sys.exit(main())
