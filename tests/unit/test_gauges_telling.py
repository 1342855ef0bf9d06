"""Whatever the platform calls its devices, figures reach Prometheus and a Collector."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from periscope_otel.gauges.devices import DeviceClasses
from periscope_otel.gauges.filesystems import FilesystemReader
from periscope_otel.gauges.host import HostReader
from periscope_otel.gauges.observe import COUNTER, FILESYSTEM, GAUGE, HOST, UP_DOWN_COUNTER
from periscope_otel.gauges.procfs import ProcfsSource
from periscope_otel.telemetry import names
from periscope_otel.telemetry.prometheus import PrometheusPage

if TYPE_CHECKING:
    from collections.abc import Iterator

NASTY = b'x\xff\x1b"y'
TOLD = 'x\ufffd\ufffd"y'
"""The same as a label."""


class Telling:
    """The figures of a machine on a provider."""

    def __init__(self) -> None:
        self.stats: Any = None
        self.filesystems: Any = ()
        self.memory = InMemoryMetricReader()
        self.page = PrometheusPage()
        self.provider = MeterProvider([self.memory, self.page.reader], shutdown_on_exit=False)
        meter = self.provider.get_meter(names.SCOPE)
        create = {
            COUNTER: meter.create_observable_counter,
            UP_DOWN_COUNTER: meter.create_observable_up_down_counter,
            GAUGE: meter.create_observable_gauge,
        }
        for figure in (*HOST, *FILESYSTEM):

            def callback(_options: Any, figure: Any = figure) -> list[Any]:
                stats = self.filesystems if figure in FILESYSTEM else self.stats
                return list(figure.observe(stats))

            create[figure.kind](figure.metric.name, [callback], figure.metric.unit)

    def page_labels(self, label: str) -> set[str]:
        """Return the values of a label on the Prometheus page."""
        text = self.page.render("text/plain")[0].decode()
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        assert samples
        return {one.labels[label] for one in samples if label in one.labels}

    def sent_attributes(self, attribute: str) -> set[str]:
        """Return the values of an attribute in an OTLP request."""
        data = self.memory.get_metrics_data()
        assert data is not None
        request = type(encode_metrics(data)).FromString(encode_metrics(data).SerializeToString())
        return {
            one.value.string_value
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in (*metric.sum.data_points, *metric.gauge.data_points)
            for one in point.attributes
            if one.key == attribute
        }


@pytest.fixture
def telling() -> Iterator[Telling]:
    made = Telling()
    yield made
    made.provider.shutdown()


@pytest.fixture
def reader(tmp_path: Path) -> HostReader:
    """A reader of a machine on which somebody has chosen nasty names."""
    proc = tmp_path / "proc"
    (proc / "net").mkdir(parents=True)
    counts = b"1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
    (proc / "net/dev").write_bytes(b"\n\n" + NASTY + b": " + counts)
    (proc / "diskstats").write_bytes(b" 8 0 " + NASTY + b" 1 0 1 0 1 0 1 0 0 0 0\n")
    (proc / "swaps").write_bytes(b"Filename\n/" + NASTY + b" file 10 1 -2\n")
    return HostReader(
        sources=[ProcfsSource(str(proc))], classes=DeviceClasses(str(tmp_path / "sys"))
    )


def test_nasty_names_reach_prometheus_and_a_collector(telling, reader, tmp_path):
    """Names that are no UTF-8 cost no page and no attribute: they are told as text."""
    point = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + NASTY))
    point.mkdir()
    mount = SimpleNamespace(
        device=os.fsdecode(NASTY), mountpoint=str(point), fstype="ext4", opts="rw"
    )
    telling.stats = reader.read(slow=True)
    telling.filesystems = FilesystemReader(lambda _every: [mount]).read(slow=True)
    for found in (telling.page_labels, telling.sent_attributes):
        dot = "." if found == telling.sent_attributes else "_"
        assert TOLD in found(dot.join(("network", "interface", "name")))
        assert {TOLD, "/" + TOLD} <= found(dot.join(("system", "device")))
        assert f"{tmp_path}/{TOLD}" in found(dot.join(("system", "filesystem", "mountpoint")))
