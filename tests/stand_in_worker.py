"""A worker as `gear_trainer/tasks/worker/serve.py` describes: a shelf of boxes, and hostile tasks beside.

It stands for ToolSandbox and AppWorld, whose packages no test can have.
"""

import os
import sys
import time

TOOL = {
    "name": "open_box",
    "description": "Open a box.",
    "parameters": {"type": "object", "properties": {"box": {"type": "integer"}}},
}


class Worker:
    holds = 2

    def __init__(self, boxes=4):
        print("noise on the standard output")
        self.boxes = boxes

    def tasks(self, split):
        if split == "broken":
            raise KeyError("no such split")
        return [f"{split}-{i}" for i in range(self.boxes)] + (["dies", "hangs", "garbles"] if split == "hostile" else [])

    def reset(self, task, seed):
        right = seed % self.boxes
        begun = {
            "messages": [{"role": "user", "content": f"{task}: which of {self.boxes} boxes holds the ball?"}],
            "tools": [{"type": "function", "function": TOOL}],
            "truth": f"box {right}",
            "category": "boxes",
        }
        return {"task": task, "right": right, "found": False, "opened": 0}, begun

    def step(self, state, text, calls):
        if state["task"] == "dies":
            sys.stderr.write("the simulator fell over\n")
            sys.stderr.flush()
            os._exit(3)
        if state["task"] == "hangs":
            time.sleep(60)
        if state["task"] == "garbles":
            raise RuntimeError("a box is stuck")
        if not calls:
            return {"messages": []}
        state["opened"] += len(calls)
        hits = [bool(call) and call["arguments"].get("box") == state["right"] for call in calls]
        state["found"] = state["found"] or any(hits)
        messages = [{"role": "tool", "content": "the ball" if hit else "nothing"} for hit in hits]
        return {"messages": messages, "errors": calls.count(None)}

    def evaluate(self, state, end):
        return {
            "reward": float(state["found"]),
            "success": state["found"],
            "metrics": {"opened": state["opened"], "pid": os.getpid()},
        }

    def close(self, state):
        pass
