"""Our own metric reader: collects and exports from one thread, on a beat or when asked.

The SDK's periodic reader restarts its thread in a forked child and there exports the parent's
totals once more, and its flush has no bound. This one does neither: a child gets a new one with a
new provider, and a flush is a request to the thread with a wait that ends in time.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY as SUPPRESS_KEY
from opentelemetry.context import attach, detach, set_value
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
)

from periscope_otel import guard
from periscope_otel.redaction import clean_name
from periscope_otel.telemetry.export import ForkGate, keep_for_ever
from periscope_otel.telemetry.start_times import StartTimes

if TYPE_CHECKING:
    from periscope_otel.telemetry.export import ExportAccount

COLLECT_TIMEOUT = 60.0
"""Seconds that a collect may take: with many busy threads it gets little of the processor."""

DEFAULT_INTERVAL = 60.0
"""Seconds between two exports where OTEL_METRIC_EXPORT_INTERVAL says nothing else."""


class ExportingReader(MetricReader):
    """Collects every `interval` seconds and hands the result to an exporter.

    Args:
        exporter: Where metrics go; its preferred temporality and aggregation are kept.
        account: Counts what was exported and what was not.
        interval: Seconds; by default OTEL_METRIC_EXPORT_INTERVAL (milliseconds), else 60.
    """

    def __init__(
        self, exporter: MetricExporter, account: ExportAccount, interval: float | None = None
    ) -> None:
        super().__init__(
            preferred_temporality=getattr(exporter, "_preferred_temporality", None),
            preferred_aggregation=getattr(exporter, "_preferred_aggregation", None),
        )
        self._exporter = exporter
        self.account = account
        self.gate = ForkGate()
        self._start_times = StartTimes()
        self._interval = interval or _interval_from_environment()
        self._wake = threading.Condition()
        self._asked = 0
        self._done = 0
        self._succeeded = True
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="periscope-metrics", daemon=True)
        self._thread.start()

    def start_flush(self) -> None:
        """Ask for a collect and export, without waiting for it."""
        with self._wake:
            self._asked += 1
            self._wake.notify_all()

    def wait_flushed(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the export asked for last; returns whether it worked."""
        with self._wake:
            asked = self._asked
            self._wake.wait_for(lambda: self._stopping or self._done >= asked, timeout)
            return self._done >= asked and self._succeeded

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Collect and export now, waiting `timeout_millis` at most; for the provider."""
        self.start_flush()
        return self.wait_flushed(timeout_millis / 1e3)

    def shutdown(self, timeout_millis: float = 30_000, **_kwargs: Any) -> None:
        """Export a last time within `timeout_millis`, and stop; for a provider that shuts down."""
        if not self._stopping:
            self.force_flush(timeout_millis)
        self.stop()

    def stop(self) -> None:
        """End the thread after what it is doing; nothing more is exported."""
        with self._wake:
            already, self._stopping = self._stopping, True
            self._wake.notify_all()
        if not already:
            self._exporter.shutdown()

    def left_to_the_parent(self) -> None:
        """Keep the exporter of this reader, which a forked child does not use, from being freed."""
        keep_for_ever(self._exporter)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopping or self._asked > self._done, self._interval
                )
                if self._stopping:
                    return
                asked = self._asked
            self._succeeded = False
            with guard.contained("metric export"):
                self.collect(timeout_millis=COLLECT_TIMEOUT * 1e3)
            with self._wake:
                self._done = asked
                self._wake.notify_all()

    def _receive_metrics(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_kwargs: Any
    ) -> None:
        metrics_data = self._start_times.put_right(metrics_data)
        points = _points_in(metrics_data)
        token = attach(set_value(SUPPRESS_KEY, True))
        try:
            with self.gate:
                result = self._exporter.export(metrics_data, timeout_millis=timeout_millis)
            self._succeeded = result is MetricExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001  (an exporter must not end the thread)
            guard.warn("metric exporter", "exporting metrics raised %s", type(error).__name__)
        finally:
            self.account.add(exported=self._succeeded, count=points)
            detach(token)


def _points_in(metrics_data: MetricsData) -> int:
    return sum(
        len(metric.data.data_points)
        for resource in metrics_data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )


def _interval_from_environment() -> float:
    text = os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    if not text:
        return DEFAULT_INTERVAL
    try:
        seconds = float(text) / 1e3
    except ValueError:
        seconds = 0.0
    if 0.0 < seconds <= threading.TIMEOUT_MAX:  # false for NaN too
        return seconds
    guard.warn("metric interval", "OTEL_METRIC_EXPORT_INTERVAL=%.40s is no number of "
               "milliseconds; %g s are used", clean_name(text), DEFAULT_INTERVAL)  # fmt: skip
    return DEFAULT_INTERVAL
