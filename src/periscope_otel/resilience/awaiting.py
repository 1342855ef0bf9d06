"""What has begun and not ended: permits that their span's end settles, and open client spans.

It needs no SDK: operations fill it in, and a span processor, if there is one, comes first.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from periscope_otel.failure import Failure

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from periscope_otel.resilience.circuit import Circuit, Permit

MOST_OPEN: Final = 10_000
"""Open spans that are remembered; one more, and the oldest is taken for one that never ends."""

_FORGOTTEN: Final = Failure("error", None, "ignored", retryable=False)

permits_by_span: Final[dict[int, Permit]] = {}
"""Permits of operations whose span is about to end, by the span's id."""


def await_end(span_id: int, permit: Permit) -> None:
    """Have the end of a span settle a permit, which has been told how the call ended.

    Args:
        span_id: Of the operation's span. The permit is settled at once if that is 0, which is no
            span, or if another permit waits for the same span.
        permit: The permit, concluded.

    Example:
        >>> permit.conclude(failure, span.get_span_context())
        >>> await_end(span_id, permit)
        >>> span.end()
        >>> settle_awaiting(span_id)
    """
    if not span_id or permits_by_span.setdefault(span_id, permit) is not permit:
        permit.settle()


def settle_awaiting(span_id: int) -> None:
    """Settle the permit that waits for the end of this span, if nobody has.

    Args:
        span_id: Of a span that has ended.

    Example:
        >>> settle_awaiting(span.get_span_context().span_id)
    """
    permit = permits_by_span.pop(span_id, None)
    if permit is not None:
        permit.settle()


class OpenSpan:
    """A client span that has begun, and what is to be known about it at its end.

    Args:
        span_id: Its own id; spans beneath it that are no client spans stand under theirs too.
        above: The client spans that it is nested in, the nearest first.
        span: The span, while it is open.
        guarded: Names of the breakers that guard it.
    """

    __slots__ = (
        "above", "began", "breaker", "counted_below", "guarded", "moves", "permit", "span",
        "span_id",
    )  # fmt: skip

    def __init__(
        self,
        span_id: int,
        above: tuple[OpenSpan, ...],
        span: ReadableSpan,
        guarded: tuple[str, ...],
    ) -> None:
        self.span_id = span_id
        self.above = above
        self.span: ReadableSpan | None = span
        self.guarded = guarded
        self.breaker: Circuit | None = None
        """That of its dependency, once it is known; also where another call of it is counted."""
        self.permit: Permit | None = None
        self.counted_below: list[Circuit] | None = None
        """Breakers that count a span nested in this one, while its own was not known."""
        self.moves = 0
        self.began = 0.0

    def forget(self) -> None:
        """Give back what it holds: it never ends."""
        self.above, self.span = (), None
        if self.permit is not None:
            self.permit.settle(_FORGOTTEN)


open_spans: Final[OrderedDict[int, OpenSpan]] = OrderedDict()
"""Client spans that have begun, and spans of other kinds beneath them, by id, the oldest first."""


def remember(span_id: int, opened: OpenSpan) -> None:
    """Keep what is known about an open span until it ends."""
    open_spans[span_id] = opened
    if len(open_spans) > MOST_OPEN:
        oldest, forgotten = open_spans.popitem(last=False)
        if oldest == forgotten.span_id:
            forgotten.forget()


def _after_fork_in_child() -> None:
    permits_by_span.clear()
    open_spans.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
