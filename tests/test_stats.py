"""token_stats and linear_token_stats, every back end of this machine, against float64 plain logits.

Tolerances: 2e-6 nats (docs/mathematics.md's contract) plus the float32 spacing of large values for float32 inputs; for half
inputs the inputs are compared after rounding, so the same bound holds for values, and gradients may differ by their own rounding.
"""

from pathlib import Path

import pytest
import torch
from fuzzing import fuzz
from hypothesis import strategies as st

import gear_kernels
from gear_kernels import GearKernelsError, Head, TokenStats, backends, linear_token_stats, ops, reference, tiling, token_stats
from gear_kernels.reference import GRADIENT_NAMES
from gear_kernels.stats import linear_call

ALL = reference.STAT_NAMES
BACKENDS = sorted(backends.BACKENDS)
VOCABS = (1, 2, 127, 1187, 32003, 151936)
INF = float("inf")
OPERATORS = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()  # what it says of limits is tested here
ROUNDINGS = 4  # of each term: z - max, the product with 1 / T, exp, the product with p; the worst of 1,800 fuzzed calls was 2.2
UNDERFLOW = 1e-33  # a p below float32's 1.2e-38 is 0; times log p and 1 / T
GRAD_ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with gear_kernels.backend(request.param):
        yield request.param


def exact(student, teacher, targets, *, stats, temperature=1.0, ignore_index=-100, jsd_beta=0.5):
    """The statistics in float64, by the definition, differentiated by autograd."""
    n = student.shape[0]
    rows = reference.Rows(targets, (1.0 / torch.as_tensor(temperature)).double().expand(n), ignore_index)
    out = reference.token_stats(student.double(), None if teacher is None else teacher.double(), rows, stats, jsd_beta)
    return TokenStats(**out)


def logits_case(seed, n, vocab, dtype=torch.float32, spread=3.0, distance=0.5):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, vocab, generator=g) * spread
    teacher = student + torch.randn(n, vocab, generator=g) * distance
    return student.to(dtype), teacher.to(dtype), torch.randint(vocab, (n,), generator=g)


def assert_values(got, want, names=ALL, atol=2e-6):
    for name in names:
        torch.testing.assert_close(
            getattr(got, name).double(),
            getattr(want, name),
            rtol=5e-7,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def weighted(out: TokenStats, seed=0):
    """A loss through every differentiable output that is there and finite, with random row weights."""
    total = 0
    for name, weight in row_weights(out, seed).items():
        value = getattr(out, name)
        total = total + (torch.where(value.isfinite(), value, 0).double() * weight).sum()
    return total


def row_weights(out: TokenStats, seed=0):
    g = torch.Generator().manual_seed(seed)
    given = {name: getattr(out, name) for name in GRADIENT_NAMES if getattr(out, name) is not None}
    return {name: torch.randn(value.shape, generator=g).double() * value.isfinite() for name, value in given.items()}


def gradients(compute, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(weighted(compute(*leaves)), leaves)


def assert_gradients(got, want, rounding):
    """Relative to each tensor's largest entry; 1e-6 for terms of order 1 that cancel, as 1 - p at V = 1."""
    for g, w in zip(got, want, strict=True):
        scale = w.abs().max().item()
        torch.testing.assert_close(g.double(), w, rtol=rounding, atol=3e-6 * scale + 1e-6)


class Logs:
    """A head's row in float64: p, log p (0 where p is), and `blur`, the error of log p in units of float32 rounding: its x =
    (z - max) / T and log Z are rounded, and so is their difference; p is as far off, relatively.
    """

    def __init__(self, logits, inverse):
        null = logits == -INF
        x = ((logits - logits.amax(-1, keepdim=True)) * inverse).masked_fill(null, -1e3)
        log_z = x.logsumexp(-1, keepdim=True)
        self.log_p = x - log_z
        self.p = self.log_p.exp().masked_fill(null, 0)
        self.blur = (x.abs() + log_z.abs() + 1).masked_fill(null, 1)


def cancelling(student, teacher, targets, *, stats, temperature=1.0, jsd_beta=0.5, ignore_index=-100):
    """[N, V]: how large the terms are whose difference is the gradient of `weighted`, dz_v T = gl (1[v=y] - p) - gH p (log p + H)
    + gK p (log p/q - KL) + gF (p - q) + gJ (1 - beta) p (log p/m - KL(S||M)). Each is rounded on its own, H and the KLs too,
    which are themselves means of such terms; so float32 errors are a few times 2^-24 of this, however small the difference.
    """
    inverse = 1.0 / torch.as_tensor(temperature).double().expand(len(student))[:, None]
    s, total = Logs(student.double(), inverse), torch.zeros(student.shape, dtype=torch.float64)
    t = s if teacher is None else Logs(teacher.double(), inverse)
    d, both = s.log_p - t.log_p, s.blur + t.blur
    from_s = -torch.log(1 - jsd_beta + jsd_beta * (-d).clamp(-80, 80).exp())
    sizes = {
        "logprobs": lambda: s.p * s.blur + torch.nn.functional.one_hot(targets.clamp(min=0), student.shape[1]),
        "entropy": lambda: s.p * _mean_and_self(s, s.log_p.abs(), s.blur),
        "reverse_kl": lambda: s.p * _mean_and_self(s, d.abs(), both),
        "forward_kl": lambda: s.p * s.blur + t.p * t.blur,
        "jsd": lambda: (1 - jsd_beta) * s.p * _mean_and_self(s, from_s.abs(), both),
        "logsumexp": lambda: s.p * s.blur,
    }
    out = exact(student, teacher, targets, stats=stats, temperature=temperature, ignore_index=ignore_index, jsd_beta=jsd_beta)
    for name, weight in row_weights(out).items():
        total += torch.where(weight[:, None] == 0, 0, weight.abs()[:, None] * sizes[name]())
    return total * inverse


def _mean_and_self(s: Logs, value, blur):
    """The size of value - E value, where p multiplies it: both are off by `blur`, and by p's own error of s.blur times value."""
    one = value * s.blur + blur
    return one + (s.p * one).sum(-1, keepdim=True)


def assert_rounded(got, want, sizes):
    """Errors are those of rounding: of the result to its dtype, of the terms that cancel to float32."""
    info = torch.finfo(got.dtype)
    limit = GRAD_ROUNDING[got.dtype] * want.abs() + ROUNDINGS * 2**-24 * sizes + max(info.smallest_normal * info.eps, UNDERFLOW)
    worst = ((got.double() - want).abs() - limit).argmax()
    assert ((got.double() - want).abs() <= limit).all(), [x.flatten()[worst].item() for x in (got, want, limit)]


# --- values and gradients on logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_all_statistics_and_gradients(backend, vocab, dtype):
    student, teacher, targets = logits_case(vocab, 5, vocab, dtype)
    targets[1] = -100
    out = token_stats(student, teacher, targets, stats=ALL)
    assert all(value.dtype == torch.float32 and value.shape == (5,) for value in out)
    assert_values(out, exact(student, teacher, targets, stats=ALL))
    got = gradients(lambda s: token_stats(s, teacher, targets, stats=ALL), student)
    want = gradients(lambda s: exact(s, teacher, targets, stats=ALL), student.double())
    assert got[0].dtype == dtype
    assert_gradients(got, want, GRAD_ROUNDING[dtype])
    assert not got[0][1].any()


def test_reference_agrees_with_log_softmax():
    student, teacher, targets = logits_case(3, 40, 50)
    targets[::2] = student[::2].argmax(-1)
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    mixture = (0.3 * t.exp() + 0.7 * s.exp()).log()
    want = TokenStats(
        s.gather(-1, targets[:, None])[:, 0],
        t.gather(-1, targets[:, None])[:, 0],
        -(s.exp() * s).sum(-1),
        -(t.exp() * t).sum(-1),
        (s.exp() * (s - t)).sum(-1),
        (t.exp() * (t - s)).sum(-1),
        0.3 * (t.exp() * (t - mixture)).sum(-1) + 0.7 * (s.exp() * (s - mixture)).sum(-1),
        student.double().logsumexp(-1),
        (s.argmax(-1) == targets).double(),
        (s.argmax(-1) == t.argmax(-1)).double(),
    )
    assert 0 < want.argmax_agreement.mean() < 1 and want.top1.any()
    got = exact(student, teacher, targets, stats=ALL, jsd_beta=0.3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compute", (exact, token_stats), ids=("definition", "tiles"))
@pytest.mark.parametrize("name", GRADIENT_NAMES)
def test_gradcheck_in_float64(name, compute):
    student, teacher, targets = logits_case(1, 3, 7)
    student, teacher = student.double(), teacher.double()
    student[0, 2] = teacher[0, 2] = teacher[1, 3] = student[2, 4] = -INF
    targets[:] = torch.tensor([1, -100, 0])
    fixed = student.isinf()
    free = torch.where(fixed, 0, student).requires_grad_()

    def value(x):
        temperature = torch.tensor([0.7, 1.0, 2.0])
        options = {"temperature": temperature, "stats": (name,), "jsd_beta": 0.3}
        out = compute(x.masked_fill(fixed, -INF), teacher, targets, **options)
        return torch.where(getattr(out, name).isfinite(), getattr(out, name), 0)

    assert torch.autograd.gradcheck(value, (free,))


FUZZ_CALLS = {"native": 1000, "reference": 750, "triton": 250}  # 2,000 calls of each operator in all; see fuzzing.often


@st.composite
def fuzz_cases(draw):
    """A call of either operator: sizes, dtypes, masks, extremes, layouts, any subset of the statistics."""
    names = draw(st.sets(st.sampled_from(ALL), min_size=1))
    seed, n, vocab = draw(st.integers(0, 2**20)), draw(st.integers(0, 4)), draw(st.integers(1, 300))
    g = torch.Generator().manual_seed(seed)
    student, teacher, targets = logits_case(seed, n, vocab, spread=draw(st.sampled_from([0.0, 1.0, 8.0])))
    student = student + draw(st.sampled_from([0.0, 1e4, -1e4]))
    if draw(st.booleans()):
        student[torch.rand(n, vocab, generator=g) < 0.2] = -INF
        teacher[torch.rand(n, vocab, generator=g) < 0.2] = -INF
        targets[torch.rand(n, generator=g) < 0.3] = -1
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    student, teacher = student.to(draw(dtypes)), teacher.to(draw(dtypes))
    student, teacher = (
        laid_out(x, draw(st.sampled_from(["plain", "transposed", "sliced", "strided"]))) for x in (student, teacher)
    )
    temperature = 0.5 + torch.rand(n, generator=g) if draw(st.booleans()) else draw(st.sampled_from([0.3, 1.0, 2.0]))
    options = {
        "ignore_index": -1,
        "temperature": temperature,
        "stats": tuple(sorted(names)),
        "jsd_beta": draw(st.sampled_from([0.1, 0.5])),
    }
    return student, teacher, targets, options


def laid_out(x, layout):
    """The same values behind other strides."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":
        return torch.cat([x, x], -1)[:, : x.shape[1]]
    return x.repeat_interleave(2, -1)[:, ::2] if layout == "strided" else x


def check_logits_call(case):
    student, teacher, targets, options = case
    want = exact(student, teacher, targets, **options)
    assert_values(token_stats(student, teacher, targets, **options), want, options["stats"])
    if not set(options["stats"]) & set(GRADIENT_NAMES):
        return
    got = gradients(lambda s: token_stats(s, teacher, targets, **options), student)
    want = gradients(lambda s: exact(s, teacher, targets, **options), student.double())
    sound = (student > -INF).any(-1) & (teacher > -INF).any(-1)  # a row of nothing but -inf is NaN by definition
    if sound.any():
        assert_rounded(got[0][sound], want[0][sound], cancelling(student, teacher, targets, **options)[sound])


def check_linear_call(case):
    logits, teacher, targets, options = case
    vocab, n = logits.shape[1], logits.shape[0]
    g = torch.Generator().manual_seed(n * 1000 + vocab)
    hidden, weight = torch.randn(n, 5, generator=g), torch.randn(vocab, 5, generator=g)
    hidden_teacher = hidden + 0.3 * torch.randn(n, 5, generator=g)
    call = options | {"workspace_bytes": 20_000 + 40 * vocab}
    want = plain(hidden, weight, None, hidden_teacher, targets, {}, **options)
    assert_values(linear_token_stats(hidden, weight, targets, hidden_teacher, **call), want, options["stats"], atol=8e-6)


def test_fuzz(backend):
    fuzz(check_logits_call, fuzz_cases(), FUZZ_CALLS[backend])
    fuzz(check_linear_call, fuzz_cases(), FUZZ_CALLS[backend])


def test_a_large_kl_leaves_its_own_rounding_in_the_gradient(backend):
    """One finite logit: p = 1, so log p/q - KL is 0, of two rounded numbers: 14 nats may leave 1e-6, and 1e5 left 1.2e-3."""
    student, teacher = torch.full((2, 40), -INF), torch.zeros(2, 40)
    student[:, 3], teacher[:, 3] = 0.0, torch.tensor([-10.137, -1e5])
    targets, options = torch.tensor([3, 3]), {"stats": ("entropy", "reverse_kl"), "temperature": 0.99}
    got = gradients(lambda s: token_stats(s, teacher, targets, **options), student)[0]
    want = gradients(lambda s: exact(s, teacher, targets, **options), student.double())[0]
    sizes = cancelling(student, teacher, targets, **options)
    assert_rounded(got, want, sizes)
    assert want.abs().max() < 1e-9 and (sizes[:, 3] * 2**-24 > torch.tensor([1e-6, 1e-2])).all()


def test_real_vocabulary_with_a_teacher_close_by(backend):
    """True KL 5e-5 at V = 151936: the size of the signal that a bfloat16 rounding of logits would drown."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(8, 151936, generator=g) * 2
    teacher = student + torch.randn(8, 151936, generator=g) * 0.01
    targets = torch.randint(151936, (8,), generator=g)
    got, want = (f(student, teacher, targets, stats=ALL) for f in (token_stats, exact))
    assert 3e-5 < want.reverse_kl.mean() < 7e-5
    for name in ("reverse_kl", "forward_kl"):
        error = getattr(got, name).double() - getattr(want, name)
        assert error.abs().max() <= 2e-6 and (error / getattr(want, name)).abs().max() < 0.05
        assert error.mean().abs() < 5e-7, "biased"
    assert_values(got, want)


@pytest.mark.parametrize("shift", (1e4, -1e4))
def test_shifted_logits(backend, shift):
    """Float64 sees the same rounded inputs, so nothing is excused: only differences to the maximum may enter."""
    student, teacher, targets = logits_case(5, 4, 5003)
    for s, t in ((student + shift, teacher), (student, teacher + shift), (student + shift, teacher - shift)):
        options = {"stats": ALL, "temperature": 0.7}
        assert_values(token_stats(s, t, targets, **options), exact(s, t, targets, **options))
        got = gradients(lambda x, t=t, options=options: token_stats(x, t, targets, **options), s)
        want = gradients(lambda x, t=t, options=options: exact(x, t, targets, **options), s.double())
        assert_gradients(got, want, 3e-6)


def test_rising_maxima(backend):
    """A larger maximum in every block: the running rescale is used throughout, for both heads, in opposite directions."""
    ramp = torch.linspace(-40, 40, 9000)
    student, teacher = ramp[None], ramp.flip(0)[None] * 0.9
    targets = torch.tensor([8999])
    assert_values(token_stats(student, teacher, targets, stats=ALL), exact(student, teacher, targets, stats=ALL))


# --- minus infinity, NaN, ignored rows ---------------------------------------------------------------------------------------


def test_first_block_all_minus_infinity(backend):
    student, teacher, targets = logits_case(2, 3, 5000)
    student[:, :2500] = teacher[:, :2500] = -INF
    targets[:] = torch.tensor([2500, 4000, 7])
    out, want = (f(student, teacher, targets, stats=ALL) for f in (token_stats, exact))
    assert_values(out, want)
    assert out.logprobs[2] == out.teacher_logprobs[2] == -INF and out.reverse_kl.isfinite().all()
    got = gradients(lambda s: token_stats(s, teacher, targets, stats=ALL), student)
    assert_gradients(got, gradients(lambda s: exact(s, teacher, targets, stats=ALL), student.double()), 3e-6)
    assert got[0].isfinite().all() and not got[0][:, :2500].any()


def test_support_mismatch_is_infinite_and_passes_no_gradient(backend):
    student, teacher, targets = logits_case(2, 3, 3000)
    teacher[0, 5] = -INF  # the student is finite there: KL(S||T) = inf
    student[1, 2999] = -INF  # the teacher is finite there: KL(T||S) = inf
    student[0, 9] = -200.0  # probability 0 in float32, still support: the rule goes by logits
    teacher[0, 9] = -INF
    out = token_stats(student, teacher, targets, stats=ALL)
    assert out.reverse_kl.isinf().tolist() == [True, False, False] and out.forward_kl.isinf().tolist() == [False, True, False]
    assert_values(out, exact(student, teacher, targets, stats=ALL))
    leaf = student.clone().requires_grad_()
    out = token_stats(leaf, teacher, targets, stats=("reverse_kl", "forward_kl"))
    (out.reverse_kl.sum() + out.forward_kl.sum()).backward()
    assert leaf.grad.isfinite().all() and leaf.grad[1, 2999] == 0
    leaf.grad = None
    token_stats(leaf, teacher, targets, stats=("reverse_kl",)).reverse_kl.sum().backward()
    assert not leaf.grad[0].any() and leaf.grad[1].any()


def test_large_finite_masks(backend):
    """HF writes finfo.min, not -inf: 0 * 3e38 must stay 0."""
    student, teacher, targets = logits_case(2, 2, 2100)
    low = torch.finfo(torch.float32).min
    student[:, 100:200] = teacher[:, 100:200] = low
    student[0, 300] = low
    targets[:] = 0
    names = ("logprobs", "entropy", "teacher_entropy", "reverse_kl")
    options = {"stats": names, "temperature": 0.5}
    assert_values(token_stats(student, teacher, targets, **options), exact(student, teacher, targets, **options), names)
    got = gradients(lambda s: token_stats(s, teacher, targets, **options), student)
    assert got[0].isfinite().all()


def test_nan_and_empty_rows_give_nan(backend):
    student, teacher, targets = logits_case(2, 4, 2100)
    student[0, 2050], student[1], teacher[2, 3] = float("nan"), -INF, float("nan")
    out = token_stats(student, teacher, targets, stats=ALL)
    for name, rows in (("logprobs", [0, 1]), ("entropy", [0, 1]), ("teacher_entropy", [2]), ("teacher_logprobs", [2])):
        assert getattr(out, name).isnan().nonzero()[:, 0].tolist() == rows, name
    for name in ("reverse_kl", "forward_kl"):
        assert getattr(out, name).isnan().tolist() == [True, True, True, False], name


def test_ignored_rows_may_hold_anything(backend):
    student, teacher, targets = logits_case(2, 3, 50)
    student[1], teacher[1], targets[1] = float("nan"), INF, -100
    leaf = student.clone().requires_grad_()
    out = token_stats(leaf, teacher, targets, stats=ALL)
    assert all(value[1] == 0 for value in out)
    sum(v.sum() for v in out if v.requires_grad).backward()
    assert not leaf.grad[1].any() and leaf.grad.isfinite().all() and leaf.grad[0].any()


def test_kl_is_never_negative(backend):
    student, _, targets = logits_case(9, 40 if backend == "triton" else 200, 300, spread=6.0)
    teacher = student * (1 + 1e-7)
    out = token_stats(student, teacher, targets, stats=ALL)
    assert (out.reverse_kl >= 0).all() and (out.forward_kl >= 0).all() and (out.entropy >= 0).all()
    same = token_stats(student, student, targets, stats=ALL)
    assert not same.reverse_kl.any() and not same.forward_kl.any()


# --- shapes, strides, options -----------------------------------------------------------------------------------------


def test_non_contiguous_inputs(backend):
    wide, other, targets = logits_case(4, 12, 800)
    views = ((wide[::2, :400], other[1::2, 3:403]), (wide[:6, ::2], other[:6, 1::2]), (wide.T[:12, :6].T, other.T[:12, :6].T))
    for student, teacher in views:
        ids = targets[:6] % student.shape[1]
        assert_values(token_stats(student, teacher, ids, stats=ALL), exact(student, teacher, ids, stats=ALL))
        got = gradients(lambda s, t=teacher, i=ids: token_stats(s, t, i, stats=ALL), student)
        want = gradients(lambda s, t=teacher, i=ids: exact(s, t, i, stats=ALL), student.double())
        assert_gradients(got, want, 3e-6)


def test_more_elements_than_an_int32_counts(backend):
    """Two rows 2^31 elements apart: only the pages that are written exist. The gradient would be 8 GB, so values alone."""
    vocab = 1000
    storage = torch.empty(2**31 + vocab, dtype=torch.bfloat16)
    student = storage.as_strided((2, vocab), (2**31, 1))
    student.copy_(torch.randn(2, vocab, generator=torch.Generator().manual_seed(0)))
    targets = torch.tensor([3, 999])
    assert_values(token_stats(student, student, targets, stats=ALL), exact(student, student, targets, stats=ALL))


def test_few_rows_are_split_over_the_vocabulary(backend):
    """The splits have their own maxima, and one of them holds nothing but -inf."""
    student, teacher, targets = logits_case(8, 2, 70_000)
    student[0, :36_000] = teacher[0, :36_000] = -INF
    student[1] += torch.linspace(-30, 30, 70_000)
    targets[:] = torch.tensor([69_999, 36_001])
    tiles = backends.BACKENDS[backend]
    assert backend == "reference" or tiles.splits(2, 70_000) > 2
    assert_values(token_stats(student, teacher, targets, stats=ALL), exact(student, teacher, targets, stats=ALL))


def test_the_table_says_what_each_statistic_reads(backend):
    """Asked for alone, with no more than the table names, each is there; without it, an error names what is missing."""
    student, teacher, targets = logits_case(3, 3, 200)
    leaf = student.clone().requires_grad_()
    for stat in reference.STATISTICS:
        given = (teacher if stat.needs_teacher else None, targets if stat.needs_target else None)
        value = getattr(token_stats(leaf, *given, stats=(stat.name,)), stat.name)
        assert value.requires_grad == stat.gradient and value.isfinite().all()
        if stat.needs_teacher:
            with pytest.raises(GearKernelsError, match=f"{stat.name} was asked for without a teacher"):
                token_stats(leaf, None, targets, stats=(stat.name,))
        if stat.needs_target:
            with pytest.raises(GearKernelsError, match=f"{stat.name} was asked for without targets"):
                token_stats(leaf, teacher, None, stats=(stat.name,))
    assert TokenStats._fields == tuple(stat.name for stat in reference.STATISTICS)


def test_leading_dimensions(backend):
    student, teacher, targets = logits_case(4, 6, 40)
    flat = token_stats(student, teacher, targets, stats=ALL)
    cube = token_stats(student.view(2, 3, 40), teacher.view(2, 3, 40), targets.view(2, 3), stats=ALL)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(cube, flat, strict=True))


@pytest.mark.parametrize("names", [(), ("entropy",), ("forward_kl",), ("teacher_logprobs", "logprobs"), ("teacher_entropy",)])
def test_subsets(backend, names):
    student, teacher, targets = logits_case(4, 3, 2500)
    whole, part = token_stats(student, teacher, targets, stats=ALL), token_stats(student, teacher, targets, stats=names)
    for name in ALL:
        if name in names:
            assert torch.equal(getattr(part, name), getattr(whole, name))
        else:
            assert getattr(part, name) is None


def test_without_teacher_or_targets(backend):
    student, _, targets = logits_case(4, 3, 2500)
    names = ("logprobs", "entropy")
    assert_values(token_stats(student, None, targets, stats=names), exact(student, None, targets, stats=names), names)
    assert_values(token_stats(student, stats=("entropy",)), exact(student, None, None, stats=("entropy",)), ("entropy",))


def test_teacher_never_gets_a_gradient(backend):
    student, teacher, targets = logits_case(4, 3, 90)
    student.requires_grad_()
    teacher.requires_grad_()
    out = token_stats(student, teacher, targets, stats=ALL)
    assert not out.teacher_logprobs.requires_grad and not out.teacher_entropy.requires_grad
    (out.reverse_kl.sum() + out.forward_kl.sum()).backward()
    assert teacher.grad is None and student.grad.any()


# --- hidden states ----------------------------------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "padded": {"valid_vocab": 700},
    "all": {"bias": True, "softcap": 4.0, "scale": 1.7, "valid_vocab": 701},
}


def hidden_case(seed, n=13, width=24, vocab=731, bias=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, width, generator=g)
    teacher = student + 0.1 * torch.randn(n, width, generator=g)
    weight, shift = torch.randn(vocab, width, generator=g) * 0.5, torch.randn(vocab, generator=g)
    targets = torch.randint(690, (n,), generator=g)
    targets[3] = -100
    student, teacher, weight, shift = (x.to(dtype) for x in (student, teacher, weight, shift))
    return student, teacher, weight, shift if bias else None, targets


def plain(student, weight, bias, teacher, targets, options, **call):
    """float64 statistics by whole logits and autograd."""
    logits = reference.head_logits(student.double(), weight.double(), None if bias is None else bias.double(), **options)
    with torch.no_grad():
        other = reference.head_logits(teacher.double(), weight.double(), None if bias is None else bias.double(), **options)
    return exact(logits, other, targets, **call)


@pytest.mark.parametrize("workspace", (1, 100_000, 1 << 28))  # 64 columns of a row at a time, a ragged few, all at once
@pytest.mark.parametrize("kind", HEADS)
def test_linear_values_and_gradients(backend, kind, workspace):
    if backend == "triton" and workspace == 1 and kind != "all":
        workspace = 30_000  # the interpreter takes 20 s for 156 tiles: once is enough
    options = dict(HEADS[kind])
    student, teacher, weight, bias, targets = hidden_case(1, bias=options.pop("bias", False))
    leaves = (student, weight) if bias is None else (student, weight, bias)
    call = {"stats": ALL, "temperature": 0.5 + torch.rand(13, generator=torch.Generator().manual_seed(1))}

    def fused(s, w, b=None):
        return linear_token_stats(s, Head(w, b, **options), targets, teacher, workspace_bytes=workspace, **call)

    want = plain(student, weight, bias, teacher, targets, options, **call)
    assert_values(fused(student, weight, bias), want, atol=8e-6)  # a float32 GEMM's rounding of the logits comes on top
    got = gradients(fused, *leaves)
    want = gradients(lambda s, w, b=None: plain(s, w, b, teacher, targets, options, **call), *(x.double() for x in leaves))
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= 3e-6 * w.norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("n", (4, 150, 1500))  # few rows make wide tiles; 1500 take two rounds of gradient GEMMs
@pytest.mark.parametrize("name", ("native", "reference"))  # at a GPU's shapes: test_compile.py
def test_tiles_and_sums_stay_within_the_workspace(name, n, dtype, monkeypatch):
    student, teacher, weight, _, targets = hidden_case(2, n=n, width=160, vocab=4001, dtype=dtype)
    calls, make = [], tiling.Linear.__post_init__
    monkeypatch.setattr(tiling.Linear, "__post_init__", lambda self: (make(self), calls.append(self))[0])
    with gear_kernels.backend(name):
        out = linear_token_stats(student, weight.requires_grad_(), targets, teacher, workspace_bytes=1 << 20)
        out.reverse_kl.sum().backward()
    assert len(calls) == 2
    for call in calls:  # "weight": the head's block in float32, a quarter more, where the back end multiplies no halves
        held = {name: x.nbytes for name, x in call.scratch.items() if name != "weight"}
        assert 0 < sum(held.values()) <= 1 << 20, held


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_hidden_states_keep_float32_logits(backend, dtype):
    student, teacher, weight, _, targets = hidden_case(2, dtype=dtype)
    want = plain(student, weight, None, teacher, targets, {}, stats=ALL)
    roundings = 2 if backends.BACKENDS[backend].multiplies(dtype) else 1  # of the gradient, and of dz
    for workspace in (60_000 if backend == "triton" else 4096, 1 << 26):  # the small one also cuts the head into column blocks
        assert_values(
            linear_token_stats(student, weight, targets, teacher, stats=ALL, workspace_bytes=workspace), want, atol=8e-6
        )
        call = {"stats": ALL, "workspace_bytes": workspace}
        got = gradients(lambda s, w, call=call: linear_token_stats(s, w, targets, teacher, **call), student, weight)
        wanted = gradients(lambda s, w: plain(s, w, None, teacher, targets, {}, stats=ALL), student.double(), weight.double())
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == dtype and (g.double() - w).norm() <= roundings * GRAD_ROUNDING[dtype] / 2 * w.norm()


def test_teacher_with_its_own_head(backend):
    student, teacher, weight, _, targets = hidden_case(3)
    own = torch.randn(731, 9)
    teacher = teacher[:, :9]
    out = linear_token_stats(student, weight, targets, teacher, teacher_head=Head(own, scale=0.5), stats=ALL)
    logits = (student.double() @ weight.double().T, teacher.double() @ own.double().T * 0.5)
    assert_values(out, exact(*logits, targets, stats=ALL), atol=8e-6)
    same = linear_token_stats(student, weight, targets, student, teacher_head=weight, stats=ALL)
    assert not same.reverse_kl.any()


def test_frozen_weight_costs_no_gradient_and_autocast_changes_nothing(backend):
    student, teacher, weight, _, targets = hidden_case(4)
    student.requires_grad_()
    out = linear_token_stats(student, weight, targets, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_token_stats(student, weight, targets, teacher)
        (grad_cast,) = torch.autograd.grad(weighted(cast), student)
    (grad,) = torch.autograd.grad(weighted(out), student)
    assert torch.equal(out.reverse_kl, cast.reverse_kl) and torch.equal(grad, grad_cast)


def test_empty_and_single_rows(backend):
    student, teacher, weight, _, targets = hidden_case(5)
    weight.requires_grad_()
    empty = linear_token_stats(student[:0], weight, targets[:0], teacher[:0], stats=ALL)
    assert all(value.shape == (0,) for value in empty)
    assert not torch.autograd.grad(empty.entropy.sum() + empty.reverse_kl.sum(), weight)[0].any()
    one = linear_token_stats(student[:1], weight, targets[:1], teacher[:1], stats=ALL)
    assert_values(one, plain(student[:1], weight, None, teacher[:1], targets[:1], {}, stats=ALL), atol=8e-6)
    no_rows = token_stats(torch.zeros(0, 7), torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), stats=ALL)
    assert all(value.shape == (0,) for value in no_rows)


def test_bitwise_repeats(backend):
    student, teacher, weight, _, targets = hidden_case(6, n=40)
    runs = []
    for _ in range(3):
        s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_token_stats(s, w, targets.repeat(4)[:40], teacher, stats=ALL, workspace_bytes=200_000)
        runs.append([*out, *torch.autograd.grad(weighted(out), (s, w))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_checkpointed_and_partial_use_of_outputs(backend):
    student, teacher, weight, _, targets = hidden_case(7)
    s, w = student.requires_grad_(), weight.requires_grad_()
    out = linear_token_stats(s, w, targets, teacher)
    want = torch.autograd.grad(out.reverse_kl.sum(), (s, w))
    again = torch.utils.checkpoint.checkpoint(lambda a, b: linear_token_stats(a, b, targets, teacher), s, w, use_reentrant=False)
    got = torch.autograd.grad(again.reverse_kl.sum(), (s, w))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- limits of what is computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
def test_R5_half_hidden_states_under_a_float32_head(backend, half):
    """TRL's cast_lm_head_to_fp32: as if widened by the caller, bit by bit; gradients come back in the input's dtype."""
    student, teacher, weight, bias, targets = hidden_case(8, bias=True)
    student, teacher = student.to(half), teacher.to(half)

    def fused(s, w, b, t=teacher):
        return linear_token_stats(s, Head(w, b), targets, t, stats=ALL, workspace_bytes=60_000)

    want = gradients(lambda s, w, b: fused(s.float(), w, b, teacher.float()), student, weight, bias)
    got = gradients(fused, student, weight, bias)
    assert [g.dtype for g in got] == [half, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert_values(fused(student, weight, bias), plain(student, weight, bias, teacher, targets, {}, stats=ALL), atol=8e-6)
    own = linear_token_stats(weight[:13], weight, targets, student, teacher_head=weight)  # the teacher's alone is half
    assert own.reverse_kl.isfinite().all()


def test_R5_reentrant_checkpointing_returns_a_tuple_in_the_fields_order():
    student, teacher, weight, _, targets = hidden_case(7)
    pair = []
    for reentrant in (False, True):
        s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(
            lambda a, b: linear_token_stats(a, b, targets, teacher), s, w, use_reentrant=reentrant
        )
        assert type(out) is (tuple if reentrant else TokenStats)
        weighted(TokenStats(*out)).backward()  # as docs/operators.md and the docstring say
        pair.append((s.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    assert "TokenStats(*out)" in linear_token_stats.__doc__


def test_R5_forward_mode_is_refused():
    """A tangent came back as 0, silently. Constants may carry one: the teacher's is 0 by definition."""
    logits, hidden, weight = torch.randn(3, 5), torch.randn(3, 4), torch.randn(5, 4)
    calls = {
        "student_logits": (lambda x: token_stats(x, **ENTROPY).entropy, logits),
        "student_hidden": (lambda x: linear_token_stats(x, weight, **ENTROPY).entropy, hidden),
        "head.weight": (lambda x: linear_token_stats(hidden, x, **ENTROPY).entropy, weight),
        "head.bias": (lambda x: linear_token_stats(hidden, Head(weight, x), **ENTROPY).entropy, torch.randn(5)),
    }
    for name, (call, x) in calls.items():
        with pytest.raises(GearKernelsError, match=f"{name} carries a forward-mode tangent .*expected reverse mode"):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
        with pytest.raises(GearKernelsError, match=f"{name} carries a forward-mode tangent"):
            torch.func.jacfwd(call)(x)
    value, tangent = torch.func.jvp(lambda t: token_stats(logits, t, stats=("reverse_kl",)).reverse_kl, (logits,), (logits,))
    assert not value.any() and not tangent.any()


def test_R5_divergences_are_exact_to_6e29_nats_and_bounded_above(backend):
    """As docs/operators.md says: a logit counts as at most 1e30 (native: 1e30 ln 2) below its row's largest."""
    for gap in (1e20, 1.3e30):
        logits, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -gap]])
        got = token_stats(logits.requires_grad_(), teacher, stats=("reverse_kl",)).reverse_kl
        got.backward()
        assert logits.grad.isfinite().all() and got <= gap / 2 * 1.000001
        assert got.item() == pytest.approx(gap / 2, rel=1e-6) if gap < 1e30 else 3.4e29 < got.item() < 5.1e29
    assert "at most 1e30 (`native`: 6.9e29) nats below its row's largest" in OPERATORS


@pytest.mark.parametrize("temperature", (1e-4, 1e-2))
def test_R5_gradients_at_low_temperature_are_off_by_what_cancels(backend, temperature):
    """T = 1e-4 makes KLs of 1e5 nats and more: their float32 rounding, over T, reaches hundreds where the truth is 0."""
    student, teacher, targets = logits_case(3, 40, 200, spread=10.0, distance=10.0)
    options = {"stats": ("reverse_kl",), "temperature": temperature}
    got = gradients(lambda s: token_stats(s, teacher, targets, **options), student)[0]
    want = gradients(lambda s: exact(s, teacher, targets, **options), student.double())[0]
    assert_rounded(got, want, cancelling(student, teacher, targets, **options))
    assert "2e-7 · KL · gK / T" in OPERATORS
    kl = exact(student, teacher, targets, **options).reverse_kl
    weights = row_weights(exact(student, teacher, targets, **options))["reverse_kl"].abs()
    limit = 2e-7 * (kl + 40) * weights / temperature  # docs/operators.md; 40: where log p adds what the KL lacks
    assert ((got.double() - want).abs().amax(-1) <= limit + GRAD_ROUNDING[torch.float32] * want.abs().amax(-1)).all()


# --- bad input --------------------------------------------------------------------------------------------------------

Z, T, Y = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
H, W = torch.zeros(3, 4), torch.zeros(5, 4)
ENTROPY = {"stats": ("entropy",)}


def megatron_shard():
    weight = W.clone()
    weight.tensor_model_parallel = True  # what Megatron leaves on a sharded parameter
    return weight


BAD_LOGITS = {
    "stats names 'kl'; expected names out of logprobs": lambda: token_stats(Z, T, Y, stats=("kl",)),
    "stats is the string 'entropy'": lambda: token_stats(Z, T, Y, stats="entropy"),
    "reverse_kl was asked for without a teacher; expected teacher_logits": lambda: token_stats(Z, None, Y),
    "logprobs was asked for without targets": lambda: token_stats(Z, T),
    "student_logits has dtype torch.int64": lambda: token_stats(Z.long(), **ENTROPY),
    "student_logits is a list; expected a torch.Tensor": lambda: token_stats([[0.0]], **ENTROPY),
    r"student_logits has shape \(3, 0\)": lambda: token_stats(Z[:, :0], **ENTROPY),
    r"teacher_logits has shape \(3, 4\); expected that of student_logits, \(3, 5\)": lambda: token_stats(Z, T[:, :4], Y),
    "teacher_logits has dtype torch.float64": lambda: token_stats(Z, T.double(), Y),
    "teacher_logits is on meta; expected that of student_logits, cpu": lambda: token_stats(Z, T.to("meta"), Y),
    r"targets has shape \(2,\)": lambda: token_stats(Z, T, Y[:2]),
    "targets has dtype torch.float32": lambda: token_stats(Z, T, Y.float()),
    r"targets holds 5 \(3 out of range\); expected 0 to 4, or ignore_index -100": lambda: token_stats(Z, T, Y + 5),
    "targets is on meta": lambda: token_stats(Z, T, Y.to("meta")),
    "temperature is 0": lambda: token_stats(Z, T, Y, temperature=0),
    r"temperature has shape \(2,\)": lambda: token_stats(Z, T, Y, temperature=torch.ones(2)),
    "temperature holds a value that is not above 0": lambda: token_stats(Z, T, Y, temperature=torch.zeros(3)),
    "temperature has dtype torch.bfloat16, rounded": lambda: token_stats(Z, T, Y, temperature=torch.ones(3).bfloat16()),
}
BAD_HIDDEN = {
    "student_hidden has shape .* expected .*4.* for this head": lambda: linear_token_stats(H[:, :2], W, Y, **ENTROPY),
    "student_hidden has dtype torch.float32; expected the head weight's": lambda: linear_token_stats(H, W.bfloat16(), **ENTROPY),
    "student_hidden has dtype torch.bfloat16; expected the head weight's torch.float64": lambda: linear_token_stats(
        H.bfloat16(), W.double(), **ENTROPY
    ),
    "head is a Linear module; expected a Head or a weight.*Head.from_model": lambda: linear_token_stats(
        H, torch.nn.Linear(4, 5), **ENTROPY
    ),
    "student_hidden is on meta": lambda: linear_token_stats(H.to("meta"), W, **ENTROPY),
    r"head.weight has shape \(5,\); expected \[V, D\]": lambda: linear_token_stats(H, W[:, 0], **ENTROPY),
    "head.weight is empty: shape .* gather the shards": lambda: linear_token_stats(H, W[:0], **ENTROPY),
    "head.bias is torch.float32": lambda: linear_token_stats(H, Head(W, torch.zeros(4)), **ENTROPY),
    "head.valid_vocab is 6; expected 1 to V = 5": lambda: linear_token_stats(H, Head(W, valid_vocab=6), **ENTROPY),
    "head.softcap is -1": lambda: linear_token_stats(H, Head(W, softcap=-1), **ENTROPY),
    "head.group is a str; expected a torch.distributed process group": lambda: linear_token_stats(
        H, Head(W, group="tp"), **ENTROPY
    ),
    "jsd_beta is 1; expected a number between 0 and 1": lambda: token_stats(Z, T, stats=("jsd",), jsd_beta=1),
    r"targets holds 4 .* expected 0 to 3": lambda: linear_token_stats(H, Head(W, valid_vocab=4), Y + 4, H),
    "reverse_kl was asked for without a teacher; expected teacher_hidden": lambda: linear_token_stats(H, W, Y),
    "teacher_hidden has rows": lambda: linear_token_stats(H, W, Y, H[:2]),
    "teacher_head was given without teacher_hidden": lambda: linear_token_stats(H, W, Y, teacher_head=W, **ENTROPY),
    "head.weight is marked tensor_model_parallel: a vocabulary shard without its group": lambda: linear_token_stats(
        H, megatron_shard(), **ENTROPY
    ),
    "targets holds 5 .* a vocabulary shard needs Head": lambda: linear_token_stats(H, W, Y + 5, H),
    "teacher_head has 4 tokens": lambda: linear_token_stats(H, W, Y, H, teacher_head=W[:4]),
    "workspace_bytes is 0": lambda: linear_token_stats(H, W, Y, H, workspace_bytes=0),
}


@pytest.mark.parametrize("match, call", [*BAD_LOGITS.items(), *BAD_HIDDEN.items()], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(match, call):
    with pytest.raises(GearKernelsError, match=match):
        call()


def test_partitioned_and_distributed_weights():
    sharded = torch.nn.Parameter(torch.empty(0))
    sharded.ds_id = 0  # what DeepSpeed's ZeRO-3 leaves on a parameter
    with pytest.raises(GearKernelsError, match="ZeRO-3 holds it partitioned.*FusedHead.adopt"):
        linear_token_stats(H, sharded, **ENTROPY)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import DeviceMesh, distribute_tensor

        with pytest.raises(GearKernelsError, match=r"head.weight is a DTensor.*FusedHead.adopt.*grad_placements"):
            linear_token_stats(H, distribute_tensor(W, DeviceMesh("cpu", [0])), **ENTROPY)
    finally:
        torch.distributed.destroy_process_group()


# --- where the largest logit stands -------------------------------------------------------------------------------------------


def test_the_first_of_equal_logits_is_the_most_likely(backend):
    """Ties across tiles and within one, in halves, where they are common; an ignored row is 0, a broken one NaN."""
    student, teacher, targets = logits_case(3, 6, 9000, torch.bfloat16)
    student[:3, [10, 4000, 8999]] = teacher[:3, [10, 8999]] = 50.0
    student[3], teacher[4, 5], targets[5] = -INF, float("nan"), -100
    targets[:3] = torch.tensor([10, 4000, 8999])
    names = ("top1", "argmax_agreement")
    out = token_stats(student, teacher, targets, stats=names)
    assert out.top1[:3].tolist() == [1, 0, 0] and out.argmax_agreement[:3].tolist() == [1, 1, 1]
    assert out.top1[3].isnan() and out.argmax_agreement[3:5].isnan().all() and not out.argmax_agreement[5]
    assert_values(out, exact(student, teacher, targets, stats=names), names)
    assert not out.top1.requires_grad


# --- logits that are held for the backward --------------------------------------------------------------------------------------


def products_of(call, monkeypatch):
    """What a call returns, and the shapes of all its products, each a whole product's share of [N, D] with the head."""
    made, product = [], tiling.Linear.product
    whole = {}

    def counted(self, a, b, out, add=False):
        whole[self.rows] = self.head.columns * self.student.shape[1] * self.rows
        made.append(a.shape[0] * a.shape[1] * b.shape[1])
        product(self, a, b, out, add)

    monkeypatch.setattr(tiling.Linear, "product", counted)
    found = call()
    monkeypatch.undo()
    return found, sum(made) / max(whole.values())


KEPT = {  # statistics, dtype, bytes beyond the default, what is held, products forward and backward without it and with it
    "few rows of two heads": (("logprobs", "entropy", "reverse_kl"), torch.float32, 1 << 22, "logits", 6, 4),
    "every statistic": (ALL, torch.float32, 1 << 22, "logits", 8, 4),
    "one head": (("logprobs", "entropy"), torch.float32, 1 << 22, "logits", 4, 3),
    "the teacher is only looked at": (("logprobs", "teacher_entropy"), torch.float32, 1 << 22, "logits", 5, 4),
    "the difference": (("logprobs", "entropy", "reverse_kl"), torch.bfloat16, 60_000, "difference", 6, 5),
    "no difference for float32": (("reverse_kl",), torch.float32, 60_000, "", 6, 6),
    "nor for jsd": (("jsd",), torch.bfloat16, 60_000, "", 8, 8),
    "nothing fits": (("reverse_kl",), torch.bfloat16, 20_000, "", 6, 6),
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("kind", ("plain", "all"))
def test_what_workspace_bytes_holds_saves_products(backend, kind, case, monkeypatch):
    if backend == "triton" and case not in ("few rows of two heads", "the difference"):
        return
    names, dtype, beyond, keeps, before, after = KEPT[case]
    options = dict(HEADS[kind])
    student, teacher, weight, bias, targets = hidden_case(1, n=20, bias=options.pop("bias", False), dtype=dtype)
    leaves = [x.requires_grad_() for x in (student, weight, bias) if x is not None]
    head, room = Head(weight, bias, **options), tiling.limits(student.device).workspace
    runs = []
    for workspace, held, count in ((None, "", before), (room + beyond, keeps, after)):
        given = {"stats": names, "temperature": 0.8, "workspace_bytes": workspace}
        plan = ops.plan(linear_call(student, head, targets, teacher, **given))
        assert (plan.keeps, plan.forward + plan.recomputed + plan.gradients) == (held, count)

        def call(given=given):
            out = linear_token_stats(student, head, targets, teacher, **given)
            loss = weighted(out)
            found = torch.autograd.grad(loss, leaves, retain_graph=True)
            again = torch.autograd.grad(loss, leaves)  # what is held is not used up
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            return [*(x for x in out if x is not None), *found]

        found, products = products_of(call, monkeypatch)
        runs.append(found)
        assert products == pytest.approx(plan.forward + 2 * (plan.recomputed + plan.gradients), rel=1e-6)
    rounding = 0 if keeps != "difference" else 2**-7
    for one, other in zip(*runs, strict=True):
        assert (one.double() - other.double()).norm() <= rounding * other.double().norm() or torch.equal(one, other)


def test_a_difference_that_is_held_is_off_by_its_rounding(backend):
    """Against float64: no worse than twice the error of plain torch in bfloat16, here far better; masks stay masks."""
    student, teacher, weight, bias, targets = hidden_case(2, n=20, bias=True, dtype=torch.bfloat16)
    bias[[3, 500]] = -INF
    targets[targets == 3] = 4
    leaves = [x.requires_grad_() for x in (student, weight)]
    names, room = ("reverse_kl",), tiling.limits(student.device).workspace
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(weighted(plain(*doubles, bias, teacher, targets, {}, stats=names)), doubles)
    logits = (torch.nn.functional.linear(x, leaves[1], bias) for x in (student, teacher))
    eager = torch.autograd.grad(weighted(exact(*logits, targets, stats=names)), leaves)
    errors = [[((g.double() - w).norm() / w.norm()).item() for g, w in zip(eager, truth, strict=True)]]
    for workspace in (None, room + 60_000):
        given = {"stats": names, "workspace_bytes": workspace}
        assert linear_call(student, Head(weight, bias), targets, teacher, **given).keeps == ("difference" if workspace else "")
        out = linear_token_stats(student, Head(weight, bias), targets, teacher, **given)
        got = torch.autograd.grad(weighted(out), leaves)
        assert all(x.isfinite().all() for x in got)
        errors.append([((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, truth, strict=True)])
    for plain_torch, anew, held in zip(*errors, strict=True):
        assert held <= 2 * plain_torch and held <= 4 * anew < 0.012, errors


def test_nothing_is_held_without_a_gradient_or_for_a_sparse_backward():
    student, teacher, weight, _, targets = hidden_case(1)
    given = {"workspace_bytes": 1 << 28}
    assert linear_call(student, weight, targets, teacher, **given).keeps == ""
    student.requires_grad_()
    assert linear_call(student, weight, targets, teacher, **given).keeps == "logits"
    assert linear_call(student, weight, targets, teacher, backward="sparse", **given).keeps == ""
    assert linear_call(student, weight, targets, teacher, stats=("teacher_entropy", "top1"), **given).keeps == ""
    with torch.no_grad():
        assert linear_call(student, weight, targets, teacher, **given).keeps == ""
