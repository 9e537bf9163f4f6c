"""BFCL has no training set. A run that trains on a part of its items holds out the rest, the same part for every seed."""

from __future__ import annotations

import zlib

from gear_trainer.tasks.base import Problem, TaskError
from gear_trainer.tasks.epochs import Epochs


class Shares:
    """Items divided by their key, so that variants of one scenario fall to one side."""

    def __init__(self, problems: list[Problem], train_share: float, seed: int, teachable: set[str]):
        """teachable: the ids whose ground truth can be shown; the others are never trained on."""
        if not 0 <= train_share < 1:
            raise TaskError(f"train_share: {train_share} must be 0 or more, and below 1: the rest is held out")
        trained = {p.id: zlib.crc32((p.key or p.id).encode()) % 1000 < 1000 * train_share for p in problems}
        self.held_out = [p for p in problems if not trained[p.id]]
        self._train = [p for p in problems if trained[p.id] and p.id in teachable]
        self._epochs = Epochs(seed, len(self._train)) if self._train else None

    def train_problem(self, index: int) -> Problem:
        """The index-th training problem. Raises TaskError where there are none."""
        if self._epochs is None:
            raise TaskError(
                "BFCL is for evaluation and has no training set: set task_args.train_share=0.8 to train on that share of its "
                "items and hold out the others (figures of such a run are not the leaderboard's)"
            )
        return self._train[self._epochs.row(index)]
