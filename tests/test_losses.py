"""The loss against a literal loop, and aggregation weights against the means they are named for."""

import math

import pytest
import torch

from gear_kernels import GearKernelsError
from gear_kernels.losses import AGGREGATIONS, aggregation_weights, policy_gradient_loss


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
