"""The contracts of a breaker, one by one; how they work together is in test_breaker_model.py."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import math
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.trace import SpanContext, TraceFlags

from periscope_otel import guard
from periscope_otel.failure import Failure, classify
from periscope_otel.resilience.breaker import Breaker
from periscope_otel.resilience.errors import CircuitOpenError
from periscope_otel.resilience.guards import guarding
from periscope_otel.resilience.policy import BreakerPolicy
from periscope_otel.resilience.transition import Grant
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from periscope_otel.resilience.transition import Transition

FAILED = Failure("error", "ConnectionError", "failure", retryable=True, reason="connect")
IGNORED = Failure("error", "404", "ignored", retryable=False, reason="client")
CANCELLED = Failure("cancelled", None, "ignored", retryable=False)
REFUSED = Failure("error", "401", "failure", retryable=False, reason="auth")


def limited(seconds: float) -> Failure:
    return Failure("error", "429", "ignored", True, retry_after=seconds, reason="rate_limit")


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock) -> Callable[..., Breaker]:
    """Makes breakers on the clock of the test, without jitter."""
    return partial(Breaker, "feed.example", clock=clock, jitter=0.0)


@pytest.fixture
def breaker(make) -> Breaker:
    return make()


def settle(breaker: Breaker, *results: Failure | None) -> None:
    """Make calls one after the other that end like this."""
    for result in results:
        breaker.acquire().settle(result)


def opened(breaker: Breaker) -> Breaker:
    settle(breaker, *[FAILED] * 5)
    assert breaker.state == "open"
    return breaker


def pass_open_time(breaker: Breaker, clock: Clock) -> None:
    clock.now += breaker.retry_after or 0.0


def heard_by(breaker: Breaker) -> list[Transition]:
    heard: list[Transition] = []
    breaker.listen(heard.append)
    return heard


def told(heard: list[Transition]) -> list[tuple[str, str, str]]:
    assert worker.finish_posted(30)
    return [(one.from_state, one.to_state, one.reason) for one in heard]


def fail() -> None:
    raise ConnectionError


# --- when it opens -------------------------------------------------------------------------------


def test_five_failures_in_a_row_open_it(breaker):
    """However far apart they are, and whatever is ignored between them."""
    heard = heard_by(breaker)
    settle(breaker, FAILED, FAILED, None, *[FAILED, IGNORED] * 4)
    assert breaker.state == "closed"
    settle(breaker, FAILED)
    assert breaker.state == "open"
    assert told(heard) == [("closed", "open", "consecutive_failures")]
    assert heard[0].error_type == "ConnectionError"
    assert (heard[0].open_for, heard[0].openings) == (30.0, 1)


def test_half_of_ten_calls_failing_opens_it(breaker):
    """The rate is looked at when a call is counted, also when that one succeeds."""
    settle(breaker, *[FAILED, FAILED, None] * 3)
    assert breaker.state == "closed"
    settle(breaker, None)
    assert (breaker.state, breaker.view().reason) == ("open", "failure_rate")


def test_a_rate_is_exact(make):
    """55 of 100 is at least 55 %."""
    breaker = make(failure_rate=0.55, consecutive_failures=None, minimum_calls=100)
    settle(breaker, *[None] * 45, *[FAILED] * 55)
    assert breaker.state == "open"


def test_failures_that_are_too_old_do_not_count(make, clock):
    """The window is 60 s long, in steps of 6 s."""
    breaker = make(consecutive_failures=None)
    settle(breaker, *[FAILED] * 9)
    clock.now += 60
    settle(breaker, FAILED)
    assert breaker.state == "closed"
    assert (breaker.view().calls, breaker.view().failures) == (1, 1)


def test_slow_calls_open_it_where_a_threshold_is_set(make, clock):
    """80 % of them, of at least ten; without a threshold no call is slow."""
    for threshold, state in ((None, "closed"), (20.0, "open")):
        breaker = make(slow_threshold=threshold, window=3600.0, consecutive_slow=None)
        for seconds in (0, 0, *[20] * 8):
            permit = breaker.acquire()
            clock.now += seconds / 100  # all within one window
            permit._seconds = seconds
            permit.settle()
        assert breaker.state == state


def test_refused_credentials_open_it_at_once(make):
    """401 and 403 are no matter of rates; where `open_on_auth` is off they are failures."""
    breaker = make()
    settle(breaker, REFUSED)
    assert (breaker.state, breaker.view().reason) == ("open", "auth")
    breaker = make(open_on_auth=False)
    settle(breaker, REFUSED)
    assert (breaker.state, breaker.view().failures) == ("closed", 1)


def test_an_ignored_call_touches_no_counter(breaker):
    """It neither fails nor succeeds: a row of failures goes on after it."""
    settle(breaker, FAILED, IGNORED, CANCELLED)
    view = breaker.view()
    assert (view.calls, view.failures, view.consecutive_failures) == (1, 1, 1)
    assert view.outcomes == {"success": 0, "failure": 1, "ignored": 2}


def test_a_cancelled_call_that_was_slow_counts_as_slow(make, clock):
    """An outer timeout that cancels does not hide that the dependency hangs; 404s are no sign."""
    breaker = make(slow_threshold=5.0, minimum_calls=2, window=3600.0)
    for result in (IGNORED, CANCELLED, CANCELLED):
        assert breaker.state == "closed"
        permit = breaker.acquire()
        clock.now += 5
        permit.settle(result)
    assert (breaker.state, breaker.view().reason) == ("open", "slow_rate")


def test_a_generators_own_time_counts(make, clock):
    """While it is at a `yield` its time stands still, also where it is closed there."""
    breaker = make(slow_threshold=5.0, minimum_calls=1)
    permit = breaker.acquire()
    clock.now += 2
    permit.pause()
    clock.now += 100
    permit.pause()
    permit.resume()
    clock.now += 2
    permit.resume()
    permit.pause()
    clock.now += 100
    permit.settle()
    assert breaker.state == "closed"
    breaker.reset()
    permit = breaker.acquire()
    clock.now += 3
    permit.pause()
    permit.resume()
    clock.now += 2
    permit.settle()
    assert breaker.state == "open"


# --- for how long --------------------------------------------------------------------------------


def test_each_opening_in_a_row_doubles_the_open_time(make, clock):
    """30 s, 60 s and so on, up to ten minutes."""
    breaker = opened(make())
    times = []
    for _ in range(7):
        times.append(breaker.retry_after)
        pass_open_time(breaker, clock)
        settle(breaker, FAILED)
    assert times == [30, 60, 120, 240, 480, 600, 600]


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 24.0), (0.5, 30.0), (1.0, 36.0)])
def test_jitter_makes_it_a_fifth_longer_or_shorter(clock, chance, seconds):
    """At most; also of the longest."""
    breaker = opened(Breaker("feed.example", clock=clock, rng=lambda: chance))
    assert breaker.retry_after == pytest.approx(seconds)
    for _ in range(9):
        pass_open_time(breaker, clock)
        settle(breaker, FAILED)
    assert breaker.retry_after == pytest.approx(seconds * 20)


def test_jitter_is_random_by_default(clock):
    """Processes that open together do not come back together."""
    times = [opened(Breaker("feed.example", clock=clock)).retry_after or 0.0 for _ in range(50)]
    assert all(24 <= time <= 36 for time in times)
    assert len(set(times)) > 40


def test_health_makes_it_shorter_again(make, clock):
    """By one doubling for each 300 s closed; a rate limit between changes nothing in that."""
    breaker = opened(make())
    for _ in range(2):
        pass_open_time(breaker, clock)
        settle(breaker, FAILED)
    pass_open_time(breaker, clock)
    settle(breaker, None, None)
    clock.now += 600
    settle(breaker, limited(10))
    pass_open_time(breaker, clock)
    settle(breaker, None, None)
    assert opened(breaker).retry_after == 60


def test_after_a_night_of_outage_health_counts_at_once(make, clock):
    """The open time is halved for each 300 s, however often it had been the longest before."""
    breaker = opened(make())
    for _ in range(50):
        pass_open_time(breaker, clock)
        settle(breaker, FAILED)
    pass_open_time(breaker, clock)
    settle(breaker, None, None)
    clock.now += 300
    assert opened(breaker).retry_after == 480


def test_a_failures_retry_after_makes_it_at_least_that_long(make, clock):
    """As far as `longest_hold` goes."""
    for asked, seconds in ((7.0, 30.0), (90.0, 90.0), (1e9, 86_400.0)):
        breaker = make(consecutive_failures=1)
        settle(breaker, Failure("error", "500", "failure", True, asked, "server"))
        assert breaker.retry_after == seconds


def test_a_rate_limit_holds_it_for_exactly_that_time(make, clock):
    """At once, without jitter, and without a failure: the next opening is as long as before."""
    breaker = make(jitter=1.0, rng=lambda: 1.0)
    settle(breaker, limited(7))
    assert (breaker.state, breaker.retry_after, breaker.view().reason) == ("open", 7, "rate_limit")
    assert breaker.view().outcomes["failure"] == 0
    clock.now += 7
    settle(breaker, None, None)
    assert opened(breaker).retry_after == 60  # 30 s and all of the jitter
    breaker = make(longest_hold=5.0)
    settle(breaker, limited(7))
    assert breaker.retry_after == 5


def test_a_rate_limit_without_a_time_is_ignored(breaker):
    """Nobody can tell when to come back: 429 alone, or with a Retry-After of 0."""
    settle(breaker, *[limited(0.0), Failure("error", "429", "ignored", True, None, "rate_limit")])
    assert breaker.state == "closed"


@pytest.mark.parametrize("asked", [math.nan, -5.0, -math.inf, "soon", b"", object()])
def test_a_retry_after_that_is_none_holds_nothing(breaker, asked):
    """An exception may answer for itself, and say what it likes."""
    settle(breaker, limited(asked))
    assert breaker.state == "closed"
    settle(breaker, *[Failure("error", "500", "failure", True, asked, "server")] * 5)
    assert breaker.retry_after == 30


def test_an_endless_retry_after_ends(breaker):
    """By `longest_hold`."""
    settle(breaker, limited(math.inf))
    assert breaker.retry_after == 86_400


@pytest.mark.parametrize("verdict", ["broken", "", None, 1, ["failure"]])
def test_a_verdict_that_is_none_counts_as_failure(breaker, verdict):
    """And breaks no call."""

    class OddError(Exception):
        periscope_failure = Failure("error", "Odd", verdict, retryable=False)

    with pytest.raises(OddError), breaker:
        raise OddError
    assert breaker.view().outcomes == {"success": 0, "failure": 1, "ignored": 0}
    assert breaker.view().in_flight == 0


# --- half open -----------------------------------------------------------------------------------


def test_one_probe_at_a_time(make, clock):
    """More where the policy says so; who finds no room is rejected, and told to ask in a second."""
    for probes in (1, 3):
        breaker = opened(make(probes=probes))
        pass_open_time(breaker, clock)
        permits = [breaker.allow() for _ in range(5)]
        assert [permit is not None for permit in permits] == [n < probes for n in range(5)]
        assert breaker.view().probes == probes
        assert breaker.retry_after == 1.0


def test_two_successes_close_it(breaker, clock):
    """One is not enough, and nothing is rejected between them."""
    heard = heard_by(opened(breaker))
    pass_open_time(breaker, clock)
    assert breaker.state == "open"
    settle(breaker, None)
    assert (breaker.state, breaker.retry_after) == ("half_open", 0.0)
    settle(breaker, None)
    assert (breaker.state, breaker.retry_after, breaker.view().reason) == ("closed", None, None)
    wanted = [("open", "half_open", "probing"), ("half_open", "closed", "recovered")]
    assert told(heard)[-2:] == wanted
    assert heard[-1].error_type is heard[-2].error_type is None


def test_a_probe_that_fails_opens_it_again(breaker, clock):
    """For twice as long."""
    pass_open_time(opened(breaker), clock)
    settle(breaker, None, FAILED)
    assert (breaker.state, breaker.view().reason) == ("open", "probe_failed")
    assert breaker.retry_after == 60


def test_a_slow_probe_opens_it_again(make, clock):
    """Also one that was cancelled, but not one that says nothing about health."""
    for result, state in ((None, "open"), (CANCELLED, "open"), (IGNORED, "half_open")):
        breaker = opened(make(slow_threshold=5.0))
        pass_open_time(breaker, clock)
        permit = breaker.acquire()
        clock.now += 5
        permit.settle(result)
        assert breaker.state == state


def test_a_cancelled_probe_only_gives_its_place_back(breaker, clock):
    """It does not close the breaker, and does not open it."""
    pass_open_time(opened(breaker), clock)
    settle(breaker, CANCELLED)
    assert (breaker.state, breaker.view().probes) == ("half_open", 0)
    assert breaker.allow() is not None


def test_a_probe_that_never_ends_makes_room(breaker, clock):
    """After the lease, when another call wants it; until then its result counts."""
    pass_open_time(opened(breaker), clock)
    lost = breaker.acquire()
    clock.now += 59.9
    assert breaker.allow() is None
    clock.now += 0.1
    assert breaker.retry_after == 0.0
    found = breaker.acquire()
    assert lost.settle(FAILED)
    assert (breaker.state, breaker.view().outcomes["failure"]) == ("half_open", 6)
    assert found.settle()
    assert (breaker.view().in_flight, breaker.view().probes) == (0, 0)
    settle(breaker, None)
    assert breaker.state == "closed"


def test_what_comes_back_late_changes_nothing(breaker, clock):
    """A call that began before the breaker changed is counted, and not judged."""
    late = [breaker.acquire() for _ in range(8)]
    pass_open_time(opened(breaker), clock)
    probe = breaker.acquire()
    for permit in late[:7]:
        permit.settle()
    late[7].settle(FAILED)
    assert breaker.state == "half_open"
    assert breaker.view().outcomes == {"success": 7, "failure": 6, "ignored": 0}
    probe.settle()
    assert breaker.view().in_flight == 0


def test_a_permit_settles_once(breaker):
    """Only the first time counts."""
    permit = breaker.acquire()
    assert permit.outcome is None
    assert permit.settle(IGNORED) is True
    assert permit.settle(FAILED) is False
    assert permit.outcome == "ignored"
    assert (breaker.view().outcomes["failure"], breaker.view().in_flight) == (0, 0)


# --- how it is used ------------------------------------------------------------------------------


def test_with_counts_how_the_block_ends(breaker):
    """An exception passes as it is; success is no exception."""
    error = ConnectionError("gone")
    with pytest.raises(ConnectionError) as raised, breaker as permit:
        raise error
    assert raised.value is error
    assert permit.outcome == "failure"
    with breaker as permit:
        assert breaker.view().in_flight == 1
    assert permit.outcome == "success"
    assert breaker.view().outcomes == {"success": 1, "failure": 1, "ignored": 0}


def test_a_failure_can_be_told_without_being_raised(breaker):
    """By `conclude`, and in the block by `settle`."""
    with breaker as permit:
        permit.conclude(FAILED)
    with breaker as permit:
        permit.settle(FAILED)
    assert breaker.view().outcomes == {"success": 0, "failure": 2, "ignored": 0}


async def test_async_with_counts_how_the_block_ends(breaker):
    """As `with` does."""
    with pytest.raises(ConnectionError):
        async with breaker:
            raise ConnectionError
    async with breaker as permit:
        await asyncio.sleep(0)
    assert permit.outcome == "success"
    assert breaker.view().outcomes == {"success": 1, "failure": 1, "ignored": 0}


def test_blocks_can_be_nested(make):
    """Each breaker counts the call once, however often it guards it."""
    outer, inner = make(), Breaker("inner.example")
    with outer as first, inner, outer as second:
        assert guarding() == ("feed.example", "inner.example")
        assert (outer.view().in_flight, inner.view().in_flight) == (1, 1)
        assert outer.call(lambda: 7) == 7
        second.conclude(FAILED)
    assert (first.outcome, second.outcome) == ("success", "ignored")
    assert guarding() == ()
    assert outer.view().outcomes == {"success": 1, "failure": 0, "ignored": 0}
    assert (outer.view().in_flight, inner.view().in_flight) == (0, 0)


def test_a_probe_may_be_guarded_twice(make, clock):
    """The inner guard does not ask for another lease, which would reject the probe itself."""
    breaker = make(consecutive_failures=1, successes=1)
    settle(breaker, FAILED)
    clock.now += 30
    with breaker, breaker:
        breaker.call(lambda: None)
    assert breaker.state == "closed"


async def test_tasks_have_blocks_of_their_own(breaker):
    """Each settles its own permit, whatever ends first."""

    async def fetch(number: int) -> str | None:
        try:
            async with breaker as permit:
                await asyncio.sleep(0.001 * (number % 3))
                if number % 2:
                    raise ValueError
        except ValueError:
            pass
        return permit.outcome

    outcomes = await asyncio.gather(*map(fetch, range(50)))
    assert outcomes == ["success", "ignored"] * 25
    assert breaker.view().in_flight == 0


def test_threads_have_blocks_of_their_own(breaker):
    """Each settles its own permit."""
    outcomes: dict[int, str | None] = {}
    together = threading.Barrier(8)

    def fetch(number: int) -> None:
        try:
            with breaker as permit:
                together.wait(30)
                if number % 2:
                    raise ValueError
        except ValueError:
            pass
        outcomes[number] = permit.outcome

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == {n: "ignored" if n % 2 else "success" for n in range(8)}


def test_call_returns_and_raises_what_the_function_does(breaker):
    """Under a permit, which it settles; while it runs the breaker is among the `guarding`."""
    assert breaker.call(lambda a, *, b: (a, b, guarding()), 1, b=2) == (1, 2, ("feed.example",))
    with pytest.raises(ConnectionError):
        breaker.call(fail)
    assert guarding() == ()
    assert breaker.view().outcomes == {"success": 1, "failure": 1, "ignored": 0}
    with pytest.raises(CircuitOpenError):
        opened(breaker).call(lambda: pytest.fail("was called"))


async def test_call_async_returns_and_raises_what_the_function_does(breaker):
    """Under a permit, which it settles when the function is done."""

    async def fetch(url: str) -> str:
        assert breaker.view().in_flight == 1
        await asyncio.sleep(0)
        return url

    async def broken() -> None:
        await asyncio.sleep(0)
        raise ConnectionError

    assert await breaker.call_async(fetch, "a") == "a"
    with pytest.raises(ConnectionError):
        await breaker.call_async(broken)
    assert breaker.view().outcomes == {"success": 1, "failure": 1, "ignored": 0}
    with pytest.raises(CircuitOpenError):
        await opened(breaker).call_async(fetch, "a")


async def test_a_cancelled_call_is_ignored(breaker):
    """Cancelled from outside, it says nothing about the dependency."""
    task = asyncio.create_task(breaker.call_async(asyncio.sleep, 3600))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    view = breaker.view()
    assert (view.outcomes, view.in_flight) == ({"success": 0, "failure": 0, "ignored": 1}, 0)


async def test_guard_keeps_what_the_function_is(breaker):
    """Its name, signature and kind."""

    @breaker.guard
    def fetch(url: str, *, page: int = 1) -> str:
        """Fetch."""
        return f"{url} {page}"

    @breaker.guard
    async def fetch_async(url: str) -> str:
        return url

    assert (fetch.__name__, fetch.__doc__) == ("fetch", "Fetch.")
    assert str(inspect.signature(fetch)) == "(url: 'str', *, page: 'int' = 1) -> 'str'"
    assert fetch("a", page=2) == "a 2"
    assert inspect.iscoroutinefunction(fetch_async)
    assert await fetch_async("a") == "a"
    assert breaker.view().outcomes["success"] == 2
    opened(breaker)
    with pytest.raises(CircuitOpenError):
        fetch("a")
    with pytest.raises(CircuitOpenError):
        await fetch_async("a")


def test_guard_takes_no_generator_function(breaker):
    """It would be settled before anything is done."""

    def rows():
        yield 1

    async def arows():
        yield 1

    for function in (rows, arows, partial(rows)):
        with pytest.raises(TypeError, match="monitored"):
            breaker.guard(function)


async def test_acquire_raises_where_allow_says_none(breaker):
    """And both count a rejection."""
    opened(breaker)
    assert breaker.allow() is None
    assert await breaker.allow_async() is None
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    with pytest.raises(CircuitOpenError):
        await breaker.acquire_async()
    assert breaker.view().rejections == 4


async def test_async_calls_are_probes_too(breaker, clock):
    """Under the same leases."""
    pass_open_time(opened(breaker), clock)
    permit = await breaker.allow_async()
    assert permit is not None
    assert breaker.allow() is None
    permit.settle()
    (await breaker.acquire_async()).settle()
    assert breaker.state == "closed"


def test_a_watched_call_is_never_rejected(breaker, clock):
    """It counts where one may pass, as a probe too, and not where none may."""
    assert breaker.watch().settle() is True
    opened(breaker)
    assert breaker.watch() is None
    pass_open_time(breaker, clock)
    probe = breaker.watch()
    assert (breaker.state, breaker.view().probes) == ("half_open", 1)
    assert breaker.watch() is None
    probe.settle(FAILED)
    assert (breaker.state, breaker.view().rejections) == ("open", 0)


# --- the error -----------------------------------------------------------------------------------


def test_the_error_says_why_and_when(breaker):
    """In attributes and in its text."""
    with pytest.raises(CircuitOpenError) as raised:
        opened(breaker).acquire()
    error = raised.value
    assert (error.name, error.state, error.retry_after) == ("feed.example", "open", 30)
    assert error.reason == "consecutive_failures"
    assert str(error) == "breaker feed.example is open (consecutive_failures); try again in 30 s"
    assert (
        str(CircuitOpenError("a", retry_after=3600.0)) == "breaker a is open; try again in 3600 s"
    )
    assert str(CircuitOpenError("a", "forced_open")) == "breaker a is forced_open"


def test_the_error_can_be_pickled_and_copied():
    """With all that it says, as process pools need it."""
    error = CircuitOpenError("feed.example", "half_open", 1.0, "auth")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is CircuitOpenError
        assert vars(other) == vars(error)
        assert str(other) == str(error)


def test_the_error_is_no_failure_of_what_made_the_call(make):
    """To everybody else it is a rejection: an outer breaker ignores it."""
    failure = classify(CircuitOpenError("a", retry_after=30.0))
    assert (failure.outcome, failure.verdict, failure.retryable) == ("rejected", "ignored", False)
    assert (failure.error_type, failure.retry_after) == ("CircuitOpenError", 30.0)
    outer, inner = make(), opened(make())
    with pytest.raises(CircuitOpenError), outer:
        inner.acquire()
    assert outer.view().outcomes == {"success": 0, "failure": 0, "ignored": 1}


# --- by hand -------------------------------------------------------------------------------------


def test_forced_open_rejects_everything(breaker, clock):
    """However much time passes; nobody can tell until when."""
    breaker.force_open()
    clock.now += 1e6
    assert breaker.allow() is breaker.watch() is None
    assert (breaker.state, breaker.retry_after) == ("forced_open", None)


def test_disabled_passes_everything_and_judges_nothing(breaker):
    """It still counts the calls."""
    breaker.disable()
    settle(breaker, *[FAILED] * 20, REFUSED, limited(60))
    assert (breaker.state, breaker.view().calls) == ("disabled", 0)
    assert breaker.view().outcomes == {"success": 0, "failure": 21, "ignored": 1}


def test_observe_passes_everything_and_says_what_would_be(breaker):
    """And begins a new window each time."""
    heard = heard_by(breaker)
    breaker.observe()
    settle(breaker, *[FAILED] * 11, REFUSED, limited(60))
    assert (breaker.state, breaker.retry_after) == ("observe", None)
    assert told(heard) == [
        ("closed", "observe", "manual"),
        *[("observe", "open", "consecutive_failures")] * 2,
        ("observe", "open", "auth"),
        ("observe", "open", "rate_limit"),
    ]
    assert [one.would_be for one in heard] == [False, *[True] * 4]


def test_reset_closes_it_and_forgets(breaker, clock):
    """Also how often it had opened; what it has counted stays."""
    pass_open_time(opened(breaker), clock)
    settle(breaker, FAILED)
    breaker.reset()
    view = breaker.view()
    assert (view.state, view.calls, view.consecutive_failures, view.reason) == (
        "closed",
        0,
        0,
        None,
    )
    assert view.outcomes["failure"] == 6
    assert opened(breaker).retry_after == 30


def test_what_other_processes_find_is_adopted(breaker, clock):
    """With its time; set by hand, it stays as it is until somebody says otherwise."""
    heard = heard_by(breaker)
    breaker.adopt("open", reason="failure_rate", open_for=50.0, openings=2)
    assert (breaker.state, breaker.retry_after) == ("open", 50)
    assert told(heard) == [("closed", "open", "failure_rate")]
    assert (heard[0].adopted, heard[0].openings, heard[0].error_type) == (True, 2, None)
    pass_open_time(breaker, clock)
    settle(breaker, FAILED)
    assert breaker.retry_after == 120
    for by_hand in (breaker.force_open, breaker.disable, breaker.observe):
        by_hand()
        state = breaker.state
        breaker.adopt("open", reason="failure_rate", open_for=50.0)
        breaker.adopt("closed", reason="recovered")
        assert breaker.state == state
    breaker.adopt("closed", reason="manual")
    assert breaker.state == "closed"


def test_that_it_opened_once_more_elsewhere_is_adopted_with_the_reason(breaker):
    """Also where nothing was heard of the probe that failed in between."""
    opened(breaker)
    breaker.adopt("open", reason="probe_failed", open_for=50.0, openings=2)
    assert (breaker.refusal().reason, breaker.retry_after) == ("probe_failed", 50)


# --- listeners -----------------------------------------------------------------------------------


def test_listeners_are_told_in_order_and_elsewhere(breaker, clock):
    """In the thread of the worker, never in the caller's."""
    threads: set[threading.Thread] = set()
    heard = heard_by(breaker)
    breaker.listen(lambda _: threads.add(threading.current_thread()))
    for _ in range(100):
        pass_open_time(opened(breaker), clock)
        settle(breaker, None, None)
    told(heard)
    cycle = [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]
    assert [(one.from_state, one.to_state) for one in heard] == cycle * 100
    assert threading.current_thread() not in threads


def test_a_listener_that_raises_stops_nobody(breaker, caplog):
    """Neither the caller nor the other listeners."""
    guard.set_strict(False)
    breaker.listen(lambda _: 1 / 0)
    heard = heard_by(breaker)
    opened(breaker)
    breaker.reset()
    assert len(told(heard)) == 2
    assert guard.counts() == {"breaker listener": 2}


def test_a_listener_can_use_the_breaker(breaker):
    """It is told while no lock is held."""
    seen = []

    def listener(transition: Transition) -> None:
        if transition.to_state == "open":
            breaker.reset()
        with breaker:
            seen.append((transition.to_state, breaker.view().state))

    breaker.listen(listener)
    opened_state = threading.Thread(target=lambda: settle(breaker, *[FAILED] * 5))
    opened_state.start()
    opened_state.join(30)
    assert worker.finish_posted(30)
    assert worker.finish_posted(30)
    assert seen == [("open", "closed"), ("closed", "closed")]


def test_a_listener_can_be_ended(breaker):
    """By itself, also where the same one listens twice; ending it again does nothing."""
    heard: list[Transition] = []
    ends = [breaker.listen(heard.append) for _ in range(2)]
    breaker.disable()
    assert len(told(heard)) == 2
    ends[0]()
    ends[0]()
    breaker.reset()
    assert len(told(heard)) == 3
    ends[1]()
    breaker.disable()
    assert len(told(heard)) == 3


def test_listeners_that_come_at_once_are_all_heard(breaker):
    """None is lost in between."""
    counted: list[int] = []

    def listen() -> None:
        for _ in range(50):
            breaker.listen(lambda _: counted.append(1))

    threads = [threading.Thread(target=listen) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    breaker.disable()
    assert worker.finish_posted(30)
    assert len(counted) == 400


def test_a_transition_is_linked_to_the_call_that_caused_it(breaker):
    """By the span that the permit was told of."""
    context = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))
    heard = heard_by(breaker)
    settle(breaker, *[FAILED] * 4)
    permit = breaker.acquire()
    permit.conclude(FAILED, context)
    permit.settle()
    told(heard)
    assert heard[0].span_context is context


# --- the judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "error", "outcome"),
    [
        ("failure", KeyError, "failure"),
        ("success", ConnectionError, "success"),
        ("ignored", ConnectionError, "ignored"),
        (None, ConnectionError, "failure"),
        ("nonsense", ConnectionError, "failure"),
        (["ignored"], ConnectionError, "failure"),
    ],
)
def test_the_judge_is_asked_first(make, verdict, error, outcome):
    """What it does not know is judged as usual."""
    asked = []
    breaker = make(judge=lambda error: asked.append(error) or verdict)
    with pytest.raises(error) as raised, breaker as permit:
        raise error
    assert asked == [raised.value]
    assert permit.outcome == outcome


def test_a_judge_that_raises_is_passed_over(make, caplog):
    """The exception of the call passes, judged as usual, and a warning says why."""

    class Odd(str):
        __slots__ = ()

        def __eq__(self, other):
            raise OSError

        __hash__ = str.__hash__

    for judge in (lambda _: 1 / 0, lambda _: Odd("failure")):
        guard.reset()
        caplog.clear()
        breaker = make(judge=judge)
        with pytest.raises(ConnectionError), breaker as permit:
            raise ConnectionError
        assert permit.outcome == "failure"
        assert "judge= of breaker feed.example raised" in caplog.text


def test_a_judge_can_make_a_rate_limit_a_failure(make):
    """Then it opens as failures do, for at least the time that was asked for."""
    breaker = make(judge=lambda _: "failure")
    response = SimpleNamespace(status_code=429, headers={"Retry-After": "90"})
    error = OSError()
    error.response = response
    for _ in range(5):
        assert breaker.state == "closed"
        with pytest.raises(OSError), breaker:
            raise error
    assert (breaker.view().reason, breaker.retry_after) == ("consecutive_failures", 90)


# --- the policy ----------------------------------------------------------------------------------

BOUNDS = {
    "window": (0.01, 86_400.0),
    "minimum_calls": (1, 1_000_000),
    "failure_rate": (1e-6, 1.0),
    "consecutive_failures": (1, 1_000_000),
    "slow_threshold": (0.0, 86_400.0),
    "slow_rate": (1e-6, 1.0),
    "consecutive_slow": (1, 1_000_000),
    "open_time": (0.0, 600.0),
    "longest_open": (30.0, 86_400.0),
    "jitter": (0.0, 1.0),
    "decay": (0.001, 30 * 86_400.0),
    "longest_hold": (0.0, 86_400.0),
    "probes": (1, 1_000),
    "successes": (1, 1_000),
    "lease": (0.001, 86_400.0),
    "probe_wait": (0.0, 5.0),
}
WHOLE = ("minimum_calls", "consecutive_failures", "consecutive_slow", "probes", "successes")


@pytest.mark.parametrize("name", BOUNDS)
def test_each_setting_has_its_range(name):
    """Its bounds fit, what is beyond does not, and the message names the setting."""
    for bound in BOUNDS[name]:
        assert getattr(BreakerPolicy(**{name: bound}), name) == bound
    low, high = BOUNDS[name]
    step = 1 if name in WHOLE else 1e-3
    for value in (low - step, high + step, -1, *(() if name in WHOLE else (math.nan, math.inf))):
        with pytest.raises(ValueError, match=name):
            BreakerPolicy(**{name: value})


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", ["1", b"1", True, [1], 1j, len], ids=repr)
def test_a_setting_of_another_type_is_a_type_error(name, value):
    """Nothing is converted."""
    with pytest.raises(TypeError, match=name):
        BreakerPolicy(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_a_count_is_a_whole_number(name):
    """Not 2.0 either."""
    with pytest.raises(TypeError, match=f"{name}.*whole"):
        BreakerPolicy(**{name: 2.0})


@pytest.mark.parametrize("name", BOUNDS)
def test_only_two_rules_can_be_left_out(name):
    """None is no failures in a row, and no slow calls; else it is a wrong type."""
    if name in ("consecutive_failures", "consecutive_slow", "slow_threshold"):
        assert getattr(BreakerPolicy(**{name: None}), name) is None
    else:
        with pytest.raises(TypeError, match=name):
            BreakerPolicy(**{name: None})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("open_on_auth", 1), ("shared", "yes"), ("shared", None), ("judge", "x"), ("judge", 1)],
)
def test_the_other_settings_have_their_types(setting, value):
    """True or False, and a callable."""
    with pytest.raises(TypeError, match=setting):
        BreakerPolicy(**{setting: value})


def test_the_longest_open_time_is_no_shorter_than_the_first():
    """They would contradict each other."""
    with pytest.raises(ValueError, match="longest_open"):
        BreakerPolicy(open_time=700.0)


def test_an_unknown_setting_is_refused():
    """The message names those that there are."""
    with pytest.raises(TypeError, match=r"'treshold' is no setting.*slow_threshold"):
        Breaker("feed.example", treshold=1)
    with pytest.raises(TypeError, match="treshold"):
        BreakerPolicy().changed(treshold=1)


def test_changes_are_put_over_the_policy():
    """The policy itself stays as it is, and is checked as a whole."""
    policy = BreakerPolicy(probes=3)
    breaker = Breaker("feed.example", policy, successes=4)
    assert (breaker.policy.probes, breaker.policy.successes) == (3, 4)
    assert policy.successes == 2
    with pytest.raises(ValueError, match="probes"):
        Breaker("feed.example", policy, probes=0)


def test_a_policy_cannot_be_changed():
    """It may be shared by many breakers."""
    with pytest.raises(AttributeError):
        BreakerPolicy().probes = 2


# --- its name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "  ", "\x00\x1b", None, 5, b"a"], ids=repr)
def test_a_breaker_needs_a_name(name):
    """A string with something in it."""
    with pytest.raises(ValueError, match="name"):
        Breaker(name)


def test_a_hostile_name_is_made_harmless():
    """One clean line of bounded length, in errors too."""
    breaker = Breaker("a\n\x1b[31mb\u202e" + "x" * 100_000)
    assert len(breaker.name) <= 200
    assert breaker.name.isprintable()
    breaker.force_open()
    assert breaker.name in str(breaker.refusal())
    assert breaker.name in repr(breaker)


# --- threads, forks and memory -------------------------------------------------------------------


COLLECTED = """
import gc
from periscope_otel import Breaker
from periscope_otel.failure import classify

breaker = Breaker("feed.example")
threshold = gc.get_threshold()

def rows(own):
    with breaker:
        yield 1

def garbage():
    own = []
    own.append(rows(own))
    next(own[0])

for later in range(1, 60):  # so many allocations
    gc.collect()
    gc.disable()
    garbage()
    gc.set_threshold(gc.get_count()[0] + later)
    gc.enable()
    for _ in range(5):
        permit = breaker.allow()
        if permit is not None:
            permit.settle(classify(ConnectionError()))
    gc.set_threshold(*threshold)
    breaker.reset()
gc.collect()
print("done", breaker.view().in_flight)
"""


def test_a_collection_in_the_middle_of_it_cannot_hang_it():
    """A generator in a block may be collected wherever something is allocated."""
    # A process of its own: with all that tests leave in memory, each collection takes seconds.
    ended = subprocess.run(
        [sys.executable, "-c", COLLECTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "done 0\n", ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_child_of_a_fork_begins_anew(breaker, clock):
    """A new lock, no permits and no counts, in the state that it was in; parent's are parent's."""
    late = breaker.acquire()
    pass_open_time(opened(breaker), clock)
    probe = breaker.acquire()
    reading, writing = os.pipe()
    with breaker._lock:
        pid = os.fork()
        if pid == 0:
            os.write(writing, _as_the_child_sees_it(breaker, [late, probe]).encode())
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(reading, 10_000).decode() == (
        "half_open 0 0 {'success': 0, 'failure': 0, 'ignored': 0} "
        "half_open 0 0 {'success': 0, 'failure': 0, 'ignored': 0} "
        "closed 0 0 {'success': 2, 'failure': 0, 'ignored': 0} "
    )
    assert (breaker.view().in_flight, breaker.view().probes) == (2, 1)


def _as_the_child_sees_it(breaker: Breaker, permits: list[Any]) -> str:
    done: list[str] = []

    def work() -> None:
        done.append(_told_of(breaker))
        for permit in permits:
            permit.settle(FAILED)
        done.append(_told_of(breaker))
        settle(breaker, None, None)
        done.append(_told_of(breaker))

    thread = threading.Thread(target=work, daemon=True)  # another one: the lock is reentrant
    thread.start()
    thread.join(30)
    return "".join(done)


def _told_of(breaker: Breaker) -> str:
    view = breaker.view()
    return f"{view.state} {view.in_flight} {view.probes} {view.outcomes} "


def test_ten_thousand_breakers_take_a_few_megabytes():
    """Below 1,500 bytes each, unused or used."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = [Breaker(f"host-{number}.example") for number in range(10_000)]
        unused = (tracemalloc.get_traced_memory()[0] - before) / len(made)
        for breaker in made:
            settle(breaker, None, FAILED)
        used = (tracemalloc.get_traced_memory()[0] - before) / len(made)
    finally:
        tracemalloc.stop()
    print(f"a breaker: {unused:.0f} bytes, {used:.0f} used")
    assert unused <= used < 2000


def test_a_breaker_that_nobody_holds_is_gone():
    """The registry does not keep what it has not made."""
    import weakref

    breaker = Breaker("gone.example")
    settle(breaker, FAILED)
    known = weakref.ref(breaker)
    del breaker
    gc.collect()
    assert known() is None


# --- what shares verdicts ------------------------------------------------------------------------


class Sharing:
    """Other processes, as a test wants them."""

    def __init__(self, grant: Grant | None) -> None:
        self.grant = grant
        self.heard: list[Any] = []

    def moved(self, breaker, transition) -> None:
        self.heard.append(transition.to_state)

    def ask(self, breaker) -> Sharing | None:
        return self

    def settled(self, breaker, lease, outcome) -> None:
        self.heard.append((lease, outcome))

    def wait(self, timeout: float) -> Grant | None:
        self.heard.append(timeout)
        return self.grant

    async def wait_async(self, timeout: float) -> Grant | None:  # noqa: ASYNC109
        return self.wait(timeout)


class Broken(Sharing):
    def moved(self, *_: Any) -> None:
        raise OSError

    ask = settled = wait = moved


async def test_others_are_asked_before_a_probe(breaker, clock):
    """Who is granted the lease probes, and says how it ended; nobody else does."""
    breaker.sharing = sharing = Sharing(Grant("lease-1"))
    pass_open_time(opened(breaker), clock)
    settle(breaker, None)
    (await breaker.acquire_async()).settle()
    wait = breaker.policy.probe_wait
    probed = [wait, ("lease-1", "success")]
    moves = ["open", "half_open", "closed"]
    assert sharing.heard == ["open", wait, "half_open", *probed[1:], wait, "closed", *probed[1:]]
    assert [one for one in sharing.heard if isinstance(one, str)] == moves
    sharing.grant = Grant(None)
    pass_open_time(opened(breaker), clock)
    assert breaker.allow() is None
    assert await breaker.allow_async() is None


def test_where_nobody_answers_it_decides_alone(make, clock):
    """With `probe_wait=0` the call is rejected: one may pass when the answer is there."""
    for wait, passes in ((0.05, True), (0.0, False)):
        breaker = make(probe_wait=wait)
        breaker.sharing = Sharing(None)
        pass_open_time(opened(breaker), clock)
        assert (breaker.allow() is not None) is passes


def test_a_call_passes_if_others_closed_it_meanwhile(breaker, clock):
    """Even if they would not let it probe."""

    class Closing(Sharing):
        def wait(self, timeout: float) -> Grant | None:
            breaker.adopt("closed", reason="recovered")
            return self.grant

    for grant in (None, Grant(None), Grant("lease-1")):
        breaker.sharing = Closing(grant)
        pass_open_time(opened(breaker), clock)
        permit = breaker.allow()
        assert permit is not None
        assert (breaker.state, breaker.view().probes) == ("closed", 0)
        permit.settle()


async def test_errors_of_the_sharing_are_contained(breaker, clock):
    """The breaker goes on alone."""
    guard.set_strict(False)
    breaker.sharing = Broken(None)
    pass_open_time(opened(breaker), clock)
    permit = await breaker.allow_async()
    permit.lease = "lease-1"
    permit.settle()
    settle(breaker, None)
    assert breaker.state == "closed"
    assert guard.counts()["breaker sharing"] >= 5


def test_slow_calls_in_a_row_open_it(clock):
    """A feed that is polled seldom and hangs each time opens it, though the window is empty."""
    breaker = Breaker("hanging", slow_threshold=20.0, consecutive_slow=3, clock=clock)
    for _ in range(3):
        assert breaker.state == "closed"
        permit = breaker.allow()
        clock.now += 20.0
        permit.settle()
        clock.now += 300.0
    assert (breaker.state, breaker.view().reason) == ("open", "consecutive_slow")


def test_call_refuses_a_coroutine(clock):
    """`call` would settle before the coroutine has run: it says what to use instead."""
    breaker = Breaker("async", clock=clock)

    async def fetch() -> None: ...

    with pytest.raises(TypeError, match="call_async"):
        breaker.call(fetch)
    assert breaker.view().in_flight == 0
    assert breaker.view().outcomes["success"] == 0


def test_a_denied_call_says_when_to_ask_again(clock):
    """Where other processes probe, the refusal says how long to wait, so that nobody spins."""
    breaker = Breaker("shared", consecutive_failures=1, open_time=10.0, jitter=0.0, clock=clock)
    breaker.sharing = Denying(retry_after=4.0)
    breaker.allow().settle(FAILED)
    clock.now += 10.0
    assert breaker.allow() is None
    assert breaker.refusal().retry_after == 4.0
    clock.now += 4.0
    assert breaker.retry_after == 0.0


class Denying:
    """The word of other processes: they probe themselves."""

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after

    def moved(self, *_: object) -> None: ...

    def settled(self, *_: object) -> None: ...

    def ask(self, _breaker: object) -> Denying:
        return self

    def wait(self, _timeout: float) -> Grant:
        return Grant(None, self.retry_after)
