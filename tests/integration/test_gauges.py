"""Gauges from end to end: what a Collector and Prometheus get from a real process."""

from __future__ import annotations

import http.client
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from nvml import FIRST, PARTS, SECOND, compile_stub, ends_well
from processes import otlp, running
from prometheus_client.parser import text_string_to_metric_families

from periscope_otel.gauges.observe import GPU, HOST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from otlp import Point, Receiver
    from processes import Program

GPU_IS_LOST = 15


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


class Gauges:
    """The program `gauges`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.port = int(program.line())

    def ask(self, *command: object) -> Any:
        """Have it do something, and return its answer."""
        self.program.tell(json.dumps(command))
        return json.loads(self.program.line())


@contextmanager
def gauges(
    collector: Receiver | None = None, library: Path | None = None, **settings: object
) -> Iterator[Gauges]:
    """Run a program with these settings."""
    env = {} if collector is None else otlp(collector.http)
    if library is not None:
        env["LD_LIBRARY_PATH"] = str(library)
    with running("gauges", json.dumps(settings), env=env) as program:
        yield Gauges(program)
        ends_well(program)


def latest(collector: Receiver, metric: str, **labels: object) -> list[Point]:
    """Return the last point of each series of a metric, those with these attributes."""
    wanted = {name.replace("_", "."): value for name, value in labels.items()}
    found = {
        tuple(sorted(point.attributes.items())): point
        for point in collector.received().points
        if point.metric == metric and wanted.items() <= point.attributes.items()
    }
    return list(found.values())


def value(collector: Receiver, metric: str, **labels: object) -> float:
    """Return the value of the one series that matches."""
    (point,) = latest(collector, metric, **labels)
    return point.value


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


def test_gpu_figures_at_the_collector(collector, library):
    """GPU figures arrive in base units, with the attributes of the conventions."""
    with gauges(collector, library, gauges=["gpu"]) as program:
        program.ask("readings", 2)
        program.ask("flush")
    busy = {"hw_id": SECOND}
    assert value(collector, "hw.gpu.utilization", hw_gpu_task="general", **busy) == 1.0
    assert value(collector, "hw.gpu.utilization", hw_gpu_task="memory", **busy) == 0.33
    assert value(collector, "hw.gpu.utilization", hw_gpu_task="decoder", **busy) == 0.12
    assert latest(collector, "hw.gpu.utilization", hw_gpu_task="encoder") == []
    assert value(collector, "hw.gpu.memory.usage", **busy) == 42760404992
    assert value(collector, "hw.gpu.memory.limit", **busy) == 85520809984
    assert value(collector, "hw.gpu.memory.utilization", **busy) == 0.5
    assert value(collector, "hw.gpu.io", network_io_direction="transmit", **busy) == 4096
    assert value(collector, "hw.gpu.io", network_io_direction="receive", **busy) == 8192
    assert value(collector, "hw.temperature", **busy) == 57
    assert value(collector, "hw.power", **busy) == 696.581
    assert value(collector, "hw.energy", **busy) == 8295.448
    assert value(collector, "hw.errors", error_type="corrected", **busy) == 3
    assert value(collector, "hw.errors", error_type="uncorrected", **busy) == 1
    assert value(collector, "periscope.gpu.power.limit", **busy) == 700
    clock = {"periscope_gpu_clock_domain": "sm"}
    assert value(collector, "periscope.gpu.clock.speed", **clock, **busy) == 1350e6
    assert value(collector, "periscope.gpu.process.memory.usage") == 1073741824
    states = {p.attributes["hw.state"]: p.value for p in latest(collector, "hw.status", **busy)}
    assert states == {"ok": 1, "degraded": 0, "predicted_failure": 0, "failed": 0}
    assert latest(collector, "system.memory.usage") == []

    (power,) = latest(collector, "hw.power", **busy)
    assert power.attributes == {"hw.id": SECOND, "hw.name": "GPU 1", "hw.type": "gpu"}
    (memory,) = latest(collector, "hw.gpu.memory.usage", **busy)
    assert memory.attributes == {
        **power.attributes,
        "hw.model": "NVIDIA H100 80GB HBM3",
        "hw.vendor": "NVIDIA",
        "hw.serial_number": "1650000000002",
        "hw.driver_version": "580.159.04",
        "hw.firmware_version": "96.00.74.00.01",
    }
    (heat,) = latest(collector, "hw.temperature", **busy)
    assert heat.attributes == {"hw.id": SECOND, "hw.name": "GPU 1", "hw.sensor_location": "gpu"}


def scrape(port: int) -> dict[str, list[Any]]:
    """Return the samples of the Prometheus page by name."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    samples: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


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


def test_mig_instances_at_collector_and_prometheus(collector, library, tmp_path):
    """MIG instances arrive as devices with their parent, and only with what they tell."""
    with gauges(
        collector, compile_stub(tmp_path, "-DMIG=1"), gauges="gpu", prometheus="127.0.0.1:0"
    ) as program:
        program.ask("readings", 2)
        program.ask("flush")
        samples = scrape(program.port)
    (part,) = latest(collector, "hw.gpu.memory.limit", hw_id=PARTS[1])
    assert part.value == 20937965568
    assert part.attributes["hw.parent"] == FIRST
    assert part.attributes["hw.name"] == "GPU 0 MIG 2"
    assert latest(collector, "hw.temperature", hw_id=PARTS[1]) == []
    parents = {
        one.labels["hw_id"]: one.labels.get("hw_parent", "")
        for one in samples["hw_gpu_memory_limit_bytes"]
    }
    assert parents == {FIRST: "", SECOND: "", PARTS[0]: FIRST, PARTS[1]: FIRST}


def test_lost_and_found_at_the_collector(collector, library):
    """A GPU that is lost is failed and has no other figures, and has them again when it is back."""
    with gauges(collector, library, gauges=["gpu"]) as program:
        program.ask("readings", 2)
        program.ask("stub", "answer", "*", 0, GPU_IS_LOST)
        program.ask("readings", 2)
        program.ask("flush")
    failed = {"hw_id": FIRST, "hw_state": "failed"}
    assert value(collector, "hw.status", **failed) == 1
    assert latest(collector, "hw.temperature", hw_id=FIRST) == []
    assert value(collector, "hw.temperature", hw_id=SECOND) == 57


def test_a_call_that_hangs(collector, library):
    """A driver call that hangs is told as failed, costs the host's figures nothing, nor the end."""
    with gauges(collector, library, gauges=True) as program:
        program.ask("readings", 2)
        program.ask("stub", "hang", "nvmlDeviceGetPowerUsage")
        devices, problem = program.ask("gpu_until", "driver_hangs")
        assert (devices, problem) == ({FIRST: "failed", SECOND: "failed"}, "driver_hangs")
        program.ask("readings", 3)
        assert program.ask("host") is not None
        before = len(latest(collector, "hw.power"))
        program.ask("flush")
        assert value(collector, "hw.status", hw_id=FIRST, hw_state="failed") == 1
        assert len(latest(collector, "hw.power")) == before == 0
        assert latest(collector, "system.memory.usage")
        assert len([line for line in program.ask("logs") if "has not come back" in line]) == 1
        assert program.ask("fork")[1] == 7


def test_a_call_that_comes_back(library):
    """Once a call that hung returns, figures are back."""
    with gauges(None, library, gauges=True) as program:
        program.ask("readings", 2)
        program.ask("stub", "hang", "nvmlDeviceGetPowerUsage")
        assert program.ask("gpu_until", "driver_hangs")[1] == "driver_hangs"
        program.ask("stub", "hang", "")
        assert program.ask("gpu_until", None) == [{FIRST: "ok", SECOND: "ok"}, None]


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
