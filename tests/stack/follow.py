"""Following one marked span and one marked metric through the whole stack.

    python tests/stack/follow.py --otlp http://127.0.0.1:4318 \
        --jaeger http://127.0.0.1:16686 --prometheus http://127.0.0.1:9090

A marker made for this one time is sent by OTLP and looked for where it should arrive; each hop says
how long it took, or why it was not passed. It leaves a trace and a series behind, so it is for
looking into something rather than for every minute. Nothing of pytest is used and no global
provider is touched, so a program can follow its own way out with it while it runs.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from apis import Jaeger, Prometheus, UnansweredError
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from periscope_otel.redaction import redact
from periscope_otel.telemetry import pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVICE = "periscope-follow"
SPAN = "follow"
METRIC = "periscope.follow.marks"
METRIC_IN_PROMETHEUS = "periscope_follow_marks_total"
MARK = "periscope.follow.mark"
MARK_IN_PROMETHEUS = "periscope_follow_mark"
PERIOD = 0.1
"""Seconds between two looks."""


class Hop(NamedTuple):
    """One step of the way."""

    name: str
    passed: bool
    seconds: float
    detail: str
    """Where the marker can be seen, or what is wrong and what to look at."""


def follow(
    otlp: str,
    *,
    jaeger: str | None = None,
    prometheus: str | None = None,
    protocol: str | None = None,
    timeout: float = 30.0,
) -> list[Hop]:
    """Send a marked span and a marked metric, and look for each where it should arrive.

    Args:
        otlp: The OTLP endpoint, as `configure(otlp_endpoint=...)` takes it.
        jaeger: URL of Jaeger's interface; None leaves its hop out.
        prometheus: URL of Prometheus; None leaves its hop out.
        protocol: `grpc` or `http/protobuf`; by default as `configure()` chooses it.
        timeout: Seconds to look for a marker. Sending takes OTEL_EXPORTER_OTLP_TIMEOUT at most.

    Returns:
        The hops in order. What lies behind a hop that was not passed is left out.

    Example:
        >>> all(hop.passed for hop in follow("http://127.0.0.1:4318"))
        True
    """
    mark = uuid.uuid4().hex
    span, trace_id = _marked_span(mark)
    hops = [_send("span to the Collector", "traces", [span], otlp, protocol)]
    if hops[-1].passed and jaeger is not None:
        hops.append(_find_trace(Jaeger(jaeger), trace_id, mark, timeout))
    hops.append(_send("metric to the Collector", "metrics", _marked_metric(mark), otlp, protocol))
    if hops[-1].passed and prometheus is not None:
        hops.append(_find_metric(Prometheus(prometheus), mark, timeout))
    return hops


def _marked_span(mark: str) -> tuple[Any, str]:
    """Return an ended span, sampled whatever the environment says, and its trace's id."""
    ended = InMemorySpanExporter()
    provider = TracerProvider(ALWAYS_ON, pipeline.resource_of(SERVICE), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(ended))
    with provider.get_tracer(SERVICE).start_as_current_span(SPAN, attributes={MARK: mark}) as span:
        trace_id = f"{span.get_span_context().trace_id:032x}"
    return ended.get_finished_spans()[0], trace_id


def _marked_metric(mark: str) -> Any:
    """Return a counter's one point."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], pipeline.resource_of(SERVICE), shutdown_on_exit=False)
    provider.get_meter(SERVICE).create_counter(METRIC).add(1, {MARK: mark})
    return reader.get_metrics_data()


def _send(name: str, signal: str, what: Any, otlp: str, protocol: str | None) -> Hop:
    (destination,) = pipeline.destinations(signal, otlp, protocol)
    began = time.monotonic()
    with _messages_of_the_exporter() as messages:
        exporter = destination.make()
        result = exporter.export(what)
        exporter.shutdown()
    passed = result.name == "SUCCESS"
    seconds = time.monotonic() - began
    if passed:
        return Hop(name, True, seconds, f"accepted by {redact(otlp)}")
    said = redact(messages[0], 300) if messages else "the exporter does not say why"
    why = _unreachable(otlp) or said
    return Hop(name, False, seconds, f"not accepted by {redact(otlp)}: {why}")


def _unreachable(url: str) -> str | None:
    """Return why nothing can be connected to there; None if something can."""
    parts = urlsplit(url)
    if not parts.hostname:
        return "this is no URL such as http://127.0.0.1:4318"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextmanager
def _messages_of_the_exporter() -> Iterator[list[str]]:
    """Keep what the OTLP exporters log, which is the only place where they say what is wrong."""
    messages: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, keeper = logging.getLogger("opentelemetry.exporter.otlp"), Keeper(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(keeper)
    try:
        yield messages
    finally:
        logger.removeHandler(keeper)
        logger.propagate = propagated


def _find_trace(jaeger: Jaeger, trace_id: str, mark: str, timeout: float) -> Hop:
    def found() -> bool:
        return any(span.attributes.get(MARK) == mark for span in jaeger.trace(trace_id))

    missing = f"trace {trace_id} is not in Jaeger: see the Collector's log and its queue"
    return _look("span in Jaeger", found, timeout, jaeger.link(trace_id), missing)


def _find_metric(prometheus: Prometheus, mark: str, timeout: float) -> Hop:
    expression = f'{METRIC_IN_PROMETHEUS}{{{MARK_IN_PROMETHEUS}="{mark}"}}'
    missing = f"{expression} is not in Prometheus: see the Collector's log and its queue"
    return _look(
        "metric in Prometheus",
        lambda: prometheus.value(expression) == 1,
        timeout,
        expression,
        missing,
    )


def _look(name: str, found: Callable[[], bool], timeout: float, seen: str, missing: str) -> Hop:
    """Look until the marker is there or the time is up; a server that is silent is asked again."""
    began = time.monotonic()
    while True:
        try:
            if found():
                return Hop(name, True, time.monotonic() - began, seen)
            wrong = missing
        except UnansweredError as error:
            wrong = str(error)
        if time.monotonic() - began > timeout:
            return Hop(name, False, time.monotonic() - began, wrong)
        time.sleep(PERIOD)


def main() -> int:
    """Follow, and print a line a hop; the exit code is 1 if one was not passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--otlp", default="http://127.0.0.1:4318", metavar="URL")
    parser.add_argument("--protocol", choices=[pipeline.GRPC, pipeline.HTTP])
    parser.add_argument("--jaeger", default="http://127.0.0.1:16686", metavar="URL")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    given = parser.parse_args()
    hops = follow(**vars(given))
    for hop in hops:
        print(
            f"{'ok  ' if hop.passed else 'FAIL'} {hop.name:24} {hop.seconds:6.2f} s  {hop.detail}"
        )
    return 0 if all(hop.passed for hop in hops) else 1


if __name__ == "__main__":
    sys.exit(main())
