"""Credit for any trainer: its rows go in, padded, nested, listed or packed; token advantages of the same layout come out.

Needs torch alone. A trainer's own file beside this one finds the rows; what is done with them stands here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ..credit import Credit, credit_weights
from ..errors import bad_input, require
from ..methods import METHODS, resolve, signals_of

Rows = Tensor | Sequence[Any]  # a value a token: padded [B, T], jagged nested, a list of B rows [t], or packed [sum of t]


class Inputs(TypedDict, total=False):
    """The rows that a credit method may read, under the names of `credit_weights`, each laid out as the mask is; nats."""

    signal: Rows  # lpS - lpT of the sampled tokens (k1), or KL(student || teacher)
    entropy: Rows  # the student's
    teacher_entropy: Rows
    forward_kl: Rows  # KL(teacher || student)
    turn_rewards: Rows
    turn_ids: Rows  # integer; left out, a turn is a run of policy tokens
    anchors: Rows  # integer


class TokenAdvantages(NamedTuple):
    """The result of `token_advantages`: three rows in the layout that was given, the packed credit, and metrics to log."""

    token_advantages: Rows  # 0 on tokens outside the mask
    weights: Rows  # W
    segment_ids: Rows  # int32, from 0 within each sequence, -1 outside segments
    credit: Credit  # over padded rows, `credit` counts the padding as tokens outside the mask
    metrics: dict[str, Tensor]  # "gear/..." of Credit.diagnostics: 0-d float32, means to average over ranks


@torch.no_grad()
def token_advantages(
    advantages: Rows,
    mask: Rows | None = None,
    *,
    method: str | object = "gear",
    step: int | None = None,
    tool_mask: Rows | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | Sequence[int] | None = None,
    **inputs: Unpack[Inputs],
) -> TokenAdvantages:
    """Token advantages of B trajectories by a credit method, in and out in the layout of the caller (see `credit_weights`).

    Layouts, one for all rows of a call: a tensor [B, T], padded on whichever side; a jagged nested tensor; a list of B rows
    (tensors or lists of numbers); a packed tensor [T] with cu_seqlens, int32 [B + 1]. Nothing is cut out of a padded tensor: it
    is read as B sequences of T tokens of which the mask leaves some, and no look at a value waits for a GPU.

    advantages  one a trajectory: a tensor [B], [B, 1], or B numbers; or one a token in the layout of the rows, as verl and
                OpenRLHF have them, equal on all policy tokens of a trajectory (looked at: this waits for a GPU).
    mask        nonzero on policy tokens. Padded rows need it; None elsewhere: all tokens are.
    tool_mask   0 on what tools said, as in TRL; a policy token is nonzero in both.
    method      a name or a method object; `step`, counted from 1, lets it change over training (rlsd's mix).
    groups      [B] integer, names each trajectory's siblings; for turn and gigpo.
    inputs      the rows that the method reads, out of `Inputs`; others are left alone. turn_ids are made from the mask where the
                method reads them and they are not given: a trajectory's runs of policy tokens, counted from 0.

    Token advantages are W times the trajectory's advantage: float64 where signal or entropy is, else float32.
    Raises GearKernelsError on rows that do not fit each other, on unknown names, and as `credit_weights` does.
    """
    chosen = resolve(method)
    if step is not None and hasattr(chosen, "at"):
        chosen = chosen.at(step)
    unknown = sorted(set(inputs) - set(Inputs.__annotations__))
    require(not unknown, f"inputs: given {', '.join(unknown)}", f"names out of {', '.join(Inputs.__annotations__)}", "rename it")
    given: dict[str, Any] = {name: x for name, x in inputs.items() if x is not None and name in chosen.needs}
    layout = _layout({"mask": mask, **inputs, "tool_mask": tool_mask}, cu_seqlens)
    policy = _policy_tokens(layout, mask, tool_mask)
    rows = {name: layout.pack(name, x) for name, x in given.items()}
    if "turn_ids" in chosen.needs and "turn_ids" not in rows:
        rows["turn_ids"] = turn_ids(policy, layout.cu_seqlens)
    own = _per_trajectory(layout, advantages, policy)
    names = None if groups is None else torch.as_tensor(groups, device=layout.device)
    credit = credit_weights(
        rows.pop("signal", None),
        rows.pop("entropy", None),
        own,
        layout.cu_seqlens,
        mask=policy,
        method=chosen,
        groups=names,
        **rows,
    )
    metrics = {f"gear/{name}": value for name, value in credit.diagnostics.items()}
    advantages, weights, ids = (layout.unpack(x) for x in (credit.token_advantages, credit.weights, credit.segment_ids))
    return TokenAdvantages(advantages, weights, ids, credit, metrics)


def turn_ids(policy: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The number of each policy token's turn in its sequence, int64 [T], from 0: runs of True in `policy`, bool [T].

    A token outside the mask has the number of the turn before it (-1 before the first), which nothing reads.
    """
    before = torch.cat([policy.new_zeros(1), policy[:-1]]) if policy.numel() else policy
    sequence = _sequence(cu_seqlens, policy.numel())
    first = torch.ones_like(policy)
    first[1:] = sequence[1:] != sequence[:-1]
    turns = (policy & (first | ~before)).long().cumsum(0)
    offset = torch.cat([turns.new_zeros(1), turns])[cu_seqlens[:-1].long()]  # turns of the sequences before
    return turns - offset[sequence] - 1


# --- what a trainer can serve ------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A credit method with the signal that it is to be given; None where it reads none."""

    method: Any
    signal: str | None


def choose(
    credit: str | object,
    gives: Sequence[str],
    *,
    signals: Sequence[str] = ("k1",),
    signal: str | None = None,
    args: Mapping[str, Any] | None = None,
    trainer: str = "this trainer",
) -> Choice:
    """The method that `credit` names and its signal, checked against what a trainer has, before work starts.

    credit: a name out of METHODS, or a method object. gives: the inputs (`Inputs`, and groups) that the trainer can make.
    signals: those that it can make, k1 or reverse_kl. signal: the one that is asked for; None: the method's own first that there
    is. args: fields of a named method's dataclass, as configurations without objects have them.

    Raises GearKernelsError, in one line that names the trainer and the method, for what it cannot serve.
    """
    method = resolve(credit)
    if args:
        require(isinstance(credit, str), f"credit: given {credit!r} with arguments {dict(args)}", "a name with them", "pass one")
        fields = tuple(getattr(method, "__dataclass_fields__", ()))
        wrong = sorted(set(args) - set(fields))
        require(
            not wrong, f"credit {credit!r}: given {', '.join(wrong)}", f"fields out of {', '.join(fields)}", "correct the name"
        )
        method = type(method)(**{**{name: getattr(method, name) for name in fields}, **args})
    named = repr(credit) if isinstance(credit, str) else repr(method)
    lacking = sorted(set(method.needs) - set(gives))
    if lacking:
        fit = ", ".join(name for name, known in METHODS.items() if set(known.needs) <= set(gives))
        expected = f"a method that reads no more than {', '.join(gives)}"
        raise bad_input(f"credit {named} reads {', '.join(lacking)}, which {trainer} does not have", expected, f"choose of {fit}")
    if "signal" not in method.needs:
        return Choice(method, None)
    takes = [name for name in signals_of(method) if name in signals]
    chosen = signal or next(iter(takes), None)
    if chosen not in takes:
        asked = f"credit {named} with signal {signal or 'its own'}"
        given, expected = f"{asked} in {trainer}", f"a signal out of {', '.join(takes) or 'none that both know'}"
        raise bad_input(given, expected, f"the method reads {', '.join(signals_of(method))}, {trainer} has {', '.join(signals)}")
    return Choice(method, chosen)


# --- layouts -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A trainer's way to lay rows out: padded, nested, listed or packed. shape: of a padded tensor; offsets: of a nested one."""

    kind: str
    cu_seqlens: Tensor
    total: int  # tokens in the pack
    shape: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()  # of listed rows
    offsets: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def pack(self, name: str, rows: Any) -> Tensor:
        """A row a token, as one [T]."""
        kind = _kind(rows)
        if kind != self.kind:
            raise bad_input(f"{name}: given {kind} rows", f"{self.kind} rows as the others", "lay them out alike")
        if self.kind == "padded":
            given, expected, flat = tuple(rows.shape), self.shape, rows.reshape(-1)
        elif self.kind == "nested":
            same = _same(rows.offsets(), self.offsets)
            given, expected, flat = "these offsets" if same else "other offsets", "these offsets", rows.values()
        elif self.kind == "listed":
            parts = [torch.as_tensor(row, device=self.device) for row in rows]
            given, expected = tuple(part.numel() for part in parts), self.lengths
            flat = torch.cat(parts) if parts else torch.zeros(0, device=self.device)
        else:
            given, expected, flat = rows.numel(), self.total, rows
        require(given == expected, f"{name}: given {given}", f"{expected} as in the other rows", "align token by token")
        return flat

    def unpack(self, flat: Tensor) -> Rows:
        """One [T] in the trainer's layout."""
        if self.kind == "padded":
            return flat.view(self.shape)
        if self.kind == "nested":
            return torch.nested.nested_tensor_from_jagged(flat, offsets=self.offsets)
        return list(flat.split(list(self.lengths))) if self.kind == "listed" else flat


def _kind(rows: Any) -> str:
    if not isinstance(rows, Tensor):
        return "listed"
    if rows.is_nested:
        return "nested"
    return {1: "packed", 2: "padded"}.get(rows.dim(), f"{rows.dim()}-dimensional")


def _layout(rows: dict[str, Any], cu_seqlens: Tensor | None) -> _Layout:
    """The layout of the first row that there is, the mask before all others."""
    name, first = next(((name, x) for name, x in rows.items() if x is not None), ("mask", None))
    if first is None:
        raise bad_input("neither a mask nor a row of the method was given", "a mask, at least", "pass the mask of policy tokens")
    kind = _kind(first)
    packs = cu_seqlens is not None
    require(
        packs == (kind == "packed"), f"{name}: given {kind} rows with{'' if packs else 'out'} cu_seqlens", _LAYOUTS, "pass so"
    )
    if kind == "packed":
        assert cu_seqlens is not None
        return _Layout(kind, cu_seqlens, first.numel())
    if kind == "padded":
        require(rows["mask"] is not None, f"{name}: given padded rows without a mask", "the mask of policy tokens", "pass mask")
        batch, width = first.shape
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=first.device) * width
        return _Layout(kind, bounds, first.numel(), shape=(batch, width))
    if kind == "nested":
        holed = first.layout != torch.jagged or first._lengths is not None
        require(not holed, f"{name}: given a nested tensor that is not jagged without holes", "one of torch.jagged", "convert it")
        return _Layout(kind, first.offsets(), first.values().numel(), offsets=first.offsets())
    require(kind == "listed", f"{name}: given a {kind} tensor", _LAYOUTS, "reshape it")
    lengths = tuple(len(row) for row in first)
    device = next((row.device for x in rows.values() if x is not None for row in x if isinstance(row, Tensor)), None)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return _Layout(kind, bounds.to(device), sum(lengths), lengths=lengths)


_LAYOUTS = "rows [B, T], nested or listed without cu_seqlens, or packed [T] with them"


def _same(offsets: Tensor, others: Tensor | None) -> bool:
    return offsets is others or (others is not None and offsets.shape == others.shape and torch.equal(offsets, others))


def _policy_tokens(layout: _Layout, mask: Rows | None, tool_mask: Rows | None) -> Tensor:
    """Bool [T], True on policy tokens."""
    policy = torch.ones(layout.total, dtype=torch.bool, device=layout.device)
    for name, given in (("mask", mask), ("tool_mask", tool_mask)):
        if given is not None:
            policy = policy & (layout.pack(name, given) != 0)
    return policy


def _sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    lengths = cu_seqlens.diff().long()
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths, output_size=total)


def _per_trajectory(layout: _Layout, advantages: Rows, policy: Tensor) -> Tensor:
    """The advantages [B]; of advantages a token, each trajectory's own."""
    batch = layout.cu_seqlens.numel() - 1
    if not isinstance(advantages, Tensor) and all(torch.as_tensor(x).numel() == 1 for x in advantages):
        numbers = [float(x) for x in advantages]
        advantages = torch.tensor(numbers, dtype=torch.float32, device=layout.device)
    if isinstance(advantages, Tensor) and not advantages.is_nested and advantages.numel() == batch:
        return advantages.reshape(-1)
    each = layout.pack("advantages", advantages)
    sequence = _sequence(layout.cu_seqlens, layout.total)
    places = torch.where(policy, torch.arange(layout.total, device=layout.device), layout.total)
    first = places.new_full((batch,), layout.total).scatter_reduce_(0, sequence, places, "amin")
    own = torch.cat([each, each.new_zeros(1)])[first]  # 0 where a trajectory has no policy token
    unequal = (policy & (each != own[sequence])).nonzero().flatten().tolist()
    if unequal:
        b = int(sequence[unequal[0]])
        given = f"advantages: given {own[b]:.6g} and {each[unequal[0]]:.6g} in trajectory {b}"
        raise bad_input(given, "one advantage a trajectory", "use a group-relative estimator (grpo, rloo), not one by tokens")
    return own
