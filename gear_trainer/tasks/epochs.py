"""The order in which a run goes through the rows of a data set: each epoch a new one, a function of the seed alone."""

from __future__ import annotations

import random


class Epochs:
    """Orders of `rows` rows for one seed."""

    def __init__(self, seed: int, rows: int):
        self._seed, self._rows = seed, rows
        self._order: tuple[int, list[int]] = -1, []

    def row(self, index: int) -> int:
        """The row of the index-th problem of a run (0-based, unbounded)."""
        epoch, at = divmod(index, self._rows)
        if self._order[0] != epoch:  # one epoch at a time is read, so one order is kept
            self._order = epoch, random.Random(f"{self._seed}/{epoch}").sample(range(self._rows), self._rows)
        return self._order[1][at]
