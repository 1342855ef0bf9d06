"""Every name the plugin emits, with its unit and description: the one table.

Names follow the OpenTelemetry naming rules (lower case, dots between namespaces, UCUM units);
`error.type` and the `exception.*` event are taken from the semantic conventions as they are.
"""

from __future__ import annotations

from typing import Final, NamedTuple

SCOPE: Final = "periscope_otel"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

# Attributes of spans and metrics.
OPERATION_NAME: Final = "threat.ingest.operation.name"
FEED_NAME: Final = "threat.feed.name"
OUTCOME: Final = "threat.ingest.outcome"
ERROR_TYPE: Final = "error.type"
BREAKER_NAME: Final = "circuit_breaker.name"
BREAKER_STATE: Final = "circuit_breaker.state"
BREAKER_FROM: Final = "circuit_breaker.from_state"
BREAKER_TO: Final = "circuit_breaker.to_state"
BREAKER_CALL_OUTCOME: Final = "circuit_breaker.call.outcome"
BREAKER_REASON: Final = "circuit_breaker.reason"
BREAKER_OPEN_FOR: Final = "circuit_breaker.open.duration"
BREAKER_ADOPTED: Final = "circuit_breaker.adopted"
BREAKER_TRANSITION_SPAN: Final = "circuit_breaker.transition"
ITEM_OUTCOME: Final = "threat.ingest.item.outcome"
SKIP_REASON: Final = "threat.ingest.skip.reason"

# Attributes of spans alone.
ITEMS_RECEIVED: Final = "threat.ingest.items.received"
ITEMS_CONVERTED: Final = "threat.ingest.items.converted"
ITEMS_INGESTED: Final = "threat.ingest.items.ingested"
ITEMS_SKIPPED: Final = "threat.ingest.items.skipped"
ITEMS_FAILED: Final = "threat.ingest.items.failed"
ITEMS_UNACCOUNTED: Final = "threat.ingest.items.unaccounted"
ITEMS_EXCESS: Final = "threat.ingest.items.excess"
CONSUMER_DURATION: Final = "threat.ingest.consumer.duration"

# The exception event of the semantic conventions, and ours for an item that failed.
EXCEPTION_EVENT: Final = "exception"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACKTRACE: Final = "exception.stacktrace"
ITEM_FAILED_EVENT: Final = "threat.ingest.item.failed"

# Dead letters: the event on the span of what failed, and the attributes of their metrics.
DEAD_LETTER_EVENT: Final = "dead_letter.put"
DEAD_LETTER_ID: Final = "dead_letter.id"
DEAD_LETTER_QUEUE: Final = "dead_letter.queue"
DEAD_LETTER_STATE: Final = "dead_letter.state"
DEAD_LETTER_COUNT: Final = "dead_letter.count"
DEAD_LETTER_OUTCOME: Final = "dead_letter.outcome"
DEAD_LETTER_REASON: Final = "dead_letter.reason"

# Retries: the event on the span of what is tried again, and its attributes.
RETRY_EVENT: Final = "retry"
RETRY_ATTEMPT: Final = "retry.attempt"
RETRY_WAIT: Final = "retry.wait"
RETRY_REASON: Final = "retry.reason"

# Attributes of the plugin's own metrics.
COMPONENT: Final = "periscope.component"
SIGNAL: Final = "periscope.signal"
EXPORT_OUTCOME: Final = "periscope.export.outcome"

# Attributes of host, process and hardware metrics: those of the semantic conventions, then ours.
CPU_MODE: Final = "cpu.mode"
CPU_NUMBER: Final = "cpu.logical_number"
MEMORY_STATE: Final = "system.memory.state"
PAGING_STATE: Final = "system.paging.state"
FAULT_TYPE: Final = "system.paging.fault.type"
DEVICE: Final = "system.device"
DISK_DIRECTION: Final = "disk.io.direction"
FILESYSTEM_MODE: Final = "system.filesystem.mode"
FILESYSTEM_MOUNTPOINT: Final = "system.filesystem.mountpoint"
FILESYSTEM_STATE: Final = "system.filesystem.state"
FILESYSTEM_TYPE: Final = "system.filesystem.type"
INTERFACE: Final = "network.interface.name"
NETWORK_DIRECTION: Final = "network.io.direction"
SWITCH_TYPE: Final = "process.context_switch.type"
HW_ID: Final = "hw.id"
HW_NAME: Final = "hw.name"
HW_TYPE: Final = "hw.type"
HW_MODEL: Final = "hw.model"
HW_VENDOR: Final = "hw.vendor"
HW_SERIAL_NUMBER: Final = "hw.serial_number"
HW_DRIVER_VERSION: Final = "hw.driver_version"
HW_FIRMWARE_VERSION: Final = "hw.firmware_version"
HW_PARENT: Final = "hw.parent"
HW_STATE: Final = "hw.state"
HW_SENSOR_LOCATION: Final = "hw.sensor_location"
GPU_TASK: Final = "hw.gpu.task"
LOAD_PERIOD: Final = "periscope.host.load.period"
GPU_CLOCK: Final = "periscope.gpu.clock.domain"

OTHER: Final = "other"
"""What a label value becomes when its instrument has reached its limit of label sets."""


class Metric(NamedTuple):
    """A metric's name, UCUM unit and description."""

    name: str
    unit: str
    description: str


DURATION: Final = Metric(
    "threat.ingest.operation.duration",
    "s",
    "Duration of ingest operations; its count is the number of operations.",
)
ACTIVE: Final = Metric(
    "threat.ingest.operation.active",
    "{operation}",
    "Ingest operations that have begun and not yet settled.",
)
RETRIES: Final = Metric(
    "threat.ingest.operation.retries",
    "{retry}",
    "Attempts after the first, by the error of the attempt before.",
)
RECEIVED: Final = Metric(
    "threat.ingest.items.received", "{item}", "Items that ingest operations received."
)
CONVERTED: Final = Metric(
    "threat.ingest.items.converted", "{item}", "Items that ingest operations converted."
)
SETTLED: Final = Metric(
    "threat.ingest.items.settled",
    "{item}",
    "What became of received items: ingested, skipped, failed or unaccounted.",
)
LAST_SUCCESS: Final = Metric(
    "threat.ingest.feed.last_success.time",
    "s",
    "Unix time at which an operation of the feed last succeeded, wholly or in part.",
)
LAST_ITEM: Final = Metric(
    "threat.ingest.feed.last_item.time",
    "s",
    "Unix time at which the feed last delivered at least one item.",
)
BREAKER_STATES: Final = Metric(
    "circuit_breaker.state", "1", "1 for the state that a circuit breaker is in, 0 for the others."
)
BREAKER_TRANSITIONS: Final = Metric(
    "circuit_breaker.transitions", "{transition}", "Changes of the state of circuit breakers."
)
BREAKER_CALLS: Final = Metric(
    "circuit_breaker.calls", "{call}", "Calls that circuit breakers let pass, by how they ended."
)
BREAKER_REJECTIONS: Final = Metric(
    "circuit_breaker.rejections", "{call}", "Calls that circuit breakers did not let pass."
)
INTERNAL_ERRORS: Final = Metric(
    "periscope.internal_errors", "{error}", "Errors of the plugin itself, contained by it."
)
EXPORT_ITEMS: Final = Metric(
    "periscope.export.items",
    "{item}",
    "Spans and metric points by signal and what became of them: exported, failed or dropped.",
)
DEAD_LETTERS: Final = Metric(
    "dead_letter.letters", "{letter}", "Dead letters by state; pending ones are on their way."
)
DEAD_LETTER_PUTS: Final = Metric(
    "dead_letter.puts", "{letter}", "Dead letters that this process kept, by where."
)
DEAD_LETTER_REPLAYS: Final = Metric(
    "dead_letter.replays", "{letter}", "Replays of dead letters by this process, by how they ended."
)
DEAD_LETTERS_LOST: Final = Metric(
    "dead_letter.lost", "{letter}", "Dead letters that this process could not keep, by the reason."
)
DEAD_LETTER_AGE: Final = Metric(
    "dead_letter.oldest.age", "s", "Time since the dead letter failed that has waited for longest."
)
OUTBOX_LETTERS: Final = Metric(
    "periscope.outbox.letters", "{letter}", "Letters on this machine that the store has not taken."
)
OUTBOX_AGE: Final = Metric(
    "periscope.outbox.oldest.age", "s", "Time for which the oldest of them has waited."
)

# Host, process and hardware: the semantic conventions, then what these lack.
SYSTEM_CPU_TIME: Final = Metric(
    "system.cpu.time", "s", "Seconds that the CPUs have spent in each mode."
)
SYSTEM_CPU_UTILIZATION: Final = Metric(
    "system.cpu.utilization", "1", "Share of the CPUs' time spent in each mode."
)
SYSTEM_CPU_COUNT: Final = Metric("system.cpu.logical.count", "{cpu}", "Logical CPUs.")
SYSTEM_MEMORY_USAGE: Final = Metric("system.memory.usage", "By", "Memory by state.")
SYSTEM_MEMORY_UTILIZATION: Final = Metric(
    "system.memory.utilization", "1", "Share of the memory by state."
)
SYSTEM_MEMORY_LIMIT: Final = Metric("system.memory.limit", "By", "Size of the memory.")
SYSTEM_MEMORY_AVAILABLE: Final = Metric(
    "system.memory.linux.available", "By", "Memory that programs could still take without swapping."
)
SYSTEM_PAGING_USAGE: Final = Metric("system.paging.usage", "By", "Swap space by state.")
SYSTEM_DISK_IO: Final = Metric("system.disk.io", "By", "Bytes read from and written to disks.")
SYSTEM_DISK_OPERATIONS: Final = Metric(
    "system.disk.operations", "{operation}", "Reads from and writes to disks."
)
SYSTEM_FILESYSTEM_USAGE: Final = Metric(
    "system.filesystem.usage", "By", "Space of filesystems by state."
)
SYSTEM_FILESYSTEM_UTILIZATION: Final = Metric(
    "system.filesystem.utilization", "1", "Share of filesystems' space by state."
)
SYSTEM_NETWORK_IO: Final = Metric("system.network.io", "By", "Bytes received and transmitted.")
SYSTEM_NETWORK_ERRORS: Final = Metric("system.network.errors", "{error}", "Network errors.")
SYSTEM_NETWORK_DROPPED: Final = Metric(
    "system.network.packet.dropped", "{packet}", "Packets dropped though there was no error."
)
SYSTEM_UPTIME: Final = Metric("system.uptime", "s", "Time since the system was started.")
PROCESS_CPU_TIME: Final = Metric("process.cpu.time", "s", "CPU seconds of this process by mode.")
PROCESS_CPU_UTILIZATION: Final = Metric(
    "process.cpu.utilization", "1", "Share of the CPUs available to this process that it used."
)
PROCESS_MEMORY_USAGE: Final = Metric(
    "process.memory.usage", "By", "Physical memory of this process."
)
PROCESS_MEMORY_VIRTUAL: Final = Metric(
    "process.memory.virtual", "By", "Virtual memory of this process."
)
PROCESS_THREAD_COUNT: Final = Metric("process.thread.count", "{thread}", "Threads of this process.")
PROCESS_FILE_DESCRIPTORS: Final = Metric(
    "process.unix.file_descriptor.count",
    "{file_descriptor}",
    "Open file descriptors of this process.",
)
PROCESS_CONTEXT_SWITCHES: Final = Metric(
    "process.context_switches", "{context_switch}", "Context switches of this process by type."
)
PROCESS_PAGING_FAULTS: Final = Metric(
    "process.paging.faults", "{fault}", "Page faults of this process by type."
)
PROCESS_DISK_IO: Final = Metric(
    "process.disk.io", "By", "Bytes that this process read from and wrote to disks."
)
PROCESS_UPTIME: Final = Metric("process.uptime", "s", "Time since this process was started.")
GPU_UTILIZATION: Final = Metric(
    "hw.gpu.utilization", "1", "Share of time that the GPU spent on a task."
)
GPU_MEMORY_USAGE: Final = Metric("hw.gpu.memory.usage", "By", "GPU memory used.")
GPU_MEMORY_LIMIT: Final = Metric("hw.gpu.memory.limit", "By", "Size of the GPU memory.")
GPU_MEMORY_UTILIZATION: Final = Metric(
    "hw.gpu.memory.utilization", "1", "Share of the GPU memory used."
)
GPU_IO: Final = Metric("hw.gpu.io", "By", "Bytes received and transmitted by the GPU.")
HW_TEMPERATURE: Final = Metric("hw.temperature", "Cel", "Temperature.")
HW_POWER: Final = Metric("hw.power", "W", "Power drawn.")
HW_ENERGY: Final = Metric("hw.energy", "J", "Energy consumed.")
HW_ERRORS: Final = Metric("hw.errors", "{error}", "Errors of the component.")
HW_STATUS: Final = Metric(
    "hw.status", "1", "1 for the state that the component is in, 0 for the others."
)
HOST_LOAD: Final = Metric(
    "periscope.host.load", "{thread}", "Threads that run or wait to run, averaged over a period."
)
CONTAINER_MEMORY_LIMIT: Final = Metric(
    "periscope.container.memory.limit", "By", "Memory limit of the process's control group."
)
CONTAINER_CPU_LIMIT: Final = Metric(
    "periscope.container.cpu.limit", "{cpu}", "CPU quota of the process's control group."
)
GPU_POWER_LIMIT: Final = Metric("periscope.gpu.power.limit", "W", "Power that the GPU may draw.")
GPU_CLOCK_SPEED: Final = Metric("periscope.gpu.clock.speed", "Hz", "Clock speed of the GPU.")
GPU_REMAPPED_ROWS: Final = Metric(
    "periscope.gpu.remapped_rows", "{row}", "Memory rows that were replaced in the GPU's life."
)
GPU_PROCESS_MEMORY: Final = Metric(
    "periscope.gpu.process.memory.usage", "By", "GPU memory that this process uses."
)

DURATION_BOUNDARIES: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""Bucket boundaries in seconds: one item's conversion up to a ten-minute bulk pull.

All are floats: the Prometheus exporter prints an int boundary as `le="1"`, a float as `le="1.0"`.
"""
