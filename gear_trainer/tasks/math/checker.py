"""Answer checking with math-verify in a process of its own, so that no answer can hang or crash the trainer.

sympy can spend minutes inside one C call (9**9**9), where neither Python's handler of a signal nor a thread stops it. The kernel
does: the worker has a timer of its own processor time, whose signal ends it, so that a verdict does not depend on what else the
machine is doing; the trainer's clock is a net behind that. The worker half of this file runs as a script and imports nothing of
the project.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from enum import StrEnum
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

START_LIMIT = 50.0  # importing sympy takes 1-2 s, much more on a loaded machine; below rollout.turn_timeout, for its own message
MEMORY_LIMIT = 4 << 30  # bytes of address space of the worker
PATIENCE = 8.0  # seconds of the clock for each second of processor time


class Verdict(StrEnum):
    """The verdict on a turn. All but RIGHT earn nothing; each says why."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # the turn gives none (answer.py)
    UNREADABLE = "unreadable"  # math-verify finds no value in it, and the gold answer is one
    CHECK_BROKEN = "check_broken"  # the check passed its limits of time or memory, or broke


class AnswerChecker:
    """Tells whether a text's final answer (answer.py) is the gold one. One worker, started on first use, and after its end.

    limit_s: seconds of processor time for one check. timeouts: checks that took more, or broke the worker.
    """

    def __init__(self, limit_s: float):
        self.limit_s, self.timeouts = limit_s, 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, text: str) -> bool:
        """True where the verdict is RIGHT."""
        return self.judge(gold, text) is Verdict.RIGHT

    def judge(self, gold: str, text: str) -> Verdict:
        """The verdict on the final answer of a text, against a gold answer as its set writes it."""
        from gear_trainer.tasks.math.answer import final_answer, readings  # here: the worker runs without the project

        answer = final_answer(gold, text)
        if answer is None:
            return Verdict.NO_ANSWER
        found = Verdict.WRONG
        for one, other in readings(gold, answer):
            found = self._verdict(one, other)
            if found in (Verdict.RIGHT, Verdict.CHECK_BROKEN):
                break
        return found

    def _verdict(self, gold: str, answer: str) -> Verdict:
        with self._lock:
            try:
                worker = self._worker or self._start()
                assert worker.stdin is not None  # _start made the pipes
                worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                worker.stdin.flush()
                return Verdict(self._read(worker, PATIENCE * self.limit_s))
            except (BrokenPipeError, EOFError, TimeoutError):
                self.timeouts += 1
                self.close()
                return Verdict.CHECK_BROKEN

    def close(self) -> None:
        """Stop the worker; the next check starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, str(self.limit_s)]
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


def _check(gold: str, text: str) -> Verdict:
    import math_verify

    options: dict[str, Any] = {"parsing_timeout": None}  # the process has the time limit
    truth = math_verify.parse(f"\\boxed{{{gold}}}", **options) or math_verify.parse(gold, **options)
    given = math_verify.parse(text, **options)
    if math_verify.verify(truth, given, timeout_seconds=None):
        return Verdict.RIGHT
    return Verdict.UNREADABLE if _is_value(truth) and not _is_value(given) else Verdict.WRONG


def _is_value(parsed: list[Any]) -> bool:
    """Whether math-verify found more in an answer than its text."""
    return any(not isinstance(part, str) for part in parsed)


def serve(limit_s: float) -> None:
    """Answer one JSON line [gold, text] with one line, a Verdict, until the input ends or a check takes longer than the limit."""
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

    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel's own: it ends the process within a C call too
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            verdict = _check(*json.loads(line))
        except MemoryError:
            verdict = Verdict.CHECK_BROKEN
        except Exception:  # an answer that breaks the parser is wrong, whatever it broke
            verdict = Verdict.UNREADABLE
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict.value, file=replies, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder: its files must not shadow installed packages
    serve(float(sys.argv[1]))
