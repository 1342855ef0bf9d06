"""Providers, and what exports behind them: doubled, or in the caller's path.

The SDK shows little of this, so this looks where it keeps it, and finds nothing if that moves. It
does not go through all objects that there are: while `gc.get_objects` has them in its list, other
threads fail at making a tuple.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
from opentelemetry.sdk.trace.export import SpanExporter

from periscope_otel.doctor.finding import ok, warning
from periscope_otel.telemetry.current import global_meter_provider, global_tracer_provider

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from periscope_otel.doctor.finding import Finding
    from periscope_otel.report import ExportReport


def double_findings(
    tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
) -> Iterator[Finding]:
    """Say whether other providers are at work beside those in use."""
    check = "program.double"
    found = [
        *_doubled("TracerProvider", tracer_provider, global_tracer_provider(), _span_workers()),
        *_doubled("MeterProvider", meter_provider, global_meter_provider(), _all_readers()),
    ]
    yield from found
    if not found:
        yield ok(check, "no provider is at work beside those in use")


def _doubled(
    name: str, used: object, installed: object, workers: Iterable[object]
) -> Iterator[Finding]:
    check = "program.double"
    if used is not None and installed is not None and used is not installed:
        yield warning(
            check,
            f"the {name} in use is not the global one, which other libraries use: what they "
            "record goes elsewhere",
            f"set one {name}, before configure() and only once, or none and let configure() "
            "build it",
        )
        return
    own = {id(one) for one in (*_within(_processors(used)), *_readers(used))}
    others = [one for one in workers if id(one) not in own]
    if used is not None and others:
        yield warning(
            check,
            f"another {name} exports as well ({len(others)} pipelines beside the one in use): what "
            "is recorded there is not with the rest",
            f"make one {name} for the process; a second set_…_provider() has no effect",
        )


def duplicate_findings(
    tracer_provider: object, meter_provider: object, report: ExportReport
) -> Iterator[Finding]:
    """Say whether something is exported twice, or by whoever ends a span."""
    check = "program.duplicates"
    spans = [_exporter_of(one) for one in _processors(tracer_provider)]
    points = [getattr(one, "_exporter", None) for one in _readers(meter_provider)]
    places = [f"spans to {place}" for one in spans if (place := _endpoint_of(one))]
    places += [f"metrics to {place}" for one in points if (place := _endpoint_of(one))]
    places += [f"{one.signal} to {one.destination}" for one in report.signals]
    twice = sorted(place for place, number in Counter(places).items() if number > 1)
    if twice:
        yield warning(
            check,
            f"exported twice: {', '.join(twice)}",
            "keep one exporter for each destination: configure() adds its own where it builds the "
            "provider",
        )
    waiting = [
        type(exporter).__name__
        for one in _processors(tracer_provider)
        if type(one).__name__ == "SimpleSpanProcessor"
        and _endpoint_of(exporter := _exporter_of(one))
    ]
    if waiting:
        yield warning(
            check,
            f"each span waits for the network: {waiting[0]} is behind a SimpleSpanProcessor",
            "use a BatchSpanProcessor",
        )
    if not twice and not waiting and (tracer_provider or meter_provider):
        yield ok(check, "no destination has two exporters")


def _processors(provider: object) -> tuple[object, ...]:
    """Return the span processors of a provider."""
    return tuple(getattr(getattr(provider, "_active_span_processor", None), "_span_processors", ()))


def _readers(provider: object) -> tuple[object, ...]:
    """Return the metric readers of a provider."""
    return tuple(getattr(getattr(provider, "_measurement_consumer", None), "_reader_storages", ()))


def _within(processors: Iterable[object], depth: int = 3) -> Iterator[object]:
    """Give processors, and what they hold: some pass spans on to others."""
    for one in processors:
        yield one
        if depth and hasattr(one, "__dict__"):
            yield from _within(list(vars(one).values()), depth - 1)


def _exporter_of(processor: object) -> object:
    found = getattr(processor, "span_exporter", None) or getattr(processor, "exporter", None)
    return found or getattr(getattr(processor, "_batch_processor", None), "_exporter", None)


def _endpoint_of(exporter: object) -> str | None:
    endpoint = getattr(exporter, "_endpoint", None)
    return endpoint if isinstance(endpoint, str) else None


def _span_workers() -> list[object]:
    """Return what the SDK's threads for spans belong to: one a BatchSpanProcessor."""
    found = (_at_work(one) for one in threading.enumerate())
    return [one for one in found if isinstance(getattr(one, "_exporter", None), SpanExporter)]


def _at_work(thread: threading.Thread) -> Any:
    return getattr(getattr(thread, "_target", None), "__self__", None)


def _all_readers() -> list[object]:
    """Return the metric readers of all providers that were not shut down."""
    return list(getattr(SdkMeterProvider, "_all_metric_readers", ()))
