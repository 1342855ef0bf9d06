"""Letters of what fails: everything that is known when it does, put together."""

from __future__ import annotations

import os
import platform
import socket
import time
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanContext

from periscope_otel.dead_letter.identity import LetterIds, content_key, fingerprint
from periscope_otel.dead_letter.letter import Letter, pack
from periscope_otel.failure import message_of, stack_text
from periscope_otel.redaction import clean_name, redact
from periscope_otel.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from periscope_otel.dead_letter.codecs import Encoded

letter_ids: Final = LetterIds()
"""Makes the ids of this process's letters."""

ABANDONED: Final = "abandoned"
"""The `error.type` of a payload whose process died while it worked on it."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=letter_ids.after_fork)


class Origin(NamedTuple):
    """Where a letter comes from."""

    operation: str
    feed: str | None
    queue: str
    span: SpanContext = INVALID_SPAN_CONTEXT
    headers: Mapping[str, str] = MappingProxyType({})
    attempts: int = 1


class Cause(NamedTuple):
    """Why something failed."""

    error_type: str | None
    message: str
    stack: str
    fingerprint: str
    not_before: float = 0.0


def cause_of(
    operation: str, error_type: str | None, error: object, retry_after: float | None = None
) -> Cause:
    """Return why something failed, made harmless and bounded.

    Args:
        operation: The operation's name.
        error_type: As in telemetry.
        error: The exception, a text, or a response that means failure.
        retry_after: Seconds that the peer asked to wait.
    """
    not_before = 0.0 if retry_after is None else time.time() + retry_after
    if isinstance(error, BaseException):
        message = message_of(error)
        stack = stack_text(error, message=message)
    else:
        message, stack = _told(error), ""
    cause = fingerprint(operation, error_type, error if stack else message)
    return Cause(error_type, message, stack, cause, not_before)


def _told(error: object) -> str:
    if error is None:
        return ""
    return redact(error) if isinstance(error, str) else clean_name(type(error).__name__)


def letter_of(
    origin: Origin,
    encoded: Encoded,
    cause: Cause | None,
    *,
    tlp: str | None = None,
    letter_id: str | None = None,
    key: str | None = None,
    batch_id: str | None = None,
    item_index: int | None = None,
) -> Letter:
    """Return the letter of a payload.

    Args:
        origin: Where it comes from.
        encoded: The payload.
        cause: Why it failed; None as long as it has not.
        tlp: The marking of the payload.
        letter_id: A new one by default.
        key: The caller's idempotency key; of the content by default.
        batch_id: What the item letters of one operation have in common.
        item_index: The item's number among them.
    """
    now = time.time()
    packed = pack(encoded.payload)
    traced = _trace_of(origin.span)
    failed = {} if cause is None else fields_of(cause, now)
    return Letter(
        id=letter_id or letter_ids.new(),
        operation=origin.operation,
        codec=encoded.codec,
        queue=origin.queue,
        feed=origin.feed,
        key=key or content_key(origin.operation, origin.feed, packed["sha256"]),
        content_type=encoded.content_type,
        replayable=encoded.not_replayable_because is None,
        not_replayable_because=encoded.not_replayable_because,
        headers=dict(origin.headers),
        attempts=origin.attempts,
        first_failed_at=now,
        host=host_name(),
        pid=os.getpid(),
        versions=_versions(),
        tlp=tlp,
        batch_id=batch_id,
        item_index=item_index,
        **{"last_failed_at": now, **packed, **traced, **failed},
    )


def fields_of(cause: Cause, now: float) -> dict[str, Any]:
    """Return the fields of a letter that say why it failed, and when."""
    return {
        "error_type": cause.error_type,
        "error_message": cause.message,
        "error_stack": cause.stack,
        "fingerprint": cause.fingerprint,
        "last_failed_at": now,
        "not_before": cause.not_before,
    }


def abandoned(letter: Letter, now: float) -> Letter:
    """Return the letter of a payload whose process died while it worked on it."""
    told = f"process {letter.pid} on {letter.host} ended without a result"
    cause = cause_of(letter.operation, ABANDONED, "the process ended without a result")
    return letter.changed(**fields_of(cause._replace(message=told), now))


def _trace_of(span: SpanContext) -> dict[str, str | None]:
    """Return a span's place in its trace as headers carry it (W3C Trace Context, section 3)."""
    if not span.is_valid:
        return {"traceparent": None, "tracestate": None}
    parent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    return {"traceparent": parent, "tracestate": span.trace_state.to_header() or None}


@cache
def host_name() -> str:
    """Return this machine's name."""
    return clean_name(socket.gethostname())


@cache
def _versions() -> str:
    return f"periscope-otel {__version__}; {platform.python_implementation()} " + (
        platform.python_version()
    )
