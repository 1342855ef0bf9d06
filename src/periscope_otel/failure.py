"""What a failure means: the one classifier of exceptions and responses.

Spans, metrics, breakers, retries and dead letters all ask here, so they never disagree. Foreign
exceptions are known by `module.qualname`, looked up along the class's bases: knowing httpx or
redis costs no import of them, and subclasses are known too. The rules are the tables below.
"""

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, Literal, NamedTuple

from periscope_otel.error_text import message_of, peek, plain_name, stack_text, type_name

__all__ = ["Failure", "Outcome", "Reason", "Verdict", "add_classifier", "classify"]
__all__ += ["classify_name", "classify_response", "classify_status", "message_of", "stack_text"]

# How an operation ended (`threat.ingest.outcome`).
Outcome = Literal["ok", "error", "timeout", "cancelled", "rejected", "partial"]
# What a breaker makes of a call; `ignored` gives the permit back and touches no counter.
Verdict = Literal["success", "failure", "ignored"]
# Why, in one word.
Reason = Literal[
    "auth",  # the peer does not let us in: 401, 403, a wrong password
    "client",  # we asked for the wrong thing: 404 and other 4xx, a wrong command
    "connect",  # no connection, or it broke
    "dns",  # the name did not resolve
    "local",  # this machine: disk full, no such file, too many open files
    "rate_limit",  # the peer asks us to slow down: 429, 503 with Retry-After
    "server",  # the peer is in trouble: 5xx, a loading or read-only Redis
    "timeout",  # no answer in time; 408
    "tls",  # no secure channel
    "validation",  # the data is not what it should be
]


@dataclass(frozen=True, slots=True)
class Failure:
    """What one exception or response means.

    An exception may answer for itself, with a `Failure` in its attribute `periscope_failure`.

    Attributes:
        outcome: How the operation ended.
        error_type: The short class name, or the HTTP status code as a string (semantic
            conventions, `error.type`); None on ok and cancelled.
        verdict: What a breaker makes of it.
        retryable: Whether the same call may succeed if it is made again.
        retry_after: Seconds that the peer asked to wait (at most a day), None if it did not.
        reason: Why, in one word; None where nothing is known.
    """

    outcome: Outcome
    error_type: str | None
    verdict: Verdict
    retryable: bool
    retry_after: float | None = None
    reason: Reason | None = None


class _Kind(NamedTuple):
    """What a line of the tables means: a Failure without its name and its Retry-After."""

    outcome: Outcome
    verdict: Verdict
    retryable: bool
    reason: Reason | None
    wraps: bool = False  # the class says little; an exception inside it may say more


_CANCELLED: Final = _Kind("cancelled", "ignored", False, None)
_TIMEOUT: Final = _Kind("timeout", "failure", True, "timeout")
_CONNECT: Final = _Kind("error", "failure", True, "connect")
_WRAPPED: Final = _CONNECT._replace(wraps=True)
_DNS: Final = _Kind("error", "failure", True, "dns")
_TLS: Final = _Kind("error", "failure", True, "tls")
_WRAPPED_TLS: Final = _TLS._replace(wraps=True)
_CERTIFICATE: Final = _TLS._replace(retryable=False)  # as wrong at the next attempt
_SERVER: Final = _Kind("error", "failure", True, "server")
_BROKEN: Final = _SERVER._replace(retryable=False)  # a repeat gets the same answer
_AUTH: Final = _Kind("error", "failure", False, "auth")
_RATE_LIMIT: Final = _Kind("error", "ignored", True, "rate_limit")
_CLIENT: Final = _Kind("error", "ignored", False, "client")
_VALIDATION: Final = _Kind("error", "ignored", False, "validation")
_LOCAL: Final = _Kind("error", "failure", False, "local")
_OTHER: Final = _Kind("error", "failure", False, None)

# The most derived class that is named here counts; where none is, the exception is _OTHER.
_CLASSES: Final[tuple[tuple[str, _Kind, str], ...]] = (
    ("builtins", _CANCELLED, "GeneratorExit KeyboardInterrupt"),
    ("builtins", _TIMEOUT, "TimeoutError"),  # also asyncio's, socket's, concurrent.futures'
    ("builtins", _CONNECT, "ConnectionError"),
    ("builtins", _LOCAL, "OSError"),  # some are the network's, see _NETWORK_ERRNOS
    ("builtins", _VALIDATION, "ValueError TypeError LookupError"),  # also JSON, Unicode, pydantic
    ("asyncio.exceptions concurrent.futures._base", _CANCELLED, "CancelledError"),
    ("asyncio.exceptions", _CONNECT, "IncompleteReadError"),
    ("socket", _DNS, "gaierror herror"),
    ("ssl", _CERTIFICATE, "SSLCertVerificationError"),
    ("ssl", _TLS, "SSLError"),
    ("http.client", _CONNECT, "IncompleteRead BadStatusLine"),
    ("urllib.error", _WRAPPED, "URLError"),
    ("urllib.error", _CLIENT, "HTTPError"),  # the status decides; what is left: redirects, 304
    ("_csv", _VALIDATION, "Error"),
    ("xml.etree.ElementTree", _VALIDATION, "ParseError"),
    ("msgspec", _VALIDATION, "MsgspecError"),
    ("stix2.exceptions", _VALIDATION, "STIXError"),
    ("stix2patterns.exceptions", _VALIDATION, "ParseException"),
    ("httpx httpcore", _TIMEOUT, "TimeoutException"),
    ("httpx httpcore", _WRAPPED, "NetworkError ProxyError"),
    ("httpx httpcore", _CONNECT, "RemoteProtocolError"),  # "server disconnected without …"
    ("httpx", _BROKEN, "DecodingError TooManyRedirects"),
    ("httpx", _CLIENT, "HTTPStatusError"),  # the status decides; what is left: redirects, 304
    ("httpx", _VALIDATION, "UnsupportedProtocol InvalidURL"),
    ("requests.exceptions", _TIMEOUT, "ConnectTimeout Timeout"),  # the first is both
    ("requests.exceptions", _WRAPPED, "ConnectionError"),
    ("requests.exceptions", _CONNECT, "ChunkedEncodingError"),
    ("requests.exceptions", _SERVER, "RetryError"),
    ("requests.exceptions", _BROKEN, "ContentDecodingError TooManyRedirects"),
    ("requests.exceptions", _VALIDATION, "InvalidJSONError InvalidURL InvalidSchema"),
    ("requests.exceptions", _VALIDATION, "MissingSchema InvalidHeader"),
    ("requests.exceptions", _OTHER, "RequestException"),  # an OSError, but not this machine's
    ("urllib3.exceptions", _TIMEOUT, "TimeoutError"),  # a base of the next two, which are none
    ("urllib3.exceptions", _DNS, "NameResolutionError"),
    ("urllib3.exceptions", _WRAPPED, "NewConnectionError MaxRetryError ProxyError ProtocolError"),
    ("urllib3.exceptions requests.exceptions", _WRAPPED_TLS, "SSLError"),
    ("urllib3.exceptions", _CONNECT, "PoolError"),
    ("urllib3.exceptions", _SERVER, "ResponseError"),  # "too many 503 error responses"
    ("urllib3.exceptions", _BROKEN, "DecodeError"),
    ("urllib3.util.ssl_match_hostname", _CERTIFICATE, "CertificateError"),
    ("aiohttp.client_exceptions", _TIMEOUT, "ServerTimeoutError"),
    ("aiohttp.client_exceptions", _CERTIFICATE, "ClientConnectorCertificateError"),
    ("aiohttp.client_exceptions", _CERTIFICATE, "ServerFingerprintMismatch"),
    ("aiohttp.client_exceptions", _TLS, "ClientSSLError"),
    ("aiohttp.client_exceptions", _DNS, "ClientConnectorDNSError"),
    ("aiohttp.client_exceptions", _WRAPPED, "ClientConnectionError"),
    ("aiohttp.client_exceptions", _CONNECT, "ClientPayloadError"),
    ("aiohttp.client_exceptions", _VALIDATION, "ContentTypeError"),
    ("redis.exceptions", _TIMEOUT, "TimeoutError"),
    ("redis.exceptions", _AUTH, "AuthenticationError AuthenticationWrongNumberOfArgsError"),
    ("redis.exceptions", _AUTH, "AuthorizationError ExternalAuthProviderError NoPermissionError"),
    ("redis.exceptions", _SERVER, "BusyLoadingError ReadOnlyError OutOfMemoryError TryAgainError"),
    ("redis.exceptions", _SERVER, "ClusterError SlotNotCoveredError"),
    ("redis.exceptions", _WRAPPED, "ConnectionError RedisClusterException"),
    ("redis.exceptions", _CONNECT, "InvalidResponse"),
    ("redis.exceptions", _CLIENT, "ResponseError LockError WatchError"),  # see _BY_TEXT
    ("redis.exceptions", _CLIENT, "CrossSlotTransactionError InvalidPipelineStack"),
    ("redis.exceptions", _VALIDATION, "DataError"),
    # AccessError is what the collection has said of itself: nothing was sent, no one refused it.
    ("taxii2client.exceptions", _CLIENT, "AccessError InvalidArgumentsError"),
    ("taxii2client.exceptions", _VALIDATION, "InvalidJSONError ValidationError"),
    ("pymisp.exceptions", _SERVER, "MISPServerError"),
    ("pymisp.exceptions", _VALIDATION, "MISPObjectException PyMISPInvalidFormat"),
)
_BY_NAME: Final = {
    f"{module}.{name}": kind
    for modules, kind, names in _CLASSES
    for module in modules.split()
    for name in names.split()
}
# Where a class may be whose short name alone is known: what clients of a network raise.
_CLIENTS: Final = (
    "builtins asyncio concurrent socket ssl http urllib httpx httpcore requests urllib3"
)
_CLIENT_MODULES: Final = tuple(
    module
    for module in dict.fromkeys(name.rpartition(".")[0] for name in _BY_NAME)
    if module.partition(".")[0] in f"{_CLIENTS} aiohttp redis".split()
)

# RFC 9110 section 15: the rest of 4xx is the client's, the rest of 5xx the server's, and an unknown
# class counts as 5xx. A 503 with Retry-After is a rate limit.
_BY_STATUS: Final = {401: _AUTH, 403: _AUTH, 408: _SERVER._replace(reason="timeout")}
_BY_STATUS.update({429: _RATE_LIMIT, 501: _BROKEN, 505: _BROKEN})  # 429: RFC 6585 section 4

_NETWORK_ERRNOS: Final = {errno.EADDRNOTAVAIL, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_NETWORK_ERRNOS.update({errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH})
_BY_TEXT: Final = {
    _LOCAL: (("Multiple exceptions: ",), _CONNECT),  # asyncio: no address answered; no errno
    _CLIENT: (("MISCONF ", "NOREPLICAS ", "BUSY "), _SERVER),  # redis-py has no class for these
}

_TRANSPORT: Final = ("connect", "dns", "tls", "timeout")
# Wrappers looked into, members judged of a group, headers read of an answer, seconds to wait.
_LEVELS, _MEMBERS, _HEADERS, _LONGEST_WAIT = 5, 100, 256, 86_400.0
_NUMBER: Final = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
_now: Callable[[], float] = time.time  # the wall clock, as an HTTP date is; tests replace it

_UNKNOWN: Final = Failure("error", "Exception", "failure", retryable=False)

_predicates: Final[list[Callable[[object], Failure | None]]] = []


def add_classifier(predicate: Callable[[object], Failure | None]) -> Callable[[], None]:
    """Have a function asked first what an exception or a returned response means.

    Args:
        predicate: Given the exception or whatever was returned; None if it has nothing to say. If
            it raises, the usual rules apply.

    Returns:
        A function that takes it back.

    Example:
        >>> def maintenance(ended):
        ...     if isinstance(ended, FeedError) and ended.code == "MAINTENANCE":
        ...         return Failure("error", "Maintenance", "ignored", retryable=True)
        >>> remove = add_classifier(maintenance)
    """
    _predicates.append(predicate)

    def remove() -> None:
        if predicate in _predicates:
            _predicates.remove(predicate)

    return remove


def classify(error: BaseException) -> Failure:
    """Say what an exception means; never raises, whatever the exception's own code does.

    Cancellation, GeneratorExit and KeyboardInterrupt are `cancelled`, SystemExit(0) is `ok`. A
    group is judged by its worst member, and is retryable only if all its errors are. An exception
    of no known kind, raised `from` a transport or HTTP failure, is judged by that.

    Args:
        error: The exception that ended the operation.

    Returns:
        What everybody else goes by.

    Example:
        >>> classify(ConnectionRefusedError())
        Failure(outcome='error', error_type='ConnectionRefusedError', verdict='failure', ...)
    """
    try:
        return (_asked(error) if _predicates else None) or _classify(error)
    except Exception:  # noqa: BLE001 - hostile code, or no stack left
        return _UNKNOWN


def classify_response(response: object) -> Failure | None:
    """Say what a returned response means; never raises.

    An HTTP response is an object with an integer `status_code` (requests, httpx), or an integer
    `status` or `code` beside `headers` (aiohttp, urllib3, http.client).

    Args:
        response: What the function returned, anything at all.

    Returns:
        None unless it is a response with a status of 400 or more.

    Example:
        >>> classify_response(httpx.Response(503, headers={"Retry-After": "30"}))
        Failure(outcome='error', error_type='503', verdict='ignored', ... retry_after=30.0, ...)
    """
    try:
        if _predicates and (said := _asked(response)) is not None:
            return said
        answer = None if isinstance(response, type) else _answer_of(response)
        return None if answer is None else _failure(answer, str(answer.status))
    except Exception:  # noqa: BLE001 - what cannot be looked at is no response
        return None


def classify_status(status: int, retry_after: str | None = None) -> Failure | None:
    """Say what an HTTP status means, where there is no more of the response.

    Args:
        status: The status code.
        retry_after: The header of that name, if there was one.

    Returns:
        None for a status below 400.

    Example:
        >>> classify_status(429, "30").retry_after
        30.0
    """
    if status < 400:
        return None
    return _failure(_judge_status(status, _wait(retry_after)), str(status))


def classify_name(name: str, message: str = "") -> Failure:
    """Say what an exception means of which there is no more than the name; never raises.

    A name without a module may be that of several classes: what they have in common counts, and
    where they have nothing in common it is a failure of no known kind.

    Args:
        name: `httpx.ConnectError` or `ConnectError`, as in `exception.type` and `error.type`.
        message: What the exception said, if that is known.

    Returns:
        What everybody else goes by.

    Example:
        >>> classify_name("httpx.ConnectError").reason
        'connect'
    """
    try:
        module, _, short = name.rpartition(".")
        modules = (module,) if module else _CLIENT_MODULES
        kind = _in_common([k for k in (_kind_named(one, short, message) for one in modules) if k])
        own_name = plain_name(short) or "Exception"
        return _failure(_Judgement(kind), None if kind.outcome == "cancelled" else own_name)
    except Exception:  # noqa: BLE001 - anything may stand in a span
        return _UNKNOWN


def _asked(ended: object) -> Failure | None:
    """Return what the first predicate says that has something to say."""
    for predicate in tuple(_predicates):
        try:
            said = predicate(ended)
        except Exception:  # noqa: BLE001 - the user's predicate must not break the call
            from periscope_otel import guard  # it is heavier than what needs it so rarely

            guard.warn("classifier", "a predicate that was given to add_classifier() raised")
            continue
        if isinstance(said, Failure):
            return said
    return None


def _classify(error: BaseException) -> Failure:
    own_word = peek(error, "periscope_failure")
    if isinstance(own_word, Failure):
        return own_word
    if isinstance(error, BaseExceptionGroup):
        return _classify_group(error)
    code = peek(error, "code")
    if isinstance(error, SystemExit) and (code is None or (isinstance(code, int) and code == 0)):
        return Failure("ok", None, "ignored", retryable=False)
    own = _judge(error)
    if own.kind is _CANCELLED:
        return _failure(own, None)
    name = type_name(error) if own.status is None else str(own.status)
    return _failure(_look_inside(error, own), name)


def _classify_group(group: BaseExceptionGroup[BaseException]) -> Failure:
    """Judge a group by its worst member: failure over ignored, an error over a cancellation."""
    members = [classify(leaf) for leaf in _leaves(group)]
    errors = [member for member in members if member.outcome not in ("ok", "cancelled")]
    if members and not errors:
        return members[0]
    worst = max(errors, key=lambda m: (m.verdict == "failure", not m.retryable), default=_UNKNOWN)
    again = worst.retryable and all(member.retryable for member in errors)
    wait = max((m.retry_after for m in errors if m.retry_after is not None), default=None)
    return replace(worst, error_type=type_name(group), retryable=again, retry_after=wait)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yield the members of a group and of the groups in it, a bounded number of them."""
    waiting: list[BaseException] = [group]
    for _ in range(_MEMBERS):
        error = waiting.pop() if waiting else None
        own_word = isinstance(peek(error, "periscope_failure"), Failure)
        if isinstance(error, BaseExceptionGroup) and not own_word:
            waiting.extend(islice(error.exceptions, _MEMBERS))
        elif error is not None:
            yield error


class _Judgement(NamedTuple):  # of one exception or response, with what HTTP said
    kind: _Kind
    status: int | None = None
    retry_after: float | None = None


def _failure(judgement: _Judgement, error_type: str | None) -> Failure:
    outcome, verdict, retryable, reason, _ = judgement.kind
    return Failure(outcome, error_type, verdict, retryable, judgement.retry_after, reason)


def _judge(error: BaseException) -> _Judgement:
    """Judge one exception by itself: by the HTTP answer it carries, else by its class."""
    kind = _kind_of(error)
    carrier = None if kind is _CANCELLED else error
    return _answer_of(peek(carrier, "response")) or _answer_of(carrier) or _Judgement(kind)


def _kind_of(error: BaseException) -> _Kind:
    kind = _kind_of_class(type(error))
    if kind is _LOCAL and peek(error, "errno") in _NETWORK_ERRNOS:
        return _CONNECT
    return _refined(kind, _first_text(error)) if kind in _BY_TEXT else kind


def _kind_of_class(cls: type[BaseException]) -> _Kind:
    for base in cls.__mro__:
        kind = _BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    return _OTHER


def _refined(kind: _Kind, text: str) -> _Kind:
    starts, other = _BY_TEXT.get(kind, ((), kind))
    return other if text.startswith(starts) else kind


def _kind_named(module: str, name: str, message: str) -> _Kind | None:
    """Return what the class of a name means: what was raised here is loaded, so bases are known."""
    cls = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    if isinstance(cls, type) and issubclass(cls, BaseException):
        return _refined(_kind_of_class(cls), message)
    kind = _BY_NAME.get(f"{module}.{name}")
    return None if kind is None else _refined(kind, message)


def _in_common(kinds: list[_Kind]) -> _Kind:
    """Return what kinds of one name have in common; a failure of no known kind if nothing."""
    if len({(kind.outcome, kind.verdict) for kind in kinds}) != 1:
        return _OTHER
    first = kinds[0]
    reason = first.reason if all(kind.reason == first.reason for kind in kinds) else None
    return _Kind(first.outcome, first.verdict, all(kind.retryable for kind in kinds), reason)


def _look_inside(error: BaseException, own: _Judgement) -> _Judgement:
    """Follow wrappers inward, and take the verdict found there if it says more than `own`."""
    found = own
    for _ in range(_LEVELS):
        inner = _wrapped_in(error) if found.kind.wraps else None
        if found.kind is _OTHER:  # a stranger: the explicit cause only, a context may be anything
            inner = peek(error, "__cause__")
        if not isinstance(inner, BaseException):
            break
        error, found = inner, _judge(inner)
    # A bad value in there does not make a broken connection, or a stranger, harmless.
    return found if found.status is not None or found.kind.reason in _TRANSPORT else own


def _wrapped_in(error: BaseException) -> object:
    """Return the exception that a library's wrapper carries."""
    args = peek(error, "args")
    args = args[:4] if isinstance(args, tuple) else ()
    for inner in (peek(error, "reason"), *args, peek(error, "__cause__")):
        if isinstance(inner, BaseException):
            return inner
    # A context may be the user's business of before; an OSError is what the library wrapped.
    context = peek(error, "__context__")
    return context if isinstance(context, OSError) else None


def _answer_of(response: object) -> _Judgement | None:
    """Judge an HTTP answer of 400 or more; None if this is something else."""
    status = _status_of(response)
    if status is None:
        return None
    return _judge_status(status, _retry_after(peek(response, "headers")))


def _judge_status(status: int, wait: float | None) -> _Judgement:
    kind = _BY_STATUS.get(status) or (_SERVER if status >= 500 else _CLIENT)
    if status == 503 and wait is not None:
        kind = _RATE_LIMIT
    return _Judgement(kind, status, wait if kind.retryable else None)


def _status_of(response: object) -> int | None:
    """Return a status that means failure. `status` and `code` alone are anybody's attributes."""
    for name in ("status_code", "status", "code"):
        value = peek(response, name)
        is_failure = isinstance(value, int) and 400 <= value <= 999
        if is_failure and (name == "status_code" or peek(response, "headers") is not None):
            return int(value)
    return None


def _retry_after(headers: object) -> float | None:
    """Read Retry-After from headers of any kind; None if there is none."""
    try:
        for key, value in islice(peek(headers, "items")(), _HEADERS):
            if str(key).lower() == "retry-after":
                return _wait(value)
    except Exception:  # noqa: BLE001 - no mapping
        return None
    return None


def _wait(header: object) -> float | None:
    """Read seconds or an HTTP date (RFC 9110 section 10.2.3); None if unreadable."""
    try:
        text = "" if header is None else str(header).strip()[:64]  # no date is longer
        wait = float(text) if _NUMBER.fullmatch(text) else _date(text) - _now()
        return min(max(wait, 0.0), _LONGEST_WAIT)
    except Exception:  # noqa: BLE001 - no date
        return None


def _date(text: str) -> float:
    from datetime import UTC  # both are heavy, and dates are rare
    from email.utils import parsedate_to_datetime

    date = parsedate_to_datetime(text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _first_text(error: BaseException) -> str:
    args = peek(error, "args")
    return args[0] if isinstance(args, tuple) and args and type(args[0]) is str else ""
