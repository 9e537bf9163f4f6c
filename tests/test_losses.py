"""The loss against a literal loop, and aggregation weights against the means they are named for."""

import math

import pytest
import torch

from gear_kernels import FusedHead, GearKernelsError, Head
from gear_kernels.losses import (
    AGGREGATIONS,
    aggregation_weights,
    distillation_loss,
    divergence_loss,
    divergence_stat,
    policy_gradient_loss,
    reference_kl_loss,
    sampled_distillation_loss,
    sdar_loss,
)


def literal_loss(logprobs, old, advantages, weights, importance, low, high):
    total = 0.0
    for lp, lo, a, w, i in zip(logprobs, old, advantages, weights, importance, strict=True):
        if w:
            r = math.exp(lp - lo)
            total -= w * i * min(r * a, min(max(r, 1 - low), 1 + high) * a)
    return total


def random_case(seed, n=50):
    g = torch.Generator().manual_seed(seed)
    logprobs, old = -torch.rand(2, n, generator=g, dtype=torch.float64) * 2
    advantages, weights, importance = torch.randn(3, n, generator=g, dtype=torch.float64)
    weights = weights.abs() * (torch.rand(n, generator=g) > 0.3)
    return logprobs, old, advantages, weights, importance.abs()


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_the_literal_sum(seed):
    logprobs, old, advantages, weights, importance = random_case(seed)
    loss, _ = policy_gradient_loss(logprobs, old, advantages, weights, clip_low=0.1, clip_high=0.3, importance_weights=importance)
    want = literal_loss(*(x.tolist() for x in (logprobs, old, advantages, weights, importance)), 0.1, 0.3)
    assert loss.item() == pytest.approx(want, rel=1e-12)


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs, _, advantages, weights, _ = random_case(7)
    logprobs.requires_grad_()
    loss, metrics = policy_gradient_loss(logprobs, logprobs.detach(), advantages, weights)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -weights * advantages, rtol=1e-12, atol=0)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] == 0 and metrics["ratio_mean"] == 1
    assert metrics["tokens"] == (weights != 0).sum() and not any(m.requires_grad for m in metrics.values())


def test_clipped_tokens_pass_no_gradient():
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy_gradient_loss(logprobs, torch.zeros(4), advantages, torch.ones(4))
    loss.backward()
    assert (logprobs.grad != 0).tolist() == [False, True, True, False] and metrics["clip_fraction"] == 0.5


def test_weightless_tokens_do_nothing_whatever_they_hold():
    logprobs = torch.tensor([-1.0, float("nan"), float("-inf")], requires_grad=True)
    old, weights = torch.tensor([-1.0, 0.0, float("-inf")]), torch.tensor([1.0, 0.0, 0.0])
    loss, metrics = policy_gradient_loss(logprobs, old, torch.tensor([2.0, float("inf"), 1.0]), weights)
    loss.backward()
    assert loss.item() == -2 and logprobs.grad.tolist() == [-2, 0, 0] and metrics["ratio_max"] == 1


def test_padding_batch_and_empty_batch():
    for n in (0, 3):
        logprobs = torch.zeros(n, requires_grad=True)
        loss, metrics = policy_gradient_loss(logprobs, *torch.zeros(3, n))
        loss.backward()
        assert loss.item() == 0 and not logprobs.grad.any() and not any(metrics.values())


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_parts_sum_to_the_global_mean(mode):
    lengths, max_len = [3, 1, 5, 2, 8], 16
    values = [torch.rand(n, dtype=torch.float64) for n in lengths]
    want = {
        "token_mean": torch.cat(values).mean(),
        "seq_mean_token_mean": torch.stack([v.mean() for v in values]).mean(),
        "seq_mean_token_sum": torch.stack([v.sum() for v in values]).mean(),
        "seq_mean_token_sum_norm": torch.stack([v.sum() / max_len for v in values]).mean(),
    }[mode]
    counts = {"n_tokens_global": sum(lengths), "n_seqs_global": len(lengths)}
    got = 0
    for part in (slice(0, 2), slice(2, 5)):  # two ranks
        weights = aggregation_weights(torch.tensor(lengths[part]), mode, max_len=max_len, **counts)
        got += (weights * torch.cat(values[part])).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_aggregation_of_lists_and_nothing():
    assert aggregation_weights([], "token_mean", n_tokens_global=3).shape == (0,)
    assert aggregation_weights([0, 2], "seq_mean_token_mean").tolist() == [0.25, 0.25]


def test_bad_input():
    with pytest.raises(GearKernelsError, match="token_advantages has shape .* expected logprobs'"):
        policy_gradient_loss(torch.zeros(3), torch.zeros(3), torch.zeros(4), torch.zeros(3))
    with pytest.raises(GearKernelsError, match="mode is 'mean'; expected one of token_mean"):
        aggregation_weights([1], "mean")
    with pytest.raises(GearKernelsError, match="max_len is None; expected a positive length"):
        aggregation_weights([1], "seq_mean_token_sum_norm")
    with pytest.raises(GearKernelsError, match=r"lengths is torch.float32"):
        aggregation_weights(torch.ones(2), "token_mean")


# --- dual clip, KL to a reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_dual_clip_is_the_literal_rule(seed):
    logprobs, old, advantages, weights, _ = random_case(seed)
    logprobs = (logprobs + 2.5).requires_grad_()  # ratios well above the clip
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, weights, dual_clip=3.0)
    want, bounded = 0.0, []
    for lp, lo, a, w in zip(*(x.tolist() for x in (logprobs, old, advantages, weights)), strict=True):
        r = math.exp(lp - lo)
        term = min(r * a, min(max(r, 0.8), 1.2) * a)
        bounded.append(w != 0 and a < 0 and 3.0 * a > term)
        want -= w * (max(term, 3.0 * a) if a < 0 else term)
    assert any(bounded) and loss.item() == pytest.approx(want, rel=1e-12)
    assert metrics["dual_clip_fraction"].item() == pytest.approx(sum(bounded) / (weights != 0).sum().item())
    loss.backward()
    assert not logprobs.grad[torch.tensor(bounded)].any()  # a bounded token passes no gradient
    assert policy_gradient_loss(logprobs, old, advantages, weights)[1]["dual_clip_fraction"] == 0


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_reference_kl_estimators_meet_the_exact_kl(estimator):
    """Exact expectations over a vocabulary of 40: k1 and k3 are the KL, and the gradient of k2 is the KL's."""
    g = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 40, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    logp, logq = logits.log_softmax(-1), (logits.detach() + 0.3 * other).log_softmax(-1)
    exact = (logp.exp() * (logp - logq)).sum()
    loss, metrics = reference_kl_loss(logp, logq, logp.exp().detach(), estimator=estimator)
    if estimator == "k2":
        (got,), (want,) = torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(exact, logits)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    else:
        assert loss.item() == pytest.approx(exact.item(), rel=1e-10)
    if estimator == "k1":
        assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15  # why it is no loss
    d = logq - logp.detach()
    assert estimator != "k3" or metrics["reference_kl"].item() == pytest.approx((d.exp() - 1 - d).mean().item())


def test_reference_kl_skips_weightless_tokens():
    logprobs = torch.tensor([-1.0, float("nan")], requires_grad=True)
    loss, metrics = reference_kl_loss(logprobs, torch.tensor([-2.0, float("inf")]), torch.tensor([0.5, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.exp(-1)) and logprobs.grad[1] == 0
    assert metrics["reference_kl"].item() == pytest.approx(math.exp(-1))


# --- exploded ratios ----------------------------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("gap", (15.0, 21.0, 88.8, 800.0, math.inf))
@pytest.mark.parametrize("dual_clip", (None, 3.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_R2_exploded_ratios_stay_finite(dtype, dual_clip, gap):
    """exp overflows from a log ratio of 88.8 on (float16: 11.1): the clipped token's gradient is 0, never 0 * inf."""
    logprobs = torch.tensor([0.0, 0.0, -1.0], dtype=dtype, requires_grad=True)
    old, advantages = torch.tensor([-gap, -gap, -1.0], dtype=dtype), torch.tensor([1.0, -1.0, 1.0], dtype=dtype)
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, torch.ones(3, dtype=dtype), dual_clip=dual_clip)
    loss.backward()
    assert logprobs.grad[0] == 0 and logprobs.grad.isfinite().all() and logprobs.grad[2] == -1, logprobs.grad
    assert loss.isfinite() and metrics["ratio_max"].isfinite() and 0 < metrics["approx_kl"] <= 10, (loss, metrics)
    assert dual_clip is None or (logprobs.grad[1] == 0 and loss.item() == pytest.approx(-1.2 + 3 - 1, rel=1e-2))


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_R2_a_far_reference_costs_a_bounded_k3(dtype, estimator):
    logprobs = torch.tensor([-90.0, 0.0, -1.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([0.0, -90.0, -2.0], dtype=dtype)
    loss, metrics = reference_kl_loss(logprobs, reference, torch.ones(3, dtype=dtype), estimator=estimator)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and metrics["reference_kl"].isfinite()
    if estimator == "k3":
        assert loss.item() == pytest.approx(20 + math.exp(-1), rel=1e-2) and logprobs.grad[:2].tolist() == [0, 0]
        assert logprobs.grad[2].item() == pytest.approx(1 - math.exp(-1), rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_R2_sampled_distillation_off_policy_stays_finite(dtype):
    logprobs = torch.tensor([0.0, -1.0], dtype=dtype, requires_grad=True)
    old, teacher = torch.tensor([-90.0, -1.0], dtype=dtype), torch.tensor([-0.5, -3.0], dtype=dtype)
    loss, _ = sampled_distillation_loss(logprobs, old, teacher, torch.ones(2, dtype=dtype))
    loss.backward()
    assert loss.isfinite() and logprobs.grad.tolist() == [0, 2]


def test_R2_ordinary_ratios_are_what_they_were_bit_by_bit():
    """Log ratios of up to +-19.9 and k3 below 10, against the formulas without a cut."""
    g = torch.Generator().manual_seed(0)
    logprobs, advantages, weights = torch.randn(3, 400, generator=g)
    d = torch.linspace(-19.9, 19.9, 400)
    plain = logprobs.clone().requires_grad_()
    ratio = (plain - (logprobs - d)).exp()
    (-(weights * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).sum()).backward()
    ours = logprobs.clone().requires_grad_()
    policy_gradient_loss(ours, logprobs - d, advantages, weights)[0].backward()
    assert torch.equal(ours.grad, plain.grad)
    d, gap = d[d.abs() < 2.5], logprobs[: int((d.abs() < 2.5).sum())]
    k3 = torch.expm1(gap + d - gap) - (gap + d - gap)
    assert torch.equal(reference_kl_loss(gap, gap + d, torch.ones_like(gap))[0], k3.sum())


# --- distillation -----------------------------------------------------------------------------------------------------------


def distillation_case(n=7, width=6, vocab=90):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, n, width, generator=g)
    weight = torch.randn(vocab, width, generator=g)
    weights = torch.rand(n, generator=g) * (torch.arange(n) != 2)
    return student, teacher, weight, weights


def literal_divergence(student, weight, teacher_logits, beta):
    p, q = (student.double() @ weight.double().T).log_softmax(-1), teacher_logits.double().log_softmax(-1)
    if beta == 1:
        return (p.exp() * (p - q)).sum(-1)
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


@pytest.mark.parametrize("beta", (0.0, 0.2, 0.5, 1.0))
def test_distillation_loss_and_its_gradients(beta):
    student, teacher, weight, weights = distillation_case()
    student.requires_grad_(), weight.requires_grad_()
    loss, metrics = distillation_loss(student, weight, teacher, weights, beta=beta, workspace_bytes=5000)
    detached = weight.detach()  # the teacher's logits are constants, also in the shared weight
    value = literal_divergence(student, weight, teacher @ detached.T, beta)
    want = (weights.double() * value).sum()
    assert loss.item() == pytest.approx(want.item(), abs=2e-6)
    assert metrics["divergence"].item() == pytest.approx(value[weights != 0].mean().item(), abs=2e-6)
    for got, expected in zip(
        torch.autograd.grad(loss, (student, weight)), torch.autograd.grad(want, (student, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_distillation_loss_skips_weightless_rows_and_takes_a_module():
    student, teacher, weight, weights = distillation_case()
    want, _ = distillation_loss(student, weight, teacher, weights, beta=0.5)
    student[2] = teacher[2] = float("nan")  # its weight is 0
    head = FusedHead(6, 90, bias=False)
    head.weight.data = weight
    for given in (Head(weight), head):
        got, metrics = distillation_loss(student, given, teacher, weights, beta=0.5)
        assert got.item() == want.item() and metrics["divergence"].isfinite()


def test_distillation_from_another_models_head():
    student, teacher, weight, weights = distillation_case()
    other = weight.roll(1, 0) * 0.5
    want = (weights.double() * literal_divergence(student, weight, teacher @ other.T, 0.3)).sum()
    head = FusedHead(6, 90, bias=False)
    head.weight.data = weight
    for given in (Head(weight), head):
        got, _ = distillation_loss(student, given, teacher, weights, beta=0.3, teacher_head=other)
        assert got.item() == pytest.approx(want.item(), abs=2e-6)


def test_divergence_loss_is_the_weighted_sum():
    values = torch.tensor([0.5, float("inf"), 2.0], requires_grad=True)
    loss, metrics = divergence_loss(values, torch.tensor([2.0, 0.0, 1.0]))
    loss.backward()
    assert loss.item() == 3.0 and values.grad.tolist() == [2, 0, 1] and metrics["divergence"].item() == 1.25
    assert [divergence_stat(b) for b in (0, 0.25, 1.0)] == [("forward_kl", 0.5), ("jsd", 0.25), ("reverse_kl", 0.5)]


# --- distillation from sampled tokens ---------------------------------------------------------------------------------------


def sampled_case(n=40):
    g = torch.Generator().manual_seed(3)
    logprobs, old, teacher = -2 * torch.rand(3, n, generator=g, dtype=torch.float64)
    return logprobs.requires_grad_(), old, teacher, torch.rand(n, generator=g, dtype=torch.float64) * (torch.arange(n) % 5 != 0)


def test_sdar_is_the_literal_sum():
    logprobs, _, teacher, weights = sampled_case()
    loss, metrics = sdar_loss(logprobs, teacher, weights)
    total, slopes = 0.0, []
    for lp, t, w in zip(logprobs.tolist(), teacher.tolist(), weights.tolist(), strict=True):
        gate = 1 / (1 + math.exp(-5 * (t - lp)))
        total += w * gate * (t - lp)
        slopes.append(-w * gate)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=0)
    gap = (logprobs.detach() - teacher)[weights != 0]
    assert metrics["divergence"].item() == pytest.approx(gap.mean().item()) and 0 < metrics["gate"] < 1


def test_sampled_distillation_is_the_literal_sum():
    logprobs, old, teacher, weights = sampled_case()
    loss, metrics = sampled_distillation_loss(logprobs, old, teacher, weights)
    total, slopes = 0.0, []
    for lp, o, t, w in zip(*(x.tolist() for x in (logprobs, old, teacher, weights)), strict=True):
        total -= w * math.exp(lp - o) * (t - lp)
        slopes.append(-w * math.exp(lp - o) * (t - lp))  # d ratio / d lp = ratio
    assert loss.item() == pytest.approx(total, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=0)
    assert metrics["divergence"].item() == pytest.approx((logprobs.detach() - teacher)[weights != 0].mean().item())


def test_sampled_losses_pass_gradcheck_where_they_hold_their_constants():
    """The gate and the reward are constants: with them fixed beforehand the autograd gradient is that of the plain product."""
    logprobs, old, teacher, weights = sampled_case(12)
    gap = (teacher - logprobs).detach()
    gate = torch.sigmoid(5 * gap)
    for loss, plain in (
        (lambda x: sdar_loss(x, teacher, weights)[0], lambda x: (weights * gate * (teacher - x)).sum()),
        (lambda x: sampled_distillation_loss(x, old, teacher, weights)[0], lambda x: -(weights * (x - old).exp() * gap).sum()),
    ):
        assert torch.autograd.gradcheck(plain, (logprobs,))
        (got,), (want,) = torch.autograd.grad(loss(logprobs), logprobs), torch.autograd.grad(plain(logprobs), logprobs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: divergence_loss(x.square(), weights)[0], (logprobs,))


@pytest.mark.parametrize("name", ("sdar", "sampled"))
def test_sampled_losses_move_the_policy_towards_the_teacher(name):
    """Exact expectation over a vocabulary of 30, descended: KL(policy || teacher) falls; sampled has that KL's gradient."""
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 30, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    teacher = target.log_softmax(-1)

    def kl():
        logp = logits.log_softmax(-1)
        return (logp.exp() * (logp - teacher)).sum()

    def loss():
        logp = logits.log_softmax(-1)
        sampled = sampled_distillation_loss(logp, logp.detach(), teacher, logp.exp().detach())
        return (sdar_loss(logp, teacher, logp.exp().detach()) if name == "sdar" else sampled)[0]

    (first,), (exact,) = torch.autograd.grad(loss(), logits), torch.autograd.grad(kl(), logits)
    if name == "sampled":
        torch.testing.assert_close(first, exact, rtol=1e-9, atol=1e-14)
    assert torch.dot(first, exact) > 0
    before = kl().item()
    for _ in range(20):
        (slope,) = torch.autograd.grad(loss(), logits)
        logits.data -= 0.5 * slope
    assert kl().item() < 0.9 * before


def test_sampled_losses_skip_weightless_tokens():
    weights = torch.tensor([1.0, 0.0])
    for call in (
        lambda x: sdar_loss(x, torch.tensor([-1.0, float("inf")]), weights),
        lambda x: sampled_distillation_loss(x, torch.tensor([-2.0, 0.0]), torch.tensor([-1.0, float("nan")]), weights),
    ):
        logprobs = torch.tensor([-2.0, float("nan")], requires_grad=True)
        loss, metrics = call(logprobs)
        loss.backward()
        assert loss.isfinite() and logprobs.grad[1] == 0 and metrics["divergence"].item() == -1


S, E = torch.zeros(3, 4), torch.zeros(5, 4)
BAD = {
    "beta is 1.5; expected a number from 0": lambda: distillation_loss(S, E, S, torch.ones(3), beta=1.5),
    r"token_weights has shape \(2,\); expected one weight per row, \(3,\)": lambda: distillation_loss(S, E, S, torch.ones(2)),
    "the divergence's": lambda: divergence_loss(torch.zeros(3), torch.ones(2)),
    r"teacher_logprobs has shape \(2,\); expected logprobs' \(3,\)": lambda: sdar_loss(torch.zeros(3), *torch.ones(2, 2)),
    r"old_logprobs has shape \(2,\)": lambda: sampled_distillation_loss(torch.zeros(3), torch.zeros(2), *torch.zeros(2, 3)),
    "beta is -1": lambda: divergence_stat(-1),
    "estimator is 'k4'": lambda: reference_kl_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), estimator="k4"),
    r"reference_logprobs has shape \(2,\)": lambda: reference_kl_loss(torch.zeros(3), torch.zeros(2), torch.ones(3)),
    "dual_clip is 1.0; expected a number above 1": lambda: policy_gradient_loss(*[torch.zeros(3)] * 4, dual_clip=1.0),
}


@pytest.mark.parametrize("match", BAD)
def test_bad_input_of_the_new_losses(match):
    with pytest.raises(GearKernelsError, match=match):
        BAD[match]()
