"""The HTTP endpoint: `/metrics` for Prometheus and `/health`, on this machine only by default."""

from __future__ import annotations

import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

from periscope_otel import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

MOST_CLIENTS = 64
"""Clients answered at the same time; further ones are hung up on."""

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
        local: Paths that only this machine is answered.

    Raises:
        OSError: If the address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        pages: Mapping[str, Callable[[str], Page]],
        *,
        local: Collection[str] = (),
    ) -> None:
        handler = _handler_for(dict(pages), frozenset(local))
        try:
            self._server = _server_class(host)((host, port), handler)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {host} port {port}: {error}") from None
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

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Bind without the base's look-up of the host's name, which may wait for a DNS server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or not at all if too many clients are being answered."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        guard.warn("http", "a request to the metrics endpoint could not be answered")


class _HTTPServer6(_HTTPServer):
    address_family = socket.AF_INET6


def _server_class(host: str) -> type[_HTTPServer]:
    return _HTTPServer6 if ":" in host else _HTTPServer


def _is_local(connection: socket.socket, client: str) -> bool:
    """Whether a client is on this machine: it comes from the address that it has asked."""
    found = ip_address(client.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback or client == connection.getsockname()[0]


def _handler_for(
    pages: Mapping[str, Callable[[str], Page]], local: frozenset[str]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT
        server_version = "periscope-otel"
        sys_version = ""

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            make = pages.get(path)
            if make is None or (path in local and not self._is_local()):
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

        def _is_local(self) -> bool:
            return _is_local(self.connection, self.client_address[0])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing: a scrape every few seconds is no news."""

    return Handler
