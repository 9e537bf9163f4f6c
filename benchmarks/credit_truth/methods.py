"""Who is scored: the package's methods by name, a user's own as `module:Class`, and the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gear_kernels import Gear, credit_weights
from gear_kernels.methods import METHODS, resolve, signals_of
from gear_trainer.errors import ConfigError
from gear_trainer.user_code import load_class, said

from .measures import Assigned
from .rollouts import CORRECTED, Rollouts

LEFT_OUT = {"turn": "reads the environment's rewards of turns, which an audit does not hold; without them it is grpo"}
_TAUGHT = {"signal", "teacher_entropy", "forward_kl"}  # what a teacher says
SIGNAL = "signal"


@dataclass(frozen=True)
class Entry:
    """A method to score: an object as credit_weights takes it, and which signal it is given (k1 or reverse_kl; None: its own).

    own: it is the user's.
    """

    name: str
    method: Any
    signal: str | None = None
    own: bool = False

    @property
    def taught(self) -> bool:
        """True of a method that reads what a teacher says."""
        return bool(_TAUGHT & set(self.method.needs))

    def teachers(self, r: Rollouts) -> list[str | None]:
        """The teachers that it is scored under; a difference of two is one for a signal alone."""
        if not self.taught:
            return [None]
        return [t for t in r.teachers if t != CORRECTED or SIGNAL in self.method.needs]

    def assign(self, r: Rollouts, teacher: str | None) -> Assigned:
        """Token advantages and onsets of trajectories that the teacher has seen, all of them."""
        needs = self.method.needs
        said = r.teachers[teacher] if teacher else {}
        rows = {"entropy": r.tokens["entropy"], "turn_ids": r.tokens["turn"], "anchors": r.tokens["anchor"]}
        rows |= {"turn_rewards": _outcome_in_last_turn(r)} if "turn_rewards" in needs else {}
        rows |= {SIGNAL: said[self.signal or signals_of(self.method)[0]]} if SIGNAL in needs else {}
        rows |= {name: said[name] for name in ("teacher_entropy", "forward_kl") if name in needs}
        inputs: dict[str, Any] = {name: _tensor(x) for name, x in rows.items() if name in needs}
        if "groups" in needs:
            inputs["groups"] = _tensor(r.rows["group"])
        bounds = torch.from_numpy(r.bounds.astype(np.int32))
        inputs = {SIGNAL: None, "entropy": None} | inputs
        credit = credit_weights(advantages=_tensor(r.rows["advantage"]), cu_seqlens=bounds, method=self.method, **inputs)
        segmented = bool((credit.segment_ids >= 0).any())
        return Assigned(credit.token_advantages.double().numpy(), credit.onsets.numpy() if segmented else None)


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32) if x.dtype == np.float64 else x)


def _outcome_in_last_turn(r: Rollouts) -> np.ndarray:
    """The outcome's reward on the tokens of a trajectory's last turn, 0 before: of a task without rewards of turns."""
    turn = r.tokens["turn"]
    last = turn == r.over_tokens(turn[r.bounds[1:] - 1])
    return np.where(last, r.over_tokens(r.rows["reward"]), 0.0)


def entries(own: list[str]) -> list[Entry]:
    """All methods of the package but LEFT_OUT, two variants of GEAR, then the user's, each named as `module:Class`."""
    ours = [Entry(name, method) for name, method in METHODS.items() if name not in LEFT_OUT]
    variants = [
        Entry("gear_renormalized", Gear(renormalize=True)),  # the tilt taken out
        Entry("gear_full_kl", Gear(normalizer="max"), "reverse_kl"),
    ]
    return [*ours, *variants, *map(_users, own)]


def _users(spec: str) -> Entry:
    try:
        made = load_class(spec)()
        return Entry(spec, resolve(made), own=True)
    except Exception as error:
        raise ConfigError(
            f"--method {spec}: {said(error)}: name a class as module:Class that is made without arguments"
        ) from None


# --- controls -----------------------------------------------------------------------------------------------------------
# Beside `random` and `fixed`, which are methods of the package, and the teachers `wrong` and `nothing`.


def tilt(r: Rollouts, assigned: Assigned) -> Assigned:
    """Each trajectory's mean advantage on all its tokens: what is left of a method without any choice between tokens."""
    return Assigned(r.over_tokens(r.sums(assigned.advantages) / r.lengths))


def oracle(r: Rollouts) -> Assigned:
    """A* itself; its onsets are the tokens that surely lost something."""
    return Assigned(r.truth, r.decided & (r.truth < 0))


def oracle_same_sign(r: Rollouts) -> Assigned:
    """A* where it has the sign of the trajectory's advantage, else 0: the most that a weight of at least 0 can say."""
    fits = np.sign(r.truth) == np.sign(r.over_tokens(r.rows["advantage"]))
    return Assigned(np.where(fits, r.truth, 0.0), r.decided & (r.truth < 0) & fits)


ORACLES: dict[str, Callable[[Rollouts], Assigned]] = {"oracle": oracle, "oracle_same_sign": oracle_same_sign}
