"""Sides: each stands for a process that shares its verdicts; and what tests do with them."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from periscope_otel.failure import Failure
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.sharing.records import EVENTS, DamagedRecordError, Record, Records
from periscope_otel.resilience.sharing.verdicts import SharedVerdicts
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from redis import Redis
    from redis_servers import RedisServer

    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.resilience.transition import Transition

WITHIN = 15.0
SOON = 2.0
"""Within this time a poll has found what no message has told."""
FAILED = Failure("error", "ConnectTimeout", "failure", retryable=True)
IGNORED = Failure("cancelled", "CancelledError", "ignored", retryable=False)
SOUND = {
    "state": "closed", "generation": 1, "until": 0, "reason": "recovered", "openings": 0,
    "successes": 0, "since": 0,
}  # fmt: skip
"""A record, but for its epoch."""
_numbers = itertools.count()


class Clock:
    """Monotonic seconds that a test can set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Side:
    """What a process has: verdicts that it shares, and breakers."""

    def __init__(self, url: str) -> None:
        self.breakers: list[Breaker] = []
        self.verdicts = SharedVerdicts(RedisLink(url), self.breakers)
        self.seen: list[Transition] = []
        self.started = False

    def breaker(self, name: str, **changes) -> Breaker:
        made = Breaker(name, **({"jitter": 0.0, "open_time": 0.2, "probe_wait": 0.5} | changes))
        made.sharing = self.verdicts
        made.listen(self.seen.append)
        self.breakers.append(made)
        return made

    @property
    def steps(self) -> list[tuple[str, str]]:
        """The states that its breakers went through."""
        worker.finish_posted(WITHIN)
        return [(one.from_state, one.to_state) for one in self.seen]


def new_name() -> str:
    """Return a name that no other test has."""
    return f"feed{next(_numbers)}.example"


@contextmanager
def sides(server: RedisServer, client: Redis) -> Iterator[Callable[..., Side]]:
    """Give what makes sides, for a block."""
    made: list[Side] = []

    def make(*, start: bool = True) -> Side:
        one = Side(server.url)
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
            one.verdicts.close()
            for breaker in one.breakers:
                breaker.sharing = None


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


def wait_until_over(*breakers: Breaker) -> None:
    """Wait until the open time is over, here and by the Redis's clock."""
    until(lambda: all(one.retry_after == 0 for one in breakers))
    time.sleep(0.03)


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
