"""A real HTTP server on the loopback whose behaviour a test switches."""

from __future__ import annotations

import http.server
import socket
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Behaviour = Literal["ok", "500", "401", "404", "429", "hang", "truncated", "reset", "refused"]

RETRY_AFTER = 30
HANGS = "/hang"
"""How the path ends at which it does not answer."""
HANGS_FOR = 60.0


class FlakyServer(http.server.ThreadingHTTPServer):
    """Answers every GET as it is told to at the moment."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour: Behaviour = "ok"
        self.requests = 0
        self.closing = threading.Event()
        self._deaf = socket.socket()  # bound and not listening: it refuses connections
        self._deaf.bind(("127.0.0.1", 0))

    @property
    def host(self) -> str:
        """Its name as a dependency."""
        return "127.0.0.1"

    @property
    def url(self) -> str:
        """Where to find it; nobody listens there when it is to refuse connections."""
        port = self._deaf.getsockname()[1] if self.behaviour == "refused" else self.server_port
        path = HANGS if self.behaviour == "hang" else "/feed"
        return f"http://{self.host}:{port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that go away are what is tested."""

    def server_close(self) -> None:
        self.closing.set()
        self._deaf.close()
        super().server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        self.server.requests += 1
        behaviour = self.server.behaviour
        if behaviour == "hang":
            self.server.closing.wait(HANGS_FOR)
        elif behaviour == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif behaviour == "truncated":
            self._answer(200, b"half", length=8)
        else:
            self._answer(200 if behaviour == "ok" else int(behaviour), b"feed", length=4)

    def _answer(self, status: int, body: bytes, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 429:
            self.send_header("Retry-After", str(RETRY_AFTER))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def flaky_server() -> Iterator[FlakyServer]:
    """Run one for a block."""
    server = FlakyServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
