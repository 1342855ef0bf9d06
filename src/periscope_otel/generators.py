"""Generators as operations: left around each `yield`, and settled whatever ends them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from periscope_otel import guard
from periscope_otel.async_generators import first_step
from periscope_otel.call_site import failure_of, finish_raised, judge
from periscope_otel.ending import CANCELLED
from periscope_otel.scope import written_down
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    from periscope_otel.attempts import Attempts
    from periscope_otel.call_site import CallSite, ResultPredicate
    from periscope_otel.operation import Operation
    from periscope_otel.resilience.retry import Retry


def wrap_generator(
    function: Callable[..., Any], site: CallSite, result: ResultPredicate | None
) -> Callable[..., Any]:
    """Return the wrapper of a generator function."""

    def monitored_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = function(*args, **kwargs)
        operation, _keeper = _begin_generator(site.prepare(args, kwargs))
        attempts = _attempts_of(operation, site.retry)
        step: Callable[[Any], Any] = inner.send
        sent: Any = None
        closing = False
        # Whatever the consumer does to this generator is done to the user's, with the operation
        # left around every yield. A close too is thrown in: the body may return, fail or go on.
        while True:
            operation.resume()
            try:
                item = step(sent)
            except StopIteration as stop:
                if result is not None:
                    judge(operation, result, stop.value)
                _finish_generator(operation, closing=closing)
                return stop.value
            except BaseException as error:
                _excuse(operation, error, sent)
                sent = None  # or the error's traceback would refer to the error
                if attempts is not None and attempts.again_before_items(error):
                    inner = function(*args, **kwargs)
                    step = inner.send
                    continue
                _finish_generator(operation, _kept(attempts, error), closing=closing)
                _conclude(attempts, error)
                raise
            attempts = None
            operation.suspend()
            step, sent, closing = inner.send, None, False
            try:
                sent = yield item
            except GeneratorExit as error:
                step, sent, closing = inner.throw, error, True
            except BaseException as error:  # noqa: BLE001  (thrown in by the consumer: passed on)
                step, sent = inner.throw, error

    return monitored_generator


def wrap_async_generator(function: Callable[..., Any], site: CallSite) -> Callable[..., Any]:
    """Return the wrapper of an async generator function."""
    site.in_coroutine = True

    async def monitored_async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner = function(*args, **kwargs)
        operation, _keeper = _begin_generator(await site.prepare_async(args, kwargs))
        attempts = _attempts_of(operation, site.retry)
        if operation.journal_waiting:
            await written_down(operation)
        step: Callable[[Any], Awaitable[Any]] = functools.partial(first_step, inner)
        sent: Any = None
        closing = False
        while True:
            operation.resume()
            try:
                item = await step(sent)
            except StopAsyncIteration:
                await _finish_async_generator(operation, closing=closing)
                return
            except BaseException as error:
                _excuse(operation, error, sent)
                sent = None
                if attempts is not None and await attempts.again_before_items_async(error):
                    inner = function(*args, **kwargs)
                    step = functools.partial(first_step, inner)
                    continue
                kept = _kept(attempts, error)
                await _finish_async_generator(operation, kept, closing=closing)
                del kept
                _conclude(attempts, error)
                raise
            attempts = None
            operation.suspend()
            step, sent, closing = inner.asend, None, False
            try:
                sent = yield item
            except GeneratorExit as error:
                step, sent, closing = inner.athrow, error, True
            except BaseException as error:  # noqa: BLE001  (thrown in by the consumer: passed on)
                step, sent = inner.athrow, error

    return monitored_async_generator


class _Keeper:
    """Settles the operation of a generator whose frame is thrown away without being run.

    That is what becomes of a body that yields or awaits when it is told to exit.
    """

    __slots__ = ("_operation",)

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    def __del__(self) -> None:
        self._operation.abandon()


def _excuse(operation: Operation, error: BaseException, sent: object) -> None:
    """Have an exception that the consumer threw in, and that only came back, blame no breaker."""
    if error is sent and operation.permit is not None:
        operation.permit.settle(CANCELLED)


def _attempts_of(operation: Operation, retry: Retry | None) -> Attempts | None:
    if retry is None:
        return None
    from periscope_otel.attempts import Attempts  # which only some users need

    return Attempts(operation, retry)


def _kept(attempts: Attempts | None, error: BaseException) -> BaseException:
    """Return what a generator ends with: perhaps the error of an attempt before."""
    return error if attempts is None else attempts.error_kept(error)


def _conclude(attempts: Attempts | None, error: BaseException) -> None:
    """Raise that of an attempt before, if it is so; in any case hold on to none."""
    if attempts is None:
        return
    try:
        if attempts.error_kept(error) is not error:
            attempts.conclude()
    finally:
        attempts.let_go()


def _begin_generator(operation: Operation) -> tuple[Operation, _Keeper]:
    with guard.contained("worker start"):
        worker.start()
    return operation, _Keeper(operation)


async def _finish_async_generator(
    operation: Operation, error: BaseException | None = None, *, closing: bool
) -> None:
    _finish_generator(operation, error, closing=closing)
    if operation.letters_waiting:
        await operation.deliver()


def _finish_generator(
    operation: Operation, error: BaseException | None = None, *, closing: bool
) -> None:
    """Leave and settle; a closed generator may be so by a finaliser, which takes no lock."""
    if closing and (error is None or isinstance(error, GeneratorExit)):
        operation.leave()
        operation.settle_later()
    elif error is None:
        operation.finish()
    elif closing:
        operation.leave()
        operation.settle_later(failure_of(error), error)
    else:
        finish_raised(operation, error)
