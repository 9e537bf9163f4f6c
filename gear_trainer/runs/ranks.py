"""Lost ranks, named: each rank leaves a beat a second beside the run's folder, and reads the others' when a collective breaks.

A rank that dies shows to the others as a broken connection (gloo) or as a collective that never ends (NCCL); neither names it.
What a process does is looked up on its own machine alone: others are told of it by the ranks there, or take it from its silence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import psutil
import torch.distributed as dist

from gear_trainer.errors import ConfigError, RunError
from gear_trainer.runs import stacks
from gear_trainer.runs.files import beside

INTERVAL = 1.0
WARN_AFTER = 30.0  # seconds of silence; a busy machine starves the beating thread for a few
GRACE = 6.0  # for the main thread to notice by itself, with its own message, that a peer is gone
HUSH = 10.0  # of silence, with a broken connection, are a rank of another machine that is gone; a network file system lags by 3
SEEN_WITHIN = 20.0  # until what one machine wrote is seen on another; names that were never asked for are seen at once
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SIZE = 1024  # bytes of a beat's file, written in place: on a full disk it can still say why a rank ended
_NETWORK = ("gloo", "nccl", "connection", "socket", "broken pipe", "processgroup", "store", "timed out", "timeout")


@cache
def machine() -> str:
    """Where a process id means the same process: the machine since its start, and its table of processes. Containers may share a
    host name and have different tables."""
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # another system than Linux
        return socket.gethostname()


class Lost(NamedTuple):
    """Why a rank counts as lost. hangs: nothing is known but its silence, so it may still be there."""

    why: str
    hangs: bool = False


class Beats:
    """This rank's beat and its view of the others'. `limit`: seconds of silence after which a rank counts as lost."""

    running: ClassVar[Beats | None] = None  # of this process, for whoever reports its end

    def __init__(self, run_dir: Path, rank: int, world: int, limit: float):
        self.folder, self.rank, self.world, self.limit = beside(run_dir, "ranks"), rank, world, limit
        self.own: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine()}
        self.own |= {"started": psutil.Process().create_time(), "ended": None, "run": "", "lost": {}}
        self._seen: dict[int, tuple[float, float]] = {}  # rank -> (its file's time, when that last changed by our clock)
        self._told: set[int] = set()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="beats", daemon=True)

    def start(self) -> Beats:
        """Begin to beat. Collective, on the first rank's clean folder; the process group is there already.

        Raises ConfigError, on all ranks, where one of them does not see what another writes.
        """
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        start = [uuid.uuid4().hex]  # a folder that is not shared may hold the beats of an earlier start
        dist.broadcast_object_list(start)
        self.own["run"] = start[0]
        self._write()
        self._check_shared()
        self._stacks = stacks.listen(stacks.stack_file(self.folder, self.rank))
        self._thread.start()
        Beats.running = self
        return self

    def _check_shared(self) -> None:
        dist.barrier()
        deadline = time.monotonic() + SEEN_WITHIN
        while (unseen := self._unseen()) is not None and time.monotonic() < deadline:
            time.sleep(0.2)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (self.own["host"], unseen))
        for rank, (host, other) in enumerate(found):
            if other is not None:
                raise ConfigError(
                    f"output_dir={self.folder.parent}: rank {rank} on {host} does not see there what rank {other} on "
                    f"{found[other][0]} wrote: name a folder on a file system that all machines share, or mount it on all of them"
                )

    def _unseen(self) -> int | None:
        """The first rank whose beat of this start is not to be seen from here."""
        beats = ((rank, self._read(rank)) for rank in range(self.world))
        return next((rank for rank, beat in beats if beat is None or beat.get("run") != self.own["run"]), None)

    def stop(self) -> None:
        """Before the process ends in good order: nobody is lost any more."""
        self._stopped.set()

    def fail(self, error: BaseException) -> None:
        """Leave word for the others of why this rank ends."""
        self.stop()
        self.own["ended"] = _word(error)
        self._write()

    def said_by(self, rank: int, error: BaseException) -> bool:
        """True where another rank ended by the same error; each rank tells one that was foreseen in its own words."""
        ended = (self._read(rank) or {}).get("ended") or ""
        return ended == _word(error) or isinstance(error, RunError) and ended.startswith(f"{type(error).__name__}: ")

    def blame(self, error: BaseException, wait: float = 5.0) -> dict[int, Lost]:
        """The ranks behind a broken collective; none where the error is this rank's own. Waits for word."""
        if not _is_network(error):
            return {}
        elsewhere = any(beat and not _here(beat) for beat in map(self._read, range(self.world)))
        started = time.monotonic()
        while (waited := time.monotonic() - started) < wait + (2 * HUSH if elsewhere else 0.0):
            lost = self.lost(self.limit if waited < wait else min(HUSH, self.limit))
            if lost:
                return lost
            time.sleep(0.2)
        return {}

    def lost(self, limit: float | None = None) -> dict[int, Lost]:
        """The ranks that ended by an error, whose process is gone, or that have been silent for longer than `limit`, by default
        the run's; and those that a rank named before it left because of them."""
        limit, found = limit or self.limit, {}
        for rank in range(self.world):
            beat = self._read(rank) if rank != self.rank else None
            if beat is None:
                continue
            if beat["lost"]:
                found |= {int(named): Lost(*what) for named, what in beat["lost"].items()}
            elif beat["ended"]:
                found[rank] = Lost(f"ended ({beat['ended']})")
            elif _here(beat) and not _alive(beat):
                found[rank] = Lost(f"was killed (pid {beat['pid']})")
            elif self._silence(rank) > limit:
                why = f"has been silent for {limit:.0f} s ({_whereabouts(beat)})"
                found[rank] = Lost(why, hangs=limit == self.limit)
        return found

    # --- the thread -------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        since = None
        while not self._stopped.wait(INTERVAL):
            with suppress(OSError):
                os.utime(self._file(self.rank))
            self._warn()
            lost = self.lost()
            since = since or time.monotonic() if lost else None
            if since is not None and time.monotonic() - since > GRACE and not self._stopped.is_set():
                self.leave(lost)

    def leave(self, lost: dict[int, Lost]) -> None:
        """End this process because of those ranks, with a line on the terminal, from any thread; the main one may be stuck.

        Where a rank hangs the stacks of all are shown before, and what hangs on this machine is killed: nobody else would.
        """
        with self._lock:  # never let go: said once
            speaks = all(rank in lost for rank in range(self.rank))  # the first of the ranks that are left
            hanging = [rank for rank, what in lost.items() if what.hangs and rank != self.rank]
            if hanging:
                self._show_stacks(hanging, speaks)
            if speaks:
                said = "; ".join(f"rank {rank} {what.why}" for rank, what in sorted(lost.items()))
                print(f"gear_trainer: {said}: --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
            self.own["lost"] = lost
            self._write()
            os._exit(1)

    def _show_stacks(self, hanging: list[int], speaks: bool) -> None:
        """Write this rank's stacks and those of hanging ones beside it, and show those of all ranks on one of them."""
        stacks.write_own(self._stacks)
        hung = [beat for rank in hanging if (beat := self._read(rank)) and _here(beat) and _alive(beat)]
        for beat in hung:  # by each rank of the machine: it cannot be known which of them is the last to look
            stacks.write_of(beat["pid"])
        time.sleep(1.0)  # they are asked without an answer
        for rank in (self.rank, *hanging):
            stacks.flush(stacks.stack_file(self.folder, rank))
        if speaks:
            print(stacks.collect(self.folder, list(range(self.world))), end="", file=sys.stderr, flush=True)
            print(f"gear_trainer: all threads are in {self.folder}/rank-*.stack", file=sys.stderr, flush=True)
        else:
            time.sleep(stacks.TOLD_WITHIN)  # a launcher ends the others once one has left
        for beat in hung:
            with suppress(OSError):
                os.kill(beat["pid"], signal.SIGKILL)

    def _warn(self) -> None:
        for rank in range(self.world):
            beat = self._read(rank) if rank != self.rank else None
            if beat is None or beat["ended"]:
                continue
            silence = self._silence(rank)
            if silence < WARN_AFTER:
                self._told.discard(rank)
            elif rank not in self._told and self._speaks_beside(rank):
                self._told.add(rank)
                print(
                    f"gear_trainer: rank {rank} has been silent for {silence:.0f} s ({_whereabouts(beat)}); "
                    f"waiting, up to {self.limit:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def _speaks_beside(self, rank: int) -> bool:
        return self.rank == (1 if rank == 0 else 0)

    # --- the files --------------------------------------------------------------------------------------------------

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self) -> None:
        path = self._file(self.rank)
        with suppress(OSError), path.open("r+b" if path.exists() else "wb") as file:
            file.write(json.dumps(self.own).encode().ljust(_SIZE))

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None

    def _silence(self, rank: int) -> float:
        """Seconds by this machine's clock since the rank's file last changed: clocks of several machines need not agree."""
        now = time.monotonic()
        try:
            stamp = self._file(rank).stat().st_mtime
        except OSError:
            return 0.0
        if rank not in self._seen or self._seen[rank][0] != stamp:
            self._seen[rank] = (stamp, now)
        return now - self._seen[rank][1]


def last_beats(run_dir: Path) -> list[tuple[dict[str, Any], float]]:
    """The beats that a run's ranks left, of its last start, and how many seconds ago by this machine's clock each was written."""
    found = []
    for path in sorted(beside(run_dir, "ranks").glob("rank-*.json")):
        with suppress(OSError, ValueError):
            found.append((json.loads(path.read_text()), time.time() - path.stat().st_mtime))
    return found


def lives(beat: dict[str, Any], age: float) -> bool:
    """True where the process of a beat runs: looked up on this machine, by the age of its beat on another."""
    return _alive(beat) if _here(beat) else age < 2 * WARN_AFTER


def _here(beat: dict[str, Any]) -> bool:
    return beat.get("machine") == machine()  # older versions left none


def _word(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return json.dumps(text)[1:-1][: _SIZE // 2]  # ASCII, so that its length in bytes is known


def _is_network(error: BaseException) -> bool:
    if isinstance(error, RunError):  # it says itself what happened
        return False
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in _NETWORK)


def _alive(beat: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(beat["pid"])
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and process.create_time() == beat["started"]
    except psutil.Error:
        return False


def _whereabouts(beat: dict[str, Any]) -> str:
    """Its process and machine, and what the process is doing where it is on this machine."""
    where = f"pid {beat['pid']} on {beat['host']}"
    if not _here(beat):
        return where
    try:
        return f"{where}, {psutil.Process(beat['pid']).status()}"
    except psutil.Error:
        return f"{where}, gone"
