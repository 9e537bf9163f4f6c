"""The event loop in which everything `async` of a task is awaited: one a process, in a thread of its own, so that what an episode
opened in one call (a session, a socket) still belongs to the same loop in the next."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_ANSWERS_WITHIN = 1.0  # seconds; a loop that takes longer is held by a call that never awaits
_lock = threading.Lock()
_running: asyncio.AbstractEventLoop | None = None


def resolved(value: Any, started: Callable[[Future[Any]], None] | None = None) -> Any:
    """The value, or what an awaitable comes to; raises what that raises. Blocks; not to be called from the loop itself.

    started: is given the handle of an awaitable, whose `cancel` ends the wait.
    """
    if not inspect.isawaitable(value):
        return value
    handle = asyncio.run_coroutine_threadsafe(_awaited(value), _loop())
    if started:
        started(handle)
    return handle.result()


def leave(handle: Future[Any]) -> None:
    """Cancel what took too long; where a call holds the whole loop, later ones get a fresh loop."""
    global _running
    handle.cancel()
    loop, alive = _running, threading.Event()
    if loop is not None:
        loop.call_soon_threadsafe(alive.set)
        if not alive.wait(_ANSWERS_WITHIN):
            with _lock:
                _running = None if _running is loop else _running


async def _awaited(value: Any) -> Any:
    return await value


def _loop() -> asyncio.AbstractEventLoop:
    global _running
    with _lock:
        if _running is None:
            _running = asyncio.new_event_loop()
            threading.Thread(target=_running.run_forever, name="episodes' event loop", daemon=True).start()
        return _running
