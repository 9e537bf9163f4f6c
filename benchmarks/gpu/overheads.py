"""The GPU report's overheads: what small calls cost beside their kernels, and what the host does during a large one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import torch

from gear_kernels import backends

from ..harness.cases import PASSES, SMALL, Case, make_case, runner
from ..harness.credit_inputs import SMALL_PACK, pack
from ..harness.peers import OURS, peers
from .items import BF16, F32, Item, Setting
from .speed import head_case
from .timing import alone_ms, timed


def overhead_items(setting: Setting) -> list[Item]:
    """The head's forward, whose host works tile by tile; then calls so small that the host is what they wait for."""
    rows = setting.pick(8192, 16)
    found = [
        Item(f"hidden, {rows} rows, forward", lambda: _tiled(setting)),
        Item("torch, an addition", lambda: _overhead(setting, torch.ones(1, device=setting.device).add_, 1)),
    ]
    for kind in SMALL:
        found += [
            Item(f"{kind} {list(SMALL[kind])}, {passes}", lambda k=kind, p=passes: _statistics(setting, k, p))
            for passes in PASSES
        ]
    return [*found, Item("credit, typical pack", lambda: _overhead(setting, pack(*SMALL_PACK).to(setting.device).credit))]


def _ours(case: Case, kind: str, passes: str) -> Callable[[], tuple]:
    return runner(next(peer for peer in peers(kind) if peer.name == OURS).load(), case, passes)


def _statistics(setting: Setting, kind: str, passes: str) -> dict:
    return _overhead(setting, _ours(make_case(kind, F32, *SMALL[kind], device=setting.device), kind, passes))


def _tiled(setting: Setting) -> dict:
    call = _ours(head_case(setting), "hidden", "forward")
    found, tiles = _overhead(setting, call), _sweeps(setting, call)
    return {**found, "tiles": tiles, "host_us_a_tile": found["host_us"] / tiles}


def _sweeps(setting: Setting, call: Callable) -> int:
    """Tiles that a call reads."""
    name = backends.choose(torch.device(setting.device), BF16)
    chosen = backends.BACKENDS[name]
    counted = mock.Mock(wraps=chosen.sweep)
    with mock.patch.dict(backends.BACKENDS, {name: dataclasses.replace(chosen, sweep=counted)}):
        call()
    return counted.call_count


def _overhead(setting: Setting, function: Callable, *arguments: object) -> dict:
    """alone_ms: a call on an idle device, the gaps between its launches included."""
    call = functools.partial(function, *arguments)
    return {**timed(call, setting, seconds=0.5), "alone_ms": alone_ms(call, setting)}
