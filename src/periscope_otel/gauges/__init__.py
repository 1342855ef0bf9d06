"""Host and GPU figures: sampled in the background, told by observable instruments.

Example:
    >>> import periscope_otel as periscope
    >>> gauges = periscope.instrument_gauges(gauges={"host"})
    >>> gauges.close()
"""

from periscope_otel.gauges.instrument import (
    Gauges,
    get_gpu_stats,
    get_system_stats,
    instrument_gauges,
)
from periscope_otel.gauges.stats import (
    ContainerLimits,
    CpuStats,
    DiskStats,
    FilesystemStats,
    GpuDeviceStats,
    GpuIdentity,
    GpuProblem,
    GpuStats,
    MemoryStats,
    NetworkStats,
    PagingStats,
    ProcessStats,
    SystemStats,
)

__all__ = [
    "ContainerLimits",
    "CpuStats",
    "DiskStats",
    "FilesystemStats",
    "Gauges",
    "GpuDeviceStats",
    "GpuIdentity",
    "GpuProblem",
    "GpuStats",
    "MemoryStats",
    "NetworkStats",
    "PagingStats",
    "ProcessStats",
    "SystemStats",
    "get_gpu_stats",
    "get_system_stats",
    "instrument_gauges",
]
