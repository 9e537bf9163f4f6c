"""The credit scan on a typical pack, compiled and by the reference back end: `python -m pytest benchmarks`."""

import pytest

from .bench_stats import note
from .harness.credit_inputs import SMALL_PACK, TOKEN_BYTES, Pack, pack
from .harness.measure import extra_memory, keep_freed_blocks
from .harness.peers import OURS
from .reports.credit import REFERENCE, by_reference

WAYS = {OURS: Pack.credit, REFERENCE: by_reference}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(group=f"credit_weights, typical pack {list(SMALL_PACK)}", min_rounds=5, max_time=0.3)
def bench_credit(benchmark, way: str):
    """One way of computing GEAR's weights, its error against float64."""
    p = pack(*SMALL_PACK)
    exact = by_reference(Pack(p.signal.double(), p.entropy.double(), p.advantages.double(), p.cu_seqlens))
    keep_freed_blocks()
    error = (WAYS[way](p).weights.double() - exact.weights).abs().max().item()
    benchmark(WAYS[way], p)
    figures = {"bytes": SMALL_PACK[0] * TOKEN_BYTES, "flops": None, "extra_mib": extra_memory(lambda: WAYS[way](p))}
    note(benchmark, way, figures, {"weights": error})
