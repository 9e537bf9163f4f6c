"""The GPU report's overheads: what small calls cost beside their kernels, and what is left of that in a CUDA graph."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from .cases import PASSES, SMALL, make_case, runner
from .gpu_items import F32, Item, Setting, capture, synchronize
from .gpu_speed import spread, timed_ms
from .packs import SMALL_PACK, pack
from .peers import OURS, peers


def overhead_items(setting: Setting) -> list[Item]:
    """Calls so small that the host is what they wait for, after one of torch's own."""
    found = [Item("torch, an addition", lambda: _overhead(setting, torch.ones(1, device=setting.device).add_, 1))]
    for kind in SMALL:
        found += [
            Item(f"{kind} {list(SMALL[kind])}, {passes}", lambda k=kind, p=passes: _statistics(setting, k, p))
            for passes in PASSES
        ]
    return [*found, Item("credit, typical pack", lambda: _overhead(setting, pack(*SMALL_PACK).to(setting.device).credit))]


def _statistics(setting: Setting, kind: str, passes: str) -> dict:
    case = make_case(kind, F32, *SMALL[kind], device=setting.device)
    ours = next(peer for peer in peers(kind) if peer.name == OURS)
    return _overhead(setting, runner(ours.load(), case, passes))


def _overhead(setting: Setting, function: Callable, *arguments: object) -> dict:
    """host_us: until a call returns, the device still busy.  ms: by events, the gaps between kernels included.  graph_ms: the
    same replayed as a CUDA graph.
    """
    call = functools.partial(function, *arguments)
    times = timed_ms(call, setting, seconds=0.5)
    found = {"host_us": _host_us(setting, call), **spread(times)}
    if not setting.self_test:
        graph, _ = capture(call)
        found["graph_ms"] = statistics.median(timed_ms(graph.replay, setting, seconds=0.5))
    return found


def _host_us(setting: Setting, call: Callable, rounds: int = 20) -> float:
    found = []
    for _ in range(setting.pick(rounds, 3)):
        synchronize(setting)
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(found)
