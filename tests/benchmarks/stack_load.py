"""The load of `stack.py`: a process that makes spans at a pace and says what became of them.

python stack_load.py ENDPOINT PROTOCOL SPANS_A_SECOND SECONDS
"""

from __future__ import annotations

import json
import sys
import time

from opentelemetry import trace

import periscope_otel as periscope

SPANS = 100
"""Of one trace: a pull and 99 items that it stores."""

WARM_UP = 20
"""Traces before the measurement, so that imports and connections are made."""


@periscope.monitored("store")
def store(item: int) -> int:
    """Stand for what a real one does."""
    return item


@periscope.monitored("pull", feed="urlhaus")
def pull() -> str:
    """Make one trace, with a ledger like that of real code; returns its id."""
    operation = periscope.current_operation()
    for item in operation.track(range(SPANS - 1)):
        store(item)
        operation.ingested()
    return f"{trace.get_current_span().get_span_context().trace_id:032x}"


def main() -> None:
    """Pull at the pace that is asked for, or as fast as it goes."""
    endpoint, protocol, pace, seconds = sys.argv[1:]
    runtime = periscope.configure(
        service_name="load", otlp_endpoint=endpoint, otlp_protocol=protocol, exit_report="never"
    )
    for _ in range(WARM_UP):
        pull()
    runtime.flush()
    interval, traces = SPANS / float(pace), []
    began, cpu = time.perf_counter(), time.process_time()
    while (now := time.perf_counter() - began) < float(seconds):
        if (early := len(traces) * interval - now) > 0:
            time.sleep(early)
        traces.append(pull())
    took = time.perf_counter() - began
    spans = runtime.shutdown(30.0).signals[0]
    cpu = time.process_time() - cpu
    print(json.dumps({
        "traces": traces,
        "made": len(traces) * SPANS,
        "warm_up": WARM_UP * SPANS,
        "seconds": took,
        "cpu": cpu,
        "exported": spans.exported,
        "lost": spans.lost,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
