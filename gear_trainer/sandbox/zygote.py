"""The warm process inside a sandbox, which forks for every call: it runs as `python -c` and imports nothing of the project.

argv[1] is JSON: `landlock` (readable paths) and `sandlock` (the folder with the package), or null; `library`, the libraries'
folder; `warm`, code that imports and tries what most calls want; `filter`, base64 of a seccomp filter. It writes one byte when it
is ready. A request is struct REQUEST and the code; the answer is struct REPLY and what the code printed. The end of the input
ends it, and the call that runs.
"""

from __future__ import annotations

import ast
import base64
import ctypes
import gc
import json
import math
import mmap
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import traceback
from types import CodeType

REQUEST = struct.Struct("=dQQQ")  # seconds, bytes of memory, bytes of output, bytes of code
REPLY = struct.Struct("=BdQ")  # how it ended, seconds, bytes of output
ENDS = ("done", "error", "memory", "time", "output", "killed")
DONE, ERROR, MEMORY, TIME, OUTPUT, KILLED = range(len(ENDS))
_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38  # prctl's
_CAPABILITIES = 0x20080522  # version of capset's header
_LONGEST = 1000  # characters of an error's message: a syntax error shows its line
_FILES = 64  # descriptors of a call
_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def _must(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _confine(settings: dict) -> None:
    """Landlock by sandlock, then no capability: from here on this process is no more than its calls but for the filter."""
    if settings["landlock"]:
        sys.path.insert(0, settings["sandlock"])
        import sandlock

        if sandlock.landlock_abi_version() < sandlock.min_landlock_abi():
            raise OSError(f"Landlock ABI {sandlock.landlock_abi_version()}, strict needs {sandlock.min_landlock_abi()}")
        sandlock.confine(sandlock.Sandbox(fs_readable=settings["landlock"]))
        sys.path.pop(0)
    _must(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    header, none = struct.pack("II", _CAPABILITIES, 0), bytes(24)
    _must(_libc.capset(header, none), "capset")
    _must(_libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")  # nobody of this user reads its memory


def _warm(settings: dict) -> None:
    """Import and try what most calls want; with a fixed seed, so that what they draw is the same in each."""
    sys.path.append(settings["library"])
    exec(settings["warm"], {"__name__": "warm"})
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    gc.collect()
    gc.freeze()  # a collection in a fork need not touch, and so copy, what is here


def serve(settings: dict) -> None:
    """Answer requests until the input ends."""
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _confine(settings)
    _warm(settings)
    program = base64.b64decode(settings["filter"])
    os.write(replies, b"+")
    while head := _read(requests, REQUEST.size):
        seconds, memory, output, size = REQUEST.unpack(head)
        # both in pages that are given back: no later call finds in this process's memory what an earlier one was
        with mmap.mmap(-1, max(size, 1)) as code, mmap.mmap(-1, output) as shown:
            _read_into(requests, memoryview(code)[:size])
            end, took, length = _call(requests, code[:size], program, (seconds, memory), shown)
            _write(replies, REPLY.pack(end, took, length))
            _write(replies, memoryview(shown)[:length])


def _read(file: int, size: int) -> bytes:
    found = b""
    while len(found) < size and (part := os.read(file, size - len(found))):
        found += part
    return found if len(found) == size else b""


def _read_into(file: int, view: memoryview) -> None:
    with view:
        at = 0
        while at < len(view):
            got = os.readv(file, [view[at:]])
            if not got:
                os._exit(0)
            at += got


def _write(file: int, data: bytes | memoryview) -> None:
    with memoryview(data) as view:
        at = 0
        while at < len(view):
            at += os.write(file, view[at:])


def _call(requests: int, code: bytes, program: bytes, limits: tuple[float, int], shown: mmap.mmap) -> tuple[int, float, int]:
    """One forked call: how it ended, its seconds, and how many bytes of `shown` it filled."""
    read, write = os.pipe()
    began = time.monotonic()
    if (child := os.fork()) == 0:
        _child(write, code, program, *limits)
    os.close(write)
    handle = os.pidfd_open(child)
    try:
        end, length = _watch(requests, read, handle, began + limits[0], shown)
        if end is not None:
            os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    finally:
        os.close(read)
        os.close(handle)
    if end is None:
        spent = used.ru_utime + used.ru_stime >= 0.98 * math.ceil(limits[0])
        left = os.WEXITSTATUS(status) if os.WIFEXITED(status) else TIME if spent else KILLED
        end = left if left < len(ENDS) else ERROR
    return end, time.monotonic() - began, length


def _watch(requests: int, output: int, child: int, deadline: float, shown: mmap.mmap) -> tuple[int | None, int]:
    """Read what the call prints until it ends (None), has printed too much, or its time is up."""
    poll, length, open_ = select.poll(), 0, True
    poll.register(requests, select.POLLHUP)
    poll.register(child, select.POLLIN)
    poll.register(output, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(left * 1000))
        if requests in ready:
            return KILLED, 0  # the trainer is gone; the read after this finds the end
        if open_ and output in ready:
            spare = bytearray(1)  # a byte more than fits is too much
            with memoryview(shown)[length:] as rest:
                got = os.readv(output, [rest if len(rest) else spare])
            if got and length == len(shown):
                return OUTPUT, length
            length += got
            if not got:
                poll.unregister(output)
                open_ = False
        elif child in ready:
            return None, length
    return TIME, length


def _child(output: int, code: bytes, program: bytes, seconds: float, memory: int) -> None:
    """Become the call: nothing open but the pipe, limits, the filter, then the code. Never returns."""
    end = KILLED
    try:
        nothing, other = os.pipe()
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 4096)
        random.seed(0)  # a fork gets a seed of its own otherwise
        sys.argv[1:] = []
        _limit(seconds, memory)
        _must(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
        steps = ctypes.create_string_buffer(program, len(program))
        fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps)))
        _must(_libc.prctl(_SET_SECCOMP, 2, ctypes.addressof(fprog), 0, 0), "seccomp")
        end = run(code.decode())
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(end)


def _limit(seconds: float, memory: int) -> None:
    cpu = math.ceil(seconds)
    for what, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (most, most))


def run(code: str) -> int:
    """Run a text as a module; a last line that is an expression is shown, as in a notebook. Returns one of ENDS by its place."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr = sys.stdout
    names = {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit}
    try:
        body, last = _compiled(code)
        exec(body, names)
        if last is not None and (value := eval(last, names)) is not None:
            print(repr(value))
    except SystemExit as error:
        if error.code not in (None, 0):
            print(error.code)
            return ERROR
    except MemoryError:
        names.clear()
        print("MemoryError")
        return MEMORY
    except BaseException as error:
        _tell(error)
        return ERROR
    return DONE


def _compiled(code: str) -> tuple[CodeType, CodeType | None]:
    tree = ast.parse(code, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    shown = compile(ast.Expression(last.value), "<code>", "eval") if isinstance(last, ast.Expr) else None
    return compile(tree, "<code>", "exec"), shown


def _tell(error: BaseException) -> None:
    """The line of the code that failed and the exception, not the path through the libraries."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<code>"]
    told = "".join(traceback.format_exception_only(error)).strip()[:_LONGEST]
    print(f"line {lines[-1]}: {told}" if lines else told)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
