"""Letters survive: deaths of processes, everything that a Redis can do, crowds, damaged files."""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import signal
import sqlite3
import statistics
import struct
import time
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from patience import PATIENT, be_patient
from processes import running
from redis.exceptions import RedisError
from redis_faults import FAULTS
from redis_servers import NoServerError, RedisServer

from periscope_otel import monitored
from periscope_otel.dead_letter import (
    DamagedLetterError,
    Filter,
    Letter,
    StoreError,
    open_store,
    outbox,
)
from periscope_otel.dead_letter import forwarder as forwarding
from periscope_otel.dead_letter.letter import SCHEMA, STATES
from periscope_otel.dead_letter.queue import FILE, DeadLetterQueue
from periscope_otel.replay import replay

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    a_letter,
    everything,
    ids_of,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from processes import Program
    from redis import Redis

    from periscope_otel.dead_letter import Store

KILLS = int(os.environ.get("PERISCOPE_TEST_KILLS", "30"))
WITHIN = 60.0
MARK = b"\xf0\x9f\x94\xad telescope"
"""In the payload of every letter that is to be damaged."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


def wait_until(holds: Callable[[], bool], within: float = WITHIN) -> None:
    """Wait for what other threads and processes do."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def a_server(kind: str, folder: Path, **options: str) -> RedisServer:
    """Return a server that is not running yet; skips the test where there is none."""
    try:
        return RedisServer(kind, folder, **options)
    except NoServerError as error:
        pytest.skip(str(error))


# Processes that are killed.


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_no_kill_point_loses_a_payload(tmp_path: Path, kind: str) -> None:
    """Killed in any phase, a worker leaves each payload ingested or a letter, under one key."""
    seed = secrets.token_hex(4)
    with ExitStack() as stack:
        url = "-"
        if kind != "sqlite":
            url = stack.enter_context(a_server(kind, tmp_path / "redis")).url
        arguments = (str(tmp_path), url, seed, str(KILLS), "3")
        program = stack.enter_context(running("kill_letters", *arguments))
        ended = program.ended(280)
    assert ended.status == 0, ended.stderr
    found = json.loads(ended.lines[-1])
    assert all(one.endswith(": -9") for one in found["ended"]), (found, ended.stderr)
    assert sum(found["ended"].values()) == KILLS
    assert found["lost"] == found["never ingested"] == found["under two keys"] == [], (seed, found)
    assert found["left"] == 0
    assert found["payloads"] > KILLS


# Everything that a Redis can do.


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the pauses of the forwarder be short; returns what ends the grace time."""
    monkeypatch.setattr(forwarding, "SHORTEST_WAIT", 0.05)
    monkeypatch.setattr(forwarding, "LONGEST_WAIT", 0.5)
    return lambda: monkeypatch.setattr(outbox, "GRACE", 0.5)


def put_some(
    queue: DeadLetterQueue, count: int, pause: float = 0.001
) -> tuple[list[str], list[float]]:
    """Put letters; returns their ids and the seconds that each put took."""
    letters, took = some(count, error_stack="x" * 1500), []
    for letter in letters:
        began = time.perf_counter()
        assert queue.put([letter]) == "disk"
        took.append(time.perf_counter() - began)
        time.sleep(pause)
    return ids_of(letters), took


def arrived(store: Store) -> set[str]:
    """Return what is in a store; nothing while that cannot be had."""
    with suppress(StoreError):
        return set(ids_of(everything(store, limit=1000)))
    return set()


@pytest.mark.parametrize("kind", ["redis", "valkey"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_letter_is_lost_whatever_redis_does(
    tmp_path: Path,
    soon: Callable[[], None],
    kind: str,
    fault: str,
    record_property: Callable[[str, object], None],
) -> None:
    """What is put before, during and after is all there, and a put takes as long as ever.

    Twice is the aim, and measured by a benchmark with the 99th percentile; here the machine may be
    busy, and stop now and then. What waits for the network takes as long as that is waited for.
    """
    with (
        a_server(kind, tmp_path / "redis") as server,
        DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue,
        open_store(server.url) as store,
    ):
        before, normal = put_some(queue, 300)
        with FAULTS[fault](server):
            during, took = put_some(queue, 300)
        after, _ = put_some(queue, 50)
        wanted = {*before, *during, *after}
        soon()
        wait_until(lambda: arrived(store) >= wanted)
        assert set(ids_of(everything(store, limit=1000))) == wanted
        assert (queue.in_memory, queue.lost) == (0, 0)
    usual, spoilt = (statistics.quantiles(one, n=10)[8] for one in (normal, took))
    record_property("put p90 in the fault, of the normal", round(spoilt / usual, 2))
    assert spoilt < max(10 * usual, 0.1)
    assert max(took) < PATIENT / 2


@pytest.mark.usefixtures("soon")
def test_no_letter_is_lost_when_redis_is_down_at_the_start(tmp_path: Path) -> None:
    """Letters that were put before there was a Redis arrive once there is one."""
    server = a_server("redis", tmp_path / "redis")
    with DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue:
        wanted, _ = put_some(queue, 200)
        with server, open_store(server.url) as store:
            wait_until(lambda: arrived(store) == set(wanted))


def test_no_letter_is_lost_when_redis_is_killed_again_and_again(
    tmp_path: Path, soon: Callable[[], None]
) -> None:
    """A Redis that is killed in the middle of batches and keeps nothing has them all at last."""
    with (
        a_server("redis", tmp_path / "redis") as server,
        DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue,
    ):
        wanted: list[str] = []
        for _ in range(6):
            letters = some(400, error_stack="x" * 3000)
            queue.put(letters)
            wanted += ids_of(letters)
            time.sleep(random.uniform(0, 0.05))
            server.kill()
            server.start()
        soon()
        with open_store(server.url) as store:
            wait_until(lambda: arrived(store) == set(wanted))


@pytest.mark.usefixtures("soon")
def test_a_redis_that_keeps_what_it_took_has_nothing_twice(tmp_path: Path) -> None:
    """With an append-only file, killed and restarted, each letter is there once."""
    with (
        a_server("redis", tmp_path / "redis", appendonly="yes", appendfsync="always") as server,
        DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue,
        open_store(server.url) as store,
    ):
        letters = some(300)
        for start in range(0, 300, 100):
            queue.put(letters[start : start + 100])
            time.sleep(0.05)
            server.kill()
            server.start()
        wait_until(lambda: arrived(store) == set(ids_of(letters)))
        assert {letter.attempts for letter in everything(store)} == {1}


def test_what_was_replayed_does_not_come_back_after_the_grace_time(
    tmp_path: Path, soon: Callable[[], None]
) -> None:
    """A letter that a replay has done with stays gone when the outbox looks for it once more."""
    done: list[object] = []

    @monitored("survives.replayed", feed="urlhaus")
    def ingest(value: object) -> None:
        done.append(value)

    with (
        a_server("redis", tmp_path / "redis") as server,
        DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue,
        open_store(server.url) as store,
    ):
        payloads = [b"\xc4\x01" + bytes([number]) for number in range(20)]
        queue.put([a_letter(one, operation="survives.replayed") for one in payloads])
        wait_until(lambda: store.stats().total == 20)
        assert replay(store).succeeded == 20
        soon()
        outgoing = queue._outbox.database
        # A letter leaves the outbox once it was looked for.
        wait_until(lambda: outgoing.read("SELECT count(*) FROM outbox") == [(0,)])
        assert store.stats().total == 0
        assert len(done) == 20


def is_linked(client: Redis) -> bool:
    """Whether a replica has its master's data; False while it does not say."""
    with suppress(RedisError):
        return client.info("replication").get("master_link_status") == "up"
    return False


@pytest.mark.parametrize("kind", ["redis", "valkey"])
def test_a_replica_confirms_nothing(tmp_path: Path, soon: Callable[[], None], kind: str) -> None:
    """A master that was made a replica still has letters that its new master wipes out."""
    with (
        a_server(kind, tmp_path / "redis") as server,
        a_server(kind, tmp_path / "other", repl_diskless_sync_delay="0") as other,
        DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue,
        open_store(server.url) as store,
        server.client as client,
    ):
        wanted, _ = put_some(queue, 100)
        wait_until(lambda: arrived(store) == set(wanted))
        client.replicaof("127.0.0.1", "1")  # its new master is not to be reached yet
        soon()
        time.sleep(2.0)
        client.replicaof("127.0.0.1", str(other.port))
        wait_until(lambda: is_linked(client))
        client.replicaof("NO", "ONE")
        wait_until(lambda: arrived(store) == set(wanted))


# Many processes, forks among them, on one outbox.


def forwarder_of(folder: Path) -> int | None:
    """Return the process that holds the forwarder's lock; None while nobody does."""
    for path in folder.glob("*.forwarder"):
        with path.open("rb+") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                return int(pid)
    return None


@pytest.mark.usefixtures("uncovered")
def test_a_crowd_on_one_outbox_loses_nothing(tmp_path: Path) -> None:
    """Eight processes with forks, and whoever forwards killed twice: all arrives, with no error."""
    log = tmp_path / "log"
    log.touch()
    server = a_server("redis", tmp_path / "redis", appendonly="yes")
    with server, ExitStack() as stack:
        arguments = (str(tmp_path / "data"), server.url, "200", str(log))
        crowd: dict[int, Program] = {}
        for _ in range(8):
            program = stack.enter_context(running("outbox_crowd", *arguments))
            crowd[program.pid] = program
        for program in crowd.values():
            assert program.line() == "ready"
        for program in crowd.values():
            program.tell()
        killed = set()
        for _ in range(2):
            time.sleep(random.uniform(0.1, 0.4))
            wait_until(lambda: forwarder_of(tmp_path / "data") in crowd.keys() - killed)
            victim = forwarder_of(tmp_path / "data")
            if victim in crowd:
                crowd[victim].send(signal.SIGKILL)
                killed.add(victim)
        for pid in crowd.keys() - killed:
            assert crowd[pid].line(150).split()[1:] == ["0", "0"]
        with open_store(server.url) as store:
            wait_until(lambda: arrived(store) >= set(log.read_text().split()))
            # One that was killed may have put one more letter than it could say.
            assert len(arrived(store)) - len(log.read_text().split()) <= len(killed)
        for pid in crowd.keys() - killed:
            crowd[pid].tell()
            ended = crowd[pid].ended()
            assert (ended.status, ended.stderr) == (0, ""), ended
    assert killed


# Damaged files.


def filled(folder: Path, count: int = 200) -> tuple[Path, list[Letter]]:
    """Return a store's file with letters, all of it in one file, and the letters."""
    letters = [a_letter(MARK + os.urandom(300)) for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    with open_store(f"sqlite:///{folder / FILE}") as store:
        store.put(letters)
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    return folder / FILE, letters


def used(path: Path, letters: list[Letter]) -> set[str]:
    """Use a damaged file in all ways; returns the ids of the letters that it serves, all right."""
    originals = {letter.id: letter for letter in letters}
    served: set[str] = set()
    with open_store(f"sqlite:///{path}") as store:
        for letter in everything(store, limit=50):
            with suppress(DamagedLetterError):
                if letter.id in originals:
                    assert letter.payload() == originals[letter.id].payload()
                    served.add(letter.id)
        for use in (
            store.stats,
            lambda: store.get(letters[0].id),
            lambda: store.put(some(1)),
            lambda: [store.release(one) for one in store.claim("me", 30.0, 500, Filter())],
            lambda: store.requeue(Filter(), limit=5),
            lambda: store.park(Filter(states=("queued",))),
            lambda: store.purge(Filter(states=STATES)),
        ):
            with suppress(StoreError):
                use()
    return served


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_a_clear_error_or_serves_the_rest(tmp_path: Path, part: float) -> None:
    """A file that lost its end raises nothing but a StoreError that names it."""
    path, letters = filled(tmp_path / "letters")
    os.truncate(path, int(path.stat().st_size * part))
    if part in (0.0, 0.999):
        with suppress(StoreError):
            used(path, letters)
    else:
        with pytest.raises(StoreError, match=FILE):
            used(path, letters)


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:1/0"])
def test_a_queue_on_a_truncated_file_says_so_and_never_raises_in_put(
    tmp_path: Path, part: float, url: str | None
) -> None:
    """Opening it is a clear error, or each letter put is on disk, in memory or counted as lost."""
    with DeadLetterQueue(tmp_path, redis_url=url) as queue:
        queue.put(some(300, error_stack="x" * 1000))
    path = tmp_path / FILE
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    os.truncate(path, int(path.stat().st_size * part))
    with suppress(StoreError):
        queue = DeadLetterQueue(tmp_path, redis_url=url)
        assert {queue.put(some(1)) for _ in range(20)} <= {"disk", "memory"}
        queue.close(timeout=0.5)


def test_flipped_bits_are_errors_or_damaged_letters_and_no_wrong_payload(tmp_path: Path) -> None:
    """Whatever bit is flipped in a file, what is served as a payload is what was put."""
    path, letters = filled(tmp_path / "letters", 100)
    whole = path.read_bytes()
    rng, served = random.Random(1), []
    for _ in range(50):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 8))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        for leftover in path.parent.glob(f"{FILE}*"):
            leftover.unlink()
        path.write_bytes(damaged)
        with suppress(StoreError):
            served.append(len(used(path, letters)))
    assert statistics.median(served) >= 99  # one flipped bit costs one letter at most, mostly


def test_letters_of_a_newer_version_pass_unchanged(tmp_path: Path) -> None:
    """A newer schema's letter goes by outbox and forwarder to Redis with all that it holds."""
    newer = a_letter(schema=SCHEMA + 1, unknown={"colour": [1, {"of": "sky"}], "flag": True})
    with (
        a_server("redis", tmp_path / "redis") as server,
        DeadLetterQueue(tmp_path / "data", redis_url=server.url) as queue,
    ):
        queue.put([newer])
        with open_store(server.url) as store:
            wait_until(lambda: store.stats().total == 1)
            found = store.get(newer.id)
    assert (found.schema, found.unknown) == (newer.schema, newer.unknown)
    assert found.payload() == newer.payload()


# Blobs that are no letters.


def fuzzed(blob: bytes, rng: random.Random) -> bytes:
    """Return a blob that was damaged in one of many ways."""
    data = bytearray(blob)
    match rng.randrange(7):
        case 0:
            return bytes(data[: rng.randrange(len(data))])
        case 1:
            return rng.randbytes(rng.randrange(400))
        case 2:
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 3:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 4:
            place = rng.randrange(len(data))
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        case 5:
            start = rng.randrange(len(data))
            del data[start : start + rng.randrange(1, 9)]
        case _:
            # The types of msgpack: nested arrays and maps, extensions, lengths that are lies.
            place = rng.randrange(min(64, len(data)))
            data[place] = rng.choice(b"\xdd\xdf\xc6\xc9\xdb\x9f\x8f\xc0\xc3\xcb\xd9\x91\x81")
    return bytes(data)


def test_ten_thousand_fuzzed_blobs_are_letters_or_damaged() -> None:
    """`Letter.decode` returns a letter or raises DamagedLetterError, whatever it is given."""
    rng, damaged = random.Random(7), 0
    blobs = [a_letter(MARK * 20, headers={"a": "b"}).encode() for _ in range(20)]
    for number in range(10_000):
        try:
            letter = Letter.decode(fuzzed(blobs[number % 20], rng))
            letter.encode()
            letter.payload()
        except DamagedLetterError:
            damaged += 1
    assert damaged > 5_000


def spoil_sqlite(path: Path, change: Callable[[bytes], bytes | None]) -> None:
    """Change the marked blobs in all tables of a file; None leaves one as it is."""
    with closing(sqlite3.connect(path)) as connection, connection:
        tables = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        for table in tables:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            for column in columns:
                with suppress(sqlite3.OperationalError):  # a table without rowids
                    rows = connection.execute(
                        f"SELECT rowid, {column} FROM {table} WHERE typeof({column}) = 'blob'"
                    ).fetchall()
                    changed = [
                        (new, row)
                        for row, blob in rows
                        if MARK in blob and (new := change(blob)) is not None
                    ]
                    connection.executemany(
                        f"UPDATE {table} SET {column} = ? WHERE rowid = ?", changed
                    )


def spoil_redis(server: RedisServer, change: Callable[[bytes], bytes | None]) -> None:
    """Change the marked fields of all hashes of a Redis; None leaves one as it is."""
    with server.client as client:
        for key in client.scan_iter(_type="hash", count=1000):
            for field, blob in client.hgetall(key).items():
                if MARK in blob and (new := change(blob)) is not None:
                    client.hset(key, field, new)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_ten_thousand_fuzzed_blobs_in_a_store_hide_no_letter(tmp_path: Path, kind: str) -> None:
    """Among blobs that are no letters any more all others are listed, claimed and replayed."""
    ingested: list[Any] = []

    @monitored("survives.fuzz")
    def ingest(value: bytes) -> None:
        ingested.append(value)

    count = 10_000
    rng = random.Random(3)
    letters = [
        a_letter(b"\xc4" + bytes([len(MARK) + 8]) + MARK + number.to_bytes(8),
                 operation="survives.fuzz")
        for number in range(count)
    ]  # fmt: skip
    whole = {letter.sha256 for letter in letters[::50]}
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path / FILE}"
        server = None
        if kind == "redis":
            server = stack.enter_context(a_server(kind, tmp_path / "redis"))
            url = server.url
        store = stack.enter_context(open_store(url))
        for start in range(0, count, 500):
            store.put(letters[start : start + 500])

        def change(blob: bytes) -> bytes | None:
            return None if any(one in blob for one in _near(blob, whole)) else fuzzed(blob, rng)

        if server is None:
            spoil_sqlite(tmp_path / FILE, change)
        else:
            spoil_redis(server, change)
        listed = {letter.sha256 for letter in everything(store, limit=1000)}
        assert whole <= listed
        report = replay(store, Filter(operation="survives.fuzz"), concurrency=2)
        assert report.succeeded >= len(whole)
        left = {letter.sha256 for letter in everything(store, limit=1000)}
        assert not whole & left
        assert store.put(some(1)) == ["stored"]
        store.stats()
    assert len(set(ingested)) == len(ingested)


def _near(blob: bytes, whole: set[bytes]) -> Iterator[bytes]:
    """Give the digest that a blob holds, if it is one of those."""
    place = blob.find(b"\xa6sha256\xc4\x20")
    digest = blob[place + 9 : place + 41]
    if digest in whole:
        yield digest
