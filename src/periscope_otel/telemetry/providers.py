"""Where spans and metrics leave the process: given providers as they are, or built here.

What is given, or set globally by the application, is flushed and never shut down; what is missing
is built, made the global provider, renewed in the child of a fork, and shut down at the end.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from opentelemetry import metrics, trace

from periscope_otel import guard
from periscope_otel.report import SignalReport
from periscope_otel.telemetry import pipeline
from periscope_otel.telemetry.current import current, global_meter_provider, global_tracer_provider
from periscope_otel.telemetry.lifecycle import Flushable, FlushThread
from periscope_otel.telemetry.reader import ExportingReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import TracerProvider

    from periscope_otel.settings import Settings
    from periscope_otel.telemetry.export import CountedSpanProcessor, ExportAccount, ForkGate
    from periscope_otel.telemetry.prometheus import PrometheusPage

logger = logging.getLogger("periscope_otel")

_Provider = TypeVar("_Provider")


class Providers:
    """The providers of a process, and what is behind those that are built here.

    Args:
        settings: Where to export to.
        tracer_provider: Used as it is, if given; else the global one; else one is built.
        meter_provider: Likewise.
        page: What Prometheus reads, if anything.
    """

    def __init__(
        self,
        settings: Settings,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
        page: PrometheusPage | None,
    ) -> None:
        self._settings = settings
        self._page = page
        self.tracer_provider = tracer_provider or _usable(global_tracer_provider())
        self.meter_provider = meter_provider or _usable(global_meter_provider())
        self.builds_metrics = self.meter_provider is None
        self._processors: list[CountedSpanProcessor] = []
        self._readers: list[ExportingReader] = []
        self._foreign_readers: list[MetricReader] = []
        self._flush_threads: list[FlushThread] = []
        self._can_export = True

    @cached_property
    def resource(self) -> Resource:
        """What the telemetry is about."""
        return pipeline.resource_of(self._settings.service_name)

    @property
    def builds_spans(self) -> bool:
        """Whether the tracer provider was built here."""
        return bool(self._processors)

    @property
    def accounts(self) -> tuple[ExportAccount, ...]:
        """What was exported and what was not, by destination."""
        return (
            *(processor.account for processor in self._processors),
            *(reader.account for reader in self._readers),
        )

    @property
    def flushables(self) -> list[Flushable]:
        """What a flush sends."""
        return [*self._flush_threads, *self._readers]

    def report(self) -> tuple[SignalReport, ...]:
        """Return what has been exported so far, by signal and destination."""
        return (
            *(
                SignalReport(
                    "spans", one.account.destination, *one.account.counts(), waiting=one.waiting
                )
                for one in self._processors
            ),
            *(
                SignalReport(
                    "metric points", one.account.destination, *one.account.counts(), waiting=0
                )
                for one in self._readers
            ),
        )

    # Wiring.

    def wire_traces(self) -> None:
        """Use the tracer provider that there is, or build one if spans are to go anywhere."""
        if self.tracer_provider is not None:
            self._use_foreign("spans", self.tracer_provider)
            return
        wanted = self._destinations("traces")
        if wanted:
            self._processors = pipeline.span_processors(wanted)
            self.tracer_provider = pipeline.build_tracer_provider(self.resource, self._processors)
            for processor in self._processors:
                self._flush_threads.append(FlushThread("periscope-spans", processor.force_flush))

    def wire_metrics(self) -> None:
        """Use the meter provider that there is, or build one if metrics are to go anywhere."""
        if self.meter_provider is not None:
            self._use_foreign("metrics", self.meter_provider)
            if self._page is not None:
                _add_reader(self.meter_provider, self._page.reader)
        else:
            self._build_meter_provider(self.resource, self._page)

    def publish(self) -> None:
        """Make what was built here the global providers, so that other libraries use it too."""
        tracer_provider, meter_provider = self.tracer_provider, self.meter_provider
        if self._processors and tracer_provider and global_tracer_provider() is None:
            trace.set_tracer_provider(tracer_provider)
        if self.builds_metrics and meter_provider and global_meter_provider() is None:
            metrics.set_meter_provider(meter_provider)

    def _destinations(self, signal: str) -> list[pipeline.Destination]:
        settings = self._settings
        return pipeline.destinations(signal, settings.otlp_endpoint, settings.otlp_protocol)

    def _build_meter_provider(self, resource: Resource, page: PrometheusPage | None) -> None:
        wanted = self._destinations("metrics")
        if not self._can_export:
            guard.warn(
                "fork",
                "this child was forked in the middle of an export by gRPC, which it cannot use "
                "therefore: it exports nothing. OTLP over HTTP has no such limit",
            )
            wanted = []
        readers = pipeline.metric_readers(wanted)
        self._readers = [reader for reader in readers if isinstance(reader, ExportingReader)]
        self._foreign_readers = [one for one in readers if not isinstance(one, ExportingReader)]
        self._flush_threads += [
            FlushThread("periscope-metrics", one.force_flush) for one in self._foreign_readers
        ]
        if page is not None:
            readers.append(page.reader)
        if readers:
            self.meter_provider = pipeline.build_meter_provider(resource, readers)

    def _use_foreign(self, what: str, provider: object) -> None:
        """Flush a provider that is not ours, and never shut it down."""
        if self._settings.otlp_endpoint is not None:
            logger.warning(
                "otlp_endpoint has no effect on %s: %s is set already and used as it is",
                what,
                type(provider).__name__,
            )
        flush = getattr(provider, "force_flush", None)
        if flush is not None:
            self._flush_threads.append(FlushThread(f"periscope-{what}", flush))

    # The end.

    def close(self, deadline: float) -> None:
        """Shut down what was built here; what hangs is left behind when the time is up."""
        if self._page is not None and not self.builds_metrics:
            remove = getattr(self.meter_provider, "remove_metric_reader", None)
            if remove is not None:
                remove(self._page.reader)
        if self._processors:
            _closed_providers.add(self.tracer_provider)
        if self.builds_metrics and self.meter_provider is not None:
            _closed_providers.add(self.meter_provider)
        current.silenced = _only_closed_ones(global_tracer_provider(), global_meter_provider())
        closers: list[Callable[[], object]] = [reader.stop for reader in self._readers]
        closers += [reader.shutdown for reader in self._foreign_readers]
        closers += [processor.shutdown for processor in self._processors]
        for close in closers:
            _run_until(deadline, close)
        for thread in self._flush_threads:
            thread.stop()

    # Forks.

    def gates(self) -> list[ForkGate]:
        """Return what a fork waits for; only gRPC needs it."""
        gates = [one.gate for one in self._processors if one.account.fork_waits]
        return gates + [one.gate for one in self._readers if one.account.fork_waits]

    def after_fork(self) -> None:
        """Put right at once, in the child, what cannot wait for its first operation."""
        self._can_export = all(gate.child_is_safe for gate in self.gates())
        self._page = None  # served by the parent alone
        for reader in self._readers:
            reader.left_to_the_parent()
        self._readers = []
        self._foreign_readers = []
        if self._processors:
            pipeline.renew_after_fork(self.tracer_provider)
        for processor in self._processors:
            processor.after_fork(usable=self._can_export)
        for thread in self._flush_threads:
            thread.restart()

    def renew_after_fork(self) -> None:
        """Build the child's own meter provider, on its first operation."""
        if not self.builds_metrics:
            return
        self.meter_provider = None
        self._build_meter_provider(pipeline.resource_after_fork(self.resource), None)
        if self.meter_provider is None:
            # Nothing exports metrics here; the parent's provider must not be used instead.
            self.meter_provider = metrics.NoOpMeterProvider()
        current.global_instruments = None


def _add_reader(provider: object, reader: MetricReader) -> None:
    add = getattr(provider, "add_metric_reader", None)
    if add is None:
        raise TypeError(f"{type(provider).__name__} takes no further metric reader")
    add(reader)


def _run_until(deadline: float, close: Callable[[], object]) -> None:
    """Run `close`, but leave it behind in its thread when the time is up."""

    def run() -> None:
        with guard.contained("shutdown"):
            close()

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return  # the interpreter is ending: nothing needs to be closed any more
    thread.join(max(0.0, deadline - time.monotonic()))


def _usable(provider: _Provider | None) -> _Provider | None:
    """Return a global provider unless it is one of ours that was shut down."""
    return None if provider in _closed_providers else provider


def _only_closed_ones(*providers: object) -> bool:
    """Whether all global providers are ones that were built here and shut down."""
    found = [provider for provider in providers if provider is not None]
    return bool(found) and all(provider in _closed_providers for provider in found)


_closed_providers: weakref.WeakSet[object] = weakref.WeakSet()
"""Providers that were built here and shut down; the API keeps the first global one for ever."""
