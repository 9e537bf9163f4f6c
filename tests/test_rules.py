"""Rules: each record, as both compiled scans run it, is the weight function of reference/credit.py that it stands for."""

import random
from dataclasses import dataclass

import pytest
import torch

import gear_kernels
from gear_kernels import backends, credit_weights, rules
from gear_kernels.methods import METHODS, Method
from gear_kernels.reference import credit as reference

N, B = 60, 3
SCANNING = [name for name in sorted(backends.BACKENDS) if backends.BACKENDS[name].scans]


@dataclass(frozen=True)
class Ruled(Method):
    """A method from outside the package that is nothing but a rule."""

    given: rules.Rule
    needs: tuple[str, ...]

    def rule(self):
        return self.given


def tokens(dtype):
    g = torch.Generator().manual_seed(5)
    rows = {name: torch.randn(N, generator=g).abs().to(dtype) for name in ("entropy", "teacher_entropy", "forward_kl")}
    return torch.randn(N, generator=g).to(dtype), rows, torch.tensor([1.5, -0.5, 0.0], dtype=dtype)


def scanned(rule, needs, dtype):
    signal, rows, advantages = tokens(dtype)
    return credit_weights(
        signal,
        rows.pop("entropy"),
        advantages,
        torch.tensor([0, 20, 41, N], dtype=torch.int32),
        method=Ruled(rule, needs),
        **rows,
    )


def stated(rule, dtype):
    """The rule's weights by the reference, and whether an exp is in them, which the compilers round in ways of their own."""
    signal, rows, advantages = tokens(dtype)
    sequence = torch.arange(B).repeat_interleave(torch.tensor([20, 21, 19]))
    a = advantages[sequence]
    second = None if rule.second is None else rows[rule.second]
    level = None if rule.level is None else rule.level(second, None)
    match rule:
        case rules.GearRule():
            g = torch.cat([reference.normalise(x, rule.cut.normalizer)[0] for x in signal.split([20, 21, 19])])
            return reference.gear_weight(g, a, rule.alpha), False
        case rules.RatioRule():
            return reference.mixed_ratio(reference.bounded_ratio(signal, a, rule.clip), rule.mix), True
        case rules.GatedRatioRule():
            ahead = reference.least_ahead(second, sequence, rule.look_ahead)
            gate = reference.entropy_gate(ahead, level, rule.slope, rule.floor)
            return reference.bounded_ratio(signal, a, rule.clip) * gate, True
        case rules.ShareRule():
            return reference.share(second, level), False
        case rules.MarginRule():
            delta = reference.clipped_delta(signal, rule.bound)
            return reference.margin_weight(delta, a, rule.up, rule.down, rule.margin), False
        case rules.AtLeastRule():
            return reference.at_least(second, level), False
        case rules.LiftRule():
            return torch.ones_like(signal), False  # no segment: nothing is lifted


CASES = {
    "gear": (rules.GearRule(0.4, None, rules.Cut("abs_max")), ("signal",)),
    "ratio": (rules.RatioRule(0.7, 0.3), ("signal",)),
    "gated_ratio": (rules.GatedRatioRule(0.4, 0.6, 0.2, 2), ("signal", "teacher_entropy")),
    "share": (rules.ShareRule(0.6, 1e-3), ("forward_kl",)),
    "margin": (rules.MarginRule(0.3, 0.8, 0.2, 1.1), ("signal",)),
    "at_least": (rules.AtLeastRule(0.3), ("entropy",)),
    "lift": (rules.LiftRule(0.5, 1.5, "teacher_entropy", rules.Cut("quantile", threshold=1.0)), ("signal", "teacher_entropy")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", SCANNING)
@pytest.mark.parametrize("name", CASES)
def test_a_scan_weighs_as_the_reference_states(name, backend, dtype):
    rule, needs = CASES[name]
    with gear_kernels.backend(backend):
        found = scanned(rule, needs, dtype).weights
    wanted, rounded = stated(rule, dtype)
    assert found.dtype == wanted.dtype
    if rounded:
        torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(found, wanted)


def test_every_rule_has_its_case_and_its_own_number():
    assert [rule.name for rule in rules.RULES] == list(CASES)
    assert [rules.lower(rule).rule for rule, _ in CASES.values()] == list(range(len(rules.RULES)))
    used = {type(method.rule()) for method in METHODS.values() if method.rule() is not None}
    assert used == set(rules.RULES)


@pytest.mark.parametrize("backend", SCANNING)
def test_segments_of_a_lift_are_the_references(backend):
    """The rule of sgcd with its segments, over random packs: as `apply` says, token for token."""
    method, r = METHODS["sgcd"], random.Random(0)
    lengths = [r.randrange(1, 30) for _ in range(6)]
    signal, entropy = torch.rand(2, sum(lengths), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    found = []
    for name in (backend, "reference"):
        with gear_kernels.backend(name):
            found.append(credit_weights(signal, None, torch.randn(6), bounds, method=method, teacher_entropy=entropy))
    assert found[0].onsets.any() and all(torch.equal(a, b) for a, b in zip(found[0][1:6], found[1][1:6], strict=True))
