"""The contracts that every store of dead letters keeps, whatever it keeps them in.

A store is run through them by a class of its own, with two fixtures beside it:

    class TestThisStore(StoreConformance):
        '''...'''

    @pytest.fixture
    def clock(): ...    # has `now`, Unix seconds, and `advance(seconds)`

    @pytest.fixture
    def store(clock): ...    # an empty store whose time is the clock's
"""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from periscope_otel.dead_letter import Claim, Filter, Letter, StoreError
from periscope_otel.dead_letter.errors import RefusedError
from periscope_otel.dead_letter.identity import LetterIds, content_key
from periscope_otel.dead_letter.letter import STATES, pack
from periscope_otel.dead_letter.names import queue_name
from periscope_otel.dead_letter.store import MOST_LEASES, MOST_REPLAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Protocol

    from periscope_otel.dead_letter import Store
    from periscope_otel.dead_letter.letter import State

    class Clock(Protocol):
        """The time that a store sees."""

        now: float

        def advance(self, seconds: float) -> None:
            """Let time pass."""


LEASE = 600.0
SLACK = 20.0
"""Seconds before the end of a lease at which it is still held, also where the store's time goes on
while the machine stops."""
EVERY = Filter(states=STATES)
QUEUED = Filter(states=("queued",))
PARKED = Filter(states=("parked",))
_IDS = LetterIds()


def a_letter(payload: bytes | None = None, **fields: Any) -> Letter:
    """Return a letter, by default with a payload that no other has."""
    body = uuid.uuid4().bytes if payload is None else payload
    given: dict[str, Any] = {
        "id": _IDS.new(),
        "operation": "store",
        "codec": "item",
        "feed": "urlhaus",
        "error_type": "ConnectTimeout",
        "error_message": "timed out",
        "fingerprint": "f1",
        "first_failed_at": 1000.0,
        "last_failed_at": 1000.0,
        "traceparent": "00-01-01-01",
    }
    given |= pack(body) | fields
    given.setdefault("key", content_key(given["operation"], given["feed"], given["sha256"]))
    return Letter(**given)


def some(count: int, **fields: Any) -> list[Letter]:
    return [a_letter(**fields) for _ in range(count)]


def ids_of(letters: Iterable[Letter | Claim]) -> list[str]:
    return [(one.letter if isinstance(one, Claim) else one).id for one in letters]


def everything(store: Store, where: Filter = EVERY, limit: int = 100, **how: Any) -> list[Letter]:
    """Return all letters of a list, page by page."""
    letters: list[Letter] = []
    cursor = None
    for _ in range(10_000):
        page = store.list(where, cursor=cursor, limit=limit, **how)
        assert len(page.letters) <= limit
        letters += page.letters
        if page.cursor is None:
            return letters
        cursor = page.cursor
    raise AssertionError("the pages of a list never end")


def state_of(store: Store, letter: Letter | Claim) -> State | None:
    (letter_id,) = ids_of([letter])
    found = store.get(letter_id)
    return None if found is None else found.state


def same_but_for_life(one: Letter, other: Letter | None) -> bool:
    """Say whether two letters are equal but for what a store keeps track of."""
    assert other is not None
    blank: dict[str, Any] = {"state": "dead", "revision": 0, "replays": 0}
    return one.changed(**blank) == other.changed(**blank)


def queued(store: Store, count: int = 1, **fields: Any) -> list[Letter]:
    """Put letters and have them queued."""
    letters = some(count, **fields)
    assert store.put(letters) == ["stored"] * count
    assert store.requeue(Filter(ids=tuple(ids_of(letters)))) == count
    return letters


def claimed(store: Store, owner: str = "one") -> Claim:
    """Put a letter and claim it."""
    (letter,) = queued(store)
    (claim,) = store.claim(owner, LEASE)
    assert claim.letter.id == letter.id
    return claim


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run something in threads that start at the same moment; raise what any of them raised."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    for error in errors:
        raise error


class StoreConformance:
    """What holds for any store."""

    # --- put and get -----------------------------------------------------------------------------

    def test_put_letter_is_there(self, store):
        """A letter that was put is dead in its queue, and otherwise as it was."""
        letter = a_letter(b"indicator" * 1000, headers={"etag": "x"}, tlp="TLP:AMBER", attempts=3)
        assert store.put([letter]) == ["stored"]
        found = store.get(letter.id)
        assert same_but_for_life(letter, found)
        assert (found.state, found.replays) == ("dead", 0)
        assert found.revision > 0
        assert found.payload() == b"indicator" * 1000

    def test_put_of_nothing(self, store):
        """Putting no letters does nothing."""
        assert store.put([]) == []
        assert store.stats().total == 0

    def test_empty_store(self, store):
        """In an empty store there is nothing to get, list, count, change or claim."""
        assert store.get(_IDS.new()) is None
        assert store.get("no id at all' OR 1=1 --") is None
        assert store.list(EVERY) == ([], None)
        stats = store.stats()
        assert (stats.by_state, stats.by_feed, stats.by_fingerprint) == ({}, {}, {})
        assert (stats.oldest, stats.size, stats.total) == (None, 0, 0)
        for change in (store.requeue, store.park, store.unpark, store.purge):
            assert change(EVERY) == 0
        assert store.purge(EVERY, dry_run=False) == 0
        assert list(store.claim("one", LEASE, where=EVERY)) == []

    def test_put_many(self, store):
        """Many letters, of any queues, are put at once, and each is answered in its place."""
        first = some(3) + some(2, queue="other")
        assert store.put(first) == ["stored"] * 5
        twin = a_letter(first[0].payload())
        assert store.put([a_letter(), first[1], twin, a_letter(queue="third")]) == [
            *("stored", "known"),
            *("merged", "stored"),
        ]
        assert [store.stats(queue).total for queue in ("default", "other", "third")] == [4, 2, 1]

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_put_stores_all_or_none(self, store, place):
        """If one of the letters cannot be stored then none of them is, and none is merged."""
        there = a_letter(b"x")
        store.put([there])
        letters = [a_letter(), a_letter(b"x", error_message="new")]
        letters.insert(place, a_letter(error_message="\ud800"))
        with pytest.raises(Exception, match=r"."):
            store.put(letters)
        (only,) = everything(store)
        assert same_but_for_life(there, only)
        assert store.stats().total == 1
        assert store.put([one for one in letters if one.error_message != "\ud800"]) == [
            *("stored", "merged")
        ]

    def test_letter_is_found_in_its_queue_alone(self, store):
        """A letter is got from its own queue and from no other."""
        letter = a_letter(queue="other")
        store.put([letter])
        assert store.get(letter.id) is None
        assert store.get(letter.id, "other").id == letter.id
        assert everything(store) == []
        assert ids_of(everything(store, Filter(queue="other"))) == [letter.id]

    def test_missing_letters(self, store):
        """Missing are the ids of which a store knows nothing, in the queue that is asked about."""
        there, merged, gone, elsewhere = a_letter(b"x"), a_letter(b"x"), a_letter(), a_letter()
        store.put([there, merged, gone, elsewhere.changed(queue="other")])
        store.purge(Filter(ids=(gone.id,)), dry_run=False)
        strangers = [_IDS.new() for _ in range(1200)]
        asked = [there.id, strangers[0], merged.id, gone.id, elsewhere.id, *strangers[1:]]
        assert sorted(store.missing(asked)) == sorted([*strangers, elsewhere.id])
        assert store.missing([elsewhere.id, there.id], "other") == [there.id]
        assert list(store.missing([])) == []

    def test_the_same_id_in_two_queues(self, store):
        """Queues know nothing of each other: a letter may be in each of them under one id."""
        letter = a_letter()
        other = letter.changed(queue="other", error_message="other")
        assert store.put([letter, other, letter, other]) == [*["stored"] * 2, *["known"] * 2]
        assert store.requeue(Filter()) == 1
        (claim,) = store.claim("one", LEASE)
        assert store.settle(claim)
        assert store.get(letter.id) is None
        assert store.get(letter.id, "other").error_message == "other"
        assert store.put([letter, other]) == ["known", "known"]

    def test_putting_a_letter_twice_stores_it_once(self, store):
        """A letter that has been put before is known by its id, whatever else it says."""
        letter = a_letter()
        assert store.put([letter]) == ["stored"]
        before = store.get(letter.id)
        assert store.put([letter]) == ["known"]
        changed = letter.changed(error_message="other", feed="other", **pack(b"other"))
        assert store.put([changed, changed]) == ["known", "known"]
        assert store.get(letter.id) == before
        assert store.stats().total == 1

    def test_putting_a_letter_twice_at_once_stores_it_once(self, store):
        """A letter that is twice among those that are put is stored once."""
        letter = a_letter()
        assert store.put([letter, letter]) == ["stored", "known"]
        assert store.get(letter.id).attempts == 1

    @pytest.mark.parametrize(
        ("given", "found"),
        [
            ("pending", {"dead"}),
            ("dead", {"dead"}),
            ("queued", {"dead", "queued"}),
            ("claimed", {"dead"}),
            ("parked", {"parked"}),
        ],
    )
    def test_put_letter_that_comes_from_another_store(self, store, given, found):
        """A letter that was on its way or with somebody is put as dead; a parked one stays so."""
        letter = a_letter(state=given, replays=2, revision=17)
        assert store.put([letter]) == ["stored"]
        stored = store.get(letter.id)
        assert stored.state in found
        assert stored.replays == 2
        assert store.stats().by_state == {stored.state: 1}

    def test_large_letter(self, store):
        """A letter of 8 MiB is stored and comes back whole."""
        payload = random.Random(1).randbytes(8 << 20)
        letter = a_letter(payload)
        store.put([letter])
        assert store.get(letter.id).payload() == payload
        assert store.stats().size >= len(payload)

    @pytest.mark.parametrize(
        "odd",
        [
            "",
            " ",
            "a b",
            "a:b",
            "{a}",
            "*",
            "%",
            "a'b\"c",
            "é漢🙂",
            "a\nb",
            "a\0b",
            "-1",
            "x" * 500,
        ],
        ids=ascii,
    )
    def test_odd_names(self, store, odd):
        """Feeds, operations and errors may be called anything, and are told apart."""
        names = {"feed": odd, "operation": odd, "fingerprint": odd, "error_type": odd}
        letter = a_letter(**names)
        other = a_letter(**dict.fromkeys(names, f"{odd}x"))
        store.put([letter, other, a_letter(queue="other")])
        assert ids_of(everything(store, Filter(**names))) == [letter.id]
        assert store.stats().by_state == {"dead": 2}
        assert store.requeue(Filter(**names)) == 1
        assert ids_of(store.claim("one", LEASE, 9, QUEUED)) == [letter.id]

    @pytest.mark.parametrize("name", ["a", "Z", "0", ".", "_-.", "a" * 100, "-1"])
    def test_names_of_queues(self, store, name):
        """A queue is called by 1 to 100 letters, digits, dots, dashes and underscores."""
        assert queue_name(name) == name
        assert store.put([a_letter(queue=name)]) == ["stored"]
        assert store.stats(name).total == 1
        assert store.requeue(Filter(name)) == 1
        assert len(store.claim("one", LEASE, 9, Filter(name, ("queued",)))) == 1

    @pytest.mark.parametrize(
        "name", ["", " ", "a b", "a:b", "}a", "{a}", "*", "é", "a\n", "a\0", "a" * 101]
    )
    def test_names_of_no_queue(self, store, name):
        """What may not be a queue's name is an error everywhere, and refuses that letter alone."""
        with pytest.raises(ValueError, match="name of a queue"):
            queue_name(name)
        with pytest.raises(RefusedError, match="name of a queue"):
            store.put([a_letter(), a_letter(queue=name)])
        assert store.stats().total == 0
        where = Filter(name)
        for call in (
            lambda: store.get("x", name),
            lambda: store.missing([], name),
            lambda: store.stats(name),
            lambda: store.list(where),
            lambda: store.requeue(where),
            lambda: store.park(where),
            lambda: store.unpark(where),
            lambda: store.purge(where),
            lambda: store.purge(where, dry_run=False),
            lambda: store.claim("one", LEASE, where=where),
        ):
            with pytest.raises(StoreError):
                call()

    # --- merging ---------------------------------------------------------------------------------

    def test_same_key_and_payload_are_merged(self, store):
        """A further failure of the same payload is taken in by the letter that is there."""
        first = a_letter(b"x", attempts=2, first_failed_at=1000.0, last_failed_at=1000.0)
        again = a_letter(
            b"x",
            attempts=3,
            first_failed_at=2000.0,
            last_failed_at=2001.0,
            error_type="ReadTimeout",
            error_message="no answer",
            error_stack="File y",
            fingerprint="f2",
            not_before=3000.0,
            traceparent="00-02-02-01",
            tracestate="a=b",
        )
        assert store.put([first]) == ["stored"]
        before = store.get(first.id)
        assert store.put([again]) == ["merged"]
        found = store.get(first.id)
        assert same_but_for_life(first.with_latest(again.latest()).changed(attempts=5), found)
        assert found.first_failed_at == 1000.0
        assert found.revision > before.revision
        assert found.state == "dead"
        assert store.get(again.id) is None
        assert ids_of(everything(store)) == [first.id]
        assert store.stats().by_fingerprint == {"f2": 1}

    def test_merged_letter_is_found_by_its_latest_failure(self, store):
        """After a merge the filters go by the latest failure."""
        store.put([a_letter(b"x", last_failed_at=1000.0)])
        store.put([a_letter(b"x", last_failed_at=2000.0, error_type="E2", fingerprint="f2")])
        for where, count in (
            (Filter(error_type="ConnectTimeout"), 0),
            (Filter(fingerprint="f1"), 0),
            (Filter(until=1500.0), 0),
            (Filter(error_type="E2", fingerprint="f2", since=2000.0), 1),
        ):
            assert len(everything(store, where)) == count

    def test_older_failure_that_comes_late_overwrites_nothing(self, store):
        """A failure from before the one that is known adds its attempts, and no more."""
        first = a_letter(b"x", last_failed_at=5000.0, error_message="newer", not_before=7000.0)
        late = a_letter(
            b"x",
            last_failed_at=4000.0,
            error_type="E",
            fingerprint="f0",
            attempts=3,
            tracestate="b",
        )
        assert store.put([first, late]) == ["stored", "merged"]
        found = store.get(first.id)
        assert same_but_for_life(first.changed(attempts=4), found)
        assert found.revision > 1
        assert ids_of(everything(store, Filter(fingerprint="f1", since=5000.0))) == [first.id]
        assert store.stats().by_fingerprint == {"f1": 1}

    def test_another_marking_is_not_merged(self, store):
        """The same payload under another Traffic Light Protocol marking is another letter."""
        letters = [a_letter(b"x", tlp=tlp) for tlp in (None, "TLP:CLEAR", "TLP:RED")]
        assert store.put(letters) == ["stored"] * 3

    def test_failed_replay_takes_in_what_came_meanwhile(self, store):
        """A payload that failed anew during its replay that failed, too, is one letter again."""
        claim = claimed(store)
        again = a_letter(claim.letter.payload(), attempts=3, last_failed_at=2000.0)
        assert store.put([again]) == ["stored"]
        failed = claim.letter.changed(attempts=2, last_failed_at=3000.0, error_message="replay")
        assert store.settle(claim, failed)
        (left,) = everything(store)
        assert (left.id, left.attempts, left.state) == (claim.letter.id, 5, "dead")
        assert left.error_message == "replay"
        assert store.put([again]) == ["known"]
        assert store.stats().by_state == {"dead": 1}
        assert store.purge(Filter(ids=(left.id,)), dry_run=False) == 1
        assert (store.stats().total, store.stats().size) == (0, 0)

    @pytest.mark.parametrize("stack", ["", "File y\n" * 500])
    def test_letter_that_takes_another_in_has_the_latest_error(self, store, stack):
        """Of a letter that comes back and one that came meanwhile, the later failure is left."""
        claim = claimed(store)
        again = a_letter(
            claim.letter.payload(),
            last_failed_at=9000.25,
            error_type=None,
            error_message="é",
            error_stack=stack,
            fingerprint="f7",
            tracestate="a=b",
            not_before=0.5,
        )
        store.put([again])
        assert store.release(claim)
        (left,) = everything(store)
        right = claim.letter.with_latest(again.latest()).changed(attempts=2)
        assert same_but_for_life(right, left)
        assert left.state == "queued"
        assert ids_of(everything(store, Filter(states=STATES, fingerprint="f7"))) == [left.id]

    def test_expired_claim_takes_in_what_came_meanwhile(self, store, clock):
        """Also a claim that runs out leaves one letter of a payload, and a parked one parked."""
        claim = claimed(store)
        again = a_letter(claim.letter.payload())
        store.put([again])
        assert store.park(Filter(ids=(again.id,))) == 1
        clock.advance(LEASE + 1)
        assert list(store.claim("two", LEASE)) == []
        (left,) = everything(store)
        assert (left.id, left.state, left.attempts) == (claim.letter.id, "parked", 2)

    def test_purged_letter_can_be_imported(self, store):
        """Who asks for it gets a letter back that was removed a moment ago."""
        letter = a_letter()
        store.put([letter])
        store.purge(Filter(), dry_run=False)
        assert store.put([letter]) == ["known"]
        assert store.put([letter], revive=True) == ["stored"]
        assert store.put([letter], revive=True) == ["known"]
        assert ids_of(everything(store)) == [letter.id]
        (claim,) = store.claim("one", LEASE, where=Filter())
        store.settle(claim)
        assert store.put([letter]) == ["known"]

    @pytest.mark.parametrize("when", [float("nan"), float("inf"), float("-inf")])
    def test_times_that_are_none(self, store, when):
        """A letter whose times are no numbers is kept, and claimed, like any other."""
        letter = a_letter(last_failed_at=when, not_before=when)
        assert store.put([letter]) == ["stored"]
        assert store.stats().oldest == 0
        assert ids_of(store.claim("one", LEASE, where=Filter())) == [letter.id]

    def test_same_key_but_other_payload_is_not_merged(self, store):
        """A payload is never lost to another one that has the same idempotency key."""
        one, other = a_letter(b"one", key="k"), a_letter(b"other", key="k")
        assert store.put([one, other]) == ["stored", "stored"]
        assert [store.get(it.id).payload() for it in (one, other)] == [b"one", b"other"]

    def test_same_payload_but_other_key_is_not_merged(self, store):
        """The same payload under two keys is two letters."""
        assert store.put([a_letter(b"x", key="1"), a_letter(b"x", key="2")]) == ["stored"] * 2

    def test_other_queue_is_not_merged(self, store):
        """The same payload in another queue is another letter."""
        assert store.put([a_letter(b"x"), a_letter(b"x", queue="other")]) == ["stored"] * 2
        assert (store.stats().total, store.stats("other").total) == (1, 1)

    def test_other_operation_is_not_merged(self, store):
        """The same payload for another operation is another letter, though their keys are equal."""
        one = a_letter(b"x", key="k", operation="store")
        other = a_letter(b"x", key="k", operation="notify")
        assert store.put([one, other]) == ["stored", "stored"]

    def test_keys_are_told_apart_exactly(self, store):
        """Keys and payloads are never confused, however they are made up."""
        keys = ["k", "K", "k ", "k\0", "k:", "%", "\u00e9", "e\u0301", "x" * 500, "x" * 501]
        assert store.put([a_letter(b"x", key=key) for key in keys]) == ["stored"] * len(keys)
        assert store.put([a_letter(b"x", key=key) for key in keys]) == ["merged"] * len(keys)

    def test_merged_letter_put_again_is_known(self, store):
        """A letter that was merged is known by its id when it is put again, and counts once."""
        first, again = a_letter(b"x"), a_letter(b"x")
        assert store.put([first, again]) == ["stored", "merged"]
        assert store.put([again]) == ["known"]
        assert store.get(first.id).attempts == 2

    def test_merged_letter_does_not_come_back_after_success(self, store):
        """When a letter is done then so is one that it took in, and it does not come back."""
        (first,) = queued(store)
        again = a_letter(first.payload())
        assert store.put([again]) == ["merged"]
        (claim,) = store.claim("one", LEASE)
        assert store.settle(claim)
        assert store.put([again]) == ["known"]
        assert store.stats().total == 0

    @pytest.mark.parametrize("state", ["queued", "parked"])
    def test_merge_leaves_the_state(self, store, state):
        """A letter that is queued or parked stays so when the same payload fails again."""
        letter = a_letter(b"x")
        store.put([letter])
        {"queued": store.requeue, "parked": store.park}[state](Filter(ids=(letter.id,)))
        assert store.put([a_letter(b"x")]) == ["merged"]
        assert store.get(letter.id).state == state

    def test_failure_during_a_replay_is_not_lost(self, store):
        """A payload that fails anew while its letter is claimed outlives that claim's success."""
        claim = claimed(store)
        again = a_letter(claim.letter.payload(), error_message="new")
        store.put([again])
        store.settle(claim)
        (left,) = everything(store)
        assert left.payload() == claim.letter.payload()
        assert left.error_message == "new"

    def test_merge_ends_no_claim_silently(self, store):
        """If a claimed letter's payload fails anew, its claim works whole or is refused."""
        claim = claimed(store)
        store.put([a_letter(claim.letter.payload())])
        held = store.settle(claim, claim.letter.changed(error_message="replayed"))
        found = store.get(claim.letter.id)
        assert held == (found.error_message == "replayed")
        assert held == (found.replays == 1)

    def test_same_payload_after_success_is_a_new_letter(self, store):
        """The same payload that fails after its letter is done is a letter of its own."""
        claim = claimed(store)
        assert store.settle(claim)
        again = a_letter(claim.letter.payload())
        assert store.put([again]) == ["stored"]
        assert ids_of(everything(store)) == [again.id]

    def test_threads_that_put_the_same(self, store):
        """Of threads that put one letter, or one payload, at the same time, one stores it."""
        letter = a_letter()
        answers: list[str] = []
        in_threads(8, lambda _: answers.extend(store.put([letter])))
        assert sorted(answers) == ["known"] * 7 + ["stored"]
        answers.clear()
        in_threads(8, lambda _: answers.extend(store.put([a_letter(b"same", attempts=2)])))
        assert sorted(answers) == ["merged"] * 7 + ["stored"]
        (one,) = [it for it in everything(store) if it.id != letter.id]
        assert one.attempts == 16

    # --- lists -----------------------------------------------------------------------------------

    def test_list_is_in_the_order_of_coming(self, store):
        """Letters are listed as they came, or the other way round."""
        letters = some(7)
        for letter in letters[:3]:
            store.put([letter])
        store.put(letters[3:])
        ids = ids_of(letters)
        assert ids_of(store.list(Filter()).letters) == ids
        assert ids_of(store.list(Filter(), newest_first=True).letters) == ids[::-1]

    @pytest.mark.parametrize("newest_first", [False, True])
    @pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 100])
    def test_pages_cover_everything_once(self, store, limit, newest_first):
        """Whatever the length of pages, together they have each letter once, in order."""
        letters = some(6)
        store.put(letters)
        listed = ids_of(everything(store, limit=limit, newest_first=newest_first))
        assert listed == ids_of(letters)[:: -1 if newest_first else 1]

    def test_page_is_bounded(self, store):
        """A page has 100 letters if nothing is said, and 1,000 at most."""
        store.put(some(1100))
        assert len(store.list(EVERY).letters) == 100
        page = store.list(EVERY, limit=5000)
        assert len(page.letters) == 1000
        assert len(store.list(EVERY, limit=5000, cursor=page.cursor).letters) == 100

    @pytest.mark.parametrize("newest_first", [False, True])
    def test_pages_while_others_put_and_remove(self, store, newest_first):
        """What is there from the first page to the last is listed once, whatever comes and goes."""
        letters = some(20)
        store.put(letters)
        listed: list[str] = []
        cursor, gone = None, set()
        for step in range(100):
            page = store.list(EVERY, cursor=cursor, limit=3, newest_first=newest_first)
            listed += ids_of(page.letters)
            if page.cursor is None:
                break
            cursor = page.cursor
            if step < 5:
                store.put(some(2))
                removed = letters[step * 4].id
                store.purge(Filter(ids=(removed,)), dry_run=False)
                store.requeue(Filter(ids=(letters[step * 4 + 1].id,)))
                gone.add(removed)
        assert max(Counter(listed).values()) == 1
        stayed = [one for one in ids_of(letters) if one not in gone]
        found = [one for one in listed if one in stayed]
        assert found == stayed[:: -1 if newest_first else 1]

    def test_pages_while_threads_put(self, store):
        """While threads put, pages have each letter that was there before, once."""
        letters = some(60)
        store.put(letters)
        done = threading.Event()
        lists: list[list[str]] = []

        def work(number: int) -> None:
            if number:
                while not done.is_set():
                    store.put(some(2))
                return
            try:
                for newest_first in (False, True) * 3:
                    pages = everything(store, limit=7, newest_first=newest_first)
                    lists.append(ids_of(pages)[:: -1 if newest_first else 1])
            finally:
                done.set()

        in_threads(3, work)
        for listed in lists:
            assert len(listed) == len(set(listed))
            assert listed[:60] == ids_of(letters)

    def test_filters_alone_and_together(self, store):
        """Each filter, alone and with any others, finds what it says, in lists and in counts."""
        letters = [
            a_letter(feed=feed, operation=operation, error_type=kind, fingerprint=f"f{n % 3}")
            .changed(last_failed_at=1000.0 + n)
            for n, (feed, operation, kind) in enumerate(
                itertools.product(["a", "b", None], ["o1", "o2"], ["E1", None]),
            )
        ]  # fmt: skip
        store.put(letters)
        wanted = {
            "ids": tuple(ids_of(letters[1:9])),
            "feed": "a",
            "operation": "o1",
            "fingerprint": "f1",
            "error_type": "E1",
            "since": 1001.0,
            "until": 1008.0,
        }
        tests = {
            "ids": lambda it: it.id in wanted["ids"],
            "since": lambda it: it.last_failed_at >= 1001.0,
            "until": lambda it: it.last_failed_at < 1008.0,
        }
        for count in range(len(wanted) + 1):
            for names in itertools.combinations(wanted, count):
                where = Filter(**{name: wanted[name] for name in names})
                right = [
                    one.id
                    for one in letters
                    if all(
                        tests[name](one) if name in tests else getattr(one, name) == wanted[name]
                        for name in names
                    )
                ]
                assert ids_of(everything(store, where, limit=4)) == right, names
                assert store.purge(where) == len(right), names

    def test_filter_for_letters_without_something(self, store):
        """An empty name in a filter means the letters that have none."""
        without = a_letter(feed=None, error_type=None)
        store.put([without, *some(2)])
        for where in (Filter(feed=""), Filter(error_type=""), Filter(feed="", error_type="")):
            assert ids_of(everything(store, where)) == [without.id]
            assert store.purge(where) == 1
        assert ids_of(store.claim("one", LEASE, 9, Filter(feed=""))) == [without.id]

    def test_pages_of_large_letters(self, store):
        """However large letters are, pages and claims have as many of them as are asked for."""
        letters = [a_letter(random.Random(n).randbytes(300_000), feed="a") for n in range(9)]
        store.put(letters)
        ids = ids_of(letters)
        assert ids_of(store.list(Filter(), limit=7).letters) == ids[:7]
        assert ids_of(everything(store, Filter(feed="a"), limit=4)) == ids
        assert ids_of(everything(store, limit=4, newest_first=True)) == ids[::-1]
        assert ids_of(everything(store, Filter(ids=tuple(ids)), limit=4)) == ids
        assert ids_of(store.claim("one", LEASE, 5, Filter())) == ids[:5]
        store.requeue(Filter())
        assert ids_of(store.claim("one", LEASE, 99)) == ids[5:]

    def test_filter_by_state(self, store):
        """Letters are found by one state or several; dead ones if nothing is said."""
        dead, waiting, parked = some(3)
        store.put([dead, waiting, parked])
        store.requeue(Filter(ids=(waiting.id,)))
        store.park(Filter(ids=(parked.id,)))
        (claim,) = store.claim("one", LEASE)
        assert claim.letter.id == waiting.id
        queued(store)
        by_state = {
            state: set(ids_of(everything(store, Filter(states=(state,))))) for state in STATES
        }
        for one in everything(store):
            assert by_state[one.state] >= {one.id}
        assert sum(map(len, by_state.values())) == 4
        assert set(ids_of(everything(store, Filter()))) == by_state["dead"] == {dead.id}
        both = set(ids_of(everything(store, Filter(states=("dead", "parked")))))
        assert both == {dead.id, parked.id}

    def test_empty_filter_values_match_nothing(self, store):
        """A filter with no ids or no states means no letters, not all of them."""
        store.put(some(3))
        for where in (Filter(ids=()), Filter(states=()), Filter(ids=(), states=STATES)):
            assert everything(store, where) == []
            assert store.requeue(where) == store.park(where) == 0
            assert store.purge(where) == store.purge(where, dry_run=False) == 0
            assert list(store.claim("one", LEASE, 9, where)) == []
        assert store.stats().by_state == {"dead": 3}

    def test_filter_with_very_many_ids(self, store):
        """As many ids may be named as a bulk action has."""
        letters = some(3)
        store.put(letters)
        strangers = [str(uuid.UUID(int=n)) for n in range(40_000)]
        where = Filter(ids=(*strangers, letters[0].id, letters[2].id, letters[2].id))
        assert ids_of(everything(store, where)) == [letters[0].id, letters[2].id]
        assert store.requeue(where) == 2

    # --- requeue, park, purge --------------------------------------------------------------------

    def test_requeue_by_ids(self, store):
        """Letters named by their ids are queued, and no others."""
        letters = some(4)
        store.put(letters)
        wanted = (letters[2].id, letters[0].id, _IDS.new())
        assert store.requeue(Filter(ids=wanted)) == 2
        assert ids_of(everything(store, QUEUED)) == [letters[0].id, letters[2].id]
        assert store.requeue(Filter(ids=wanted)) == 0

    def test_requeue_by_filter(self, store):
        """All letters that a filter means are queued."""
        store.put([*some(3, feed="a"), *some(2, feed="b")])
        before = {one.id: one.revision for one in everything(store)}
        assert store.requeue(Filter(feed="a")) == 3
        assert {one.feed for one in everything(store, QUEUED)} == {"a"}
        assert store.stats().by_state == {"queued": 3, "dead": 2}
        for one in everything(store):
            assert (one.revision > before[one.id]) == (one.state == "queued")

    def test_requeue_with_a_limit(self, store):
        """No more letters than the limit are queued; none at zero."""
        store.put(some(5))
        assert store.requeue(Filter(), limit=0) == 0
        assert store.requeue(Filter(), limit=2) == 2
        assert store.stats().by_state == {"queued": 2, "dead": 3}
        assert store.requeue(Filter(), limit=9) == 3

    def test_requeue_leaves_claims_alone(self, store):
        """A letter that somebody has is not queued for another, and its claim still holds."""
        claim = claimed(store)
        assert store.requeue(EVERY) == 0
        assert list(store.claim("two", LEASE, 9, EVERY)) == []
        assert store.settle(claim)

    def test_parked_letters_are_out_of_every_replay(self, store):
        """A parked letter is neither queued nor claimed until it is unparked."""
        (letter,) = queued(store)
        assert store.park(Filter(ids=(letter.id,), states=("dead", "queued"))) == 1
        assert state_of(store, letter) == "parked"
        assert list(store.claim("one", LEASE, 9)) == []
        assert list(store.claim("one", LEASE, 9, EVERY)) == []
        assert list(store.claim("one", LEASE, 9, PARKED)) == []
        assert store.requeue(Filter(ids=(letter.id,), states=STATES)) == 0
        assert state_of(store, letter) == "parked"

    def test_unparked_letters_are_dead_with_no_failed_replays(self, store):
        """An unparked letter is dead, has no failed replays, and may be replayed again."""
        letter = a_letter(state="parked", replays=5)
        store.put([letter])
        assert store.unpark(PARKED) == 1
        found = store.get(letter.id)
        assert (found.state, found.replays) == ("dead", 0)
        assert store.unpark(PARKED) == 0
        store.requeue(Filter())
        (claim,) = store.claim("one", LEASE)
        assert store.settle(claim, claim.letter)
        assert state_of(store, letter) == "dead"

    def test_park_and_unpark_go_by_their_filter(self, store):
        """Only the letters that a filter means are parked and unparked."""
        store.put([*some(3, feed="a"), *some(2, feed="b")])
        assert store.park(Filter(feed="a")) == 3
        assert store.park(Filter(feed="a")) == 0
        assert {one.feed for one in everything(store, PARKED)} == {"a"}
        assert store.unpark(replace(PARKED, feed="b")) == 0
        assert store.unpark(replace(PARKED, feed="a")) == 3
        assert store.stats().by_state == {"dead": 5}

    def test_purge_counts_first_and_removes_then(self, store):
        """A purge only counts unless it is told otherwise, and then removes what it counted."""
        kept, gone = some(2, feed="a"), some(3, feed="b")
        store.put([*kept, *gone])
        before = everything(store)
        assert store.purge(Filter(feed="b")) == store.purge(Filter(feed="b"), dry_run=True) == 3
        assert everything(store) == before
        assert store.purge(Filter(feed="b"), dry_run=False) == 3
        assert ids_of(everything(store)) == ids_of(kept)
        assert [store.get(one.id) for one in gone] == [None] * 3
        assert store.stats().by_feed == {"a": 2}
        assert store.purge(Filter(feed="b"), dry_run=False) == 0

    def test_purged_letter_does_not_come_back(self, store):
        """A letter that was purged and is put again, late from somewhere, stays removed."""
        letter = a_letter()
        store.put([letter])
        store.purge(Filter(), dry_run=False)
        assert store.put([letter]) == ["known"]
        assert store.stats().total == 0

    def test_purge_leaves_other_states_and_queues(self, store):
        """A purge removes what its filter means, and by default that is dead letters."""
        queued(store)
        store.put([*some(2), a_letter(queue="other")])
        assert store.purge(Filter(), dry_run=False) == 2
        assert store.stats().by_state == {"queued": 1}
        assert store.stats("other").by_state == {"dead": 1}

    def test_claim_of_a_purged_letter_holds_no_more(self, store):
        """Where a claimed letter was purged, its claim is refused and nothing comes back."""
        claim = claimed(store)
        assert store.purge(EVERY, dry_run=False) == 1
        assert not store.settle(claim, claim.letter.changed(error_message="new"))
        assert store.renew(claim, LEASE) is None
        assert not store.release(claim)
        assert store.stats().total == 0

    def test_bulk_actions_cover_any_number(self, store):
        """Actions on more letters than one step takes cover them all, and keep to their limit."""
        letters = some(1300)
        store.put(letters)
        assert store.requeue(Filter(), limit=700) == 700
        assert store.stats().by_state == {"queued": 700, "dead": 600}
        assert store.requeue(Filter()) == 600
        assert store.park(QUEUED) == 1300
        assert store.unpark(PARKED) == 1300
        assert store.stats().by_state == {"dead": 1300}
        assert store.purge(EVERY) == 1300
        assert store.purge(EVERY, dry_run=False) == 1300
        assert store.stats().total == store.stats().size == 0

    # --- claims ----------------------------------------------------------------------------------

    def test_claim_has_the_letter(self, store, clock):
        """A claim has the letter as it is, its owner, and the time until which it holds."""
        letter = a_letter(b"x", attempts=2)
        store.put([letter, a_letter(b"x", attempts=1, error_message="new")])
        store.requeue(Filter())
        before = clock.now
        (claim,) = store.claim("one", LEASE)
        assert before + LEASE - 1 <= claim.until <= clock.now + LEASE + 1
        assert claim.letter == store.get(letter.id)
        assert (claim.letter.state, claim.letter.attempts) == ("claimed", 3)
        assert claim.letter.error_message == "new"
        assert claim.owner == "one"

    def test_only_queued_letters_are_claimed_by_default(self, store):
        """Without a filter only what is queued in the default queue is claimed."""
        store.put([*some(2), a_letter(queue="other")])
        assert store.requeue(Filter("other")) == 1
        assert list(store.claim("one", LEASE, 9)) == []
        assert len(store.claim("one", LEASE, 9, Filter("other", ("queued",)))) == 1

    def test_claims_are_in_the_order_of_coming(self, store):
        """What came first is claimed first, no more than the limit at once."""
        letters = queued(store, 5)
        ids = ids_of(letters)
        assert ids_of(store.claim("one", LEASE)) == ids[:1]
        assert ids_of(store.claim("one", LEASE, 3)) == ids[1:4]
        assert ids_of(store.claim("two", LEASE, 3)) == ids[4:]
        assert list(store.claim("two", LEASE, 3)) == []
        assert store.stats().by_state == {"claimed": 5}

    def test_claims_are_not_in_the_order_of_requeuing(self, store):
        """What came first is claimed first, also where it was queued last."""
        letters = some(4)
        store.put(letters)
        for place in (2, 0, 3, 1):
            store.requeue(Filter(ids=(letters[place].id,)))
        assert ids_of(store.claim("one", LEASE, 2)) == ids_of(letters[:2])
        assert ids_of(store.claim("one", LEASE, 9)) == ids_of(letters[2:])

    def test_letters_that_are_not_due_are_not_claimed(self, store, clock):
        """A letter whose `not_before` is to come is left until then, unless asked for by id."""
        soon, now, late = (
            a_letter(not_before=clock.now + seconds) for seconds in (100.0, -1.0, 5000.0)
        )
        store.put([soon, now, late])
        assert ids_of(store.claim("one", LEASE, 9, Filter())) == [now.id]
        assert store.requeue(Filter()) == 2
        assert list(store.claim("one", LEASE, 9)) == []
        assert list(store.claim("one", LEASE, 9, QUEUED)) == []
        assert list(store.claim("one", LEASE, 9, replace(QUEUED, feed="urlhaus"))) == []
        (claim,) = store.claim("one", LEASE, 9, replace(QUEUED, ids=(late.id,)))
        assert claim.letter.id == late.id
        assert store.release(claim)
        assert list(store.claim("one", LEASE, 9)) == []
        clock.advance(101)
        assert ids_of(store.claim("one", LEASE, 9)) == [soon.id]
        assert store.stats().by_state["queued"] == 1

    def test_failure_says_when_a_letter_is_due_again(self, store, clock):
        """What a replay, or a further failure, says about the time of the next try counts."""
        claim = claimed(store)
        store.settle(claim, claim.letter.changed(not_before=clock.now + 100))
        other = a_letter(b"x")
        store.put([other, a_letter(b"x", not_before=clock.now + 100)])
        assert store.requeue(Filter()) == 2
        assert list(store.claim("one", LEASE, 9)) == []
        store.put([a_letter(b"x", not_before=0.0)])
        assert ids_of(store.claim("one", LEASE, 9)) == [other.id]

    def test_letters_that_are_due_do_not_wait_behind_many_that_are_not(self, store, clock):
        """However many letters are not due, those behind them that are can be claimed."""
        store.put(some(300, not_before=clock.now + 100))
        (last,) = some(1)
        store.put([last])
        store.requeue(Filter())
        assert ids_of(store.claim("one", LEASE)) == [last.id]
        clock.advance(101)
        assert len(store.claim("one", LEASE, 250)) >= 100

    def test_claims_go_by_their_filter(self, store):
        """A filter says what is claimed; dead letters are claimed where it says so."""
        store.put([*some(2, feed="a"), *some(2, feed="b")])
        assert {it.letter.feed for it in store.claim("one", LEASE, 9, Filter(feed="a"))} == {"a"}
        assert store.stats().by_state == {"claimed": 2, "dead": 2}
        assert list(store.claim("two", LEASE, 9, Filter(states=("claimed",)))) == []

    def test_each_letter_is_claimed_by_one(self, store):
        """Threads that claim at the same time get different letters, together all of them."""
        letters = queued(store, 60)
        got: dict[int, list[str]] = {number: [] for number in range(6)}

        def work(number: int) -> None:
            while claims := store.claim(f"owner {number}", LEASE, 1 + number % 3):
                got[number] += ids_of(claims)

        in_threads(6, work)
        assert sorted(itertools.chain(*got.values())) == sorted(ids_of(letters))

    def test_settled_letter_is_gone(self, store):
        """After a replay that succeeded the letter is gone, and stays so when it is put again."""
        claim = claimed(store)
        assert store.settle(claim)
        assert store.get(claim.letter.id) is None
        assert everything(store) == []
        assert store.stats().total == store.stats().size == 0
        assert store.put([claim.letter]) == ["known"]
        assert store.stats().total == 0
        assert not store.settle(claim)

    def test_settled_letter_stays_gone_for_longer_than_it_may_come_late(self, store, clock):
        """For twice the grace time of 60 s at least it is remembered that a letter is done."""
        claim = claimed(store)
        store.settle(claim)
        clock.advance(100)
        store.settle(claimed(store))
        clock.advance(15)
        assert store.put([claim.letter]) == ["known"]
        assert store.stats().total == 0

    def test_failed_replay_makes_the_letter_dead_again(self, store):
        """After a replay that failed the letter is dead with the new error, once more failed."""
        claim = claimed(store)
        failed = claim.letter.changed(
            error_type="ReadTimeout",
            error_message="no answer",
            error_stack="File z",
            fingerprint="f9",
            last_failed_at=5000.0,
            not_before=6000.0,
            traceparent="00-09-09-01",
            tracestate="a=b",
        )
        assert store.settle(claim, failed)
        found = store.get(claim.letter.id)
        assert same_but_for_life(failed.changed(attempts=found.attempts), found)
        assert (found.state, found.replays) == ("dead", 1)
        assert found.revision > claim.letter.revision
        assert store.stats().by_fingerprint == {"f9": 1}
        assert ids_of(everything(store, Filter(error_type="ReadTimeout", since=5000.0))) == [
            found.id
        ]
        assert list(store.claim("one", LEASE)) == []

    @pytest.mark.parametrize("calls", [0, 1, 4])
    def test_failed_replay_says_how_many_attempts_there_were(self, store, calls):
        """The attempts of a letter after a failed replay are those that it was settled with."""
        claim = claimed(store)
        failed = claim.letter.changed(attempts=claim.letter.attempts + calls)
        assert store.settle(claim, failed)
        assert store.get(claim.letter.id).attempts == failed.attempts

    def test_five_failed_replays_park_a_letter(self, store):
        """After the fifth failed replay a letter is parked; before, it is dead."""
        (letter,) = queued(store)
        for replay in range(1, MOST_REPLAYS + 1):
            (claim,) = store.claim("one", LEASE)
            assert store.settle(claim, claim.letter.changed(error_message=f"no {replay}"))
            found = store.get(letter.id)
            assert found.replays == replay
            assert found.error_message == f"no {replay}"
            assert found.state == ("dead" if replay < MOST_REPLAYS else "parked")
            store.requeue(Filter())
        assert MOST_REPLAYS == 5
        assert store.stats().by_state == {"parked": 1}

    def test_expired_lease_is_to_be_had_again(self, store, clock):
        """A letter is its owner's until its lease runs out, and then another's."""
        claim = claimed(store)
        clock.advance(LEASE - SLACK)
        assert list(store.claim("two", LEASE)) == []
        clock.advance(SLACK + 0.5)
        (other,) = store.claim("two", LEASE)
        assert other.letter.id == claim.letter.id
        assert other.letter.revision > claim.letter.revision
        assert (other.owner, other.letter.replays) == ("two", 0)

    def test_expired_lease_is_to_be_had_again_under_the_same_filter(self, store, clock):
        """Who claims by a filter gets what was claimed by that filter before and has expired."""
        store.put(some(1))
        (claim,) = store.claim("one", LEASE, 1, Filter())
        clock.advance(LEASE + 1)
        (other,) = store.claim("two", LEASE, 1, Filter())
        assert other.letter.id == claim.letter.id

    def test_three_expired_leases_park_a_letter(self, store, clock):
        """A letter whose lease ran out three times is parked: whoever replays it dies of it."""
        (letter,) = queued(store)
        for lease in range(MOST_LEASES):
            (claim,) = store.claim(f"owner {lease}", LEASE)
            assert claim.letter.id == letter.id
            clock.advance(LEASE + 1)
        assert list(store.claim("last", LEASE)) == []
        assert MOST_LEASES == 3
        assert state_of(store, letter) == "parked"
        assert store.stats().by_state == {"parked": 1}

    def test_unparked_letter_has_three_leases_again(self, store, clock):
        """An unparked letter is not parked at its next lease that runs out."""
        (letter,) = queued(store)
        for _ in range(MOST_LEASES):
            store.claim("one", LEASE)
            clock.advance(LEASE + 1)
        store.claim("one", LEASE)
        assert store.unpark(PARKED) == 1
        store.requeue(Filter())
        for _ in range(2):
            (claim,) = store.claim("one", LEASE)
            assert claim.letter.id == letter.id
            clock.advance(LEASE + 1)
        assert len(store.claim("one", LEASE)) == 1

    def test_leases_of_other_letters_do_not_count(self, store, clock):
        """A lease that runs out counts for its own letter alone, and by its own time."""
        first, second = queued(store, 2)
        (one,) = store.claim("one", 10)
        (two,) = store.claim("two", 100)
        clock.advance(11)
        assert ids_of(store.claim("three", LEASE, 9)) == [first.id]
        assert store.settle(two)
        assert not store.settle(one)
        assert state_of(store, second) is None

    def test_renewed_claim_holds_for_longer(self, store, clock):
        """A claim that is renewed holds from then on for the new lease."""
        claim = claimed(store)
        clock.advance(LEASE - SLACK)
        before = clock.now
        renewed = store.renew(claim, LEASE)
        assert before + LEASE - 1 <= renewed.until <= clock.now + LEASE + 1
        assert (renewed.owner, renewed.letter.id) == (claim.owner, claim.letter.id)
        clock.advance(LEASE - SLACK)
        assert list(store.claim("two", LEASE)) == []
        again = store.renew(renewed, LEASE)
        assert store.settle(again)
        assert store.stats().total == 0

    def test_renewed_claim_runs_out_too(self, store, clock):
        """A renewed claim is to be had by others when its new lease has run out."""
        renewed = store.renew(claimed(store), LEASE)
        clock.advance(LEASE + 1)
        (other,) = store.claim("two", LEASE)
        assert store.renew(renewed, LEASE) is None
        assert store.settle(other)

    @pytest.mark.parametrize("owner", ["one", "two"])
    def test_late_replayer_changes_nothing(self, store, clock, owner):
        """Once a letter was claimed again, the claim before it can do nothing any more."""
        late = claimed(store, "one")
        clock.advance(LEASE + 1)
        (holding,) = store.claim(owner, LEASE)
        before = store.get(late.letter.id)
        assert not store.settle(late)
        assert not store.settle(late, late.letter.changed(error_message="late"))
        assert store.renew(late, LEASE) is None
        assert not store.release(late)
        assert store.get(late.letter.id) == before
        assert store.settle(holding)

    def test_late_replayer_of_a_settled_letter_changes_nothing(self, store, clock):
        """A claim from before another's replay, failed or not, can do nothing any more."""
        late = claimed(store, "one")
        clock.advance(LEASE + 1)
        (other,) = store.claim("two", LEASE)
        store.settle(other, other.letter.changed(error_message="two"))
        assert not store.settle(late, late.letter.changed(error_message="late"))
        assert not store.settle(late)
        assert store.get(late.letter.id).error_message == "two"
        store.requeue(Filter())
        (other,) = store.claim("two", LEASE)
        assert store.settle(other)
        assert not store.settle(late, late.letter)
        assert store.stats().total == 0

    def test_settle_after_the_lease_tells_the_truth(self, store, clock):
        """Settling after the lease with no other claim removes the letter if it says so."""
        claim = claimed(store)
        clock.advance(LEASE + 1)
        held = store.settle(claim)
        assert held == (store.get(claim.letter.id) is None)
        assert len(store.claim("two", LEASE)) == (0 if held else 1)

    @pytest.mark.parametrize("failed", [False, True])
    def test_claim_is_settled_once(self, store, failed):
        """A claim that was settled does not hold a second time."""
        claim = claimed(store)
        assert store.settle(claim, claim.letter if failed else None)
        before = store.get(claim.letter.id)
        assert not store.settle(claim, claim.letter)
        assert not store.settle(claim)
        assert not store.release(claim)
        assert store.renew(claim, LEASE) is None
        assert store.get(claim.letter.id) == before

    def test_claim_of_another_owner_holds_nothing(self, store):
        """A claim under another owner's name is refused."""
        claim = claimed(store)
        stolen = claim._replace(owner="thief")
        assert not store.settle(stolen)
        assert not store.release(stolen)
        assert store.renew(stolen, LEASE) is None
        assert store.settle(claim)

    def test_claim_of_another_revision_holds_nothing(self, store):
        """A claim with another revision of the letter is refused."""
        claim = claimed(store)
        for revision in (claim.letter.revision - 1, claim.letter.revision + 1):
            wrong = claim._replace(letter=claim.letter.changed(revision=revision))
            assert not store.settle(wrong)
            assert not store.release(wrong)
            assert store.renew(wrong, LEASE) is None
        assert store.settle(claim)

    def test_one_of_many_settles_wins(self, store):
        """Of threads that settle the same claim one is told that it held."""
        claim = claimed(store)
        held: list[bool] = []
        in_threads(6, lambda n: held.append(store.settle(claim, claim.letter if n % 2 else None)))
        assert sorted(held) == [False] * 5 + [True]
        assert store.stats().total == len(everything(store))

    def test_released_letter_is_to_be_had_again(self, store):
        """A letter that is given back was not tried: it has no failed replay and is had again."""
        claim = claimed(store)
        assert store.release(claim)
        found = store.get(claim.letter.id)
        assert found.state in {"dead", "queued"}
        assert (found.replays, found.attempts) == (0, claim.letter.attempts)
        assert same_but_for_life(claim.letter, found)
        assert found.revision > claim.letter.revision
        (other,) = store.claim("two", LEASE, 9, EVERY)
        assert store.settle(other)

    def test_releases_do_not_park(self, store):
        """However often a letter is given back untried, it is not parked for it."""
        (letter,) = queued(store)
        for _ in range(2 * max(MOST_LEASES, MOST_REPLAYS)):
            (claim,) = store.claim("one", LEASE, 9, EVERY)
            assert claim.letter.id == letter.id
            assert store.release(claim)
        assert state_of(store, letter) in {"dead", "queued"}

    def test_park_and_claim_do_not_both_win(self, store):
        """A claimed letter that is parked is no longer its owner's; else it is not parked."""
        claim = claimed(store)
        parked = store.park(EVERY)
        assert store.settle(claim) == (parked == 0)
        assert store.stats().total == parked

    # --- counts ----------------------------------------------------------------------------------

    def test_stats_count_by_state_feed_and_fingerprint(self, store):
        """Letters are counted by state, by feed without those that have none, and by cause."""
        store.put([*some(3, feed="a"), *some(2, feed=None, fingerprint="f2")])
        store.park(Filter(feed="a"))
        queued(store, 1, feed="b", fingerprint="f2")
        store.put(some(1, queue="other"))
        stats = store.stats()
        assert stats.by_state == {"parked": 3, "dead": 2, "queued": 1}
        assert stats.by_feed == {"a": 3, "b": 1}
        assert stats.by_fingerprint == {"f1": 3, "f2": 3}
        assert stats.total == 6

    def test_size_is_that_of_the_letters(self, store):
        """The size grows with each letter by about its encoded bytes, and shrinks with removals."""
        chance = random.Random(1)
        letters = [a_letter(chance.randbytes(size), queue="a") for size in (10, 3000, 50_000)]
        before = 0
        for letter in letters:
            store.put([letter])
            size = store.stats("a").size
            assert abs(size - before - len(letter.encode())) < 1000
            before = size
        store.purge(Filter("a", ids=(letters[2].id,)), dry_run=False)
        assert abs(store.stats("a").size - sum(len(it.encode()) for it in letters[:2])) < 2000

    def test_oldest_is_the_letter_dead_for_longest(self, store):
        """The oldest dead letter counts, not those that are queued, claimed or parked."""
        letters = [a_letter(last_failed_at=1000.0 + n, first_failed_at=1000.0) for n in range(4)]
        store.put(letters)
        assert store.stats().oldest == 1000.0
        store.park(Filter(ids=(letters[0].id,)))
        assert store.stats().oldest == 1001.0
        store.requeue(Filter(ids=(letters[1].id,)))
        assert store.stats().oldest == 1002.0
        store.purge(Filter(), dry_run=False)
        assert store.stats().oldest is None

    def test_oldest_does_not_go_by_the_order_of_coming(self, store):
        """A letter that came late, as from another store, but failed earlier is the older one."""
        store.put([a_letter(last_failed_at=5000.0), a_letter(last_failed_at=1000.0)])
        assert store.stats().oldest == 1000.0

    def test_oldest_after_a_failed_replay(self, store):
        """A letter that failed again just now is not the one that has been dead for longest."""
        queued(store, 1, last_failed_at=1000.0)
        store.put([a_letter(last_failed_at=2000.0)])
        (claim,) = store.claim("one", LEASE)
        store.settle(claim, claim.letter.changed(last_failed_at=9000.0))
        assert store.stats().oldest == 2000.0

    def test_counts_after_random_operations(self, store, clock):
        """After any operations in any order lists and counts are what they should be."""

        class Machine(StoreMachine):
            def __init__(self) -> None:
                super().__init__(store, clock)

        how = settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Machine, settings=how)

    # --- newer versions --------------------------------------------------------------------------

    def test_newer_letters_survive(self, store, clock):
        """A letter of a newer schema keeps the fields that this version does not know, always."""
        newer = {"newer": {"a": [1, b"\x00", {"b": None}]}, "other": 2.5}
        raw = msgspec.msgpack.decode(a_letter(b"x").encode()) | newer | {"schema": 2}
        letter = Letter.decode(msgspec.msgpack.encode(raw))
        assert store.put([letter]) == ["stored"]
        store.put([a_letter(b"x", error_message="merged")])
        store.requeue(Filter())
        (claim,) = store.claim("one", LEASE)
        clock.advance(LEASE + 1)
        (claim,) = store.claim("two", LEASE)
        store.settle(claim, claim.letter.changed(error_message="failed"))
        store.park(Filter())
        store.unpark(PARKED)
        for found in (store.get(letter.id), *everything(store), claim.letter):
            assert found.unknown == newer
            assert found.schema == 2
        raw_again = msgspec.msgpack.decode(store.get(letter.id).encode())
        assert {name: raw_again[name] for name in newer} == newer


# --- random operations ---------------------------------------------------------------------------


@dataclass
class Expected:
    """What a letter should be like."""

    letter: Letter
    same: int
    """Which payload it has."""
    state: State = "dead"
    replays: int = 0
    leases: int = 0
    """That ran out since it was last settled, released, renewed or unparked."""
    all_leases: int = 0
    """That ran out since it was last unparked."""
    claim: Claim | None = None
    revision: int = 0


@dataclass(frozen=True)
class Wanted:
    """A filter, and what it should find."""

    where: Filter
    found: list[Expected] = field(compare=False)


class StoreMachine(RuleBasedStateMachine):
    """Does anything with a queue of its own, and knows what should come of it."""

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__()
        self.store, self.clock = store, clock
        self.queue = f"q-{uuid.uuid4().hex}"
        self.letters: dict[str, Expected] = {}
        self.removed: list[tuple[Letter, float]] = []
        self.claims: list[Claim] = []
        self.serial = itertools.count()

    @initialize(count=st.integers(0, 4))
    def begin(self, count: int) -> None:
        for number in range(count):
            self.put(number, "a", number % 2)

    def among(self, states: Sequence[State], **fields: Any) -> Wanted:
        fields = {name: value for name, value in fields.items() if value is not None}
        found = [
            one
            for one in self.letters.values()
            if one.state in states
            and all(getattr(one.letter, name) == value for name, value in fields.items())
        ]
        return Wanted(Filter(self.queue, tuple(states), **fields), found)

    @rule(
        payload=st.integers(0, 5),
        feed=st.sampled_from(["a", "b", None]),
        cause=st.integers(0, 2),
    )
    def put(self, payload: int, feed: str | None, cause: int) -> None:
        letter = a_letter(
            f"{payload} of {feed}".encode(),
            queue=self.queue,
            feed=feed,
            fingerprint=f"f{cause}",
            error_message=f"failure {next(self.serial)}",
            last_failed_at=self.clock.now,
            first_failed_at=self.clock.now,
        )
        twins = [
            one
            for one in self.letters.values()
            if (one.same, one.letter.feed) == (payload, feed) and one.state != "claimed"
        ]
        (answer,) = self.store.put([letter])
        if not twins:
            assert answer == "stored"
            self.letters[letter.id] = Expected(letter, payload)
            return
        assert answer == "merged"
        message = letter.error_message
        merged = [
            one
            for one in self.letters.values()
            if self.store.get(one.letter.id, self.queue).error_message == message
        ]
        assert len(merged) == 1
        assert (merged[0].same, merged[0].letter.feed) == (payload, feed)
        attempts = merged[0].letter.attempts + 1
        merged[0].letter = merged[0].letter.with_latest(letter.latest()).changed(attempts=attempts)

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(list(self.letters.values())))
        assert self.store.put([one.letter.changed(error_message="again")]) == ["known"]

    @precondition(lambda self: self.removed)
    @rule(data=st.data())
    def put_removed(self, data: st.DataObject) -> None:
        letter, at = data.draw(st.sampled_from(self.removed))
        if self.clock.now < at + 100:
            assert self.store.put([letter]) == ["known"]

    @rule(
        feed=st.sampled_from(["a", "b", None]),
        fingerprint=st.sampled_from(["f0", "f1", None]),
        limit=st.sampled_from([None, None, 1, 2]),
    )
    def requeue(self, feed: str | None, fingerprint: str | None, limit: int | None) -> None:
        wanted = self.among(["dead"], feed=feed, fingerprint=fingerprint)
        count = self.store.requeue(wanted.where, limit)
        assert count == min(len(wanted.found), len(wanted.found) if limit is None else limit)
        for one in wanted.found:
            if count == len(wanted.found) or self.now(one).state == "queued":
                one.state = "queued"

    def now(self, one: Expected) -> Letter:
        found = self.store.get(one.letter.id, self.queue)
        assert found is not None
        return found

    # All in tens of seconds: no end is so near that a machine that stops gets past it.
    @rule(limit=st.integers(1, 3), lease=st.sampled_from([100.0, 500.0]))
    def claim(self, limit: int, lease: float) -> None:
        expired = [
            one for one in self.letters.values() if one.claim and one.claim.until <= self.clock.now
        ]
        for one in expired:
            one.claim = None
            one.leases, one.all_leases = one.leases + 1, one.all_leases + 1
            one.state = "parked" if one.leases >= MOST_LEASES else "queued"
        where = Filter(self.queue, ("queued",))
        before = self.clock.now
        claims = self.store.claim(f"owner {limit}", lease, limit, where)
        for one in expired:
            if one.all_leases >= MOST_LEASES > one.leases and self.now(one).state == "parked":
                one.state = "parked"
        self.come_back(expired)
        waiting = [one for one in self.letters.values() if one.state == "queued"]
        # A letter whose lease ran out may have lost its place in the queue.
        assert len(claims) == min(limit, len(waiting))
        assert set(ids_of(claims)) <= {one.letter.id for one in waiting}
        for claim in claims:
            one = self.letters[claim.letter.id]
            assert before + lease - 1 <= claim.until <= self.clock.now + lease + 1
            one.state, one.claim = "claimed", claim
        self.claims += claims

    @rule(seconds=st.sampled_from([10.0, 110.0, 600.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.claim(1, 100.0)

    def holder(self, claim: Claim) -> Expected | None:
        one = self.letters.get(claim.letter.id)
        return one if one is not None and one.claim is claim else None

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), how=st.sampled_from(["success", "failure", "release", "renew"]))
    def end(self, data: st.DataObject, how: str) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        one = self.holder(claim)
        if how == "renew":
            renewed = self.store.renew(claim, 500.0)
            assert (renewed is None) == (one is None)
            if renewed is not None and one is not None:
                one.claim, one.leases = renewed, 0
                self.claims = [it for it in self.claims if it is not claim] + [renewed]
            return
        if how == "release":
            held = self.store.release(claim)
        elif how == "success":
            held = self.store.settle(claim)
        else:
            failed = claim.letter.changed(
                error_message=f"failure {next(self.serial)}",
                fingerprint="f2",
                last_failed_at=self.clock.now,
            )
            held = self.store.settle(claim, failed)
        assert held == (one is not None)
        if one is None:
            return
        one.claim, one.leases = None, 0
        if how == "success":
            self.forget([one])
        elif how == "release":
            one.state = "queued"
            self.come_back([one])
        else:
            one.replays += 1
            one.state = "parked" if one.replays >= MOST_REPLAYS else "dead"
            one.letter = one.letter.with_latest(failed.latest())
            self.come_back([one])

    def come_back(self, ended: list[Expected]) -> None:
        """Expect one letter of a payload where there was a claim, and one that came meanwhile."""
        for identity in {(one.same, one.letter.feed) for one in ended}:
            group = [
                one
                for one in self.letters.values()
                if (one.same, one.letter.feed) == identity and one.state != "claimed"
            ]
            if len(group) < 2:
                continue
            (left,) = (one for one in group if self.store.get(one.letter.id, self.queue))
            found = self.now(left)
            errors = {one.letter.error_message: one.letter for one in group}
            latest = errors[found.error_message]
            assert latest.last_failed_at == max(one.letter.last_failed_at for one in group)
            attempts = sum(one.letter.attempts for one in group)
            left.letter = left.letter.with_latest(latest.latest()).changed(attempts=attempts)
            if any(one.state == "parked" for one in group):
                left.state = "parked"
            self.forget([one for one in group if one is not left])

    def forget(self, gone: list[Expected]) -> None:
        for one in gone:
            del self.letters[one.letter.id]
            self.removed.append((one.letter, self.clock.now))

    @rule(feed=st.sampled_from(["a", "b", None]), queued_too=st.booleans())
    def park(self, feed: str | None, queued_too: bool) -> None:
        wanted = self.among(["dead", "queued"] if queued_too else ["dead"], feed=feed)
        assert self.store.park(wanted.where) == len(wanted.found)
        for one in wanted.found:
            one.state = "parked"

    @rule(fingerprint=st.sampled_from(["f0", "f1", "f2", None]))
    def unpark(self, fingerprint: str | None) -> None:
        wanted = self.among(["parked"], fingerprint=fingerprint)
        assert self.store.unpark(wanted.where) == len(wanted.found)
        for one in wanted.found:
            one.state, one.replays, one.leases, one.all_leases = "dead", 0, 0, 0

    @rule(state=st.sampled_from(STATES), feed=st.sampled_from(["a", "b", None]))
    def purge(self, state: State, feed: str | None) -> None:
        wanted = self.among([state], feed=feed)
        assert self.store.purge(wanted.where) == len(wanted.found)
        assert self.store.purge(wanted.where, dry_run=False) == len(wanted.found)
        self.forget(wanted.found)

    @invariant()
    def everything_is_as_expected(self) -> None:
        listed = everything(self.store, Filter(self.queue, STATES), limit=7)
        assert ids_of(listed) == list(self.letters)
        for found in listed:
            one = self.letters[found.id]
            assert (found.state, found.replays) == (one.state, one.replays)
            assert same_but_for_life(one.letter, found)
            assert found.revision >= one.revision
            one.revision = found.revision

    @invariant()
    def counts_are_right(self) -> None:
        letters = list(self.letters.values())
        stats = self.store.stats(self.queue)
        assert stats.by_state == Counter(one.state for one in letters)
        feeds = Counter(one.letter.feed for one in letters if one.letter.feed is not None)
        assert stats.by_feed == feeds
        assert stats.by_fingerprint == Counter(one.letter.fingerprint for one in letters)
        assert stats.total == len(letters)
        assert (stats.size > 0) == bool(letters)
        assert (stats.oldest is None) == all(one.state != "dead" for one in letters)
