"""The path of a GPU, where there is none: meta tensors, recorders in place of kernels and products, counts of what they see."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gates import compile_report
from benchmarks.gates import figures as gates
from gear_kernels import Head, backends, credit_weights, linear_token_stats, ops, reference, tiling, token_stats
from gear_kernels.triton import candidates, scan, stats

ROOT = Path(__file__).parents[1]
BF16 = torch.bfloat16


def linear(n, width, vocab, workspace=None, dtype=BF16):
    """The operator's body on meta tensors; inside `gates.gpu_path` it takes them for a GPU's."""
    with torch.device("meta"):
        hidden, teacher, weight = (torch.empty(*shape, dtype=dtype) for shape in ((n, width), (n, width), (vocab, width)))
        rows = torch.empty(n, dtype=torch.int64), torch.empty(n)
    tensors = (hidden, weight, None, teacher, None, None, *rows)
    workspace = workspace or tiling.limits(hidden.device).workspace
    return ops.tiled(ops.LinearCall(*tensors, ("logprobs", "entropy", "reverse_kl"), "triton", workspace))


def backward(call):
    """Gradients of hidden states and weight."""
    n = len(call.student)
    return call.backward(torch.empty(n, 9, device="meta"), torch.empty(n, 7, device="meta"), [True, True, False])


@pytest.fixture
def products(monkeypatch):
    """(shape of the result, its dtype, whether it is added to) of every product."""
    seen, own = [], tiling.Linear.product

    def product(self, a, b, out, add=False):
        seen.append((tuple(out.shape), out.dtype, add))
        own(self, a, b, out, add)

    monkeypatch.setattr(tiling.Linear, "product", product)
    return seen


# --- kernels and launches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """What a process in which Triton compiles has to say of a forward: tests/compiled_launches.py."""
    command = [sys.executable, str(ROOT / "tests" / "compiled_launches.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_K2_every_load_stands_above_the_first_reduction(compiled):
    loads = compiled["loads"]
    assert loads["vectors"] == 2 and loads["scalars"] >= 15  # both heads' logits; target, temperature and the sums
    assert loads["late vectors"] == loads["late scalars"] == 0


def test_K5_triton_works_out_its_arguments_once_a_shape(compiled):
    """Of eight sweeps and a finish, the first of each shape; and the others are what Triton would have launched."""
    assert compiled["launched"] == 9 and compiled["asked"] == 3 and compiled["same"]


def test_K10_the_ragged_last_block_has_no_kernel_of_its_own(compiled):
    assert compiled["sweeps"] == 1


class Kernel:
    """Stands for a jitted kernel and for what Triton made of it: counts how often either is launched."""

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def ask(*arguments, **options):
            self.asked.append((grid, arguments, tuple(options.values())[:-1]))
            return {grid: lambda *given: self.launched.append((grid, given))}

        return ask


def test_K5_unaligned_rows_and_other_shapes_are_asked_of_triton_again(monkeypatch):
    kernel, kept = Kernel(), {}
    monkeypatch.setattr(stats, "_sweep_kernel", kernel)
    z, inverse = torch.zeros(8, 64), torch.ones(16)
    sums = torch.zeros(1, 8, 12, dtype=torch.float64)

    def sweep(first, columns):
        rows = reference.Rows(None, inverse[first : first + 8], -100)
        stats.sweep(backends.Tile(z[:, :columns]), None, backends.TileTask(rows, ("entropy",), 0.5, 0, kept), sums)
        return len(kernel.asked), len(kernel.launched)

    assert sweep(0, 64) == (1, 0) and sweep(4, 64) == (1, 1)  # 16 bytes on
    assert sweep(1, 64) == (2, 1) and sweep(8, 64) == (2, 2)
    assert sweep(0, 63) == (3, 2) and sweep(0, 63) == (3, 3)
    grid, arguments, constants = kernel.asked[0]
    assert kernel.launched[0][0] == grid and kernel.launched[0][1][4:] == (*arguments[4:], *constants)
    assert {asked[2] for asked in kernel.asked} == {constants}  # K10: one block for all


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_K5_a_tile_makes_no_views_of_its_own():
    """8192 rows at the Qwen3-8B shape, 300 tiles: two products a tile, slices of the head a block of columns, and little else."""
    with gates.gpu_path() as launches:
        call = linear(8192, 4096, 151936)
        with Calls() as calls:
            call.forward()
        assert launches.count == 301 and calls.count - 600 < 300
        call = linear(8192, 4096, 151936)
        with Calls() as calls:
            backward(call)
    assert calls.count - 600 < 700


@pytest.mark.parametrize(("width", "columns"), [(4096, 2048), (2560, 2048), (2048, 4096), (1024, 4096), (64, 4096)])
def test_K5_tiles_grow_where_hidden_states_are_narrow(width, columns):
    with gates.gpu_path():
        call = linear(8192, width, 151936)
        assert call.tile_shape() == (2048, columns) and call.tile_bytes() <= call.workspace // 2


# --- gradients ----------------------------------------------------------------------------------------------------------------


def test_K3_one_product_gives_the_weights_gradient_in_bfloat16(products):
    """All 8192 rows in one round: no float32 sums beside it, and spans twice as wide."""
    with gates.gpu_path():
        call = linear(8192, 4096, 151936)
        backward(call)
    made = [one for one in products if one[0][1] == 4096 and one[0][0] != 8192]
    spans = [one for one in products if one[0] == (8192, 4096) and not one[2]]
    assert "weight sums" not in call.scratch and {one[1] for one in [*made, *spans]} == {BF16}
    assert len(made) + len(spans) == 19 and not any(one[2] for one in made)


def test_K3_several_rounds_of_rows_are_summed_in_float32(products):
    with gates.gpu_path():
        call = linear(20000, 4096, 30000)
        backward(call)
    made = [one for one in products if one[0] == (4096, 4096)]
    assert {one[1] for one in made} == {torch.float32} and {one[2] for one in made} == {False, True}
    assert call.scratch["weight sums"].dtype == torch.float32


@pytest.mark.parametrize("vocab", [512, 8192 + 64])
def test_K3_a_narrow_block_is_not_left_to_split_sums_in_bfloat16(products, vocab):
    """A block that fills no wave of an H100: its GEMM may add pieces of the sum over rows in bfloat16, if its result is that."""
    with gates.gpu_path():
        backward(linear(8192, 4096, vocab))
    made = {one[0][0]: one[1] for one in products if one[0][1] == 4096 and not one[2]}
    assert made[vocab % 8192] == torch.float32 and made.get(8192, BF16) == BF16


def half_products(monkeypatch):
    """The reference back end with products of float16 as a GPU has them: float32 sums, rounded once to the result's dtype."""

    def product(a, b, out, add):
        found = a.float() @ b.float()
        out.copy_(out + found if add else found)

    monkeypatch.setattr(backends.BACKENDS["reference"], "product", product)
    monkeypatch.setattr(backends.BACKENDS["reference"], "multiplies", lambda dtype: dtype == torch.float16)


@pytest.mark.parametrize("size", [1.0, 3e-5, 3e-7])
def test_K9_float16_gradients_of_a_mean_over_a_batch_survive(monkeypatch, size):
    """dz = g p: with row gradients of 3e-5 it is below float16's 6e-8 wherever p is below 2e-3, but not if it is scaled."""
    half_products(monkeypatch)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=g).half() for shape in ((40, 16), (300, 16))]
    bias, targets = torch.randn(300, generator=g).half(), torch.randint(300, (40,), generator=g)
    targets[3] = -100
    upstream = (torch.randn(40, generator=g) * size).double()
    upstream[3] = 1e30 * size  # an ignored row's

    def gradients(dtype, factor):
        given = [x.to(dtype).requires_grad_() for x in (*leaves, bias)]
        hidden, weight, own_bias = given
        if dtype == torch.float16:
            with backends.backend("reference"):
                out = linear_token_stats(hidden, Head(weight, own_bias), targets, stats=("logprobs", "entropy"), temperature=0.5)
            return torch.autograd.grad([out.logprobs, out.entropy], given, [upstream.float(), upstream.float()])
        logp = torch.log_softmax((hidden @ weight.T + own_bias) / 0.5, -1)
        keep = targets != -100
        chosen = logp[torch.arange(40), targets.clamp_min(0)]
        total = ((chosen - (logp.exp() * logp).sum(-1))[keep] * upstream[keep] * factor).sum()
        return torch.autograd.grad(total, given)

    factor = 1 / size  # of the exact gradient, so that what float16 can hold of it is compared
    for found, wanted in zip(gradients(torch.float16, 1), gradients(torch.float64, factor), strict=True):
        wanted = wanted * size
        held = wanted.half().double()
        assert (found.double() - held).norm() <= 2e-3 * wanted.norm() + 3e-8 * wanted.numel() ** 0.5


def test_K9_the_scale_is_found_without_a_look_at_a_value():
    with gates.gpu_path():
        call = linear(300, 64, 3000, dtype=torch.float16)
        with gates.Counter() as counter:
            found = backward(call)
    assert counter.synchronisations == 0 and [x.dtype for x in found[:2]] == [torch.float16] * 2


def test_K8_a_torch_without_the_argument_is_found_out(monkeypatch):
    """addmm of releases before out_dtype knows no such word: TypeError, and the sum is made in two steps."""
    add, calls = torch.addmm, []

    def addmm(total, a, b, *, out):
        calls.append(1)
        return add(total, a, b, out=out)

    tiling.addmm_into_float32.cache_clear()
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype, mm=torch.mm: mm(a.to(out_dtype), b.to(out_dtype)))
    try:
        assert tiling.addmm_into_float32("cpu") is False
        with gates.gpu_path():
            call = linear(4, 8, 64)
        total, a, b = torch.ones(4, 3), torch.ones(4, 2, dtype=BF16), torch.full((2, 3), 3.0, dtype=BF16)
        call.product(a, b, total, add=True)
        assert torch.equal(total, torch.full((4, 3), 7.0)) and not calls
    finally:
        tiling.addmm_into_float32.cache_clear()


# --- devices ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def current(monkeypatch):
    """The device that is current, as the guard makes it; `gates.gpu_path` and a guard that notes instead of asking CUDA."""
    devices = [None]

    @contextmanager
    def guard(device):
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(backends.triton, "on_device", guard)
    monkeypatch.setattr(ops, "on_device", guard)
    return devices


def test_K4_every_launch_has_its_tensors_device(current, monkeypatch):
    """Both operators, their backwards and the scan; the guard is gone again behind each."""
    seen = []
    with gates.gpu_path() as launches:
        monkeypatch.setattr(launches, "_launch", lambda *arguments, **options: seen.append(current[-1]))
        with torch.device("meta"):
            logits, hidden, weight = torch.empty(8, 300), torch.empty(8, 16), torch.empty(300, 16)
            targets, inverse = torch.empty(8, dtype=torch.int64), torch.empty(8)
        stats_ = ["logprobs", "jsd"]
        linear_ = ops.LinearCall(hidden, weight, None, hidden, None, None, targets, inverse, stats_, "triton", 10**8)
        state, grads = torch.empty(8, 9, device="meta"), torch.empty(10, 8, device="meta")
        given = (logits, logits, targets, inverse)
        held = (torch.empty(0, 0, device="meta"), torch.empty(0, 0, 0, device="meta"))  # nothing
        calls = {
            "token_stats": (*given, -100, stats_, 0.5, "triton"),
            "token_stats_backward": (*given, -100, stats_, 0.5, "triton", state, grads),
            "linear_token_stats": linear_,
            "linear_token_stats_backward": (*linear_, state, *held, grads, [True, True, False]),
        }
        for name, arguments in calls.items():
            before = len(seen)
            getattr(ops, name)._init_fn(*arguments)
            assert len(seen) > before and current == [None], name
        rows = torch.empty(2, 64, device="meta")
        credit_weights(*rows, torch.empty(2, device="meta"), torch.empty(3, dtype=torch.int32, device="meta"))
    assert len(seen) >= 9 and set(seen) == {torch.device("meta")}


def test_K4_the_guard_is_cudas():
    guard = backends.on_device(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    with backends.on_device(torch.device("cpu")):
        assert token_stats(torch.zeros(1, 2), stats=("entropy",)).entropy.item() == pytest.approx(0.6931, abs=1e-4)


# --- blocks -------------------------------------------------------------------------------------------------------------------


def test_K7_512_sequences_of_2048_tokens_run_in_one_round(monkeypatch):
    """By the committed registers: as many programs as an H100 holds at a time, 65536 registers on each of 132 processors."""
    table = json.loads((compile_report.RESULTS / compile_report.TABLE).read_text())
    row = next(r for r in table["rows"] if (r["target"], r["kernel"], r["case"]) == ("sm_90", "scan", "gear, masked"))
    resident = 132 * (65536 // (-(-row["registers"] // 8) * 8 * 32 * row["num_warps"]))
    assert resident >= 512
    monkeypatch.setattr(scan, "INTERPRETED", False)
    assert scan.config(1 << 20, 512, True) == (row["block"], row["num_warps"])
    assert scan.config(1 << 20, 1, True) == (2048, 8) and scan.config(60 * 64, 64, True) == (128, 1)


def test_candidates_stand_for_every_target_and_are_what_a_kernel_takes(monkeypatch):
    monkeypatch.setattr(stats, "INTERPRETED", False)
    monkeypatch.setattr(scan, "INTERPRETED", False)
    architectures = {str(target[1]) for target, _ in compile_report.TARGETS.values()}
    tables = (candidates.STATS_CANDIDATES, candidates.SCAN_CANDIDATES, candidates.TILE_CANDIDATES)
    assert all(set(table) == architectures for table in tables)
    assert [candidates.nearest(arch) for arch in ("90", "120", "103", "75", "gfx950")] == ["90", "100", "100", "80", "gfx942"]
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    for (kind, arch, lanes), _ in compile_report.TARGETS.values():
        monkeypatch.setattr(driver, "_active", compile_report.StubDriver(GPUTarget(kind, arch, lanes)))
        for kernel, configs in candidates.STATS_CANDIDATES[str(arch)].items():
            assert stats.config(kernel, 1 << 20, torch.float32) in configs, "the table's own is among them"
            for one in configs:
                with candidates.trying(kernel, one):
                    assert stats.config(kernel, 1 << 20, BF16) == one
        for one in candidates.SCAN_CANDIDATES[str(arch)]:
            with candidates.trying("scan", one):
                assert scan.config(1 << 20, 512, True) == one
    assert not candidates.TRIED
