"""The contracts of the registry of breakers: who is found by a name, and what calls add up to."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

from periscope_otel.failure import Failure
from periscope_otel.resilience import breakers as breakers_module
from periscope_otel.resilience.breaker import Breaker, breakers
from periscope_otel.resilience.breakers import MOST_WATCHED
from periscope_otel.resilience.policy import DEFAULT_POLICY, BreakerPolicy
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILED = Failure("error", "ConnectionError", "failure", retryable=True)


@pytest.fixture(autouse=True)
def nothing_yet() -> Iterator[None]:
    """Begin each test at nothing, and leave nothing behind."""
    gc.collect()
    worker.finish_posted(30)
    defaults = dict(breakers._defaults)
    with breakers.set_aside():
        yield
        worker.finish_posted(30)
    breakers._defaults.clear()
    breakers._defaults.update(defaults)


def settle(breaker: Breaker, *results: Failure | None) -> None:
    for result in results:
        breaker.acquire().settle(result)


def totals(*names: str) -> dict[str, list[int]]:
    """Return what calls of these names have come to."""
    found = breakers.totals().items()
    return {name: list(counts.values()) for name, counts in found if name in names}


# --- who is found --------------------------------------------------------------------------------


def test_a_name_always_has_the_same_breaker():
    """It is made at the first time, and kept though nobody holds it."""
    first = id(breakers.get("a.example"))
    gc.collect()
    assert id(breakers.get("a.example")) == first
    assert breakers.find("a.example") is breakers.get("a.example")
    assert breakers.get("b.example") is not breakers.get("a.example")


def test_find_makes_none():
    """It says what there is."""
    assert breakers.find("a.example") is None
    assert [one.name for one in breakers if one.name == "a.example"] == []


def test_threads_that_come_at_once_get_the_same_breaker():
    """Only one is made."""
    found: list[int] = []
    together = threading.Barrier(16)

    def get() -> None:
        together.wait(30)
        found.append(id(breakers.get("a.example")))

    threads = [threading.Thread(target=get) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 16
    assert len(set(found)) == 1


def test_the_newest_of_a_name_is_found():
    """Whoever has made it, while somebody holds it."""
    made = breakers.get("a.example")
    first, second = Breaker("a.example"), Breaker("a.example")
    assert breakers.get("a.example") is second is not made
    assert breakers.watched("a.example") is second
    assert [one for one in breakers if one.name == "a.example"] == [second]
    del second
    gc.collect()
    assert breakers.get("a.example") not in (made, first)


def test_what_users_make_is_theirs():
    """The registry does not keep it alive."""
    breaker = Breaker("a.example")
    assert breakers.find("a.example") is breaker
    del breaker
    gc.collect()
    assert breakers.find("a.example") is None


def test_two_breakers_of_one_name_that_differ_are_warned_about(caplog):
    """Two that do not differ are usual, as in a module that is loaded again."""
    first = Breaker("a.example")
    second = Breaker("a.example")
    assert caplog.text == ""
    third = Breaker("a.example", probes=2)
    assert "two breakers a.example with different settings" in caplog.text
    assert breakers.find("a.example") is third is not (first, second)


def test_iteration_is_by_name():
    """Over all that there are at that moment."""
    mine = Breaker("b.example")
    for name in ("c.example", "a.example"):
        breakers.get(name)
    names = [one.name for one in breakers]
    assert names == sorted(names)
    assert {"a.example", "b.example", "c.example"} <= set(names)
    del mine


def test_a_hostile_name_is_found_however_it_is_spelled():
    """It is kept under its clean name alone, and the newest of that is found."""
    hostile = "a.example\n\x1b[31m" + "x" * 10_000
    made = breakers.get(hostile)
    assert breakers.get(hostile) is made is breakers.get(made.name)
    assert breakers.watched(hostile) is made
    newer = Breaker(made.name)
    assert breakers.get(hostile) is breakers.find(hostile) is newer
    assert len([one for one in breakers if one.name == made.name]) == 1


@pytest.mark.parametrize("name", ["", " ", "\x00"], ids=repr)
def test_an_empty_name_has_no_breaker(name):
    """And takes none of the places of those that are watched."""
    assert breakers.find(name) is None
    for get in (breakers.get, breakers.watched):
        with pytest.raises(ValueError, match="name"):
            get(name)
    assert breakers._watched == 0


def test_watched_breakers_are_bounded(caplog):
    """Beyond a thousand dependencies further ones have none; those that there are stay."""
    mine = Breaker("mine.example")
    for number in range(MOST_WATCHED):
        assert breakers.watched(f"host-{number}.example") is not None
    assert breakers.watched("one-more.example") is None
    worker.finish_posted(30)
    assert "more than 1000 dependencies" in caplog.text
    assert breakers.watched("host-7.example") is breakers.get("host-7.example")
    assert breakers.watched("mine.example") is mine
    assert breakers.get("one-more.example") is breakers.watched("one-more.example")


# --- how they are made ---------------------------------------------------------------------------


def test_breakers_are_made_with_the_defaults():
    """Unless something else was said."""
    assert breakers.get("a.example").policy is DEFAULT_POLICY


def test_the_last_pattern_that_matches_counts():
    """Said again, a pattern is the last."""
    breakers.defaults("*.example", probes=2)
    breakers.defaults("a*", BreakerPolicy(successes=5), probes=3)
    assert breakers.policy_for("b.example").probes == 2
    assert breakers.policy_for("a.example") == BreakerPolicy(successes=5, probes=3)
    breakers.defaults("*.example", probes=4)
    assert breakers.get("a.example").policy == BreakerPolicy(probes=4)
    assert breakers.policy_for("A.test") is DEFAULT_POLICY


def test_defaults_are_for_those_that_are_made_later():
    """And not for those that users make themselves."""
    before = breakers.get("a.example")
    breakers.defaults("*", probes=2)
    assert breakers.get("a.example") is before
    assert before.policy.probes == Breaker("b.example").policy.probes == 1
    assert breakers.watched("c.example").policy.probes == 2


def test_defaults_are_checked_at_once():
    """A wrong one changes nothing."""
    breakers.defaults("*", probes=2)
    with pytest.raises(ValueError, match="probes"):
        breakers.defaults("*", probes=0)
    with pytest.raises(TypeError, match="treshold"):
        breakers.defaults("*", treshold=0)
    assert breakers.policy_for("a.example").probes == 2


# --- what calls come to --------------------------------------------------------------------------


def test_totals_are_by_name():
    """Success, failure, ignored and rejected, of all breakers of that name together."""
    settle(breakers.get("a.example"), None, None, FAILED)
    newer = Breaker("a.example", consecutive_failures=1)
    settle(newer, FAILED)
    assert newer.allow() is None
    settle(breakers.get("b.example"), Failure("error", "404", "ignored", retryable=False))
    assert totals("a.example", "b.example") == {
        "a.example": [2, 2, 0, 1],
        "b.example": [0, 0, 1, 0],
    }


def test_totals_keep_what_breakers_that_are_gone_have_counted():
    """Dropped, or replaced by another."""
    for _ in range(500):
        settle(Breaker("a.example"), None, FAILED)
    assert totals("a.example") == {"a.example": [500, 500, 0, 0]}
    late = Breaker("a.example").acquire()
    gc.collect()
    late.settle()
    del late
    gc.collect()
    assert totals("a.example") == {"a.example": [501, 500, 0, 0]}


def test_breakers_that_are_gone_take_no_room():
    """Also where nobody asks for totals."""
    breakers.totals()
    others = len(breakers._tallies)
    for _ in range(5_000):
        settle(Breaker("a.example"), None)
    assert len(breakers._tallies) < 2 * others + 1_000
    assert totals("a.example") == {"a.example": [5_000, 0, 0, 0]}


def test_totals_are_exact_while_threads_make_and_drop_breakers():
    """Nothing is counted twice, and nothing is lost."""
    stop = threading.Event()
    sums: list[int] = []

    def work() -> None:
        for _ in range(300):
            settle(Breaker("a.example"), None)

    def watch() -> None:
        while not stop.is_set():
            sums.append(totals("a.example").get("a.example", [0])[0])

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    watcher.join(60)
    assert totals("a.example") == {"a.example": [2_400, 0, 0, 0]}
    assert sums == sorted(sums)


def test_totals_and_transitions_are_copies():
    """Changing them changes nothing."""
    settle(breakers.get("a.example"), None)
    breakers.totals()["a.example"]["success"] = 99
    breakers.transitions()["a", "b", "c"] = 1
    assert totals("a.example") == {"a.example": [1, 0, 0, 0]}
    assert ("a", "b", "c") not in breakers.transitions()


def test_transitions_are_counted_by_name():
    """Of breakers that are gone, too."""
    for _ in range(3):
        breaker = Breaker("a.example")
        breaker.force_open()
        breaker.reset()
    assert worker.finish_posted(30)
    assert breakers.transitions() == {
        ("a.example", "closed", "forced_open"): 3,
        ("a.example", "forced_open", "closed"): 3,
    }


def test_a_block_begins_at_nothing():
    """What was there before is there after it, and what somebody holds has lost no count."""
    made, mine = breakers.get("made.example"), Breaker("mine.example")
    settle(made, None)
    settle(mine, None)
    made.force_open()
    assert worker.finish_posted(30)
    with breakers.set_aside():
        assert breakers.transitions() == {}
        assert breakers.get("made.example") is not made
        assert breakers.get("mine.example") is mine
        settle(breakers.get("made.example"), FAILED)
        settle(mine, FAILED)
        begun = Breaker("begun.example")
        settle(begun, FAILED)
        mine.disable()
        assert worker.finish_posted(30)
        assert totals("made.example", "mine.example", "begun.example") == {
            "made.example": [0, 1, 0, 0],
            "mine.example": [0, 1, 0, 0],
            "begun.example": [0, 1, 0, 0],
        }
    assert breakers.get("made.example") is made
    settle(begun, None)
    assert totals("made.example", "mine.example", "begun.example") == {
        "made.example": [1, 0, 0, 0],
        "mine.example": [1, 1, 0, 0],
        "begun.example": [1, 0, 0, 0],
    }
    assert list(breakers.transitions()) == [("made.example", "closed", "forced_open")]


def test_a_block_that_fails_is_undone_too():
    """As tests do."""
    settle(breakers.get("a.example"), None)

    def block() -> None:
        with breakers.set_aside():
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert totals("a.example") == {"a.example": [1, 0, 0, 0]}


# --- other processes -----------------------------------------------------------------------------


class Sharing:
    """Takes note of what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def moved(self, breaker: Any, transition: Any) -> None:
        self.heard.append((breaker.name, transition.to_state))

    def ask(self, breaker: Any) -> None:
        return None

    def settled(self, *_: Any) -> None:
        raise AssertionError("there is no shared lease")


def test_all_verdicts_are_shared_or_none():
    """Of breakers from before and after, but not where the policy forbids it or others found it."""
    sharing = Sharing()
    before = breakers.get("before.example")
    local = Breaker("local.example", shared=False)
    breakers.share(sharing)
    try:
        after = Breaker("after.example")
        for breaker in (before, local, after):
            breaker.force_open()
        after.adopt("closed", reason="manual")
        later = Breaker("later.example", shared=False)
        later.force_open()
    finally:
        breakers.share(None)
    before.reset()
    assert sharing.heard == [("before.example", "forced_open"), ("after.example", "forced_open")]


def test_what_would_have_been_is_not_shared():
    """Others do not open for it."""
    sharing = Sharing()
    breakers.share(sharing)
    try:
        breaker = Breaker("a.example")
        breaker.observe()
        settle(breaker, *[FAILED] * 5)
    finally:
        breakers.share(None)
    assert sharing.heard == [("a.example", "observe")]


# --- logging -------------------------------------------------------------------------------------


def test_a_log_handler_may_use_the_registry():
    """From any thread: nothing is logged while its lock is held."""
    import logging

    done: list[bool] = []
    here = threading.get_ident()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread != here:  # of a thread that another test has left behind
                return
            thread = threading.Thread(target=breakers.get, args=("log.example",), daemon=True)
            thread.start()
            thread.join(30)
            done.append(not thread.is_alive())

    handler = Handler()
    logger = logging.getLogger("periscope_otel")
    logger.addHandler(handler)
    try:
        first, second = Breaker("a.example"), Breaker("a.example", probes=2)
    finally:
        logger.removeHandler(handler)
    assert first is not second
    assert done == [True]


def test_breakers_made_by_name_are_bounded(monkeypatch):
    """Names without end, as of hosts out of data, take no room without end; open ones stay."""
    monkeypatch.setattr(breakers_module, "MOST_MADE", 100)
    monkeypatch.setattr(breakers, "_most_made", 100)
    breakers.get("failing.example").force_open()
    for number in range(1_000):
        breakers.get(f"host-{number}.example").allow().settle()
    assert len(list(breakers)) <= 101
    assert breakers.get("failing.example").state == "forced_open"
    assert sum(counts["success"] for counts in breakers.totals().values()) == 1_000
