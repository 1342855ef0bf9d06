"""Feeds of threat intelligence on a clock of their own: who asks when, and what comes back.

Nothing waits: a call is a coroutine that is driven by hand, and told its answer when the clock has
come there. So calls overlap as they do under asyncio, and every run is the same. It needs the
standard library only, since it runs in the environments of the peers too.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Iterator

HOUR = 3600.0
DAY = 24 * HOUR


class HttpError(Exception):
    """An answer that is an error, as HTTP clients raise it."""

    def __init__(self, status: int, retry_after: float | None = None) -> None:
        super().__init__(status)
        headers = {} if retry_after is None else {"Retry-After": f"{retry_after:.0f}"}
        self.response = SimpleNamespace(status_code=status, headers=headers)


class BadDataError(ValueError):
    """What came is not what it should be."""


def says_nothing(error: BaseException) -> bool:
    """Whether an error is the caller's business: a 404, or data that cannot be read."""
    status = error.response.status_code if isinstance(error, HttpError) else None
    return status == 404 or isinstance(error, BadDataError)


class Segment(NamedTuple):
    """A part of a trace in which the dependency behaves in one way."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Feed:
    """How a feed is asked.

    Attributes:
        name: What it is called.
        interval: Seconds between calls.
        outage: Seconds that it is in trouble each time; well for as long, and an hour at least.
        timeout: Seconds after which the caller gives up on a call, and cancels it.
        slow: The slow threshold that suits it.
        burst: Calls come for this long, and then not for three times as long; 0 for always.
    """

    name: str
    interval: float
    outage: float
    timeout: float
    slow: float
    burst: float = 0.0

    def segments(self) -> Iterator[Segment]:
        """Return what happens, one after the other."""
        at = 0.0
        for kind in (*(part for trouble in KINDS for part in ("well", trouble)), "well"):
            seconds = max(self.outage, HOUR) if kind == "well" else self.outage
            yield Segment(kind, at, at + seconds)
            at += seconds

    def calls(self) -> Iterator[float]:
        """Return when calls are made; a cron job is never quite on time."""
        chance = random.Random(self.name)
        end = max(segment.end for segment in self.segments())
        at = 0.0
        while at < end:
            if not self.burst or at % (4 * self.burst) < self.burst:
                yield at + chance.random() * self.interval / 10
            at += self.interval


FEEDS = (
    Feed("hourly feed", HOUR, DAY, 60.0, 40.0),
    Feed("TAXII poll, 5 min", 300.0, 3 * HOUR, 30.0, 20.0),
    Feed("blocklist, 1 min", 60.0, HOUR, 30.0, 20.0),
    Feed("enrichment, 20/s in bursts", 0.05, 600.0, 2.0, 1.5, burst=15.0),
)
OUTAGES = ("dead", "dead among 404s", "flapping", "hanging", "dead, then hanging")
"""Away; away, while every third answer is a cache's 404 or bad data; up and down; accepting and
never answering; one after the other."""
KINDS = (*OUTAGES, "cancelled", "held", "revoked")
"""And well, but the callers cancel; 429 with Retry-After; 401."""

LATENCY = 0.2


class Answer(NamedTuple):
    """What becomes of a call."""

    seconds: float
    error: Exception | None = None
    cancelled: bool = False


def answer(feed: Feed, segment: Segment, now: float, number: int) -> Answer:
    """Return what a call made now comes to."""
    into, length = now - segment.start, segment.end - segment.start
    dead = Answer(0.05, ConnectionRefusedError())
    hanging = Answer(feed.timeout, cancelled=True)
    nothing_found = Answer(LATENCY, HttpError(404) if number % 2 else BadDataError())
    return {
        "well": Answer(LATENCY),
        "dead": dead,
        "dead among 404s": dead if number % 3 else nothing_found,
        "flapping": Answer(LATENCY) if int(into / length * 12) % 2 else dead,
        "hanging": hanging,
        "dead, then hanging": dead if into < length / 3 else hanging,
        "cancelled": Answer(LATENCY / 2, cancelled=True),
        "held": Answer(0.05, HttpError(429, segment.end - now)),
        "revoked": Answer(0.05, HttpError(401)),
    }[segment.kind]


class Request:
    """One request, if the breaker lets it be made."""

    def __init__(self) -> None:
        self.sent = False

    async def fetch(self) -> None:
        """Send it, and raise or return what comes back."""
        self.sent = True
        error = await self
        if error is not None:
            raise error

    def __await__(self) -> Generator[None, Exception | None, Exception | None]:
        return (yield)


class Breaker(Protocol):
    """A breaker of any make, as the simulation uses it."""

    def call(self, request: Request) -> Coroutine[Any, Any, None]:
        """Make a request under it."""
        ...

    def state(self) -> str:
        """`closed`, `open`, or another word for half open."""
        ...


class Clock:
    """The seconds of the simulation."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Found:
    """What has happened in the segments of one kind."""

    sent: int = 0
    failed: int = 0
    wrongly_closed: int = 0
    wrongly_opened: int = 0
    until_open: float | None = None


@dataclass
class Simulation:
    """One feed under one breaker."""

    feed: Feed
    breaker: Breaker
    clock: Clock
    found: dict[str, Found] = field(default_factory=dict)
    until_found_well: dict[float, float] = field(default_factory=dict)
    """By the beginning of each time of health, the seconds until a call first succeeds."""
    refused_when_well: int = 0

    def run(self) -> dict[str, Any]:
        """Let it all happen."""
        segments = list(self.feed.segments())
        self.found = {segment.kind: Found() for segment in segments}
        numbers, waiting = count(), []
        for at in self.feed.calls():
            self._end_until(at, waiting)
            self.clock.now = at
            segment = next(one for one in segments if at < one.end or one is segments[-1])
            number = next(numbers)
            got = answer(self.feed, segment, at, number)
            request = Request()
            coroutine = self.breaker.call(request)
            _drive(coroutine, None)
            if not request.sent:
                self.refused_when_well += got.error is None and got.seconds <= LATENCY
                continue
            self.found[segment.kind].sent += 1
            self.found[segment.kind].failed += isinstance(got.error, ConnectionError)
            heapq.heappush(waiting, (at + got.seconds, number, got, coroutine, segment))
        self._end_until(float("inf"), waiting)
        return self._figures()

    def _end_until(self, at: float, waiting: list[Any]) -> None:
        while waiting and waiting[0][0] <= at:
            self.clock.now, _, got, coroutine, segment = heapq.heappop(waiting)
            before = self.breaker.state()
            _drive(coroutine, asyncio.CancelledError() if got.cancelled else got.error)
            self._ended(segment, got, before, self.breaker.state())

    def _ended(self, segment: Segment, got: Answer, before: str, after: str) -> None:
        found = self.found[segment.kind]
        if after == "open" and found.until_open is None:
            found.until_open = self.clock.now - segment.start
        if got.cancelled and before != "closed" and after == "closed":
            found.wrongly_closed += segment.kind != "cancelled"
        if segment.kind == "cancelled" and before == "closed" and after == "open":
            found.wrongly_opened += 1
        if segment.kind == "well" and got.error is None:
            self.until_found_well.setdefault(segment.start, self.clock.now - segment.start)

    def _figures(self) -> dict[str, Any]:
        found = self.found
        after = [one.end for one in self.feed.segments() if one.kind in OUTAGES]
        back = [self.until_found_well.get(at) for at in after]
        return {
            "dead_sent": found["dead"].failed,
            "until_open": found["dead"].until_open,
            "until_found_well": None if None in back else max(back),
            "refused_when_well": self.refused_when_well,
            "among_404s_sent": found["dead among 404s"].failed,
            "flapping_sent": found["flapping"].failed,
            "hanging_sent": found["hanging"].sent,
            "dead_hanging_sent": found["dead, then hanging"].sent,
            "wrongly_closed": sum(one.wrongly_closed for one in found.values()),
            "wrongly_opened": found["cancelled"].wrongly_opened,
            "held_sent": max(0, found["held"].sent - 1),
            "revoked_sent": found["revoked"].sent,
        }


def _drive(coroutine: Coroutine[Any, Any, None], what: BaseException | None) -> None:
    """Let a call go on with what has come back, until it waits or ends."""
    try:
        if isinstance(what, asyncio.CancelledError):
            coroutine.throw(what)
        else:
            coroutine.send(what)
    except BaseException:
        pass
