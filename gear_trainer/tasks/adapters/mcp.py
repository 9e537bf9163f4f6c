"""Tools of an MCP server. A server has no reward, so a function of the user's own judges the conversation."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gear_trainer.tasks.adapters.rows import Row, RowTask
from gear_trainer.tasks.awaiting import resolved
from gear_trainer.tasks.base import End, Episode, Message, Outcome, Problem, Reply, TaskError
from gear_trainer.tasks.tool_calls import read_call, split_calls
from gear_trainer.user_code import load_object, said

MAX_CALLS = 16  # run a turn; more is a runaway


class Session:
    """A connection of its own, kept by one task of the event loop: what opens it must close it too."""

    def __init__(self, target: Any):
        self.target, self.jobs, self.owner = target, asyncio.Queue(), None
        self.tools: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    async def opened(self) -> list[Any]:
        """The server's tools, connected on the first call."""
        self.owner = self.owner or asyncio.ensure_future(self._own())
        return await asyncio.shield(self.tools)

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """The result of a tool's call. Raises what the client raises."""
        answer = asyncio.get_running_loop().create_future()
        await self.jobs.put((name, arguments, answer))
        return await answer

    async def close(self) -> None:
        """Close the connection; a server that was started for it ends."""
        if self.owner is not None:
            await self.jobs.put(None)
            with suppress(Exception):
                await self.owner

    async def _own(self) -> None:
        from mcp.client.client import Client

        answer = None
        try:
            async with Client(self.target) as client:
                self.tools.set_result((await client.list_tools()).tools)
                while (job := await self.jobs.get()) is not None:
                    name, arguments, answer = job
                    answer.set_result(await client.call_tool(name, arguments))
        except Exception as error:
            waiting = [f for f in (self.tools, answer) if f is not None and not f.done()]
            while not self.jobs.empty() and (job := self.jobs.get_nowait()) is not None:
                waiting.append(job[2])
            for future in waiting:
                future.set_exception(RuntimeError(f"the MCP server: {said(error)}"))


class McpEpisode(Episode):
    """One session of the server; a turn without calls is the last."""

    def __init__(self, task: McpTask, problem: Problem):
        self.task, self.row, self.session = task, problem.data["row"], None
        self.transcript: list[dict[str, Any]] = list(problem.messages)

    async def step(self, text: str) -> Reply:
        """Run the turn's calls one after the other."""
        self.transcript.append({"role": "assistant", "content": text})
        bodies, messages, errors = split_calls(text), [], 0
        for body in bodies[:MAX_CALLS]:
            answer, ok = await self._run(body)
            messages.append(Message("tool", answer))
            errors += not ok
        if left := len(bodies) - len(messages):
            messages.append(Message("tool", f"Error: at most {MAX_CALLS} calls a turn"))
            errors += left
        self.transcript += [{"role": "tool", "content": message.content} for message in messages]
        return Reply(messages, len(bodies), errors)

    async def _run(self, body: str | None) -> tuple[str, bool]:
        call = read_call(body, self.task.names)
        if isinstance(call, str):
            return f"Error: {call}", False
        if self.session is None:
            self.session = Session(self.task.target)
            await self.session.opened()
        result = await self.session.call(call.name, call.arguments)
        text = "\n".join(getattr(block, "text", f"[{block.type}]") for block in result.content)
        return text, not result.is_error

    async def outcome(self, end: End) -> Outcome:
        """The judge's reward for the conversation."""
        found = self.task.judged(row=self.row, transcript=self.transcript, end=end)
        reward = float(await found if asyncio.iscoroutine(found) else found)
        return Outcome(reward, reward >= self.task.success_at)

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()


@dataclass(frozen=True)
class McpTask(RowTask):
    """Rows solved with the tools of an MCP server.

    server: an http address, or a command that serves on standard input and output; each episode has a session of its own. judge:
    `module:function`, called with row, transcript (chat messages) and end, which returns the reward. The others are RowTask's.
    """

    server: str = ""
    judge: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.judged, self._tools

    @cached_property
    def target(self) -> Any:
        """The address or the command that the client connects to."""
        if not self.server:
            raise TaskError("server is missing: give an http address or a command")
        if self.server.startswith(("http://", "https://")):
            return self.server
        try:
            from mcp import StdioServerParameters
        except ImportError as error:
            raise TaskError(f"the task mcp needs the package mcp, 2 or newer ({error}): pip install 'mcp>=2'") from error
        command, *arguments = shlex.split(self.server)
        return StdioServerParameters(command=command, args=arguments)

    @cached_property
    def judged(self) -> Callable[..., Any]:
        """The judge."""
        if not self.judge:
            raise TaskError("judge is missing: an MCP server has no reward, so name a function as module:function")
        try:
            return load_object(self.judge)
        except ImportError as error:
            raise TaskError(f"judge={self.judge} cannot be loaded ({error}): name a function as module:function") from error

    @cached_property
    def _tools(self) -> list[dict[str, Any]]:
        try:
            found = resolved(_listed(self.target))
        except Exception as error:  # the client's families, and the operating system's
            raise TaskError(f"server={self.server} does not answer ({said(error)})") from error
        return [
            {"type": "function", "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema}}
            for t in found
        ]

    @cached_property
    def names(self) -> list[str]:
        """The names of the tools."""
        return [schema["function"]["name"] for schema in self._tools]

    def _begun(self, row: Row) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]:
        return self._chat(row), self._tools or None

    def episode(self, problem: Problem) -> McpEpisode:
        return McpEpisode(self, problem)


async def _listed(target: Any) -> list[Any]:
    session = Session(target)
    try:
        return await session.opened()
    finally:
        await session.close()
