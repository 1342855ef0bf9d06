"""The contracts of the numbers about dead letters, and of the instruments that read them."""

from __future__ import annotations

import threading
import time

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from periscope_otel.telemetry import names
from periscope_otel.telemetry.letter_counts import (
    FRESH,
    Depth,
    LetterCounts,
    OutboxDepth,
    letter_counts,
)
from periscope_otel.telemetry.letter_instruments import create_letter_instruments


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
def counts(clock: Clock) -> LetterCounts:
    return LetterCounts(clock)


def test_counters_add_up_by_queue_and_word(counts):
    """Each kind by itself."""
    counts.put("a", "disk")
    counts.put("a", "disk", 2)
    counts.put("b", "memory")
    counts.replayed("a", "succeeded")
    counts.lost("a", "full")
    assert counts.puts() == {("a", "disk"): 3, ("b", "memory"): 1}
    assert counts.replays() == {("a", "succeeded"): 1}
    assert counts.losses() == {("a", "full"): 1}


def test_counts_of_many_threads_are_exact(counts):
    """None gets in the way of another."""
    threads = [
        threading.Thread(target=lambda: [counts.put("a", "disk") for _ in range(2000)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.puts() == {("a", "disk"): 16000}


def test_a_snapshot_is_told_until_it_is_too_old(counts, clock):
    """A store that cannot be reached yields no figure rather than an old one."""
    counts.take({"a": Depth({"dead": 3}, 1.0)})
    clock.now += FRESH
    assert counts.depths() == {"a": Depth({"dead": 3}, 1.0)}
    clock.now += 0.1
    assert counts.depths() == {}


def test_the_outbox_is_told_of_while_the_store_is_away(counts, clock):
    """Its snapshot has an age of its own."""
    counts.take({"a": Depth({"dead": 3}, 1.0)})
    clock.now += FRESH + 1
    counts.take_outbox(OutboxDepth(5, 2.0, {"default": 5}))
    assert (counts.depths(), counts.outbox()) == ({}, OutboxDepth(5, 2.0, {"default": 5}))
    clock.now += FRESH + 1
    assert counts.outbox() is None


def test_nothing_is_told_before_the_first_snapshot():
    """Also on a machine that was started a moment ago."""
    counts = LetterCounts(lambda: 0.5)
    assert (counts.depths(), counts.outbox(), counts.puts()) == ({}, None, {})


def test_what_is_returned_is_a_copy(counts):
    """Changing it changes no count."""
    counts.put("a", "disk")
    counts.puts().clear()
    assert counts.puts() == {("a", "disk"): 1}


def test_a_block_can_begin_at_nothing(counts):
    """What was there before is there after it, also if it fails."""
    counts.put("a", "disk")

    def block() -> None:
        with counts.set_aside():
            assert counts.puts() == {}
            counts.put("a", "memory")
            raise ValueError

    with pytest.raises(ValueError):
        block()
    assert counts.puts() == {("a", "disk"): 1}


def test_the_child_of_a_fork_begins_at_nothing(counts):
    """`clear` takes no lock: a thread of the parent may have had it."""
    counts.put("a", "disk")
    counts._lock.acquire()
    done = threading.Thread(target=counts.clear)
    done.start()
    done.join(30)
    assert counts.puts() == {}


def points() -> dict[str, dict[tuple[str, ...], float]]:
    """Return what the instruments tell, by metric and by the values of its attributes."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    create_letter_instruments(provider.get_meter("test"))
    data = reader.get_metrics_data()
    provider.shutdown()
    found = [] if data is None else data.resource_metrics[0].scope_metrics[0].metrics
    return {
        metric.name: {
            tuple(str(one) for one in point.attributes.values()): point.value
            for point in metric.data.data_points
        }
        for metric in found
    }


def test_every_number_has_its_instrument(monkeypatch):
    """By the names, states and attributes of the table of names."""
    now = time.time()
    with letter_counts.set_aside():
        letter_counts.put("a", "disk", 4)
        letter_counts.replayed("a", "succeeded", 3)
        letter_counts.lost("a", "full", 2)
        letter_counts.take(
            {"a": Depth({"dead": 3, "parked": 1}, now - 100), "b": Depth({"dead": 0}, None)}
        )
        letter_counts.take_outbox(OutboxDepth(7, now - 50, {"default": 7}))
        told = points()
    assert told[names.DEAD_LETTER_PUTS.name] == {("a", "disk"): 4}
    assert told[names.DEAD_LETTER_REPLAYS.name] == {("a", "succeeded"): 3}
    assert told[names.DEAD_LETTERS_LOST.name] == {("a", "full"): 2}
    assert told[names.DEAD_LETTERS.name] == {
        ("a", "dead"): 3,
        ("a", "parked"): 1,
        ("b", "dead"): 0,
        ("default", "pending"): 7,
    }
    ages = told[names.DEAD_LETTER_AGE.name]
    assert ages["a",] == pytest.approx(100, abs=30)
    assert ages["b",] == 0
    assert told[names.OUTBOX_LETTERS.name] == {(): 7}
    assert told[names.OUTBOX_AGE.name][()] == pytest.approx(50, abs=30)


def test_an_age_is_never_below_nothing():
    """A clock that was put back makes no negative age."""
    with letter_counts.set_aside():
        letter_counts.take({"a": Depth({"dead": 1}, time.time() + 1000)})
        assert points()[names.DEAD_LETTER_AGE.name] == {("a",): 0}


def test_where_nothing_was_counted_nothing_is_told():
    """No series of an outbox where there is none."""
    with letter_counts.set_aside():
        assert not any(points().values())
