"""Monitor code that you do not own, without touching it, and take the monitoring off again.

    python examples/patch_library.py

The library here is the standard library's `urllib.request`; a TAXII or MISP client is monitored in
the same way. The server that it talks to is this very process, on 127.0.0.1.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import periscope_otel as periscope
from periscope_otel.monitor.summary import RunSummary


class Feed(BaseHTTPRequestHandler):
    """Serves one list and nothing else."""

    def do_GET(self) -> None:
        """Answer with the list, or 404."""
        self.send_response(200 if self.path == "/list.txt" else 404)
        self.end_headers()
        self.wfile.write(b"bad.example\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def download(url: str) -> int:
    """Return the status of a URL: code that knows nothing of being monitored."""
    try:
        with urllib.request.urlopen(url) as response:  # noqa: S310  (the URL is this file's own)
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def main() -> None:
    """Download with and without monitoring."""
    server = HTTPServer(("127.0.0.1", 0), Feed)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"

    # The target is "module:attribute". A module that is not imported yet is patched when it is.
    with periscope.monitor_function(
        "urllib.request:urlopen", name="download", feed=lambda args: urlsplit(args["url"]).path
    ):
        print("monitored:    ", download(f"{site}/list.txt"), download(f"{site}/gone.txt"))
    print("not monitored:", download(f"{site}/list.txt"), "\n")

    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    with RunSummary(periscope.configure(service_name="patched")) as summary:
        main()
    summary.print()
