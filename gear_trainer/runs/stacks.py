"""Where the ranks of a run stand: each writes the stacks of its threads to a file when it is asked to, in whatever it hangs.

`kill -USR2 PID` asks; PID and file stand beside the run's folder, in `.NAME.ranks`. What answers is C code of the interpreter's:
it needs neither the main thread nor the lock that a hung call may hold.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from gear_trainer.runs.files import sync

ASK = signal.SIGUSR2
TOLD_WITHIN = 5.0  # seconds that a rank, on another machine too, has to write its stacks
SETTLED = 1.0  # a rank that was just continued shares its core with the others: a half-written stack was read within 0.2 s
_THREAD = re.compile(r"^(?:Current thread|Thread) .*\n((?:  .*\n)+)", re.MULTILINE)


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks, the last ones at the end."""
    return folder / f"rank-{rank}.stack"


def listen(path: Path) -> IO[bytes]:
    """Answer when this process is asked for its stacks, into this file; it stays open, for the answer opens nothing."""
    file = path.open("ab", buffering=0)
    faulthandler.register(ASK, file=file, all_threads=True, chain=False)
    return file


def write_own(file: IO[bytes]) -> None:
    """Write this process' stacks to the file that `listen` returned."""
    faulthandler.dump_traceback(file, all_threads=True)


def write_of(pid: int) -> None:
    """Ask another process of this machine. One that is stopped answers when it is continued, before it goes on with its work."""
    with suppress(OSError):
        os.kill(pid, ASK)
        os.kill(pid, signal.SIGCONT)


def collect(folder: Path, ranks: list[int]) -> str:
    """The main threads' stacks of these ranks, alike ones together; waits for those that are not written to their end yet.

    A stack is written line by line and nothing marks its end: it is whole once SETTLED seconds have added nothing to any.
    """
    deadline = time.monotonic() + TOLD_WITHIN
    told, since = [_told(folder, rank) for rank in ranks], time.monotonic()
    while time.monotonic() < deadline and not (all(told) and time.monotonic() - since > SETTLED):
        time.sleep(0.2)
        before, told = told, [_told(folder, rank) for rank in ranks]
        since = since if told == before else time.monotonic()
    found: dict[str, list[int]] = {}
    for rank, stack in zip(ranks, told, strict=True):
        found.setdefault(stack or "  no answer\n", []).append(rank)
    return "".join(f"gear_trainer: {_names(same)} in\n{stack}" for stack, same in found.items())


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]} stands" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} stand"


def _told(folder: Path, rank: int) -> str | None:
    """The last stack that a rank wrote of its main thread, innermost call first: threads are written youngest first."""
    with suppress(OSError):
        found = _THREAD.findall(stack_file(folder, rank).read_text(errors="replace"))
        return found[-1] if found else None
    return None


def flush(path: Path) -> None:
    """Have other machines see what a process of this one wrote."""
    with suppress(OSError):
        sync(path)
