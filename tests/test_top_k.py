"""linear_token_logprobs and the divergences over K tokens and a bucket, every back end of this machine against float64 logits."""

import pytest
import torch

import gear_kernels
from gear_kernels import GearKernelsError, Head, backends, linear_token_stats, reference, tiling
from gear_kernels.reference import top_k as definition
from gear_kernels.top_k import TokenLogprobs, linear_token_logprobs, top_k_divergences

BACKENDS = sorted(backends.BACKENDS)
HEADS = {"plain": {}, "all": {"bias": True, "softcap": 6.0, "scale": -1.7, "valid_vocab": 280}}
INF = float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with gear_kernels.backend(request.param):
        yield request.param


def make(seed=0, n=9, width=8, vocab=301, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, width, generator=g), torch.randn(vocab, width, generator=g) * 0.7
    bias, temperature = torch.randn(vocab, generator=g), 0.5 + torch.rand(n, generator=g)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), temperature


def distinct(n, k, vocab, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(n)]) if n else torch.zeros(0, k, dtype=torch.int64)


def exact(leaves, tokens, temperature, mask=None, **options):
    """Log-probs and rest of float64 logits that are all there."""
    hidden, weight, bias = (x if x is None else x.double() for x in leaves)
    logits = reference.head_logits(hidden, weight, bias, **options)
    n = len(hidden)
    targets = torch.zeros(n, dtype=torch.int64) if mask is None else torch.where(mask, 0, -100)
    inverse = (1.0 / torch.as_tensor(temperature)).double().expand(n)
    return TokenLogprobs(tokens, *definition.token_logprobs(logits, tokens, reference.Rows(targets, inverse, -100)))


def gradients(found, leaves, seed=2):
    g = torch.Generator().manual_seed(seed)
    total = 0
    for value in found[1:]:
        sent = torch.randn(value.shape, generator=g).to(torch.float64)
        total = total + (torch.where(value.isfinite(), value, 0).double() * sent).sum()
    return torch.autograd.grad(total, [x for x in leaves if x is not None])


def assert_close(got, want, rounding=4e-6):
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= rounding * w.norm() + 1e-12, (g.double() - w).norm() / w.norm()


@pytest.mark.parametrize("own", (True, False), ids=("the most likely", "given tokens"))
@pytest.mark.parametrize("workspace", (30_000, None))
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients(backend, kind, workspace, own):
    options = dict(HEADS[kind])
    hidden, weight, bias, temperature = make()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    leaves[2] = leaves[2] if options.pop("bias", False) else None
    mask = torch.arange(9) != 4
    tokens = 6 if own else distinct(9, 6, 280)
    given = {"mask": mask, "temperature": temperature, "workspace_bytes": workspace}
    got = linear_token_logprobs(hidden, Head(weight, leaves[2], **options), tokens, **given)
    doubles = [x if x is None else x.detach().double().requires_grad_() for x in leaves]
    want = exact(doubles, got.tokens, temperature, mask, **options)
    for value, true in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(value.double(), true, rtol=5e-7, atol=8e-6)
        assert not value[4].any()
    if own:
        logits = reference.head_logits(*doubles, **options)
        assert torch.equal(got.tokens[mask], logits[mask].topk(6).indices) and (got.tokens[4] == -1).all()
    else:
        assert torch.equal(got.tokens[mask], tokens[mask])
    assert_close(gradients(got, leaves), gradients(want, doubles))


@pytest.mark.parametrize("name", ("logprobs", "rest"))
def test_gradcheck_in_float64(name):
    hidden, weight, _, temperature = make(n=3, width=4, vocab=11, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    tokens = distinct(3, 4, 11)
    tokens[0, 2] = -1

    def value(h, w):
        found = getattr(linear_token_logprobs(h, w, tokens, temperature=temperature.double()), name)
        return torch.where(found.isfinite(), found, 0)

    assert torch.autograd.gradcheck(value, leaves)


def test_masked_tokens_and_small_vocabularies(backend):
    """A -inf bias masks: such a token has log-prob -inf, is never among the most likely, and passes no gradient."""
    hidden, weight, bias, _ = make(vocab=7)
    bias[[0, 2, 3, 5, 6]] = -INF
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    most = linear_token_logprobs(hidden, Head(weight, bias), 4)
    assert set(most.tokens.flatten().tolist()) == {1, 4, -1} and (most.tokens[:, 2:] == -1).all()
    assert (most.rest == -INF).all() and (most.logprobs[:, 2:] == -INF).all()
    given = linear_token_logprobs(hidden, Head(weight, bias), torch.tensor([[1, 0]]).expand(9, 2))
    assert (given.logprobs[:, 1] == -INF).all() and given.rest.isfinite().all()
    for found in (most, given):
        torch.testing.assert_close(found.buckets.exp().sum(-1), torch.ones(9))
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        got, want = gradients(found, leaves), gradients(exact(doubles, found.tokens, 1.0), doubles)
        assert all(x.isfinite().all() for x in got)
        assert_close([x[: len(hidden)] for x in got[:1]], want[:1])
    one = linear_token_logprobs(hidden, weight[:1], 1)
    assert not one.logprobs.any() and (one.rest == -INF).all() and not one.tokens.any()
    none = linear_token_logprobs(hidden[:0], weight, 3)
    assert none.tokens.shape == (0, 3) and none.rest.shape == (0,)


def test_all_of_the_vocabulary_leaves_no_rest(backend):
    hidden, weight, _, _ = make(vocab=5)
    found = linear_token_logprobs(hidden, weight, 5)
    torch.testing.assert_close(found.logprobs.exp().sum(-1), torch.ones(9))
    assert (found.rest == -INF).all()
    both = linear_token_logprobs(hidden + 0.1, weight, found.tokens)
    full = linear_token_stats(hidden, weight, None, hidden + 0.1, stats=("reverse_kl", "forward_kl"))
    for bucketed, whole in zip(top_k_divergences(found, both), (full.reverse_kl, full.forward_kl), strict=True):
        torch.testing.assert_close(bucketed, whole, rtol=1e-5, atol=2e-6)


def test_a_rest_that_is_tiny_keeps_its_gradient(backend):
    """The student leaves e^-60 for what the teacher gives a half: p_v / r is formed without r."""
    weight = torch.eye(6) * 60.0
    weight[3:] -= 1.0
    hidden = torch.eye(6)[:2].requires_grad_()
    tokens = torch.tensor([[0, 1], [1, 0]])
    student = linear_token_logprobs(hidden, weight, tokens)
    teacher = TokenLogprobs(tokens, torch.tensor([[-1.0, -2.0], [-2.0, -1.0]]), torch.log1p(-torch.tensor([0.5032, 0.5032])))
    double = hidden.detach().double().requires_grad_()
    want = exact((double, weight, None), tokens, 1.0)
    assert student.rest.max() < -55
    for kl, true in zip(
        top_k_divergences(student, teacher),
        top_k_divergences(want, TokenLogprobs(tokens, *(x.double() for x in teacher[1:]))),
        strict=True,
    ):
        torch.testing.assert_close(kl.double(), true, rtol=1e-6, atol=1e-6)
        got, expected = (torch.autograd.grad(x.sum(), y, retain_graph=True)[0] for x, y in ((kl, hidden), (true, double)))
        assert_close([got], [expected], 2e-6)


def test_divergences_are_those_of_the_buckets_and_at_most_the_whole(backend):
    """SDPO's: both heads on the student's most likely tokens, and what they leave. Its own code cuts log sum p at -1e-7."""
    hidden, weight, _, _ = make(3, n=30)
    teacher = hidden + 0.4 * make(4, n=30)[0]
    hidden.requires_grad_()
    student = linear_token_logprobs(hidden, weight, 20)
    taught = linear_token_logprobs(teacher, weight, student.tokens)
    found = top_k_divergences(student, taught)
    logs = [(x.double() @ weight.double().T).log_softmax(-1).gather(1, student.tokens) for x in (hidden, teacher)]
    p, q = (torch.cat([x, torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))], -1) for x in logs)
    want = ((p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1))
    full = linear_token_stats(hidden, weight, None, teacher, stats=("reverse_kl", "forward_kl"))
    for got, true, whole in zip(found, want, (full.reverse_kl, full.forward_kl), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=5e-6, atol=4e-6)
        assert (got <= whole + 2e-6).all() and got.mean() < whole.mean()
        one, other = (torch.autograd.grad(x.double().sum(), hidden, retain_graph=True)[0] for x in (got, true))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_support_mismatch_is_infinite_and_passes_no_gradient():
    log_p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    log_q = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]).log()
    value = definition.divergence(log_p, log_q)
    assert value.tolist() == [INF, pytest.approx(0.693147)]
    value[1].backward()
    assert log_p.grad.isfinite().all() and not log_p.grad[0].any()
    value = definition.divergence(log_q, log_p)
    assert value[1] == INF and value[0].item() == pytest.approx(0.693147)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_hidden_states(backend, dtype):
    hidden, weight, _, _ = make(dtype=dtype, n=40)
    tokens = distinct(40, 5, 301)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    got = linear_token_logprobs(hidden, weight, tokens)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want = exact((*doubles, None), tokens, 1.0)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=5e-7, atol=8e-6)
    scaled = [TokenLogprobs(x.tokens, x.logprobs * 1e-3, x.rest * 1e-3) for x in (got, want)]
    assert_close(gradients(scaled[0], leaves), gradients(scaled[1], doubles), 2.0 ** (-8 if dtype == torch.bfloat16 else -10))


def test_repeats_are_bitwise_equal_and_tiles_stay_within_the_workspace(backend, monkeypatch):
    hidden, weight, _, _ = make(n=40, vocab=900)
    calls, built = [], tiling.Linear.__post_init__
    monkeypatch.setattr(tiling.Linear, "__post_init__", lambda self: (built(self), calls.append(self))[0])
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        found = linear_token_logprobs(*leaves, 7, workspace_bytes=60_000)
        runs.append([*found, *gradients(found, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len(calls) == 4
    for call in calls:
        assert 0 < sum(x.nbytes for x in call.scratch.values()) <= 60_000 < 40 * 900 * 4, call.scratch.keys()


def test_compiles_whole_and_leading_dimensions():
    hidden, weight, _, _ = make(n=6)
    torch._dynamo.reset()

    def loss(h, w):
        found = linear_token_logprobs(h, w, 4)
        return (found.logprobs * found.logprobs.detach().exp()).sum() + found.rest.sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden.view(2, 3, 8), weight)]
        run(*leaves).backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert linear_token_logprobs(hidden.view(2, 3, 8), weight, 4).logprobs.shape == (2, 3, 4)


H, W = torch.zeros(3, 4), torch.zeros(5, 4)
BAD = {
    "tokens is 6; expected 1 to 5": lambda: linear_token_logprobs(H, W, 6),
    "tokens is 0; expected 1 to 5": lambda: linear_token_logprobs(H, W, 0),
    "tokens is a list": lambda: linear_token_logprobs(H, W, [1]),
    r"tokens is torch.int64 \(3,\); expected int64 \(3, 'K'\)": lambda: linear_token_logprobs(H, W, torch.zeros(3).long()),
    "tokens is on meta": lambda: linear_token_logprobs(H, W, torch.zeros(3, 2).long().to("meta")),
    "ids out of range; expected 0 to 4": lambda: linear_token_logprobs(H, W, torch.full((3, 1), 5)),
    "an id twice in a row": lambda: linear_token_logprobs(H, W, torch.ones(3, 2).long()),
    r"mask is torch.float32 \(3,\); expected bool": lambda: linear_token_logprobs(H, W, 1, mask=torch.ones(3)),
    "student_hidden has shape": lambda: linear_token_logprobs(H[:, :2], W, 1),
    "the same tokens": lambda: top_k_divergences(linear_token_logprobs(H, W, 1), linear_token_logprobs(H, W, 2)),
    "have other tokens": lambda: top_k_divergences(
        *(linear_token_logprobs(H, W, torch.full((3, 1), i)) for i in (0, 1))
    ),
}  # fmt: skip


@pytest.mark.parametrize("match", BAD)
def test_bad_input(match):
    with pytest.raises(GearKernelsError, match=match):
        BAD[match]()
