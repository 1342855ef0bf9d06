"""A feed fails, is left alone, is found again, and what was missed is replayed.

Run it:

    python examples/flaky_feed.py

It starts a feed server of its own on a free port of this machine, and uses a folder that is gone
afterwards. The server counts the requests that reach it: what a breaker saves shows there.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import periscope_otel as periscope
from periscope_otel.replay import replay

OPEN_TIME = 2.0
"""Seconds for which the breaker stays open; by default these are 30, and double each time."""

server_is_healthy = True
requests_received = 0


class Feed(BaseHTTPRequestHandler):
    """A feed of one blocklist page after the other."""

    def do_GET(self) -> None:
        """Give a page, or fail."""
        global requests_received
        requests_received += 1
        status, body = (200, b"bad.example\n") if server_is_healthy else (503, b"overloaded\n")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the example does."""


breaker = periscope.Breaker("blocklist", open_time=OPEN_TIME, successes=1, jitter=0.0)
retry = periscope.Retry(attempts=2, base=0.05, deadline=1.0)
"""A deadline shorter than the open time: no call waits for the breaker, each fails at once."""

pages: list[str] = []


@periscope.monitored(
    "pull",
    feed="blocklist",
    breaker=breaker,
    retry=retry,
    dead_letter=True,
    dead_letter_rejected=True,  # a page that was not asked for is not to be missed either
)
def pull(url: str) -> None:
    """Fetch one page."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310
        pages.append(response.read().decode())


def attempt(url: str) -> None:
    """Pull a page, and say in one line what came of it."""
    before, began = requests_received, time.monotonic()
    try:
        pull(url)
        result = "ok"
    except periscope.CircuitOpenError as error:
        result = f"not sent, {error.state}: try again in {error.retry_after or 0.0:.1f} s"
    except OSError as error:
        result = f"failed: {error}"
    sent, took = requests_received - before, time.monotonic() - began
    time.sleep(0.05)  # what is logged in the background comes first
    print(f"  requests sent: {sent}, {took * 1000:3.0f} ms, {result}", flush=True)


def main() -> None:
    """Fail, open, probe, recover, replay."""
    global server_is_healthy
    logging.basicConfig(level=logging.INFO, format="  >> %(message)s", stream=sys.stdout)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Feed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/page/{{}}"
    with tempfile.TemporaryDirectory() as folder:
        runtime = periscope.configure(data_dir=folder, exit_report="never")

        print("The feed works.")
        attempt(url.format(1))

        print("\nIt fails: calls are tried twice, until five failures in a row open the breaker.")
        server_is_healthy = False
        for number in range(2, 5):
            attempt(url.format(number))

        print(f"\nIt is open: for {OPEN_TIME:.0f} s nothing is sent, and calls fail at once.")
        for number in range(5, 8):
            attempt(url.format(number))

        print("\nOne call probes when the time is over. It fails: twice as long.")
        time.sleep(breaker.retry_after or 0.0)
        attempt(url.format(8))

        print("\nThe feed is back. The next probe finds it.")
        server_is_healthy = True
        time.sleep(breaker.retry_after or 0.0)
        attempt(url.format(9))
        attempt(url.format(10))

        print(f"\nWhat was missed are dead letters. {len(pages)} of 10 pages are here: replay.")
        report = replay(runtime.dead_letters.store)
        print(f"  {report.succeeded} succeeded, {report.failed} failed; pages: {len(pages)} of 10")
        runtime.shutdown()
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
