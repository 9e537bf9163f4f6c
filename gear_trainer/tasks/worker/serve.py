"""Serves a `Worker` class over standard input and output, one JSON object a line: `python serve.py FILE.py '{"option": 1}'`.

Runs in the environment's own Python (3.9 or newer) and needs nothing but the standard library. A request is
{"do": ..., "episode": n, ...}, an answer {"ok": ...} or {"error": text}. The class in FILE.py:

    class Worker:
        holds = 1                           episodes that a process holds at a time; None: any number
        def __init__(self, **options)
        def tasks(self, split)              the names of the tasks of a split
        def reset(self, task, seed)         (state, {"messages": chat, "tools": schemas or None, "truth": text, "category": text})
        def step(self, state, text, calls)  {"messages": [{"role": "tool" or "user", "content": text}], "errors": n}; none: over
        def evaluate(self, state, end)      {"reward": x, "success": bool, "metrics": {name: x}}
        def close(self, state)

`calls` are the turn's tool calls, {"name", "arguments"} each, or None in the place of a broken one.
"""

import importlib.util
import json
import os
import sys
import traceback


def load(path):
    """The class `Worker` of a file."""
    spec = importlib.util.spec_from_file_location("served", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Worker


class Server:
    """Answers requests by one worker, which keeps a state for each episode."""

    def __init__(self, worker):
        self.worker, self.states = worker, {}

    def answer(self, request):
        """The answer to a request. Raises what the worker raises."""
        do, episode = request["do"], request.get("episode")
        if do == "hello":
            return {"holds": self.worker.holds}
        if do == "tasks":
            return list(self.worker.tasks(request["split"]))
        if do == "reset":
            self.states[episode], begun = self.worker.reset(request["task"], request["seed"])
            return begun
        if do == "step":
            return self.worker.step(self.states[episode], request["text"], request["calls"])
        if do == "evaluate":
            return self.worker.evaluate(self.states[episode], request["end"])
        if do == "close":
            return self.worker.close(self.states.pop(episode)) if episode in self.states else None
        raise ValueError(f"unknown request {do!r}")


def main(path, options):
    """Serve until the input ends. What the environment prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    server = None
    for line in sys.stdin:
        try:
            server = server or Server(load(path)(**options))
            said = {"ok": server.answer(json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
