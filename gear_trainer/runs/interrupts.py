"""Who may end a run: Ctrl-C, SIGTERM, and a launcher that is gone. The run then ends after its step, with a checkpoint."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from typing import Any

import psutil

POLL = 1.0
EARLY = "interrupted before training began"  # all that such a run says; it is no failure
PATIENCE = 30.0  # seconds for the main thread to unwind before training has begun
_COMMANDS = ("deepspeed", "torchrun", "accelerate", "mpirun", "srun")
_MODULES = ("deepspeed.launcher", "torch.distributed")


class Interrupts:
    """`asked` is True once the run is to end after its step; before `arm` an interrupt ends it at once, with nothing to save."""

    def __init__(self) -> None:
        self.asked, self.armed, self.why = False, False, ""
        self.launchers = _launchers()
        if self.launchers:
            threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    def arm(self) -> None:
        """From here on a step is to be finished first.

        Ctrl-C under the deepspeed launcher comes as SIGINT, then as the launcher's SIGTERM, so a SIGTERM never counts as the
        second one. The launcher kills what is left after 30 s: a longer step goes on from the checkpoint before.
        """

        def ask(number: int, _frame: Any) -> None:
            if number == signal.SIGINT and self.asked:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.asked = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
        self.armed = True

    def _watch(self) -> None:
        """A SIGTERM or a kill to the `deepspeed` command reaches nobody else: its ranks would train on, and hold the port."""
        while all(_running(p) for p in self.launchers):
            threading.Event().wait(POLL)
        self.why = "its launcher is gone"
        if self.armed:
            self.asked = True
            return
        print("gear_trainer: the launcher is gone before training began: ending", file=sys.stderr, flush=True)
        _thread.interrupt_main()  # unwinds, so that half-built things are cleaned up
        threading.Event().wait(PATIENCE)
        if not self.armed:
            os._exit(1)
        self.asked = True


def _launchers() -> list[psutil.Process]:
    """The processes above this one that started it: the nearest where a rank was set, and each launcher above that."""
    if "RANK" not in os.environ:
        return []
    above = psutil.Process().parents()
    found = above[:1]
    for process in above[1:]:
        if not _launches(process):
            break
        found.append(process)
    return found


def _launches(process: psutil.Process) -> bool:
    """Whether its command is a launcher's. Only the first words are looked at: a shell's `-c "deepspeed ... &"` may end early."""
    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return False
    return any(os.path.basename(word) in _COMMANDS or word.startswith(_MODULES) for word in words)


def _running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
