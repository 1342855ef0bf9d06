"""Breakers that learn from spans: those of monitored operations, and of other instrumentations.

It runs wherever a span begins or ends, so it takes no lock of its own, writes nothing and raises
nothing. What has to be remembered of open client spans is in `awaiting`, once for the process: two
processors, on one provider or on two, count a call once.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from opentelemetry.context import (
    _SUPPRESS_HTTP_INSTRUMENTATION_KEY as SUPPRESS_HTTP_KEY,
)
from opentelemetry.context import (
    _SUPPRESS_INSTRUMENTATION_KEY as SUPPRESS_KEY,
)
from opentelemetry.context import get_current
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind

from periscope_otel import guard
from periscope_otel.failure import Failure
from periscope_otel.redaction import clean_name
from periscope_otel.resilience.awaiting import (
    OpenSpan,
    open_spans,
    permits_by_span,
    remember,
    settle_awaiting,
)
from periscope_otel.resilience.breaker import Breaker, breakers
from periscope_otel.resilience.circuit import moves
from periscope_otel.resilience.client_spans import dependency_of, failure_of
from periscope_otel.resilience.guards import guarding
from periscope_otel.telemetry.names import SCOPE
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span

_CLIENT: Final = SpanKind.CLIENT
_DEEPEST: Final = 16
"""Client spans in each other that are looked at."""

_UNREADABLE: Final = Failure("error", None, "ignored", retryable=False)


class BreakerSpanProcessor(SpanProcessor):
    """Settles the permits of monitored operations, and watches client spans of other libraries.

    A client span counts on the breaker that is named as its host (`breakers.get("host")`), and
    only if nothing else counts the call: a guard of that breaker around it, or a client span for
    the same dependency that it is nested in. Spans are seen only if they are recorded: see
    `RecordOnlySampler`. It has to run where spans begin and end, as the SDK's default has it:
    threads of a `ConcurrentMultiSpanProcessor` cannot see what guards the caller.

    Args:
        matcher: Gives the name of a client span's breaker; None if it is not to be counted. It is
            asked as the span begins, and once more at its end if it had nothing to say: some
            instrumentations set attributes late. By default the span's host counts.

    Example:
        >>> provider = TracerProvider(sampler=RecordOnlySampler(DEFAULT_ON))
        >>> provider.add_span_processor(BreakerSpanProcessor())
    """

    def __init__(self, matcher: Callable[[ReadableSpan], str | None] | None = None) -> None:
        self._name_of = dependency_of if matcher is None else matcher
        self._is_shut_down = False

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Take a permit for a client span, if its dependency is known already."""
        try:
            if open_spans or span.kind is _CLIENT:
                self._begin(span, parent_context)
        except Exception as error:  # noqa: BLE001 - in the caller's path
            _contain(error)

    def on_end(self, span: ReadableSpan) -> None:
        """Settle the permit of a span."""
        try:
            if open_spans or permits_by_span:
                self._end(span)
        except Exception as error:  # noqa: BLE001 - in the caller's path
            _contain(error)

    def shutdown(self) -> None:
        """Take no further spans into account; those that are open are still settled."""
        self._is_shut_down = True

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002
        """Return True: everything is done by the time a span has ended."""
        return True

    def _begin(self, span: Span, parent_context: Context | None) -> None:
        parent = span.parent
        above = None if parent is None or parent.is_remote else open_spans.get(parent.span_id)
        is_client = span.kind is _CLIENT
        if not is_client and above is None:
            return
        span_id = span.get_span_context().span_id
        if self._is_shut_down or span_id in open_spans:  # or another processor was first
            return
        context = get_current() if parent_context is None else parent_context
        if is_client and _is_of_a_dependency(span, context):
            opened = OpenSpan(span_id, _with_those_above(above), span, guarding(context))
            self._look_at(opened, span)
            remember(span_id, opened)
        elif above is not None:  # what is beneath this one is beneath that one
            remember(span_id, above)

    def _look_at(self, opened: OpenSpan, span: ReadableSpan) -> None:
        """Take a permit for a span that has begun; its name may come later."""
        breaker = self._breaker_of(span)
        if breaker is None:
            opened.began, opened.moves = time.monotonic(), moves[0]
            opened.counted_below = []
            return
        opened.breaker = breaker
        if self._counts(opened, breaker):
            opened.permit = breaker.watch()

    def _end(self, span: ReadableSpan) -> None:
        context = span.context
        if context is None:  # of no span that this SDK makes
            return
        span_id = context.span_id
        if permits_by_span:
            settle_awaiting(span_id)
        opened = open_spans.pop(span_id, None)
        if opened is None or opened.span_id != span_id:
            return
        if opened.breaker is None:
            self._look_again(opened, span)
        opened.above, opened.span = (), None
        permit = opened.permit
        if permit is None:
            return
        failure: Failure | None = _UNREADABLE
        try:
            failure = failure_of(span)
        finally:
            permit.conclude(failure, context)
            permit.settle()

    def _look_again(self, opened: OpenSpan, span: ReadableSpan) -> None:
        """Take the permit now that attributes have come which were not there at the beginning."""
        breaker = opened.breaker = self._breaker_of(span)
        if breaker is not None and self._counts(opened, breaker):
            seconds = time.monotonic() - opened.began
            opened.permit = breaker.watch(seconds=seconds, moves_before=opened.moves)

    def _breaker_of(self, span: ReadableSpan) -> Breaker | None:
        given = self._name_of(span)
        name = clean_name(given) if isinstance(given, str) else ""
        return breakers.watched(name) if name else None

    def _counts(self, opened: OpenSpan, breaker: Breaker) -> bool:
        """Whether a span counts on a breaker: nothing else may count the same call."""
        if breaker.name in opened.guarded or breaker in (opened.counted_below or ()):
            return False
        unnamed = []
        for one in opened.above:
            span = one.span
            named = one.breaker
            if named is None and span is not None:  # it may have its attributes by now
                named = self._breaker_of(span)
                unnamed.append(one)
            if named is breaker:
                return False
        for one in unnamed:
            if one.counted_below is not None and len(one.counted_below) < _DEEPEST:
                one.counted_below.append(breaker)
        return True


def _is_of_a_dependency(span: Span, context: Context) -> bool:
    """Whether a client span is another library's, and not one that was asked to be quiet."""
    if context.get(SUPPRESS_KEY) or context.get(SUPPRESS_HTTP_KEY):
        return False
    scope = span.instrumentation_scope
    return scope is None or scope.name != SCOPE


def _with_those_above(above: OpenSpan | None) -> tuple[OpenSpan, ...]:
    return () if above is None else (above, *above.above)[:_DEEPEST]


# Errors of our own, which the worker reports: a handler of the log may be slow.
MOST_ERRORS: Final = 100
_errors: Final[deque[Exception]] = deque()


def _contain(error: Exception) -> None:
    if guard.is_strict():
        raise error
    if len(_errors) < MOST_ERRORS:  # else as many reports are on their way already
        _errors.append(error)
        worker.post(_report)
        with suppress(RuntimeError):  # no thread can be started: at the end of the interpreter
            worker.start()


def _report() -> None:
    while _errors:
        guard.report("breaker span processor", _errors.popleft())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_errors.clear)
