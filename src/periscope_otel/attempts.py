"""Trying a call again: the attempts of one operation.

Each attempt has a permit of its own. Those that are followed by another one settle theirs when they
end, so that the breaker knows before it is asked for the next; the last one's is settled with the
operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from periscope_otel.call_site import failure_of
from periscope_otel.resilience.retry_telemetry import tell_of_retry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from periscope_otel.operation import Operation
    from periscope_otel.resilience.retry import Retry, Retrying


class Attempts:
    """The attempts of one operation.

    Args:
        operation: What they are attempts of; its first one begins now.
        retry: When to try again.
    """

    __slots__ = ("_dependency", "_operation", "_retry", "_retrying", "_started")

    def __init__(self, operation: Operation, retry: Retry) -> None:
        self._operation = operation
        self._retry = retry
        self._retrying: Retrying | None = None
        breaker = operation.breaker
        self._dependency = operation.feed or operation.name if breaker is None else breaker.name
        self._started = retry.start(self._dependency)

    def run(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, called again for as long as it fails and that makes sense.

        Raises:
            BaseException: What the last attempt raised, as it is.
        """
        while True:
            try:
                value = call()
            except Exception as error:
                if not self._again(error):
                    raise
            else:
                if not self._failed(value) or not self._again(None):
                    return value

    async def run_async(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Await what `call` returns, as `run` does, without holding the event loop up."""
        while True:
            try:
                value = await call()
            except Exception as error:
                if not await self._again_async(error):
                    raise
            else:
                if not self._failed(value) or not await self._again_async(None):
                    return value

    def again_before_items(self, error: BaseException) -> bool:
        """Begin the next attempt of a generator that has raised before it gave an item."""
        again = isinstance(error, Exception) and self._again(error)
        if again:
            self._operation.suspend()  # as at a `yield`: it is resumed where it goes on
        return again

    async def again_before_items_async(self, error: BaseException) -> bool:
        """Begin the next attempt of an async generator likewise."""
        again = isinstance(error, Exception) and await self._again_async(error)
        if again:
            self._operation.suspend()
        return again

    def _failed(self, value: object) -> bool:
        """Whether the attempt failed although it raised nothing."""
        operation = self._operation
        if operation.failure is None and self._retry.result is not None:
            operation.failure = self._retry.failure_in(value)
        return operation.failure is not None

    def _again(self, error: Exception | None) -> bool:
        """Wait and begin the next attempt, if there is to be one; `error` ended the last one."""
        retrying, wait = self._ended(error)
        return wait is not None and retrying.again(wait) and self._begin(retrying)

    async def _again_async(self, error: Exception | None) -> bool:
        retrying, wait = self._ended(error)
        return wait is not None and await retrying.again_async(wait) and self._begin(retrying)

    def _ended(self, error: Exception | None) -> tuple[Retrying, float | None]:
        """Settle the attempt that has ended; returns seconds until the next one, None for none."""
        operation, retry = self._operation, self._retry
        retrying = self._retrying
        if retrying is None:
            retrying = self._retrying = retry.begin(
                self._started, self._dependency, breaker=operation.breaker
            )
        failure = operation.failure if error is None else failure_of(error)
        if failure is None:
            return retrying, None
        if operation.attempts < retry.attempts and retry.wants(failure, error):
            operation.settle_attempt(failure, error)  # the breaker is asked for the next one
        wait = retrying.after(failure, error)
        retrying.error = None  # or its traceback would refer to it, by way of this frame
        if wait is not None:
            tell_of_retry(operation.span, operation.series, retrying.attempt, wait, failure)
        return retrying, wait

    def _begin(self, retrying: Retrying) -> bool:
        self._operation.begin_again(retrying.permit)
        return True
