"""Replay: each letter through its operation once, settled once, and never by two at a time."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from patience import be_patient
from processes import clean_environment, running
from redis import Redis
from redis_servers import NoServerError, RedisServer

from periscope_otel import current_operation, monitored, operation
from periscope_otel.dead_letter import Filter, StoreError, open_store
from periscope_otel.dead_letter.bodies import BodyFiles
from periscope_otel.dead_letter.letter import STATES
from periscope_otel.dead_letter.redis_store import RedisStore
from periscope_otel.dead_letter.store import MOST_LEASES, MOST_REPLAYS
from periscope_otel.failure import Failure
from periscope_otel.replay import replay, replay_handler
from periscope_otel.replay import run as replay_run
from periscope_otel.replay.run import LEASE
from periscope_otel.testing import capture_telemetry

pytest.register_assert_rewrite("store_conformance")

from store_conformance import a_letter, everything  # noqa: E402  (its assertions are rewritten)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from periscope_otel.dead_letter import Letter, Store
    from periscope_otel.replay import Replayed
    from periscope_otel.testing import CapturedTelemetry

WITHIN = 60.0
SPAN = "dead_letter.replay"
_numbers = itertools.count()
_OWNER = 5
"""The place of a letter's owner in what a Redis keeps of its changes."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine that stops for seconds change nothing."""
    be_patient(monkeypatch)


class HeldError(Exception):
    """A failure that says of itself that the call was not made."""

    def __init__(self, outcome: Any = "rejected") -> None:
        super().__init__("not now")
        self.periscope_failure = Failure(outcome, "HeldError", "ignored", retryable=False)


def let_pass(url: str, seconds: float, holder: str = "") -> None:
    """Let time pass for the leases in a store: their ends are moved into the past.

    Args:
        url: The store's.
        seconds: How much.
        holder: What the owner's name begins with; by default all.
    """
    if url.startswith("sqlite:///"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, timeout=WITHIN)) as connection, connection:
            connection.execute(
                "UPDATE letters SET until = until - ? WHERE state = 'claimed' AND owner LIKE ?",
                (seconds, f"{holder}%"),
            )
        return
    with Redis.from_url(url, socket_timeout=WITHIN) as client:
        for key in client.keys("*}:leases"):
            letter_of = key.removesuffix(b"leases") + b"l:"
            for letter_id in client.zrange(key, 0, -1):
                changing = client.hget(letter_of + letter_id, "x")
                if changing and msgspec.msgpack.decode(changing)[_OWNER].startswith(holder):
                    # Unless it has ended meanwhile.
                    client.zadd(key, {letter_id: -seconds}, xx=True, incr=True)


def lease_ends(url: str) -> list[float]:
    """Return when the leases in a store end, as those who claim see it."""
    if url.startswith("sqlite:///"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, timeout=WITHIN)) as connection:
            found = connection.execute("SELECT until FROM letters WHERE state = 'claimed'")
            return [until for (until,) in found]
    with Redis.from_url(url, socket_timeout=WITHIN) as client:
        return [
            until
            for key in client.keys("*}:leases")
            for _, until in client.zrange(key, 0, -1, withscores=True)
        ]


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what other threads and processes do."""
    deadline = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class World:
    """A store, and what operations have emitted, with letters that go where the test says."""

    def __init__(self, store: Store, captured: CapturedTelemetry) -> None:
        self.store = store
        self.captured = captured
        self._seen = 0

    def new_letters(self) -> list[Letter]:
        """Return what operations have made since this was asked for last."""
        letters = self.captured.letters[self._seen :]
        self._seen += len(letters)
        return letters

    def fail(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Letter:
        """Call what fails; returns its letter, which is in the store."""
        with suppress(Exception):
            result = call(*args, **kwargs)
            if asyncio.iscoroutine(result):
                asyncio.run(result)
        return self.keep()[-1]

    def keep(self) -> list[Letter]:
        """Put the new letters into the store."""
        letters = self.new_letters()
        self.store.put(letters)
        return letters

    def state(self, letter: Letter) -> str | None:
        """Return the state of a letter; None if it is gone."""
        found = self.store.get(letter.id, letter.queue)
        return None if found is None else found.state


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a running Redis."""
    try:
        made = RedisServer("redis", tmp_path_factory.mktemp("server"))
    except NoServerError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'letters' / 'letters.db'}"
    server: RedisServer = request.getfixturevalue("server")
    with server.client as client:
        client.flushall()
    return server.url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """Return an empty store."""
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture
def world(store: Store) -> Iterator[World]:
    """Return an empty store, with all telemetry captured."""
    with capture_telemetry() as captured:
        yield World(store, captured)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[World]:
    """Return an empty store in a file, for what does not depend on the kind of store."""
    with (
        open_store(f"sqlite:///{tmp_path / 'letters' / 'letters.db'}") as opened,
        capture_telemetry() as captured,
    ):
        yield World(opened, captured)


@pytest.fixture
def name() -> str:
    """Return a name that no other operation has."""
    return f"replayed.{next(_numbers)}"


class Ingest:
    """A monitored function that fails until it is healed, and knows its calls."""

    def __init__(self, name: str, **policy: Any) -> None:
        self.error: BaseException | None = KeyError("no such feed")
        self.calls: list[Any] = []
        self.keys: list[str | None] = []

        @monitored(name, **{"feed": "urlhaus", "dead_letter": True, **policy})
        def ingest(value: Any) -> None:
            self.calls.append(value)
            self.keys.append(current_operation().idempotency_key)
            if self.error is not None:
                raise self.error

        self.function = ingest

    def heal(self) -> None:
        """Let calls succeed from now on, and forget those so far."""
        self.error = None
        self.calls, self.keys = [], []


def some_failed(world: World, ingest: Ingest, count: int) -> list[Letter]:
    """Return letters of as many failed calls."""
    return [world.fail(ingest.function, number) for number in range(count)]


# How a letter fares.


def test_success_removes_the_letter_for_good(world, name):
    """A letter whose operation succeeds is gone, and does not come back when it is put again."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, {"id": 1})
    ingest.heal()
    told: list[Replayed] = []
    report = replay(world.store, on_replayed=told.append)
    assert (report.succeeded, report.failed, report.tried) == (1, 0, 1)
    assert [(one.letter.id, one.outcome) for one in told] == [(letter.id, "succeeded")]
    assert ingest.calls == [{"id": 1}]
    assert world.store.put([letter]) == ["known"]
    assert world.store.stats().total == 0


def test_failure_leaves_the_letter_with_its_new_error(world, name):
    """A letter whose operation fails again is dead, tells the new error and counts the attempt."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    ingest.error = RuntimeError("another reason")
    told: list[Replayed] = []
    report = replay(world.store, on_replayed=told.append)
    assert (report.succeeded, report.failed, report.parked) == (0, 1, 0)
    now = world.store.get(letter.id)
    assert (now.state, now.replays, now.attempts) == ("dead", 1, 2)
    assert (now.error_type, now.error_message) == ("RuntimeError", "another reason")
    assert "another reason" in told[0].detail
    assert now.first_failed_at == letter.first_failed_at <= now.last_failed_at


def test_a_letter_that_fails_five_times_is_parked(world, name):
    """The fifth failed replay parks a letter, and no later replay of everything tries it."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    reports = [replay(world.store) for _ in range(MOST_REPLAYS)]
    assert [one.parked for one in reports] == [0, 0, 0, 0, 1]
    assert [one.failed for one in reports] == [1] * MOST_REPLAYS
    assert world.state(letter) == "parked"
    assert replay(world.store).tried == 0
    world.store.unpark(Filter(states=("parked",)))
    ingest.heal()
    assert replay(world.store).succeeded == 1


def test_a_letter_that_replayers_die_of_is_parked(world, name, url):
    """Three leases that ran out park a letter: no replay tries it again."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    ingest.heal()
    for number in range(MOST_LEASES):
        assert world.store.claim(f"dies {number}", LEASE, 1, Filter())
        let_pass(url, LEASE + 1)
        replay(world.store, Filter(operation=f"{name}.another"))  # ends leases
    assert replay(world.store).tried == 0
    assert world.state(letter) == "parked"
    assert ingest.calls == []


def test_a_lease_that_ran_out_is_taken_over(world, name, url):
    """What a dead replayer held is replayed by the next one once its lease has run out."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    ingest.heal()
    assert world.store.claim("dies", LEASE, 1, Filter())
    assert replay(world.store).tried == 0
    let_pass(url, LEASE + 1)
    assert replay(world.store).succeeded == 1
    assert world.state(letter) is None


@pytest.mark.parametrize("outcome", ["rejected", "cancelled"])
def test_a_call_that_was_not_made_ends_the_replay(world, name, outcome):
    """A rejected or cancelled operation gives its letter back as it was, and stops the rest."""
    ingest = Ingest(name)
    letters = some_failed(world, ingest, 3)
    ingest.error, ingest.calls = HeldError(outcome), []
    report = replay(world.store)
    assert len(ingest.calls) == 1
    assert (report.tried, report.left[outcome]) == (0, 1)
    assert name in report.stopped
    assert outcome in report.stopped
    for letter in letters:
        now = world.store.get(letter.id)
        assert (now.state, now.replays, now.error_type) == ("dead", 0, "KeyError")


def test_a_cancelled_coroutine_gives_its_letter_back(world, name):
    """A coroutine that is cancelled in a replay has neither succeeded nor failed."""
    cancel = False

    @monitored(name, dead_letter=True)
    async def ingest(value: int) -> None:
        if cancel:
            raise asyncio.CancelledError
        raise KeyError(value)

    letter = world.fail(ingest, 1)
    cancel = True
    report = replay(world.store)
    assert (report.tried, report.left["cancelled"]) == (0, 1)
    assert world.store.get(letter.id).replays == 0


def test_a_queued_letter_is_again_queued_when_it_is_given_back(world, name):
    """What was queued before a replay that did not try it is queued after it."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    world.store.requeue(Filter())
    ingest.error = HeldError()
    assert replay(world.store).stopped
    assert world.state(letter) == "queued"


def test_a_returned_failure_is_a_failure(world, name):
    """A handler that returns normally from an operation marked as failed has failed."""
    with_error = True

    @monitored(name, dead_letter=True)
    def ingest(value: int) -> None:
        if with_error:
            current_operation().fail("the peer said no")

    letter = world.fail(ingest, 1)
    assert replay(world.store).failed == 1
    assert world.store.get(letter.id).error_message == "the peer said no"
    with_error = False
    assert replay(world.store).succeeded == 1


# Which letters.


def test_the_filter_limit_and_order_are_kept(world, name):
    """Only letters of the filter are tried, first those that came first, up to the limit."""
    ingest = Ingest(name)
    letters = some_failed(world, ingest, 6)
    other = Ingest(f"{name}.other")
    world.fail(other.function, 1)
    ingest.heal()
    other.heal()
    assert replay(world.store, Filter(operation=name), limit=2).succeeded == 2
    assert ingest.calls == [0, 1]
    chosen = (letters[3].id, letters[5].id)
    assert replay(world.store, Filter(ids=chosen)).succeeded == 2
    assert ingest.calls == [0, 1, 3, 5]
    assert other.calls == []
    assert replay(world.store).succeeded == 3


def test_letters_of_many_pages_are_all_tried(world, name):
    """More letters than a page has are tried, each once, though they all fail again."""
    ingest = Ingest(name)
    ingest.error = RuntimeError("never")
    some_failed(world, ingest, 230)
    ingest.calls = []
    report = replay(world.store, concurrency=3)
    assert report.failed == 230
    assert Counter(ingest.calls) == Counter(range(230))


def test_letters_that_come_meanwhile_are_for_the_next_replay(world, name):
    """A replay ends though each letter that it tries leaves another one."""
    ingest = Ingest(name)
    world.fail(ingest.function, 0)
    calls: list[int] = []

    @replay_handler(name)
    def again(value: int) -> None:
        calls.append(value)
        assert len(calls) < 50, "the replay does not end"
        with suppress(KeyError):
            monitored(f"{name}.next", dead_letter=True)(fails_with)(value + 1)
        (left,) = world.new_letters()
        world.store.put([left.changed(operation=name)])
        raise RuntimeError("failed again")

    def fails_with(value: int) -> None:
        raise KeyError(value)

    assert replay(world.store).failed == 1
    assert calls == [0]
    assert world.store.stats().total == 2


def test_unknown_operations_are_left(world, name):
    """A letter whose operation is not registered stays, untouched and with the reason."""
    letter = a_letter(operation=name)
    world.store.put([letter])
    told: list[Replayed] = []
    report = replay(world.store, on_replayed=told.append)
    assert (report.tried, sum(report.left.values())) == (0, 1)
    assert name in told[0].detail
    now = world.store.get(letter.id)
    assert (now.state, now.revision, now.replays) == ("dead", 1, 0)


@pytest.mark.parametrize("path", ["os.system", "os:system", "builtins.exec", "subprocess.run"])
def test_nothing_is_imported_because_a_letter_says_so(sqlite, path):
    """A letter that names a function of some module is left like any other unknown one."""
    sqlite.store.put([a_letter(operation=path)])
    report = replay(sqlite.store)
    assert (report.tried, sum(report.left.values())) == (0, 1)


def test_what_asks_for_later_is_left_until_then(world, name):
    """A letter with a `not_before` in the future is left, unless it is asked for by its id."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    later = letter.changed(
        id=a_letter().id, not_before=time.time() + 3600, key="later", last_failed_at=time.time()
    )
    world.store.put([later])
    ingest.heal()
    report = replay(world.store)
    assert (report.succeeded, report.left) == (1, Counter({"not yet": 1}))
    assert replay(world.store, Filter(ids=(later.id,))).succeeded == 1


def test_what_could_not_be_carried_is_left(world, name):
    """A letter that holds only a text about its payload is left, and never tried."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, object())
    assert not letter.replayable
    ingest.heal()
    report = replay(world.store)
    assert (report.tried, report.left) == (0, Counter({"not replayable": 1}))
    assert world.state(letter) == "dead"


def test_a_dry_run_changes_nothing(world, name):
    """A dry run says how many would be tried and which would be left, and calls nothing."""
    ingest = Ingest(name)
    letters = some_failed(world, ingest, 3)
    world.store.put([a_letter(operation=f"{name}.unknown")])
    ingest.heal()
    report = replay(world.store, dry_run=True)
    assert (report.would_replay, report.tried, sum(report.left.values())) == (3, 0, 1)
    assert replay(world.store, dry_run=True, limit=2).would_replay == 2
    assert ingest.calls == []
    assert {world.store.get(letter.id).revision for letter in letters} == {1}


def test_a_store_may_be_named_by_its_url(url, name):
    """A URL is opened for the replay, and closed after it."""
    ingest = Ingest(name)
    with open_store(url) as opened, capture_telemetry() as captured:
        World(opened, captured).fail(ingest.function, 1)
        ingest.heal()
        assert replay(url).succeeded == 1
        assert opened.stats().total == 0


@pytest.mark.parametrize("what", ["concurrency", "rate", "limit", "lease"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_figures_have_to_make_sense(sqlite, what, value):
    """A concurrency, rate, limit or lease that is not greater than 0 is an error."""
    with pytest.raises(ValueError, match=what):
        replay(sqlite.store, **{what: value})


def test_a_store_that_cannot_be_used_is_an_error(server, sqlite, name):
    """A Redis that is away is said at once, and no letter is called tried."""
    with pytest.raises(StoreError):
        replay("redis://127.0.0.1:1/0")


# At which pace.


def test_the_rate_is_kept(sqlite, name):
    """Letters are not tried faster than asked for, whatever the concurrency."""
    ingest = Ingest(name)
    some_failed(sqlite, ingest, 6)
    ingest.heal()
    began = time.monotonic()
    assert replay(sqlite.store, rate=10, concurrency=4).succeeded == 6
    assert time.monotonic() - began >= 0.5


def test_so_many_handlers_run_at_the_same_time(world, name):
    """With a concurrency of 3 three handlers meet, and never a fourth."""
    meeting = threading.Barrier(3, timeout=WITHIN)
    lock, now, most = threading.Lock(), 0, 0
    fails = True

    @monitored(name, dead_letter=True)
    def ingest(value: int) -> None:
        nonlocal now, most
        if fails:
            raise KeyError(value)
        with lock:
            now += 1
            most = max(most, now)
        meeting.wait()
        with lock:
            now -= 1

    for number in range(9):
        world.fail(ingest, number)
    fails = False
    assert replay(world.store, concurrency=3).succeeded == 9
    assert most == 3


def test_one_at_a_time_is_the_default(sqlite, name):
    """Without a concurrency no two handlers run at the same time."""
    lock = threading.Lock()
    fails = True

    @monitored(name, dead_letter=True)
    def ingest(value: int) -> None:
        if fails:
            raise KeyError(value)
        assert lock.acquire(blocking=False)
        time.sleep(0.01)
        lock.release()

    for number in range(5):
        sqlite.fail(ingest, number)
    fails = False
    assert replay(sqlite.store).succeeded == 5


def test_coroutines_share_one_loop(world, name):
    """Handlers that are coroutines run at the same time on one event loop."""
    loops: set[int] = set()
    arrived: list[int] = []
    fails = True

    @monitored(name, dead_letter=True)
    async def ingest(value: int) -> None:
        if fails:
            raise KeyError(value)
        loops.add(id(asyncio.get_running_loop()))
        arrived.append(value)
        async with asyncio.timeout(WITHIN):
            while len(arrived) < 3:  # noqa: ASYNC110  (the loop is the replay's own)
                await asyncio.sleep(0.01)

    for number in range(3):
        world.fail(ingest, number)
    fails = False
    assert replay(world.store, concurrency=3).succeeded == 3
    assert len(loops) == 1


def test_what_a_coroutine_leaves_running_is_ended(sqlite, name, recwarn, caplog):
    """A task that a handler started and did not await is cancelled at the end, not dropped."""
    ended: list[str] = []
    fails = True

    async def background() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("cancelled")

    @monitored(name, dead_letter=True)
    async def ingest(value: int) -> None:
        if fails:
            raise KeyError(value)
        tasks.add(asyncio.create_task(background(), name=f"{name}.background"))
        await asyncio.sleep(0)

    tasks: set[Any] = set()
    sqlite.fail(ingest, 1)
    fails = False
    assert replay(sqlite.store).succeeded == 1
    assert ended == ["cancelled"]
    assert f"{name}.background" not in caplog.text  # of other tests' tasks anything may be told


def test_an_awaitable_that_is_no_coroutine_is_awaited(sqlite, name):
    """A handler that returns any awaitable has succeeded only once that has."""
    ingest = Ingest(name)
    sqlite.fail(ingest.function, 1)
    done: list[int] = []

    class Later:
        def __init__(self, value: int) -> None:
            self.value = value

        def __await__(self) -> Any:
            yield from asyncio.sleep(0.01).__await__()
            done.append(self.value)
            raise RuntimeError("after all")

    replay_handler(name)(Later)
    report = replay(sqlite.store)
    assert (done, report.succeeded, report.failed) == ([1], 0, 1)


# What the handler sees.


def test_a_replay_is_a_new_trace_linked_to_the_failed_one(world, name):
    """The replay's span has no parent, a link to the failed span and its operation as a child."""
    ingest = Ingest(name)
    with operation(f"{name}.around"):
        letter = world.fail(ingest.function, 1)
    failed = world.captured.operation(name).span.context
    ingest.heal()
    with operation(f"{name}.caller"):
        replay(world.store)
    (root,) = [span for span in world.captured.spans if span.name == SPAN]
    again = world.captured.operations(name)[-1].span
    assert root.parent is None
    assert [(one.context.trace_id, one.context.span_id) for one in root.links] == [
        (failed.trace_id, failed.span_id)
    ]
    assert root.context.trace_id != failed.trace_id
    assert again.parent.span_id == root.context.span_id
    assert root.attributes["dead_letter.id"] == letter.id
    assert root.attributes["dead_letter.outcome"] == "succeeded"
    assert root.status.is_unset


def test_a_failed_replay_shows_in_its_span(world, name):
    """The span of a failed replay has the status of an error, with the error."""
    ingest = Ingest(name)
    world.fail(ingest.function, 1)
    replay(world.store)
    (root,) = [span for span in world.captured.spans if span.name == SPAN]
    assert root.attributes["dead_letter.outcome"] == "failed"
    assert not root.status.is_ok
    assert "KeyError" in root.status.description


def test_replays_are_counted_by_outcome(world, name):
    """`dead_letter.replays` counts each letter that was tried, by what became of it."""
    ingest = Ingest(name)
    some_failed(world, ingest, 3)
    world.store.put([a_letter(operation=f"{name}.unknown")])
    replay(world.store, limit=1)
    ingest.heal()
    replay(world.store)
    counted = world.captured.label_sets("dead_letter.replays")
    assert {one["dead_letter.outcome"] for one in counted} == {"failed", "succeeded"}
    assert world.captured.metric("dead_letter.replays", outcome="failed") == 1
    assert world.captured.metric("dead_letter.replays", outcome="succeeded") == 3
    assert {one["dead_letter.queue"] for one in counted} == {"default"}


def test_the_key_is_that_of_the_failed_call(world, name):
    """In a replay the operation's idempotency key is the one that its first attempt had."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, {"id": 1})
    (first,) = ingest.keys
    ingest.heal()
    replay(world.store)
    assert ingest.keys == [first] == [letter.key]


def test_a_key_of_the_callers_own_is_kept(world, name):
    """A key that the caller chose is the key in the replay, also where it was set by hand."""
    ingest = Ingest(name, idempotency_key=lambda args: f"own-{args['value']}")
    world.fail(ingest.function, 7)
    ingest.heal()
    replay(world.store)
    assert ingest.keys == ["own-7"]


def test_the_key_reaches_coroutines_and_nested_code(world, name):
    """A coroutine sees the letter's key, on the loop's thread and in tasks that it starts."""
    keys: list[str | None] = []
    fails = True

    async def inner() -> None:
        keys.append(current_operation().idempotency_key)

    @monitored(name, dead_letter=True)
    async def ingest(value: int) -> None:
        if fails:
            raise KeyError(value)
        await inner()
        await asyncio.create_task(inner())

    letter = world.fail(ingest, 1)
    fails = False
    assert replay(world.store).succeeded == 1
    assert keys == [letter.key] * 2


def test_an_explicit_handler_sees_the_key(world, name):
    """A handler that is no operation itself sees the letter's key by `current_operation()`."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    seen: list[Any] = []

    @replay_handler(name)
    def again(value: int) -> None:
        seen.append((value, current_operation().idempotency_key))
        with operation(f"{name}.store"):
            seen.append((value, current_operation().idempotency_key))

    assert replay(world.store).succeeded == 1
    assert seen == [(1, letter.key)] * 2


def test_the_feed_is_that_of_the_failed_call(world, name):
    """An operation that had its feed from the one around it has it in its replay too."""
    feeds: list[str | None] = []
    fails = True

    @monitored(name, dead_letter=True)
    def ingest(value: int) -> None:
        feeds.append(current_operation().feed)
        if fails:
            raise KeyError(value)

    with operation(f"{name}.around", feed="threatfox"):
        world.fail(ingest, 1)
    fails = False
    assert replay(world.store).succeeded == 1
    assert feeds == ["threatfox"] * 2


def test_nothing_of_a_replay_stays_behind(sqlite, name):
    """After a replay, operations have keys of their own again and make letters again."""
    ingest = Ingest(name)
    letter = sqlite.fail(ingest.function, 1)
    ingest.heal()
    replay(sqlite.store)
    ingest.error = KeyError("anew")
    again = sqlite.fail(ingest.function, 2)
    assert again.key != letter.key


# Letters that are made in a replay.


def test_the_replayed_operation_writes_no_second_letter(world, name):
    """What fails again keeps its letter: none is made anew."""
    ingest = Ingest(name)
    world.fail(ingest.function, 1)
    assert replay(world.store).failed == 1
    assert world.new_letters() == []
    assert world.store.stats().total == 1


def test_nested_operations_keep_what_fails_in_them(world, name):
    """An operation within the replayed one writes its own letter, and does not end the replay."""
    fails = True

    @monitored(f"{name}.inner", dead_letter=True)
    def inner(value: int) -> None:
        raise ValueError(value)

    @monitored(name, dead_letter=True)
    def ingest(value: int) -> None:
        if fails:
            raise KeyError(value)
        with suppress(ValueError):
            inner(value + 1)

    letter = world.fail(ingest, 1)
    fails = False
    assert replay(world.store).succeeded == 1
    (own,) = world.new_letters()
    assert own.operation == f"{name}.inner"
    assert own.key != letter.key


def test_an_operation_that_calls_itself_is_replayed_once(world, name):
    """Within the replayed operation one of the same name stands for a payload of its own."""
    fails = True

    @monitored(name, dead_letter=True)
    def ingest(depth: int) -> None:
        if fails:
            raise KeyError(depth)
        if depth < 3:
            with suppress(ValueError):
                ingest(depth + 1)
        else:
            raise ValueError(depth)

    world.fail(ingest, 2)
    fails = False
    assert replay(world.store).succeeded == 1
    (own,) = world.new_letters()
    assert (own.operation, own.error_type) == (name, "ValueError")


def test_a_handler_that_tries_again_writes_no_letters(world, name):
    """A handler that calls the operation three times over makes no letter of its own payload."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)

    @replay_handler(name)
    def again(value: int) -> None:
        for _ in range(2):
            with suppress(KeyError):
                ingest.function(value)
        ingest.function(value)

    assert replay(world.store).failed == 1
    assert world.new_letters() == []
    assert world.store.get(letter.id).replays == 1


def test_a_handler_that_succeeds_at_its_second_try_has_succeeded(world, name):
    """The payload's last try within a replay counts."""
    ingest = Ingest(name)
    world.fail(ingest.function, 1)

    @replay_handler(name)
    def again(value: int) -> None:
        with suppress(KeyError):
            ingest.function(value)
        ingest.heal()
        ingest.function(value)

    assert replay(world.store).succeeded == 1
    assert world.store.stats().total == 0


def test_items_that_fail_in_a_replay_are_letters(world, name):
    """A payload whose replay ingests all but some items is done; those items are letters."""
    fails = True

    @monitored(name, dead_letter=True)
    def ingest(values: list[int]) -> None:
        if fails:
            raise ConnectionError("away")
        for value in values:
            if value % 2:
                current_operation().failed(value, ValueError(f"odd {value}"))

    world.fail(ingest, [1, 2, 3])
    fails = False
    assert replay(world.store).succeeded == 1
    assert [one.item_index for one in world.keep()] == [0, 1]
    assert world.store.stats().total == 2


def test_no_item_is_lost_where_too_many_fail_in_a_replay(world, name):
    """However many items fail in a replay, each is in a letter afterwards."""
    count, fails = 2500, True

    @monitored(name, dead_letter=True)
    def ingest(values: list[int]) -> None:
        if fails:
            raise ConnectionError("away")
        for value in values:
            current_operation().failed(value, ValueError("bad"))

    letter = world.fail(ingest, list(range(count)))
    fails = False
    replay(world.store)
    made = world.new_letters()
    has_all = world.store.get(letter.id) is not None
    assert has_all or len({one.sha256 for one in made}) == count


# Items.


def item_letters(world: World, name: str, function: Callable[..., Any]) -> list[Letter]:
    """Return the letters of three items, each of which failed."""
    bad = [{"value": number} for number in range(3)]
    with suppress(Exception):
        function(bad)
    letters = world.keep()
    assert [one.item_index for one in letters] == [0, 1, 2]
    return letters


def test_items_go_to_the_handler_of_items(world, name):
    """A letter of one item is handed to what is registered for items, as its first argument."""

    @monitored(name, dead_letter=True)
    def ingest(values):
        for value in values:
            current_operation().failed(value, ValueError("bad"))

    item_letters(world, name, ingest)
    seen: list[Any] = []
    replay_handler(name, items=True)(seen.append)
    assert replay(world.store).succeeded == 3
    assert seen == [{"value": number} for number in range(3)]


def test_items_go_to_an_operation_that_takes_a_list(world, name):
    """An operation whose annotation says many gets each item in a list."""
    seen: list[Any] = []
    bad = True

    @monitored(name, dead_letter=True)
    def ingest(values: list[dict[str, int]]) -> None:
        for value in values:
            if bad:
                current_operation().failed(value, ValueError("bad"))
            else:
                seen.append(values)

    item_letters(world, name, ingest)
    bad = False
    assert replay(world.store).succeeded == 3
    assert seen == [[{"value": number}] for number in range(3)]


def test_items_go_to_an_operation_that_takes_one(world, name):
    """An operation whose annotation says one item gets the item itself."""
    seen: list[Any] = []

    @monitored(name, dead_letter=True)
    def ingest(value: dict[str, int]) -> None:
        if isinstance(value, list):
            for one in value:
                current_operation().failed(one, ValueError("bad"))
        else:
            seen.append(value)

    item_letters(world, name, ingest)
    assert replay(world.store).succeeded == 3
    assert seen == [{"value": number} for number in range(3)]


def test_items_are_left_where_nobody_says_what_is_taken(world, name):
    """An operation without an annotation is not called with an item: that is left, and says so."""

    @monitored(name, dead_letter=True)
    def ingest(values):
        for value in values:
            current_operation().failed(value, ValueError("bad"))

    letters = item_letters(world, name, ingest)
    told: list[Replayed] = []
    report = replay(world.store, on_replayed=told.append)
    assert (report.tried, sum(report.left.values())) == (0, 3)
    assert all("annotat" in one.detail for one in told)
    assert {world.state(letter) for letter in letters} == {"dead"}
    assert {world.store.get(letter.id).replays for letter in letters} == {0}


def test_an_item_that_fails_again_keeps_its_letter(world, name):
    """An item that its operation marks as failed again is dead with the new error, once."""
    why = "bad"

    @monitored(name, dead_letter=True)
    def ingest(values: list[dict[str, int]]) -> None:
        for value in values:
            current_operation().failed(value, ValueError(why))

    letters = item_letters(world, name, ingest)
    why = "worse"
    assert replay(world.store).failed == 3
    assert world.new_letters() == []
    for letter in letters:
        now = world.store.get(letter.id)
        assert (now.state, now.replays, now.error_message) == ("dead", 1, "worse")


def test_letters_of_items_alone_are_replayed(world, name):
    """With `dead_letter="items"` an item is replayed though its operation failed as a whole."""
    seen: list[Any] = []
    fails = True

    @monitored(name, dead_letter="items")
    def ingest(values: list[dict[str, int]]) -> None:
        for value in values:
            if fails:
                current_operation().failed(value, ValueError("bad"))
            seen.append(value)
        if fails:
            raise ConnectionError("away")

    item_letters(world, name, ingest)
    fails, seen[:] = False, []
    assert replay(world.store).succeeded == 3
    assert len(seen) == 3


# Handlers.


def test_methods_need_a_handler(world, name):
    """A letter of a method is left until a handler is registered, which gets the arguments."""

    class Client:
        @monitored(name, dead_letter=True)
        def fetch(self, url: str) -> None:
            raise ConnectionError(url)

    letter = world.fail(Client().fetch, "https://urlhaus.example/")
    report = replay(world.store)
    assert (report.tried, sum(report.left.values())) == (0, 1)
    assert world.store.get(letter.id).replays == 0
    fetched: list[str] = []

    @replay_handler(name)
    def again(url: str) -> None:
        fetched.append(url)

    assert replay(world.store).succeeded == 1
    assert fetched == ["https://urlhaus.example/"]


def test_generators_need_a_handler(world, name):
    """The items of a generator would be nobody's: it is left until a handler is registered."""

    @monitored(name, dead_letter=True)
    def items(url: str) -> Any:
        yield 1
        raise ConnectionError(url)

    world.fail(lambda: list(items("https://threatfox.example/")))
    told: list[Replayed] = []
    assert replay(world.store, on_replayed=told.append).tried == 0
    assert "generator" in told[0].detail
    taken: list[int] = []

    @replay_handler(name)
    def again(url: str) -> Any:
        for number in range(3):
            taken.append(number)
            yield number

    assert replay(world.store).succeeded == 1
    assert taken == [0, 1, 2]


def test_async_generators_are_run_to_their_end(sqlite, name):
    """A handler that is an asynchronous generator has succeeded once it is exhausted."""
    ingest = Ingest(name)
    sqlite.fail(ingest.function, 1)
    taken: list[int] = []

    @replay_handler(name)
    async def again(value: int) -> Any:
        for number in range(3):
            taken.append(number)
            yield number
        raise RuntimeError("at its end")

    assert replay(sqlite.store).failed == 1
    assert taken == [0, 1, 2]


def test_secrets_are_the_handlers(world, name):
    """What is named like a secret is in no letter: the handler supplies it."""
    fails = True

    @monitored(name, dead_letter=True)
    def fetch(url: str, api_key: str) -> None:
        if fails:
            raise ConnectionError(url)
        keys.append((url, api_key))

    keys: list[tuple[str, str]] = []
    letter = world.fail(fetch, "https://otx.example/", "s3cr3t")
    assert b"s3cr3t" not in letter.encode()
    fails = False
    report = replay(world.store)
    assert (report.tried, keys) == (0, [])
    assert world.store.get(letter.id).replays == 0

    @replay_handler(name)
    def again(url: str) -> None:
        fetch(url, api_key="fresh")

    assert replay(world.store).succeeded == 1
    assert keys == [("https://otx.example/", "fresh")]


def test_a_payload_that_no_longer_fits_is_left(world, name):
    """A letter whose operation has other parameters by now is left, and says what does not fit."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)

    @replay_handler(name)
    def again(other: int) -> None:
        raise AssertionError

    told: list[Replayed] = []
    assert replay(world.store, on_replayed=told.append).tried == 0
    assert "value" in told[0].detail
    assert world.store.get(letter.id).replays == 0


def test_a_handler_that_ends_the_program_ends_the_replay(world, name):
    """`SystemExit` in a handler is raised where the replay was called; no letter is lost."""
    ingest = Ingest(name)
    some_failed(world, ingest, 3)
    ingest.error, ingest.calls = SystemExit(3), []
    with pytest.raises(SystemExit):
        replay(world.store)
    assert len(ingest.calls) == 1
    assert world.store.stats().total == 3


def test_a_callback_that_raises_ends_the_replay(world, name):
    """What `on_replayed` raises comes out; the letters are settled or as they were."""
    ingest = Ingest(name)
    some_failed(world, ingest, 3)
    ingest.heal()

    def told(replayed: Replayed) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replay(world.store, on_replayed=told)
    assert world.store.stats().by_state == {"dead": 2}


# Payloads.


def test_a_payload_in_a_file_here_is_replayed(world, name, tmp_path):
    """A payload too large for its letter is read from the file beside the store."""
    ingest = Ingest(name)
    with suppress(KeyError):
        ingest.function("x" * 5000)
    (letter,) = world.new_letters()
    moved = BodyFiles(tmp_path / "payloads", inline=10).moved_out(letter)
    assert moved.body_file is not None
    world.store.put([moved])
    ingest.heal()
    assert replay(world.store, folder=tmp_path / "payloads").succeeded == 1
    assert ingest.calls == ["x" * 5000]


def test_a_payload_of_another_machine_is_left(world, name, tmp_path):
    """Where its file is not, a letter is left, unchanged, and names the host that has it."""
    ingest = Ingest(name)
    with suppress(KeyError):
        ingest.function("x" * 5000)
    (letter,) = world.new_letters()
    moved = BodyFiles(tmp_path / "payloads", inline=10).moved_out(letter)
    world.store.put([moved.changed(host="feeds-7")])
    ingest.heal()
    told: list[Replayed] = []
    report = replay(world.store, folder=tmp_path / "none", on_replayed=told.append)
    assert (report.tried, report.left) == (0, Counter({"payload elsewhere": 1}))
    assert "feeds-7" in told[0].detail
    assert (world.state(letter), world.store.get(letter.id).replays) == ("dead", 0)
    assert ingest.calls == []


def test_a_damaged_payload_is_left(world, name):
    """A payload with a flipped bit is never handed to its operation; its letter stays."""
    ingest = Ingest(name)
    with suppress(KeyError):
        ingest.function("x" * 100)
    (letter,) = world.new_letters()
    body = bytearray(letter.body)
    body[50] ^= 1
    world.store.put([letter.changed(body=bytes(body))])
    good = world.fail(ingest.function, "y")
    ingest.heal()
    report = replay(world.store)
    assert (report.succeeded, report.left) == (1, Counter({"damaged": 1}))
    assert ingest.calls == ["y"]
    assert (world.state(letter), world.state(good)) == ("dead", None)


def test_letters_of_a_newer_version_are_replayed(world, name):
    """A letter of a newer schema is replayed, and keeps fields that this version does not know."""
    ingest = Ingest(name)
    with suppress(KeyError):
        ingest.function(1)
    (letter,) = world.new_letters()
    newer = letter.changed(schema=99, unknown={"colour": {"of": ["the", "sky"]}})
    world.store.put([newer])
    assert replay(world.store).failed == 1
    now = world.store.get(letter.id)
    assert (now.schema, now.unknown) == (99, {"colour": {"of": ["the", "sky"]}})
    ingest.heal()
    assert replay(world.store).succeeded == 1


# Leases, and stores that are away.


class Soon(threading.Event):
    """Waits a hundredth of what it is asked to, and knows what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout)
        return super().wait(timeout / 100)


def test_the_lease_is_renewed_as_long_as_a_handler_runs(world, name, url, monkeypatch):
    """A handler may run longer than its lease: no other replayer gets the letter meanwhile."""
    ingest, soon = Ingest(name), Soon()
    letter = world.fail(ingest.function, 1)
    ingest.heal()
    got: list[Any] = []

    class Often(replay_run._Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._finished = soon

    monkeypatch.setattr(replay_run, "_Run", Often)

    @replay_handler(name)
    def again(value: int) -> None:
        with open_store(url) as other:
            for _ in range(3):
                let_pass(url, 0.8 * LEASE)
                wait_until(lambda: min(lease_ends(url)) > time.time() + 0.5 * LEASE)
                got.extend(other.claim("other", LEASE, 1, Filter(states=("dead", "queued"))))

    assert replay(world.store).succeeded == 1
    assert got == []
    assert world.state(letter) is None
    assert max(soon.asked) < 0.5 * LEASE


def test_a_replayer_that_lost_its_letter_does_not_settle_it(world, name):
    """What another replayer took over is its own: the first one's end changes nothing."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)

    @replay_handler(name)
    def again(value: int) -> None:
        world.store.purge(Filter(states=STATES), dry_run=False)
        world.store.put([letter.changed(id=a_letter().id)])

    report = replay(world.store)
    assert (report.succeeded, report.lost_claim) == (0, 1)
    assert world.store.stats().total == 1


class Moody:
    """A store that now and then is away for some of its methods."""

    def __init__(self, store: Store, **away: int) -> None:
        self._store = store
        self.away = Counter(away)
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if not callable(value):
            return value

        def asked(*args: Any, **kwargs: Any) -> Any:
            self.asked[name] += 1
            if self.away[name] > 0:
                self.away[name] -= 1
                raise StoreError("away")
            return value(*args, **kwargs)

        return asked


class Mute(Moody):
    """A store that does what it is asked to, and whose first answer does not arrive."""

    def settle(self, *args: Any) -> bool:
        self.asked["settle"] += 1
        answer = self._store.settle(*args)
        if self.asked["settle"] == 1:
            raise StoreError("no answer")
        return answer


@pytest.mark.parametrize("fails", [False, True])
def test_an_end_whose_answer_was_lost_is_no_lost_claim(world, name, fails):
    """A replay's end that the store took, without an answer, is what the report says."""
    ingest = Ingest(name)
    letter = world.fail(ingest.function, 1)
    if not fails:
        ingest.heal()
    report = replay(Mute(world.store))
    assert (report.succeeded, report.failed) == ((0, 1) if fails else (1, 0))
    assert report.lost_claim == 0
    assert world.state(letter) == ("dead" if fails else None)
    assert not fails or world.store.get(letter.id).replays == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_store_that_is_away_when_a_replay_ends_is_told_later(sqlite, name, fails):
    """A success or a failure that the store could not be told of at once is told again."""
    ingest = Ingest(name)
    letter = sqlite.fail(ingest.function, 1)
    if not fails:
        ingest.heal()
    moody = Moody(sqlite.store, settle=2)
    report = replay(moody, lease=60)
    assert (report.succeeded, report.failed) == ((0, 1) if fails else (1, 0))
    assert moody.asked["settle"] == 3
    assert sqlite.state(letter) == ("dead" if fails else None)


def test_a_store_that_stays_away_gets_its_letters_back_by_their_leases(sqlite, name, monkeypatch):
    """What cannot be told at all is a lost claim; the letter is there when its lease has ended."""
    monkeypatch.setattr(replay_run, "_SETTLE_AGAIN", (0.01, 0.02))
    ingest = Ingest(name)
    letter = sqlite.fail(ingest.function, 1)
    ingest.heal()
    report = replay(Moody(sqlite.store, settle=99))
    assert (report.succeeded, report.lost_claim) == (0, 1)
    assert sqlite.state(letter) == "claimed"
    let_pass(sqlite.store.url, LEASE + 1)
    assert replay(sqlite.store).succeeded == 1


def test_a_store_that_cannot_renew_is_no_error_of_our_own(sqlite, name, caplog):
    """A store that is away when a lease is to be renewed is asked again, and not reported."""
    moody = Moody(sqlite.store, renew=2)
    ingest = Ingest(name)
    sqlite.fail(ingest.function, 1)

    @replay_handler(name)
    def again(value: int) -> None:
        deadline = time.monotonic() + WITHIN
        while moody.asked["renew"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)

    assert replay(moody, lease=1.5).succeeded == 1
    assert moody.asked["renew"] >= 3
    assert "error of its own" not in caplog.text
    assert sqlite.captured.metric("periscope.internal_errors") == 0


def test_a_look_at_a_store_that_is_away_does_not_undo_a_failure(sqlite, name):
    """A replay that was told to the store has failed, whatever the store does afterwards."""
    ingest = Ingest(name)
    letter = sqlite.fail(ingest.function, 1)
    report = replay(Moody(sqlite.store, get=99))
    assert report.failed == 1
    assert sqlite.store.get(letter.id).replays == 1


class Hanging(Moody):
    """A Redis that hangs when it is told of an end, for longer than the first call of it waits."""

    def __init__(self, store: Store, hasty: Store, server: RedisServer) -> None:
        super().__init__(store)
        self._hasty, self._server = hasty, server

    def settle(self, *args: Any) -> bool:
        self.asked["settle"] += 1
        if self.asked["settle"] > 1:
            return self._store.settle(*args)
        self._server.pause()
        try:
            return self._hasty.settle(*args)
        finally:
            self._server.resume()


def test_a_redis_that_hangs_when_a_replay_ends_is_told_later(server, name):
    """A Redis that does not answer for a while gets the success after it."""
    with server.client as client:
        client.flushall()
    ingest = Ingest(name)
    with (
        RedisStore(server.url) as opened,
        RedisStore(server.url, timeout=0.3) as hasty,
        capture_telemetry() as captured,
    ):
        World(opened, captured).fail(ingest.function, 1)
        ingest.heal()
        with suppress(StoreError):
            hasty.stats()  # connects
        hanging = Hanging(opened, hasty, server)
        assert replay(hanging).succeeded == 1
        assert hanging.asked["settle"] == 2
        assert opened.stats().total == 0


# Interruptions, and what people see.


def test_ctrl_c_lets_what_runs_finish(world, name, monkeypatch):
    """An interruption ends the replay after the handlers that run; their letters are settled."""
    ingest = Ingest(name)
    some_failed(world, ingest, 4)
    finished: list[int] = []
    waits, was_stopped = threading.Event(), []

    class Watched(replay_run._Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            was_stopped.append(self._stop)

        def _wait(self) -> None:
            waits.set()
            super()._wait()

    monkeypatch.setattr(replay_run, "_Run", Watched)

    @replay_handler(name)
    def again(value: int) -> None:
        assert waits.wait(WITHIN)
        os.kill(os.getpid(), signal.SIGINT)
        assert was_stopped[0].wait(WITHIN)
        finished.append(value)

    with pytest.raises(KeyboardInterrupt):
        replay(world.store)
    assert finished == [0]
    assert world.store.stats().by_state == {"dead": 3}


def test_ctrl_c_while_a_thread_is_started_lets_what_runs_finish(world, name, monkeypatch):
    """Also where the thread runs already, and the call that starts it has not returned."""
    some_failed(world, Ingest(name), 2)
    begun, raised = threading.Event(), threading.Event()
    finished: list[int] = []
    start = threading.Thread.start

    def held_up(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "periscope-replay":
            assert begun.wait(WITHIN)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", held_up)

    @replay_handler(name)
    def again(value: int) -> None:
        begun.set()
        if not raised.wait(0.5):
            finished.append(value)

    with pytest.raises(KeyboardInterrupt):
        replay(world.store)
    raised.set()
    assert finished == [0]
    assert world.store.stats().by_state == {"dead": 1}


BAR = """
import sys
from periscope_otel import monitored
from periscope_otel.replay import replay

@monitored("bar")
def ingest(value): ...

print(replay(sys.argv[1]).succeeded)
"""


@contextmanager
def letters_for_a_bar(tmp_path: Path) -> Iterator[list[str]]:
    url = f"sqlite:///{tmp_path / 'letters.db'}"
    with open_store(url) as opened, capture_telemetry() as captured:
        world = World(opened, captured)
        some_failed(world, Ingest("bar"), 3)
        yield [sys.executable, "-c", BAR, url]


def test_a_terminal_shows_progress(tmp_path):
    """On a terminal there is a bar with the number of letters."""
    with letters_for_a_bar(tmp_path) as command:
        ours, theirs = os.openpty()
        with subprocess.Popen(
            command, env=clean_environment(), stdout=subprocess.PIPE, stderr=theirs, text=True
        ) as process:
            os.close(theirs)
            shown = b""
            with suppress(OSError):  # the other end is closed
                while data := os.read(ours, 4096):
                    shown += data
            os.close(ours)
            assert process.stdout.read() == "3\n"
    assert b"replay" in shown
    assert b"3/" in shown


def test_elsewhere_nothing_is_shown(tmp_path):
    """Where standard error is no terminal a replay writes nothing."""
    with letters_for_a_bar(tmp_path) as command:
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, check=True
        )
    assert (done.stdout, done.stderr) == ("3\n", "")


# Two at once.


def runs_of(log: Path) -> dict[str, list[list[str]]]:
    """Return the begins and ends of each letter's handlers, in order: [what, process]."""
    runs: dict[str, list[list[str]]] = {}
    for line in log.read_text().splitlines():
        what, letter, process = line.split()
        runs.setdefault(letter, []).append([what, process])
    return runs


def put_letters(url: str, count: int) -> list[Letter]:
    """Put letters for `programs/replayer.py`."""
    ingest = Ingest("replayer")
    with open_store(url) as opened, capture_telemetry() as captured:
        return some_failed(World(opened, captured), ingest, count)


def test_two_replayers_share_the_letters(url, tmp_path):
    """Two processes on one store: each letter runs once, and succeeds once."""
    letters = put_letters(url, 60)
    log = tmp_path / "log"
    log.touch()
    arguments = (url, str(log), "3", "120", "0.02")
    with running("replayer", *arguments) as one, running("replayer", *arguments) as other:
        assert {one.line(), other.line()} == {"ready"}
        one.tell()
        other.tell()
        ends = [one.ended(), other.ended()]
    assert [end.status for end in ends] == [0, 0], ends
    did = [Counter(line.split()[0] for line in end.lines[1:]) for end in ends]
    runs = runs_of(log)
    assert set(runs) == {letter.key for letter in letters}
    assert all([what for what, _ in run] == ["begin", "end"] for run in runs.values())
    assert sum(one["succeeded"] for one in did) == 60
    assert sum(one["lost_claim"] for one in did) == 0
    with open_store(url) as opened:
        assert opened.stats().total == 0


@pytest.mark.parametrize("round_number", range(3))
def test_a_replayer_that_is_killed_loses_nothing(url, tmp_path, round_number):
    """What a replayer held when it was killed is reclaimed; no letter is run by two at a time."""
    letters = put_letters(url, 30)
    log = tmp_path / "log"
    log.touch()
    arguments = (url, str(log), "2", "120", "0.2")
    with running("replayer", *arguments) as victim, running("replayer", *arguments) as other:
        assert {victim.line(), other.line()} == {"ready"}
        victim.tell()
        other.tell()
        deadline = time.monotonic() + WITHIN
        while not any(process == str(victim.pid) for run in runs_of(log).values()
                      for _, process in run):  # fmt: skip
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.1 * round_number)
        victim.send(signal.SIGKILL)
        assert victim.ended().status == -signal.SIGKILL
        while other.running:
            # Again and again: a Redis may read what it asked for after its death.
            let_pass(url, 121, holder=f"{victim.pid} ")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert other.ended().status == 0, other.ended()
    succeeded: Counter[str] = Counter()
    for key, run in runs_of(log).items():
        for place, (what, process) in enumerate(run):
            before = run[place - 1] if place else None
            if what == "end":
                succeeded[key] += 1
                assert before == ["begin", process], (key, run)
            else:
                # Nobody else is in the middle of it, but for the one that was killed.
                assert before is None or before[1] == str(victim.pid), (key, run)
    assert set(succeeded) == {letter.key for letter in letters}
    with open_store(url) as opened:
        assert everything(opened) == []
    twice = [key for key, count in succeeded.items() if count > 1]
    assert all(runs_of(log)[key][1] == ["end", str(victim.pid)] for key in twice)
