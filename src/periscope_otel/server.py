"""The HTTP endpoint: `/metrics` for Prometheus and `/health`, on this machine only by default."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REQUEST_TIMEOUT = 10.0
"""Seconds that a client may take to send its request."""


class Page(NamedTuple):
    """What an endpoint answers."""

    body: bytes
    content_type: str
    status: int = 200


class Server:
    """Serves pages by path from threads of its own.

    Args:
        host: The address to listen on.
        port: The port; 0 picks a free one.
        pages: A function for each path, called with the request's Accept header.

    Raises:
        OSError: If the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[str], Page]]) -> None:
        self._server = _HTTPServer((host, port), _handler_for(dict(pages)))
        self.host = host
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="periscope-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=1.0)

    def after_fork(self) -> None:
        """Let go of the parent's socket in the child of a fork, which does not serve."""
        self._server.socket.close()


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        guard.warn("http", "a request to the metrics endpoint could not be answered")


def _handler_for(pages: Mapping[str, Callable[[str], Page]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT
        server_version = "periscope-otel"
        sys_version = ""

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            make = pages.get(self.path.partition("?")[0])
            if make is None:
                page = Page(b"not found\n", "text/plain; charset=utf-8", 404)
            else:
                page = make(self.headers.get("Accept", ""))
            self.send_response(page.status)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if with_body:
                self.wfile.write(page.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing: a scrape every few seconds is no news."""

    return Handler
