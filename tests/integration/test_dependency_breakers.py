"""The contracts of breakers that learn from real instrumentations of real clients.

The last test runs all others once more with the new semantic conventions, which are chosen once a
process.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
import pytest
import requests
import taxii2client.v21
import urllib3
from flaky_server import HANGS, RETRY_AFTER, FlakyServer, flaky_server
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from redis_servers import NoServerError, RedisServer

from periscope_otel.failure import classify
from periscope_otel.resilience.breaker import breakers
from periscope_otel.resilience.errors import CircuitOpenError
from periscope_otel.resilience.sampler import RecordOnlySampler
from periscope_otel.resilience.span_processor import BreakerSpanProcessor
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.transition import Transition

PATIENCE = 60.0
"""Seconds that clients wait for a server that answers, on a machine that may stop it."""
TIMEOUT = 0.15
"""Seconds that they wait for one that hangs."""
OPT_IN = "OTEL_SEMCONV_STABILITY_OPT_IN"

SAMPLERS = {
    1.0: ALWAYS_ON,
    0.1: RecordOnlySampler(ParentBased(TraceIdRatioBased(0.1))),
    0.0: RecordOnlySampler(ALWAYS_OFF),
}


# Clients; each ends a call as it ends by itself, without looking at the status.


def timeout_of(url: str) -> float:
    """Return how long to wait for an answer."""
    return TIMEOUT if url.endswith(HANGS) else PATIENCE


def get_httpx(url: str) -> None:
    with httpx.Client(timeout=timeout_of(url), trust_env=False) as client:
        client.get(url)


def get_httpx_async(url: str) -> None:
    async def get() -> None:
        async with httpx.AsyncClient(timeout=timeout_of(url), trust_env=False) as client:
            await client.get(url)

    asyncio.run(get())


def get_requests(url: str) -> None:
    with requests.Session() as session:
        session.trust_env = False
        session.get(url, timeout=timeout_of(url))


def get_urllib3(url: str) -> None:
    with urllib3.PoolManager(timeout=timeout_of(url), retries=False) as pool:
        pool.request("GET", url)


def get_aiohttp(url: str) -> None:
    async def get() -> None:
        timeout = aiohttp.ClientTimeout(total=timeout_of(url))
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            await response.read()

    asyncio.run(get())


CLIENTS: dict[str, tuple[Callable[[str], None], tuple[type[Any], ...]]] = {
    "httpx": (get_httpx, (HTTPXClientInstrumentor,)),
    "httpx async": (get_httpx_async, (HTTPXClientInstrumentor,)),
    "requests": (get_requests, (RequestsInstrumentor,)),
    "requests over urllib3": (get_requests, (RequestsInstrumentor, URLLib3Instrumentor)),
    "urllib3": (get_urllib3, (URLLib3Instrumentor,)),
    "aiohttp": (get_aiohttp, (AioHttpClientInstrumentor,)),
}
FAILURES = (OSError, httpx.HTTPError, aiohttp.ClientError, urllib3.exceptions.HTTPError, RedisError)


def attempt(get: Callable[[str], None], url: str) -> BaseException | None:
    """Make a call that may fail."""
    try:
        get(url)
    except FAILURES as error:
        return error
    return None


class Watched:
    """The breaker of a dependency, what it has told, and its clock."""

    def __init__(self, name: str, **policy: Any) -> None:
        breakers.defaults(name, **{"consecutive_failures": 3, "jitter": 0.0, **policy})
        self.breaker: Breaker = breakers.get(name)
        self._skipped = 0.0
        self.breaker.clock = lambda: time.monotonic() + self._skipped
        self._told: list[Transition] = []
        self.breaker.listen(self._told.append)

    def skip(self, seconds: float) -> None:
        """Let time pass."""
        self._skipped += seconds

    @property
    def told(self) -> list[Transition]:
        """Its transitions so far."""
        assert worker.finish_posted(30)
        return self._told

    @property
    def counted(self) -> list[int]:
        """The calls that succeeded, failed and were ignored."""
        return self.breaker.counts[:3]


@pytest.fixture(autouse=True)
def begin_without_breakers() -> Iterator[None]:
    with breakers.set_aside():
        yield


@pytest.fixture(scope="module")
def running() -> Iterator[FlakyServer]:
    with flaky_server() as server:
        yield server


@pytest.fixture
def server(running: FlakyServer) -> FlakyServer:
    running.behaviour, running.requests = "ok", 0
    return running


@pytest.fixture
def watched(server: FlakyServer) -> Watched:
    return Watched(server.host)


@pytest.fixture
def instrument(monkeypatch) -> Iterator[Callable[..., None]]:
    """Return a function that instruments clients, at a share of sampled traces."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_CLIENT_RESPONSE", "retry-after")
    with ExitStack() as stack:

        def instrument(*instrumentors: type[Any], sampled: float = 0.0) -> None:
            provider = TracerProvider(sampler=SAMPLERS[sampled], shutdown_on_exit=False)
            provider.add_span_processor(BreakerSpanProcessor())
            stack.callback(provider.shutdown)
            for instrumentor in instrumentors:
                instrumentor().instrument(tracer_provider=provider, skip_dep_check=True)
                stack.callback(instrumentor().uninstrument)

        yield instrument


# The right breaker opens, by the right cause, and closes again.

CAUSES = {
    "500": ("consecutive_failures", 3),
    "reset": ("consecutive_failures", 3),
    "refused": ("consecutive_failures", 3),
    "hang": ("consecutive_failures", 3),
    "429": ("rate_limit", 1),
    "401": ("auth", 1),
}
"""Why it opens, and after how many calls, by what the server does."""


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("behaviour", CAUSES)
def test_the_breaker_opens_by_its_cause_and_closes_again(
    client, behaviour, server, watched, instrument
):
    """Though no trace is sampled, and whichever client it is."""
    get, instrumentors = CLIENTS[client]
    reason, calls = CAUSES[behaviour]
    instrument(*instrumentors)
    get(server.url)
    assert (watched.counted, watched.breaker.state) == ([1, 0, 0], "closed")
    server.behaviour = behaviour
    errors = []
    for _ in range(calls):
        assert watched.breaker.state == "closed"
        errors.append(attempt(get, server.url))
    assert watched.breaker.state == "open"
    opened = watched.told[0]
    error_type = behaviour if behaviour.isdigit() else type(errors[-1]).__name__
    assert (opened.reason, opened.error_type) == (reason, error_type)
    assert opened.open_for == RETRY_AFTER == 30
    assert opened.span_context.is_valid
    assert watched.counted == ([1, 0, 1] if behaviour == "429" else [1, calls, 0])
    assert [breaker.name for breaker in breakers] == [server.host]

    server.behaviour = "ok"
    get(server.url)
    assert watched.breaker.state == "open"
    watched.skip(30.1)
    get(server.url)
    get(server.url)
    assert [(one.to_state, one.reason) for one in watched.told[1:]] == [
        ("half_open", "probing"),
        ("closed", "recovered"),
    ]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("sampled", [1.0, 0.1])
def test_sampling_changes_nothing(client, sampled, server, watched, instrument):
    """Each call counts once, whether or not its trace is sampled."""
    get, instrumentors = CLIENTS[client]
    instrument(*instrumentors, sampled=sampled)
    for behaviour in ("ok", "404", "500", "ok", "500", "500", "500"):
        server.behaviour = behaviour
        attempt(get, server.url)
    assert watched.counted == [2, 4, 1]
    assert watched.breaker.state == "open"
    watched.skip(30.1)
    server.behaviour = "ok"
    get(server.url)
    get(server.url)
    assert watched.breaker.state == "closed"


@pytest.mark.parametrize("behaviour", ["500", "401", "404", "429", "reset", "refused", "truncated"])
def test_a_taxii_client_means_the_same_by_what_it_raises(behaviour, server, watched, instrument):
    """It calls by requests: the span and the exception agree."""
    instrument(RequestsInstrumentor)
    server.behaviour = behaviour
    with pytest.raises(requests.RequestException) as raised:
        _ = taxii2client.v21.Server(server.url).title
    meant = classify(raised.value)
    assert meant.reason is not None
    outcomes = ["success", "failure", "ignored"]
    assert watched.counted == [int(outcome == meant.verdict) for outcome in outcomes]
    reasons = {"auth": "auth", "rate_limit": "rate_limit"}
    assert [one.reason for one in watched.told] == [
        reasons[meant.reason] for _ in range(meant.reason in reasons)
    ]


# What spans cannot tell, and guards can.


def read_requests_stream(url: str) -> None:
    no_proxies = {"no_proxy": "*"}
    with requests.get(url, timeout=PATIENCE, stream=True, proxies=no_proxies) as response:
        _ = response.content


TRUNCATED = {
    "httpx": (get_httpx, HTTPXClientInstrumentor),
    "httpx async": (get_httpx_async, HTTPXClientInstrumentor),
    "requests stream": (read_requests_stream, RequestsInstrumentor),
    "aiohttp": (get_aiohttp, AioHttpClientInstrumentor),
}


@pytest.mark.parametrize("client", TRUNCATED)
def test_a_truncated_body_counts_where_a_guard_sees_it(client, server, watched, instrument):
    """The span has ended well before; inside the guard it is not counted, so it cannot hide it."""
    get, instrumentor = TRUNCATED[client]
    instrument(instrumentor)
    server.behaviour = "truncated"
    assert attempt(get, server.url) is not None
    assert watched.counted == [1, 0, 0]
    for _ in range(3):
        with pytest.raises(FAILURES), watched.breaker:
            get(server.url)
    assert watched.counted == [1, 3, 0]
    assert watched.told[0].reason == "consecutive_failures"
    with pytest.raises(CircuitOpenError), watched.breaker:
        get(server.url)
    assert server.requests == 4


def test_a_truncated_body_that_is_read_within_the_span_counts(server, watched, instrument):
    """As by requests, where it is not asked for a stream."""
    instrument(RequestsInstrumentor)
    server.behaviour = "truncated"
    assert attempt(get_requests, server.url) is not None
    assert watched.counted == [0, 1, 0]


HANGING = {
    "httpx": (HTTPXClientInstrumentor, httpx.AsyncClient),
    "aiohttp": (AioHttpClientInstrumentor, aiohttp.ClientSession),
}


@pytest.mark.parametrize("client", HANGING)
@pytest.mark.parametrize("slow_threshold", [None, 0.02])
def test_a_call_that_is_cancelled_is_ignored_unless_it_was_slow(
    client, slow_threshold, server, instrument
):
    """A time limit around the call tells the client nothing about why it ends."""
    instrumentor, new_client = HANGING[client]
    instrument(instrumentor)
    watched = Watched(server.host, slow_threshold=slow_threshold, minimum_calls=2)
    server.behaviour = "hang"

    async def calls() -> None:
        async with new_client() as session:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(session.get(server.url), 0.05)

    asyncio.run(calls())
    assert watched.counted == [0, 0, 2]
    reasons = [one.reason for one in watched.told]
    assert reasons == ([] if slow_threshold is None else ["slow_rate"])


# Redis.


@pytest.fixture
def redis_server(tmp_path) -> Iterator[RedisServer]:
    try:
        with RedisServer("redis", tmp_path) as running:
            yield running
    except NoServerError as error:
        pytest.skip(str(error))


def ping_redis(port: int) -> None:
    with Redis("127.0.0.1", port, socket_timeout=PATIENCE, retry=Retry(NoBackoff(), 0)) as client:
        client.set("x", "y")


def ping_redis_async(port: int) -> None:
    async def ping() -> None:
        retry = AsyncRetry(NoBackoff(), 0)
        async with AsyncRedis(
            host="127.0.0.1", port=port, socket_timeout=PATIENCE, retry=retry
        ) as client:
            await client.set("x", "y")

    asyncio.run(ping())


@pytest.mark.parametrize("ping", [ping_redis, ping_redis_async])
@pytest.mark.parametrize("sampled", SAMPLERS)
def test_a_redis_that_dies_opens_its_breaker(ping, sampled, redis_server, instrument):
    """And one that comes back closes it."""
    instrument(RedisInstrumentor, sampled=sampled)
    watched = Watched("127.0.0.1")
    ping(redis_server.port)
    redis_server.kill()
    for _ in range(3):
        with pytest.raises(RedisError):
            ping(redis_server.port)
    opened = watched.told[0]
    assert (opened.reason, opened.error_type) == ("consecutive_failures", "ConnectionError")
    redis_server.start()  # which asks it by an instrumented client whether it is there
    assert watched.breaker.state == "open"
    watched.skip(30.1)
    ping(redis_server.port)
    ping(redis_server.port)
    assert watched.told[-1].reason == "recovered"


def test_a_wrong_command_says_nothing_about_redis(redis_server, instrument):
    """It answers, if only to refuse."""
    instrument(RedisInstrumentor)
    watched = Watched("127.0.0.1")
    with Redis("127.0.0.1", redis_server.port, socket_timeout=PATIENCE) as client:
        client.set("x", "y")
        for _ in range(4):
            with pytest.raises(RedisError):
                client.lpush("x", "y")
    assert watched.counted == [1, 0, 4]


# Once more.


@pytest.mark.timeout(600)
@pytest.mark.skipif(OPT_IN in os.environ, reason="these are the new conventions already")
@pytest.mark.parametrize("conventions", ["http,database", "http/dup,database/dup"])
def test_the_new_conventions_say_the_same(conventions):
    """All of the above, alone and beside the old ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "not new_conventions", __file__],
        env={**os.environ, OPT_IN: conventions},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
