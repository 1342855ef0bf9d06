"""The contracts of `periscope_otel.failure`, with the exceptions of the real libraries."""

import asyncio
import concurrent.futures
import contextlib
import csv
import email.message
import errno
import http.client
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import httpcore
import httpx
import msgspec
import pytest
import redis
import redis.exceptions
import requests
import stix2
import taxii2client.exceptions
import urllib3
import urllib3.util.ssl_match_hostname
from aiohttp.client_reqrep import ConnectionKey
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry
from stix2patterns.exceptions import ParseException

from periscope_otel import error_text, failure
from periscope_otel.failure import Failure, classify, classify_response, message_of, stack_text

# --- what is expected, by name -------------------------------------------------------------------


def expected(error_type: str | None, kind: str, retry_after: float | None = None) -> Failure:
    outcome, verdict, retryable, reason = {
        "cancelled": ("cancelled", "ignored", False, None),
        "ok": ("ok", "ignored", False, None),
        "timeout": ("timeout", "failure", True, "timeout"),
        "connect": ("error", "failure", True, "connect"),
        "dns": ("error", "failure", True, "dns"),
        "tls": ("error", "failure", True, "tls"),
        "certificate": ("error", "failure", False, "tls"),
        "server": ("error", "failure", True, "server"),
        "request timeout": ("error", "failure", True, "timeout"),
        "broken": ("error", "failure", False, "server"),
        "auth": ("error", "failure", False, "auth"),
        "rate limit": ("error", "ignored", True, "rate_limit"),
        "client": ("error", "ignored", False, "client"),
        "validation": ("error", "ignored", False, "validation"),
        "local": ("error", "failure", False, "local"),
        "other": ("error", "failure", False, None),
    }[kind]
    return Failure(outcome, error_type, verdict, retryable, retry_after, reason)  # type: ignore[arg-type]


def raised(call: Callable[[], object]) -> BaseException:
    """Run `call` and return what it raises."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def chained(*errors: BaseException) -> BaseException:
    """Raise the first from the second, that from the third and so on; return the first."""
    for outer, inner in pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


PATIENCE = 60.0
"""Seconds that a peer which does answer has for it, however busy the machine is."""


# --- a peer on the loopback ----------------------------------------------------------------------


class Peer(http.server.BaseHTTPRequestHandler):
    """Answers `/<status>` with that status, `/<status>/<value>` with Retry-After as well."""

    def do_GET(self) -> None:
        status, _, retry_after = self.path.strip("/").partition("/")
        if status == "close":
            return
        self.send_response(200 if status == "short" else int(status))
        if retry_after:
            self.send_header("retry-AFTER", retry_after)
        self.send_header("Content-Length", "10" if status == "short" else "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def peer() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the machine's would answer in the peer's place."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, and that nobody else can take meanwhile."""
    with socket.socket() as plug:
        plug.bind(("", 0))
        yield plug.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def get_requests(url: str) -> None:
    requests.get(url, timeout=PATIENCE).raise_for_status()


def get_httpx(url: str) -> None:
    httpx.get(url, timeout=PATIENCE).raise_for_status()


def get_httpx_async(url: str) -> None:
    async def get() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            (await client.get(url)).raise_for_status()

    asyncio.run(get())


def get_urllib3(url: str) -> None:
    with urllib3.PoolManager(retries=1, timeout=PATIENCE) as pool:
        pool.request("GET", url)


def get_urllib(url: str) -> None:
    with urllib.request.urlopen(url, timeout=PATIENCE):
        pass


def get_aiohttp(url: str) -> None:
    async def get() -> None:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            response.raise_for_status()
            await response.read()

    asyncio.run(get())


CLIENTS = {
    "requests": get_requests,
    "httpx": get_httpx,
    "httpx async": get_httpx_async,
    "urllib3": get_urllib3,
    "urllib": get_urllib,
    "aiohttp": get_aiohttp,
}
STATUS_RAISERS = {name: get for name, get in CLIENTS.items() if name != "urllib3"}


def got(get: Callable[[str], None], url: str) -> Failure:
    """Return what a failed request means; an HTTPError of urllib's also is an open response."""
    error = raised(lambda: get(url))
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    return classify(error)


# --- provoked for real ---------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_refused_connection(client: str, closed_port: int) -> None:
    """A refused connection is a retryable failure under the client's own class name."""
    found = got(CLIENTS[client], f"http://127.0.0.1:{closed_port}/")

    names = {"urllib": "URLError", "aiohttp": "ClientConnectorError", "urllib3": "MaxRetryError"}
    name = names.get(client, "ConnectError" if "httpx" in client else "ConnectionError")
    assert expected(name, "connect") == found


@pytest.mark.parametrize("client", CLIENTS)
def test_unresolvable_name(client: str) -> None:
    """A name that does not resolve is a retryable failure of DNS, however deep it is wrapped."""
    found = got(CLIENTS[client], "http://name.invalid/")

    assert expected(found.error_type, "dns") == found


@pytest.mark.parametrize("client", CLIENTS)
def test_no_tls_peer(client: str, peer: str) -> None:
    """A peer that does not speak TLS is a retryable failure of TLS."""
    found = got(CLIENTS[client], peer.replace("http:", "https:") + "/200")

    assert expected(found.error_type, "tls") == found


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("client", CLIENTS)
def test_self_signed_certificate(client: str, tls_peer: str) -> None:
    """A certificate that cannot be verified is a failure, and no repeat will mend it."""
    found = got(CLIENTS[client], tls_peer)

    assert expected(found.error_type, "certificate") == found


@pytest.fixture(scope="module")
def tls_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-batch"),
            *("-subj", "/CN=localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=shake_hands, args=(listener, context))
        thread.start()
        yield f"https://localhost:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def shake_hands(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()


@pytest.mark.parametrize("client", CLIENTS)
def test_hang_up(client: str, peer: str) -> None:
    """A peer that hangs up without an answer is a broken connection."""
    found = got(CLIENTS[client], f"{peer}/close")

    assert expected(found.error_type, "connect") == found


@pytest.mark.parametrize(
    "get",
    [
        lambda url: requests.get(url, timeout=0.02),
        lambda url: httpx.get(url, timeout=0.02),
        lambda url: urllib3.request("GET", url, timeout=0.02, retries=False),
        lambda url: urllib3.request("GET", url, timeout=0.02, retries=1),
        lambda url: urllib.request.urlopen(url, timeout=0.02),
    ],
)
def test_no_answer(get: Callable[[str], object], silent_port: int) -> None:
    """A peer that does not answer in time is a timeout, for every client."""
    found = classify(raised(lambda: get(f"http://127.0.0.1:{silent_port}/")))

    assert expected(found.error_type, "timeout") == found


def test_no_answer_to_aiohttp(silent_port: int) -> None:
    """A timeout of aiohttp's is a timeout, though it is a connection error as well."""

    async def get() -> None:
        limits = aiohttp.ClientTimeout(sock_read=0.02)
        async with aiohttp.ClientSession(timeout=limits) as session:
            await session.get(f"http://127.0.0.1:{silent_port}/")

    assert expected("SocketTimeoutError", "timeout") == classify(raised(lambda: asyncio.run(get())))


@pytest.mark.parametrize("get", [get_requests, get_aiohttp])
def test_short_body(get: Callable[[str], None], peer: str) -> None:
    """A body that ends too early is a broken connection."""
    found = got(get, f"{peer}/short")

    assert expected(found.error_type, "connect") == found


@pytest.mark.parametrize("client", STATUS_RAISERS)
@pytest.mark.parametrize(
    ("path", "kind", "retry_after"),
    [
        ("400", "client", None),
        ("401", "auth", None),
        ("403", "auth", None),
        ("404", "client", None),
        ("404/7", "client", None),
        ("408", "request timeout", None),
        ("410", "client", None),
        ("429", "rate limit", None),
        ("429/7", "rate limit", 7.0),
        ("500", "server", None),
        ("500/7", "server", 7.0),
        ("501", "broken", None),
        ("502", "server", None),
        ("503", "server", None),
        ("503/soon", "server", None),
        ("503/7", "rate limit", 7.0),
        ("503/0", "rate limit", 0.0),
        ("504", "server", None),
        ("505", "broken", None),
        ("599", "server", None),
    ],
)
def test_status(client: str, path: str, kind: str, retry_after: float | None, peer: str) -> None:
    """An HTTP status means the same whichever client raises it, and is its `error.type`."""
    found = got(STATUS_RAISERS[client], f"{peer}/{path}")

    assert expected(path[:3], kind, retry_after) == found


@pytest.mark.parametrize("get", [get_httpx, get_urllib])
def test_not_modified(get: Callable[[str], None], peer: str) -> None:
    """A raised 304 is no failure of the peer's."""
    found = got(get, f"{peer}/304")

    assert expected(found.error_type, "client") == found


def no_retry(port: int, host: str = "127.0.0.1", timeout: float = PATIENCE) -> redis.Redis:
    return redis.Redis(host, port, socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def test_redis_away(closed_port: int) -> None:
    """A Redis that is away is a broken connection."""
    error = raised(no_retry(closed_port).ping)

    assert expected("ConnectionError", "connect") == classify(error)


def test_redis_unresolvable() -> None:
    """A Redis whose name does not resolve is a failure of DNS, found in the context."""
    error = raised(no_retry(1, "name.invalid").ping)

    assert expected("ConnectionError", "dns") == classify(error)


def test_redis_hangs(silent_port: int) -> None:
    """A Redis that hangs is a timeout."""
    error = raised(no_retry(silent_port, timeout=0.02).ping)

    assert expected("TimeoutError", "timeout") == classify(error)


def test_asyncio_tries_several_addresses(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An asyncio connection refused at each of several addresses is a broken connection."""

    async def connect() -> None:
        loop = asyncio.get_running_loop()
        tcp = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        addresses = [(*tcp, (f"127.0.0.{last}", closed_port)) for last in (1, 2)]

        async def resolve(*args: object, **kwargs: object) -> list[tuple[object, ...]]:
            return [*addresses]

        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        await asyncio.open_connection("two-addresses.invalid", closed_port)

    assert expected("OSError", "connect") == classify(raised(lambda: asyncio.run(connect())))


# --- table ---------------------------------------------------------------------------------------


class Indicator(msgspec.Struct):
    value: str


def aiohttp_key() -> ConnectionKey:
    return ConnectionKey("127.0.0.1", 1, False, True, None, None, None)


def http_info() -> aiohttp.RequestInfo:
    return SimpleNamespace(real_url="http://127.0.0.1/")  # type: ignore[return-value]


def stand_in(module: str, name: str, *bases: type[Exception]) -> Exception:
    """An exception of a class named like one of a library that is not installed here."""
    return type(name, bases or (Exception,), {"__module__": module})("it happened")  # type: ignore[no-any-return]


BY_CLASS: list[tuple[str, BaseException | Callable[[], object]]] = [
    # called off
    ("cancelled", asyncio.CancelledError()),
    ("cancelled", concurrent.futures.CancelledError()),
    ("cancelled", GeneratorExit()),
    ("cancelled", KeyboardInterrupt()),
    ("ok", SystemExit()),
    ("ok", SystemExit(0)),
    ("ok", SystemExit(False)),
    ("other", SystemExit(3)),
    ("other", SystemExit("no such feed")),
    # timeouts
    ("timeout", TimeoutError()),
    ("timeout", OSError(errno.ETIMEDOUT, "timed out")),
    ("timeout", httpx.ConnectTimeout("")),
    ("timeout", httpx.PoolTimeout("")),
    ("timeout", httpcore.ReadTimeout("")),
    ("timeout", requests.Timeout()),
    ("timeout", requests.ConnectTimeout()),
    ("timeout", requests.ReadTimeout()),
    ("timeout", urllib3.exceptions.TimeoutError()),
    ("timeout", urllib3.exceptions.ConnectTimeoutError()),
    ("timeout", aiohttp.ServerTimeoutError()),
    ("timeout", aiohttp.ConnectionTimeoutError()),
    ("timeout", redis.TimeoutError()),
    # no connection
    ("connect", ConnectionResetError()),
    ("connect", BrokenPipeError()),
    ("connect", OSError(errno.EHOSTUNREACH, "no route")),
    ("connect", OSError(errno.ENETUNREACH, "no network")),
    ("connect", asyncio.IncompleteReadError(b"", 4)),
    ("connect", http.client.IncompleteRead(b"")),
    ("connect", http.client.RemoteDisconnected("gone")),
    ("connect", http.client.BadStatusLine("")),
    ("connect", urllib.error.URLError("no reason that is one")),
    ("connect", urllib.error.ContentTooShortError("short", b"")),  # type: ignore[arg-type]
    ("connect", httpx.ConnectError("")),
    ("connect", httpx.ReadError("")),
    ("connect", httpx.ProxyError("")),
    ("connect", httpx.RemoteProtocolError("")),
    ("connect", requests.ConnectionError()),
    ("connect", requests.exceptions.ProxyError()),
    ("connect", requests.exceptions.ChunkedEncodingError()),
    ("connect", urllib3.exceptions.NewConnectionError(None, "refused")),  # type: ignore[arg-type]
    ("connect", urllib3.exceptions.ProtocolError("Connection aborted.")),
    ("connect", urllib3.exceptions.EmptyPoolError(None, "")),  # type: ignore[arg-type]
    ("connect", aiohttp.ServerDisconnectedError()),
    ("connect", aiohttp.ClientPayloadError()),
    ("connect", aiohttp.ClientConnectionResetError()),
    ("connect", redis.ConnectionError()),
    ("connect", redis.exceptions.MaxConnectionsError()),
    ("connect", redis.exceptions.InvalidResponse()),
    ("connect", redis.exceptions.RedisClusterException()),
    # names and TLS
    ("dns", socket.gaierror(-2, "Name or service not known")),
    ("dns", socket.herror()),
    ("dns", urllib3.exceptions.NameResolutionError("h", None, socket.gaierror())),  # type: ignore[arg-type]
    ("dns", aiohttp.ClientConnectorDNSError(aiohttp_key(), socket.gaierror(-2, "unknown"))),
    ("tls", ssl.SSLError(1, "wrong version number")),
    ("tls", ssl.SSLEOFError()),
    ("tls", requests.exceptions.SSLError()),
    ("tls", urllib3.exceptions.SSLError()),
    ("tls", aiohttp.ClientConnectorSSLError(aiohttp_key(), ssl.SSLError())),
    ("certificate", ssl.SSLCertVerificationError()),
    ("certificate", urllib3.exceptions.SSLError(ssl.SSLCertVerificationError())),
    ("certificate", urllib3.util.ssl_match_hostname.CertificateError("other host")),
    ("certificate", aiohttp.ClientConnectorCertificateError(aiohttp_key(), ssl.SSLError())),  # type: ignore[arg-type]
    ("certificate", aiohttp.ServerFingerprintMismatch(b"", b"", "h", 443)),
    # the peer's trouble
    ("server", requests.exceptions.RetryError()),
    ("server", urllib3.exceptions.ResponseError("too many 503 error responses")),
    ("server", redis.BusyLoadingError()),
    ("server", redis.ReadOnlyError()),
    ("server", redis.exceptions.OutOfMemoryError()),
    ("server", redis.exceptions.ClusterDownError("CLUSTERDOWN")),
    ("server", redis.exceptions.MasterDownError("MASTERDOWN")),
    ("server", redis.exceptions.TryAgainError()),
    ("server", redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but …")),
    ("server", redis.ResponseError("NOREPLICAS Not enough good replicas to write.")),
    ("server", redis.ResponseError("BUSY Redis is busy running a script.")),
    ("server", stand_in("pymisp.exceptions", "MISPServerError")),
    ("broken", httpx.DecodingError("")),
    ("broken", httpx.TooManyRedirects("")),
    ("broken", requests.TooManyRedirects()),
    ("broken", requests.exceptions.ContentDecodingError()),
    ("broken", urllib3.exceptions.DecodeError()),
    # not let in
    ("auth", redis.AuthenticationError()),
    ("auth", redis.exceptions.AuthorizationError()),
    ("auth", redis.exceptions.NoPermissionError()),
    ("auth", redis.exceptions.AuthenticationWrongNumberOfArgsError()),
    ("auth", redis.exceptions.ExternalAuthProviderError()),
    # our own mistake
    ("client", redis.ResponseError("WRONGTYPE Operation against a key")),
    ("client", redis.ResponseError()),
    ("client", redis.exceptions.NoScriptError()),
    ("client", redis.WatchError()),
    ("client", redis.exceptions.LockError()),
    ("client", redis.exceptions.CrossSlotTransactionError()),
    ("client", redis.exceptions.InvalidPipelineStack()),
    ("client", taxii2client.exceptions.AccessError()),
    ("client", taxii2client.exceptions.InvalidArgumentsError()),
    # data
    ("validation", ValueError()),
    ("validation", TypeError()),
    ("validation", KeyError("id")),
    ("validation", IndexError()),
    ("validation", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")),
    ("validation", lambda: json.loads("{")),
    ("validation", lambda: ET.fromstring("<")),
    ("validation", lambda: list(csv.reader(["a\0" * 200_000]))),
    ("validation", lambda: msgspec.json.decode(b"{}", type=Indicator)),
    ("validation", lambda: msgspec.json.encode(object())),
    ("validation", msgspec.EncodeError()),
    ("validation", lambda: stix2.Indicator(pattern="x")),
    ("validation", lambda: stix2.parse({"type": "indicator"})),
    ("validation", ParseException()),
    ("validation", taxii2client.exceptions.ValidationError()),
    ("validation", taxii2client.exceptions.InvalidJSONError()),
    ("validation", lambda: requests.get("no-scheme", timeout=1)),
    ("validation", lambda: requests.get("http://", timeout=1)),
    ("validation", lambda: requests.get("gopher://h/", timeout=1)),
    ("validation", lambda: requests.get("http://h/", headers={"a": "b\nc"}, timeout=1)),
    ("validation", requests.exceptions.InvalidJSONError()),
    ("validation", requests.JSONDecodeError("Expecting value", "", 0)),
    ("validation", lambda: httpx.get("no-scheme")),
    ("validation", lambda: httpx.get("http://h:port/")),
    ("validation", lambda: urllib3.request("GET", "http://[")),
    ("validation", lambda: get_aiohttp("http://[")),
    ("validation", aiohttp.ContentTypeError(http_info(), (), status=200)),
    ("validation", redis.DataError()),
    ("validation", stand_in("pymisp.exceptions", "PyMISPInvalidFormat")),
    # this machine
    ("local", OSError(errno.ENOSPC, "No space left on device")),
    ("local", OSError(errno.EMFILE, "Too many open files")),
    ("local", OSError("no errno")),
    ("local", OSError()),
    ("local", FileNotFoundError()),
    ("local", PermissionError()),
    # anything else
    ("other", RuntimeError()),
    ("other", AssertionError()),
    ("other", MemoryError()),
    ("other", RecursionError()),
    ("other", requests.RequestException()),
    ("other", requests.exceptions.StreamConsumedError()),
    ("other", httpx.ResponseNotRead()),
    ("other", taxii2client.exceptions.TAXIIServiceException()),
    ("other", type("Odd", (BaseException,), {})()),
]


@pytest.mark.parametrize(("kind", "origin"), BY_CLASS)
def test_by_class(kind: str, origin: BaseException | Callable[[], object]) -> None:
    """Every exception of a known class means what the table says, under its short class name."""
    error = origin if isinstance(origin, BaseException) else raised(origin)

    name = None if kind in ("cancelled", "ok") else type(error).__name__
    assert expected(name, kind) == classify(error)


def test_subclass_of_a_known_class() -> None:
    """A subclass of a known class is known, under its own name."""

    class FeedTimeoutError(httpx.ReadTimeout):
        pass

    assert expected("FeedTimeoutError", "timeout") == classify(FeedTimeoutError("slow"))


def test_wait_for() -> None:
    """What asyncio.wait_for raises is a timeout, what it does to the waiter a cancellation."""
    seen = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            seen.append(classify(error))
            raise

    error = raised(lambda: asyncio.run(asyncio.wait_for(work(), 0)))

    assert expected("TimeoutError", "timeout") == classify(error)
    assert seen in ([], [expected(None, "cancelled")])


# --- looking inside ------------------------------------------------------------------------------


class FeedError(Exception):
    pass


class FeedDataError(ValueError):
    pass


def status_error(status: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://h/")
    response = httpx.Response(status, headers=headers, request=request)
    return httpx.HTTPStatusError("no", request=request, response=response)


def with_context(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (requests.ConnectionError(urllib3.exceptions.ReadTimeoutError(None, "/", "")), "timeout"),  # type: ignore[arg-type]
        (urllib3.exceptions.MaxRetryError(None, "/", ssl.SSLError()), "tls"),  # type: ignore[arg-type]
        (urllib.error.URLError(ssl.SSLCertVerificationError()), "certificate"),
        (urllib.error.URLError(TimeoutError()), "timeout"),
        (chained(FeedError(), httpx.ReadTimeout("")), "timeout"),
        (chained(FeedError(), FeedError(), ConnectionResetError()), "connect"),
        (chained(FeedError(), status_error(404)), "client"),
        (chained(FeedError(), status_error(502)), "server"),
        # what is found inside must be the peer's: a bug in there excuses nobody
        (chained(FeedError(), KeyError("id")), "other"),
        (chained(FeedError(), OSError(errno.ENOSPC, "full")), "other"),
        (chained(FeedDataError(), httpx.ReadTimeout("")), "validation"),
        (chained(httpx.ConnectError(""), KeyError("id")), "connect"),
        (chained(FeedError(), asyncio.CancelledError()), "other"),
        # a context is what happened before, not always the reason
        (with_context(FeedError(), httpx.ReadTimeout("")), "other"),
        (with_context(redis.ConnectionError(), httpx.ReadTimeout("")), "connect"),
        (with_context(redis.ConnectionError(), TimeoutError()), "timeout"),
        # bounded
        (chained(*(FeedError() for _ in range(5)), TimeoutError()), "timeout"),
        (chained(*(FeedError() for _ in range(6)), TimeoutError()), "other"),
    ],
)
def test_wrapped(error: BaseException, kind: str) -> None:
    """A wrapper means what it wraps if that is the peer's doing, under the wrapper's name."""
    assert expected(type(error).__name__, kind) == classify(error)


def test_wrapped_retry_after() -> None:
    """A Retry-After is found inside a wrapper."""
    error = chained(FeedError(), status_error(429, retry_after="x", **{"Retry-After": "9"}))

    assert expected("FeedError", "rate limit", 9.0) == classify(error)


def test_chain_in_a_circle() -> None:
    """A chain of causes that bites its tail ends."""
    first, second = FeedError("first"), FeedError("second")
    first.__cause__, second.__cause__ = second, first

    assert expected("FeedError", "other") == classify(first)
    assert stack_text(first) == "FeedError: second\n… which caused:\nFeedError: first"


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([ValueError(), KeyError()], expected("ExceptionGroup", "validation")),
        ([ValueError(), RuntimeError()], expected("ExceptionGroup", "other")),
        ([TimeoutError(), TimeoutError()], expected("ExceptionGroup", "timeout")),
        ([ExceptionGroup("in", [TimeoutError()])], expected("ExceptionGroup", "timeout")),
        ([TimeoutError(), RuntimeError()], expected("ExceptionGroup", "other")),
        (
            [status_error(429, **{"Retry-After": n}) for n in "283"],
            expected("ExceptionGroup", "rate limit", 8.0),
        ),
        ([asyncio.CancelledError(), KeyboardInterrupt()], expected(None, "cancelled")),
        (
            [asyncio.CancelledError(), TimeoutError()],
            expected("BaseExceptionGroup", "timeout"),
        ),
        # the failure counts for the breaker, but the value stays as wrong as it is
        (
            [TimeoutError(), ValueError()],
            Failure("timeout", "ExceptionGroup", "failure", False, None, "timeout"),
        ),
    ],
)
def test_group(members: list[BaseException], found: Failure) -> None:
    """A group is judged by its worst member, under its own class name."""
    assert found == classify(BaseExceptionGroup("several", members))


def test_large_group_is_bounded() -> None:
    """Of a large group, and of one nested without end, a bounded number of members is judged."""
    judged = []

    class CountedError(Exception):
        @property
        def periscope_failure(self) -> None:
            judged.append(self)

    classify(ExceptionGroup("many", [CountedError() for _ in range(1000)]))

    assert 0 < len(judged) <= 2 * failure._MEMBERS


def test_group_without_an_end() -> None:
    """A group that lies about its members is some failure, and the answer comes."""

    class EndlessGroup(ExceptionGroup[Exception]):
        @property
        def exceptions(self) -> tuple[Exception, ...]:  # type: ignore[override]
            return (self, self)

    assert expected("EndlessGroup", "other") == classify(EndlessGroup("", [ValueError()]))
    assert stack_text(EndlessGroup("", [ValueError()])).endswith("EndlessGroup:  (1 sub-exception)")


# --- exceptions that answer for themselves -------------------------------------------------------


class CircuitOpenError(Exception):
    periscope_failure: object = Failure("rejected", "CircuitOpenError", "ignored", True, 30.0)


def test_own_word() -> None:
    """An exception's own Failure is used as it is, in a group too."""
    error = CircuitOpenError()

    assert classify(error) is CircuitOpenError.periscope_failure
    assert classify(ExceptionGroup("", [error])).outcome == "rejected"
    assert classify(ExceptionGroup("", [ValueError(), error])).retry_after == 30.0


def test_own_word_of_a_group() -> None:
    """A group inside a group that answers for itself is not taken apart."""

    class SpokenGroup(ExceptionGroup[Exception]):
        periscope_failure = Failure("rejected", "SpokenGroup", "ignored", False)

    found = classify(ExceptionGroup("", [SpokenGroup("", [RuntimeError()])]))

    assert Failure("rejected", "ExceptionGroup", "ignored", False) == found


def test_own_word_of_another_type() -> None:
    """An attribute of that name that is no Failure means nothing."""
    error = CircuitOpenError()
    error.periscope_failure = "rejected"

    assert expected("CircuitOpenError", "other") == classify(error)


# --- responses -----------------------------------------------------------------------------------


def urllib3_response(status: int, headers: Mapping[str, str]) -> object:
    return urllib3.HTTPResponse(status=status, headers=headers)


def requests_response(status: int, headers: Mapping[str, str]) -> object:
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers)
    return response


def httpx_response(status: int, headers: Mapping[str, str]) -> object:
    return httpx.Response(status, headers=headers)


def plain_response(status: int, headers: Mapping[str, str]) -> object:
    return SimpleNamespace(code=status, headers=dict(headers))


RESPONSES = [urllib3_response, requests_response, httpx_response, plain_response]


@pytest.mark.parametrize("make", RESPONSES)
def test_response(make: Callable[[int, Mapping[str, str]], object]) -> None:
    """A returned response of 400 or more is the failure that raising it would be."""
    assert classify_response(make(200, {})) is None
    assert classify_response(make(304, {})) is None
    assert expected("404", "client") == classify_response(make(404, {}))
    assert expected("999", "server") == classify_response(make(999, {}))
    assert expected("503", "rate limit", 30.0) == classify_response(
        make(503, {"RETRY-after": "30"})
    )


def test_response_of_the_standard_library(peer: str) -> None:
    """A response of http.client's is one."""
    connection = http.client.HTTPConnection(peer.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request("GET", "/429/5")

        assert expected("429", "rate limit", 5.0) == classify_response(connection.getresponse())


@pytest.mark.parametrize(
    "value",
    [
        None,
        503,
        "503",
        {"status": 503},
        [],
        SimpleNamespace(status=503),
        SimpleNamespace(code=503),
        SimpleNamespace(status_code="503"),
        SimpleNamespace(status_code=None),
        SimpleNamespace(status_code=True),
        SimpleNamespace(status_code=1000),
        SimpleNamespace(status_code=-1),
        SimpleNamespace(status_code=503).__class__,
        type("Route", (), {"status_code": 503}),
    ],
)
def test_no_response(value: object) -> None:
    """A value that is no HTTP response means nothing, whatever numbers it carries."""
    assert classify_response(value) is None


def test_exception_with_a_status() -> None:
    """An exception of any SDK that carries `status_code` or a response is judged by it."""
    error = FeedError()
    error.status_code = http.HTTPStatus.BAD_GATEWAY  # type: ignore[attr-defined]

    assert expected("502", "server") == classify(error)


def test_json_error_of_a_good_response() -> None:
    """A response of 200 does not make a decoding error an HTTP failure."""
    error = requests.exceptions.InvalidJSONError(response=requests_response(200, {}))  # type: ignore[arg-type]

    assert expected("InvalidJSONError", "validation") == classify(error)


# --- Retry-After ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 120 ", 120.0),
        (120, 120.0),
        ("1.5", 1.5),
        ("+3", 3.0),
        ("-5", 0.0),
        ("0", 0.0),
        ("99999999", 86_400.0),
        ("9" * 5000, 86_400.0),
        # the three forms of RFC 9110 section 5.6.7; the clock stands ten seconds before them
        ("Sun, 06 Nov 1994 08:49:37 GMT", 10.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 10.0),
        ("Sun Nov  6 08:49:37 1994", 10.0),
        ("Sun, 06 Nov 1994 07:49:37 GMT", 0.0),
        ("Sun, 06 Nov 2094 07:49:37 GMT", 86_400.0),
        ("Sun, 99 Nov 1994 99:49:37 GMT", None),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("1_000", None),
        ("١٢٠", None),
        ("1e3", None),
        (None, None),
    ],
)
def test_retry_after(value: object, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After is read as seconds or as a date, from 0 to a day; nonsense is as good as none."""
    monkeypatch.setattr(failure, "_now", lambda: 784_111_777.0 - 10)
    response = SimpleNamespace(status_code=429, headers={"Server": "x", "retry-After": value})

    assert expected("429", "rate limit", seconds) == classify_response(response)


def test_retry_after_of_an_email_message() -> None:
    """The headers may be any mapping, urllib's among them."""
    headers = email.message.Message()
    headers["Retry-After"] = "3"
    error = urllib.error.HTTPError("http://h/", 503, "busy", headers, None)

    assert expected("503", "rate limit", 3.0) == classify(error)
    error.close()


@pytest.mark.parametrize("headers", [None, 7, [("Retry-After", "3")], {"Retry-After": {}}, {}])
def test_headers_that_are_none(headers: object) -> None:
    """Headers that are no mapping, or without the field, say nothing about waiting."""
    response = SimpleNamespace(status_code=503, headers=headers)

    assert expected("503", "server") == classify_response(response)


# --- hostile objects -----------------------------------------------------------------------------


class HostileError(Exception):
    """Raises whatever is read from it."""

    def __getattribute__(self, name: str) -> object:
        if name == "__class__":  # pytest looks at it, too
            return HostileError
        raise RuntimeError(name)

    def __str__(self) -> str:
        raise ValueError


def test_hostile_exception() -> None:
    """An exception that raises at every touch is just another failure."""
    error = raised(lambda: (_ for _ in ()).throw(HostileError()))

    assert expected("HostileError", "other") == classify(error)
    assert message_of(error) == "<unreadable message>"
    assert stack_text(error).endswith("HostileError: <unreadable message>")


class HostileType(type):
    @property
    def __mro__(cls) -> tuple[type, ...]:  # type: ignore[override]
        raise RuntimeError

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError


def test_hostile_class() -> None:
    """A class that cannot be looked at is `Exception`, and a failure."""

    class OddError(Exception, metaclass=HostileType):
        pass

    assert expected("Exception", "other") == classify(OddError())
    assert stack_text(OddError()) == "Exception"
    assert stack_text(OddError(), 3) == "Exc"


class HostileNumber(int):
    def __ge__(self, other: object) -> bool:
        raise RuntimeError

    __le__ = __gt__ = __lt__ = __ge__


def test_hostile_response() -> None:
    """A returned value that raises when it is compared is no response."""
    assert classify_response(SimpleNamespace(status_code=HostileNumber(503))) is None


@pytest.mark.parametrize("name", ["a\nb\x1b[31m", "x" * 5000, "Ошибка", ""])
def test_odd_class_name(name: str) -> None:
    """A class name made up at run time comes out as one bounded, harmless line."""
    error_type = classify(type(name, (Exception,), {})()).error_type

    assert error_type is not None
    assert len(error_type) <= 200
    assert "\n" not in error_type
    assert "\x1b" not in error_type


attribute = st.sampled_from(
    [
        *("response", "status_code", "status", "code", "headers", "reason", "args", "errno"),
        *("periscope_failure", "__cause__", "__context__", "__traceback__"),
        "__suppress_context__",
    ]
)
hostile_value = st.one_of(
    st.none(),
    st.integers(),
    st.text(),
    st.binary(),
    st.floats(),
    st.booleans(),
    st.just(HostileNumber(503)),
    st.builds(HostileError),
    st.builds(FeedError),
    st.dictionaries(st.text(), st.text()),
    st.builds(lambda value: {"Retry-After": value}, st.text()),
    st.tuples(st.text(), st.builds(HostileError)),
    st.builds(
        lambda status, headers: SimpleNamespace(status=status, headers=headers),
        st.integers(),
        st.dictionaries(st.just("retry-after"), st.text()),
    ),
)
base = st.sampled_from(
    [
        *(Exception, BaseException, OSError, ValueError, SystemExit, httpx.ConnectError, KeyError),
        *(redis.ConnectionError, urllib.error.URLError, requests.ConnectionError),
    ]
)


@settings(max_examples=150, deadline=None)
@given(base=base, attributes=st.dictionaries(attribute, hostile_value), raising=attribute)
def test_never_raises(
    base: type[BaseException], attributes: dict[str, object], raising: str
) -> None:
    """Whatever an exception or response carries or raises, there is an answer within bounds."""

    def refuse(self: object) -> None:
        raise RuntimeError

    members = {**attributes, raising: property(refuse)}
    error = type("MadeUpError", (base,), {**members, "__init__": lambda self: None})()
    answer = type("Answer", (), members)()

    found = classify(error)
    assert found.outcome in ("ok", "error", "timeout", "cancelled", "rejected", "partial")
    assert found.retry_after is None or 0 <= found.retry_after <= 86_400
    assert classify_response(answer) is None or isinstance(classify_response(answer), Failure)
    assert len(message_of(error, 50)) <= 50
    assert len(stack_text(error, 500)) <= 500


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_a_signal_passes(ending: type[BaseException]) -> None:
    """A Ctrl-C or a signal handler's exit that comes while we look is not swallowed."""

    class BadMomentError(Exception):
        @property
        def response(self) -> object:
            raise ending

    with pytest.raises(ending):
        classify(BadMomentError())


# --- messages ------------------------------------------------------------------------------------


class Shouting(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError

    def __getitem__(self, key: object) -> str:  # type: ignore[override]
        raise RuntimeError


class MessageError(Exception):
    """Its message is whatever `made` returns."""

    def __init__(self, made: Callable[["MessageError"], object]) -> None:
        self.made = made

    def __str__(self) -> str:
        return self.made(self)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such column: score"), "no such column: score"),
        (ValueError(), ""),
        (KeyError("id"), "'id'"),
        (MessageError(lambda _: Shouting("loud")), "loud"),
        (MessageError(lambda _: 7), "<unreadable message>"),
        (MessageError(lambda _: b"bytes"), "<unreadable message>"),
        (MessageError(str), "<unreadable message>"),
        (MessageError(lambda _: 1 / 0), "<unreadable message>"),
    ],
)
def test_message(error: BaseException, message: str) -> None:
    """The message is what `str` gives, and a note where that gives none."""
    assert message == message_of(error)


@pytest.mark.parametrize("limit", [0, 1, 10, 1024])
def test_message_is_bounded(limit: int) -> None:
    """A message of a mebibyte comes out within the limit."""
    assert len(message_of(ValueError("long " * (1 << 18)), limit)) <= limit


def test_message_is_redacted() -> None:
    """A secret in the message stays out, the host it was for stays in."""
    message = message_of(ValueError("GET https://me:hunter2@feed.example/x?token=s3cr3tvalue"))

    assert "hunter2" not in message
    assert "s3cr3tvalue" not in message
    assert "feed.example" in message


def test_message_without_redaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """If redaction itself fails, nothing is let out."""

    def broken(text: str, limit: int = 1024) -> str:
        raise RuntimeError(text)

    monkeypatch.setattr(error_text, "redact", broken)

    assert message_of(ValueError("password=hunter2")) == ""
    assert stack_text(ValueError("password=hunter2")) == "ValueError"


# --- stack text ----------------------------------------------------------------------------------


def deep(levels: int, error: BaseException) -> None:
    if levels:
        deep(levels - 1, error)
    raise error


def frames(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(__file__)]


def test_stack() -> None:
    """The stack text names file, line and qualified name, the innermost call last."""

    class Feed:
        def parse(self) -> None:
            raise ValueError("no such column: score")

    error = raised(lambda: Feed().parse())

    first = Feed.parse.__code__.co_firstlineno
    here = f"{test_stack.__name__}.<locals>"
    *_, last_but_one, last, end = stack_text(error).splitlines()
    assert last_but_one.endswith(f" in {here}.<lambda>")
    assert f"{__file__}:{first + 1} in {here}.Feed.parse" == last
    assert end == "ValueError: no such column: score"


def test_no_traceback() -> None:
    """An exception that was never raised has its type and message, without a colon if empty."""
    assert stack_text(ValueError("x")) == "ValueError: x"
    assert stack_text(ValueError()) == "ValueError"


def test_no_values_and_no_source() -> None:
    """Neither a local variable's value nor a line of source code gets into the text."""

    def parse(payload: str) -> None:
        raise ValueError("bad row")  # source-of-this-line

    text = stack_text(raised(lambda: parse("value-of-the-payload")))

    assert "value-of-the-payload" not in text
    assert "source-of-this-line" not in text


@pytest.mark.parametrize(("levels", "shown"), [(17, 20), (18, 20), (500, 20)])
def test_frames_are_bounded(levels: int, shown: int) -> None:
    """Of many frames the first 5 and the last 15 are shown, and how many were not."""
    error = raised(lambda: deep(levels, ValueError("x")))  # raised, the lambda, levels + 1 of deep
    text = stack_text(error, 100_000)

    left_out = levels + 3 - shown
    assert shown == len(frames(text))
    assert (f"… {left_out} frames left out …" in text.splitlines()) == (left_out > 0)
    if left_out:
        assert f"… {left_out} frames left out …" == text.splitlines()[5]


def test_endless_recursion() -> None:
    """A RecursionError comes out as short as any other."""

    def endless() -> None:
        endless()

    text = stack_text(raised(endless))

    assert len(text) <= 4096
    assert len(text.splitlines()) == 22
    assert text.endswith("RecursionError: maximum recursion depth exceeded")


def run_as(module: str, filename: str = "feed.py") -> BaseException:
    """Raise in code that belongs to `module`, called from here."""
    scope: dict[str, object] = {"__name__": module}
    exec(compile("def pull():\n    raise ValueError('x')", filename, "exec"), scope)
    return raised(scope["pull"])  # type: ignore[arg-type]


def test_own_frames_are_left_out() -> None:
    """The frames of this package are no news to its user."""
    assert "feed.py" in stack_text(run_as("feeds.urlhaus"))
    assert "feed.py" in stack_text(run_as("periscope_otel_plugin"))
    assert "feed.py" not in stack_text(run_as("periscope_otel.operation"))


def test_odd_file_names() -> None:
    """A file name that would break a line or a terminal comes out as a harmless line."""
    *_, place, end = stack_text(run_as("feeds", "fe\x1b[31med\n.py" + "x" * 5000)).splitlines()

    assert "\x1b" not in place
    assert len(place) <= 300
    assert end == "ValueError: x"


def test_cause_and_context() -> None:
    """Causes and contexts come before what they led to; a suppressed context does not come."""

    def outer(how: str) -> None:
        try:
            deep(0, KeyError("id"))
        except KeyError as error:
            if how == "while":
                raise FeedError("bad feed")  # noqa: B904
            raise FeedError("bad feed") from (error if how == "from" else None)

    texts = {how: stack_text(raised(lambda h=how: outer(h))) for how in ("while", "from", "none")}  # type: ignore[misc]

    assert "KeyError: 'id'\n… and while that was handled:\n" in texts["while"]
    assert "KeyError: 'id'\n… which caused:\n" in texts["from"]
    assert "KeyError" not in texts["none"]
    assert {"FeedError: bad feed"} == {text.splitlines()[-1] for text in texts.values()}


def test_long_chain() -> None:
    """Of a long chain the last four exceptions are told."""
    text = stack_text(chained(*(FeedError(str(number)) for number in range(9))))

    told = [line for line in text.splitlines() if line.startswith("FeedError")]
    assert told == ["FeedError: 3", "FeedError: 2", "FeedError: 1", "FeedError: 0"]


def test_group_members() -> None:
    """A group shows its first three members and how many there are."""
    members = [ValueError(f"row {number}") for number in range(7)]

    assert stack_text(ExceptionGroup("bad rows", members)).splitlines() == [
        "member 1 of 7: ValueError: row 0",
        "member 2 of 7: ValueError: row 1",
        "member 3 of 7: ValueError: row 2",
        "ExceptionGroup: bad rows (7 sub-exceptions)",
    ]


@pytest.mark.parametrize("limit", [-1, 0, 1, 20, 99, 100, 300, 1000, 4096])
def test_stack_text_is_bounded(limit: int) -> None:
    """The text keeps to its limit, and the oldest lines go first."""
    cause = raised(lambda: deep(30, ValueError("y" * 2000)))
    error = raised(lambda: deep(30, chained(FeedError("x" * 2000), cause)))

    text = stack_text(error, limit)

    assert len(text) <= max(limit, 0)
    if limit >= 300:
        assert text.startswith("… earlier lines left out …\n")
        assert text.splitlines()[-1].startswith("FeedError: xxx")
        assert text.splitlines()[1].startswith((__file__, "… ", "ValueError: "))


def test_stack_text_is_redacted() -> None:
    """A secret in a message, also in that of a cause or a member, stays out."""
    secret = ValueError("password=hunter2")

    for error in (secret, chained(FeedError(), secret), ExceptionGroup("", [secret])):
        assert "hunter2" not in stack_text(error)


# --- imports -------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    """Knowing the failures of other libraries does not import them, nor anything heavy."""
    package = str(Path(failure.__file__).parent)
    heavy = ["httpx", "requests", "aiohttp", "urllib3", "redis", "taxii2client", "stix2"]
    heavy += [
        "ssl",
        "socket",
        "email",
        "http",
        "asyncio",
        "traceback",
        "linecache",
        "opentelemetry",
    ]
    script = (
        "import sys, types, dataclasses, re\n"
        "package = types.ModuleType('periscope_otel')\n"  # without what its __init__ imports
        f"package.__path__ = [{package!r}]\n"
        "sys.modules['periscope_otel'] = package\n"
        "before = set(sys.modules)\n"
        "import periscope_otel.failure\n"
        f"print([name for name in {heavy!r} if name in set(sys.modules) - before])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"
