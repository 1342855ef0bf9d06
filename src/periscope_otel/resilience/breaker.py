"""A circuit breaker: it watches how calls to a dependency end, and stops making them for a while.

Each call takes a permit and settles it once, with one of three outcomes: success, failure or
ignored. How it decides is in `circuit`; here is how it is used.
"""

from __future__ import annotations

from functools import wraps
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast

from periscope_otel import guard
from periscope_otel.failure import Failure
from periscope_otel.resilience.blocks import entered, left
from periscope_otel.resilience.breakers import Breakers, renew_in_children
from periscope_otel.resilience.circuit import Circuit, Permit, listeners_of_all
from periscope_otel.resilience.errors import CircuitOpenError
from periscope_otel.resilience.guards import GUARDED
from periscope_otel.resilience.telling import tell
from periscope_otel.telemetry.breaker_instruments import source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from periscope_otel.resilience.policy import State
    from periscope_otel.resilience.transition import Transition

_NOT_MADE: Final = Failure("error", "TypeError", "ignored", retryable=False)

P = ParamSpec("P")
R = TypeVar("R")


class Breaker(Circuit):
    """A breaker for one dependency, for threads and event loops alike.

    Args:
        name: What it is known by, such as the host that it guards.
        policy: Its settings; `**changes` are put over them.
        clock: Monotonic seconds; tests give their own.
        rng: Gives numbers from 0 to 1, for the jitter.
        **changes: Single settings of `BreakerPolicy`, by name.

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If there is no such setting.

    Example:
        >>> breaker = Breaker("urlhaus.abuse.ch", slow_threshold=20.0)
        >>> with breaker:
        ...     fetch()
    """

    __slots__ = ()

    def _made(self) -> None:
        breakers.add(self)

    # Calls.

    def allow(self, *, rejecting: bool = True) -> Permit | None:
        """Return a permit for one call; None if none may be made now.

        It waits only where other processes have to be asked who probes, `probe_wait` at most.

        Args:
            rejecting: Whether None is counted as a rejected call; False where the call is only
                waiting, and asks again.
        """
        now = self.clock()
        permit, may_probe = self._look(now, rejecting=rejecting)
        if not may_probe:
            return permit
        asked = self._ask()
        grant = None
        if asked is not None:
            with guard.contained("breaker sharing"):
                grant = asked.wait(self.policy.probe_wait)
        return self._probe(now, asked, grant, rejecting=rejecting)

    async def allow_async(self, *, rejecting: bool = True) -> Permit | None:
        """Return a permit as `allow` does, without holding the event loop up."""
        now = self.clock()
        permit, may_probe = self._look(now, rejecting=rejecting)
        if not may_probe:
            return permit
        asked = self._ask()
        grant = None
        if asked is not None:
            with guard.contained("breaker sharing"):
                grant = await asked.wait_async(self.policy.probe_wait)
        return self._probe(now, asked, grant, rejecting=rejecting)

    def acquire(self) -> Permit:
        """Return a permit for one call.

        Raises:
            CircuitOpenError: If no call may be made now.
        """
        permit = self.allow()
        if permit is None:
            raise self.refusal()
        return permit

    async def acquire_async(self) -> Permit:
        """Return a permit as `acquire` does, without holding the event loop up.

        Raises:
            CircuitOpenError: If no call may be made now.
        """
        permit = await self.allow_async()
        if permit is None:
            raise self.refusal()
        return permit

    def watch(self, *, seconds: float = 0.0, moves_before: int | None = None) -> Permit | None:
        """Return a permit for a call that is made anyway, and only watched; None if it counts not.

        It rejects nothing and asks nobody.

        Args:
            seconds: For how long the call has been under way.
            moves_before: `circuit.moves[0]` as it began: a call from before the breaker's latest
                change does not count.
        """
        if moves_before is not None and self.moved > moves_before:
            return None
        now = self.clock()
        permit, may_probe = self._look(now, rejecting=False)
        if may_probe:
            with self._lock:
                permit = self._lease(now)
            self._announce()
        if permit is not None and seconds:
            permit.has_run(seconds)
        return permit

    def refusal(self) -> CircuitOpenError:
        """Return the error of a call that may not be made now."""
        return CircuitOpenError(self.name, self._state, self.retry_after, self._reason)

    def __enter__(self) -> Permit:
        return entered(self._nested() or self.acquire(), depth=1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(left(self, depth=1), error)

    async def __aenter__(self) -> Permit:
        return entered(self._nested() or await self.acquire_async(), depth=1)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(left(self, depth=1), error)

    def _end(self, permit: Permit | None, error: BaseException | None) -> None:
        if permit is not None:
            permit.settle(None if error is None else self.failure_of(error))

    def _nested(self) -> Permit | None:
        """Return a permit that counts nothing, inside of another guard of this breaker."""
        for guard_around in GUARDED.get():
            if guard_around.breaker.name == self.name and guard_around.outcome is None:
                permit = Permit(self, 0, 0.0)
                permit.outcome = "ignored"
                return permit
        return None

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` under a permit.

        Raises:
            CircuitOpenError: If no call may be made now.
            TypeError: If it returns a coroutine, which `call_async` would await.
        """
        permit = (self._nested() if GUARDED.get() else None) or self.acquire()
        token = GUARDED.set((*GUARDED.get(), permit))
        try:
            value = function(*args, **kwargs)
        except BaseException as error:
            permit.settle(self.failure_of(error))
            raise
        else:
            if isinstance(value, CoroutineType):
                permit.settle(_NOT_MADE)
                value.close()
                raise TypeError("call() awaits nothing: use call_async() for coroutine functions")
            self._settle(permit, None)
        finally:
            GUARDED.reset(token)
        return value

    async def call_async(
        self, function: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Await what `function` returns, under a permit.

        Raises:
            CircuitOpenError: If no call may be made now.
        """
        async with self:
            return await function(*args, **kwargs)

    def guard(self, function: Callable[P, R]) -> Callable[P, R]:
        """Have each call of a function or coroutine function take a permit; a decorator.

        Raises:
            TypeError: For a generator function: `monitored(breaker=)` knows when one ends.
        """
        import inspect

        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("guard() takes no generator function: use monitored(breaker=...)")
        if inspect.iscoroutinefunction(function):

            async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
                return await self.call_async(function, *args, **kwargs)

            return cast("Callable[P, R]", wraps(function)(guarded_coroutine))

        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            return self.call(function, *args, **kwargs)

        return wraps(function)(guarded)

    # By hand.

    def force_open(self) -> None:
        """Reject every call until `reset`."""
        self._set("forced_open")

    def disable(self) -> None:
        """Let every call pass and judge none, until `reset`."""
        self._set("disabled")

    def observe(self) -> None:
        """Let every call pass, and only say when it would open, until `reset`."""
        self._set("observe")

    def reset(self) -> None:
        """Close it, and forget what it knows."""
        self._set("closed")

    def _set(self, state: State) -> None:
        with self._lock:
            self._openings = 0
            self._move(state, "manual", self.clock())
        self._announce()

    # Looking at it.

    def listen(self, listener: Callable[[Transition], None]) -> Callable[[], None]:
        """Have `listener` told of every transition, in the order in which they happen.

        It is called in a background thread; what it raises is contained.

        Returns:
            A function that ends it.
        """
        entry = [listener]  # one of its own, also where a listener is given twice
        with self._lock:
            self._listeners = (*self._listeners, entry)

        def end() -> None:
            with self._lock:
                self._listeners = tuple(one for one in self._listeners if one is not entry)

        return end


breakers: Final = Breakers(Breaker)
"""Those of this process."""

renew_in_children(breakers)
source.figures = breakers
listeners_of_all.append(tell)
