"""The compiled product of bfloat16 matrices in float32, and statistics of hidden states that are computed through it."""

import pytest
import torch
from test_stats import exact, gradients, hidden_case, plain

from gear_kernels import Head, _native, backends, linear_token_stats, reference, tiling

pytestmark = pytest.mark.skipif(not _native.has_product(), reason="this processor has no AVX512-BF16")

# (m, k, n): single elements, odd depths, ends of the kernel's 6 rows and 64 columns, of a job's 96 and 384 rows, of 256 of k
SHAPES = [(1, 1, 1), (1, 2, 65), (5, 3, 16), (6, 31, 17), (7, 64, 63), (13, 255, 129), (97, 257, 64), (100, 511, 70)]
SHAPES += [(400, 33, 1), (2, 1025, 190), (391, 514, 66), (3, 1, 40), (1, 700, 1)]
STATS = ("logprobs", "entropy", "reverse_kl")
LAYOUTS = ("rows", "columns", "strided rows", "strided columns")


@pytest.fixture(autouse=True, params=("AVX512-BF16", "AMX"))
def tiles(request, monkeypatch):
    """Whether products go by AMX."""
    if request.param == "AMX" and not _native.may_use_tiles():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(backends.native, "has_tiles", lambda: request.param == "AMX")
    return request.param == "AMX"


def half(rows, columns, layout, scale=1.0):
    """A random bfloat16 matrix with unit stride along its rows or its columns, contiguous or cut out of a wider one."""
    if "columns" in layout:
        return half(columns, rows, layout.replace("columns", "rows"), scale).T
    extra = 3 if "strided" in layout else 0
    return (torch.randn(rows, columns + extra) * scale).bfloat16()[:, :columns]


def multiply(a, b, threads=2, out=None):
    target = torch.full((a.shape[0], b.shape[1]), torch.nan) if out is None else out
    _native.product(a, b, target, out is not None, backends.native.has_tiles(), threads)
    return target


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_against_float64(a_layout, b_layout, tiles):
    torch.manual_seed(0)
    for m, k, n in SHAPES:
        a, b = half(m, k, a_layout), half(k, n, b_layout)
        wide = torch.randn(m, n + 5)
        got, added = multiply(a, b), multiply(a, b, out=wide.clone()[:, :n])
        want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        bound = 2.0**-24 * 2 * min(k, 256 + k / 256) ** 0.5 * size + 1e-37  # roundings of a block's sums are independent
        assert ((got - want).abs() <= bound).all(), (m, k, n)
        in_place = tiles or k > 256  # AMX goes on from the sums that are there
        assert torch.equal(added, wide[:, :n] + got) or in_place and ((added - wide[:, :n] - want).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_bfloat16_results_are_the_float32_ones_rounded_once(a_layout, b_layout):
    torch.manual_seed(1)
    for m, k, n in [*SHAPES, (98, 300, 330), (2, 0, 3)]:
        a, b = half(m, k, a_layout), half(k, n, b_layout)
        rounded = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
        _native.product(a, b, rounded, False, backends.native.has_tiles(), 2)
        assert torch.equal(rounded, multiply(a, b).bfloat16()), (m, k, n)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_only_the_output_is_written(dtype):
    a, b, out = half(7, 9, "rows"), half(9, 70, "columns"), torch.full((9, 80), 7.0, dtype=dtype)
    _native.product(a, b, out[1:8, 3:73], False, backends.native.has_tiles(), 1)
    assert (out[1:8, 3:73] != 7).all()
    out[1:8, 3:73] = 7
    assert (out == 7).all()


def test_neither_threads_nor_neighbours_change_a_bit():
    torch.manual_seed(0)
    for a_layout in LAYOUTS[:2]:
        a, b = half(421, 777, a_layout), half(777, 333, "columns")
        whole = multiply(a, b, 1)
        assert torch.equal(whole, multiply(a, b, 3))
        part = multiply(a[11:20].contiguous(), b[:, 70:199].contiguous(), 1)
        assert torch.equal(part, whole[11:20, 70:199])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_infinity_and_nan_reach_their_rows_and_columns_alone(layout):
    a, b = half(9, 41, layout), half(41, 67, layout)
    a[1, 40], a[2, 3], b[40, 66] = torch.inf, torch.nan, torch.nan  # the last depth is odd: its pair is filled up
    got, want = multiply(a, b), a.float() @ b.float()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()) and got.isinf().any()
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-5)


def test_empty_operands():
    for m, k, n in ((0, 3, 4), (2, 3, 0), (0, 0, 0)):
        assert multiply(half(m, k, "rows"), half(k, n, "rows")).shape == (m, n)
    assert not multiply(half(2, 0, "rows"), half(0, 3, "rows")).any()
    assert (multiply(half(2, 0, "rows"), half(0, 3, "rows"), out=torch.ones(2, 3)) == 1).all()


def test_wrong_arrays_are_refused():
    a, b, out = half(2, 3, "rows"), half(3, 4, "rows"), torch.zeros(2, 4)
    wrong = [(a.float(), b, out), (a, b.half(), out), (a, b[:2], out), (a, b, out[:, :3]), (a, b, torch.zeros(2, 8)[:, ::2])]
    wrong += [(half(2, 8, "rows")[:, ::3], b, out), (a, half(6, 8, "rows")[::2, ::2], out)]
    for operands in wrong:
        with pytest.raises(ValueError):
            _native.product(*operands, False, backends.native.has_tiles(), 1)
    with pytest.raises(ValueError, match="not added to"):
        _native.product(a, b, out.bfloat16(), True, backends.native.has_tiles(), 1)


# --- statistics of hidden states --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "native")


@pytest.mark.parametrize("options", ({}, {"softcap": 4.0, "scale": 1.7}), ids=("plain", "softcap"))
def test_gradients_are_no_worse_than_plain_torch(options):
    student, teacher, weight, _, targets = hidden_case(2, n=64, width=96, dtype=torch.bfloat16)
    targets = targets.repeat(5)[:64]
    teacher_logits = reference.head_logits(teacher, weight, None, **options)

    def fused(s, w):
        return linear_token_stats(s, Head(w, **options), targets, teacher, stats=STATS)

    def torch_alone(s, w):
        return exact(reference.head_logits(s, w, None, **options), teacher_logits, targets, stats=STATS)

    want = gradients(lambda s, w: plain(s, w, None, teacher, targets, options, stats=STATS), student.double(), weight.double())
    ours, theirs = gradients(fused, student, weight), gradients(torch_alone, student, weight)
    for own, other, w in zip(ours, theirs, want, strict=True):
        assert (own - w).norm() <= 2 * (other - w).norm() and (own - w).norm() <= 2**-8 * w.norm()


def test_neither_the_weight_nor_its_gradient_is_copied_and_strides_are_taken(monkeypatch):
    """Rows cut out of wider tensors, a transposed weight, and one with no unit stride at all: the same bits."""
    student, teacher, weight, _, targets = hidden_case(3, n=40, dtype=torch.bfloat16)
    targets = targets.repeat(4)[:40]
    want = linear_token_stats(student, weight, targets, teacher)
    spread = torch.zeros(2 * weight.shape[0], 2 * weight.shape[1], dtype=torch.bfloat16)[::2, ::2]
    for other in (weight.T.contiguous().T, spread.copy_(weight)):
        got = linear_token_stats(student.repeat(1, 2)[:, :24], other, targets, teacher)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True) if x is not None)
    names, buffer = set(), tiling.Linear.buffer

    def noted(self, name, *shape, dtype):
        names.add(name)
        return buffer(self, name, *shape, dtype=dtype)

    monkeypatch.setattr(tiling.Linear, "buffer", noted)
    linear_token_stats(student, weight.requires_grad_(), targets, teacher).entropy.sum().backward()
    assert names == {"student logits", "dz"}
    whole = weight.grad
    other = weight.detach().T.contiguous().T.requires_grad_()  # its gradient has its strides, and is summed in float32
    linear_token_stats(student, other, targets, teacher).entropy.sum().backward()
    assert "weight sums" in names and torch.equal(whole, other.grad)


def test_more_rows_than_a_round_takes(monkeypatch):
    """Sums of several rounds are kept in float32 and rounded once: as if there had been one round, but for the order."""
    student, teacher, weight, _, targets = hidden_case(6, n=200, dtype=torch.bfloat16)
    targets = targets.repeat(20)[:200]

    def gradient():
        w = weight.clone().requires_grad_()
        return torch.autograd.grad(linear_token_stats(student, w, targets, teacher).logprobs.sum(), w)[0].float()

    whole = gradient()
    monkeypatch.setitem(tiling._LIMITS, "cpu", tiling._LIMITS["cpu"]._replace(rows=64, part=64))
    torch.testing.assert_close(gradient(), whole, rtol=2**-8, atol=1e-6 * whole.abs().max().item())


def test_values_do_not_depend_on_threads_or_tiles():
    student, teacher, weight, _, targets = hidden_case(4, n=40, width=300, dtype=torch.bfloat16)
    targets, threads = targets.repeat(4)[:40], torch.get_num_threads()

    def run(count):
        torch.set_num_threads(count)
        try:
            s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
            out = linear_token_stats(s, w, targets, teacher)
            return [out.logprobs, out.entropy, *torch.autograd.grad(out.reverse_kl.sum() + out.logprobs.sum(), (s, w))]
        finally:
            torch.set_num_threads(threads)

    assert all(torch.equal(x, y) for x, y in zip(run(1), run(3), strict=True))


def test_without_the_instruction_float32_serves(monkeypatch):
    student, teacher, weight, _, targets = hidden_case(5, dtype=torch.bfloat16)
    own = linear_token_stats(student, weight, targets, teacher)
    monkeypatch.setattr(tiling.Linear, "multiplies", lambda self, dtype: False)
    other = linear_token_stats(student, weight, targets, teacher)
    for name in STATS:
        torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=1e-6, atol=8e-6)
