"""The choice of a means for a run: the first that holds when it is tried out, else none."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from gear_trainer.launcher import ranks_here
from gear_trainer.sandbox.interpreter import LIMITS, OPENING_LIMIT, START_LIMIT, WARM, Limits, Sandbox, SandboxError, said
from gear_trainer.sandbox.means import AUTO, INSTALL, MEANS, Means

# Each attempt of the trial by what it would show, with the code; one that raises nothing has got through.
ATTEMPTS = {
    "opens a TCP connection": "socket.create_connection(('127.0.0.1', TCP), 1)",
    "sends a UDP packet": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))",
    "signals the run": "os.kill(RUN, 0)",
    "reads a file of the run": "open(CANARY).read()",
    "writes a file": "open(TARGET, 'w').write('x')",
    "starts a process": "os.fork() or os._exit(0)",
}
_TRIAL = """
import os, socket
held = []
for name, attempt in ATTEMPTS:
    try:
        exec(attempt)
        held.append(name)
    except Exception:
        pass
import json
print(json.dumps([1 + 1, held]))
"""


def cores() -> int:
    """The cores that a rank has to itself: the machine's, shared among its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


@lru_cache
def shared_sandbox(choice: str, limits: Limits) -> Sandbox:
    """The sandbox that all tasks of this process share for a choice and limits, as many calls at a time as `cores`."""
    return open_sandbox(choice, limits=limits)


def open_sandbox(choice: str = "auto", size: int | None = None, limits: Limits = LIMITS, warm: str = WARM) -> Sandbox:
    """A sandbox by the first means of a choice (auto, or one's name) that holds. Raises SandboxError, with each one's reason."""
    if choice != "auto" and choice not in MEANS:
        raise SandboxError(f"sandbox: {choice!r} is none of auto, {', '.join(MEANS)}")
    failed: list[str] = []
    for name in AUTO if choice == "auto" else (choice,):
        means = MEANS[name]
        if reason := means.missing():
            failed.append(f"{name}: {reason}")
            continue
        sandbox = None
        try:
            sandbox = Sandbox(means, size or cores(), limits, warm)
            sandbox.start_limit = OPENING_LIMIT
            _try_out(sandbox, means)
            sandbox.start_limit = START_LIMIT
            return sandbox
        except (SandboxError, OSError, ValueError) as error:
            failed.append(f"{name}: {said(error)}")
            if sandbox:
                sandbox.close()
    raise SandboxError(
        f"no sandbox holds on this machine ({'; '.join(failed)}): {INSTALL} on Linux 6.12 or one with user namespaces, or take "
        "sandbox=rlimits, under which the model's code can read every file that the run can read, the answers too"
    )


def _try_out(sandbox: Sandbox, means: Means) -> None:
    """Let code attempt what it must not; raises SandboxError with all that got through."""
    with _targets() as names:
        attempts = [(name, code) for name, code in ATTEMPTS.items() if means.hides_files or "CANARY" not in code]
        setting = "".join(f"{name} = {value!r}\n" for name, value in (names | {"ATTEMPTS": attempts}).items())
        result = sandbox.run(setting + _TRIAL, Limits(seconds=20.0))
        try:
            two, held = json.loads(result.text)
        except ValueError:
            raise SandboxError(f"the trial ended by {result.end}: {result.text.strip()[-200:]}") from None
        if os.path.exists(names["TARGET"]) and "writes a file" not in held:
            held.append("writes a file")
    if two != 2 or held:
        raise SandboxError(f"code in it {', '.join(held)}")


@contextmanager
def _targets() -> Iterator[dict[str, Any]]:
    """What the trial aims at, all of it this process's: two ports, its number, a file to read and one to write."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for server in (tcp, udp):
            server.bind(("127.0.0.1", 0))
        tcp.listen()
        canary, target = Path(folder, "canary"), Path(folder, "written")
        canary.write_text("canary")
        yield {
            "TCP": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "RUN": os.getpid(),
            "CANARY": str(canary),
            "TARGET": str(target),
        }
