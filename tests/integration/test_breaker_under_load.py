"""A breaker that 32 threads or a thousand tasks use at once loses no permit and counts exactly."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.errors import CircuitOpenError
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.resilience.circuit import Permit
    from periscope_otel.resilience.transition import Transition

ENOUGH = 1_000
PROBES = 7
LEASE = 60.0
MOVES = {
    "closed": {"open"},
    "open": {"half_open"},
    "half_open": {"open", "closed"},
}


class GoneError(ConnectionError):
    """The dependency is away."""


OUTCOMES: dict[type[BaseException], str] = {
    CircuitOpenError: "rejected",
    GoneError: "failure",
    KeyError: "ignored",
    asyncio.CancelledError: "ignored",
    TimeoutError: "ignored",  # that of the `wait_for` around the call, which is cancelled
}


class Watch:
    """Counts by itself what the breaker counts."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.heard: list[Transition] = []
        breaker.listen(self.heard.append)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count how a call ends."""
        outcome = "success"
        try:
            yield
        except tuple(OUTCOMES) as error:
            outcome = OUTCOMES[type(error)]
        self.count(outcome)

    def count(self, outcome: str) -> None:
        """Count a call's end."""
        with self.lock:
            self.counts[outcome] += 1

    def check(self) -> None:
        """All is as it was counted, and every state came after one that it may come after."""
        assert worker.finish_posted(30)
        view = self.breaker.view()
        assert (view.in_flight, view.probes) == (0, 0)
        assert {**view.outcomes, "rejected": view.rejections} == {
            name: self.counts[name] for name in ("success", "failure", "ignored", "rejected")
        }
        states = ["closed", *(one.to_state for one in self.heard)]
        assert states[-1] == view.state
        for before, after, one in zip(states, states[1:], self.heard, strict=False):
            assert one.from_state == before
            assert after in MOVES[before]
        assert view.generation == len(self.heard)


class Probed(Watch):
    """Also looks, in each probe, at how many run at the same time."""

    def __init__(self, breaker: Breaker) -> None:
        super().__init__(breaker)
        self.began = time.monotonic()
        self.looks_at = self.began + 2
        self.ends = False
        self.running: Counter[int] = Counter()
        self.together: Counter[int] = Counter()

    @contextmanager
    def call(self, permit: Permit) -> Iterator[None]:
        """Count a call of a generation, and see how many of it run.

        A generation is one stay in one state. Which of them were half open is known when all
        transitions have been told.
        """
        generation = permit.generation
        with self.lock:
            self.running[generation] += 1
            self.together[generation] = max(self.together[generation], self.running[generation])
        try:
            yield
        finally:
            with self.lock:
                self.running[generation] -= 1

    def goes_on(self) -> bool:
        """For two seconds, and on a busy machine until enough has happened."""
        now = time.monotonic()
        if now >= self.looks_at and not self.ends:
            self.looks_at = now + 0.1
            self.ends = now - self.began > 60 or self._has_seen_enough()
        return not self.ends

    def _has_seen_enough(self) -> bool:
        wanted = {"recovered", "probe_failed"}
        if not wanted <= {one.reason for one in list(self.heard)}:
            return False
        most = self._most()
        calls = sum(self.counts.values())
        return calls > ENOUGH and most["half_open"] > 1 and most["closed"] > PROBES

    def _most(self) -> dict[str, int]:
        """Return how many calls ran at once in each state, at most."""
        stays = {number: one.to_state for number, one in enumerate(list(self.heard), start=1)}
        most = dict.fromkeys(("closed", "half_open", "open"), 0)
        with self.lock:
            counted = list(self.together.items())
        for generation, together in counted:
            stay = stays.get(generation, "closed")
            most[stay] = max(most[stay], together)
        return most

    def check(self) -> None:
        """No half-open generation had more probes at once than the policy allows."""
        super().check()
        most = self._most()
        assert most["open"] == 0
        assert 1 < most["half_open"] <= PROBES
        assert most["closed"] > PROBES


def hammered() -> Breaker:
    """A breaker that opens and closes all the time."""
    return Breaker(
        "hammered.example",
        open_time=0.002,
        longest_open=0.004,
        jitter=1.0,
        probes=PROBES,
        successes=3,
        lease=LEASE,
        slow_threshold=0.25,
        slow_rate=0.3,
        minimum_calls=20,
        consecutive_failures=8,
    )


def health(ran: float) -> float:
    """How many calls succeed now: it is well for a while, then away, and so on."""
    return (0.995, 0.05, 0.9)[int(ran * 7) % 3]


@pytest.mark.timeout(180)
def test_32_threads() -> None:
    """With failures, slow calls, ignored ones and abandoned blocks."""
    breaker = hammered()
    watch = Probed(breaker)

    def fetch(chance: random.Random) -> None:
        with breaker as permit, watch.call(permit):
            lot = chance.random()
            if lot < 0.005:
                time.sleep(0.3)
            elif lot < 0.5:
                time.sleep(0.0005)
            if chance.random() > health(time.monotonic() - watch.began):
                raise GoneError
            if lot > 0.97:
                raise KeyError("a 404, or so")
            if lot > 0.95:
                raise asyncio.CancelledError

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while watch.goes_on():
            with watch.counted():
                fetch(chance)
            time.sleep(0 if breaker.state == "closed" else 0.0003)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))  # raises what a thread has raised
    watch.check()
    assert sum(watch.counts.values()) > ENOUGH


@pytest.mark.timeout(180)
async def test_1000_tasks() -> None:
    """Cancelled in mid-call, by `task.cancel` and by `wait_for`, and failing and slow besides."""
    breaker = hammered()
    watch = Probed(breaker)
    in_call: set[asyncio.Task[None]] = set()

    async def fetch(chance: random.Random) -> None:
        async with breaker as permit:
            with watch.call(permit):
                await asyncio.sleep(0.3 if chance.random() < 0.005 else 0.001 * chance.random())
                if chance.random() > health(time.monotonic() - watch.began):
                    raise GoneError

    async def one(chance: random.Random) -> None:
        task = asyncio.current_task()
        assert task is not None
        in_call.add(task)
        with watch.counted():
            if chance.random() < 0.3:
                await asyncio.wait_for(fetch(chance), 0.01)
            else:
                await fetch(chance)
        in_call.discard(task)

    async def work(seed: int) -> None:
        chance = random.Random(seed)
        while watch.goes_on():
            call = asyncio.create_task(one(chance))
            if chance.random() < 0.1:
                await asyncio.sleep(0.0005)
                if call in in_call:  # it has begun, and will say how it ended
                    call.cancel()
            await asyncio.wait([call])
            assert call.cancelled() or call.exception() is None
            await asyncio.sleep(0.02 * chance.random())

    await asyncio.gather(*map(work, range(1_000)))
    watch.check()
    assert sum(watch.counts.values()) > ENOUGH


async def test_one_breaker_for_threads_and_tasks() -> None:
    """Both at the same time."""
    breaker = Breaker("mixed.example", consecutive_failures=None, failure_rate=1.0)
    watch = Watch(breaker)

    def in_thread() -> None:
        for _ in range(500):
            with breaker:
                pass
            watch.count("success")

    async def in_task() -> None:
        for _ in range(20):
            async with breaker:
                await asyncio.sleep(0)
            watch.count("success")

    threads = [asyncio.to_thread(in_thread) for _ in range(8)]
    await asyncio.gather(*threads, *(in_task() for _ in range(200)))
    watch.check()
    assert breaker.view().outcomes["success"] == 8_000
