"""What a copy of gear_kernels that was extended by the recipes of docs/extending.md computes. test_extending.py runs it with the
copy first on the path, and TRITON_INTERPRET=1. It prints JSON: where the package lay, and each comparison's worst relative error.

    python tests/extended_copy.py statistic|method
"""

import json
import sys

import torch

import gear_kernels
from gear_kernels import backends, credit_weights, linear_token_stats, token_stats

N, V, D = 7, 301, 12
STATS = ("logprobs", "entropy", "energy")
WITH_TEACHER = (*STATS, "reverse_kl", "jsd")


def difference(got, want):
    """The largest, over the largest of `want`; infinite where only one of both is a number."""
    if got.isnan().any() or want.isnan().any():
        return float("inf")
    return ((got.double() - want).abs().max() / want.abs().max()).item()


# --- energy: -log sum exp(z / T), its gradient the student's probabilities, negative -------------------------------------------


def statistic():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    temperature, sent = torch.rand(N, generator=g) + 0.5, torch.randn(N, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    targets[2] = -100
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    values = -((exact[0] @ exact[1].T) / temperature.double()[:, None]).logsumexp(-1)
    kept = torch.where(targets < 0, 0, values)
    wanted = {}
    for name, value in (("all", values), ("kept", kept)):
        wanted[name] = (value.detach(), *torch.autograd.grad((value * sent.double()).sum(), exact, retain_graph=True))
    found = {}
    for name in backends.BACKENDS:
        with gear_kernels.backend(name):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            runs = {  # alone, as the linear operator, among others, and through the backward with a teacher
                "alone": ("all", token_stats(leaves[0] @ leaves[1].T, stats=STATS[2:], temperature=temperature)),
                "linear": ("all", linear_token_stats(*leaves, stats=STATS[2:], temperature=temperature)),
                "among": ("kept", linear_token_stats(*leaves, targets, stats=STATS, temperature=temperature)),
                "teacher": (
                    "kept",
                    linear_token_stats(*leaves, targets, hidden + 1, stats=WITH_TEACHER, temperature=temperature),
                ),
            }
            for run, (which, out) in runs.items():
                got = (out.energy.detach(), *torch.autograd.grad((out.energy * sent).sum(), leaves))
                found[f"{name} {run}"] = max(difference(a, b) for a, b in zip(got, wanted[which], strict=True))
    return found


# --- surprise: a rule of its own, W = clip(1 + gain (H / mean H - 1), 0.5, 1.5) -------------------------------------------------


def method():
    from gear_kernels.methods import METHODS
    from gear_kernels.reference import credit as reference
    from gear_trainer.config import load_config
    from gear_trainer.recipe import resolve

    g = torch.Generator().manual_seed(0)
    entropy, mask = torch.rand(60, generator=g), torch.rand(60, generator=g) > 0.2
    advantages, bounds = torch.tensor([1.5, -0.5, 0.0]), torch.tensor([0, 20, 41, 60], dtype=torch.int32)
    sequence = torch.arange(3).repeat_interleave(bounds.diff())
    surprise = type(METHODS["surprise"])(0.7)
    applied = []
    monitored = type("Monitored", (type(surprise),), {"apply": lambda self, tokens: applied.append(0) or surprise.apply(tokens)})
    found = {}
    for dtype in (torch.float32, torch.float64):
        h, a = entropy.to(dtype), advantages.to(dtype)
        stated = reference.surprise(h, reference.mean_entropy(h, mask), 0.7)
        wanted = torch.where(mask, stated * a[sequence], 0).double()
        for name in backends.BACKENDS:
            with gear_kernels.backend(name):
                credit = credit_weights(None, h, a, bounds, mask=mask, method=monitored(0.7))
            assert len(applied) == (name == "reference"), f"{name}: the method's own torch ran {len(applied)} times"
            applied.clear()
            found[f"{name} {dtype}"] = difference(credit.token_advantages, wanted)
    named = resolve(load_config(sys.argv[2], ["credit=surprise", "credit_args.gain=0.7"]))
    assert named.method == surprise, named.method
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    worst = {"statistic": statistic, "method": method}[sys.argv[1]]()
    print(json.dumps({"package": gear_kernels.__file__, "worst": worst}))
