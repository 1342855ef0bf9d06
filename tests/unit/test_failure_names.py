"""The contracts of `failure` where only a status or a name is known, and of its predicates."""

from __future__ import annotations

import aiohttp
import httpx
import pytest
import redis.exceptions
import requests
import taxii2client.exceptions
import urllib3

from periscope_otel import guard
from periscope_otel.failure import (
    Failure,
    add_classifier,
    classify,
    classify_name,
    classify_response,
    classify_status,
)

MAINTENANCE = Failure("error", "Maintenance", "ignored", retryable=True)


class FeedError(httpx.ReadError):
    """A class of the application's."""


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 429, 500, 501, 503, 599, 700])
@pytest.mark.parametrize("wait", [None, "30"])
def test_a_status_means_what_a_response_with_it_means(status, wait):
    """With and without Retry-After."""
    response = httpx.Response(status, headers={} if wait is None else {"Retry-After": wait})
    assert classify_status(status, wait) == classify_response(response)


@pytest.mark.parametrize("status", [0, 100, 200, 302, 399, -1])
def test_a_status_below_400_is_no_failure(status):
    """Whatever else it is."""
    assert classify_status(status) is None


def test_a_wait_that_cannot_be_read_is_none():
    """Neither a number nor a date."""
    assert classify_status(429, "soon").retry_after is None


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("x"),
        httpx.ReadTimeout("x"),
        httpx.RemoteProtocolError("x"),
        requests.ConnectionError(),
        requests.ConnectTimeout(),
        requests.TooManyRedirects(),
        urllib3.exceptions.ReadTimeoutError(None, "", ""),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ServerTimeoutError(),
        redis.exceptions.ConnectionError(),
        redis.exceptions.AuthenticationError(),
        redis.exceptions.ResponseError("WRONGTYPE"),
        redis.exceptions.ResponseError("BUSY Redis is busy"),
        taxii2client.exceptions.ValidationError(),
        taxii2client.exceptions.TAXIIServiceException(),
        TimeoutError(),
        FeedError("x"),
        KeyError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_name_means_what_the_exception_means(error):
    """Also where only a base of the class is known to the tables."""
    module, name = type(error).__module__, type(error).__qualname__
    full = name if module == "builtins" else f"{module}.{name}"
    assert classify_name(full, str(error)) == classify(error)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ConnectError", "connect"),
        ("ConnectTimeout", "timeout"),
        ("ConnectionError", "connect"),
        ("TimeoutError", "timeout"),
        ("SSLError", "tls"),
        ("gaierror", "dns"),
        ("MaxRetryError", "connect"),
        ("MissingSchema", "validation"),
    ],
)
def test_a_short_name_is_found_where_clients_have_their_exceptions(name, reason):
    """It may be that of several classes that mean the same."""
    assert classify_name(name).reason == reason
    assert classify_name(name).error_type == name


@pytest.mark.parametrize("name", ["ResponseError", "HTTPError", "Error", "FeedError", "x.Y", ""])
def test_a_name_that_says_nothing_is_a_failure(name):
    """Not retried: of no known class, or of classes that do not mean the same."""
    found = classify_name(name)
    assert (found.verdict, found.retryable, found.reason) == ("failure", False, None)


def test_a_cancellation_is_known_by_its_name():
    """As in an event of aiohttp's instrumentation."""
    for name in ("asyncio.exceptions.CancelledError", "CancelledError", "KeyboardInterrupt"):
        assert classify_name(name) == Failure("cancelled", None, "ignored", retryable=False)


@pytest.mark.parametrize("name", ["os.system", "os.path.__class__", "sys.modules", "..", "a" * 999])
def test_a_name_of_something_else_is_a_failure_of_no_known_kind(name):
    """Nothing is imported or called for it, and what is told of it is bounded."""
    found = classify_name(name)
    assert found.verdict == "failure"
    assert len(found.error_type) <= 200


def test_a_predicate_is_asked_first_until_it_is_taken_back():
    """For exceptions, members of groups and responses alike."""
    remove = add_classifier(lambda ended: MAINTENANCE if "soon" in str(ended) else None)
    try:
        assert classify(ConnectionError("back soon")) is MAINTENANCE
        assert classify(ExceptionGroup("", [ConnectionError("soon")])).verdict == "ignored"
        assert classify_response("soon") is MAINTENANCE
        assert classify(ConnectionError("gone")).reason == "connect"
        assert classify_response(httpx.Response(200)) is None
    finally:
        remove()
    remove()
    assert classify(ConnectionError("back soon")).reason == "connect"


def test_the_first_predicate_with_something_to_say_counts():
    """In the order in which they were added."""
    other = Failure("timeout", "Other", "failure", retryable=True)
    removals = [add_classifier(lambda _, said=said: said) for said in (None, MAINTENANCE, other)]
    try:
        assert classify(ValueError()) is MAINTENANCE
    finally:
        for remove in removals:
            remove()


@pytest.mark.parametrize("said", ["failure", True, object()])
def test_what_is_no_failure_is_not_taken_for_one(said):
    """The usual rules apply."""
    remove = add_classifier(lambda _: said)
    try:
        assert classify(ConnectionError()).reason == "connect"
    finally:
        remove()


def test_a_predicate_that_raises_is_contained(caplog):
    """It is warned about, and the usual rules apply."""
    remove = add_classifier(lambda ended: ended.no_such_attribute)
    try:
        assert classify(ConnectionError()).reason == "connect"
        assert classify_response(httpx.Response(503)).reason == "server"
    finally:
        remove()
    assert [record.name for record in caplog.records] == [guard.logger.name]
