"""The GPU report's first minute: one call of each kind, and what decides how the others run. What fails here ends the report."""

from __future__ import annotations

import time

import torch

from gear_kernels import Gear, linear_token_stats

from ..harness.cases import HEAD_SHAPE, OUTPUTS, make_case
from ..harness.credit_inputs import credit_packs
from ..harness.internals import joins_in_one_call, serving
from .checks import check, check_linear, credit_same, linear, problem
from .run import BF16, Item, Setting, synchronize


def smoke_items(setting: Setting) -> list[Item]:
    """In the order in which one explains the next."""
    rows, shape = setting.pick((300, 32003), (20, 300)), setting.pick((300, 32003, 256), (20, 300, 32))
    return [
        Item("paths", lambda: _paths(setting), seconds=60),
        Item(f"logits bfloat16 {rows}", lambda: check(problem(setting, *rows, BF16)), seconds=60),
        Item(f"hidden bfloat16 {shape}", lambda: check_linear(linear(setting, BF16, shape)), seconds=60),
        Item("credit gear, against the CPU", lambda: _scan(setting), seconds=60),
        Item(f"hidden, {setting.pick(HEAD_SHAPE, shape)[0]} rows, forward", lambda: _forward(setting), seconds=60),
    ]


def _paths(setting: Setting) -> dict:
    """Which back end serves this device, and how products are added to float32 sums."""
    found = {"backend": serving(setting.device, BF16).name}
    if setting.self_test:
        return found
    assert found["backend"] == "triton", f"{found['backend']} serves {setting.device}; gear_kernels.show() says why"
    return {**found, "addmm": "in one call" if joins_in_one_call(setting.device) else "product, then sum: slower, 128 MiB"}


def _scan(setting: Setting) -> dict:
    found = credit_packs(setting.pick(1 << 16, 1 << 8), *setting.pick((512, 4096), (8, 16)))
    return credit_same(setting, Gear(), dict(list(found.items())[:3]))


def _forward(setting: Setting) -> dict:
    """The first call, with its compiling, and a warm one by the wall clock."""
    n, vocab, width = setting.pick(HEAD_SHAPE, (20, 300, 32))
    case = make_case("hidden", BF16, n, vocab, width, device=setting.device)
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            synchronize(setting)
            start = time.perf_counter()
            values = linear_token_stats(case.student, case.head, case.targets, case.teacher, stats=OUTPUTS)
            synchronize(setting)
            seconds.append(time.perf_counter() - start)
    assert values.reverse_kl is not None and values.reverse_kl.isfinite().all(), "a KL is not finite"
    return {"first_s": seconds[0], "wall_ms": seconds[1] * 1e3}
