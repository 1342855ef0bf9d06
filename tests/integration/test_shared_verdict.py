"""Verdicts on breakers, shared by processes through a real Redis or Valkey."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from typing import TYPE_CHECKING
from weakref import ref

import pytest
from redis_servers import NoServerError, RedisServer
from sides import (
    IGNORED,
    SOUND,
    WITHIN,
    Clock,
    Side,
    fail,
    lease_of,
    leases_given_back,
    may_probe,
    new_name,
    recorded,
    recorded_state,
    sides,
    trip,
    until,
    wait_for_answers,
    wait_until_over,
)

from periscope_otel.failure import Failure
from periscope_otel.redis_link import RedisLink
from periscope_otel.resilience.sharing.records import (
    Records,
    Verdict,
    leases_key,
    new_epoch,
    record_key,
)
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from periscope_otel.resilience.breaker import Breaker
    from periscope_otel.resilience.circuit import Permit


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request, tmp_path_factory) -> Iterator[RedisServer]:
    try:
        made = RedisServer(request.param, tmp_path_factory.mktemp(request.param))
    except NoServerError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def client(server):
    with server.client as made:
        made.flushall()
        yield made


@pytest.fixture
def side(server, client) -> Iterator[Callable[..., Side]]:
    """Return what makes sides: each stands for a process."""
    with sides(server, client) as make:
        yield make


@pytest.fixture
def answered(monkeypatch) -> None:
    """Have every question wait for its answer."""
    wait_for_answers(monkeypatch)


@pytest.fixture
def name() -> str:
    return new_name()


@pytest.fixture
def records(server) -> Iterator[Records]:
    link = RedisLink(server.url, WITHIN)
    yield Records(link)
    link.close()


# --- one verdict for all -------------------------------------------------------------------------


def test_what_one_has_found_the_others_take_over(side, name):
    """A breaker that opens in one process is open in the others, with the same time and reason."""
    a, b = side(), side()
    one, two = a.breaker(name, open_time=500.0), b.breaker(name, open_time=30.0)
    trip(one)
    until(lambda: two.state == "open")
    assert two.retry_after == pytest.approx(500.0, abs=WITHIN)
    assert two.refusal().reason == "consecutive_failures"
    assert b.steps == [("closed", "open")]
    assert b.seen[0].adopted


def test_probes_of_several_processes_close_it_for_all(side, name):
    """Successes count together: two processes' one each close it everywhere."""
    sides = [side() for _ in range(3)]
    one, two, three = (each.breaker(name) for each in sides)
    trip(one)
    until(lambda: two.state == three.state == "open")
    lease_of(one).settle()
    lease_of(two).settle()
    until(lambda: {one.state, two.state, three.state} == {"closed"})
    # One that looks late sees the last of several changes only.
    until(lambda: all(each.steps[-1][1] == "closed" for each in sides))


def test_a_probe_that_fails_opens_it_for_all(side, client, name):
    """The next open time is the longer one, for everybody."""
    a, b, clock = side(), side(), Clock()
    one, two = (each.breaker(name, open_time=100.0, clock=clock) for each in (a, b))
    trip(one)
    until(lambda: two.state == "open")
    clock.ahead = 100.0
    client.hset(record_key(name), "until", 1)  # it is over by the Redis's clock, too
    fail(lease_of(two))
    until(lambda: one.state == "open" and (one.retry_after or 0) > 100.0)
    assert one.refusal().reason == "probe_failed"


@pytest.mark.usefixtures("answered")
def test_only_so_many_probe_at_the_same_time(side, name):
    """With one probe's lease out, other processes' calls are rejected, and told to come back."""
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name, clock=Clock(stands=True))
    trip(one)
    until(lambda: two.state == "open")
    probe = lease_of(one)
    until(lambda: two.state == "half_open")
    assert [two.allow() for _ in range(20)] == [None] * 20
    assert two.retry_after > 0
    probe.settle()
    lease_of(two)


@pytest.mark.usefixtures("answered")
def test_as_many_probe_as_the_policy_says(side, name):
    """`probes` leases are out at a time, of all processes together."""
    sides = [side() for _ in range(4)]
    made = [each.breaker(name, probes=2) for each in sides]
    trip(made[0])
    until(lambda: all(each.state == "open" for each in made))
    lease_of(made[0])
    lease_of(made[1])
    time.sleep(0.15)  # for longer than a denial holds
    assert [each.allow() for each in made[2:]] == [None, None]


def test_a_lease_that_ends_makes_room(side, name):
    """A process that dies in a probe does not keep the others out; its late result is nothing."""
    a, b = side(), side()
    one, two = (each.breaker(name, lease=0.3) for each in (a, b))
    trip(one)
    until(lambda: two.state == "open")
    late = lease_of(one)
    probe = lease_of(two)
    late.settle()
    time.sleep(0.1)
    assert (one.state, two.state) == ("half_open", "half_open")
    probe.settle()
    lease_of(two).settle()
    until(lambda: one.state == two.state == "closed")


def test_an_ignored_probe_only_gives_its_lease_back(side, name):
    """A cancelled probe neither closes nor opens it; the next one may go at once."""
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name)
    trip(one)
    until(lambda: two.state == "open")
    lease_of(one).settle(IGNORED)
    lease_of(two)
    assert {one.state, two.state} == {"half_open"}


def test_of_two_that_open_at_the_same_time_one_is_first(side, records, name, monkeypatch):
    """The loser takes over the winner's time: one record, one generation."""
    # A poll that had found no record would write the one of what has just opened, too.
    monkeypatch.setattr("periscope_otel.resilience.sharing.verdicts.POLL", 3600.0)
    sides = [side() for _ in range(4)]
    made = [
        each.breaker(name, open_time=1000.0 * n, longest_open=4000.0)
        for n, each in enumerate(sides, 1)
    ]
    for _ in range(4):
        for each in made:
            fail(each.acquire())
    barrier = threading.Barrier(4)

    def last(each: Breaker) -> None:
        permit = each.acquire()
        barrier.wait()
        fail(permit)

    threads = [threading.Thread(target=last, args=(each,)) for each in made]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    until(lambda: len({round((each.retry_after or 0) / 1000) for each in made}) == 1)
    found = recorded(records, name)
    assert found.generation == 1
    assert all(each.retry_after == pytest.approx(found.open_for, abs=WITHIN) for each in made)


def test_what_is_done_by_hand_counts_everywhere(side, name):
    """`force_open`, `disable`, `observe` and `reset` in one process are those of all."""
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name)
    for act, state in (
        (one.force_open, "forced_open"),
        (two.disable, "disabled"),
        (one.observe, "observe"),
        (two.reset, "closed"),
    ):
        act()
        until(lambda state=state: one.state == two.state == state)


def test_what_is_done_by_hand_twice_ends_as_it_was_done_last(side, records, name):
    """However fast: no step is overridden by the one before it."""
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name)
    for _ in range(20):
        one.force_open()
        one.reset()
    one.disable()
    until(lambda: recorded_state(records, name) == "disabled")
    until(lambda: one.state == two.state == "disabled")
    time.sleep(0.2)
    assert (one.state, two.state) == ("disabled", "disabled")


def test_a_breaker_that_is_made_later_is_told(side, name):
    """A process that starts while it is open does not have to fail five times."""
    a, b = side(), side()
    trip(a.breaker(name, open_time=30.0))
    two = b.breaker(name, open_time=30.0)
    until(lambda: two.state == "open")


def test_the_verdict_of_a_process_that_knew_nothing_counts(side, records, name):
    """A short-lived process that opens it before it has read that it was closed is heard."""
    records.change(name, Verdict("closed", "recovered"), None)
    b = side(start=False)
    two = b.breaker(name)
    trip(two)
    b.verdicts.start()
    until(lambda: recorded_state(records, name) == "open")
    assert two.state == "open"


@pytest.mark.parametrize(("age", "seconds"), [(0, 80.0), (650, 20.0), (100_000, 10.0)])
def test_what_others_forget_of_it_a_new_process_forgets_too(side, client, name, age, seconds):
    """The open time is halved for each `decay` that it was closed, also before this one began."""
    now = client.time()[0]
    one = side()
    breaker = one.breaker(name, open_time=10.0, clock=Clock(stands=True))
    client.hset(record_key(name), mapping=SOUND | {
        "epoch": new_epoch(), "generation": 2, "openings": 3, "since": (now - age) * 1000,
    })  # fmt: skip
    until(lambda: breaker.view().openings == round(math.log2(seconds / 10.0)))
    one.finish(client)  # what it finds while it still takes over the record would be overridden
    trip(breaker)
    assert breaker.retry_after == pytest.approx(seconds)


def test_a_retry_after_is_shared(side, name):
    """A dependency that says when to come back is left alone by all for as long."""
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name)
    one.acquire().settle(
        Failure("error", "429", "ignored", retryable=True, retry_after=777.0, reason="rate_limit")
    )
    until(lambda: two.state == "open")
    assert two.retry_after == pytest.approx(777.0, abs=WITHIN)


# --- asking --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("answered")
def test_fifty_workers_send_one_probe(side, records, name):
    """Of fifty threads of five processes that call as it may be probed, one does."""
    sides = [side() for _ in range(5)]
    made = [each.breaker(name, open_time=0.3) for each in sides]
    trip(made[0])
    until(lambda: all(each.state == "open" for each in made))
    wait_until_over(*made, records=records)
    barrier = threading.Barrier(50)
    passed: list[Permit] = []

    def call(each: Breaker) -> None:
        barrier.wait()
        permit = each.allow()
        if permit is not None:
            passed.append(permit)

    threads = [threading.Thread(target=call, args=(each,)) for each in made for _ in range(10)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(passed) <= 1
    assert (passed or [may_probe(made[0])])[0].lease is not None


def ask_too_soon(server: RedisServer, breaker: Breaker) -> None:
    """Make a call that does not wait, and whose answer comes when it has been rejected."""
    server.pause()
    try:
        assert breaker.allow() is None
    finally:
        server.resume()


@pytest.mark.usefixtures("answered")
def test_where_calls_do_not_wait_the_next_one_passes(side, server, records, name):
    """With `probe_wait=0` the call that asks is rejected, and the next one has the lease."""
    breaker = side().breaker(name, probe_wait=0.0)
    trip(breaker)
    wait_until_over(breaker, records=records)
    server.pause()  # which would hold up whoever waits
    try:
        began = time.monotonic()
        assert breaker.allow() is None
        assert time.monotonic() - began < WITHIN / 2  # the Redis is waited for longer
    finally:
        server.resume()
    lease_of(breaker)


@pytest.mark.usefixtures("answered")
def test_rare_calls_that_do_not_wait_pass_too(side, server, client, records, name, *, monkeypatch):
    """Where each lease would be gone before the next call comes, that call decides alone."""
    monkeypatch.setattr("periscope_otel.resilience.sharing.talk.HELD", 0.05)
    breaker = side().breaker(name, probe_wait=0.0)
    trip(breaker)
    wait_until_over(breaker, records=records)
    for _ in range(2):
        before = leases_given_back(client)
        ask_too_soon(server, breaker)
        until(lambda before=before: leases_given_back(client) > before)
        permit = breaker.allow()
        if permit is not None:
            break
    assert permit is not None
    permit.settle()
    until(lambda: breaker.allow() is not None)


@pytest.mark.usefixtures("answered")
def test_a_lease_that_nobody_takes_goes_back(side, server, client, records, name, *, monkeypatch):
    """An answer that came too late is no probe that is out."""
    monkeypatch.setattr("periscope_otel.resilience.sharing.talk.HELD", 0.1)
    breaker = side().breaker(name, probe_wait=0.0)
    trip(breaker)
    wait_until_over(breaker, records=records)
    before = leases_given_back(client)
    ask_too_soon(server, breaker)
    until(lambda: leases_given_back(client) > before)
    assert client.zcard(leases_key(name)) == 0


@pytest.mark.usefixtures("answered")
def test_a_lease_of_a_breaker_that_is_gone_goes_back_too(
    side, server, client, records, name, *, monkeypatch
):
    """Whoever asked for it and went keeps nobody out."""
    monkeypatch.setattr("periscope_otel.resilience.sharing.talk.HELD", WITHIN)
    a = side()
    trip(a.breaker(name, probe_wait=0.0))
    wait_until_over(*a.breakers, records=records)
    ask_too_soon(server, a.breakers[0])
    until(lambda: a.holds_a_lease(a.breakers[0]))
    talk = a.verdicts._exchange.talk(a.breakers[0])
    a.breakers.clear()
    assert worker.finish_posted(WITHIN)
    until(lambda: gc.collect() is not None and talk.breaker() is None)
    assert client.zcard(leases_key(name)) == 1
    talk._hand = talk._hand._replace(until=0.0)  # its time is over, now that it is gone
    until(lambda: client.zcard(leases_key(name)) == 0)


@pytest.mark.usefixtures("answered")
async def test_a_coroutine_asks_without_holding_the_loop_up(side, server, records, name):
    """While one waits for an answer the others go on."""
    breaker = side().breaker(name)
    trip(breaker)
    wait_until_over(breaker, records=records)
    server.pause()
    try:
        asking = asyncio.create_task(breaker.allow_async())
        turns = 0
        while turns < 10:
            await asyncio.sleep(0.001)
            turns += 1
        assert not asking.done()
    finally:
        server.resume()
    permit = await asking
    while permit is None or permit.lease is None:  # no answer came in time: the machine is busy
        if permit is not None:
            permit.settle(IGNORED)
        await asyncio.sleep(0)
        permit = await breaker.allow_async()


async def test_a_coroutine_waits_no_longer_than_it_may(side, server, name):
    """With a Redis that hangs the loop goes on, and after `probe_wait` the call is decided on."""
    breaker = side().breaker(name, probe_wait=0.05)
    trip(breaker)
    wait_until_over(breaker)
    server.pause()
    try:
        began = time.monotonic()
        permit = await breaker.allow_async()
        assert permit is not None
        assert permit.lease is None
        assert time.monotonic() - began < WITHIN / 2  # the Redis is waited for longer
    finally:
        server.resume()


@pytest.mark.usefixtures("answered")
async def test_a_cancelled_question_loses_no_lease(
    side, server, client, records, name, *, monkeypatch
):
    """The lease of a call that was cancelled as it asked is the next call's."""
    monkeypatch.setattr("periscope_otel.resilience.sharing.talk.HELD", WITHIN)
    a = side()
    breaker = a.breaker(name)
    trip(breaker)
    wait_until_over(breaker, records=records)
    server.pause()  # so that it is cancelled before there is an answer
    try:
        asking = asyncio.create_task(breaker.allow_async())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    finally:
        server.resume()
    until(lambda: a.holds_a_lease(breaker))
    assert client.zcard(leases_key(name)) == 1
    permit = breaker.allow()
    assert permit is not None
    assert permit.lease is not None
    assert client.zcard(leases_key(name)) == 1


def test_calls_that_pass_ask_nobody(side, client, name):
    """A closed breaker has no record, and its calls cost the Redis nothing."""
    breaker = side().breaker(name)
    for _ in range(100):
        breaker.acquire().settle()
    time.sleep(0.05)
    assert client.dbsize() == 0


def test_a_breaker_of_this_redis_is_not_shared(side, server, client):
    """Whether the Redis can be reached is for each process to find out."""
    a = side()
    for own in ("127.0.0.1", f"127.0.0.1:{server.port}"):
        breaker = a.breaker(own)
        trip(breaker)
        wait_until_over(breaker)
        assert breaker.acquire().lease is None
    time.sleep(0.05)
    assert client.dbsize() == 0


# --- a feed that is fetched once an hour ---------------------------------------------------------


@pytest.mark.parametrize("redis_answers", [True, False])
def test_an_hourly_feed_recovers_at_its_first_call(
    side, server, records, name, *, redis_answers, monkeypatch
):
    """Open time over long ago: one question, and the call passes; also without an answer."""
    clock = Clock()
    breaker = side().breaker(name, clock=clock, probe_wait=5.0 if redis_answers else 0.5)
    trip(breaker)
    wait_until_over(breaker, records=records)
    clock.ahead = 3600.0
    if redis_answers:
        wait_for_answers(monkeypatch)
    else:
        server.pause()
    try:
        permit = breaker.allow()
        assert permit is not None
        assert (permit.lease is not None) == redis_answers
        permit.settle()
        clock.ahead += 3600.0
        second = may_probe(breaker)
        second.settle()
        assert breaker.state == "closed"
    finally:
        if not redis_answers:
            server.resume()


# --- beginning and ending ------------------------------------------------------------------------


def test_close_tells_what_is_not_told_yet(side, records, name):
    """A job that opens a breaker and ends has told it."""
    a = side(start=False)
    breaker = a.breaker(name)
    a.verdicts.start()
    trip(breaker)
    assert a.verdicts.close(WITHIN)
    assert recorded(records, name).state == "open"


def test_after_close_the_process_decides_alone(side, name):
    """Nothing raises, and nothing waits."""
    a = side()
    breaker = a.breaker(name)
    assert a.verdicts.close(WITHIN)
    trip(breaker)
    wait_until_over(breaker)
    permit = breaker.acquire()
    assert permit.lease is None
    permit.settle()
    assert a.verdicts.close(WITHIN)
    a.verdicts.start()
    assert not a.verdicts.answers


@pytest.mark.usefixtures("answered")
def test_close_gives_leases_back(side, server, client, records, name, *, monkeypatch):
    """A process that ends keeps nobody waiting for a lease that it does not use."""
    monkeypatch.setattr("periscope_otel.resilience.sharing.talk.HELD", WITHIN)
    a = side()
    breaker = a.breaker(name, probe_wait=0.0)
    trip(breaker)
    wait_until_over(breaker, records=records)
    ask_too_soon(server, breaker)
    until(lambda: client.zcard(leases_key(name)) == 1)
    assert a.verdicts.close(WITHIN)
    assert client.zcard(leases_key(name)) == 0


def test_it_starts_when_it_is_first_asked(side, name):
    """Whoever forgets `start` has it at the first question."""
    a = side(start=False)
    breaker = a.breaker(name)
    trip(breaker)
    wait_until_over(breaker)
    breaker.allow()
    until(lambda: a.verdicts.answers)


def test_breakers_that_are_gone_are_let_go(side, records, name):
    """Sharing keeps none alive."""
    a = side()
    names = [f"{name}-{n}" for n in range(20)]
    for each in names:
        trip(a.breaker(each))
    gone = [ref(each) for each in a.breakers]
    a.breakers.clear()
    assert worker.finish_posted(WITHIN)
    until(lambda: all(recorded_state(records, each) == "open" for each in names))
    until(lambda: gc.collect() is not None and not any(each() for each in gone))


def test_many_breakers_are_polled_in_turns(side, client, monkeypatch, name):
    """No poll looks at more than so many; all have their turn."""
    monkeypatch.setattr("periscope_otel.resilience.sharing.exchange.MOST_POLLED", 10)
    monkeypatch.setattr("periscope_otel.resilience.sharing.verdicts.POLL", 0.05)
    a = side()
    made = [a.breaker(f"{name}-{n:02}") for n in range(25)]
    for breaker in made:
        forced = SOUND | {"state": "forced_open", "epoch": new_epoch()}
        client.hset(record_key(breaker.name), mapping=forced)
    until(lambda: all(each.state == "forced_open" for each in made))
