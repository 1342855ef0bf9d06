"""The outbox and its forwarder: what was put arrives, whatever ends or forgets meanwhile."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from processes import clean_environment

from periscope_otel.dead_letter import Filter, StoreError
from periscope_otel.dead_letter.database import LARGEST_LOG
from periscope_otel.dead_letter.errors import RefusedError
from periscope_otel.dead_letter.forwarder import LONGEST_WAIT, Forwarder
from periscope_otel.dead_letter.locks import ProcessLock
from periscope_otel.dead_letter.outbox import (
    FIRST_RETRY,
    GRACE,
    LATEST_CHECK,
    LONGEST_RETRY,
    MOST_LETTERS,
    Outbox,
)
from periscope_otel.dead_letter.sqlite_store import SQLiteStore

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    a_letter,
    everything,
    ids_of,
    some,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from periscope_otel.dead_letter import Letter
    from periscope_otel.dead_letter.store import Put


@dataclass
class Clock:
    """Time that a test moves."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Elsewhere(SQLiteStore):
    """A store that can be away, or can forget."""

    away = False
    refuses: tuple[str, ...] = ()
    """Ids."""
    asked = 0

    def put(self, letters: Sequence[Letter], *, revive: bool = False) -> list[Put]:
        self.asked += 1
        if self.away:
            raise StoreError("away")
        if any(one.id in self.refuses for one in letters):
            raise RefusedError("refused")
        return super().put(letters)


@pytest.fixture
def clock() -> Clock:
    """Return the time of all parts."""
    return Clock()


@pytest.fixture
def outbox(tmp_path: Path, clock: Clock) -> Iterator[Outbox]:
    """Return an empty outbox."""
    made = Outbox(tmp_path / "out" / "outbox.db", clock=clock, checkpoints=False)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Elsewhere]:
    """Return an empty store."""
    with Elsewhere(tmp_path / "store.db", clock=clock) as made:
        yield made


@pytest.fixture
def forwarder(outbox: Outbox, store: Elsewhere, clock: Clock) -> Iterator[Forwarder]:
    """Return a forwarder that does its rounds when it is told to."""
    made = Forwarder(outbox, store, clock)
    yield made
    made.release()


def rounds(forwarder: Forwarder) -> None:
    """Let it work until there is nothing to do."""
    while forwarder.round():
        pass


def test_what_is_put_arrives_in_order(outbox, store, forwarder):
    """All letters of all queues are in the store, and wait no more."""
    letters = [*some(3 * MOST_LETTERS), *some(3, queue="other")]
    outbox.put(letters)
    assert outbox.waiting().letters == len(letters)
    rounds(forwarder)
    assert ids_of(everything(store)) == ids_of(letters[:-3])
    assert ids_of(everything(store, Filter("other"))) == ids_of(letters[-3:])
    assert outbox.waiting() == (0, None)


def test_putting_twice_is_putting_once(outbox, store, forwarder):
    """The same letter is kept once, before and after it was forwarded."""
    (letter,) = some(1)
    outbox.put([letter, letter])
    assert outbox.waiting().letters == 1
    rounds(forwarder)
    outbox.put([letter])
    rounds(forwarder)
    assert store.stats().total == 1


def test_letters_are_put_as_a_part_of_a_transaction(outbox):
    """What is put within a transaction waits when that ends well, and not when it is undone."""
    letters = some(3)

    def undone() -> None:
        with outbox.database.writing() as writing:
            outbox.put_within(writing, letters)
            raise KeyError

    with pytest.raises(KeyError):
        undone()
    assert outbox.waiting() == (0, None)
    with outbox.database.writing() as writing:
        outbox.put_within(writing, [*letters, letters[0]])
    assert ids_of(outbox.next()) == ids_of(letters)


def test_waiting_says_since_when(outbox, clock):
    """The oldest letter that waits is told by the time at which it was put."""
    outbox.put(some(1))
    first = clock.now
    clock.now += 10
    outbox.put(some(1))
    assert outbox.waiting() == (2, first)


def test_waiting_is_counted_and_not_looked_for(outbox, clock):
    """The count is right after puts, repeated ones, arrivals, refusals and removals."""
    letters = some(300)
    outbox.put([*letters, *letters[:9]])
    outbox.taken(letters[:100])
    outbox.taken(letters[:100])
    assert outbox.waiting().letters == 200
    outbox.refused(letters[0])
    outbox.refused(letters[150])
    assert outbox.waiting().letters == 201
    clock.now += GRACE
    outbox.let_go(outbox.due())
    assert outbox.waiting().letters == 201
    counted = outbox.database.read("SELECT count(*) FROM outbox WHERE taken_at IS NULL")
    assert counted == [(201,)]
    plan = outbox.database.read(
        "EXPLAIN QUERY PLAN SELECT put_at FROM outbox WHERE taken_at IS NULL ORDER BY seq LIMIT 1"
    )
    assert "outbox_waiting" in str(plan)


def test_batches_are_bounded_in_bytes(outbox):
    """A batch is at most a mebibyte, unless one letter is larger."""
    outbox.put([a_letter(os.urandom(400_000)) for _ in range(4)])
    assert len(outbox.next()) == 2
    outbox.taken(outbox.next())
    outbox.taken(outbox.next())
    outbox.put([a_letter(os.urandom(3_000_000)), *some(1)])
    assert len(outbox.next()) == 1


def test_a_store_that_is_away_is_left_alone_and_gets_all_later(outbox, store, forwarder, clock):
    """After a failure there is a pause of at most half a minute, and nothing is lost."""
    outbox.put(some(5))
    store.away = True
    for _ in range(12):
        assert not forwarder.round()
        clock.now += LONGEST_WAIT
    assert outbox.waiting().letters == 5
    store.away = False
    rounds(forwarder)
    assert store.stats().total == 5


def test_a_pause_is_kept(outbox, store, forwarder, clock):
    """During its pause a store is not asked."""
    outbox.put(some(1))
    store.away = True
    forwarder.round()
    store.away = False
    assert not forwarder.round()
    assert store.stats().total == 0
    clock.now += LONGEST_WAIT
    rounds(forwarder)
    assert store.stats().total == 1


def test_what_a_store_forgets_within_the_grace_time_is_put_again(outbox, store, forwarder, clock):
    """A store that lost its letters, and with them their ids, has them again."""
    letters = some(3)
    outbox.put(letters)
    rounds(forwarder)
    with store.database.writing() as writing:
        writing.execute("DELETE FROM letters")
    clock.now += GRACE
    rounds(forwarder)
    assert ids_of(everything(store)) == ids_of(letters)


def test_what_was_put_again_has_a_grace_time_of_its_own(outbox, store, forwarder, clock):
    """A store that forgets twice has its letters again twice."""
    letters = some(3)
    outbox.put(letters)
    for _ in range(2):
        rounds(forwarder)
        with store.database.writing() as writing:
            writing.execute("DELETE FROM letters")
        clock.now += GRACE
    rounds(forwarder)
    assert ids_of(everything(store)) == ids_of(letters)


def test_a_damaged_letter_holds_no_other_up(outbox, store, forwarder):
    """What cannot be read is set aside, and all others arrive."""
    letters = [*some(2), a_letter(os.urandom(5000)), *some(1)]
    outbox.put(letters)
    with outbox.database.writing() as writing:
        writing.execute("UPDATE outbox SET letter = x'c1' WHERE seq = 1")
        writing.execute("DELETE FROM outbox_blobs WHERE seq = 3")
    rounds(forwarder)
    assert ids_of(everything(store)) == [letters[1].id, letters[3].id]
    assert outbox.database.read("SELECT id FROM damaged") == [(letters[0].id,), (letters[2].id,)]


def test_that_the_store_took_it_writes_no_payload_anew(outbox):
    """However large a letter is, to note that it has arrived writes some kilobytes."""
    outbox.put([a_letter(os.urandom(4 << 20))])
    log = f"{outbox.database.path}-wal"
    before = os.stat(log).st_size  # noqa: PTH116
    outbox.taken(outbox.next())
    assert os.stat(log).st_size < before + 100_000  # noqa: PTH116


# Refused letters.


@pytest.mark.parametrize("places", [(0,), (40,), (3, 4, 63, 90), (99,)])
def test_a_refused_letter_holds_no_other_up(outbox, store, forwarder, places):
    """Only letters that the store refuses by themselves stay, and all others arrive."""
    letters = some(100)
    store.refuses = tuple(letters[place].id for place in places)
    outbox.put(letters)
    rounds(forwarder)
    assert set(ids_of(everything(store))) == set(ids_of(letters)) - set(store.refuses)
    assert outbox.waiting().letters == len(places)
    outbox.put(later := some(1))
    rounds(forwarder)
    assert store.get(later[0].id)


def test_a_refused_letter_is_tried_again_less_and_less_often(outbox, store, forwarder, clock):
    """After five minutes, then after twice as long each time, and at least once an hour."""
    (letter,) = some(1)
    store.refuses = (letter.id,)
    outbox.put([letter])
    pauses = []
    for _ in range(6):
        rounds(forwarder)
        asked, began = store.asked, clock.now
        while store.asked == asked:
            clock.now += 60
            rounds(forwarder)
        pauses.append(clock.now - began)
    assert pauses == [300, 600, 1200, 2400, 3600, 3600]
    assert (FIRST_RETRY, LONGEST_RETRY) == (300, 3600)
    store.refuses = ()
    clock.now += LONGEST_RETRY
    rounds(forwarder)
    assert store.get(letter.id)
    assert outbox.waiting() == (0, None)


def test_refused_letters_say_so_once(outbox, store, forwarder, caplog):
    """However many are refused, a warning a minute says which and for how long."""
    letters = some(20)
    store.refuses = tuple(ids_of(letters))
    outbox.put(letters)
    rounds(forwarder)
    (warning,) = [one for one in caplog.messages if "is refused and waits" in one]
    assert letters[0].id in warning
    assert "5 minutes" in warning


def test_a_queue_that_refuses_holds_no_other_up(outbox, store, forwarder):
    """What a store took of one queue is noted, whatever it says to another's."""
    one, other = some(3), some(3, queue="other")
    store.refuses = tuple(ids_of(one))
    outbox.put([*one, *other])
    rounds(forwarder)
    assert len(everything(store, Filter("other"))) == 3
    assert outbox.waiting().letters == 3


def test_what_was_taken_is_noted_although_the_next_queue_fails(outbox, store, forwarder):
    """When a store goes away between two queues the first one's letters do not wait any more."""
    outbox.put([*some(3), *some(3, queue="other")])
    put = store.put

    def once(letters):
        store.away = True
        return SQLiteStore.put(store, letters)

    store.put = once
    store.put = lambda letters: once(letters) if not store.away else put(letters)
    assert not forwarder.round()
    assert outbox.waiting().letters == 3


# Looking for letters once more.


def test_letters_that_are_there_are_not_sent_again(outbox, store, forwarder, clock):
    """After the grace time the store is asked by ids, and gets only what it does not know."""
    letters = some(3)
    outbox.put(letters)
    rounds(forwarder)
    with store.database.writing() as writing:
        writing.execute("DELETE FROM letters WHERE id = ?", (letters[1].id,))
    sent: list[str] = []
    put = store.put
    store.put = lambda given: sent.extend(ids_of(given)) or put(given)
    clock.now += GRACE
    rounds(forwarder)
    assert sent == [letters[1].id]
    assert len(everything(store)) == 3
    assert outbox.database.read("SELECT count(*) FROM outbox") == [(1,)]


def test_forgotten_letters_are_sent_again_in_bounded_batches(outbox, store, forwarder, clock):
    """What a store has forgotten goes there again by the mebibyte."""
    letters = [a_letter(os.urandom(400_000)) for _ in range(5)]
    outbox.put(letters)
    rounds(forwarder)
    with store.database.writing() as writing:
        writing.execute("DELETE FROM letters")
    sizes: list[int] = []
    put = store.put
    store.put = lambda given: sizes.append(len(given)) or put(given)
    clock.now += GRACE
    rounds(forwarder)
    assert sizes == [2, 2, 1]
    assert len(everything(store)) == 5


def test_the_log_does_not_grow_for_ever(outbox):
    """A write-ahead log that readers have kept long is moved once they let it be."""
    reader = sqlite3.connect(outbox.database.path)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM outbox").fetchall()
    for _ in range(3):
        outbox.put([a_letter(os.urandom(30 << 20))])
        outbox.database.checkpoint()
    reader.close()
    outbox.database.checkpoint()
    assert os.stat(f"{outbox.database.path}-wal").st_size < LARGEST_LOG  # noqa: PTH116


def test_what_was_replayed_does_not_come_back(outbox, store, forwarder, clock):
    """A letter that the store has done with stays gone when it is looked for once more."""
    outbox.put(some(2))
    rounds(forwarder)
    for claim in store.claim("one", 30.0, 2, Filter()):
        store.settle(claim)
    clock.now += GRACE
    rounds(forwarder)
    assert store.stats().total == 0


def test_a_check_that_comes_too_late_brings_nothing_back(outbox, store, forwarder, clock):
    """When nobody looked in time the store may have forgotten what it has done with."""
    outbox.put(some(2))
    rounds(forwarder)
    for claim in store.claim("one", 30.0, 2, Filter()):
        store.settle(claim)
    clock.now += LATEST_CHECK + 3600
    rounds(forwarder)
    assert store.stats().total == 0
    assert outbox.due() == []


def test_a_failure_that_was_taken_in_counts_once(outbox, store, forwarder, clock):
    """A letter that another one took in is not taken in again when it is looked for."""
    one, again = a_letter(b"same"), a_letter(b"same")
    outbox.put([one, again])
    rounds(forwarder)
    clock.now += GRACE
    rounds(forwarder)
    assert [letter.attempts for letter in everything(store)] == [2]


def test_one_process_at_a_time_forwards(outbox, store, forwarder):
    """While another process holds the lock nothing is moved; when it dies, it goes on here."""
    code = (
        "import sys; from pathlib import Path;"
        "from periscope_otel.dead_letter.locks import ProcessLock;"
        "print(ProcessLock(Path(sys.argv[1])).acquire(), flush=True); sys.stdin.read()"
    )
    lock = str(outbox.database.path.with_suffix(".forwarder"))
    other = subprocess.Popen(
        [sys.executable, "-c", code, lock],
        env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout.readline() == "True\n"
        outbox.put(some(2))
        assert not forwarder.round()
        assert store.stats().total == 0
        other.kill()
        other.wait()
        rounds(forwarder)
    assert store.stats().total == 2


# Locks.


def test_a_lock_is_held_by_one(tmp_path):
    """It can be taken again by who has it, given up and taken anew; its file is private."""
    lock = ProcessLock(tmp_path / "lock")
    assert not lock.held
    assert lock.acquire()
    assert lock.acquire()
    assert lock.held
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
    lock.release()
    lock.release()
    assert not lock.held
    assert lock.acquire()
    lock.release()


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path):
    """A child neither has the lock nor takes it away by ending."""
    lock = ProcessLock(tmp_path / "lock")
    assert lock.acquire()
    child = os.fork()
    if child == 0:
        os._exit(1 if lock.held or lock.acquire() else 0)
    assert os.waitpid(child, 0)[1] == 0
    assert lock.held
    lock.release()
