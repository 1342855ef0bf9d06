"""Call sites that a breaker guards, and whose calls are tried again.

A permit is taken before the operation begins, so that a rejected call costs little; it is settled
as the operation settles, at the end of its span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY as SUPPRESS_KEY
from opentelemetry.context import get_current

from periscope_otel import guard
from periscope_otel.call_site import CallSite, contained_call
from periscope_otel.ending import REFUSED_TYPE
from periscope_otel.failure import Failure
from periscope_otel.operation import enclosing_operation
from periscope_otel.resilience.breaker import Breaker, breakers
from periscope_otel.resilience.guards import guarding
from periscope_otel.resilience.retry import Retry
from periscope_otel.telemetry import names
from periscope_otel.telemetry.attributes import clean_label
from periscope_otel.telemetry.current import current, discover
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Link
    from opentelemetry.util.types import AttributeValue

    from periscope_otel.call_site import BreakerChoice, PerCall
    from periscope_otel.operation import Operation
    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.resilience.errors import CircuitOpenError

    _Call: TypeAlias = tuple[
        tuple[Any, ...], Mapping[str, Any] | None, Context, Sequence[Link] | None
    ]
    """What `prepare` was given."""


_REFUSED: Final = Failure("rejected", REFUSED_TYPE, "ignored", retryable=False)

_OF_REFUSED: Final[dict[str, AttributeValue]] = {
    names.OUTCOME: "rejected",
    names.ERROR_TYPE: REFUSED_TYPE,
}


class GuardedCallSite(CallSite):
    """A call site with a breaker, or a retry policy, or both; see `call_site`."""

    is_guarded = True

    def __init__(
        self,
        name: str | PerCall,
        breaker: BreakerChoice | None,
        retry: Retry | None,
        *,
        attributes: Mapping[str, AttributeValue] | None = None,
        **fixed: Any,
    ) -> None:
        if not isinstance(breaker, (str, Breaker, type(None))) and not callable(breaker):
            raise TypeError(
                f"breaker= takes a name, a Breaker or a callable, not {type(breaker).__name__}"
            )
        if retry is not None and not isinstance(retry, Retry):
            raise TypeError(f"retry= takes a Retry, not {type(retry).__name__}")
        self._breaker = (clean_label(breaker) or None) if isinstance(breaker, str) else breaker
        if isinstance(breaker, str) and self._breaker is None:
            guard.warn("breaker name", "breaker= is empty: calls are made without a breaker")
        self.retry = retry
        known = breaker.name if isinstance(breaker, Breaker) else self._breaker
        if isinstance(known, str):
            attributes = {**(attributes or {}), names.BREAKER_NAME: known}
        super().__init__(name, attributes=attributes, **fixed)
        self._is_plain = False

    def prepare(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        parent: Context | None = None,
        links: Sequence[Link] | None = None,
    ) -> Operation:
        """Begin an operation without making it the current one; see `CallSite`.

        Raises:
            CircuitOpenError: If the breaker lets no call pass; the operation has settled then.
        """
        parent = get_current() if parent is None else parent
        breaker = self._breaker_to_ask(args, kwargs, parent)
        if breaker is None:
            return super().prepare(args, kwargs, parent, links)
        try:
            permit = breaker.allow()
        except Exception as own_error:  # noqa: BLE001  (the call goes on without the breaker)
            guard.report("breaker", own_error)
            return super().prepare(args, kwargs, parent, links)
        if permit is None:
            error, _ = self._refused(breaker, (args, kwargs, parent, links))
            raise error
        return self._begun(breaker, permit, (args, kwargs, parent, links))

    async def prepare_async(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        parent: Context | None = None,
        links: Sequence[Link] | None = None,
    ) -> Operation:
        """Begin an operation as `prepare` does, without holding the event loop up.

        Raises:
            CircuitOpenError: If the breaker lets no call pass; the operation has settled then.
        """
        parent = get_current() if parent is None else parent
        breaker = self._breaker_to_ask(args, kwargs, parent)
        if breaker is None:
            return super().prepare(args, kwargs, parent, links)
        try:
            permit = await breaker.allow_async()
        except Exception as own_error:  # noqa: BLE001  (the call goes on without the breaker)
            guard.report("breaker", own_error)
            return super().prepare(args, kwargs, parent, links)
        if permit is None:
            error, operation = self._refused(breaker, (args, kwargs, parent, links))
            if operation is not None and operation.letters_waiting:
                await operation.deliver()
            raise error
        return self._begun(breaker, permit, (args, kwargs, parent, links))

    def _begun(self, breaker: Breaker, permit: Permit | None, call: _Call) -> Operation:
        operation = self._make(*call[:2])
        operation.breaker, operation.permit = breaker, permit
        operation.refused = permit is None
        operation.is_plain = False
        if not worker.is_started:
            with guard.contained("worker start"):
                worker.start()  # a coroutine that is closed settles there
        self._start(operation, *call)
        return operation

    def _refused(self, breaker: Breaker, call: _Call) -> tuple[CircuitOpenError, Operation | None]:
        """Count a call that is not made; with a span, unless there have been many just now."""
        error = breaker.refusal()
        if not breaker.tells_of_rejection() and not self._keeps_rejected:
            try:
                self._count_rejected(call)
            except Exception as own_error:  # noqa: BLE001
                guard.report("rejected call", own_error)
            return error, None
        operation = self._begun(breaker, None, call)
        # A dead letter also wants to know when to try again; nothing else here does.
        operation.settle(_REFUSED if self._letters is None else error.periscope_failure, error)
        return error, operation

    def _count_rejected(self, call: _Call) -> None:
        telemetry = current.telemetry or discover()
        args, kwargs, context, _ = call
        if telemetry is None or telemetry.inherited or context.get(SUPPRESS_KEY):
            return
        name, feed = self._name, self._feed
        if self._per_call:
            name, feed, _attributes = self._work_out(args, kwargs or {})
        if feed is None and (enclosing := enclosing_operation(context)) is not None:
            feed = enclosing.feed
        instruments = telemetry.instruments
        series = instruments.labels.series(name, feed)
        instruments.record((0.0, series, "rejected", REFUSED_TYPE, None))

    @property
    def _keeps_rejected(self) -> bool:
        return self._letters is not None and self._letters.rejected

    def _identify(
        self,
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        parent: Context,
    ) -> dict[str, AttributeValue]:
        attributes = super()._identify(operation, args, kwargs, parent)
        if operation.breaker is not None and names.BREAKER_NAME not in attributes:
            attributes = {**attributes, names.BREAKER_NAME: operation.breaker.name}
        if operation.refused:
            attributes = {**attributes, **_OF_REFUSED}
        return attributes

    def _breaker_to_ask(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, parent: Context
    ) -> Breaker | None:
        """Return the breaker of a call; None if there is none, or a guard around has asked it."""
        breaker = self._breaker_of(args, kwargs)
        return None if breaker is None or breaker.name in guarding(parent) else breaker

    def _breaker_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> Breaker | None:
        """Return the breaker of a call; None if there is none, or it cannot be had."""
        choice = self._breaker
        if choice is None or isinstance(choice, Breaker):
            return choice
        try:
            if isinstance(choice, str):
                return breakers.get(choice)
            bound = self._bind(args, kwargs or {})
            chosen = None if bound is None else contained_call("breaker", choice, bound)
            if isinstance(chosen, Breaker):
                return chosen
            name = "" if chosen is None else clean_label(chosen)
            return breakers.get(name) if name else None
        except Exception as error:  # noqa: BLE001
            guard.report("breaker", error)
            return None
