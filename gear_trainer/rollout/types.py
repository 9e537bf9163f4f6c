"""Requests to an engine and their completions, a rollout as one flat token stream, and the limits of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch

from gear_trainer.config import RolloutConfig
from gear_trainer.tasks.base import Problem


@dataclass(frozen=True)
class Request:
    """One turn to sample behind `prompt_ids`. An engine that honours the seed gives the same tokens in any company.

    top_p: the smallest set of likeliest tokens with that much probability is sampled from; other than 1 in evaluation only.
    """

    prompt_ids: list[int]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """One sampled turn. `logprobs` are the sampler's own, of the tempered distribution, in nats; `ended`: it closed its turn.

    `version` counts the run's pushes of weights before it was sampled; `versions`: before each token, where one came in between.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool
    version: int = 0
    versions: list[int] | None = None

    @property
    def token_versions(self) -> list[int]:
        """Pushes of weights before each token was sampled."""
        return [self.version] * len(self.ids) if self.versions is None else self.versions


class Status(StrEnum):
    """The end of a rollout: by itself, with the last turn it may have, where tokens ran out, or because its environment broke."""

    DONE = "done"
    TURNS = "turns"
    LENGTH = "length"
    ERROR = "error"


@dataclass
class Rollout:
    """One trajectory as a flat token stream after its prompt. `mask` is True on policy tokens, False on the environment's."""

    problem: Problem
    group: int
    sample: int
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)  # 0 where mask is False
    turn_ids: list[int] = field(default_factory=list)
    turns: int = 0
    calls: int = 0
    errors: int = 0
    status: Status = Status.DONE
    reward: float = 0.0
    success: bool = False
    metrics: dict[str, float] = field(default_factory=dict)  # the outcome's, beside its reward
    turn_rewards: list[float] = field(default_factory=list)  # the environment's, of each turn by itself
    anchors: list[int] = field(default_factory=list)  # names what each turn answers: the prompt, then the last reply
    versions: list[int] = field(default_factory=list)  # of the weights that sampled each token; -1 where mask is False
    wrong_prompt_ids: list[int] = field(default_factory=list)  # the teacher's prompt with a wrong hint; empty: none was shown
    reference: str | None = None  # what the teacher reads beside the question, where a credit reference was written
    escaped: int = 0  # texts of both prompts and of replies that spelled control tokens
    cut: int = 0  # replies that did not fit into the context whole
    failures: list[str] = field(default_factory=list)  # one line for each try that the environment broke off
    dropped: bool = False  # one of its group failed or is too old: nobody learns from the group

    def __post_init__(self) -> None:
        self.anchors = self.anchors or [seed_of(self.prompt_ids)]

    @property
    def truncated(self) -> bool:
        """True where tokens ran out: a turn was cut, or no turn fitted behind what there was."""
        return self.status is Status.LENGTH

    @property
    def failed(self) -> bool:
        """True where its last try broke off too: what it earned is unknown."""
        return self.status is Status.ERROR

    @property
    def policy_positions(self) -> list[int]:
        """The places in `ids` of what the policy sampled."""
        return [i for i, is_policy in enumerate(self.mask) if is_policy]

    def append(self, ids: list[int], logprobs: list[float] | None, versions: list[int] | None = None) -> None:
        """Add a turn's tokens with their log-probs and the versions of their weights (None: of the first), or (None) the
        environment's."""
        self.ids += ids
        self.mask += [logprobs is not None] * len(ids)
        self.sampler_logprobs += logprobs if logprobs is not None else [0.0] * len(ids)
        self.versions += [-1 if logprobs is None else 0] * len(ids) if versions is None else versions
        self.turn_ids += [self.turns] * len(ids)


@dataclass(frozen=True)
class Limits:
    """The number of rollouts that a problem gets, and what each of them may take."""

    group_size: int
    temperature: float
    max_new_tokens: int
    max_model_len: int
    turn_timeout: float | None = None  # seconds of one call of the environment
    schedule: Literal["lockstep", "continuous"] = "lockstep"
    max_failed_share: float = 1.0  # of a step's rollouts; see groups.check_failures
    top_p: float = 1.0  # of evaluation; training samples from the whole distribution

    @classmethod
    def of(cls, cfg: RolloutConfig) -> Limits:
        """The limits that a configuration sets for training."""
        schedule = cfg.schedule or ("continuous" if torch.cuda.is_available() else "lockstep")
        sizes = cfg.group_size, cfg.temperature, cfg.max_new_tokens, cfg.max_model_len
        return cls(*sizes, cfg.turn_timeout, schedule, cfg.max_failed_share)

    def room(self, rollout: Rollout) -> int:
        """Tokens that its next turn may have."""
        return min(self.max_new_tokens, self.left(rollout))

    def left(self, rollout: Rollout) -> int:
        """Tokens of the context that the rollout has not used."""
        return self.max_model_len - len(rollout.prompt_ids) - len(rollout.ids)


def seed_of(*parts: object) -> int:
    """A 31-bit seed from a name: equal in every process and every run, so that a resumed run samples the same tokens."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") >> 1
