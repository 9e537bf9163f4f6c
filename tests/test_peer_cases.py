"""The cases of peers' own test suites, described anew and run by this package's operators against float64: no peer is needed.

Shapes, options, dtypes, tolerances and rules of comparison are the peers' (small and ragged shapes as they are, large ones scaled
down); truth is plain torch in float64. docs/operators.md has the table of what passes and what is not offered.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gear_kernels import Head, linear_token_stats
from gear_kernels.losses import divergence_stat, policy_gradient_loss, reference_kl_loss

PAGE = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()
HALVES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Case:
    peer: str
    options: dict

    def __str__(self):
        return self.peer + ": " + ", ".join(f"{k}={HALVES.get(v, v)}" for k, v in self.options.items())


def cases(peer, **options):
    """Every combination, as the peer's own parametrisation."""
    return [Case(peer, dict(zip(options, values, strict=True))) for values in itertools.product(*options.values())]


def covering(peer, count, **options):
    """So many combinations drawn out of every one: the peer's product is larger."""
    g = torch.Generator().manual_seed(0)
    every = list(itertools.product(*options.values()))
    chosen = torch.randperm(len(every), generator=g)[:count].sort().values
    return [Case(peer, dict(zip(options, every[i], strict=True))) for i in chosen]


LIGER_SHAPES = ((2, 4, 32, 512), (3, 47, 31, 123))  # B, T, H, V
LIGER_TOLERANCES = {torch.float32: (1e-5, 5e-4), torch.bfloat16: (5e-3, 5e-2)}  # atol, rtol
CCE_SHAPES = ((256, 512, 128), (252, 507, 128), (252, 507, 123))  # N, V, D
CASES = [
    *covering(
        "Liger fused linear cross entropy",
        32,
        shape=LIGER_SHAPES,
        dtype=tuple(LIGER_TOLERANCES),
        reduction=("mean", "sum"),
        ignore_index=(-100, 42),
        lse_square_scale=(0.0, 1e-5),
        softcap=(None, 30.0),
        bias=(True, False),
    ),
    *(
        Case("Liger fused linear JSD", {"shape": shape, "dtype": dtype, "temperature": t, "beta": beta, "ignore": ignore})
        for shape in ((2, 8, 128, 512), (1, 423, 167, 1423), (9, 7, 41, 41))
        for dtype in LIGER_TOLERANCES
        for t, beta in ((1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0))
        for ignore in ((None, "some") if shape[1] != 423 else ("some",))
    ),
    *cases(
        "Liger fused linear JSD",
        shape=((2, 8, 128, 512),),
        dtype=(torch.float32,),
        temperature=(2.0,),
        beta=(0.1,),
        ignore=("all",),
    ),
    *covering(
        "Liger GRPO",
        24,
        shape=((2, 16, 64, 256), (3, 47, 31, 123)),
        dtype=(torch.float32, torch.bfloat16),
        bias=(True, False),
        setting=((0.1, 0.2, 0.2, 1.0), (0.0, 0.1, 0.1, 2.0)),  # beta, epsilon low and high, temperature
        reference=("model", "logprobs", None),
        old=(True, False),
    ),
    *covering(
        "cut-cross-entropy",
        48,
        shape=CCE_SHAPES,
        dtype=(torch.float32, torch.float16, torch.bfloat16),
        softcap=(None, 20.0),
        bias=(False, True),
        shift=(False, True),
        invalids=(False, True),
        reduction=("none", "mean", "sum"),
    ),
    *(
        Case("cut-cross-entropy", {"partial": leaves})
        for leaves in ((True, False, True), (False, True, False), (False, False, True))
    ),
    *cases(
        "verl linear cross entropy",
        shape=((193, 112, 1188), (217, 28, 1187), (153, 64, 252), (139, 128, 800), (256, 128, 800)),  # tokens, hidden, vocabulary
        temperature=(1.5, 0.7),
    ),
    *covering(
        "TRL chunked log-probs",
        24,
        dtype=(torch.float32, torch.bfloat16),
        temperature=(1.0, 0.7, 2.0),
        scale=(1.0, 0.25),
        softcap=(None, 5.0),
        bias=(False, True),
        workspace=(None, 40_000),  # chunks that divide neither rows nor vocabulary
    ),
    *cases("TRL chunked divergence", beta=(0.0, 0.5, 1.0), temperature=(1.0, 2.0), bias=(False, True), scale=(1.0, 0.5)),
]


# --- the comparison -------------------------------------------------------------------------------------------------------------


def draw(case, *shape, scale=1.0):
    """Numbers that this case alone has, in its dtype."""
    case.g.manual_seed(case.g.initial_seed() + 1)
    return (torch.randn(*shape, generator=case.g) * scale).to(case.dtype)


def compare(loss, truth, leaves, atol, rtol):
    """Losses and the gradients of all leaves, against float64. The peers' own truth is plain torch in the case's dtype: where
    that is off in bfloat16, its largest error is allowed beside their tolerance.
    """
    found = []
    for function, dtype in ((loss, None), (truth, torch.float64), (truth, None)):
        own = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
        value = function(*own)
        found.append([x.double() for x in (value, *torch.autograd.grad(value, own))])
    for got, true, plain in zip(*found, strict=True):
        spare = (plain - true).abs().max() if leaves[0].dtype == torch.bfloat16 else 0
        assert ((got - true).abs() <= atol + rtol * true.abs() + spare).all(), (got - true).abs().max()


def plain_logits(hidden, weight, bias=None, softcap=None, scale=1.0, temperature=1.0):
    logits = F.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits / temperature


def some_ignored(targets, index, share=0.3):
    g = torch.Generator().manual_seed(7)
    return targets.masked_fill(torch.rand(targets.shape, generator=g) < share, index)


# --- each peer's ----------------------------------------------------------------------------------------------------------------


def liger_cross_entropy(case):
    """loss = mean or sum of -log p + lse_square_scale * lse^2; z-loss and token accuracy beside it."""
    b, t, h, v = case.shape
    leaves = [x.requires_grad_() for x in (draw(case, b * t, h), draw(case, v, h, scale=h**-0.5), *[draw(case, v)] * case.bias)]
    targets = some_ignored(torch.randint(v, (b * t,), generator=case.g), case.ignore_index)
    keep = targets != case.ignore_index
    count = keep.sum() if case.reduction == "mean" else 1

    def parts(x, w, c=None):
        found = linear_token_stats(
            x, Head(w, c, softcap=case.softcap), targets, ignore_index=case.ignore_index, stats=("logprobs", "logsumexp", "top1")
        )
        return -found.logprobs, case.lse_square_scale * found.logsumexp.square(), found.top1

    def loss(*given):
        nll, z, _ = parts(*given)
        return (nll + z).sum() / count

    def truth(x, w, c=None):
        logits = plain_logits(x, w, c, case.softcap)
        nll = F.cross_entropy(logits, targets, ignore_index=case.ignore_index, reduction=case.reduction)
        return nll + (case.lse_square_scale * logits.logsumexp(-1).square() * keep).sum() / count

    compare(loss, truth, leaves, *LIGER_TOLERANCES[case.dtype])
    logits = plain_logits(*(x.double() for x in leaves[:2]), *(x.double() for x in leaves[2:]), softcap=case.softcap)
    assert torch.equal(parts(*leaves)[2].bool(), (logits.argmax(-1) == targets) & keep)


def liger_jsd(case):
    """The student's head is half as wide as the teacher's; beta 0 is KL(T || S), 1 KL(S || T); the mean is over the rows kept."""
    b, t, h, v = case.shape
    leaves = [draw(case, b * t, h // 2).requires_grad_(), draw(case, v, h // 2, scale=0.3).requires_grad_()]
    teacher, own = draw(case, b * t, h), draw(case, v, h, scale=0.2)
    targets = torch.randint(v, (b * t,), generator=case.g)
    targets = {None: targets, "some": some_ignored(targets, 2), "all": torch.full_like(targets, 2)}[case.ignore]
    keep = targets != 2 if case.ignore else torch.ones_like(targets, dtype=torch.bool)
    count = keep.sum().clamp_min(1)
    name, beta = divergence_stat(case.beta)

    def loss(x, w):
        given = {"temperature": case.temperature, "stats": (name,), "jsd_beta": beta}
        given |= {"targets": targets, "ignore_index": 2} if case.ignore else {}
        return getattr(linear_token_stats(x, w, teacher_hidden=teacher, teacher_head=own, **given), name).sum() / count

    def truth(x, w):
        p = plain_logits(x, w, temperature=case.temperature).log_softmax(-1)
        q = plain_logits(teacher.double(), own.double(), temperature=case.temperature).log_softmax(-1)
        if case.beta in (0.0, 1.0):
            one, other = (q, p) if case.beta == 0 else (p, q)
            value = (one.exp() * (one - other)).sum(-1)
        else:
            m = (case.beta * q.exp() + (1 - case.beta) * p.exp()).log()
            value = case.beta * (q.exp() * (q - m)).sum(-1) + (1 - case.beta) * (p.exp() * (p - m)).sum(-1)
        return (value * keep).sum() / count

    compare(loss, truth, leaves, *LIGER_TOLERANCES[case.dtype])
    if case.ignore == "all":
        found = loss(*leaves)
        assert found == 0 and not any(x.any() for x in torch.autograd.grad(found, leaves))


def liger_grpo(case):
    """The clipped surrogate and beta times k3, both means over the mask's tokens."""
    (b, t, h, v), (beta, low, high, temperature) = case.shape, case.setting
    leaves = [x.requires_grad_() for x in (draw(case, b, t, h), draw(case, v, h), *[draw(case, v)] * case.bias)]
    other = [x.detach() + draw(case, *x.shape, scale=0.01) for x in leaves]
    targets, mask = torch.randint(v, (b, t), generator=case.g), torch.rand(b, t, generator=case.g) > 0.3
    advantages = torch.rand(b, 1, generator=case.g).expand(b, t)
    weights = mask / mask.sum()

    def exact(x, w, c=None):
        return plain_logits(x, w, c, temperature=temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    sampled = exact(*(x.detach().double() for x in leaves))
    old = (sampled + draw(case, b, t, scale=0.01)).float() if case.old else None
    reference = {
        "model": lambda: exact(*(x.double() for x in other)).float(),
        "logprobs": lambda: (sampled + draw(case, b, t, scale=0.01)).float(),
        None: lambda: None,
    }[case.reference]()

    def loss(x, w, c=None):
        lp = linear_token_stats(x, Head(w, c), targets, temperature=temperature, stats=("logprobs",)).logprobs
        total = policy_gradient_loss(lp, lp.detach() if old is None else old, advantages, weights, clip_low=low, clip_high=high)[
            0
        ]
        penalty = reference_kl_loss(lp, lp.detach() if reference is None else reference, weights, estimator="k3")[0]
        return total + beta * penalty

    def truth(*given):
        lp = exact(*given)
        ratio = (lp - (lp.detach() if old is None else old.double())).exp()
        term = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        gap = (lp.detach() if reference is None else reference.double()) - lp
        return ((term + beta * (gap.exp() - gap - 1)) * mask).sum() / mask.sum()

    compare(loss, truth, leaves, *{torch.float32: (1e-5, 5e-4), torch.bfloat16: (5e-2, 5e-1)}[case.dtype])


def cut_cross_entropy(case):
    """An error against float32 truth of at most that of plain torch in the same dtype and a tolerance, element by element."""
    if "partial" in vars(case):
        return cut_cross_entropy_partial(case)
    n, v, d = case.shape
    e, c, bias = draw(case, n, d, scale=d**-0.5), draw(case, v, d), draw(case, v, scale=0.02) if case.bias else None
    c[: min(n, v) // 2] = e[: min(n, v) // 2]
    targets = torch.randint(v, (n,), generator=case.g)
    targets = (some_ignored(targets, -100, 0.2) if case.invalids else targets).view(4, -1)
    leaves = [x.requires_grad_() for x in (e.view(4, -1, d).contiguous(), c, *[bias] * case.bias)]
    tolerance = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}[case.dtype]

    def losses(log_prob, x, *head):
        x, y = (x[:, :-1], targets[:, 1:]) if case.shift else (x, targets)
        found = -log_prob(x, y, *head)
        count = (y != -100).sum()
        value = {"none": found, "mean": found.sum() / count, "sum": found.sum()}[case.reduction]
        return value, (value / count if case.reduction == "sum" else value).mean()

    def ours(x, y, w, b=None):
        return linear_token_stats(x, Head(w, b, softcap=case.softcap), y, stats=("logprobs",)).logprobs

    def plain(x, y, w, b=None):
        logits = plain_logits(x, w, b, case.softcap)
        return -F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-100, reduction="none").view(y.shape)

    found = []
    for function, dtype in ((plain, torch.float64), (plain, case.dtype), (ours, case.dtype)):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        value, scalar = losses(function, *own)
        found.append([value, *torch.autograd.grad(scalar, own)])
    for true, theirs, mine in zip(*found, strict=True):
        assert ((mine.double() - true).abs() <= (theirs.double() - true).abs() + tolerance).all()
    lse = linear_token_stats(leaves[0], Head(*leaves[1:], softcap=case.softcap), stats=("logsumexp",)).logsumexp
    true = plain_logits(*(x.double() for x in leaves), softcap=case.softcap).logsumexp(-1)
    torch.testing.assert_close(lse.double(), true, atol=tolerance, rtol=0)


def cut_cross_entropy_partial(case):
    """Gradients of those leaves alone that ask for one."""
    case.dtype = torch.bfloat16
    leaves = [
        x.requires_grad_(need)
        for x, need in zip((draw(case, 256, 128), draw(case, 512, 128), draw(case, 512)), case.partial, strict=True)
    ]
    targets = torch.randint(512, (256,), generator=case.g)
    linear_token_stats(leaves[0], Head(*leaves[1:]), targets, stats=("logprobs",)).logprobs.mean().backward()
    assert tuple(x.grad is not None for x in leaves) == case.partial


def verl_linear_cross_entropy(case):
    """bfloat16 inputs of [-1/2, 1/2], random gradients of both outputs, a batch axis of 1."""
    n, d, v = case.shape
    case.dtype = torch.bfloat16
    hidden, weight = (torch.rand(*shape, generator=case.g).sub(0.5).bfloat16().requires_grad_() for shape in ((1, n, d), (v, d)))
    labels = torch.randint(v, (1, n), generator=case.g)
    sent = torch.rand(n, generator=case.g) * 2 - 1, torch.rand(n, generator=case.g) - 0.5
    found = linear_token_stats(hidden, weight, labels, temperature=case.temperature, stats=("logprobs", "entropy"))
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp = plain_logits(*doubles, temperature=case.temperature).log_softmax(-1)
    want = logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    for got, true, (atol, rtol) in zip((found.logprobs, found.entropy), want, ((1e-3, 2e-4), (5e-3, 5e-4)), strict=True):
        torch.testing.assert_close(got.double(), true, atol=atol, rtol=rtol)
    got = torch.autograd.grad((found.logprobs[0], found.entropy[0]), (hidden, weight), sent)
    true = torch.autograd.grad((want[0][0], want[1][0]), doubles, [x.double() for x in sent])
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-2, rtol=4e-2)


def trl_log_probs(case):
    """Log-probs and entropy, both with a gradient, of rows compacted by a mask; is_top1 beside them."""
    leaves = [x.requires_grad_() for x in (draw(case, 37, 24), draw(case, 211, 24, scale=0.4), *[draw(case, 211)] * case.bias)]
    targets = torch.randint(211, (37,), generator=case.g)
    sent = torch.randn(2, 37, generator=case.g)

    def parts(x, w, c=None):
        head = Head(w, c, scale=case.scale, softcap=case.softcap)
        names = ("logprobs", "entropy", "top1")
        return linear_token_stats(x, head, targets, temperature=case.temperature, stats=names, workspace_bytes=case.workspace)

    def loss(*given):
        found = parts(*given)
        return (found.logprobs * sent[0] + found.entropy * sent[1]).sum()

    def exact(x, w, c=None):
        return plain_logits(x, w, c, case.softcap, case.scale, case.temperature).log_softmax(-1)

    def truth(*given):
        logp = exact(*given)
        return (logp.gather(-1, targets[:, None])[:, 0] * sent[0] - (logp.exp() * logp).sum(-1) * sent[1]).sum()

    compare(loss, truth, leaves, *{torch.float32: (3e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}[case.dtype])
    assert torch.equal(parts(*leaves).top1.bool(), exact(*(x.double() for x in leaves)).argmax(-1) == targets)


def trl_divergence(case):
    """Per-token divergence of two heads of unequal width, and the student's entropy from the same pass."""
    case.dtype = torch.float32
    leaves = [draw(case, 29, 12).requires_grad_(), draw(case, 173, 12, scale=0.5).requires_grad_()]
    bias = draw(case, 173) if case.bias else None
    teacher, own = draw(case, 29, 20), draw(case, 173, 20, scale=0.4)
    name, beta = divergence_stat(case.beta)
    sent = torch.randn(29, generator=case.g)

    def parts(x, w):
        return linear_token_stats(
            x, Head(w, bias, scale=case.scale), None, teacher, teacher_head=own, temperature=case.temperature,
            stats=(name, "entropy"), jsd_beta=beta,
        )  # fmt: skip

    def exact(x, w):
        p = plain_logits(x, w, None if bias is None else bias.to(x.dtype), scale=case.scale, temperature=case.temperature)
        return p.log_softmax(-1), plain_logits(teacher.double(), own.double(), temperature=case.temperature).log_softmax(-1)

    def truth(x, w):
        p, q = exact(x, w)
        if case.beta in (0.0, 1.0):
            one, other = (q, p) if case.beta == 0 else (p, q)
            return ((one.exp() * (one - other)).sum(-1) * sent).sum()
        m = (case.beta * q.exp() + (1 - case.beta) * p.exp()).log()
        value = case.beta * (q.exp() * (q - m)).sum(-1) + (1 - case.beta) * (p.exp() * (p - m)).sum(-1)
        return (value * sent).sum()

    compare(lambda x, w: (getattr(parts(x, w), name) * sent).sum(), truth, leaves, 1e-5, 1e-4)
    p, _ = exact(*(x.double() for x in leaves))
    torch.testing.assert_close(parts(*leaves).entropy.double(), -(p.exp() * p).sum(-1), atol=8e-6, rtol=5e-7)


RUN = {
    "Liger fused linear cross entropy": liger_cross_entropy,
    "Liger fused linear JSD": liger_jsd,
    "Liger GRPO": liger_grpo,
    "cut-cross-entropy": cut_cross_entropy,
    "verl linear cross entropy": verl_linear_cross_entropy,
    "TRL chunked log-probs": trl_log_probs,
    "TRL chunked divergence": trl_divergence,
}


@pytest.mark.parametrize("peer", RUN)
def test_every_case_of_a_peer_passes(peer):
    own, failed = [case for case in CASES if case.peer == peer], []
    for seed, case in enumerate(own):
        given = SimpleNamespace(**case.options, g=torch.Generator().manual_seed(1000 * seed))
        try:
            RUN[peer](given)
        except AssertionError as problem:
            failed.append(f"{case}: {str(problem)[:300]}")
    assert own and not failed, "\n".join([f"{len(failed)} of {len(own)}", *failed])


def test_the_page_counts_the_cases():
    table = dict(re.findall(r"^\| ([\w ,-]+) \| (\d+) of \d+ \|", PAGE, re.M))
    assert table == {peer: str(sum(case.peer == peer for case in CASES)) for peer in RUN}
    assert len(set(map(str, CASES))) == len(CASES)
