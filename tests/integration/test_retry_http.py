"""Retries against a real HTTP server, through the clients that people use."""

from __future__ import annotations

import asyncio
import email.utils
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import requests

from periscope_otel import operation
from periscope_otel.resilience import retry
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.budget import forget_budgets
from periscope_otel.resilience.retry import Retry
from periscope_otel.testing import capture_telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 30.0


class Peer:
    """A server that gives one answer after the other, the last one for ever."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_address[1]}/feed"
        self.answers: list[tuple[int, Callable[[], str] | str | None]] = [(200, None)]
        self.asked_at: list[float] = []
        """When the requests came, on the monotonic clock."""

    def next_answer(self) -> tuple[int, str | None]:
        index = min(len(self.asked_at), len(self.answers) - 1)
        self.asked_at.append(time.monotonic())
        status, retry_after = self.answers[index]
        return status, retry_after() if callable(retry_after) else retry_after


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Return a running server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, retry_after = running.next_answer()
            self.send_response(status)
            if retry_after is not None:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    running = Peer(server)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def budgets_are_new() -> Iterator[None]:
    forget_budgets()
    yield
    forget_budgets()
    retry.resumed()


def in_two_seconds() -> str:
    return email.utils.formatdate(time.time() + 2.0, usegmt=True)


@contextmanager
def client_of(kind: str) -> Iterator[Any]:
    """Give a session of requests or a client of httpx."""
    with requests.Session() if kind == "requests" else httpx.Client() as client:
        yield client


CLIENTS = ["requests", "httpx"]
ERRORS = {"requests": requests.HTTPError, "httpx": httpx.HTTPStatusError}


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("how", ["raised", "returned"])
def test_retry_after_in_seconds_is_kept_to(peer, kind, status, how):
    """The next request comes no sooner, whether the answer is raised or returned."""
    peer.answers = [(status, "1"), (200, None)]
    policy = Retry(base=0.0, result=lambda answer: answer.status_code >= 400)

    with client_of(kind) as client:

        @policy
        def fetch():
            answer = client.get(peer.url, timeout=PATIENCE)
            if how == "raised":
                answer.raise_for_status()
            return answer

        assert fetch().status_code == 200
    first, second = peer.asked_at
    assert 1.0 <= second - first < PATIENCE


@pytest.mark.parametrize("kind", CLIENTS)
def test_retry_after_as_a_date_is_kept_to(peer, kind):
    """The next request comes no sooner than that."""
    not_before: list[float] = []

    def date() -> str:
        told = in_two_seconds()
        left = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        not_before.append(time.monotonic() + left)
        return told

    peer.answers = [(503, date), (200, None)]
    with client_of(kind) as client:
        for attempt in Retry(base=0.0):
            with attempt:
                client.get(peer.url, timeout=PATIENCE).raise_for_status()
    assert len(peer.asked_at) == 2
    assert peer.asked_at[1] >= not_before[0] - 0.05  # the two clocks are not read at once


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_peer_that_wants_too_long_a_pause_gets_it(peer, kind):
    """The call ends at once with the client's own error."""
    peer.answers = [(429, "3600")]
    with client_of(kind) as client:

        @Retry(attempts=5)
        def fetch():
            client.get(peer.url, timeout=PATIENCE).raise_for_status()

        with pytest.raises(ERRORS[kind]) as raised:
            fetch()
    assert raised.value.response.status_code == 429
    assert len(peer.asked_at) == 1


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_404_is_asked_for_once(peer, kind):
    """It would be one again."""
    peer.answers = [(404, None)]
    with client_of(kind) as client:

        @Retry(base=0.0)
        def fetch():
            client.get(peer.url, timeout=PATIENCE).raise_for_status()

        with pytest.raises(ERRORS[kind]):
            fetch()
    assert len(peer.asked_at) == 1


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_server_that_is_not_there_is_asked_again(peer, kind):
    """Refused connections are retried, and the client's own error is raised in the end."""
    calls = []
    with client_of(kind) as client:

        @Retry(base=0.001)
        def fetch():
            calls.append(1)
            client.get("http://127.0.0.1:9/feed", timeout=PATIENCE)

        with pytest.raises((requests.ConnectionError, httpx.ConnectError)) as raised:
            fetch()
    assert len(calls) == 3
    assert raised.value.__traceback__ is not None


async def test_coroutines_are_retried_against_a_real_server(peer):
    """With an event on the operation's span for each retry."""
    peer.answers = [(500, None), (502, None), (200, None)]
    with capture_telemetry() as captured:
        async with operation("fetch", feed="urlhaus"), httpx.AsyncClient() as client:

            @Retry(base=0.001)
            async def fetch():
                (await client.get(peer.url, timeout=PATIENCE)).raise_for_status()

            await fetch()
        events = captured.operation("fetch").span.events
        assert [event.attributes["error.type"] for event in events] == ["500", "502"]
        assert captured.metric("threat.ingest.operation.retries", feed_name="urlhaus") == 2
    assert len(peer.asked_at) == 3


def test_many_callers_of_a_peer_that_is_down_keep_to_the_budget(peer):
    """Together they send a fifth more requests, and the reserve."""
    peer.answers = [(500, None)]

    @Retry(base=0.0, attempts=10)
    def fetch():
        requests.get(peer.url, timeout=PATIENCE).raise_for_status()

    def work():
        for _ in range(10):
            with pytest.raises(requests.HTTPError):
                fetch()

    started = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    windows = 1 + (time.monotonic() - started) / 10
    assert 80 < len(peer.asked_at) <= 80 + 0.2 * 80 * windows + 10 * windows


def test_a_breaker_held_by_retry_after_is_waited_for(peer):
    """The retry is the breaker's probe, and no request is rejected."""
    peer.answers = [(429, "1"), (200, None)]
    breaker = Breaker("held.example", successes=1)
    for attempt in Retry(base=0.01):
        with attempt, breaker:
            requests.get(peer.url, timeout=PATIENCE).raise_for_status()
    assert breaker.state == "closed"
    assert breaker.view().rejections == 0
    assert peer.asked_at[1] - peer.asked_at[0] >= 1.0


def test_all_callers_that_wait_for_a_breaker_get_through(peer):
    """One probes, the others wait on; none sees a CircuitOpenError, nor asks too often."""
    callers = 4
    peer.answers = [(429, "1")] * callers + [(200, None)]
    breaker = Breaker("shared.example", successes=1)
    together = threading.Barrier(callers)
    ended: list[str] = []

    def work():
        for attempt in Retry(base=0.01):
            with attempt, breaker:
                if attempt.number == 1:
                    together.wait(PATIENCE)
                requests.get(peer.url, timeout=PATIENCE).raise_for_status()
        ended.append("well")

    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["well"] * callers
    assert breaker.state == "closed"
    assert len(peer.asked_at) == 2 * callers


def test_a_shutdown_during_a_wait_ends_the_call_with_its_error(peer):
    """At once."""
    peer.answers = [(429, "60")]
    waiting = threading.Event()
    ended: list[BaseException] = []

    @Retry(deadline=None, on_retry=lambda _: waiting.set())
    def fetch():
        requests.get(peer.url, timeout=PATIENCE).raise_for_status()

    def work():
        try:
            fetch()
        except requests.HTTPError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(PATIENCE)
    retry.shutting_down()
    thread.join(PATIENCE)
    assert [error.response.status_code for error in ended] == [429]
    assert len(peer.asked_at) == 1


async def test_cancelling_a_wait_leaves_nothing_behind(peer):
    """No task and no timer, and no further request."""
    peer.answers = [(503, "60")]
    waiting = asyncio.Event()

    async with httpx.AsyncClient() as client:

        @Retry(deadline=None, on_retry=lambda _: waiting.set())
        async def fetch():
            (await client.get(peer.url, timeout=PATIENCE)).raise_for_status()

        task = asyncio.create_task(fetch())
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
    loop: Any = asyncio.get_running_loop()
    assert [one for one in loop._scheduled if not one.cancelled()] == []
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len(peer.asked_at) == 1
