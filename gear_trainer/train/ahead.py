"""Work for coming steps, done in a thread while the trainer is at the present one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `draw(step)` for `steps` coming steps, one after the other, and never for one after `last`.

    The call for step s + n is begun when step s is taken, so what it finds is at most n steps old when it is used. What it raises
    is raised where its step is taken.
    """

    def __init__(self, draw: Callable[[int], T], steps: int, last: int):
        self.draw, self.steps, self.last = draw, steps, last
        self._asked: dict[int, Future[T]] = {}
        self._jobs: SimpleQueue[tuple[int, Future[T]]] = SimpleQueue()
        threading.Thread(target=self._work, name="rollouts of coming steps", daemon=True).start()

    def take(self, step: int) -> T:
        """The result for a step. Waits for it; those of the next `steps` are worked on from here on."""
        for due in range(step, min(step + self.steps, self.last) + 1):
            if due not in self._asked:
                self._asked[due] = Future()
                self._jobs.put((due, self._asked[due]))
        return self._asked.pop(step).result()

    def _work(self) -> None:
        while True:
            step, result = self._jobs.get()
            try:
                result.set_result(self.draw(step))
            except BaseException as error:  # also a task's sys.exit(): it ends the run where the step is taken
                result.set_exception(error)
