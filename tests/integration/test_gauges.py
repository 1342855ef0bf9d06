"""Gauges from end to end: what a Collector and Prometheus get from a real process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nvml import FIRST, SECOND, compile_stub
from telling import gauges, latest, scrape

from periscope_otel.gauges.observe import GPU, HOST

if TYPE_CHECKING:
    from pathlib import Path

    from otlp import Receiver


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


def kinds(collector: Receiver) -> dict[str, tuple[str, bool | None, str]]:
    """Return how each metric was sent: as gauge or sum, whether it only grows, and its unit."""
    return {
        metric.name: (
            metric.WhichOneof("data"),
            metric.sum.is_monotonic if metric.HasField("sum") else None,
            metric.unit,
        )
        for request in collector.requests()
        for resource in getattr(request.message, "resource_metrics", ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


SENT_AS = {"counter": ("sum", True), "up_down_counter": ("sum", False), "gauge": ("gauge", None)}

SELDOM = {
    "periscope.container.memory.limit",
    "periscope.container.cpu.limit",
    "system.disk.io",
    "system.disk.operations",
    "system.filesystem.usage",
    "system.filesystem.utilization",
    "system.network.io",
    "system.network.errors",
    "system.network.packet.dropped",
    "system.memory.linux.available",
    "process.disk.io",
}
"""What some machines do not have."""


def test_everything_arrives_as_what_it_is(collector, library):
    """Every figure arrives at a Collector with its name, kind and unit; none was left out."""
    with gauges(collector, library, gauges=True) as program:
        program.ask("readings", 3)
        program.ask("flush")
    sent = kinds(collector)
    for figure in (*HOST, *GPU):
        metric = figure.metric
        if metric.name not in SELDOM or metric.name in sent:
            assert sent[metric.name] == (*SENT_AS[figure.kind], metric.unit), metric.name


def test_prometheus_text(library):
    """The Prometheus page has each GPU and the host, with names and units as Prometheus's."""
    with gauges(None, library, gauges=True, prometheus="127.0.0.1:0") as program:
        program.ask("readings", 2)
        samples = scrape(program.port)
    power = {one.labels["hw_id"]: one.value for one in samples["hw_power_watts"]}
    assert power == {FIRST: 97.419, SECOND: 696.581}
    energy = {one.labels["hw_id"]: one.value for one in samples["hw_energy_joules_total"]}
    assert energy == {FIRST: 2121.748, SECOND: 8295.448}
    heat = {one.labels["hw_id"]: one.value for one in samples["hw_temperature_celsius"]}
    assert heat == {FIRST: 37, SECOND: 57}
    limits = {one.labels["hw_id"]: one.value for one in samples["hw_gpu_memory_limit_bytes"]}
    assert limits == {FIRST: 85520809984, SECOND: 85520809984}
    clocks = {one.value for one in samples["periscope_gpu_clock_speed_hertz"]}
    assert clocks == {915e6, 1350e6, 2619e6}
    shares = [one.value for one in samples["system_cpu_utilization"]]
    assert sum(shares) == pytest.approx(1.0)
    assert {one.labels["cpu_mode"] for one in samples["system_cpu_time_seconds_total"]} >= {
        "user",
        "system",
        "idle",
    }


@pytest.mark.usefixtures("uncovered")
def test_children_of_a_fork_tell_their_own(collector, library):
    """Each forked child tells figures of its own process, and the GPU's; its parent goes on."""
    with gauges(collector, library, gauges=True) as program:
        program.ask("readings", 2)
        children = [program.ask("fork") for _ in range(20)]
        program.ask("readings", 2)
        program.ask("flush")
    assert [status for _, status in children] == [7] * 20
    told = {
        point.resource["process.pid"]
        for point in collector.received().points
        if point.metric == "process.uptime"
    }
    assert told == {program.program.pid, *(pid for pid, _ in children)}
    gpus = {
        point.resource["process.pid"]
        for point in collector.received().points
        if point.metric == "hw.power"
    }
    assert gpus == told


def test_without_a_gpu_there_are_host_figures_and_one_line(collector, tmp_path):
    """On a machine without a GPU host figures arrive, no GPU's, and one line says so."""
    with gauges(collector, tmp_path, gauges=True) as program:
        program.ask("readings", 5)
        program.ask("flush")
        said = [line for line in program.ask("logs") if "GPU" in line]
    assert latest(collector, "system.memory.usage")
    assert [p for p in collector.received().points if p.metric.startswith("hw.")] == []
    assert len(said) == 1


def test_off_by_default(collector):
    """Without `gauges` nothing is sampled, and psutil and pynvml are not loaded."""
    with gauges(collector) as program:
        program.ask("flush")
    assert [p for p in collector.received().points if p.metric.startswith("system.")] == []


def test_shutdown_ends_the_sampler(library):
    """After shutdown() of what was switched on no thread samples."""
    with gauges(None, library, gauges=["host"]) as program:
        program.ask("readings", 1)
        assert program.ask("close") == []
