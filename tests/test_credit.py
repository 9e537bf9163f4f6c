"""Credit weights: the worked example of docs/mathematics.md, a slow literal transcription of the paper, their invariances."""

from __future__ import annotations

import json
import math
import random

import fuzzing
import pytest
import torch

import gear_kernels
from gear_kernels import backends
from gear_kernels.credit import credit_weights
from gear_kernels.errors import GearKernelsError
from gear_kernels.methods import METHODS, NORMALIZERS, SEGMENTERS, Gear, Grpo

RKL = [0.0, 0.05, 2.0, 0.1, 0.4, 0.0, 1.0, 0.2, 0.0, 0.1]
ENTROPY = [0.5, 0.4, 1.0, 0.2, 0.9, 1.6, 0.8, 0.7, 1.1, 1.3]
FLOATS = ("token_advantages", "weights", "signal", "credit")


@pytest.fixture(params=sorted(backends.BACKENDS), autouse=True)
def backend(request):
    """Every test of this file runs on the compiled scan, the reference and the Triton scan (interpreted)."""
    with gear_kernels.backend(request.param):
        yield request.param


def cases(backend, count, rng, interpreted=None):
    """Random cases; the interpreter takes 10 ms for every sequence, so there they are short, and `interpreted` of them."""
    small = {"max_sequences": 2, "max_tokens": 12} if backend == "triton" else {}
    return (random_case(rng, **small) for _ in range(interpreted or fuzzing.often(count) if backend == "triton" else count))


# --- the paper, one token at a time, on Python floats -----------------------------------------------------------------


def slow_normalise(x, kind, q, floor=0.0):
    if not x or min(x) == max(x):
        return [0.0] * len(x)
    if kind == "minmax":
        return [(v - min(x)) / max(max(x) - min(x), floor) for v in x]
    if kind == "none":
        return [min(max(v, 0.0), 1.0) for v in x]
    x = [abs(v) if kind == "abs_max" else max(v, 0.0) for v in x]
    top = max(x)
    if top == 0:
        return [0.0] * len(x)
    if kind == "quantile":
        place = q * (len(x) - 1)
        below, above = sorted(x)[math.floor(place)], sorted(x)[math.ceil(place)]
        top = below + (place - math.floor(place)) * (above - below) or top
    return [min(v / max(top, floor), 1.0) for v in x]


def slow_segments(gear, g, h, turns):
    """Segments of one trajectory as (first, last), by the rule of each deterministic segmenter."""
    n = len(g)
    found = []
    if gear.segmenter == "fixed":
        return [(t, min(t + gear.fixed_len, n) - 1) for t in range(n) if t % gear.fixed_len == 0]
    if gear.segmenter == "turn":
        for t in range(n):
            if t > 0 and turns[t] == turns[t - 1]:
                found[-1] = (found[-1][0], t)
            else:
                found.append((t, t))
        return found
    t = 0
    while t < n and gear.segmenter != "token":
        if gear.segmenter != "entropy_only" and not g[t] > gear.kl_threshold:
            t = t + 1
            continue
        end = t
        while end < n - 1:
            u = end + 1
            if gear.max_segment_len is not None and u - t + 1 > gear.max_segment_len:
                break
            if gear.stop_at_turn and turns[u] != turns[t]:
                break
            if gear.segmenter == "kl_only":
                if g[u] > gear.kl_threshold:
                    break
                end = u
                continue
            end = u
            seen = h[max(0, u - gear.window + 1) : u + 1] if gear.segmenter == "entropy_window" else [h[u]]
            if sum(seen) / len(seen) > gear.entropy_ratio * max(h[t], gear.entropy_floor):
                break
        found.append((t, end))
        t = end + 1
    return found


def slow_sequence(gear, signal, h, turns, advantage, segments=None):
    """Eq. 2-5 on one trajectory's policy tokens: (token advantages, W, g, c, segment ids, onsets)."""
    g = slow_normalise(signal, gear.normalizer, gear.quantile, gear.signal_floor)
    segments = slow_segments(gear, g, h, turns) if segments is None else segments
    sign = (advantage > 0) - (advantage < 0)
    weights, credit, ids, onsets = [], [], [], []
    for t in range(len(g)):
        holder = [i for i, (first, last) in enumerate(segments) if first <= t <= last]
        assert len(holder) <= 1, "segments overlap"
        onset = segments[holder[0]][0] if holder else t
        w = 0.5 + (0.5 - g[onset]) * sign
        beta = 1 - gear.alpha / 2
        weights.append(gear.alpha * w + beta)
        credit.append(g[onset])
        ids.append(holder[0] if holder else -1)
        onsets.append(bool(holder) and onset == t)
    if gear.renormalize and weights:
        mean = sum(weights) / len(weights)
        weights = [w / mean for w in weights]
    return [w * advantage for w in weights], weights, g, credit, ids, onsets


def slow_credit(gear, case):
    """The same for a pack, on lists; masked tokens hold (0, 0, 0, 0, -1, False)."""
    rows, given = [], {name: x.tolist() for name, x in case.items()}
    for b, advantage in enumerate(given["advantages"]):
        places = range(given["cu_seqlens"][b], given["cu_seqlens"][b + 1])
        policy = [i for i in places if given["mask"][i]]
        columns = [[given[name][i] for i in policy] for name in ("signal", "entropy", "turn_ids")]
        result = dict(zip(policy, zip(*slow_sequence(gear, *columns, advantage), strict=True), strict=True))
        rows += [result.get(i, (0.0, 0.0, 0.0, 0.0, -1, False)) for i in places]
    return list(zip(*rows, strict=True)) if rows else [()] * 6


# --- cases ------------------------------------------------------------------------------------------------------------


def random_case(rng, max_sequences=5, max_tokens=30):
    """A pack with empty sequences, sequences without policy tokens, ties, constant signals, and turns."""
    signal, entropy, mask, turns, cu, advantages = [], [], [], [], [0], []
    for _ in range(rng.randint(0, max_sequences)):
        n = rng.choice([0, 1, 2, rng.randint(3, max_tokens), rng.randint(3, max_tokens)])
        kind, policy = rng.choice(["grid", "smooth", "constant", "sparse"]), rng.choice([0.0, 0.3, 0.8, 1.0])
        low = rng.choice([0.0, -1.0])  # the full KL, or the signed k1
        turn = 0
        for _ in range(n):
            smooth = rng.uniform(low, 1) ** 3
            values = {"grid": rng.randint(int(low * 10), 10) / 10, "smooth": smooth, "constant": 0.7}
            signal.append(values.get(kind, smooth if rng.random() < 0.05 else 0.0))
            entropy.append(rng.choice([rng.randint(0, 8) / 4, rng.expovariate(1.0)]))
            mask.append(rng.random() < policy)
            turn = rng.randint(0, 3) if rng.random() < 0.15 else turn
            turns.append(turn)
        cu.append(cu[-1] + n)
        advantages.append(rng.choice([-1.0, 1.0, 0.0, rng.gauss(0, 2)]))
    return {
        "signal": torch.tensor(signal, dtype=torch.float64),
        "entropy": torch.tensor(entropy, dtype=torch.float64),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "cu_seqlens": torch.tensor(cu, dtype=torch.int32),
        "mask": torch.tensor(mask, dtype=torch.bool),
        "turn_ids": torch.tensor(turns, dtype=torch.int64),
    }


def random_gear(rng, segmenter):
    """Scales of random_case are 0.7 (constant), tenths (grid) and anything up to 2: floors lie below, at and above them."""
    normalizer = rng.choice(NORMALIZERS)
    return Gear(
        normalizer=normalizer,
        quantile=rng.choice([0.5, 0.95, 1.0]),
        signal_floor=0.0 if normalizer == "none" else rng.choice([0.0, 1e-3, 0.7, 0.9, 1.0, 2 * rng.random()]),
        kl_threshold=rng.choice([0.0, 0.1, 0.5, 1.0, rng.random()]),
        entropy_ratio=rng.choice([0.5, 1.0, 1.5, 3.0]),
        alpha=rng.choice([0.0, 0.2, 1.0, 1.9]),
        segmenter=segmenter,
        renormalize=rng.random() < 0.3,
        max_segment_len=rng.choice([None, None, 1, 2, 5]),
        entropy_floor=rng.choice([0.0, 0.0, 0.5]),
        stop_at_turn=rng.random() < 0.3,
        fixed_len=rng.choice([1, 3, 8]),
        window=rng.choice([1, 3, 8]),
    )


def assert_equals_slow(got, want):
    for name, column in zip(FLOATS, want, strict=False):
        expected = torch.tensor(column, dtype=torch.float64)
        torch.testing.assert_close(getattr(got, name), expected, rtol=0, atol=1e-12)
    assert got.segment_ids.tolist() == list(want[4]) and got.segment_ids.dtype == torch.int32
    assert got.onsets.tolist() == list(want[5])


def assert_same(got, want):
    for name in (*FLOATS, "segment_ids", "onsets"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def example(advantage, dtype=torch.float64, **options):
    one = torch.tensor([advantage], dtype=dtype)
    rows = torch.tensor(RKL, dtype=dtype), torch.tensor(ENTROPY, dtype=dtype)
    return credit_weights(*rows, one, torch.tensor([0, 10], dtype=torch.int32), method=Gear(normalizer="minmax"), **options)


# --- the paper's rule -------------------------------------------------------------------------------------------------

EXAMPLE_WEIGHTS = [
    (1.0, [1.1, 1.095, 0.9, 0.9, 0.9, 0.9, 1, 1, 1, 1]),
    (-1.0, [0.9, 0.905, 1.1, 1.1, 1.1, 1.1, 1, 1, 1, 1]),
    (0.0, [1.0] * 10),
]


@pytest.mark.parametrize("advantage, weights", EXAMPLE_WEIGHTS)
def test_worked_example(advantage, weights):
    got = example(advantage)
    near = {"rtol": 0, "atol": 1e-15}
    g = [0.0, 0.025, 1.0, 0.05, 0.2, 0.0, 0.5, 0.1, 0.0, 0.05]
    torch.testing.assert_close(got.signal, torch.tensor(g, dtype=torch.float64), **near)
    credit = torch.tensor([0.0, 0.025, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(got.credit, credit, **near)
    assert got.segment_ids.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert got.onsets.nonzero().flatten().tolist() == [2, 6]
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(got.weights, expected, rtol=0, atol=5e-16)  # two units in the last place of 1.1
    torch.testing.assert_close(got.token_advantages, expected * advantage, rtol=0, atol=5e-16)


def test_worked_example_diagnostics():
    got = {name: round(value.item(), 6) for name, value in example(1.0).diagnostics.items()}
    assert got == {
        "share_above_threshold": 0.3,
        "share_in_segments": 0.8,
        "segments_per_trajectory": 2.0,
        "mean_segment_length": 4.0,
        "share_unclosed": 0.0,  # the entropy of the last token ends the last segment
        "mean_signal": 0.385,
        "silent_trajectories": 0.0,
        "mean_weight_positive": 0.9795,
        "mean_weight_negative": 1.0,
    }


@pytest.mark.parametrize("part", range(4))
def test_gear_equals_slow_transcription(part, backend):
    rng = fuzzing.rng(part)
    for case in cases(backend, 125, rng):
        gear = random_gear(rng, "entropy")
        assert_equals_slow(credit_weights(**case, method=gear), slow_credit(gear, case))


@pytest.mark.parametrize("segmenter", sorted(set(SEGMENTERS) - {"entropy", "random"}))
def test_ablation_equals_slow_transcription(segmenter, backend):
    rng = fuzzing.rng(segmenter)
    for case in cases(backend, 500, rng):
        gear = random_gear(rng, segmenter)
        assert_equals_slow(credit_weights(**case, method=gear), slow_credit(gear, case))


def lengths_of(credit, start, end):
    ids = credit.segment_ids[start:end]
    return sorted(int((ids == i).sum()) for i in range(int(ids.max()) + 1)) if end > start else []


def test_random_control(backend):
    """As many and as long as GEAR's, never overlapping, seeded, and credited by the g of their first token."""
    rng, moved = random.Random(0), 0
    for case in (random_case(rng) for _ in range(30 if backend == "triton" else 200)):
        gear = random_gear(rng, "entropy")
        twin = Gear(**{**gear.__dict__, "segmenter": "random"})
        rule, got = credit_weights(**case, method=gear), credit_weights(**case, method=twin)
        assert_same(got, credit_weights(**case, method=twin))
        moved += not torch.equal(rule.segment_ids, got.segment_ids)
        bounds = case["cu_seqlens"].tolist()
        for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            assert lengths_of(got, start, end) == lengths_of(rule, start, end)
            policy = [i for i in range(start, end) if case["mask"][i]]
            ids = [int(got.segment_ids[i]) for i in policy]
            runs = [(ids.index(i), len(ids) - 1 - ids[::-1].index(i)) for i in range(max(ids, default=-1) + 1)]
            assert all(set(ids[first : last + 1]) == {i} for i, (first, last) in enumerate(runs)), "a segment has a gap"
            columns = [[case[name][i].item() for i in policy] for name in ("signal", "entropy", "turn_ids")]
            want = slow_sequence(twin, *columns, case["advantages"][b].item(), segments=runs)
            assert got.weights[policy].tolist() == pytest.approx(want[1], abs=1e-12)
            assert got.onsets[policy].tolist() == want[5]
    assert moved > 3


def test_random_control_seed_and_spread():
    """Other seeds give other places, and every place is about equally likely."""
    signal = torch.zeros(5, dtype=torch.float64)
    signal[0] = 1.0  # one segment of two tokens: onset 0, ended by the entropy of token 1
    rows = signal, torch.tensor([1.0, 9, 1, 1, 1]), torch.ones(1), torch.tensor([0, 5], dtype=torch.int32)
    firsts = [credit_weights(*rows, method=Gear(segmenter="random", seed=s)).onsets.tolist().index(True) for s in range(400)]
    assert all(70 <= firsts.count(place) <= 130 for place in range(4)) and firsts.count(4) == 0


def test_random_control_order_and_independence():
    """Lengths 3 and 2 come in both orders; sequences with different signals draw differently under one seed."""
    signal, entropy = torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.tensor([1.0, 1, 9, 1, 9, 9])
    rows = signal.repeat(20), entropy.repeat(20), torch.ones(20), torch.arange(0, 121, 6, dtype=torch.int32)
    rows[0].view(20, 6)[:, 1] = torch.linspace(0, 0.05, 20)  # below the threshold: the same lengths for all twenty
    got = credit_weights(*rows, method="random")
    places = {tuple(ids) for ids in got.segment_ids.view(20, 6).tolist()}
    assert {ids.count(0) for ids in places} == {2, 3} and {ids.count(1) for ids in places} == {2, 3}
    assert len(places) > 1


# --- invariances ------------------------------------------------------------------------------------------------------


def every_method(rng):
    yield Grpo()
    for segmenter in SEGMENTERS:
        yield random_gear(rng, segmenter)


def packed(case, order):
    """The sequences of a case in another order (or some of them), with the packed token index of each new token."""
    bounds = case["cu_seqlens"].tolist()
    index = [i for b in order for i in range(bounds[b], bounds[b + 1])]
    cu = [0]
    for b in order:
        cu.append(cu[-1] + bounds[b + 1] - bounds[b])
    rows = {name: case[name][index] for name in ("signal", "entropy", "mask", "turn_ids")}
    return {**rows, "advantages": case["advantages"][order], "cu_seqlens": torch.tensor(cu, dtype=torch.int32)}, index


def assert_rows_same(part, whole, index, backend):
    for name in (*FLOATS, "segment_ids", "onsets"):
        rtol = 4e-15 if backend == "triton" and name in FLOATS else 0  # renormalize: the mean's sum has the order of its blocks
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[index], rtol=rtol, atol=0, msg=name)


def test_order_and_split_of_the_pack_change_nothing(backend):
    rng = random.Random(1)
    for case in cases(backend, 25, rng, interpreted=4):
        batch = len(case["advantages"])
        shuffled = rng.sample(range(batch), batch)
        cut = rng.randint(0, batch)
        for method in every_method(rng):
            whole = credit_weights(**case, method=method)
            for order in (shuffled, list(range(cut)), list(range(cut, batch))):
                part, index = packed(case, order)
                assert_rows_same(credit_weights(**part, method=method), whole, index, backend)


def with_masked_tokens(case, rng):
    """Masked tokens, NaN in both inputs, put in at random places; also the new index of each old token."""
    bounds, kept, rows, cu = case["cu_seqlens"].tolist(), [], [], [0]
    for start, end in zip(bounds, bounds[1:], strict=False):
        for i in range(start, end + 1):
            rows += [(math.nan, math.nan, False, rng.randint(0, 9))] * rng.choice([0, 0, 1, 3])
            if i < end:
                kept.append(len(rows))
                rows.append(tuple(case[name][i].item() for name in ("signal", "entropy", "mask", "turn_ids")))
        cu.append(len(rows))
    columns = zip(*rows, strict=True) if rows else [()] * 4
    names = ("signal", "entropy", "mask", "turn_ids")
    new = {name: torch.tensor(column, dtype=case[name].dtype) for name, column in zip(names, columns, strict=True)}
    return {**case, **new, "cu_seqlens": torch.tensor(cu, dtype=torch.int32)}, kept


def test_masked_tokens_change_nothing(backend):
    rng = random.Random(2)
    for case in cases(backend, 25, rng, interpreted=4):
        longer, kept = with_masked_tokens(case, rng)
        for method in every_method(rng):
            want, got = credit_weights(**case, method=method), credit_weights(**longer, method=method)
            assert_rows_same(want, got, kept, backend)
            outside = ~longer["mask"]
            assert not got.weights[outside].any() and not got.token_advantages[outside].any()
            assert (got.segment_ids[outside] == -1).all() and not got.onsets[outside].any()
            for name, value in want.diagnostics.items():  # equal but for the order of the kernel's sums
                torch.testing.assert_close(got.diagnostics[name], value, rtol=1e-6 if backend == "triton" else 0, atol=0)


@pytest.mark.parametrize(
    "dtype, alpha",
    [
        (torch.float64, 0.0),
        (torch.float64, 1.99),
        (torch.float32, 0.2),
        (torch.float32, 1.0),
        (torch.bfloat16, 0.3),
        (torch.bfloat16, 1.99),
        (torch.float16, 0.2),
    ],
)
def test_zero_advantage_gives_one_and_signs_stay(dtype, alpha):
    rng = random.Random(3)
    for segmenter in SEGMENTERS:
        case = random_case(rng)
        case |= {name: case[name].to(dtype) for name in ("signal", "entropy", "advantages")}
        method = Gear(**{**random_gear(rng, segmenter).__dict__, "alpha": alpha, "renormalize": False})
        got = credit_weights(**{**case, "advantages": torch.zeros_like(case["advantages"])}, method=method)
        assert (got.weights == case["mask"]).all() and not got.token_advantages.any()
        got = credit_weights(**case, method=method)
        assert (got.weights[case["mask"]] > 0).all()
        lengths = case["cu_seqlens"].diff().long()
        a = case["advantages"].repeat_interleave(lengths)
        assert (got.token_advantages.sign() == a.sign() * case["mask"]).all()
        tolerance = 1e-6
        assert ((got.weights - 1).abs()[case["mask"]] <= alpha / 2 + tolerance).all()


def test_renormalize_gives_mean_one_per_trajectory(backend):
    rng = random.Random(4)
    for case in cases(backend, 30, rng, interpreted=10):
        got = credit_weights(**case, method=Gear(renormalize=True, alpha=1.0))
        bounds = case["cu_seqlens"].tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            weights = got.weights[start:end][case["mask"][start:end]]
            assert not len(weights) or weights.mean().item() == pytest.approx(1, abs=1e-12)


# --- silent trajectories -----------------------------------------------------------------------------------------------


def spoken_and_silent(loud, quiet=1e-5, dtype=torch.float64):
    """Two packed trajectories of equal shape: the largest signals are `loud` and `quiet` nats."""
    shape = torch.tensor([0.0, 0.05, 1.0, 0.1, 0.4, 0.0], dtype=dtype)
    entropy = torch.tensor([0.5, 0.4, 1.0, 0.2, 0.9, 1.6], dtype=dtype)
    rows = torch.cat([shape * loud, shape * quiet]), entropy.repeat(2), torch.tensor([1.0, -1.0], dtype=dtype)
    return *rows, torch.tensor([0, 6, 12], dtype=torch.int32)


SCALED = [name for name in NORMALIZERS if name != "none"]


@pytest.mark.parametrize("normalizer", SCALED)
def test_D10_noise_of_a_silent_trajectory_gets_no_spread(normalizer):
    """Without a floor 1e-5 nats weigh as 1 nat does; with one their g is at most 0.01. The other trajectory keeps every bit."""
    rows = spoken_and_silent(loud=1.0)
    paper = credit_weights(*rows, method=Gear(normalizer=normalizer, quantile=1.0))
    torch.testing.assert_close(paper.signal[6:], paper.signal[:6], rtol=0, atol=1e-12)
    got = credit_weights(*rows, method=Gear(normalizer=normalizer, quantile=1.0, signal_floor=1e-3))
    for name in (*FLOATS, "segment_ids", "onsets"):
        assert torch.equal(getattr(got, name)[:6], getattr(paper, name)[:6]), name
    torch.testing.assert_close(got.signal[6:], rows[0][6:] / 1e-3, rtol=1e-12, atol=0)
    assert got.signal[6:].max().item() == pytest.approx(0.01) and not got.onsets[6:].any()
    assert ((got.weights[6:] - 0.9).abs() <= 0.2 * 0.01 + 1e-12).all()


@pytest.mark.parametrize("normalizer", SCALED)
def test_D10_nothing_jumps_at_the_floor(normalizer):
    """A scale a millionth below, at and a millionth above the floor: g moves by no more than that."""
    floor, found = 0.01, []
    for loud in (floor * (1 - 1e-6), floor, floor * (1 + 1e-6)):
        method = Gear(normalizer=normalizer, quantile=1.0, signal_floor=floor)
        found.append(credit_weights(*spoken_and_silent(loud), method=method).signal[:6])
    assert (found[0] - found[1]).abs().max() <= 1.1e-6 and (found[2] - found[1]).abs().max() <= 1.1e-6
    assert found[2].max() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_D10_floor_zero_and_a_floor_below_every_scale_are_the_paper(segmenter, dtype):
    rows = spoken_and_silent(1.0, 0.5, dtype)
    turns = torch.arange(12) // 3
    results = [credit_weights(*rows, turn_ids=turns, method=Gear(segmenter=segmenter))]
    for floor in (0.0, 0.49, 0.5):
        results.append(credit_weights(*rows, turn_ids=turns, method=Gear(segmenter=segmenter, signal_floor=floor)))
        assert_same(results[-1], results[0])


def share_silent(signal, lengths, method, mask=None):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    n = bounds[-1]
    rows = torch.tensor(signal), torch.ones(n), torch.ones(len(lengths)), bounds
    more = {name: torch.ones(n) for name in ("teacher_entropy", "forward_kl")}
    return credit_weights(*rows, method=method, mask=mask, turn_ids=torch.arange(n), **more).diagnostics["silent_trajectories"]


def test_D10_silent_trajectories_are_counted():
    """Scale below 1e-3 nats or the floor; trajectories without a policy token count for nothing, constant ones as silent."""
    signal, lengths = [0.0, 2e-3, 0.0, 9e-4, -5.0, 9e-4, 7.0, 7.0, 1.0, 0.0], [2, 2, 2, 2, 0, 2]
    # with no floor the second, the third (its -5 counts for nothing) and the constant one
    for floor, share in ((0.0, 3 / 5), (9e-4, 3 / 5), (1e-3, 3 / 5), (2.5e-3, 4 / 5), (1.0, 4 / 5), (10.0, 1.0)):
        for segmenter in SEGMENTERS:
            got = share_silent(signal, lengths, Gear(segmenter=segmenter, signal_floor=floor))
            assert got.item() == pytest.approx(share)
    expected = {"max": 3 / 5, "minmax": 2 / 5, "abs_max": 2 / 5, "quantile": 3 / 5, "none": 0.0}
    for normalizer, share in expected.items():
        got = share_silent(signal, lengths, Gear(normalizer=normalizer, quantile=1.0))
        assert got.item() == pytest.approx(share), normalizer
    mask = torch.tensor([True] * 8 + [False] * 2)
    assert share_silent(signal, lengths, "gear", mask).item() == pytest.approx(3 / 4)
    assert share_silent(signal, lengths, "sgcd").item() == pytest.approx(3 / 5)
    assert all(share_silent(signal, lengths, name) == 0 for name in ("grpo", "rlsd", "sc_grpo", "high_entropy", "amr_sd"))
    assert share_silent([], [0], "gear") == 0


# --- options, dtypes, edges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype):
    got = example(-1.0, dtype)
    assert got.weights.dtype == got.token_advantages.dtype == torch.float32
    assert got.segment_ids.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]
    rounded = torch.tensor(RKL, dtype=dtype).float()
    assert torch.equal(got.signal, rounded / 2)


def test_threshold_is_strict_in_float32():
    """0.2 / 2 is 0.1 in float32 too, where it exceeds the double 0.1: the threshold must be rounded alike."""
    signal = torch.tensor([0.2, 2.0])
    got = credit_weights(signal, torch.ones(2), torch.ones(1), torch.tensor([0, 2], dtype=torch.int32))
    assert got.segment_ids.tolist() == [-1, 0]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, math.inf])
def test_constant_signal_gives_zero(normalizer, value):
    cu = torch.tensor([0, 4, 5, 5], dtype=torch.int32)
    got = credit_weights(torch.full((5,), value), torch.ones(5), torch.ones(3), cu, method=Gear(normalizer=normalizer))
    assert not got.signal.any() and (got.segment_ids == -1).all()
    assert torch.allclose(got.weights, torch.full((5,), 1.1))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_infinite_signal_is_the_largest(normalizer):
    """The full KL is infinite where the teacher rules the student's token out: g = 1 there, and nothing becomes NaN."""
    cu = torch.tensor([0, 4], dtype=torch.int32)
    method = Gear(normalizer=normalizer, quantile=1.0)
    got = credit_weights(torch.tensor([0.0, math.inf, 1.0, -math.inf]), torch.ones(4), torch.ones(1), cu, method=method)
    assert got.signal[1] == 1 and got.signal.isfinite().all() and got.weights.isfinite().all()


def test_names_mean_defaults():
    rng = random.Random(5)
    case = random_case(rng)
    case |= {"anchors": case["turn_ids"], "groups": torch.zeros(len(case["advantages"]), dtype=torch.int64)}
    assert METHODS["gear"] == Gear() and METHODS["grpo"] == Grpo()
    for name, method in METHODS.items():
        more = {name: case["entropy"] for name in ("teacher_entropy", "forward_kl", "turn_rewards") if name in method.needs}
        assert_same(credit_weights(**case, method=name, **more), credit_weights(**case, method=method, **more))
    relatives = {"tilt", "rlsd", "egrsd", "cl_egrsd", "sc_grpo", "amr_sd", "high_entropy", "sgcd", "tool_call", "turn", "gigpo"}
    assert set(METHODS) == {"gear", "grpo", *SEGMENTERS, *relatives} - {"entropy"}
    assert METHODS["tool_call"] == Gear(segmenter="turn")
    del case["turn_ids"]
    assert_same(credit_weights(**case), credit_weights(**case, method=Gear()))


def test_unneeded_inputs_may_be_none():
    advantages, cu = torch.tensor([2.0, -1.0]), torch.tensor([0, 2, 3], dtype=torch.int32)
    for mask in (None, torch.tensor([True, False, True])):
        got = credit_weights(None, None, advantages, cu, mask=mask, method="grpo")
        assert got.token_advantages.tolist() == [2.0, 2.0 if mask is None else 0.0, -1.0]
    signal = torch.tensor([1.0, 0.0, 0.5])
    assert credit_weights(signal, None, advantages, cu, method="token").credit.tolist() == [1.0, 0.0, 0.0]


def test_no_gradient_flows_and_diagnostics_are_finite():
    signal = torch.rand(6, requires_grad=True)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    got = credit_weights(signal, torch.rand(6), torch.ones(1), cu)
    assert not got.token_advantages.requires_grad and not got.weights.requires_grad
    empty = credit_weights(torch.rand(0), torch.rand(0), torch.rand(0), torch.zeros(1, dtype=torch.int32))
    assert empty.weights.shape == (0,)
    for credit in (got, empty):
        assert all(x.dim() == 0 and math.isfinite(x) for x in credit.diagnostics.values())
        json.dumps({name: x.item() for name, x in credit.diagnostics.items()}, allow_nan=False)


def test_unclosed_segments_are_counted():
    """Unclosed: no entropy ends it before the last policy token; one ended by its turn or its length is closed."""
    signal, entropy = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1, 1, 1])
    rows = signal, entropy, torch.ones(1), torch.tensor([0, 4], dtype=torch.int32)
    turns = torch.tensor([0, 0, 1, 1])
    share = [
        credit_weights(*rows, method=method, turn_ids=turns).diagnostics["share_unclosed"].item()
        for method in (Gear(), Gear(stop_at_turn=True), Gear(max_segment_len=2), Gear(segmenter="kl_only"))
    ]
    assert share == [1.0, 0.0, 0.0, 1.0]
    rows = torch.tensor([1.0, 0, 0, 1]), *rows[1:]
    assert credit_weights(*rows, method="kl_only").diagnostics["share_unclosed"] == 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_input_gives_gpu_output():
    rng = random.Random(6)
    case = random_case(rng)
    got = credit_weights(**{name: x.cuda() for name, x in case.items()})
    assert all(x.is_cuda for x in (*got[:6], *got.diagnostics.values()))
    assert_same(type(got)(*(x.cpu() for x in got[:6]), got.diagnostics), credit_weights(**case))


# --- a user's own method ----------------------------------------------------------------------------------------------


def test_own_method_object():
    class Halve:
        needs = ()

        def apply(self, tokens):
            return Grpo().apply(tokens)._replace(weights=torch.full_like(tokens.signal, 0.5))

    got = credit_weights(None, None, torch.tensor([3.0]), torch.tensor([0, 2], dtype=torch.int32), method=Halve())
    assert got.token_advantages.tolist() == [1.5, 1.5]


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"normalizer": "softmax"}, r"Gear.normalizer: given 'softmax'; expected one of relu_max, .*. To mend: correct"),
    ({"segmenter": "sentence"}, r"Gear.segmenter: given 'sentence'"),
    ({"quantile": 0.0}, r"Gear.quantile: given 0.0; expected a finite number in \(0, 1\]"),
    ({"signal_floor": -1e-3}, r"Gear.signal_floor: given -0.001; expected a finite number of nats, at least 0"),
    ({"signal_floor": math.nan}, r"Gear.signal_floor: given nan; expected a finite number"),
    ({"signal_floor": math.inf}, r"Gear.signal_floor: given inf; expected a finite number"),
    ({"signal_floor": True}, r"Gear.signal_floor: given True"),
    ({"signal_floor": 0.1, "normalizer": "none"}, r'signal_floor: given 0.1; expected 0 with normalizer "none". To mend: choose'),
    ({"kl_threshold": -0.1}, r"Gear.kl_threshold: given -0.1"),
    ({"kl_threshold": "0.1"}, r"Gear.kl_threshold: given '0.1'; expected a finite number"),
    ({"entropy_ratio": 0}, r"Gear.entropy_ratio: given 0; expected a finite number above 0"),
    ({"entropy_ratio": math.inf}, r"Gear.entropy_ratio: given inf"),
    ({"alpha": 2.0}, r"Gear.alpha: given 2.0; expected a finite number in \[0, 2\)"),
    ({"alpha": math.nan}, r"Gear.alpha: given nan"),
    ({"entropy_floor": -1.0}, r"Gear.entropy_floor: given -1.0"),
    ({"max_segment_len": 0}, r"Gear.max_segment_len: given 0; expected an integer of at least 1. To mend: pass None"),
    ({"fixed_len": 2.5}, r"Gear.fixed_len: given 2.5; expected an integer"),
    ({"window": 0}, r"Gear.window: given 0"),
    ({"seed": -1}, r"Gear.seed: given -1"),
    ({"renormalize": 1}, r"Gear.renormalize: given 1; expected a bool"),
    ({"stop_at_turn": "yes"}, r"Gear.stop_at_turn: given 'yes'; expected a bool"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_bad_options(options, message):
    with pytest.raises(GearKernelsError, match=message):
        Gear(**options)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_ARGUMENTS = [
    ({"signal": torch.ones(5)}, r"entropy: given 4 tokens; expected 5"),
    ({"entropy": torch.ones(3)}, r"entropy: given 3 tokens; expected 4"),
    ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: given 3 tokens; expected 4"),
    ({"turn_ids": torch.ones(4)}, r"turn_ids: given dtype torch.float32; expected integer"),
    ({"mask": torch.ones(4)}, r"mask: given dtype torch.float32; expected bool"),
    ({"signal": torch.ones(2, 2)}, r"signal: given shape \(2, 2\); expected one packed dimension"),
    ({"signal": [0.0] * 4}, r"signal: given list; expected a 1-D floating tensor"),
    ({"signal": torch.ones(4, dtype=torch.int64)}, r"signal: given dtype torch.int64; expected floating"),
    ({"signal": torch.ones(4, device="meta")}, r"signal: given on meta; expected on cpu like cu_seqlens"),
    ({"signal": None}, r"signal: given None; expected a tensor, for Gear"),
    ({"entropy": None}, r"entropy: given None; expected a tensor, for Gear"),
    ({"method": "tool_call"}, r"turn_ids: given None; expected a tensor, for Gear"),
    ({"method": Gear(stop_at_turn=True)}, r"turn_ids: given None"),
    ({"advantages": torch.ones(3)}, r"advantages: given 3; expected 2, one per sequence"),
    ({"advantages": torch.tensor([1.0, math.nan])}, r"advantages: given NaN at sequence \[1\]"),
    ({"cu_seqlens": i32(1, 3, 4)}, r"cu_seqlens: given 1 first; expected 0"),
    ({"cu_seqlens": i32(0, 3, 5)}, r"cu_seqlens: given 5 last; expected T = 4"),
    ({"cu_seqlens": i32(0, 5, 4)}, r"cu_seqlens: given 5 then 4 at sequence 1"),
    ({"cu_seqlens": i32()}, r"cu_seqlens: given 0 elements; expected \[B \+ 1\]"),
    ({"cu_seqlens": torch.tensor([0.0, 3, 4])}, r"cu_seqlens: given dtype torch.float32; expected int32"),
    ({"signal": torch.tensor([0, 1, 2, math.nan])}, r"signal: given NaN at sequence 1, position 0 \(packed token 3\)"),
    ({"entropy": torch.tensor([0, math.nan, 2, 3])}, r"entropy: given NaN at sequence 0, position 1 \(packed token 1\)"),
    ({"method": "geer"}, r"method: given 'geer'; expected one of gear, grpo"),
    ({"method": Gear}, r"method: given <class .*Gear'>; expected a name"),
    ({"method": None}, r"method: given None; expected a name"),
]


@pytest.mark.parametrize("change, message", BAD_ARGUMENTS)
def test_bad_arguments(change, message):
    good = {"signal": torch.rand(4), "entropy": torch.rand(4), "advantages": torch.ones(2), "cu_seqlens": i32(0, 3, 4)}
    with pytest.raises(GearKernelsError, match=message):
        credit_weights(**{**good, **change})


# --- the scans against the reference, bit by bit -------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in sorted(backends.BACKENDS) if backends.BACKENDS[name].scans], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("segmenter", sorted(set(SEGMENTERS) - {"random"}))
def test_scan_is_bitwise_the_reference(segmenter, dtype, backend):
    """Every option, masks, ties, sequences of length 0 to 60; several threads; segments across the blocks of the kernel."""
    draw, g = random.Random(segmenter), torch.Generator().manual_seed(1)
    for _ in range(5 if backend == "triton" else 60):
        lengths = torch.randint(0, 60, (7,), generator=g)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        total = int(bounds[-1])
        signal = torch.randn(total, generator=g, dtype=dtype) * (torch.rand(total, generator=g) > 0.3)
        entropy = (torch.rand(total, generator=g, dtype=dtype) * 8).round() / 4  # ties
        mask = torch.rand(total, generator=g) > 0.2 if draw.random() < 0.7 else None
        normalizer = draw.choice(NORMALIZERS)
        if draw.random() < 0.3:
            signal *= 5e-4  # scales from half of SILENT to three times that
        top = signal.abs().max().item()  # one sequence's scale, to the bit, with abs_max and often with others
        floor = draw.choice([0.0, 1e-3, top, top / 2, 2.0])
        method = Gear(
            segmenter=segmenter,
            normalizer=normalizer,
            signal_floor=0.0 if normalizer == "none" else floor,
            quantile=draw.choice([0.5, 0.95, 1.0]),
            kl_threshold=draw.choice([0.0, 0.1, 0.5]),
            entropy_ratio=draw.choice([0.9, 1.5]),
            renormalize=draw.random() < 0.5,
            max_segment_len=draw.choice([None, 1, 3, 10]),
            entropy_floor=draw.choice([0.0, 0.3]),
            stop_at_turn=draw.random() < 0.5,
            window=draw.choice([1, 3, 100]),
        )
        advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.3, -0.1], dtype=dtype)
        call = {"mask": mask, "method": method, "turn_ids": torch.arange(total) // 7}
        results = []
        for name in (backend, "reference"):
            with gear_kernels.backend(name):
                results.append(credit_weights(signal, entropy, advantages, bounds, **call))
        for field, a, b in zip(results[0]._fields, *(r[:6] for r in results), strict=False):
            assert a.dtype == b.dtype, field
            if backend == "triton" and method.renormalize and dtype == torch.float64:
                torch.testing.assert_close(a, b, rtol=4e-15, atol=0)  # the mean's sum has the order of the kernel's blocks
            else:
                assert torch.equal(a, b), (field, method)
        for name, value in results[0].diagnostics.items():
            torch.testing.assert_close(value, results[1].diagnostics[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_compiled_scan_does_not_depend_on_threads(backend):
    g = torch.Generator().manual_seed(2)
    lengths = torch.randint(0, 300, (50,), generator=g)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    signal, entropy = torch.randn(2, int(bounds[-1]), generator=g)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(
                credit_weights(
                    signal, entropy, torch.randn(50, generator=g.manual_seed(3)), bounds, method=Gear(renormalize=True)
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:6], found[1][:6], strict=True))
