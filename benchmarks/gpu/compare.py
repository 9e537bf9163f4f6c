"""Inputs of the GPU report's checks, and their comparison with float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gear_kernels import Head, linear_token_stats, reference, stats, token_stats
from gear_kernels.reference import GRADIENT_NAMES, STAT_NAMES

from .items import BF16, F16, F32, Setting


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
        return named(found, names)

    def exact(self, names: Sequence[str] = STAT_NAMES, student: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The definition, in float64."""
        rows = reference.Rows(self.targets, 1.0 / self.temperature.double(), -100)
        own = (self.student if student is None else student).double()
        return reference.token_stats(own, self.teacher.double(), rows, tuple(names))

    def part(self, rows: list[int]) -> Problem:
        """Some of the rows."""
        return Problem(*(None if x is None else x[rows] for x in (self.student, self.teacher, self.targets, self.temperature)))


def named(found: stats.TokenStats, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Some of the statistics, by name."""
    return {name: getattr(found, name) for name in names}


def problem(setting: Setting, n: int, vocab: int, dtype: torch.dtype = F32, seed: int = 0, masked: bool = True) -> Problem:
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
    rounding = {F32: 3e-6, BF16: 1.02 * 2**-8, F16: 2**-10}[dtype] * limit
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


def gradients(function: Callable, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of `weighted` outputs of the function, with respect to copies of its leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(weighted(function(*leaves)), leaves)


def check(given: Problem, names: Sequence[str] = STAT_NAMES, atol: float = 2e-6) -> dict:
    """Values and gradients of given logits against float64."""
    error = compare(given.run(names), given.exact(names), atol)
    if not set(names) & set(GRADIENT_NAMES):
        return {"error": error}
    got = gradients(lambda s: given.run(names, s), given.student)
    want = gradients(lambda s: given.exact(names, s), given.student.double())
    if got[0].dtype != given.student.dtype:
        raise AssertionError(f"gradient of dtype {got[0].dtype}")
    return {"error": error, "gradient_error": compare_gradients(got, want, given.student.dtype)}


# --- hidden states ----------------------------------------------------------------------------------------------------------


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
        return named(linear_token_stats(student, head, self.targets, self.teacher, **options), names)

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


def linear(setting: Setting, dtype=F32, shape=(37, 1187, 64), bias=False, own=False, workspace=None, **options) -> Linear:
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
    got = gradients(lambda *x: given.run(*x, names=names), *given.leaves)
    want = gradients(lambda *x: given.exact(*x, names=names), *(x.double() for x in given.leaves))
    dtype = given.student.dtype
    return {"error": error, "gradient_error": compare_gradients(got, want, dtype, limit=10 if dtype == F32 else 2)}
