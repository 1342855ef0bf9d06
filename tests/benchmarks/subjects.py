"""The calls that are compared: ours, and the same telemetry written by hand.

Each subject has providers of its own: a TracerProvider with a batch processor to an exporter that
throws everything away, and a MeterProvider with one reader, collected once a round. The function
that is called does nothing, so that only the instrumentation is measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from harness import Subject
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler

from periscope_otel import monitored
from periscope_otel.telemetry import names
from periscope_otel.telemetry.current import Telemetry, current, telemetry_on
from periscope_otel.telemetry.export import CountedSpanProcessor, ExportAccount
from periscope_otel.telemetry.worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.metrics import Histogram, Meter

OPERATION, FEED, BREAKER = "store", "urlhaus", "urlhaus.abuse.ch"

SPAN_ATTRIBUTES = {
    names.OPERATION_NAME: OPERATION,
    names.FEED_NAME: FEED,
    names.BREAKER_NAME: BREAKER,
    names.OUTCOME: "ok",
}
"""The four attributes that the span of a successful call has, ours and the hand-written."""

OUR_LABELS = {names.OPERATION_NAME: OPERATION, names.FEED_NAME: FEED, names.OUTCOME: "ok"}
"""What our metrics say of a successful call: `error.type` is not set on success."""

FOUR_LABELS = {**OUR_LABELS, names.ERROR_TYPE: ""}
"""The hand-written labels: code by hand has one label dict, and error.type is one of its four."""


class NullExporter(SpanExporter):
    """Throws spans away, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.count += len(spans)
        return SpanExportResult.SUCCESS


class Pipeline:
    """Providers whose telemetry goes nowhere, and how to wait until it is there.

    Args:
        sampler: Decides what is recorded; everything by default.
        counted: Export with the processor that `configure()` builds instead of the SDK's own.
    """

    def __init__(self, sampler: Sampler = ALWAYS_ON, *, counted: bool = False) -> None:
        self.exporter = NullExporter()
        self.reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(sampler=sampler)
        self._processor = (
            CountedSpanProcessor(lambda: self.exporter, ExportAccount("spans", "nowhere"))
            if counted
            else BatchSpanProcessor(self.exporter)
        )
        self.tracer_provider.add_span_processor(self._processor)
        self.meter_provider = MeterProvider(metric_readers=[self.reader])

    def drain(self) -> None:
        """Export every span and collect every metric."""
        self._processor.force_flush()
        self.reader.get_metrics_data()

    def points(self, metric_name: str) -> int:
        """Return how many label sets a metric has."""
        data = self.reader.get_metrics_data()
        return sum(
            len(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == metric_name
        )


def use(telemetry: Telemetry | None) -> Callable[[], None]:
    """Return what makes `telemetry` the one in use, as `configure()` does."""

    def switch() -> None:
        current.telemetry = telemetry
        worker.start()

    return switch


def telemetry_of(pipeline: Pipeline) -> Telemetry:
    """Return what `configure()` makes of a pair of given providers."""
    return telemetry_on(pipeline.tracer_provider, pipeline.meter_provider)


def drain_ours(pipeline: Pipeline) -> Callable[[], None]:
    """Return what waits for the worker too: it feeds the histogram in batches."""

    def drain() -> None:
        worker.finish_posted(60)
        pipeline.drain()

    return drain


@monitored(OPERATION, feed=FEED, attributes={names.BREAKER_NAME: BREAKER})
def monitored_function() -> None:
    """Do nothing, monitored."""


def ours(sampler: Sampler = ALWAYS_ON, *, counted: bool = False) -> Subject:
    """Return a call of a monitored function."""
    pipeline = Pipeline(sampler, counted=counted)
    switch = use(telemetry_of(pipeline))
    return Subject(monitored_function, drain_ours(pipeline), switch)


def duration_histogram(meter: Meter) -> Histogram:
    """Make the histogram that we make, buckets and all."""
    return meter.create_histogram(
        names.DURATION.name,
        names.DURATION.unit,
        names.DURATION.description,
        explicit_bucket_boundaries_advisory=names.DURATION_BOUNDARIES,
    )


def hand_written(labels: dict[str, str]) -> Subject:
    """Return the same telemetry in the usual way; metrics in the span, so with exemplars."""
    pipeline = Pipeline()
    tracer = pipeline.tracer_provider.get_tracer("by hand")
    meter = pipeline.meter_provider.get_meter("by hand")
    counter, histogram = meter.create_counter("calls"), duration_histogram(meter)

    def call() -> None:
        started = time.perf_counter()
        with tracer.start_as_current_span(OPERATION) as span:
            span.set_attribute(names.OPERATION_NAME, OPERATION)
            span.set_attribute(names.FEED_NAME, FEED)
            span.set_attribute(names.BREAKER_NAME, BREAKER)
            span.set_attribute(names.OUTCOME, "ok")
            counter.add(1, labels)
            histogram.record(time.perf_counter() - started, labels)

    return Subject(call, pipeline.drain)
