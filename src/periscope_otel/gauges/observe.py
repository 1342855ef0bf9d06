"""The metrics: which figure is which metric, of what kind, with which attributes.

Names, units, kinds and attributes are those of the OpenTelemetry semantic conventions 1.44, and
`periscope.*` for what these lack. A callback reads what was sampled last and nothing else.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry.metrics import Observation

from periscope_otel.gauges.gpu import STATES
from periscope_otel.telemetry import names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from periscope_otel.gauges.stats import (
        CpuStats,
        FilesystemStats,
        GpuDeviceStats,
        GpuStats,
        SystemStats,
    )
    from periscope_otel.telemetry.names import Metric

COUNTER, UP_DOWN_COUNTER, GAUGE = "counter", "up_down_counter", "gauge"


class Figure(NamedTuple):
    """One metric: what it is called, of which kind it is, and how it is taken from the stats."""

    metric: Metric
    kind: str
    observe: Callable[[Any], Iterable[Observation]]


def _by(attribute: str, values: Mapping[str, float] | None) -> Iterator[Observation]:
    for name, value in (values or {}).items():
        yield Observation(value, {attribute: name})


def _one(value: float | None) -> Iterable[Observation]:
    return () if value is None else (Observation(value),)


# The host.


def _cpu_times(stats: SystemStats) -> Iterator[Observation]:
    for cpu in stats.cpus or (stats.cpu,):
        yield from _of_cpu(cpu, cpu.times)


def _cpu_utilization(stats: SystemStats) -> Iterator[Observation]:
    for cpu in stats.cpus or (stats.cpu,):
        yield from _of_cpu(cpu, cpu.utilization or {})


def _of_cpu(cpu: CpuStats, values: Mapping[str, float]) -> Iterator[Observation]:
    if cpu.number is None:
        yield from _by(names.CPU_MODE, values)
        return
    for mode, value in values.items():
        yield Observation(value, {names.CPU_MODE: mode, names.CPU_NUMBER: cpu.number})


def _memory_states(stats: SystemStats) -> dict[str, int]:
    memory = stats.memory
    states = {
        "used": memory.used,
        "free": memory.free,
        "buffers": memory.buffers,
        "cached": memory.cached,
    }
    return {state: value for state, value in states.items() if value is not None}


def _memory_utilization(stats: SystemStats) -> Iterator[Observation]:
    shares = {
        state: value / stats.memory.total
        for state, value in _memory_states(stats).items()
        if stats.memory.total
    }
    return _by(names.MEMORY_STATE, shares)


def _disk_io(stats: SystemStats) -> Iterator[Observation]:
    for disk in stats.disks:
        yield from _both_ways(disk.device, disk.read_bytes, disk.written_bytes)


def _disk_operations(stats: SystemStats) -> Iterator[Observation]:
    for disk in stats.disks:
        yield from _both_ways(disk.device, disk.reads, disk.writes)


def _both_ways(device: str, read: int, written: int) -> Iterator[Observation]:
    for direction, value in (("read", read), ("write", written)):
        yield Observation(value, {names.DEVICE: device, names.DISK_DIRECTION: direction})


def _filesystem_usage(stats: SystemStats) -> Iterator[Observation]:
    for one in stats.filesystems:
        yield from _of_filesystem(one, 1)


def _filesystem_utilization(stats: SystemStats) -> Iterator[Observation]:
    for one in stats.filesystems:
        yield from _of_filesystem(one, one.used + one.free + one.reserved)


def _of_filesystem(one: FilesystemStats, whole: int) -> Iterator[Observation]:
    for state, value in (("used", one.used), ("free", one.free), ("reserved", one.reserved)):
        yield Observation(
            value if whole == 1 else value / whole,
            {
                names.DEVICE: one.device,
                names.FILESYSTEM_MOUNTPOINT: one.mountpoint,
                names.FILESYSTEM_TYPE: one.type,
                names.FILESYSTEM_MODE: one.mode,
                names.FILESYSTEM_STATE: state,
            },
        )


def _network(received: str, transmitted: str) -> Callable[[SystemStats], Iterator[Observation]]:
    def observe(stats: SystemStats) -> Iterator[Observation]:
        for one in stats.networks:
            for direction, field in (("receive", received), ("transmit", transmitted)):
                attributes = {names.INTERFACE: one.interface, names.NETWORK_DIRECTION: direction}
                yield Observation(getattr(one, field), attributes)

    return observe


def _load(stats: SystemStats) -> Iterator[Observation]:
    averages = stats.load or ()
    return _by(names.LOAD_PERIOD, dict(zip(("1m", "5m", "15m"), averages, strict=False)))


def _paging(stats: SystemStats) -> Iterator[Observation]:
    return _by(names.PAGING_STATE, stats.paging and stats.paging._asdict())


HOST: tuple[Figure, ...] = (
    Figure(names.SYSTEM_CPU_TIME, COUNTER, _cpu_times),
    Figure(names.SYSTEM_CPU_UTILIZATION, GAUGE, _cpu_utilization),
    Figure(names.SYSTEM_CPU_COUNT, UP_DOWN_COUNTER, lambda stats: _one(stats.cpu_count)),
    Figure(
        names.SYSTEM_MEMORY_USAGE,
        UP_DOWN_COUNTER,
        lambda stats: _by(names.MEMORY_STATE, _memory_states(stats)),
    ),
    Figure(names.SYSTEM_MEMORY_UTILIZATION, GAUGE, _memory_utilization),
    Figure(names.SYSTEM_MEMORY_LIMIT, UP_DOWN_COUNTER, lambda stats: _one(stats.memory.total)),
    Figure(
        names.SYSTEM_MEMORY_AVAILABLE,
        UP_DOWN_COUNTER,
        lambda stats: _one(stats.memory.available if sys.platform == "linux" else None),
    ),
    Figure(names.SYSTEM_PAGING_USAGE, UP_DOWN_COUNTER, _paging),
    Figure(names.SYSTEM_DISK_IO, COUNTER, _disk_io),
    Figure(names.SYSTEM_DISK_OPERATIONS, COUNTER, _disk_operations),
    Figure(names.SYSTEM_FILESYSTEM_USAGE, UP_DOWN_COUNTER, _filesystem_usage),
    Figure(names.SYSTEM_FILESYSTEM_UTILIZATION, GAUGE, _filesystem_utilization),
    Figure(names.SYSTEM_NETWORK_IO, COUNTER, _network("received_bytes", "transmitted_bytes")),
    Figure(names.SYSTEM_NETWORK_ERRORS, COUNTER, _network("receive_errors", "transmit_errors")),
    Figure(names.SYSTEM_NETWORK_DROPPED, COUNTER, _network("receive_dropped", "transmit_dropped")),
    Figure(names.SYSTEM_UPTIME, GAUGE, lambda stats: _one(stats.uptime)),
    Figure(names.HOST_LOAD, GAUGE, _load),
    Figure(
        names.CONTAINER_MEMORY_LIMIT,
        UP_DOWN_COUNTER,
        lambda stats: _one(stats.container.memory),
    ),
    Figure(names.CONTAINER_CPU_LIMIT, UP_DOWN_COUNTER, lambda stats: _one(stats.container.cpus)),
    Figure(
        names.PROCESS_CPU_TIME,
        COUNTER,
        lambda stats: _by(names.CPU_MODE, stats.process.cpu_times),
    ),
    Figure(
        names.PROCESS_CPU_UTILIZATION,
        GAUGE,
        lambda stats: _by(names.CPU_MODE, stats.process.cpu_utilization),
    ),
    Figure(names.PROCESS_MEMORY_USAGE, UP_DOWN_COUNTER, lambda stats: _one(stats.process.memory)),
    Figure(
        names.PROCESS_MEMORY_VIRTUAL,
        UP_DOWN_COUNTER,
        lambda stats: _one(stats.process.virtual_memory),
    ),
    Figure(names.PROCESS_THREAD_COUNT, UP_DOWN_COUNTER, lambda stats: _one(stats.process.threads)),
    Figure(
        names.PROCESS_FILE_DESCRIPTORS,
        UP_DOWN_COUNTER,
        lambda stats: _one(stats.process.file_descriptors),
    ),
    Figure(
        names.PROCESS_CONTEXT_SWITCHES,
        COUNTER,
        lambda stats: _by(names.SWITCH_TYPE, stats.process.context_switches),
    ),
    Figure(
        names.PROCESS_PAGING_FAULTS,
        COUNTER,
        lambda stats: _by(names.FAULT_TYPE, stats.process.paging_faults),
    ),
    Figure(
        names.PROCESS_DISK_IO,
        COUNTER,
        lambda stats: _by(names.DISK_DIRECTION, stats.process.disk_io),
    ),
    Figure(names.PROCESS_UPTIME, GAUGE, lambda stats: _one(stats.process.uptime)),
)
"""What is told of the host and this process."""


# GPUs.

_IDENTITY = (
    (names.HW_MODEL, "model"),
    (names.HW_VENDOR, "vendor"),
    (names.HW_SERIAL_NUMBER, "serial_number"),
    (names.HW_DRIVER_VERSION, "driver_version"),
    (names.HW_FIRMWARE_VERSION, "firmware_version"),
)


def _component(device: GpuDeviceStats) -> dict[str, str]:
    """Return the attributes that the conventions have for any component."""
    identity = device.identity
    attributes = {names.HW_ID: identity.id, names.HW_NAME: identity.name, names.HW_TYPE: "gpu"}
    if identity.parent is not None:
        attributes[names.HW_PARENT] = identity.parent
    return attributes


def _gpu(device: GpuDeviceStats) -> dict[str, str]:
    """Return the attributes that the conventions have for GPUs."""
    attributes = _component(device)
    for name, field in _IDENTITY:
        value = getattr(device.identity, field)
        if value:
            attributes[name] = value
    return attributes


def _sensor(device: GpuDeviceStats) -> dict[str, str]:
    """Return the attributes that the conventions have for a temperature sensor."""
    attributes = {**_component(device), names.HW_SENSOR_LOCATION: "gpu"}
    del attributes[names.HW_TYPE]
    return attributes


def _gpu_figure(
    metric: Metric,
    kind: str,
    value_of: Callable[[GpuDeviceStats], float | None],
    attributes_of: Callable[[GpuDeviceStats], dict[str, str]] = _gpu,
) -> Figure:
    """Return a figure with one value a device."""

    def observe(stats: GpuStats) -> Iterator[Observation]:
        for device in stats.devices:
            value = value_of(device)
            if value is not None:
                yield Observation(value, attributes_of(device))

    return Figure(metric, kind, observe)


def _gpu_figures(
    metric: Metric,
    kind: str,
    by: str,
    values_of: Callable[[GpuDeviceStats], Mapping[str, float] | None],
    attributes_of: Callable[[GpuDeviceStats], dict[str, str]] = _gpu,
) -> Figure:
    """Return a figure with several values a device, told apart by the attribute `by`."""

    def observe(stats: GpuStats) -> Iterator[Observation]:
        for device in stats.devices:
            values = values_of(device)
            shared = attributes_of(device) if values else {}
            for name, value in (values or {}).items():
                yield Observation(value, {**shared, by: name})

    return Figure(metric, kind, observe)


def _memory_share(device: GpuDeviceStats) -> float | None:
    if device.memory_used is None or not device.memory_total:
        return None
    return device.memory_used / device.memory_total


def _states(device: GpuDeviceStats) -> dict[str, int] | None:
    if device.state is None:
        return None
    return {state: int(state == device.state) for state in STATES}


GPU: tuple[Figure, ...] = (
    _gpu_figures(names.GPU_UTILIZATION, GAUGE, names.GPU_TASK, lambda one: one.utilization),
    _gpu_figure(names.GPU_MEMORY_USAGE, UP_DOWN_COUNTER, lambda one: one.memory_used),
    _gpu_figure(names.GPU_MEMORY_LIMIT, UP_DOWN_COUNTER, lambda one: one.memory_total),
    _gpu_figure(names.GPU_MEMORY_UTILIZATION, GAUGE, _memory_share),
    _gpu_figures(names.GPU_IO, COUNTER, names.NETWORK_DIRECTION, lambda one: one.io),
    _gpu_figure(names.HW_TEMPERATURE, GAUGE, lambda one: one.temperature, _sensor),
    _gpu_figure(names.HW_POWER, GAUGE, lambda one: one.power, _component),
    _gpu_figure(names.HW_ENERGY, COUNTER, lambda one: one.energy, _component),
    _gpu_figures(names.HW_ERRORS, COUNTER, names.ERROR_TYPE, lambda one: one.errors, _component),
    _gpu_figures(names.HW_STATUS, UP_DOWN_COUNTER, names.HW_STATE, _states, _component),
    _gpu_figures(
        names.GPU_REMAPPED_ROWS,
        COUNTER,
        names.ERROR_TYPE,
        lambda one: one.remapped_rows,
        _component,
    ),
    _gpu_figure(names.GPU_POWER_LIMIT, GAUGE, lambda one: one.power_limit, _component),
    _gpu_figures(names.GPU_CLOCK_SPEED, GAUGE, names.GPU_CLOCK, lambda one: one.clocks, _component),
    _gpu_figure(
        names.GPU_PROCESS_MEMORY, UP_DOWN_COUNTER, lambda one: one.process_memory, _component
    ),
)
"""What is told of GPUs."""
