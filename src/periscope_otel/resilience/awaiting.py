"""Permits whose span is about to end, and which breakers guard what runs now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from opentelemetry.context import create_key

if TYPE_CHECKING:
    from periscope_otel.resilience.circuit import Permit

GUARDED_KEY: Final = create_key("periscope-guarded")
"""The context key of the names of the breakers that guard monitored operations, a tuple."""

permits_by_span: Final[dict[int, Permit]] = {}
"""Permits that are settled at the end of their span, by its id."""


def await_end(span_id: int, permit: Permit) -> None:
    """Have a permit settled at the end of its span, which comes next."""
    permits_by_span[span_id] = permit


def settle_awaiting(span_id: int) -> bool:
    """Settle the permit of a span, if there is one that waits for it."""
    permit = permits_by_span.pop(span_id, None)
    return permit is not None and permit.settle()
