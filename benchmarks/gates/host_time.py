"""Host time a tile of the GPU path, without a GPU: `python -m benchmarks.gates.host_time [--widths 1024,2048,4096]`.

linear_token_stats of 8192 rows under a head of 151936 in bfloat16, on meta tensors that are taken for a GPU's, with everything
that would run on the device stubbed out: GEMMs do nothing, and a kernel is compiled for sm_90 as ever, but its launch ends where
Triton would hand it to the driver. What is left is this package's Python and Triton's: where it takes longer than the GPU does
for a tile, the GPU waits. Not in it: two calls of torch.mm (4 to 8 us each) and the driver's own launch. Needs ptxas (Triton
ships it), about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from gear_kernels.tiling import Linear

from ..harness.cases import HEAD_SHAPE, OUTPUTS
from ..harness.internals import STAT_NAMES, STATE_NAMES, linear_body, taken_for_gpu
from .compile_report import TARGETS, StubDriver

GOAL_US = 25  # a tile of a head of 1024 takes an H100 about 41 us by the model of docs/architecture.md, Goals on a GPU


@contextlib.contextmanager
def stubbed(target: str = "sm_90") -> Iterator[None]:
    """Meta tensors take the path of a GPU as far as the driver; kernels compile, products and launches do nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    def no_handles(kernel) -> None:
        kernel.module = kernel.function = 0
        kernel._run = lambda *_: None

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", StubDriver(GPUTarget(*TARGETS[target][0]))))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", no_handles))
        for product in ("mm", "addmm"):
            stack.enter_context(mock.patch.object(torch, product, lambda *_, **__: None))
        stack.enter_context(taken_for_gpu())
        yield


def linear(width: int, rows: int = HEAD_SHAPE[0], columns: int = HEAD_SHAPE[1]) -> Linear:
    """The operator's body for student, teacher and their head, bfloat16 tensors without values."""
    shapes = ((rows, width), (columns, width), (rows, width))
    student, weight, teacher = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    return linear_body(student, weight, teacher, OUTPUTS)


def measure(width: int, repeats: int = 20) -> dict[str, float]:
    """A head's tile, how many there are, and the least microseconds a tile over the repeats, for both passes."""
    rows, columns = linear(width).tile_shape()
    state, grads = (torch.empty(HEAD_SHAPE[0], length, device="meta") for length in (len(STATE_NAMES), len(STAT_NAMES)))
    passes = {"forward": Linear.forward, "backward": lambda call: call.backward(state, grads, [True, True, False])}
    tiles = -(-HEAD_SHAPE[0] // rows) * -(-HEAD_SHAPE[1] // columns)
    found = {"rows": rows, "columns": columns, "tiles": tiles}
    for name, run in passes.items():
        run(linear(width))  # compiles
        found[name] = min(_seconds(run, linear(width)) for _ in range(repeats)) / tiles * 1e6
    return found


def _seconds(run: Callable[[Linear], object], call: Linear) -> float:
    """Of this thread alone: neighbours on the machine do not count."""
    start = time.thread_time()
    run(call)
    return time.thread_time() - start


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.host_time", description=__doc__)
    parser.add_argument("--widths", default="1024,2048,4096", help="of the hidden states, comma-separated")
    given = parser.parse_args(arguments)
    names = ("D", "tile", "tiles", "forward, us a tile", "ms in all", "backward, us a tile", "ms in all")
    shown = Table(*names, title="host time, kernels and products stubbed out")
    with stubbed():
        for width in (int(word) for word in given.widths.split(",")):
            found = measure(width)
            cells = [f"{found['rows']} x {found['columns']}", f"{found['tiles']}"]
            for name in ("forward", "backward"):
                cells += [f"{found[name]:.1f}", f"{found[name] * found['tiles'] / 1e3:.1f}"]
            shown.add_row(str(width), *cells)
    Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
