"""Who gets a run's numbers beside its own files: TensorBoard, Weights & Biases, trackio, each imported where it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

from gear_trainer.config import Config
from gear_trainer.errors import ConfigError
from gear_trainer.user_code import said

_SAMPLE = "sample"  # the name of a rollout's text


class Tracker(ABC):
    """A place for a run's numbers; one is made on rank 0 alone, as `cls(cfg, run_id, after)`.

    run_id: the same at each start of a run. after: the step that the run goes on from; what comes again past it is shown in the
    place of what was.
    """

    @abstractmethod
    def __init__(self, cfg: Config, run_id: str, after: int): ...

    @abstractmethod
    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take a step's numbers by name, `/` between levels."""

    @abstractmethod
    def sample(self, step: int, text: str) -> None:
        """Take a rollout as text."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Hand on all that was taken; `failed`: the run ends by an error."""


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    def __init__(self, cfg: Config, run_id: str, after: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(cfg.run_dir / "tensorboard"), purge_step=after + 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def sample(self, step: int, text: str) -> None:
        self.writer.add_text(_SAMPLE, "    " + text.replace("\n", "\n    "), step)  # Markdown's block of code

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases, under one id at every start. WANDB_MODE, WANDB_ENTITY and the like hold.

    The step is a metric, and the axis of all others: W&B's own counter would refuse the steps that a resumed run makes again.
    """

    def __init__(self, cfg: Config, run_id: str, after: int):
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb = wandb
        self.run = wandb.init(
            project=cfg.tracking.project,
            id=run_id,
            name=cfg.name,
            dir=str(cfg.run_dir),
            config=cfg.model_dump(mode="json"),
            resume="allow",
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        self.run.log({"step": step, _SAMPLE: self.wandb.Table(columns=["step", "rollout"], data=[[step, text]])})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """A run of trackio, which knows its runs by name: this one's ends with its id. TRACKIO_SPACE_ID and the like hold."""

    def __init__(self, cfg: Config, run_id: str, after: int):
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio = trackio
        self.run = trackio.init(
            project=cfg.tracking.project,
            name=f"{cfg.name}-{run_id}",
            config=cfg.model_dump(mode="json"),
            resume="allow",
            embed=False,
        )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log(metrics=values, step=step)

    def sample(self, step: int, text: str) -> None:
        self.run.log(metrics={_SAMPLE: self.trackio.Table(columns=["step", "rollout"], data=[[step, text]])}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


_TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def open_trackers(cfg: Config, run_id: str, after: int) -> list[Tracker]:
    """The trackers that a run asks for, see `Tracker`. Raises ConfigError where one of them cannot start."""
    found = []
    for name in cfg.tracking.trackers:
        try:
            found.append(_TRACKERS[name](cfg, run_id, after))
        except Exception as error:  # no login, no network, no such project: each package has errors of its own
            raise ConfigError(
                f"tracking.trackers: {name} does not start ({said(error)}): mend it, or leave it out; offline: {_OFFLINE[name]}"
            ) from error
    return found


_OFFLINE = {"tensorboard": "it is", "wandb": "WANDB_MODE=offline", "trackio": "unset TRACKIO_SPACE_ID"}


def check_trackers(cfg: Config) -> None:
    """Raises ConfigError where a tracker's package is not installed."""
    for name in cfg.tracking.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"tracking.trackers: {name} is not installed: pip install {name}, or leave it out")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A step's numbers by name, `/` between levels, without the step itself and what is no number."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and prefix + name != "step":  # seconds/step is one of them
            found[prefix + name] = value
    return found
