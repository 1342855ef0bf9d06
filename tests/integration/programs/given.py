"""Use the application's own providers, given to configure() or set globally."""

import json
import sys

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import periscope_otel as periscope

calls = []


class Tracers(TracerProvider):
    def force_flush(self, *args, **kwargs):
        calls.append("flush traces")
        return super().force_flush(*args, **kwargs)

    def shutdown(self, *args, **kwargs):
        calls.append("shutdown traces")
        return super().shutdown(*args, **kwargs)


class Meters(MeterProvider):
    def force_flush(self, *args, **kwargs):
        calls.append("flush metrics")
        return super().force_flush(*args, **kwargs)

    def shutdown(self, *args, **kwargs):
        calls.append("shutdown metrics")
        return super().shutdown(*args, **kwargs)


def count():
    data = reader.get_metrics_data()
    return sum(
        point.count
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "threat.ingest.operation.duration"
        for point in metric.data.data_points
    )


exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
tracers = Tracers(shutdown_on_exit=False)
tracers.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=600_000))
meters = Meters([reader], shutdown_on_exit=False)
if sys.argv[1] == "given":
    periscope.configure(tracer_provider=tracers, meter_provider=meters)
else:
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(meters)
    periscope.configure()
globals_kept = [
    trace.get_tracer_provider() is tracers,
    metrics.get_meter_provider() is meters,
]
for _ in range(5):
    with periscope.operation("work"):
        pass
before = len(exporter.get_finished_spans())
periscope.shutdown()
spans, counted = len(exporter.get_finished_spans()), count()
with tracers.get_tracer("app").start_as_current_span("later"):
    pass
seen = list(calls)
tracers.force_flush()
print(
    json.dumps(
        {
            "globals": globals_kept,
            "calls": sorted(set(seen)),
            "before": before,
            "spans": spans,
            "count": counted,
            "later": len(exporter.get_finished_spans()) - spans,
        }
    )
)
