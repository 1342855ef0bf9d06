"""One letter and its handler: what it is called with, and how it ends."""

from __future__ import annotations

import asyncio
import inspect
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import baggage
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanKind,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from periscope_otel import guard
from periscope_otel.dead_letter.codecs import bind, first_is_many
from periscope_otel.dead_letter.draft import cause_of
from periscope_otel.dead_letter.errors import CannotReplayError
from periscope_otel.dead_letter.replaying import REPLAYING
from periscope_otel.failure import classify
from periscope_otel.registry import handler_of
from periscope_otel.telemetry import names
from periscope_otel.telemetry.current import current, discover

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from periscope_otel.dead_letter.bodies import BodyFiles
    from periscope_otel.dead_letter.draft import Cause
    from periscope_otel.dead_letter.letter import Letter
    from periscope_otel.dead_letter.replaying import Replaying

_SPAN: Final = "dead_letter.replay"


def prepared(
    letter: Letter, bodies: BodyFiles
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return the handler of a letter and what it is called with.

    Raises:
        DeadLetterError: If it cannot be called; the message says why.
    """
    item = is_item(letter)
    handler = handler_of(letter.operation, item=item)
    if handler is None:
        raise CannotReplayError(f"no operation {letter.operation} is registered")
    function = handler.function
    if not handler.explicit and _is_generator(function):
        raise CannotReplayError(
            f"{letter.operation} is a generator, whose items nobody would take: "
            "register a replay_handler for it"
        )
    payload = bodies.payload_of(letter)
    many = item and not handler.explicit and _takes_many(function)
    args, kwargs = bind(function, payload, letter.codec, many=many)
    return function, args, kwargs


def is_item(letter: Letter) -> bool:
    """Whether a letter holds one item of what its operation was called with."""
    return letter.item_index is not None


def _is_generator(function: Callable[..., Any]) -> bool:
    inner = inspect.unwrap(function)
    return inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner)


def _takes_many(function: Callable[..., Any]) -> bool:
    """Whether an operation is called with many items, so that one is handed over in a list.

    Raises:
        CannotReplayError: If its annotations do not say.
    """
    answer = first_is_many(function)
    if answer is None:
        raise CannotReplayError(
            "the annotation of its first parameter does not say whether it takes one item or "
            "many: annotate it, or register a replay_handler(…, items=True)"
        )
    return answer


def tried(
    handler: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    replaying: Replaying,
    loop: asyncio.AbstractEventLoop,
) -> tuple[str, Cause | None]:
    """Run a handler; returns its outcome, and why it failed if it did."""
    token = REPLAYING.set(replaying)
    try:
        result = handler(*args, **kwargs)
        if inspect.isawaitable(result):
            asyncio.run_coroutine_threadsafe(_awaited(result), loop).result()
        elif inspect.isgenerator(result):
            for _ in result:
                pass
        elif inspect.isasyncgen(result):
            asyncio.run_coroutine_threadsafe(_exhaust(result), loop).result()
    except Exception as error:  # noqa: BLE001  (whatever a handler raises is its failure)
        failure = classify(error)
        cause = replaying.cause or cause_of(
            replaying.operation, failure.error_type, error, failure.retry_after
        )
        return failure.outcome, cause
    except asyncio.CancelledError:
        return "cancelled", None
    finally:
        REPLAYING.reset(token)
    return replaying.outcome or "ok", replaying.cause


async def _awaited(result: Awaitable[Any]) -> None:
    await result


async def _exhaust(items: Any) -> None:
    async for _ in items:
        pass


@contextmanager
def span_of(letter: Letter) -> Iterator[Span]:
    """Run a block under a new trace, linked to the one in which the letter failed."""
    telemetry = current.telemetry or discover()
    context = Context()
    span: Span = INVALID_SPAN
    for name, value in letter.headers.items():
        context = baggage.set_baggage(name, value, context)
    if telemetry is not None:
        attributes = {
            names.DEAD_LETTER_ID: letter.id,
            names.DEAD_LETTER_QUEUE: letter.queue,
            names.OPERATION_NAME: letter.operation,
        }
        with guard.contained("replay span"):
            span = telemetry.start_span(
                _SPAN, context, SpanKind.INTERNAL, attributes, _links_to(letter)
            )
        context = set_span_in_context(span, context)
    token = attach(context)
    try:
        yield span
    finally:
        detach(token)
        span.end()


def _links_to(letter: Letter) -> list[Link]:
    carrier = {"traceparent": letter.traceparent or "", "tracestate": letter.tracestate or ""}
    context = TraceContextTextMapPropagator().extract(carrier, Context())
    failed = get_current_span(context).get_span_context()
    return [Link(failed)] if failed.is_valid else []


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Give an event loop that runs in a thread of its own, for all handlers that are coroutines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="periscope-replay-loop", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_end_of(loop), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_of(loop: asyncio.AbstractEventLoop) -> None:
    """End what handlers have left running, as `asyncio.run` does."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
