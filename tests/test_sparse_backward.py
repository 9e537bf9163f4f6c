"""The sparse backward: against float64 truth, against its definition, and against the tolerance that it promises to keep."""

import math
from unittest import mock

import pytest
import torch
from fuzzing import fuzz
from hypothesis import strategies as st

import gear_kernels
from gear_kernels import FusedHead, GearKernelsError, Head, backends, linear_token_stats, ops, sparse
from gear_kernels.losses import distillation_loss
from gear_kernels.records import Tile, TileTask
from gear_kernels.reference import GRADIENT_NAMES, Rows, head_logits
from gear_kernels.reference import sparse as definition
from gear_kernels.reference import stats as reference

BACKENDS = ("reference", "native")
SETS = tuple((name,) for name in GRADIENT_NAMES) + (("logprobs", "entropy"), GRADIENT_NAMES)
ROUNDING = 3e-5  # relative, of float32 gradients of one back end in another order of sums


def make(n=200, vocab=1500, width=16, sure=6.0, seed=0, dtype=torch.float32):
    """Hidden states around three directions, so that a block of rows needs few columns; targets are sampled from each row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight = normal(vocab, width) * sure / math.sqrt(width)
    hidden = normal(3, width)[torch.randint(3, (n,), generator=g)] * 1.5 + 0.1 * normal(n, width)
    teacher = hidden + 0.1 * normal(n, width)
    logits = hidden @ weight.T
    targets = torch.multinomial(torch.softmax(logits, -1), 1, generator=g)[:, 0] if n else torch.zeros(0, dtype=torch.int64)
    return (*(x.to(dtype) for x in (hidden, weight, teacher)), targets)


def backprop(case, stats, *, dtype=None, bias=None, frozen=(), **options):
    """Gradients of hidden states, weight and bias (None where frozen or not there) of a random loss, and the reports."""
    hidden, weight, teacher, targets = case
    dtype = dtype or hidden.dtype
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: x.detach().to(dtype).requires_grad_(name not in frozen) for name, x in leaves.items() if x is not None}
    head = Head(leaves["weight"], leaves.get("bias"), *(options.pop(name, None) for name in ("softcap", "scale", "valid_vocab")))
    weights = torch.randn((len(hidden), len(stats)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    used = teacher.to(dtype) if reference.needs_teacher(stats) else None
    with sparse.reports() as reports:
        out = linear_token_stats(leaves["hidden"], head, targets, used, stats=stats, **options)
        loss = 0
        for i, name in enumerate(stats):
            value = getattr(out, name)
            loss = loss + (torch.where(value.isfinite(), value, 0).double() * weights[:, i]).sum()
        loss.backward()
    return [x.grad for x in leaves.values()], reports


def distances(got, want):
    """Relative errors in the Frobenius norm; 0 where both are 0."""
    pairs = [(g.double(), w.double()) for g, w in zip(got, want, strict=True) if w is not None]
    return [0.0 if torch.equal(g, w) else ((g - w).norm() / w.norm()).item() for g, w in pairs]


def assert_kept(got, want, reports, tolerance, rounding=ROUNDING):
    (report,) = reports
    assert 0 <= report.bound <= tolerance
    assert max(distances(got, want), default=0) <= report.bound + rounding
    return report


# --- truth --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stats", SETS, ids="+".join)
def test_truth(backend, stats):
    case = make()
    want, _ = backprop(case, stats, dtype=torch.float64)
    for tolerance in (1e-2, 1e-3):
        with gear_kernels.backend(backend):
            got, reports = backprop(case, stats, backward="sparse", backward_tolerance=tolerance)
            exact, _ = backprop(case, stats)
        report = assert_kept(got, want, reports, tolerance, ROUNDING + 2 * max(distances(exact, want)))
        assert report.tries and report.bound > 0 and report.kept < 0.5  # it was sparse


def test_a_back_end_that_applies_the_head_itself():
    """The triton back end, in its interpreter: bias, scale and softcap are left to it, and notes are taken of what it sees."""
    case, bias = make(30, 260, 6), torch.linspace(-1, 1, 260)
    for options in ({"scale": 1.2}, {"scale": 1.2, "softcap": 25.0}):
        want, _ = backprop(case, ("logprobs", "reverse_kl"), bias=bias, dtype=torch.float64, **options)
        with gear_kernels.backend("triton"):
            got, reports = backprop(
                case, ("logprobs", "reverse_kl"), bias=bias, backward="sparse", backward_tolerance=0.05, **options
            )
        assert assert_kept(got, want, reports, 0.05).kept < 0.5


def test_bfloat16_adds_no_error_of_its_own():
    case = make(dtype=torch.bfloat16)
    want, _ = backprop(case, ("logprobs", "reverse_kl"), dtype=torch.float64)
    for backend in BACKENDS:
        with gear_kernels.backend(backend):
            exact, _ = backprop(case, ("logprobs", "reverse_kl"))
            got, (report,) = backprop(case, ("logprobs", "reverse_kl"), backward="sparse")
        assert 0 < report.kept < 0.5 and report.bound <= sparse.TOLERANCE
        assert all(g.dtype == torch.bfloat16 for g in got)
        for mine, plain in zip(distances(got, want), distances(exact, want), strict=True):
            assert mine <= 1.1 * plain + report.bound


def test_the_tail_takes_most_of_the_error_away():
    """Without it the left-out mass, all of one sign, pulls the hidden states' gradient to one side."""
    hidden, weight, *rest = make(sure=4.0)
    case = (hidden, weight + 2, *rest)  # embeddings of a language model have a mean, too; the logits of a row are moved alike
    want, _ = backprop(case, ("logprobs",), dtype=torch.float64)
    got, (report,) = backprop(case, ("logprobs",), dtype=torch.float64, backward="sparse", backward_tolerance=0.05)
    with mock.patch.object(sparse.SparseBackward, "_mean_embeddings", lambda self, left: torch.zeros(len(left), 16).double()):
        plain, (other,) = backprop(case, ("logprobs",), dtype=torch.float64, backward="sparse", backward_tolerance=0.05)
    assert report.kept == other.kept < 0.5
    assert distances(got, want)[0] < 0.2 * distances(plain, want)[0]
    assert distances(got, want)[1] == distances(plain, want)[1] <= report.bound


# --- definition ---------------------------------------------------------------------------------------------------------------


def by_definition(case, stats, budget):
    """The definition's gradients in float64, and what a SparseBackward of the same rows is made of."""
    hidden, weight, teacher, targets = (x.double() if x.is_floating_point() else x for x in case)
    rows = Rows(targets, torch.full((len(hidden),), 1 / 0.8, dtype=torch.float64), -100)
    student, other = head_logits(hidden, weight), head_logits(teacher, weight) if reference.needs_teacher(stats) else None
    task = TileTask(rows, stats, 0.3)
    tiles = backends.BACKENDS["reference"]
    sums = torch.zeros((1, len(hidden), len(reference.SUM_NAMES)), dtype=torch.float64)
    tiles.sweep(Tile(student), None if other is None else Tile(other), task, sums)
    values, state = tiles.finish(sums, task)
    if "jsd" in stats:
        shares = torch.zeros((1, len(hidden), 2), dtype=torch.float64)
        tiles.mixture(Tile(student), Tile(other), task, state, shares)
        state[:, reference.STATE_NAMES.index("mixture_kl")] = shares[0, :, 0]
    named = dict(zip(reference.STATE_NAMES, state.unbind(-1), strict=True))
    table = torch.randn((len(hidden), len(values)), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = {name: table[:, reference.STAT_NAMES.index(name)] for name in stats}
    found = definition.sparse_gradient(hidden, weight, student, other, rows, named, grads, 0.3, budget)
    return found, (hidden, weight, teacher, targets, rows, student, other, named, state, table)


@pytest.mark.parametrize("stats", SETS, ids="+".join)
def test_products_equal_the_definition(stats):
    """Column by column products, with the left-out sums from the kept ones, against dz that is all there."""
    want, (hidden, weight, teacher, targets, rows, student, other, named, state, table) = by_definition(make(), stats, 0.3)
    norms = [named[a] * rows.inv_temperature + named[b] for a, b in (("max", "log_z"), ("teacher_max", "teacher_log_z"))]
    noted = definition.importance(student, other, rows, *norms, stats)
    noted = torch.stack([part.sum(0) for part in noted.split(definition.ROWS)])
    used = teacher if reference.needs_teacher(stats) else None
    call = ops.LinearCall(hidden, weight, None, used, None, None, targets, rows.inv_temperature, stats, "reference", 1 << 16)
    call = call._replace(jsd_beta=0.3)
    body = sparse.SparseBackward(ops.tiled(call), state, table, (True, True, False), noted, 0.1)
    got, bound = body._attempt(want.kept)
    assert 0 < want.kept.double().mean() < 0.5 and bound > 0
    torch.testing.assert_close(got[0], want.hidden, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], want.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stats", SETS, ids="+".join)
def test_definition_with_no_budget_is_exact(stats):
    found, (hidden, weight, teacher, targets, rows, *_, table) = by_definition(make(40, 90, 5), stats, 0.0)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    used = head_logits(teacher, weight.detach()) if reference.needs_teacher(stats) else None
    out = reference.token_stats(head_logits(*leaves), used, rows, stats, 0.3)
    sum((out[name] * table[:, reference.STAT_NAMES.index(name)]).sum() for name in stats).backward()
    torch.testing.assert_close(found.hidden, hidden.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.weight, weight.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("stats", SETS, ids="+".join)
def test_gradcheck(stats):
    """At a tolerance of next to nothing the operator passes torch's own check by finite differences."""
    hidden, weight, teacher, targets = make(5, 40, 3, dtype=torch.float64)
    used = {"teacher_hidden": teacher, "teacher_head": weight.clone()} if reference.needs_teacher(stats) else {}

    def values(h, w):
        out = linear_token_stats(h, w, targets, **used, stats=stats, backward="sparse", backward_tolerance=1e-9)
        return tuple(getattr(out, name) for name in stats)

    assert torch.autograd.gradcheck(values, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("stats", SETS, ids="+".join)
def test_importance_bounds_dz(stats):
    """|dz| <= plain u + entropy p |log p| but at the target, also with norms that fall short; sums to 0 over the vocabulary, that
    of logsumexp to its row gradient.
    """
    _, (*_, rows, student, other, named, _, table) = by_definition(make(30, 200, 6), stats, 0.0)
    grads = {name: table[:, reference.STAT_NAMES.index(name)] for name in stats}
    dz = reference.gradient(student, other, rows, named, grads, 0, 0.3)
    total = (
        torch.where(rows.keep(), grads["logsumexp"] * rows.inv_temperature, 0)
        if "logsumexp" in grads
        else torch.zeros(30).double()
    )
    torch.testing.assert_close(dz.sum(-1), total, atol=1e-12, rtol=0)
    if "logprobs" in stats:
        dz[torch.arange(30), rows.targets] = 0
    factor = definition.row_factor(rows, named, grads, 0.3)
    p = torch.softmax(student * rows.inv_temperature[:, None], -1)
    short = torch.rand(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4
    norm, teacher_norm = (
        named[a] * rows.inv_temperature + named[b] for a, b in (("max", "log_z"), ("teacher_max", "teacher_log_z"))
    )
    for by in (torch.zeros(30).double(), short):
        u = definition.importance(student, other, rows, norm - by, teacher_norm - by, stats)
        u = u * definition.note_factor(stats, by)[:, None]
        assert (dz.abs() <= factor.plain[:, None] * u + factor.entropy[:, None] * p * p.log().abs() + 1e-15).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("compiled", ["native", "triton"])
def test_compiled_notes_equal_the_definition(compiled, dtype, teacher):
    """Ignored rows, -inf, a tile that begins within a block, ragged columns, every instruction set's own lanes."""
    g = torch.Generator().manual_seed(0)
    n, columns, first_row = 150, 2100, 100
    z, t = (torch.randn(n, columns, generator=g).mul(3).to(dtype) for _ in range(2))
    z[3, :50] = t[3, 20:70] = z[:, 7] = -math.inf
    targets = torch.where(torch.rand(n, generator=g) < 0.1, -100, 0)
    z[targets == -100] = math.nan
    rows = Rows(targets, 0.5 + torch.rand(n, generator=g), -100)
    norms = [(x.float() * rows.inv_temperature[:, None]).nan_to_num(0, neginf=-math.inf).logsumexp(-1) for x in (z, t)]
    task = TileTask(rows, ("logprobs", "reverse_kl") if teacher else ("logprobs",), 0.5)
    found = []
    for backend in ("reference", compiled):
        noted = torch.zeros(2, columns)
        pair = (Tile(z), Tile(t) if teacher else None)
        backends.BACKENDS[backend].note(*pair, task, (norms[0], norms[1] if teacher else None), first_row, noted)
        found.append(noted)
    assert found[0].isfinite().all() and (found[0].sum(1) > 1).all()
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("stats", [("logprobs", "reverse_kl"), ("entropy",), ("forward_kl",)], ids="+".join)
def test_the_note_kernel_finishes_raw_logits(stats):
    """Bias, scale and softcap, fewer rows than it takes at a time, strided columns, memory that holds notes already."""
    g = torch.Generator().manual_seed(1)
    z, t = (torch.randn(5, 600, generator=g)[:, ::2] for _ in range(2))
    bias = torch.randn(300, generator=g)
    pair = [Tile(x, bias, 1.3, 4.0) for x in (z, t)]
    rows = Rows(None, 0.5 + torch.rand(5, generator=g), -100)
    norms = [(backends.finished(tile) * rows.inv_temperature[:, None]).logsumexp(-1) for tile in pair]
    if not reference.needs_teacher(stats):
        pair[1] = norms[1] = None
    found = []
    for backend in ("reference", "triton"):
        noted = torch.ones(1, 400)[:, 50:350]
        backends.BACKENDS[backend].note(*pair, TileTask(rows, stats), norms, 0, noted)
        found.append(noted)
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-9)
    assert (found[0] > 1).all()


# --- the tolerance ------------------------------------------------------------------------------------------------------------


def test_tolerance_on_a_thousand_draws():
    """Errors against the exact backward of the same back end never pass the bound reported, nor that the tolerance."""
    g, sparse_ones = torch.Generator().manual_seed(5), 0
    for draw in range(1000):
        n, vocab = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 40), (60, 400)))
        stats = SETS[draw % len(SETS)]
        case = make(n, vocab, 6, sure=3 + 9 * torch.rand((), generator=g).item(), seed=draw)
        tolerance = 10 ** (-1 - 2 * torch.rand((), generator=g).item())
        want, _ = backprop(case, stats)
        got, reports = backprop(case, stats, backward="sparse", backward_tolerance=tolerance)
        report = assert_kept(got, want, reports, tolerance, 2e-4)  # short gradients of rows that are sure round by as much
        sparse_ones += report.kept < 1
    assert sparse_ones > 300


CASES = st.fixed_dictionaries(
    {
        "n": st.integers(0, 300),
        "vocab": st.integers(1, 500),
        "width": st.integers(1, 9),
        "sure": st.floats(0.1, 15),
        "seed": st.integers(0, 10**6),
        "stats": st.sampled_from(SETS),
        "tolerance": st.sampled_from((0.3, 0.05, 1e-3, 1e-6)),
        "bias": st.booleans(),
        "masked": st.booleans(),
        "ignored": st.booleans(),
        "per_token": st.booleans(),
        "softcap": st.sampled_from((None, 5.0)),
        "scale": st.sampled_from((None, -0.7, 1.5)),
        "workspace": st.sampled_from((None, 3000, 10**5)),
        "frozen": st.sampled_from(((), ("weight",), ("hidden",))),
    }
)


def test_fuzz():
    """In float64, where rounding hides nothing."""

    def check(drawn):
        case = make(drawn["n"], drawn["vocab"], drawn["width"], drawn["sure"], drawn["seed"], torch.float64)
        g, (n, vocab) = torch.Generator().manual_seed(drawn["seed"]), (drawn["n"], drawn["vocab"])
        bias = torch.randn(vocab, generator=g, dtype=torch.float64) if drawn["bias"] or drawn["masked"] else None
        hidden, weight, teacher, targets = case
        if drawn["masked"]:
            bias[torch.randperm(vocab, generator=g)[: vocab // 3]] = -math.inf
        if drawn["ignored"]:
            targets = torch.where(torch.rand(n, generator=g) < 0.3, 0, targets)
        temperature = 0.3 + torch.rand(n, generator=g, dtype=torch.float64) if drawn["per_token"] else 0.9
        options = {name: drawn[name] for name in ("softcap", "scale", "frozen")}
        options |= {"bias": bias, "temperature": temperature, "workspace_bytes": drawn["workspace"], "jsd_beta": 0.3}
        options |= {"ignore_index": 0} if drawn["ignored"] else {}
        if bias is not None and drawn["softcap"] is not None:
            bias = options["bias"] = bias.clamp_min(-50)  # a softcap lifts -inf
        case = (hidden, weight, teacher, targets)
        want, _ = backprop(case, drawn["stats"], **options)
        got, reports = backprop(case, drawn["stats"], backward="sparse", backward_tolerance=drawn["tolerance"], **options)
        if any(w is not None and w.isnan().any() for w in want):
            assert all(torch.equal(g.isnan(), w.isnan()) for g, w in zip(got, want, strict=True) if w is not None)
            return
        assert [g is None for g in got] == [w is None for w in want]
        if not n:
            assert not reports and distances(got, want) in ([], [0.0], [0.0] * 2, [0.0] * 3)
            return
        assert_kept(got, want, reports, drawn["tolerance"], 1e-6)

    fuzz(check, CASES, 400)


# --- special distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_distributions_get_the_exact_backward(backend):
    case = make(sure=0.1)
    with gear_kernels.backend(backend):
        got, (report,) = backprop(case, ("logprobs", "entropy"), backward="sparse")
        want, none = backprop(case, ("logprobs", "entropy"))
    assert report == sparse.Report(0.0, 1.0, 0) and not none
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sure", [20.0, 200.0])
def test_peaked(backend, sure):
    case = make(sure=sure)
    with gear_kernels.backend(backend):
        want, _ = backprop(case, ("logprobs",))
        got, reports = backprop(case, ("logprobs",), backward="sparse")
    assert assert_kept(got, want, reports, sparse.TOLERANCE, 1e-3).kept < 0.1 or distances(got, want) == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary(backend):
    """Columns at -inf are left out at no cost, a target there passes nothing, and a block's first columns may all be masked."""
    case = make()
    bias = torch.zeros(1500)
    bias[:700] = -math.inf
    with gear_kernels.backend(backend):
        want, _ = backprop(case, GRADIENT_NAMES, bias=bias)
        got, reports = backprop(case, GRADIENT_NAMES, bias=bias, backward="sparse", backward_tolerance=1e-2)
    report = assert_kept(got, want, reports, 1e-2)
    assert report.kept < 0.5 and all(g.isfinite().all() for g in got) and not got[2][:700].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_token_vocabulary_and_no_rows(backend):
    with gear_kernels.backend(backend):
        for n, vocab in ((7, 1), (0, 30), (0, 1)):
            got, _ = backprop(make(n, vocab, 4), ("logprobs", "entropy"), backward="sparse")
            assert [g.shape for g in got] == [(n, 4), (vocab, 4)]
            assert all(not g.any() for g in got)


def test_valid_vocab_softcap_and_scale():
    case = make(vocab=1000)
    case = (*case[:3], case[3].clamp_max(899))
    options = {"valid_vocab": 900, "softcap": 20.0, "scale": 1.3}
    for backend in BACKENDS:
        with gear_kernels.backend(backend):
            want, _ = backprop(case, ("logprobs", "forward_kl"), **options)
            got, reports = backprop(case, ("logprobs", "forward_kl"), backward="sparse", backward_tolerance=0.02, **options)
        assert assert_kept(got, want, reports, 0.02).kept < 0.5
        assert not got[1][900:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_ignored_rows(backend):
    hidden, weight, teacher, targets = make(300)
    ignored = torch.arange(300) % 3 == 0
    hidden = torch.where(ignored[:, None], math.nan, hidden)
    case = (hidden, weight, teacher, targets.masked_fill(ignored, -100))
    with gear_kernels.backend(backend):
        want, _ = backprop(case, ("logprobs",))
        got, reports = backprop(case, ("logprobs",), backward="sparse")
        assert assert_kept(got, want, reports, sparse.TOLERANCE).kept < 0.5
        assert not got[0][ignored].any()
        case[0][1] = math.nan  # a row that counts
        want, _ = backprop(case, ("logprobs",))
        got, (report,) = backprop(case, ("logprobs",), backward="sparse")
    assert report.kept == 1.0
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


# --- shapes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 127, 128, 129, 257])
def test_rows_around_a_block(n):
    case = make(n)
    want, _ = backprop(case, ("logprobs", "reverse_kl"))
    got, reports = backprop(case, ("logprobs", "reverse_kl"), backward="sparse")
    assert assert_kept(got, want, reports, sparse.TOLERANCE).kept < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_changes_nothing_but_rounding(dtype):
    case, stats = make(300, dtype=dtype), ("logprobs", "reverse_kl")
    want, _ = backprop(case, stats, backward="sparse", backward_tolerance=0.01)
    for workspace in (2000, 40_000, 400_000):
        got, (report,) = backprop(case, stats, backward="sparse", backward_tolerance=0.01, workspace_bytes=workspace)
        assert 0 < report.kept < 0.5
        assert max(distances(got, want)) < (2e-2 if dtype == torch.float32 else 3e-2)  # a choice of columns may differ


def test_repeats_are_bitwise_equal_on_any_number_of_threads():
    case, threads = make(300), torch.get_num_threads()
    want, _ = backprop(case, ("logprobs", "entropy"), backward="sparse")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            got, _ = backprop(case, ("logprobs", "entropy"), backward="sparse")
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_frozen_parts_cost_nothing():
    case = make()
    whole, _ = backprop(case, ("logprobs",), backward="sparse")
    (hidden, weight), (report,) = backprop(case, ("logprobs",), frozen=("weight",), backward="sparse")
    assert weight is None and report.kept < 0.5 and distances([hidden], whole[:1])[0] < 2 * sparse.TOLERANCE
    (hidden, weight), (report,) = backprop(case, ("logprobs",), frozen=("hidden",), backward="sparse")
    assert hidden is None and report.kept < 0.5 and distances([weight], whole[1:])[0] < 2 * sparse.TOLERANCE


def test_two_heads():
    hidden, weight, _, targets = make()
    other = torch.randn(200, 5, generator=torch.Generator().manual_seed(7)) * 2
    own = torch.randn(1500, 5, generator=torch.Generator().manual_seed(8)) * 3
    for backend in BACKENDS:
        grads = []
        for options in ({}, {"backward": "sparse", "backward_tolerance": 0.05}):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            with gear_kernels.backend(backend), sparse.reports() as reports:
                out = linear_token_stats(leaves[0], leaves[1], targets, other, teacher_head=own, stats=("forward_kl",), **options)
                out.forward_kl.sum().backward()
            grads.append([x.grad for x in leaves])
        assert_kept(grads[1], grads[0], reports, 0.05)


# --- ways in ------------------------------------------------------------------------------------------------------------------


def test_exact_is_the_default_and_notes_nothing():
    case = make(20, 100)
    hidden, weight, _, targets = case
    default, reports = backprop(case, ("logprobs",))
    exact, _ = backprop(case, ("logprobs",), backward="exact")
    assert not reports and all(torch.equal(a, b) for a, b in zip(default, exact, strict=True))
    inverse = torch.ones(20)
    call = ops.LinearCall(hidden, weight, None, None, None, None, targets, inverse, ("logprobs",), "native", 1 << 20)
    assert ops.linear_token_stats(*call)[2].shape == (0, 0)
    assert ops.linear_token_stats(*call._replace(tolerance=0.01))[2].shape == (1, 100)
    with torch.no_grad(), mock.patch.object(sparse, "Notes", side_effect=AssertionError):
        linear_token_stats(hidden, weight.requires_grad_(), targets, stats=("logprobs",), backward="sparse")


def test_values_are_those_of_the_exact_call():
    hidden, weight, teacher, targets = make()
    hidden.requires_grad_()
    plain = linear_token_stats(hidden, weight, targets, teacher, stats=reference.STAT_NAMES)
    noted = linear_token_stats(hidden, weight, targets, teacher, stats=reference.STAT_NAMES, backward="sparse")
    assert all(torch.equal(a, b) for a, b in zip(plain, noted, strict=True))


def test_module_and_distillation():
    hidden, weight, teacher, targets = make()
    head = FusedHead(16, 1500, bias=False)
    head.weight.data.copy_(weight)
    with sparse.reports() as reports:
        head(hidden, targets, stats=("logprobs",), backward="sparse").logprobs.sum().backward()
        given = {"beta": 0.5, "backward": "sparse", "backward_tolerance": 0.02}
        distillation_loss(hidden, head, teacher, torch.ones(200), **given)[0].backward()
        distillation_loss(hidden, weight.requires_grad_(), teacher, torch.ones(200), **given)[0].backward()
    assert [report.kept < 0.5 for report in reports] == [True] * 3


def test_compiles_whole():
    hidden, weight, _, targets = make(60, 300, 5)

    def loss(h, w):
        return linear_token_stats(h, w, targets, stats=("logprobs",), backward="sparse", backward_tolerance=0.05).logprobs.sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        run(*leaves).backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backward": "spares"}, "backward: given 'spares'; expected one of exact, sparse"),
        ({"backward": "sparse", "backward_tolerance": 0.0}, "backward_tolerance: given 0.0"),
        ({"backward": "sparse", "backward_tolerance": 1.0}, "between 0 and 1"),
        ({"backward": "sparse", "backward_tolerance": math.nan}, "backward_tolerance: given nan"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(GearKernelsError, match=text):
        backprop(make(3, 10, 2), ("logprobs",), **options)


def test_vocabulary_shards_are_refused(tmp_path):
    hidden, weight, _, targets = make(3, 10, 2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = Head(weight.requires_grad_(), group=torch.distributed.group.WORLD)
        with pytest.raises(GearKernelsError, match='backward="sparse" with a vocabulary shard'):
            linear_token_stats(hidden, head, targets, stats=("logprobs",), backward="sparse")
    finally:
        torch.distributed.destroy_process_group()
