"""What the plugin keeps in memory.

Growth
    A million calls (`--calls`), full pipeline to nowhere, after the first ten thousand: of the
    process's resident memory, and, in another process, of what Python has allocated
    (tracemalloc). The calls end in turn well, with items counted, with an exception, and as a
    generator closed early. Metrics are collected every thousand calls and once before each
    reading. A process that never drains would measure its queues.
Label sets
    The bytes that Python has allocated (tracemalloc) for the most label sets that an instrument
    may have, 1,500, divided by those that the SDK alone holds for the same points of the same
    instruments, recorded by hand through the public API: once with 1,500 pairs of operation and
    feed, once with 300 pairs and five endings. Each in a process of its own; `--rounds` of it.

Not measured: spans that wait for an exporter that is away (bounded by the queue's size).
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING

import psutil
from harness import Report, arguments, spread, start_report
from opentelemetry.trace import Status, StatusCode
from subjects import Pipeline, drain_ours, duration_histogram, telemetry_of, use

from periscope_otel import current_operation, monitored
from periscope_otel.scope import operation
from periscope_otel.telemetry import names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.operation import Operation

FIRST = 10_000
ENDINGS = (None, "ConnectionError", "ReadTimeout", "503", "429")

LabelSet = tuple[str, str, str | None]
"""Operation, feed and error type."""


@monitored("plain", feed="urlhaus")
def plain() -> None:
    """End well."""


@monitored("counted", feed="urlhaus")
def counted() -> None:
    """Count items."""
    current: Operation = current_operation()
    current.received(3)
    current.ingested(2)
    current.skipped(reason="no_content")


@monitored("raising", feed="urlhaus")
def raising() -> None:
    """End badly."""
    raise ValueError("no such feed")


@monitored("generated", feed="urlhaus")
def generated() -> Iterator[int]:
    """Be closed early."""
    yield 1
    yield 2


def four_calls() -> None:
    """Make one call of each ending."""
    plain()
    counted()
    with contextlib.suppress(ValueError):
        raising()
    for _ in generated():
        break


def growth(how: str, calls: int) -> float:
    """Return the megabytes by which memory grew after the first calls; runs in a child."""
    pipeline = Pipeline()
    use(telemetry_of(pipeline))()
    drain = drain_ours(pipeline)
    if how == "tracemalloc":
        tracemalloc.start()
    process = psutil.Process()

    def held() -> int:
        drain()
        gc.collect()
        return (
            tracemalloc.get_traced_memory()[0]
            if how == "tracemalloc"
            else process.memory_info().rss
        )

    before = 0
    for number in range(0, calls, 1_000):
        if number == FIRST:
            before = held()
        for _ in range(250):
            four_calls()
        drain()
    return (held() - before) / 1e6


def label_sets(pairs: int) -> Iterator[LabelSet]:
    """Return 1,500 label sets made of so many pairs of operation and feed."""
    for pair in range(pairs):
        for ending in ENDINGS[: 1_500 // pairs]:
            yield f"operation{pair % 30}", f"feed{pair}", ending


class _FailingError(Exception):
    """Stands for a response with an HTTP status; the class name is set for each error type."""


def hold_ours(pairs: int) -> Pipeline:
    """Record every label set once by operations; returns what must stay alive."""
    pipeline = Pipeline()
    use(telemetry_of(pipeline))()
    failures = {name: type(name, (_FailingError,), {}) for name in ENDINGS if name}
    for name, feed, error_type in label_sets(pairs):
        with operation(name, feed=feed) as op:
            if error_type is not None:
                op.fail(failures[error_type]())
    drain_ours(pipeline)()
    return pipeline


def hold_by_hand(pairs: int) -> Pipeline:
    """Record the same points of the same instruments with the SDK alone."""
    pipeline = Pipeline()
    tracer = pipeline.tracer_provider.get_tracer("by hand")
    meter = pipeline.meter_provider.get_meter("by hand")
    histogram = duration_histogram(meter)
    active = meter.create_up_down_counter(names.ACTIVE.name)
    last_success = meter.create_gauge(names.LAST_SUCCESS.name)
    for name, feed, error_type in label_sets(pairs):
        labels = {names.OPERATION_NAME: name, names.FEED_NAME: feed}
        # Ours are observable, so without exemplars: outside of the span these have none either.
        active.add(0, labels)
        ending = {names.OUTCOME: "error" if error_type else "ok"}
        if error_type is None:
            last_success.set(time.time(), {names.FEED_NAME: feed})
        else:
            ending[names.ERROR_TYPE] = error_type
        with tracer.start_as_current_span(name, attributes=labels) as span:
            if error_type is not None:
                span.set_status(Status(StatusCode.ERROR))
            histogram.record(1e-5, labels | ending)
    pipeline.drain()
    return pipeline


def held_bytes(who: str, pairs: int) -> float:
    """Return the bytes that one side holds; runs in a child."""
    hold = {"ours": hold_ours, "by hand": hold_by_hand}[who]
    hold(1)  # what is loaded and cached once is not for the label sets
    gc.collect()
    tracemalloc.start()
    kept = hold(pairs)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    points = kept.points(names.DURATION.name)
    if points != 1_500:
        raise RuntimeError(f"{who} has {points} duration points instead of 1,500")
    return held


def in_child(what: str, *values: object) -> float:
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "--child", what, json.dumps(values)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def child(what: str, values: str) -> None:
    """Do what `in_child` asks for."""
    functions = {"growth": growth, "held_bytes": held_bytes}
    print(json.dumps(functions[what](*json.loads(values))))


def add_growth(report: Report, calls: int) -> None:
    """Measure both kinds of growth."""
    what = f"growth from {FIRST:,} to {calls:,} calls"
    resident, traced = in_child("growth", "rss", calls), in_child("growth", "tracemalloc", calls)
    report.measures.append(spread(f"{what}, resident", [resident], 1.0, " MB"))
    report.measures.append(spread(f"{what}, allocated", [traced], 1.0, " MB"))


def add_label_sets(report: Report, pairs: int, rounds: int) -> None:
    """Measure what 1,500 label sets take."""
    what = f"1,500 label sets of {pairs:,} operations and feeds ÷ SDK alone"
    ours = [in_child("held_bytes", "ours", pairs) for _ in range(rounds)]
    by_hand = [in_child("held_bytes", "by hand", pairs) for _ in range(rounds)]
    ratios = [a / b for a, b in zip(ours, by_hand, strict=True)]
    report.measures.append(spread(what, ratios, 1.1))
    report.indications.append(f"{what}: {ours[0] / 1e6:.2f} MB ÷ {by_hand[0] / 1e6:.2f} MB")


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__, rounds=3, calls=1_000_000)
    report = start_report(__doc__, options)
    add_label_sets(report, 1_500, options.rounds)
    add_label_sets(report, 300, options.rounds)
    add_growth(report, options.calls)
    report.publish(options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        main()
