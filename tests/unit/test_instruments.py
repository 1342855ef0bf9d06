"""The contracts of the metric instruments: exact, complete, with exemplars, for every reader."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, Self

import pytest
from opentelemetry.sdk.metrics import (
    Counter,
    Histogram,
    MeterProvider,
    ObservableCounter,
    ObservableUpDownCounter,
    UpDownCounter,
)
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

import periscope_otel
from periscope_otel import guard, monitored, operation
from periscope_otel.resilience.retry import Retry
from periscope_otel.telemetry import instruments as instruments_module
from periscope_otel.telemetry import names
from periscope_otel.telemetry.current import Telemetry, current, telemetry_on
from periscope_otel.telemetry.worker import Worker, worker
from periscope_otel.testing import capture_telemetry

DURATION = "threat.ingest.operation.duration"
ACTIVE = "threat.ingest.operation.active"
LAST_SUCCESS = "threat.ingest.feed.last_success.time"
LAST_ITEM = "threat.ingest.feed.last_item.time"

DELTA = dict.fromkeys(
    (Counter, UpDownCounter, Histogram, ObservableCounter, ObservableUpDownCounter),
    sdk.AggregationTemporality.DELTA,
)


class Wired:
    """Telemetry on providers of its own, with as many metric readers as are given."""

    def __init__(self, *readers: sdk.InMemoryMetricReader, sampler: Any = ALWAYS_ON) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider(readers, shutdown_on_exit=False)
        self.telemetry: Telemetry = telemetry_on(self.tracers, self.meters)

    def __enter__(self) -> Self:
        self.before = current.telemetry
        current.telemetry = self.telemetry
        return self

    def __exit__(self, *_: object) -> None:
        current.telemetry = self.before
        self.tracers.shutdown()
        self.meters.shutdown()


def collect(reader: sdk.InMemoryMetricReader) -> dict[str, sdk.Metric]:
    data = reader.get_metrics_data()
    return {
        metric.name: metric
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def points(reader: sdk.InMemoryMetricReader, name: str) -> list[Any]:
    metric = collect(reader).get(name)
    return [] if metric is None else list(metric.data.data_points)


def total(found: list[Any]) -> int:
    return sum(point.count if hasattr(point, "count") else point.value for point in found)


# --- what there is -------------------------------------------------------------------------------

COUNTER = (sdk.Sum, True)
UP_DOWN = (sdk.Sum, False)
GAUGE = (sdk.Gauge, None)
OPERATION_LABELS = {"threat.ingest.operation.name", "threat.feed.name"}

TABLE = {
    DURATION: (
        (sdk.Histogram, None),
        "s",
        OPERATION_LABELS | {"threat.ingest.outcome", "error.type"},
    ),
    ACTIVE: (UP_DOWN, "{operation}", OPERATION_LABELS),
    "threat.ingest.operation.retries": (COUNTER, "{retry}", OPERATION_LABELS | {"error.type"}),
    "threat.ingest.items.received": (COUNTER, "{item}", OPERATION_LABELS),
    "threat.ingest.items.converted": (COUNTER, "{item}", OPERATION_LABELS),
    "threat.ingest.items.settled": (
        COUNTER,
        "{item}",
        OPERATION_LABELS | {"threat.ingest.item.outcome", "threat.ingest.skip.reason"},
    ),
    LAST_SUCCESS: (GAUGE, "s", {"threat.feed.name"}),
    LAST_ITEM: (GAUGE, "s", {"threat.feed.name"}),
    "periscope.internal_errors": (COUNTER, "{error}", {"periscope.component"}),
    "circuit_breaker.state": (GAUGE, "1", {"circuit_breaker.name", "circuit_breaker.state"}),
    "circuit_breaker.transitions": (
        COUNTER,
        "{transition}",
        {"circuit_breaker.name", "circuit_breaker.from_state", "circuit_breaker.to_state"},
    ),
    "circuit_breaker.calls": (
        COUNTER,
        "{call}",
        {"circuit_breaker.name", "circuit_breaker.call.outcome"},
    ),
    "circuit_breaker.rejections": (COUNTER, "{call}", {"circuit_breaker.name"}),
}


def everything() -> dict[str, sdk.Metric]:
    """Collect after a call of every kind."""
    guard.set_strict(False)
    guard.report("a test", ValueError("made up"))
    reader = sdk.InMemoryMetricReader()
    with Wired(reader):
        with operation("store", feed="urlhaus") as op:
            op.received(6)
            op.converted(5)
            op.ingested(1)
            op.skipped(1, reason="no_content")
            op.failed(count=1)
            for attempt in Retry(base=0):
                with attempt:
                    if attempt.number == 1:
                        raise ConnectionError
        with pytest.raises(ValueError, match="x"), operation("store", feed="urlhaus"):
            raise ValueError("x")
        breaker = tried_again_until_its_breaker_opens()
        assert breaker.state == "open"
        return collect(reader)


def tried_again_until_its_breaker_opens() -> periscope_otel.Breaker:
    """Make a call that fails, is retried, and opens a breaker that rejects the next."""
    breaker = periscope_otel.Breaker("example", consecutive_failures=2)

    @periscope_otel.monitored(
        "fetch",
        feed="urlhaus",
        breaker=breaker,
        retry=periscope_otel.Retry(attempts=2, base=0.0),
    )
    def fetch() -> None:
        raise ConnectionError

    for error in (ConnectionError, periscope_otel.CircuitOpenError):
        with pytest.raises(error):
            fetch()
    worker.finish_posted(30)
    return breaker


@pytest.mark.parametrize("name", TABLE)
def test_instrument_is_as_designed(name):
    """Each instrument has the kind, unit and attributes of the design, and a description."""
    (data, monotonic), unit, labels = TABLE[name]
    metric = everything()[name]
    assert isinstance(metric.data, data)
    assert getattr(metric.data, "is_monotonic", None) is monotonic
    assert metric.unit == unit
    assert metric.description.endswith(".")
    seen = {label for point in metric.data.data_points for label in point.attributes}
    assert seen == labels


def test_nothing_else_is_emitted():
    """The instruments of the design are all there are, in one scope with a schema URL."""
    guard.set_strict(False)
    guard.report("a test", ValueError("made up"))
    assert set(everything()) == set(TABLE)
    reader = sdk.InMemoryMetricReader()
    with Wired(reader) as wired:
        with operation("store"):
            pass
        (resource,) = reader.get_metrics_data().resource_metrics
        (scope,) = resource.scope_metrics
        (span,) = wired.exporter.get_finished_spans()
    for emitted in (scope.scope, span.instrumentation_scope):
        assert emitted.name == "periscope_otel"
        assert emitted.version
        assert emitted.schema_url.startswith("https://opentelemetry.io/schemas/1.")


def test_table_of_names_has_these_and_no_other_unit():
    """The one table of names agrees with what is emitted."""
    table = [value for value in vars(names).values() if isinstance(value, names.Metric)]
    for name, (_, unit, _labels) in TABLE.items():
        assert [one.unit for one in table if one.name == name] == [unit]
    assert len({one.name for one in table}) == len(table)


def test_histogram_bounds_suit_an_ingest():
    """The duration's buckets reach from 1 ms to 10 min, and are floats."""
    (point,) = [
        one
        for one in everything()[DURATION].data.data_points
        if one.attributes["threat.ingest.outcome"] == "partial"
    ]
    assert tuple(point.explicit_bounds) == names.DURATION_BOUNDARIES
    assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (0.001, 600.0)
    assert all(type(bound) is float for bound in point.explicit_bounds)
    assert list(point.explicit_bounds) == sorted(point.explicit_bounds)


# --- exactness -----------------------------------------------------------------------------------


def test_counts_of_50_threads_are_exact(captured_telemetry):
    """50 threads of 2,000 calls are 100,000 counts and spans, and nothing is active afterwards."""

    @monitored("fetch", feed="urlhaus")
    def fetch(number: int) -> None:
        if number % 20 == 0:
            raise LookupError

    def work() -> None:
        for number in range(2000):
            with contextlib.suppress(LookupError):
                fetch(number)

    threads = [threading.Thread(target=work) for _ in range(50)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert 0 <= captured_telemetry.metric(ACTIVE) <= 50
        threads[0].join(1)
    for thread in threads:
        thread.join()
    assert captured_telemetry.metric(DURATION, outcome="ok") == 95_000
    assert captured_telemetry.metric(DURATION, outcome="error") == 5_000
    assert captured_telemetry.metric(ACTIVE) == 0
    assert len(captured_telemetry.spans) == 100_000


async def test_counts_of_2000_tasks_are_exact(captured_telemetry):
    """2,000 tasks at the same time are 2,000 counts, 2,000 active meanwhile and 0 afterwards."""
    begun: list[int] = []
    all_begun, go = asyncio.Event(), asyncio.Event()

    @monitored("fetch", feed="urlhaus")
    async def fetch(number: int) -> None:
        begun.append(number)
        if len(begun) == 2000:
            all_begun.set()
        await go.wait()

    tasks = [asyncio.create_task(fetch(number)) for number in range(2000)]
    await all_begun.wait()
    assert captured_telemetry.metric(ACTIVE, feed_name="urlhaus") == 2000
    assert captured_telemetry.metric(DURATION) == 0
    for task in tasks[:500]:
        task.cancel()
    go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert captured_telemetry.metric(DURATION, outcome="ok") == 1500
    assert captured_telemetry.metric(DURATION, outcome="cancelled") == 500
    assert captured_telemetry.metric(ACTIVE) == 0


def test_pending_is_bounded_and_nothing_is_lost(monkeypatch):
    """Without anybody who drains, what waits is bounded; what finds it full is recorded at once."""
    monkeypatch.setattr(instruments_module, "worker", Worker())  # never started
    calls = instruments_module.PENDING_LIMIT * 3
    reader = sdk.InMemoryMetricReader()
    with Wired(reader) as wired:
        for _ in range(calls):
            with operation("store"):
                pass
        assert len(wired.telemetry.instruments.pending) <= instruments_module.PENDING_LIMIT
        assert total(points(reader, DURATION)) == calls
        assert len(wired.telemetry.instruments.pending) == 0


def test_drain_puts_durations_into_the_histogram():
    """The drain alone, without a collect, empties what waits; a second one finds nothing."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader) as wired:
        for _ in range(5):
            with operation("store"):
                pass
        heard: list[object] = []
        end = wired.telemetry.instruments.listen(heard.append)
        wired.telemetry.instruments.drain()
        wired.telemetry.instruments.drain()
        assert len(heard) == 5
        end()
        with operation("store"):
            pass
        wired.telemetry.instruments.drain()
        assert len(heard) == 5
        assert total(points(reader, DURATION)) == 6


def test_durations_are_those_of_the_clock():
    """Each duration falls into its bucket, and their sum is exact."""
    now = 0.0
    with capture_telemetry(clock=lambda: now) as captured:
        for seconds in (0.0, 0.001, 0.002, 45.0, 700.0):
            with operation("store"):
                now += seconds
        (metric,) = [one for one in captured._metrics() if one.name == DURATION]
    (point,) = metric.data.data_points
    assert point.sum == pytest.approx(745.003)
    assert (point.count, point.min, point.max) == (5, 0.0, 700.0)
    assert point.bucket_counts[0] == 2  # 0 and 1 ms
    assert point.bucket_counts[-1] == 1  # over 10 min


# --- readers -------------------------------------------------------------------------------------


def test_two_readers_agree():
    """Two readers, one cumulative and one delta, both have each call exactly once."""
    cumulative = sdk.InMemoryMetricReader()
    delta = sdk.InMemoryMetricReader(preferred_temporality=DELTA)
    with Wired(cumulative, delta):
        by_delta = 0
        for _ in range(10):
            for _ in range(7):
                with operation("store", feed="misp") as op:
                    op.ingested(2)
            by_delta += total(points(delta, DURATION))
            assert total(points(cumulative, DURATION)) == by_delta
        assert by_delta == 70
        assert total(points(delta, DURATION)) == 0
        assert total(points(cumulative, "threat.ingest.items.received")) == 140


def test_delta_reader_gets_each_call_once_while_threads_record():
    """A delta reader that collects all the time while threads record sees each call once."""
    delta = sdk.InMemoryMetricReader(preferred_temporality=DELTA)
    with Wired(delta):
        seen = {"calls": 0, "items": 0}

        def look() -> None:
            found = collect(delta)
            for key, name in (("calls", DURATION), ("items", "threat.ingest.items.settled")):
                if name in found:
                    seen[key] += total(found[name].data.data_points)

        def work() -> None:
            for _ in range(1000):
                with operation("store", feed="misp") as op:
                    op.ingested(3)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            look()
        for thread in threads:
            thread.join()
        look()
    assert seen == {"calls": 4000, "items": 12_000}


# --- exemplars -----------------------------------------------------------------------------------


def test_exemplars_carry_the_sampled_span():
    """Though drained later, outside of the span, the duration has its span as exemplar."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader) as wired:
        with operation("store"):
            pass
        (point,) = points(reader, DURATION)
        (span,) = wired.exporter.get_finished_spans()
    (exemplar,) = point.exemplars
    assert (exemplar.span_id, exemplar.trace_id) == (span.context.span_id, span.context.trace_id)
    assert exemplar.value == point.sum


def test_exemplar_is_the_operations_own_span_when_collected_inside_another():
    """A collect inside some other span does not lend that span to what it drains."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader) as wired:
        with operation("store"):
            pass
        with operation("other"):
            found = points(reader, DURATION)
        spans = {span.name: span.context.span_id for span in wired.exporter.get_finished_spans()}
    assert [one.span_id for point in found for one in point.exemplars] == [spans["store"]]


def test_unsampled_operations_leave_no_exemplar():
    """An operation whose span is not sampled is counted without an exemplar."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader, sampler=ALWAYS_OFF):
        with operation("store"):
            pass
        (point,) = points(reader, DURATION)
    assert point.count == 1
    assert list(point.exemplars) == []


# --- last success, last item ---------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, which nobody sets meanwhile: it goes on by a second with each look."""
    now = [1_760_000_000.0]

    def look() -> float:
        now[0] += 1.0
        return now[0]

    for module in (instruments_module, sys.modules["periscope_otel.operation"]):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=look, time_ns=time.time_ns))
    return now


def value_of(reader: sdk.InMemoryMetricReader, name: str) -> dict[str, float]:
    return {one.attributes["threat.feed.name"]: one.value for one in points(reader, name)}


def test_last_success_is_set_by_ok_and_partial_only(clock):
    """The time of the last success is that of an ok or partial end, of no other."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader):
        for error in (ValueError, TimeoutError, asyncio.CancelledError):
            with pytest.raises(error), operation("fetch", feed="failing"):
                raise error
        before = clock[0]
        with operation("fetch", feed="good"):
            pass
        with operation("fetch", feed="partly") as op:
            op.failed(count=1)
        after = clock[0]
        found = value_of(reader, LAST_SUCCESS)
    assert set(found) == {"good", "partly"}
    assert all(before < at <= after for at in found.values())


def test_last_item_needs_an_item(clock):
    """A success without a record moves the last success and leaves the last item where it was."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader):
        with operation("fetch", feed="misp") as op:
            op.received(1)
            op.ingested(1)
        first = value_of(reader, LAST_ITEM)["misp"]
        success = value_of(reader, LAST_SUCCESS)["misp"]
        with operation("fetch", feed="misp") as op:
            op.received(0)
        with operation("fetch", feed="silent"):
            pass
        assert value_of(reader, LAST_ITEM) == {"misp": first}
        assert value_of(reader, LAST_SUCCESS)["misp"] > success
        assert "silent" in value_of(reader, LAST_SUCCESS)


def test_times_are_one_series_a_feed(clock):
    """Several operations of one feed share its times: the latest counts; no feed, no series."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader):
        for name in ("fetch", "parse", "store"):
            with operation(name, feed="misp") as op:
                op.ingested(1)
        with operation("store") as op:
            op.ingested(1)
        latest = clock[0]
        for name in (LAST_SUCCESS, LAST_ITEM):
            (point,) = points(reader, name)
            assert dict(point.attributes) == {"threat.feed.name": "misp"}
            assert latest - 60 < point.value <= latest


def test_known_series_without_calls_stay_at_zero_active():
    """A series that has been active is reported as 0 by every later collect."""
    reader = sdk.InMemoryMetricReader()
    with Wired(reader):
        with operation("store", feed="misp"):
            assert total(points(reader, ACTIVE)) == 1
        for _ in range(3):
            (point,) = points(reader, ACTIVE)
            assert point.value == 0
