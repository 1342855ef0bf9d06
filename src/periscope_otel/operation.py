"""One ingest operation, from begin to settle.

The Operation lives in the OpenTelemetry context beside its span, so one attach carries both
wherever the span goes. It settles exactly once: whoever takes it out of the set of live operations
settles it, whether that is a return, an exception, a finaliser or the end of the process.
"""

from __future__ import annotations

import contextvars
import time
from typing import TYPE_CHECKING, Any, overload

from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    set_span_in_context,
)

from periscope_otel import guard
from periscope_otel.dead_letter.replaying import REPLAYING
from periscope_otel.ending import (
    CANCELLED,
    FAILURES,
    REFUSED_TYPE,
    SUCCESSES,
    UNTYPED_FAILURE,
    describe_item_failure,
    item_attributes,
    outcome_of,
    record_exception,
    record_refusal,
)
from periscope_otel.failure import Failure, classify, classify_response
from periscope_otel.items import (
    CLOSED_LEDGER,
    FAILED,
    INGESTED,
    SKIPPED,
    ItemAccount,
    ItemLedger,
)
from periscope_otel.redaction import redact
from periscope_otel.resilience.awaiting import await_end, settle_awaiting
from periscope_otel.resilience.guards import GUARDED, GUARDED_KEY
from periscope_otel.telemetry import names
from periscope_otel.telemetry.attributes import clean_attribute
from periscope_otel.telemetry.enclosing import OPERATION_KEY, UNOBSERVED
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from opentelemetry.util.types import AttributeValue

    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.telemetry.current import Telemetry
    from periscope_otel.telemetry.series import Series

    _Item = TypeVar("_Item")

SPAN_KEY = next(iter(set_span_in_context(INVALID_SPAN, Context())))
"""The API's own context key of the current span, learnt from its public setter: with it one copy
of the context takes both the span and the operation."""

_ITEM_EVENTS = 8
"""Failed items of one operation that are described in its span; all are counted."""


class Operation:
    """One ingest operation: its span, its account of items, and how it ended.

    Made by `monitored` and `operation`, read with `current_operation`; not built by hand.
    """

    # What most operations never set is a default of the class: it costs nothing there.
    span: Span = INVALID_SPAN
    """The OpenTelemetry span; a non-recording one without an SDK."""
    series: Series | None = None
    """The operation and feed that metrics are counted under."""
    outcome: str | None = None
    """How it ended (`ok`, `error`, `timeout`, `cancelled`, `rejected`, `partial`); None before."""
    context: Context | None = None
    """The OpenTelemetry context in which it is the current operation; None without an SDK."""
    is_plain = True
    """Whether there is nothing to settle: no telemetry, no items, no failure and no permit."""
    breaker: Breaker | None = None
    """The breaker that guards it."""
    permit: Permit | None = None
    """What its breaker has given it; that of the last attempt, where there were several."""
    refused = False
    """Whether its breaker gave it none, so that no call was made."""
    last_attempt: tuple[Failure, BaseException | None] | None = None
    """How the attempt ended that is to be followed by another one, until that begins."""
    attempts = 1
    """How many attempts it has taken so far."""
    _telemetry: Telemetry | None = None
    token: contextvars.Token[Any] | None = None
    _guarding: contextvars.Token[Any] | None = None
    _resumed_at: float = 0.0
    _seconds: float = 0.0
    _ledger: ItemLedger | None = None
    failure: Failure | None = None
    """What `fail` was told, and so how it will end if nothing is raised."""
    _item_events: int = 0
    _posted: bool = False
    _suspended_at: float = 0.0
    _resume_in: Operation | None = None
    _consumer_seconds: float | None = None
    _failed_before = 0
    _key: str | None = None

    def __init__(self, name: str, feed: str | None) -> None:
        self.name = name
        self.feed = feed

    def __repr__(self) -> str:
        state = self.outcome or "live"
        return f"<Operation {self.name!r} feed={self.feed!r} {state}>"

    # What the user calls.

    @property
    def idempotency_key(self) -> str | None:
        """What the payload is known by, on each try of it; None without dead letters, unless set.

        In the replay of a dead letter it is the letter's. Give it to whatever stores the payload,
        and a payload that comes twice is stored once.
        """
        replaying = REPLAYING.get()
        return self._key if replaying is None else replaying.key

    @idempotency_key.setter
    def idempotency_key(self, key: str) -> None:
        # Half a character in it would keep the letter from being written.
        self._key = str(key).encode(errors="replace").decode()

    @property
    def items(self) -> ItemAccount:
        """How the items add up so far; final once the operation has settled."""
        return ItemAccount() if self._ledger is None else self._ledger.account()

    def received(self, count: int = 1) -> None:
        """Count items that came in: each should later be ingested, skipped or failed.

        Args:
            count: How many; a whole number from 0 up.
        """
        self._items().receive(count)

    def converted(self, count: int = 1) -> None:
        """Count items that were converted; a step on the way, it settles no item."""
        self._items().convert(count)

    def ingested(self, count: int = 1) -> None:
        """Count items that reached their destination."""
        self._items().settle(INGESTED, count)

    def skipped(self, count: int = 1, *, reason: str | None = None) -> None:
        """Count items that were left out on purpose.

        Args:
            count: How many.
            reason: Why, one of a few fixed words such as `"no_content"`: it becomes a label.
        """
        self._items().settle(SKIPPED, count, reason)

    def failed(
        self,
        item: object = None,  # noqa: ARG002  (its content never goes into telemetry)
        error: BaseException | None = None,
        *,
        count: int = 1,
    ) -> None:
        """Count items that could not be ingested; the outcome becomes `partial`.

        Args:
            item: The item; its content is never put into telemetry.
            error: Why; the first few are described in the span.
            count: How many items this is about.
        """
        self._items().settle(FAILED, count)
        if error is not None:
            self._describe_item_failure(error)

    def fail(self, error: BaseException | str | object) -> None:
        """Mark the operation as failed although nothing is raised.

        Args:
            error: What went wrong: an exception, a response object with an HTTP status, or a text.
        """
        self.is_plain = False
        with guard.contained("operation.fail"):
            if isinstance(error, BaseException):
                breaker = self.breaker
                self.failure = classify(error) if breaker is None else breaker.failure_of(error)
                if self.failure.outcome in FAILURES:
                    record_exception(self.span, error)
            else:
                self.failure = classify_response(error) or UNTYPED_FAILURE
                description = redact(error) if isinstance(error, str) else None
                self.span.set_status(Status(StatusCode.ERROR, description))

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        """Set a span attribute; texts are made harmless, as everything that the plugin emits."""
        with guard.contained("operation.set_attribute"):
            self.span.set_attribute(*clean_attribute(key, value))

    @overload
    def track(self, items: Iterable[_Item], *, total: int | None = None) -> Iterator[_Item]: ...
    @overload
    def track(
        self, items: AsyncIterable[_Item], *, total: int | None = None
    ) -> AsyncIterator[_Item]: ...
    def track(self, items: Any, *, total: int | None = None) -> Any:
        """Iterate over items, counting each as received as it is handed out.

        On a terminal a progress bar is shown on standard error; elsewhere nothing.

        Args:
            items: Any iterable or async iterable.
            total: How many there are, if `len(items)` does not tell.

        Example:
            >>> for item in op.track(feed.items()):
            ...     store(item)
        """
        from periscope_otel import progress

        if hasattr(items, "__aiter__"):
            return progress.track_async(self, items, total)
        return progress.track(self, items, total)

    # Begin, suspend, resume, settle: what the wrappers call.

    @property
    def letters_waiting(self) -> bool:
        """Whether a coroutine has to await `deliver`."""
        return False

    def settle_attempt(self, failure: Failure, error: BaseException | None) -> None:
        """Tell the breaker of an attempt that has ended and may be followed by another one."""
        permit = self.permit
        if permit is not None and permit.outcome is None:
            with guard.contained("breaker"):
                permit.conclude(self._verdict(permit, failure, error), self.span.get_span_context())
                permit.settle()

    def begin_again(self, permit: Permit | None) -> None:
        """Begin a further attempt: what the one before has counted stays, what it said is void."""
        self.permit = permit
        self.failure = self.last_attempt = None
        if self._ledger is not None:
            self._failed_before = self._ledger.begin_again()

    @property
    def journal_waiting(self) -> bool:
        """Whether a coroutine has to await `write_journal`."""
        return False

    async def write_journal(self) -> None:
        """Write the payload down before the first attempt; see `LetteredOperation`."""

    async def deliver(self) -> None:
        """Write dead letters that a coroutine left to be awaited; see `LetteredOperation`."""

    def start(
        self,
        telemetry: Telemetry,
        parent: Context,
        kind: SpanKind,
        attributes: Mapping[str, AttributeValue],
        links: Sequence[Link] | None = None,
    ) -> None:
        """Start the span as a child of what `parent` holds, and count the operation as live."""
        self._telemetry = telemetry
        self.series = telemetry.instruments.labels.series(self.name, self.feed)
        try:
            self.span = telemetry.start_span(self.name, parent, kind, attributes, links)
        except Exception as error:  # noqa: BLE001  (a span processor raised: count without a span)
            guard.report("start_span", error)
        context = parent | {SPAN_KEY: self.span, OPERATION_KEY: self}
        if self.permit is not None:
            guards: Any = parent.get(GUARDED_KEY, ())
            context[GUARDED_KEY] = (*guards, self)
        self.context = Context(context)
        self.is_plain = False
        telemetry.live.add(self)

    def enter(self) -> None:
        """Make this the current operation and let its time run; not again once it has settled."""
        if self.outcome is not None:
            return
        if self.context is None:
            self.token = UNOBSERVED.set(self._resume_in or self)
        else:
            self.token = attach(self.context)
        if self.permit is not None:
            self._guarding = GUARDED.set((*GUARDED.get(), self))
        if self._telemetry is not None:
            self._resumed_at = self._telemetry.clock()

    def leave(self) -> None:
        """Stop its time and make current what was current before; once for each `enter`."""
        token = self.token
        if token is None:
            return
        self.token = None
        if self._guarding is not None:
            _restore(self._guarding)
            self._guarding = None
        if self._telemetry is not None:
            self._seconds += self._telemetry.clock() - self._resumed_at
        try:
            token.var.reset(token)
        except Exception:  # noqa: BLE001  (another kind of token, or another context)
            _restore(token)

    def finish(self) -> None:
        """Leave and settle an operation that raised nothing."""
        if self.is_plain:
            # As in CallSite.begin: without an SDK this is nearly all that a call costs.
            self.outcome = "ok"
            try:
                UNOBSERVED.reset(self.token)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                return  # not entered, or in another context: there is nothing to restore
            return
        self.leave()
        self.settle()

    def suspend(self) -> None:
        """Leave at a `yield`: what follows is the consumer's time."""
        # The body may have made something else current, such as a span around its yield.
        if self.context is None:
            self._resume_in = UNOBSERVED.get()
        else:
            self.context = get_current()
        self.leave()
        if self.permit is not None:
            self.permit.pause()
        if self._telemetry is not None:
            self._suspended_at = self._telemetry.clock()

    def resume(self) -> None:
        """Enter again, or for the first time."""
        if self._telemetry is not None:
            consumed = self._consumer_seconds
            if consumed is None:
                self._consumer_seconds = 0.0
            else:
                self._consumer_seconds = consumed + self._telemetry.clock() - self._suspended_at
        if self.permit is not None:
            self.permit.resume()
        self.enter()

    def settle(
        self,
        failure: Failure | None = None,
        error: BaseException | None = None,
        *,
        ended_at: int | None = None,
    ) -> None:
        """End the operation once; later calls, and those of another process, do nothing.

        Args:
            failure: What went wrong; None if nothing did.
            error: The exception to record, if the failure is one.
            ended_at: Unix nanoseconds; now by default.
        """
        telemetry = self._telemetry
        if telemetry is None:
            self._settle_without_telemetry(failure, error)
            return
        if telemetry.inherited:
            return
        try:
            telemetry.live.remove(self)
        except KeyError:
            return
        try:
            outcome, error_type = "ok", None
            # From here on nothing is counted: without a ledger a closed one takes its place.
            ledger = self.__dict__.setdefault("_ledger", CLOSED_LEDGER)
            if self.refused:
                outcome, error_type = "rejected", REFUSED_TYPE
                record_refusal(self.span, error)
            elif (
                failure is not None
                or self.failure is not None
                or ledger is not CLOSED_LEDGER
                or self._consumer_seconds is not None
                or self.attempts > 1
            ):
                outcome, error_type = self._describe(failure, error)
        except Exception as own_error:  # noqa: BLE001
            guard.report("operation.settle", own_error)
            known = failure or self.failure
            outcome, error_type = ("ok", None) if known is None else (known.outcome, None)
        self._closing(outcome, failure or self.failure, error)  # whatever came of the span
        self.last_attempt = None  # or its traceback would refer to this, and this to it
        self.outcome = outcome
        # The context refers to this operation: without the circle it is freed at once.
        self.context = None
        permit = self.permit
        if permit is not None and permit.outcome is None:
            self._conclude(permit, failure, error)
        try:
            self.span.end(ended_at)
        except Exception as own_error:  # noqa: BLE001  (a span processor raised)
            guard.report("span.end", own_error)
        finally:
            # Also when the span's end is interrupted by Ctrl-C: the call is counted.
            if permit is not None:
                self._settle_permit(permit)
            self._record(telemetry, outcome, error_type)

    def _conclude(
        self, permit: Permit, failure: Failure | None, error: BaseException | None
    ) -> None:
        """Have a span processor that drives breakers settle the permit as the span ends."""
        span_context = self.span.get_span_context()
        permit.conclude(self._verdict(permit, failure, error), span_context)
        if span_context.is_valid:
            await_end(span_context.span_id, permit)

    def _verdict(
        self, permit: Permit, failure: Failure | None, error: BaseException | None
    ) -> Failure | None:
        failure = failure or self.failure
        judge = permit.breaker.policy.judge
        if judge is None or error is None or failure is None:
            return failure
        return permit.breaker.failure_of(error)

    def _settle_permit(self, permit: Permit) -> None:
        """Settle it, unless the span's end has; see that nothing of it is left behind."""
        try:
            settle_awaiting(self.span.get_span_context().span_id)
            permit.settle()
        except Exception as own_error:  # noqa: BLE001
            guard.report("breaker", own_error)

    def _record(self, telemetry: Telemetry, outcome: str, error_type: str | None) -> None:
        series = self.series
        if series is not None:
            if outcome in SUCCESSES:
                series.last_success = time.time()
            telemetry.instruments.record(
                (self._seconds, series, outcome, error_type, self.span.get_span_context())
            )

    def abort(self) -> None:
        """Settle as cancelled, from another thread: the process ends in the middle of it."""
        telemetry = self._telemetry
        if telemetry is not None and self.token is not None:
            self._seconds += telemetry.clock() - self._resumed_at
        # An attempt that has failed is what it came to, though the next one was still waited for.
        self.settle(*(self.last_attempt or (CANCELLED, None)))

    def abandon(self) -> None:
        """Settle, if nothing else has: what ran it is gone. Called by finalisers."""
        if self.outcome is not None or self._posted:
            return
        if self is UNOBSERVED.get() or (self.context and self.context is get_current()):
            self.leave()
        self.settle_later()

    def orphan(self) -> None:
        """Take note, in the child of a fork, that this is the parent's operation."""
        self.__dict__["_ledger"] = CLOSED_LEDGER

    def settle_later(
        self, failure: Failure | None = None, error: BaseException | None = None
    ) -> None:
        """End the operation where no lock may be taken, such as in a finaliser.

        The worker settles it a moment later; the span's end is the time of this call.
        """
        self._posted = True
        ended_at = time.time_ns()
        worker.post(lambda: self.settle(failure, error, ended_at=ended_at))

    def _items(self) -> ItemLedger:
        ledger = self._ledger
        if ledger is None:
            self.is_plain = False
            instruments = None if self._telemetry is None else self._telemetry.instruments
            # Two threads may both get here: setdefault lets one ledger win.
            ledger = self.__dict__.setdefault("_ledger", ItemLedger(instruments, self.series))
        return ledger

    def _settle_without_telemetry(
        self, failure: Failure | None, error: BaseException | None
    ) -> None:
        if self.outcome is None:
            failure = failure or self.failure
            self.outcome = outcome_of(failure, self._close_ledger(), self._failed_before)
            self._closing(self.outcome, failure, error)
            if self.permit is not None:
                with guard.contained("breaker"):
                    self.permit.settle(self._verdict(self.permit, failure, error))

    def _closing(self, outcome: str, failure: Failure | None, error: BaseException | None) -> None:
        """Take note of how it ends, while the span can still be written to; for subclasses."""

    def _close_ledger(self) -> ItemAccount | None:
        ledger = self._ledger
        return None if ledger is None or ledger is CLOSED_LEDGER else ledger.close()

    def _describe(
        self, failure: Failure | None, error: BaseException | None
    ) -> tuple[str, str | None]:
        """Put what differs from a plain success on the span; return outcome and error type."""
        account = self._close_ledger()
        failure = failure or self.failure
        outcome = outcome_of(failure, account, self._failed_before)
        error_type = None if failure is None else failure.error_type
        span = self.span
        if not span.is_recording():
            return outcome, error_type
        attributes: dict[str, AttributeValue] = {} if account is None else item_attributes(account)
        if self._consumer_seconds is not None:
            attributes[names.CONSUMER_DURATION] = self._consumer_seconds
        if outcome != "ok":
            attributes[names.OUTCOME] = outcome
        if error_type is not None:
            attributes[names.ERROR_TYPE] = error_type
        span.set_attributes(attributes)
        if self.attempts > 1 and outcome in SUCCESSES:
            span.set_status(Status(StatusCode.OK))  # an earlier attempt may have said ERROR
        if error is not None and outcome in FAILURES:
            record_exception(self.span, error)
        return outcome, error_type

    def _describe_item_failure(self, error: BaseException) -> None:
        self._item_events += 1
        if self._item_events > _ITEM_EVENTS or not self.span.is_recording():
            return
        with guard.contained("operation.failed"):
            describe_item_failure(self.span, error)


def _restore(token: contextvars.Token[Any]) -> None:
    """Detach, without the API's error log where this runs in another context than the attach did.

    That happens to a generator that is finalised by another task, and to operations that the end
    of the process settles: there is nothing to restore there.
    """
    if isinstance(token, contextvars.Token):
        try:
            token.var.reset(token)
        except (ValueError, RuntimeError):
            return
    else:  # a runtime context of the application's own (OTEL_PYTHON_CONTEXT)
        detach(token)


def current_operation() -> Operation:
    """Return the enclosing operation; outside of any, one on which every call does nothing.

    Example:
        >>> current_operation().skipped(reason="no_content")
    """
    return enclosing_operation(get_current()) or Operation("", None)


def enclosing_operation(context: Context) -> Operation | None:
    """Return the operation of an OpenTelemetry context; without an SDK, the current one."""
    operation = context.get(OPERATION_KEY)
    return operation if isinstance(operation, Operation) else UNOBSERVED.get()
