"""Cases of a comparison: inputs, the loss that gives them gradients, and the float64 truth that every answer is held against."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import internals

DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("forward", "forward+backward")
OUTPUTS = ("logprobs", "entropy", "reverse_kl")
SEVEN = ("logprobs", "teacher_logprobs", "entropy", "teacher_entropy", "reverse_kl", "forward_kl", "jsd")  # all that have sums
TERMS = {"logprobs": "logprobs", "entropy": "entropy", "reverse_kl": "reverse_kl", "mean_reverse_kl": "reverse_kl"}
# kind: N, V and, with a head, D; a ragged vocabulary, a few MiB: what the gates and the pytest benchmarks run on a CPU
SMALL = {"logits": (32, 32003), "hidden": (32, 32003, 128)}
QWEN3_VOCABULARY = 151936
QWEN3_WIDTHS = {"4B": 2560, "8B": 4096}  # of the hidden states under the heads of Qwen3-4B and Qwen3-8B
HEAD_SHAPE = (8192, QWEN3_VOCABULARY, QWEN3_WIDTHS["8B"])  # N, V, D that the limits on a GPU are set for
# Tensors of [N, V] that a pass over given logits must move at least: both heads read; backward reads them again and writes one
TRAFFIC = {"forward": 2, "forward+backward": 5}
# Products of a head that a pass must make: student and teacher; then both again, and the two gradients
PRODUCTS = {"forward": 2, "forward+backward": 6}
_LOGIT_STD = 4.0  # entropies of 3 to 5 nats at V = 151936, nearer a language model than flat logits
_TEACHER_GAP = 0.3  # std of the teacher's logits around the student's: a KL of some 0.05 nats
_CHECKED_ROWS = 16  # rows of the student's gradient that are compared
_CHECKED_COLUMNS = 256  # and rows of the weight's, beside the targets' own


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison. student, teacher: logits [N, V], or hidden states [N, D] under `weight` [V, D] (shared head).

    row_grads: [2, N], what the loss multiplies log-probs and entropy with; the KL enters as its mean, because some peers give
    no more than that.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    targets: torch.Tensor
    row_grads: torch.Tensor
    weight: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """The kind of inputs: logits or hidden."""
        return "logits" if self.weight is None else "hidden"

    @property
    def head(self) -> torch.Tensor:
        """The weight that hidden states come with."""
        assert self.weight is not None
        return self.weight

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The tensors that get gradients: the student's and, where there is one, the head's weight."""
        return [self.student] if self.weight is None else [self.student, self.weight]

    def loss(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """A scalar over whatever outputs there are; gradients of the parts add up, so each peer's can be checked."""
        parts = [self._term(name, value) for name, value in outputs.items()]
        return torch.stack(parts).sum()

    def _term(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name in ("logprobs", "entropy"):
            return (value.double() * self.row_grads[OUTPUTS.index(name)]).sum()
        return value.double().mean()


def plain(dtype: torch.dtype) -> str:
    """float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def make_case(
    kind: str, dtype: torch.dtype, rows: int, columns: int, width: int = 0, *, device: str = "cpu", sampled: bool = True
) -> Case:
    """Random inputs, the same on every run: kind "logits" [rows, columns], or "hidden" [rows, width] with its head.

    sampled: targets out of each row's own distribution, for which the logits are made; else any.
    """
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device).mul_(scale)

    if kind == "logits":
        student, weight = normal(rows, columns, scale=_LOGIT_STD), None
        teacher = student + normal(rows, columns, scale=_TEACHER_GAP)
    else:
        student, weight = normal(rows, width), normal(columns, width, scale=_LOGIT_STD / math.sqrt(width))
        teacher = student + normal(rows, width, scale=_TEACHER_GAP / _LOGIT_STD)
    if sampled:
        targets = _sampled(student if weight is None else student @ weight.T, random)
    else:
        targets = torch.randint(columns, (rows,), generator=random, device=device)
    weight = None if weight is None else weight.to(dtype).requires_grad_()
    row_grads = normal(2, rows, scale=1 / rows).double()
    return Case(student.to(dtype).requires_grad_(), teacher.to(dtype), targets, row_grads, weight)


def _sampled(logits: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """One token per row out of its own distribution, as in training."""
    noise = torch.empty_like(logits).exponential_(generator=random)
    return torch.argmax(logits - noise.log_(), -1)


def runner(function: Callable, case: Case, passes: str, loss: Callable | None = None) -> Callable[[], tuple]:
    """A call that gives (outputs, gradients): forward as in scoring, without autograd; or through the loss and back.

    loss: of the outputs; the case's own by default.
    """
    loss = loss or case.loss

    def forward():
        with torch.no_grad():
            return function(case), None

    def both():
        outputs = function(case)
        return outputs, torch.autograd.grad(loss(outputs), case.leaves)

    return forward if passes == "forward" else both


def definition(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor | None,
    names: Sequence[str] = OUTPUTS,
    temperature: torch.Tensor | float = 1.0,
) -> dict[str, torch.Tensor]:
    """The statistics of logits [N, V] by name, [N] float64 each, by the package's reference: what every answer is held against.

    targets: [N], -100 where a row is ignored.  temperature: [N] or one for all.
    """
    inverse = 1 / torch.as_tensor(temperature, dtype=torch.float64, device=student.device).expand(len(student))
    rows = internals.Rows(targets, inverse, internals.IGNORED)
    return internals.token_stats(student.double(), teacher.double(), rows, tuple(names))


@dataclass(frozen=True)
class Truth:
    """Float64 outputs [N] in nats, and each term's gradient on the checked rows of the student and of the weight."""

    outputs: dict[str, torch.Tensor]
    student_grads: dict[str, torch.Tensor]
    weight_grads: dict[str, torch.Tensor]
    weight_rows: torch.Tensor | None

    def errors(self, outputs: dict[str, torch.Tensor], grads: list[torch.Tensor] | None) -> dict[str, float]:
        """Largest absolute error of each output in nats; of each gradient, relative to its own largest entry."""
        found = {name: self._output_error(name, value) for name, value in outputs.items()}
        if grads is not None:
            terms = [TERMS[name] for name in outputs]
            found["grad_student"] = _relative(grads[0][:_CHECKED_ROWS], _added(self.student_grads, terms))
            if self.weight_rows is not None:
                found["grad_weight"] = _relative(grads[1][self.weight_rows], _added(self.weight_grads, terms))
        return found

    def _output_error(self, name: str, value: torch.Tensor) -> float:
        truth = self.outputs[TERMS[name]]
        truth = truth.mean() if name.startswith("mean_") else truth
        return (value.detach().double() - truth).abs().max().item()


def _added(grads: dict[str, torch.Tensor], terms: list[str]) -> torch.Tensor:
    return functools.reduce(torch.add, (grads[term] for term in terms))


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def find_truth(case: Case, chunk: int = 32) -> Truth:
    """The float64 answer, `chunk` rows at a time: at V = 151936 one float64 tile of 32 rows is 37 MiB."""
    weight = None if case.weight is None else case.weight.detach().double()
    picked = None
    if weight is not None:
        picked = torch.cat([torch.arange(min(_CHECKED_COLUMNS, len(weight)), device=weight.device), case.targets]).unique()
    truth = Truth({}, {}, {}, picked)
    parts = [
        _add_truth(truth, case, weight, slice(start, min(start + chunk, len(case.targets))))
        for start in range(0, len(case.targets), chunk)
    ]
    truth.outputs.update({name: torch.cat([part[name] for part in parts]) for name in OUTPUTS})
    return truth


def _add_truth(truth: Truth, case: Case, weight: torch.Tensor | None, rows: slice) -> dict[str, torch.Tensor]:
    """The outputs of these rows; their part of the gradients is added."""
    student, teacher = case.student.detach()[rows].double(), case.teacher[rows].double()
    logits = (student if weight is None else student @ weight.T).requires_grad_()
    teacher_logits = teacher if weight is None else teacher @ weight.T
    values = definition(logits, teacher_logits, case.targets[rows])
    scales = [*case.row_grads[:, rows], torch.full_like(values["entropy"], 1 / len(case.targets))]
    for name, scale in zip(OUTPUTS, scales, strict=True):
        (dz,) = torch.autograd.grad((values[name] * scale).sum(), logits, retain_graph=True)
        if rows.start == 0:
            dz_checked = dz[:_CHECKED_ROWS]
            truth.student_grads[name] = dz_checked if weight is None else dz_checked @ weight
        if weight is not None:
            own = dz[:, truth.weight_rows].T @ student
            truth.weight_grads[name] = truth.weight_grads[name] + own if name in truth.weight_grads else own
    return {name: value.detach() for name, value in values.items()}
