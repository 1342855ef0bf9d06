"""The contracts of reading client spans: whom a call was made to, and how it ended."""

from __future__ import annotations

import httpx
import pytest
import redis.exceptions
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanKind, Status, StatusCode

from periscope_otel.failure import Failure, classify
from periscope_otel.resilience.client_spans import dependency_of, failure_of

HTTP = {"http.request.method": "GET", "url.full": "https://feed.example/x"}
HTTP_OLD = {"http.method": "GET", "http.url": "https://feed.example/x"}
REDIS = {"db.system.name": "redis"}
REDIS_OLD = {"db.system": "redis"}
CANCELLED = Failure("cancelled", None, "ignored", retryable=False)


def span(
    attributes: dict | None = None,
    status: Status | StatusCode = StatusCode.UNSET,
    *exceptions: tuple[str, str],
) -> ReadableSpan:
    """Return a client span that has ended."""
    return ReadableSpan(
        "GET",
        kind=SpanKind.CLIENT,
        attributes=attributes,
        status=status if isinstance(status, Status) else Status(status),
        events=[
            Event("exception", {"exception.type": name, "exception.message": message})
            for name, message in exceptions
        ],
    )


# Whom the call was made to.


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"server.address": "Feed.Example"}, "feed.example"),
        ({"server.address": "feed.example:8080"}, "feed.example"),
        ({"server.address": "feed.example."}, "feed.example"),
        ({"server.address": "10.0.0.1"}, "10.0.0.1"),
        ({"server.address": "::1"}, "::1"),
        ({"server.address": "[::1]:6379"}, "::1"),
        ({"server.address": "/run/redis.sock"}, "/run/redis.sock"),
        ({"net.peer.name": "localhost", "net.peer.port": 6379}, "localhost"),
        ({"url.full": "https://me:secret@Feed.Example:8443/x?a=b"}, "feed.example"),
        ({"http.url": "http://[2001:DB8::1]:80/"}, "2001:db8::1"),
        ({"server.address": "a.example", "http.url": "http://b.example"}, "a.example"),
        ({"server.address": "", "url.full": "http://b.example"}, "b.example"),
        ({"server.address": 5, "net.peer.name": b"x", "http.url": "http://b.example"}, "b.example"),
    ],
)
def test_a_dependency_is_named_by_its_host(attributes, name):
    """In lower case and without a port, by the new and the old conventions."""
    assert dependency_of(span(attributes)) == name


@pytest.mark.parametrize(
    "attributes",
    [None, {}, {"url.full": "/x"}, {"url.full": "http://[::1"}, {"http.url": ""}, {"x": "y"}],
)
def test_a_span_may_not_say_whom_it_calls(attributes):
    """Also with a URL that cannot be read."""
    assert dependency_of(span(attributes)) is None


def test_a_name_is_bounded():
    """Whatever an instrumentation writes."""
    assert len(dependency_of(span({"server.address": "x" * 1_000_000}))) <= 255
    assert len(dependency_of(span({"url.full": "http://" + "x" * 1_000_000}))) <= 255


# How it ended: HTTP.


@pytest.mark.parametrize("key", ["http.response.status_code", "http.status_code"])
@pytest.mark.parametrize("status", [401, 404, 408, 429, 500, 503])
def test_a_status_code_counts_and_not_the_status_of_the_span(key, status):
    """A 404 is ignored and a 500 a failure, whether or not the span is marked as an error."""
    meant = classify(
        httpx.HTTPStatusError("", request=None, response=httpx.Response(status))  # type: ignore[arg-type]
    )
    for code in StatusCode:
        assert failure_of(span({**HTTP, key: status}, code)) == meant


@pytest.mark.parametrize("key", ["http.response.status_code", "http.status_code"])
@pytest.mark.parametrize("code", StatusCode)
def test_a_good_status_code_is_a_success(key, code):
    """Even if the span is marked as an error without saying which."""
    assert failure_of(span({**HTTP, key: 200}, code)) is None
    assert failure_of(span({**HTTP, key: 304}, code)) is None


def test_an_error_beside_a_good_status_code_counts():
    """Too many redirects, or a body that cannot be decoded, after an answer had come."""
    new = {**HTTP, "http.response.status_code": 302, "error.type": "TooManyRedirects"}
    event = ("requests.exceptions.TooManyRedirects", "")
    old = {**HTTP_OLD, "http.status_code": 302}
    assert failure_of(span(new, StatusCode.ERROR, event)).reason == "server"
    assert failure_of(span(old, StatusCode.ERROR, event)).reason == "server"


def test_an_exception_that_was_handled_is_not_the_end():
    """It is only recorded: the span has a good status code and is no error."""
    handled = ("httpx.ConnectError", "")
    assert failure_of(span({**HTTP, "http.status_code": 200}, StatusCode.UNSET, handled)) is None
    assert failure_of(span(REDIS, StatusCode.OK, handled)) is None


@pytest.mark.parametrize("error_type", ["ConnectError", "httpx.ConnectError"])
def test_an_error_type_is_looked_up(error_type):
    """As the short or the full name of an exception."""
    found = failure_of(span({**HTTP, "error.type": error_type}, StatusCode.ERROR))
    assert found == classify(httpx.ConnectError(""))


def test_an_error_type_may_be_a_status():
    """As the conventions have it; a status below 400 is none."""
    assert failure_of(span({**HTTP, "error.type": "503"}, StatusCode.ERROR)).reason == "server"
    assert failure_of(span({**HTTP, "error.type": "200"})) is None


def test_the_event_tells_what_the_short_name_means():
    """`ResponseError` is a wrong command to Redis, and too many bad answers to urllib3."""
    attributes = {**REDIS, "error.type": "ResponseError"}
    event = ("redis.exceptions.ResponseError", "WRONGTYPE Operation against a key")
    assert failure_of(span(attributes, StatusCode.ERROR, event)).verdict == "ignored"
    assert failure_of(span(attributes, StatusCode.ERROR)).verdict == "failure"


def test_an_exception_event_counts_where_there_is_no_more():
    """As with the old conventions: the one that was recorded last."""
    events = ("builtins.ValueError", ""), ("httpx.ReadTimeout", "timed out")
    found = failure_of(span(HTTP_OLD, StatusCode.ERROR, *events))
    assert found == classify(httpx.ReadTimeout("timed out"))


def test_words_of_the_status_count_where_spans_keep_no_events():
    """The SDK writes the exception's name there."""
    status = Status(StatusCode.ERROR, "ConnectTimeout: timed out")
    assert failure_of(span(HTTP_OLD, status)).reason == "timeout"


@pytest.mark.parametrize("words", [None, "", "bad", "went wrong: badly"])
def test_an_error_without_a_name_is_a_failure(words):
    """Of no known kind."""
    found = failure_of(span(HTTP, Status(StatusCode.ERROR, words)))
    assert found == Failure("error", "_OTHER", "failure", retryable=False)


@pytest.mark.parametrize("attributes", [HTTP, HTTP_OLD])
def test_a_http_span_that_says_nothing_was_cancelled(attributes):
    """By a time limit around the call, for example."""
    assert failure_of(span(attributes)) == CANCELLED


def test_a_cancellation_that_was_recorded_is_one():
    """As aiohttp's instrumentation does."""
    cancelled = ("asyncio.exceptions.CancelledError", "")
    assert failure_of(span(HTTP_OLD, StatusCode.ERROR, cancelled)) == CANCELLED
    attributes = {**HTTP, "error.type": "CancelledError"}
    assert failure_of(span(attributes, StatusCode.ERROR, cancelled)) == CANCELLED


@pytest.mark.parametrize(
    "key", ["http.response.header.retry-after", "http.response.header.retry_after"]
)
@pytest.mark.parametrize("value", [["30"], ("30", "60"), "30"])
def test_retry_after_is_read_where_it_is_kept(key, value):
    """In the list of values that the conventions have."""
    found = failure_of(span({**HTTP, "http.response.status_code": 429, key: value}))
    assert (found.reason, found.retry_after) == ("rate_limit", 30.0)


# How it ended: databases, and what is neither.


@pytest.mark.parametrize("attributes", [REDIS, REDIS_OLD, {**REDIS, **HTTP}, {}, None])
def test_any_other_span_without_an_error_is_a_success(attributes):
    """Also that of a database behind HTTP."""
    assert failure_of(span(attributes)) is None


@pytest.mark.parametrize("attributes", [REDIS, REDIS_OLD])
@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.ConnectionError("refused"),
        redis.exceptions.TimeoutError("timed out"),
        redis.exceptions.AuthenticationError("WRONGPASS"),
        redis.exceptions.ResponseError("WRONGTYPE"),
        redis.exceptions.ResponseError("MISCONF Redis is configured to save"),
    ],
    ids=str,
)
def test_an_error_of_redis_means_what_the_exception_means(attributes, error):
    """Its instrumentation sets no `error.type`, only the event."""
    event = (f"redis.exceptions.{type(error).__name__}", str(error))
    assert failure_of(span(attributes, StatusCode.ERROR, event)) == classify(error)


# Hostile ones.


@pytest.mark.parametrize("value", [True, "500", 5.5, -1, 0, 99, 10**30, None, [500]])
def test_what_is_no_status_code_is_not_taken_for_one(value):
    """The span is as good as one without."""
    assert failure_of(span({**HTTP, "http.status_code": value})) == CANCELLED


@pytest.mark.parametrize("value", [[], [5], {}, b"30", [[]], ["soon"], ["9" * 10_000]])
def test_a_header_that_cannot_be_read_is_none(value):
    """Or is bounded."""
    attributes = {"http.status_code": 429, "http.response.header.retry-after": value}
    wait = failure_of(span(attributes)).retry_after
    assert wait is None or wait <= 86_400


@pytest.mark.parametrize("name", [5, "", "\x00", "x" * 100_000, "²", "9" * 5000])
def test_a_strange_error_type_is_contained(name):
    """It is a failure, or as good as none, and what is told of it is bounded."""
    found = failure_of(span({**REDIS, "error.type": name}, StatusCode.ERROR))
    assert found.verdict in ("failure", "ignored")
    assert len(found.error_type) <= 200
