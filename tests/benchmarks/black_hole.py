"""Whether a Collector that accepts and never answers slows the callers down.

The p99 of a call's wall time in a process configured with OTLP over HTTP to such a Collector,
divided by the p99 in a process whose equal pipeline exports to nowhere. Both processes take turns
in random order; a round is a burst of `--calls` calls. The first rounds fill the queue, so what
is measured is the state that an outage settles in: full queue, new spans counted as dropped, and
an exporter that waits. At the end `shutdown()` of the process with the black hole is timed; its
bound is the default of 5 s, give or take a quarter for saying what was lost.

Not measured: gRPC; a Collector that is slow rather than silent; calls paced like real traffic.
"""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from harness import Sample, arguments, here, interleave, ratio, spread, start_report
from hosts import Host, serve
from subjects import NullExporter, monitored_function

import periscope_otel as periscope

if TYPE_CHECKING:
    from collections.abc import Callable

    from periscope_otel.runtime import Runtime

BOUND = 5.0
GRACE = 0.25
BLACK_HOLE, NULL = "black hole", "null exporter"


def listen() -> socket.socket:
    """Accept connections and never answer."""
    server = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            held.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    return server


def configure(endpoint: str) -> Runtime:
    """Configure for the endpoint, or the same parts with exporters to nowhere."""
    if endpoint != "nowhere":
        return periscope.configure(service_name="benchmark", otlp_endpoint=endpoint)
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult

    from periscope_otel.telemetry import pipeline

    class NullMetrics(MetricExporter):
        def export(self, *_args: Any, **_kwargs: Any) -> MetricExportResult:
            return MetricExportResult.SUCCESS

        def force_flush(self, timeout_millis: float = 0) -> bool:
            return True

        def shutdown(self, timeout_millis: float = 0, **_kwargs: Any) -> None:
            pass

    nowhere = pipeline.Destination("nowhere", NullExporter)
    resource = pipeline.resource_of("benchmark")
    readers = pipeline.metric_readers([pipeline.Destination("nowhere", NullMetrics)])
    return periscope.configure(
        tracer_provider=pipeline.build_tracer_provider(
            resource, pipeline.span_processors([nowhere])
        ),
        meter_provider=pipeline.build_meter_provider(resource, readers),
    )


def call_times(calls: int) -> Sample:
    """Time each call by itself; returns quantiles in seconds."""
    gc.collect()
    clock, taken = time.perf_counter, []
    for _ in range(calls):
        started = clock()
        monitored_function()
        taken.append(clock() - started)
    taken.sort()
    return {"p50": taken[calls // 2], "p99": taken[calls * 99 // 100], "max": taken[-1]}


def make() -> dict[str, Callable[[int], Sample]]:
    """Configure a host's process; returns what it measures."""
    runtime = configure(sys.argv[2])

    def shutdown(_calls: int) -> Sample:
        started = time.perf_counter()
        runtime.shutdown()
        return {"seconds": time.perf_counter() - started}

    return {"calls": call_times, "shutdown": shutdown}


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, rounds=60, calls=2_000)
    report = start_report(__doc__, options)
    server = listen()
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    script = here() / "black_hole.py"
    with Host(script, "--host", endpoint) as hole, Host(script, "--host", "nowhere") as null:
        rounds = interleave(
            {BLACK_HOLE: hole.subject("calls"), NULL: null.subject("calls")},
            options.rounds,
            options.calls,
        )
        seconds = hole.ask("shutdown", 0)["seconds"]
    report.measures = [
        ratio("p99 with a black hole ÷ with a null exporter", rounds, BLACK_HOLE, NULL, "p99", 1.1),
        ratio("p50 with a black hole ÷ with a null exporter", rounds, BLACK_HOLE, NULL, "p50"),
        spread("shutdown() with a black hole", [seconds], BOUND + GRACE, " s"),
    ]
    for name, samples in rounds.items():
        for figure in ("p50", "p99", "max"):
            of_it = spread(figure, [sample[figure] * 1e6 for sample in samples])
            report.indications.append(f"{name}, {figure}: {of_it.median:.3g} µs")
    report.publish(options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--host"]:
        serve(make)
    else:
        main()
