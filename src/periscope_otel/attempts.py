"""Trying a call again: the attempts of one operation.

Each attempt has a permit of its own. Those that are followed by another one settle theirs when they
end, so that the breaker knows before it is asked for the next; the last one's is settled with the
operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from periscope_otel.call_site import failure_of, finish_raised
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

    __slots__ = ("_dependency", "_operation", "_retry", "_started", "_state")

    def __init__(self, operation: Operation, retry: Retry) -> None:
        self._operation = operation
        self._retry = retry
        self._state: Retrying | None = None
        breaker = operation.breaker
        self._dependency = operation.feed or operation.name if breaker is None else breaker.name
        self._started = retry.start(self._dependency)

    def run(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, called again for as long as it fails and that makes sense.

        Raises:
            BaseException: What the last attempt raised, as it is.
        """
        try:
            while True:
                try:
                    value = call()
                except Exception as error:
                    wait = self._ended(error)
                    if wait is None and not self._retrying.rejected:
                        raise
                else:
                    if not self._failed(value):
                        return value
                    wait = self._ended(None, value)
                # Outside of the `except`: or the next attempt's errors would be chained to this.
                if wait is None or not self._retrying.again(wait):
                    return self._retrying.conclude()
                self._begin()
        finally:
            self.let_go()

    async def run_async(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Await what `call` returns, as `run` does, without holding the event loop up."""
        try:
            while True:
                try:
                    value = await call()
                except Exception as error:
                    wait = self._ended(error)
                    if wait is None and not self._retrying.rejected:
                        raise
                else:
                    if not self._failed(value):
                        return value
                    wait = self._ended(None, value)
                if wait is None or not await self._retrying.again_async(wait):
                    return self._retrying.conclude()
                self._begin()
        finally:
            self.let_go()

    def again_before_items(self, error: BaseException) -> bool:
        """Begin the next attempt of a generator that has raised before it gave an item."""
        if not isinstance(error, Exception):
            return False
        wait = self._ended(error)
        try:
            return wait is not None and self._retrying.again(wait) and self._resumed()
        except BaseException as interruption:
            self.let_go()
            finish_raised(self._operation, interruption)
            raise

    async def again_before_items_async(self, error: BaseException) -> bool:
        """Begin the next attempt of an async generator likewise."""
        if not isinstance(error, Exception):
            return False
        wait = self._ended(error)
        try:
            return wait is not None and await self._retrying.again_async(wait) and self._resumed()
        except BaseException as interruption:
            self.let_go()
            finish_raised(self._operation, interruption)
            if self._operation.letters_waiting:
                await self._operation.deliver()
            raise

    def error_kept(self, error: BaseException) -> BaseException:
        """Return what the caller gets: an earlier error, if a breaker inside rejected the last."""
        state = self._state
        if state is None or not state.rejected or state.error is None:
            return error
        return state.error

    def conclude(self) -> None:
        """Raise that, as it was."""
        self._retrying.conclude()

    def let_go(self) -> None:
        """Forget what the last attempt came to: the exception's frames would refer to it."""
        if self._state is not None:
            self._state.let_go()

    def _failed(self, value: object) -> bool:
        """Whether the attempt failed although it raised nothing."""
        operation = self._operation
        if operation.failure is None and self._retry.result is not None:
            operation.failure = self._retry.failure_in(value)
            operation.is_plain = False
        return operation.failure is not None

    @property
    def _retrying(self) -> Retrying:
        if self._state is None:
            self._state = self._retry.begin(
                self._started, self._dependency, breaker=self._operation.breaker
            )
        return self._state

    def _ended(self, error: Exception | None, value: object = None) -> float | None:
        """Settle the attempt that has ended; returns seconds until the next one, None for none."""
        operation, retry, retrying = self._operation, self._retry, self._retrying
        failure = operation.failure if error is None else failure_of(error)
        if failure is None:
            retrying.rejected = False
            return None
        may_follow = retry.on is not None or failure.retryable
        if may_follow and operation.attempts < retry.attempts:
            operation.settle_attempt(failure, error)  # the breaker is asked for the next one
        wait = retrying.after(failure, error, value)
        if wait is not None or retrying.rejected:
            operation.settle_attempt(failure, error)
        operation.attempts = retrying.attempt
        if wait is not None:
            operation.last_attempt = (failure, error)
            if not retrying.rejected:
                tell_of_retry(operation.span, operation.series, retrying.attempt, wait, failure)
        return wait

    def _begin(self) -> None:
        self._operation.begin_again(self._retrying.permit)
        self._operation.attempts = self._retrying.attempt + 1

    def _resumed(self) -> bool:
        self._begin()
        self._operation.suspend()  # as at a `yield`: it is resumed where it goes on
        return True
