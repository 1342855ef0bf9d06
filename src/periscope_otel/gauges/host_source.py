"""What a host reader asks a platform for, and in which form it is answered.

Names of devices are as the platform has them: they are looked up before they are told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from periscope_otel.gauges.stats import DiskStats, MemoryStats, NetworkStats, PagingStats


class CpuTimes(NamedTuple):
    """Seconds that CPUs have spent, by mode of the semantic conventions."""

    together: Mapping[str, float]
    each: Mapping[int, Mapping[str, float]]
    """By the number of the CPU; empty unless asked for."""


class ProcessSize(NamedTuple):
    """How large this process is, and for how long it runs."""

    memory: int
    """Bytes of physical memory."""
    virtual_memory: int
    """Bytes."""
    threads: int
    uptime: float
    """Seconds."""


class ProcessUsage(NamedTuple):
    """What this process, with all its threads, has used."""

    cpu_times: Mapping[str, float]
    """Seconds, `user` and `system`."""
    context_switches: Mapping[str, int]
    """`voluntary` and `involuntary`."""
    paging_faults: Mapping[str, int] | None
    """`minor` and `major`."""


class HostSource(Protocol):
    """Answers each question by itself: any of these may raise whatever it likes."""

    def cpu_count(self) -> int:
        """Return how many CPUs are in use."""
        ...

    def cpu_times(self, each: bool) -> CpuTimes:
        """Return what the CPUs have spent their time on, each by itself too if asked for."""
        ...

    def memory(self) -> MemoryStats:
        """Return the memory of the host."""
        ...

    def swaps(self) -> Sequence[PagingStats]:
        """Return the devices of swap space."""
        ...

    def disks(self, wanted: Callable[[str], bool]) -> Sequence[DiskStats]:
        """Return what the disks with wanted names have done."""
        ...

    def networks(self, wanted: Callable[[str], bool]) -> Sequence[NetworkStats]:
        """Return what the network interfaces with wanted names have done."""
        ...

    def load(self) -> tuple[float, float, float]:
        """Return the threads that run or wait, averaged over 1, 5 and 15 minutes."""
        ...

    def uptime(self) -> float:
        """Return the seconds since the system was started."""
        ...

    def process_size(self) -> ProcessSize:
        """Return how large this process is."""
        ...

    def process_usage(self) -> ProcessUsage:
        """Return what this process has used."""
        ...

    def process_io(self) -> Mapping[str, int]:
        """Return the bytes that this process has read from and written to disks."""
        ...

    def file_descriptors(self) -> int:
        """Return how many file descriptors this process has open."""
        ...

    def available_cpus(self) -> int:
        """Return how many CPUs the threads of this process may run on."""
        ...
