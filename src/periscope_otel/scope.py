"""`operation(...)`: a block of code that is monitored as one operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import Link, SpanContext, SpanKind

from periscope_otel.call_site import call_site, entered, finish_raised
from periscope_otel.lettered import policy_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

    from periscope_otel.call_site import CallSite
    from periscope_otel.operation import Operation
    from periscope_otel.resilience.breaker import Breaker


async def written_down(operation: Operation) -> None:
    """Write the payload of an operation down that is not entered yet."""
    try:
        await operation.write_journal()
    except BaseException as error:  # cancelled: nothing else would settle it
        finish_raised(operation, error)
        if operation.letters_waiting:
            await operation.deliver()
        raise


class OperationBlock:
    """What `operation(...)` returns: a context manager, sync and async, usable once."""

    def __init__(
        self, site: CallSite, context: Context | None, links: Sequence[Link] | None
    ) -> None:
        self._site = site
        self._parent = context
        self._links = links
        self._operation: Operation | None = None
        self._begun = False

    def __enter__(self) -> Operation:
        self._begin_once()
        self._operation = self._site.prepare(parent=self._parent, links=self._links)
        return entered(self._operation)

    def _begin_once(self) -> None:
        if self._begun:
            raise RuntimeError("an operation block is entered once: call operation(...) again")
        self._begun = True

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        operation = self._operation
        if operation is None:
            return
        if exc is None:
            operation.finish()
        else:
            finish_raised(operation, exc)

    async def __aenter__(self) -> Operation:
        self._begin_once()
        self._site.in_coroutine = True
        operation = await self._site.prepare_async(parent=self._parent, links=self._links)
        self._operation = operation
        if operation.journal_waiting:
            await written_down(operation)
        return entered(operation)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)
        if self._operation is not None and self._operation.letters_waiting:
            await self._operation.deliver()


def operation(
    name: str,
    *,
    feed: str | None = None,
    breaker: str | Breaker | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    links: Sequence[Link | SpanContext] | None = None,
    context: Context | None = None,
    dead_letter: bool | str = False,
    payload: object = None,
    idempotency_key: str | None = None,
    journal: bool = False,
    dead_letter_rejected: bool = False,
) -> OperationBlock:
    """Monitor a block of code as one ingest operation; for `with` and `async with`.

    Args:
        name: The operation's name; one of a few fixed ones, since it is a label.
        feed: The feed's name; by default that of the enclosing operation.
        breaker: The breaker of what the block calls, or its name.
        kind: The span's kind; INTERNAL by default.
        attributes: Further attributes of the span.
        links: Spans of other traces that led to this one.
        context: The OpenTelemetry context to begin in; the current one by default.
        dead_letter: True, or the name of a queue: if the block fails, `payload` becomes a dead
            letter, else each item given to `failed`. `"items"`: only those.
        payload: What the block works on; a replay hands it to the function monitored under the
            same name.
        idempotency_key: What `payload` is known by; of its content by default.
        journal: Write `payload` down before the block begins, so that a killed process leaves it.
        dead_letter_rejected: Keep `payload` also where the breaker rejects the block.

    Returns:
        A context manager that gives the `Operation`; entering it raises `CircuitOpenError` where
        the breaker lets no call pass.

    Example:
        >>> with operation("store", feed="urlhaus") as op:
        ...     op.ingested(database.insert(op.track(rows)))
    """
    if callable(breaker):
        raise TypeError("operation(breaker=) takes a name or a Breaker: there are no arguments")
    letters = policy_of(
        dead_letter,
        None if payload is None else lambda _: payload,
        None if idempotency_key is None else lambda _: idempotency_key,
        journal=journal,
        rejected=dead_letter_rejected,
    )
    site = call_site(
        name, feed=feed, breaker=breaker, kind=kind, attributes=attributes, letters=letters
    )
    made = None if links is None else [_link(one) for one in links]
    return OperationBlock(site, context, made)


def _link(link: Link | SpanContext) -> Link:
    return link if isinstance(link, Link) else Link(link)
