"""How an operation ends: its outcome, and what its span says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import Span, Status, StatusCode

from periscope_otel.failure import Failure, message_of, stack_text
from periscope_otel.redaction import clean_name
from periscope_otel.telemetry import names

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

    from periscope_otel.items import ItemAccount

REFUSED_TYPE = "CircuitOpenError"
"""The `error.type` of an operation that its breaker did not let begin."""

CANCELLED = Failure(
    outcome="cancelled", error_type=None, verdict="ignored", retryable=False, retry_after=None
)

UNTYPED_FAILURE = Failure(
    # `_OTHER` is what the semantic conventions put into `error.type` for want of a better value.
    outcome="error",
    error_type="_OTHER",
    verdict="failure",
    retryable=False,
    retry_after=None,
)

SUCCESSES = frozenset({"ok", "partial"})
FAILURES = frozenset({"error", "timeout", "rejected"})


def outcome_of(failure: Failure | None, account: ItemAccount | None, failed_before: int) -> str:
    """Return how it ended; items that failed in attempts that were followed by one are past."""
    if failure is not None and failure.outcome != "ok":
        return failure.outcome
    if account is not None and (account.failed > failed_before or account.unaccounted):
        return "partial"
    return "ok"


def item_attributes(account: ItemAccount) -> dict[str, AttributeValue]:
    """Return how items add up, as attributes of a span."""
    attributes: dict[str, AttributeValue] = {
        names.ITEMS_RECEIVED: account.received,
        names.ITEMS_CONVERTED: account.converted,
        names.ITEMS_INGESTED: account.ingested,
        names.ITEMS_SKIPPED: account.skipped,
        names.ITEMS_FAILED: account.failed,
        names.ITEMS_UNACCOUNTED: account.unaccounted,
    }
    if account.excess:
        attributes[names.ITEMS_EXCESS] = account.excess
    return attributes


def record_exception(span: Span, error: BaseException) -> None:
    """Set the status; and the event, if no inner operation of this trace has recorded it."""
    if not span.is_recording():
        return
    message = message_of(error)
    name = clean_name(type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, f"{name}: {message}" if message else name))
    if _first_to_record(error, span.get_span_context().trace_id):
        span.add_event(
            names.EXCEPTION_EVENT,
            {
                names.EXCEPTION_TYPE: _full_name(error),
                names.EXCEPTION_MESSAGE: message,
                names.EXCEPTION_STACKTRACE: stack_text(error),
            },
        )


def record_refusal(span: Span, error: BaseException | None) -> None:
    """Set the status alone: the span began with all else, and the stack would tell nothing."""
    if error is not None and span.is_recording():
        span.set_status(Status(StatusCode.ERROR, str(error)))
        _first_to_record(error, span.get_span_context().trace_id)


def describe_item_failure(span: Span, error: BaseException) -> None:
    """Tell of an item that failed."""
    span.add_event(
        names.ITEM_FAILED_EVENT,
        {names.EXCEPTION_TYPE: _full_name(error), names.EXCEPTION_MESSAGE: message_of(error)},
    )


def _full_name(error: BaseException) -> str:
    """Return the type as `exception.type` wants it: with its module, unless it is built in."""
    cls = type(error)
    name = (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )
    return clean_name(name)


def _first_to_record(error: BaseException, trace_id: int) -> bool:
    """Whether no operation of this trace has recorded `error` yet; marks it as recorded.

    The mark is an attribute of the exception: an exception of a built-in type takes no weak
    reference, and a strong one would keep the frames with all their locals alive.
    """
    if error.__dict__.get(_RECORDED_IN) == trace_id:
        return False
    # The base's setter: a frozen exception class may forbid its own.
    BaseException.__setattr__(error, _RECORDED_IN, trace_id)
    return True


_RECORDED_IN = "_periscope_recorded_in"
