"""Times, peak memory and memory bandwidth, on the CPU and on CUDA (the CUDA branches have not run on a device yet)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds. low_ms, high_ms: first and third quartile.  first_ms: the first call, with compilation and warm-up.
    least_ms: the quickest warm call, what a neighbour's load moves least.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    first_ms: float
    rounds: int
    least_ms: float


def interleave(
    calls: dict[str, Call],
    first_ms: dict[str, float],
    rounds: int = 9,
    seconds: float = 20.0,
    step: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time warm calls in turn, one each per round, so that a busy spell of the machine falls on all of them alike.

    The order never changes: two turns of one call are a whole round apart. (Going back and forth put the last call's turns side
    by side, and one busy spell made its median twice too long.) Stops after `rounds`, or once `seconds` have passed and three
    rounds are done. first_ms: what each call's first took. `step` is called after every call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= min(3, rounds) and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            times[name].append(elapsed_ms(call, device))
            step()
    return {name: _summary(values, first_ms[name]) for name, values in times.items()}


def _summary(values: list[float], first_ms: float) -> Timing:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(statistics.median(values), low, high, first_ms, len(values), min(values))


_FILLER_CYCLES = 1_000_000  # of the device's clock: about half a millisecond


def elapsed_ms(call: Call, device: str = "cpu", filler: bool = True) -> float:
    """Milliseconds of one call: by events on CUDA, by the wall clock elsewhere. Its result is dropped after the clock stops.

    filler: keep the device busy until the first event and some launches are enqueued. On an idle device the events would time how
    the host starts the call, 30 to 300 microseconds.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if filler:
            torch.cuda._sleep(_FILLER_CYCLES)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)
    begin = time.perf_counter()
    result = call()
    spent = time.perf_counter() - begin
    del result
    return spent * 1e3


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's and the compiled pass' operators, inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class OtherLoad:
    """Share of the processors' time that others took (other processes, and the hypervisor's steal) since it was made.

    Medians of a few rounds do not survive a neighbour that stays; a report has to say that there was one.
    """

    def __init__(self):
        self._start, self._others = time.perf_counter(), self._seconds()

    @staticmethod
    def _seconds() -> float | None:
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except OSError:
            return None
        own = sum(os.times()[:4])  # this process and its children that have ended
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own

    def share(self) -> float | None:
        """0 (alone) to 1; None where the system does not tell."""
        now = self._seconds()
        if self._others is None or now is None:
            return None
        spent = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (now - self._others) / spent))


# --- memory ------------------------------------------------------------------------------------------------------------------


def extra_memory(call: Call, device: str = "cpu") -> float | None:
    """Peak MiB of a warm call above what was held before it, results included; None where the system cannot tell.

    CUDA: the caching allocator's own peak. CPU: the kernel's high-water mark of the process' resident memory, which Linux
    lets a process reset. That peak is exact (no sampling) and counts everybody's pages: torch's, the compiled pass' and the
    GEMM library's; torch's profiler would miss the last two. Two things would blur it. The C library keeps freed blocks, which
    a later call reuses without a trace in the peak: they are handed back first, and during the call every block of 64 KiB and
    more comes straight from the kernel, unless a hole in the heap holds it: a process that has done other work before has such
    holes, and a block in one stays. And the kernel counts pages per processor before it adds them up: some 0.3 MiB.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if not sys.platform.startswith("linux"):
        return None
    with _blocks_from_the_kernel() as trim:
        gc.collect()
        trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: the peak becomes the present value
        except OSError:
            return None
        before = _status_kib("VmRSS")
        result = call()
        peak = _status_kib("VmHWM")
        del result
    return (peak - before) / 1024


@contextlib.contextmanager
def _blocks_from_the_kernel() -> Iterator[Callable[[int], int]]:
    """malloc maps blocks of 64 KiB and more and unmaps them when freed; afterwards glibc's own limits hold again.

    Those are the ones its adaptive rule arrives at (32 and 64 MiB) once a large block has been freed, as it has by then.
    """
    libc = ctypes.CDLL(None)
    try:
        libc.mallopt(_MMAP_THRESHOLD, 64 << 10)
        yield libc.malloc_trim
    finally:
        keep_freed_blocks()


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_blocks() -> None:
    """From here on malloc keeps freed blocks below 32 MiB: before, page faults can make eager torch three times slower."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)


def _status_kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


# --- bandwidth ---------------------------------------------------------------------------------------------------------------


class ReadBandwidth:
    """The machine's read bandwidth, as the quicker of two plain reductions over a buffer far larger than the caches.

    `calls` go into the same interleaved run as what they are compared with: bandwidth drifts with the neighbours' load.
    """

    def __init__(self, device: str = "cpu", size_mib: int = 512):
        # 1.0 as a float: unwritten memory would be one shared zero page, and integer ones are subnormal floats
        words = torch.full((size_mib * MIB // 4,), 0x3F800000, dtype=torch.int32, device=device)
        self.bytes = size_mib * MIB
        self.calls: dict[str, Call] = {
            "read, integer maximum": lambda: words.amax(),
            "read, float sum": lambda: words.view(torch.float32).sum(),
        }

    def gb_s(self, timings: dict[str, Timing]) -> float:
        """GB/s (1e9 bytes) by the medians of one interleaved run."""
        return max(self.bytes / timings[name].median_ms / 1e6 for name in self.calls)
