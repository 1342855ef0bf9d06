"""Where operations begin: what a place in the code says of them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY as SUPPRESS_KEY
from opentelemetry.context import Context, get_current
from opentelemetry.trace import SpanKind

from periscope_otel import guard
from periscope_otel.ending import CANCELLED
from periscope_otel.failure import Failure, classify, message_of
from periscope_otel.lettered import Call
from periscope_otel.operation import Operation, enclosing_operation
from periscope_otel.telemetry import names
from periscope_otel.telemetry.attributes import clean_attributes, clean_label
from periscope_otel.telemetry.current import current, discover
from periscope_otel.telemetry.enclosing import OPERATION_KEY, UNOBSERVED
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.trace import Link
    from opentelemetry.util.types import AttributeValue

    from periscope_otel.lettered import LetterPolicy
    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.retry import Retry

    PerCall: TypeAlias = Callable[[dict[str, Any]], object]
    """A value worked out for each call, from its bound arguments by name."""

    BreakerChoice: TypeAlias = str | Breaker | PerCall
    """A breaker, its name, or a callable of the bound arguments that returns either."""

    ResultPredicate: TypeAlias = Callable[[Any], object]
    """Says of a returned value whether it means failure."""

UNNAMED = "operation"
"""The name of an operation whose name could not be had."""


class CallSite:
    """What all operations begun at one place share; the values that vary are worked out per call.

    Args:
        name: The operation's name, or a callable of the bound arguments.
        feed: The feed's name, or such a callable; None inherits the enclosing operation's.
        kind: The kind of the spans.
        attributes: Further attributes of the spans.
        function: The callable whose signature binds the arguments.
        letters: What of it becomes a dead letter; nothing by default.
    """

    is_guarded = False
    """Whether a breaker or a retry policy has a say in its calls."""
    retry: Retry | None = None
    """When its calls are made again."""
    in_coroutine = False
    """Whether a coroutine runs the operations, and awaits what must not hold its loop up."""

    def __init__(
        self,
        name: str | PerCall,
        *,
        feed: str | PerCall | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, AttributeValue] | None = None,
        function: Callable[..., Any] | None = None,
        letters: LetterPolicy | None = None,
    ) -> None:
        for what, value in (("name", name), ("feed", feed)):
            if value is not None and not isinstance(value, str) and not callable(value):
                raise TypeError(f"{what}= takes a text or a callable, not {type(value).__name__}")
        self._name = (clean_label(name) if isinstance(name, str) else "") or UNNAMED
        self._feed = (clean_label(feed) or None) if isinstance(feed, str) else None
        self._kind = kind
        self._extra = clean_attributes(attributes or {})
        self._attributes = self._span_attributes(self._name, self._feed)
        self._per_call: dict[str, PerCall] = {
            what: value for what, value in (("name", name), ("feed", feed)) if callable(value)
        }
        self._function = function
        self._letters = letters
        if letters is not None:
            # Now, and not by those who keep no letters.
            from periscope_otel.lettered.operation import LetteredOperation

            self._lettered = LetteredOperation
        self._is_plain = not self._per_call and letters is None
        self._signature: inspect.Signature | None = None

    def begin(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Operation:
        """Begin an operation and make it the current one; raises nothing but an interruption."""
        if current.telemetry is None and self._is_plain and discover() is None:
            # Without an SDK this is nearly all that a decorated call costs, so it is spelt out.
            enclosing = UNOBSERVED.get()
            feed = self._feed
            if feed is None and enclosing is not None:
                feed = enclosing.feed
            operation = Operation(self._name, feed)
            operation.token = UNOBSERVED.set(operation)
            return operation
        return entered(self.prepare(args, kwargs))

    def prepare(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        parent: Context | None = None,
        links: Sequence[Link] | None = None,
    ) -> Operation:
        """Begin an operation without making it the current one.

        Args:
            args: The positional arguments of the call, for what is worked out per call.
            kwargs: Its keyword arguments.
            parent: The context to begin in; the current one by default.
            links: Spans of other traces that led to this one.
        """
        operation = self._make(args, kwargs)
        self._start(operation, args, kwargs, parent, links)
        return operation

    async def prepare_async(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        parent: Context | None = None,
        links: Sequence[Link] | None = None,
    ) -> Operation:
        """Begin an operation as `prepare` does; only a guarded one has something to wait for."""
        return self.prepare(args, kwargs, parent, links)

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Operation:
        if self._letters is None:
            return Operation(self._name, self._feed)
        operation = self._lettered(
            self._name,
            self._feed,
            self._letters,
            Call(self._function, args, kwargs or {}),
            lambda: self._bind(args, kwargs or {}),
        )
        operation.in_coroutine = self.in_coroutine
        with guard.contained("worker start"):
            worker.start()  # a finaliser may end it, and may not start a thread
        return operation

    def _start(
        self,
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        parent: Context | None,
        links: Sequence[Link] | None,
    ) -> None:
        try:
            parent = get_current() if parent is None else parent
            attributes = self._identify(operation, args, kwargs, parent)
            telemetry = current.telemetry or discover()
            if telemetry is None:
                return
            if parent.get(SUPPRESS_KEY):
                operation.context = Context(parent | {OPERATION_KEY: operation})
                operation.is_plain = False
            else:
                operation.start(telemetry, parent, self._kind, attributes, links)
        except BaseException as error:  # noqa: BLE001
            never_begun(operation, error)

    def _identify(
        self,
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        parent: Context,
    ) -> dict[str, AttributeValue]:
        """Give an operation its name and feed; returns the attributes of its span."""
        attributes = self._attributes
        if self._per_call:
            operation.name, operation.feed, attributes = self._work_out(args, kwargs or {})
        if operation.feed is None:
            enclosing = enclosing_operation(parent)
            if enclosing is not None:
                operation.feed = enclosing.feed
        if operation.feed is not None and names.FEED_NAME not in attributes:
            attributes = {**attributes, names.FEED_NAME: operation.feed}
        return attributes

    def _span_attributes(self, name: str, feed: str | None) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {names.OPERATION_NAME: name, names.OUTCOME: "ok"}
        if feed is not None:
            attributes[names.FEED_NAME] = feed
        # The user's attributes come first in the dict literal's order of precedence: ours win.
        return {**self._extra, **attributes}

    def _work_out(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[str, str | None, dict[str, AttributeValue]]:
        values: dict[str, str] = {}
        bound = self._bind(args, kwargs)
        if bound is not None:
            for what, work_out in self._per_call.items():
                value = contained_call(what, work_out, bound)
                label = "" if value is None else clean_label(value)
                if label:
                    values[what] = label
        name, feed = values.get("name", self._name), values.get("feed", self._feed)
        attributes = self._span_attributes(name, feed)
        return name, feed, attributes

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments by name; None if they do not fit, which the call itself will say."""
        if self._function is None:
            return None
        try:
            if self._signature is None:
                self._signature = inspect.signature(self._function)
            bound = self._signature.bind(*args, **kwargs)
        except (TypeError, ValueError):
            return None
        bound.apply_defaults()
        return bound.arguments


def call_site(
    name: str | PerCall,
    *,
    breaker: BreakerChoice | None = None,
    retry: Retry | None = None,
    **fixed: Any,
) -> CallSite:
    """Return what all operations begun at one place share.

    Args:
        name: The operation's name, or a callable of the bound arguments.
        breaker: The breaker of what is called there.
        retry: When to call again.
        **fixed: As for `CallSite`.

    Raises:
        TypeError: If one of them is of another type.
    """
    if breaker is None and retry is None:
        return CallSite(name, **fixed)
    from periscope_otel.guarded import GuardedCallSite  # which only some users need

    return GuardedCallSite(name, breaker, retry, **fixed)


def entered(operation: Operation) -> Operation:
    """Make an operation the current one."""
    try:
        operation.enter()
    except BaseException as error:  # noqa: BLE001
        never_begun(operation, error)
    return operation


def never_begun(operation: Operation, error: BaseException) -> None:
    """Leave nothing behind of an operation whose begin failed, or was interrupted by Ctrl-C."""
    operation.leave()
    operation.settle(CANCELLED)
    if not isinstance(error, Exception):
        raise error
    guard.report("begin", error)


def contained_call(what: str, work_out: PerCall, bound: dict[str, Any]) -> object:
    """Work out a value of a call; None where that fails."""
    try:
        return work_out(bound)
    except Exception as error:  # noqa: BLE001  (the user's callable must not break the user's call)
        guard.warn(
            f"{what} callable",
            "the callable given as %s= raised %s; left out",
            what,
            told_of(error),
        )
        return None


def told_of(error: BaseException) -> str:
    """Return an error of the user's callable as a log line may show it."""
    return f"{type(error).__name__}: {message_of(error, 200)}"


def failure_of(error: BaseException) -> Failure | None:
    """Return what an exception that left an operation means; None if nothing went wrong."""
    failure = classify(error)
    return None if failure.outcome == "ok" else failure


def finish_raised(operation: Operation, error: BaseException) -> None:
    """Leave and settle an operation that `error` ended."""
    operation.leave()
    if operation.last_attempt is not None and not isinstance(error, Exception):
        # Interrupted while it waited for the next attempt: the last one is what it came to.
        end = operation.settle_later if isinstance(error, GeneratorExit) else operation.settle
        end(*operation.last_attempt)
    elif isinstance(error, GeneratorExit):
        # A coroutine that is closed; perhaps by a finaliser, where no lock may be taken.
        operation.settle_later(CANCELLED)
    else:
        operation.settle(failure_of(error), error)


def judge(operation: Operation, result: ResultPredicate, value: object) -> None:
    """Ask the user's predicate whether a returned value means failure."""
    try:
        verdict = result(value)
        means_failure = bool(verdict)
    except Exception as error:  # noqa: BLE001  (the user's predicate must not break the call)
        guard.warn("result predicate", "the callable given as result= raised %s", told_of(error))
        return
    if means_failure:
        operation.fail(verdict if isinstance(verdict, (str, BaseException)) else value)
