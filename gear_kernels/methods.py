"""Credit methods: small frozen dataclasses that turn policy tokens into weights, behind one class, `Method`.

The mathematics behind the package's own is in reference/credit.py. A method from elsewhere derives from `Method`, or is any
object with `needs` and `apply`; what it leaves out is as Method has it.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from .errors import check_choice, check_integer, check_number, require
from .records import FLOAT_INPUTS, INPUTS
from .reference import credit as reference
from .rules import (
    NORMALIZERS,
    SCAN_SEGMENTERS,
    AtLeastRule,
    Cut,
    GatedRatioRule,
    GearRule,
    LiftRule,
    MarginRule,
    RatioRule,
    Rule,
    ShareRule,
)

__all__ = [
    "FLOAT_INPUTS",
    "INPUTS",
    "METHODS",
    "NORMALIZERS",
    "SEGMENTERS",
    "Method",
    "PolicyCredit",
    "PolicyTokens",
    "resolve",
    "signals_of",
]
SEGMENTERS = tuple(name for name in SCAN_SEGMENTERS if name != "stable")  # Gear's

Row = TypeVar("Row", torch.Tensor, list[int])


class PolicyTokens(NamedTuple):
    """A method's input: the policy tokens alone, packed without gaps, n of them in B sequences (some may be empty)."""

    signal: torch.Tensor  # [n] nats
    entropy: torch.Tensor  # [n] nats
    advantages: torch.Tensor  # [n], each token's sequence's A
    turn_ids: torch.Tensor | None  # [n] int
    sequence: torch.Tensor  # [n] int64, the sequence of each token
    lengths: torch.Tensor  # [B] int64, policy tokens of each sequence
    teacher_entropy: torch.Tensor | None = None  # [n] nats
    forward_kl: torch.Tensor | None = None  # [n] nats, KL(teacher || student)
    turn_rewards: torch.Tensor | None = None  # [n], the reward of each token's turn
    anchors: torch.Tensor | None = None  # [n] int, names what the token's turn answered
    groups: torch.Tensor | None = None  # [n] int, each token's sequence's group of siblings

    def sequences(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int] | None]]:
        """Yields (signal, entropy, turn ids as a list or None) of each sequence."""
        sizes = self.lengths.tolist()
        turns = [None] * len(sizes) if self.turn_ids is None else [x.tolist() for x in self.turn_ids.split(sizes)]
        yield from zip(self.signal.split(sizes), self.entropy.split(sizes), turns, strict=True)


def _given(row: Row | None) -> Row:
    """An input that a method names in its `needs`, so that credit_weights has checked that it is there."""
    assert row is not None
    return row


class PolicyCredit(NamedTuple):
    """A method's result, over the same n tokens: see `Credit`."""

    weights: torch.Tensor
    signal: torch.Tensor
    credit: torch.Tensor
    segment_ids: torch.Tensor
    onsets: torch.Tensor
    above: torch.Tensor  # [n] bool, g above the method's threshold
    unclosed: int  # segments that reached the last policy token without a rule ending them there
    token_advantages: torch.Tensor | None = None  # [n]; None: weights times the sequence's advantage
    silent: int = 0  # trajectories whose scale is below the signal floor or reference.SILENT


class Method:
    """A credit method: `apply` in plain torch, and what a caller has to know of it."""

    needs: tuple[str, ...] = ()  # the inputs that it reads, out of INPUTS
    # what its signal may be, its own first; k1: the sampled log-ratio lpS - lpT; reverse_kl: the full KL
    signals: tuple[str, ...] = ("k1", "reverse_kl")
    # for a trainer:
    teacher_sees = "ground_truth"  # in its prompt; or sibling: a correct rollout of the group
    outcome_in_last_turn = False  # the outcome's reward is added to the last turn's
    wants_references = False  # the teacher reads a written credit reference in place of the ground truth
    mixed_groups = False  # groups that all succeed or all fail are sampled again

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        """Weights and what they were made of, from the policy tokens alone."""
        raise NotImplementedError

    def rule(self) -> Rule | None:
        """The same as a record of rules.py, for the compiled scans; None: `apply` alone says it."""
        return None

    def at(self, step: int) -> Method:
        """The method of training step `step`, counted from 1."""
        return self


# --- GEAR and GRPO ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grpo(Method):
    """W = 1: the sequence's advantage on each of its policy tokens. Reads neither signal nor entropy (either may be None)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def rule(self) -> Rule:
        """GEAR's with alpha 0: W = 1."""
        return GearRule()

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        zero, none = torch.zeros_like(tokens.signal), torch.zeros_like(tokens.sequence, dtype=torch.bool)
        ids = torch.full_like(tokens.sequence, -1, dtype=torch.int32)
        return PolicyCredit(torch.ones_like(zero), zero, zero, ids, none, none, 0)


@dataclass(frozen=True)
class Gear(Method):
    """Adaptive-granularity credit: GEAR, arXiv 2605.11853, Eq. 2-5 and Algorithm 1, its ablations and two controls.

    A segment opens at a token with g > kl_threshold and ends with the first later token whose entropy exceeds
    entropy_ratio times the onset's; all of it gets the onset's g as credit c; W = alpha w + 1 - alpha / 2 with
    w = 1 - c for A > 0, c for A < 0, 0.5 for A = 0. So W is within 1 +- alpha / 2 and the sign of A never flips.

    Segmenters: entropy (the paper's rule); token (no segments, c = g); kl_only (up to the next token above the
    threshold); entropy_only (segments cover the trajectory, each ends by the entropy rule); turn (one per turn);
    entropy_window (tests the mean entropy of the last `window` tokens). Controls, ours in detail: random (as many
    segments, as long as the entropy rule gives, anywhere in the trajectory) and fixed (fixed_len tokens each, covering
    the trajectory). In each of them c is the g of the segment's first token, and the token's own g outside segments.

    random draws from a generator seeded by `seed` and the sequence's own signal and length, so a sequence gets the same
    places wherever it is packed; two sequences with equal signals and segment lengths get equal places.

    signal_floor bounds what the normaliser divides by from below: without it a trajectory about which the teacher says nothing
    has its rounding noise stretched over all of [0, 1] and gets the full spread of W. Under a floor of 1e-3 nats a signal of at
    most 1e-4 keeps g within 0.1, so the default threshold opens no segment, and W is within 0.1 alpha of its value for g = 0,
    1 + alpha / 2 for A > 0, 1 - alpha / 2 for A < 0. Nothing jumps at the floor; signals with a scale above it keep every bit.
    """

    normalizer: str = "relu_max"  # how g comes from the signal, see reference.normalise
    quantile: float = 0.95  # of normalizer "quantile"
    kl_threshold: float = 0.1  # on g, strict
    entropy_ratio: float = 1.5
    alpha: float = 0.2  # share of the advantage that is redistributed, in [0, 2)
    segmenter: str = "entropy"
    renormalize: bool = False  # divide W by its mean over the trajectory's policy tokens
    max_segment_len: int | None = None  # in policy tokens; like stop_at_turn, without effect on token, turn and fixed
    entropy_floor: float = 0.0  # nats; the onset's entropy counts as at least this much
    stop_at_turn: bool = False  # a segment ends with its turn at the latest; needs turn_ids
    fixed_len: int = 8  # of segmenter "fixed", in policy tokens
    seed: int = 0  # of segmenter "random"
    window: int = 8  # of segmenter "entropy_window", in policy tokens
    signal_floor: float = 0.0  # nats; g = signal / max(scale, signal_floor), 0: the paper. normalizer "none" has no scale

    def __post_init__(self) -> None:
        check_choice("Gear.normalizer", self.normalizer, NORMALIZERS)
        check_choice("Gear.segmenter", self.segmenter, SEGMENTERS)
        check_number("Gear.quantile", self.quantile, lambda x: 0 < x <= 1, "in (0, 1]")
        check_number("Gear.signal_floor", self.signal_floor, lambda x: x >= 0, "of nats, at least 0")
        unscaled = self.normalizer == "none" and self.signal_floor > 0
        mend = "choose a normalizer that divides, or leave signal_floor out"
        require(not unscaled, f"Gear.signal_floor: given {self.signal_floor!r}", '0 with normalizer "none"', mend)
        check_number("Gear.kl_threshold", self.kl_threshold, lambda x: 0 <= x <= 1, "in [0, 1], for g is normalised")
        check_number("Gear.entropy_ratio", self.entropy_ratio, lambda x: x > 0, "above 0")
        check_number("Gear.alpha", self.alpha, lambda x: 0 <= x < 2, "in [0, 2), or W could reach 0")
        check_number("Gear.entropy_floor", self.entropy_floor, lambda x: x >= 0, "of nats, at least 0")
        for name in ("fixed_len", "window"):
            check_integer(f"Gear.{name}", getattr(self, name), 1)
        check_integer("Gear.seed", self.seed, 0)
        if self.max_segment_len is not None:
            check_integer("Gear.max_segment_len", self.max_segment_len, 1, mend="pass None for no limit")
        for name in ("renormalize", "stop_at_turn"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"Gear.{name}: given {value!r}", "a bool", "pass True or False")

    @property
    def needs(self) -> tuple[str, ...]:
        entropy = self.segmenter in ("entropy", "entropy_only", "entropy_window", "random")
        turns = self.segmenter == "turn" or self.stop_at_turn
        return ("signal", *(("entropy",) if entropy else ()), *(("turn_ids",) if turns else ()))

    def rule(self) -> Rule | None:
        """GEAR's, or None for the segmenter random: its places are drawn by Python's generator."""
        if self.segmenter == "random":
            return None
        fixed = self.segmenter == "fixed"
        free = fixed or self.segmenter in ("token", "turn")  # what neither cap touches
        cut = Cut(
            normalizer=self.normalizer,
            segmenter=self.segmenter,
            quantile=self.quantile,
            signal_floor=self.signal_floor,
            threshold=self.kl_threshold,
            ratio=self.entropy_ratio,
            floor=self.entropy_floor,
            longest=self.fixed_len if fixed else 0 if free else self.max_segment_len or 0,
            window=self.window if self.segmenter == "entropy_window" else 1,
            stop_at_turn=self.stop_at_turn and not free,
        )
        return GearRule(self.alpha, "entropy" if "entropy" in self.needs else None, cut, self.renormalize)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        found, silent = [], 0
        for signal, entropy, turns in tokens.sequences():
            g, quiet = reference.normalise(signal, self.normalizer, self.quantile, self.signal_floor)
            found.append((g, self.segments(g, signal, entropy, turns)))
            silent += quiet
        g, credit, ids, onsets, unclosed = _joined(found, tokens)
        weights = reference.gear_weight(credit, tokens.advantages, self.alpha)
        if self.renormalize:
            weights = reference.renormalise(weights, tokens.sequence, tokens.lengths)
        return PolicyCredit(weights, g, credit, ids, onsets, g > self.kl_threshold, unclosed, silent=silent)

    def segments(
        self, g: torch.Tensor, signal: torch.Tensor, entropy: torch.Tensor, turn_ids: list[int] | None
    ) -> list[reference.Segment]:
        """The segments of one trajectory: g, signal, entropy [n] and its turn ids, policy tokens only."""
        n = g.numel()
        if self.segmenter == "token":
            return []
        if self.segmenter == "turn":
            return reference.turn_segments(_given(turn_ids))
        if self.segmenter == "fixed":
            return reference.fixed_segments(n, self.fixed_len)
        onset = [True] * n if self.segmenter == "entropy_only" else (g > self.kl_threshold).tolist()
        last = reference.last_allowed(n, self.max_segment_len, turn_ids if self.stop_at_turn else None)
        if self.segmenter == "kl_only":
            return reference.trigger_segments(onset, last)
        windowed = self.segmenter == "entropy_window"
        tested = reference.window_mean(entropy, torch.zeros(n, device=g.device), self.window) if windowed else entropy
        limit = reference.entropy_limits(entropy, self.entropy_ratio, self.entropy_floor)
        segments = reference.entropy_segments(onset, tested.tolist(), limit.tolist(), last)
        if self.segmenter == "random":
            lengths = [last - first + 1 for first, last, _ in segments]
            return reference.random_segments(lengths, n, _generator(self.seed, signal))
        return segments


@dataclass(frozen=True)
class Tilt(Gear):
    """Control, ours: the mean of GEAR's W over a trajectory, on all of its policy tokens, so nothing within it is told apart.

    Where most g are near 0, GEAR weighs a success up and a failure down as a whole; what it has over this control is found
    inside trajectories. The fields are Gear's, of which the means are taken. The compiled scans do not know it: `apply` runs.
    """

    def rule(self) -> None:
        """See Method.rule: none."""
        return None

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        gear = super().apply(tokens)
        return gear._replace(weights=reference.tilt(gear.weights, tokens.sequence, tokens.lengths))


def _joined(found: list[tuple[torch.Tensor, list[reference.Segment]]], tokens: PolicyTokens):
    """(g, segments) of each sequence -> g, credit, segment ids, onsets [n] over the pack, and how many are unclosed."""
    source, ids, unclosed = [], [], 0
    for g, segments in found:
        start, n = len(source), g.numel()
        source += [start + t for t in reference.credit_sources(segments, n)]
        ids += reference.segment_numbers(segments, n)
        unclosed += sum(not segment.closed for segment in segments)
    g = torch.cat([own for own, _ in found]) if found else tokens.signal
    source, ids = torch.tensor(source, dtype=torch.int64).to(g.device), torch.tensor(ids, dtype=torch.int32).to(g.device)
    return g, g[source], ids, (source == torch.arange(g.numel(), device=g.device)) & (ids >= 0), unclosed


def _generator(seed: int, signal: torch.Tensor) -> random.Random:
    """A generator that depends on the seed and on one sequence's signal [n], not on where it stands in the pack."""
    data = struct.pack(f"<{signal.numel()}d", *signal.tolist())  # its length is the number of policy tokens
    digest = hashlib.blake2b(f"{seed}:".encode() + data, digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


# --- relatives ----------------------------------------------------------------------------------------------------------
# Weights without segments, over the whole pack at once. What a paper leaves open is marked "ours".


def _unsegmented(tokens: PolicyTokens, weights: torch.Tensor, behind: torch.Tensor) -> PolicyCredit:
    """`behind`: the quantity that the weight was made of, shown in the place of g."""
    none = torch.zeros_like(tokens.sequence, dtype=torch.bool)
    return PolicyCredit(weights, behind, behind, torch.full_like(tokens.sequence, -1, dtype=torch.int32), none, none, 0)


@dataclass(frozen=True)
class Rlsd(Method):
    """W = 1 - mix + mix * clip(exp(sign(A) delta), 1 +- clip): RLSD, arXiv 2604.03128. `at(step)` lets mix decay to 0."""

    mix: float = 0.5
    clip: float = 0.2
    decay_steps: int = 50  # steps over which mix falls linearly to 0; 0: it stays

    def __post_init__(self) -> None:
        check_number("Rlsd.mix", self.mix, lambda x: 0 <= x <= 1, "in [0, 1]")
        check_number("Rlsd.clip", self.clip, lambda x: 0 < x < 1, "in (0, 1)")
        check_integer("Rlsd.decay_steps", self.decay_steps, 0)

    signals = ("k1",)
    needs = ("signal",)

    def at(self, step: int) -> Rlsd:
        """See Method.at: mix falls linearly."""
        left = max(0.0, 1 - (step - 1) / self.decay_steps) if self.decay_steps else 1.0
        return replace(self, mix=self.mix * left, decay_steps=0)

    def rule(self) -> Rule:
        return RatioRule(self.mix, self.clip)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        ratio = reference.bounded_ratio(tokens.signal, tokens.advantages, self.clip)
        return _unsegmented(tokens, reference.mixed_ratio(ratio, self.mix), ratio)


@dataclass(frozen=True)
class Egrsd(Method):
    """W = clip(exp(sign(A) delta), 1 +- clip) * clip(1 - slope * H, floor, 1): EGRSD, arXiv 2605.13255.

    H is the teacher's entropy over max(its largest value in the pack, 1). look_ahead k: in its place its least value over tokens
    t to t + k of the trajectory (CL-EGRSD: 3).
    """

    clip: float = 0.2
    slope: float = 0.3
    floor: float = 0.1
    look_ahead: int = 0

    def __post_init__(self) -> None:
        check_number("Egrsd.clip", self.clip, lambda x: 0 < x < 1, "in (0, 1)")
        check_number("Egrsd.slope", self.slope, lambda x: x >= 0, "at least 0")
        check_number("Egrsd.floor", self.floor, lambda x: 0 < x <= 1, "in (0, 1]")
        check_integer("Egrsd.look_ahead", self.look_ahead, 0)

    signals = ("k1",)
    needs = ("signal", "teacher_entropy")

    def rule(self) -> Rule:
        return GatedRatioRule(self.clip, self.slope, self.floor, self.look_ahead)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        entropy = reference.least_ahead(_given(tokens.teacher_entropy), tokens.sequence, self.look_ahead)
        gate = reference.entropy_gate(entropy, reference.largest_or_one(_given(tokens.teacher_entropy)), self.slope, self.floor)
        return _unsegmented(tokens, reference.bounded_ratio(tokens.signal, tokens.advantages, self.clip) * gate, gate)


@dataclass(frozen=True)
class ScGrpo(Method):
    """W = D / (D + max(P75(D), 1e-4)), D = KL(teacher || student), P75 over the pack (ours): SC-GRPO, arXiv 2606.18810.

    The teacher sees a correct sibling trajectory (`teacher_sees`, for a trainer).
    """

    quantile: float = 0.75
    least: float = 1e-4  # nats

    def __post_init__(self) -> None:
        check_number("ScGrpo.quantile", self.quantile, lambda x: 0 < x <= 1, "in (0, 1]")
        check_number("ScGrpo.least", self.least, lambda x: x > 0, "of nats, above 0")

    needs = ("forward_kl",)
    teacher_sees = "sibling"

    def rule(self) -> Rule:
        return ShareRule(self.quantile, self.least)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        level = reference.share_level(_given(tokens.forward_kl), self.quantile, self.least)
        weights = reference.share(_given(tokens.forward_kl), level)
        return _unsegmented(tokens, weights, weights)


@dataclass(frozen=True)
class AmrSd(Method):
    """A >= 0: W = 1 + up * max(0, I - margin); A < 0: W = 1 + down * max(0, -I - margin); I = clip(delta, +-bound).

    AMR-SD, arXiv 2605.18529; the defaults of up, down and margin are ours.
    """

    up: float = 0.5
    down: float = 0.5
    margin: float = 0.1  # nats
    bound: float = 5.0  # nats

    def __post_init__(self) -> None:
        for name in ("up", "down", "margin"):
            check_number(f"AmrSd.{name}", getattr(self, name), lambda x: x >= 0, "at least 0")
        check_number("AmrSd.bound", self.bound, lambda x: x > 0, "of nats, above 0")

    signals = ("k1",)
    needs = ("signal",)

    def rule(self) -> Rule:
        return MarginRule(self.up, self.down, self.margin, self.bound)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        delta = reference.clipped_delta(tokens.signal, self.bound)
        weights = reference.margin_weight(delta, tokens.advantages, self.up, self.down, self.margin)
        return _unsegmented(tokens, weights, delta)


@dataclass(frozen=True)
class HighEntropy(Method):
    """W = 1 on the tokens of the pack's top `share` of entropies (ties included), else 0: arXiv 2506.01939."""

    share: float = 0.2

    def __post_init__(self) -> None:
        check_number("HighEntropy.share", self.share, lambda x: 0 < x <= 1, "in (0, 1]")

    needs = ("entropy",)

    def rule(self) -> Rule:
        return AtLeastRule(self.share)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        weights = reference.at_least(tokens.entropy, reference.top_share(tokens.entropy, self.share))
        return _unsegmented(tokens, weights, weights)


@dataclass(frozen=True)
class Sgcd(Method):
    """W = clip(1 + gamma s, 1, cap), s the saliency in [0, 1] of a divergence spike: SGCD, arXiv 2606.12634.

    s = the signal's `quantile`-normalised value (the full KL(student || teacher) is meant); a spike above kl_threshold opens a
    segment that goes on while the teacher's entropy stays within a factor `stable` of its value there; s is the spike's value
    inside, 0 elsewhere (both ours).
    """

    gamma: float = 1.0
    cap: float = 2.0
    kl_threshold: float = 0.1
    stable: float = 1.5
    quantile: float = 0.95

    def __post_init__(self) -> None:
        check_number("Sgcd.gamma", self.gamma, lambda x: x >= 0, "at least 0")
        check_number("Sgcd.cap", self.cap, lambda x: x >= 1, "at least 1")
        check_number("Sgcd.kl_threshold", self.kl_threshold, lambda x: 0 <= x <= 1, "in [0, 1], for s is normalised")
        check_number("Sgcd.stable", self.stable, lambda x: x >= 1, "at least 1")
        check_number("Sgcd.quantile", self.quantile, lambda x: 0 < x <= 1, "in (0, 1]")

    signals = ("reverse_kl", "k1")
    needs = ("signal", "teacher_entropy")
    wants_references = True
    mixed_groups = True

    def rule(self) -> Rule:
        cut = Cut("quantile", "stable", quantile=self.quantile, threshold=self.kl_threshold, ratio=self.stable)
        return LiftRule(self.gamma, self.cap, "teacher_entropy", cut)

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        sizes, found, silent = tokens.lengths.tolist(), [], 0
        for signal, entropy in zip(tokens.signal.split(sizes), _given(tokens.teacher_entropy).split(sizes), strict=True):
            g, quiet = reference.normalise(signal, "quantile", self.quantile)
            silent += quiet
            found.append((g, reference.stable_segments((g > self.kl_threshold).tolist(), entropy.tolist(), self.stable)))
        g, credit, ids, onsets, unclosed = _joined(found, tokens)
        s = torch.where(ids >= 0, credit, 0)
        weights = reference.lift(s, self.gamma, self.cap)
        return PolicyCredit(weights, g, s, ids, onsets, g > self.kl_threshold, unclosed, silent=silent)


# --- turns --------------------------------------------------------------------------------------------------------------
# Advantages of turns, added to the trajectory's. A turn is a run of policy tokens with equal turn ids. Nothing is segmented or
# multiplied: W is 1, and the segments shown are the turns. Plain torch on the tensors' device, no look at a value.


def _turns(tokens: PolicyTokens, relative: torch.Tensor, weight: float) -> PolicyCredit:
    """The trajectory's advantage and on top of it its turn's: `relative` [n], the same within a turn, times `weight`."""
    onsets = reference.turn_onsets(_given(tokens.turn_ids), tokens.sequence)
    ids = reference.turn_numbers(onsets, tokens.sequence)
    none, extra = torch.zeros_like(onsets), reference.turn_part(relative, weight, tokens.advantages)
    return PolicyCredit(torch.ones_like(extra), extra, extra, ids, onsets, none, 0, tokens.advantages + extra)


@dataclass(frozen=True)
class Turn(Method):
    """A_outcome + weight * A_turn: MT-GRPO, arXiv 2505.11821, for any number of turns (two in the paper's code).

    A_turn is the turn's reward relative to the turns of equal turn id among its sequence's group: minus their mean, over their
    standard deviation with `std`. It is 0 where all agree, as after the last rewarded turn; so the tokens up to a turn's result
    get the sum and those after the last one A_outcome alone. Turn ids count a trajectory's turns. The outcome's advantage is
    normalised by the caller; keep it out of turn_rewards.
    """

    weight: float = 1.0
    std: bool = True

    def __post_init__(self) -> None:
        check_number("Turn.weight", self.weight, lambda x: x >= 0, "at least 0")
        require(isinstance(self.std, bool), f"Turn.std: given {self.std!r}", "a bool", "pass True or False")

    needs = ("turn_rewards", "turn_ids", "groups")

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        first = reference.turn_onsets(_given(tokens.turn_ids), tokens.sequence)
        turn = reference.group_relative(
            _given(tokens.turn_rewards), first, (_given(tokens.groups), _given(tokens.turn_ids)), self.std
        )
        return _turns(tokens, turn, self.weight)


@dataclass(frozen=True)
class Gigpo(Method):
    """A_episode + weight * A_step: GiGPO, arXiv 2505.10978, Eq. 5-8.

    A turn's return is its reward plus gamma times the next turn's return; A_step is that return relative to those of the group's
    turns that answered the same anchor observation (equal `anchors`, of one sequence or of several); 0 for a turn without such
    company. Its mean is taken off, and with `std` it is divided by their standard deviation (the authors' code offers both and
    defaults to the mean alone). As there, the last turn's reward holds the outcome.
    """

    weight: float = 1.0
    gamma: float = 0.95
    std: bool = False

    def __post_init__(self) -> None:
        check_number("Gigpo.weight", self.weight, lambda x: x >= 0, "at least 0")
        check_number("Gigpo.gamma", self.gamma, lambda x: 0 <= x <= 1, "in [0, 1]")
        require(isinstance(self.std, bool), f"Gigpo.std: given {self.std!r}", "a bool", "pass True or False")

    needs = ("turn_rewards", "turn_ids", "anchors", "groups")
    outcome_in_last_turn = True

    def apply(self, tokens: PolicyTokens) -> PolicyCredit:
        first = reference.turn_onsets(_given(tokens.turn_ids), tokens.sequence)
        returns = reference.turn_returns(_given(tokens.turn_rewards), first, tokens.sequence, self.gamma)
        step = reference.group_relative(returns, first, (_given(tokens.groups), _given(tokens.anchors)), self.std)
        return _turns(tokens, step, self.weight)


METHODS = {
    "gear": Gear(),
    "grpo": Grpo(),
    **{name: Gear(segmenter=name) for name in ("token", "kl_only", "entropy_only", "entropy_window", "random", "fixed")},
    "tool_call": Gear(segmenter="turn"),  # the paper's name for its ablation by turns
    "tilt": Tilt(),
    "rlsd": Rlsd(),
    "egrsd": Egrsd(),
    "cl_egrsd": Egrsd(look_ahead=3),
    "sc_grpo": ScGrpo(),
    "amr_sd": AmrSd(),
    "high_entropy": HighEntropy(),
    "sgcd": Sgcd(),
    "turn": Turn(),
    "gigpo": Gigpo(),
}


def signals_of(method: object) -> tuple[str, ...]:
    """The signals that a method may be given, its own first."""
    return getattr(method, "signals", Method.signals)


def resolve(method: object) -> Any:
    """The method that a name out of METHODS means, or the method object itself; Any, for a caller's own needs no base class.

    Raises GearKernelsError for an unknown name, a class in place of its object, and what has no `needs` and `apply`.
    """
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        return METHODS[method]
    usable = not isinstance(method, type) and callable(getattr(method, "apply", None)) and hasattr(method, "needs")
    require(
        usable,
        f"method: given {method!r}",
        f"a name ({', '.join(METHODS)}) or a method object",
        "pass Gear(...) or Grpo()",
    )
    return method
