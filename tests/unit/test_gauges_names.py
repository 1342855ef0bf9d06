"""Gauges are called, counted and labelled as the semantic conventions say."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeter
from opentelemetry.semconv import _incubating, attributes
from opentelemetry.semconv._incubating import attributes as incubating_attributes
from opentelemetry.semconv._incubating import metrics as incubating_metrics
from opentelemetry.semconv._incubating.attributes import (
    cpu_attributes,
    disk_attributes,
    hw_attributes,
    network_attributes,
    process_attributes,
    system_attributes,
)

from periscope_otel.gauges.filesystems import _WELL_KNOWN
from periscope_otel.gauges.gpu import STATES
from periscope_otel.gauges.observe import FILESYSTEM, GPU, HOST, Figure
from periscope_otel.gauges.portable import _MODES
from periscope_otel.gauges.stats import (
    ContainerLimits,
    CpuStats,
    DiskStats,
    FilesystemStats,
    GpuDeviceStats,
    GpuIdentity,
    GpuStats,
    MemoryStats,
    NetworkStats,
    PagingStats,
    ProcessStats,
    SystemStats,
)
from periscope_otel.telemetry import names

ALL = (*HOST, *FILESYSTEM, *GPU)
OWN = [
    "periscope.host.load",
    "periscope.container.memory.limit",
    "periscope.container.cpu.limit",
    "periscope.gpu.power.limit",
    "periscope.gpu.clock.speed",
    "periscope.gpu.process.memory.usage",
    "periscope.gpu.remapped_rows",
]
OWN_ATTRIBUTES = {"periscope.host.load.period", "periscope.gpu.clock.domain"}


class Recorder(NoOpMeter):
    """Keeps the kind, name and unit of what is made on it."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.made: list[tuple[str, str, str]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("create_"):
            return super().__getattribute__(name)
        kind = name.removeprefix("create_").removeprefix("observable_")

        def create(name: str, callbacks: Any = None, unit: str = "", description: str = "") -> None:
            self.made.append((kind, name, unit))

        return create


def conventions() -> dict[str, tuple[str, str]]:
    """Return kind and unit of every metric of the conventions' package, by name."""
    recorder = Recorder()
    for found in pkgutil.iter_modules(incubating_metrics.__path__):
        module = importlib.import_module(f"{incubating_metrics.__name__}.{found.name}")
        for name, create in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("create_"):
                wants_callbacks = "callbacks" in inspect.signature(create).parameters
                create(recorder, *([()] if wants_callbacks else []))
    return {name: (kind, unit) for kind, name, unit in recorder.made}


def deprecated_attributes() -> set[str]:
    """Return the attributes that the conventions' package calls deprecated."""
    found = set()
    for one in pkgutil.iter_modules(incubating_attributes.__path__):
        module = importlib.import_module(f"{incubating_attributes.__name__}.{one.name}")
        text = inspect.getsource(module)
        found |= set(re.findall(r'Final = "([^"]+)"\n"""\nDeprecated', text))
    return found


def known_attributes() -> set[str]:
    found = set()
    for package in (attributes, incubating_attributes):
        for one in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{one.name}")
            found |= {value for name, value in vars(module).items() if name.isupper()}
    return found


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[str, str]]:
    return conventions()


def test_the_tables_are_read(tables):
    """The conventions' tables are found: a few that are known."""
    assert tables["system.cpu.time"] == ("counter", "s")
    assert tables["hw.temperature"] == ("gauge", "Cel")
    assert tables["process.memory.usage"] == ("up_down_counter", "By")
    assert _incubating is not None


@pytest.mark.parametrize("figure", ALL, ids=lambda one: one.metric.name)
def test_kind_and_unit_are_those_of_the_conventions(tables, figure):
    """Every metric has the kind and unit of the conventions, or is one of those they lack."""
    metric = figure.metric
    if metric.name in OWN:
        assert metric.name not in tables
    else:
        assert tables[metric.name] == (figure.kind, metric.unit)


def test_what_the_conventions_lack_is_all_there():
    """Our own metrics are exactly those of the design, each with its unit."""
    own = {f.metric.name: f.metric.unit for f in ALL if f.metric.name in OWN}
    assert sorted(own) == sorted(OWN)
    assert own["periscope.gpu.clock.speed"] == "Hz"
    assert own["periscope.gpu.power.limit"] == "W"


def test_no_metric_is_told_twice():
    """No two figures share a name."""
    told = [figure.metric.name for figure in ALL]
    assert len(told) == len(set(told))


def attribute_names() -> list[str]:
    block = inspect.getsource(names).split("CPU_MODE: Final")[1].split("OTHER: Final")[0]
    return re.findall(r'Final = "([^"]+)"|^ = "([^"]+)"', "CPU_MODE: Final" + block, re.MULTILINE)


def test_attributes_are_those_of_the_conventions():
    """Every attribute is one of the conventions that is not deprecated, or ours."""
    told = {one for pair in attribute_names() for one in pair if one}
    assert len(told) > 25
    assert told - known_attributes() == OWN_ATTRIBUTES
    assert told & deprecated_attributes() == set()


def values(enum: Any) -> set[str]:
    return {one.value for one in enum}


def test_values_are_those_of_the_conventions():
    """Modes, states, types and directions are values that the conventions list."""
    assert {mode for mode, _ in _MODES} <= values(cpu_attributes.CpuModeValues)
    assert set(STATES) <= values(hw_attributes.HwStateValues)
    assert {"used", "free", "buffers", "cached"} <= values(
        system_attributes.SystemMemoryStateValues
    )
    assert {"used", "free"} == values(system_attributes.SystemPagingStateValues)
    assert {"used", "free", "reserved"} == values(system_attributes.SystemFilesystemStateValues)
    assert {"minor", "major"} == values(system_attributes.SystemPagingFaultTypeValues)
    assert {"read", "write"} == values(disk_attributes.DiskIoDirectionValues)
    assert {"receive", "transmit"} == values(network_attributes.NetworkIoDirectionValues)
    assert {"voluntary", "involuntary"} == values(process_attributes.ProcessContextSwitchTypeValues)
    # `memory` is one of ours: the conventions allow others.
    assert {"general", "encoder", "decoder"} <= values(hw_attributes.HwGpuTaskValues)


REQUIRED: dict[str, set[str]] = {
    "process.cpu.time": {"cpu.mode"},
    "process.cpu.utilization": {"cpu.mode"},
    "process.context_switches": {"process.context_switch.type"},
    "process.disk.io": {"disk.io.direction"},
    "hw.gpu.utilization": {"hw.id"},
    "hw.gpu.memory.usage": {"hw.id"},
    "hw.gpu.memory.limit": {"hw.id"},
    "hw.gpu.memory.utilization": {"hw.id"},
    "hw.gpu.io": {"hw.id", "network.io.direction"},
    "hw.temperature": {"hw.id"},
    "hw.power": {"hw.id", "hw.type"},
    "hw.energy": {"hw.id", "hw.type"},
    "hw.errors": {"hw.id", "hw.type"},
    "hw.status": {"hw.id", "hw.type", "hw.state"},
}
"""What the conventions (1.44) require of each metric."""

_DISK = {"system.device", "disk.io.direction"}
_FILESYSTEM = {
    "system.device",
    "system.filesystem.mode",
    "system.filesystem.mountpoint",
    "system.filesystem.state",
    "system.filesystem.type",
}
_NETWORK = {"network.interface.name", "network.io.direction"}
_GPU = {
    "hw.name",
    "hw.model",
    "hw.vendor",
    "hw.driver_version",
    "hw.firmware_version",
    "hw.serial_number",
}
RECOMMENDED: dict[str, set[str]] = {
    "system.cpu.time": {"cpu.mode"},
    "system.cpu.utilization": {"cpu.mode"},
    "system.memory.usage": {"system.memory.state"},
    "system.memory.utilization": {"system.memory.state"},
    "system.paging.usage": {"system.paging.state", "system.device"},
    "system.disk.io": _DISK,
    "system.disk.operations": _DISK,
    "system.filesystem.usage": _FILESYSTEM,
    "system.filesystem.utilization": _FILESYSTEM,
    "system.network.io": _NETWORK,
    "system.network.errors": _NETWORK,
    "system.network.packet.dropped": _NETWORK,
    "process.paging.faults": {"system.paging.fault.type"},
    "hw.gpu.utilization": {"hw.gpu.task", *_GPU},
    "hw.gpu.memory.usage": _GPU,
    "hw.gpu.memory.limit": _GPU,
    "hw.gpu.memory.utilization": _GPU,
    "hw.gpu.io": _GPU,
    "hw.temperature": {"hw.name", "hw.sensor_location"},
    "hw.power": {"hw.name"},
    "hw.energy": {"hw.name"},
    "hw.errors": {"hw.name", "error.type"},
    "hw.status": {"hw.name"},
}
"""What the conventions recommend for each metric, as far as we know it."""

OURS: dict[str, set[str]] = {
    "periscope.host.load": {"periscope.host.load.period"},
    "periscope.gpu.power.limit": {"hw.id", "hw.name", "hw.type"},
    "periscope.gpu.clock.speed": {"hw.id", "hw.name", "hw.type", "periscope.gpu.clock.domain"},
    "periscope.gpu.process.memory.usage": {"hw.id", "hw.name", "hw.type"},
    "periscope.gpu.remapped_rows": {"hw.id", "hw.name", "hw.type", "error.type"},
}

# The type of hardware is in the name of the metric here, and told all the same: it is one label
# to choose all figures of GPUs by.
BESIDES = {one.metric.name: {"hw.type"} for one in GPU if one.metric.name.startswith("hw.gpu.")}

CPU = CpuStats(None, {"user": 1.0}, {"user": 0.5})
SYSTEM = SystemStats(
    taken_at=1.0,
    cpu_count=2,
    cpu=CPU,
    cpus=(),
    memory=MemoryStats(100, 40, 30, 60, 5, 6),
    paging=(PagingStats("/dev/dm-1", 1, 2),),
    disks=(DiskStats("sda", 1, 2, 3, 4),),
    filesystems=(),
    networks=(NetworkStats("eth0", 1, 2, 3, 4, 5, 6),),
    load=(1.0, 2.0, 3.0),
    uptime=5.0,
    container=ContainerLimits(1, 0.5),
    process=ProcessStats(
        1, {"user": 1.0}, {"user": 0.5}, 1, 2, 3, 4, {"voluntary": 1}, {"minor": 1}, {"read": 1}, 9
    ),
)
FILESYSTEMS = (FilesystemStats("/dev/sda1", "/", "ext4", "rw", 1, 2, 3),)
IDENTITY = GpuIdentity("GPU-1", "GPU 0", "H100", "NVIDIA", "165", "580", "96")
GPUS = GpuStats(
    1.0,
    (
        GpuDeviceStats(
            IDENTITY,
            state="ok",
            utilization={"general": 0.5},
            memory_total=100,
            memory_used=50,
            temperature=40.0,
            power=100.0,
            power_limit=700.0,
            energy=5.0,
            io={"receive": 1},
            errors={"corrected": 1},
            remapped_rows={"corrected": 1},
            clocks={"sm": 1e9},
            process_memory=10,
        ),
    ),
)


@pytest.mark.parametrize("figure", ALL, ids=lambda one: one.metric.name)
def test_attributes_are_what_the_conventions_want(figure):
    """Each metric has all attributes that are required or recommended for it, and no others."""
    stats = SYSTEM if figure in HOST else FILESYSTEMS if figure in FILESYSTEM else GPUS
    name = figure.metric.name
    observed = list(figure.observe(stats))
    assert observed
    expected = REQUIRED.get(name, set()) | RECOMMENDED.get(name, set()) | OURS.get(name, set())
    for one in observed:
        assert set(one.attributes or {}) == expected | BESIDES.get(name, set())


def test_attributes_that_are_opt_in_are_told_where_asked_for():
    """A CPU has its number where each is told; a GPU that is part of another has its parent."""
    cpus = SYSTEM._replace(cpus=(CPU._replace(number=3),))
    (time,) = HOST[0].observe(cpus)
    assert time.attributes == {"cpu.mode": "user", "cpu.logical_number": 3}
    part = GPUS.devices[0]._replace(identity=IDENTITY._replace(parent="GPU-0"))
    power = next(one for one in GPU if one.metric.name == "hw.power")
    (observed,) = power.observe(GPUS._replace(devices=(part,)))
    assert observed.attributes["hw.parent"] == "GPU-0"


def test_types_of_filesystems_are_those_of_the_conventions():
    """Where the conventions have a name for a type of filesystem it is the one that is told."""
    known = values(system_attributes.SystemFilesystemTypeValues)
    assert set(_WELL_KNOWN.values()) <= known
    assert not set(_WELL_KNOWN) & known


def test_figures_are_tuples_of_the_tables():
    """Host and GPU tables hold figures, which the instruments are made of."""
    assert all(isinstance(one, Figure) for one in ALL)
