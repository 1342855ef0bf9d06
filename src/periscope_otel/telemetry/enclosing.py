"""Which operation encloses the code that runs: where it is kept, and how lower rooms read it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry.context import create_key, get_current

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from periscope_otel.telemetry.series import Series

OPERATION_KEY = create_key("periscope-operation")
"""The context key of the enclosing operation."""

UNOBSERVED: ContextVar[Any] = ContextVar("periscope-unobserved", default=None)
"""The current operation where there is no SDK, and so no span that it would have to travel with:
a variable costs a fifth of a new OpenTelemetry context."""


class Enclosing(Protocol):
    """What a lower room needs of an operation."""

    span: Span
    series: Series | None


def enclosing() -> Enclosing | None:
    """Return the operation that encloses the caller; None outside of any."""
    operation: Enclosing | None = get_current().get(OPERATION_KEY) or UNOBSERVED.get()  # type: ignore[assignment]
    return operation
