"""A server process that ends with the process that started it."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_PDEATHSIG = 1  # prctl's
_TAIL = 1 << 16  # bytes at the end of a log that are searched for its error
_GRACE = 10.0  # seconds that it may take to end


class Served:
    """A running server; what it prints goes to the end of `log`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt of the terminal is the trainer's
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        atexit.register(self.end)

    def ended(self, within: float = 0.0) -> str | None:
        """The exit code and the last error of its log, where it is no longer there; waits for its end for some seconds."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            return None
        return f"exit code {code}{_last_error(self.log)}"

    def end(self) -> None:
        """End it, and whatever it started."""
        atexit.unregister(self.end)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between fork and exec


def _end_with_parent() -> None:
    """In the new process: have the system end it when the one that started it is gone, however that ended."""
    assert _libc is not None
    _libc.prctl(_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _last_error(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    # an error that is told, not one that a warning quotes in backticks
    errors = [found[1] for line in lines if (found := re.search(r"(?:^|[\s.])(\w+(?:Error|Exception): \S.*)", line))]
    return f", {errors[-1][:200]}" if errors else ""
