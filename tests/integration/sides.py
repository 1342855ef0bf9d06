"""Sides: each stands for a process that shares its verdicts; and what tests do with them."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from periscope_otel.failure import Failure
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.sharing.records import (
    EVENTS,
    DamagedRecordError,
    Record,
    Records,
    leases_key,
)
from periscope_otel.resilience.sharing.verdicts import SharedVerdicts
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest
    from redis import Redis
    from redis_servers import RedisServer

    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.resilience.transition import Transition

WITHIN = 30.0
"""More than a busy machine stops any of the threads and servers that take part."""
FAILED = Failure("error", "ConnectTimeout", "failure", retryable=True)
IGNORED = Failure("cancelled", "CancelledError", "ignored", retryable=False)
SOUND = {
    "state": "closed", "generation": 1, "until": 0, "reason": "recovered", "openings": 0,
    "successes": 0, "since": 0,
}  # fmt: skip
"""A record, but for its epoch."""
_numbers = itertools.count()


class Clock:
    """Monotonic seconds that a test can set forward, and that go on by themselves if they shall."""

    def __init__(self, *, stands: bool = False) -> None:
        self.ahead = 0.0
        self._stands_at = time.monotonic() if stands else None

    def __call__(self) -> float:
        began = time.monotonic() if self._stands_at is None else self._stands_at
        return began + self.ahead


class Side:
    """What a process has: verdicts that it shares, and breakers.

    Args:
        url: The Redis's.
        timeout: Seconds that it waits for an answer; long, since where the Redis is not meant to be
            away a machine that stops it for a while shall not look like that.
    """

    def __init__(self, url: str, timeout: float = WITHIN) -> None:
        self.breakers: list[Breaker] = []
        self.verdicts = SharedVerdicts(RedisLink(url, timeout), self.breakers)
        self.seen: list[Transition] = []
        self.started = False

    def breaker(self, name: str, **changes) -> Breaker:
        made = Breaker(name, **({"jitter": 0.0, "open_time": 0.2, "probe_wait": 5.0} | changes))
        made.sharing = self.verdicts
        made.listen(self.seen.append)
        self.breakers.append(made)
        return made

    @property
    def steps(self) -> list[tuple[str, str]]:
        """The states that its breakers went through."""
        assert worker.finish_posted(WITHIN)
        return [(one.from_state, one.to_state) for one in self.seen]

    def holds_a_lease(self, breaker: Breaker) -> bool:
        """Whether a lease that nobody uses yet has arrived here."""
        talk = self.verdicts._exchange.talk(breaker)
        return talk is not None and talk.goes_back_at is not None

    def finish(self, client: Redis) -> None:
        """Wait until its thread is through with what it has begun and was given so far."""
        last = Breaker(new_name())
        leases = leases_key(last.name)
        client.zadd(leases, {"last": 1})
        self.verdicts.settled(last, "last", "ignored")
        until(lambda: not client.exists(leases))


def new_name() -> str:
    """Return a name that no other test has."""
    return f"feed{next(_numbers)}.example"


@contextmanager
def sides(server: RedisServer, client: Redis) -> Iterator[Callable[..., Side]]:
    """Give what makes sides, for a block."""
    made: list[Side] = []

    def make(*, start: bool = True, timeout: float = WITHIN) -> Side:
        one = Side(server.url, timeout)
        made.append(one)
        one.started = start
        if start:
            one.verdicts.start()
            until(lambda: listening(client) == sum(each.started for each in made))
        return one

    try:
        yield make
    finally:
        for one in made:
            one.verdicts.close(WITHIN)  # so that it writes nothing that the next test finds
            for breaker in one.breakers:
                breaker.sharing = None


def wait_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no process decide alone because the Redis, or its own thread, was stopped for a while.

    For tests of what all of them agree on. How long a call waits is up to its breaker.
    """
    monkeypatch.setattr("periscope_otel.resilience.sharing.verdicts.SLOW", WITHIN)
    monkeypatch.setattr("periscope_otel.resilience.sharing.talk.UNANSWERED", WITHIN)


def leases_given_back(client: Redis) -> int:
    """Return how many leases have gone back: it only grows, whoever looks late."""
    found: dict[str, dict[str, int]] = client.info("commandstats")
    return found.get("cmdstat_zrem", {"calls": 0})["calls"]


def listening(client: Redis) -> int:
    """Return how many processes hear of changes."""
    return client.pubsub_numsub(EVENTS)[0][1]


def until(happened: Callable[[], object], within: float = WITHIN) -> float:
    """Wait for something; returns the seconds that it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within, "it has not happened"
        time.sleep(0.002)
    return time.monotonic() - began


def trip(breaker: Breaker) -> None:
    """Have five calls in a row fail."""
    for _ in range(5):
        fail(breaker.acquire())
    assert breaker.state == "open"


def fail(permit: Permit) -> None:
    permit.settle(FAILED)


def wait_until_over(*breakers: Breaker, records: Records | None = None) -> None:
    """Wait until the open time is over, here and, given the records, by the Redis's clock."""
    until(lambda: all(one.retry_after == 0 for one in breakers))
    if records is not None:
        until(lambda: all(_is_over(recorded(records, one.name)) for one in breakers))


def _is_over(found: Record | None) -> bool:
    return found is not None and found.open_for == 0


def may_probe(breaker: Breaker, within: float = WITHIN) -> Permit:
    """Ask until a call may pass; returns its permit."""
    found: list[Permit] = []

    def asked() -> bool:
        permit = breaker.allow()
        if permit is not None:
            found.append(permit)
        return permit is not None

    until(asked, within)
    return found[0]


def lease_of(breaker: Breaker, within: float = WITHIN) -> Permit:
    """Ask until a call may pass under a lease that all know of; returns its permit."""
    deadline = time.monotonic() + within
    while True:
        permit = may_probe(breaker, deadline - time.monotonic())
        if permit.lease is not None:
            return permit
        permit.settle(IGNORED)  # no answer came in time: the machine is busy


def recorded_state(records: Records, name: str) -> str | None:
    found = recorded(records, name)
    return None if found is None else found.state


def recorded(records: Records, name: str) -> Record | None:
    (found,) = records.read([name])
    assert not isinstance(found, DamagedRecordError)
    return found
