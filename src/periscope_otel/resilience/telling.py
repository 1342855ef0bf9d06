"""What becomes of a transition: a short span, linked to the call that caused it, and a log line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind

from periscope_otel.telemetry import names
from periscope_otel.telemetry.current import current, discover

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

    from periscope_otel.resilience.transition import Transition

logger = logging.getLogger("periscope_otel")

_WORSE = ("open", "forced_open")

_BECAUSE = {
    "consecutive_failures": "calls failed one after the other",
    "failure_rate": "too many of the calls failed",
    "consecutive_slow": "calls were slow one after the other",
    "slow_rate": "too many of the calls were slow",
    "auth": "the credentials are refused",
    "rate_limit": "it was asked to wait",
    "probing": "the open time is over",
    "probe_failed": "a probe failed",
    "recovered": "probes succeeded",
    "manual": "set by hand",
}


def tell(transition: Transition) -> None:
    """Emit the span and the log line; called in the worker's thread."""
    _emit_span(transition)
    _log(transition)


def _emit_span(transition: Transition) -> None:
    """Emit a span of its own: that of the call has ended, and takes no more events."""
    telemetry = current.telemetry or discover()
    if telemetry is None:
        return
    attributes: dict[str, AttributeValue] = {
        names.BREAKER_NAME: transition.name,
        names.BREAKER_FROM: transition.from_state,
        names.BREAKER_TO: transition.to_state,
        names.BREAKER_REASON: transition.reason,
        names.BREAKER_ADOPTED: transition.adopted,
    }
    if transition.open_for is not None:
        attributes[names.BREAKER_OPEN_FOR] = transition.open_for
    if transition.error_type is not None:
        attributes[names.ERROR_TYPE] = transition.error_type
    links = None if transition.span_context is None else [Link(transition.span_context)]
    span = telemetry.start_span(
        names.BREAKER_TRANSITION_SPAN, Context(), SpanKind.INTERNAL, attributes, links
    )
    span.end()


def _log(transition: Transition) -> None:
    level = logging.WARNING if transition.to_state in _WORSE else logging.INFO
    logger.log(
        level,
        "breaker %s %s %s: %s%s%s%s",
        transition.name,
        "would be" if transition.would_be else "is",
        transition.to_state,
        _BECAUSE.get(transition.reason, transition.reason),
        f" ({transition.error_type})" if transition.error_type else "",
        "" if transition.open_for is None else f"; for {_seconds(transition.open_for)}",
        "; as another process found" if transition.adopted else "",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
