"""Statistics of logits and of hidden states beside the peers: `python -m pytest benchmarks [--full]`."""

import functools
import math
from typing import NamedTuple

import pytest
import torch

from .harness.cases import (
    DTYPES,
    PASSES,
    PRODUCTS,
    QWEN3_VOCABULARY,
    QWEN3_WIDTHS,
    SMALL,
    TRAFFIC,
    Case,
    Truth,
    find_truth,
    make_case,
    plain,
)
from .harness.measure import extra_memory, keep_freed_blocks
from .harness.peers import OURS, PEERS, Peer
from .harness.tables import first_call


class Given(NamedTuple):
    """Inputs of one group of rows. shape: N, V and, from hidden states, D."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = "small"

    def __str__(self) -> str:
        return f"{self.kind}-{plain(self.dtype)}-{self.name}"


ALWAYS = [Given(kind, dtype, shape) for kind, shape in SMALL.items() for dtype in DTYPES]
# few rows, one dtype a head: a call of the slowest peer takes seconds, and the float32 copy of the 8B head is 2.3 GiB
FULL = [
    *(Given("logits", dtype, (64, QWEN3_VOCABULARY), "Qwen3") for dtype in DTYPES),
    Given("hidden", torch.float32, (16, QWEN3_VOCABULARY, QWEN3_WIDTHS["4B"]), "Qwen3-4B"),
    Given("hidden", torch.bfloat16, (16, QWEN3_VOCABULARY, QWEN3_WIDTHS["8B"]), "Qwen3-8B"),
]


def everyone(kind: str) -> list[Peer]:
    """Ours, then all peers that run on a CPU, those included that the others' choice of a compiled form leaves out."""
    return [peer for peer in PEERS if peer.kind == kind and "cpu" in peer.devices]


def _entrants() -> list:
    found = []
    for given in ALWAYS + FULL:
        for passes in PASSES:
            for peer in everyone(given.kind):
                marks = [pytest.mark.full] if peer.compiles or given in FULL else []
                found.append(pytest.param(given, peer, passes, marks=marks, id=f"{given}-{passes}-{peer.name}"))
    return found


@functools.lru_cache(maxsize=1)  # the widest head's float64 truth is 5 GB while it is made
def inputs(given: Given) -> tuple[Case, Truth]:
    """A group's inputs, and what its answers are held against."""
    case = make_case(given.kind, given.dtype, *given.shape)
    return case, find_truth(case)


def moved(case: Case, passes: str) -> int:
    """Bytes that a pass must move at least: tensors of [N, V] where logits are given; else inputs read, gradients written."""
    if case.kind == "logits":
        return TRAFFIC[passes] * case.student.nbytes
    inputs, gradients = case.student.nbytes + case.teacher.nbytes + case.head.nbytes, sum(x.nbytes for x in case.leaves)
    return inputs if passes == "forward" else 2 * inputs + gradients


@pytest.mark.parametrize(("given", "peer", "passes"), _entrants())
@pytest.mark.benchmark(min_rounds=5, max_time=0.3)
def bench_statistics(benchmark, given: Given, peer: Peer, passes: str):
    """One peer on one group of inputs; ours must be right."""
    torch.compiler.reset()  # compiled peers start afresh, with this shape and dtype only
    keep_freed_blocks()
    case, truth = inputs(given)
    row, call, _ = first_call(peer, case, truth, passes)
    if call is None:
        pytest.skip(str(row.failure))
    assert not (row.wrong and peer.name == OURS), row.errors
    benchmark.group = f"{given.kind}, {plain(given.dtype)}, {passes}, {given.name} {list(given.shape)}"
    benchmark.pedantic(call, rounds=3) if given in FULL else benchmark(call)
    flops = PRODUCTS[passes] * 2 * math.prod(given.shape) if given.kind == "hidden" else None
    note(benchmark, peer.name, {"bytes": moved(case, passes), "flops": flops, "extra_mib": extra_memory(call)}, row.errors)


def note(benchmark, name: str, figures: dict, errors: dict[str, float]) -> None:
    """Into extra_info: bytes that must move, floating-point operations that must be made (None where there are no products),
    peak MiB, errors against float64; and by the median GB/s and TFLOP/s (NaN under --benchmark-disable).
    """
    seconds = benchmark.stats.stats.median if benchmark.stats else math.nan
    tflop_s = figures["flops"] / seconds / 1e12 if figures["flops"] else None
    rates = {"gb_s": figures["bytes"] / seconds / 1e9, "tflop_s": tflop_s}
    benchmark.extra_info.update(name=name, errors=errors, **figures, **rates)
