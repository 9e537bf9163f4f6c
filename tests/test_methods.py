"""Each relative of GEAR against a slow transcription of its formula, token by token, and its invariances."""

import math
import random
import statistics

import pytest
import torch

from gear_kernels import GearKernelsError, credit_weights
from gear_kernels.methods import METHODS, AmrSd, Egrsd, HighEntropy, Rlsd, ScGrpo, Sgcd


def sign(x):
    return (x > 0) - (x < 0)


def clip(x, low, high):
    return min(max(x, low), high)


# --- the formulas on Python floats: trajectories is a list of lists of tokens {a, signal, h, ht, fkl} ------------------------


def slow_rlsd(m, trajectories):
    return [
        [1 - m.mix + m.mix * clip(math.exp(sign(t["a"]) * -t["signal"]), 1 - m.clip, 1 + m.clip) for t in tokens]
        for tokens in trajectories
    ]


def slow_egrsd(m, trajectories):
    top = max([t["ht"] for tokens in trajectories for t in tokens] + [1.0])
    out = []
    for tokens in trajectories:
        row = []
        for i, t in enumerate(tokens):
            least = min(u["ht"] for u in tokens[i : i + 1 + m.look_ahead])
            ratio = clip(math.exp(sign(t["a"]) * -t["signal"]), 1 - m.clip, 1 + m.clip)
            row.append(ratio * clip(1 - m.slope * least / top, m.floor, 1))
        out.append(row)
    return out


def slow_sc_grpo(m, trajectories):
    values = sorted(t["fkl"] for tokens in trajectories for t in tokens)
    place = m.quantile * (len(values) - 1) if values else 0
    low = math.floor(place)
    middle = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low]) if values else 0
    return [[t["fkl"] / (t["fkl"] + max(middle, m.least)) for t in tokens] for tokens in trajectories]


def slow_amr_sd(m, trajectories):
    out = []
    for tokens in trajectories:
        row = []
        for t in tokens:
            i = clip(-t["signal"], -m.bound, m.bound)
            row.append(1 + m.up * max(0, i - m.margin) if t["a"] >= 0 else 1 + m.down * max(0, -i - m.margin))
        out.append(row)
    return out


def slow_high_entropy(m, trajectories):
    values = sorted((t["h"] for tokens in trajectories for t in tokens), reverse=True)
    least = values[math.ceil(m.share * len(values)) - 1] if values else 0
    return [[float(t["h"] >= least) for t in tokens] for tokens in trajectories]


def slow_sgcd(m, trajectories):
    out = []
    for tokens in trajectories:
        d = [max(t["signal"], 0.0) for t in tokens]
        flat = not tokens or min(t["signal"] for t in tokens) == max(t["signal"] for t in tokens)
        place = m.quantile * (len(d) - 1)
        low = math.floor(place)
        scale = sorted(d)[low] + (place - low) * (sorted(d)[min(low + 1, len(d) - 1)] - sorted(d)[low]) if d else 0
        scale = scale if scale > 0 else max(d, default=0)
        g = [0.0 if flat or scale == 0 else min(x / scale, 1) for x in d]
        s, held = [], None
        for x, t in zip(g, tokens, strict=True):
            if held is not None:
                value, entropy = held
                ratio = t["ht"] <= m.stable * entropy and entropy <= m.stable * t["ht"]
                held = held if ratio else None
            if held is None and x > m.kl_threshold:
                held = (x, t["ht"])
            s.append(held[0] if held else 0.0)
        out.append([clip(1 + m.gamma * x, 1, m.cap) for x in s])
    return out


CASES = {
    Rlsd: (slow_rlsd, lambda r: Rlsd(mix=r.random(), clip=r.uniform(0.05, 0.9))),
    Egrsd: (slow_egrsd, lambda r: Egrsd(slope=r.uniform(0, 2), floor=r.uniform(0.05, 1), look_ahead=r.choice([0, 1, 3, 100]))),
    ScGrpo: (slow_sc_grpo, lambda r: ScGrpo(quantile=r.uniform(0.1, 1))),
    AmrSd: (slow_amr_sd, lambda r: AmrSd(up=r.random(), down=r.random(), margin=r.random(), bound=r.uniform(0.5, 5))),
    HighEntropy: (slow_high_entropy, lambda r: HighEntropy(share=r.uniform(0.01, 1))),
    Sgcd: (
        slow_sgcd,
        lambda r: Sgcd(gamma=r.uniform(0, 2), cap=r.uniform(1, 3), kl_threshold=r.random(), stable=r.uniform(1, 3)),
    ),
}


def random_pack(r):
    """(call, trajectories of policy tokens, places of the policy tokens)."""
    lengths = [r.choice([0, 1, 2, 5, 20]) for _ in range(r.randint(1, 6))]
    total, bounds = sum(lengths), [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    draw = {
        "signal": [r.choice([0.0, r.gauss(0, 1)]) for _ in range(total)],
        "entropy": [r.expovariate(1) for _ in range(total)],
        "teacher_entropy": [r.expovariate(1) for _ in range(total)],
        "forward_kl": [r.expovariate(2) for _ in range(total)],
    }
    advantages = [r.choice([-1.0, 0.0, 2.0]) for _ in lengths]
    mask = [r.random() < 0.8 for _ in range(total)]
    call = {name: torch.tensor(values, dtype=torch.float64) for name, values in draw.items()}
    call |= {
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "mask": torch.tensor(mask, dtype=torch.bool),
    }
    short = {"signal": "signal", "entropy": "h", "teacher_entropy": "ht", "forward_kl": "fkl"}
    trajectories, places = [], []
    for b, a in enumerate(advantages):
        own = [i for i in range(bounds[b], bounds[b + 1]) if mask[i]]
        places += own
        trajectories.append([{"a": a} | {short[name]: values[i] for name, values in draw.items()} for i in own])
    return call, trajectories, places


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_equals_the_slow_transcription(kind):
    slow, make = CASES[kind]
    for seed in range(500):
        r = random.Random(seed)
        call, trajectories, places = random_pack(r)
        method = make(r)
        got = credit_weights(**call, method=method)
        want = torch.zeros(len(call["signal"]), dtype=torch.float64)
        want[places] = torch.tensor([w for row in slow(method, trajectories) for w in row], dtype=torch.float64)
        torch.testing.assert_close(got.weights, want, rtol=1e-12, atol=1e-12, msg=lambda m, s=seed, k=method: f"{s} {k}: {m}")
        for value in got.diagnostics.values():
            assert value.isfinite()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"random"}))
def test_masked_tokens_and_order_of_sequences_change_nothing(name):
    r = random.Random(name)
    call, _, _ = random_pack(r)
    call["turn_ids"] = torch.arange(len(call["signal"])) // 3
    whole = credit_weights(**call, method=name)
    noisy = dict(call)
    for field in ("signal", "entropy", "teacher_entropy", "forward_kl"):
        noisy[field] = torch.where(call["mask"], call[field], math.inf)
    assert torch.equal(credit_weights(**noisy, method=name).weights, whole.weights)
    parts = [slice(a, b) for a, b in zip(call["cu_seqlens"], call["cu_seqlens"][1:], strict=False)][::-1]
    turned = {n: torch.cat([call[n][p] for p in parts]) for n in call if n not in ("advantages", "cu_seqlens")}
    turned["advantages"] = call["advantages"].flip(0)
    turned["cu_seqlens"] = torch.tensor([0, *(p.stop - p.start for p in parts)]).cumsum(0).int()
    got = credit_weights(**turned, method=name).weights
    torch.testing.assert_close(got, torch.cat([whole.weights[p] for p in parts]), rtol=1e-12, atol=1e-12)


def test_rlsd_decays_over_the_steps():
    assert [Rlsd().at(step).mix for step in (1, 26, 51, 100)] == [0.5, 0.25, 0.0, 0.0]
    assert Rlsd(decay_steps=0).at(1000).mix == 0.5
    off = credit_weights(torch.randn(4), None, torch.ones(1), torch.tensor([0, 4], dtype=torch.int32), method=Rlsd().at(51))
    assert torch.equal(off.weights, torch.ones(4))


def test_missing_inputs_are_named():
    one = (torch.zeros(3), torch.zeros(3), torch.ones(1), torch.tensor([0, 3], dtype=torch.int32))
    for name, missing in (("egrsd", "teacher_entropy"), ("sgcd", "teacher_entropy"), ("sc_grpo", "forward_kl")):
        with pytest.raises(GearKernelsError, match=f"{missing}: given None"):
            credit_weights(*one, method=name)
    with pytest.raises(GearKernelsError, match="forward_kl: given NaN at sequence 0, position 1"):
        credit_weights(*one, method="sc_grpo", forward_kl=torch.tensor([0.0, math.nan, 0.0]))


def test_infinite_divergences_stay_finite():
    inf = torch.tensor([0.0, math.inf, 1.0])
    call = {"teacher_entropy": torch.ones(3), "forward_kl": inf}
    for name in ("sc_grpo", "sgcd", "rlsd", "amr_sd", "egrsd"):
        got = credit_weights(inf, None, torch.tensor([-1.0]), torch.tensor([0, 3], dtype=torch.int32), method=name, **call)
        assert got.weights.isfinite().all(), name


BAD = [
    (lambda: Rlsd(mix=1.5), "Rlsd.mix: given 1.5"),
    (lambda: Rlsd(decay_steps=-1), "Rlsd.decay_steps: given -1"),
    (lambda: Egrsd(floor=0), "Egrsd.floor: given 0"),
    (lambda: Egrsd(look_ahead=1.5), "Egrsd.look_ahead: given 1.5"),
    (lambda: ScGrpo(least=0), "ScGrpo.least: given 0"),
    (lambda: AmrSd(bound=-1), "AmrSd.bound: given -1"),
    (lambda: HighEntropy(share=0), "HighEntropy.share: given 0"),
    (lambda: Sgcd(cap=0.5), "Sgcd.cap: given 0.5"),
]


@pytest.mark.parametrize("make, message", BAD)
def test_bad_options(make, message):
    with pytest.raises(GearKernelsError, match=message):
        make()


def test_high_entropy_keeps_about_its_share():
    entropy = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 400, 1000], dtype=torch.int32)
    weights = credit_weights(None, entropy, torch.ones(2), bounds, method="high_entropy").weights
    assert weights.sum() == 200 and entropy[weights == 1].min() > statistics.quantiles(entropy.tolist(), n=5)[3] - 1e-6
