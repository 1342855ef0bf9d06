"""Shared verdicts, with a Redis or Valkey that is away, slow, wiped or damaged."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis_servers import NoServerError, RedisServer
from sides import (
    SOUND,
    WITHIN,
    Side,
    fail,
    lease_of,
    listening,
    may_probe,
    new_name,
    recorded,
    sides,
    trip,
    until,
    wait_for_answers,
    wait_until_over,
)

from periscope_otel.redis_link import TIMEOUT, RedisLink
from periscope_otel.resilience.sharing.records import (
    INDEX,
    MOST_NAMES,
    Records,
    Verdict,
    leases_key,
    new_epoch,
    record_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
def name() -> str:
    return new_name()


@pytest.fixture
def records(server) -> Iterator[Records]:
    link = RedisLink(server.url, WITHIN)
    yield Records(link)
    link.close()


def test_after_everything_was_removed_the_verdict_is_written_again(side, records, client, name):
    """No process closes because of a wipe, and none has to find out again."""
    a, b = side(), side()
    one, two = a.breaker(name, open_time=500.0), b.breaker(name, open_time=500.0)
    trip(one)
    until(lambda: two.state == "open")
    a.finish(client)
    epoch = recorded(records, name).epoch
    client.flushall()
    until(lambda: recorded(records, name) is not None)
    found = recorded(records, name)
    assert found.epoch != epoch
    assert found.state == "open"
    assert found.open_for == pytest.approx(500.0, abs=WITHIN)
    time.sleep(1.2)
    assert a.steps == b.steps == [("closed", "open")]
    assert recorded(records, name).generation == 1


def test_after_a_wipe_one_of_all_probes(side, client, name, monkeypatch):
    """Leases are as good as before."""
    wait_for_answers(monkeypatch)
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name)
    trip(one)
    until(lambda: two.state == "open")
    wait_until_over(one, two)
    client.flushall()
    lease_of(one)
    until(lambda: two.state == "half_open")
    time.sleep(0.15)
    assert two.allow() is None


def test_a_closed_breaker_stays_closed_in_a_wipe(side, client, name):
    """Nothing is written, and nothing happens."""
    a = side()
    breaker = a.breaker(name)
    trip(breaker)
    may_probe(breaker).settle()
    may_probe(breaker).settle()
    until(lambda: client.hget(record_key(name), "state") == b"closed")
    a.finish(client)  # the index is written after the record
    steps = a.steps
    client.flushall()
    time.sleep(1.3)
    assert (a.steps, client.dbsize()) == (steps, 0)


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_with_the_redis_away_each_process_decides_alone(side, server, name, fault):
    """No call waits for long, none raises, and probes go on; on return they agree again."""
    a, b = (side(timeout=TIMEOUT) for _ in range(2))
    one, two = (each.breaker(name, probe_wait=0.05) for each in (a, b))
    trip(one)
    until(lambda: two.state == "open")
    getattr(server, fault)()
    try:
        waited = []
        for breaker in (one, two):
            permit = may_probe(breaker)
            assert permit.lease is None
            for _ in range(20):
                started = time.monotonic()
                breaker.allow()
                waited.append(time.monotonic() - started)
            fail(permit)
            assert breaker.state == "open"
        # But for a few that the machine has held up.
        assert sum(sorted(waited)[:-4]) < 1.0
    finally:
        server.start() if fault == "kill" else server.resume()
    until(lambda: _state_of(server, name) is not None)
    until(lambda: a.verdicts.answers and b.verdicts.answers)
    with server.client as client:
        a.finish(client)  # what both have found meanwhile is told, and comes between no probes
        b.finish(client)

    def closed() -> bool:
        permit = one.allow()
        if permit is not None:
            permit.settle()
        return one.state == two.state == "closed"

    until(closed)
    assert max(Counter(a.steps).values()) <= 4
    assert max(Counter(b.steps).values()) <= 4


def _state_of(server: RedisServer, name: str) -> bytes | None:
    try:
        with server.client as client:
            return client.hget(record_key(name), "state")
    except RedisError:
        return None


def test_what_was_found_in_an_outage_is_told_afterwards(side, server, client, name):
    """The newest verdict of each breaker is published when the Redis is back."""
    a, b = side(), side()
    one, two = a.breaker(name, open_time=60.0), b.breaker(name, open_time=60.0)
    server.kill()
    try:
        trip(one)
        until(lambda: not a.verdicts.answers)
    finally:
        server.start()
    until(lambda: two.state == "open")
    assert two.retry_after < 60.0


def test_a_lost_message_is_found_by_the_poll(side, client, name, records):
    """Without any message a process knows within about a second."""
    a = side()
    breaker = a.breaker(name)
    forced = SOUND | {"state": "forced_open", "epoch": new_epoch()}
    client.hset(record_key(name), mapping=forced)
    until(lambda: breaker.state == "forced_open")


def test_a_subscription_that_breaks_is_made_again(side, client, name):
    """Messages are heard again after the server has ended the connection."""
    a, b = side(), side()
    one, two = a.breaker(name), b.breaker(name)
    client.client_kill_filter(_type="pubsub")
    until(lambda: listening(client) == 2)
    one.force_open()
    until(lambda: two.state == "forced_open")
    until(lambda: a.verdicts.answers)


def test_an_older_generation_is_ignored_and_repaired(side, client, name, records):
    """A replica that lagged behind when it took over changes nothing, and is put right."""
    a = side()
    breaker = a.breaker(name)
    breaker.force_open()
    a.finish(client)
    breaker.disable()
    a.finish(client)
    newest = recorded(records, name).generation
    assert newest > 1
    client.hset(record_key(name), mapping={"generation": 1, "state": "forced_open"})
    until(lambda: recorded(records, name).generation > newest)
    assert recorded(records, name).state == breaker.state == "disabled"
    assert a.steps == [("closed", "forced_open"), ("forced_open", "disabled")]


def test_a_record_of_another_epoch_is_taken_over(side, client, name, records):
    """However small its generation is."""
    a = side()
    breaker = a.breaker(name)
    breaker.force_open()
    breaker.observe()
    a.finish(client)
    assert recorded(records, name).generation > 1
    # In one step: a poll that found none in between would write one.
    other = SOUND | {"state": "disabled", "reason": "manual", "epoch": new_epoch()}
    client.hset(record_key(name), mapping=other)
    until(lambda: breaker.state == "disabled")


DAMAGE = {
    "state": b"broken",
    "generation": b"-1",
    "epoch": b"\xff" * 16,
    "until": b"9" * 90,
    "reason": b"x" * 5000,
    "openings": b"nan",
    "successes": b"\x00",
}


@pytest.mark.parametrize("field", DAMAGE)
def test_a_damaged_record_is_ignored_and_told_once(side, client, name, field, caplog):
    """It changes nothing here; the next verdict replaces it."""
    a = side()
    breaker = a.breaker(name)
    sound = SOUND | {"state": "open", "epoch": new_epoch()}
    with caplog.at_level(logging.WARNING, "periscope_otel"):
        client.hset(record_key(name), mapping=sound | {field: DAMAGE[field]})
        until(lambda: _told_of(name, caplog))
        client.hset(record_key(name), "since", 2)
        time.sleep(1.1)
    assert len(_told_of(name, caplog)) == 1
    assert breaker.state == "closed"
    trip(breaker)
    lease_of(breaker)


def _told_of(name: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if name in line]


def test_a_key_of_another_kind_is_replaced(side, client, name):
    """Whatever lies where the record belongs."""
    client.set(record_key(name), "x")
    client.set(leases_key(name), "x")
    client.set(INDEX, "x")
    breaker = side().breaker(name)
    trip(breaker)
    lease_of(breaker)
    assert client.zscore(INDEX, name) is not None


def test_nothing_stays_for_ever_but_what_an_operator_has_set(side, client, name, records):
    """All keys expire a week after the last change; forced states stay."""
    breaker = side().breaker(name)
    trip(breaker)
    lease_of(breaker)
    keys = {key.decode() for key in client.keys()}  # noqa: SIM118
    assert keys == {record_key(name), leases_key(name), INDEX}
    assert all(0 < client.ttl(key) <= 7 * 86400 for key in keys)
    breaker.force_open()
    until(lambda: client.ttl(record_key(name)) == -1)
    until(lambda: client.ttl(INDEX) == -1)
    breaker.reset()
    until(lambda: client.ttl(record_key(name)) > 0)
    until(lambda: client.ttl(INDEX) > 0)


def test_the_index_is_bounded(client, records):
    """Those that changed longest ago give way."""
    client.zadd(INDEX, {f"old{n}": 10**14 + n for n in range(MOST_NAMES)})
    records.change("new", Verdict("forced_open", "manual"), None)
    assert client.zcard(INDEX) == MOST_NAMES
    assert client.zscore(INDEX, "old0") is None


@pytest.mark.parametrize("odd", ["a}b{c", "{x}", "a}:probes", "100%", "ü{", "a b", "%7B"])
def test_any_name_has_one_slot_and_its_own_keys(side, client, odd):
    """Braces and whatever else is in a name: both keys of it hash alike."""
    breaker = side().breaker(odd)
    trip(breaker)
    lease_of(breaker)
    keys = record_key(breaker.name), leases_key(breaker.name)
    slots = {key_slot(key.encode()) for key in keys}
    assert len(slots) == 1
    assert client.exists(*keys) == 2


def test_keys_of_different_names_differ():
    """Also where one is written like the other's key."""
    names = ["a", "a}", "{a}", "a}:probes", "%7Da", "}a", "a:probes"]
    keys = [record_key(one) for one in names] + [leases_key(one) for one in names]
    assert len(set(keys)) == len(keys)


def test_it_is_said_once_that_the_redis_is_away(side, server, name, caplog):
    """Not at every attempt."""
    a = side()
    breaker = a.breaker(name)

    def said() -> list[str]:
        return [line for line in caplog.messages if "decides alone" in line]

    server.kill()
    try:
        with caplog.at_level(logging.WARNING, "periscope_otel"):
            until(said)
            for _ in range(3):
                trip(breaker)
                breaker.reset()
            time.sleep(0.5)
        assert len(said()) == 1
    finally:
        server.start()
