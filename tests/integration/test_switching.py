"""Letters in the file of a queue for which a Redis was switched on or off arrive all the same."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING

import pytest

from periscope_otel.dead_letter import Filter, StoreError
from periscope_otel.dead_letter.outbox import Outbox
from periscope_otel.dead_letter.sqlite_store import SQLiteStore
from periscope_otel.dead_letter.switching import move_what_is_left

pytest.register_assert_rewrite("store_conformance")

from store_conformance import (  # noqa: E402  (its assertions are rewritten first)
    LEASE,
    a_letter,
    everything,
    ids_of,
    queued,
    some,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the file of a queue."""
    return tmp_path / "dead-letters.db"


def moved(file: SQLiteStore | Outbox) -> int:
    """Move all that is left; return in how many chunks."""
    chunks = 0
    while move_what_is_left(file):
        chunks += 1
    return chunks


def test_letters_of_the_store_go_into_the_outbox(path):
    """With a Redis from now on, all that is in the file goes there, in order and in its state."""
    with SQLiteStore(path) as store:
        letters = queued(store, 1)
        store.claim("one", LEASE)
        letters += queued(store, 1)
        store.put(more := [*some(150, attempts=3), a_letter(b"x"), a_letter(os.urandom(50_000))])
        store.put([a_letter(b"x", error_message="again")])
        store.park(Filter(ids=(more[0].id,)))
        letters += more
    outbox = Outbox(path)
    assert moved(outbox) == 3
    got = []
    while batch := outbox.next():
        got += batch
        outbox.taken(batch)
    assert ids_of(got) == ids_of(letters)
    states = {one.id: one.state for one in got}
    assert states.pop(letters[0].id) == "dead"
    assert states.pop(letters[1].id) == "queued"
    assert states.pop(more[0].id) == "parked"
    assert set(states.values()) == {"dead"}
    again = next(one for one in got if one.id == more[150].id)
    assert (again.attempts, again.error_message) == (2, "again")
    assert moved(outbox) == 0
    outbox.close()
    with SQLiteStore(path) as store:
        assert (store.stats().total, store.stats().size) == (0, 0)


def test_letters_of_the_outbox_go_into_the_store(path):
    """Without a Redis from now on, what has not arrived there is in the file's own store."""
    letters = [*some(100), a_letter(state="parked"), *some(1, queue="other")]
    outbox = Outbox(path)
    outbox.put([*some(5), *letters])
    outbox.taken(outbox.next()[:5])
    outbox.refused(letters[0])
    outbox.close()
    with SQLiteStore(path) as store:
        assert moved(store) == 2
        states = ("dead", "parked")
        assert ids_of(everything(store, Filter(states=states))) == ids_of(letters[:-1])
        assert store.stats().by_state == {"dead": 100, "parked": 1}
        assert store.stats("other").total == 1
        assert moved(store) == 0
    outbox = Outbox(path)
    assert outbox.waiting() == (0, None)
    outbox.close()


def test_nothing_is_left_in_a_new_file(path):
    """A file that has never been the other kind has nothing to move."""
    with SQLiteStore(path) as store:
        store.put(some(1))
        assert not move_what_is_left(store)
    outbox = Outbox(path.with_name("outbox.db"))
    outbox.put(some(1))
    assert not move_what_is_left(outbox)
    outbox.close()


def test_letters_that_are_there_already_are_not_doubled(path):
    """A letter that arrived in both tables is one letter afterwards."""
    (letter,) = some(1)
    outbox = Outbox(path)
    outbox.put([letter])
    with SQLiteStore(path) as store:
        store.put([letter])
        assert moved(store) == 1
        assert ids_of(everything(store)) == [letter.id]
    assert outbox.waiting().letters == 0
    outbox.close()


def test_a_damaged_letter_holds_no_other_up(path):
    """What cannot be read is kept aside, and all others arrive."""
    letters = some(3)
    with SQLiteStore(path) as store:
        store.put(letters)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE letters SET letter = x'c1' WHERE id = ?", (letters[1].id,))
    connection.close()
    outbox = Outbox(path)
    assert moved(outbox) == 1
    assert ids_of(outbox.next()) == [letters[0].id, letters[2].id]
    assert outbox.database.read("SELECT id FROM damaged") == [(letters[1].id,)]
    outbox.close()


def test_a_letter_of_no_queue_holds_no_other_up(path):
    """What the store would refuse is kept aside, and all others arrive."""
    letters = [*some(1), a_letter(queue="no queue"), *some(1)]
    outbox = Outbox(path)
    outbox.put(letters)
    with SQLiteStore(path) as store:
        assert moved(store) == 1
        assert ids_of(everything(store)) == [letters[0].id, letters[2].id]
    assert outbox.database.read("SELECT id FROM damaged") == [(letters[1].id,)]
    outbox.close()


def test_what_fails_moves_nothing(path, monkeypatch):
    """A chunk that cannot be written stays where it was, whole."""
    with SQLiteStore(path) as store:
        store.put(some(3))
    outbox = Outbox(path)
    put = Outbox.put_within

    def failing(*given):
        put(*given)
        raise StoreError("full")

    monkeypatch.setattr(Outbox, "put_within", failing)
    with pytest.raises(StoreError):
        move_what_is_left(outbox)
    assert outbox.waiting().letters == 0
    monkeypatch.undo()
    assert moved(outbox) == 1
    assert outbox.waiting().letters == 3
    outbox.close()
