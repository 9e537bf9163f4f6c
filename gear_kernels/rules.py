"""Rules: a method as a small record, which the compiled scans (csrc/scan.cpp, triton/scan.py) run in one pass over each sequence.

A scan normalises, cuts segments and weighs. Each record stands for a weight rule of reference/credit.py, which alone says what it
means; `lower` turns any of them into the numbers that the scans take. A place in RULES, NORMALIZERS or SCAN_SEGMENTERS is an
entry's number: triton/scan.py looks it up here, and csrc/tables.h, which has lists of its own, is compared when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from .reference import credit as reference

NORMALIZERS = ("relu_max", "max", "minmax", "abs_max", "quantile", "none")  # see reference.credit.normalise
# How segments end; random stays in Python, which draws its places; stable is SGCD's.
SCAN_SEGMENTERS = ("entropy", "token", "kl_only", "entropy_only", "turn", "entropy_window", "random", "fixed", "stable")


@dataclass(frozen=True)
class Cut:
    """A rule's cut of a sequence: the signal is normalised, a segment opens above the threshold, the segmenter ends it."""

    normalizer: str = "none"
    segmenter: str = "token"  # no segments
    quantile: float = 0.95  # of the normaliser of that name
    signal_floor: float = 0.0  # nats, the least that the normaliser divides by
    threshold: float = 0.0  # on the normalised signal
    ratio: float = 1.0  # of the entropy that ends a segment to its first token's; stable: the factor that it may change by
    floor: float = 0.0  # nats; the first token's entropy counts as at least this much
    longest: int = 0  # policy tokens in a segment at most; 0: no limit
    window: int = 1  # policy tokens whose mean entropy entropy_window tests
    stop_at_turn: bool = False


class Rule:
    """A weight rule. `second` names the [T] input that is read beside the signal: it ends segments or enters the weight."""

    name: ClassVar[str]
    segmented: ClassVar[bool] = False  # whether there are segments: then it has a Cut
    second: ClassVar[str | None] = None
    cut: ClassVar[Cut] = Cut()
    renormalize: ClassVar[bool] = False
    look_ahead: ClassVar[int] = 0  # tokens ahead over which the least of `second` counts
    # level(second [T], mask [T] or None): the one number of the rule that is taken over the whole pack, 0-d
    level: ClassVar[Callable | None] = None


@dataclass(frozen=True)
class GearRule(Rule):
    """The rule gear_weight of the segments' credit; with `renormalize` over its mean in the sequence."""

    name = "gear"
    segmented = True
    alpha: float = 0.0
    second: str | None = None  # the entropy that ends segments
    cut: Cut = Cut()
    renormalize: bool = False


@dataclass(frozen=True)
class RatioRule(Rule):
    """The rule mixed_ratio of the bounded_ratio."""

    name = "ratio"
    mix: float = 0.5
    clip: float = 0.2


@dataclass(frozen=True)
class GatedRatioRule(Rule):
    """The rule bounded_ratio times entropy_gate of the least `second` over the token and `look_ahead` more."""

    name = "gated_ratio"
    clip: float = 0.2
    slope: float = 0.3
    floor: float = 0.1
    look_ahead: int = 0
    second: str = "teacher_entropy"

    def level(self, second: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The largest of the pack, at least 1."""
        return reference.largest_or_one(second, mask)


@dataclass(frozen=True)
class ShareRule(Rule):
    """The rule share of `second`, against a quantile of the pack."""

    name = "share"
    quantile: float = 0.75
    least: float = 1e-4
    second: str = "forward_kl"

    def level(self, second: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The pack's quantile, at least `least`."""
        return reference.share_level(second, self.quantile, self.least, mask)


@dataclass(frozen=True)
class MarginRule(Rule):
    """The rule margin_weight of the clipped_delta."""

    name = "margin"
    up: float = 0.5
    down: float = 0.5
    margin: float = 0.1
    bound: float = 5.0


@dataclass(frozen=True)
class AtLeastRule(Rule):
    """The rule at_least, against the least of the pack's top share of `second`."""

    name = "at_least"
    share: float = 0.2
    second: str = "entropy"

    def level(self, second: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The least value of the pack's top share."""
        return reference.top_share(second, self.share, mask)


@dataclass(frozen=True)
class LiftRule(Rule):
    """The rule lift by the segments' credit, which is 0 outside them."""

    name = "lift"
    segmented = True
    gamma: float = 1.0
    cap: float = 2.0
    second: str | None = None
    cut: Cut = Cut()


RULES = (GearRule, RatioRule, GatedRatioRule, ShareRule, MarginRule, AtLeastRule, LiftRule)


class Lowered(NamedTuple):
    """A rule as the numbers that the scans take: places in the tables, the rule's own a, b, c, and its Cut's.

    Two slots are shared: `ratio` is MarginRule's bound, `window` counts GatedRatioRule's tokens ahead, its own included.
    """

    rule: int
    normalizer: int
    segmenter: int
    a: float
    b: float
    c: float
    quantile: float
    signal_floor: float
    threshold: float
    ratio: float
    floor: float
    longest: int
    window: int
    renormalize: bool
    stop_at_turn: bool


def lower(rule: Rule) -> Lowered:
    """The numbers of a rule; the one place that knows which slot a record's field goes to."""
    cut, ratio, window = rule.cut, rule.cut.ratio, rule.cut.window
    match rule:
        case GearRule():
            own = (rule.alpha,)
        case RatioRule():
            own = (rule.mix, rule.clip)
        case GatedRatioRule():
            own, window = (rule.clip, rule.slope, rule.floor), rule.look_ahead + 1
        case MarginRule():
            own, ratio = (rule.up, rule.down, rule.margin), rule.bound
        case LiftRule():
            own = (rule.gamma, rule.cap)
        case _:  # nothing but the level
            own = ()
    a, b, c = (*own, 0.0, 0.0, 0.0)[:3]
    return Lowered(
        rule=RULES.index(type(rule)),
        normalizer=NORMALIZERS.index(cut.normalizer),
        segmenter=SCAN_SEGMENTERS.index(cut.segmenter),
        a=a,
        b=b,
        c=c,
        quantile=cut.quantile,
        signal_floor=cut.signal_floor,
        threshold=cut.threshold,
        ratio=ratio,
        floor=cut.floor,
        longest=cut.longest,
        window=window,
        renormalize=rule.renormalize,
        stop_at_turn=cut.stop_at_turn,
    )
