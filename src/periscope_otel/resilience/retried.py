"""What a `Retry` is used as by itself: a decorator of functions of any shape, and a loop.

The wrappers are plain closures, and do nothing while calls succeed but tell the policy of the
start. A next attempt is never made while the exception of the last one is handled: it would become
the context of what the next one raises.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from periscope_otel.async_generators import first_step
from periscope_otel.failure import classify
from periscope_otel.resilience.retry_telemetry import tell_where_it_is

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
    from types import TracebackType

    from periscope_otel.failure import Failure
    from periscope_otel.resilience.retry import Retry

    FailureIn = Callable[[Any], Failure | None]


def decorated(policy: Retry, function: Any) -> Any:
    """Return a wrapper that suits the shape of `function`, looking like it.

    Raises:
        TypeError: If it is no function or method.
    """
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(decorated(policy, function.__func__))
    if inspect.isclass(function) or not callable(function):
        raise TypeError(f"a Retry decorates functions and methods, not {function!r:.80}")
    name = _full_name(function)
    failure_in = None if policy.result is None else policy.failure_in
    shaped: Any = _what_runs(function)
    if inspect.isasyncgenfunction(shaped):
        wrapper = _retried_async_generator(_retried_coroutine(policy, _begun_async(function), name))
    elif inspect.isgeneratorfunction(shaped):
        wrapper = _retried_generator(_retried_function(policy, _begun(function), name))
    elif inspect.iscoroutinefunction(shaped) or inspect.iscoroutinefunction(function):
        wrapper = _retried_coroutine(policy, function, name, failure_in)
    else:
        wrapper = _retried_function(policy, function, name, failure_in)
    return functools.wraps(function)(wrapper)


def _what_runs(function: Any) -> Any:
    """Return the function that a partial or a callable object calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _full_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _short_name(name: str) -> str:
    """Return the last two parts, as operations are named by default."""
    return ".".join([part for part in name.split(".") if part != "<locals>"][-2:])


# Functions and coroutine functions.


def _retried_function(
    policy: Retry,
    function: Callable[..., Any],
    name: str,
    failure_in: FailureIn | None = None,
) -> Callable[..., Any]:
    start = policy.start

    def retried_function(*args: Any, **kwargs: Any) -> Any:
        started = start(name)
        course: _Course | None = None
        try:
            while True:
                try:
                    value = function(*args, **kwargs)
                except Exception as error:
                    course = course or _Course(policy, name, started)
                    if not course.goes_on_after(error):
                        raise
                else:
                    if failure_in is None or (failure := failure_in(value)) is None:
                        return value
                    course = course or _Course(policy, name, started)
                    course.returned(value, failure)
                if not course.again():
                    return course.conclude()
        finally:
            if course is not None:
                course.let_go()

    return retried_function


def _retried_coroutine(
    policy: Retry,
    function: Callable[..., Any],
    name: str,
    failure_in: FailureIn | None = None,
) -> Callable[..., Any]:
    start = policy.start

    async def retried_coroutine(*args: Any, **kwargs: Any) -> Any:
        started = start(name)
        course: _Course | None = None
        try:
            while True:
                try:
                    value = await function(*args, **kwargs)
                except Exception as error:
                    course = course or _Course(policy, name, started)
                    if not course.goes_on_after(error):
                        raise
                else:
                    if failure_in is None or (failure := failure_in(value)) is None:
                        return value
                    course = course or _Course(policy, name, started)
                    course.returned(value, failure)
                if not await course.again_async():
                    return course.conclude()
        finally:
            if course is not None:
                course.let_go()

    return retried_coroutine


class _Course:
    """What becomes of one call or loop whose first attempt has failed."""

    __slots__ = ("_name", "_retrying", "_wait")

    def __init__(self, policy: Retry, name: str, started: float) -> None:
        self._name = name
        self._retrying = policy.begin(started, name)
        self._wait: float | None = None

    @property
    def failed_attempts(self) -> int:
        """How many there have been."""
        return self._retrying.attempt

    def goes_on_after(self, error: Exception) -> bool:
        """Whether another attempt may follow one that raised.

        Raises:
            Exception: What the attempt before raised, where a breaker has rejected this one: the
                rejection does not hide why it was tried again.
        """
        self._tell(classify(error), error, None)
        if self._wait is None and self._retrying.error is not error:
            self._retrying.conclude()
        return self._wait is not None

    def returned(self, value: object, failure: Failure) -> None:
        """Take note of an attempt that returned what means failure."""
        self._tell(failure, None, value)

    def _tell(self, failure: Failure, error: Exception | None, value: object) -> None:
        retrying = self._retrying
        self._wait = retrying.after(failure, error, value)
        if self._wait is not None and not retrying.rejected:
            tell_where_it_is(_short_name(self._name), retrying.attempt, self._wait, failure)

    def again(self) -> bool:
        """Wait; False where there is no further attempt."""
        return self._wait is not None and self._retrying.again(self._wait)

    async def again_async(self) -> bool:
        """Wait without holding the event loop up."""
        return self._wait is not None and await self._retrying.again_async(self._wait)

    def conclude(self) -> Any:
        """Return what the last attempt returned, or raise what it raised."""
        return self._retrying.conclude()

    def let_go(self) -> None:
        """Forget what the last attempt came to."""
        self._retrying.let_go()


# Generator functions: only what comes before the first item is tried again.


class _Begun:
    """A generator that has been run up to its first item, for `yield from`."""

    __slots__ = ("_ended", "_inner", "_item", "_waits", "close", "send", "throw")

    def __init__(self, inner: Generator[Any, Any, Any]) -> None:
        self._inner = inner
        self._item: Any = None
        self._ended: StopIteration | None = None
        self._waits = True
        """Whether the first item, or the end, is still to be handed out."""
        try:
            self._item = next(inner)
        except StopIteration as stop:
            self._ended = stop
        self.close, self.send, self.throw = inner.close, inner.send, inner.throw

    def __iter__(self) -> _Begun:
        return self

    def __next__(self) -> Any:
        if not self._waits:
            return next(self._inner)
        self._waits = False
        if self._ended is not None:
            raise StopIteration(self._ended.value)
        item, self._item = self._item, None
        return item


def _begun(function: Callable[..., Any]) -> Callable[..., _Begun]:
    def begin(*args: Any, **kwargs: Any) -> _Begun:
        return _Begun(function(*args, **kwargs))

    return begin


def _retried_generator(begin: Callable[..., Any]) -> Callable[..., Any]:
    def retried_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        return (yield from begin(*args, **kwargs))

    return retried_generator


_NO_ITEM: Final = object()


def _begun_async(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def begin(*args: Any, **kwargs: Any) -> tuple[AsyncGenerator[Any, Any], Any]:
        inner = function(*args, **kwargs)
        try:
            return inner, await first_step(inner)
        except StopAsyncIteration:
            return inner, _NO_ITEM

    return begin


def _retried_async_generator(
    begin: Callable[..., Awaitable[tuple[AsyncGenerator[Any, Any], Any]]],
) -> Callable[..., Any]:
    async def retried_async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner, item = await begin(*args, **kwargs)
        while item is not _NO_ITEM:
            try:
                sent = yield item
            except GeneratorExit:
                await inner.aclose()
                raise
            except BaseException as error:  # noqa: BLE001  (thrown in by the consumer)
                step = inner.athrow(error)
            else:
                step = inner.asend(sent)
            try:
                item = await step
            except StopAsyncIteration:
                return

    return retried_async_generator


# Loops.


def caller() -> str:
    """Return the full name of the function whose frame is the second one outside."""
    frame = sys._getframe(2)
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"


class Attempt:
    """One attempt of a loop: what its block raises is a failure of it."""

    __slots__ = ("_attempts", "number")

    def __init__(self, attempts: _Attempts, number: int) -> None:
        self._attempts = attempts
        self.number = number
        """From 1."""

    def __enter__(self) -> Self:
        self._attempts.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        return self._attempts.leave(error)


class _Attempts:
    """The attempts of one loop."""

    __slots__ = ("_at", "_course", "_name", "_policy", "_started")

    def __init__(self, policy: Retry, name: str) -> None:
        self._policy = policy
        self._name = name
        self._at: Literal["start", "handed out", "entered", "failed", "end"] = "start"
        self._started = 0.0
        self._course: _Course | None = None

    def enter(self) -> None:
        """Take note that an attempt is used as it should be."""
        self._at = "entered"

    def leave(self, error: BaseException | None) -> bool:
        """Take note of how an attempt ended; True swallows its exception."""
        self._at = "end"
        again = False
        try:
            if isinstance(error, Exception):
                if self._course is None:
                    self._course = _Course(self._policy, self._name, self._started)
                again = self._course.goes_on_after(error)
        finally:
            if again:
                self._at = "failed"
            elif self._course is not None:
                self._course.let_go()
        return again

    def _begins(self) -> bool:
        """Whether there is no attempt yet, and the first one begins now."""
        if self._at == "handed out":
            raise RuntimeError("the attempts of a Retry are used by `with attempt: ...`")
        if self._at != "start":
            return False
        self._started = self._policy.start(self._name)
        return True

    def _failed_course(self) -> _Course | None:
        """Return the course to go on with; None at the end."""
        if self._at != "failed":
            return None
        self._at = "end"
        return self._course

    def _next(self) -> Attempt:
        self._at = "handed out"
        return Attempt(self, 1 if self._course is None else self._course.failed_attempts + 1)


class Attempts(_Attempts):
    """The attempts of a `for` loop."""

    __slots__ = ()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Attempt:
        if not self._begins():
            course = self._failed_course()
            if course is None:
                raise StopIteration
            try:
                if not course.again():
                    course.conclude()
            except BaseException:
                course.let_go()
                raise
        return self._next()


class AsyncAttempts(_Attempts):
    """The attempts of an `async for` loop."""

    __slots__ = ()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Attempt:
        if not self._begins():
            course = self._failed_course()
            if course is None:
                raise StopAsyncIteration
            try:
                if not await course.again_async():
                    course.conclude()
            except BaseException:
                course.let_go()
                raise
        return self._next()
