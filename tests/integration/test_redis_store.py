"""The Redis store, on a real Redis and a real Valkey: all contracts of a store, and its own."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from patience import be_patient
from redis_servers import NoServerError, RedisServer

from periscope_otel.dead_letter import Claim, Filter, StoreError, StoreFullError, open_store
from periscope_otel.dead_letter.errors import RefusedError
from periscope_otel.dead_letter.redis_store import RedisStore

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    EVERY,
    LEASE,
    StoreConformance,
    a_letter,
    everything,
    ids_of,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


class Clock:
    """Lets time pass for what a server keeps, by moving the times that it has stored.

    The server's own time goes on as ever; it is the past that moves away from it.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self.ahead = 0.0

    @property
    def now(self) -> float:
        """Unix time, as if the seconds had passed."""
        return time.time() + self.ahead

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead += seconds
        with self._server.client as client:
            for key in client.keys("*}:leases"):
                for letter_id in client.zrange(key, 0, -1):
                    client.zincrby(key, -seconds, letter_id)
            for key in client.keys("*}:later"):
                for letter_id in client.zrange(key, 0, -1):
                    client.zincrby(key, -seconds, letter_id)
            for key in client.keys("*}:gone:*"):
                client.pexpire(key, max(1, client.pttl(key) - int(seconds * 1000)))


class StoreOfThatTime(RedisStore):
    """Tells the end of a lease in the time of a clock that is ahead."""

    clock: Clock

    def _claim(self, *given: Any, **how: Any) -> Sequence[Claim]:
        return [self._moved(one) for one in super()._claim(*given, **how)]

    def renew(self, claim: Claim, lease: float) -> Claim | None:
        renewed = super().renew(claim, lease)
        return renewed and self._moved(renewed)

    def _moved(self, claim: Claim) -> Claim:
        return claim._replace(until=claim.until + self.clock.ahead)


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """Return a running server."""
    try:
        made = RedisServer(request.param, tmp_path_factory.mktemp("server"))
    except NoServerError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def clock(server: RedisServer) -> Clock:
    """Return what has `now` and `advance(seconds)`."""
    return Clock(server)


@pytest.fixture
def store(server: RedisServer, clock: Clock) -> Iterator[RedisStore]:
    """Return an empty store."""
    server.client.flushall()
    with StoreOfThatTime(server.url) as opened:
        opened.clock = clock
        yield opened


class TestRedisStore(StoreConformance):
    """All contracts of a store."""


def test_a_url_opens_it(server: RedisServer, store: RedisStore) -> None:
    """`open_store` knows it by the scheme of its URL, and shows no password."""
    with open_store(server.url.replace("redis://", "redis://:hunter2@")) as opened:
        assert isinstance(opened, RedisStore)
        assert "hunter2" not in opened.url
    with open_store(server.url) as opened:
        assert opened.stats().total == 0


def test_a_url_that_cannot_be_used_is_an_error() -> None:
    """What redis-py does not understand is said at once."""
    with pytest.raises(StoreError, match="no Redis has such a URL"):
        open_store("redis://127.0.0.1:port/0")


@pytest.mark.parametrize(
    "option",
    [
        *("decode_responses=true", "socket_timeout=900", "socket_connect_timeout=900"),
        *("retry_on_timeout=true", "encoding=utf-16", "encoding_errors=replace", "protocol=3"),
        "health_check_interval=1&client_name=us&socket_keepalive=yes",
    ],
)
def test_options_in_the_url_do_not_change_ours(tmp_path: Path, option: str) -> None:
    """Whatever the query of the URL says, letters come back and time is bounded."""
    letters = some(2, feed="é")
    own = RedisServer("redis", tmp_path)
    url = f"{own.url}?{option}"
    with own, RedisStore(url) as store, RedisStore(url, timeout=0.2) as hasty:
        assert store.put(letters) == ["stored"] * 2
        assert ids_of(everything(store, Filter(feed="é"))) == ids_of(letters)
        assert store.stats().by_feed == {"é": 2}
        with suppress(StoreError):
            hasty.stats()  # connects
        own.pause()
        began = time.monotonic()
        with pytest.raises(StoreError):
            hasty.stats()
        assert time.monotonic() - began < 30
        own.resume()


def test_an_option_that_is_none_is_said_at_once() -> None:
    """What redis-py takes for no option is an error when the store is opened."""
    with pytest.raises(StoreError, match="no Redis has such a URL"):
        open_store("redis://127.0.0.1/0?no_such_option=1")


def test_advice(tmp_path: Path) -> None:
    """A Redis that may lose letters is told of, each thing in a sentence with its remedy."""
    own = RedisServer("redis", tmp_path)
    with own, RedisStore(own.url) as store, own.client as client:
        (disk,) = store.advice()
        assert "appendonly yes" in disk
        client.config_set("maxmemory-policy", "allkeys-lru")
        memory, disk = store.advice()
        assert "allkeys-lru" in memory
        assert "noeviction" in memory
        client.config_set("save", "60 1")
        assert store.advice() == [memory]
        client.config_set("save", "")
        client.execute_command("ACL SETUSER default -config")
        store.close()
        memory, unsure = store.advice()
        assert "does not say" in unsure
        client.execute_command("ACL SETUSER default -info")
        assert store.advice() == []


def test_a_well_kept_redis_needs_no_advice(tmp_path: Path) -> None:
    """With an append-only file and without eviction nothing is said."""
    options = {"appendonly": "yes"}
    with RedisServer("redis", tmp_path, **options) as own, RedisStore(own.url) as store:
        assert store.advice() == []


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for what a busy server may not answer at once."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(StoreError):
            if holds():
                return
        time.sleep(0.02)
    raise AssertionError


def test_a_redis_that_is_away_is_an_error(server: RedisServer, tmp_path: Path) -> None:
    """Refused and unanswered calls are a StoreError soon, and work again when it is back."""
    with RedisServer("redis", tmp_path) as own, RedisStore(own.url, timeout=0.2) as store:
        wait_until(lambda: store.put(some(1)))
        own.pause()
        with pytest.raises(StoreError, match="Timeout"):
            store.stats()
        own.resume()
        wait_until(lambda: store.stats().total)
        own.kill()
        with pytest.raises(StoreError, match="refused"):
            store.put(some(1))


def test_a_full_redis_refuses_letters_and_lets_others_go(tmp_path: Path) -> None:
    """Without memory nothing is put, which is said; what is there can be replayed and removed."""
    options = {"maxmemory": "3mb", "maxmemory_policy": "noeviction"}
    with RedisServer("redis", tmp_path, **options) as own, RedisStore(own.url) as store:
        put = 0
        with suppress(StoreFullError):
            while put < 10_000:
                put += store.put([a_letter(os.urandom(2000))]).count("stored")
        assert 100 < put == store.stats().total < 10_000
        (claim,) = store.claim("one", LEASE, where=Filter())
        assert store.settle(claim)
        assert store.purge(Filter(), dry_run=False) == put - 1
        assert store.put(some(1)) == ["stored"]


def test_letters_survive_a_restart_with_persistence(tmp_path: Path) -> None:
    """With `appendonly` a Redis that is killed has them again, and knows the scripts anew."""
    options = {"appendonly": "yes", "appendfsync": "always"}
    with RedisServer("redis", tmp_path, **options) as own, RedisStore(own.url) as store:
        letters = some(5)
        store.put(letters)
        own.kill()
        own.start()
        assert ids_of(everything(store)) == ids_of(letters)
        assert store.put(letters) == ["known"] * 5


def test_memory_for_a_letter_is_bounded(store: RedisStore, server: RedisServer) -> None:
    """A letter takes at most 1.25 times its encoded form and 1,400 bytes."""
    letters = [a_letter(os.urandom(2048)) for _ in range(1000)]
    encoded = sum(len(letter.encode()) for letter in letters)
    store.put(some(1))
    with server.client as client:
        before = client.info("memory")["used_memory"]
        for start in range(0, 1000, 50):
            store.put(letters[start : start + 50])
        taken = client.info("memory")["used_memory"] - before
    assert taken <= 1.25 * encoded + 1400 * len(letters)


def test_bulk_actions_carry_no_letters(store: RedisStore, server: RedisServer) -> None:
    """To requeue, park, count and purge letters takes their ids to the client, and no more."""
    store.put([a_letter(os.urandom(100_000)) for _ in range(20)])
    with server.client as client:
        before = client.info("stats")["total_net_output_bytes"]
        assert store.purge(Filter()) == store.requeue(Filter()) == 20
        assert store.park(Filter(states=("queued",))) == store.purge(EVERY, dry_run=False) == 20
        assert client.info("stats")["total_net_output_bytes"] - before < 100_000


def test_the_most_frequent_causes_are_told(store: RedisStore) -> None:
    """Of any number of causes the most frequent thousand are counted out."""
    store.put([a_letter(fingerprint=f"f{n}") for n in range(1200)])
    store.put(some(3, fingerprint="f7"))
    causes = store.stats().by_fingerprint
    assert len(causes) == 1000
    assert next(iter(causes.items())) == ("f7", 4)
    assert store.purge(EVERY, dry_run=False) == 1203
    assert store.stats().by_fingerprint == store.stats().by_feed == store.stats().by_state == {}


def test_what_a_newer_version_keeps_of_a_letter_stays(
    store: RedisStore, server: RedisServer
) -> None:
    """Fields that are behind those that are known here are carried through every change."""
    (letter,) = some(1)
    store.put([letter])
    key = f"periscope:{{default}}:l:{letter.id}"
    with server.client as client:
        values = msgspec.msgpack.decode(client.hget(key, "x"))
        client.hset(key, "x", msgspec.msgpack.encode([*values, "newer", 7]))
        store.requeue(EVERY)
        (claim,) = store.claim("one", LEASE)
        assert store.settle(claim, claim.letter.changed(error_message="new"))
        assert msgspec.msgpack.decode(client.hget(key, "x"))[len(values) :] == ["newer", 7]
    assert ids_of(everything(store)) == [letter.id]


def test_nothing_is_left_behind(store: RedisStore, server: RedisServer) -> None:
    """When all letters are gone, the only keys are the tombstones and the number of the last."""
    store.put([a_letter(not_before=1.0), a_letter(b"x"), a_letter(b"x"), *some(2)])
    store.requeue(EVERY)
    for claim in store.claim("one", LEASE, 2):
        store.put([a_letter(claim.letter.payload(), key=claim.letter.key)])
        store.settle(claim, claim.letter)
    store.purge(EVERY, dry_run=False)
    with server.client as client:
        left = {key.decode().rpartition("}:")[2].partition(":")[0] for key in client.keys("*")}
    assert left == {"gone", "seq"}


def test_a_refused_letter_is_told_from_an_unwell_server(
    store: RedisStore, server: RedisServer, tmp_path: Path
) -> None:
    """What goes wrong with a letter is a RefusedError; what goes wrong with all of them is not."""
    (letter,) = some(1)
    with server.client as client:
        client.set(f"periscope:{{default}}:l:{letter.id}", "no hash")
    with pytest.raises(RefusedError):
        store.put([letter])
    assert store.put(some(1)) == ["stored"]
    with RedisServer("redis", tmp_path) as own, RedisStore(own.url) as unwell:
        for ill in (("REPLICAOF", "127.0.0.1", "1"), ("CONFIG", "SET", "requirepass", "x")):
            with own.client as client:
                client.execute_command(*ill)
            unwell.close()
            with pytest.raises(StoreError) as raised:
                unwell.put(some(1))
            assert not isinstance(raised.value, RefusedError)


def test_a_damaged_letter_hides_no_other(store: RedisStore, server: RedisServer) -> None:
    """What cannot be read is left out of lists and claims."""
    letters = some(3)
    store.put(letters)
    with server.client as client:
        client.hset(f"periscope:{{default}}:l:{letters[1].id}", "b", b"\xc1")
    assert ids_of(everything(store)) == [letters[0].id, letters[2].id]
    store.requeue(EVERY)
    assert ids_of(store.claim("one", LEASE, 3)) == [letters[0].id, letters[2].id]
