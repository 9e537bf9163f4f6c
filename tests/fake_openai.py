"""A small OpenAI-compatible server on loopback that keeps its requests and fails when told to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeOpenAI(ThreadingHTTPServer):
    """`behave(body)` returns the reply's text, an HTTP status to fail with, or seconds to hang (a float)."""

    daemon_threads = True

    def __init__(self, behave=lambda body: "call the tool first", models=("writer-1",), key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.models, self.key, self.requests = behave, models, key, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.models is None or self.path != "/v1/models":
            return self.reply(404, {"error": "nothing here"})
        if self.refused():
            return self.reply(401, {"error": "bad key"})
        models = [{"id": m, "object": "model", "max_model_len": 700} for m in self.server.models]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.reply(404, {"error": "nothing here"})
        if self.refused():
            return self.reply(401, {"error": "bad key"})
        self.server.requests.append(body)
        done = "OK" if body["max_tokens"] == 1 else self.server.behave(body)
        if isinstance(done, float):
            time.sleep(done)
            done = "late"
        if isinstance(done, int):
            return self.reply(done, {"error": {"message": f"told to fail with {done}"}})
        message = {"role": "assistant", "content": done}
        self.reply(200, {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    def refused(self):
        return self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}"

    def reply(self, status, content):
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up first


@contextmanager
def fake_openai(**options):
    server = FakeOpenAI(**options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
