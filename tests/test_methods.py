"""Each relative of GEAR against a slow transcription of its formula, token by token, and its invariances."""

import math
import random
import statistics

import fuzzing
import pytest
import torch

import gear_kernels
from gear_kernels import GearKernelsError, backends, credit_weights
from gear_kernels.methods import METHODS, AmrSd, Egrsd, Gear, Gigpo, HighEntropy, Rlsd, ScGrpo, Sgcd, Tilt, Turn


@pytest.fixture(params=sorted(backends.BACKENDS), autouse=True)
def backend(request):
    """Every test of this file runs on the compiled scan, the reference and the Triton scan (interpreted)."""
    with gear_kernels.backend(request.param):
        yield request.param


def sign(x):
    return (x > 0) - (x < 0)


def clip(x, low, high):
    return min(max(x, low), high)


# --- the formulas on Python floats: trajectories is a list of lists of tokens {a, signal, h, ht, fkl} ------------------------


def slow_tilt(m, trajectories):
    """GEAR's worked rules (relu_max, entropy ends), and then the mean of a trajectory's W on all of its tokens."""
    out = []
    for tokens in trajectories:
        top = max([t["signal"] for t in tokens] + [0.0])
        flat = len({t["signal"] for t in tokens}) < 2 or top == 0
        g = [0.0 if flat else max(t["signal"], 0.0) / top for t in tokens]
        credit, i = list(g), 0
        while i < len(g):
            end = i
            if g[i] > m.kl_threshold:
                limit = m.entropy_ratio * tokens[i]["h"]
                end = next((u for u in range(i + 1, len(g)) if tokens[u]["h"] > limit), len(g) - 1)
                credit[i : end + 1] = [g[i]] * (end + 1 - i)
            i = end + 1
        weights = [m.alpha * (0.5 + (0.5 - c) * sign(t["a"])) + 1 - m.alpha / 2 for c, t in zip(credit, tokens, strict=True)]
        out.append([sum(weights) / len(weights)] * len(weights) if weights else [])
    return out


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


def runs(tokens):
    """The turns of a trajectory: lists of tokens with equal turn ids, one after another."""
    out = []
    for t in tokens:
        if out and out[-1][0]["turn"] == t["turn"]:
            out[-1].append(t)
        else:
            out.append([t])
    return out


def relative(values, own, std):
    mean = sum(values) / len(values)
    if min(values) == max(values):
        return 0.0
    return (own - mean) / (statistics.stdev(values) + 1e-6 if std else 1)


def slow_turns(m, trajectories, key, worth):
    """A + weight * (a turn's worth relative to the turns of its group that share its key)."""
    steps = [[(run, worth(all_runs, k)) for k, run in enumerate(all_runs)] for all_runs in map(runs, trajectories)]
    found = {}
    for own in steps:
        for run, value in own:
            found.setdefault((run[0]["group"], run[0][key]), []).append(value)
    return [
        [t["a"] + m.weight * relative(found[run[0]["group"], run[0][key]], value, m.std) for run, value in own for t in run]
        for own in steps
    ]


def slow_turn(m, trajectories):
    return slow_turns(m, trajectories, "turn", lambda all_runs, k: all_runs[k][0]["reward"])


def slow_gigpo(m, trajectories):
    return slow_turns(
        m, trajectories, "anchor", lambda all_runs, k: sum(m.gamma**i * run[0]["reward"] for i, run in enumerate(all_runs[k:]))
    )


CASES = {
    Tilt: (
        slow_tilt,
        lambda r: Tilt(alpha=r.uniform(0, 1.9), kl_threshold=r.choice([0, 0.1, r.random()]), entropy_ratio=r.uniform(0.5, 3)),
    ),
    Turn: (slow_turn, lambda r: Turn(weight=r.random(), std=r.random() < 0.5)),
    Gigpo: (slow_gigpo, lambda r: Gigpo(weight=r.random(), gamma=r.choice([0, 0.5, 0.95, 1]), std=r.random() < 0.5)),
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


def random_turns(r, length):
    """Turn ids that count up, each turn's anchor and reward at its tokens."""
    turn, rows = 0, []
    of_turn = {}
    for _ in range(length):
        turn += r.random() < 0.3
        anchor, reward = of_turn.setdefault(turn, (r.randint(0, 2), r.choice([0.0, 1.0, r.random()])))
        rows.append((turn, anchor, reward))
    return rows


def random_pack(r, short=False):
    """(call, trajectories of policy tokens, places of the policy tokens)."""
    lengths = [r.choice([0, 1, 2, 5, 9 if short else 20]) for _ in range(r.randint(1, 2 if short else 6))]
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
    groups = [r.choice([7, -3]) for _ in lengths]
    turns = [row for n in lengths for row in random_turns(r, n)]
    draw["turn_rewards"] = [reward for _, _, reward in turns]
    mask = [r.random() < 0.8 for _ in range(total)]
    call = {name: torch.tensor(values, dtype=torch.float64) for name, values in draw.items()}
    call |= {
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "mask": torch.tensor(mask, dtype=torch.bool),
        "groups": torch.tensor(groups),
        "turn_ids": torch.tensor([turn for turn, _, _ in turns], dtype=torch.int32),
        "anchors": torch.tensor([anchor for _, anchor, _ in turns], dtype=torch.int64),
    }
    names = {"signal": "signal", "entropy": "h", "teacher_entropy": "ht", "forward_kl": "fkl", "turn_rewards": "reward"}
    trajectories, places = [], []
    for b, a in enumerate(advantages):
        own = [i for i in range(bounds[b], bounds[b + 1]) if mask[i]]
        places += own
        extra = [{"a": a, "group": groups[b], "turn": turns[i][0], "anchor": turns[i][1]} for i in own]
        trajectories.append([x | {names[n]: values[i] for n, values in draw.items()} for x, i in zip(extra, own, strict=True)])
    return call, trajectories, places


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_equals_the_slow_transcription(kind, backend):
    slow, make = CASES[kind]
    for seed in range(fuzzing.often(500) if backend == "triton" else 500):  # the interpreter takes 10 ms for a sequence
        r = fuzzing.rng(seed)
        call, trajectories, places = random_pack(r, short=backend == "triton")
        method = make(r)
        got = credit_weights(**call, method=method)
        got_values = got.token_advantages if kind in (Turn, Gigpo) else got.weights
        want = torch.zeros(len(call["signal"]), dtype=torch.float64)
        want[places] = torch.tensor([w for row in slow(method, trajectories) for w in row], dtype=torch.float64)
        near = 1e-9 if kind in (Turn, Gigpo) else 1e-12  # equal returns may differ by a rounding, over a deviation of 0 + 1e-6
        torch.testing.assert_close(got_values, want, rtol=1e-12, atol=near, msg=lambda m, s=seed, k=method: f"{s} {k}: {m}")
        for value in got.diagnostics.values():
            assert value.isfinite()


def parts_of(call, order):
    """The sequences of a pack in another order, or some of them, and the places of their tokens in the pack."""
    bounds = call["cu_seqlens"].tolist()
    index = torch.tensor([i for b in order for i in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    per_sequence = {n: call[n][torch.tensor(order, dtype=torch.int64)] for n in ("advantages", "groups")}
    lengths = [bounds[b + 1] - bounds[b] for b in order]
    rows = {n: x[index] for n, x in call.items() if n not in ("advantages", "groups", "cu_seqlens")}
    return {**rows, **per_sequence, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}, index


PACK_WIDE = {"egrsd", "cl_egrsd", "sc_grpo", "high_entropy"}  # they compare a token with the whole pack, as their papers do


@pytest.mark.parametrize("name", sorted(METHODS))
def test_invariances(name, backend):
    """Noise on masked tokens, tokens added outside the mask, the order of sequences and a split of the pack change nothing."""
    for seed in range(2 if backend == "triton" else 12):
        r = random.Random(f"{name}{seed}")
        call, _, _ = random_pack(r, short=backend == "triton")
        whole, batch = credit_weights(**call, method=name), len(call["advantages"])
        noisy = dict(call)
        for field in ("signal", "entropy", "teacher_entropy", "forward_kl", "turn_rewards"):
            noisy[field] = torch.where(call["mask"], call[field], math.nan)
        noisy["turn_ids"] = torch.where(call["mask"], call["turn_ids"], -5)
        assert torch.equal(credit_weights(**noisy, method=name).token_advantages, whole.token_advantages)
        assert_policy_tokens_same(call, whole, name, r)
        groups = sorted(set(call["groups"].tolist()))
        of_group = [[b for b in range(batch) if call["groups"][b] == group] for group in groups]
        orders = [r.sample(range(batch), batch)] + ([] if name in PACK_WIDE else of_group)
        for order in orders:
            part, index = parts_of(call, order)
            got = credit_weights(**part, method=name)
            for field in ("token_advantages", "weights", "signal", "credit"):
                torch.testing.assert_close(getattr(got, field), getattr(whole, field)[index], rtol=1e-12, atol=1e-12)
            assert torch.equal(got.segment_ids, whole.segment_ids[index]) and torch.equal(got.onsets, whole.onsets[index])


def assert_policy_tokens_same(call, whole, name, r):
    """The pack without its masked tokens gives the same on the others."""
    keep = call["mask"]
    counts = [int(keep[a:b].sum()) for a, b in zip(call["cu_seqlens"], call["cu_seqlens"][1:], strict=False)]
    fewer = {
        n: x[keep] if len(x) == len(keep) and n not in ("advantages", "groups", "cu_seqlens") else x for n, x in call.items()
    }
    fewer |= {"cu_seqlens": torch.tensor([0, *counts]).cumsum(0).int(), "mask": None if r.random() < 0.5 else fewer["mask"]}
    got = credit_weights(**fewer, method=name)
    torch.testing.assert_close(got.token_advantages, whole.token_advantages[keep], rtol=1e-12, atol=1e-12)
    assert torch.equal(got.segment_ids, whole.segment_ids[keep])


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"turn", "gigpo"}))
def test_no_weight_turns_an_advantage_round(name, backend):
    """A-hat has A's sign (or is 0); A = 0 gives A-hat = 0, and W = 1 where the weight depends on A."""
    for seed in range(3):
        call, _, _ = random_pack(random.Random(f"{name}{seed}"), short=backend == "triton")
        got = credit_weights(**call, method=name)
        a = call["advantages"].repeat_interleave(call["cu_seqlens"].diff().long())
        assert (got.weights >= 0).all() and (got.token_advantages * a >= 0).all()
        flat = call["mask"] & (a == 0)
        assert not got.token_advantages[flat].any()
        if name in (
            "gear",
            "grpo",
            "rlsd",
            "token",
            "kl_only",
            "entropy_only",
            "entropy_window",
            "random",
            "fixed",
            "tool_call",
            "tilt",
        ):
            assert (got.weights[flat] == 1).all()


@pytest.mark.parametrize("options", [{}, {"segmenter": "random"}, {"segmenter": "fixed", "alpha": 1.8}, {"renormalize": True}])
def test_tilt_keeps_the_mean_of_gear_and_its_segments_and_nothing_else(options):
    for seed in range(5):
        call, _, places = random_pack(random.Random(seed), short=True)
        gear, tilt = credit_weights(**call, method=Gear(**options)), credit_weights(**call, method=Tilt(**options))
        for field in ("signal", "credit", "segment_ids", "onsets"):
            assert torch.equal(getattr(tilt, field), getattr(gear, field)), field
        sequence = torch.arange(len(call["advantages"])).repeat_interleave(call["cu_seqlens"].diff().long())
        for b in range(len(call["advantages"])):
            own = call["mask"] & (sequence == b)
            if own.any():
                mean = gear.weights[own].mean()
                torch.testing.assert_close(tilt.weights[own], mean.expand(int(own.sum())), rtol=1e-12, atol=0)
        assert not tilt.weights[~call["mask"]].any() and len(places) == int(call["mask"].sum())


def test_turns_are_shown_as_segments():
    call, _, _ = random_pack(random.Random(3))
    got = credit_weights(**call, method="turn")
    assert (got.segment_ids[call["mask"]] >= 0).all() and (got.weights[call["mask"]] == 1).all()
    assert got.onsets.sum() == len({(s, i) for s, i in zip(*labels(call, got), strict=True) if i >= 0})


def labels(call, got):
    sequence = torch.arange(len(call["advantages"])).repeat_interleave(call["cu_seqlens"].diff().long())
    return sequence.tolist(), got.segment_ids.tolist()


def test_mt_grpo_rewards_the_tool_turn_and_the_outcome_apart():
    """Two siblings, two turns each: the first call works and the answer is wrong, and the other way round."""
    call = {
        "advantages": torch.tensor([-1.0, 1.0]),
        "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
        "turn_ids": torch.tensor([0, 0, 1, 0, 0, 1]),
        "turn_rewards": torch.tensor([1.0, 1, 0, 0, 0, 0]),
        "groups": torch.tensor([0, 0]),
    }
    got = credit_weights(None, None, **call, method=Turn(std=False))
    assert got.token_advantages.tolist() == [-0.5, -0.5, -1.0, 0.5, 0.5, 1.0]


def test_rlsd_decays_over_the_steps():
    assert [Rlsd().at(step).mix for step in (1, 26, 51, 100)] == [0.5, 0.25, 0.0, 0.0]
    assert Rlsd(decay_steps=0).at(1000).mix == 0.5
    off = credit_weights(torch.randn(4), None, torch.ones(1), torch.tensor([0, 4], dtype=torch.int32), method=Rlsd().at(51))
    assert torch.equal(off.weights, torch.ones(4))


def test_missing_inputs_are_named():
    one = (torch.zeros(3), torch.zeros(3), torch.ones(1), torch.tensor([0, 3], dtype=torch.int32))
    needs = {"egrsd": "teacher_entropy", "sgcd": "teacher_entropy", "sc_grpo": "forward_kl", "turn": "turn_rewards"}
    for name, missing in (needs | {"gigpo": "turn_rewards"}).items():
        with pytest.raises(GearKernelsError, match=f"{missing}: given None"):
            credit_weights(*one, method=name)
    with pytest.raises(GearKernelsError, match="forward_kl: given NaN at sequence 0, position 1"):
        credit_weights(*one, method="sc_grpo", forward_kl=torch.tensor([0.0, math.nan, 0.0]))


def test_infinite_divergences_stay_finite():
    inf = torch.tensor([0.0, math.inf, 1.0])
    call = {"teacher_entropy": torch.ones(3), "forward_kl": inf}
    for name in ("sc_grpo", "sgcd", "rlsd", "amr_sd", "egrsd"):
        for advantage in (-1.0, 0.0, 1.0):
            bounds = torch.tensor([0, 3], dtype=torch.int32)
            got = credit_weights(inf, None, torch.tensor([advantage]), bounds, method=name, **call)
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
    (lambda: Turn(weight=-1), "Turn.weight: given -1"),
    (lambda: Turn(std=1), "Turn.std: given 1"),
    (lambda: Gigpo(gamma=1.5), "Gigpo.gamma: given 1.5"),
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


class Launches:
    """In a kernel's place: counts its launches and runs nothing."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.count += 1

        return launch


SCANNED = sorted(name for name in METHODS if METHODS[name].rule() is not None)
# with a mask the turn methods do look, as their docs say


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name, masked", [*((n, m) for n in SCANNED for m in (False, True)), ("turn", False), ("gigpo", False)])
def test_on_a_gpu_one_launch_and_no_look_at_a_value(name, masked, backend, monkeypatch):
    """Meta tensors stand in for a GPU's: any look at a value raises."""
    from gear_kernels.triton import scan as module

    scan, tally = Launches(), Launches()
    monkeypatch.setattr(module, "_scan_kernel", scan)
    monkeypatch.setattr(module, "_tally_kernel", tally)
    monkeypatch.setattr(backends, "choose", lambda device, dtype: "triton")
    call, _, _ = random_pack(random.Random(1))
    call = {field: x.to("meta") for field, x in call.items() if field != "mask" or masked}
    got = credit_weights(**call, method=name)
    assert all(x.device.type == "meta" and x.shape == call["signal"].shape for x in got[:6])
    assert all(x.device.type == "meta" and x.shape == () for x in got.diagnostics.values())
    assert (scan.count, tally.count) == ((1, 1) if METHODS[name].rule() is not None else (0, 0))
