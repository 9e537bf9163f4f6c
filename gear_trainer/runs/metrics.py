"""Numbers of a step: sums that add up over ranks, and its phases' seconds and memory. All are read once a step; until then nobody
waits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Number = float | torch.Tensor  # a tensor of one element stays on its device until it is read

# What the machine decides and no resumed run repeats: every other key of a step is a function of the configuration.
MEASURED = ("seconds", "tokens_per_second", "tokens_per_second_per_gpu", "idle_share", "mfu", "memory", "memory_planned")


class Sums:
    """A step's numbers by name, over all ranks: means, totals and peaks. `read` is collective; every rank must name the same."""

    def __init__(self) -> None:
        self._means: dict[str, list[Number]] = {}  # total and count
        self._totals: dict[str, Number] = {}
        self._peaks: dict[str, list[Number]] = {}

    def mean(self, name: str, total: Number, count: Number) -> None:
        """Add to a mean: what `count` items sum up to, on this rank. Without any item on any rank it reads None."""
        entry = self._means.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + _wide(total)
        entry[1] = entry[1] + _wide(count)

    def mean_of(self, name: str, values: torch.Tensor) -> None:
        """Add all elements to a mean."""
        self.mean(name, values.double().sum(), values.numel())

    def total(self, name: str, value: Number) -> None:
        """Add to a total over all ranks."""
        self._totals[name] = self._totals.get(name, 0.0) + _wide(value)

    def declare(self, *names: str) -> None:
        """Name means to which this rank may have nothing to add."""
        for name in names:
            self.mean(name, 0.0, 0.0)

    def peak(self, name: str, value: Number) -> None:
        """Add to a maximum, which is at least 0; a NaN stays: max(0, nan) would hide it."""
        self._peaks.setdefault(name, [0.0]).append(_wide(value))

    def read(self, device: torch.device) -> dict[str, float | None]:
        """Each name's value over all ranks, by name, peaks last. Collective."""
        means, totals, peaks = sorted(self._means), sorted(self._totals), sorted(self._peaks)
        summed = _stacked([x for name in means for x in self._means[name]] + [self._totals[name] for name in totals], device)
        largest = [_stacked(self._peaks[name], device).amax() for name in peaks]
        most = torch.stack(largest) if largest else summed.new_zeros(0)
        dist.all_reduce(summed)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        flat = summed.tolist()
        pairs = zip(means, flat[: 2 * len(means) : 2], flat[1 : 2 * len(means) : 2], strict=True)
        out: dict[str, float | None] = {name: s / n if n else None for name, s, n in pairs}
        out |= dict(zip(totals, flat[2 * len(means) :], strict=True))
        return dict(sorted(out.items())) | dict(zip(peaks, most.tolist(), strict=True))


def _wide(value: Number) -> Number:
    return value.detach().double() if isinstance(value, torch.Tensor) else float(value)


def _stacked(values: list[Number], device: torch.device) -> torch.Tensor:
    """float64 on the device, without a look at those that are there."""
    known = torch.tensor([0.0 if isinstance(x, torch.Tensor) else x for x in values], dtype=torch.float64, device=device)
    held = [(i, x) for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
    if held:
        known[torch.tensor([i for i, _ in held], device=device)] = torch.stack([x.to(device) for _, x in held])
    return known


class Phases:
    """Seconds and peak memory by phase of one step; `split()` returns the seconds and forgets both. Phases do not lie in others.

    On a GPU a phase lasts until its kernels are done: marks are events in the stream, which nobody waits for before `split`.
    peaks: bytes that this rank held at most, by phase, as `peak_bytes` counts them; a phase that cannot be counted is not there.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any, Any]] = []
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = _mark()
        forget_peak()
        try:
            yield
        finally:
            self._marks.append((name, start, _mark()))
            if (peak := peak_bytes()) is not None:
                self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def split(self) -> dict[str, float]:
        """Seconds by phase, in the order of their first use."""
        seconds: dict[str, float] = {}
        for name, start, end in self._marks:
            seconds[name] = seconds.get(name, 0.0) + _between(start, end)
        self._marks, self.peaks = [], {}
        return {name: round(value, 3) for name, value in seconds.items()}


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let `peak_bytes` count from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # another system than Linux
        _REFS.write_text("5")


def peak_bytes() -> int | None:
    """The most bytes that this process held since `forget_peak`; None where the system does not say.

    On a GPU what torch had allocated at most, and what the card holds beside torch's pool: CUDA's context, NCCL, graphs; less
    what of vLLM sleeps, which torch goes on counting. On a CPU the resident set.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_allocated() + (total - free) - torch.cuda.memory_reserved()
    with suppress(OSError, ValueError):
        (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) << 10
    return None


def step_values(
    step: int, values: dict[str, float | None], seconds: dict[str, float], rate: float, held_out: dict[str, Any]
) -> dict[str, Any]:
    """A step's line of metrics.jsonl: what `Sums.read` and `Phases.split` say, the learning rate, held-out figures if any."""
    tokens, total = values.pop("policy_tokens"), sum(seconds.values())
    assert tokens is not None  # a total, and none of those is missing
    out = {"step": step} | {name: six_digits(value) for name, value in values.items()}
    out |= {"lr": rate, "policy_tokens": tokens} | held_out
    return out | {"tokens_per_second": round(tokens / total, 1), "seconds": seconds | {"step": round(total, 3)}}


def six_digits(value: float | None) -> float | None:
    """None for what was not counted or is not finite, which JSON cannot say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
