"""`@monitored`: which shape of callable gets which wrapper.

The wrappers are plain closures: they pickle by name, copy, and cost a fifth of a wrapt proxy. A
class or static method is unwrapped, wrapped and wrapped again, so either decorator order works.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from opentelemetry.trace import SpanKind

from periscope_otel.call_site import call_site, entered, finish_raised, judge
from periscope_otel.generators import wrap_async_generator, wrap_generator
from periscope_otel.lettered import policy_of
from periscope_otel.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.util.types import AttributeValue

    from periscope_otel.call_site import CallSite, PerCall, ResultPredicate
    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.retry import Retry


_Function = TypeVar(
    "_Function", bound="Callable[..., Any] | classmethod[Any, Any, Any] | staticmethod[Any, Any]"
)


class Decorator(Protocol):
    """What `monitored(...)` with arguments returns: it gives back what it is given, typed alike."""

    def __call__(self, function: _Function, /) -> _Function:
        """Decorate `function`."""
        ...


@overload
def monitored(function: _Function, /) -> _Function: ...
@overload
def monitored(
    target: str | None = None,
    /,
    *,
    name: str | PerCall | None = None,
    feed: str | PerCall | None = None,
    breaker: str | Breaker | PerCall | None = None,
    retry: Retry | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    result: ResultPredicate | None = None,
    dead_letter: bool | str = False,
    payload: PerCall | None = None,
    idempotency_key: PerCall | None = None,
    journal: bool = False,
    dead_letter_rejected: bool = False,
) -> Decorator: ...
def monitored(
    target: Any = None,
    /,
    *,
    name: str | PerCall | None = None,
    feed: str | PerCall | None = None,
    breaker: str | Breaker | PerCall | None = None,
    retry: Retry | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    result: ResultPredicate | None = None,
    dead_letter: bool | str = False,
    payload: PerCall | None = None,
    idempotency_key: PerCall | None = None,
    journal: bool = False,
    dead_letter_rejected: bool = False,
) -> Any:
    """Monitor a function as an ingest operation: each call is a span, counted and timed.

    Works on functions, coroutine functions, generator and async generator functions, and on
    instance, class and static methods in either decorator order. The decorated function keeps
    signature, types, documentation and pickling by name.

    Args:
        target: The function (bare use), or the operation's name.
        name: The operation's name; also a callable of the bound arguments. By default the last
            two parts of the function's module and qualified name.
        feed: The feed's name, or a callable of the bound arguments (a dict by parameter name); by
            default that of the enclosing operation.
        breaker: The breaker of what is called, its name, or a callable of the bound arguments that
            returns either. While it is open calls are not made: they raise `CircuitOpenError`.
        retry: When to call again. Generators are not, once they have given an item.
        kind: The spans' kind; INTERNAL by default.
        attributes: Further attributes of the spans.
        result: Called with what the function returned. A true answer means failure: an exception
            or text says which; for True a response's HTTP status is looked at.
        dead_letter: True, or the name of a queue: the arguments of a call that fails are kept as
            a dead letter, to be replayed; of a call that succeeds each item given to
            `op.failed(item, error)`. `"items"`: where items failed only those, whatever the call.
            Without `journal` arguments are kept as they are when the call fails.
        payload: A callable of the bound arguments that says what to keep instead: a dict of
            arguments by name, or what the function is to be handed as its first one.
        idempotency_key: Such a callable, for what the payload is known by; of its content by
            default.
        journal: Write the arguments down before the call and remove them when it has succeeded,
            so that a process that is killed in the middle of it leaves a dead letter.
        dead_letter_rejected: Keep also what an open breaker rejects.

    Returns:
        The decorated function, or a decorator.

    Raises:
        TypeError: For a class, a property or something that cannot be called.
        ValueError: If `dead_letter` cannot be the name of a queue.

    Example:
        >>> @monitored("fetch", feed=lambda args: args["url"].host)
        ... def fetch(url): ...
    """
    if isinstance(target, str):
        if name is not None:
            raise TypeError("monitored() got the operation's name twice")
        target, name = None, target
    letters = policy_of(
        dead_letter, payload, idempotency_key, journal=journal, rejected=dead_letter_rejected
    )

    def decorate(function: Any) -> Any:
        return _decorate(
            function,
            name,
            result,
            feed=feed,
            breaker=breaker,
            retry=retry,
            kind=kind,
            attributes=attributes,
            letters=letters,
        )

    return decorate if target is None else decorate(target)


def _decorate(
    function: Any, name: str | PerCall | None, result: ResultPredicate | None, **fixed: Any
) -> Any:
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(_decorate(function.__func__, name, result, **fixed))
    refuse_what_is_no_function(function)
    name = name or default_name(function)
    site = call_site(name, function=function, **fixed)
    wrapper = wrap(function, site, result)
    if isinstance(name, str):
        register(name, wrapper)
    return wrapper


def refuse_what_is_no_function(function: Any) -> None:
    """Raise a TypeError that says what to do instead."""
    if inspect.isclass(function):
        raise TypeError(
            f"monitored() decorates functions and methods, not classes: put it on the methods of "
            f"{function.__qualname__} that do the ingest"
        )
    if isinstance(function, (property, functools.cached_property)):
        raise TypeError("monitored() goes under @property, on the function itself")
    if not callable(function):
        raise TypeError(f"monitored() decorates functions and methods, not {function!r:.80}")


def default_name(function: Callable[..., Any]) -> str:
    """Return the last two parts of a function's module and qualified name.

    Example:
        >>> default_name(json.JSONDecoder.decode)
        'JSONDecoder.decode'
    """
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None) or "builtins"  # a method descriptor has none
    parts = f"{module}.{named.__qualname__}".split(".")
    return ".".join([part for part in parts if part != "<locals>"][-2:])


def wrap(
    function: Callable[..., Any], site: CallSite, result: ResultPredicate | None = None
) -> Callable[..., Any]:
    """Return the wrapper that suits the shape of `function`, looking like it."""
    shaped = _what_runs(function)
    if inspect.isasyncgenfunction(shaped):
        wrapper = wrap_async_generator(function, site)
    elif inspect.isgeneratorfunction(shaped):
        wrapper = wrap_generator(function, site, result)
    elif inspect.iscoroutinefunction(shaped) or inspect.iscoroutinefunction(function):
        wrap_it = _wrap_guarded_coroutine if site.is_guarded else _wrap_coroutine
        wrapper = wrap_it(function, site, result)
    elif site.retry is not None:
        wrapper = _wrap_retried_function(function, site, site.retry, result)
    else:
        wrapper = _wrap_function(function, site, result)
    if inspect.isfunction(shaped) and shaped.__code__.co_flags & inspect.CO_ITERABLE_COROUTINE:
        wrapper = types.coroutine(wrapper)
    return functools.wraps(function)(wrapper)


def _what_runs(function: Any) -> Any:
    """Return the function that a partial or a callable object calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _wrap_function(
    function: Callable[..., Any], site: CallSite, result: ResultPredicate | None
) -> Callable[..., Any]:
    begin = site.begin

    def monitored_function(*args: Any, **kwargs: Any) -> Any:
        operation = begin(args, kwargs)
        try:
            value = function(*args, **kwargs)
            if result is not None:
                judge(operation, result, value)
            operation.finish()
        except BaseException as error:
            finish_raised(operation, error)
            raise
        return value

    return monitored_function


def _wrap_retried_function(
    function: Callable[..., Any], site: CallSite, retry: Retry, result: ResultPredicate | None
) -> Callable[..., Any]:
    from periscope_otel.attempts import Attempts

    begin = site.begin

    def retried_function(*args: Any, **kwargs: Any) -> Any:
        def attempt() -> Any:
            value = function(*args, **kwargs)
            if result is not None:
                judge(operation, result, value)
            return value

        operation = begin(args, kwargs)
        try:
            value = Attempts(operation, retry).run(attempt)
            operation.finish()
        except BaseException as error:
            finish_raised(operation, error)
            raise
        return value

    return retried_function


def _wrap_coroutine(
    function: Callable[..., Any], site: CallSite, result: ResultPredicate | None
) -> Callable[..., Any]:
    begin = site.begin
    site.in_coroutine = True

    async def monitored_coroutine(*args: Any, **kwargs: Any) -> Any:
        operation = begin(args, kwargs)
        try:
            if operation.journal_waiting:
                await operation.write_journal()
            value = await function(*args, **kwargs)
            if result is not None:
                judge(operation, result, value)
            operation.finish()
        except BaseException as error:
            finish_raised(operation, error)
            if operation.letters_waiting:
                await operation.deliver()
            raise
        if operation.letters_waiting:
            await operation.deliver()
        return value

    return monitored_coroutine


def _wrap_guarded_coroutine(
    function: Callable[..., Any], site: CallSite, result: ResultPredicate | None
) -> Callable[..., Any]:
    from periscope_otel.attempts import Attempts

    site.in_coroutine = True
    retry = site.retry

    async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
        async def attempt() -> Any:
            value = await function(*args, **kwargs)
            if result is not None:
                judge(operation, result, value)
            return value

        operation = entered(await site.prepare_async(args, kwargs))
        try:
            if operation.journal_waiting:
                await operation.write_journal()
            if retry is None:
                value = await attempt()
            else:
                value = await Attempts(operation, retry).run_async(attempt)
            operation.finish()
        except BaseException as error:
            finish_raised(operation, error)
            if operation.letters_waiting:
                await operation.deliver()
            raise
        if operation.letters_waiting:
            await operation.deliver()
        return value

    return guarded_coroutine
