"""Environments of skyrl-gym: text in, chat messages out, a reward for each step."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from gear_trainer.tasks.adapters.rows import Row, RowTask, field_of
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, TaskError
from gear_trainer.user_code import said


class SkyRlEpisode(Episode):
    """One environment of its own; what it rewarded over all steps is the outcome."""

    def __init__(self, world: Any, success_at: float):
        self.world, self.success_at, self.earned = world, success_at, 0.0

    def step(self, text: str) -> Reply:
        """Take the environment's step; its messages come back as they are, other roles as the user's."""
        answer = self.world.step(text)
        self.earned += float(answer["reward"])
        if answer["done"]:
            return Reply(calls=1)
        said = [Message("tool" if m["role"] == "tool" else "user", str(m["content"])) for m in answer["observations"]]
        return Reply(said or [Message("user", "")], calls=1)

    def outcome(self, end: End) -> Outcome:
        """The sum of the steps' rewards."""
        return Outcome(self.earned, self.earned >= self.success_at)

    def close(self) -> None:
        self.world.close()


@dataclass(frozen=True)
class SkyRlTask(RowTask):
    """Rows played through a registered skyrl-gym environment: its name, or of a row its field `env_class`.

    env: the name. env_config: what its constructor takes beside the row (`extras`). teacher_field: as
    reward_spec.ground_truth. The other arguments are RowTask's.
    """

    env: str | None = None
    env_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.episode(self.train_problem(0)).close()  # what is wrong with an environment is said before any engine starts

    def _world(self, row: Row) -> Any:
        try:
            skyrl_gym = importlib.import_module("skyrl_gym")
        except ImportError as error:
            raise TaskError(f"the task skyrl needs the package skyrl-gym ({error}): pip install skyrl-gym") from error
        name = self.env or str(field_of(row, "env_class"))
        try:
            return skyrl_gym.make(name, env_config=self.env_config, extras=row)
        except Exception as error:  # unknown names, rows without what they ask for
            raise TaskError(f"env={name} cannot be made ({said(error)}): known are {', '.join(skyrl_gym.registry)}") from error

    def _begun(self, row: Row) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]:
        world = self._world(row)
        try:
            return [{"role": m["role"], "content": m["content"]} for m in world.init(self._chat(row))[0]], None
        finally:
            world.close()

    def episode(self, problem: Problem) -> SkyRlEpisode:
        row = problem.data["row"]
        world = self._world(row)
        world.init(self._chat(row))
        return SkyRlEpisode(world, self.success_at)
