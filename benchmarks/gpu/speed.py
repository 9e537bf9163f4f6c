"""The GPU report's figures: what the device reaches; times and memory of the operators and of peers; overheads of small calls."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from gear_kernels import linear_token_stats

from ..harness.cases import HEAD_SHAPE, OUTPUTS, PASSES, SEVEN, SMALL, Case, definition, make_case, plain, runner
from ..harness.credit_inputs import SMALL_PACK, TOKEN_BYTES, Pack, credit_packs, pack
from ..harness.internals import replaced, serving
from ..harness.measure import MIB, ReadBandwidth, extra_memory
from ..harness.peers import OURS, UPDATE_PEERS, Peer, PeerMissing, named, ours_call, peers, trl_kernels
from .checks import weighted
from .run import BF16, F32, Item, Setting, Skip, is_fatal, synchronize
from .timing import alone_ms, timed

UPDATE_LABEL = "log-prob + entropy"  # the update pass: TRL's issue 7244 has this shape
REPEATS = 3  # of the headline

# --- ceilings ---------------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A matrix product [rows, inner] x [inner, columns] that the operators make. add: to what is there.  turned: of a transposed
    left operand.
    """

    name: str
    rows: int
    inner: int
    columns: int
    result: torch.dtype = F32
    add: bool = False
    turned: bool = False


def products() -> list[Product]:
    """The head's products: tiles of logits in every geometry worth trying, then the two gradients."""
    n, _, width = HEAD_SHAPE
    tiles = ((2048, 2048), (2048, 4096), (4096, 2048), (4096, 4096), (8192, 1024), (8192, 2048), (1024, 8448))
    found = [Product(f"tile {rows} x {columns}", rows, width, columns) for rows, columns in tiles]
    for columns in (4096, 8192):
        found.append(Product(f"hidden gradient, {columns} columns", n, columns, width, add=True))
        found.append(Product(f"weight gradient, {columns} columns", columns, n, width, turned=True))
        found.append(Product(f"weight gradient, {columns} columns, bfloat16 result", columns, n, width, BF16, turned=True))
    return found


def card_items(setting: Setting) -> list[Item]:
    """The device's two numbers: GB/s (1e9 bytes) and TFLOP/s."""
    square = Product("8192 x 8192 x 8192", 8192, 8192, 8192, BF16)
    found = [Item("copy", lambda: _copy_ceiling(setting)), Item("read", lambda: _read_ceiling(setting))]
    return [*found, Item(f"GEMM, {square.name}", lambda: _gemm_ceiling(setting, square))]


def ceiling_items(setting: Setting) -> list[Item]:
    """TFLOP/s of the products that the operators make."""
    return [Item(f"GEMM, {p.name}", lambda p=p: _gemm_ceiling(setting, p)) for p in products()]


def _copy_ceiling(setting: Setting) -> dict:
    words = torch.ones(setting.pick(2 << 30, 4 << 20) // 4, device=setting.device)
    target = torch.empty_like(words)
    found = timed(lambda: target.copy_(words), setting)
    return {**found, "gb_s": 2 * words.numel() * 4 / found["ms"] / 1e6}


def _read_ceiling(setting: Setting) -> dict:
    size = setting.pick(4096, 4)
    found = min((timed(call, setting) for call in ReadBandwidth(setting.device, size).calls.values()), key=lambda f: f["ms"])
    return {**found, "gb_s": size * MIB / found["ms"] / 1e6}


def _gemm_ceiling(setting: Setting, product: Product, count: int = 12) -> dict:
    """Twelve products in turns of three sets of operands and results, as tiles follow each other; ms is one product's."""
    rows, inner, columns = (setting.pick(size, 64) for size in (product.rows, product.inner, product.columns))
    sets = []
    for _ in range(3):
        a, b = (torch.randn(*shape, device=setting.device).to(BF16) for shape in ((rows, inner), (columns, inner)))
        a = a.T.contiguous().T if product.turned else a
        sets.append((a, b.T, torch.zeros(rows, columns, dtype=setting.pick(product.result, BF16), device=setting.device)))
    options: dict[str, Any] = {"out_dtype": product.result} if product.result != BF16 and not setting.self_test else {}

    def call() -> None:
        for i in range(count):
            a, b, out = sets[i % 3]
            if product.add:
                torch.addmm(out, a, b, out=out, **options)
            else:
                torch.mm(a, b, out=out, **options)

    found = timed(call, setting)
    found |= {name: found[name] / count for name in ("ms", "low_ms", "high_ms", "host_us")}
    return {**found, "tflop_s": 2 * rows * inner * columns / found["ms"] / 1e9}


# --- the headline -----------------------------------------------------------------------------------------------------------


def headline_items(setting: Setting) -> list[Item]:
    """The figures that the design promises: ours, the update pass beside its peers and the bare products, ours again."""
    _bare_trl()
    found = _ours_items(setting, "default", OUTPUTS)
    for peer in UPDATE_PEERS[: setting.pick(None, 1)]:
        if setting.device in peer.devices:
            found += [_peer_item(setting, peer, "hidden", BF16, passes, UPDATE_LABEL) for passes in PASSES]
        if peer.name == OURS:
            found += [Item(f"{UPDATE_LABEL}, bare GEMM, {passes}", lambda p=passes: _bare(setting, p)) for passes in PASSES]
    for again in range(2, REPEATS + 1):
        found += _ours_items(setting, "default", OUTPUTS, f" ({again} of {REPEATS})")
    return found


def _ours_items(setting: Setting, label: str, names: tuple[str, ...], suffix: str = "") -> list[Item]:
    return [
        Item(
            f"hidden bfloat16, {OURS}, {label}, {passes}{suffix}",
            lambda p=passes: ours_hidden(setting, names, label, p),
            seconds=40,
        )
        for passes in PASSES
    ]


def _bare(setting: Setting, passes: str) -> dict:
    """One head's logits kept in bfloat16; with the backward, the two products of their gradient."""
    case = head_case(setting)
    student, weight = case.student.detach(), case.head.detach()
    logits = torch.empty(len(student), len(weight), dtype=BF16, device=setting.device)

    def call() -> tuple[torch.Tensor, ...]:
        torch.mm(student, weight.T, out=logits)
        return () if passes == "forward" else (logits @ weight, logits.T @ student)

    found = timed(call, setting)
    flops = (1 if passes == "forward" else 3) * 2 * logits.numel() * student.shape[1]
    return {**found, "tflop_s": flops / found["ms"] / 1e9, "extra_mib": logits.numel() * 2 / MIB}


# --- speed ------------------------------------------------------------------------------------------------------------------


def speed_items(setting: Setting) -> list[Item]:
    """Ours beyond the headline: all outputs, given logits, credit."""
    found = _ours_items(setting, "all seven", SEVEN)
    found += [Item(f"credit, {name}", lambda n=name: credit_speed(setting, n)) for name in credit_packs(1 << 10)]
    for dtype in (BF16, F32):
        peer = next(p for p in peers("logits") if p.name == OURS)
        found += [_peer_item(setting, peer, "logits", dtype, passes) for passes in PASSES]
    return found


def shape_items(setting: Setting) -> list[Item]:
    """Other widths, where the host may be what a call waits for, and other numbers of rows."""
    n, _, width = HEAD_SHAPE
    shapes = setting.pick([(n, 1024), (n, 2048), (n, 2560), (512, width), (2048, width), (32768, width)], [(16, 32), (8, 64)])
    return [
        Item(f"hidden bfloat16, {rows} rows, D={wide}, {passes}", lambda s=(rows, wide), p=passes: _shaped(setting, *s, p))
        for rows, wide in shapes
        for passes in PASSES
    ]


def _shaped(setting: Setting, rows: int, width: int, passes: str) -> dict:
    """alone_ms: on an idle device. Where host_us is longer than ms, the host is what a call waits for."""
    case = _shaped_case(setting, rows, width)
    call = ours_call(case, passes)
    return {**timed(call, setting), "alone_ms": alone_ms(call, setting, 3), **_floor(case, passes, "default")}


@functools.lru_cache(maxsize=1)
def _shaped_case(setting: Setting, rows: int, width: int) -> Case:
    return make_case("hidden", BF16, rows, setting.pick(HEAD_SHAPE[1], 1187), width, device=setting.device, sampled=False)


def peer_items(setting: Setting) -> list[Item]:
    """The peers of all three outputs: first those that need no compiling."""
    _bare_trl()
    found = []
    for kind, dtype in (("hidden", BF16), ("logits", BF16), ("logits", F32)):
        entrants = [p for p in peers(kind, setting.device, compiled=not setting.self_test) if p.name != OURS]
        for peer in entrants[: setting.pick(None, 1)]:  # the others import slowly; the CPU's report and its tests have them
            found += [(peer, _peer_item(setting, peer, kind, dtype, passes)) for passes in PASSES]
    return [item for _, item in sorted(found, key=lambda pair: pair[0].compiles)]


def _bare_trl() -> None:
    """Import trl's kernels where transformers is missing: they ask it for one function, whether there is triton."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("transformers") is not None:
        return
    stand_ins: dict[str, Any] = {name: types.ModuleType(name) for name in ("transformers", "transformers.utils")}
    stand_ins["transformers.utils"].is_triton_available = lambda *_: True
    sys.modules.update(stand_ins)
    try:
        for module in ("chunked_divergence", "chunked_logprob", "logprob_entropy"):
            with contextlib.suppress(Exception):  # then the peer says what is missing when its turn comes
                trl_kernels(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]  # others must not take it for the real one


def _peer_item(setting: Setting, peer: Peer, kind: str, dtype: torch.dtype, passes: str, label: str = "") -> Item:
    """label: what the outputs are called, where they are not the default."""
    name = f"{label or f'{kind} {plain(dtype)}'}, {peer.name} ({'+'.join(peer.gives)}), {passes}"
    run = functools.partial(_peer, setting, peer, kind, dtype, passes, label or "default")
    return Item(name, run, seconds=90 if peer.compiles else 40, peer=peer.name != OURS)


def head_case(setting: Setting) -> Case:
    """Hidden states and the head of HEAD_SHAPE."""
    return _case(setting, "hidden", BF16)


@functools.lru_cache(maxsize=1)  # some 6 GB; items of one case follow each other
def _case(setting: Setting, kind: str, dtype: torch.dtype) -> Case:
    n, vocab, width = setting.pick(HEAD_SHAPE, (16, 1187, 32))
    return make_case(kind, dtype, n, vocab, width, device=setting.device)


def _peer(setting: Setting, peer: Peer, kind: str, dtype: torch.dtype, passes: str, label: str) -> dict:
    try:
        function, case = peer.load(), _case(setting, kind, dtype)
        found = {**_measured(setting, case, function, case.loss, passes), **_floor(case, passes, label)}
        return {**found, **({"label": label, "passes": passes} if peer.name == OURS else {})}
    except PeerMissing as error:
        raise Skip(f"not installed: {error}") from error
    except Exception as error:
        if peer.name == OURS or is_fatal(error):
            raise
        raise Skip(f"{type(error).__name__}: {error}"[:300]) from error


def ours_hidden(setting: Setting, names: tuple[str, ...], label: str, passes: str) -> dict:
    """Figures of `linear_token_stats` at HEAD_SHAPE."""
    case = head_case(setting)

    def function(case: Case) -> dict[str, torch.Tensor]:
        return named(linear_token_stats(case.student, case.head, case.targets, case.teacher, stats=names), names)

    return {
        **_measured(setting, case, function, weighted, passes),
        **_floor(case, passes, label),
        "label": label,
        "passes": passes,
    }


def _measured(setting: Setting, case: Case, function: Callable, loss: Callable, passes: str) -> dict:
    """Time, peak memory beside what was held (results included, and without the gradients), error of the outputs."""
    call = runner(function, case, passes, loss)
    start = time.perf_counter()
    call()
    synchronize(setting)
    first = time.perf_counter() - start
    found = {**timed(call, setting, seconds=3.0, rounds=12), "first_s": first}
    extra = extra_memory(call, setting.device)
    results = 0 if passes == "forward" else sum(leaf.numel() * leaf.element_size() for leaf in case.leaves) / MIB
    if extra is not None:
        found |= {"extra_mib": extra, "beside_results_mib": extra - results}
    return {**found, "error": _error(case, runner(function, case, "forward")()[0])}


def _error(case: Case, outputs: dict[str, torch.Tensor], rows: int = 32) -> float:
    """The largest error of the default outputs among these, over the first rows, in nats."""
    student, teacher = case.student.detach()[:rows].double(), case.teacher[:rows].double()
    if case.weight is not None:
        weight = case.head.detach().double()
        student, teacher = student @ weight.T, teacher @ weight.T
    want = definition(student, teacher, case.targets[:rows])
    errors = [(outputs[k][:rows].double() - w).abs().max().item() for k, w in want.items() if k in outputs and outputs[k].dim()]
    return max(errors, default=math.nan)


def credit_speed(setting: Setting, name: str) -> dict:
    """Three copies of a pack in turn: one of 2^20 tokens, 33 MB, would stay in the L2 cache."""
    packs = [_pack(setting, name).to(setting.device) for _ in range(3)]
    return {**timed([p.credit for p in packs], setting), "floor_bytes": TOKEN_BYTES * packs[0].signal.numel()}


@functools.lru_cache(maxsize=1)
def _pack(setting: Setting, name: str) -> Pack:
    return credit_packs(setting.pick(1 << 20, 1 << 12))[name]


def _floor(case: Case, passes: str, label: str) -> dict:
    """What must be done at least: GEMM flops from hidden states, bytes of logits moved. jsd needs the logits a second time."""
    sweeps, heads = 2 if label == "all seven" else 1, 1 if label == UPDATE_LABEL else 2
    n = len(case.targets)
    if case.weight is None:
        tensors = 2 * sweeps + (3 if passes != "forward" else 0)
        return {"floor_bytes": tensors * case.student.numel() * case.student.element_size()}
    gemms = heads * sweeps + (heads + 2 if passes != "forward" else 0)
    return {"floor_flops": gemms * 2 * n * case.head.numel()}


# --- overheads ----------------------------------------------------------------------------------------------------------------


def overhead_items(setting: Setting) -> list[Item]:
    """The head's forward, whose host works tile by tile; then calls so small that the host is what they wait for."""
    rows = setting.pick(8192, 16)
    found = [
        Item(f"hidden, {rows} rows, forward", lambda: _tiled(setting)),
        Item("torch, an addition", lambda: _overhead(setting, torch.ones(1, device=setting.device).add_, 1)),
    ]
    for kind in SMALL:
        found += [
            Item(f"{kind} {list(SMALL[kind])}, {passes}", lambda k=kind, p=passes: _small(setting, k, p)) for passes in PASSES
        ]
    return [*found, Item("credit, typical pack", lambda: _overhead(setting, pack(*SMALL_PACK).to(setting.device).credit))]


def _small(setting: Setting, kind: str, passes: str) -> dict:
    return _overhead(setting, ours_call(make_case(kind, F32, *SMALL[kind], device=setting.device), passes))


def _tiled(setting: Setting) -> dict:
    call = ours_call(head_case(setting), "forward")
    found, tiles = _overhead(setting, call), _sweeps(setting, call)
    return {**found, "tiles": tiles, "host_us_a_tile": found["host_us"] / tiles}


def _sweeps(setting: Setting, call: Callable) -> int:
    """Tiles that a call reads."""
    chosen = serving(setting.device, BF16)
    counted = mock.Mock(wraps=chosen.sweep)
    with replaced(chosen.name, sweep=counted):
        call()
    return counted.call_count


def _overhead(setting: Setting, function: Callable, *arguments: object) -> dict:
    """alone_ms: a call on an idle device, the gaps between its launches included."""
    call = functools.partial(function, *arguments)
    return {**timed(call, setting, seconds=0.5), "alone_ms": alone_ms(call, setting)}
