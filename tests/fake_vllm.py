"""A small stand-in for vLLM's server on loopback: token ids in and out, weights over a group of the test's, faults on demand.

As a script (arguments: host, port, a file) it is a process that a run starts in vLLM's place and pushes its weights to over gloo.
From the third version of the weights on it answers no request for a turn; the file is made when one has come.
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

EOS = 1


class FakeVllm(ThreadingHTTPServer):
    """`asked` keeps (path, body) of all requests but those for health, `weights` what was pushed, by name, `adapters` the files
    of a pushed folder, by the name that requests give.

    faults: by path an HTTP status to fail with, or "hang", or "drop" (the connection breaks off). A turn is the prompt's last
    token + 1, + 2, ... up to max_tokens or 4 tokens and EOS; one whose prompt begins with 99 is held until the next push.
    """

    daemon_threads = True

    def __init__(self, address=("127.0.0.1", 0)):
        super().__init__(address, Handler)
        self.asked, self.weights, self.faults = [], {}, {}
        self.version, self.paused, self.updated, self.adapters = "default", False, False, {}
        self.pushed, self.ended, self.group = threading.Event(), threading.Event(), None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self):
        return [path for path, _ in self.asked]

    def generate(self, body):
        assert body.get("model") in (None, *self.adapters)
        first = [self.version]
        held = body["token_ids"][0] == 99
        if held:
            self.pushed.wait(30)
        ids = [body["token_ids"][-1] + i for i in range(1, 5)] + [EOS]
        cut = ids[: body["sampling_params"]["max_tokens"]]
        spans = [{"version": first[0], "start": 0, "end": 2 if held else len(cut)}]
        if held:
            spans.append({"version": self.version, "start": 2, "end": len(cut)})
        content = [{"token_id": t, "logprob": -t / 10, "top_logprobs": []} for t in cut]
        reason = "stop" if cut == ids else "length"
        choice = {"index": 0, "token_ids": cut, "logprobs": {"content": content}, "finish_reason": reason}
        return {"choices": [{**choice, "weight_versions": spans}]}

    def load(self, lora_name, lora_path):
        assert self.paused and lora_name not in self.adapters, "only the first is loaded so"
        self.adapters[lora_name] = sorted(path.read_text() for path in Path(lora_path).iterdir())

    def call(self, method, *arguments):
        if method == "adapters":
            return list(range(1, 1 + len(self.adapters)))
        assert self.paused and method == "replace_adapter"
        ((name, _),) = self.adapters.items()
        self.adapters[name] = sorted(path.read_text() for path in Path(*arguments).iterdir())

    def update(self, info):
        assert self.paused, "weights come while nothing runs"
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.receive(tensor)
            self.weights[name] = tensor


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self.faulty():
            self.reply(200, {"world_size": 1} if self.path == "/get_world_size" else None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        server, path = self.server, self.path
        server.asked.append((path, body))
        if self.faulty():
            return
        answer = None
        if path == "/inference/v1/generate":
            answer = server.generate(body)
        elif path == "/init_weight_transfer_engine":
            server.group = server.group or Joined(**body["init_info"])
        elif path == "/update_weight_version":
            server.version, server.updated = body["new_version"], server.paused
        elif path == "/pause?mode=keep":
            server.paused = True
        elif path == "/v1/load_lora_adapter":
            server.load(**body)
            return self.reply(200, "Success", plain=True)
        elif path == "/collective_rpc":
            answer = {"results": [server.call(body["method"], *body["args"])] * 2}
        elif path == "/update_weights":
            server.update(body["update_info"])
        elif path == "/finish_weight_update":
            if body is None:
                return self.reply(500, {"error": {"message": "no update was begun"}})
            server.version, server.updated = body["weight_version"], True
        elif path == "/resume":
            server.paused = False
            if server.updated:
                server.pushed.set()
        self.reply(200, answer)

    def faulty(self):
        fault = self.server.faults.get(self.path)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "hang":
            self.server.ended.wait(60)
        elif fault:
            self.reply(fault, {"error": {"message": f"told to fail with {fault}"}})
        return bool(fault)

    def reply(self, status, content, plain=False):
        data = b"" if content is None else content.encode() if plain else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if plain else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass


class Joined:
    """The server's end of a group over gloo."""

    def __init__(self, master_address, master_port, world_size, rank_offset):
        from gear_trainer.rollout.weight_transfer import Gloo

        self.group = Gloo(master_address, master_port, rank_offset, world_size, 60.0)

    def receive(self, tensor):
        self.group.send(tensor)  # a broadcast, to all but its root


class Halting(FakeVllm):
    def __init__(self, host, port, held):
        super().__init__((host, int(port)))
        self.held = Path(held)

    def generate(self, body):
        if self.version in ("default", "0", "1", "2"):
            return super().generate(body)
        self.held.touch()
        threading.Event().wait()


class Wire:
    """Both ends of a group in one process: what one sends, the other receives, in order."""

    def __init__(self):
        self.sent, self.there = [], threading.Condition()

    def send(self, tensor):
        with self.there:
            self.sent.append(tensor)
            self.there.notify()

    def finish(self):
        deadline = time.monotonic() + 30
        while self.sent and time.monotonic() < deadline:
            time.sleep(0.001)

    def receive(self, tensor):
        with self.there:
            assert self.there.wait_for(lambda: self.sent, 30)
            tensor.copy_(self.sent.pop(0))


@contextmanager
def fake_vllm():
    server = FakeVllm()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.pushed.set()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    Halting(*sys.argv[1:]).serve_forever()
