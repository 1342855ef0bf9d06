"""The contracts of the item ledger and of `op.track`."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from periscope_otel import operation
from periscope_otel.items import ItemAccount
from periscope_otel.testing import CapturedTelemetry, capture_telemetry

RECEIVED = "threat.ingest.items.received"
CONVERTED = "threat.ingest.items.converted"
SETTLED = "threat.ingest.items.settled"
LAST_ITEM = "threat.ingest.feed.last_item.time"
ITEM_FAILED = "threat.ingest.item.failed"


def settled_labels(captured: CapturedTelemetry) -> set[tuple[str, str | None]]:
    return {
        (one["threat.ingest.item.outcome"], one.get("threat.ingest.skip.reason"))
        for one in captured.label_sets(SETTLED)
    }


# --- the rules -----------------------------------------------------------------------------------


def test_account_that_adds_up_is_ok(captured_telemetry):
    """Where everything received is ingested or skipped the outcome is ok, and the span has all."""
    with operation("store", feed="urlhaus") as op:
        op.received(10)
        op.converted(8)
        op.ingested(7)
        op.skipped(2, reason="no_content")
        op.skipped(reason="old")
    store = captured_telemetry.operation("store")
    assert store.outcome == "ok"
    assert op.items == store.items == ItemAccount(10, 8, 7, 3, 0, 0, 0)
    names = ("received", "converted", "ingested", "skipped", "failed", "unaccounted")
    on_span = {name: store.attributes[f"threat.ingest.items.{name}"] for name in names}
    assert on_span == dict(zip(names, (10, 8, 7, 3, 0, 0), strict=True))
    assert captured_telemetry.items(feed_name="urlhaus") == op.items
    assert captured_telemetry.metric(SETTLED, reason="no_content") == 2
    assert captured_telemetry.metric(SETTLED, reason="old") == 1
    assert settled_labels(captured_telemetry) == {
        ("ingested", None),
        ("skipped", "no_content"),
        ("skipped", "old"),
    }


def test_operation_without_items_has_no_account(captured_telemetry):
    """An operation that counts nothing has no item attributes and no item series."""
    with operation("store"):
        pass
    assert not [key for key in captured_telemetry.operation("store").attributes if "items" in key]
    for metric in (RECEIVED, CONVERTED, SETTLED):
        assert captured_telemetry.label_sets(metric) == []


def test_unaccounted_items_make_the_outcome_partial(captured_telemetry):
    """What was received and not settled is unaccounted: on the span, in the metrics, partial."""
    with operation("store", feed="urlhaus") as op:
        op.received(10)
        op.ingested(6)
        op.failed(count=1)
    assert op.outcome == "partial"
    assert op.items.unaccounted == 3
    store = captured_telemetry.operation("store")
    assert store.outcome == "partial"
    assert store.attributes["threat.ingest.items.unaccounted"] == 3
    assert captured_telemetry.metric(SETTLED, item_outcome="unaccounted") == 3
    assert captured_telemetry.metric(SETTLED) == captured_telemetry.metric(RECEIVED) == 10
    assert captured_telemetry.metric("threat.ingest.operation.duration", outcome="partial") == 1


def test_failed_items_make_the_outcome_partial(captured_telemetry):
    """A failed item makes the outcome partial, with no error.type and no error status."""
    with operation("store") as op:
        op.received(1)
        op.failed({"id": 1}, ValueError("x"))
    store = captured_telemetry.operation("store")
    assert (store.outcome, store.error_type) == ("partial", None)


def test_failed_operation_counts_the_rest_as_unaccounted(captured_telemetry):
    """An operation that raises keeps its outcome, and what it did not get to is unaccounted."""

    def source():
        yield from range(5)
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"), operation("store") as op:
        op.ingested(len(list(op.track(source()))))
    store = captured_telemetry.operation("store")
    assert store.outcome == "error"
    assert store.items == ItemAccount(received=5, unaccounted=5)
    assert captured_telemetry.items().unaccounted == 5


def test_received_is_inferred_where_it_was_not_called(captured_telemetry):
    """Where `received` was never called it is the sum of the rest, and nothing is unaccounted."""
    with operation("store", feed="misp") as op:
        op.ingested(4)
        op.skipped(1, reason="old")
        op.converted(9)
    assert op.outcome == "ok"
    assert op.items == ItemAccount(received=5, converted=9, ingested=4, skipped=1)
    assert captured_telemetry.items() == op.items
    assert captured_telemetry.metric(LAST_ITEM, feed_name="misp") > 0


def test_received_zero_is_not_inferred(captured_telemetry):
    """`received(0)` says that nothing came: what settles all the same is excess."""
    with operation("store", feed="misp") as op:
        op.received(0)
        op.ingested(2)
    assert op.items == ItemAccount(ingested=2, excess=2)
    assert captured_telemetry.label_sets(LAST_ITEM) == []


def test_excess_is_reported_and_changes_no_outcome(captured_telemetry):
    """More settled than received is counted, told on the span, and leaves the outcome ok."""
    with operation("store") as op:
        op.received(2)
        op.ingested(5)
    store = captured_telemetry.operation("store")
    assert store.outcome == "ok"
    assert op.items == store.items == ItemAccount(received=2, ingested=5, excess=3)
    assert captured_telemetry.items() == op.items


def test_ledger_does_not_roll_up(captured_telemetry):
    """What a nested operation counts is its own, not the enclosing one's."""
    with operation("fetch") as fetch:
        fetch.received(2)
        with operation("store") as store:
            store.received(5)
            store.ingested(5)
        fetch.ingested(2)
    assert fetch.items == ItemAccount(received=2, ingested=2)
    assert captured_telemetry.operation("fetch").outcome == "ok"
    assert captured_telemetry.items(operation_name="store").received == 5
    assert captured_telemetry.items().received == 7


def test_account_so_far_can_be_read(captured_telemetry):
    """`op.items` tells the account while the operation runs, without guessing what is missing."""
    with operation("store") as op:
        assert op.items == ItemAccount()
        op.received(3)
        op.ingested(1)
        assert op.items == ItemAccount(received=3, ingested=1)
        op.ingested(2)
    assert op.items == ItemAccount(received=3, ingested=3)


def test_counts_of_zero_make_no_series(captured_telemetry):
    """Counting zero items changes nothing and makes no series."""
    with operation("store") as op:
        op.received(0)
        op.converted(0)
        op.ingested(0)
        op.skipped(0, reason="none")
        op.failed(count=0)
    assert op.outcome == "ok"
    assert captured_telemetry.metric(RECEIVED) == 0
    assert captured_telemetry.label_sets(SETTLED) == []


# --- late and bad counts -------------------------------------------------------------------------


def test_late_counts_change_nothing(captured_telemetry, caplog):
    """Items counted after the operation has settled change no account and are warned about once."""
    with operation("store") as op:
        op.received(3)
        op.ingested(1)
    before = op.items
    with caplog.at_level(logging.WARNING, "periscope_otel"):
        op.ingested(2)
        op.received(1)
        op.converted(1)
        op.skipped(1, reason="late")
        op.failed(None, ValueError("late"))
    assert op.items == before
    assert captured_telemetry.items() == before
    assert len(caplog.records) == 1
    assert "settled" in caplog.text


def test_late_counts_without_earlier_ones_change_nothing(captured_telemetry):
    """Also where the operation had counted nothing, late counts leave settled = received."""
    with operation("store") as op:
        pass
    op.ingested(5)
    op.skipped(2, reason="late")
    assert captured_telemetry.metric(SETTLED) == captured_telemetry.metric(RECEIVED)


class _RaisingIndex:
    def __index__(self) -> int:
        raise ValueError("no number")


@pytest.mark.parametrize(
    "bad",
    [-1, 1.5, 2.0, None, "3", b"3", [], object(), float("nan"), Decimal(3), _RaisingIndex()],
    ids=lambda bad: type(bad).__name__ + ("" if not isinstance(bad, (int, float)) else f" {bad}"),
)
def test_bad_counts_never_raise_and_count_nothing(captured_telemetry, caplog, bad):
    """What is no whole number from 0 up is warned about, counts nothing and raises nothing."""
    with operation("store") as op, caplog.at_level(logging.WARNING, "periscope_otel"):
        op.received(bad)
        op.converted(bad)
        op.ingested(bad)
        op.skipped(bad, reason="x")
        op.failed(None, count=bad)
    assert op.outcome == "ok"
    assert captured_telemetry.items() == ItemAccount()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("count", [2**63, 2**64, 10**30])
def test_counts_beyond_64_bits_do_not_break_the_export(captured_telemetry, count):
    """A count that OTLP cannot carry leaves metrics that can still be encoded."""
    from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

    with operation("store", feed="misp") as op:
        op.received(count)
        op.ingested(count)
    data = captured_telemetry._reader.get_metrics_data()
    assert encode_metrics(data).SerializeToString()


# --- failed items --------------------------------------------------------------------------------


def test_failed_items_events_are_bounded_and_the_count_is_exact(captured_telemetry):
    """However many items fail, the span describes only a few of them; all are counted."""
    with operation("store") as op:
        op.received(5000)
        for number in range(5000):
            op.failed({"payload": "PAYLOAD"}, ValueError(f"row {number}"))
    store = captured_telemetry.operation("store")
    events = [event for event in store.span.events if event.name == ITEM_FAILED]
    assert 1 <= len(events) <= 32
    assert len(store.span.events) == len(events)
    assert events[0].attributes["exception.type"] == "ValueError"
    assert events[0].attributes["exception.message"] == "row 0"
    assert op.items.failed == 5000
    assert captured_telemetry.metric(SETTLED, item_outcome="failed") == 5000


def test_failed_items_payload_never_reaches_the_span(captured_telemetry):
    """The content of a failed item is nowhere in the telemetry."""
    with operation("store") as op:
        op.failed("PAYLOAD-1", ValueError("bad row"))
        op.failed(["PAYLOAD-2"])
    assert "PAYLOAD" not in captured_telemetry.operation("store").span.to_json()
    assert op.items.failed == 2


# --- threads -------------------------------------------------------------------------------------


def test_counts_of_many_threads_are_exact(captured_telemetry):
    """Eight threads counting into one operation lose nothing, also when they count first."""
    with operation("store") as op:
        start = threading.Barrier(8)

        def work() -> None:
            start.wait()
            for _ in range(500):
                op.received(2)
                op.converted()
                op.ingested()
                op.skipped(reason="old")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert op.items == ItemAccount(received=8000, converted=4000, ingested=4000, skipped=4000)
    assert captured_telemetry.items() == op.items


STEP = st.tuples(
    st.sampled_from(["received", "converted", "ingested", "skipped", "failed"]),
    st.integers(0, 50),
    st.sampled_from([None, "no_content", "old", "", "[bold]"]),
)
PROGRAM = st.lists(st.lists(STEP, max_size=12), min_size=1, max_size=4)


def run_steps(op, steps) -> None:
    for what, count, reason in steps:
        if what == "failed":
            op.failed(None, ValueError("x") if reason else None, count=count)
        elif what == "skipped":
            op.skipped(count, reason=reason)
        else:
            getattr(op, what)(count)


@settings(max_examples=60, deadline=None)
@given(program=PROGRAM, fails=st.booleans())
def test_any_program_adds_up(program, fails):
    """Whatever several threads count, settled = received in the metrics and on the span.

    Only an excess breaks that, and then by as much as it says.
    """
    with capture_telemetry() as captured:
        with operation("store", feed="urlhaus") as op:
            threads = [threading.Thread(target=run_steps, args=(op, part)) for part in program]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if fails:
                op.fail("told")
        steps = [step for part in program for step in part]
        total = Counter()
        for what, count, _reason in steps:
            total[what] += count
        settled = total["ingested"] + total["skipped"] + total["failed"]
        known = any(what == "received" for what, _count, _reason in steps)
        received = total["received"] if known else settled
        expected = ItemAccount(
            received=received,
            converted=total["converted"],
            ingested=total["ingested"],
            skipped=total["skipped"],
            failed=total["failed"],
            unaccounted=max(0, received - settled),
            excess=max(0, settled - received),
        )
        assert op.items == expected
        assert captured.items() == expected
        assert captured.operation("store").items == expected
        assert captured.metric(SETTLED) == captured.metric(RECEIVED) + expected.excess
        partial = bool(expected.failed or expected.unaccounted)
        assert op.outcome == ("error" if fails else "partial" if partial else "ok")


@settings(max_examples=30, deadline=None)
@given(program=st.lists(st.lists(STEP, max_size=8), max_size=6))
def test_accounts_of_several_operations_add_up(program):
    """The metrics of one series are the sum of what its operations accounted for."""
    with capture_telemetry() as captured:
        accounts = []
        for steps in program:
            with operation("store") as op:
                run_steps(op, steps)
            accounts.append(op.items)
        total = captured.items()
        for field in ("received", "converted", "ingested", "skipped", "failed", "unaccounted"):
            assert getattr(total, field) == sum(getattr(one, field) for one in accounts)
        excess = sum(one.excess for one in accounts)
        assert captured.metric(SETTLED) == captured.metric(RECEIVED) + excess


# --- track ---------------------------------------------------------------------------------------


def numbers(count: int):
    yield from range(count)


async def numbers_async(count: int):
    for number in range(count):
        yield number


@pytest.mark.parametrize("make", [list, tuple, iter, set, dict.fromkeys, numbers])
def test_track_counts_what_it_hands_out(captured_telemetry, make):
    """`op.track` hands out every item of any iterable, and counts each as received."""
    source = make(7) if make is numbers else make(range(7))
    with operation("store") as op:
        assert sorted(op.track(source)) == list(range(7))
        op.ingested(7)
    assert captured_telemetry.items() == ItemAccount(received=7, ingested=7)


def test_track_counts_only_what_was_handed_out(captured_telemetry):
    """A loop that breaks off has received what it was given, and the source gave no more."""
    source = iter(range(100))
    with operation("store") as op:
        for item in op.track(source):
            if item == 4:
                break
            op.ingested()
    assert op.items == ItemAccount(received=5, ingested=4, unaccounted=1)
    assert next(source) == 5
    assert captured_telemetry.items() == op.items


def test_track_is_lazy(captured_telemetry):
    """Nothing is taken from the source before it is asked for."""
    taken = []

    def source():
        for number in range(3):
            taken.append(number)
            yield number

    with operation("store") as op:
        tracked = op.track(source())
        assert taken == []
        assert next(tracked) == 0
        assert taken == [0]
        tracked.close()
    assert op.items.received == 1


def test_track_passes_the_sources_exception_on(captured_telemetry):
    """An exception of the source passes; what came before it is counted."""

    def source():
        yield 1
        yield 2
        raise OSError("truncated")

    with pytest.raises(OSError, match="truncated"), operation("fetch") as op:
        op.ingested(len(list(op.track(source()))))
    assert captured_telemetry.operation("fetch").items == ItemAccount(received=2, unaccounted=2)


async def test_track_counts_async_iterables(captured_telemetry):
    """`op.track` of an async iterable is an async iterable that counts alike."""
    async with operation("fetch") as op:
        seen = [item async for item in op.track(numbers_async(9))]
        op.ingested(9)
    assert seen == list(range(9))
    assert captured_telemetry.items() == ItemAccount(received=9, ingested=9)


async def test_track_of_async_iterable_counts_what_was_handed_out(captured_telemetry):
    """An async loop that breaks off has received what it was given."""
    async with operation("fetch") as op:
        tracked = op.track(numbers_async(100))
        async for item in tracked:
            if item == 2:
                break
        await tracked.aclose()
    assert op.items.received == 3


def test_track_hands_out_the_very_items(captured_telemetry):
    """Tracked items are the same objects, None and exceptions included."""
    items = [None, StopIteration(), object(), [], 0]
    with operation("store") as op:
        handed = list(op.track(items))
    assert all(one is other for one, other in zip(handed, items, strict=True))
    assert op.items.received == 5


def test_track_refuses_what_is_not_iterable(captured_telemetry):
    """What cannot be iterated over raises the TypeError that `for` would raise."""
    with operation("store") as op, pytest.raises(TypeError, match="iterable"):
        list(op.track(3))


def test_two_tracks_add_up(captured_telemetry):
    """Tracks in one operation, nested or one after the other, count together."""
    with operation("store") as op:
        for _page in op.track([1, 2]):
            assert list(op.track("abc")) == ["a", "b", "c"]
    assert op.items.received == 8
