"""What was read, as typed structs: for the metrics, the console and whoever asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class CpuStats(NamedTuple):
    """All CPUs together, or one of them."""

    number: int | None
    """Which CPU, from 0; None for all together."""
    times: Mapping[str, float]
    """Seconds since the start of the system, by mode."""
    utilization: Mapping[str, float] | None
    """Share of the time since the reading before, by mode, from 0 to 1; None at first."""


class MemoryStats(NamedTuple):
    """Memory of the host, in bytes."""

    total: int
    used: int
    """What programs could not get: total less available."""
    free: int
    available: int
    buffers: int | None
    cached: int | None


class PagingStats(NamedTuple):
    """Swap space, in bytes."""

    used: int
    free: int


class DiskStats(NamedTuple):
    """One disk since the start of the system."""

    device: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int


class FilesystemStats(NamedTuple):
    """One mounted filesystem, in bytes."""

    device: str
    mountpoint: str
    type: str
    mode: str
    """`rw` or `ro`."""
    used: int
    free: int
    """What a program without privileges can still write."""
    reserved: int


class NetworkStats(NamedTuple):
    """One network interface since the start of the system."""

    interface: str
    received_bytes: int
    transmitted_bytes: int
    receive_errors: int
    transmit_errors: int
    receive_dropped: int
    transmit_dropped: int


class ContainerLimits(NamedTuple):
    """What the control group of the process may use; None where nothing limits it."""

    memory: int | None
    """Bytes."""
    cpus: float | None
    """CPUs' worth of time."""


class ProcessStats(NamedTuple):
    """This process; None stands for what the platform does not tell."""

    pid: int
    cpu_times: Mapping[str, float]
    """Seconds by mode."""
    cpu_utilization: Mapping[str, float] | None
    """Share of the CPUs available to it since the reading before, by mode; None at first."""
    memory: int
    """Bytes of physical memory."""
    virtual_memory: int
    """Bytes of virtual memory."""
    threads: int
    file_descriptors: int | None
    context_switches: Mapping[str, int]
    """`voluntary` and `involuntary`."""
    paging_faults: Mapping[str, int]
    """`minor` and `major`."""
    disk_io: Mapping[str, int] | None
    """Bytes, `read` and `write`."""
    uptime: float
    """Seconds."""


class SystemStats(NamedTuple):
    """The host and this process at one moment."""

    taken_at: float
    """Unix time in seconds."""
    cpu_count: int | None
    cpu: CpuStats
    cpus: tuple[CpuStats, ...]
    """Each CPU by itself; empty unless asked for."""
    memory: MemoryStats
    paging: PagingStats | None
    disks: tuple[DiskStats, ...]
    filesystems: tuple[FilesystemStats, ...]
    networks: tuple[NetworkStats, ...]
    load: tuple[float, float, float] | None
    """Threads that run or wait, averaged over 1, 5 and 15 minutes."""
    uptime: float
    """Seconds since the system was started."""
    container: ContainerLimits
    process: ProcessStats


class GpuIdentity(NamedTuple):
    """Which GPU it is; read once."""

    id: str
    """Unique and lasting: the UUID."""
    name: str
    """Short, such as `GPU 0`."""
    model: str | None = None
    vendor: str | None = None
    serial_number: str | None = None
    driver_version: str | None = None
    firmware_version: str | None = None
    parent: str | None = None
    """The `id` of the GPU that this one is a part of."""


class GpuDeviceStats(NamedTuple):
    """One GPU at one moment; None stands for what it does not tell."""

    identity: GpuIdentity
    state: str | None = None
    """`ok`, `degraded`, `predicted_failure` or `failed`."""
    utilization: Mapping[str, float] | None = None
    """Share of time by task: general, memory, encoder, decoder."""
    memory_total: int | None = None
    memory_used: int | None = None
    """Bytes; without what the driver reserves, where the driver tells these apart."""
    temperature: float | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts."""
    power_limit: float | None = None
    """Watts."""
    energy: float | None = None
    """Joules since the driver was loaded."""
    io: Mapping[str, int] | None = None
    """Bytes over PCIe, `receive` and `transmit`, as the GPU sees it."""
    errors: Mapping[str, int] | None = None
    """`corrected` and `uncorrected` ones of the memory, since the driver was loaded."""
    remapped_rows: Mapping[str, int] | None = None
    """Memory rows replaced in its life after `corrected` and `uncorrected` errors."""
    clocks: Mapping[str, float] | None = None
    """Hertz, `sm` and `memory`."""
    process_memory: int | None = None
    """Bytes that this process uses there; None where it does not use it."""


class GpuProblem(NamedTuple):
    """Why there are no GPU figures."""

    reason: str
    """A fixed word, such as `driver_not_loaded`."""
    message: str
    remedy: str


class GpuStats(NamedTuple):
    """All GPUs at one moment."""

    taken_at: float
    """Unix time in seconds."""
    devices: tuple[GpuDeviceStats, ...]
    problem: GpuProblem | None = None
    """Set where GPUs cannot be read, or not all of them."""
