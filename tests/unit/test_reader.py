from __future__ import annotations

import threading
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult

from periscope_otel import guard
from periscope_otel.telemetry.export import ExportAccount, ForkGate
from periscope_otel.telemetry.reader import ExportingReader


class Exporter(MetricExporter):
    """Answers as it is told, and keeps the sums that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Any = MetricExportResult.SUCCESS
        self.sums: list[int] = []
        self.ended = 0
        self.exported = threading.Event()

    def export(self, metrics_data: Any, timeout_millis: float = 0, **_: Any) -> Any:
        points = metrics_data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
        self.sums.append(points[0].value)
        self.exported.set()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        self.ended += 1


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()


def wired(exporter: Exporter, interval: float | None = 3600.0) -> tuple[Any, ExportingReader]:
    """A provider with one counter at 7, and its reader."""
    reader = ExportingReader(exporter, ExportAccount("metrics", "nowhere"), interval)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    provider.get_meter("test").create_counter("count").add(7)
    return provider, reader


def test_a_flush_exports_what_there_is(exporter):
    """A flush collects, exports and says that it did."""
    provider, reader = wired(exporter)
    assert reader.force_flush(30_000)
    assert exporter.sums == [7]
    assert reader.account.counts() == (1, 0, 0)
    provider.shutdown()


@pytest.mark.parametrize("answer", [MetricExportResult.FAILURE, OSError("away")])
def test_an_export_that_fails_is_no_flush(exporter, answer):
    """A refused or raising export is counted as failed, and the flush says so."""
    provider, reader = wired(exporter)
    exporter.answer = answer
    assert not reader.force_flush(30_000)
    assert reader.account.counts() == (0, 1, 0)
    reader.stop()
    provider.shutdown()


def test_a_provider_that_is_shut_down_exports_a_last_time(exporter):
    """The shutdown of the provider, by whomever, exports what was recorded last; once."""
    provider, _ = wired(exporter)
    provider.shutdown()
    assert exporter.sums == [7]
    assert exporter.ended == 1


def test_stopping_exports_nothing_and_ends_the_wait(exporter):
    """A stopped reader exports nothing more, and nobody waits for it."""
    provider, reader = wired(exporter)
    reader.stop()
    reader.start_flush()
    assert not reader.wait_flushed(60)
    assert exporter.sums == []
    assert exporter.ended == 1
    provider.shutdown()


def test_it_exports_on_its_beat(exporter):
    """Without being asked it exports every interval."""
    provider, reader = wired(exporter, 0.001)
    assert exporter.exported.wait(30)
    reader.stop()
    provider.shutdown()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (60.0, False)),
        ("1500", (1.5, False)),
        *((text, (60.0, True)) for text in ("0", "-5", "nan", "inf", "soon")),
    ],
)
def test_the_interval_is_the_standard_variables(exporter, monkeypatch, caplog, text, expected):
    """OTEL_METRIC_EXPORT_INTERVAL counts where it is a positive number of milliseconds."""
    guard.reset()
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", text)
    provider, reader = wired(exporter, None)
    assert (reader._interval, bool(caplog.messages)) == expected
    reader.stop()
    provider.shutdown()


def test_a_fork_waits_for_an_export_no_longer_than_it_may():
    """A gate that is taken lets the fork go on at its deadline, and the child is told."""
    gate = ForkGate()
    gate.before_fork(deadline=0.0)
    assert gate.child_is_safe
    gate.after_fork_in_parent()
    with gate:
        gate.before_fork(deadline=0.0)
        assert not gate.child_is_safe
        gate.after_fork_in_parent()
    with gate:
        gate.after_fork_in_child()
        with gate:
            assert not gate.child_is_safe
        gate._lock.acquire()
