"""The GPU report's figures: what the device reaches, times and memory beside the peers, and the sweep of --tune."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import statistics
import sys
import time
import types
from collections.abc import Callable

import torch

from gear_kernels import backends, linear_token_stats, reference, tiling
from gear_kernels.reference import STAT_NAMES

from .cases import PASSES, Case, make_case, plain, runner
from .gpu_compare import named, weighted
from .gpu_items import BF16, F32, Item, Setting, Skip, is_fatal, synchronize
from .measure import MIB, ReadBandwidth, elapsed_ms, extra_memory
from .packs import TOKEN_BYTES
from .packs import packs as credit_packs
from .peers import ALL as DEFAULT
from .peers import OURS, Peer, PeerMissing, eager_stats, peers, trl_kernels
from .projections import HEAD_SHAPE

# --- ceilings ---------------------------------------------------------------------------------------------------------------


def ceiling_items(setting: Setting) -> list[Item]:
    """GB/s (1e9 bytes) and TFLOP/s that this device reaches."""
    n, vocab, width = setting.pick(HEAD_SHAPE, (64, 512, 32))
    tile = max(64, tiling.limits(torch.device(setting.device)).tile // (8 * n))  # columns of both heads' float32 tile
    return [
        Item("copy", lambda: _copy_ceiling(setting)),
        Item("read", lambda: _read_ceiling(setting)),
        Item("GEMM, bfloat16 result", lambda: _gemm_ceiling(setting, 2 * n, vocab // 2, width, vocab // 2, BF16)),
        Item("GEMM, float32 result", lambda: _gemm_ceiling(setting, 2 * n, vocab // 2, width, vocab // 2, F32)),
        Item("GEMM, float32 tiles", lambda: _gemm_ceiling(setting, 2 * n, min(16 * tile, vocab), width, min(tile, vocab), F32)),
    ]


def _copy_ceiling(setting: Setting) -> dict:
    words = torch.ones(setting.pick(2 << 30, 4 << 20) // 4, device=setting.device)
    target = torch.empty_like(words)
    times = timed_ms(lambda: target.copy_(words), setting)
    return {**spread(times), "gb_s": 2 * words.numel() * 4 / statistics.median(times) / 1e6}


def _read_ceiling(setting: Setting) -> dict:
    size = setting.pick(4096, 4)
    calls = ReadBandwidth(setting.device, size).calls.values()
    times = min((timed_ms(call, setting) for call in calls), key=statistics.median)
    return {**spread(times), "gb_s": size * MIB / statistics.median(times) / 1e6}


def _gemm_ceiling(setting: Setting, rows: int, columns: int, width: int, tile: int, result: torch.dtype) -> dict:
    """[rows, width] x [width, columns] in tiles of so many columns into one buffer."""
    hidden, weight = (torch.randn(size, width, device=setting.device).to(BF16) for size in (rows, columns))
    out = torch.empty(rows, tile, dtype=result, device=setting.device)
    options = {"out_dtype": result} if result != BF16 and setting.device == "cuda" else {}
    if setting.self_test:
        out = out.to(BF16)  # a CPU has no float32 result for bfloat16 operands

    def call():
        for start in range(0, columns - tile + 1, tile):
            torch.mm(hidden, weight[start : start + tile].T, out=out, **options)

    times = timed_ms(call, setting)
    return {**spread(times), "tflop_s": 2 * rows * width * (columns // tile * tile) / statistics.median(times) / 1e9}


def timed_ms(call: Callable, setting: Setting, seconds: float = 2.0, rounds: int = 20) -> list[float]:
    """Milliseconds of warm calls: at least three, until `rounds` or `seconds` are spent."""
    for _ in range(setting.pick(3, 1)):
        call()
    found, start = [], time.perf_counter()
    while len(found) < 3 or (len(found) < setting.pick(rounds, 3) and time.perf_counter() - start < seconds):
        found.append(elapsed_ms(call, setting.device))
    return found


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": middle, "low_ms": low, "high_ms": high}


# --- speed ------------------------------------------------------------------------------------------------------------------


def speed_items(setting: Setting) -> list[Item]:
    """Ours first, then the peers that need no compiling, then those that do."""
    _bare_trl()
    ours = [
        Item(f"hidden bfloat16, {OURS}, {label}, {passes}", lambda s=names, p=passes, n=label: _ours_hidden(setting, s, n, p))
        for label, names in (("default", DEFAULT), ("all seven", STAT_NAMES))
        for passes in PASSES
    ]
    ours += [Item(f"credit, {name}", lambda n=name: _credit_speed(setting, n)) for name in credit_packs(1 << 10)]
    logits = [("logits", BF16), ("logits", F32)]
    for kind, dtype in logits:
        peer = next(p for p in peers(kind) if p.name == OURS)
        ours += [_peer_item(setting, peer, kind, dtype, passes) for passes in PASSES]
    others = []
    for kind, dtype in (("hidden", BF16), *logits):
        entrants = peers(kind, setting.device, compiled=not setting.self_test)
        others += [(p, _peer_item(setting, p, kind, dtype, passes)) for p in entrants if p.name != OURS for passes in PASSES]
    return ours + [item for _, item in sorted(others, key=lambda pair: pair[0].compiles)]


def _bare_trl() -> None:
    """Import trl's kernels where transformers is missing: they ask it for one function, whether there is triton."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("transformers") is not None:
        return
    stand_ins = {name: types.ModuleType(name) for name in ("transformers", "transformers.utils")}
    stand_ins["transformers.utils"].is_triton_available = lambda *_: True
    sys.modules.update(stand_ins)
    try:
        for module in ("chunked_divergence", "chunked_logprob", "logprob_entropy"):
            with contextlib.suppress(Exception):  # then the peer says what is missing when its turn comes
                trl_kernels(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]  # others must not take it for the real one


def _peer_item(setting: Setting, peer: Peer, kind: str, dtype: torch.dtype, passes: str) -> Item:
    name = f"{kind} {plain(dtype)}, {peer.name} ({'+'.join(peer.gives)}), {passes}"
    return Item(name, lambda: _peer(setting, peer, _case(setting, kind, dtype), passes))


@functools.lru_cache(maxsize=1)  # some 6 GB; items of one case follow each other
def _case(setting: Setting, kind: str, dtype: torch.dtype) -> Case:
    n, vocab, width = setting.pick(HEAD_SHAPE, (16, 1187, 32))
    return make_case(kind, dtype, n, vocab, width, setting.device)


def _peer(setting: Setting, peer: Peer, case: Case, passes: str) -> dict:
    try:
        function = peer.load()
        return {**_measured(setting, case, function, case.loss, passes), **_floor(case, passes, "default")}
    except PeerMissing as error:
        raise Skip(f"not installed: {error}") from error
    except Exception as error:
        if peer.name == OURS or is_fatal(error):
            raise
        raise Skip(f"{type(error).__name__}: {error}"[:300]) from error


def _ours_hidden(setting: Setting, names: tuple[str, ...], label: str, passes: str) -> dict:
    case = _case(setting, "hidden", BF16)

    def function(case: Case) -> dict[str, torch.Tensor]:
        return named(linear_token_stats(case.student, case.weight, case.targets, case.teacher, stats=names), names)

    return {**_measured(setting, case, function, weighted, passes), **_floor(case, passes, label), "label": label}


def _measured(setting: Setting, case: Case, function: Callable, loss: Callable, passes: str) -> dict:
    """Time, peak memory beside what was held (results included, and without the gradients), error of the outputs."""
    call = runner(function, case, passes, loss)
    start = time.perf_counter()
    call()
    synchronize(setting)
    first = time.perf_counter() - start
    found = {**spread(timed_ms(call, setting, seconds=3.0, rounds=12)), "first_s": first}
    extra = extra_memory(call, setting.device)
    results = 0 if passes == "forward" else sum(leaf.numel() * leaf.element_size() for leaf in case.leaves) / MIB
    if extra is not None:
        found |= {"extra_mib": extra, "beside_results_mib": extra - results}
    return {**found, "error": _error(case, runner(function, case, "forward")()[0])}


def _error(case: Case, outputs: dict[str, torch.Tensor], rows: int = 32) -> float:
    """The largest error of the outputs that `eager_stats` has too, over the first rows, in nats."""
    student, teacher = case.student.detach()[:rows].double(), case.teacher[:rows].double()
    if case.weight is not None:
        weight = case.weight.detach().double()
        student, teacher = student @ weight.T, teacher @ weight.T
    want = eager_stats(student, teacher, case.targets[:rows])
    errors = [(outputs[k][:rows].double() - w).abs().max().item() for k, w in want.items() if k in outputs and outputs[k].dim()]
    return max(errors, default=math.nan)


def _credit_speed(setting: Setting, name: str) -> dict:
    p = credit_packs(setting.pick(1 << 20, 1 << 12))[name].to(setting.device)
    return {**spread(timed_ms(p.credit, setting)), "floor_bytes": TOKEN_BYTES * p.signal.numel()}


def _floor(case: Case, passes: str, label: str) -> dict:
    """What must be done at least: GEMM flops from hidden states, bytes of logits moved. jsd needs the logits a second time."""
    sweeps = 2 if label == "all seven" else 1
    n = len(case.targets)
    if case.weight is None:
        tensors = 2 * sweeps + (3 if passes != "forward" else 0)
        return {"floor_bytes": tensors * case.student.numel() * case.student.element_size()}
    gemms = 2 * sweeps + (4 if passes != "forward" else 0)
    return {"floor_flops": gemms * 2 * n * case.weight.numel()}


# --- tuning -----------------------------------------------------------------------------------------------------------------


def tune_items(setting: Setting) -> list[Item]:
    """Blocks and warps of the kernels, then sizes of tiles: reported, applied by nobody but a reader."""
    found = []
    shapes = setting.pick({"tile": (2048, 2048, F32), "logits": (4096, 151936, BF16)}, {"tile": (8, 64, F32)})
    for kernel, (place, shape) in itertools.product(("sweep", "gradient", "mixture"), shapes.items()):
        for block, warps in ((512, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (4096, 16)):
            name = f"{kernel}, {place}, {block}/{warps}"
            run = functools.partial(_tune_kernel, setting, kernel, shape, block, warps)
            found.append(Item(name, run, "the table of blocks is for compiled kernels"))
    for tile, rows, workspace in setting.pick(
        ((32, 2048, 160), (16, 2048, 160), (64, 2048, 160), (32, 4096, 160), (32, 8192, 160), (64, 4096, 160), (32, 2048, 320)),
        ((1, 16, 4),),
    ):
        name = f"tile {tile} MiB, {rows} rows, workspace {workspace} MiB"
        limits = tiling.Limits(tile << 20, workspace << 20, rows, max(rows, 8192))
        found.append(Item(name, functools.partial(_tune_tiles, setting, limits)))
    return found


def _tune_kernel(setting: Setting, kernel: str, shape: tuple, block: int, warps: int) -> dict:
    from gear_kernels.triton import candidates
    from gear_kernels.triton import stats as kernels

    n, columns, dtype = shape
    student = _tune_logits(setting, shape)
    sums = torch.zeros(1, n, len(reference.SUM_NAMES), dtype=torch.float64, device=setting.device)
    rows = reference.Rows(torch.zeros(n, dtype=torch.int64, device=setting.device), torch.ones(n, device=setting.device), -100)
    task, tile = backends.Task(rows, DEFAULT if kernel != "mixture" else ("jsd",)), backends.Tile(student)
    kernels.sweep(tile, tile, task, sums)
    _, state = kernels.finish(sums, task)
    calls = {
        "sweep": lambda: kernels.sweep(tile, tile, task, sums),
        "gradient": lambda: kernels.gradient(tile, tile, task, state, torch.ones(n, 7, device=setting.device), dz),
        "mixture": lambda: kernels.mixture(tile, tile, task, state, torch.zeros_like(sums[..., :2])),
    }
    dz = torch.empty(n, columns, dtype=BF16, device=setting.device)
    with candidates.trying(kernel, candidates.Config(block, warps)):
        times = timed_ms(calls[kernel], setting, seconds=0.5)
    return {**spread(times), "gb_s": 2 * student.numel() * student.element_size() / statistics.median(times) / 1e6}


@functools.lru_cache(maxsize=1)
def _tune_logits(setting: Setting, shape: tuple) -> torch.Tensor:
    return torch.randn(shape[0], shape[1], device=setting.device).mul_(3).to(shape[2])


def _tune_tiles(setting: Setting, limits: tiling.Limits) -> dict:
    before = dict(tiling._LIMITS)
    tiling._LIMITS[setting.device] = limits
    try:
        found = {}
        for passes in PASSES:
            measured = _ours_hidden(setting, DEFAULT, "default", passes)
            found |= {f"{passes} ms": measured["ms"], f"{passes} MiB": measured.get("beside_results_mib")}
        return found
    finally:
        tiling._LIMITS.clear()
        tiling._LIMITS.update(before)
