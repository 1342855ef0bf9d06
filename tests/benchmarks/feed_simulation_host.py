"""Breakers of several makes under the traces of feed_traces.py; served to feed_simulation.py.

Time is simulated in the whole process: ours takes a clock; each peer's module is given one in the
place of what it has imported:

- pybreaker: `datetime`, of which it calls `now(UTC)`
- circuitbreaker: `monotonic`
- purgatory: `time`, of which it calls `time()`
- aiobreaker: `datetime`, of which it calls `utcnow()` and `now()`

Each peer is used as its documentation shows for asyncio, with its own defaults; and once more with
its way to exclude what says nothing about health (404s and bad data). pybreaker has no support for
asyncio: its `calling()`, a context manager, is what works there.
"""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from feed_traces import FEEDS, BadDataError, Clock, Feed, HttpError, Simulation, says_nothing
from hosts import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from feed_traces import Breaker, Request

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def datetime_of(clock: Clock) -> type[datetime]:
    """Return a `datetime` whose now is the clock's."""

    class Simulated(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            moment = BEGIN + timedelta(seconds=clock())
            return moment if tz is not None else moment.replace(tzinfo=None)

        @classmethod
        def utcnow(cls) -> datetime:  # type: ignore[override]
            return cls.now()

    return Simulated


class Ours:
    """Ours, with its default policy, and with one or two settings that suit the feed."""

    def __init__(self, clock: Clock, feed: Feed, variant: str) -> None:
        from periscope_otel.resilience.breaker import Breaker

        chance = random.Random(1).random
        settings = {
            "": {},
            "slow_threshold": {"slow_threshold": feed.slow},
            "short": {"slow_threshold": feed.slow, "longest_open": 60.0},
        }[variant]
        self._breaker = Breaker(f"{feed.name} {variant}", clock=clock, rng=chance, **settings)

    async def call(self, request: Request) -> None:
        """Make a request in its block."""
        async with self._breaker:
            await request.fetch()

    def state(self) -> str:
        """Return its state."""
        return self._breaker.state


class PyBreaker:
    """pybreaker's `calling()`: 5 failures in a row open it, for 60 s."""

    def __init__(self, clock: Clock, feed: Feed, variant: str) -> None:
        import pybreaker

        pybreaker.datetime = datetime_of(clock)
        exclude = [says_nothing] if variant == "excludes" else []
        self._breaker = pybreaker.CircuitBreaker(exclude=exclude)

    async def call(self, request: Request) -> None:
        """Make a request in its block."""
        with self._breaker.calling():
            await request.fetch()

    def state(self) -> str:
        """Return its state."""
        return self._breaker.current_state


class CircuitBreaker:
    """circuitbreaker's decorator: 5 failures in a row open it, for 30 s."""

    def __init__(self, clock: Clock, feed: Feed, variant: str) -> None:
        import circuitbreaker

        circuitbreaker.monotonic = clock
        expected: Any = Exception
        if variant == "excludes":

            def expected(_: type, error: BaseException) -> bool:
                return isinstance(error, Exception) and not says_nothing(error)

        self._breaker = circuitbreaker.CircuitBreaker(expected_exception=expected, name="feed")
        self.call = self._breaker(_fetch)

    def state(self) -> str:
        """Return its state."""
        return self._breaker.state


class AioBreaker:
    """aiobreaker's decorator: 5 failures in a row open it, for 60 s."""

    def __init__(self, clock: Clock, feed: Feed, variant: str) -> None:
        import aiobreaker
        from aiobreaker import circuitbreaker, state

        circuitbreaker.datetime = state.datetime = datetime_of(clock)
        exclude = [says_nothing] if variant == "excludes" else []
        self._breaker = aiobreaker.CircuitBreaker(exclude=exclude)
        self.call = self._breaker(_fetch)

    def state(self) -> str:
        """Return its state."""
        return self._breaker.current_state.name.lower()


class Purgatory:
    """purgatory's decorator: 5 failures in a row open it, for 30 s."""

    def __init__(self, clock: Clock, feed: Feed, variant: str) -> None:
        import purgatory
        from purgatory.domain import model

        model.time = SimpleNamespace(time=clock)
        exclude = [BadDataError, (HttpError, says_nothing)] if variant == "excludes" else []
        self._factory = purgatory.AsyncCircuitBreakerFactory(exclude=exclude)
        self.call = self._factory("feed")(_fetch)

    def state(self) -> str:
        """Return its state."""
        context = self._factory.uow.contexts.breakers.get("feed")
        return "closed" if context is None else {"opened": "open"}.get(context.state, context.state)


async def _fetch(request: Request) -> None:
    await request.fetch()


MAKES: dict[str, Callable[[Clock, Feed, str], Breaker]] = {
    "ours": Ours,
    "pybreaker": PyBreaker,
    "circuitbreaker": CircuitBreaker,
    "purgatory": Purgatory,
    "aiobreaker": AioBreaker,
}


def simulate(make: str, variant: str, feed: Feed) -> dict[str, Any]:
    """Run one trace under one breaker."""
    clock = Clock()
    return Simulation(feed, MAKES[make](clock, feed, variant), clock).run()


def subjects() -> Mapping[str, Callable[[int], dict[str, Any]]]:
    """Return the makes that the command line names, under every trace."""
    return {
        f"{make}|{variant}|{feed.name}": lambda _, make=make, variant=variant, feed=feed: simulate(
            make, variant, feed
        )
        for make in sys.argv[1:]
        for variant in ("", "slow_threshold", "short", "excludes")
        for feed in FEEDS
    }


if __name__ == "__main__":
    serve(subjects)
