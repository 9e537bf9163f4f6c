"""A page that asks for what it shows, on this machine alone: runs of any size, and runs that still go on."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from gear_trainer.errors import ConfigError
from gear_trainer.report import payload
from gear_trainer.report.pages import live_page

HOST = "127.0.0.1"
_KEY = re.compile(r"\d{1,9}|samples|audit|audit/[\w.-]{1,200}")


class Handler(BaseHTTPRequestHandler):
    """Answers `/` with the page, `/data/manifest` (nothing where `known` names it), and of a step `/data/rows` and `/data/pack`.

    A request whose Host is not the one that was printed is refused: another site's script may reach the port, but not so.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, folders: Sequence[Path], *rest):
        self.folders = folders
        super().__init__(*rest)

    def do_GET(self) -> None:  # noqa: N802  (http.server's name)
        """Answer a request, or refuse it in one line."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self._say(HTTPStatus.FORBIDDEN, b"another host's page", "text/plain")
        url = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            if url.path == "/":
                return self._say(HTTPStatus.OK, gzip.compress(live_page().encode(), 1), "text/html; charset=utf-8")
            if url.path == "/data/manifest" and asked.get("known") and asked["known"] == payload.stamp(self.folders):
                return self._say(HTTPStatus.NO_CONTENT, b"", "text/plain")  # not 0.3 s of a core every five seconds
            return self._say(HTTPStatus.OK, self._data(url.path, asked), "application/octet-stream")
        except (KeyError, ValueError, IndexError, FileNotFoundError, ConfigError):
            return self._say(HTTPStatus.NOT_FOUND, b"nothing there", "text/plain")

    def _data(self, path: str, asked: dict[str, str]) -> bytes:
        """Gzipped bytes. Raises KeyError, ValueError, IndexError or FileNotFoundError where there is no such thing."""
        if path == "/data/manifest":
            return gzip.compress(json.dumps(payload.manifest(self.folders, live=True)).encode(), 1)
        if not _KEY.fullmatch(asked["key"]):
            raise ValueError(asked["key"])
        number = int(asked["run"])
        if not 0 <= number < len(self.folders):
            raise IndexError(number)
        folder, key = self.folders[number], int(asked["key"]) if asked["key"].isdecimal() else asked["key"]
        if path == "/data/rows":
            return gzip.compress(json.dumps(payload.rows(folder, key)).encode(), 1)
        if path == "/data/pack":
            groups = [int(group) for group in asked["groups"].split(",")] if "groups" in asked else None
            return payload.pack(payload.rollouts(folder, key, groups))
        raise KeyError(path)

    def _say(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if kind.startswith("text/html"):
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of a request: the terminal may be a run's."""


def server(folders: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """A server of these runs' page on the loopback address; port 0: any that is free. Raises ConfigError where it is taken."""
    for folder in folders:
        payload.describe(folder)
    try:
        made = ThreadingHTTPServer((HOST, port), partial(Handler, folders))
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; give another, or none for any that is free") from None
    made.daemon_threads = True
    return made


def serve(folders: Sequence[Path], port: int) -> None:
    """Serve until interrupted, and say where. Raises ConfigError as `server` does."""
    with server(folders, port) as made:
        print(f"http://{HOST}:{made.server_address[1]}/  (interrupt to end)", flush=True)
        try:
            made.serve_forever()
        except KeyboardInterrupt:
            print()
