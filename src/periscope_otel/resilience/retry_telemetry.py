"""What is told of a retry: an event on the span of what is tried again, and a count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry import trace

from periscope_otel import guard
from periscope_otel.telemetry import names
from periscope_otel.telemetry.attributes import clean_label
from periscope_otel.telemetry.current import current, discover
from periscope_otel.telemetry.enclosing import enclosing

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from periscope_otel.failure import Failure
    from periscope_otel.telemetry.series import Series


def tell_of_retry(
    span: Span, series: Series | None, attempt: int, wait: float, failure: Failure
) -> None:
    """Put a retry on the span of what is tried again, and count it.

    Args:
        span: That of the operation, or whatever else is current.
        series: What it is counted under; it is not counted without.
        attempt: The number of the attempt that failed, from 1.
        wait: Seconds until the next one.
        failure: Why it failed.
    """
    with guard.contained("retry telemetry"):
        if span.is_recording():
            span.add_event(names.RETRY_EVENT, _attributes(attempt, wait, failure))
        telemetry = current.telemetry or discover()
        if telemetry is not None and series is not None:
            telemetry.instruments.count_retry(series, failure.error_type)


def tell_where_it_is(name: str, attempt: int, wait: float, failure: Failure) -> None:
    """Tell of a retry on the current span, counted under the enclosing operation.

    Args:
        name: What is tried again, to be counted under outside of any operation.
        attempt: The number of the attempt that failed, from 1.
        wait: Seconds until the next one.
        failure: Why it failed.
    """
    with guard.contained("retry telemetry"):
        operation = enclosing()
        series = None if operation is None else operation.series
        telemetry = current.telemetry or discover()
        if series is None and telemetry is not None:
            series = telemetry.instruments.labels.series(clean_label(name), None)
        tell_of_retry(trace.get_current_span(), series, attempt, wait, failure)


def _attributes(attempt: int, wait: float, failure: Failure) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        names.RETRY_ATTEMPT: attempt,
        names.RETRY_WAIT: round(wait, 3),
    }
    if failure.error_type is not None:
        attributes[names.ERROR_TYPE] = failure.error_type
    if failure.reason is not None:
        attributes[names.RETRY_REASON] = failure.reason
    return attributes
