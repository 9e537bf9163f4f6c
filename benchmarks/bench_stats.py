"""Statistics of logits and of hidden states beside the peers, on small shapes: `python -m pytest benchmarks [--compiled]`."""

import functools
import math

import pytest
import torch

from .cases import SMALL, Case, Truth, find_truth, make_case, plain
from .cpu_report import DTYPES, PASSES, TRAFFIC, first_call
from .measure import extra_memory, keep_freed_blocks
from .peers import OURS, PEERS, Peer

SEATS = [(kind, peer) for kind in SMALL for peer in PEERS if peer.kind == kind and "cpu" in peer.devices]


@functools.cache
def given(kind: str, dtype: torch.dtype) -> tuple[Case, Truth]:
    case = make_case(kind, dtype, *SMALL[kind])
    return case, find_truth(case)


def moved(case: Case, passes: str) -> int:
    """Bytes that a pass must move at least: tensors of [N, V] where logits are given; else inputs read, gradients written."""
    if case.kind == "logits":
        return TRAFFIC[passes] * case.student.nbytes
    inputs, gradients = case.student.nbytes + case.teacher.nbytes + case.weight.nbytes, sum(x.nbytes for x in case.leaves)
    return inputs if passes == "forward" else 2 * inputs + gradients


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=plain)
@pytest.mark.parametrize(("kind", "peer"), SEATS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.benchmark(min_rounds=5, max_time=0.3)
def bench_statistics(benchmark, pytestconfig, kind: str, peer: Peer, dtype: torch.dtype, passes: str):
    if peer.compiles and not pytestconfig.getoption("--compiled"):
        pytest.skip("it compiles at its first call: --compiled")
    torch.compiler.reset()  # compiled peers start afresh, with this shape and dtype only
    keep_freed_blocks()
    case, truth = given(kind, dtype)
    row, call, _ = first_call(peer, case, truth, passes)
    if call is None:
        pytest.skip(row.failure)
    assert not (row.wrong and peer.name == OURS), row.errors
    benchmark.group = f"{kind}, {plain(dtype)}, {passes} {list(SMALL[kind])}"
    benchmark(call)
    note(benchmark, peer.name, moved(case, passes), extra_memory(call), row.errors)


def note(benchmark, name: str, size: int, extra_mib: float | None, errors: dict[str, float]) -> None:
    """Into extra_info: bytes moved, GB/s by the median (NaN under --benchmark-disable), peak MiB, errors against float64."""
    seconds = benchmark.stats.stats.median if benchmark.stats else math.nan
    benchmark.extra_info.update(name=name, bytes=size, gb_s=size / seconds / 1e9, extra_mib=extra_mib, errors=errors)
