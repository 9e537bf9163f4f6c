"""The GPU report's clock: what the device needs for a call, and what the host does meanwhile, apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..harness.measure import elapsed_ms
from .run import Setting, synchronize

SMALL_MS = 1.0  # below it a call is timed by a graph: its launches would take longer than its kernels
_GRAPH_CALLS = (20, 50)  # in one graph, fewest and most


def timed(calls: Callable | Sequence[Callable], setting: Setting, seconds: float = 2.0, rounds: int = 20) -> dict:
    """Figures of a warm call: `ms` on the device with `low_ms` and `high_ms` (quartiles), `host_us` until it returns, `clock`.

    calls: one, or the same work on other memory to take turns with, so that none finds its inputs in the L2 cache. Below a
    millisecond the device replays a CUDA graph of 20 to 50 calls; above, events stand around single calls that are enqueued while
    the device is still busy: neither holds the host's start. At least three rounds, until `rounds` or `seconds` are spent.
    """
    calls = (calls,) if callable(calls) else tuple(calls)
    for _ in range(setting.pick(3, 1)):
        for call in calls:
            call()
    clock, times = "wall" if setting.self_test else "filler", _in_turn(calls, setting, seconds, 3)
    if not setting.self_test:
        clock, graphed = _by_graph(calls, min(times), seconds, rounds) if min(times) < SMALL_MS else (clock, None)
        times = graphed or times + _in_turn(calls, setting, seconds, rounds - 3)
    return {**spread(times), "host_us": host_us(calls[0], setting, rounds=3 if min(times) > 5 else 10), "clock": clock}


def _in_turn(calls: Sequence[Callable], setting: Setting, seconds: float, rounds: int) -> list[float]:
    return _repeated(lambda i: elapsed_ms(calls[i % len(calls)], setting.device), seconds, rounds)


def _repeated(measure: Callable[[int], float], seconds: float, rounds: int) -> list[float]:
    found, start = [], time.perf_counter()
    while len(found) < 3 or (len(found) < rounds and time.perf_counter() - start < seconds):
        found.append(measure(len(found)))
    return found


def _by_graph(calls: Sequence[Callable], first: float, seconds: float, rounds: int) -> tuple[str, list[float] | None]:
    """The clock's name and milliseconds of a call by replays; no times, and the reason, where the calls cannot be captured."""
    least, most = _GRAPH_CALLS
    count = max(least, min(most, round(SMALL_MS / max(first, 1e-3))))
    count += -count % len(calls)  # whole turns

    def several() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    try:
        graph, _ = capture(several)
    except RuntimeError as error:  # if the context is lost, the next call says so
        return f"filler; not captured: {error}"[:200], None
    return f"graph of {count}", _repeated(lambda _: elapsed_ms(graph.replay, "cuda") / count, seconds, rounds)


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": middle, "low_ms": low, "high_ms": high}


def host_us(call: Callable, setting: Setting, rounds: int = 10) -> float:
    """Microseconds until a call returns on a device that was idle; more than 1000 launches wait for the device's queue."""
    found = []
    for _ in range(setting.pick(rounds, 3)):
        synchronize(setting)
        start = time.perf_counter()
        result = call()
        found.append((time.perf_counter() - start) * 1e6)
        del result
    return statistics.median(found)


def alone_ms(call: Callable, setting: Setting, rounds: int = 10) -> float:
    """Milliseconds of a single call on an idle device, its start on the host included: what a lone caller waits for."""
    return statistics.median(elapsed_ms(call, setting.device, filler=False) for _ in range(setting.pick(rounds, 3)))


def capture(call: Callable) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call that has run three times on a side stream, as capturing wants it, and the call's results in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
