"""The meaning of `credit`, `signal`, `teacher`, `writer`, `kl` and `distill` together: one `Recipe`, made once, read by others.

Nobody else parses `credit`, compares a signal's name or asks what a credit method declares.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from gear_kernels import Gear, GearKernelsError, TokenStats, credit_weights
from gear_kernels.losses import divergence_loss, divergence_stat, reference_kl_loss, sampled_distillation_loss, sdar_loss
from gear_kernels.methods import FLOAT_INPUTS, INPUTS, METHODS, Method
from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.user_code import load_class, said

LOSSES = ("opsd", "sdar")
SIGNAL_STATS = {"k1": (), "reverse_kl": ("reverse_kl",)}  # what a signal takes beside both log-probs
TEACHER_COLUMNS = ("signal", "teacher_entropy", "forward_kl")  # inputs of methods that a teacher's pass makes
FULL_KL = "reverse_kl"


@dataclass(frozen=True)
class Distillation:
    """A loss that pulls the policy towards its teacher on every trajectory, those of advantage 0 too.

    opsd, full: the generalised JSD over the whole vocabulary, gradient to the student only. opsd, sampled: reverse KL as a policy
    gradient of the sampled tokens. sdar: the gated term of arXiv 2605.15155. Both of these read the scoring pass's teacher.
    """

    name: str
    variant: str
    beta: float
    coefficient: float
    alone: bool  # no policy-gradient term beside it

    @property
    def full(self) -> bool:
        return self.name == "opsd" and self.variant == "full"

    @property
    def stats(self) -> tuple[str, ...]:
        """The statistics that the update pass must compute beside the log-probs."""
        return (divergence_stat(self.beta)[0],) if self.full else ()

    @property
    def jsd_beta(self) -> float:
        return divergence_stat(self.beta)[1]

    def loss(
        self, out: TokenStats, old: torch.Tensor, teacher: torch.Tensor | None, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted loss over n policy tokens, times the coefficient, and their mean divergence (nats), both scalars.

        old, teacher: [n] log-probs of the scoring pass; the full variant reads neither. weights: [n], see aggregation_weights.
        """
        if self.full:
            loss, metrics = divergence_loss(getattr(out, self.stats[0]), weights)
            return self.coefficient * loss, metrics["divergence"]
        assert out.logprobs is not None and teacher is not None
        if self.name == "sdar":
            loss, metrics = sdar_loss(out.logprobs, teacher, weights)
        else:
            loss, metrics = sampled_distillation_loss(out.logprobs, old, teacher, weights)
        return self.coefficient * loss, metrics["divergence"]


@dataclass(frozen=True)
class Frozen:
    """The weights of a frozen model beside the policy, and how they follow it after each step.

    initial: not at all; ema: e + ema_rate * (policy - e); synced: the policy's own, copied every sync_every steps.
    """

    name: Literal["teacher", "reference"]  # of its file in a checkpoint
    key: str  # of the configuration that asked for it, for messages
    weights: Literal["initial", "ema", "synced"]
    ema_rate: float = 0.0
    sync_every: int = 1
    path: str | None = None  # where it starts from; None: where the policy does

    @property
    def follows(self) -> bool:
        """True where the weights follow the policy's, so there is state to save: others are read again instead."""
        return self.weights != "initial"

    def is_same(self, other: Frozen | None) -> bool:
        """True where one copy can serve as both."""
        if other is None or (self.weights, self.path) != (other.weights, other.path):
            return False
        return self.weights == "initial" or (self.weights == "ema" and self.ema_rate == other.ema_rate)


@dataclass(frozen=True)
class Kl:
    """The term coefficient * KL(policy || reference model), estimated from the sampled tokens (GRPO's, arXiv 2402.03300)."""

    coefficient: float
    estimator: str
    reference: Frozen
    shared: bool  # the teacher's copy is the reference model

    def loss(self, logprobs: torch.Tensor, reference: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted loss over n policy tokens, times the coefficient, and their mean estimate (nats), both scalars."""
        loss, metrics = reference_kl_loss(logprobs, reference, weights, estimator=self.estimator)
        return self.coefficient * loss, metrics["reference_kl"]


class Declared(NamedTuple):
    """The optional parts of a credit method; a class that does not derive from gear_kernels' Method may leave them out."""

    signals: tuple[str, ...]
    teacher_sees: str
    outcome_in_last_turn: bool
    wants_references: bool
    mixed_groups: bool

    @classmethod
    def by(cls, method: Any) -> Declared:
        """The parts as the method declares them, or as Method's defaults are."""
        return cls(*(getattr(method, part, getattr(Method, part)) for part in cls._fields))


def _at(method: Any, step: int) -> Any:
    """The method of a step, where it changes by step."""
    return method.at(step) if hasattr(method, "at") else method


@dataclass(frozen=True)
class Recipe:
    """A run's recipe: what it does with its rollouts; made by `resolve`, read everywhere.

    teacher: of a teacher with weights of its own; None where the policy itself is the teacher, or nothing reads one.
    references: who puts something else than the ground truth into the teacher's prompt. wrong_answer: it is another problem's
    ground truth. gen_batches: batches that a step may
    sample, 1 without the filter for mixed groups. updates: optimizer steps on what a step sampled. until: the last step of the
    distillation loss alone, which the method alone follows; None: both act at every step.
    """

    method: Any
    declared: Declared
    signal: str
    distillation: Distillation | None
    teacher: Frozen | None
    references: Literal["writer", "siblings"] | None
    gen_batches: int
    kl: Kl | None = None
    entropy_bonus: float = 0.0
    masks_truncated: bool = False
    wrong_hint: bool = False
    wrong_answer: bool = False
    updates: int = 1
    until: int | None = None

    def at(self, step: int) -> Recipe:
        """The recipe of the 1-based step: another than the run's where it distils first."""
        if self.until is None:
            return self
        if step > self.until:
            return replace(self, distillation=None)
        plain = METHODS["grpo"]
        return replace(self, method=plain, declared=Declared.by(plain), wrong_hint=False)

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """All frozen models beside the policy, each once."""
        own = self.kl.reference if self.kl and not self.kl.shared else None
        return tuple(model for model in (self.teacher, own) if model is not None)

    @property
    def moves_all(self) -> bool:
        """True where a rollout of advantage 0 has something to learn too: distillation, the KL term, the entropy bonus."""
        return self.distillation is not None or self.kl is not None or self.entropy_bonus > 0

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """The method's inputs that only a teacher's pass makes."""
        return tuple(name for name in TEACHER_COLUMNS if name in self.method.needs)

    @property
    def needs_teacher(self) -> bool:
        """True where the method asks for the teacher's view of the trajectories that have an advantage."""
        return bool(self.teacher_columns)

    @property
    def teaches_all(self) -> bool:
        """True where the scoring pass asks the teacher about every trajectory: a distillation loss of the sampled tokens."""
        return self.distillation is not None and not self.distillation.full

    @property
    def scores_first(self) -> bool:
        """True where something reads scores of the rollouts that learn before the update's own forward has made them.

        That are credit (an entropy, a teacher's view), the second of several updates, and the pass of the reference model. Else
        the policy that is updated is the one that would be scored, and the update's log-probs are the old ones.
        """
        return self.updates > 1 or self.needs_teacher or self.teaches_all or self.kl is not None or "entropy" in self.method.needs

    @property
    def by_turn(self) -> bool:
        """True where trajectories of advantage 0 can teach too, by the rewards of their turns."""
        return "turn_rewards" in self.method.needs

    @property
    def stretches_noise(self) -> bool:
        """True where the method divides a trajectory's signal by its own scale, however small that is."""
        method = self.method
        return isinstance(method, Gear) and method.normalizer != "none" and method.signal_floor == 0

    @property
    def teacher_stats(self) -> tuple[str, ...]:
        """The method's inputs that are statistics themselves, unlike the signal, which is made of some."""
        return tuple(name for name in self.teacher_columns if name != "signal")

    @property
    def stats_to_update(self) -> tuple[str, ...]:
        """The statistics of the update pass."""
        entropy = ("entropy",) if self.entropy_bonus or not self.scores_first else ()
        return ("logprobs", *entropy, *(self.distillation.stats if self.distillation else ()))

    @property
    def jsd_beta(self) -> float | None:
        """The Jensen-Shannon divergence's weight of the teacher, None without a distillation loss."""
        return self.distillation.jsd_beta if self.distillation else None

    def stats_to_score(self, teacher: bool) -> tuple[str, ...]:
        """The statistics of a scoring pass, of the student's rows alone or beside the teacher's."""
        if not teacher:
            return ("logprobs", "entropy")
        return ("logprobs", "entropy", "teacher_logprobs", *SIGNAL_STATS[self.signal], *self.teacher_stats)

    def signal_of(self, out: TokenStats) -> torch.Tensor:
        """The signal [n] (nats) out of a pass with the teacher's rows."""
        if self.signal == FULL_KL:
            assert out.reverse_kl is not None
            return out.reverse_kl
        assert out.logprobs is not None and out.teacher_logprobs is not None
        return out.logprobs - out.teacher_logprobs

    def method_at(self, step: int) -> Any:
        """The credit method of the 1-based step."""
        return _at(self.method, step)


def resolve(cfg: Config) -> Recipe:
    """The recipe of a configuration. Raises ConfigError where its parts do not go together."""
    name, loss = _parse(cfg.credit)
    method = _make_method(name, cfg)
    own = Declared.by(method)
    if cfg.signal is not None and cfg.signal not in own.signals:
        raise ConfigError(f"signal={cfg.signal}: {name} reads {' or '.join(own.signals)}; leave signal out")
    missing = [need for need in method.needs if need not in INPUTS]
    if missing:
        raise ConfigError(f"credit={cfg.credit} reads {', '.join(missing)}, which this trainer does not make: choose another")
    distillation = _make_distillation(loss, cfg)
    asks = any(column in method.needs for column in TEACHER_COLUMNS)
    teacher = _teacher(cfg) if asks or distillation is not None else None
    references = _references(cfg, own, asks)
    filtered = own.mixed_groups if cfg.rollout.filter_groups is None else cfg.rollout.filter_groups
    return Recipe(
        method=method,
        declared=own,
        signal=cfg.signal or own.signals[0],
        distillation=distillation,
        teacher=teacher,
        references=references,
        gen_batches=cfg.rollout.max_num_gen_batches if filtered else 1,
        kl=_kl(cfg, teacher),
        entropy_bonus=cfg.train.entropy_bonus,
        masks_truncated=cfg.train.mask_truncated,
        wrong_hint=_wrong_hint(cfg, method, references),
        wrong_answer=_wrong_answer(cfg, references, asks or distillation is not None),
        updates=cfg.train.updates_per_step,
        until=_until(cfg, distillation),
    )


def _parse(credit: str) -> tuple[str, str | None]:
    """`credit` as (name of its credit method or module:Class, name of its distillation loss or None). Raises ConfigError."""
    parts = [part.strip() for part in credit.split("+")]
    for part in parts:
        if part not in METHODS and part not in LOSSES and ":" not in part:
            which = "" if part == credit else f"{part!r} is unknown; "
            known = f"known are {', '.join((*METHODS, *LOSSES))}, or a + of two such as opsd+gear"
            raise ConfigError(f"credit={credit}: {which}{known}; module:Class for a method of your own")
    methods, losses = [p for p in parts if p not in LOSSES], [p for p in parts if p in LOSSES]
    if len(methods) > 1 or len(losses) > 1:
        raise ConfigError(f"credit={credit}: give one credit method and at most one of {' and '.join(LOSSES)} beside it")
    return methods[0] if methods else "grpo", losses[0] if losses else None


def _make_method(name: str, cfg: Config) -> Any:
    """The credit method, W = 1 where `credit` names a distillation loss alone. Raises ConfigError."""
    if cfg.credit == "grpo" and cfg.credit_args:
        raise ConfigError("credit=grpo takes no credit_args: drop them, or choose credit=gear")
    if ":" in name:
        return _own_method(name, cfg.credit_args)
    method = METHODS[name]
    fields = {field: getattr(method, field) for field in method.__dataclass_fields__}
    unknown = sorted(set(cfg.credit_args) - set(fields))
    if unknown:
        raise ConfigError(f"credit_args.{unknown[0]}: unknown; {name} takes {', '.join(sorted(fields)) or 'none'}")
    if isinstance(method, Gear) and cfg.signal == FULL_KL:
        fields["normalizer"] = "max"  # the full KL is never negative: there is nothing below 0 to clip
    try:
        return type(method)(**(fields | cfg.credit_args))
    except GearKernelsError as error:
        raise ConfigError(f"credit_args: {error}") from None


def _make_distillation(name: str | None, cfg: Config) -> Distillation | None:
    if name is None:
        return None
    first = cfg.distill.until_step is not None
    alone = first or cfg.credit.strip() == "opsd"  # sdar alone is sdar+grpo, as in its paper
    coefficient = {"sdar": 0.01, "opsd": 1.0 if alone else 0.1}[name]
    d = cfg.distill
    return Distillation(name, d.variant, d.beta, d.coefficient if d.coefficient is not None else coefficient, alone)


def _teacher(cfg: Config) -> Frozen | None:
    t = cfg.teacher
    return None if t.weights == "rollout" else Frozen("teacher", "teacher.weights", t.weights, t.ema_rate, t.sync_every)


def _kl(cfg: Config, teacher: Frozen | None) -> Kl | None:
    k = cfg.kl
    if not k.coefficient:
        return None
    if k.reference == "ema":
        reference = Frozen("reference", "kl.reference", "ema", k.ema_rate)
    else:
        reference = Frozen("reference", "kl.reference", "initial", path=None if k.reference == "initial" else k.reference)
    return Kl(k.coefficient, k.estimator, reference, reference.is_same(teacher))


def _until(cfg: Config, distillation: Distillation | None) -> int | None:
    """The last step of distillation alone. Raises ConfigError where there is nothing to distil, or nothing that follows."""
    until = cfg.distill.until_step
    if until is None:
        return None
    if distillation is None or "+" not in cfg.credit:
        raise ConfigError(
            f"distill.until_step={until}: credit={cfg.credit} is not a distillation loss and the method that follows it: "
            "give both, as credit=opsd+grpo"
        )
    if until >= cfg.train.steps:
        raise ConfigError(f"distill.until_step={until}: train.steps={cfg.train.steps} ends before the method's turn; lower it")
    return until


def _wrong_hint(cfg: Config, method: Any, references: str | None) -> bool:
    """Whether the signal is held against a wrong hint's. Raises ConfigError where nobody reads a signal, or none can be shown."""
    if not cfg.teacher.wrong_hint:
        return False
    if "signal" not in method.needs:
        raise ConfigError(f"teacher.wrong_hint: credit={cfg.credit} reads no signal that could be corrected: drop it")
    if references != "siblings":
        raise ConfigError("teacher.wrong_hint shows a failed sibling where a correct one stands: set teacher.sees=sibling")
    return True


def _wrong_answer(cfg: Config, references: str | None, asks: bool) -> bool:
    """Whether the teacher sees another problem's ground truth. Raises ConfigError without a teacher or with references."""
    if cfg.teacher.sees != "wrong_answer":
        return False
    if references or not asks:
        why = "has references written for its teacher" if references else "asks no teacher"
        raise ConfigError(f"teacher.sees=wrong_answer: credit={cfg.credit} {why}; drop one of them")
    return True


def _references(cfg: Config, own: Declared, asks: bool) -> Literal["writer", "siblings"] | None:
    """Who shows the teacher something in place of the ground truth. Raises ConfigError where two would, or nobody reads it."""
    written = own.wants_references if cfg.writer.enabled is None else cfg.writer.enabled
    sibling = (cfg.teacher.sees or own.teacher_sees) == "sibling"
    if cfg.writer.url and not written:
        raise ConfigError(
            f"writer.url is set, but credit={cfg.credit} has no references written: drop it, or set writer.enabled=true"
        )
    if not written:
        return "siblings" if sibling else None
    if not asks:
        raise ConfigError(f"writer.enabled: credit={cfg.credit} asks no teacher, so nobody would read references: drop it")
    if sibling:
        raise ConfigError(f"teacher.sees=sibling: credit={cfg.credit} has references written for its teacher; drop one of them")
    return "writer"


# --- a method of the user's own -------------------------------------------------------------------------------------------


def _own_method(spec: str, args: dict[str, Any]) -> Any:
    """The credit method of the class `module:Class`, made with `credit_args` and tried on a few tokens. Raises ConfigError."""
    try:
        cls = load_class(spec)
        takes = list(inspect.signature(cls).parameters)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"credit={spec}: cannot be loaded ({error}): check the module path and the class name") from None
    unknown = sorted(set(args) - set(takes))
    if unknown:
        raise ConfigError(f"credit_args.{unknown[0]}: unknown; {cls.__name__} takes {', '.join(sorted(takes)) or 'none'}")
    try:
        method = cls(**args)
    except Exception as error:
        raise ConfigError(f"credit_args: {cls.__name__} cannot be made ({said(error, where=True)})") from None
    _check_method(spec, method)
    return method


def _check_method(spec: str, method: Any) -> None:
    """Raises ConfigError where `needs` or `apply` are not what credit_weights asks for (docs/credit.md)."""
    needs, name = getattr(method, "needs", None), type(method).__name__
    if not isinstance(needs, (tuple, list)) or not callable(getattr(method, "apply", None)):
        raise ConfigError(
            f"credit={spec}: {name} must have `needs`, a tuple of input names, and a method `apply` (docs/credit.md); add them"
        )
    if set(needs) <= set(INPUTS):  # others are named by the check of inputs
        try:
            _try_method(method)
        except Exception as error:
            raise ConfigError(f"credit={spec}: {name} fails on two made-up sequences ({said(error, where=True)})") from None


def _try_method(method: Any) -> None:
    """One call as the trainer makes it, on two sequences of three tokens."""
    rows: dict[str, Any] = {name: torch.linspace(-0.1, 0.4, 6) if name in method.needs else None for name in FLOAT_INPUTS}
    turns = torch.tensor([0, 0, 1, 0, 1, 1])
    credit = credit_weights(
        rows.pop("signal"),
        rows.pop("entropy"),
        torch.tensor([1.0, -1.0]),
        torch.tensor([0, 3, 6], dtype=torch.int32),
        method=_at(method, 1),
        turn_ids=turns,
        anchors=turns,
        groups=torch.tensor([0, 0]),
        **rows,
    )
    if not credit.token_advantages.isfinite().all():
        raise ValueError("a token's advantage is not finite")
