"""Client spans of other instrumentations: whom a call was made to, and how it ended.

The old and the new semantic conventions of HTTP and databases are read, whichever a span has. The
status of a span says little (a 404 is an error on a client span), so it is looked at last.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from opentelemetry.trace import StatusCode

from periscope_otel.failure import Failure, classify_name, classify_status
from periscope_otel.telemetry.names import (
    ERROR_TYPE,
    EXCEPTION_EVENT,
    EXCEPTION_MESSAGE,
    EXCEPTION_TYPE,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import ReadableSpan

_ADDRESSES: Final = ("server.address", "net.peer.name")
_URLS: Final = ("url.full", "http.url")
_STATUSES: Final = ("http.response.status_code", "http.status_code")
_METHODS: Final = ("http.request.method", "http.method")
_DATABASES: Final = ("db.system.name", "db.system")
_RETRY_AFTER: Final = "http.response.header.retry-after"
_RETRY_AFTER_OLD: Final = "http.response.header.retry_after"

_LONGEST_NAME: Final = 255
_LONGEST_URL: Final = 2048

_CANCELLED: Final = Failure("cancelled", None, "ignored", retryable=False)
_UNKNOWN: Final = Failure("error", "_OTHER", "failure", retryable=False)


def dependency_of(span: ReadableSpan) -> str | None:
    """Return the name of what a call was made to: its host in lower case, without the port.

    Args:
        span: A client span; one that has only begun may not know yet.

    Returns:
        None if the span does not say.

    Example:
        >>> dependency_of(span)
        'urlhaus.abuse.ch'
    """
    attributes = _attributes_of(span)
    for key in _ADDRESSES:
        if (address := _text(attributes, key)) and (host := _host(address)):
            return host
    for key in _URLS:
        if (url := _text(attributes, key)) and (host := _host_of_url(url)):
            return host
    return None


def failure_of(span: ReadableSpan) -> Failure | None:
    """Return how a call ended: by its HTTP status, `error.type`, exception event, then status.

    An HTTP span with none of them was cancelled, by a time limit around the call for example.

    Args:
        span: A client span that has ended.

    Returns:
        None if it succeeded.

    Example:
        >>> failure_of(span).reason
        'server'
    """
    attributes = _attributes_of(span)
    status = _http_status(attributes)
    if status is not None and status >= 400:
        return classify_status(status, _retry_after(attributes))
    error_type = _text(attributes, ERROR_TYPE)
    code = span.status.status_code
    if error_type is None and (code is StatusCode.OK or (status and code is StatusCode.UNSET)):
        return None
    exception = _exception_of(span)
    if error_type:
        return _failure_of_type(error_type, exception, attributes)
    if exception is not None:
        return classify_name(*exception)
    if code is StatusCode.ERROR:
        return None if status else _failure_of_description(span.status.description)
    return _CANCELLED if _is_http(attributes) else None


def _attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """Return a plain dict where there is one: the SDK's own mapping raises for what it lacks."""
    attributes: Any = span.attributes
    return attributes.copy() if isinstance(attributes, MappingProxyType) else attributes or {}


def _failure_of_type(
    error_type: str, exception: tuple[str, str] | None, attributes: Mapping[str, Any]
) -> Failure | None:
    if error_type.isascii() and error_type.isdigit():
        return classify_status(int(error_type[:4]), _retry_after(attributes))
    # The event has the module too, which tells classes of one name apart.
    if exception is not None and f".{exception[0]}".endswith(f".{error_type}"):
        return classify_name(*exception)
    return classify_name(error_type)


def _failure_of_description(description: str | None) -> Failure:
    """Look for the exception in the words of a status: spans may keep no events."""
    name = (description or "").partition(":")[0]
    found = classify_name(name)
    return found if found.reason or found.outcome == "cancelled" else _UNKNOWN


def _exception_of(span: ReadableSpan) -> tuple[str, str] | None:
    """Return type and message of the exception that was recorded last."""
    for event in reversed(span.events):
        if event.name == EXCEPTION_EVENT:
            attributes: Mapping[str, Any] = event.attributes or {}
            if name := _text(attributes, EXCEPTION_TYPE):
                return name, _text(attributes, EXCEPTION_MESSAGE) or ""
    return None


def _http_status(attributes: Mapping[str, Any]) -> int | None:
    for key in _STATUSES:
        value = attributes.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 999:
            return value
    return None


def _retry_after(attributes: Mapping[str, Any]) -> str | None:
    """Return the header, where the instrumentation was told to keep it: a list of values."""
    value = attributes.get(_RETRY_AFTER) or attributes.get(_RETRY_AFTER_OLD)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def _is_http(attributes: Mapping[str, Any]) -> bool:
    """Whether it is a span of an HTTP client, and not of a database behind HTTP."""
    keys = _METHODS + _URLS
    return any(key in attributes for key in keys) and not any(k in attributes for k in _DATABASES)


def _host(address: str) -> str | None:
    """Return an address as a name, without a port that does not belong there."""
    text = address[:_LONGEST_NAME].strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0] or None
    host, _, port = text.rpartition(":")
    if host and ":" not in host and port.isdigit():  # an IPv6 address has more of them
        text = host
    return text.rstrip(".") or None


def _host_of_url(url: str) -> str | None:
    try:
        return _host(urlsplit(url[:_LONGEST_URL]).hostname or "")
    except ValueError:
        return None


def _text(attributes: Mapping[str, Any], key: str) -> str | None:
    value = attributes.get(key)
    return value if isinstance(value, str) else None
