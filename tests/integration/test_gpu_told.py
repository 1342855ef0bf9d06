"""GPU figures, and each way to lose them, as a Collector and Prometheus get them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
from nvml import FIRST, PARTS, SECOND, compile_stub
from telling import Gauges, gauges, latest, scrape, value

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from otlp import Receiver

NOT_SUPPORTED, NO_PERMISSION, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN = 3, 4, 15, 16, 999
EVERYWHERE = (-1, 0, 1)
OK = {FIRST: "ok", SECOND: "ok"}
POWER = {FIRST: 97.419, SECOND: 696.581}
PAGE = "127.0.0.1:0"
HANGS_AFTER = 2.0
"""Seconds after which a reading is taken to hang, for those that do."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def program(collector: Receiver, library: Path) -> Iterator[Gauges]:
    """Run a program that has read two GPUs."""
    with gauges(collector, library, gauges="gpu", prometheus=PAGE) as running:
        running.ask("readings", 2)
        yield running


class Told(NamedTuple):
    """What is told of GPUs at one moment."""

    states: dict[str, str]
    power: dict[str, float]
    devices: set[str]
    """Which have any figure besides their state."""


def tells(program: Gauges, collector: Receiver, wanted: Told) -> None:
    """Fail unless a Collector is told this, and Prometheus the same.

    A machine that stops the program in the middle of a reading lets that one look like a driver
    that hangs, until it goes on.
    """
    end = time.monotonic() + 30
    while True:
        sent, shown = sent_now(program, collector), shown_now(program)
        if sent == shown == wanted or time.monotonic() > end:
            break
    assert sent == wanted
    assert shown == wanted


def sent_now(program: Gauges, collector: Receiver) -> Told:
    before = len(collector.received().points)
    program.ask("flush")
    points = collector.received().points[before:]
    return Told(
        {
            one.attributes["hw.id"]: one.attributes["hw.state"]
            for one in points
            if one.metric == "hw.status" and one.value
        },
        {one.attributes["hw.id"]: one.value for one in points if one.metric == "hw.power"},
        {
            one.attributes["hw.id"]
            for one in points
            if one.metric != "hw.status" and "hw.id" in one.attributes
        },
    )


def shown_now(program: Gauges) -> Told:
    samples = scrape(program.port)
    return Told(
        {
            one.labels["hw_id"]: one.labels["hw_state"]
            for one in samples.get("hw_status", ())
            if one.value
        },
        {one.labels["hw_id"]: one.value for one in samples.get("hw_power_watts", ())},
        {
            one.labels["hw_id"]
            for name, found in samples.items()
            for one in found
            if name != "hw_status" and "hw_id" in one.labels
        },
    )


NOTHING = Told({}, {}, set())
WELL = Told(OK, POWER, set(OK))
ONE_FAILED = Told({FIRST: "failed", SECOND: "ok"}, {SECOND: 696.581}, {SECOND})
ALL_FAILED = Told({FIRST: "failed", SECOND: "failed"}, {}, set())


# Figures.


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
    assert {p.attributes["error.type"] for p in latest(collector, "hw.errors")} == {
        "corrected",
        "uncorrected",
    }
    rows = "periscope.gpu.remapped_rows"
    assert value(collector, rows, error_type="corrected", **busy) == 2
    assert value(collector, rows, error_type="uncorrected", **busy) == 1
    assert value(collector, "periscope.gpu.power.limit", **busy) == 700
    clock = {"periscope_gpu_clock_domain": "sm"}
    assert value(collector, "periscope.gpu.clock.speed", **clock, **busy) == 1350e6
    assert value(collector, "periscope.gpu.process.memory.usage") == 1073741824
    states = {p.attributes["hw.state"]: p.value for p in latest(collector, "hw.status", **busy)}
    assert states == {"ok": 1, "degraded": 0, "predicted_failure": 0, "failed": 0}
    assert latest(collector, "system.memory.usage") == []

    for metric in ("hw.temperature", "hw.power", "hw.energy"):
        assert {type(point.value) for point in latest(collector, metric)} == {float}
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


# Drivers that are away.


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (4, "no_permission"),
        (9, "driver_not_loaded"),
        (13, "function_not_found"),
        (15, "gpu_is_lost"),
        (18, "lib_rm_version_mismatch"),
        (UNKNOWN, "nvml_999"),
    ],
)
def test_a_driver_that_does_not_open(collector, library, code, reason):
    """A driver that does not open is one line and no figure, until it opens."""
    refused = [["answer", "nvmlInitWithFlags", -1, code]]
    with gauges(collector, library, gauges="gpu", prometheus=PAGE, stub=refused) as program:
        assert program.ask("gpu_until", reason) == [{}, reason]
        tells(program, collector, NOTHING)
        program.ask("readings", 20)
        (line,) = program.ask("logs")
        assert line.startswith("no GPU figures: ")
        assert f"({reason})" in line
        program.ask("stub", "answer", "nvmlInitWithFlags", -1, 0)
        assert program.ask("gpu_until", None) == [OK, None]
        tells(program, collector, WELL)
        assert program.ask("logged", "are back")[1:] == ["GPU figures are back"]


def test_a_library_that_is_missing(collector, tmp_path):
    """Where there is no library there is one line and no figure, until it is installed."""
    with gauges(collector, tmp_path, gauges="gpu", prometheus=PAGE) as program:
        assert program.ask("gpu_until", "library_not_found") == [{}, "library_not_found"]
        tells(program, collector, NOTHING)
        assert len(program.ask("logs")) == 1
        compile_stub(tmp_path)
        assert program.ask("gpu_until", None) == [OK, None]
        tells(program, collector, WELL)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, "uninitialized"),
        (9, "driver_not_loaded"),
        (18, "lib_rm_version_mismatch"),
        (UNKNOWN, "nvml_999"),
    ],
)
def test_a_driver_that_goes(program, collector, code, reason):
    """While a driver is away its GPUs are failed and tell nothing else, and they come back."""
    tells(program, collector, WELL)
    for device in EVERYWHERE:
        program.ask("stub", "answer", "*", device, code)
    program.ask("gpu_until", reason)
    tells(program, collector, ALL_FAILED)
    for device in EVERYWHERE:
        program.ask("stub", "answer", "*", device, 0)
    assert program.ask("gpu_until", None) == [OK, None]
    tells(program, collector, WELL)
    assert program.ask("logged", "are back")[-1] == "GPU figures are back"


# GPUs that are lost.


@pytest.mark.parametrize(
    ("code", "reason"),
    [(GPU_IS_LOST, "gpu_is_lost"), (RESET_REQUIRED, "reset_required"), (UNKNOWN, "no_answer")],
)
def test_a_gpu_that_is_lost_and_found(program, collector, code, reason):
    """A GPU that is lost is failed and has no other figures, and has them again when it is back."""
    program.ask("stub", "answer", "*", 0, code)
    program.ask("gpu_until", reason)
    tells(program, collector, ONE_FAILED)
    program.ask("stub", "answer", "*", 0, 0)
    assert program.ask("gpu_until", None) == [OK, None]
    tells(program, collector, WELL)
    lines = program.ask("logged", "are back")
    assert lines[0].startswith(f"no figures of GPU 0 ({FIRST}): ")
    assert lines[-1] == f"figures of GPU 0 ({FIRST}) are back"


def test_a_gpu_that_is_not_permitted(collector, library):
    """A GPU that this user may not use has no figure and no state; the other one has all."""
    refused = [["answer", "nvmlDeviceGetHandleByIndex_v2", 0, NO_PERMISSION]]
    with gauges(collector, library, gauges="gpu", prometheus=PAGE, stub=refused) as program:
        program.ask("gpu_until", "no_permission")
        tells(program, collector, Told({SECOND: "ok"}, {SECOND: 696.581}, {SECOND}))
        program.ask("stub", "answer", "nvmlDeviceGetHandleByIndex_v2", 0, 0)
        assert program.ask("gpu_until", None) == [OK, None]
        tells(program, collector, WELL)


def test_a_figure_that_is_not_supported(collector, library):
    """What one GPU does not support is absent of that one alone."""
    refused = [["answer", "nvmlDeviceGetPowerUsage", 0, NOT_SUPPORTED]]
    with gauges(collector, library, gauges="gpu", prometheus=PAGE, stub=refused) as program:
        program.ask("readings", 2)
        tells(program, collector, WELL._replace(power={SECOND: 696.581}))
        assert program.ask("logs") == []


def test_numbers_that_stand_for_none(collector, library):
    """Numbers by which NVML says that there is none cost their own figures, not the export."""
    odd = [["ecc", 0, -1], ["memory", 0, -1], ["power", 0, 2**32 - 1]]
    with gauges(collector, library, gauges="gpu", prometheus=PAGE, stub=odd) as program:
        program.ask("readings", 2)
        tells(program, collector, WELL._replace(power={SECOND: 696.581}))
    assert latest(collector, "hw.errors", hw_id=FIRST, error_type="corrected") == []
    assert latest(collector, "hw.gpu.memory.usage", hw_id=FIRST) == []
    assert value(collector, "hw.gpu.memory.limit", hw_id=FIRST) == 85520809984


def test_counters_of_pcie_that_are_narrow(collector, library):
    """Where the driver counts bytes over PCIe in 32 bits there is no such metric."""
    narrow = [["io", 0, 780000, 619000, 1]]
    with gauges(collector, library, gauges="gpu", prometheus=PAGE, stub=narrow) as program:
        program.ask("readings", 2)
        tells(program, collector, WELL)
    assert latest(collector, "hw.gpu.io") == []


# Calls that hang.


@pytest.mark.parametrize(("device", "failed"), [(0, FIRST), (1, SECOND)], ids=["first", "second"])
def test_a_call_that_hangs(program, collector, device, failed):
    """While the reading of one GPU hangs that one is failed, and nothing else is told of GPUs."""
    program.ask("patience", HANGS_AFTER)
    program.ask("stub", "hang_on", "nvmlDeviceGetPowerUsage", device)
    assert program.ask("gpu_until", "driver_hangs") == [{failed: "failed"}, "driver_hangs"]
    tells(program, collector, Told({failed: "failed"}, {}, set()))
    program.ask("stub", "hang", "")
    assert program.ask("gpu_until", None) == [OK, None]
    tells(program, collector, WELL)
    assert len([line for line in program.ask("logs") if "has not come back" in line]) == 1


def test_a_call_that_hangs_costs_the_host_nothing(collector, library):
    """While a call into the driver hangs the host's figures go on, and so do forks and the end."""
    with gauges(collector, library, gauges=True) as program:
        program.ask("readings", 2)
        program.ask("patience", HANGS_AFTER)
        program.ask("stub", "hang", "nvmlDeviceGetPowerUsage")
        program.ask("gpu_until", "driver_hangs")
        program.ask("readings", 3)
        assert program.ask("host") is not None
        program.ask("flush")
        assert latest(collector, "system.memory.usage")
        assert program.ask("fork")[1] == 7


def test_opening_that_hangs(collector, library):
    """A driver that hangs when it is first opened has no GPUs, until it comes back."""
    hanging = [["hang", "nvmlInitWithFlags"]]
    settings = {"gauges": "gpu", "prometheus": PAGE, "stub": hanging, "impatient": True}
    with gauges(collector, library, **settings) as program:
        assert program.ask("gpu_until", "driver_hangs") == [{}, "driver_hangs"]
        tells(program, collector, NOTHING)
        program.ask("stub", "hang", "")
        assert program.ask("gpu_until", None) == [OK, None]
        tells(program, collector, WELL)


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlShutdown", "nvmlDeviceGetCount_v2"])
def test_looking_again_that_hangs(program, collector, function):
    """While looking for a lost GPU hangs all are failed, and told again when it comes back."""
    program.ask("patience", HANGS_AFTER)
    program.ask("stub", "hang", function)
    program.ask("stub", "answer", "nvmlDeviceGetPowerUsage", 0, GPU_IS_LOST)
    program.ask("gpu_until", "driver_hangs")
    tells(program, collector, ALL_FAILED)
    program.ask("stub", "answer", "nvmlDeviceGetPowerUsage", 0, 0)
    program.ask("stub", "hang", "")
    assert program.ask("gpu_until", None) == [OK, None]
    tells(program, collector, WELL)


def test_an_end_that_hangs(program, collector):
    """A driver that hangs when it is let go of does not keep the process from ending well."""
    program.ask("stub", "hang", "nvmlShutdown")
    tells(program, collector, WELL)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    ("function", "failed"),
    [
        ("nvmlInitWithFlags", {FIRST: "failed", SECOND: "failed"}),
        ("nvmlDeviceGetPowerUsage", {FIRST: "failed"}),
    ],
)
def test_a_forked_child_that_hangs(program, collector, function, failed):
    """A driver that hangs in a forked child is failed there, and read on in the parent."""
    pid, status = program.ask("fork", function)
    assert status == 7
    points = [one for one in collector.received().points if one.resource["process.pid"] == pid]
    states = {
        one.attributes["hw.id"]: one.attributes["hw.state"]
        for one in points
        if one.metric == "hw.status" and one.value
    }
    assert states == failed
    assert [one for one in points if one.metric == "hw.power"] == []
    tells(program, collector, WELL)
