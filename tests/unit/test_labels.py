"""The contracts of bounded label sets: nothing is lost, and no instrument grows without end."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from periscope_otel import operation
from periscope_otel.telemetry.current import current, telemetry_on
from periscope_otel.testing import CapturedTelemetry

DURATION = "threat.ingest.operation.duration"
ACTIVE = "threat.ingest.operation.active"
RECEIVED = "threat.ingest.items.received"
SETTLED = "threat.ingest.items.settled"
OPERATION, FEED = "threat.ingest.operation.name", "threat.feed.name"
OUTCOME, ERROR_TYPE = "threat.ingest.outcome", "error.type"
REASON = "threat.ingest.skip.reason"
SDK_LIMIT = 2000
"""Label sets from which on the SDK collects what comes in a point without any label."""


class limited:  # noqa: N801  (reads like the function it stands for)
    """Telemetry of its own with a limit of label sets, captured."""

    def __init__(self, limit: int) -> None:
        exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(exporter))
        self.meters = MeterProvider([reader], shutdown_on_exit=False)
        self.captured = CapturedTelemetry(exporter, reader)
        self.limit = limit

    def __enter__(self) -> CapturedTelemetry:
        self.before = current.telemetry
        current.telemetry = telemetry_on(self.tracers, self.meters, label_limit=self.limit)
        return self.captured

    def __exit__(self, *_: object) -> None:
        current.telemetry = self.before
        self.tracers.shutdown()
        self.meters.shutdown()


def fail(name: str, feed: str | None, kind: str) -> None:
    error = type(kind, (Exception,), {})
    with pytest.raises(error), operation(name, feed=feed):
        raise error


def values(captured: CapturedTelemetry, metric: str, label: str) -> Counter[str | None]:
    return Counter(one.get(label) for one in captured.label_sets(metric))


def test_error_type_becomes_other_first():
    """Beyond the limit it is the error type that becomes `other`; operation and feed stay."""
    with limited(4) as captured:
        for number in range(10):
            fail("fetch", "urlhaus", f"Error{number}")
        kept = set(values(captured, DURATION, ERROR_TYPE)) - {"other"}
        assert len(kept) == 4
        assert all(captured.metric(DURATION, error_type=one) == 1 for one in kept)
        assert set(values(captured, DURATION, FEED)) == {"urlhaus"}
        assert captured.metric(DURATION, error_type="other") == 6
        assert captured.metric(DURATION) == 10


def test_skip_reason_becomes_other_first():
    """Beyond the limit the skip reason becomes `other`; operation, feed and outcome stay."""
    with limited(4) as captured:
        with operation("store", feed="misp") as op:
            op.received(10)
            for number in range(10):
                op.skipped(reason=f"reason{number}")
        assert captured.metric(SETTLED, reason="other") == 6
        assert captured.metric(SETTLED, item_outcome="skipped", feed_name="misp") == 10
        assert captured.items().received == captured.items().skipped == 10


def test_feed_becomes_other_next():
    """With the limit used up by feeds, a further feed becomes `other`; the operation stays."""
    with limited(3) as captured:
        for number in range(8):
            with operation("fetch", feed=f"feed{number}") as op:
                op.ingested(2)
        for metric in (DURATION, RECEIVED, SETTLED, ACTIVE):
            assert set(values(captured, metric, OPERATION)) == {"fetch"}
            assert set(values(captured, metric, FEED)) == {"feed0", "feed1", "feed2", "other"}
        assert captured.metric(DURATION, feed_name="other") == 5
        assert captured.metric(RECEIVED, feed_name="other") == 10
        assert captured.metric(DURATION) == 8
        assert captured.metric(SETTLED) == captured.metric(RECEIVED) == 16


def test_known_label_sets_stay_exact_beyond_the_limit():
    """A label set that was there before the limit was reached goes on counting."""
    with limited(3) as captured:
        for _ in range(3):
            for number in range(9):
                with operation("fetch", feed=f"feed{number}"):
                    pass
        for number in range(3):
            assert captured.metric(DURATION, feed_name=f"feed{number}") == 3
        assert captured.metric(DURATION) == 27


def test_operation_without_a_feed_beyond_the_limit():
    """Operations without a feed are bounded alike, and all are counted."""
    with limited(3) as captured:
        for number in range(2000):
            with operation(f"operation{number}"):
                pass
        assert len(captured.label_sets(DURATION)) < SDK_LIMIT
        assert captured.metric(DURATION) == 2000


def test_spans_keep_their_own_values():
    """Where the metrics say `other`, the span still has its operation, feed and error type."""
    with limited(1) as captured:
        for number in range(4):
            fail("fetch", f"feed{number}", f"Error{number}")
        spans = captured.operations("fetch")
        assert [one.feed for one in spans] == [f"feed{number}" for number in range(4)]
        assert [one.error_type for one in spans] == [f"Error{number}" for number in range(4)]
        assert captured.metric(DURATION, feed_name="other") == 3


def test_limit_is_warned_about_once(caplog):
    """Reaching the limit is one log line, however often it happens."""
    with caplog.at_level(logging.WARNING, "periscope_otel"), limited(2) as captured:
        for number in range(50):
            fail("fetch", f"feed{number}", f"Error{number}")
        captured.metric(DURATION)
        with operation("store") as op:
            for number in range(50):
                op.skipped(reason=f"reason{number}")
    assert len(caplog.records) == 1
    assert "other" in caplog.text


def test_no_warning_below_the_limit(caplog):
    """As long as the limit is not exceeded nothing is said and nothing becomes `other`."""
    with caplog.at_level(logging.WARNING, "periscope_otel"), limited(5) as captured:
        for number in range(5):
            with operation("fetch", feed=f"feed{number}"):
                pass
        assert "other" not in values(captured, DURATION, FEED)
    assert caplog.records == []


def test_feed_called_other_is_no_harm():
    """A feed that the user has named `other` shares that label set; nothing is lost."""
    with limited(2) as captured:
        for feed in ("other", "a", "b", "c", "other"):
            with operation("other", feed=feed):
                pass
        assert captured.metric(DURATION) == 5
        assert captured.metric(DURATION, feed_name="other") == 4


def test_active_is_zero_after_the_end_and_exact_meanwhile():
    """A series is 1 while its operation runs and 0 after, also those that share `other`."""
    with limited(2) as captured:
        blocks = [operation("fetch", feed=f"feed{number}") for number in range(5)]
        for block in blocks:
            block.__enter__()
        assert captured.metric(ACTIVE) == 5
        assert captured.metric(ACTIVE, feed_name="other") == 3
        for block in reversed(blocks):
            block.__exit__(None, None, None)
        assert captured.metric(ACTIVE) == 0
        assert len(captured.label_sets(ACTIVE)) == 3


METRICS = (DURATION, ACTIVE, RECEIVED, SETTLED, "threat.ingest.items.converted")


def assert_bounded(captured: CapturedTelemetry) -> None:
    for metric in (
        *METRICS,
        "threat.ingest.feed.last_success.time",
        "threat.ingest.feed.last_item.time",
    ):
        label_sets = captured.label_sets(metric)
        assert len(label_sets) < SDK_LIMIT, metric
        assert not any("otel.metric.overflow" in one for one in label_sets), metric
        assert len({tuple(sorted(one.items())) for one in label_sets}) == len(label_sets), metric


@pytest.mark.parametrize("what", ["feeds", "operations", "both"])
def test_6000_distinct_names_stay_below_the_sdks_limit(captured_telemetry, what):
    """Whatever is named after an item, no instrument reaches the SDK's limit; totals are exact."""
    for number in range(6_000):
        name = "fetch" if what == "feeds" else f"fetch{number}"
        feed = "urlhaus" if what == "operations" else f"feed{number}"
        with operation(name, feed=feed) as op:
            op.received(3)
            op.converted()
            op.ingested(1)
            op.skipped(1, reason=f"reason{number}")
    assert_bounded(captured_telemetry)
    assert captured_telemetry.metric(DURATION) == 6_000
    items = captured_telemetry.items()
    assert items.received == 18_000
    assert items.ingested == items.skipped == items.unaccounted == items.converted == 6_000


def test_5000_error_types_stay_below_the_sdks_limit(captured_telemetry):
    """Error types without number, over a hundred feeds, are bounded; each feed stays exact."""
    for number in range(5_000):
        with operation("fetch", feed=f"feed{number % 100}") as op:
            op.fail(type(f"Error{number}", (Exception,), {})())
    assert_bounded(captured_telemetry)
    assert captured_telemetry.metric(DURATION, outcome="error") == 5_000
    for number in (0, 50, 99):
        assert captured_telemetry.metric(DURATION, feed_name=f"feed{number}") == 50


def test_threads_that_reach_the_limit_together_lose_nothing():
    """Eight threads that use up the limit at the same time stay within it, with exact totals."""
    with limited(50) as captured:
        start = threading.Barrier(8)

        def work(number: int) -> None:
            start.wait()
            for turn in range(100):
                with operation("fetch", feed=f"feed{number}.{turn}") as op:
                    op.ingested(1)
                    op.skipped(1, reason=f"reason{turn}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_bounded(captured)
        assert captured.metric(DURATION) == 800
        assert captured.items().received == 1600
        assert captured.metric(ACTIVE) == 0


CALL = st.tuples(
    st.sampled_from(["fetch", "parse", "store", "other"]),
    st.sampled_from([None, "urlhaus", "misp", "otx", "other"]),
    st.sampled_from(["ok", "KeyError", "ValueError", "TimeoutError", "E1", "E2", "E3"]),
)


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 12), calls=st.lists(CALL, max_size=40))
def test_totals_are_exact_at_any_limit(limit, calls):
    """At any limit every call is counted once, under its own outcome, and below the SDK's limit."""
    with limited(limit) as captured:
        for name, feed, kind in calls:
            if kind == "ok":
                with operation(name, feed=feed):
                    pass
            else:
                fail(name, feed, kind)
        assert captured.metric(DURATION) == len(calls)
        oks = sum(kind == "ok" for _, _, kind in calls)
        assert captured.metric(DURATION, outcome="ok") == oks
        for one in captured.label_sets(DURATION):
            assert (one[OUTCOME] == "ok") == (ERROR_TYPE not in one)
        assert_bounded(captured)
