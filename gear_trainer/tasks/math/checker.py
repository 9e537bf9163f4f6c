"""Answer checking with math-verify in a process of its own, so that no answer can hang or crash the trainer.

sympy can spend minutes inside one C call (9**9**9), where neither an alarm signal nor a thread stops it; a process can be killed.
The worker half of this file runs as a script and imports nothing of the project.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

START_LIMIT = 50.0  # importing sympy takes 1-2 s, much more on a loaded machine; below rollout.turn_timeout, for its own message
MEMORY_LIMIT = 4 << 30  # bytes of address space of the worker


class AnswerChecker:
    """Tells whether a text's final answer (answer.py) is the gold one. One worker, started on first use, and after a kill."""

    def __init__(self, limit_s: float):
        self.limit_s, self.timeouts = limit_s, 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, text: str) -> bool:
        """False also where the text gives no answer, and where the check took longer than the limit or broke the worker."""
        from gear_trainer.tasks.math.answer import final_answer, ungrouped  # here: the worker runs without the project

        answer = final_answer(gold, text)
        return answer is not None and self._agree(ungrouped(gold), answer)

    def _agree(self, gold: str, answer: str) -> bool:
        with self._lock:
            try:
                worker = self._worker or self._start()
                assert worker.stdin is not None  # _start made the pipes
                worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                worker.stdin.flush()
                return self._read(worker, self.limit_s) == "true"
            except (BrokenPipeError, EOFError, TimeoutError):
                self.timeouts += 1
                self.close()
                return False

    def close(self) -> None:
        """Stop the worker; the next check starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            self._read(self._worker, START_LIMIT)
        except (EOFError, TimeoutError) as error:
            self.close()
            raise RuntimeError("math-verify does not start: try `python -c 'import math_verify'`") from error
        return self._worker

    @staticmethod
    def _read(worker: subprocess.Popen[bytes], limit_s: float) -> str:
        assert worker.stdout is not None
        if not select.select([worker.stdout], [], [], limit_s)[0]:
            raise TimeoutError
        line = worker.stdout.readline()  # the worker writes whole short lines, so this does not block
        if not line:
            raise EOFError
        return line.decode().strip()


@lru_cache
def answer_checker(limit_s: float) -> AnswerChecker:
    """The checker that all tasks of this process share for a given limit."""
    if find_spec("math_verify") is None:
        raise ModuleNotFoundError("checking mathematical answers needs the package math-verify: pip install math-verify")
    checker = AnswerChecker(limit_s)
    atexit.register(checker.close)
    return checker


def _check(gold: str, text: str) -> bool:
    import math_verify

    options: dict[str, Any] = {"parsing_timeout": None}  # the parent process is the time limit
    truth = math_verify.parse(f"\\boxed{{{gold}}}", **options) or math_verify.parse(gold, **options)
    return bool(math_verify.verify(truth, math_verify.parse(text, **options), timeout_seconds=None))


def serve() -> None:
    """Answer one JSON line [gold, text] with one line true or false until the input ends."""
    import logging
    import os
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; it then closes the pipe
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (before the first question, so that its import is not on the clock)

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            right = _check(*json.loads(line))
        except Exception:  # an answer that breaks the parser is wrong, whatever it broke
            right = False
        print("true" if right else "false", file=replies, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder: its files must not shadow installed packages
    serve()
